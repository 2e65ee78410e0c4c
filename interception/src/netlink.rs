//! nlink's errors in our words: the one place that reads what the kernel answered over netlink.
//!
//! Not here: requests. Those are in `nftables.rs`, `routes.rs` and `netns.rs`, beyond which no
//! nlink type goes.

use std::io;

use nlink::ErrorDetail;
use nlink::netlink::nftables::NftBatchFailure;

use crate::InterceptionError;

/// Turns a netlink failure of `operation` (a verb phrase) into ours: a missing capability and a
/// missing kernel module are told apart from the rest.
pub(crate) fn failed(operation: &'static str) -> impl FnOnce(nlink::Error) -> InterceptionError {
    move |error| {
        if error.is_permission_denied() {
            return InterceptionError::NotPermitted { operation, capability: "NET_ADMIN" };
        }
        let module = missing_module(&error);
        let source = into_io(error);
        match module {
            Some(module) => InterceptionError::Unsupported { operation, module, source },
            None => InterceptionError::Netlink { operation, source },
        }
    }
}

/// The error without nlink's type, its text kept.
pub(crate) fn into_io(error: nlink::Error) -> io::Error {
    io::Error::other(error)
}

/// The kernel module whose absence explains a refused nftables batch.
///
/// A missing chain or expression type is ENOENT, by `nf_tables_chain_type_lookup` and
/// `nft_expr_type_get` (net/netfilter/nf_tables_api.c); a kernel without nf_tables refuses the
/// whole batch with EOPNOTSUPP (`nfnetlink_rcv_batch`, net/netfilter/nfnetlink.c).
fn missing_module(error: &nlink::Error) -> Option<&'static str> {
    let ErrorDetail::NftBatch { failures, .. } = error.detail() else {
        return None;
    };
    failures.iter().find_map(module_of)
}

fn module_of(failure: &NftBatchFailure) -> Option<&'static str> {
    let errno = nix::errno::Errno::from_raw(failure.errno);
    let missing = errno == nix::errno::Errno::ENOENT || errno == nix::errno::Errno::EOPNOTSUPP;
    if !missing {
        return None;
    }
    if failure.index.is_none() {
        return Some("nf_tables");
    }
    if failure.operation.starts_with("add chain") {
        return failure.operation.contains("/nat_").then_some("nft_chain_nat");
    }
    let attribute = failure.attribute.as_deref()?;
    [("(redir)", "nft_redir"), ("(ct)", "nft_ct")]
        .into_iter()
        .find_map(|(name, module)| attribute.contains(name).then_some(module))
}

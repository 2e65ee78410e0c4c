//! Translates errors of nlink into [`InterceptionError`].

use std::io;

use nix::errno::Errno;
use nlink::ErrorDetail;
use nlink::netlink::nftables::NftBatchFailure;

use crate::error::InterceptionError;

/// Translates a netlink error of `operation` (a verb phrase). Distinguishes a missing capability, a
/// table that another program owns, a missing kernel module, and a loopback interface that is down.
pub(crate) fn failed(operation: &'static str) -> impl FnOnce(nlink::Error) -> InterceptionError {
    move |error| {
        if refusals(&error).iter().any(is_owned) {
            return InterceptionError::Owned { operation, source: into_io(error) };
        }
        if error.is_permission_denied() {
            return InterceptionError::NotPermitted { operation, capability: "NET_ADMIN" };
        }
        let module = refusals(&error).iter().find_map(missing_module);
        // All routes and addresses of a plan use the loopback interface.
        let down = error.errno().map(Errno::from_raw) == Some(Errno::ENETDOWN);
        let source = into_io(error);
        if down {
            return InterceptionError::LoopbackDown { operation, source };
        }
        match module {
            Some(module) => InterceptionError::Unsupported { operation, module, source },
            None => InterceptionError::Netlink { operation, source },
        }
    }
}

/// Converts the error to an `io::Error` with the same text.
pub(crate) fn into_io(error: nlink::Error) -> io::Error {
    io::Error::other(error)
}

/// The failed operations of an nftables batch.
fn refusals(error: &nlink::Error) -> &[NftBatchFailure] {
    match error.detail() {
        ErrorDetail::NftBatch { failures, .. } => failures,
        _ => &[],
    }
}

/// Returns true if another netlink socket owns the table (`nft_table_lookup`,
/// net/netfilter/nf_tables_api.c). Without NET_ADMIN, the kernel rejects the batch before any
/// operation (`nfnetlink_rcv`, net/netfilter/nfnetlink.c).
fn is_owned(failure: &NftBatchFailure) -> bool {
    failure.index.is_some() && Errno::from_raw(failure.errno) == Errno::EPERM
}

fn missing_module(failure: &NftBatchFailure) -> Option<&'static str> {
    let refused = failure.index.map(|_| failure.operation.as_str());
    module(refused, failure.attribute.as_deref(), Errno::from_raw(failure.errno))
}

/// The kernel module whose absence explains an error. `refused` is the failed operation of a batch,
/// `None` for the entire batch; `attribute` is the one that the kernel reports as the cause.
///
/// A missing chain or expression type gives ENOENT (`nf_tables_chain_type_lookup` and
/// `nft_expr_type_get`), a missing set type EOPNOTSUPP (`nft_select_set_ops`, all in
/// net/netfilter/nf_tables_api.c). A kernel without nf_tables rejects the batch with EOPNOTSUPP
/// (`nfnetlink_rcv_batch`, net/netfilter/nfnetlink.c).
fn module(refused: Option<&str>, attribute: Option<&str>, errno: Errno) -> Option<&'static str> {
    /// Expressions and the modules that implement them. Newer kernels have some of them built in.
    const EXPRESSIONS: [(&str, &str); 7] = [
        ("(counter)", "nft_counter"),
        ("(ct)", "nft_ct"),
        ("(redir)", "nft_redir"),
        ("(reject)", "nft_reject_inet"),
        ("(socket)", "nft_socket"),
        ("(tproxy)", "nft_tproxy"),
        ("(fib)", "nft_fib_inet"),
    ];
    match (refused, errno) {
        (None, Errno::ENOENT | Errno::EOPNOTSUPP) => Some("nf_tables"),
        (Some(operation), Errno::EOPNOTSUPP) if operation.starts_with("add set") => {
            Some("nf_tables_set")
        }
        (Some(operation), Errno::ENOENT | Errno::EOPNOTSUPP)
            if operation.starts_with("add chain") =>
        {
            operation.contains("/nat_").then_some("nft_chain_nat")
        }
        (Some(_), Errno::ENOENT) => {
            let mut expressions = EXPRESSIONS.into_iter();
            expressions.find_map(|(name, module)| attribute?.contains(name).then_some(module))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_error_names_missing_module() {
        const NO_ATTRIBUTE: Option<&str> = None;
        for (refused, attribute, errno, expected) in [
            (None, NO_ATTRIBUTE, Errno::EOPNOTSUPP, Some("nf_tables")),
            (
                Some("add set inet underpass/x"),
                NO_ATTRIBUTE,
                Errno::EOPNOTSUPP,
                Some("nf_tables_set"),
            ),
            (
                Some("add chain inet underpass/nat_output"),
                NO_ATTRIBUTE,
                Errno::ENOENT,
                Some("nft_chain_nat"),
            ),
            (Some("add chain inet underpass/mangle_output"), NO_ATTRIBUTE, Errno::ENOENT, None),
            (
                Some("add rule inet underpass/x"),
                Some("expression #4 (redir)"),
                Errno::ENOENT,
                Some("nft_redir"),
            ),
            (
                Some("add rule inet underpass/x"),
                Some("expression #1 (tproxy)"),
                Errno::ENOENT,
                Some("nft_tproxy"),
            ),
            (Some("add rule inet underpass/x"), Some("attribute 3"), Errno::ENOENT, None),
            (Some("add rule inet underpass/x"), NO_ATTRIBUTE, Errno::EINVAL, None),
        ] {
            assert_eq!(
                module(refused, attribute, errno),
                expected,
                "{refused:?} {attribute:?} {errno}"
            );
        }
    }
}

//! What can go wrong while traffic is caught, said for the operator who has to put it right.
//!
//! Not here: errors of single connections. Those are `std::io::Error`, as the system call gave
//! them.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use crate::privileges::{MissingCapabilities, ProxyUser};

/// Why interception cannot be set up, read or removed.
///
/// `Display` says only this level; the inner error is the `source()`.
#[derive(Debug, thiserror::Error)]
pub enum InterceptionError {
    /// The kernel wants a capability that the process does not have.
    #[error(
        "cannot {operation}: the capability {capability} is missing; grant it with \
         `securityContext.capabilities.add: [{capability}]` in a pod, `--cap-add {capability}` in a container, \
         or run as root"
    )]
    NotPermitted {
        /// What was tried, as a verb phrase.
        operation: &'static str,
        /// The capability, without `CAP_`.
        capability: &'static str,
    },
    /// The rules would catch the traffic of a whole host.
    #[error(
        "the rules would be installed in the host's own network namespace ({why}); run in the pod's or \
         container's namespace, or set `interception.allow_host: true` if the whole host is meant"
    )]
    HostNamespace {
        /// What gave the host away.
        why: String,
    },
    /// The kernel lacks a part of netfilter.
    #[error(
        "cannot {operation}: the kernel has no {module}; load it on the host with `modprobe {module}`, \
         or build it into the kernel"
    )]
    Unsupported {
        /// What was tried, as a verb phrase.
        operation: &'static str,
        /// The kernel module that provides what is missing.
        module: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a netlink request.
    #[error("cannot {operation}: the kernel refused it")]
    Netlink {
        /// What was tried, as a verb phrase.
        operation: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The routes that lead to the loopback interface cannot be made while it is down.
    #[error("cannot {operation}: the loopback interface is down; `ip link set lo up` sets it up")]
    LoopbackDown {
        /// What was tried, as a verb phrase.
        operation: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The kernel drops what TPROXY marks before the proxy gets it.
    #[error(
        "inbound connections would hang: interception.inbound.mode is tproxy, and the kernel drops what so arrives by \
         {interface}, since it looks for clients' addresses with the mark too and finds them here; set the sysctl \
         net.ipv4.conf.all.src_valid_mark and net.ipv4.conf.{interface}.src_valid_mark to 0 (or \
         net.ipv4.conf.{interface}.accept_local to 1), or interception.inbound.mode: redirect"
    )]
    ClientsRefused {
        /// By which interface they come.
        interface: String,
    },
    /// The profile tells the proxy by its user, and this process is another's.
    #[error(
        "the rules know the proxy by its user ({} or group {}), but this process is user {is} and cannot become that \
         one without these capabilities: {missing}; its connections would be caught again. Grant them \
         (`securityContext.capabilities.add: [{missing}]`, `--cap-add`), start it as that user \
         (`securityContext.runAsUser: {}`), or set `interception.proxy_uids`",
        user.uid, user.gid, user.uid
    )]
    WrongUser {
        /// The user of this process.
        is: u32,
        /// Whom the rules know.
        user: ProxyUser,
        /// What would let it become that user.
        missing: MissingCapabilities,
    },
    /// The process cannot become the proxy's user.
    #[error(
        "cannot become user {} and group {}, by which the rules know the proxy: does the user namespace have them? \
         See `interception.proxy_uids` and `interception.proxy_gids`",
        user.uid, user.gid
    )]
    BecomeUser {
        /// Whom the rules know.
        user: ProxyUser,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// A listener cannot be opened.
    #[error("cannot listen on {address} for {purpose}: {}", listen_advice(source, setting))]
    Listen {
        /// What the listener is for.
        purpose: &'static str,
        /// Where it was to listen.
        address: SocketAddr,
        /// The setting that chooses the address.
        setting: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// A network namespace cannot be made, opened, entered, wired or deleted.
    #[error("cannot {operation} the network namespace {namespace}")]
    Namespace {
        /// What was tried, as a verb phrase that the namespace follows: `open`, `run code in`.
        operation: &'static str,
        /// The path of the namespace.
        namespace: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// Our table belongs to another netlink socket, which alone may change it.
    #[error(
        "cannot {operation}: the nftables table `inet underpass` belongs to another program, which alone may change it \
         and takes it along when it ends; stop that program (`nft list ruleset` names it)"
    )]
    Owned {
        /// What was tried, as a verb phrase.
        operation: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// A program of iptables cannot be run.
    #[error(
        "cannot run `{program}`: {}choose another backend with `interception.backend`",
        install_advice(source)
    )]
    IptablesProgram {
        /// The program.
        program: String,
        /// Why not; `TimedOut`: it ran, and did not end.
        #[source]
        source: io::Error,
    },
    /// A program of iptables failed.
    #[error("cannot {operation}: `{program}` says: {message}{}", module_advice(*module))]
    Iptables {
        /// What was tried, as a verb phrase.
        operation: &'static str,
        /// The program.
        program: String,
        /// What it printed, in one line.
        message: String,
        /// The kernel module whose absence would explain it.
        module: Option<&'static str>,
    },
    /// iptables refuses a user or group that the user namespace does not have.
    #[error(
        "iptables cannot tell the {kind} {id}: this user namespace has none of that number; set \
         `interception.backend: nftables`, which can, or choose another with `interception.proxy_{}ids` or in \
         `interception.outbound`",
        kind.get(..1).unwrap_or_default()
    )]
    IptablesOwner {
        /// `user` or `group`.
        kind: &'static str,
        /// Its number.
        id: u32,
    },
    /// iptables-nft cannot read a table.
    #[error(
        "cannot {operation}: iptables cannot read the table {table}, because another program put rules into it \
         that only nft understands; set `interception.backend: nftables`"
    )]
    IptablesIncompatible {
        /// What was tried, as a verb phrase.
        operation: &'static str,
        /// The table.
        table: String,
    },
    /// The rules of a family could not be installed with iptables.
    #[error("cannot install the {family} rules with iptables; {}", undone_advice(*undone))]
    IptablesNotInstalled {
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// Whether all rules, of both families, are again as they were before.
        undone: bool,
        /// What failed.
        #[source]
        source: Box<Self>,
    },
    /// Private namespaces for tests and demonstrations cannot be made.
    #[error("cannot {step} for a sandbox: {remedy}")]
    Sandbox {
        /// What was tried, as a verb phrase.
        step: &'static str,
        /// What the operator can do about it.
        remedy: SandboxRemedy,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
}

impl InterceptionError {
    /// Whether a setting of ours, rather than the machine, has to change.
    #[must_use]
    pub fn is_configuration(&self) -> bool {
        matches!(
            self,
            Self::HostNamespace { .. }
                | Self::Listen { .. }
                | Self::WrongUser { .. }
                | Self::IptablesProgram { .. }
                | Self::IptablesOwner { .. }
                | Self::IptablesIncompatible { .. }
        )
    }

    /// Whether a program that would be needed is not installed.
    pub(crate) fn is_missing_program(&self) -> bool {
        matches!(self, Self::IptablesProgram { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// What lets a sandbox be made where it could not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxRemedy {
    /// The process already has several threads: the kernel moves only single-threaded ones.
    SingleThread,
    /// User namespaces are forbidden to this user.
    UserNamespaces,
    /// Nothing that we know of.
    Unknown,
}

impl fmt::Display for SandboxRemedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SingleThread => "it must be entered before the process starts a second thread",
            Self::UserNamespaces => {
                "user namespaces are forbidden here; allow them with `sysctl kernel.unprivileged_userns_clone=1`, \
                 `sysctl kernel.apparmor_restrict_unprivileged_userns=0` or `sysctl user.max_user_namespaces=10000` \
                 (whichever this kernel has), or run as root"
            }
            Self::Unknown => "the kernel refused it",
        })
    }
}

/// The likely cause in words, and the setting to change.
fn listen_advice(source: &io::Error, setting: &str) -> String {
    match source.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another process already listens there; stop it, take over from it if it is underpass (`run --take-over`), or \
             choose another port with `{setting}`"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "the kernel does not permit it; a port below 1024 needs NET_BIND_SERVICE and a marked socket \
             NET_ADMIN, otherwise choose another port with `{setting}`"
        ),
        io::ErrorKind::AddrNotAvailable => {
            format!("no interface here has this address; correct `{setting}`")
        }
        _ => format!("the address comes from `{setting}`"),
    }
}

/// Whether a package is missing.
fn install_advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "install the package `iptables`, or ",
        io::ErrorKind::TimedOut => {
            "it does not end; another program may hold the lock /run/xtables.lock; end that, or "
        }
        _ => "",
    }
}

fn module_advice(module: Option<&'static str>) -> String {
    let Some(module) = module else { return String::new() };
    // Of a table, legacy iptables says the same whichever is missing.
    let capability = if module.contains("table_") {
        ", or the capability NET_RAW is missing, which legacy iptables needs besides NET_ADMIN"
    } else {
        ""
    };
    format!(
        "; the kernel has no {module} (load it on the host with `modprobe {module}`, or build it into the \
         kernel){capability}"
    )
}

fn undone_advice(undone: bool) -> &'static str {
    if undone {
        "the rules are as they were before"
    } else {
        "nor could all be put back that was there before: remove the rest with `underpass rules remove`"
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    fn listen(kind: io::ErrorKind) -> InterceptionError {
        InterceptionError::Listen {
            purpose: "captured outbound connections",
            address: SocketAddr::from(([0, 0, 0, 0], 15001)),
            setting: "proxy.outbound_port",
            source: io::Error::from(kind),
        }
    }

    #[test]
    fn a_taken_port_is_explained_and_names_the_setting() {
        let message = listen(io::ErrorKind::AddrInUse).to_string();
        assert!(message.contains("another process already listens"), "{message}");
        assert!(message.contains("proxy.outbound_port"), "{message}");
    }

    #[test]
    fn a_forbidden_port_is_explained() {
        let message = listen(io::ErrorKind::PermissionDenied).to_string();
        assert!(message.contains("NET_BIND_SERVICE"), "{message}");
    }

    #[test]
    fn a_message_leaves_its_source_to_the_chain() {
        for kind in [io::ErrorKind::AddrInUse, io::ErrorKind::OutOfMemory] {
            let error = listen(kind);
            let source = error.source().expect("a source").to_string();
            assert!(!error.to_string().contains(&source), "{error}");
        }
    }

    #[test]
    fn the_host_refusal_names_the_setting_that_allows_it() {
        let error = InterceptionError::HostNamespace { why: "test".to_owned() };
        assert!(error.to_string().contains("interception.allow_host"));
        assert!(error.is_configuration());
    }
}

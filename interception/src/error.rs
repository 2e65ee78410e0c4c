//! What can go wrong while traffic is caught, said for the operator who has to put it right.
//!
//! Not here: errors of single connections. Those are `std::io::Error`, as the system call gave
//! them.

use std::fmt;
use std::io;
use std::net::SocketAddr;

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
        matches!(self, Self::HostNamespace { .. } | Self::Listen { .. })
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
            "another process already listens there; stop it, or choose another port with `{setting}`"
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

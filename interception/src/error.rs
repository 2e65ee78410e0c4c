//! The errors of installing, verifying and removing interception.
//!
//! `error::hint` has the hints for the operator. Errors of single connections are plain
//! `std::io::Error`s.

mod hint;

use std::io;
use std::net::SocketAddr;

use crate::process::privileges::{MissingCapabilities, ProxyUser};

/// The reason why interception cannot be installed, read or removed.
///
/// `Display` prints only this level; the cause is the `source()`.
#[derive(Debug, thiserror::Error)]
pub enum InterceptionError {
    /// The process lacks a capability.
    #[error("cannot {operation}: the capability {capability} is missing")]
    NotPermitted {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The capability, without `CAP_`.
        capability: &'static str,
    },
    /// The rules would capture the traffic of an entire host.
    #[error("cannot install the rules: this is the host's own network namespace ({why})")]
    HostNamespace {
        /// The evidence that this is the host's namespace.
        why: String,
    },
    /// The kernel lacks a module of netfilter.
    #[error("cannot {operation}: the kernel has no {module}")]
    Unsupported {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The missing kernel module.
        module: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// The kernel rejected a netlink request.
    #[error("cannot {operation}: the kernel rejected the request")]
    Netlink {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// Routes through the loopback interface cannot be added while it is down.
    #[error("cannot {operation}: the loopback interface is down")]
    LoopbackDown {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// With TPROXY, the kernel's source validation would drop all inbound packets.
    #[error(
        "cannot use interception.inbound.mode: tproxy: the kernel would drop all inbound connections on {interface}, \
         because src_valid_mark makes it treat clients' addresses as local"
    )]
    InboundDropped {
        /// The interface at which connections arrive.
        interface: String,
    },
    /// The rules identify the proxy by its user, but this process runs as a different one and
    /// cannot switch.
    #[error(
        "cannot run as user {is}: the rules identify the proxy by user {} or group {} and would capture its \
         connections, and switching to that user requires the capabilities {missing}",
        user.uid, user.gid
    )]
    WrongUser {
        /// The user of this process.
        is: u32,
        /// The user that the rules identify as the proxy.
        user: ProxyUser,
        /// The capabilities for switching to that user.
        missing: MissingCapabilities,
    },
    /// The process cannot switch to the proxy's user.
    #[error(
        "cannot switch to user {} and group {}, which the rules identify as the proxy",
        user.uid, user.gid
    )]
    BecomeUser {
        /// The user that the rules identify as the proxy.
        user: ProxyUser,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A listener cannot be opened.
    #[error("cannot listen on {address} for {purpose}")]
    Listen {
        /// The purpose of the listener.
        purpose: &'static str,
        /// The address of the listener.
        address: SocketAddr,
        /// The setting that contains the address.
        setting: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A socket or another object of a namespace cannot be opened or read.
    #[error("cannot {operation}")]
    Socket {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A privileged operation returned a reply of the wrong kind.
    #[error("a privileged operation returned an unexpected reply: {0}")]
    UnexpectedReply(String),
    /// A network namespace cannot be created, opened, entered, connected or deleted.
    #[error("cannot {operation} the network namespace {namespace}")]
    Namespace {
        /// The failed operation as a verb phrase with the namespace as its object: `open`, `run
        /// code in`.
        operation: &'static str,
        /// The path of the namespace.
        namespace: String,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// Another netlink socket owns the table exclusively.
    #[error(
        "cannot {operation}: another program owns the nftables table `inet underpass` exclusively"
    )]
    Owned {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A program of iptables cannot be run.
    #[error("cannot run `{program}`")]
    IptablesProgram {
        /// The program.
        program: String,
        /// The cause. `TimedOut` if the program did not end in time.
        #[source]
        source: io::Error,
    },
    /// A program of iptables failed.
    #[error("cannot {operation}: `{program}` failed: {message}")]
    Iptables {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The program.
        program: String,
        /// The program's output in one line.
        message: String,
        /// The kernel module whose absence explains the failure, if known.
        module: Option<&'static str>,
    },
    /// iptables rejects a user or group outside of the user namespace.
    #[error("cannot match {kind} {id} with iptables: it does not exist in this user namespace")]
    IptablesOwner {
        /// `user` or `group`.
        kind: &'static str,
        /// The user id or group id.
        id: u32,
    },
    /// iptables-nft cannot read a table.
    #[error(
        "cannot {operation}: iptables cannot read the table {table}, because another program added rules that only \
         nft supports"
    )]
    IptablesIncompatible {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The table.
        table: String,
    },
    /// iptables did not install the rules of one family.
    #[error("cannot install the {family} rules with iptables, and {}", undone_result(*undone))]
    IptablesNotInstalled {
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// True if the previous rules of both families were restored.
        undone: bool,
        /// The cause.
        #[source]
        source: Box<Self>,
    },
    /// A sandbox for tests and demonstrations cannot be created.
    #[error("cannot create a sandbox: cannot {step}")]
    Sandbox {
        /// The failed operation as a verb phrase.
        step: &'static str,
        /// The remedy for the operator.
        remedy: SandboxRemedy,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
}

impl InterceptionError {
    /// Returns true if a setting is the cause, false if the machine is.
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

    /// Returns true if another socket listens at the address of a listener.
    #[must_use]
    pub fn is_address_in_use(&self) -> bool {
        let in_use = |source: &io::Error| source.kind() == io::ErrorKind::AddrInUse;
        matches!(self, Self::Listen { source, .. } if in_use(source))
    }

    /// Returns true if the loopback interface is down.
    #[must_use]
    pub fn is_loopback_down(&self) -> bool {
        matches!(self, Self::LoopbackDown { .. })
    }

    /// Returns true if a required program is not installed.
    pub(crate) fn is_missing_program(&self) -> bool {
        matches!(self, Self::IptablesProgram { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// The condition under which a sandbox can be created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxRemedy {
    /// The process must have a single thread.
    SingleThread,
    /// User namespaces must be permitted.
    UserNamespaces,
    /// The condition is unknown.
    Unknown,
}

/// Converts an error of opening a socket into the error of its connection.
impl From<InterceptionError> for io::Error {
    fn from(error: InterceptionError) -> Self {
        match error {
            InterceptionError::Socket { source, .. } => source,
            other => Self::other(other),
        }
    }
}

fn undone_result(undone: bool) -> &'static str {
    if undone {
        "the previous rules are restored"
    } else {
        "the previous rules could not be restored"
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    pub(super) fn listen(kind: io::ErrorKind) -> InterceptionError {
        InterceptionError::Listen {
            purpose: "captured outbound connections",
            address: SocketAddr::from(([0, 0, 0, 0], 15001)),
            setting: "proxy.outbound_port",
            source: io::Error::from(kind),
        }
    }

    #[test]
    fn message_omits_its_source() {
        for kind in [io::ErrorKind::AddrInUse, io::ErrorKind::OutOfMemory] {
            let error = listen(kind);
            let source = error.source().expect("a source").to_string();
            assert!(!error.to_string().contains(&source), "{error}");
        }
    }
}

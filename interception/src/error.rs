//! The errors of installing, verifying and removing interception, with remedies for the operator.
//!
//! Errors of single connections are plain `std::io::Error`s.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use crate::process::privileges::{MissingCapabilities, ProxyUser};

/// The reason why interception cannot be installed, read or removed.
///
/// `Display` prints only this level; the cause is the `source()`.
#[derive(Debug, thiserror::Error)]
pub enum InterceptionError {
    /// The process lacks a capability.
    #[error(
        "cannot {operation}: the capability {capability} is missing; grant it with \
         `securityContext.capabilities.add: [{capability}]` in a pod, `--cap-add {capability}` in a container, \
         or run as root"
    )]
    NotPermitted {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The capability, without `CAP_`.
        capability: &'static str,
    },
    /// The rules would capture the traffic of an entire host.
    #[error(
        "cannot install the rules: this is the host's own network namespace ({why}); run in the namespace of a \
         pod or container, or set `interception.allow_host: true` to capture the entire host"
    )]
    HostNamespace {
        /// The evidence that this is the host's namespace.
        why: String,
    },
    /// The kernel lacks a module of netfilter.
    #[error(
        "cannot {operation}: the kernel has no {module}; load it on the host with `modprobe {module}`, \
         or build it into the kernel"
    )]
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
    #[error(
        "cannot {operation}: the loopback interface is down; enable it with `ip link set lo up`"
    )]
    LoopbackDown {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// Source validation of the kernel would drop the packets that TPROXY marks.
    #[error(
        "cannot use interception.inbound.mode: tproxy: the kernel would drop all inbound connections on {interface}, \
         because src_valid_mark makes it treat clients' addresses as local; set the sysctls \
         net.ipv4.conf.all.src_valid_mark and net.ipv4.conf.{interface}.src_valid_mark to 0 (or \
         net.ipv4.conf.{interface}.accept_local to 1), or interception.inbound.mode: redirect"
    )]
    InboundDropped {
        /// The interface at which connections arrive.
        interface: String,
    },
    /// The rules identify the proxy by its user, and this process runs as a different one.
    #[error(
        "cannot run as user {is}: the rules identify the proxy by user {} or group {} and would capture its \
         connections, and switching to that user requires the capabilities {missing}; grant them \
         (`securityContext.capabilities.add: [{missing}]`, `--cap-add`), start the process as that user \
         (`securityContext.runAsUser: {}`), or set `interception.proxy_uids`",
        user.uid, user.gid, user.uid
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
        "cannot switch to user {} and group {}, which the rules identify as the proxy; check that the user namespace \
         contains them (`interception.proxy_uids`, `interception.proxy_gids`)",
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
    #[error("cannot listen on {address} for {purpose}: {}", listen_advice(source, setting))]
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
    /// A socket, or what belongs to a namespace besides its rules, cannot be opened or read.
    #[error("cannot {operation}")]
    Socket {
        /// The operation, as a verb phrase.
        operation: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A privileged operation was answered with another reply than its request has.
    #[error("a privileged operation was answered with {0}")]
    UnexpectedReply(String),
    /// A network namespace cannot be created, opened, entered, connected or deleted.
    #[error("cannot {operation} the network namespace {namespace}")]
    Namespace {
        /// The failed operation as a verb phrase before the namespace: `open`, `run code in`.
        operation: &'static str,
        /// The path of the namespace.
        namespace: String,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// Another netlink socket owns the table exclusively.
    #[error(
        "cannot {operation}: another program owns the nftables table `inet underpass` exclusively; stop that program, \
         which also removes the table (`nft list ruleset` prints its name)"
    )]
    Owned {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A program of iptables cannot be run.
    #[error(
        "cannot run `{program}`{}choose another backend with `interception.backend`",
        install_advice(source)
    )]
    IptablesProgram {
        /// The program.
        program: String,
        /// The error; `TimedOut` if the program did not finish.
        #[source]
        source: io::Error,
    },
    /// A program of iptables failed.
    #[error("cannot {operation}: `{program}` failed: {message}{}", module_advice(*module))]
    Iptables {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The program.
        program: String,
        /// Its output in one line.
        message: String,
        /// The kernel module whose absence would explain the failure.
        module: Option<&'static str>,
    },
    /// iptables rejects a user or group outside of the user namespace.
    #[error(
        "cannot match {kind} {id} with iptables: it does not exist in this user namespace; set \
         `interception.backend: nftables`, which accepts any id, or choose another with \
         `interception.proxy_{}ids` or in `interception.outbound`",
        kind.get(..1).unwrap_or_default()
    )]
    IptablesOwner {
        /// `user` or `group`.
        kind: &'static str,
        /// Its id.
        id: u32,
    },
    /// iptables-nft cannot read a table.
    #[error(
        "cannot {operation}: iptables cannot read the table {table}, because another program added rules that only \
         nft supports; set `interception.backend: nftables`"
    )]
    IptablesIncompatible {
        /// The failed operation as a verb phrase.
        operation: &'static str,
        /// The table.
        table: String,
    },
    /// The rules of a family cannot be installed with iptables.
    #[error("cannot install the {family} rules with iptables; {}", undone_advice(*undone))]
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
    #[error("cannot {step} for a sandbox: {remedy}")]
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
    /// Returns true if a setting is wrong, rather than the machine.
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
    /// Unknown.
    Unknown,
}

/// The error of a connection for which a socket could not be opened.
impl From<InterceptionError> for io::Error {
    fn from(error: InterceptionError) -> Self {
        match error {
            InterceptionError::Socket { source, .. } => source,
            other => Self::other(other),
        }
    }
}

impl fmt::Display for SandboxRemedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SingleThread => "the process has several threads; enter the sandbox before the second one starts",
            Self::UserNamespaces => {
                "user namespaces are not permitted; allow them with `sysctl kernel.unprivileged_userns_clone=1`, \
                 `sysctl kernel.apparmor_restrict_unprivileged_userns=0` or `sysctl user.max_user_namespaces=10000` \
                 (depending on the kernel), or run as root"
            }
            Self::Unknown => "the kernel rejected the request",
        })
    }
}

/// The likely cause, and the setting to change.
fn listen_advice(source: &io::Error, setting: &str) -> String {
    match source.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another process already listens there; stop it, take over from it if it is underpass (`run --take-over`), \
             or choose another port with `{setting}`"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "the kernel does not permit it; grant NET_BIND_SERVICE for a port below 1024 and NET_ADMIN for a marked \
             socket, or choose another port with `{setting}`"
        ),
        io::ErrorKind::AddrNotAvailable => {
            format!("no interface has this address; correct `{setting}`")
        }
        _ => format!("the kernel rejected it; the address is set by `{setting}`"),
    }
}

/// The likely cause and remedy, up to the choice of another backend.
fn install_advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => ": it is not installed; install the package `iptables`, or ",
        io::ErrorKind::TimedOut => {
            ": it did not finish; another program may hold the lock /run/xtables.lock; stop that program, or "
        }
        _ => "; ",
    }
}

fn module_advice(module: Option<&'static str>) -> String {
    let Some(module) = module else { return String::new() };
    // For tables, legacy iptables reports a missing module and a missing NET_RAW alike.
    let capability = if module.contains("table_") {
        ", or the capability NET_RAW is missing, which legacy iptables needs in addition to NET_ADMIN"
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
        "the previous rules are restored"
    } else {
        "the previous rules could not be restored; remove the rest with `underpass rules remove`"
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
    fn listen_error_names_setting_of_port_in_use() {
        let message = listen(io::ErrorKind::AddrInUse).to_string();
        assert!(message.contains("another process already listens"), "{message}");
        assert!(message.contains("proxy.outbound_port"), "{message}");
    }

    #[test]
    fn listen_error_names_capability_for_privileged_port() {
        let message = listen(io::ErrorKind::PermissionDenied).to_string();
        assert!(message.contains("NET_BIND_SERVICE"), "{message}");
    }

    #[test]
    fn message_omits_its_source() {
        for kind in [io::ErrorKind::AddrInUse, io::ErrorKind::OutOfMemory] {
            let error = listen(kind);
            let source = error.source().expect("a source").to_string();
            assert!(!error.to_string().contains(&source), "{error}");
        }
    }

    #[test]
    fn host_namespace_error_names_setting_that_allows_it() {
        let error = InterceptionError::HostNamespace { why: "test".to_owned() };
        assert!(error.to_string().contains("interception.allow_host"));
        assert!(error.is_configuration());
    }
}

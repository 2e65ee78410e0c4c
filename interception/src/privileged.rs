//! The operations in a pod's namespace that take privileges, as messages: what is asked and what is
//! answered is plain data and descriptors, so that another process can perform them.
//!
//! [`NamespaceAccess`] asks (`access.rs`), and the namespaces thread performs (`operations.rs`).
//! Not here: what each operation does.

mod access;
mod operations;

use std::fmt;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;

use underpass_config::{InterceptionSettings, Profile};

use crate::backend::Backend;
use crate::backend::foreign::ForeignRule;
use crate::backend::iptables::RemovalScope;
use crate::backend::leftovers::{Leftover, LegacyTables};
use crate::backend::nftables::RuleCounter;
use crate::backend::verify::Difference;
use crate::error::InterceptionError;
use crate::plan::{Environment, Ports};
use crate::process::bypass::BypassingProcess;
use crate::rules::RuleSettings;
use crate::self_test::ProbeSockets;
use crate::self_test::return_path::ReturnPathProbe;
use crate::sockets::listener::BoundListener;
use crate::sockets::local::LocalAddresses;
use crate::sockets::socket::{ListenerRequest, ReadySocket, SocketKind, Sockets};
use crate::watching::{Watched, Watching};

pub use access::NamespaceAccess;

/// Performs privileged operations in one pod's namespace.
pub trait PrivilegedOperations: fmt::Debug + Send + Sync {
    /// Performs what is asked. It is done to its end if the caller stops waiting.
    ///
    /// # Errors
    ///
    /// Those of the operation, and that it cannot be performed in the namespace.
    fn perform(&self, request: Request) -> Performing;
}

/// The answer to come.
pub type Performing = Pin<Box<dyn Future<Output = Result<Reply, InterceptionError>> + Send>>;

/// What is asked for.
#[derive(Debug)]
pub enum Request {
    /// Nothing; answered when every operation that was asked for before is done.
    Barrier,
    /// The interfaces that are up, and their addresses.
    Environment,
    /// Whether IPv6 is enabled on the loopback interface.
    Ipv6OnLoopback,
    /// Which of these addresses a socket can be bound to.
    UsableAddresses(Vec<IpAddr>),
    /// Fails if the kernel drops what TPROXY marks.
    CheckReversePath(InterceptionSettings),
    /// Other processes that can bypass the rules of a profile.
    BypassingProcesses(Profile),
    /// Sockets to connect.
    OpenSockets {
        /// How they are made.
        sockets: Sockets,
        /// What they are for.
        kind: SocketKind,
        /// At most so many, and at least one.
        count: usize,
    },
    /// A listener.
    Listen {
        /// How it is made.
        sockets: Sockets,
        /// Where it listens.
        listener: ListenerRequest,
    },
    /// A socket that tells the namespace's own addresses.
    OpenLocalAddresses,
    /// The sockets of the self-test.
    OpenProbes,
    /// The sockets of the self-test of the return path, for the rules of these settings.
    OpenReturnPath {
        /// How traffic is caught.
        settings: InterceptionSettings,
        /// The proxy's ports.
        ports: Ports,
    },
    /// Whether and how rules can be installed.
    PrepareRules(InterceptionSettings),
    /// Something about the rules of these settings.
    Rules {
        /// Which rules.
        rules: Arc<RuleSettings>,
        /// What about them.
        operation: RuleOperation,
    },
    /// How often each rule of our nftables table matched, whatever installed it.
    TableCounters,
    /// Removes whatever underpass ever installed.
    RemoveEverything {
        /// Whose rules are removed.
        scope: RemovalScope,
        /// Whether this may be the host's own namespace.
        allow_host: bool,
    },
    /// Descriptors that become readable when rules, routes or addresses change.
    Watch(Watched),
    /// The kernel's lists of legacy iptables' tables.
    OpenLegacyTables,
}

/// What is done with rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleOperation {
    /// Install routes and rules, and remove the blackhole.
    Install,
    /// Install routes and rules, and leave the blackhole.
    Repair,
    /// Install the routes and addresses alone, if IPv6 is enabled on the loopback interface.
    InstallRoutes,
    /// Write beside the rules which process installed them.
    MarkOwner,
    /// Compare what is installed with the plan.
    Verify,
    /// Install the blackhole.
    Block,
    /// Remove the blackhole.
    Unblock,
    /// Whether the blackhole is installed.
    IsBlocked,
    /// How often each rule matched.
    Counters,
    /// Remove rules, routes and blackhole.
    Remove,
    /// Rules of older runs and of other meshes.
    Leftovers,
    /// Rules of other programs that act before ours.
    ForeignRules,
}

/// What is answered: to each request always the same one.
#[derive(Debug)]
pub enum Reply {
    /// It is done.
    Done,
    /// Whether it is so, or whether something was changed.
    Is(bool),
    /// See [`Request::Environment`].
    Environment(Environment),
    /// See [`Request::UsableAddresses`].
    Addresses(Vec<IpAddr>),
    /// See [`Request::BypassingProcesses`].
    Processes(Vec<BypassingProcess>),
    /// See [`Request::OpenSockets`].
    Sockets(Vec<ReadySocket>),
    /// See [`Request::Listen`].
    Listener(BoundListener),
    /// See [`Request::OpenLocalAddresses`].
    LocalAddresses(LocalAddresses),
    /// See [`Request::OpenProbes`].
    Probes(ProbeSockets),
    /// See [`Request::OpenReturnPath`].
    ReturnPath(Vec<ReturnPathProbe>),
    /// The backend that rules can be installed with.
    Backend(Backend),
    /// See [`RuleOperation::Verify`]; `None` if nothing differs.
    Difference(Option<Difference>),
    /// See [`RuleOperation::Counters`].
    Counters(Vec<RuleCounter>),
    /// See [`RuleOperation::Leftovers`].
    Leftovers(Vec<Leftover>),
    /// See [`RuleOperation::ForeignRules`].
    ForeignRules(Vec<ForeignRule>),
    /// See [`Request::Watch`].
    Watching(Watching),
    /// See [`Request::OpenLegacyTables`].
    LegacyTables(LegacyTables),
}

impl Request {
    /// Whether performing it waits for nothing, so that it need not wait for other operations.
    pub(crate) fn is_immediate(&self) -> bool {
        matches!(
            self,
            Self::OpenSockets { .. }
                | Self::OpenLocalAddresses
                | Self::OpenLegacyTables
                | Self::Ipv6OnLoopback
                | Self::Environment
                | Self::UsableAddresses(_)
        )
    }
}

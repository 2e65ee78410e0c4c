//! The privileged operations in a pod's namespace, as messages of plain data and descriptors, so
//! that another process can perform them.
//!
//! [`NamespaceAccess`] sends requests (`access.rs`); the namespaces thread performs them
//! (`operations.rs`). Not here: the operations themselves.

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
use crate::plan::host::HostPlan;
use crate::plan::{Environment, Ports};
use crate::process::bypass::BypassingProcess;
use crate::rules::RuleSettings;
use crate::self_test::ProbeSockets;
use crate::self_test::return_path::ReturnPathProbe;
use crate::sockets::listener::BoundListener;
use crate::sockets::local::LocalAddresses;
use crate::sockets::socket::{ListenerRequest, ReadySocket, SocketKind, Sockets};
use crate::subscription::{RuleSubscription, WatchScope};

pub use access::NamespaceAccess;

/// Performs privileged operations in one pod's namespace.
pub trait PrivilegedOperations: fmt::Debug + Send + Sync {
    /// Performs a request, to completion even if the caller stops waiting.
    ///
    /// # Errors
    ///
    /// The operation's errors, or that the namespace cannot be entered.
    fn perform(&self, request: Request) -> ReplyFuture;
}

/// The future reply.
pub type ReplyFuture = Pin<Box<dyn Future<Output = Result<Reply, InterceptionError>> + Send>>;

/// A request.
#[derive(Debug)]
pub enum Request {
    /// No operation; answered after all earlier operations.
    Barrier,
    /// The interfaces that are up, and their addresses.
    Environment,
    /// Whether IPv6 is enabled on the loopback interface.
    Ipv6OnLoopback,
    /// The subset of these addresses that a socket can be bound to.
    UsableAddresses(Vec<IpAddr>),
    /// Fails if the kernel drops packets that TPROXY marks.
    CheckReversePath(InterceptionSettings),
    /// Other processes that can bypass the rules of a profile.
    BypassingProcesses(Profile),
    /// Sockets to connect.
    OpenSockets {
        /// Their options.
        sockets: Sockets,
        /// Their purpose.
        kind: SocketKind,
        /// Maximum number; at least one is opened.
        count: usize,
    },
    /// A listener.
    Listen {
        /// Its options.
        sockets: Sockets,
        /// Its address and purpose.
        listener: ListenerRequest,
    },
    /// A socket that looks up the namespace's own addresses.
    OpenLocalAddresses,
    /// The sockets of the self-test.
    OpenProbes,
    /// The sockets of the self-test of the return path, for the rules of these settings.
    OpenReturnPath {
        /// The interception settings.
        settings: InterceptionSettings,
        /// The proxy's ports.
        ports: Ports,
    },
    /// Whether and how rules can be installed.
    PrepareRules(InterceptionSettings),
    /// An operation on the rules of these settings.
    Rules {
        /// The settings of the rules.
        rules: Arc<RuleSettings>,
        /// The operation.
        operation: RuleOperation,
    },
    /// An operation on the rules in the host's namespace.
    HostRules(HostRuleOperation),
    /// The match counters of our nftables table, whichever process installed it.
    TableCounters,
    /// Removes everything that underpass installed.
    RemoveEverything {
        /// Which rules are removed.
        scope: RemovalScope,
        /// Whether this may be the host's own namespace.
        allow_host: bool,
    },
    /// Descriptors that become readable when rules, routes or addresses change.
    Watch(WatchScope),
    /// The kernel's lists of the tables of legacy iptables.
    OpenLegacyTables,
}

/// An operation on rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleOperation {
    /// Install routes and rules, and remove the blackhole.
    Install,
    /// Install routes and rules, and leave the blackhole.
    Repair,
    /// Install the routes and addresses alone, if IPv6 is enabled on the loopback interface.
    InstallRoutes,
    /// Record in the table which process installed the rules.
    MarkOwner,
    /// Compare the installed rules with the plan.
    Verify,
    /// Install the blackhole.
    Block,
    /// Remove the blackhole.
    Unblock,
    /// Whether the blackhole is installed.
    IsBlocked,
    /// The match counters of the rules.
    Counters,
    /// Remove rules, routes and blackhole.
    Remove,
    /// Rules of older runs and of other meshes.
    Leftovers,
    /// Rules of other programs that act before ours.
    ForeignRules,
}

/// An operation on the rules in the host's namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostRuleOperation {
    /// Whether the rules can be installed.
    Check,
    /// Install these rules, or replace those that are installed.
    Apply(HostPlan),
    /// Compare the installed rules with these.
    Verify(HostPlan),
    /// Remove the rules.
    Remove,
}

/// A reply. Each request has one kind of reply.
#[derive(Debug)]
pub enum Reply {
    /// Done, without a result.
    Done,
    /// The answer to a question, or whether the operation changed anything.
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
    RuleSubscription(RuleSubscription),
    /// See [`Request::OpenLegacyTables`].
    LegacyTables(LegacyTables),
}

impl Request {
    /// Whether performing it never waits, so that it need not queue behind operations.
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

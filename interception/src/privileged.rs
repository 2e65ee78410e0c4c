//! Privileged operations in a pod's namespace, as messages of plain data and descriptors, so that
//! another process can perform them.
//!
//! [`NamespaceAccess`] sends requests; the namespaces thread performs them (`operations`).

mod access;
mod operations;

use std::collections::BTreeSet;
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
    /// The error of the operation, or of entering the namespace.
    fn perform(&self, request: Request) -> ReplyFuture;
}

/// A reply that is not complete yet.
pub type ReplyFuture = Pin<Box<dyn Future<Output = Result<Reply, InterceptionError>> + Send>>;

/// A request for a privileged operation.
#[derive(Debug)]
pub enum Request {
    /// Do nothing, but reply after all earlier operations.
    Barrier,
    /// List the interfaces that are up, and their addresses.
    Environment,
    /// Return whether IPv6 is enabled on the loopback interface.
    Ipv6OnLoopback,
    /// Return the addresses of this list that a socket can be bound to.
    UsableAddresses(Vec<IpAddr>),
    /// Fail if the kernel would drop packets that TPROXY marks.
    CheckReversePath(InterceptionSettings),
    /// List other processes that can bypass the rules of a profile.
    BypassingProcesses(Profile),
    /// Open sockets that connect.
    OpenSockets {
        /// The options of the sockets.
        sockets: Sockets,
        /// The purpose of the sockets.
        kind: SocketKind,
        /// The maximum number of sockets. At least one is opened.
        count: usize,
    },
    /// Open a listener.
    Listen {
        /// The options of the listener.
        sockets: Sockets,
        /// The address and purpose of the listener.
        listener: ListenerRequest,
    },
    /// List the inodes of the listening TCP sockets.
    Listening,
    /// Open a netlink socket that looks up the namespace's local addresses.
    OpenLocalAddresses,
    /// Open the sockets of the self-test.
    OpenProbes,
    /// Open the sockets for testing the return path, for the rules of these settings.
    OpenReturnPath {
        /// The interception settings.
        settings: InterceptionSettings,
        /// The proxy's ports.
        ports: Ports,
    },
    /// Check whether rules can be installed, and by which backend.
    PrepareRules(InterceptionSettings),
    /// Perform an operation on the rules of these settings.
    Rules {
        /// The settings of the rules.
        rules: Arc<RuleSettings>,
        /// The operation.
        operation: RuleOperation,
    },
    /// Perform an operation on the rules in the host's namespace.
    HostRules(HostRuleOperation),
    /// Read the counters of underpass's nftables table, whichever process installed it.
    TableCounters,
    /// Remove everything that underpass installed.
    RemoveEverything {
        /// The rules to remove.
        scope: RemovalScope,
        /// True if this may be the host's network namespace.
        allow_host: bool,
    },
    /// Subscribe to changes of rules, routes or addresses: return descriptors that become readable.
    Watch(WatchScope),
    /// Open the kernel's lists of legacy iptables tables.
    OpenLegacyTables,
}

/// An operation on rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleOperation {
    /// Install routes and rules, and remove the blackhole.
    Install,
    /// Like [`Install`](Self::Install), unless the rules are installed already. Return `true` if it
    /// installed them, `false` if they were already installed.
    InstallIfDifferent,
    /// Install routes and rules, and keep the blackhole.
    Repair,
    /// Install only the routes and addresses, if IPv6 is enabled on the loopback interface.
    InstallRoutes,
    /// Compare the installed rules with the plan.
    Verify,
    /// Install the blackhole.
    Block,
    /// Remove the blackhole.
    Unblock,
    /// Return whether the blackhole is installed.
    IsBlocked,
    /// Read the counters of the rules.
    Counters,
    /// Remove rules, routes and blackhole.
    Remove,
    /// Find rules of earlier runs and of other meshes.
    Leftovers,
    /// List rules of other programs that act before underpass's rules.
    ForeignRules,
}

/// An operation on the rules in the host's namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostRuleOperation {
    /// Check whether the rules can be installed.
    Check,
    /// Install these rules, or replace those that are installed.
    Apply(HostPlan),
    /// Change the addresses of installed rules. Return whether the plans have the same rules.
    Update {
        /// The installed plan.
        old: HostPlan,
        /// The plan with the new addresses.
        new: HostPlan,
    },
    /// Compare the installed rules with this plan.
    Verify(HostPlan),
    /// Remove the rules.
    Remove,
}

/// A reply. Each request has one kind of reply.
#[derive(Debug)]
pub enum Reply {
    /// The operation is complete and has no result.
    Done,
    /// The answer to a yes-or-no question, or whether the operation changed anything.
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
    /// See [`Request::Listening`].
    Listening(BTreeSet<u64>),
    /// See [`Request::OpenLocalAddresses`].
    LocalAddresses(LocalAddresses),
    /// See [`Request::OpenProbes`].
    Probes(ProbeSockets),
    /// See [`Request::OpenReturnPath`].
    ReturnPath(Vec<ReturnPathProbe>),
    /// The backend for installing rules.
    Backend(Backend),
    /// See [`RuleOperation::Verify`]. `None` if the rules equal the plan.
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
    /// Returns true if performing the request never waits, so that it need not queue behind
    /// operations.
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

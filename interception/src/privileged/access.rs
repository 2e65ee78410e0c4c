//! Access to one namespace from outside of it. Each method requests one privileged operation.
//!
//! `operations` performs them.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use underpass_config::{InterceptionSettings, Profile};

use super::operations::InNamespace;
use super::{HostRuleOperation, PrivilegedOperations, Reply, Request, RuleOperation};
use crate::backend::Backend;
use crate::backend::iptables::RemovalScope;
use crate::backend::leftovers::LegacyTables;
use crate::backend::nftables::RuleCounter;
use crate::error::InterceptionError;
use crate::namespace::{Namespace, NamespaceThread};
use crate::plan::{Environment, Ports};
use crate::process::bypass::BypassingProcess;
use crate::rules::RuleSettings;
use crate::self_test::ProbeSockets;
use crate::self_test::return_path::ReturnPathProbe;
use crate::sockets::listener::BoundListener;
use crate::sockets::local::LocalAddresses;
use crate::sockets::socket::{ListenerRequest, ReadySocket, SocketKind, Sockets};
use crate::subscription::{RuleSubscription, WatchScope};

/// Access to one namespace. Cheap to clone.
#[derive(Debug, Clone)]
pub struct NamespaceAccess(Arc<dyn PrivilegedOperations>);

/// Performs a request, and extracts the value of its kind of reply.
macro_rules! ask {
    ($access:expr, $request:expr, $answer:pat => $value:expr) => {
        match $access.0.perform($request).await? {
            $answer => Ok($value),
            other => Err(InterceptionError::UnexpectedReply(format!("{other:?}"))),
        }
    };
}

impl NamespaceAccess {
    /// Creates access to `namespace`. Its operations run on `thread`.
    #[must_use]
    pub fn new(namespace: Namespace, thread: NamespaceThread) -> Self {
        Self::through(Arc::new(InNamespace::new(namespace, thread)))
    }

    /// Creates access whose operations `performer` runs, for example in another process.
    #[must_use]
    pub fn through(performer: Arc<dyn PrivilegedOperations>) -> Self {
        Self(performer)
    }

    /// Creates access to the calling thread's namespace, with a new namespaces thread that has the
    /// caller's capabilities.
    ///
    /// # Errors
    ///
    /// As [`NamespaceThread::start`].
    pub fn current() -> io::Result<Self> {
        let namespace = Namespace::current().map_err(io::Error::other)?;
        Ok(Self::new(namespace, NamespaceThread::start()?))
    }

    /// Waits for all earlier operations, including those whose callers have stopped waiting.
    pub async fn finish(&self) {
        // An error means that the thread has ended.
        self.0.perform(Request::Barrier).await.ok();
    }

    /// Opens sockets that match the rules: up to `count`, and at least one.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Socket`].
    pub async fn open_sockets(
        &self,
        sockets: &Sockets,
        kind: SocketKind,
        count: usize,
    ) -> Result<Vec<ReadySocket>, InterceptionError> {
        let request = Request::OpenSockets { sockets: sockets.clone(), kind, count };
        ask!(self, request, Reply::Sockets(sockets) => sockets)
    }

    /// Listens in the namespace.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Listen`].
    pub async fn listen(
        &self,
        sockets: &Sockets,
        listener: ListenerRequest,
    ) -> Result<BoundListener, InterceptionError> {
        let request = Request::Listen { sockets: sockets.clone(), listener };
        ask!(self, request, Reply::Listener(listener) => listener)
    }

    /// Opens a netlink socket that looks up the namespace's local addresses.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Socket`].
    pub async fn local_addresses(&self) -> Result<LocalAddresses, InterceptionError> {
        ask!(self, Request::OpenLocalAddresses, Reply::LocalAddresses(local) => local)
    }

    /// Lists the interfaces that are up, and their addresses.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Socket`] if the kernel cannot list them.
    pub async fn environment(&self) -> Result<Environment, InterceptionError> {
        ask!(self, Request::Environment, Reply::Environment(environment) => environment)
    }

    /// Returns the inodes of the listening TCP sockets ([`BoundListener::inode`]).
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Socket`]: /proc cannot be read.
    pub async fn listening(&self) -> Result<BTreeSet<u64>, InterceptionError> {
        ask!(self, Request::Listening, Reply::Listening(inodes) => inodes)
    }

    /// Returns true if IPv6 is enabled on the loopback interface.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn ipv6_on_loopback(&self) -> Result<bool, InterceptionError> {
        ask!(self, Request::Ipv6OnLoopback, Reply::Is(enabled) => enabled)
    }

    /// Returns the `addresses` that a socket can be bound to.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn usable_addresses(
        &self,
        addresses: Vec<IpAddr>,
    ) -> Result<Vec<IpAddr>, InterceptionError> {
        ask!(self, Request::UsableAddresses(addresses), Reply::Addresses(usable) => usable)
    }

    /// Fails if TPROXY is used and the kernel would drop inbound connections.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::InboundDropped`].
    pub async fn check_reverse_path(
        &self,
        settings: &InterceptionSettings,
    ) -> Result<(), InterceptionError> {
        ask!(self, Request::CheckReversePath(settings.clone()), Reply::Done => ())
    }

    /// Lists other processes in the namespace that can bypass the rules of `profile`.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Socket`] if /proc cannot be read.
    pub async fn bypassing_processes(
        &self,
        profile: Profile,
    ) -> Result<Vec<BypassingProcess>, InterceptionError> {
        ask!(self, Request::BypassingProcesses(profile), Reply::Processes(processes) => processes)
    }

    /// Opens the sockets of the self-test. The current user of the process owns them.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Socket`].
    pub async fn open_probes(&self) -> Result<ProbeSockets, InterceptionError> {
        ask!(self, Request::OpenProbes, Reply::Probes(probes) => probes)
    }

    /// Opens the sockets for testing the return path. The current user of the process owns them.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Socket`].
    pub async fn open_return_path(
        &self,
        settings: &InterceptionSettings,
        ports: Ports,
    ) -> Result<Vec<ReturnPathProbe>, InterceptionError> {
        let request = Request::OpenReturnPath { settings: settings.clone(), ports };
        ask!(self, request, Reply::ReturnPath(connections) => connections)
    }

    pub(crate) async fn prepare_rules(
        &self,
        settings: &InterceptionSettings,
    ) -> Result<Backend, InterceptionError> {
        ask!(self, Request::PrepareRules(settings.clone()), Reply::Backend(backend) => backend)
    }

    pub(crate) async fn rules(
        &self,
        rules: &Arc<RuleSettings>,
        operation: RuleOperation,
    ) -> Result<Reply, InterceptionError> {
        self.0.perform(Request::Rules { rules: rules.clone(), operation }).await
    }

    pub(crate) async fn host_rules(
        &self,
        operation: HostRuleOperation,
    ) -> Result<Reply, InterceptionError> {
        self.0.perform(Request::HostRules(operation)).await
    }

    pub(crate) async fn table_counters(&self) -> Result<Vec<RuleCounter>, InterceptionError> {
        ask!(self, Request::TableCounters, Reply::Counters(counters) => counters)
    }

    pub(crate) async fn remove_everything(
        &self,
        scope: RemovalScope,
        allow_host: bool,
    ) -> Result<bool, InterceptionError> {
        let request = Request::RemoveEverything { scope, allow_host };
        ask!(self, request, Reply::Is(removed) => removed)
    }

    pub(crate) async fn watch(
        &self,
        watched: WatchScope,
    ) -> Result<RuleSubscription, InterceptionError> {
        ask!(self, Request::Watch(watched), Reply::RuleSubscription(subscription) => subscription)
    }

    pub(crate) async fn legacy_tables(&self) -> Result<LegacyTables, InterceptionError> {
        ask!(self, Request::OpenLegacyTables, Reply::LegacyTables(tables) => tables)
    }
}

//! Performs privileged operations on the namespaces thread.
//!
//! `rules` contains the operations on rules.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use super::{HostRuleOperation, PrivilegedOperations, Reply, ReplyFuture, Request, RuleOperation};
use crate::backend::leftovers::LegacyTables;
use crate::backend::nftables;
use crate::error::InterceptionError;
use crate::namespace::ipv6::ipv6_available;
use crate::namespace::reverse_path::check_reverse_path;
use crate::namespace::{Entered, Namespace, NamespaceThread, ipv6};
use crate::plan::{Environment, RulePlan};
use crate::process::bypass::bypassing_processes;
use crate::process::privileges::lacks_net_admin;
use crate::rules::{self, RuleSettings};
use crate::self_test::ProbeSockets;
use crate::self_test::return_path::ReturnPathProbe;
use crate::sockets::listening::listening;
use crate::sockets::local::LocalAddresses;
use crate::sockets::socket::{ReadySocket, SocketKind, Sockets};
use crate::subscription::RuleSubscription;

/// Performs operations in one namespace, on the thread that enters it.
#[derive(Debug)]
pub(super) struct InNamespace {
    namespace: Namespace,
    thread: NamespaceThread,
}

impl InNamespace {
    pub(super) fn new(namespace: Namespace, thread: NamespaceThread) -> Self {
        Self { namespace, thread }
    }
}

impl PrivilegedOperations for InNamespace {
    fn perform(&self, request: Request) -> ReplyFuture {
        let (namespace, thread) = (self.namespace.clone(), self.thread.clone());
        Box::pin(async move {
            if request.is_immediate() {
                thread.call(&namespace, |entered| perform_at_once(entered, request)).await?
            } else {
                thread.run(&namespace, async |entered| perform(entered, request).await).await?
            }
        })
    }
}

/// Performs a request that never waits.
fn perform_at_once(entered: &Entered, request: Request) -> Result<Reply, InterceptionError> {
    let failed = |operation| move |source| InterceptionError::Socket { operation, source };
    match request {
        Request::OpenSockets { sockets, kind, count } => {
            let opened = open(entered, &sockets, kind, count);
            opened.map(Reply::Sockets).map_err(failed("open a socket"))
        }
        Request::OpenLocalAddresses => {
            let opened = LocalAddresses::open(entered);
            opened.map(Reply::LocalAddresses).map_err(failed("open a socket for addresses"))
        }
        Request::OpenLegacyTables => Ok(Reply::LegacyTables(LegacyTables::open(entered))),
        Request::Ipv6OnLoopback => Ok(Reply::Is(ipv6::on_loopback(entered))),
        Request::Environment => {
            let environment = Environment::of(entered);
            environment.map(Reply::Environment).map_err(failed("list the interfaces"))
        }
        Request::UsableAddresses(mut addresses) => {
            addresses.retain(|address| is_usable(entered, *address));
            Ok(Reply::Addresses(addresses))
        }
        other => Err(InterceptionError::UnexpectedReply(format!("{other:?}"))),
    }
}

async fn perform(entered: &Entered, request: Request) -> Result<Reply, InterceptionError> {
    let failed = |operation| move |source| InterceptionError::Socket { operation, source };
    match request {
        Request::Barrier => Ok(Reply::Done),
        Request::CheckReversePath(settings) => {
            check_reverse_path(entered, &settings).map(|()| Reply::Done)
        }
        Request::BypassingProcesses(profile) => {
            let found = bypassing_processes(entered, profile);
            found.map(Reply::Processes).map_err(failed("read /proc"))
        }
        Request::Listen { sockets, listener } => {
            sockets.listen(entered, listener).map(Reply::Listener)
        }
        Request::Listening => {
            let found = listening(entered);
            found.map(Reply::Listening).map_err(failed("list the listening sockets"))
        }
        Request::OpenProbes => {
            let opened = ProbeSockets::open(entered);
            opened.map(Reply::Probes).map_err(failed("open the sockets of the self-test"))
        }
        Request::OpenReturnPath { settings, ports } => {
            let plan = RulePlan::new(&settings, ports, ipv6_available());
            let sockets = Sockets::new(&settings, ipv6_available());
            let opened = ReturnPathProbe::prepare(entered, &plan, &sockets);
            opened.map(Reply::ReturnPath).map_err(failed("open the sockets of the self-test"))
        }
        Request::PrepareRules(settings) => {
            rules::prepare(entered, &settings).await.map(Reply::Backend)
        }
        Request::Rules { rules, operation } => on_rules(entered, &rules, operation).await,
        Request::HostRules(operation) => on_host_rules(entered, operation).await,
        Request::TableCounters => nftables::counters(entered).await.map(Reply::Counters),
        Request::RemoveEverything { scope, allow_host } => {
            rules::remove_everything(entered, scope, allow_host).await.map(Reply::Is)
        }
        Request::Watch(watched) => {
            RuleSubscription::start(entered, watched).map(Reply::RuleSubscription)
        }
        immediate => perform_at_once(entered, immediate),
    }
}

async fn on_rules(
    entered: &Entered,
    rules: &RuleSettings,
    operation: RuleOperation,
) -> Result<Reply, InterceptionError> {
    let rules = rules.rules();
    match operation {
        RuleOperation::Install => rules.install(entered).await.map(|()| Reply::Done),
        RuleOperation::InstallIfDifferent => {
            rules.install_if_different(entered).await.map(Reply::Is)
        }
        RuleOperation::Repair => rules.repair(entered).await.map(|()| Reply::Done),
        RuleOperation::InstallRoutes => rules.install_routes(entered).await.map(|()| Reply::Done),
        RuleOperation::Verify => rules.verify(entered).await.map(Reply::Difference),
        RuleOperation::Block => rules.block(entered).await.map(|()| Reply::Done),
        RuleOperation::Unblock => rules::unblock(entered).await.map(Reply::Is),
        RuleOperation::IsBlocked => rules::is_blocked(entered).await.map(Reply::Is),
        RuleOperation::Counters => rules.counters(entered).await.map(Reply::Counters),
        RuleOperation::Remove => rules.remove(entered).await.map(|()| Reply::Done),
        RuleOperation::Leftovers => rules.leftovers(entered).await.map(Reply::Leftovers),
        RuleOperation::ForeignRules => rules.foreign_rules(entered).await.map(Reply::ForeignRules),
    }
}

async fn on_host_rules(
    entered: &Entered,
    operation: HostRuleOperation,
) -> Result<Reply, InterceptionError> {
    match operation {
        HostRuleOperation::Check => check_host_rules(entered).await.map(|()| Reply::Done),
        HostRuleOperation::Apply(plan) => {
            nftables::host::apply(entered, &plan).await.map(|()| Reply::Done)
        }
        HostRuleOperation::Update { old, new } => {
            nftables::host::update(entered, &old, &new).await.map(Reply::Is)
        }
        HostRuleOperation::Verify(plan) => {
            nftables::host::verify(entered, &plan).await.map(Reply::Difference)
        }
        HostRuleOperation::Remove => nftables::host::remove(entered).await.map(Reply::Is),
    }
}

async fn check_host_rules(entered: &Entered) -> Result<(), InterceptionError> {
    if lacks_net_admin() {
        return Err(InterceptionError::NotPermitted {
            operation: "install the rules that translate kubelet probes",
            capability: "NET_ADMIN",
        });
    }
    nftables::check_available(entered).await
}

/// Opens up to `count` sockets. Opens fewer if the kernel lacks resources.
fn open(
    entered: &Entered,
    sockets: &Sockets,
    kind: SocketKind,
    count: usize,
) -> io::Result<Vec<ReadySocket>> {
    let mut opened = vec![sockets.open(entered, kind)?];
    while opened.len() < count
        && let Ok(socket) = sockets.open(entered, kind)
    {
        opened.push(socket);
    }
    Ok(opened)
}

fn is_usable(_: &Entered, address: IpAddr) -> bool {
    UdpSocket::bind(SocketAddr::new(address, 0)).is_ok()
}

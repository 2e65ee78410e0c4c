//! Intercepts traffic: netfilter rules, the sockets that match them, and network namespaces.
//!
//! In reading order: [`RulePlan`] contains the rules of a profile with their reasons.
//! [`Interception`] checks, installs, verifies and removes them. [`Sockets`] opens the proxy's
//! listeners and connections, and [`OriginalDestination`] is the address that a redirected client
//! had connected to. [`Namespace`], [`enter_sandbox`] and [`PacketCapture`] serve tests, the
//! demonstration and nodes, which set up namespaces.
//!
//! The crate does not depend on HTTP/2, TLS or policies.

mod backend;
mod error;
mod explain;
mod folder_events;
mod host_facts;
mod host_rules;
mod interception;
mod namespace;
mod plan;
mod privileged;
mod process;
mod rules;
mod self_test;
mod shared_plan;
mod sockets;
mod subscription;
#[doc(hidden)]
pub mod testing;
mod trial;

pub use ipnet::IpNet;

pub use backend::Backend;
pub use backend::changes::Changes;
pub use backend::foreign::{Effect, ForeignRule};
pub use backend::iptables::{RemovalScope, Variant};
pub use backend::leftovers::{Leftover, LeftoverOwner, LegacyTables};
pub use backend::nftables::RuleCounter;
pub use backend::verify::{Difference, Line, LineStatus, SectionDifference};
pub use error::{InterceptionError, SandboxRemedy};
pub use explain::{Explanation, Flow, Hop, PacketExplanation, Party, Sender};
pub use folder_events::Inotify;
pub use host_facts::disk::{DiskUsage, disk_usage};
pub use host_facts::ports::{ListeningSocket, SocketOwner, listening_sockets};
pub use host_facts::running_process::{RunningProcess, is_own_program_replaced};
pub use host_facts::{HostFacts, Ipv6Support, Usage, conntrack_usage};
pub use host_rules::HostRules;
pub use interception::{Interception, counters, remove_everything};
pub use namespace::host::HostNamespaces;
pub use namespace::ipv6::{ipv6_available, is_ipv6_disabled_on_loopback};
pub use namespace::sandbox::{Sandbox, enter_sandbox, sandbox_folder};
pub use namespace::{Endpoint, Entered, Namespace, NamespaceId, NamespaceThread, veth};
pub use plan::host::{HOST_TABLE, HostPlan};
pub use plan::{
    Action, CONNECTION_MARK, Chain, ChainId, ConntrackState, Direction, Entry, Environment,
    Families, Family, Hook, Interface, KUBELET_PROBE_IN, KUBELET_PROBE_V4, KUBELET_PROBE_V6,
    LoopbackAddress, MARK_MASK, Mark, Match, Origin, PROXY_MARK, PROXY_ZONE, Packet, PolicyRoute,
    Ports, Protocol, ROUTE_TABLE, RULE_PRIORITY, ReplyOutcome, Rule, RulePlan, TABLE, Table,
    TraversedChain, Verdict, Walk,
};
pub use privileged::{
    HostRuleOperation, NamespaceAccess, PrivilegedOperations, Reply, ReplyFuture, Request,
    RuleOperation,
};
pub use process::background::{run_in_background, run_on_thread};
pub use process::bypass::BypassingProcess;
pub use process::limits::{is_out_of_files, raise_open_files};
pub use process::privileges::{
    KeptCapabilities, MissingCapabilities, ProxyUser, confine_auxiliary_thread, confine_process,
    confine_thread, may_signal_other_users, prepare_change_of_user, raise_capabilities,
};
pub use process::separate::SeparationError;
pub use rules::RuleSettings;
pub use self_test::packets::{PacketCapture, TcpSegment};
pub use self_test::return_path::ReturnPathProbe;
pub use self_test::{Probe, ProbeSockets};
pub use sockets::handover::Handover;
pub use sockets::listener::{BoundListener, Listener, ListenerTransport};
pub use sockets::local::LocalAddresses;
pub use sockets::original_destination::OriginalDestination;
pub use sockets::pacing::{Pacing, UndecidedPacing};
pub use sockets::peer::Peer;
pub use sockets::seqpacket::{Message, SeqPacket};
pub use sockets::socket::{
    AcceptedOptions, Closing, KEEPALIVE_PROBES, ListenerRequest, ReadySocket, SocketKind,
    SocketRole, Sockets, enable_keepalive, end_on_close, end_writing, peek, reset_on_close,
    write_before_end,
};
pub use sockets::splice::SplicePipe;
pub use sockets::supervisor::{inherited_listeners, notify_supervisor};
pub use subscription::{RuleSubscription, WatchScope};
pub use trial::{RuleTrial, try_rules};

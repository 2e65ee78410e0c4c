//! Intercepts traffic: netfilter rules, the sockets that match them, and network namespaces.
//!
//! In reading order: [`RulePlan`] contains the rules of a profile with their reasons.
//! [`Interception`] checks, installs, verifies and removes them. [`Sockets`] opens the proxy's
//! listeners and connections, and [`OriginalDestination`] is the address to which a redirected
//! connection was made. [`Namespace`], [`enter_sandbox`] and [`PacketCapture`] serve tests, the
//! demonstration and nodes, which set up namespaces.
//!
//! The crate has no knowledge of HTTP/2, TLS or policies.

mod backend;
mod blackhole;
mod bypass;
mod changes;
mod error;
mod explain;
mod foreign;
mod handover;
mod host;
mod interception;
mod iptables;
mod ipv6;
mod leftovers;
mod limits;
mod listener;
mod local;
mod namespace;
mod netlink;
mod nftables;
mod packets;
mod plan;
mod planned;
mod privileged;
mod privileges;
mod return_path;
mod reverse_path;
mod routes;
mod rules;
mod sandbox;
mod self_test;
mod socket;
#[doc(hidden)]
pub mod testing;
mod user_ids;
mod verify;
mod watching;

pub use ipnet::IpNet;

pub use backend::Backend;
pub use bypass::BypassingProcess;
pub use changes::Changes;
pub use error::{InterceptionError, SandboxRemedy};
pub use explain::{Explanation, Flow, Hop, PacketExplanation, Party, Sender};
pub use foreign::{Effect, ForeignRule};
pub use handover::{Handover, Peer};
pub use interception::{Interception, counters, remove_everything};
pub use iptables::{RemovalScope, Variant};
pub use ipv6::ipv6_available;
pub use leftovers::{Leftover, LeftoverOwner, LegacyTables};
pub use limits::{is_out_of_files, raise_open_files};
pub use listener::{BoundListener, Listener};
pub use local::LocalAddresses;
pub use namespace::{Endpoint, Entered, Namespace, NamespaceId, NamespaceThread, veth};
pub use nftables::RuleCounter;
pub use packets::{PacketCapture, TcpSegment};
pub use plan::{
    Action, CONNECTION_MARK, Chain, ChainId, ConntrackState, Direction, Entry, Environment,
    Families, Family, Hook, Interface, KUBELET_PROBE_IN, KUBELET_PROBE_V4, KUBELET_PROBE_V6,
    LoopbackAddress, MARK_MASK, Mark, Match, Origin, PROXY_MARK, PROXY_ZONE, Packet, PolicyRoute,
    Ports, Protocol, ROUTE_TABLE, RULE_PRIORITY, ReplyOutcome, Rule, RulePlan, TABLE, Table,
    TraversedChain, Verdict, Walk,
};
pub use privileged::{
    NamespaceAccess, Performing, PrivilegedOperations, Reply, Request, RuleOperation,
};
pub use privileges::{
    Kept, MissingCapabilities, ProxyUser, confine_auxiliary_thread, confine_process,
    confine_thread, prepare_change_of_user,
};
pub use return_path::ReturnPathProbe;
pub use rules::RuleSettings;
pub use sandbox::{Sandbox, enter_sandbox, sandbox_folder};
pub use self_test::{Probe, ProbeSockets};
pub use socket::{
    Closing, KEEPALIVE_PROBES, ListenerRequest, OriginalDestination, ReadySocket, SocketKind,
    SocketRole, Sockets, end_on_close, end_writing, probe_every, reset_on_close, write_before_end,
};
pub use verify::{Difference, Line, SectionDifference, Sign};
pub use watching::{Watched, Watching};

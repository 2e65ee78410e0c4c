//! Catches traffic: the netfilter rules of a profile, the sockets that fit them, and network
//! namespaces.
//!
//! In reading order: [`RulePlan`] says which packets are caught and why; [`Interception`] checks,
//! installs and removes; [`Sockets`] makes what the proxy listens and connects with, and
//! [`original_destination`] tells where a caught connection was going. [`Namespace`],
//! [`enter_sandbox`] and [`PacketCapture`] are for whoever sets up namespaces: tests, the
//! demonstration, a node.
//!
//! This crate knows neither HTTP/2, TLS nor policies.

mod error;
mod host;
mod interception;
mod ipv6;
mod limits;
mod listener;
mod netlink;
mod netns;
mod nftables;
mod packets;
mod plan;
mod routes;
mod sandbox;
mod socket;

pub use ipnet::IpNet;

pub use error::{InterceptionError, SandboxRemedy};
pub use interception::{Interception, counters, remove_everything};
pub use ipv6::ipv6_available;
pub use limits::raise_open_files;
pub use listener::{BoundListener, Listener};
pub use netns::{Endpoint, Namespace, veth};
pub use nftables::RuleCounter;
pub use packets::{PacketCapture, TcpSegment};
pub use plan::{
    Action, CONNECTION_MARK, Chain, Families, KUBELET_PROBE_V4, KUBELET_PROBE_V6, MARK_MASK, Match,
    PROXY_MARK, PROXY_ZONE, Ports, ROUTE_TABLE, RULE_PRIORITY, Rule, RulePlan, TABLE,
};
pub use sandbox::enter_sandbox;
pub use socket::{
    KEEPALIVE, KEEPALIVE_PROBES, Sockets, original_destination, reset_on_close, tune,
};

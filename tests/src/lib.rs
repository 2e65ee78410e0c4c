//! The harness of end-to-end tests and benchmarks: real pods, the real binary, scripted peers.
//!
//! In reading order: [`Suite`] runs trials in a sandbox. [`Scene`] sets up two pods from [`World`],
//! [`Pod`], [`Pki`], [`Mesh`] and [`Settings`]. [`Proxy`] is the real binary in a pod. `peers` and
//! `tls` are its applications and TLS peers. [`tool`] runs third-party programs such as nft.
//! [`Metrics`] and [`Counters`] read the proxy's and the rules' counters. [`soak()`] combines all
//! of them.
//!
//! A failure panics with the expected event, and so fails its trial.
#![expect(clippy::expect_used, clippy::panic, reason = "a harness fails a test by panicking")]

mod binary;
mod checker;
mod control_plane;
mod counters;
mod load;
mod mesh;
mod metrics;
mod or_fail;
mod otlp;
mod peers;
mod pki;
mod pods;
mod proxy;
mod scene;
mod settings;
mod soak;
mod spire_agent;
mod successor;
mod suite;
mod supervisor;
mod tls;
mod tools;

pub use binary::binary;
pub use checker::checker;
pub use control_plane::{
    ControlPlaneEvent, ScriptedControlPlane, deny_port, field, hbone_workload, number, resource,
    response,
};
pub use counters::Counters;
pub use load::Load;
pub use mesh::Mesh;
pub use metrics::{Metrics, http_get, is_metric_name};
pub use otlp::{CollectedItem, ScriptedCollector};
pub use peers::{
    DEADLINE, Dial, End, Listener, Server, abort, carry, exchange, finish, read_to_end, until,
    within,
};
pub use pki::Pki;
pub use pods::{Family, Pod, World};
pub use proxy::{Proxy, error_of};
pub use scene::{APP, CLIENT, HBONE, SERVER, Scene};
pub use settings::Settings;
pub use soak::{Fault, SoakOptions, SoakSummary, soak};
pub use spire_agent::SpireAgent;
pub use successor::ScriptedSuccessor;
pub use suite::{Suite, skipped};
pub use supervisor::{Notification, ScriptedSupervisor, Service};
pub use tls::{TlsClient, TlsServer};
pub use tools::{Background, OutputLines, Printed, tool};

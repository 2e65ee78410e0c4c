//! The command line after `cargo bench -p underpass-benches --`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::roles::run_child_role;

/// The arguments of the program if it should measure. `cargo bench` passes `--bench`. `cargo test`
/// runs benches without it, and then this function prints a notice.
#[expect(clippy::print_stdout, reason = "a bench's output is its result")]
#[must_use]
pub fn bench_arguments() -> Option<Vec<String>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let is_bench = arguments.iter().any(|argument| argument == "--bench");
    if !is_bench {
        println!("nothing is measured without --bench, which `cargo bench` passes");
    }
    is_bench.then_some(arguments)
}

/// Measure direct, relayed, plaintext and HBONE traffic between two pods in one session
#[derive(Debug, Clone, Parser)]
#[command(name = "cargo bench -p underpass-benches --")]
pub struct Options {
    /// Groups of workloads to measure [default: all but stalls]
    #[arg(long, value_delimiter = ',', default_values_t = WorkloadGroup::USUAL)]
    pub only: Vec<WorkloadGroup>,
    /// Paths to compare [default: all but node and node-one-process; ztunnel's only with --ztunnel]
    #[arg(long, value_delimiter = ',')]
    pub paths: Vec<PathName>,
    /// Absolute path of a ztunnel binary to compare with
    #[arg(long, value_name = "PROGRAM")]
    pub ztunnel: Option<PathBuf>,
    /// How ztunnel runs
    #[arg(long, value_enum, default_value_t = ZtunnelMode::Shared)]
    pub ztunnel_mode: ZtunnelMode,
    /// Duration of each measurement in seconds, after a warm-up of half a second
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
    /// Number of measurements of each load on each path
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Measure a single round of one second
    #[arg(long)]
    pub quick: bool,
    /// Number of additional workloads in the mesh, without traffic
    #[arg(long, default_value_t = 0)]
    pub workloads: usize,
    /// Folder for plots [default: target/bench]
    #[arg(long, value_name = "FOLDER")]
    pub plot: Option<PathBuf>,
    /// Write access logs, instead of errors only
    #[arg(long)]
    pub access_log: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Options {
    /// The options of this process, if it should measure: `cargo bench` has started it, and it is
    /// not a child process of a bench. Invalid options end the process.
    #[must_use]
    pub fn from_arguments() -> Option<Self> {
        if run_child_role() {
            return None;
        }
        bench_arguments()?;
        let mut options = Self::parse();
        if options.quick {
            options.seconds = 1.0;
            options.rounds = 1;
        }
        if options.paths.is_empty() {
            options.paths = PathName::value_variants().to_vec();
            options.paths.retain(|path| !path.is_node());
        }
        if options.ztunnel.is_none() {
            options.paths.retain(|path| !path.is_ztunnel());
        }
        Some(options)
    }

    /// The log filter of the proxies.
    pub(crate) fn log_filter(&self) -> &'static str {
        if self.access_log { "info" } else { "info,access=warn" }
    }

    /// The duration of each measurement.
    #[must_use]
    pub fn window(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

/// The mode in which a ztunnel serves its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ZtunnelMode {
    /// From a separate namespace of the node, like a DaemonSet with istio-cni
    Shared,
    /// From within the pod
    Dedicated,
}

/// A group of workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WorkloadGroup {
    /// Throughput of one and eight streams, and of one in reverse
    Bulk,
    /// Latency of requests on one connection
    Rtt,
    /// Rate of requests on 64 connections
    Rps,
    /// Rate of new connections, sixteen at a time
    Conn,
    /// Ten thousand concurrent new connections with one request each
    Storm,
    /// Memory at rest, with idle connections and after their end
    Idle,
    /// Throughput and memory while readers are stalled
    Stalls,
}

impl WorkloadGroup {
    const USUAL: [Self; 6] =
        [Self::Bulk, Self::Rtt, Self::Rps, Self::Conn, Self::Storm, Self::Idle];
}

/// A path between two pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PathName {
    /// No proxies and no rules
    Direct,
    /// A relay in each pod that copies: the minimal cost of a proxy that processes the bytes
    RelayCopy,
    /// A relay in each pod that splices: the minimal cost of a userspace proxy
    RelaySplice,
    /// A proxy in each pod, with protocol TCP in the mesh
    Plain,
    /// A proxy in each pod, with protocol HBONE in the mesh
    Hbone,
    /// A node daemon for each pod, with a broker process and protocol HBONE in the mesh
    Node,
    /// A node daemon of one process for each pod, with protocol HBONE in the mesh
    NodeOneProcess,
    /// A ztunnel in each pod, with protocol TCP in the mesh
    ZtunnelPlain,
    /// A ztunnel in each pod, with protocol HBONE in the mesh
    ZtunnelHbone,
}

impl PathName {
    /// Whether ztunnels are between the pods.
    #[must_use]
    pub fn is_ztunnel(self) -> bool {
        matches!(self, Self::ZtunnelPlain | Self::ZtunnelHbone)
    }

    /// Whether node daemons are between the pods.
    pub(crate) fn is_node(self) -> bool {
        matches!(self, Self::Node | Self::NodeOneProcess)
    }

    /// Whether relays are between the pods.
    pub(crate) fn is_relay(self) -> bool {
        matches!(self, Self::RelayCopy | Self::RelaySplice)
    }

    /// Whether proxies of either kind are between the pods.
    pub(crate) fn has_proxies(self) -> bool {
        self != Self::Direct && !self.is_relay()
    }
}

impl fmt::Display for ZtunnelMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&option_name(self))
    }
}

impl fmt::Display for WorkloadGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&option_name(self))
    }
}

impl fmt::Display for PathName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&option_name(self))
    }
}

/// The value on the command line.
fn option_name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

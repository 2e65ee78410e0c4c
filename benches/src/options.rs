//! What may be asked on the command line, after `cargo bench -p underpass-benches --`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::part::was_part;

/// Measures direct, relayed, plain and HBONE traffic between two pods, in one sitting
#[derive(Debug, Clone, Parser)]
#[command(name = "cargo bench -p underpass-benches --")]
pub struct Options {
    /// What to measure; stalls only when asked for
    #[arg(long, value_delimiter = ',', default_values_t = What::USUAL)]
    pub only: Vec<What>,
    /// Which ways to compare; by default all, those of ztunnel if there is one
    #[arg(long, value_delimiter = ',')]
    pub paths: Vec<PathName>,
    /// A stock ztunnel to compare with: the program, by its absolute path
    #[arg(long, value_name = "PROGRAM")]
    pub ztunnel: Option<PathBuf>,
    /// How long each load is measured, each time, after half a second that is not
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
    /// How often each load takes its turn on each path
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// A first impression: one second, one round
    #[arg(long)]
    pub quick: bool,
    /// So many workloads more in the mesh, which have nothing to do with what is measured
    #[arg(long, default_value_t = 0)]
    pub workloads: usize,
    /// Where plots are written to, by those who draw any [default: target/bench]
    #[arg(long, value_name = "FOLDER")]
    pub plot: Option<PathBuf>,
    /// Let the proxies write their access log, not only what fails
    #[arg(long)]
    pub access_log: bool,
    /// cargo says that this is `cargo bench`
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Options {
    /// The options of this process, if something is to be measured: if it is no part of a bench, and `cargo bench` has started it.
    /// Ends it if they are not understood.
    #[must_use]
    pub fn asked() -> Option<Self> {
        if was_part() {
            return None;
        }
        crate::asked()?;
        let mut options = Self::parse();
        if options.quick {
            options.seconds = 1.0;
            options.rounds = 1;
        }
        if options.paths.is_empty() {
            options.paths = PathName::value_variants().to_vec();
        }
        if options.ztunnel.is_none() {
            options.paths.retain(|path| !path.is_ztunnel());
        }
        Some(options)
    }

    /// What proxies log.
    pub(crate) fn log_filter(&self) -> &'static str {
        if self.access_log { "info" } else { "info,access=warn" }
    }

    /// How long each load is measured, each time.
    #[must_use]
    pub fn window(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

/// A group of workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Throughput: one and eight streams, and one in reverse
    Bulk,
    /// Requests of one connection: latency
    Rtt,
    /// Requests of 64 connections: rate
    Rps,
    /// Connections for one request each, sixteen at a time
    Conn,
    /// Ten thousand connections at once, for one request each
    Storm,
    /// Memory at rest, of idle connections and after their end
    Idle,
    /// What is left to others while readers have stopped, and what those hold
    Stalls,
}

impl What {
    const USUAL: [Self; 6] =
        [Self::Bulk, Self::Rtt, Self::Rps, Self::Conn, Self::Storm, Self::Idle];
}

/// A way between two pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PathName {
    /// No proxies and no rules
    Direct,
    /// A bare relay in each pod that copies: the floor under any proxy that has to see the bytes
    RelayCopy,
    /// A bare relay in each pod that splices: the floor under any proxy in user space
    RelaySplice,
    /// A proxy in each pod, and a mesh that says TCP
    Plain,
    /// A proxy in each pod, and a mesh that says HBONE
    Hbone,
    /// A ztunnel in each pod, and a mesh that says TCP
    ZtunnelPlain,
    /// A ztunnel in each pod, and a mesh that says HBONE
    ZtunnelHbone,
}

impl PathName {
    /// Whether a ztunnel is between the pods.
    #[must_use]
    pub fn is_ztunnel(self) -> bool {
        matches!(self, Self::ZtunnelPlain | Self::ZtunnelHbone)
    }

    /// Whether it is bare relays that are between the pods.
    pub(crate) fn is_relay(self) -> bool {
        matches!(self, Self::RelayCopy | Self::RelaySplice)
    }

    /// Whether it is proxies of either kind that are between the pods.
    pub(crate) fn has_proxies(self) -> bool {
        self != Self::Direct && !self.is_relay()
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&option_name(self))
    }
}

impl fmt::Display for PathName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&option_name(self))
    }
}

/// As it is written on the command line.
fn option_name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

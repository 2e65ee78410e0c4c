//! What may be asked on the command line, after `cargo bench -p underpass-benches --`.

use std::fmt;
use std::time::Duration;

use clap::{Parser, ValueEnum};

/// Measures direct, relayed, plain and HBONE traffic between two pods, in one sitting
#[derive(Debug, Parser)]
#[command(name = "cargo bench -p underpass-benches --")]
pub struct Options {
    /// What to measure
    #[arg(long, value_delimiter = ',', default_values_t = What::ALL)]
    pub only: Vec<What>,
    /// Which ways to compare
    #[arg(long, value_delimiter = ',', default_values_t = PathName::ALL)]
    pub paths: Vec<PathName>,
    /// How long each load is measured, each time, after half a second that is not
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
    /// How often each load takes its turn on each path
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// A first impression: one second, one round
    #[arg(long)]
    pub quick: bool,
    /// Let the proxies write their access log, not only what fails
    #[arg(long)]
    pub access_log: bool,
    /// cargo says that this is `cargo bench`
    #[arg(long, hide = true)]
    pub bench: bool,
    /// Be the relay: FROM=TO,…
    #[arg(long, hide = true, value_delimiter = ',')]
    pub relay: Vec<String>,
}

impl Options {
    /// The options of this process; ends it if they are not understood.
    #[must_use]
    pub fn read() -> Self {
        let mut options = Self::parse();
        if options.quick {
            options.seconds = 1.0;
            options.rounds = 1;
        }
        options
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
    /// Memory at rest and of idle connections
    Idle,
    /// What is left to others while readers have stopped, and what those hold
    Stalls,
}

impl What {
    const ALL: [Self; 6] = [Self::Bulk, Self::Rtt, Self::Rps, Self::Conn, Self::Idle, Self::Stalls];
}

/// A way between two pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PathName {
    /// No proxies and no rules
    Direct,
    /// A bare relay in each pod: the floor under any proxy in user space
    Relay,
    /// A proxy in each pod, and a mesh that says TCP
    Plain,
    /// A proxy in each pod, and a mesh that says HBONE
    Hbone,
}

impl PathName {
    const ALL: [Self; 4] = [Self::Direct, Self::Relay, Self::Plain, Self::Hbone];
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

//! What others can make us hold, for how long, and what becomes of it when another process takes over.

use std::path::PathBuf;
use std::time::Duration;

/// What others can make us do at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections and streams that one worker serves.
    pub connections_per_worker: usize,
    /// Connections and streams of one source address (IPv6: of one /64); `None`: as many as the workers serve.
    pub connections_per_source: Option<usize>,
    /// How many connections each listener takes in a second; `None`: as many as come.
    pub accepts_per_second: Option<u32>,
    /// TLS handshakes under way; further ones wait.
    pub handshakes: usize,
    /// TLS handshakes that one source address may have under way.
    pub handshakes_per_source: usize,
    /// Tunnels of one source address (IPv6: of one /64) that are served; `None`: as many as come.
    pub tunnels_per_source: Option<usize>,
    /// Tunnels of one SPIFFE identity that are served; `None`: as many as come.
    pub tunnels_per_identity: Option<usize>,
    /// Bytes of memory for the buffers of busy connections, of all workers together.
    pub buffers: usize,
}

/// How long a peer may let us wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    /// For a TCP connection to be established.
    pub connect: Duration,
    /// For a TLS and HTTP/2 handshake to end, as client and as server.
    pub handshake: Duration,
    /// For a frame or header block of a tunnel to arrive whole, and for the peer's first SETTINGS.
    pub frame: Duration,
    /// For the answer to a CONNECT request.
    pub reply: Duration,
    /// For a byte to move in a connection; `None`: for ever.
    pub idle: Option<Duration>,
    /// For a byte to move in a connection of which one direction has ended; `None`: for ever.
    pub half_close: Option<Duration>,
    /// For a byte from the other side of a socket, before the kernel probes whether that side is still there.
    pub keepalive: Duration,
    /// For connections to end by themselves once the proxy was told to stop.
    pub drain: Duration,
    /// The same once another process has taken over.
    pub handover_drain: Duration,
    /// For a pooled tunnel without streams before it is closed.
    pub pool_idle: Duration,
    /// For a peer's tunnel without streams before it is closed.
    pub tunnel_idle: Duration,
    /// How long an endpoint that could not be connected to is ejected: selected last.
    pub ejection: Duration,
}

/// How many metric series of connections there are, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeriesSettings {
    /// How many sets of labels there are at most; connections beyond are counted as `overflow`.
    pub limit: usize,
    /// For how long a set of labels is kept when nothing is counted.
    pub idle: Duration,
}

impl Default for SeriesSettings {
    fn default() -> Self {
        // A set of labels takes some 4 KiB of `/metrics`. A peer that connects every half hour keeps its counters.
        Self { limit: 1000, idle: Duration::from_secs(3600) }
    }
}

/// Where another process may ask for our listeners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TakeOver {
    /// At a socket that is named after the network namespace.
    Auto,
    /// At this Unix socket.
    At(PathBuf),
    /// Nowhere.
    Off,
}

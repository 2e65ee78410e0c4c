//! Limits on resources that peers and clients can use, and timeouts.

use std::time::Duration;

/// Limits on resources that peers and clients can use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// The maximum number of connections and streams of one worker.
    pub connections_per_worker: usize,
    /// The maximum number of connections and streams of one source address (IPv6: one /64); `None`:
    /// no separate limit.
    pub connections_per_source: Option<usize>,
    /// The maximum rate at which each listener accepts connections; `None`: unlimited.
    pub accepts_per_second: Option<u32>,
    /// The maximum number of concurrent TLS handshakes. Further ones wait.
    pub handshakes: usize,
    /// The maximum number of concurrent TLS handshakes of one source address.
    pub handshakes_per_source: usize,
    /// The maximum number of tunnels of one source address (IPv6: one /64); `None`: unlimited.
    pub tunnels_per_source: Option<usize>,
    /// The maximum number of tunnels of one SPIFFE identity; `None`: unlimited.
    pub tunnels_per_identity: Option<usize>,
    /// The maximum memory for the buffers of busy connections of all workers, in bytes.
    pub buffers: usize,
}

/// Timeouts of connections, handshakes, tunnels and drains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    /// Timeout of a TCP connect.
    pub connect: Duration,
    /// Timeout of a TLS and HTTP/2 handshake, as client and as server.
    pub handshake: Duration,
    /// Timeout for receiving a complete frame or header block of a tunnel, and the peer's first
    /// SETTINGS.
    pub frame: Duration,
    /// Timeout for the response to a CONNECT request.
    pub reply: Duration,
    /// Idle timeout of a connection; `None`: unlimited.
    pub idle: Option<Duration>,
    /// Idle timeout of a half-closed connection; `None`: unlimited.
    pub half_close: Option<Duration>,
    /// The time without a byte from the other side of a socket after which the kernel sends
    /// keepalive probes.
    pub keepalive: Duration,
    /// The maximum duration of a drain after a stop signal.
    pub drain: Duration,
    /// The maximum duration of a drain after another process has taken over.
    pub handover_drain: Duration,
    /// Idle timeout of our tunnels without streams.
    pub pool_idle: Duration,
    /// Idle timeout of a peer's tunnels without streams.
    pub tunnel_idle: Duration,
    /// The time for which an endpoint is selected last after a failed connect.
    pub ejection: Duration,
}

//! The settings `timeouts` and `take_over`.

use std::time::Duration;

use crate::settings::declare::{
    DURATION, DURATION_OR_OFF, Document, Fallback, LOCAL_SOCKET, settings,
};
use crate::settings::{LocalSocket, Timeouts};

const HOUR: u64 = 3600;

settings! {
    // As in ztunnel. The kernel sends four SYNs in this time (again after 1, 3 and 7 s).
    /// timeout of a TCP connect
    CONNECT: Duration = "timeouts.connect", DURATION,
        Fallback::Is(|| Duration::from_secs(10)), |s| Some(s.timeouts.connect);
    /// timeout of a TLS and HTTP/2 handshake, as client and as server
    HANDSHAKE: Duration = "timeouts.handshake", DURATION,
        Fallback::Is(|| Duration::from_secs(10)), |s| Some(s.timeouts.handshake);
    /// timeout for a peer's first SETTINGS, and for a complete header block, control frame or (in a
    /// tunnel without streams) DATA frame; then the tunnel is closed
    FRAME: Duration = "timeouts.frame", DURATION,
        Fallback::Is(|| Duration::from_secs(10)), |s| Some(s.timeouts.frame);
    // The peer responds after it has connected to its application, so this must exceed the peer's
    // connect timeout.
    /// timeout for the response to a CONNECT request (the peer first connects to its application)
    REPLY: Duration = "timeouts.reply", DURATION,
        Fallback::Is(|| Duration::from_secs(15)), |s| Some(s.timeouts.reply);
    // Applications rely on connections that carry no data for days. Keepalive detects a lost peer.
    /// the time without data after which a connection is reset
    IDLE: Option<Duration> = "timeouts.idle", DURATION_OR_OFF,
        Fallback::Is(|| None), |s| Some(s.timeouts.idle);
    // A side that has ended its direction waits for an answer. If the other side is lost, keepalive
    // detects it sooner.
    /// the time without data after which a half-closed connection is reset; `off`: never
    HALF_CLOSE: Option<Duration> = "timeouts.half_close", DURATION_OR_OFF,
        Fallback::Is(|| Some(Duration::from_secs(HOUR))), |s| Some(s.timeouts.half_close);
    // NAT gateways and load balancers forget a silent connection after as little as 240 s.
    /// the time without data from either side before the kernel sends keepalive probes to it (9
    /// probes, at this interval)
    KEEPALIVE: Duration = "timeouts.keepalive", DURATION,
        Fallback::Is(|| Duration::from_secs(180)), |s| Some(s.timeouts.keepalive);
    // Kubernetes gives a pod 30 s by default; this leaves most of it to the application.
    /// the time for open connections to end after a stop signal; the rest is reset
    DRAIN: Duration = "timeouts.drain", DURATION,
        Fallback::Is(|| Duration::from_secs(5)), |s| Some(s.timeouts.drain);
    // The old process costs some memory, but ending it early would cost connections.
    /// the time for open connections to end after another process has taken over (`--take-over`)
    HANDOVER_DRAIN: Duration = "timeouts.handover_drain", DURATION,
        Fallback::Is(|| Duration::from_secs(HOUR)), |s| Some(s.timeouts.handover_drain);
    /// the time without streams after which a tunnel that this proxy opened is closed
    POOL_IDLE: Duration = "timeouts.pool_idle", DURATION,
        Fallback::Is(|| Duration::from_secs(300)), |s| Some(s.timeouts.pool_idle);
    // Longer than ztunnel (`POOL_UNUSED_RELEASE_TIMEOUT`) and our own pool keep a tunnel, so that
    // they close it first.
    /// the time without streams after which a tunnel that a peer opened is closed; longer than
    /// peers keep theirs (ztunnel: `POOL_UNUSED_RELEASE_TIMEOUT`, 300 s), because a request that
    /// crosses GOAWAY may fail there
    TUNNEL_IDLE: Duration = "timeouts.tunnel_idle", DURATION,
        Fallback::Is(|| Duration::from_secs(600)), |s| Some(s.timeouts.tunnel_idle);
    // The maximum duration of one attempt: an endpoint that does not respond then delays each
    // caller only once.
    /// the time for which an endpoint is selected last after a failed connect
    EJECTION: Duration = "timeouts.ejection", DURATION,
        Fallback::Is(|| Duration::from_secs(10)), |s| Some(s.timeouts.ejection);
    /// the Unix socket on which a new process requests the listeners to take over; `auto`:
    /// `/run/underpass/take-over-N.sock`, where N is the number of the network namespace; `off`: no
    /// take-over
    SOCKET: LocalSocket = "take_over.socket", LOCAL_SOCKET,
        Fallback::Is(|| LocalSocket::Auto), |s| Some(s.take_over.clone());
}

pub(super) fn timeouts(document: Document<'_>) -> Option<Timeouts> {
    Some(Timeouts {
        connect: CONNECT.read(document)?,
        handshake: HANDSHAKE.read(document)?,
        frame: FRAME.read(document)?,
        reply: REPLY.read(document)?,
        idle: IDLE.read(document)?,
        half_close: HALF_CLOSE.read(document)?,
        keepalive: KEEPALIVE.read(document)?,
        drain: DRAIN.read(document)?,
        handover_drain: HANDOVER_DRAIN.read(document)?,
        pool_idle: POOL_IDLE.read(document)?,
        tunnel_idle: TUNNEL_IDLE.read(document)?,
        ejection: EJECTION.read(document)?,
    })
}

pub(super) fn take_over(document: Document<'_>) -> Option<LocalSocket> {
    SOCKET.read(document)
}

//! The settings `timeouts` and `take_over`.

use std::time::Duration;

use crate::settings::declare::{
    DURATION, DURATION_OR_OFF, Document, Fallback, Kind, Written, settings,
};
use crate::settings::{TakeOver, Timeouts};

const HOUR: u64 = 3600;

settings! {
    // As long as ztunnel waits; a SYN is sent four times in it (after 1, 3 and 7 s).
    /// for a TCP connection to be established
    CONNECT: Duration = "timeouts.connect", DURATION,
        Fallback::Is(|| Duration::from_secs(10)), |s| Some(s.timeouts.connect);
    /// for a TLS and HTTP/2 handshake, as client and as server
    HANDSHAKE: Duration = "timeouts.handshake", DURATION,
        Fallback::Is(|| Duration::from_secs(10)), |s| Some(s.timeouts.handshake);
    /// for a peer's first SETTINGS, and for a header block, control frame or (in a tunnel without
    /// streams) DATA frame to arrive whole; then the tunnel is closed
    FRAME: Duration = "timeouts.frame", DURATION,
        Fallback::Is(|| Duration::from_secs(10)), |s| Some(s.timeouts.frame);
    // The peer answers after it has connected to its application, so this must outlast the peer's
    // own connect deadline.
    /// for the answer to a CONNECT request (the peer connects to its application first)
    REPLY: Duration = "timeouts.reply", DURATION,
        Fallback::Is(|| Duration::from_secs(15)), |s| Some(s.timeouts.reply);
    // Applications keep connections open that carry nothing for days, and rely on it. Keepalive
    // detects a peer that is gone.
    /// for a byte to move in a connection; then it is reset
    IDLE: Option<Duration> = "timeouts.idle", DURATION_OR_OFF,
        Fallback::Is(|| None), |s| Some(s.timeouts.idle);
    // A side that has ended its direction waits for an answer. If it is gone, keepalive detects it
    // sooner.
    /// the same once one side has ended its direction; `off`: for ever
    HALF_CLOSE: Option<Duration> = "timeouts.half_close", DURATION_OR_OFF,
        Fallback::Is(|| Some(Duration::from_secs(HOUR))), |s| Some(s.timeouts.half_close);
    // NAT gateways and load balancers on the way forget a silent connection after as little as 240
    // s.
    /// for a byte from either side, before the kernel asks whether that side is still there (9
    /// times, as far apart)
    KEEPALIVE: Duration = "timeouts.keepalive", DURATION,
        Fallback::Is(|| Duration::from_secs(180)), |s| Some(s.timeouts.keepalive);
    // Kubernetes gives a pod 30 s by default; this leaves most of it to the application.
    /// for connections to end by themselves once the proxy was told to stop; then they are reset
    DRAIN: Duration = "timeouts.drain", DURATION,
        Fallback::Is(|| Duration::from_secs(5)), |s| Some(s.timeouts.drain);
    // The process that was taken over costs some memory; ending it early costs connections.
    /// the same once another process has taken over (`underpass run --take-over`)
    HANDOVER_DRAIN: Duration = "timeouts.handover_drain", DURATION,
        Fallback::Is(|| Duration::from_secs(HOUR)), |s| Some(s.timeouts.handover_drain);
    /// for a tunnel of ours without streams before it is closed
    POOL_IDLE: Duration = "timeouts.pool_idle", DURATION,
        Fallback::Is(|| Duration::from_secs(300)), |s| Some(s.timeouts.pool_idle);
    // Longer than ztunnel (`POOL_UNUSED_RELEASE_TIMEOUT`) and our own pool keep a tunnel: they
    // close it first.
    /// the same for a peer's tunnel; longer than peers keep theirs (a stock ztunnel:
    /// `POOL_UNUSED_RELEASE_TIMEOUT`, 300 s), for a request that meets GOAWAY may fail there
    TUNNEL_IDLE: Duration = "timeouts.tunnel_idle", DURATION,
        Fallback::Is(|| Duration::from_secs(600)), |s| Some(s.timeouts.tunnel_idle);
    // As long as one attempt may take: an endpoint that does not answer then delays each caller
    // once.
    /// for which an endpoint that could not be connected to is selected last
    EJECTION: Duration = "timeouts.ejection", DURATION,
        Fallback::Is(|| Duration::from_secs(10)), |s| Some(s.timeouts.ejection);
    /// the Unix socket at which a process that is to take over asks for the listeners; `auto`:
    /// `/run/underpass/take-over-N.sock`, where N is the number of the network namespace; `off`:
    /// none can
    SOCKET: TakeOver = "take_over.socket", TAKE_OVER,
        Fallback::Is(|| TakeOver::Auto), |s| Some(s.take_over.clone());
}

const TAKE_OVER: Kind<TakeOver> = Kind {
    name: "path, `auto`, `off`",
    is_list: false,
    read: |cursor, files| match cursor.text()? {
        "auto" => Some(TakeOver::Auto),
        "off" => Some(TakeOver::Off),
        _ => files.path(cursor).map(TakeOver::At),
    },
    write: |take_over| match take_over {
        TakeOver::Auto => Written::scalar("auto"),
        TakeOver::At(socket) => Written::scalar(socket.display()),
        TakeOver::Off => Written::scalar("off"),
    },
};

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

pub(super) fn take_over(document: Document<'_>) -> Option<TakeOver> {
    SOCKET.read(document)
}

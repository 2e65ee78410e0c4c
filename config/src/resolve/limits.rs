//! From the sections `limits`, `timeouts` and `take_over` to their settings.

use std::time::Duration;

use super::Files;
use crate::read::Cursor;
use crate::settings::{Limits, SeriesSettings, TakeOver, Timeouts};

const HOUR: u64 = 3600;
const MIB: usize = 1 << 20;

pub(super) fn limits(section: Cursor<'_>) -> Limits {
    let count = |key: &str, default| {
        section.key(key).number(1..=usize::MAX, "a number, 1 or more").unwrap_or(default)
    };
    let or_off = |key: &str, default| {
        off_or(section.key(key), default, |cursor| {
            cursor.number(1..=u32::MAX as usize, "off or a number, 1 or more")
        })
    };
    Limits {
        connections_per_worker: count("connections_per_worker", 50_000),
        // One address has some 28,000 ports for one destination. A workload, a node's gateway or a load balancer may use many
        // of them rightly; all of them is what a client does that never closes any.
        connections_per_source: or_off("connections_per_source", Some(20_000)),
        // How many a machine bears is known to whoever chose it; the kernel's queue and the limits above hold anyway.
        accepts_per_second: or_off("accepts_per_second", None)
            .and_then(|count| u32::try_from(count).ok()),
        // A handshake takes about a millisecond of a CPU: more of them at once only make all of them late.
        handshakes: count("handshakes", 1024),
        // A peer opens a few tunnels for each of its workers, and several peers may stand behind one address.
        handshakes_per_source: count("handshakes_per_source", 64),
        // A worker of ours opens at most `tunnels.per_peer` to a peer: this is enough for 128
        // workers. A tunnel without streams can hold 256 KiB (the largest frame), these 128 MiB
        // together.
        tunnels_per_source: or_off("tunnels_per_source", Some(512)),
        // One service account may have hundreds of replicas.
        tunnels_per_identity: or_off("tunnels_per_identity", Some(4096)),
        buffers: section.key("buffers").size().unwrap_or(256 * MIB),
    }
}

pub(super) fn timeouts(section: Cursor<'_>) -> Timeouts {
    let seconds = |key: &str, default| {
        section.key(key).duration().unwrap_or_else(|| Duration::from_secs(default))
    };
    let or_off = |key: &str, default: Option<u64>| {
        let default = default.map(Duration::from_secs);
        off_or(section.key(key), default, |cursor| cursor.duration_or_off())
    };
    Timeouts {
        // As long as ztunnel waits; a SYN is sent four times in it (after 1, 3 and 7 s).
        connect: seconds("connect", 10),
        handshake: seconds("handshake", 10),
        frame: seconds("frame", 10),
        // The peer answers after it has connected to its application, so it must outlast the peer's own connect deadline.
        reply: seconds("reply", 15),
        // Applications keep connections open that carry nothing for days, and rely on it. Whether the other side is still there
        // is what keepalive finds out.
        idle: or_off("idle", None),
        // Who has ended its direction waits for an answer, and has gone itself in most cases; keepalive finds that out sooner.
        half_close: or_off("half_close", Some(HOUR)),
        // NAT gateways and load balancers on the way forget a silent connection after as little as 240 s.
        keepalive: seconds("keepalive", 180),
        // Kubernetes gives a pod 30 s by default; this leaves most of it to the application.
        drain: seconds("drain", 5),
        // Nobody waits for the process that was taken over: it costs some memory, and cutting costs connections.
        handover_drain: seconds("handover_drain", HOUR),
        pool_idle: seconds("pool_idle", 300),
        // Longer than ztunnel (`POOL_UNUSED_RELEASE_TIMEOUT`) and our own pool keep a tunnel: they
        // close it first.
        tunnel_idle: seconds("tunnel_idle", 600),
        // As long as one attempt may take: what does not answer then costs every caller that much, once.
        ejection: seconds("ejection", 10),
    }
}

pub(super) fn series(section: Cursor<'_>) -> SeriesSettings {
    let default = SeriesSettings::default();
    let limit = section.key("label_sets").number(1..=usize::MAX, "a number, 1 or more");
    let idle = section.key("idle").duration();
    SeriesSettings { limit: limit.unwrap_or(default.limit), idle: idle.unwrap_or(default.idle) }
}

pub(super) fn take_over(section: Cursor<'_>, files: Files<'_>) -> TakeOver {
    let socket = section.key("socket");
    match socket.text() {
        None | Some("auto") => TakeOver::Auto,
        Some("off") => TakeOver::Off,
        Some(_) => files.path(socket).map_or(TakeOver::Auto, TakeOver::At),
    }
}

/// `off` is a value of its own.
fn off_or<T>(
    cursor: Cursor<'_>,
    default: Option<T>,
    read: impl Fn(Cursor<'_>) -> Option<T>,
) -> Option<T> {
    match cursor.text() {
        None => default,
        Some("off") => None,
        Some(_) => read(cursor),
    }
}

#[cfg(test)]
mod tests;

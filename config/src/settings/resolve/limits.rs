//! The settings `limits`.

use crate::settings::Limits;
use crate::settings::declare::{
    COUNT, COUNT_OR_OFF, Document, Fallback, RATE_OR_OFF, SIZE, settings,
};

settings! {
    /// connections and streams that one worker serves; above that new ones are refused
    CONNECTIONS_PER_WORKER: usize = "limits.connections_per_worker", COUNT,
        Fallback::Is(|| 50_000), |s| Some(s.limits.connections_per_worker);
    // One address has about 28,000 ephemeral ports for one destination. A workload, a node's
    // gateway or a load balancer may legitimately use many; a client that closes no connection uses
    // all.
    /// connections and streams of one address (IPv6: one /64); above that its new ones are refused;
    /// `off`: as many as the workers serve
    CONNECTIONS_PER_SOURCE: Option<usize> = "limits.connections_per_source", COUNT_OR_OFF,
        Fallback::Is(|| Some(20_000)), |s| Some(s.limits.connections_per_source);
    // The right rate depends on the machine. Without one, the kernel's queue and the limits above
    // still apply.
    /// how many connections each of the three listeners takes in a second, a tenth of them at once;
    /// further ones wait in the kernel's queue
    ACCEPTS_PER_SECOND: Option<u32> = "limits.accepts_per_second", RATE_OR_OFF,
        Fallback::Is(|| None), |s| Some(s.limits.accepts_per_second);
    // A handshake takes about a millisecond of CPU time: more concurrent ones delay each other.
    /// TLS handshakes under way; further ones wait, no longer than `timeouts.handshake`. A
    /// connection without a ClientHello is none
    HANDSHAKES: usize = "limits.handshakes", COUNT,
        Fallback::Is(|| 1024), |s| Some(s.limits.handshakes);
    // A peer opens a few tunnels per worker, and several peers may share an address.
    /// TLS handshakes that one address (IPv6: one /64) may have under way; above that its
    /// connections are closed
    HANDSHAKES_PER_SOURCE: usize = "limits.handshakes_per_source", COUNT,
        Fallback::Is(|| 64), |s| Some(s.limits.handshakes_per_source);
    // A worker opens at most `tunnels.per_peer` tunnels to a peer: enough for 128 workers. A tunnel
    // without streams can hold 256 KiB (the largest frame): 128 MiB in total.
    /// tunnels of one address (IPv6: one /64) that are served at a time; further ones are reset
    /// before their handshake; `off`: as many as come
    TUNNELS_PER_SOURCE: Option<usize> = "limits.tunnels_per_source", COUNT_OR_OFF,
        Fallback::Is(|| Some(512)), |s| Some(s.limits.tunnels_per_source);
    // One service account may have hundreds of replicas.
    /// tunnels of one SPIFFE identity that are served at a time; further ones get GOAWAY after
    /// their handshake; `off`: as many as come
    TUNNELS_PER_IDENTITY: Option<usize> = "limits.tunnels_per_identity", COUNT_OR_OFF,
        Fallback::Is(|| Some(4096)), |s| Some(s.limits.tunnels_per_identity);
    /// memory for the buffers of busy connections, all together; above that connections get small
    /// buffers only
    BUFFERS: usize = "limits.buffers", SIZE, Fallback::Is(|| 256 << 20), |s| Some(s.limits.buffers);
}

pub(super) fn limits(document: Document<'_>) -> Option<Limits> {
    Some(Limits {
        connections_per_worker: CONNECTIONS_PER_WORKER.read(document)?,
        connections_per_source: CONNECTIONS_PER_SOURCE.read(document)?,
        accepts_per_second: ACCEPTS_PER_SECOND.read(document)?,
        handshakes: HANDSHAKES.read(document)?,
        handshakes_per_source: HANDSHAKES_PER_SOURCE.read(document)?,
        tunnels_per_source: TUNNELS_PER_SOURCE.read(document)?,
        tunnels_per_identity: TUNNELS_PER_IDENTITY.read(document)?,
        buffers: BUFFERS.read(document)?,
    })
}

#[cfg(test)]
mod tests;

//! The settings `limits`.

use crate::settings::Limits;
use crate::settings::declare::{
    COUNT, COUNT_OR_OFF, Document, Fallback, RATE_OR_OFF, SIZE, settings,
};

settings! {
    /// the maximum number of connections and streams of one worker; further ones are refused
    CONNECTIONS_PER_WORKER: usize = "limits.connections_per_worker", COUNT,
        Fallback::Is(|| 50_000), |s| Some(s.limits.connections_per_worker);
    // One address has about 28,000 ephemeral ports for one destination. A workload, a node's
    // gateway or a load balancer may legitimately use many; a client that never closes connections
    // uses all.
    /// the maximum number of connections and streams of one address (IPv6: one /64); further ones
    /// are refused; `off`: no separate limit
    CONNECTIONS_PER_SOURCE: Option<usize> = "limits.connections_per_source", COUNT_OR_OFF,
        Fallback::Is(|| Some(20_000)), |s| Some(s.limits.connections_per_source);
    // The right rate depends on the machine. Without one, the accept queue and the limits above
    // still apply.
    /// the maximum number of connections that each of the three listeners accepts per second, a
    /// tenth of them at once; further ones wait in the accept queue
    ACCEPTS_PER_SECOND: Option<u32> = "limits.accepts_per_second", RATE_OR_OFF,
        Fallback::Is(|| None), |s| Some(s.limits.accepts_per_second);
    // A handshake takes about a millisecond of CPU time: more concurrent ones would delay each
    // other.
    /// the maximum number of concurrent TLS handshakes; further ones wait, at most for
    /// `timeouts.handshake`. A connection counts once it has sent a ClientHello
    HANDSHAKES: usize = "limits.handshakes", COUNT,
        Fallback::Is(|| 1024), |s| Some(s.limits.handshakes);
    // A peer opens a few tunnels per worker, and several peers may share an address.
    /// the maximum number of concurrent TLS handshakes of one address (IPv6: one /64); further
    /// connections are closed
    HANDSHAKES_PER_SOURCE: usize = "limits.handshakes_per_source", COUNT,
        Fallback::Is(|| 64), |s| Some(s.limits.handshakes_per_source);
    // A worker opens at most `tunnels.per_peer` tunnels to a peer, so this suffices for 128
    // workers. A tunnel without streams can hold 256 KiB (the largest frame): 128 MiB in total.
    /// the maximum number of tunnels of one address (IPv6: one /64); further ones are reset before
    /// their handshake; `off`: unlimited
    TUNNELS_PER_SOURCE: Option<usize> = "limits.tunnels_per_source", COUNT_OR_OFF,
        Fallback::Is(|| Some(512)), |s| Some(s.limits.tunnels_per_source);
    // One service account may have hundreds of replicas.
    /// the maximum number of tunnels of one SPIFFE identity; further ones get GOAWAY after their
    /// handshake; `off`: unlimited
    TUNNELS_PER_IDENTITY: Option<usize> = "limits.tunnels_per_identity", COUNT_OR_OFF,
        Fallback::Is(|| Some(4096)), |s| Some(s.limits.tunnels_per_identity);
    /// the memory for the buffers of all busy connections; beyond it connections get only small
    /// buffers
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

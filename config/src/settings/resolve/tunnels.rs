//! The settings `tunnels`.

use std::time::Duration;

use crate::settings::TunnelSettings;
use crate::settings::declare::{COUNT, DURATION, Document, Fallback, Kind, settings};

settings! {
    // Only a handshake detects a peer that was renamed or moved to other roots. A handshake an hour
    // costs nothing.
    /// the age after which a tunnel accepts no new streams (up to a tenth less, at random); open
    /// streams continue
    MAX_AGE: Duration = "tunnels.max_age", DURATION,
        Fallback::Is(|| Duration::from_secs(3600)), |s| Some(s.tunnels.max_age);
    // As in ztunnel, which accepts at most 200.
    /// the maximum number of streams in a tunnel, 1 to 10000; the peer may allow fewer
    STREAMS: usize = "tunnels.streams", UP_TO_10000,
        Fallback::Is(|| 100), |s| Some(s.tunnels.streams);
    // A thread of the peer serves each tunnel: four tunnels use four threads.
    /// the maximum number of tunnels of a worker to one peer, 1 to 64; more than one is opened only
    /// under load
    PER_PEER: usize = "tunnels.per_peer", UP_TO_64,
        Fallback::Is(|| 4), |s| Some(s.tunnels.per_peer);
}

const UP_TO_10000: Kind<usize> =
    Kind { read: |cursor, _| cursor.number(1..=10_000, "a number, 1 to 10000"), ..COUNT };
const UP_TO_64: Kind<usize> =
    Kind { read: |cursor, _| cursor.number(1..=64, "a number, 1 to 64"), ..COUNT };

pub(super) fn tunnels(document: Document<'_>) -> Option<TunnelSettings> {
    Some(TunnelSettings {
        max_age: MAX_AGE.read(document)?,
        streams: STREAMS.read(document)?,
        per_peer: PER_PEER.read(document)?,
    })
}

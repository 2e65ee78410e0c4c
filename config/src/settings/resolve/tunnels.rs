//! The settings `tunnels`.

use std::time::Duration;

use crate::settings::TunnelSettings;
use crate::settings::declare::{COUNT, DURATION, Document, Fallback, Kind, settings};

settings! {
    // Only a handshake shows what has changed: a peer that was renamed or moved to other roots is
    // noticed within the hour, and a handshake an hour costs nothing.
    /// how long a tunnel takes new streams (up to a tenth less, at random); those under way go on
    MAX_AGE: Duration = "tunnels.max_age", DURATION,
        Fallback::Is(|| Duration::from_secs(3600)), |s| Some(s.tunnels.max_age);
    // As many as ztunnel opens at once in a tunnel, and it takes no more than 200.
    /// how many streams share a tunnel, 1 to 10000; the peer may allow fewer
    STREAMS: usize = "tunnels.streams", UP_TO_10000,
        Fallback::Is(|| 100), |s| Some(s.tunnels.streams);
    // One tunnel is served by one thread of the peer: four of them make use of four.
    /// how many tunnels a worker has to one peer at most, 1 to 64; there are more than one only
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

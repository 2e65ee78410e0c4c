//! The plan of a stream. It is derived from a seed, so that both ends have the same plan.
//! `stream.rs` executes it.

use std::sync::OnceLock;
use std::time::Duration;

use fastrand::Rng;

/// The maximum number of bytes in one direction.
const MAX_BYTES: f64 = 20.0 * 1024.0 * 1024.0;

/// The maximum number of pieces in one direction, if each has the maximum size.
const MAX_PIECES: u64 = 4000;

/// The plan of a stream.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) kind: Kind,
    /// The number of bytes that the client sends.
    pub(super) up: u64,
    pub(super) down: u64,
    pub(super) client: Pace,
    pub(super) server: Pace,
}

/// The order of sending, and the kind of end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Both directions concurrently.
    Both,
    /// The server starts after the client's FIN.
    RequestResponse,
    /// The client sends its FIN after the server's.
    ServerEndsFirst,
    /// The client resets the stream after this number of received bytes, or when the server has
    /// finished.
    ClientResets(u64),
    /// The server resets the stream after this number of received bytes, or when the client has
    /// finished.
    ServerResets(u64),
    /// The client connects, sends nothing, waits and closes.
    Unused,
}

/// The speed of one end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// The maximum size of a read or write.
    pub(super) piece: usize,
    /// The average number of pieces between two pauses.
    pub(super) pauses: u64,
    /// The position at which the end stops reading for a while, and the duration.
    pub(super) stall: Option<(u64, Duration)>,
}

impl Plan {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let (up, down) = (size(&mut rng), size(&mut rng));
        let kind = match rng.u32(0..100) {
            0..35 => Kind::Both,
            35..65 => Kind::RequestResponse,
            65..80 => Kind::ServerEndsFirst,
            80..87 => Kind::ClientResets(rng.u64(0..=down)),
            87..94 => Kind::ServerResets(rng.u64(0..=up)),
            _ => Kind::Unused,
        };
        // Some streams have only one direction.
        let (up, down) = match rng.u32(0..10) {
            0 => (0, down),
            1 => (up, 0),
            _ => (up, down),
        };
        let client = Pace::new(&mut rng, up, down);
        let server = Pace::new(&mut rng, down, up);
        Self { seed, kind, up, down, client, server }
    }

    /// Whether the stream ends with FIN on both sides in the absence of faults.
    pub(super) fn ends_with_fin(&self) -> bool {
        !matches!(self.kind, Kind::ClientResets(_) | Kind::ServerResets(_))
    }
}

impl Pace {
    fn new(rng: &mut Rng, sent: u64, received: u64) -> Self {
        // Small, but large enough to avoid millions of pieces.
        let least = usize::try_from(sent.max(received) / MAX_PIECES).unwrap_or(usize::MAX);
        let piece = least.max(1 << rng.u32(4..16));
        let pauses = rng.u64(20..2000);
        let stalls = rng.u32(0..8) == 0;
        let stall =
            stalls.then(|| (rng.u64(0..=received), Duration::from_millis(rng.u64(500..4000))));
        Self { piece, pauses, stall }
    }
}

/// A log-uniform random size, or sometimes zero.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between 0 and MAX_BYTES"
)]
fn size(rng: &mut Rng) -> u64 {
    if rng.u32(0..20) == 0 { 0 } else { MAX_BYTES.powf(rng.f64()) as u64 }
}

/// The data of a direction: random bytes, starting at an offset that the seed determines. They
/// repeat with a prime period that no buffer or frame size divides, so lost, duplicated or
/// misplaced data is detected. Generating them is a copy, which leaves the CPU to the proxies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pattern(u64);

/// The period of the data in bytes, a prime.
const PERIOD: usize = 1_048_573;

impl Pattern {
    pub(super) fn up(plan: &Plan) -> Self {
        Self(plan.seed)
    }

    pub(super) fn down(plan: &Plan) -> Self {
        Self(!plan.seed)
    }

    /// Writes the data at `offset`.
    pub(super) fn fill(self, offset: u64, bytes: &mut [u8]) {
        let mut rest = bytes;
        for part in self.from(offset, rest.len()) {
            let (now, later) = rest.split_at_mut(part.len());
            now.copy_from_slice(part);
            rest = later;
        }
    }

    /// The position of the first byte that differs from the sent data.
    pub(super) fn deviation(self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let mut rest = bytes;
        for part in self.from(offset, bytes.len()) {
            let (now, later) = rest.split_at(part.len());
            if now != part {
                let same = now.iter().zip(part).take_while(|(byte, wanted)| byte == wanted).count();
                return Some(offset + (bytes.len() - rest.len() + same) as u64);
            }
            rest = later;
        }
        None
    }

    /// The data from `offset` on, in pieces.
    fn from(self, offset: u64, length: usize) -> impl Iterator<Item = &'static [u8]> {
        let start = (self.0 % PERIOD as u64 + offset) % PERIOD as u64;
        let mut start = usize::try_from(start).unwrap_or_default();
        let mut rest = length;
        std::iter::from_fn(move || {
            let length = rest.min(PERIOD - start);
            let part = bytes().get(start..start + length).filter(|part| !part.is_empty())?;
            (start, rest) = (0, rest - length);
            Some(part)
        })
    }
}

/// The bytes of one period.
fn bytes() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let mut rng = Rng::with_seed(0);
        std::iter::repeat_with(|| rng.u8(..)).take(PERIOD).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_detects_position_of_deviation_for_any_piece_size() {
        let pattern = Pattern(7);
        for offset in [3, PERIOD as u64 - 60] {
            let mut whole = [0; 100];
            pattern.fill(offset, &mut whole);
            for cut in 0..whole.len() {
                let (head, tail) = whole.split_at(cut);
                assert_eq!(pattern.deviation(offset, head), None);
                assert_eq!(pattern.deviation(offset + cut as u64, tail), None);
            }
            let mut wrong = whole;
            *wrong.last_mut().expect("there are a hundred") ^= 1;
            assert_eq!(pattern.deviation(offset, &wrong), Some(offset + 99));
            assert_eq!(Pattern(8).deviation(offset, &whole), Some(offset));
        }
    }

    #[test]
    fn stream_plan_depends_only_on_seed() {
        let text = |seed| format!("{:?}", Plan::new(seed));
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }
}

//! What one stream of the soak does, all of it from one number, so that both of its ends know it.
//!
//! Not here: doing it (`stream.rs`).

use std::sync::OnceLock;
use std::time::Duration;

use fastrand::Rng;

/// The most that a direction carries.
const LARGEST: f64 = 20.0 * 1024.0 * 1024.0;

/// A direction is in no more pieces than so many, if it always takes the largest.
const PIECES: u64 = 4000;

/// What a stream does.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) kind: Kind,
    /// How much the client sends, and the server.
    pub(super) up: u64,
    pub(super) down: u64,
    pub(super) client: Manner,
    pub(super) server: Manner,
}

/// Who sends when, and how it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Both directions at once.
    Both,
    /// The server begins when it has seen the client's FIN.
    RequestResponse,
    /// The client sends its FIN when it has seen the server's.
    ServerEndsFirst,
    /// The client resets it when it has received so many bytes, or the server is done.
    ClientResets(u64),
    /// The server resets it when it has received so many bytes, or the client is done.
    ServerResets(u64),
    /// The client connects, says nothing, waits and leaves.
    Unused,
}

/// How one end goes about it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manner {
    /// The largest piece that is written, and read, at once.
    pub(super) piece: usize,
    /// One piece in so many is followed by a pause.
    pub(super) pauses: u64,
    /// Where the end stops reading for a while, and for how long.
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
        // One way only, now and then.
        let (up, down) = match rng.u32(0..10) {
            0 => (0, down),
            1 => (up, 0),
            _ => (up, down),
        };
        let client = Manner::new(&mut rng, up, down);
        let server = Manner::new(&mut rng, down, up);
        Self { seed, kind, up, down, client, server }
    }

    /// Whether it ends well if nobody disturbs it.
    pub(super) fn ends_well(&self) -> bool {
        !matches!(self.kind, Kind::ClientResets(_) | Kind::ServerResets(_))
    }
}

impl Manner {
    fn new(rng: &mut Rng, sent: u64, received: u64) -> Self {
        // Small ones, but not so small that a stream is millions of them.
        let least = usize::try_from(sent.max(received) / PIECES).unwrap_or(usize::MAX);
        let piece = least.max(1 << rng.u32(4..16));
        let pauses = rng.u64(20..2000);
        let stalls = rng.u32(0..8) == 0;
        let stall =
            stalls.then(|| (rng.u64(0..=received), Duration::from_millis(rng.u64(500..4000))));
        Self { piece, pauses, stall }
    }
}

/// Log-uniform, with nothing at all now and then.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between 0 and LARGEST"
)]
fn size(rng: &mut Rng) -> u64 {
    if rng.u32(0..20) == 0 { 0 } else { LARGEST.powf(rng.f64()) as u64 }
}

/// What a direction of a stream carries: random bytes that follow from where they are, and begin where its seed says. They come again
/// after a prime number of bytes, which no buffer or frame is long: nothing that is lost, twice or elsewhere fits. To copy them costs
/// next to nothing, so that what is tried gets the processor and not who tries it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pattern(u64);

/// A prime.
const PERIOD: usize = 1_048_573;

impl Pattern {
    pub(super) fn up(plan: &Plan) -> Self {
        Self(plan.seed)
    }

    pub(super) fn down(plan: &Plan) -> Self {
        Self(!plan.seed)
    }

    /// Writes what stands at `offset`.
    pub(super) fn fill(self, offset: u64, bytes: &mut [u8]) {
        let mut rest = bytes;
        for part in self.from(offset, rest.len()) {
            let (now, later) = rest.split_at_mut(part.len());
            now.copy_from_slice(part);
            rest = later;
        }
    }

    /// Where `bytes`, received at `offset`, are not what was sent.
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

    /// So many bytes from `offset` on, in pieces.
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
    fn a_pattern_is_the_same_in_any_pieces_and_tells_where_it_is_not() {
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
    fn a_plan_follows_from_its_seed_and_plans_differ() {
        let text = |seed| format!("{:?}", Plan::new(seed));
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }
}

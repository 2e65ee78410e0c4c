//! Tests of frames in arbitrary pieces, unfinished header blocks, and floods.

use proptest::prelude::*;

use super::*;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const UNKNOWN: u8 = 0xee;

const MAX_HEADER_BLOCK: u32 = 64 << 10;
/// More frames than [`CONTROL_FRAME_BURST`].
const TOO_MANY: usize = 1001;

fn head(length: usize, kind: u8, flags: u8) -> Vec<u8> {
    let [_, high, middle, low] = u32::try_from(length).unwrap().to_be_bytes();
    vec![high, middle, low, kind, flags, 0, 0, 0, 1]
}

fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
    [head(length, kind, flags), vec![0; length]].concat()
}

/// Changes the stream of a frame.
fn on_stream(stream: usize, mut frame: Vec<u8>) -> Vec<u8> {
    frame[5..9].copy_from_slice(&u32::try_from(stream).unwrap().to_be_bytes());
    frame
}

impl Inspector {
    fn inspect_all(
        &mut self,
        bytes: &[u8],
        now: u64,
        useful: u64,
    ) -> Result<Option<UnfinishedFrame>, TunnelLimit> {
        self.inspect(bytes, now, useful, |_| ())
    }
}

/// An inspector that has already received the peer's SETTINGS.
fn inspector(role: PeerRole) -> Inspector {
    let mut inspector = Inspector::new(role, MAX_HEADER_BLOCK);
    let preface = if role == PeerRole::Client { PREFACE } else { 0 };
    let begin = [vec![b'P'; preface], frame(SETTINGS, 0, 0)].concat();
    assert_eq!(inspector.inspect_all(&begin, 0, 0), Ok(None));
    inspector
}

#[test]
fn missing_first_settings_are_unfinished_frame() {
    let mut inspector = Inspector::new(PeerRole::Client, MAX_HEADER_BLOCK);
    let awaited = Some(UnfinishedFrame { since: 0, data: false });
    assert_eq!(inspector.inspect_all(&[b'P'; PREFACE], 7, 0), Ok(awaited));
    assert_eq!(inspector.inspect_all(&frame(PING, 0, 8), 8, 0), Ok(awaited));
    assert_eq!(inspector.inspect_all(&frame(SETTINGS, 0, 6), 9, 0), Ok(None));
}

#[test]
fn refuses_header_block_beyond_header_list() {
    for kind in [HEADERS, PUSH_PROMISE] {
        let mut whole = inspector(PeerRole::Client);
        assert_eq!(
            whole.inspect_all(&frame(kind, END_HEADERS, MAX_HEADER_BLOCK as usize), 0, 0),
            Ok(None)
        );
        // The frame is rejected before its payload arrives.
        let larger = head(MAX_HEADER_BLOCK as usize + 1, kind, END_HEADERS);
        assert_eq!(whole.inspect_all(&larger, 0, 0), Err(TunnelLimit::HeaderBlock));
    }
    let mut pieces = inspector(PeerRole::Client);
    pieces.inspect_all(&frame(HEADERS, 0, 40 << 10), 0, 0).unwrap();
    pieces.inspect_all(&frame(CONTINUATION, 0, 24 << 10), 0, 0).unwrap();
    let one_more = frame(CONTINUATION, END_HEADERS, 1);
    assert_eq!(pieces.inspect_all(&one_more, 0, 0), Err(TunnelLimit::HeaderBlock));
}

#[test]
fn open_header_block_is_unfinished_since_its_first_byte() {
    let mut inspector = inspector(PeerRole::Server);
    let open = |since| Ok(Some(UnfinishedFrame { since, data: false }));
    assert_eq!(inspector.inspect_all(&frame(HEADERS, 0, 3), 5, 0), open(5));
    assert_eq!(inspector.inspect_all(&frame(CONTINUATION, 0, 0), 9000, 0), open(5));
    assert_eq!(inspector.inspect_all(&frame(CONTINUATION, END_HEADERS, 1), 9001, 0), Ok(None));
    assert_eq!(inspector.inspect_all(&frame(HEADERS, END_HEADERS, 9)[..17], 9002, 0), open(9002));
}

#[test]
fn refuses_large_frame_that_is_not_data() {
    for kind in [SETTINGS, PING, UNKNOWN] {
        let refused = inspector(PeerRole::Server).inspect_all(&head((16 << 10) + 1, kind, 0), 0, 0);
        assert_eq!(refused, Err(TunnelLimit::FrameSize));
    }
    let mut bulk = inspector(PeerRole::Server);
    let partial = Ok(Some(UnfinishedFrame { since: 3, data: true }));
    assert_eq!(bulk.inspect_all(&head(1 << 20, DATA, 0), 3, 0), partial);
}

#[test]
fn refuses_flood_of_control_frames() {
    for (kind, flags) in [(PING, 0), (RST_STREAM, 0), (SETTINGS, 0), (UNKNOWN, 0), (DATA, 0)] {
        let mut inspector = inspector(PeerRole::Client);
        let flood = frame(kind, flags, 0).repeat(TOO_MANY);
        assert_eq!(inspector.inspect_all(&flood, 0, 0), Err(TunnelLimit::FrameRate), "{kind}");
    }
    let padding = frame(DATA, PADDED, MAX_PADDING).repeat(TOO_MANY);
    let padded = inspector(PeerRole::Client).inspect_all(&padding, 0, 0);
    assert_eq!(padded, Err(TunnelLimit::FrameRate), "padding alone");
    let answers = frame(HEADERS, END_HEADERS, 1).repeat(TOO_MANY);
    let server = inspector(PeerRole::Server).inspect_all(&answers, 0, 0);
    assert_eq!(server, Err(TunnelLimit::FrameRate), "more answers than requests");
    let requests =
        (0..TOO_MANY).flat_map(|index| on_stream(2 * index + 1, frame(HEADERS, END_HEADERS, 1)));
    let requests: Vec<u8> = requests.collect();
    assert_eq!(inspector(PeerRole::Client).inspect_all(&requests, 0, 0), Ok(None));
}

#[test]
fn refuses_trailers_of_client() {
    let headers = |stream| on_stream(stream, frame(HEADERS, END_HEADERS, 1));
    for stream in [1, 5] {
        let mut inspector = inspector(PeerRole::Client);
        for opened in [1, 3, 5] {
            assert_eq!(inspector.inspect_all(&headers(opened), 0, 0), Ok(None));
        }
        assert_eq!(inspector.inspect_all(&headers(stream), 0, 0), Err(TunnelLimit::Trailers));
    }
}

#[test]
fn accepts_control_frames_that_traffic_justifies() {
    let mut inspector = inspector(PeerRole::Client);
    let updates = frame(8, 0, 4).repeat(4);
    for useful in 1..100_000 {
        assert_eq!(inspector.inspect_all(&updates, 0, useful), Ok(None), "{useful}");
    }
}

#[test]
fn reports_window_update_that_arrives_in_pieces() {
    let mut inspector = inspector(PeerRole::Client);
    let update = [&[0, 0, 4, 8, 0, 0x80, 0, 0, 5][..], &[0, 1, 2, 3]].concat();
    for cut in 0..update.len() {
        let mut credited = Vec::new();
        for piece in [&update[..cut], &update[cut..]] {
            inspector.inspect(piece, 0, 0, |update| credited.push(update)).unwrap();
        }
        assert_eq!(credited, [WindowUpdate { stream: 5, increment: 0x1_02_03 }]);
    }
}

proptest! {
    /// The result does not depend on how the bytes are split, and no input panics.
    #[test]
    fn result_is_independent_of_split(bytes: Vec<u8>, cuts: Vec<u8>) {
        let mut whole = inspector(PeerRole::Client);
        let expected = whole.inspect_all(&bytes, 1, 0);
        let mut pieces = inspector(PeerRole::Client);
        let (mut rest, mut seen) = (bytes.as_slice(), Ok(None));
        for cut in cuts {
            let (piece, after) = rest.split_at(usize::from(cut).min(rest.len()));
            if seen.is_ok() {
                seen = pieces.inspect_all(piece, 1, 0);
            }
            rest = after;
        }
        if seen.is_ok() {
            seen = pieces.inspect_all(rest, 1, 0);
        }
        prop_assert_eq!(seen, expected);
    }
}

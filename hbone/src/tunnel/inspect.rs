//! Inspects the frame headers that a peer sends (RFC 9113 section 4.1), and enforces limits that h2
//! lacks.
//!
//! h2 has one SETTINGS_MAX_FRAME_SIZE for all frame types. Bulk transfers need large DATA frames.
//! With the same size for HEADERS and CONTINUATION, an unfinished header block could occupy several
//! such frames, and h2 has no deadline for it.
//!
//! `overdue` enforces deadlines. Payloads are not inspected. The connection's task reads the result
//! from [`crate::tunnel::tunnel_state::TunnelState`] and closes the connection.

use std::fmt;

use crate::limits::token_bucket::TokenBucket;

/// The length of the client's preface (RFC 9113 section 3.4).
const PREFACE: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
/// The length of a frame header: length (3 bytes), type, flags, stream (4 bytes) (RFC 9113 section
/// 4.1).
const FRAME_HEADER: usize = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
/// The maximum length of padding, including its length byte (RFC 9113 section 6.1).
const MAX_PADDING: usize = 1 + u8::MAX as usize;

/// The maximum size in bytes of a frame that is neither DATA nor part of a header block. Every peer
/// may send this size (RFC 9113 section 4.2).
const MAX_CONTROL_FRAME: usize = 16 << 10;
/// The allowed number of frames without application data: a burst, and a rate per second. The rate
/// is low because a peer may have hundreds of tunnels.
const CONTROL_FRAME_BURST: u64 = 1000;
const CONTROL_FRAMES_PER_SECOND: u64 = 20;
/// The number of additional control frames for each unit of useful traffic. A receiver may send
/// WINDOW_UPDATE for stream and connection after each frame or each 4 KiB (Go's net/http2), and
/// measure the path with PING (gRPC).
const CONTROL_FRAMES_PER_USEFUL: u64 = 4;

/// The limit of a tunnel that the peer exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelLimit {
    /// A header block exceeds SETTINGS_MAX_HEADER_LIST_SIZE.
    HeaderBlock,
    /// A control frame exceeds 16 KiB.
    FrameSize,
    /// PING, SETTINGS, RST_STREAM, PRIORITY, WINDOW_UPDATE, empty or unknown frames are too
    /// frequent for the useful traffic.
    FrameRate,
    /// A frame or header block was not complete in time.
    UnfinishedFrame,
    /// Too many requests were refused, more than a legitimate client sends.
    RefusedRequests,
    /// A stream received a second header block.
    Trailers,
}

/// An unfinished frame or header block of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UnfinishedFrame {
    /// The time of its first byte, in milliseconds since the connection opened.
    pub(crate) since: u64,
    /// True for a DATA frame, which may take long while a stream is open.
    pub(crate) data: bool,
}

/// A WINDOW_UPDATE frame: flow-control credit from the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WindowUpdate {
    /// The stream identifier. 0 for the connection.
    pub(crate) stream: u32,
    pub(crate) increment: u32,
}

/// The role of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeerRole {
    Client,
    Server,
}

/// Inspects the frames of one connection.
#[derive(Debug)]
pub(crate) struct Inspector {
    role: PeerRole,
    max_header_block: usize,
    /// The remaining bytes of the client's preface.
    preface: usize,
    head: [u8; FRAME_HEADER],
    /// The number of bytes in `head`.
    head_length: usize,
    frame: Option<Frame>,
    /// The time of the current frame's first byte.
    started: u64,
    block: Option<HeaderBlockProgress>,
    /// True once the peer has sent SETTINGS.
    has_settings: bool,
    budget: TokenBucket,
    data_frames: usize,
    /// The highest stream identifier that the peer has opened, if it is a client.
    last_stream: u32,
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    kind: FrameKind,
    ends_block: bool,
    /// The number of payload bytes that have not arrived.
    left: usize,
    stream: u32,
    /// The last four payload bytes. The payload of a WINDOW_UPDATE has only these.
    increment: u32,
}

#[derive(Debug, Clone, Copy)]
struct HeaderBlockProgress {
    since: u64,
    bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FrameKind {
    Data,
    /// HEADERS or PUSH_PROMISE, which start a header block.
    Headers,
    Continuation,
    Settings,
    WindowUpdate,
    Other,
}

impl FrameKind {
    /// Converts a frame type (RFC 9113 section 6).
    fn of(code: u8) -> Self {
        match code {
            0 => Self::Data,
            1 | 5 => Self::Headers,
            4 => Self::Settings,
            8 => Self::WindowUpdate,
            9 => Self::Continuation,
            _ => Self::Other,
        }
    }

    fn is_of_block(self) -> bool {
        matches!(self, Self::Headers | Self::Continuation)
    }
}

impl Frame {
    /// Processes a part of the frame's payload.
    fn add(&mut self, part: &[u8]) {
        self.left -= part.len();
        if self.kind == FrameKind::WindowUpdate {
            for byte in part {
                self.increment = self.increment << 8 | u32::from(*byte);
            }
        }
    }
}

impl Inspector {
    /// Creates an inspector. `max_header_block` limits compressed header blocks: they are never
    /// larger than the header list in h2's accounting (RFC 9113 section 6.5.2).
    pub(crate) fn new(role: PeerRole, max_header_block: u32) -> Self {
        Self {
            role,
            max_header_block: usize::try_from(max_header_block).unwrap_or(usize::MAX),
            preface: if role == PeerRole::Client { PREFACE } else { 0 },
            head: [0; FRAME_HEADER],
            head_length: 0,
            frame: None,
            started: 0,
            block: None,
            has_settings: false,
            budget: TokenBucket::new(CONTROL_FRAME_BURST, CONTROL_FRAMES_PER_SECOND),
            data_frames: 0,
            last_stream: 0,
        }
    }

    /// The number of DATA frames that have started.
    pub(crate) fn data_frames(&self) -> usize {
        self.data_frames
    }

    /// Inspects the received `bytes`. `useful` is the useful traffic so far. Calls
    /// `on_window_update` for each WINDOW_UPDATE. Returns the unfinished frame or header block.
    pub(crate) fn inspect(
        &mut self,
        mut bytes: &[u8],
        now: u64,
        useful: u64,
        mut on_window_update: impl FnMut(WindowUpdate),
    ) -> Result<Option<UnfinishedFrame>, TunnelLimit> {
        while !bytes.is_empty() {
            let wanted = match &self.frame {
                _ if self.preface > 0 => self.preface,
                Some(frame) => frame.left,
                None => FRAME_HEADER - self.head_length,
            };
            let (part, rest) = bytes.split_at(wanted.min(bytes.len()));
            bytes = rest;
            if self.preface > 0 {
                self.preface -= part.len();
            } else if let Some(frame) = &mut self.frame {
                frame.add(part);
                self.end_frame(&mut on_window_update);
            } else {
                self.add_to_head(part, now, useful)?;
                self.end_frame(&mut on_window_update);
            }
        }
        Ok(self.unfinished())
    }

    fn add_to_head(&mut self, part: &[u8], now: u64, useful: u64) -> Result<(), TunnelLimit> {
        if self.head_length == 0 {
            self.started = now;
        }
        for (to, from) in self.head.iter_mut().skip(self.head_length).zip(part) {
            *to = *from;
        }
        self.head_length += part.len();
        if self.head_length < FRAME_HEADER {
            return Ok(());
        }
        self.head_length = 0;
        let [high, middle, low, code, flags, stream @ ..] = self.head;
        let left = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        let kind = FrameKind::of(code);
        // The highest bit is reserved.
        let stream = u32::from_be_bytes(stream) & (u32::MAX >> 1);
        self.check(kind, left, flags, now, useful)?;
        self.check_order(kind, stream)?;
        let ends_block = kind.is_of_block() && flags & END_HEADERS != 0;
        self.frame = Some(Frame { kind, ends_block, left, stream, increment: 0 });
        Ok(())
    }

    fn check(
        &mut self,
        kind: FrameKind,
        length: usize,
        flags: u8,
        now: u64,
        useful: u64,
    ) -> Result<(), TunnelLimit> {
        if kind.is_of_block() {
            let started = self.started;
            let block = self.block.get_or_insert(HeaderBlockProgress { since: started, bytes: 0 });
            block.bytes = block.bytes.saturating_add(length);
            if block.bytes > self.max_header_block {
                return Err(TunnelLimit::HeaderBlock);
            }
        } else if kind != FrameKind::Data && length > MAX_CONTROL_FRAME {
            return Err(TunnelLimit::FrameSize);
        }
        let is_control = match kind {
            // A DATA frame with only padding carries no application data.
            FrameKind::Data => {
                let is_empty = length == 0 || (flags & PADDED != 0 && length <= MAX_PADDING);
                is_empty && flags & END_STREAM == 0
            }
            // A client's requests are counted when they are refused. A server sends one response
            // per request.
            FrameKind::Headers => self.role == PeerRole::Server,
            FrameKind::Continuation
            | FrameKind::Settings
            | FrameKind::WindowUpdate
            | FrameKind::Other => true,
        };
        let earned = useful.saturating_mul(CONTROL_FRAMES_PER_USEFUL);
        if is_control && !self.budget.take(1, now, earned) {
            return Err(TunnelLimit::FrameRate);
        }
        Ok(())
    }

    /// Counts DATA frames. Rejects a client's trailers: RFC 9113 section 8.5 allows only DATA after
    /// CONNECT, and h2 would buffer trailers until the application has read all data.
    fn check_order(&mut self, kind: FrameKind, stream: u32) -> Result<(), TunnelLimit> {
        match kind {
            FrameKind::Data => self.data_frames += 1,
            // h2 rejects a header block on stream 0.
            FrameKind::Headers if self.role == PeerRole::Client && stream > 0 => {
                if stream <= self.last_stream {
                    return Err(TunnelLimit::Trailers);
                }
                self.last_stream = stream;
            }
            _ => {}
        }
        Ok(())
    }

    /// Ends the current frame if its payload is complete.
    fn end_frame(&mut self, on_window_update: &mut impl FnMut(WindowUpdate)) {
        let Some(frame) = self.frame.take_if(|frame| frame.left == 0) else { return };
        if frame.ends_block {
            self.block = None;
        }
        self.has_settings |= frame.kind == FrameKind::Settings;
        if frame.kind == FrameKind::WindowUpdate {
            on_window_update(WindowUpdate { stream: frame.stream, increment: frame.increment });
        }
    }

    /// The unfinished frame or header block. Before the first SETTINGS, SETTINGS is unfinished.
    pub(crate) fn unfinished(&self) -> Option<UnfinishedFrame> {
        if !self.has_settings {
            return Some(UnfinishedFrame { since: 0, data: false });
        }
        if let Some(block) = self.block {
            return Some(UnfinishedFrame { since: block.since, data: false });
        }
        // An incomplete frame header may belong to a DATA frame, which may be slow.
        let data = self.frame.is_none_or(|frame| frame.kind == FrameKind::Data);
        let has_started = self.head_length > 0 || self.frame.is_some();
        has_started.then_some(UnfinishedFrame { since: self.started, data })
    }
}

impl TunnelLimit {
    /// A label for metrics and logs. Dashboards depend on it: do not change it.
    pub fn code(self) -> &'static str {
        match self {
            Self::HeaderBlock => "header_block",
            Self::FrameSize => "frame_size",
            Self::FrameRate => "frame_rate",
            Self::UnfinishedFrame => "unfinished_frame",
            Self::RefusedRequests => "refused_requests",
            Self::Trailers => "trailers",
        }
    }

    /// The error code of the GOAWAY that closes the tunnel (RFC 9113 section 7).
    pub(crate) fn reason(self) -> h2::Reason {
        match self {
            Self::FrameSize => h2::Reason::FRAME_SIZE_ERROR,
            Self::Trailers => h2::Reason::PROTOCOL_ERROR,
            _ => h2::Reason::ENHANCE_YOUR_CALM,
        }
    }
}

impl fmt::Display for TunnelLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HeaderBlock => "a header block larger than SETTINGS_MAX_HEADER_LIST_SIZE",
            Self::FrameSize => "a control frame larger than 16 KiB",
            Self::FrameRate => "more control frames than its traffic justifies",
            Self::UnfinishedFrame => "an unfinished frame or header block (timeouts.frame)",
            Self::RefusedRequests => "too many requests that were refused",
            Self::Trailers => "a second header block on a stream (RFC 9113 section 8.5)",
        })
    }
}

#[cfg(test)]
mod tests;

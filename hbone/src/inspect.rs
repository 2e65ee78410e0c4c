//! Reads the frame headers (RFC 9113 section 4.1) of what a peer sends, below h2, and refuses what
//! h2 would hold or answer without a limit of its own.
//!
//! h2 has one SETTINGS_MAX_FRAME_SIZE for all types of frames. Bulk needs large DATA frames; with
//! the same size for HEADERS and CONTINUATION, a header block that never ends holds several of
//! them, and h2 has no deadline for it.
//!
//! Not here: deadlines (`overdue.rs`), payloads, and closing the connection. Its owner asks
//! [`crate::link::Link`].

use std::fmt;

use crate::budget::Budget;

/// RFC 9113 section 3.4: what a client sends before its first frame.
const PREFACE: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
/// RFC 9113 section 4.1: length (3), type, flags, stream (4).
const HEAD: usize = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
/// RFC 9113 section 6.1: the length of the padding, and at most that many bytes of it.
const MAX_PADDING: usize = 1 + u8::MAX as usize;

/// The largest frame that is neither DATA nor part of a header block, in bytes: what every peer may
/// send (RFC 9113 section 4.2).
const CONTROL_FRAME: usize = 16 << 10;
/// Frames that carry nothing for an application: so many at once, and after that so many in a
/// second. A peer may have hundreds of tunnels.
const CONTROL_FRAMES: u64 = 1000;
const CONTROL_FRAMES_PER_SECOND: u64 = 20;
/// What one unit of useful traffic earns. A receiver may return credit for the stream and for the
/// connection with each frame, or each 4 KiB (Go's net/http2), and measure the path with PING
/// (gRPC).
const CONTROL_FRAMES_PER_USEFUL: u64 = 4;

/// Which limit of a tunnel its peer exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelLimit {
    /// A header block larger than the header list that we take.
    HeaderBlock,
    /// A frame, neither DATA nor headers, that is larger than 16 KiB.
    FrameSize,
    /// More PING, SETTINGS, RST_STREAM, PRIORITY, WINDOW_UPDATE, empty or unknown frames than the
    /// traffic explains.
    FrameRate,
    /// A frame or header block that was begun and not finished in time.
    UnfinishedFrame,
    /// More requests that were refused than an honest client sends.
    RefusedRequests,
}

/// What of a peer's frames has begun and is not complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unfinished {
    /// When it began, in milliseconds since the connection was opened.
    pub(crate) since: u64,
    /// Whether it is a DATA frame, which may take long while a stream is open.
    pub(crate) data: bool,
}

/// Credit that a peer returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WindowUpdate {
    /// 0 for the connection.
    pub(crate) stream: u32,
    pub(crate) increment: u32,
}

/// Which end of a connection the peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeerRole {
    Client,
    Server,
}

/// Follows the frames of one connection.
#[derive(Debug)]
pub(crate) struct Inspector {
    role: PeerRole,
    max_header_block: usize,
    /// How much of the client's preface is still to come.
    preface: usize,
    head: [u8; HEAD],
    /// How much of `head` has come.
    have: usize,
    frame: Option<Frame>,
    /// When the frame began.
    begun: u64,
    block: Option<Block>,
    /// Whether the peer's first SETTINGS has come.
    has_settings: bool,
    budget: Budget,
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    kind: Kind,
    ends_block: bool,
    /// How much of its payload is still to come.
    left: usize,
    stream: u32,
    /// The last four bytes of a WINDOW_UPDATE's payload, which is no longer.
    increment: u32,
}

/// A header block that has begun.
#[derive(Debug, Clone, Copy)]
struct Block {
    since: u64,
    bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    /// HEADERS or PUSH_PROMISE, which begin a header block.
    Headers,
    Continuation,
    Settings,
    WindowUpdate,
    Other,
}

impl Kind {
    /// RFC 9113 section 6.
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
    /// Counts a part of the payload.
    fn add(&mut self, part: &[u8]) {
        self.left -= part.len();
        if self.kind == Kind::WindowUpdate {
            for byte in part {
                self.increment = self.increment << 8 | u32::from(*byte);
            }
        }
    }
}

impl Inspector {
    /// For a peer whose header blocks may have `max_header_block` bytes: compressed, a header list
    /// is never larger than h2 counts it (RFC 9113 section 6.5.2).
    pub(crate) fn new(role: PeerRole, max_header_block: u32) -> Self {
        Self {
            role,
            max_header_block: usize::try_from(max_header_block).unwrap_or(usize::MAX),
            preface: if role == PeerRole::Client { PREFACE } else { 0 },
            head: [0; HEAD],
            have: 0,
            frame: None,
            begun: 0,
            block: None,
            has_settings: false,
            budget: Budget::new(CONTROL_FRAMES, CONTROL_FRAMES_PER_SECOND),
        }
    }

    /// Follows `bytes`, the next that came; `useful` is how much useful traffic there was so far.
    /// Calls `credited` for each WINDOW_UPDATE. Returns what is unfinished after them.
    pub(crate) fn inspect(
        &mut self,
        mut bytes: &[u8],
        now: u64,
        useful: u64,
        mut credited: impl FnMut(WindowUpdate),
    ) -> Result<Option<Unfinished>, TunnelLimit> {
        while !bytes.is_empty() {
            let wanted = match &self.frame {
                _ if self.preface > 0 => self.preface,
                Some(frame) => frame.left,
                None => HEAD - self.have,
            };
            let (part, rest) = bytes.split_at(wanted.min(bytes.len()));
            bytes = rest;
            if self.preface > 0 {
                self.preface -= part.len();
            } else if let Some(frame) = &mut self.frame {
                frame.add(part);
                self.end_frame(&mut credited);
            } else {
                self.add_to_head(part, now, useful)?;
                self.end_frame(&mut credited);
            }
        }
        Ok(self.unfinished())
    }

    fn add_to_head(&mut self, part: &[u8], now: u64, useful: u64) -> Result<(), TunnelLimit> {
        if self.have == 0 {
            self.begun = now;
        }
        for (to, from) in self.head.iter_mut().skip(self.have).zip(part) {
            *to = *from;
        }
        self.have += part.len();
        if self.have < HEAD {
            return Ok(());
        }
        self.have = 0;
        let [high, middle, low, code, flags, stream @ ..] = self.head;
        let left = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        let kind = Kind::of(code);
        self.check(kind, left, flags, now, useful)?;
        let ends_block = kind.is_of_block() && flags & END_HEADERS != 0;
        // The highest bit is reserved.
        let stream = u32::from_be_bytes(stream) & (u32::MAX >> 1);
        self.frame = Some(Frame { kind, ends_block, left, stream, increment: 0 });
        Ok(())
    }

    fn check(
        &mut self,
        kind: Kind,
        length: usize,
        flags: u8,
        now: u64,
        useful: u64,
    ) -> Result<(), TunnelLimit> {
        if kind.is_of_block() {
            let begun = self.begun;
            let block = self.block.get_or_insert(Block { since: begun, bytes: 0 });
            block.bytes = block.bytes.saturating_add(length);
            if block.bytes > self.max_header_block {
                return Err(TunnelLimit::HeaderBlock);
            }
        } else if kind != Kind::Data && length > CONTROL_FRAME {
            return Err(TunnelLimit::FrameSize);
        }
        let is_control = match kind {
            // Padding alone carries nothing.
            Kind::Data => {
                let empty = length == 0 || (flags & PADDED != 0 && length <= MAX_PADDING);
                empty && flags & END_STREAM == 0
            }
            // A client's requests are counted when they are refused. A server owes one answer for
            // each of ours.
            Kind::Headers => self.role == PeerRole::Server,
            Kind::Continuation | Kind::Settings | Kind::WindowUpdate | Kind::Other => true,
        };
        let earned = useful.saturating_mul(CONTROL_FRAMES_PER_USEFUL);
        if is_control && !self.budget.take(1, now, earned) {
            return Err(TunnelLimit::FrameRate);
        }
        Ok(())
    }

    /// Notes the end of the current frame, if nothing of it is still to come.
    fn end_frame(&mut self, credited: &mut impl FnMut(WindowUpdate)) {
        let Some(frame) = self.frame.take_if(|frame| frame.left == 0) else { return };
        if frame.ends_block {
            self.block = None;
        }
        self.has_settings |= frame.kind == Kind::Settings;
        if frame.kind == Kind::WindowUpdate {
            credited(WindowUpdate { stream: frame.stream, increment: frame.increment });
        }
    }

    /// What is unfinished: at first the peer's SETTINGS, which are its first frame.
    pub(crate) fn unfinished(&self) -> Option<Unfinished> {
        if !self.has_settings {
            return Some(Unfinished { since: 0, data: false });
        }
        if let Some(block) = self.block {
            return Some(Unfinished { since: block.since, data: false });
        }
        // The head of a frame may be one of DATA: its payload waits for a slow network in the same
        // way.
        let data = self.frame.is_none_or(|frame| frame.kind == Kind::Data);
        let begun = self.have > 0 || self.frame.is_some();
        begun.then_some(Unfinished { since: self.begun, data })
    }
}

impl TunnelLimit {
    /// A short label for metrics and logs. Stable: dashboards depend on it.
    pub fn code(self) -> &'static str {
        match self {
            Self::HeaderBlock => "header_block",
            Self::FrameSize => "frame_size",
            Self::FrameRate => "frame_rate",
            Self::UnfinishedFrame => "unfinished_frame",
            Self::RefusedRequests => "refused_requests",
        }
    }

    /// The code of the GOAWAY that ends the tunnel (RFC 9113 section 7).
    pub(crate) fn reason(self) -> h2::Reason {
        match self {
            Self::FrameSize => h2::Reason::FRAME_SIZE_ERROR,
            _ => h2::Reason::ENHANCE_YOUR_CALM,
        }
    }
}

impl fmt::Display for TunnelLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HeaderBlock => "a header block larger than SETTINGS_MAX_HEADER_LIST_SIZE",
            Self::FrameSize => "a control frame larger than 16 KiB",
            Self::FrameRate => "more control frames than its traffic explains",
            Self::UnfinishedFrame => "an unfinished frame or header block (timeouts.frame)",
            Self::RefusedRequests => "too many requests that were refused",
        })
    }
}

#[cfg(test)]
mod tests;

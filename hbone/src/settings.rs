//! The caps and pauses of a tunnel, with the defaults that stock ztunnel expects to meet.
//!
//! Not here: deadlines. Every call that waits for a peer takes its own.

use std::time::Duration;

/// RFC 9113 section 6.5.2: the largest frame we take, in bytes. Few, large frames make bulk cheap;
/// no peer of ours sends larger ones than its `send_buffer`. h2 holds a frame until it is whole,
/// before it looks at flow control: a tunnel without streams can hold one. Only DATA may be as
/// large (`inspect.rs`).
pub(crate) const MAX_FRAME_SIZE: u32 = 256 << 10;

/// What h2 may hold beyond the payload for small DATA frames, in bytes: it counts what a frame is short
/// of 256 bytes, and closes a connection with more. Frames that are not read are copied out of h2 long
/// before (`tunnel_state/received.rs`), and count no longer then.
pub(crate) const SMALL_FRAME_BUDGET: usize = 64 << 20;

/// What a connection of this proxy may hold unread, in bytes.
const CONNECTION_WINDOW: u32 = 64 << 20;
/// What its first WINDOW_UPDATE adds to the 65,535 of RFC 9113 section 6.9.2, by which one of ours
/// is known.
pub(crate) const FIRST_WINDOW_UPDATE: u32 = CONNECTION_WINDOW - 65_535;

/// As long as a handshake.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// How a tunnel is used from the client's side.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// Windows and buffers.
    pub http2: Http2Settings,
    /// When a silent peer is given up.
    pub keepalive: KeepaliveSettings,
    /// How long a frame or header block may take that the peer has begun, and its first SETTINGS.
    pub frame_timeout: Duration,
}

/// How a tunnel is served.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// Windows and buffers.
    pub http2: Http2Settings,
    /// When a silent peer is given up.
    pub keepalive: KeepaliveSettings,
    /// How long a frame or header block may take that the peer has begun, and its first SETTINGS.
    pub frame_timeout: Duration,
    /// How many streams a peer may have open in one tunnel.
    pub max_streams: u32,
}

/// Windows and buffers of one tunnel: the caps on what a peer can make us hold, in bytes.
#[derive(Debug, Clone)]
pub struct Http2Settings {
    /// What a peer may send on a stream before it is read.
    pub stream_window: u32,
    /// The same while what is not read, of all streams, takes more than a quarter of `connection_window`.
    pub crowded_stream_window: u32,
    /// What a peer may send on all streams together before it is read.
    pub connection_window: u32,
    /// What we queue for a stream before it is written to the connection.
    pub send_buffer: usize,
    /// The largest header list that we read.
    pub max_header_list: u32,
}

/// When a silent peer is given up. Only while streams are open: idle tunnels cost nothing.
#[derive(Debug, Clone)]
pub struct KeepaliveSettings {
    /// How long nothing is received before a PING is sent.
    pub quiet: Duration,
    /// How long its answer may take.
    pub timeout: Duration,
}

impl Default for Http2Settings {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            // A hundred of these, or two, beside the quarter that was held before, leave half or a quarter of the
            // connection's window for what comes until the peer knows of them.
            crowded_stream_window: 128 << 10,
            connection_window: CONNECTION_WINDOW,
            // What is already in flight is not counted here, so this bounds memory and not throughput: it must only outlast one
            // turn of the task that writes to the connection. What is more has left the caches by then.
            send_buffer: 256 << 10,
            max_header_list: 16 << 10,
        }
    }
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            http2: Http2Settings::default(),
            keepalive: KeepaliveSettings::default(),
            frame_timeout: FRAME_TIMEOUT,
        }
    }
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            // As ztunnel: a peer that does not read can hold at most 200 of these.
            http2: Http2Settings { max_header_list: 64 << 10, ..Http2Settings::default() },
            keepalive: KeepaliveSettings::default(),
            frame_timeout: FRAME_TIMEOUT,
            max_streams: 200,
        }
    }
}

impl Default for KeepaliveSettings {
    fn default() -> Self {
        Self { quiet: Duration::from_secs(10), timeout: Duration::from_secs(20) }
    }
}

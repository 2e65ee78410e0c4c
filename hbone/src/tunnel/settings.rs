//! The limits and intervals of a tunnel, with defaults that are compatible with ztunnel.
//!
//! Deadlines are no settings: each call that waits for a peer takes its own.

use std::time::Duration;

/// The maximum accepted frame size in bytes (RFC 9113 section 6.5.2). Large frames make bulk cheap;
/// peers of this implementation send none beyond their `send_buffer`. h2 buffers an entire frame
/// before flow control applies, so even a tunnel without streams can hold one. Only DATA may be
/// that large (`inspect.rs`).
pub(crate) const MAX_FRAME_SIZE: u32 = 256 << 10;

/// The limit for the overhead of buffered small DATA frames in bytes, in h2's accounting: the
/// difference of a frame's size to 256 bytes. h2 closes a connection beyond it. Unread frames are
/// copied out of h2 long before (`tunnel_state/received.rs`), and then no longer count.
pub(crate) const SMALL_FRAME_BUDGET: usize = 64 << 20;

/// The connection window: the maximum of unread data in bytes.
const CONNECTION_WINDOW: u32 = 64 << 20;
/// The increment of the first WINDOW_UPDATE over the initial 65,535 (RFC 9113 section 6.9.2). It
/// identifies a peer of this implementation.
pub(crate) const FIRST_WINDOW_UPDATE: u32 = CONNECTION_WINDOW - 65_535;

/// The timeout of a frame, equal to that of a handshake.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// The settings of a client's tunnels.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// Windows and buffers.
    pub http2: Http2Settings,
    /// The detection of silent peers.
    pub keepalive: KeepaliveSettings,
    /// The timeout for an unfinished frame or header block, and for the first SETTINGS.
    pub frame_timeout: Duration,
}

/// The settings of a server's tunnels.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// Windows and buffers.
    pub http2: Http2Settings,
    /// The detection of silent peers.
    pub keepalive: KeepaliveSettings,
    /// The timeout for an unfinished frame or header block, and for the first SETTINGS.
    pub frame_timeout: Duration,
    /// The maximum number of open streams per tunnel.
    pub max_streams: u32,
}

/// Windows and buffers of a tunnel in bytes, which limit the memory that a peer can occupy.
#[derive(Debug, Clone)]
pub struct Http2Settings {
    /// The stream window: the maximum of unread data on a stream.
    pub stream_window: u32,
    /// The stream window while unread data of all streams exceeds a quarter of `connection_window`.
    pub crowded_stream_window: u32,
    /// The connection window: the maximum of unread data on all streams.
    pub connection_window: u32,
    /// The maximum of queued data per stream.
    pub send_buffer: usize,
    /// The maximum size of a received header list.
    pub max_header_list: u32,
}

/// The detection of silent peers, which is active only while streams are open.
#[derive(Debug, Clone)]
pub struct KeepaliveSettings {
    /// The time without received data before a PING.
    pub ping_after: Duration,
    /// The timeout of the answer to a PING.
    pub timeout: Duration,
}

impl Default for Http2Settings {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            // The remaining three quarters of the connection window hold a hundred such streams or
            // more, until the peer has received the change.
            crowded_stream_window: 128 << 10,
            connection_window: CONNECTION_WINDOW,
            // Limits memory and not throughput, since data in flight is not counted. It must last
            // for one turn of the writing task; larger buffers would leave the CPU caches.
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
            // As in ztunnel: a peer that does not read can occupy at most 200 of these.
            http2: Http2Settings { max_header_list: 64 << 10, ..Http2Settings::default() },
            keepalive: KeepaliveSettings::default(),
            frame_timeout: FRAME_TIMEOUT,
            max_streams: 200,
        }
    }
}

impl Default for KeepaliveSettings {
    fn default() -> Self {
        Self { ping_after: Duration::from_secs(10), timeout: Duration::from_secs(20) }
    }
}

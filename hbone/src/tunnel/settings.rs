//! The limits and intervals of a tunnel. The defaults are compatible with ztunnel.
//!
//! Deadlines are arguments of the calls that wait for a peer.

use std::time::Duration;

/// The maximum size in bytes of a received frame (RFC 9113 section 6.5.2). Large frames reduce the
/// cost of bulk transfers; underpass sends none above `send_buffer`. h2 buffers an entire frame
/// before flow control applies, so even a tunnel without streams may buffer one. `inspect` rejects
/// other frame types of this size.
pub(crate) const MAX_FRAME_SIZE: u32 = 256 << 10;

/// The maximum overhead in bytes of buffered small DATA frames. h2 counts 256 bytes less the
/// frame's size for each, and closes a connection above the limit. `tunnel_state::received` copies
/// unread frames out of h2 much earlier, and they no longer count.
pub(crate) const SMALL_FRAME_BUDGET: usize = 64 << 20;

/// The flow-control window of a connection: the maximum amount of unread data in bytes.
const CONNECTION_WINDOW: u32 = 64 << 20;
/// The increment of the first WINDOW_UPDATE, added to the initial 65,535 bytes (RFC 9113 section
/// 6.9.2). It identifies another underpass.
pub(crate) const FIRST_WINDOW_UPDATE: u32 = CONNECTION_WINDOW - 65_535;

/// The timeout of an unfinished frame, equal to the default timeout of a handshake.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// The settings of a client's tunnels.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// Flow-control windows and buffers.
    pub http2: Http2Settings,
    /// The detection of silent peers.
    pub keepalive: KeepaliveSettings,
    /// The timeout of an unfinished frame or header block, and of the first SETTINGS.
    pub frame_timeout: Duration,
}

/// The settings of a server's tunnels.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// Flow-control windows and buffers.
    pub http2: Http2Settings,
    /// The detection of silent peers.
    pub keepalive: KeepaliveSettings,
    /// The timeout of an unfinished frame or header block, and of the first SETTINGS.
    pub frame_timeout: Duration,
    /// The maximum number of open streams in a tunnel.
    pub max_streams: u32,
}

/// Flow-control windows and buffers of a tunnel in bytes. They limit the memory that a peer can
/// occupy.
#[derive(Debug, Clone)]
pub struct Http2Settings {
    /// The flow-control window of a stream: the maximum amount of its unread data.
    pub stream_window: u32,
    /// The window of each stream while the unread data of all streams exceeds a quarter of
    /// `connection_window`.
    pub crowded_stream_window: u32,
    /// The flow-control window of the connection: the maximum amount of unread data of all streams.
    pub connection_window: u32,
    /// The maximum amount of queued data per stream.
    pub send_buffer: usize,
    /// The maximum size of a received header list.
    pub max_header_list: u32,
}

/// Keepalive settings. Keepalive is active only while streams are open.
#[derive(Debug, Clone)]
pub struct KeepaliveSettings {
    /// The time without received data after which a PING is sent.
    pub ping_after: Duration,
    /// The timeout of the answer to a PING.
    pub timeout: Duration,
}

impl Default for Http2Settings {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            // At least a hundred such streams fit into the rest of the connection window, until the
            // peer receives the new stream window.
            crowded_stream_window: 128 << 10,
            connection_window: CONNECTION_WINDOW,
            // Does not limit throughput, since data in flight is not counted. Enough for one turn
            // of the writing task; a larger buffer would not fit into the CPU caches.
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
            // As in ztunnel. A peer that does not read can occupy at most 200 header lists.
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

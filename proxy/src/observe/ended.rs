//! A connection that has ended or could not be opened, as the access log and traces report it.

use std::net::SocketAddr;
use std::time::Duration;

use underpass_config::Service;
use underpass_hbone::TraceParent;

use crate::error::ProxyError;
use crate::observe::party::{Direction, Party};

/// The facts of a connection at its end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended<'a> {
    pub(crate) direction: Direction,
    pub(crate) source: &'a Party,
    pub(crate) destination: &'a Party,
    pub(crate) service: Option<&'a Service>,
    /// The address of the HBONE listener, if a tunnel carried the connection.
    pub(crate) hbone: Option<SocketAddr>,
    pub(crate) trace: Option<TraceParent>,
    pub(crate) durations: Durations,
    /// Bytes that went to the client.
    pub(crate) sent: u64,
    /// Bytes that came from the client.
    pub(crate) received: u64,
    pub(crate) error: Option<&'a ProxyError>,
}

/// The times of a connection since its accept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Durations {
    /// Until the connection was open; `None` if it could not be opened.
    pub(crate) connect: Option<Duration>,
    /// Until the first byte went to the client; `None` if none did.
    pub(crate) first_byte: Option<Duration>,
    /// Until the end.
    pub(crate) total: Duration,
}

impl Ended<'_> {
    /// The address of the TCP connection to the destination, and the destination inside of a
    /// tunnel: as in ztunnel.
    pub(crate) fn addresses(&self) -> [Option<SocketAddr>; 2] {
        match self.hbone {
            Some(hbone) => [Some(hbone), self.destination.address],
            None => [self.destination.address, None],
        }
    }
}

//! Relays bytes between a client's connection and the way to its destination: a tunnel or a second
//! TCP connection.
//!
//! The two directions end independently. FIN or END_STREAM ends one direction and is forwarded as
//! END_STREAM or FIN after the last byte:
//!
//! ```text
//!                 client ends
//!       +------+               +-------------+
//!       | Open |-------------->| ClientEnded |
//!       +------+               +-------------+
//!           |                         |
//!           | upstream ends           | upstream ends
//!           v                         v
//!   +---------------+             +--------+
//!   | UpstreamEnded |------------>| Closed |
//!   +---------------+ client ends +--------+
//!
//!   any state but Closed --- reset, lost tunnel, deadline, termination ---> aborted
//! ```
//!
//! An aborted connection sends RST or RST_STREAM to both sides, never FIN or END_STREAM. Sockets
//! arrive here with a linger time of zero (`accept.rs`, `dial.rs`), so that closing them sends RST;
//! only [`State::Closed`] restores an orderly close. That close also sends the FIN of the direction
//! that ends last.
//!
//! Each direction detects an abort of its source and of its sink:
//!
//! | the direction            | its source is           | its sink is                         |
//! |--------------------------|-------------------------|-------------------------------------|
//! | waits for data           | read                    | read by the other direction; when   |
//! |                          |                         | that has ended, watched for aborts  |
//! | is blocked in writing    | watched for aborts      | written                             |
//!
//! Data that a source sent before its abort is forwarded as long as the sink takes it. A FIN is no
//! abort: it waits in the socket until the sink has taken all data before it.
//!
//! [`Relay`] is a hand-written future instead of an `async fn`: it is most of the memory of an idle
//! connection, and most of the CPU time of a small request besides its system calls.

mod deadlines;
mod delivered;
mod direction;
mod readiness;
mod splice;
mod tcp;
mod tunnel;

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::net::TcpStream;
use underpass_hbone::{RevocationSignal, TunnelStream};

use self::deadlines::IdleTimer;
pub(crate) use self::deadlines::{Deadlines, Probes};
use self::delivered::Delivered;
use self::direction::Direction;
pub(crate) use self::readiness::aborted;
use self::tcp::Tcp;
use self::tunnel::Tunnelled;
use crate::decide::connection_registry::Termination;
use crate::error::ProxyError;
use crate::limits::Buffers;
use crate::observe::record::ConnectionRecord;

/// The connection or stream on one side of a relay.
trait Side<'a> {
    /// Ready when this side was aborted. Called while no direction reads or writes this side.
    fn poll_aborted(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError>;

    /// Ready when the peer of this side is no longer trusted.
    fn poll_revoked(&mut self, _: &mut Context<'_>) -> Poll<ProxyError> {
        Poll::Pending
    }

    /// Closes this side cleanly after both directions have ended, or aborts it after an error.
    fn close(&mut self, outcome: &Result<(), ProxyError>);

    /// This side as a TCP connection. Only TCP connections can be spliced and probed.
    fn as_tcp(&mut self) -> Option<&mut Tcp<'a>> {
        None
    }
}

/// The side of a relay from which a direction reads.
trait Source<'a>: Side<'a> {
    /// Reads the next bytes, never empty; `None` after a clean end (FIN, END_STREAM).
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, ProxyError>>;

    /// Whether a clean end follows the bytes of the last read. The end is then sent together with
    /// them, which saves a packet and a wake-up on both sides.
    fn is_at_end(&self) -> bool;
}

/// The side of a relay to which a direction writes.
trait Sink<'a>: Side<'a> {
    /// Writes bytes from the front of `data`, which is not empty, and returns their number. If they
    /// are the `last` data, only [`Sink::finish`] follows.
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<Result<usize, ProxyError>>;

    /// Sends written bytes that are held back, when they are due. Called when there is nothing to
    /// write.
    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ProxyError>> {
        Poll::Ready(Ok(()))
    }

    /// Ends this direction cleanly (FIN, END_STREAM). `closing`: the other direction has ended, so
    /// that [`Side::close`] follows at once.
    fn finish(&mut self, closing: bool) -> Result<(), ProxyError>;
}

/// One side of a connection: the source of one direction and the sink of the other.
trait Endpoint<'a>: Source<'a> + Sink<'a> {}

impl<'a, T: Source<'a> + Sink<'a>> Endpoint<'a> for T {}

/// One proxied connection: its counters, its limits, and the signal that terminates it.
pub(crate) struct Flow<'a> {
    buffers: &'a Buffers,
    deadlines: &'a Deadlines,
    record: &'a ConnectionRecord,
    /// The record of the destination pod, which counts the same bytes.
    neighbour: Option<&'a ConnectionRecord>,
    termination: &'a Termination,
}

/// The application of another pod of this process, with the destination pod's record and signals.
pub(crate) struct Neighbour<'a> {
    pub(crate) app: &'a TcpStream,
    pub(crate) buffers: &'a Buffers,
    pub(crate) record: &'a ConnectionRecord,
    pub(crate) termination: &'a Termination,
    /// Ready when either pod no longer trusts the other.
    pub(crate) revocations: [RevocationSignal; 2],
}

impl<'a> Flow<'a> {
    pub(crate) fn new(
        buffers: &'a Buffers,
        deadlines: &'a Deadlines,
        record: &'a ConnectionRecord,
        termination: &'a Termination,
    ) -> Self {
        Self { buffers, deadlines, record, neighbour: None, termination }
    }

    /// Relays between a client's connection and the tunnel to its destination.
    pub(crate) fn into_tunnel(
        self,
        client: &'a TcpStream,
        tunnel: TunnelStream,
    ) -> impl Future<Output = Result<(), ProxyError>> {
        let client = Tcp::new(client, ProxyError::Client, self.buffers);
        Relay::new(self, client, Tunnelled::new(tunnel))
    }

    /// Relays between a client's tunnel and the application.
    pub(crate) fn out_of_tunnel(
        self,
        tunnel: TunnelStream,
        app: &'a TcpStream,
    ) -> impl Future<Output = Result<(), ProxyError>> {
        let app = Tcp::new(app, ProxyError::Upstream, self.buffers);
        Relay::new(self, Tunnelled::new(tunnel), app)
    }

    /// Relays between a client's connection and a TCP connection to its destination.
    pub(crate) fn through_tcp(
        self,
        client: &'a TcpStream,
        upstream: &'a TcpStream,
    ) -> impl Future<Output = Result<(), ProxyError>> {
        let client = Tcp::new(client, ProxyError::Client, self.buffers);
        let upstream = Tcp::new(upstream, ProxyError::Upstream, self.buffers);
        Relay::new(self, client, upstream)
    }

    /// Relays between a client's connection and the application of another pod of this process.
    pub(crate) fn into_neighbour(
        self,
        client: &'a TcpStream,
        Neighbour { app, buffers, record, termination, revocations }: Neighbour<'a>,
    ) -> impl Future<Output = Result<(), ProxyError>> {
        let client = Tcp::new(client, ProxyError::Client, self.buffers);
        let app = Tcp::new(app, ProxyError::Upstream, buffers);
        let flow = Self { neighbour: Some(record), ..self };
        Relay::new(flow, client, Delivered { app, termination, revocations })
    }

    fn received(&self, bytes: usize) {
        self.record.received(bytes);
        if let Some(neighbour) = self.neighbour {
            neighbour.received(bytes);
        }
    }

    fn sent(&self, bytes: usize) {
        self.record.sent(bytes);
        if let Some(neighbour) = self.neighbour {
            neighbour.sent(bytes);
        }
    }
}

/// The sides that have ended their sending; see the diagram above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    ClientEnded,
    UpstreamEnded,
    Closed,
}

impl State {
    fn is_half_closed(self) -> bool {
        matches!(self, Self::ClientEnded | Self::UpstreamEnded)
    }

    fn client_sends(self) -> bool {
        matches!(self, Self::Open | Self::UpstreamEnded)
    }

    fn upstream_sends(self) -> bool {
        matches!(self, Self::Open | Self::ClientEnded)
    }

    fn end_client(&mut self) {
        *self = if self.upstream_sends() { Self::ClientEnded } else { Self::Closed };
    }

    fn end_upstream(&mut self) {
        *self = if self.client_sends() { Self::UpstreamEnded } else { Self::Closed };
    }
}

/// Relays both directions of one connection, until both have ended or the connection is aborted.
struct Relay<'a, C, U> {
    flow: Flow<'a>,
    client: C,
    upstream: U,
    client_to_upstream: Direction,
    upstream_to_client: Direction,
    /// `None` while no deadline applies.
    idle_timer: Option<Box<IdleTimer>>,
    state: State,
    /// The direction to poll first. It alternates, so that a busy direction does not starve the
    /// other.
    upstream_first: bool,
}

impl<'a, C: Endpoint<'a>, U: Endpoint<'a>> Relay<'a, C, U> {
    fn new(flow: Flow<'a>, client: C, upstream: U) -> Self {
        let idle_timer = flow.deadlines.idle(flow.record.moved());
        Self {
            flow,
            client,
            upstream,
            client_to_upstream: Direction::default(),
            upstream_to_client: Direction::default(),
            idle_timer,
            state: State::Open,
            upstream_first: false,
        }
    }

    fn poll_client_to_upstream(&mut self, cx: &mut Context<'_>) -> Result<(), ProxyError> {
        let Self { flow, client, upstream, client_to_upstream, state, .. } = self;
        let count = |bytes| flow.received(bytes);
        if state.client_sends()
            && client_to_upstream
                .poll(client, upstream, state.is_half_closed(), cx, &count)?
                .is_ready()
        {
            state.end_client();
        }
        Ok(())
    }

    fn poll_upstream_to_client(&mut self, cx: &mut Context<'_>) -> Result<(), ProxyError> {
        let Self { flow, client, upstream, upstream_to_client, state, .. } = self;
        let count = |bytes| flow.sent(bytes);
        if state.upstream_sends()
            && upstream_to_client
                .poll(upstream, client, state.is_half_closed(), cx, &count)?
                .is_ready()
        {
            state.end_upstream();
        }
        Ok(())
    }

    fn poll_directions(&mut self, cx: &mut Context<'_>) -> Result<(), ProxyError> {
        if self.upstream_first {
            self.poll_upstream_to_client(cx)?;
        }
        self.poll_client_to_upstream(cx)?;
        if !self.upstream_first {
            self.poll_upstream_to_client(cx)?;
        }
        Ok(())
    }

    /// Ready when the connection must end, even if unread data remains.
    fn poll_terminated(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError> {
        if let Poll::Ready(reason) = self.flow.termination.poll_terminated(cx) {
            return Poll::Ready(reason);
        }
        if let Poll::Ready(reason) = self.client.poll_revoked(cx) {
            return Poll::Ready(reason);
        }
        self.upstream.poll_revoked(cx)
    }

    fn poll_relay(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ProxyError>> {
        // First: no byte moves after a termination.
        if let Poll::Ready(reason) = self.poll_terminated(cx) {
            return Poll::Ready(Err(reason));
        }
        self.upstream_first = !self.upstream_first;
        let was_half_closed = self.state.is_half_closed();
        self.poll_directions(cx)?;
        let is_newly_half_closed = !was_half_closed && self.state.is_half_closed();
        if is_newly_half_closed {
            // The remaining direction was polled before it had to watch its sink. Poll it again.
            self.poll_directions(cx)?;
        }
        if self.state == State::Closed {
            return Poll::Ready(Ok(()));
        }
        if is_newly_half_closed {
            self.idle_timer = Some(self.flow.deadlines.half_closed(self.flow.record.moved()));
        }
        self.poll_idle_timer(cx).map(Err)
    }

    fn poll_idle_timer(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError> {
        let Some(timer) = &mut self.idle_timer else { return Poll::Pending };
        let sockets = [self.client.as_tcp(), self.upstream.as_tcp()];
        timer.poll(cx, self.flow.record.moved(), &sockets.map(|tcp| tcp.map(|tcp| tcp.stream)))
    }
}

impl<'a, C: Endpoint<'a> + Unpin, U: Endpoint<'a> + Unpin> Future for Relay<'a, C, U> {
    type Output = Result<(), ProxyError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = ready!(self.poll_relay(cx));
        self.client.close(&outcome);
        self.upstream.close(&outcome);
        Poll::Ready(outcome)
    }
}

#[cfg(test)]
mod tests;

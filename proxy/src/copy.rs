//! Moving bytes between an application's connection and what carries them on: a tunnel or another connection.
//!
//! Both directions run until both have ended (half-open is a state like any other) or one breaks. FIN becomes END_STREAM
//! and END_STREAM becomes FIN; whatever else ends a side aborts the other one: TCP RST and RST_STREAM, never a FIN.
//! Sockets come here such that closing them is a reset (`accept.rs`, `dial.rs`); only a good end takes that back.
//!
//! A side whose sending has ended can still break. Nobody reads it then, so that whoever has nothing to write to it watches it.
//! As long as it sends, reading tells, behind what it had sent before.
//!
//! A [`Relay`] is polled and not written as an `async fn`: it is most of what an idle connection holds, and most of what a small
//! request costs beside its system calls.
//!
//! `tcp` and `tunnel` are what a side can be, `splice` moves bulk between two connections, `buffers` is what that may cost, and
//! `deadlines` is how long it may rest.

mod buffers;
mod deadlines;
mod splice;
mod tcp;
mod tunnel;

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::net::TcpStream;
use underpass_hbone::TunnelStream;

pub(crate) use self::buffers::Buffers;
use self::deadlines::Watch;
pub(crate) use self::deadlines::{Deadlines, Probes};
use self::splice::Splice;
use self::tcp::Tcp;
pub(crate) use self::tcp::broken;
use self::tunnel::Tunnelled;
use crate::connection_registry::Termination;
use crate::error::ProxyError;
use crate::node::Node;
use crate::record::ConnectionRecord;

/// One proxied connection while its bytes move: what is counted, what it may hold, and what may cut it short.
pub(crate) struct Flow<'a> {
    pub(crate) record: &'a ConnectionRecord,
    pub(crate) buffers: &'a Buffers,
    pub(crate) deadlines: &'a Deadlines,
    pub(crate) termination: &'a Termination,
}

impl<'a> Flow<'a> {
    pub(crate) fn new(
        Node { buffers, deadlines, .. }: &'a Node,
        record: &'a ConnectionRecord,
        termination: &'a Termination,
    ) -> Self {
        Self { record, buffers, deadlines, termination }
    }

    /// Copies between a client's connection and the tunnel that leads to its destination.
    pub(crate) fn into_tunnel(
        self,
        client: &'a TcpStream,
        tunnel: TunnelStream,
    ) -> impl Future<Output = Result<(), ProxyError>> {
        let client = Tcp::new(client, ProxyError::Client, self.buffers);
        Relay::new(self, client, Tunnelled::new(tunnel))
    }

    /// Copies between the tunnel that a client came through and the application.
    pub(crate) fn out_of_tunnel(
        self,
        tunnel: TunnelStream,
        app: &'a TcpStream,
    ) -> impl Future<Output = Result<(), ProxyError>> {
        let app = Tcp::new(app, ProxyError::Upstream, self.buffers);
        Relay::new(self, Tunnelled::new(tunnel), app)
    }

    /// Copies between a client's connection and one to its destination.
    pub(crate) fn through_tcp(
        self,
        client: &'a TcpStream,
        upstream: &'a TcpStream,
    ) -> impl Future<Output = Result<(), ProxyError>> {
        let client = Tcp::new(client, ProxyError::Client, self.buffers);
        let upstream = Tcp::new(upstream, ProxyError::Upstream, self.buffers);
        Relay::new(self, client, upstream)
    }
}

/// One side of a connection: bytes come from it, and go to it.
trait Side {
    /// The next bytes, never empty; `None` after a clean end (FIN, END_STREAM).
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, ProxyError>>;

    /// Whether a clean end is known to follow what was read last. One that is known in time goes on with it, and costs neither
    /// side a packet and a wake-up of its own.
    fn is_at_end(&self) -> bool;

    /// Takes some from the front of `data`, which is not empty, when there is room: how many. After the `last` data, it is only
    /// finished.
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<Result<usize, ProxyError>>;

    /// Sends what it took and did not send yet, when it is time: called when there is nothing to
    /// write for now.
    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ProxyError>> {
        Poll::Ready(Ok(()))
    }

    /// Ends what is written to it cleanly (FIN, END_STREAM); the other direction goes on.
    fn finish(&mut self) -> Result<(), ProxyError>;

    /// Ready when it breaks, though nothing is read from it or written to it.
    fn poll_aborted(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError>;

    /// Ready when it may not be used any longer, whatever is still to be read from it.
    fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError>;

    /// All is over: both directions ended well, or this side has to tell that they did not.
    fn close(&mut self, well: bool);

    /// The connection that is probed while it is half-closed; a tunnel has its own way to find out.
    fn socket(&self) -> Option<&TcpStream>;
}

/// How bytes get from one side to another.
trait Onto<To: Side>: Side + Sized {
    /// Moves what there is: ready when this side has ended well, and that was passed on.
    fn poll_onto(
        &mut self,
        to: &mut To,
        direction: &mut Direction,
        cx: &mut Context<'_>,
        moved: &impl Fn(usize),
    ) -> Poll<Result<(), ProxyError>> {
        while ready!(direction.poll_piece(self, to, cx, moved))? {}
        Poll::Ready(to.finish())
    }
}

impl Onto<Tunnelled> for Tcp<'_> {}
impl Onto<Tcp<'_>> for Tunnelled {}

impl Onto<Tcp<'_>> for Tcp<'_> {
    /// Bulk between two connections need not be copied.
    fn poll_onto(
        &mut self,
        to: &mut Tcp<'_>,
        direction: &mut Direction,
        cx: &mut Context<'_>,
        moved: &impl Fn(usize),
    ) -> Poll<Result<(), ProxyError>> {
        loop {
            if let Some(splice) = &mut direction.splice {
                let ended = ready!(splice.poll(self, to, direction.watches, cx, moved))?;
                direction.splice = None;
                if ended {
                    break;
                }
            }
            if !ready!(direction.poll_piece(self, to, cx, moved))? {
                break;
            }
            // Boxed: most connections never are, and all of them would have to bear its state.
            direction.splice = self.is_bulk().then(|| Box::new(Splice::new()));
        }
        Poll::Ready(to.finish())
    }
}

/// One direction of a connection.
#[derive(Default)]
struct Direction {
    /// What was read and is not written yet.
    pending: Bytes,
    splice: Option<Box<Splice>>,
    /// Whether where it goes has ended its own sending, so that nobody reads there.
    watches: bool,
    ended: bool,
}

impl Direction {
    /// Moves one piece; false at a clean end. Every piece waits for a connection once, which is what gives others their turn:
    /// tokio lets no task find its connections ready for ever.
    fn poll_piece(
        &mut self,
        from: &mut impl Side,
        to: &mut impl Side,
        cx: &mut Context<'_>,
        moved: &impl Fn(usize),
    ) -> Poll<Result<bool, ProxyError>> {
        if self.pending.is_empty() {
            match from.poll_read(cx)? {
                Poll::Ready(Some(data)) => self.pending = data,
                Poll::Ready(None) => return Poll::Ready(Ok(false)),
                Poll::Pending => {
                    if let Poll::Ready(Err(error)) = to.poll_flush(cx) {
                        return Poll::Ready(Err(error));
                    }
                    return self.poll_watch(to, cx);
                }
            }
        }
        let last = from.is_at_end();
        while !self.pending.is_empty() {
            moved(ready!(to.poll_write(cx, &mut self.pending, last))?);
        }
        // Empty, it would still hold the memory that it was read into.
        self.pending = Bytes::new();
        Poll::Ready(Ok(true))
    }

    /// While there is nothing to write: an error if where it would go has broken, and nobody reads that.
    fn poll_watch<T>(
        &self,
        to: &mut impl Side,
        cx: &mut Context<'_>,
    ) -> Poll<Result<T, ProxyError>> {
        if self.watches { to.poll_aborted(cx).map(Err) } else { Poll::Pending }
    }
}

/// Both directions of one connection, until both have ended or something cuts them short.
struct Relay<'a, C, U> {
    flow: Flow<'a>,
    client: C,
    upstream: U,
    /// From the client, and to it.
    there: Direction,
    back: Direction,
    /// How long it may rest, if that is limited.
    watch: Option<Box<Watch>>,
    /// Which direction goes first: a busy one would leave the other no turn.
    back_first: bool,
}

impl<'a, C: Onto<U>, U: Onto<C>> Relay<'a, C, U> {
    fn new(flow: Flow<'a>, client: C, upstream: U) -> Self {
        let watch = flow.deadlines.idle(flow.record.moved());
        let (there, back) = (Direction::default(), Direction::default());
        Self { flow, client, upstream, there, back, watch, back_first: false }
    }

    fn poll_there(&mut self, cx: &mut Context<'_>) -> Result<(), ProxyError> {
        let record = self.flow.record;
        let Self { client, upstream, there, .. } = self;
        if !there.ended
            && client.poll_onto(upstream, there, cx, &|bytes| record.received(bytes))?.is_ready()
        {
            there.ended = true;
            self.half_closed();
        }
        Ok(())
    }

    fn poll_back(&mut self, cx: &mut Context<'_>) -> Result<(), ProxyError> {
        let record = self.flow.record;
        let Self { client, upstream, back, .. } = self;
        if !back.ended
            && upstream.poll_onto(client, back, cx, &|bytes| record.sent(bytes))?.is_ready()
        {
            back.ended = true;
            self.half_closed();
        }
        Ok(())
    }

    /// One of two directions has ended: from now on the other one watches the side that nobody reads.
    fn half_closed(&mut self) {
        if self.there.ended != self.back.ended {
            (self.there.watches, self.back.watches) = (true, true);
        }
    }

    fn poll_both(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ProxyError>> {
        // First: a connection that is terminated or cut moves nothing more.
        if let Poll::Ready(reason) = self.flow.termination.poll_terminated(cx) {
            return Poll::Ready(Err(reason));
        }
        if let Poll::Ready(reason) = self.client.poll_cut(cx) {
            return Poll::Ready(Err(reason));
        }
        if let Poll::Ready(reason) = self.upstream.poll_cut(cx) {
            return Poll::Ready(Err(reason));
        }
        self.back_first = !self.back_first;
        let half_closed = self.there.watches;
        if self.back_first {
            self.poll_back(cx)?;
        }
        self.poll_there(cx)?;
        if !self.back_first {
            self.poll_back(cx)?;
        }
        if self.there.watches != half_closed {
            // Whoever goes on may have gone first, and did not know that it has to watch.
            self.poll_there(cx)?;
            self.poll_back(cx)?;
        }
        if self.there.ended && self.back.ended {
            return Poll::Ready(Ok(()));
        }
        if self.there.watches != half_closed {
            self.watch = Some(self.flow.deadlines.half_closed(self.flow.record.moved()));
        }
        self.poll_late(cx).map(Err)
    }

    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError> {
        let Some(watch) = &mut self.watch else { return Poll::Pending };
        let sockets = [self.client.socket(), self.upstream.socket()];
        watch.poll(cx, self.flow.record.moved(), &sockets)
    }
}

impl<C: Onto<U> + Unpin, U: Onto<C> + Unpin> Future for Relay<'_, C, U> {
    type Output = Result<(), ProxyError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = ready!(self.poll_both(cx));
        self.client.close(outcome.is_ok());
        self.upstream.close(outcome.is_ok());
        Poll::Ready(outcome)
    }
}

#[cfg(test)]
mod tests;

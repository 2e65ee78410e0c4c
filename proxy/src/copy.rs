//! Moving bytes between an application's connection and what carries them on: a tunnel or another connection.
//!
//! Both directions run until both have ended (half-open is a state like any other) or one breaks. FIN becomes END_STREAM
//! and END_STREAM becomes FIN; whatever else ends a side aborts the other one: TCP RST and RST_STREAM, never a FIN.
//! Sockets come here such that closing them is a reset (`accept.rs`, `dial.rs`); only a good end takes that back.
//!
//! A side whose sending has ended can still break. Nobody reads it then, so that whoever has nothing to write to it watches it.
//! As long as it sends, reading tells, behind what it had sent before.
//!
//! `tcp` reads and writes connections, `splice` moves bulk between two of them, `buffers` is what that may cost, and `deadlines` is
//! how long it may rest.

mod buffers;
mod deadlines;
mod splice;
mod tcp;

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::Poll;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;
use underpass_hbone::{TunnelReader, TunnelStream, TunnelWriter};
use underpass_interception::end_on_close;

pub(crate) use self::buffers::Buffers;
pub(crate) use self::deadlines::{Deadlines, Probes};
use self::splice::Spliced;
pub(crate) use self::tcp::broken;
use self::tcp::{Broke, TcpSink, TcpSource};
use crate::drain::Drain;
use crate::error::ProxyError;
use crate::live::Revocation;
use crate::record::ConnectionRecord;
use crate::worker::Shared;

/// One proxied connection while its bytes move: what is counted, what it may hold, and what may cut it short.
pub(crate) struct Flow<'a> {
    pub(crate) record: &'a ConnectionRecord,
    pub(crate) buffers: &'a Buffers,
    pub(crate) deadlines: &'a Deadlines,
    pub(crate) drain: &'a Drain,
    pub(crate) revocation: &'a mut Revocation,
}

impl<'a> Flow<'a> {
    pub(crate) fn new(
        shared: &'a Shared,
        record: &'a ConnectionRecord,
        revocation: &'a mut Revocation,
    ) -> Self {
        let Shared { buffers, drain, deadlines, .. } = shared;
        Self { record, buffers, deadlines, drain, revocation }
    }

    /// Copies between a client's connection and the tunnel that leads to its destination.
    pub(crate) fn into_tunnel(
        self,
        client: TcpStream,
        tunnel: TunnelStream,
    ) -> impl Future<Output = Result<(), ProxyError>> {
        let record = self.record;
        let received = |bytes| record.received(bytes);
        let sent = |bytes| record.sent(bytes);
        self.through_tunnel(client, ProxyError::Client, tunnel, received, sent)
    }

    /// Copies between the tunnel that a client came through and the application.
    pub(crate) fn out_of_tunnel(
        self,
        tunnel: TunnelStream,
        app: TcpStream,
    ) -> impl Future<Output = Result<(), ProxyError>> {
        let record = self.record;
        let received = |bytes| record.received(bytes);
        let sent = |bytes| record.sent(bytes);
        self.through_tunnel(app, ProxyError::Upstream, tunnel, sent, received)
    }

    async fn through_tunnel(
        self,
        stream: TcpStream,
        broke: Broke,
        tunnel: TunnelStream,
        into_tunnel: impl Fn(usize),
        out_of_tunnel: impl Fn(usize),
    ) -> Result<(), ProxyError> {
        let distrusted = tunnel.distrusted();
        let (mut reader, mut writer) = tunnel.split();
        let half_closed = AtomicBool::new(false);
        let drain = self.drain;
        let cut = Box::pin(async {
            tokio::select! {
                drained = drain.aborting() => drained,
                reason = distrusted => ProxyError::Tunnel(reason),
            }
        });
        let outcome = {
            let from = TcpSource::new(&stream, broke, self.buffers);
            let to = TcpSink { stream: &stream, broke };
            let there = pin!(pump(from, &mut writer, &half_closed, into_tunnel));
            let back = pin!(pump(&mut reader, to, &half_closed, out_of_tunnel));
            self.both(there, back, &half_closed, &[&stream], cut).await
        };
        match outcome {
            Ok(()) => end_on_close(&stream),
            Err(_) => writer.abort(),
        }
        outcome
    }

    /// Copies between a client's connection and one to its destination.
    pub(crate) async fn through_tcp(
        self,
        client: TcpStream,
        upstream: TcpStream,
    ) -> Result<(), ProxyError> {
        let record = self.record;
        let half_closed = AtomicBool::new(false);
        let cut = Box::pin(self.drain.aborting());
        let outcome = {
            let from_client = TcpSource::new(&client, ProxyError::Client, self.buffers);
            let to_client = TcpSink { stream: &client, broke: ProxyError::Client };
            let from_upstream = TcpSource::new(&upstream, ProxyError::Upstream, self.buffers);
            let to_upstream = TcpSink { stream: &upstream, broke: ProxyError::Upstream };
            let received = |bytes| record.received(bytes);
            let sent = |bytes| record.sent(bytes);
            let there = pin!(pump_bulk(from_client, to_upstream, &half_closed, received));
            let back = pin!(pump_bulk(from_upstream, to_client, &half_closed, sent));
            self.both(there, back, &half_closed, &[&client, &upstream], cut).await
        };
        if outcome.is_ok() {
            end_on_close(&client);
            end_on_close(&upstream);
        }
        outcome
    }

    /// Runs both directions to their ends, unless `cut` or something else cuts them short. `half_closed` is set when the first one
    /// has ended.
    async fn both(
        self,
        mut there: Pin<&mut impl Future<Output = Result<(), ProxyError>>>,
        mut back: Pin<&mut impl Future<Output = Result<(), ProxyError>>>,
        half_closed: &AtomicBool,
        sockets: &[&TcpStream],
        cut: Pin<Box<impl Future<Output = ProxyError>>>,
    ) -> Result<(), ProxyError> {
        let Self { record, deadlines, revocation, .. } = self;
        // It is polled when it was woken, and not at every turn: that would be some locks which all connections share.
        let mut cut: FuturesUnordered<_> = [cut].into_iter().collect();
        let moved = || record.moved();
        let both = pin!(async {
            let there_ended = tokio::select! {
                ended = &mut there => ended.map(|()| true)?,
                ended = &mut back => ended.map(|()| false)?,
                late = deadlines.idle(moved) => return Err(late),
            };
            half_closed.store(true, Relaxed);
            let rest = async { if there_ended { back.await } else { there.await } };
            // Boxed: most connections are never half-closed for long, and all of them would have to bear its timers.
            tokio::select! {
                ended = rest => ended,
                late = Box::pin(deadlines.half_closed(sockets, moved)) => Err(late),
            }
        });
        let uncut = pin!(async {
            tokio::select! {
                ended = both => ended,
                Some(error) = cut.next() => Err(error),
            }
        });
        revocation.or_end(uncut).await
    }
}

/// Moves bytes from `from` to `to` until the one ends well, and then ends the other well.
async fn pump(
    mut from: impl Source,
    mut to: impl Sink,
    half_closed: &AtomicBool,
    moved: impl Fn(usize),
) -> Result<(), ProxyError> {
    while let Some(data) = next(&mut from, &mut to, half_closed).await? {
        write_all(&mut to, data, &moved).await?;
    }
    to.finish().await
}

/// The same between two connections, of which bulk need not be copied.
async fn pump_bulk(
    mut from: TcpSource<'_>,
    mut to: TcpSink<'_>,
    half_closed: &AtomicBool,
    moved: impl Fn(usize),
) -> Result<(), ProxyError> {
    while let Some(data) = next(&mut from, &mut to, half_closed).await? {
        write_all(&mut to, data, &moved).await?;
        if from.is_bulk() {
            // Boxed: most connections never are, and all of them would have to bear its state.
            let splicing = Box::pin(splice::relay(&mut from, &mut to, half_closed, &moved));
            if splicing.await? == Spliced::Ended {
                break;
            }
        }
    }
    to.finish().await
}

/// What `from` has next, unless the side that it would go to breaks when nobody reads that any longer.
async fn next(
    from: &mut impl Source,
    to: &mut impl Sink,
    half_closed: &AtomicBool,
) -> Result<Option<Bytes>, ProxyError> {
    tokio::select! {
        biased;
        data = from.read() => data,
        // Boxed: most connections are never half-closed for long, and all of them would have to bear its state.
        error = async { once(half_closed).await; Box::pin(to.aborted()).await } => Err(error),
    }
}

async fn write_all(
    to: &mut impl Sink,
    mut data: Bytes,
    moved: &impl Fn(usize),
) -> Result<(), ProxyError> {
    while !data.is_empty() {
        moved(to.write(&mut data).await?);
    }
    // A side that always has something, and one that always takes it, leave others their turn.
    consume_budget().await;
    Ok(())
}

/// Waits until `state` is set. Whoever sets it polls whoever waits, both being of one task.
async fn once(state: &AtomicBool) {
    poll_fn(|_| if state.load(Relaxed) { Poll::Ready(()) } else { Poll::Pending }).await;
}

/// Where bytes come from.
trait Source {
    /// The next bytes, never empty; `None` after a clean end (FIN, END_STREAM). Cancel-safe.
    async fn read(&mut self) -> Result<Option<Bytes>, ProxyError>;
}

/// Where bytes go.
trait Sink {
    /// Takes some from the front of `data`, waiting for room: how many.
    async fn write(&mut self, data: &mut Bytes) -> Result<usize, ProxyError>;
    /// Ends this direction cleanly (FIN, END_STREAM); the other one goes on.
    async fn finish(&mut self) -> Result<(), ProxyError>;
    /// Waits until this side breaks, though nothing is written to it. Cancel-safe.
    async fn aborted(&mut self) -> ProxyError;
}

impl Source for &mut TunnelReader {
    async fn read(&mut self) -> Result<Option<Bytes>, ProxyError> {
        TunnelReader::read(self).await.map_err(ProxyError::Tunnel)
    }
}

impl Sink for &mut TunnelWriter {
    async fn write(&mut self, data: &mut Bytes) -> Result<usize, ProxyError> {
        self.write_part(data).await.map_err(ProxyError::Tunnel)
    }

    async fn finish(&mut self) -> Result<(), ProxyError> {
        TunnelWriter::finish(self).map_err(ProxyError::Tunnel)
    }

    async fn aborted(&mut self) -> ProxyError {
        ProxyError::Tunnel(self.closed().await)
    }
}

#[cfg(test)]
mod tests;

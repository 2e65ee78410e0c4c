//! One direction of a relayed connection, from a source to a sink.

use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::splice::Splice;
use super::{Sink, Source};
use crate::error::ProxyError;

/// One direction of a connection.
#[derive(Default)]
pub(super) struct Direction {
    /// Bytes that were read and are not written yet.
    pending: Bytes,
    /// Present while the direction moves bulk between two TCP connections. Boxed, because most
    /// connections never do.
    splice: Option<Box<Splice>>,
}

impl Direction {
    /// Moves bytes until it must wait. `count` receives the number of bytes of each write. Ready
    /// when `source` has ended cleanly and the end was forwarded. `watch_sink` means that no
    /// direction reads `sink`, because it has ended its sending.
    pub(super) fn poll<'a>(
        &mut self,
        source: &mut impl Source<'a>,
        sink: &mut impl Sink<'a>,
        watch_sink: bool,
        cx: &mut Context<'_>,
        count: &impl Fn(usize),
    ) -> Poll<Result<(), ProxyError>> {
        loop {
            if let (Some(source), Some(sink)) = (source.as_tcp(), sink.as_tcp())
                && let Some(splice) = &mut self.splice
            {
                let ended = ready!(splice.poll(source, sink, watch_sink, cx, count))?;
                self.splice = None;
                if ended {
                    break;
                }
            }
            if !ready!(self.poll_piece(source, sink, watch_sink, cx, count))? {
                break;
            }
            if let (Some(source), Some(_)) = (source.as_tcp(), sink.as_tcp())
                && source.is_bulk()
            {
                self.splice = Some(Box::new(Splice::new()));
            }
        }
        Poll::Ready(sink.finish(watch_sink))
    }

    /// Moves one piece; false at a clean end. Each piece polls a socket's readiness at least once,
    /// which consumes tokio's task budget: a busy connection yields to others.
    pub(super) fn poll_piece<'a>(
        &mut self,
        source: &mut impl Source<'a>,
        sink: &mut impl Sink<'a>,
        watch_sink: bool,
        cx: &mut Context<'_>,
        count: &impl Fn(usize),
    ) -> Poll<Result<bool, ProxyError>> {
        if self.pending.is_empty() {
            match source.poll_read(cx)? {
                Poll::Ready(Some(data)) => self.pending = data,
                Poll::Ready(None) => return Poll::Ready(Ok(false)),
                Poll::Pending => {
                    if let Poll::Ready(Err(error)) = sink.poll_flush(cx) {
                        return Poll::Ready(Err(error));
                    }
                    return if watch_sink { sink.poll_aborted(cx).map(Err) } else { Poll::Pending };
                }
            }
        }
        let last = source.is_at_end();
        while !self.pending.is_empty() {
            match sink.poll_write(cx, &mut self.pending, last)? {
                Poll::Ready(written) => count(written),
                // Watch the source for an abort. It cannot be read until the sink has taken the
                // pending data.
                Poll::Pending => return source.poll_aborted(cx).map(Err),
            }
        }
        // An empty `Bytes` would still hold the memory of its read.
        self.pending = Bytes::new();
        Poll::Ready(Ok(true))
    }
}

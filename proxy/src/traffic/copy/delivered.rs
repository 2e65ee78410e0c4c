//! The application of another pod of this process as one side of a relay: a TCP connection that the
//! other pod can terminate too.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use underpass_hbone::RevocationSignal;

use super::tcp::Tcp;
use super::{Side, Sink, Source};
use crate::decide::connection_registry::Termination;
use crate::error::ProxyError;

/// A connection between two pods of this process, without a tunnel.
pub(super) struct Delivered<'a> {
    pub(super) app: Tcp<'a>,
    /// The termination signal of the destination pod.
    pub(super) termination: &'a Termination,
    /// The source's revocation by the destination, and the reverse.
    pub(super) revocations: [RevocationSignal; 2],
}

impl<'a> Side<'a> for Delivered<'a> {
    fn poll_aborted(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError> {
        self.app.poll_aborted(cx)
    }

    fn poll_revoked(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError> {
        if let Poll::Ready(reason) = self.termination.poll_terminated(cx) {
            return Poll::Ready(reason);
        }
        for revocation in &mut self.revocations {
            if let Poll::Ready(reason) = Pin::new(revocation).poll(cx) {
                return Poll::Ready(ProxyError::Tunnel(reason));
            }
        }
        Poll::Pending
    }

    fn close(&mut self, outcome: &Result<(), ProxyError>) {
        self.app.close(outcome);
    }

    fn as_tcp(&mut self) -> Option<&mut Tcp<'a>> {
        Some(&mut self.app)
    }
}

impl<'a> Source<'a> for Delivered<'a> {
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, ProxyError>> {
        self.app.poll_read(cx)
    }

    fn is_at_end(&self) -> bool {
        self.app.is_at_end()
    }
}

impl<'a> Sink<'a> for Delivered<'a> {
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<Result<usize, ProxyError>> {
        self.app.poll_write(cx, data, last)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ProxyError>> {
        self.app.poll_flush(cx)
    }

    fn finish(&mut self, closing: bool) -> Result<(), ProxyError> {
        self.app.finish(closing)
    }
}

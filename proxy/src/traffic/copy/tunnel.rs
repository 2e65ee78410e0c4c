//! A stream of a tunnel as one side of a relay.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use underpass_hbone::{RevocationSignal, TunnelReader, TunnelStream, TunnelWriter};

use super::{Side, Sink, Source};
use crate::error::ProxyError;

/// The stream of a tunnel as one side of a relay.
pub(super) struct Tunnelled {
    reader: TunnelReader,
    writer: TunnelWriter,
    revocation: RevocationSignal,
}

impl Tunnelled {
    pub(super) fn new(tunnel: TunnelStream) -> Self {
        let revocation = tunnel.revocation();
        let (reader, writer) = tunnel.split();
        Self { reader, writer, revocation }
    }
}

impl Side<'_> for Tunnelled {
    fn poll_aborted(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError> {
        self.writer.poll_closed(cx).map(ProxyError::Tunnel)
    }

    fn poll_revoked(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError> {
        Pin::new(&mut self.revocation).poll(cx).map(ProxyError::Tunnel)
    }

    fn close(&mut self, outcome: &Result<(), ProxyError>) {
        if outcome.is_err() {
            self.writer.abort();
        }
    }
}

impl Source<'_> for Tunnelled {
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, ProxyError>> {
        self.reader.poll_read(cx).map_err(ProxyError::Tunnel)
    }

    fn is_at_end(&self) -> bool {
        self.reader.is_at_end()
    }
}

impl Sink<'_> for Tunnelled {
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<Result<usize, ProxyError>> {
        self.writer.poll_write(cx, data, last).map_err(ProxyError::Tunnel)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ProxyError>> {
        self.writer.poll_flush(cx).map_err(ProxyError::Tunnel)
    }

    fn finish(&mut self, _: bool) -> Result<(), ProxyError> {
        self.writer.finish().map_err(ProxyError::Tunnel)
    }
}

//! Receives the queries of a pod's applications over UDP and TCP, and sends the responses.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use underpass_hbone::log_panic;
use underpass_interception::Listener;

use super::forward::Reply;
use super::response::Transport;
use super::service::DnsService;
use crate::node::pod::Pod;

/// The maximum length of a query. Names have at most 255 bytes; the rest is for options and
/// signatures.
const MAX_QUERY: usize = 4096;
/// The maximum number of queries of one connection that wait for a response. Further ones wait in
/// the kernel.
const MAX_PIPELINED: usize = 64;
/// The idle timeout of a connection: longer than applications keep them open (RFC 7766 section
/// 6.2.3: a few seconds).
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// The idle time after which a connection is closed during a drain: longer than the pause between
/// the queries of a client that sends many.
const DRAIN_IDLE_TIMEOUT: Duration = Duration::from_millis(200);
/// The timeout for sending a response to a client that does not read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// The timeout for the client's FIN after the proxy's.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// The pause after an error of a socket, for example without memory.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// Serves a UDP socket. Never returns.
pub(crate) async fn serve_udp(service: &Arc<DnsService>, pod: &Arc<Pod>, socket: &Arc<UdpSocket>) {
    let mut buffer = vec![0; MAX_QUERY + 1];
    loop {
        let (length, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(%error, "cannot receive a DNS query");
                sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        let Some(message) = buffer.get(..length).filter(|_| length <= MAX_QUERY) else { continue };
        match service.serve(message, Transport::Udp) {
            Reply::Nothing => {}
            // If the client's socket is full or closed, it asks again.
            Reply::Now(response) => {
                socket.send_to(&response, client).await.ok();
            }
            Reply::Later(response) => {
                let (socket, sockets) = (socket.clone(), pod.sockets.clone());
                let serving = async move {
                    tokio::select! {
                        response = response => {
                            socket.send_to(&response, client).await.ok();
                        }
                        () = sockets.closed() => {}
                    }
                };
                pod.queries.spawn(log_panic("DNS query", serving));
            }
        }
    }
}

/// Accepts connections of a TCP listener. Never returns.
pub(crate) async fn serve_tcp(service: &Arc<DnsService>, pod: &Arc<Pod>, listener: &Listener) {
    loop {
        // The semaphore is never closed.
        let Ok(permit) = service.connections.clone().acquire_owned().await else { return };
        let accepted = listener.accept().await.and_then(|(stream, _)| TcpStream::from_std(stream));
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a DNS connection");
                sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        let descriptor = pod.limits.hold_outbound();
        let (service, sockets, closing) =
            (service.clone(), pod.sockets.clone(), pod.closing.clone());
        let serving = async move {
            let _permits = (permit, descriptor);
            tokio::select! {
                served = serve_connection(&service, stream, &closing) => {
                    if let Err(error) = served {
                        tracing::debug!(%error, "a DNS connection failed");
                    }
                }
                () = sockets.closed() => {}
            }
        };
        pod.queries.spawn(log_panic("DNS connection", serving));
    }
}

/// Serves the queries of one connection, also several at a time (RFC 7766 section 6.2.1.1). A drain
/// closes it when no query waits and the client pauses: a query that arrives after FIN is lost for
/// clients that do not repeat it.
async fn serve_connection(
    service: &Arc<DnsService>,
    stream: TcpStream,
    closing: &CancellationToken,
) -> io::Result<()> {
    // The responses to several queries must not wait for acknowledgements of each other.
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = stream.into_split();
    let (mut received, mut waiting) = (BytesMut::new(), FuturesUnordered::new());
    let mut is_open = true;
    while is_open || !waiting.is_empty() {
        let has_room = waiting.len() < MAX_PIPELINED;
        let is_idle = waiting.is_empty();
        let response = tokio::select! {
            // A query that has arrived is served although the idle time has passed.
            biased;
            Some(response) = waiting.next() => Some(response),
            message = next_message(&mut reader, &mut received), if is_open && has_room => {
                match message? {
                    Some(message) => match service.serve(&message, Transport::Tcp) {
                        Reply::Nothing => return Ok(()),
                        Reply::Now(response) => Some(response),
                        Reply::Later(response) => {
                            waiting.push(response);
                            None
                        }
                    },
                    None => {
                        is_open = false;
                        None
                    }
                }
            }
            () = idle_in_drain(closing), if is_open && is_idle => {
                is_open = false;
                None
            }
        };
        if let Some(response) = response {
            let length = u16::try_from(response.len()).map_err(io::Error::other)?;
            let framed = [&length.to_be_bytes(), &*response].concat();
            timeout(WRITE_TIMEOUT, writer.write_all(&framed)).await??;
        }
    }
    writer.shutdown().await?;
    timeout(END_TIMEOUT, read_to_end(&mut reader, received)).await?
}

/// Waits until the drain has begun and [`DRAIN_IDLE_TIMEOUT`] has passed.
async fn idle_in_drain(closing: &CancellationToken) {
    closing.cancelled().await;
    sleep(DRAIN_IDLE_TIMEOUT).await;
}

/// Reads until the client's FIN. Closing a socket with unread data sends RST, which may discard
/// responses.
async fn read_to_end(
    reader: &mut (impl AsyncRead + Unpin),
    mut unread: BytesMut,
) -> io::Result<()> {
    loop {
        unread.clear();
        if reader.read_buf(&mut unread).await? == 0 {
            return Ok(());
        }
    }
}

/// The next query; `None` at the end of the connection or after [`IDLE_TIMEOUT`]. Cancel-safe:
/// `received` has what was read.
async fn next_message(
    reader: &mut (impl AsyncRead + Unpin),
    received: &mut BytesMut,
) -> io::Result<Option<BytesMut>> {
    loop {
        if let Some(length) = received.first_chunk().map(|length| u16::from_be_bytes(*length)) {
            let length = usize::from(length);
            if length > MAX_QUERY {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if received.len() >= 2 + length {
                received.advance(2);
                return Ok(Some(received.split_to(length)));
            }
        }
        match timeout(IDLE_TIMEOUT, reader.read_buf(received)).await {
            Ok(Ok(1..)) => {}
            Ok(Ok(0)) | Err(_) => return Ok(None),
            Ok(Err(error)) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests;

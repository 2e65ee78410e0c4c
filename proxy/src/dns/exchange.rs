//! Exchanges messages with servers by the sockets of a pod, which the pod's rules do not capture.
//!
//! Each query has a socket of its own, whose port the kernel chooses at random, and a random id. So
//! an attacker cannot guess the two numbers of a valid answer (RFC 5452). The kernel drops
//! datagrams of other senders than the server.

use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::message::{self, Query};
use super::response::Transport;
use super::upstream::Exchange;
use crate::limits::PodLimits;
use crate::node::sockets::PodSockets;

/// The minimum buffer for a response over UDP: the most that servers usually send, whatever the
/// client accepts.
const MIN_BUFFER: usize = 4096;

/// Exchanges messages by the sockets of one pod, or of the node.
#[derive(Debug)]
pub(crate) struct SocketExchange {
    pub(crate) sockets: Arc<PodSockets>,
    /// The limits that count the sockets.
    pub(crate) limits: PodLimits,
}

impl Exchange for SocketExchange {
    fn exchange(
        &self,
        server: SocketAddr,
        transport: Transport,
        query: Arc<Query>,
        message: Arc<[u8]>,
    ) -> BoxFuture<'static, io::Result<Vec<u8>>> {
        let (sockets, descriptor) = (self.sockets.clone(), self.limits.hold_outbound());
        async move {
            let _descriptor = descriptor;
            let exchange = async {
                match transport {
                    Transport::Udp => by_udp(&sockets, server, &query, &message).await,
                    Transport::Tcp => by_tcp(&sockets, server, &query, &message).await,
                }
            };
            tokio::select! {
                outcome = exchange => outcome,
                () = sockets.closed() => Err(io::ErrorKind::NotConnected.into()),
            }
        }
        .boxed()
    }
}

async fn by_udp(
    sockets: &Arc<PodSockets>,
    server: SocketAddr,
    query: &Query,
    message: &[u8],
) -> io::Result<Vec<u8>> {
    let socket = sockets.connect_datagram(server).await?;
    let (id, mut message) = (random_id(), message.to_vec());
    message::set_id(&mut message, id);
    socket.send(&message).await?;
    // A client may announce 64 KiB. The memory is not touched before the response arrives.
    let mut response: Vec<u8> = Vec::with_capacity(query.udp_limit().max(MIN_BUFFER));
    loop {
        socket.recv_buf(&mut response).await?;
        if query.is_answered_by(&response, id) {
            return Ok(response);
        }
        // A guess of another sender, or an answer that is not whole: the right one may follow.
        response.clear();
    }
}

async fn by_tcp(
    sockets: &Arc<PodSockets>,
    server: SocketAddr,
    query: &Query,
    message: &[u8],
) -> io::Result<Vec<u8>> {
    let mut stream = sockets.connect(server).await?;
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (id, mut framed) = (random_id(), length.to_be_bytes().to_vec());
    framed.extend(message);
    message::write_u16(&mut framed, 2, id);
    stream.write_all(&framed).await?;
    let mut response = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut response).await?;
    if query.is_answered_by(&response, id) {
        return Ok(response);
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the response belongs to another query"))
}

/// A number that an attacker cannot guess: the hash of an empty value, with a random key that
/// changes with each call.
fn random_id() -> u16 {
    let [low, high, ..] = RandomState::new().hash_one(()).to_le_bytes();
    u16::from_le_bytes([low, high])
}

#[cfg(test)]
mod tests;

//! Asks every server of resolv.conf(5) once, for a command.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::lookup::query;
use super::message::{Query, RecordType};
use super::resolv_file::ResolvFile;
use super::response::Transport;
use super::upstream::Exchange;

/// A name that servers answer without asking others (RFC 6761 section 6.3).
const NAME: &str = "localhost.";

/// The answers of the servers: every response is one, whatever its code.
pub(crate) async fn probe_servers(
    exchange: &dyn Exchange,
    file: &ResolvFile,
    deadline: Duration,
) -> Vec<(SocketAddr, io::Result<()>)> {
    let Some((query, message)) = message() else { return Vec::new() };
    let settings = file.current();
    let probes = settings.servers.iter().map(|server| {
        let asked = exchange.exchange(*server, Transport::Udp, query.clone(), message.clone());
        async move {
            let answered = timeout(deadline, asked).await;
            (*server, answered.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map(drop))
        }
    });
    join_all(probes).await
}

fn message() -> Option<(Arc<Query>, Arc<[u8]>)> {
    let message = query(NAME, RecordType::A)?;
    let query = Query::read(&message).ok()?;
    Some((Arc::new(query), message.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_of_probe_is_valid() {
        assert!(message().is_some());
    }
}

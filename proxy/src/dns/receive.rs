//! Receives the DNS queries of a pod: one task for each listener of its DNS proxy.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::sleep;
use underpass_hbone::catch_panic;
use underpass_interception::{BoundListener, Listener, ListenerTransport};

use super::serve::{serve_tcp, serve_udp};
use super::service::DnsService;
use crate::node::pod::Pod;

/// The pause after a panic, which concerns only one query.
const PANIC_PAUSE: Duration = Duration::from_millis(100);

/// A listener of a DNS proxy, registered with the runtime of its worker.
#[derive(Debug)]
pub(crate) enum DnsReceiver {
    Udp(Arc<UdpSocket>),
    Tcp(Listener),
}

impl DnsReceiver {
    pub(crate) fn register(listener: BoundListener) -> io::Result<Self> {
        match listener.transport() {
            ListenerTransport::Datagram => {
                listener.register_datagram().map(Arc::new).map(Self::Udp)
            }
            ListenerTransport::Stream => listener.register().map(Self::Tcp),
        }
    }
}

/// Receives queries until the pod or the process drains, then closes the listener. Pauses while
/// another process takes over. Cancel-safe.
pub(crate) async fn receive_queries(
    pod: Arc<Pod>,
    service: Arc<DnsService>,
    receiver: DnsReceiver,
) {
    let serve = async || match &receiver {
        DnsReceiver::Udp(socket) => serve_udp(&service, &pod, socket).await,
        DnsReceiver::Tcp(listener) => serve_tcp(&service, &pod, listener).await,
    };
    let receiving = async {
        loop {
            if let Some(Err(panic)) = pod.accepting.pass(catch_panic(serve())).await {
                tracing::error!(task = "DNS queries", %panic, "a task panicked");
                sleep(PANIC_PAUSE).await;
            }
        }
    };
    tokio::select! {
        () = pod.closing.cancelled() => {}
        () = receiving => {}
    }
}

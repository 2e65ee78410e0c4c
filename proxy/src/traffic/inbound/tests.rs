//! Tests of inbound connections that wait for lookups on demand.

use std::net::IpAddr;

use tokio::net::TcpListener;
use tokio::sync::watch;
use underpass_config::{ControlPlane, LocalWorkloads, Node};

use super::*;
use crate::decide::snapshot::Snapshot;
use crate::limits::AdmissionKind;
use crate::node::testing::{node_on_demand, pod_of, settings};
use crate::node::worker::Worker;

const LOOPBACK: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

/// A seat on a node whose control plane answers nothing.
fn seat() -> (Arc<Seat>, watch::Sender<Arc<Snapshot>>) {
    let mut plane = ControlPlane::new(Node::default(), LocalWorkloads::default(), true);
    let mesh = Snapshot::new(Arc::new(plane.snapshot()), &settings(&[]).workload, 1);
    let (sender, receiver) = watch::channel(Arc::new(mesh));
    let worker = Worker::new(node_on_demand(receiver), 0, Arc::default());
    (worker.seat(&pod_of(&worker.node, &[])), sender)
}

#[tokio::test(start_paused = true)]
async fn refused_stream_takes_no_lookups() {
    let (seat, _mesh) = seat();
    let (here, start) = (SocketAddr::from((LOOPBACK, 80)), Instant::now());
    let refused = Err(ProxyError::TooManyConnections(Refusal::Descriptors));
    let error = admitted_mesh(&seat, refused, here, &Target::Address(here)).await.map(drop);
    assert!(matches!(error, Err(ProxyError::TooManyConnections(_))), "{error:?}");
    assert_eq!(start.elapsed().as_secs(), 0);
    let asked = timeout_at(start, seat.node().lookups.asked()).await;
    assert!(asked.is_err(), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn reset_ends_the_wait_of_a_plaintext_connection() {
    let (seat, _mesh) = seat();
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (stream, address) = listener.accept().await.unwrap();
    let stream = stream.into_std().unwrap();
    let assignment = Assignment {
        pod: seat.pod.clone(),
        accepted: Accepted::testing(Kind::Plaintext, stream, address),
        registration: seat.register_stream(),
        ticket: seat.pod.limits.admit(AdmissionKind::Plaintext, LOOPBACK, None).unwrap(),
    };
    let start = Instant::now();
    let waiting = tokio::spawn(open_plaintext(seat.clone(), assignment));
    assert_ne!(seat.node().lookups.asked().await, []);
    reset_on_close(&client);
    drop(client);
    assert!(waiting.await.unwrap().is_none());
    assert!(start.elapsed() < seat.node().timeouts.connect, "{:?}", start.elapsed());
}

/// The allocator keeps the memory of these futures near that of the open connections.
#[test]
fn opening_a_connection_needs_at_most_3_kib() {
    fn plaintext<A, B, F: Future>(_: impl Fn(A, B) -> F) -> usize {
        size_of::<F>()
    }
    fn request<A, B, C, D, F: Future>(_: impl Fn(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }
    let sizes = [plaintext(open_plaintext), request(open_request)];
    assert!(sizes.iter().all(|size| *size <= 3072), "{sizes:?} bytes");
}

//! A test of an outbound connection to a hostname, with lookups on demand.

use tokio::net::TcpListener;
use tokio::sync::watch;
use underpass_config::{ControlPlane, DeltaResponse, IpFamilies, ResourceType};

use super::*;
use crate::node::testing::{node_on_demand, pod_of, settings};
use crate::node::worker::Worker;
use crate::traffic::listeners::Kind;

#[tokio::test]
async fn connection_keeps_the_lookup_of_its_resolved_address() {
    let mut plane = ControlPlane::new(Default::default(), Default::default(), true);
    let snapshot = Arc::new(Snapshot::new(Arc::new(plane.snapshot()), &settings(&[]).workload, 1));
    let (sender, receiver) = watch::channel(snapshot.clone());
    let worker = Worker::new(node_on_demand(receiver), 0, Arc::default());
    let seat = worker.seat(&pod_of(&worker.node, &[]));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (stream, address) = listener.accept().await.unwrap();
    let accepted = Accepted::testing(Kind::Outbound, stream.into_std().unwrap(), address);
    let connect = OutboundConnect {
        seat: &seat,
        registration: &seat.register_stream(),
        snapshot: &snapshot,
        connection: &accepted.register().unwrap(),
        source: Source::Own(address.ip()),
        identity: None,
        known: Facts::new(Direction::Outbound, Party::default(), Party::default()),
    };
    let to = NextHop::Hostname {
        hostname: "localhost".into(),
        port: 80,
        families: IpFamilies::V4,
        prefer_v6: false,
    };
    let via = ForwardVia::Plain { to };
    let route = Route { via, workload: None, service: None, endpoint: None, gateway: None };
    let (resolved, ()) = tokio::join!(connect.resolve(&route), async {
        let asked = seat.node().lookups.asked().await;
        plane.look_up(&asked);
        let response = DeltaResponse {
            type_url: ResourceType::Address.url().to_owned(),
            removed_resources: asked.iter().map(|lookup| lookup.as_str().to_owned()).collect(),
            ..DeltaResponse::default()
        };
        assert_eq!(plane.receive(response).unwrap().rejected, []);
        let mesh = Snapshot::new(Arc::new(plane.snapshot()), &settings(&[]).workload, 2);
        sender.send_replace(Arc::new(mesh));
    });
    let (_, lease) = resolved.unwrap();
    // The first check clears the use by the request itself.
    for _ in 0..3 {
        assert_eq!(seat.node().lookups.take_unused(1), []);
    }
    drop((lease, client));
    assert_eq!(seat.node().lookups.take_unused(1).len(), 1);
}

/// The allocator keeps the memory of this future near that of the open connections: a future that
/// is stored twice made an idle connection a third larger.
#[test]
fn opening_a_connection_needs_at_most_4_kib() {
    fn size<A, B, F: Future>(_: impl Fn(A, B) -> F) -> usize {
        size_of::<F>()
    }
    assert!(size(open) <= 4096, "{} bytes", size(open));
}

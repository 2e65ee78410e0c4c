//! Tests of a seat: its lifetime, its workload, and the waits of its connections.

use std::net::Ipv4Addr;
use std::sync::Weak;

use underpass_config::{
    ControlPlane, DeltaResponse, FileWatcher, Mesh, Resource, ResourceType, SpiffeId, TrustSettings,
};
use underpass_hbone::{CredentialsEvent, HboneError, IdentitySource, NextIdentity};

use super::*;
use crate::node::identities::{Identities, Issuer};
use crate::node::testing::{
    named_workload_resource, node, node_in, node_on_demand, pod, pod_of, settings, snapshot,
};
use crate::process::supervise::Supervisor;

#[tokio::test(start_paused = true)]
async fn seat_outlives_its_connections_while_pool_remembers_failure() {
    let (pod, worker) = (pod(&[]), Worker::new(node(1), 0, Arc::default()));
    let seat = worker.seat(&pod);
    let first = Arc::downgrade(&seat);
    seat.keep_after_failure();
    drop(seat);
    tokio::time::sleep(FAILURE_REMEMBERED / 2).await;
    let seat = worker.seat(&pod);
    assert!(
        Weak::ptr_eq(&first, &Arc::downgrade(&seat)),
        "the seat that remembers the failure is used again"
    );
    seat.keep_after_failure();
    drop(seat);
    tokio::time::sleep(FAILURE_REMEMBERED).await;
    assert!(first.upgrade().is_some(), "the second failure is remembered for the full time");
    tokio::time::sleep(FAILURE_REMEMBERED * 2).await;
    assert!(first.upgrade().is_none());
}

#[tokio::test]
async fn pod_at_neighbours_address_keeps_its_identity() {
    let text = "workloads:
- {name: server, workloadIps: [10.0.0.1]}
- {name: neighbour, workloadIps: [10.0.0.2]}
";
    let mesh = Arc::new(Mesh::from_text("mesh", text).unwrap());
    let snapshot = Snapshot::new(mesh, &settings(&[]).workload, 1);
    let worker = Worker::new(node(1), 0, Arc::default());
    let neighbour = [10, 0, 0, 2].into();
    let caller = |name: &str, source| {
        let seat = worker.seat(&pod(&[&format!("workload.name={name}")]));
        seat.caller(&snapshot, source).map(|workload| workload.name.to_string())
    };
    for source in [Source::Own(neighbour), Source::Other] {
        assert_eq!(caller("server", source).as_deref(), Some("server"), "{source:?}");
    }
    // The mesh has no workload named `unnamed`: the address decides.
    assert_eq!(caller("unnamed", Source::Own(neighbour)).as_deref(), Some("neighbour"));
    assert_eq!(caller("unnamed", Source::Other), None);
}

#[tokio::test(start_paused = true)]
async fn connections_of_new_pod_wait_until_mesh_has_it() {
    let (mesh, receiver) = watch::channel(snapshot(1, "workloads: []"));
    let worker = Worker::new(node_in(1, receiver), 0, Arc::default());
    let mut pod = Arc::into_inner(pod(&[])).unwrap();
    pod.context.must_be_in_mesh = true;
    let seat = worker.seat(&Arc::new(pod));
    let permitted = || {
        let [client, here] = [1, 2].map(|host| (Ipv4Addr::new(10, 0, 0, host), 80).into());
        let registration = seat.register_stream();
        seat.permit(Subject::inbound(client, here, None), &registration).map(drop)
    };
    let start = Instant::now();
    let [client, here] = [1, 2].map(|host| (Ipv4Addr::new(10, 0, 0, host), 80).into());
    let error = seat.outbound_mesh(here, client).await.map(drop).unwrap_err();
    assert!(matches!(error, ProxyError::PodNotInMesh { .. }), "{error}");
    assert_eq!(start.elapsed(), seat.node().timeouts.connect);
    assert!(matches!(permitted(), Err(ProxyError::PodNotInMesh { .. })));

    let other = "workloads: [{name: server, serviceAccount: other, workloadIps: [10.0.0.2]}]";
    mesh.send_replace(snapshot(2, other));
    assert!(matches!(permitted(), Err(ProxyError::PodNotInMesh { .. })), "another identity");

    let (known, ()) = tokio::join!(seat.outbound_mesh(here, client), async {
        let server = "workloads: [{name: server, workloadIps: [10.0.0.2]}]";
        mesh.send_replace(snapshot(3, server));
    });
    assert_eq!(known.unwrap().0.generation, 3);
    permitted().unwrap();
}

/// The mesh of a control plane, with the workloads of a file.
fn control_plane_mesh(plane: &mut ControlPlane, generation: u64, file: &str) -> Arc<Snapshot> {
    let file = Mesh::from_text("mesh", file).unwrap();
    let mesh = Arc::new(plane.snapshot().with_fallback(Some(Arc::new(file))));
    Arc::new(Snapshot::new(mesh, &settings(&[]).workload, generation))
}

/// The control plane may have policies that select the pod. A workload of the mesh file does not
/// end the wait.
#[tokio::test(start_paused = true)]
async fn inbound_connections_wait_until_control_plane_has_pod() {
    let file = "workloads: [{name: server, workloadIps: [10.0.0.2]}]";
    let mut plane = ControlPlane::new(Default::default(), Default::default(), false);
    let (mesh, receiver) = watch::channel(control_plane_mesh(&mut plane, 1, file));
    let worker = Worker::new(node_in(1, receiver), 0, Arc::default());
    let seat = worker.seat(&pod(&["workload.name=server"]));
    let (client, here) = (([10, 0, 0, 1], 80).into(), ([10, 0, 0, 2], 80).into());
    let permitted = || {
        let registration = seat.register_stream();
        seat.permit(Subject::inbound(client, here, None), &registration).map(drop)
    };
    assert_eq!(seat.outbound_mesh(here, client).await.unwrap().0.generation, 1);
    let error = seat.inbound_mesh(here, None).await.map(drop).unwrap_err();
    assert!(matches!(error, ProxyError::WorkloadNotSent { .. }), "{error}");
    assert_eq!(error.reason().code, "pod_not_in_mesh");
    let error = permitted().unwrap_err();
    assert!(matches!(error, ProxyError::DeniedInPlain(_)), "{error}");

    let (waited, ()) = tokio::join!(seat.inbound_mesh(here, None), async {
        let response = DeltaResponse {
            type_url: ResourceType::Address.url().to_owned(),
            resources: vec![named_workload_resource("default", "server", 2).into()],
            ..DeltaResponse::default()
        };
        assert_eq!(plane.receive(response).unwrap().rejected, []);
        mesh.send_replace(control_plane_mesh(&mut plane, 2, file));
    });
    assert_eq!(waited.unwrap().0.generation, 2);
    permitted().unwrap();
}

/// An answer after a while, without the pod, does not begin a second wait.
#[tokio::test(start_paused = true)]
async fn inbound_connection_waits_once_for_lookups_and_pod() {
    let mut plane = ControlPlane::new(Default::default(), Default::default(), true);
    let (mesh, receiver) = watch::channel(control_plane_mesh(&mut plane, 1, "workloads: []"));
    let worker = Worker::new(node_on_demand(receiver), 0, Arc::default());
    let seat = worker.seat(&pod_of(&worker.node, &["workload.name=server"]));
    let (start, connect) = (Instant::now(), seat.node().timeouts.connect);
    let here = ([10, 0, 0, 2], 80).into();
    let (error, ()) = tokio::join!(seat.inbound_mesh(here, None), async {
        let asked = seat.node().lookups.asked().await;
        plane.look_up(&asked);
        let response = DeltaResponse {
            type_url: ResourceType::Address.url().to_owned(),
            removed_resources: vec!["/10.0.0.2".to_owned()],
            ..DeltaResponse::default()
        };
        assert_eq!(plane.receive(response).unwrap().rejected, []);
        mesh.send_replace(control_plane_mesh(&mut plane, 2, "workloads: []"));
        // The answer expires just before the end of the wait.
        tokio::time::sleep(connect * 9 / 10).await;
        plane.let_go(&asked);
        mesh.send_replace(control_plane_mesh(&mut plane, 3, "workloads: []"));
    });
    let error = error.map(drop).unwrap_err();
    assert!(matches!(error, ProxyError::Lookup(_)), "{error}");
    assert_eq!(start.elapsed(), connect);
}

/// A wrong `workload.network` makes every address absent. The lookup by name finds the pod.
#[tokio::test(start_paused = true)]
async fn pod_in_other_network_of_control_plane_is_refused() {
    let mut plane = ControlPlane::new(Default::default(), Default::default(), true);
    let (mesh, receiver) = watch::channel(control_plane_mesh(&mut plane, 1, "workloads: []"));
    let worker = Worker::new(node_on_demand(receiver), 0, Arc::default());
    let settings = [
        "workload.name=server",
        "workload.network=wrong",
        "mesh.xds.address=https://istiod:15012",
        "mesh.xds.roots=r.pem",
        "mesh.xds.on_demand=true",
    ];
    let seat = worker.seat(&pod_of(&worker.node, &settings));
    let (client, here) = (([10, 0, 0, 1], 80).into(), ([10, 0, 0, 2], 80).into());
    let (known, ()) = tokio::join!(seat.outbound_mesh(here, client), async {
        let mut asked = seat.node().lookups.asked().await;
        asked.sort();
        let names: Vec<_> = asked.iter().map(ToString::to_string).collect();
        let own = "Kubernetes//Pod/default/server";
        assert_eq!(names, [own, "wrong/10.0.0.1", "wrong/10.0.0.2"]);
        plane.look_up(&asked);
        let found = named_workload_resource("default", "server", 2);
        let found = Resource { aliases: vec![own.to_owned()], ..found };
        let response = DeltaResponse {
            type_url: ResourceType::Address.url().to_owned(),
            resources: vec![found.into()],
            removed_resources: vec!["wrong/10.0.0.1".to_owned(), "wrong/10.0.0.2".to_owned()],
            ..DeltaResponse::default()
        };
        assert_eq!(plane.receive(response).unwrap().rejected, []);
        mesh.send_replace(control_plane_mesh(&mut plane, 2, "workloads: []"));
    });
    assert_eq!(known.unwrap().0.generation, 2);
    let registration = seat.register_stream();
    let subject = Subject::inbound(client, here, None);
    let error = seat.permit(subject, &registration).map(drop).unwrap_err();
    assert!(matches!(error, ProxyError::OtherNetwork { .. }), "{error}");
    assert_eq!(error.reason().code, "pod_not_in_mesh");
    assert!(seat.context().lookup_of_own(&seat.node().mesh.borrow()).is_none(), "asked again");
}

/// An issuer that never issues a certificate.
#[derive(Debug)]
struct SilentIssuer;

impl IdentitySource for SilentIssuer {
    fn next(&mut self) -> NextIdentity<'_> {
        Box::pin(std::future::pending())
    }
}

impl Issuer for SilentIssuer {
    fn source(&self, _: &SpiffeId) -> Box<dyn IdentitySource> {
        Box::new(Self)
    }

    fn report(&self, _: &SpiffeId, _: &CredentialsEvent<'_>) {}

    fn ended(&self, _: &SpiffeId) {}

    fn report_trust_failure(&self, _: &HboneError) {}
}

#[tokio::test(start_paused = true)]
async fn wait_for_first_certificate_times_out() {
    let (trust, supervisor) = (TrustSettings::default(), Supervisor::new().0);
    let identities =
        Identities::new(Arc::new(SilentIssuer), &trust, &FileWatcher::default(), supervisor)
            .unwrap();
    let worker = Worker::new(node(1), 0, Arc::default());
    let mut pod = Arc::into_inner(pod(&[])).unwrap();
    let id = pod.context.own.spiffe_id.clone();
    pod.credentials = Some(identities.lease_awaited(&id));
    let seat = worker.seat(&Arc::new(pod));
    let (start, peer) = (Instant::now(), (Ipv4Addr::LOCALHOST, 15008).into());
    let error = seat.tunnel_endpoints(peer).await.unwrap_err();
    assert!(matches!(error, ProxyError::CertificateAwaited { id: of, .. } if of == id));
    assert_eq!(start.elapsed(), seat.node().timeouts.handshake);
    assert!(!seat.has_tunnel_endpoints());
}

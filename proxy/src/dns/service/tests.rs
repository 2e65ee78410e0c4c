//! Tests of the service with scripted servers and paused time.

use std::net::SocketAddr;

use underpass_config::testing::Folder;
use underpass_config::{
    ControlPlane, DeltaResponse, LocalWorkloads, Mesh, Node, PodSourceSettings, ResourceType,
};

use super::*;
use crate::dns::failed_names::FailedNames;
use crate::dns::message::Layout;
use crate::dns::message::testing::{edns, query};
use crate::dns::resolv_file::ResolvFile;
use crate::dns::upstream::tests::{Script, ScriptedExchange, Servers};
use crate::node::testing::{settings, snapshot};

const MESH: &str = "
services:
- {hostname: web.default.svc.cluster.local, vips: [/10.1.0.1]}
- {hostname: api.example, vips: [/10.1.0.2]}
";
pub(in crate::dns) const FAST: Duration = Duration::from_millis(10);
pub(in crate::dns) const ANSWERS: Script = Script::Answers(ResponseCode::NO_ERROR, FAST);

pub(in crate::dns) struct Scene {
    pub(in crate::dns) service: Arc<DnsService>,
    pub(in crate::dns) servers: Arc<Servers>,
    failed_names: Arc<FailedNames>,
    _mesh: watch::Sender<Arc<Snapshot>>,
    _folder: Folder,
}

impl Scene {
    pub(in crate::dns) fn new(script: Script) -> Self {
        Self::with(script, None, "nameserver 10.0.0.1")
    }

    pub(in crate::dns) fn with(script: Script, per_second: Option<u32>, resolv_conf: &str) -> Self {
        let (folder, servers) = (Folder::of_test(), Arc::new(Servers::default()));
        folder.write("resolv.conf", resolv_conf);
        let file = Arc::new(ResolvFile::new(&folder.path("resolv.conf")));
        let mut settings = settings(&[]);
        settings.node.pods = Some(PodSourceSettings::Directory("/pods".into()));
        let resolver = ResolverSettings::new(file, &settings);
        let [namespace, network] = ["default", ""].map(str::to_owned);
        let domain = "cluster.local".to_owned();
        let view = PodView { namespace, network, domain, ipv6: true };
        let mesh = watch::Sender::new(snapshot(1, MESH));
        let upstream = Upstream::new(Arc::new(ScriptedExchange(servers.clone())));
        let failed_names = Arc::<FailedNames>::default();
        let failures = FailureLog::new(&settings.workload, failed_names.clone());
        let forwarder = Forwarder::new(upstream, failures, per_second);
        let lookups = (Lookups::default(), LookupLimit::new(None));
        let service = DnsService::new(view, mesh.subscribe(), lookups, resolver, forwarder);
        let scene = Self { service, servers, failed_names, _mesh: mesh, _folder: folder };
        scene.script(script);
        scene
    }

    /// With lookups on demand, of which a control plane answers none.
    fn on_demand(per_second: Option<u32>) -> (Self, ControlPlane, Lookups) {
        let mut scene = Self::new(ANSWERS);
        let mut plane = ControlPlane::new(Node::default(), LocalWorkloads::default(), true);
        scene._mesh.send_replace(on_demand(plane.snapshot()));
        let lookups = Lookups::on_demand();
        let service = Arc::get_mut(&mut scene.service).unwrap();
        service.lookups = lookups.clone();
        service.lookup_limit = LookupLimit::new(per_second);
        (scene, plane, lookups)
    }

    pub(in crate::dns) fn script(&self, script: Script) {
        let server = SocketAddr::from(([10, 0, 0, 1], 53));
        self.servers.scripts.lock().unwrap().insert(server, script);
    }

    pub(in crate::dns) fn forwarder(&self) -> &Forwarder {
        &self.service.forwarder
    }

    pub(in crate::dns) async fn send(&self, message: &[u8]) -> Vec<u8> {
        match self.service.serve(message, Transport::Udp) {
            Reply::Nothing => Vec::new(),
            Reply::Now(response) => response,
            Reply::Later(response) => response.await,
        }
    }

    /// The code, the number of answers and the first TTL of the response to a query, and the number
    /// of queries that servers have received.
    pub(in crate::dns) async fn ask(
        &self,
        name: &str,
        kind: u16,
    ) -> (&'static str, usize, u32, usize) {
        let message = self.send(&query(name, RecordType(kind), &[])).await;
        assert_eq!(&message[..2], [0, 7], "the id of the query");
        let layout = Layout::read(&message).unwrap();
        let ttl = layout.answers.first().map_or(0, |answer| answer.ttl);
        (message::code(&message).as_str(), layout.answers.len(), ttl, self.servers.asked())
    }
}

pub(in crate::dns) const A: u16 = 1;

/// The snapshot of a mesh with lookups on demand.
fn on_demand(mesh: Mesh) -> Arc<Snapshot> {
    Arc::new(Snapshot::new(Arc::new(mesh), &settings(&[]).workload, 2))
}

#[tokio::test(start_paused = true)]
async fn names_of_mesh_need_no_server() {
    let scene = Scene::new(Script::Drops);
    for name in ["web", "web.default", "web.default.svc.cluster.local", "api.example"] {
        assert_eq!(scene.ask(name, A).await, ("NOERROR", 1, 30, 0), "{name}");
    }
    assert_eq!(scene.ask("api.example", 28).await, ("NOERROR", 0, 0, 0), "no IPv6 address");
    let alias = scene.ask("api.example.default.svc.cluster.local", A).await;
    assert_eq!(alias, ("NOERROR", 2, 30, 0), "a CNAME for the search path");
}

/// The control plane is asked for the name first. Without an answer the query fails. If it has no
/// such name, the servers are asked.
#[tokio::test(start_paused = true)]
async fn name_is_looked_up_on_demand_before_it_is_forwarded() {
    let (scene, mut plane, lookups) = Scene::on_demand(None);
    let start = Instant::now();
    assert_eq!(scene.ask("a.b.example", A).await, ("SERVFAIL", 0, 0, 0));
    assert!(start.elapsed() >= LOOKUP_WAIT);
    // The control plane has no such name.
    let names = ["c.d.example", "c.d.example.svc.cluster.local", "*.d.example", "*.example"];
    let names = names.map(|name| format!("default/{name}"));
    let asked = async {
        let asked = lookups.asked().await;
        let subscribed = plane.look_up(&asked);
        let absent = DeltaResponse {
            type_url: ResourceType::Address.url().to_owned(),
            removed_resources: asked.iter().map(ToString::to_string).collect(),
            ..DeltaResponse::default()
        };
        plane.receive(absent).unwrap();
        scene._mesh.send_replace(on_demand(plane.snapshot()));
        subscribed[0].resource_names_subscribe.clone()
    };
    let (answer, asked) = tokio::join!(scene.ask("c.d.example", A), asked);
    assert_eq!(answer, ("NOERROR", 1, 60, 1));
    assert!(names.iter().all(|name| asked.contains(name)), "{asked:?}");
}

/// A pod asks for many random names at once. Queries beyond the limit fail without a lookup, and
/// never reach the servers: the names may be those of the mesh.
#[tokio::test(start_paused = true)]
async fn lookups_of_random_names_are_limited() {
    let (scene, _plane, lookups) = Scene::on_demand(Some(100));
    let names: Vec<_> = (0..200).map(|n| format!("n{n}.example")).collect();
    let asked = names.iter().map(|name| scene.ask(name, A));
    let answers = futures_util::future::join_all(asked).await;
    assert!(answers.iter().all(|answer| *answer == ("SERVFAIL", 0, 0, 0)));
    let asked = lookups.asked().await;
    let random = asked.iter().filter(|lookup| !lookup.as_str().contains('*')).count();
    assert!(random > 50 && asked.len() < 150, "{random} of {}", asked.len());
    let reasons = scene.failed_names.since(Instant::now(), Duration::from_secs(60));
    let reasons: Vec<_> = reasons.iter().map(|failed| failed.reason).collect();
    assert!(reasons.contains(&"lookup_rate"), "{reasons:?}");
}

#[tokio::test(start_paused = true)]
async fn unknown_edns_version_is_refused_for_every_name() {
    let scene = Scene::new(ANSWERS);
    let mut opt = edns(1232, false, &[]);
    opt[6] = 1;
    for name in ["web", "other.example"] {
        let response = scene.send(&query(name, RecordType::A, &[&opt])).await;
        let layout = Layout::read(&response).unwrap();
        assert_eq!(layout.additionals[0].ttl >> 24, 1, "BADVERS");
    }
    assert_eq!(scene.servers.asked(), 0);
}

#[tokio::test(start_paused = true)]
async fn malformed_messages_get_an_error_or_nothing() {
    let scene = Scene::new(Script::Drops);
    let mut message = query("web", RecordType::A, &[]);
    message.truncate(15);
    assert_eq!(message::code(&scene.send(&message).await), ResponseCode::FORMAT_ERROR);
    message[2] = 0x80;
    assert!(scene.send(&message).await.is_empty(), "a response is not answered");
    assert!(scene.send(b"short").await.is_empty());
}

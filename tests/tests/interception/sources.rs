//! Tests of outbound connections from addresses of the pod or of a neighbour.

use std::net::{IpAddr, SocketAddr};

use underpass_tests::{
    APP, CLIENT, Dial, End, Family, Mesh, Pod, Proxy, Scene, Settings, Suite, exchange,
    read_to_end, tool,
};

use crate::PROFILES;

/// The workload whose address the client uses.
const NEIGHBOUR: &str = "neighbour";

pub(crate) fn add_tests(suite: &mut Suite) {
    for family in Family::BOTH {
        for profile in PROFILES {
            let name =
                format!("an outbound connection from a neighbour's address is refused ({family})");
            profile.test(suite, &name, async move || {
                let scene = NeighbourScene::new(family).await;
                scene.refuses_neighbour(|settings| profile.of(settings)).await;
            });
        }
        suite.test(
            &format!(
                "a pod that adds a neighbour's address is not logged as the neighbour ({family})"
            ),
            async move || NeighbourScene::new(family).await.logs_own_workload().await,
        );
        suite.test(
            &format!("with a virtual interface, other hosts send through the pod ({family})"),
            async move || NeighbourScene::new(family).await.serves_virtual_machine().await,
        );
    }
}

/// The scene with a third workload, whose address the client uses as its source.
struct NeighbourScene {
    scene: Scene,
    family: Family,
    neighbour: IpAddr,
}

impl NeighbourScene {
    async fn new(family: Family) -> Self {
        let scene = Scene::new().await;
        let neighbour: IpAddr = match family {
            Family::V4 => [10, 99, 0, 7].into(),
            Family::V6 => [0xfd99, 0, 0, 0, 0, 0, 0, 7].into(),
        };
        let mesh = Mesh::default().hbone(&scene.client).tcp(&scene.server);
        scene.set_mesh(&mesh.workload(NEIGHBOUR, &[neighbour], "HBONE"));
        Self { scene, family, neighbour }
    }

    /// Routes replies to the proxy's listener inside the pod, as for a virtual machine.
    async fn keep_replies_local(&self) {
        let pod = &self.scene.client;
        self.ip(pod, "rule add ipproto tcp sport 15001 lookup 999").await;
        self.ip(pod, "route add local default dev lo table 999").await;
    }

    async fn ip(&self, pod: &Pod, arguments: &str) {
        let family = if self.family == Family::V4 { "-4" } else { "-6" };
        let arguments: Vec<_> = [family].into_iter().chain(arguments.split(' ')).collect();
        tool(pod, "ip", &arguments).await.ok();
    }

    fn neighbour_dial(&self) -> Dial {
        Dial { source: Some(SocketAddr::new(self.neighbour, 0)), ..Dial::default() }
    }

    async fn refuses_neighbour(&self, settings: impl Fn(Settings) -> Settings) {
        let scene = &self.scene;
        let mut proxy = scene.client.proxy(&settings(scene.client_settings())).await;
        self.keep_replies_local().await;
        let app = scene.server.listen(APP);
        match scene.client.dial_as(scene.app(self.family), self.neighbour_dial()).await {
            Ok(mut stream) => assert_eq!(read_to_end(&mut stream).await, (vec![], End::Reset)),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
        let line = proxy.line(&["connection failed", "reason=\"foreign_source\""]).await;
        assert!(line.contains(&self.neighbour.to_string()), "{line}");
        assert!(line.contains(&format!("src.workload=\"{CLIENT}\"")), "{line}");
        let metrics = scene.client.metrics().await;
        assert_eq!(metrics.sum("underpass_outbound_foreign_source_total", &[]), Some(1.0));
        assert!(!app.is_reached(), "the application was reached");
    }

    async fn logs_own_workload(&self) {
        let address = self.neighbour.to_string();
        self.ip(&self.scene.client, &format!("address add {address} dev lo")).await;
        let mut proxy = self.scene.client.proxy(&self.scene.client_settings()).await;
        self.is_served_as_client(&mut proxy).await;
    }

    async fn serves_virtual_machine(&self) {
        let settings =
            self.scene.client_settings().section("interception: {virtual_interfaces: [vm0]}");
        let mut proxy = self.scene.client.proxy(&settings).await;
        self.keep_replies_local().await;
        self.is_served_as_client(&mut proxy).await;
    }

    async fn is_served_as_client(&self, proxy: &mut Proxy) {
        let app = self.scene.server.listen(APP);
        let dialled = self.scene.client.dial_as(self.scene.app(self.family), self.neighbour_dial());
        let (client, (mut server, _)) = tokio::join!(dialled, app.accept());
        let mut client = client.expect("a connection");
        exchange(&mut client, &mut server).await;
        drop((client, server));
        let line = proxy.line(&["direction=\"outbound\"", &self.neighbour.to_string()]).await;
        assert!(line.contains(&format!("src.workload=\"{CLIENT}\"")), "{line}");
        assert!(!line.contains(NEIGHBOUR), "{line}");
    }
}

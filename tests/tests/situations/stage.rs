//! The place of a situation: two pods, the proxy that the tools ask, and everything that must live
//! as long.

use std::any::Any;
use std::fs;
use std::path::PathBuf;

use underpass::spawn::SpawnError;
use underpass_tests::{Family, OutputLines, Pod, Proxy, Scene, Settings, binary};

/// A situation that was made.
pub(crate) struct Broken {
    pub(crate) running: Running,
    at: Side,
    /// The settings for the doctor; `None` if it uses those of the running proxy.
    pub(crate) settings: Option<Settings>,
    /// The program of the tools, if it is another one than the binary under test.
    pub(crate) program: Option<PathBuf>,
    _kept: Vec<Box<dyn Any>>,
    scene: Scene,
}

/// The pod whose tools are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

/// The proxy in the pod.
pub(crate) enum Running {
    Ready(Box<Proxy>),
    /// It waits for something at its start. These are its log lines.
    Waiting(Box<OutputLines>),
    /// It has failed to start, or was killed, with this log.
    Ended(String),
}

impl Broken {
    /// A situation in the client's pod, whose proxy is ready.
    pub(crate) fn client(scene: Scene, proxy: Proxy) -> Self {
        Self::new(scene, Side::Client, Running::Ready(Box::new(proxy)))
    }

    /// A situation in the server's pod, whose proxy is ready.
    pub(crate) fn server(scene: Scene, proxy: Proxy) -> Self {
        Self::new(scene, Side::Server, Running::Ready(Box::new(proxy)))
    }

    pub(crate) fn new(scene: Scene, at: Side, running: Running) -> Self {
        Self { running, at, settings: None, program: None, _kept: Vec::new(), scene }
    }

    /// The client's proxy does not become ready: it waits.
    pub(crate) fn waiting(scene: Scene, settings: Settings) -> Self {
        let arguments = settings.arguments(&scene.client);
        let mut all = vec!["run"];
        all.extend(arguments.iter().map(String::as_str));
        let lines = scene.client.background(binary(), &all).lines();
        Self::new(scene, Side::Client, Running::Waiting(Box::new(lines))).doctor_with(settings)
    }

    /// The client's proxy does not start.
    pub(crate) async fn not_started(scene: Scene, settings: Settings) -> Self {
        let started = scene.client.try_proxy(&settings).await;
        Self::failed(scene, started, settings)
    }

    /// The client's proxy has not started.
    pub(crate) fn failed(
        scene: Scene,
        started: Result<Proxy, SpawnError>,
        settings: Settings,
    ) -> Self {
        let log = match started {
            Err(SpawnError::Ended { log, .. }) => log,
            other => panic!("the proxy did not exit: {other:?}"),
        };
        Self::new(scene, Side::Client, Running::Ended(log)).doctor_with(settings)
    }

    /// Keeps `value` until all tools were asked.
    pub(crate) fn keep(mut self, value: impl Any) -> Self {
        self._kept.push(Box::new(value));
        self
    }

    /// Gives the doctor these settings.
    pub(crate) fn doctor_with(self, settings: Settings) -> Self {
        Self { settings: Some(settings), ..self }
    }

    /// The pod whose tools are asked.
    pub(crate) fn pod(&self) -> &Pod {
        match self.at {
            Side::Client => &self.scene.client,
            Side::Server => &self.scene.server,
        }
    }
}

/// Settings without DNS servers, because a pod reaches none, and with short timeouts.
pub(crate) fn quick(pod: &Pod, settings: Settings) -> Settings {
    let file = pod.folder().join("no-servers.conf");
    fs::write(&file, "options timeout:1\n").expect("written");
    let resolv_conf = format!("dns.resolv_conf={}", file.display());
    settings.set(&resolv_conf).set("timeouts.connect=400ms").set("timeouts.handshake=400ms")
}

/// The settings of the client's proxy.
pub(crate) fn client_settings(scene: &Scene) -> Settings {
    quick(&scene.client, scene.client_settings())
}

/// The settings of the server's proxy.
pub(crate) fn server_settings(scene: &Scene) -> Settings {
    quick(&scene.server, scene.server_settings())
}

/// The scene with a proxy in the client's pod only.
pub(crate) async fn client_only() -> (Scene, Proxy) {
    let scene = Scene::new().await;
    let proxy = scene.client.proxy(&client_settings(&scene)).await;
    (scene, proxy)
}

/// The scene with a proxy in each pod: the client's and the server's.
pub(crate) async fn both() -> (Scene, Proxy, Proxy) {
    let scene = Scene::new().await;
    let (client, server) = (client_settings(&scene), server_settings(&scene));
    let (client, server) = tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    (scene, client, server)
}

/// Connects from the client to the server's application, which fails.
pub(crate) async fn connect(scene: &Scene) {
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
}

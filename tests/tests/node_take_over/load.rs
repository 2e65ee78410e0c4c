//! Hot restarts while connections are opened, and while a download runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinHandle;
use tokio::time::interval;
use underpass_tests::{APP, Family, Load, Server, within};

use crate::scene::{Mode, Scene, child, is_running};

/// The port from which clients download.
const DOWNLOAD: u16 = APP + 1;
const CHUNK: usize = 4096;

/// The chunk of a download at this index: its bytes depend on their offset.
fn chunk(index: usize) -> Vec<u8> {
    (0..CHUNK).map(|offset| u8::try_from((index * 31 + offset) % 251).expect("a byte")).collect()
}

/// A download from `b` to `a` that lasts until it is ended.
struct Download {
    end: Arc<AtomicBool>,
    server: Server,
    client: JoinHandle<usize>,
}

impl Download {
    async fn start(scene: &Scene) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let ends = end.clone();
        let server = Server::start(&scene.b, DOWNLOAD, move |mut stream, _| {
            let end = ends.clone();
            async move {
                let (mut index, mut pace) = (0, interval(Duration::from_millis(1)));
                while !end.load(Relaxed) {
                    stream.write_all(&chunk(index)).await?;
                    index += 1;
                    pace.tick().await;
                }
                stream.write_all(&index.to_be_bytes()).await?;
                stream.shutdown().await
            }
        });
        let to = scene.b.at(Family::V4, DOWNLOAD);
        let mut stream = scene.a.dial(to).await.expect("connected");
        let client = tokio::spawn(async move {
            let mut received = Vec::new();
            stream.read_to_end(&mut received).await.expect("not reset");
            let (chunks, count) = received.as_chunks::<CHUNK>();
            for (index, received) in chunks.iter().enumerate() {
                assert!(received.as_slice() == chunk(index), "chunk {index} differs");
            }
            let sent = usize::from_be_bytes(count.try_into().expect("the number of chunks"));
            assert_eq!(chunks.len(), sent, "every byte arrives");
            sent
        });
        Self { end, server, client }
    }

    async fn end(self) -> usize {
        self.end.store(true, Relaxed);
        let received = within("the download ends", self.client).await.expect("it is complete");
        drop(self.server);
        received
    }
}

/// Opens connections from `a` to the echo in `b` in a loop; every one must succeed.
pub(crate) fn start_load(scene: &Arc<Scene>, clients: usize) -> Load {
    let scene = scene.clone();
    Load::start(clients, move || {
        let scene = scene.clone();
        async move { scene.echoed().await }
    })
}

pub(crate) async fn under_load(mode: Mode) {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(mode).await;
    let scene = Arc::new(scene);
    let _echo = Server::echo(&scene.b, APP);
    let load = start_load(&scene, 4);
    let (mut drained, mut downloads) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        if downloads.is_empty() {
            downloads.push(Download::start(&scene).await);
        }
        load.serve_more(20).await;
        let proxy = child(daemon.pid());
        assert_eq!(proxy.is_some(), mode == Mode::Broker, "{}", daemon.log());
        let new = scene.start_successor(&mut daemon, mode).await;
        drained.push((std::mem::replace(&mut daemon, new), proxy));
        load.serve_more(20).await;
        scene.serves(&["a", "b"]).await;
        assert_eq!(daemon.count(&["cannot enrol the pod"]), 0, "{}", daemon.log());
    }
    load.end().await;
    for download in downloads {
        assert!(download.end().await > 0);
    }
    for (mut old, proxy) in drained {
        assert!(old.ended().await.success(), "{}", old.log());
        assert_eq!(old.count(&["rules removed"]), 0, "{}", old.log());
        assert!(!proxy.is_some_and(is_running), "the proxy process ends too");
    }
    scene.assert_rules().await;
    scene.echoed().await;
}

pub(crate) async fn changed_mode() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(Mode::Broker).await;
    let scene = Arc::new(scene);
    let _echo = Server::echo(&scene.b, APP);
    let load = start_load(&scene, 2);
    for mode in [Mode::OneProcess, Mode::Broker] {
        load.serve_more(10).await;
        let new = scene.start_successor(&mut daemon, mode).await;
        let mut old = std::mem::replace(&mut daemon, new);
        load.serve_more(10).await;
        scene.serves(&["a", "b"]).await;
        assert_eq!(child(daemon.pid()).is_some(), mode == Mode::Broker, "{}", daemon.log());
        assert!(old.ended().await.success(), "{}", old.log());
    }
    load.end().await;
}

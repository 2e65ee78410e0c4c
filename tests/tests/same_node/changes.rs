//! Tests that every change that terminates a stream of a tunnel also terminates a connection
//! without one.

use std::time::{Duration, SystemTime};

use tokio::net::TcpStream;
use underpass_tests::{APP, End, Family, Listener, Pki, Suite, exchange, read_to_end, until};

use crate::scene::{DRAIN, MODES, Scene, Served};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("a policy that forbids an open connection terminates it", policy);
    suite.test("revocation of either certificate terminates an open connection", revocation);
    suite.test("a rotation to another trust terminates an open connection", rotation);
    suite.test("an expired certificate refuses new connections and keeps open ones", expiry);
    suite.test("removing either pod terminates an open connection", removal);
    suite.test("a draining pod accepts no connection", draining);
}

/// The lifetime of the certificates of a trial.
const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(3);

async fn open(scene: &Scene, app: &Listener) -> (TcpStream, TcpStream) {
    let (mut client, mut server, _) = scene.a.meet(app, scene.b.at(Family::V4, APP)).await;
    exchange(&mut client, &mut server).await;
    (client, server)
}

async fn both_reset((mut client, mut server): (TcpStream, TcpStream)) {
    assert_eq!(read_to_end(&mut client).await.1, End::Reset);
    assert_eq!(read_to_end(&mut server).await.1, End::Reset);
}

fn assert_mode(served: &Served, mode: &str, before: u64) {
    assert_eq!(served.direct_connections() > before, mode == "direct");
}

async fn policy() {
    let scene = Scene::new().await;
    let app = scene.b.listen(APP);
    for mode in MODES {
        scene.set_mesh(&scene.mesh());
        let served = scene.valid_node(mode).await;
        let before = served.direct_connections();
        let ends = open(&scene, &app).await;
        assert_mode(&served, mode, before);
        let deny = "[[[{principals: [{exact: cluster.local/ns/default/sa/a}]}]]]";
        scene.set_mesh(&scene.mesh().policy("no-a", "Deny", deny));
        both_reset(ends).await;
        scene.a.dial_and_see_reset(scene.b.at(Family::V4, APP)).await;
        served.stop().await;
    }
}

async fn revocation() {
    for revoked in ["a", "b"] {
        for mode in MODES {
            let scene = Scene::new().await;
            let app = scene.b.listen(APP);
            let [a, b] = ["a", "b"].map(|name| scene.pki.issue(name));
            let crl = format!("trust: {{crls: [{:?}]}}", scene.pki.revoke(&[]));
            let settings = |name, files| scene.settings(name).identity(files).section(&crl);
            let served = scene.node(mode, settings("a", &a), settings("b", &b)).await;
            let before = served.direct_connections();
            let ends = open(&scene, &app).await;
            assert_mode(&served, mode, before);
            assert!(scene.pki.revoke(&[if revoked == "a" { &a } else { &b }]).exists());
            both_reset(ends).await;
            scene.a.dial_and_see_reset(scene.b.at(Family::V4, APP)).await;
            served.stop().await;
        }
    }
}

async fn rotation() {
    for mode in MODES {
        let scene = Scene::new().await;
        let app = scene.b.listen(APP);
        let served = scene.valid_node(mode).await;
        let before = served.direct_connections();
        let ends = open(&scene, &app).await;
        assert_mode(&served, mode, before);
        // Another authority with the same name replaces the files of `b`.
        let other = Pki::of(scene.world.folder(), "cluster.local", "other-roots");
        let _renewed = other.issue("b");
        std::fs::copy(other.roots(), scene.pki.roots()).expect("replaced");
        both_reset(ends).await;
        served.stop().await;
    }
}

async fn expiry() {
    let scene = Scene::new().await;
    let app = scene.b.listen(APP);
    for mode in MODES {
        let issued = SystemTime::now();
        let a = scene.settings("a").identity(&scene.pki.issue_expiring("a", CERTIFICATE_LIFETIME));
        let served = scene.node(mode, a, scene.with_identity("b")).await;
        let before = served.direct_connections();
        let (mut client, mut server) = open(&scene, &app).await;
        assert_mode(&served, mode, before);
        // Verification counts whole seconds, so the certificate is still valid in the second of its
        // expiry.
        until("the certificate has expired", async || {
            issued
                .elapsed()
                .is_ok_and(|elapsed| elapsed > CERTIFICATE_LIFETIME + Duration::from_secs(1))
        })
        .await;
        exchange(&mut client, &mut server).await;
        let new = async {
            match scene.connect(Family::V4).await {
                Ok(mut client) => read_to_end(&mut client).await.1,
                Err(_) => End::Reset,
            }
        };
        tokio::select! {
            end = new => assert_eq!(end, End::Reset, "{mode}"),
            _reached = app.accept() => unreachable!("{mode}"),
        }
        served.stop().await;
    }
}

async fn removal() {
    let scene = Scene::new().await;
    let app = scene.b.listen(APP);
    for mode in MODES {
        for removed in ["a", "b"] {
            let served = scene.valid_node(mode).await;
            let before = served.direct_connections();
            let ends = open(&scene, &app).await;
            assert_mode(&served, mode, before);
            let Served { node, a, b } = served;
            let (removed, other) = if removed == "a" { (a, b) } else { (b, a) };
            let terminated = node.remove_pod(removed, DRAIN).await.expect("removed");
            assert!(terminated >= 1, "{mode}: {terminated}");
            both_reset(ends).await;
            node.remove_pod(other, DRAIN).await.expect("removed");
            node.stop().await;
        }
    }
}

async fn draining() {
    let scene = Scene::new().await;
    let app = scene.b.listen(APP);
    for mode in MODES {
        let Served { node, a, b } = scene.valid_node(mode).await;
        let (client, server) = open(&scene, &app).await;
        let removing = async {
            let removed = node.remove_pod(b, Duration::from_secs(60)).await;
            removed.expect("removed")
        };
        let using = async {
            // A draining pod has closed its listeners, so a tunnel could not be opened either.
            until("the pod is not reached", async || {
                let Ok(mut client) = scene.connect(Family::V4).await else { return true };
                tokio::select! {
                    _reached = app.accept() => false,
                    (_, end) = read_to_end(&mut client) => end == End::Reset,
                }
            })
            .await;
            let (mut client, mut server) = (client, server);
            exchange(&mut client, &mut server).await;
            drop((client, server));
        };
        let (terminated, ()) = tokio::join!(removing, using);
        assert_eq!(terminated, 0, "{mode}");
        node.remove_pod(a, DRAIN).await.expect("removed");
        node.stop().await;
    }
}

//! End-to-end tests of revocation lists: open connections are terminated, new ones refused, and an
//! unreadable list fails closed.

use std::fs;

use tokio::io::AsyncWriteExt as _;
use underpass_tests::{
    APP, End, Family, Proxy, Scene, Server, Settings, Suite, exchange, read_to_end,
};

use crate::KEPT;

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("a revoked client's connections are terminated and refused", async || {
        let (watches, revoked) = (Side::Server, Side::Client);
        revoked_while_connected(watches, revoked).await;
    });
    suite.test("a revoked server's connections are terminated and refused", async || {
        let (watches, revoked) = (Side::Client, Side::Server);
        revoked_while_connected(watches, revoked).await;
    });
    suite.test(
        "a revoked server's connection is terminated even if the client does not read",
        revoked_while_not_reading,
    );
    suite.test("a proxy does not start without its revocation list", missing_list);
    suite.test("a damaged revocation list is logged, and the previous one stays", damaged_list);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

fn with_list(settings: Settings, scene: &Scene) -> Settings {
    settings.section(&format!("trust: {{crls: [{:?}]}}", scene.pki.dir().join("crl.pem")))
}

/// One side loads the list, and the certificate of the other side is added to it.
async fn revoked_while_connected(watches: Side, revoked: Side) {
    let scene = Scene::new().await;
    let _list = scene.pki.revoke(&[]);
    let with =
        |settings, side| if watches == side { with_list(settings, &scene) } else { settings };
    let client = with(scene.client_settings(), Side::Client);
    let server = with(scene.server_settings(), Side::Server);
    let (mut client, mut server) =
        tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    let app = scene.server.listen(APP);
    let (mut near, mut far, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut near, &mut far).await;

    let files = if revoked == Side::Client { &scene.client_files } else { &scene.server_files };
    let _list = scene.pki.revoke(&[files]);
    let ((_, near_end), (_, far_end)) = tokio::join!(read_to_end(&mut near), read_to_end(&mut far));
    assert_eq!((near_end, far_end), (End::Reset, End::Reset));
    let watching = if watches == Side::Client { &mut client } else { &mut server };
    watching.line(&["connection failed", "reason=\"revoked\""]).await;
    let before = watching.count(&["reason=\"revoked\""]);
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    watching.more_than(before, &["reason=\"revoked\""]).await;
    assert!(!app.is_reached(), "the application was reached");
}

async fn revoked_while_not_reading() {
    let scene = Scene::new().await;
    let _list = scene.pki.revoke(&[]);
    let mut client = scene.client.proxy(&with_list(scene.client_settings(), &scene)).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let app = scene.server.listen(APP);
    let (near, mut far, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    // More than the capacity of all buffers on the path, so that the proxy waits for the reader.
    let fill = async {
        let chunk = vec![0; 1 << 20];
        while far.write_all(&chunk).await.is_ok() {}
    };
    let revoke = async {
        scene.pki.revoke(&[&scene.server_files]);
        client.line(&["connection failed", "reason=\"revoked\""]).await;
    };
    tokio::join!(fill, revoke);
    drop(near);
}

async fn missing_list() {
    let scene = Scene::new().await;
    let settings = with_list(scene.server_settings(), &scene);
    let refused =
        scene.server.try_proxy(&settings).await.map(drop).expect_err("the list is missing");
    let refused = refused.to_string();
    assert!(refused.contains("crl.pem") && refused.contains("No such file"), "{refused}");
    fs::write(scene.pki.dir().join("crl.pem"), "damaged").expect("a file");
    let refused =
        scene.server.try_proxy(&settings).await.map(drop).expect_err("the list is missing");
    assert!(refused.to_string().contains("crl.pem"), "{refused}");
}

async fn damaged_list() {
    let scene = Scene::new().await;
    let _app = Server::echo(&scene.server, APP);
    let list = scene.pki.revoke(&[]);
    let mut server: Proxy = scene.server.proxy(&with_list(scene.server_settings(), &scene)).await;
    let _client = scene.client.proxy(&scene.client_settings()).await;
    scene.echoed().await;
    fs::write(&list, "damaged").expect("a file");
    server.line(&[KEPT, "crl.pem"]).await;
    scene.echoed().await;
}

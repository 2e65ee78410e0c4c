//! End-to-end tests of tunnels between proxies and with scripted peers: retirement, limits and
//! malformed input.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod malformed;
mod scripted;

use std::io::ErrorKind;
use std::process::ExitCode;

use nix::sys::signal::Signal;
use underpass_tests::{APP, Family, HBONE, Scene, Server, Suite, TlsClient, read_to_end, until};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test(
        "tunnels that are retired under load fail no connection and are replaced",
        retirement,
    );
    suite.test("peers of a restarted proxy open new tunnels at once", restarted_proxy);
    suite.test("handshakes are limited per source, and slow ones time out", handshakes);
    suite.test("both proxies log the same trace id", trace);
    malformed::add_tests(&mut suite);
    scripted::add_tests(&mut suite);
    suite.run()
}

async fn retirement() {
    let scene = Scene::new().await;
    let _app = Server::echo(&scene.server, APP);
    let client = scene.client_settings().set("tunnels.max_age=300ms");
    let server = scene.server_settings().set("logging.filter=debug,h2=off");
    let mut client = scene.client.proxy(&client).await;
    let mut server = scene.server.proxy(&server).await;
    let replaced = async {
        server.more_than(5, &["tunnel accepted"]).await;
    };
    let traffic = async {
        loop {
            scene.echoed().await;
        }
    };
    tokio::select! {
        () = replaced => {}
        () = traffic => {}
    }
    // Repeat with a server that stops.
    client.stop().await;
    client = scene.client.proxy(&scene.client_settings()).await;
    server.stop().await;
    let settings = scene.server_settings().set("logging.filter=debug,h2=off");
    let mut server = scene.server.proxy(&settings.set("tunnels.max_age=300ms")).await;
    tokio::select! {
        () = server.more_than(5, &["tunnel accepted"]) => {}
        () = async { loop { scene.echoed().await } } => {}
    }
    server.line(&["tunnel accepted", "resumed=true"]).await;
    assert_eq!(client.count(&["connection failed"]), 0, "{}", client.log());
    assert_eq!(server.count(&["connection failed"]), 0, "{}", server.log());
}

async fn restarted_proxy() {
    let (scene, client, mut server) = Scene::with_proxies().await;
    let _app = Server::echo(&scene.server, APP);
    for _ in 0..3 {
        scene.echoed().await;
        server.signal(Signal::SIGKILL);
        server.ended().await;
        server = scene.server.proxy(&scene.server_settings()).await;
    }
    scene.echoed().await;
    assert_eq!(client.count(&["connection failed"]), 0, "{}", client.log());
}

async fn handshakes() {
    let scene = Scene::new().await;
    let _app = Server::echo(&scene.server, APP);
    let settings = scene.server_settings();
    let settings = settings.set("limits.handshakes_per_source=3").set("timeouts.handshake=1s");
    let mut server = scene.server.proxy(&settings).await;
    let hbone = scene.server.at(Family::V4, HBONE);
    let client = TlsClient::new(Some(&scene.client_files));
    let begin = async || client.begin(scene.client.dial(hbone).await?).await;
    let mut begun = Vec::new();
    for _ in 0..3 {
        begun.push(begin().await.expect("it listens"));
    }
    until("a fourth one is refused", async || {
        let fourth = begin().await;
        let refused = server.count(&["reason=\"too_many_handshakes\""]) > 0;
        match fourth {
            Ok(mut fourth) if refused => drop(read_to_end(&mut fourth).await),
            Ok(_) => {}
            // RST may arrive while connecting.
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
        }
        refused
    })
    .await;
    let refused = scene.server.metrics().await.sum("underpass_handshakes_refused_total", &[]);
    assert!(refused >= Some(1.0), "{refused:?}");
    for stream in &mut begun {
        read_to_end(stream).await;
    }
    server.line(&["reason=\"handshake_timeout\""]).await;
    let stream = scene.client.dial(hbone).await.expect("it listens");
    client.connect(stream).await.expect("there is room again");
}

async fn trace() {
    let (scene, mut client, mut server) = Scene::with_proxies().await;
    let _app = Server::echo(&scene.server, APP);
    scene.echoed().await;
    let line = client.line(&["connection complete"]).await;
    let trace = line.split("trace_id=").nth(1).and_then(|rest| rest.split(' ').next());
    let trace = trace.expect("a trace");
    server.line(&["connection complete", trace]).await;
}

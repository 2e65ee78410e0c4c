//! Tests of a killed proxy: both sides of its connections see RST and never FIN.

use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt as _;
use underpass_tests::{APP, End, Family, Suite, exchange, read_to_end};

use crate::{BULK_BYTES, Path, await_socket_error, send};

pub(crate) fn add_tests(suite: &mut Suite) {
    for (path, which, who) in [
        (Path::Outbound, 0, "client"),
        (Path::Inbound, 0, "server"),
        (Path::Tunnel, 0, "client"),
        (Path::Tunnel, 1, "server"),
    ] {
        let name =
            format!("{}: a killed {who}'s proxy makes no connection look complete", path.name());
        suite.test_both(&name, async move |family| {
            killed_proxy_resets_connections(path, which, family).await
        });
    }
}

async fn killed_proxy_resets_connections(path: Path, which: usize, family: Family) {
    let (scene, mut proxies) = path.scene().await;
    let app = scene.server.listen(APP);
    let to = scene.app(family);
    // An idle connection, one with a partially received body, and one whose client has sent FIN.
    let (mut idle, mut idle_app, _) = scene.client.meet(&app, to).await;
    exchange(&mut idle, &mut idle_app).await;
    let (mut upload, mut upload_app, _) = scene.client.meet(&app, to).await;
    let (mut ended, mut ended_app, _) = scene.client.meet(&app, to).await;
    send(&mut ended, 0, true).await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut ended_app).await, (vec![], End::Fin));
    tokio::select! {
        sent = send(&mut upload, BULK_BYTES, true) => sent.expect("it may send"),
        read = async { upload_app.read_exact(&mut vec![0; BULK_BYTES / 2]).await } => {
            read.expect("bytes arrive");
        }
    }
    let proxy = proxies.get_mut(which).expect("a proxy of the path");
    proxy.signal(Signal::SIGKILL);
    proxy.ended().await;
    for stream in [&mut idle, &mut idle_app, &mut ended, &mut upload] {
        assert_eq!(read_to_end(stream).await.1, End::Reset);
    }
    assert_eq!(read_to_end(&mut upload_app).await.1, End::Reset, "the partial body ends in RST");
    await_socket_error(&ended_app).await;
}

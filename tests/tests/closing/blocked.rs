//! Tests of a side that aborts while the other side does not read. All buffers between them are
//! full, so the proxy cannot read the end behind the data.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use underpass_tests::{APP, End, Family, Suite, abort, exchange, read_to_end, until};

use crate::{Path, await_socket_error};

/// A write that takes longer counts as blocked.
const BLOCKED_AFTER: Duration = Duration::from_millis(500);

pub(crate) fn add_tests(suite: &mut Suite) {
    for path in Path::ALL {
        for (client_sends, who) in [(true, "client"), (false, "server")] {
            let name = path.name();
            suite.test_both(
                &format!("{name}: the {who}'s RST arrives though the other side does not read"),
                async move |family| reset_arrives(path, client_sends, family).await,
            );
        }
        suite.test_both(
            &format!("{}: FIN arrives after all data once the other side reads", path.name()),
            async move |family| fin_arrives(path, family).await,
        );
    }
}

async fn reset_arrives(path: Path, client_sends: bool, family: Family) {
    let (scene, _proxies) = path.scene().await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(family)).await;
    exchange(&mut client, &mut server).await;
    let (mut sender, reader) = if client_sends { (client, server) } else { (server, client) };
    fill(&mut sender).await;
    abort(sender);
    await_socket_error(&reader).await;
    for pod in path.pods(&scene) {
        until("the buffers are freed", async || {
            pod.metrics().await.sum("underpass_buffer_bytes", &[]) == Some(0.0)
        })
        .await;
    }
}

async fn fin_arrives(path: Path, family: Family) {
    let (scene, _proxies) = path.scene().await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(family)).await;
    let sent = fill(&mut client).await;
    client.shutdown().await.expect("FIN is sent");
    let (received, end) = read_to_end(&mut server).await;
    assert_eq!((received.len(), end), (sent, End::Fin));
}

/// Sends until a write is blocked. Returns the number of sent bytes.
async fn fill(stream: &mut TcpStream) -> usize {
    let mut sent = 0;
    while let Ok(written) = timeout(BLOCKED_AFTER, stream.write(&[7; 65536])).await {
        sent += written.expect("the connection is open");
    }
    sent
}

//! Tests of a client that ends or resets before the connection to the application exists. Its data
//! arrives completely, and a reset leaves no open connection.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use underpass_tests::{
    APP, End, Family, HBONE, Listener, Pod, Suite, abort, read_to_end, tool, within,
};

use crate::Path;

pub(crate) fn add_tests(suite: &mut Suite) {
    for (path, port, pending) in [
        (Path::Outbound, APP, "the connection"),
        (Path::Inbound, APP, "the connection to the application"),
        (Path::Tunnel, HBONE, "the tunnel"),
        (Path::Tunnel, APP, "the CONNECT request"),
    ] {
        let name = path.name();
        suite.test_both(
            &format!(
                "{name}: data and FIN that are sent while {pending} is pending arrive completely"
            ),
            async move |family| data_sent_while_pending(path, port, family).await,
        );
        suite.test_both(
            &format!("{name}: a RST while {pending} is pending ends every connection"),
            async move |family| reset_while_pending(path, port, family).await,
        );
    }
}

/// Drops all packets to a port of the pod until the rule is removed.
async fn block_port(pod: &Pod, port: u16) {
    let rules = format!(
        "add table inet wall; add chain inet wall input {{ type filter hook input priority 0; }}; \
         add rule inet wall input tcp dport {port} drop"
    );
    tool(pod, "nft", &[&rules]).await.ok();
}

async fn unblock_port(pod: &Pod) {
    tool(pod, "nft", &["delete table inet wall"]).await.ok();
}

async fn data_sent_while_pending(path: Path, port: u16, family: Family) {
    let (scene, _proxies) = path.scene().await;
    let app = scene.server.listen(APP);
    block_port(&scene.server, port).await;
    let mut client = scene.client.dial(scene.app(family)).await.expect("the proxy accepts");
    // As much as the proxy's socket accepts without a reader.
    let sent = vec![7; 32 << 10];
    client.write_all(&sent).await.expect("it may send");
    client.shutdown().await.expect("FIN is sent");
    unblock_port(&scene.server).await;
    let (mut server, _) = app.accept().await;
    assert!(read_to_end(&mut server).await == (sent, End::Fin), "every byte, and FIN");
    server.write_all(b"answer").await.expect("it may send");
    server.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut client).await, (b"answer".to_vec(), End::Fin));
}

async fn reset_while_pending(path: Path, port: u16, family: Family) {
    let (scene, _proxies) = path.scene().await;
    let app = scene.server.listen(APP);
    block_port(&scene.server, port).await;
    let mut client = scene.client.dial(scene.app(family)).await.expect("the proxy accepts");
    client.write_all(b"request").await.expect("it may send");
    abort(client);
    unblock_port(&scene.server).await;
    assert!(within("an end", ends_in_reset(&app)).await);
}

/// Whether the application gets no connection before the kernel's first SYN retransmission, or one
/// that is reset.
async fn ends_in_reset(app: &Listener) -> bool {
    match tokio::time::timeout(Duration::from_millis(2500), app.accept()).await {
        Err(_) => true,
        Ok((mut server, _)) => read_to_end(&mut server).await.1 == End::Reset,
    }
}

//! Tests of clients that open streams after GOAWAY, and after a certificate expired.

use super::*;
use crate::testing::frames::{GOAWAY, HEADERS, RST_STREAM, RawClient, connect};
use crate::tunnel::settings::KeepaliveSettings;

/// The error code REFUSED_STREAM (RFC 9113 section 7).
const REFUSED_STREAM: [u8; 4] = [0, 0, 0, 7];

/// Settings of a server without keepalive: the client of these tests does not answer PING.
fn settings_without_timeouts() -> ServerSettings {
    let keepalive = KeepaliveSettings { ping_after: 24 * HOUR, timeout: HOUR };
    ServerSettings { keepalive, ..ServerSettings::default() }
}

#[tokio::test(start_paused = true)]
async fn client_that_ignores_drain_is_refused_and_tunnel_ends() {
    let (mut client, mut server) =
        RawClient::new_with_settings_sent(settings_without_timeouts()).await;
    client.send(&connect(1)).await;
    let request = server.next().await.unwrap();
    let stream = request.accept(HeaderMap::new()).unwrap();
    server.drain();
    let served = Served::new(server);
    client.receive(Some(GOAWAY)).await;
    // The client acknowledges nothing, and keeps its stream open.
    sleep(31 * SECOND).await;
    client.send(&connect(3)).await;
    let refused = client.receive(Some(RST_STREAM)).await.pop();
    assert_eq!(refused, Some((RST_STREAM, 3, REFUSED_STREAM.to_vec())));
    drop(stream);
    assert_eq!(client.goaway().await, Some(0), "the tunnel ends with its last stream");
    served.ended().await;
}

#[tokio::test(start_paused = true)]
async fn stream_that_crosses_goaway_is_served() {
    let (mut client, mut server) =
        RawClient::new_with_settings_sent(settings_without_timeouts()).await;
    server.drain();
    let mut served = Served::new(server);
    sleep(SECOND).await;
    client.send(&connect(1)).await;
    let _stream = served.next().await.accept(HeaderMap::new()).unwrap();
    assert_eq!(client.receive(Some(HEADERS)).await.pop().unwrap().1, 1);
}

#[tokio::test(start_paused = true)]
async fn expired_certificate_refuses_new_streams_and_keeps_open_ones() {
    let (mut client, mut server) =
        RawClient::new_with_settings_sent(settings_without_timeouts()).await;
    client.send(&connect(1)).await;
    let (_reader, mut writer) =
        server.next().await.unwrap().accept(HeaderMap::new()).unwrap().split();
    let _served = Served::new(server);
    client.receive(Some(HEADERS)).await;
    sleep(HOUR).await;
    client.send(&connect(3)).await;
    let refused = client.receive(Some(RST_STREAM)).await.pop();
    assert_eq!(refused, Some((RST_STREAM, 3, REFUSED_STREAM.to_vec())));
    writer.write(Bytes::from_static(b"still open")).await.unwrap();
    assert_eq!(client.receive(Some(0)).await.pop().unwrap().2, b"still open");
}

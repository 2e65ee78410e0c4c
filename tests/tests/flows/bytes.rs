//! Tests of the data of connections: complete in both directions until each side has ended, also
//! for many connections.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use underpass_tests::{
    APP, End, Family, Pod, Scene, Server, Suite, carry, exchange, read_to_end, within,
};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test_both(
        "10 MiB pass the tunnel unchanged in both directions at once",
        large_through_the_tunnel,
    );
    suite.test_both(
        "10 MiB pass in plaintext unchanged in both directions at once",
        large_in_plaintext,
    );
    suite.test("the server can still send after the client's FIN", client_ends_first);
    suite.test("the client can still send after the server's FIN", server_ends_first);
    suite.test("300 concurrent connections each get their own answer", many_concurrent_connections);
}

async fn large_through_the_tunnel(family: Family) {
    let (scene, _client, _server) = Scene::with_proxies().await;
    large_transfer(&scene, family).await;
}

async fn large_in_plaintext(family: Family) {
    let scene = Scene::new().await;
    let _proxy = scene.server.proxy(&scene.server_settings()).await;
    large_transfer(&scene, family).await;
}

async fn large_transfer(scene: &Scene, family: Family) {
    const SIZE: usize = 10 << 20;
    let app = scene.server.listen(APP);
    let (client, server, _) = scene.client.meet(&app, scene.app(family)).await;
    let (question, answer) = (random_bytes(1, SIZE), random_bytes(2, SIZE));
    let (got_answer, got_question) =
        tokio::join!(exchange_both_ways(client, &question), exchange_both_ways(server, &answer));
    assert!(got_question == question, "the server received something else");
    assert!(got_answer == answer, "the client received something else");
}

/// Sends all data and FIN while receiving until FIN.
async fn exchange_both_ways(mut stream: TcpStream, send: &[u8]) -> Vec<u8> {
    let (mut from, mut to) = stream.split();
    let mut received = Vec::new();
    let sending = async {
        to.write_all(send).await?;
        to.shutdown().await
    };
    let both = async { tokio::try_join!(sending, from.read_to_end(&mut received)) };
    within("all bytes have passed", both).await.expect("the connection holds");
    received
}

/// Pseudorandom data without repetitions (xorshift64).
fn random_bytes(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(size / 8).flatten().collect()
}

async fn client_ends_first() {
    let (scene, _client, _server) = Scene::with_proxies().await;
    let (mut client, mut server) = connected(&scene.client, &scene).await;
    exchange(&mut client, &mut server).await;
    client.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut server).await, (vec![], End::Fin));
    carry(&mut server, &mut client, b"still here").await;
    server.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Fin));
}

async fn server_ends_first() {
    let (scene, _client, _server) = Scene::with_proxies().await;
    let (mut client, mut server) = connected(&scene.client, &scene).await;
    exchange(&mut client, &mut server).await;
    server.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Fin));
    carry(&mut client, &mut server, b"still here").await;
    client.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut server).await, (vec![], End::Fin));
}

async fn connected(from: &Pod, scene: &Scene) -> (TcpStream, TcpStream) {
    let app = scene.server.listen(APP);
    let (client, server, _) = from.meet(&app, scene.app(Family::V4)).await;
    (client, server)
}

async fn many_concurrent_connections() {
    let (scene, _client, _server) = Scene::with_proxies().await;
    let echo = Server::echo(&scene.server, APP);
    let mut clients = Vec::new();
    for number in 0..300_u32 {
        let mut client = scene.client.dial(scene.app(Family::V4)).await.expect("it connects");
        client.write_all(&number.to_be_bytes()).await.expect("it sends");
        clients.push((number, client));
    }
    // All connections are open: no client has ended, and answers are read only now.
    for (number, client) in &mut clients {
        let answer = within("an answer", client.read_u32()).await.expect("an answer");
        assert_eq!(answer, *number);
    }
    for (number, mut client) in clients {
        client.shutdown().await.expect("FIN is sent");
        assert_eq!(read_to_end(&mut client).await, (vec![], End::Fin), "{number}");
    }
    assert_eq!(echo.peers().len(), 300);
    assert!(echo.peers().iter().all(|peer| peer.ip() == scene.client.ip(Family::V4)));
}

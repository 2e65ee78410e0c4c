//! Tests of the framing over TCP.

use std::io::ErrorKind;

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use tokio::io::duplex;
use underpass_interception::BoundListener;

use super::*;
use crate::dns::message::testing::query;
use crate::dns::message::{RecordType, ResponseCode};
use crate::dns::service::MAX_CONNECTIONS;
use crate::dns::service::tests::Scene;
use crate::dns::upstream::tests::Script;
use crate::node::testing::pod;

fn framed(messages: &[&[u8]]) -> Vec<u8> {
    let frame = |message: &&[u8]| {
        let length = u16::try_from(message.len()).unwrap();
        [&length.to_be_bytes(), *message].concat()
    };
    messages.iter().flat_map(frame).collect()
}

#[tokio::test(start_paused = true)]
async fn messages_are_found_in_any_pieces() {
    let bytes = framed(&[b"first", b"", b"third"]);
    for piece in 1..bytes.len() {
        let (mut client, mut server) = duplex(64);
        let send = async {
            for part in bytes.chunks(piece) {
                client.write_all(part).await.unwrap();
                tokio::task::yield_now().await;
            }
            drop(client);
        };
        let receive = async {
            let (mut received, mut messages) = (BytesMut::new(), Vec::new());
            while let Some(message) = next_message(&mut server, &mut received).await.unwrap() {
                messages.push(message);
            }
            messages
        };
        let ((), messages) = tokio::join!(send, receive);
        assert_eq!(messages, [&b"first"[..], b"", b"third"], "{piece}");
    }
}

#[tokio::test(start_paused = true)]
async fn long_messages_and_idle_clients_end_the_connection() {
    let (mut client, mut server) = duplex(64);
    client.write_all(&[0xff, 0xff]).await.unwrap();
    let error = next_message(&mut server, &mut BytesMut::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);

    let (mut client, mut server) = duplex(64);
    client.write_all(&[0, 5, b'h', b'a']).await.unwrap();
    let began = tokio::time::Instant::now();
    assert_eq!(next_message(&mut server, &mut BytesMut::new()).await.unwrap(), None);
    assert_eq!(began.elapsed(), IDLE_TIMEOUT);
}

/// Serves a new listener, and returns its address.
fn serve(scene: &Scene, pod: &Arc<Pod>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let listener = BoundListener::try_from(OwnedFd::from(listener)).unwrap().register().unwrap();
    let (service, pod) = (scene.service.clone(), pod.clone());
    tokio::spawn(async move { serve_tcp(&service, &pod, &listener).await });
    address
}

async fn send(client: &mut TcpStream, name: &str) {
    client.write_all(&framed(&[&query(name, RecordType::A, &[])])).await.unwrap();
}

async fn receive(client: &mut TcpStream) {
    let mut answer = vec![0; client.read_u16().await.unwrap().into()];
    client.read_exact(&mut answer).await.unwrap();
}

/// A connection that has received an answer.
async fn answered(server: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(server).await.unwrap();
    send(&mut client, "web").await;
    receive(&mut client).await;
    client
}

#[tokio::test]
async fn connections_of_all_listeners_are_limited_together() {
    let (scene, pod) = (Scene::new(Script::Drops), pod(&["interception.profile=none"]));
    let [first, second] = [(); 2].map(|()| serve(&scene, &pod));
    let mut clients = Vec::new();
    // Each listener waits with a permit for its next connection.
    for n in 0..MAX_CONNECTIONS - 1 {
        clients.push(answered(if n % 2 == 0 { first } else { second }).await);
    }
    assert_eq!(scene.service.connections.available_permits(), 0);
    assert_eq!(pod.queries.len(), MAX_CONNECTIONS - 1);
    clients.clear();
    answered(first).await;
    answered(second).await;
}

/// A client that sends many queries gets all answers while the proxy drains, and the end only when
/// it pauses.
#[tokio::test]
async fn queries_during_drain_are_answered_before_the_end() {
    let slow = Script::Answers(ResponseCode::NO_ERROR, 2 * DRAIN_IDLE_TIMEOUT);
    let (scene, pod) = (Scene::new(slow), pod(&["interception.profile=none"]));
    let mut client = answered(serve(&scene, &pod)).await;
    pod.closing.cancel();
    for _ in 0..100 {
        send(&mut client, "web").await;
        receive(&mut client).await;
    }
    // The server answers after the idle time.
    send(&mut client, "slow.example").await;
    receive(&mut client).await;
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    // A query that crosses the end causes no reset.
    send(&mut client, "web").await;
    sleep(DRAIN_IDLE_TIMEOUT).await;
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    drop(client);
    pod.queries.close();
    pod.queries.wait().await;
}

/// Each response is a segment of its own, which does not wait for a delayed acknowledgement (40 ms)
/// of the one before.
#[tokio::test]
async fn responses_to_pipelined_queries_are_sent_at_once() {
    let (scene, pod) = (Scene::new(Script::Drops), pod(&["interception.profile=none"]));
    let mut client = answered(serve(&scene, &pod)).await;
    let message = query("web", RecordType::A, &[]);
    let began = tokio::time::Instant::now();
    for _ in 0..200 {
        client.write_all(&framed(&[&*message; 5])).await.unwrap();
        for _ in 0..5 {
            receive(&mut client).await;
        }
    }
    let elapsed = began.elapsed();
    assert!(elapsed < Duration::from_secs(6), "{elapsed:?}");
}

//! Tests that no query is lost while a proxy is replaced.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::timeout;
use underpass_tests::{Family, Suite};

use crate::scene::{DnsScene, SERVICE};

/// The timeout of glibc for a first attempt.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("hot restart loses no query", hot_restart);
}

async fn hot_restart() {
    let (scene, mut old) = DnsScene::start("interception.profile=ambient").await;
    let server = scene.server.at(Family::V4, 53);
    let socket = scene.client.run(|| std::net::UdpSocket::bind("0.0.0.0:0")).expect("a socket");
    socket.set_nonblocking(true).expect("a socket");
    let socket = UdpSocket::from_std(socket).expect("a socket");
    let mut id = 0;
    for _ in 0..2 {
        let settings = scene.settings.clone().take_over();
        let mut starting = std::pin::pin!(scene.client.proxy(&settings));
        let new = loop {
            tokio::select! {
                new = &mut starting => break new,
                () = ask(&socket, server, SERVICE, id) => id += 1,
            }
        };
        old.line(&["another process has taken over"]).await;
        assert!(old.ended_by_itself().await.success(), "{}", old.log());
        old = new;
        for name in [SERVICE, "other.example"] {
            id += 1;
            ask(&socket, server, name, id).await;
        }
    }
    assert!(id > 100, "queries during the restarts: {id}");
}

/// Sends one query, and waits for its answer. It is not repeated.
async fn ask(socket: &UdpSocket, server: SocketAddr, name: &str, id: u16) {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).expect("a label"));
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    socket.send_to(&message, server).await.expect("a query is sent");
    let mut answer = [0; 512];
    let receive = async {
        // The answer to a query whose future was dropped may come first.
        loop {
            let (length, sender) = socket.recv_from(&mut answer).await.expect("an answer");
            assert_eq!(sender, server, "the answer comes from the server that was asked");
            if answer[..2] == id.to_be_bytes() {
                return length;
            }
        }
    };
    let length = timeout(ANSWER_TIMEOUT, receive).await.expect("an answer in time");
    let (code, answers) = (answer[3] & 0xf, answer[7]);
    assert!(length > message.len() && code == 0 && answers == 1, "{code} {answers}");
}

//! Tests of exchanges with servers on the loopback interface.

use std::net::Ipv4Addr;

use tokio::net::{TcpListener, UdpSocket};

use super::*;
use crate::dns::message::RecordType;
use crate::dns::message::testing::{query, record, response};
use crate::limits::Limits;
use crate::node::testing::{settings, sockets};

struct Scene {
    exchange: SocketExchange,
    message: Arc<[u8]>,
    query: Arc<Query>,
}

impl Scene {
    fn new() -> Self {
        let settings = settings(&["interception.profile=none"]);
        let limits = Limits::new(&settings.limits, 1).pod();
        let message: Arc<[u8]> = query("a.example", RecordType::A, &[]).into();
        let query = Arc::new(Query::read(&message).unwrap());
        Self { exchange: SocketExchange { sockets: sockets(&settings), limits }, message, query }
    }

    async fn ask(&self, server: SocketAddr, transport: Transport) -> io::Result<Vec<u8>> {
        let (query, message) = (self.query.clone(), self.message.clone());
        self.exchange.exchange(server, transport, query, message).await
    }
}

fn answer(asked: &[u8]) -> Vec<u8> {
    response(asked, 0, [&[record(1, 60, &[10, 0, 0, 1])], &[], &[]])
}

#[tokio::test]
async fn only_the_answer_to_the_query_is_accepted() {
    let (scene, server) = (Scene::new(), UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
    let address = server.local_addr().unwrap();
    let serve = async {
        let mut buffer = [0; 512];
        let (length, client) = server.recv_from(&mut buffer).await.unwrap();
        let asked = &buffer[..length];
        let right = answer(asked);
        let mut other_id = right.clone();
        other_id[1] ^= 1;
        let mut other_name = right.clone();
        other_name[13] ^= 1;
        let other_sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut forged = right.clone();
        *forged.last_mut().unwrap() = 66;
        other_sender.send_to(&forged, client).await.unwrap();
        for message in [&other_id, &other_name, asked, &right[..right.len() - 1], &[], &right] {
            server.send_to(message, client).await.unwrap();
        }
        right
    };
    let (received, sent) = tokio::join!(scene.ask(address, Transport::Udp), serve);
    assert_eq!(received.unwrap(), sent);
}

#[tokio::test]
async fn each_query_has_a_random_id_and_port() {
    let (scene, server) = (Scene::new(), UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
    let address = server.local_addr().unwrap();
    let (mut ids, mut ports) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let serve = async {
            let mut buffer = [0; 512];
            let (length, client) = server.recv_from(&mut buffer).await.unwrap();
            server.send_to(&answer(&buffer[..length]), client).await.unwrap();
            (u16::from_be_bytes([buffer[0], buffer[1]]), client.port())
        };
        let (received, (id, port)) = tokio::join!(scene.ask(address, Transport::Udp), serve);
        received.unwrap();
        ids.push(id);
        ports.push(port);
    }
    for mut numbers in [ids, ports] {
        let in_order = numbers.windows(2).filter(|pair| pair[1] == pair[0].wrapping_add(1)).count();
        assert!(in_order < 5, "{numbers:?}");
        numbers.sort_unstable();
        numbers.dedup();
        assert!(numbers.len() > 15, "{numbers:?}");
    }
}

#[tokio::test]
async fn tcp_exchange_has_a_connection_of_its_own() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let (scene, address) = (Scene::new(), listener.local_addr().unwrap());
    let serve = async |wrong: u8| {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut asked).await.unwrap();
        let mut answer = answer(&asked);
        answer[0] ^= wrong;
        stream.write_u16(u16::try_from(answer.len()).unwrap()).await.unwrap();
        stream.write_all(&answer).await.unwrap();
        answer
    };
    let (received, sent) = tokio::join!(scene.ask(address, Transport::Tcp), serve(0));
    assert_eq!(received.unwrap(), sent);
    let (received, _) = tokio::join!(scene.ask(address, Transport::Tcp), serve(1));
    assert_eq!(received.unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[tokio::test]
async fn closed_port_and_removed_pod_end_the_exchange() {
    let (scene, free) = (Scene::new(), UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
    let address = free.local_addr().unwrap();
    let asking = scene.ask(address, Transport::Udp);
    let closing = async {
        // The query has been sent, and has no answer.
        free.readable().await.unwrap();
        scene.exchange.sockets.close();
    };
    let (outcome, ()) = tokio::join!(asking, closing);
    assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::NotConnected);

    let scene = Scene::new();
    drop(free);
    for transport in [Transport::Udp, Transport::Tcp] {
        let refused = scene.ask(address, transport).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
}

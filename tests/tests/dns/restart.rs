//! Tests that no query is lost while a proxy is replaced.

use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;
use underpass_tests::{Family, Pod, Suite};

use crate::scene::{DnsScene, SERVICE};

/// The timeout of glibc for a first attempt.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The timeout of an answer that waits for the start of another process.
const SLOW_ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// An address for a client's socket.
pub(crate) const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("hot restart loses no query", hot_restart);
    suite.test("hot restart waits for the server of a forwarded query", forwarded_query);
    suite.test("hot restart answers all queries of an open TCP connection", tcp_connection);
    suite.test("many queries wait while the proxy does not read", waiting_queries);
}

async fn hot_restart() {
    let (scene, mut old) = DnsScene::start("interception.profile=ambient").await;
    let server = scene.server.at(Family::V4, 53);
    let socket = bind(&scene.client, ANY);
    let mut id = 0;
    for _ in 0..2 {
        let settings = scene.settings.clone().take_over();
        let mut starting = std::pin::pin!(scene.client.proxy(&settings));
        let new = loop {
            tokio::select! {
                new = &mut starting => break new,
                () = ask(&socket, server, SERVICE, id, ANSWER_TIMEOUT) => id += 1,
            }
        };
        old.line(&["another process has taken over"]).await;
        assert!(old.ended_by_itself().await.success(), "{}", old.log());
        old = new;
        for name in [SERVICE, "other.example"] {
            id += 1;
            ask(&socket, server, name, id, ANSWER_TIMEOUT).await;
        }
    }
    assert!(id > 100, "queries during the restarts: {id}");
}

/// The pod's server answers a query only after another process has taken over.
async fn forwarded_query() {
    let (scene, mut first) = DnsScene::start("interception.profile=ambient").await;
    let upstream_address = scene.client.at(Family::V4, 53);
    let upstream = bind(&scene.client, upstream_address);
    let nameserver = format!("nameserver {}", upstream_address.ip());
    scene.write_resolv_conf(&format!("{nameserver}\noptions timeout:20 attempts:1\n"));
    let settings = scene.settings.clone().take_over();
    let mut old = scene.client.proxy(&settings).await;
    first.ended_by_itself().await;
    let socket = bind(&scene.client, ANY);
    let server = scene.server.at(Family::V4, 53);
    let asking = ask(&socket, server, "slow.example", 1, SLOW_ANSWER_TIMEOUT);
    let taking_over = async {
        let mut asked = [0; 512];
        let (length, proxy) = upstream.recv_from(&mut asked).await.expect("a forwarded query");
        let new = scene.client.proxy(&settings).await;
        old.line(&["another process has taken over"]).await;
        upstream.send_to(&answer_to(&asked[..length]), proxy).await.expect("an answer is sent");
        new
    };
    let ((), _new) = tokio::join!(asking, taking_over);
    assert!(old.ended_by_itself().await.success(), "{}", old.log());
}

/// The old process serves its connections until the client pauses.
async fn tcp_connection() {
    let (scene, mut old) = DnsScene::start("interception.profile=ambient").await;
    let server = scene.server.at(Family::V4, 53);
    let mut client = connect(&scene.client, server);
    let settings = scene.settings.clone().take_over();
    let is_over = Cell::new(false);
    let asking = async {
        let mut id = 0;
        while !is_over.get() {
            ask_over(&mut client, id).await;
            id += 1;
        }
        let during = id;
        for id in during..during + 100 {
            ask_over(&mut client, id).await;
        }
        assert!(during > 100, "queries during the restart: {during}");
    };
    let taking_over = async {
        let new = scene.client.proxy(&settings).await;
        old.line(&["another process has taken over"]).await;
        is_over.set(true);
        new
    };
    let ((), _new) = tokio::join!(asking, taking_over);
    assert_eq!(client.read(&mut [0]).await.expect("FIN, not RST"), 0);
    assert!(old.ended_by_itself().await.success(), "{}", old.log());
    ask_over(&mut connect(&scene.client, server), 1).await;
}

/// More queries than the kernel's default buffer holds. The clients have several sockets, so that
/// their own buffers suffice for the answers.
async fn waiting_queries() {
    let (scene, proxy) = DnsScene::start("interception.profile=ambient").await;
    let server = scene.server.at(Family::V4, 53);
    let sockets = [(); 5].map(|()| bind(&scene.client, ANY));
    proxy.signal(Signal::SIGSTOP);
    let ids = 0..100;
    for socket in &sockets {
        for id in ids.clone() {
            socket.send_to(&query(SERVICE, id), server).await.expect("a query is sent");
        }
    }
    proxy.signal(Signal::SIGCONT);
    for socket in &sockets {
        for _ in ids.clone() {
            let mut answer = [0; 512];
            let received = timeout(ANSWER_TIMEOUT, socket.recv_from(&mut answer)).await;
            received.expect("an answer in time").expect("an answer");
        }
    }
}

/// A TCP connection of a pod.
fn connect(pod: &Pod, server: SocketAddr) -> TcpStream {
    let stream = pod.run(|| std::net::TcpStream::connect(server)).expect("a connection");
    stream.set_nonblocking(true).expect("a socket");
    TcpStream::from_std(stream).expect("a socket")
}

/// Sends one query over TCP, and waits for its answer.
async fn ask_over(stream: &mut TcpStream, id: u16) {
    let query = query(SERVICE, id);
    let length = u16::try_from(query.len()).expect("a short name");
    let framed = [&length.to_be_bytes(), &*query].concat();
    stream.write_all(&framed).await.expect("a query is sent");
    let receive = async {
        let mut answer = vec![0; stream.read_u16().await?.into()];
        stream.read_exact(&mut answer).await.map(|_| answer)
    };
    let answer = timeout(ANSWER_TIMEOUT, receive).await.expect("an answer in time");
    let answer = answer.expect("an answer");
    let (code, answers) = (answer[3] & 0xf, answer[7]);
    assert_eq!((&answer[..2], code, answers), (&id.to_be_bytes()[..], 0, 1));
}

/// A query for the address of `name`.
fn query(name: &str, id: u16) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).expect("a label"));
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

/// A UDP socket of a pod.
pub(crate) fn bind(pod: &Pod, address: SocketAddr) -> UdpSocket {
    let socket = pod.run(|| std::net::UdpSocket::bind(address)).expect("a socket");
    socket.set_nonblocking(true).expect("a socket");
    UdpSocket::from_std(socket).expect("a socket")
}

/// A response to a query without additional records, with one address.
fn answer_to(query: &[u8]) -> Vec<u8> {
    let header = [0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
    let record = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 9];
    [&query[..2], &header, &query[12..], &record].concat()
}

/// Sends one query, and waits for its answer. It is not repeated.
pub(crate) async fn ask(
    socket: &UdpSocket,
    server: SocketAddr,
    name: &str,
    id: u16,
    within: Duration,
) {
    let message = query(name, id);
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
    let length = timeout(within, receive).await.expect("an answer in time");
    let (code, answers) = (answer[3] & 0xf, answer[7]);
    assert!(length > message.len() && code == 0 && answers == 1, "{code} {answers}");
}

//! Tests of the order, the timeouts and the attempts, with scripted servers and paused time.

use futures_util::FutureExt as _;
use tokio::time::sleep;

use super::*;
use crate::dns::message::RecordType;
use crate::dns::message::testing::{edns, query, record, response};

/// The behaviour of a scripted server.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Script {
    /// Answers with this code after this time.
    Answers(ResponseCode, Duration),
    /// Answers with an additional record after the OPT record. The response cannot be stored.
    AnswersUnusually(Duration),
    Drops,
    Refuses,
    Panics,
}

/// Servers by address, and the queries that they have received.
#[derive(Debug, Default)]
pub(crate) struct Servers {
    pub(crate) scripts: Mutex<HashMap<SocketAddr, Script>>,
    pub(crate) asked: Mutex<Vec<(String, Transport)>>,
}

impl Servers {
    pub(crate) fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

#[derive(Debug)]
pub(crate) struct ScriptedExchange(pub(crate) Arc<Servers>);

impl Exchange for ScriptedExchange {
    fn exchange(
        &self,
        server: SocketAddr,
        transport: Transport,
        _: Arc<Query>,
        message: Arc<[u8]>,
    ) -> BoxFuture<'static, io::Result<Vec<u8>>> {
        self.0.asked.lock().unwrap().push((server.ip().to_string(), transport));
        let script = self.0.scripts.lock().unwrap()[&server];
        async move {
            match script {
                Script::Answers(code, after) => {
                    sleep(after).await;
                    let records = [record(1, 60, &server_number(server))];
                    let soa = record(6, 60, &[[0; 20].as_slice(), &[0, 0, 0, 9]].concat());
                    Ok(match code {
                        ResponseCode::NO_ERROR => response(&message, 0, [&records, &[], &[]]),
                        code => response(&message, code.0, [&[], &[soa], &[]]),
                    })
                }
                Script::AnswersUnusually(after) => {
                    sleep(after).await;
                    let records = [record(1, 60, &server_number(server))];
                    let more = [edns(1232, false, &[]), record(16, 60, &[0])];
                    Ok(response(&message, 0, [&records, &[], &more]))
                }
                Script::Drops => std::future::pending().await,
                Script::Refuses => Err(io::ErrorKind::ConnectionRefused.into()),
                Script::Panics => panic!("a scripted panic"),
            }
        }
        .boxed()
    }
}

fn server_number(server: SocketAddr) -> [u8; 4] {
    match server.ip() {
        std::net::IpAddr::V4(v4) => v4.octets(),
        std::net::IpAddr::V6(_) => [0; 4],
    }
}

const FAST: Duration = Duration::from_millis(10);
const ANSWERS: Script = Script::Answers(ResponseCode::NO_ERROR, FAST);

struct Scene {
    servers: Arc<Servers>,
    upstream: Upstream,
    settings: ResolvConf,
}

/// Servers 10.0.0.1 and so on with these scripts.
fn scene(scripts: &[Script], options: &str) -> Scene {
    let servers = Arc::new(Servers::default());
    let mut text = format!("options {options}\n");
    for (index, script) in scripts.iter().enumerate() {
        let address = format!("10.0.0.{}", index + 1);
        text.push_str(&format!("nameserver {address}\n"));
        let server = SocketAddr::new(address.parse().unwrap(), 53);
        servers.scripts.lock().unwrap().insert(server, *script);
    }
    let upstream = Upstream::new(Arc::new(ScriptedExchange(servers.clone())));
    Scene { servers, upstream, settings: ResolvConf::read(&text) }
}

impl Scene {
    /// The last byte of the server that has answered or the code or the error, and the time in
    /// milliseconds.
    async fn ask(&self) -> (String, u128) {
        let message: Arc<[u8]> = query("a.b", RecordType::A, &[]).into();
        let query = Arc::new(Query::read(&message).unwrap());
        let began = Instant::now();
        let asked = self.upstream.ask(&self.settings, Transport::Udp, &query, &message).await;
        let outcome = match asked {
            Ok(response) if message::code(&response) == ResponseCode::NO_ERROR => {
                response.last().unwrap().to_string()
            }
            Ok(response) => message::code(&response).as_str().to_owned(),
            Err(error) => error.to_string(),
        };
        (outcome, began.elapsed().as_millis())
    }

    fn asked(&self) -> String {
        let asked = std::mem::take(&mut *self.servers.asked.lock().unwrap());
        let last = |(server, _): &(String, _)| server.rsplit('.').next().unwrap().to_owned();
        asked.iter().map(last).collect::<Vec<_>>().join(" ")
    }
}

#[tokio::test(start_paused = true)]
async fn first_server_is_asked_first() {
    let scene = scene(&[ANSWERS, ANSWERS], "");
    for _ in 0..3 {
        assert_eq!(scene.ask().await, ("1".to_owned(), 10));
    }
    assert_eq!(scene.asked(), "1 1 1");
}

#[tokio::test(start_paused = true)]
async fn rotate_asks_servers_in_turn() {
    let scene = scene(&[ANSWERS, ANSWERS], "rotate");
    for _ in 0..3 {
        scene.ask().await;
    }
    assert_eq!(scene.asked(), "1 2 1");
}

#[tokio::test(start_paused = true)]
async fn silent_server_is_followed_by_next_and_then_asked_last() {
    let scene = scene(&[Script::Drops, ANSWERS], "timeout:2");
    assert_eq!(scene.ask().await, ("2".to_owned(), 2010));
    assert_eq!(scene.ask().await, ("2".to_owned(), 10));
    assert_eq!(scene.asked(), "1 2 2");
    tokio::time::advance(AVOID_TIME).await;
    assert_eq!(scene.ask().await, ("2".to_owned(), 2010), "the silent server is asked first again");
}

#[tokio::test(start_paused = true)]
async fn unreachable_server_is_followed_by_next_at_once() {
    let scene = scene(&[Script::Refuses, ANSWERS], "");
    assert_eq!(scene.ask().await, ("2".to_owned(), 10));
}

#[tokio::test(start_paused = true)]
async fn late_answer_of_slow_server_counts() {
    let slow = Script::Answers(ResponseCode::NO_ERROR, Duration::from_millis(1500));
    let scene = scene(&[slow, Script::Drops], "timeout:1 attempts:1");
    assert_eq!(scene.ask().await, ("1".to_owned(), 1500));
}

#[tokio::test(start_paused = true)]
async fn errors_of_servers_are_followed_by_next() {
    for code in [ResponseCode::SERVER_FAILURE, ResponseCode::REFUSED, ResponseCode::NOT_IMPLEMENTED]
    {
        let fails = Script::Answers(code, FAST);
        assert_eq!(scene(&[fails, ANSWERS], "").ask().await, ("2".to_owned(), 20));
        let all = scene(&[fails], "attempts:3");
        assert_eq!(all.ask().await, (code.as_str().to_owned(), 30));
        assert_eq!(all.asked(), "1 1 1");
    }
    let missing = Script::Answers(ResponseCode::NAME_ERROR, FAST);
    assert_eq!(scene(&[missing, ANSWERS], "").ask().await, ("NXDOMAIN".to_owned(), 10));
}

#[tokio::test(start_paused = true)]
async fn error_response_counts_if_no_other_server_answers() {
    let fails = Script::Answers(ResponseCode::SERVER_FAILURE, FAST);
    let scene = scene(&[fails, Script::Drops], "timeout:1 attempts:1");
    assert_eq!(scene.ask().await, ("SERVFAIL".to_owned(), 1010));
}

#[tokio::test(start_paused = true)]
async fn silence_ends_after_all_attempts_and_names_the_servers() {
    let scene = scene(&[Script::Drops, Script::Drops], "timeout:1 attempts:2");
    let expected = "no answer within 4 s from 10.0.0.1, 10.0.0.2";
    assert_eq!(scene.ask().await, (expected.to_owned(), 4000));
    assert_eq!(scene.asked(), "1 2 1 2");
}

#[tokio::test(start_paused = true)]
async fn attempts_beside_earlier_ones_are_limited() {
    let scene = scene(&[Script::Drops], "timeout:1 attempts:5");
    let count = MAX_FURTHER + 100;
    futures_util::future::join_all((0..count).map(|_| scene.ask())).await;
    assert_eq!(scene.servers.asked(), count + MAX_FURTHER);
}

#[tokio::test(start_paused = true)]
async fn one_query_takes_bounded_time() {
    let scene = scene(&[Script::Drops], "timeout:30 attempts:5");
    assert_eq!(scene.ask().await.1, MAX_TIME.as_millis());
}

#[tokio::test(start_paused = true)]
async fn settings_without_server_fail_at_once() {
    let (outcome, elapsed) = scene(&[], "").ask().await;
    assert_eq!((outcome.as_str(), elapsed), ("the pod has no DNS server", 0));
}

//! End-to-end tests of the ends of connections: a table of actions and their visible effects on the
//! other side, on every path.
//!
//! FIN stays FIN, RST stays RST, and an aborted connection never looks complete. The proxy's unit
//! tests cover the relay; other suites test deadlines and policies.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod blocked;
mod killed;
mod peer;
mod pending;
mod wire;

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::rc::Rc;

use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{LocalSet, spawn_local};
use underpass_tests::{
    APP, End, Family, Pod, Proxy, Scene, Suite, abort, exchange, read_to_end, until, within,
};

use Action::{Close, Fin, Reset};
use Outcome::{Aborted, Closed, HalfClosed, ResetAfterFin, ResetOnSend};
use Stage::{Fresh, OtherEnded, SelfEnded, Streaming};

/// Actions of one side, and the required effect on the other side. Each row applies to client and
/// server, on each path.
#[rustfmt::skip]
const TABLE: [(Stage, Action, Outcome); 11] = [
    (Fresh,      Fin,   HalfClosed),
    (Fresh,      Close, ResetAfterFin),
    (Fresh,      Reset, Aborted),
    (Streaming,  Fin,   HalfClosed),
    (Streaming,  Close, ResetAfterFin),
    (Streaming,  Reset, Aborted),
    (OtherEnded, Fin,   Closed),
    (OtherEnded, Close, Closed),
    (OtherEnded, Reset, Aborted),
    (SelfEnded,  Close, ResetOnSend),
    (SelfEnded,  Reset, Aborted),
];

/// The state of the connection at the time of the action.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    /// Open, without data.
    Fresh,
    /// Data was exchanged, and more data from the acting side is in flight.
    Streaming,
    /// Data was exchanged, and the other side has sent FIN.
    OtherEnded,
    /// Data was exchanged, and the acting side has sent FIN.
    SelfEnded,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Action {
    /// Sends FIN and continues reading.
    Fin,
    /// Closes the socket: FIN, and RST for data that arrives later.
    Close,
    /// Aborts with RST.
    Reset,
}

/// The end of the connection for the other side.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Outcome {
    /// The other side receives all data and FIN, and can still send.
    HalfClosed,
    /// The other side receives all data and FIN, and RST after sending more.
    ResetAfterFin,
    /// The other side receives all data and FIN after it has sent its own FIN.
    Closed,
    /// The other side receives RST after sending more.
    ResetOnSend,
    /// The other side receives RST without sending.
    Aborted,
}

/// More than the capacity of all buffers between the applications while one side does not read.
const BULK_BYTES: usize = 3 << 20;

fn main() -> ExitCode {
    let mut suite = Suite::new();
    for path in Path::ALL {
        suite.test_both(
            &format!("{}: connections end as the table states", path.name()),
            async move |family| {
                table(path, family).await;
            },
        );
    }
    blocked::add_tests(&mut suite);
    pending::add_tests(&mut suite);
    peer::add_tests(&mut suite);
    killed::add_tests(&mut suite);
    wire::add_tests(&mut suite);
    suite.run()
}

/// The proxies between client and server.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Path {
    /// Only the client's proxy, which connects in plaintext.
    Outbound,
    /// Only the server's proxy, which captures the plaintext connection.
    Inbound,
    /// Both proxies, with a tunnel.
    Tunnel,
}

impl Path {
    const ALL: [Self; 3] = [Self::Outbound, Self::Inbound, Self::Tunnel];

    fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound in plaintext",
            Self::Inbound => "inbound in plaintext",
            Self::Tunnel => "tunnel",
        }
    }

    /// The pods of these proxies.
    fn pods(self, scene: &Scene) -> Vec<&Pod> {
        match self {
            Self::Outbound => vec![&scene.client],
            Self::Inbound => vec![&scene.server],
            Self::Tunnel => vec![&scene.client, &scene.server],
        }
    }

    /// The scene with the proxies of this path, the client's first.
    async fn scene(self) -> (Scene, Vec<Proxy>) {
        match self {
            Self::Outbound => {
                let scene = Scene::new().await;
                let mesh = format!("mesh.file={}", scene.empty_mesh().display());
                let proxy = scene.client.proxy(&scene.client_settings().set(&mesh)).await;
                (scene, vec![proxy])
            }
            Self::Inbound => {
                let scene = Scene::new().await;
                let proxy = scene.server.proxy(&scene.server_settings()).await;
                (scene, vec![proxy])
            }
            Self::Tunnel => {
                let (scene, client, server) = Scene::with_proxies().await;
                (scene, vec![client, server])
            }
        }
    }
}

/// Runs every row concurrently, with the client and with the server as the acting side.
async fn table(path: Path, family: Family) {
    LocalSet::new().run_until(all_cells(path, family)).await;
}

async fn all_cells(path: Path, family: Family) {
    let (scene, _proxies) = path.scene().await;
    let scene = Rc::new(scene);
    let rows = TABLE.into_iter().flat_map(|row| [(row, true), (row, false)]);
    let mut cells = Vec::new();
    for (port, ((stage, action, outcome), by_client)) in (APP..).zip(rows) {
        let (scene, to) = (scene.clone(), scene.server.at(family, port));
        let cell =
            spawn_local(async move { run(&scene, to, stage, action, outcome, by_client).await });
        let who = if by_client { "client" } else { "server" };
        cells.push((format!("{stage:?}: the {who}'s {action:?} -> {outcome:?}"), cell));
    }
    let mut wrong = Vec::new();
    for (name, cell) in cells {
        if cell.await.is_err() {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "{} cells are wrong: {wrong:#?}", wrong.len());
}

async fn run(
    scene: &Scene,
    to: SocketAddr,
    stage: Stage,
    action: Action,
    outcome: Outcome,
    by_client: bool,
) {
    let app = scene.server.listen(to.port());
    let (mut client, mut server, _) = scene.client.meet(&app, to).await;
    if stage != Fresh {
        exchange(&mut client, &mut server).await;
    }
    let (mut one, mut other) = if by_client { (client, server) } else { (server, client) };
    match stage {
        OtherEnded => end(&mut other, &mut one).await,
        SelfEnded => end(&mut one, &mut other).await,
        Fresh | Streaming => {}
    }
    let sent =
        if stage == Streaming || (stage == OtherEnded && action != Reset) { BULK_BYTES } else { 0 };
    let mut one = act(one, action, sent, stage, &mut other).await;
    match outcome {
        HalfClosed => {
            let one = one.as_mut().expect("it still reads");
            let (sending, received) =
                tokio::join!(send(&mut other, BULK_BYTES, true), received_slowly(one));
            sending.expect("it may send");
            assert_eq!(received, (BULK_BYTES, End::Fin));
        }
        ResetAfterFin | ResetOnSend => {
            let refused = within("a RST", send_until_error(&mut other)).await;
            assert!(is_reset(&refused), "{refused}");
        }
        Closed => assert!(
            other.take_error().expect("the socket's error can be read").is_none(),
            "nothing comes after FIN"
        ),
        Aborted if stage == SelfEnded => await_socket_error(&other).await,
        Aborted => {}
    }
}

/// Performs the action after sending `sent` bytes, while the other side reads to its end, if an end
/// is expected.
async fn act(
    mut one: TcpStream,
    action: Action,
    sent: usize,
    stage: Stage,
    other: &mut TcpStream,
) -> Option<TcpStream> {
    match (action, stage) {
        (Reset, SelfEnded) => abort(one),
        (_, SelfEnded) => drop(one),
        (Reset, _) => {
            if sent > 0 {
                // Wait until half of the data has arrived, so that the action interrupts the
                // transfer.
                tokio::select! {
                    sending = send(&mut one, sent, false) => sending.expect("it may send"),
                    read = async { other.read_exact(&mut vec![0; sent / 2]).await } => {
                        read.expect("bytes arrive");
                    }
                }
            }
            abort(one);
            assert_eq!(read_to_end(other).await.1, End::Reset);
        }
        (Fin | Close, _) => {
            let acting = async {
                send(&mut one, sent, action == Fin).await.expect("it may send");
                (action == Fin).then_some(one)
            };
            let (one, received) = tokio::join!(acting, received_slowly(other));
            assert_eq!(received, (sent, End::Fin), "every byte, and FIN");
            return one;
        }
    }
    None
}

/// Sends this number of bytes, then FIN if `with_fin`.
async fn send(to: &mut TcpStream, bytes: usize, with_fin: bool) -> io::Result<()> {
    let sending = async {
        to.write_all(&vec![7; bytes]).await?;
        if with_fin { to.shutdown().await } else { Ok(()) }
    };
    within("bytes are sent", sending).await
}

/// Reads in small pieces and yields in between. Returns the number of bytes and the end.
async fn received_slowly(from: &mut TcpStream) -> (usize, End) {
    let mut received = 0;
    let mut piece = [0; 1024];
    loop {
        tokio::task::yield_now().await;
        match within("bytes or an end", from.read(&mut piece)).await {
            Ok(0) => return (received, End::Fin),
            Ok(bytes) => received += bytes,
            Err(error) if is_reset(&error) => return (received, End::Reset),
            Err(error) => unreachable!("the connection ended with neither FIN nor RST: {error}"),
        }
    }
}

/// Sends FIN from `from` and expects it at `to`.
async fn end(from: &mut TcpStream, to: &mut TcpStream) {
    from.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(to).await, (vec![], End::Fin));
}

/// Sends until an error.
async fn send_until_error(from: &mut TcpStream) -> io::Error {
    loop {
        if let Err(error) = from.write_all(&[7; 1024]).await {
            return error;
        }
        tokio::task::yield_now().await;
    }
}

/// Waits for a RST after FIN, which a reader learns only from the socket error (EPIPE, `tcp_reset`
/// in net/ipv4/tcp_input.c).
async fn await_socket_error(stream: &TcpStream) {
    until("the connection breaks", async || {
        let error = SockRef::from(stream).take_error().expect("the socket is asked");
        error.is_some_and(|error| is_reset(&error))
    })
    .await;
}

fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

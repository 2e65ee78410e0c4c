//! How connections end: the table of who does what, in which state, and what the other side sees of it, on every path. FIN stays FIN,
//! RST stays RST, and what is cut is never taken for complete.
//!
//! Not here: the copy loop by itself (the proxy's own tests), deadlines, and what policies cut.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

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
    APP, End, Family, Proxy, Scene, Suite, abort, exchange, read_to_end, until, within,
};

use Does::{Close, Fin, Reset};
use Sees::{Broken, Gone, Over, Refused, Works};
use Stage::{Fresh, OtherEnded, SelfEnded, Streaming};

/// What one side does, and what the other one must see. Each row holds for the client and for the server, on each path.
#[rustfmt::skip]
const TABLE: [(Stage, Does, Sees); 11] = [
    (Fresh,      Fin,   Works),
    (Fresh,      Close, Gone),
    (Fresh,      Reset, Broken),
    (Streaming,  Fin,   Works),
    (Streaming,  Close, Gone),
    (Streaming,  Reset, Broken),
    (OtherEnded, Fin,   Over),
    (OtherEnded, Close, Over),
    (OtherEnded, Reset, Broken),
    (SelfEnded,  Close, Refused),
    (SelfEnded,  Reset, Broken),
];

/// How far the connection has come.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    /// Open; nothing was sent.
    Fresh,
    /// Bytes went both ways, and more are on their way from who acts.
    Streaming,
    /// Bytes went both ways, and who does not act has sent FIN.
    OtherEnded,
    /// Bytes went both ways, and who acts has sent FIN.
    SelfEnded,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Does {
    /// Sends FIN, and goes on reading.
    Fin,
    /// Closes the socket: FIN, and RST for whatever comes after it.
    Close,
    /// Aborts: RST.
    Reset,
}

/// What the other side sees.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Sees {
    /// Every byte and FIN; it can still send, much and to the end.
    Works,
    /// Every byte and FIN; when it sends more, RST.
    Gone,
    /// Every byte and FIN, and then nothing: both have ended.
    Over,
    /// When it sends more, RST.
    Refused,
    /// RST, though it sends nothing.
    Broken,
}

/// More than all buffers between two applications hold while one of them does not read.
const MUCH: usize = 3 << 20;

fn main() -> ExitCode {
    let mut suite = Suite::new();
    for path in Path::ALL {
        suite.test_both(
            &format!("{}: every cell of the table", path.name()),
            async move |family| {
                table(path, family).await;
            },
        );
    }
    pending::add(&mut suite);
    peer::add(&mut suite);
    killed::add(&mut suite);
    wire::add(&mut suite);
    suite.run()
}

/// Which proxies are between client and server.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Path {
    /// The client's, which connects in plain.
    Outbound,
    /// The server's, which caught the connection in plain.
    Inbound,
    /// Both, and a tunnel.
    Tunnel,
}

impl Path {
    const ALL: [Self; 3] = [Self::Outbound, Self::Inbound, Self::Tunnel];

    fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound in plain",
            Self::Inbound => "inbound in plain",
            Self::Tunnel => "tunnel",
        }
    }

    /// The scene, with the proxies of this path: first the client's.
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

/// Every row, with the client and with the server as the one who acts, all at once.
async fn table(path: Path, family: Family) {
    LocalSet::new().run_until(all_cells(path, family)).await;
}

async fn all_cells(path: Path, family: Family) {
    let (scene, _proxies) = path.scene().await;
    let scene = Rc::new(scene);
    let rows = TABLE.into_iter().flat_map(|row| [(row, true), (row, false)]);
    let mut cells = Vec::new();
    for (port, ((stage, does, sees), by_client)) in (APP..).zip(rows) {
        let (scene, to) = (scene.clone(), scene.server.at(family, port));
        let cell = spawn_local(async move { run(&scene, to, stage, does, sees, by_client).await });
        let who = if by_client { "client" } else { "server" };
        cells.push((format!("{stage:?}: the {who}'s {does:?} -> {sees:?}"), cell));
    }
    let mut wrong = Vec::new();
    for (name, cell) in cells {
        if cell.await.is_err() {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "{} cells are wrong: {wrong:#?}", wrong.len());
}

async fn run(scene: &Scene, to: SocketAddr, stage: Stage, does: Does, sees: Sees, by_client: bool) {
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
    let sent = if stage == Streaming || (stage == OtherEnded && does != Reset) { MUCH } else { 0 };
    let mut one = act(one, does, sent, stage, &mut other).await;
    match sees {
        Works => {
            let one = one.as_mut().expect("it still reads");
            let (sending, received) =
                tokio::join!(send(&mut other, MUCH, true), received_slowly(one));
            sending.expect("it may send");
            assert_eq!(received, (MUCH, End::Fin));
        }
        Gone | Refused => {
            let refused = within("a RST", sends_in_vain(&mut other)).await;
            assert!(is_reset(&refused), "{refused}");
        }
        Over => assert!(other.take_error().expect("asked").is_none(), "nothing comes after FIN"),
        Broken if stage == SelfEnded => breaks(&other).await,
        Broken => {}
    }
}

/// One side does it, after it has `sent` that many bytes, while the other one reads to the end that it must see, if there is one to
/// come.
async fn act(
    mut one: TcpStream,
    does: Does,
    sent: usize,
    stage: Stage,
    other: &mut TcpStream,
) -> Option<TcpStream> {
    match (does, stage) {
        (Reset, SelfEnded) => abort(one),
        (_, SelfEnded) => drop(one),
        (Reset, _) => {
            if sent > 0 {
                // Until half of it has arrived, and nothing can be in order any longer.
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
                send(&mut one, sent, does == Fin).await.expect("it may send");
                (does == Fin).then_some(one)
            };
            let (one, received) = tokio::join!(acting, received_slowly(other));
            assert_eq!(received, (sent, End::Fin), "every byte, and FIN");
            return one;
        }
    }
    None
}

/// Sends that many bytes, and FIN if `ends`.
async fn send(to: &mut TcpStream, bytes: usize, ends: bool) -> io::Result<()> {
    let sending = async {
        to.write_all(&vec![7; bytes]).await?;
        if ends { to.shutdown().await } else { Ok(()) }
    };
    within("bytes are sent", sending).await
}

/// Reads in small pieces and lets others go first: how many bytes, and which end.
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

/// FIN from `from`, seen by `to`.
async fn end(from: &mut TcpStream, to: &mut TcpStream) {
    from.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(to).await, (vec![], End::Fin));
}

/// Sends until that is refused.
async fn sends_in_vain(from: &mut TcpStream) -> io::Error {
    loop {
        if let Err(error) = from.write_all(&[7; 1024]).await {
            return error;
        }
        tokio::task::yield_now().await;
    }
}

/// Who has read FIN already learns of a RST by the socket's error (EPIPE, `tcp_reset` in net/ipv4/tcp_input.c).
async fn breaks(stream: &TcpStream) {
    until("the connection breaks", async || {
        let error = SockRef::from(stream).take_error().expect("the socket is asked");
        error.is_some_and(|error| is_reset(&error))
    })
    .await;
}

fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

//! Tests with a scripted tunnel server: the proxy retries only where no data can have been lost.

use h2::Reason;
use h2::server::SendResponse;
use http::{Request, Response, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use underpass_tests::{
    APP, End, Family, HBONE, Listener, Scene, Suite, TlsServer, read_to_end, within,
};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("a stream refused with REFUSED_STREAM is retried once on a new connection", refused);
    suite.test("a stream beyond GOAWAY's last stream is retried once on a new connection", goaway);
    suite.test("a stream that is refused twice fails its connection", refused_twice);
    suite.test("a stream that is reset for another reason is not retried", reset);
    suite.test("a request that is answered with an error is not retried", denied);
    suite.test(
        "small writes to a stalled reader do not close another stream of the tunnel",
        small_writes,
    );
}

type Tunnel = h2::server::Connection<TlsStream<TcpStream>, bytes::Bytes>;

/// The client's pod with its proxy, and a listener in place of the server's proxy.
struct Script {
    scene: Scene,
    listener: Listener,
    server: TlsServer,
    proxy: underpass_tests::Proxy,
}

impl Script {
    async fn new() -> Self {
        Self::with(&[]).await
    }

    async fn with(settings: &[&str]) -> Self {
        let scene = Scene::new().await;
        let listener = scene.server.listen(HBONE);
        let server = TlsServer::new(&scene.server_files);
        let settings = settings.iter().fold(scene.client_settings(), |all, one| all.set(one));
        let proxy = scene.client.proxy(&settings).await;
        Self { scene, listener, server, proxy }
    }

    /// The next tunnel of the proxy.
    async fn tunnel(&self) -> Tunnel {
        let (stream, _) = self.listener.accept().await;
        let stream = self.server.accept(stream).await.expect("a TLS handshake");
        within("a preface", h2::server::handshake(stream)).await.expect("HTTP/2")
    }

    /// Connects as an application, and reads to the end.
    async fn application(&self) -> (Vec<u8>, End) {
        let to = self.scene.app(Family::V4);
        assert_eq!(to.port(), APP);
        let mut stream = self.scene.client.dial(to).await.expect("the proxy accepts");
        read_to_end(&mut stream).await
    }
}

async fn request(tunnel: &mut Tunnel) -> (Request<h2::RecvStream>, SendResponse<bytes::Bytes>) {
    let accepted = within("a request", tunnel.accept()).await;
    accepted.expect("a request before the end").expect("HTTP/2")
}

/// Answers a request with 200 and `served`, and runs the tunnel until the client ends it.
async fn serve(mut tunnel: Tunnel) {
    let (request, mut respond) = request(&mut tunnel).await;
    let mut stream = respond.send_response(Response::new(()), false).expect("an answer");
    stream.send_data("served".into(), true).expect("data");
    drop((request, stream));
    while tunnel.accept().await.is_some() {}
}

async fn refused() {
    let script = Script::new().await;
    let server = async {
        let mut first = script.tunnel().await;
        let (_request, mut respond) = request(&mut first).await;
        respond.send_reset(Reason::REFUSED_STREAM);
        tokio::join!(async { while first.accept().await.is_some() {} }, async {
            serve(script.tunnel().await).await;
        });
    };
    tokio::select! {
        answered = script.application() => assert_eq!(answered, (b"served".to_vec(), End::Fin)),
        () = server => unreachable!("the proxy ended its tunnels"),
    }
}

async fn goaway() {
    let script = Script::new().await;
    let server = async {
        let mut first = script.tunnel().await;
        // No stream was accepted: the last stream id is 0.
        first.abrupt_shutdown(Reason::NO_ERROR);
        tokio::join!(async { while first.accept().await.is_some() {} }, async {
            serve(script.tunnel().await).await;
        });
    };
    tokio::select! {
        answered = script.application() => assert_eq!(answered, (b"served".to_vec(), End::Fin)),
        () = server => unreachable!("the proxy ended its tunnels"),
    }
}

async fn refused_twice() {
    let mut script = Script::new().await;
    let refuse = async || {
        let mut tunnel = script.tunnel().await;
        let (_request, mut respond) = request(&mut tunnel).await;
        respond.send_reset(Reason::REFUSED_STREAM);
        while tunnel.accept().await.is_some() {}
    };
    tokio::select! {
        (_, end) = script.application() => assert_eq!(end, End::Reset),
        _ = async { tokio::join!(refuse(), refuse()) } => unreachable!("the proxy ended its tunnels"),
    }
    assert!(!script.listener.is_reached(), "a third attempt was made");
    script.proxy.line(&["connection failed", "reason=\"reset\""]).await;
}

async fn reset() {
    assert_not_retried(|respond| respond.send_reset(Reason::INTERNAL_ERROR), "reset").await;
}

async fn denied() {
    let deny = |respond: &mut SendResponse<bytes::Bytes>| {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::UNAUTHORIZED;
        respond.send_response(response, true).expect("an answer");
    };
    assert_not_retried(deny, "refused").await;
}

async fn assert_not_retried(answer: impl FnOnce(&mut SendResponse<bytes::Bytes>), reason: &str) {
    let mut script = Script::new().await;
    let server = async {
        let mut tunnel = script.tunnel().await;
        let (_request, mut respond) = request(&mut tunnel).await;
        answer(&mut respond);
        while tunnel.accept().await.is_some() {}
    };
    tokio::select! {
        (_, end) = script.application() => assert_eq!(end, End::Reset),
        () = server => unreachable!("the proxy ended its tunnels"),
    }
    assert!(!script.listener.is_reached(), "a second attempt was made");
    script.proxy.line(&["connection failed", &format!("reason=\"{reason}\"")]).await;
}

/// A server with the defaults of h2 0.4.17 that does not read its first stream until the end.
async fn small_writes() {
    const BYTES: usize = 600;
    // Both connections share one tunnel.
    let script = Script::with(&["proxy.workers=1"]).await;
    let (all_written, mut is_all_written) = tokio::sync::mpsc::channel::<()>(1);
    let first_has_arrived = tokio::sync::Notify::new();
    let server = async {
        let (stream, _) = script.listener.accept().await;
        let stream = script.server.accept(stream).await.expect("a TLS handshake");
        let mut builder = h2::server::Builder::new();
        let handshake = builder.data_frame_budget(25_600).handshake(stream);
        let mut tunnel: Tunnel = within("a preface", handshake).await.expect("HTTP/2");
        let (stalled, mut answer) = request(&mut tunnel).await;
        let _stalled = answer.send_response(Response::new(()), false).expect("an answer");
        first_has_arrived.notify_one();
        let (neighbour, mut answer) = request(&mut tunnel).await;
        let mut echo = answer.send_response(Response::new(()), false).expect("an answer");
        let (mut neighbour, mut stalled) = (neighbour.into_body(), stalled.into_body());
        let echoing = async {
            while let Some(Ok(chunk)) = neighbour.data().await {
                echo.send_data(chunk, false).expect("an echo");
            }
        };
        let reading = async {
            is_all_written.recv().await;
            let mut read = 0;
            while read < BYTES {
                read += stalled.data().await.expect("data").expect("data").len();
            }
            read
        };
        tokio::select! {
            read = reading => read,
            () = echoing => unreachable!("the neighbour was closed"),
            () = async { while let Some(Ok(_)) = tunnel.accept().await {} } => unreachable!("the tunnel ended"),
        }
    };
    let applications = async {
        let to = script.scene.app(Family::V4);
        let mut stalled = script.scene.client.dial(to).await.expect("the proxy accepts");
        stalled.set_nodelay(true).expect("an option");
        stalled.write_u8(0).await.expect("it is open");
        within("its request", first_has_arrived.notified()).await;
        let mut neighbour = script.scene.client.dial(to).await.expect("the proxy accepts");
        for _ in 1..BYTES {
            stalled.write_u8(0).await.expect("it is open");
            // The echo arrives after the proxy has read the byte before it.
            neighbour.write_u8(7).await.expect("it is open");
            assert_eq!(within("an echo", neighbour.read_u8()).await.expect("an echo"), 7);
        }
        all_written.send(()).await.expect("the server waits");
        std::future::pending::<()>().await;
    };
    tokio::select! {
        read = within("all that was written", server) => assert_eq!(read, BYTES),
        () = applications => {}
    }
}

//! A server of tunnels that is not ours, and does what the script says: the proxy tries again where nothing was lost, and
//! nowhere else.

use h2::Reason;
use h2::server::SendResponse;
use http::{Request, Response, StatusCode};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use underpass_tests::{
    APP, End, Family, HBONE, Listener, Scene, Suite, TlsServer, read_to_end, within,
};

pub(crate) fn add(suite: &mut Suite) {
    suite.test("a stream that is refused unseen is tried once more on a new connection", refused);
    suite
        .test("a stream that GOAWAY leaves out is tried once more on a new connection", going_away);
    suite.test("what is refused twice fails", refused_twice);
    suite.test("a stream that is reset otherwise is not tried again", reset);
    suite.test("a request that is answered with an error is not tried again", denied);
}

type Tunnel = h2::server::Connection<TlsStream<TcpStream>, bytes::Bytes>;

/// The client's pod with its proxy, and instead of the server's proxy a listener.
struct Script {
    scene: Scene,
    listener: Listener,
    server: TlsServer,
    proxy: underpass_tests::Proxy,
}

impl Script {
    async fn new() -> Self {
        let scene = Scene::new().await;
        let listener = scene.server.listen(HBONE);
        let server = TlsServer::new(&scene.server_files);
        let proxy = scene.client.proxy(&scene.client_settings()).await;
        Self { scene, listener, server, proxy }
    }

    /// The next connection of the proxy.
    async fn tunnel(&self) -> Tunnel {
        let (stream, _) = self.listener.accept().await;
        let stream = self.server.accept(stream).await.expect("a TLS handshake");
        within("a preface", h2::server::handshake(stream)).await.expect("HTTP/2")
    }

    /// An application connects, and reads to the end.
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

/// Answers a request with 200 and `served`, and drives the tunnel until the client ends it.
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

async fn going_away() {
    let script = Script::new().await;
    let server = async {
        let mut first = script.tunnel().await;
        // Nothing was accepted: the last stream is 0.
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
    assert!(!script.listener.is_reached(), "it was tried a third time");
    script.proxy.line(&["connection failed", "reason=\"reset\""]).await;
}

async fn reset() {
    not_tried_again(|respond| respond.send_reset(Reason::INTERNAL_ERROR), "reset").await;
}

async fn denied() {
    let deny = |respond: &mut SendResponse<bytes::Bytes>| {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::UNAUTHORIZED;
        respond.send_response(response, true).expect("an answer");
    };
    not_tried_again(deny, "refused").await;
}

async fn not_tried_again(answer: impl FnOnce(&mut SendResponse<bytes::Bytes>), reason: &str) {
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
    assert!(!script.listener.is_reached(), "it was tried again");
    script.proxy.line(&["connection failed", &format!("reason=\"{reason}\"")]).await;
}

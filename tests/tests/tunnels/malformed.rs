//! Tests of malformed input from a peer: it ends that peer's connection and affects no other.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use underpass_tests::{
    APP, Dial, Family, HBONE, Scene, Server, Suite, TlsClient, exchange, within,
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

// Frame types of RFC 9113 section 6.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_HEADERS: u8 = 4;

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("malformed frames and headers do not affect other connections", others_unaffected);
    suite.test("malformed requests of an authenticated peer are logged", malformed_requests_logged);
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a small frame").to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A literal header field without indexing (RFC 7541 section 6.2.2).
fn field(name: &str, value: &[u8]) -> Vec<u8> {
    let length = |length: usize| u8::try_from(length).expect("a short text");
    let mut field = vec![0, length(name.len())];
    field.extend(name.as_bytes());
    field.push(length(value.len()));
    field.extend(value);
    field
}

fn request(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let fields: Vec<u8> = fields.iter().flat_map(|(name, value)| field(name, value)).collect();
    frame(HEADERS, END_HEADERS, 1, &fields)
}

/// Data after the preface, each on a separate connection.
fn malformed_inputs(app: &str) -> Vec<(&'static str, Vec<u8>)> {
    let connect: &[(&str, &[u8])] = &[(":method", b"CONNECT"), (":authority", app.as_bytes())];
    let with = |name, value| request(&[connect, &[(name, value)]].concat());
    let panicking = [b"00-".as_slice(), &[b'0'; 52]].concat();
    vec![
        ("a frame larger than allowed", [&[0xff, 0xff, 0xff, DATA, 0][..], &[0; 4]].concat()),
        ("a frame of an unknown kind", frame(0xee, 0xff, 7, b"?")),
        ("DATA on stream 0", frame(DATA, 0, 0, b"?")),
        ("DATA on an idle stream", frame(DATA, 0, 9, b"?")),
        ("HEADERS on stream 0", frame(HEADERS, END_HEADERS, 0, &[])),
        ("HEADERS on an even stream", frame(HEADERS, END_HEADERS, 2, &[])),
        ("HEADERS that are no HPACK", frame(HEADERS, END_HEADERS, 1, &[0xff; 40])),
        (
            "a HPACK table that is too large",
            frame(HEADERS, END_HEADERS, 1, &[0x3f, 0xff, 0xff, 0x7f]),
        ),
        ("CONTINUATION without HEADERS", frame(CONTINUATION, END_HEADERS, 1, &[])),
        (
            "HEADERS that never end",
            [frame(HEADERS, 0, 1, &[]), frame(PING, 0, 0, &[0; 8])].concat(),
        ),
        ("PUSH_PROMISE by a client", frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2])),
        ("RST_STREAM of an idle stream", frame(RST_STREAM, 0, 5, &[0; 4])),
        ("a short RST_STREAM", frame(RST_STREAM, 0, 1, &[0])),
        ("PRIORITY on itself", frame(PRIORITY, 0, 1, &[0, 0, 0, 1, 0])),
        ("a short PING", frame(PING, 0, 0, &[0])),
        ("WINDOW_UPDATE of 0", frame(WINDOW_UPDATE, 0, 0, &[0; 4])),
        ("WINDOW_UPDATE beyond the maximum", frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff])),
        ("a short GOAWAY", frame(GOAWAY, 0, 0, &[0])),
        ("SETTINGS of half a setting", frame(4, 0, 0, &[0; 3])),
        ("no method", request(&[(":authority", app.as_bytes())])),
        (
            "GET",
            request(&[
                (":method", b"GET"),
                (":scheme", b"https"),
                (":path", b"/"),
                (":authority", app.as_bytes()),
            ]),
        ),
        ("CONNECT without an authority", request(&[(":method", b"CONNECT")])),
        ("CONNECT with a path", with(":path", b"/")),
        (
            "CONNECT to a name without a port",
            request(&[(":method", b"CONNECT"), (":authority", b"example")]),
        ),
        (
            "CONNECT to an authority that is not text",
            request(&[(":method", b"CONNECT"), (":authority", b"\xff\xfe\x00")]),
        ),
        ("a header in upper case", with("Baggage", b"a=b")),
        ("a traceparent that makes other parsers panic", with("traceparent", &panicking)),
        ("a traceparent that is not text", with("traceparent", b"\xff\xff\xff")),
        ("baggage that is not text", with("baggage", b"=,;=;,k8s.\xff=%zz%")),
        ("a forwarded header without an end", with("forwarded", b"for=\"[::1")),
    ]
}

async fn others_unaffected() {
    let (scene, mut client, mut server) = Scene::with_proxies().await;
    let app = scene.server.listen(APP);
    let (mut near, mut far, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    let rogue = TlsClient::new(Some(&scene.pki.issue("rogue")));
    let hbone = scene.server.at(Family::V4, HBONE);
    let target = scene.app(Family::V4).to_string();
    let no_preface = (b"GET / HTTP/1.1\r\n\r\n".repeat(4), "no preface");
    let malformed_inputs = malformed_inputs(&target).into_iter();
    let malformed_inputs =
        malformed_inputs.map(|(what, bytes)| ([PREFACE, SETTINGS, &bytes].concat(), what));
    for (bytes, what) in malformed_inputs.chain([no_preface]) {
        // With the proxy's mark, because the pod's other connections are captured.
        let marked = Dial { mark: Some(0x539), ..Dial::default() };
        let stream = scene.client.dial_as(hbone, marked).await.expect("it listens");
        let mut tunnel = rogue.connect(stream).await.expect("a handshake");
        within(what, tunnel.write_all(&bytes)).await.expect("the bytes are sent");
        // The server's preface, its answer, or its end shows that it has read the data.
        let _answer = within(what, tunnel.read(&mut [0; 4096])).await;
        drop(tunnel);
        exchange(&mut near, &mut far).await;
    }
    drop((near, far, app));
    let _app = Server::echo(&scene.server, APP);
    scene.echoed().await;
    for proxy in [&mut client, &mut server] {
        assert_eq!(proxy.count(&["panicked"]), 0, "{}", proxy.log());
    }
}

async fn malformed_requests_logged() {
    let scene = Scene::new().await;
    let mut server = scene.server.proxy(&scene.server_settings()).await;
    let rogue = TlsClient::new(Some(&scene.pki.issue("rogue")));
    let peer = "peer=spiffe://cluster.local/ns/default/sa/rogue";
    let target = scene.app(Family::V4).to_string();
    let refused = "malformed request answered with 400";
    let lines = [
        ("GET", [refused, "method=GET", "the method is not CONNECT"]),
        ("CONNECT to a name without a port", [refused, "authority=example", "NAME:PORT"]),
        (
            "HEADERS on stream 0",
            ["tunnel failed: HTTP/2 protocol violation", "error=", "protocol error"],
        ),
    ];
    let malformed_inputs = malformed_inputs(&target);
    for (what, parts) in lines {
        let (_, bytes) = malformed_inputs.iter().find(|(name, _)| *name == what).expect("an input");
        let stream = scene.client.dial(scene.server.at(Family::V4, HBONE)).await;
        let mut tunnel = rogue.connect(stream.expect("it listens")).await.expect("a handshake");
        let bytes = [PREFACE, SETTINGS, bytes].concat();
        within(what, tunnel.write_all(&bytes)).await.expect("the bytes are sent");
        server.line(&[&parts[..], &[peer]].concat()).await;
    }
}

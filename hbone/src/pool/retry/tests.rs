//! Tests of the retry decision. The peer is scripted frame by frame, so that all errors come from
//! h2.

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;
use crate::testing::{Mesh, SECOND};

const PREFACE: usize = 24;
const HEADERS: u8 = 1;
const EMPTY_SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
/// A DATA frame on stream 0, which RFC 9113 section 6.1 forbids.
const VIOLATION: [u8; 9] = [0; 9];

fn go_away(last_stream: u8, reason: Reason) -> Vec<u8> {
    let mut frame = vec![0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, last_stream];
    frame.extend(u32::from(reason).to_be_bytes());
    frame
}

fn rst_stream(reason: Reason) -> Vec<u8> {
    let mut frame = vec![0, 0, 4, 3, 0, 0, 0, 0, 1];
    frame.extend(u32::from(reason).to_be_bytes());
    frame
}

async fn connect() -> (SendRequest<Bytes>, DuplexStream) {
    let (near, mut far) = duplex(64 << 10);
    far.write_all(&EMPTY_SETTINGS).await.unwrap();
    let (send, connection) = h2::client::handshake(near).await.unwrap();
    tokio::spawn(connection);
    far.read_exact(&mut [0; PREFACE]).await.unwrap();
    (send, far)
}

fn request() -> Request<()> {
    let connect = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80");
    connect.body(()).unwrap()
}

async fn receive_request(far: &mut DuplexStream) {
    loop {
        let mut head = [0; 9];
        far.read_exact(&mut head).await.unwrap();
        let mut payload = vec![0; usize::from(head[2])];
        far.read_exact(&mut payload).await.unwrap();
        if head[3] == HEADERS {
            return;
        }
    }
}

/// Converts an error of h2 as a tunnel does.
async fn reported(error: h2::Error) -> HboneError {
    let (tunnel, _server) = Mesh::new().tunnel().await;
    tunnel.tunnel_state().stream_error(error)
}

/// The error of a request if the peer answers with `reply` and closes the connection.
async fn error_of_a_request_in_flight(reply: &[u8]) -> HboneError {
    let (mut send, mut far) = connect().await;
    let (response, _stream) = send.send_request(request(), false).unwrap();
    receive_request(&mut far).await;
    far.write_all(reply).await.unwrap();
    drop(far);
    reported(response.await.unwrap_err()).await
}

/// The errors after GOAWAY arrived: of sending a request, and of waiting until one may be sent.
async fn errors_after_go_away(reason: Reason) -> [HboneError; 2] {
    let (mut send, mut far) = connect().await;
    let (response, _stream) = send.send_request(request(), false).unwrap();
    receive_request(&mut far).await;
    far.write_all(&go_away(0, reason)).await.unwrap();
    response.await.unwrap_err();
    let unsent = send.send_request(request(), false).unwrap_err();
    let unready = send.ready().await.unwrap_err();
    [reported(unsent).await, reported(unready).await]
}

fn retryable(error: &HboneError) -> [bool; 2] {
    [false, true].map(|pooled| is_retryable(error, pooled))
}

const ALWAYS: [bool; 2] = [true, true];
const IF_POOLED: [bool; 2] = [false, true];
const NEVER: [bool; 2] = [false, false];

#[tokio::test]
async fn retries_request_above_last_stream_of_goaway_with_any_code() {
    for reason in [Reason::NO_ERROR, Reason::ENHANCE_YOUR_CALM, Reason::INTERNAL_ERROR] {
        let error = error_of_a_request_in_flight(&go_away(0, reason)).await;
        assert_eq!(retryable(&error), ALWAYS, "{error:?}");
    }
}

#[tokio::test]
async fn retries_request_not_sent_because_of_goaway() {
    for reason in [Reason::NO_ERROR, Reason::ENHANCE_YOUR_CALM] {
        for error in errors_after_go_away(reason).await {
            assert_eq!(retryable(&error), ALWAYS, "{error:?}");
        }
    }
}

#[tokio::test]
async fn request_below_last_stream_of_goaway_is_lost_with_connection() {
    for reason in [Reason::NO_ERROR, Reason::INTERNAL_ERROR] {
        let error = error_of_a_request_in_flight(&go_away(1, reason)).await;
        assert_eq!(retryable(&error), IF_POOLED, "{error:?}");
    }
}

#[tokio::test]
async fn retries_only_refused_stream_of_all_rst_stream_codes() {
    let error = error_of_a_request_in_flight(&rst_stream(Reason::REFUSED_STREAM)).await;
    assert_eq!(retryable(&error), ALWAYS, "{error:?}");
    for code in (0..=0xd).filter(|code| *code != u32::from(Reason::REFUSED_STREAM)) {
        let error = error_of_a_request_in_flight(&rst_stream(code.into())).await;
        assert!(matches!(error, HboneError::Reset { .. }), "{error:?}");
        assert_eq!(retryable(&error), NEVER, "{error:?}");
    }
}

#[tokio::test]
async fn retries_request_lost_with_pooled_connection() {
    for last_bytes in [&[][..], &VIOLATION] {
        let error = error_of_a_request_in_flight(last_bytes).await;
        assert!(matches!(error, HboneError::Lost { .. }), "{error:?}");
        assert_eq!(retryable(&error), IF_POOLED, "{error:?}");
    }
    let gone = [HboneError::Lost { source: None }, HboneError::Unresponsive { silent: SECOND }];
    for error in gone {
        assert_eq!(retryable(&error), IF_POOLED, "{error:?}");
    }
}

#[test]
fn answer_timeout_and_failed_handshake_are_not_retried() {
    let address = ([10, 0, 0, 1], 15008).into();
    let refused = std::sync::Arc::new(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
    let last = std::sync::Arc::new(HboneError::Lost { source: None });
    for error in [
        HboneError::Refused { status: StatusCode::SERVICE_UNAVAILABLE },
        HboneError::ReplyTimeout { after: SECOND },
        HboneError::HandshakeTimeout { after: SECOND },
        HboneError::Dial { address, source: refused },
        HboneError::BackingOff { address, remaining: SECOND, source: last },
        HboneError::CertificateRefused { alert: "bad_certificate".to_owned() },
        HboneError::InvalidAuthority { authority: "".into() },
    ] {
        assert_eq!(retryable(&error), NEVER, "{error:?}");
    }
}

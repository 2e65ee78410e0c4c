//! Tests of clients that exceed the limits of a tunnel.

use h2::Reason;
use tokio::time::Instant;

use super::*;
use crate::testing::frames::{
    DATA, END_HEADERS, GOAWAY, HEADERS, PING, RST_STREAM, RawClient, SETTINGS, connect, frame, head,
};

const FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends SETTINGS and `bytes` to a server, and waits until it closes the tunnel. Returns the
/// exceeded limit, the error code of GOAWAY, and the elapsed time.
async fn send_and_await_close(bytes: &[u8]) -> (Option<TunnelLimit>, Option<u32>, Duration) {
    let (mut client, mut server) =
        RawClient::new_with_settings_sent(ServerSettings::default()).await;
    let start = Instant::now();
    client.send(bytes).await;
    assert!(timeout(HOUR, server.next()).await.unwrap().is_none());
    let (limit, duration) = (server.exceeded(), start.elapsed());
    drop(server);
    (limit, client.goaway().await, duration)
}

#[tokio::test(start_paused = true)]
async fn endless_header_block_of_client_closes_tunnel() {
    let enhance_your_calm = Some(u32::from(Reason::ENHANCE_YOUR_CALM));
    for bytes in [
        frame(HEADERS, 0, 1, &[]),
        frame(HEADERS, 0, 1, &vec![0; 60 << 10]),
        frame(HEADERS, END_HEADERS, 1, &[0; 9])[..10].to_vec(),
        frame(SETTINGS, 0, 0, &[0; 6])[..12].to_vec(),
        frame(PING, 0, 0, &[0; 8])[..5].to_vec(),
        // DATA on an unknown stream. h2 detects it only in a complete frame.
        [head(256 << 10, DATA, 0, 1), vec![0; 200 << 10]].concat(),
    ] {
        let (limit, code, duration) = send_and_await_close(&bytes).await;
        assert_eq!((limit, code), (Some(TunnelLimit::UnfinishedFrame), enhance_your_calm));
        assert!(duration >= FRAME_TIMEOUT && duration < FRAME_TIMEOUT + SECOND, "{duration:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn oversized_frame_closes_tunnel_at_once() {
    let enhance_your_calm = Some(u32::from(Reason::ENHANCE_YOUR_CALM));
    let too_large = Some(u32::from(Reason::FRAME_SIZE_ERROR));
    let continued = |length| {
        let (first, second) = (frame(HEADERS, 0, 1, &[0x41; 60 << 10]), head(length, 9, 0, 1));
        [first, second].concat()
    };
    for (bytes, limit, code) in [
        (head(256 << 10, HEADERS, 0, 1), TunnelLimit::HeaderBlock, enhance_your_calm),
        (continued(5 << 10), TunnelLimit::HeaderBlock, enhance_your_calm),
        (head(17 << 10, PING, 0, 0), TunnelLimit::FrameSize, too_large),
        (head(17 << 10, 0xee, 0, 0), TunnelLimit::FrameSize, too_large),
    ] {
        assert_eq!(send_and_await_close(&bytes).await, (Some(limit), code, Duration::ZERO));
    }
}

#[tokio::test(start_paused = true)]
async fn tunnel_without_settings_frame_is_closed() {
    let (_client, mut server) = RawClient::new(ServerSettings::default()).await;
    let start = Instant::now();
    assert!(timeout(HOUR, server.next()).await.unwrap().is_none());
    assert_eq!(server.exceeded(), Some(TunnelLimit::UnfinishedFrame));
    assert!(start.elapsed() < FRAME_TIMEOUT + SECOND);
}

#[tokio::test(start_paused = true)]
async fn flood_of_control_frames_closes_tunnel() {
    let pings = frame(PING, 0, 0, &[0; 8]).repeat(3000);
    let resets: Vec<u8> = (0..3000)
        .flat_map(|index| {
            let stream = 2 * index + 1;
            [connect(stream), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()
        })
        .collect();
    for flood in [pings, resets] {
        let (mut client, mut server) =
            RawClient::new_with_settings_sent(ServerSettings::default()).await;
        let serve = async { while server.next().await.is_some() {} };
        let send = async {
            let _cut = client.try_send(&flood).await;
            client.goaway().await
        };
        let (code, ()) = tokio::join!(send, serve);
        assert!(code.is_some());
        // h2 may detect the flood first.
        assert!(matches!(server.exceeded(), None | Some(TunnelLimit::FrameRate)));
    }
}

#[tokio::test(start_paused = true)]
async fn drains_and_then_closes_tunnel_with_too_many_refused_requests() {
    let (mut client, mut server) =
        RawClient::new_with_settings_sent(ServerSettings::default()).await;
    let serve = async {
        let mut refused = 0;
        while let Some(request) = server.next().await {
            request.refuse(StatusCode::UNAUTHORIZED);
            refused += 1;
        }
        (refused, server.exceeded())
    };
    let flood = async {
        let mut goaways = 0;
        for stream in (1..20_000).step_by(2) {
            let sent = client.try_send(&connect(stream)).await;
            let frames = client.receive(sent.then_some(HEADERS)).await;
            goaways += frames.iter().filter(|(kind, ..)| *kind == GOAWAY).count();
            if frames.last().is_none_or(|(kind, ..)| *kind != HEADERS) {
                return goaways;
            }
        }
        panic!("the tunnel did not end");
    };
    let (goaways, (refused, limit)) = tokio::join!(flood, serve);
    assert_eq!(limit, Some(TunnelLimit::RefusedRequests));
    // A thousand requests before GOAWAY, and a thousand after it. A correct client sends none after
    // it.
    assert!((2000..2010).contains(&refused), "{refused}");
    assert_eq!(goaways, 2);
}

#[tokio::test(start_paused = true)]
async fn tolerates_occasional_refused_requests() {
    let (mut client, mut server) =
        RawClient::new_with_settings_sent(ServerSettings::default()).await;
    let serve = async {
        while let Some(request) = server.next().await {
            request.refuse(StatusCode::UNAUTHORIZED);
        }
        panic!("the tunnel ended");
    };
    let ask = async {
        for stream in (1..6_000).step_by(2) {
            client.send(&connect(stream)).await;
            let frames = client.receive(Some(HEADERS)).await;
            assert!(frames.iter().all(|(kind, ..)| *kind != GOAWAY));
            sleep(SECOND / 19).await;
        }
    };
    tokio::select! {
        () = ask => {}
        () = serve => unreachable!(),
    }
}

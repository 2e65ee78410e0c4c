//! Tests of the ends of connections, of bulk in both directions, and that no packet of a tunnel is
//! sent.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use underpass_interception::TcpSegment;
use underpass_tests::{
    APP, End, Family, HBONE, Suite, abort, carry, exchange, read_to_end, within,
};

use crate::scene::Scene;

/// More than the bytes after which a connection is spliced.
const BULK: usize = 16 << 20;

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("an abort arrives as an abort, and a half-closed connection continues", ends);
    suite.test_both("bulk arrives whole, and no packet crosses the wire", bulk);
}

async fn ends() {
    let scene = Scene::new().await;
    let app = scene.b.listen(APP);
    let served = scene.valid_node("direct").await;
    let to = scene.b.at(Family::V4, APP);

    let (client, mut server, _) = scene.a.meet(&app, to).await;
    abort(client);
    assert_eq!(read_to_end(&mut server).await.1, End::Reset);
    let (mut client, server, _) = scene.a.meet(&app, to).await;
    abort(server);
    assert_eq!(read_to_end(&mut client).await.1, End::Reset);

    let (mut client, mut server, _) = scene.a.meet(&app, to).await;
    client.shutdown().await.expect("an end");
    assert_eq!(read_to_end(&mut server).await, (vec![], End::Fin));
    carry(&mut server, &mut client, b"still here").await;
    server.shutdown().await.expect("an end");
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Fin));
    assert!(served.direct_connections() >= 3);
    served.stop().await;
}

async fn bulk(family: Family) {
    let scene = Scene::new().await;
    let app = scene.b.listen(APP);
    let served = scene.valid_node("direct").await;
    let mut captures = [scene.a.capture(), scene.b.capture()];
    let (mut client, mut server, peer) = scene.a.meet(&app, scene.b.at(family, APP)).await;
    assert_eq!(peer.ip(), scene.a.ip(family));
    exchange(&mut client, &mut server).await;
    let data: Vec<u8> = (0..BULK).map(|n| (n % 251).to_le_bytes()[0]).collect();
    for to_server in [true, false] {
        let (from, to) =
            if to_server { (&mut client, &mut server) } else { (&mut server, &mut client) };
        let mut received = vec![0; BULK];
        let (sent, read) = tokio::join!(
            within("bulk is sent", from.write_all(&data)),
            within("bulk arrives", to.read_exact(&mut received))
        );
        sent.expect("sent");
        read.expect("received");
        assert!(received == data);
    }
    for capture in &mut captures {
        let frames = capture.drain().expect("captured");
        let segments = frames.iter().filter_map(|frame| TcpSegment::parse(frame));
        let ports = segments.map(|segment| [segment.source.port(), segment.destination.port()]);
        let seen: Vec<_> =
            ports.filter(|ports| ports.contains(&HBONE) || ports.contains(&APP)).collect();
        assert!(seen.is_empty(), "{seen:?}");
    }
    served.stop().await;
}

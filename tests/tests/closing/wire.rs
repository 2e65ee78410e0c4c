//! Tests of the segments of a clean end: one FIN in each direction and no RST.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use tokio::io::AsyncWriteExt as _;
use underpass_interception::{PacketCapture, TcpSegment};
use underpass_tests::{APP, End, Family, Suite, exchange, read_to_end, until};

use crate::Path;

pub(crate) fn add_tests(suite: &mut Suite) {
    for path in Path::ALL {
        let name =
            format!("{}: an orderly end sends one FIN in each direction and no RST", path.name());
        suite.test_both(&name, async move |family| clean_end(path, family).await);
    }
}

/// TCP flags (RFC 9293 section 3.1).
const FIN: u8 = 0b001;
const RST: u8 = 0b100;

/// The source, destination and sequence number of segments. A set, because duplicates are expected:
/// loopback shows each segment twice, and lost ones are retransmitted.
type Segments = BTreeSet<(SocketAddr, SocketAddr, u32)>;

#[derive(Debug, Default)]
struct Ends {
    fins: Segments,
    resets: Segments,
}

impl Ends {
    /// Adds the captured segments of connections to the application's port.
    fn add(&mut self, wire: &mut PacketCapture) {
        for frame in wire.drain().expect("the capture is read") {
            let Some((segment, flags, sequence)) = read(&frame) else { continue };
            let id = (segment.source, segment.destination, sequence);
            if ![id.0.port(), id.1.port()].contains(&APP) {
                continue;
            }
            if flags & FIN != 0 {
                self.fins.insert(id);
            }
            if flags & RST != 0 {
                self.resets.insert(id);
            }
        }
    }
}

fn read(frame: &[u8]) -> Option<(TcpSegment<'_>, u8, u32)> {
    let segment = TcpSegment::parse(frame)?;
    let ip = frame.get(14..)?;
    let header = match segment.source {
        // RFC 791 section 3.1: the header length in 32-bit words.
        SocketAddr::V4(_) => usize::from(ip.first()? & 0xf) * 4,
        SocketAddr::V6(_) => 40,
    };
    let tcp = ip.get(header..)?;
    let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
    Some((segment, *tcp.get(13)?, sequence))
}

async fn clean_end(path: Path, family: Family) {
    let (scene, _proxies) = path.scene().await;
    let app = scene.server.listen(APP);
    // The interface that carries plaintext: the link between the pods for an outbound connection,
    // loopback for the others.
    let wire = || PacketCapture::open(if path == Path::Outbound { "eth0" } else { "lo" });
    let mut wire = scene.server.run(wire).expect("packets are captured");
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(family)).await;
    exchange(&mut client, &mut server).await;
    client.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut server).await, (vec![], End::Fin));
    server.shutdown().await.expect("FIN is sent");
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Fin));
    drop((client, server));
    let mut ends = Ends::default();
    until("both ends are on the wire", async || {
        ends.add(&mut wire);
        ends.fins.len() >= 2
    })
    .await;
    // Later segments of the connection would appear before those of the next connection.
    let (mut next, mut next_server, _) = scene.client.meet(&app, scene.app(family)).await;
    exchange(&mut next, &mut next_server).await;
    ends.add(&mut wire);
    assert_eq!(ends.fins.len(), 2, "{ends:?}");
    assert!(ends.resets.is_empty(), "{ends:?}");
}

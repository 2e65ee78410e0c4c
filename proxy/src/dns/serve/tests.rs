//! Tests of the framing over TCP.

use std::io::ErrorKind;

use tokio::io::duplex;

use super::*;

fn framed(messages: &[&[u8]]) -> Vec<u8> {
    let frame = |message: &&[u8]| {
        let length = u16::try_from(message.len()).unwrap();
        [&length.to_be_bytes(), *message].concat()
    };
    messages.iter().flat_map(frame).collect()
}

#[tokio::test(start_paused = true)]
async fn messages_are_found_in_any_pieces() {
    let bytes = framed(&[b"first", b"", b"third"]);
    for piece in 1..bytes.len() {
        let (mut client, mut server) = duplex(64);
        let send = async {
            for part in bytes.chunks(piece) {
                client.write_all(part).await.unwrap();
                tokio::task::yield_now().await;
            }
            drop(client);
        };
        let receive = async {
            let (mut received, mut messages) = (BytesMut::new(), Vec::new());
            while let Some(message) = next_message(&mut server, &mut received).await.unwrap() {
                messages.push(message);
            }
            messages
        };
        let ((), messages) = tokio::join!(send, receive);
        assert_eq!(messages, [&b"first"[..], b"", b"third"], "{piece}");
    }
}

#[tokio::test(start_paused = true)]
async fn long_messages_and_idle_clients_end_the_connection() {
    let (mut client, mut server) = duplex(64);
    client.write_all(&[0xff, 0xff]).await.unwrap();
    let error = next_message(&mut server, &mut BytesMut::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);

    let (mut client, mut server) = duplex(64);
    client.write_all(&[0, 5, b'h', b'a']).await.unwrap();
    let began = tokio::time::Instant::now();
    assert_eq!(next_message(&mut server, &mut BytesMut::new()).await.unwrap(), None);
    assert_eq!(began.elapsed(), IDLE_TIMEOUT);
}

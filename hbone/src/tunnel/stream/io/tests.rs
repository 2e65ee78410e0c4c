//! Tests of a tunnelled stream with tokio's I/O traits: ends, errors and back-pressure.
//! `pool::gateway` tests tunnels inside of it.

use h2::Reason;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use super::*;
use crate::testing::{Mesh, SECOND};
use crate::tunnel::settings::{ClientSettings, Http2Settings, ServerSettings};

#[tokio::test]
async fn shutdown_ends_one_direction_and_keeps_the_other() {
    let (near, far, tunnel, _served) = Mesh::new().stream().await;
    let (mut near, mut far) = (near.into_io(), far.into_io());
    near.write_all(b"request").await.unwrap();
    near.shutdown().await.unwrap();
    let mut request = String::new();
    far.read_to_string(&mut request).await.unwrap();
    assert_eq!(request, "request");
    far.write_all(b"late answer").await.unwrap();
    // Read in two parts, like a reader with a small buffer.
    let mut begin = [0; 5];
    near.read_exact(&mut begin).await.unwrap();
    assert_eq!(&begin, b"late ");
    far.shutdown().await.unwrap();
    far.shutdown().await.unwrap();
    let mut rest = String::new();
    near.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "answer");
    assert_eq!(near.read(&mut begin).await.unwrap(), 0, "an end stays an end");
    assert!(near.write_all(b"more").await.is_err());
    drop((near, far));
    assert_eq!(tunnel.open_streams(), 0);
}

#[tokio::test]
async fn stream_dropped_before_its_end_is_aborted() {
    for client_aborts in [true, false] {
        let (near, far, _tunnel, _served) = Mesh::new().stream().await;
        let (aborting, other) = if client_aborts { (near, far) } else { (far, near) };
        let (mut aborting, mut other) = (aborting.into_io(), other.into_io());
        aborting.write_all(b"part").await.unwrap();
        other.read_exact(&mut [0; 4]).await.unwrap();
        drop(aborting);
        let error = other.read(&mut [0; 4]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        let Some(HboneError::Reset { reason }) = HboneError::carried_by(&error) else {
            panic!("{error:?}")
        };
        assert_eq!(reason, Reason::CONNECT_ERROR);
        assert!(other.write_all(b"x").await.is_err());
        assert!(other.shutdown().await.is_err());
    }
}

#[tokio::test]
async fn lost_connection_is_an_io_error() {
    let (near, _far, _tunnel, served) = Mesh::new().stream().await;
    let mut near = near.into_io();
    served.abort().await;
    let error = near.read(&mut [0; 4]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    assert!(matches!(HboneError::carried_by(&error), Some(HboneError::Lost { .. })), "{error:?}");
}

#[tokio::test]
async fn several_buffers_are_sent_as_one_frame() {
    let (near, far, _tunnel, _served) = Mesh::new().stream().await;
    let mut near = near.into_io();
    assert!(near.is_write_vectored());
    let buffers = [&b"several "[..], b"", b"buffers"].map(IoSlice::new);
    assert_eq!(near.write_vectored(&buffers).await.unwrap(), 15);
    let (mut reader, _writer) = far.split();
    assert_eq!(reader.read().await.unwrap().unwrap(), "several buffers");
}

#[tokio::test(start_paused = true)]
async fn unread_stream_blocks_its_writer() {
    let http2 = Http2Settings { stream_window: 100_000, ..Http2Settings::default() };
    let server = ServerSettings { http2, ..ServerSettings::default() };
    let mesh = Mesh::with(ClientSettings::default(), server);
    let (near, far, _tunnel, _served) = mesh.stream().await;
    let (mut near, mut far) = (near.into_io(), far.into_io());
    let mut sent = 0;
    while let Ok(written) = timeout(SECOND, near.write(&[0; 3000])).await {
        sent += written.unwrap();
    }
    assert_eq!(sent, 100_000);
    near.shutdown().await.unwrap();
    let mut received = Vec::new();
    far.read_to_end(&mut received).await.unwrap();
    assert_eq!(received.len(), sent);
}

#[tokio::test(start_paused = true)]
async fn outer_stream_closes_after_both_directions_end_or_excess_data() {
    let (near, far, _tunnel, _served) = Mesh::new().stream().await;
    let ((mut near, _open), mut far) = (near.into_carrier(), far.into_io());
    timeout(SECOND, near.shutdown()).await.unwrap_err();
    assert_eq!(far.read(&mut [0; 4]).await.unwrap(), 0);
    far.write_all(b"what was on its way").await.unwrap();
    far.shutdown().await.unwrap();
    near.shutdown().await.unwrap();

    let (near, far, _tunnel, _served) = Mesh::new().stream().await;
    let ((mut near, _open), mut far) = (near.into_carrier(), far.into_io());
    let flood = tokio::spawn(async move {
        let chunk = vec![0; 1 << 20];
        while far.write_all(&chunk).await.is_ok() {}
    });
    assert!(near.shutdown().await.is_err());
    drop((near, _open));
    flood.await.unwrap();
}

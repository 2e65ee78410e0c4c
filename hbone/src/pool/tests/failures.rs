//! Tests of failed dials, of peers that are lost, refuse or drain, and of retries.

use super::*;
use crate::testing::{authority, credentials, identity};

const FIRST_BACKOFF: Duration = Duration::from_millis(120);

#[tokio::test(start_paused = true)]
async fn stuck_dial_does_not_block_other_keys() {
    let client = Arc::new(Client::new());
    let stuck = tokio::spawn({
        let client = client.clone();
        async move { client.connect(NEVER_CONNECTS).await }
    });
    yield_now().await;
    let start = Instant::now();
    client.stream().await;
    assert!(start.elapsed() < SECOND);
    assert_eq!((client.dials(), client.pool.statistics().dialing), (2, 1));
    let error = stuck.await.unwrap().unwrap_err();
    let HboneError::Dial { source, .. } = error else { panic!("{error:?}") };
    assert_eq!(source.kind(), io::ErrorKind::TimedOut);
}

#[tokio::test(start_paused = true)]
async fn failed_dial_fails_all_waiters_and_starts_back_off() {
    let client = Client::new();
    let answers = join_all((0..5).map(|_| client.connect(REFUSES_CONNECTIONS))).await;
    assert!(answers.iter().all(|answer| matches!(answer, Err(HboneError::Dial { .. }))));
    assert_eq!((client.dials(), client.pool.statistics().backing_off), (1, 1));
    let refused = client.connect(REFUSES_CONNECTIONS).await.unwrap_err();
    let HboneError::BackingOff { address, remaining, source } = &refused else {
        panic!("{refused:?}")
    };
    assert_eq!(*address, key(REFUSES_CONNECTIONS).address);
    assert!(*remaining > SECOND / 20 && *remaining <= FIRST_BACKOFF);
    assert!(matches!(**source, HboneError::Dial { .. }));
    assert_eq!(client.dials(), 1);
    sleep(*remaining).await;
    let again = client.connect(REFUSES_CONNECTIONS).await;
    assert!(matches!(again, Err(HboneError::Dial { .. })), "{again:?}");
    sleep(20 * SECOND).await;
    assert_eq!(client.entries(), 0, "the back-off is removed");
}

#[tokio::test(start_paused = true)]
async fn recovered_peer_is_dialled_after_back_off() {
    let client = Client::new();
    client.servers.down.store(true, Ordering::Relaxed);
    for dials in 1..=7 {
        let failed = client.connect(80).await;
        assert!(matches!(failed, Err(HboneError::Dial { .. })), "{failed:?}");
        let refused = client.connect(80).await;
        let Err(HboneError::BackingOff { remaining, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(client.dials(), dials);
        sleep(remaining).await;
    }
    client.servers.down.store(false, Ordering::Relaxed);
    client.stream().await;
    assert_eq!(client.pool.statistics().backing_off, 0);
}

#[tokio::test(start_paused = true)]
async fn certificate_refusal_after_handshake_counts_as_failed_handshake() {
    let authority = authority("td");
    let fixed = |who| credentials(&identity(&authority, who)).fixed();
    let connector = Connector::anonymous(fixed(CLIENT), ClientSettings::default());
    let acceptor = Acceptor::new(fixed(SERVER), ServerSettings::default());
    let client = Client::of(Mesh { connector, acceptor }, SETTINGS);
    for dials in 1..=2 {
        let first = client.connect(80).await;
        assert!(matches!(first, Err(HboneError::CertificateRefused { .. })), "{first:?}");
        client.wait_until(|now| now.backing_off == 1).await;
        let refused = client.connect(80).await;
        let Err(HboneError::BackingOff { source, .. }) = refused else { panic!("{refused:?}") };
        assert!(matches!(*source, HboneError::CertificateRefused { .. }));
        assert_eq!(client.dials(), dials);
        sleep(SECOND).await;
    }
    sleep(20 * SECOND).await;
    assert_eq!(client.entries(), 0);
}

#[tokio::test(start_paused = true)]
async fn panicked_dial_fails_all_waiters() {
    let client = Client::new();
    for dials in 1..=2 {
        let answers = join_all((0..3).map(|_| client.connect(DIAL_PANICS))).await;
        assert!(answers.iter().all(|answer| matches!(answer, Err(HboneError::Lost { .. }))));
        assert_eq!((client.dials(), client.entries()), (dials, 0));
    }
}

#[tokio::test]
async fn lost_peer_aborts_streams_and_next_stream_dials() {
    let client = Client::new();
    let streams = client.streams(20).await;
    client.connection(0).serving.abort();
    for stream in streams {
        let (mut reader, _writer) = stream.split();
        assert!(matches!(reader.read().await, Err(HboneError::Lost { .. })));
    }
    let _stream = client.stream().await;
    client.wait_until(|now| now.retired == 0).await;
    assert_eq!((client.dials(), client.pool.tunnels()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn silent_tunnel_is_not_reused() {
    let client = Client::new();
    for dials in 1..=2 {
        let stream = client.connect(ANSWERS_ONCE).await.unwrap();
        sleep(SECOND).await;
        let second = client.connect(ANSWERS_ONCE).await;
        assert!(matches!(second, Err(HboneError::ReplyTimeout { .. })), "{second:?}");
        assert_eq!(
            (client.pool.tunnels(), client.dials()),
            (0, dials),
            "and the request is not retried"
        );
        drop(stream);
    }
}

#[tokio::test(start_paused = true)]
async fn drained_pool_aborts_dial_in_progress() {
    let client = Client::new();
    let drain = async {
        while client.dials() == 0 {
            yield_now().await;
        }
        client.pool.drain();
    };
    let start = Instant::now();
    let (outcome, ()) = tokio::join!(client.connect(NEVER_CONNECTS), drain);
    assert!(matches!(outcome, Err(HboneError::Lost { .. })));
    assert!(client.entries() == 0 && start.elapsed() < SECOND);
}

#[tokio::test(start_paused = true)]
async fn unresponsive_peer_is_closed_by_timeout() {
    let client = Client::new();
    let long_request = |number: usize| {
        let mut long = request();
        // Fill all buffers between client and server. HPACK cannot compress this value.
        let value = format!("{number:04}").repeat(500).parse().unwrap();
        long.headers.insert("baggage", value);
        long
    };
    let key = key(READS_NOTHING);
    let answers =
        join_all((0..90).map(|number| {
            client.pool.connect(&key, &client.connector, move || long_request(number))
        }));
    assert!(answers.await.iter().all(Result::is_err));
    client.pool.drain();
    assert_eq!(client.pool.statistics(), PoolStatistics { retired: 1, ..Default::default() });
    sleep(60 * SECOND).await;
    assert_eq!(client.entries(), 0);
}

#[tokio::test]
async fn requests_lost_with_pooled_tunnel_share_one_retry_tunnel() {
    let client = Client::new();
    let (mut reader, _writer) = client.connect(CLOSES_AT_FIFTH_REQUEST).await.unwrap().split();
    let answers = join_all((0..4).map(|_| client.connect(CLOSES_AT_FIFTH_REQUEST))).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert_eq!((client.dials(), client.requests()), (2, vec![5, 4]));
    assert!(
        matches!(reader.read().await, Err(HboneError::Lost { .. })),
        "an answered stream is not retried"
    );
}

#[tokio::test]
async fn retry_uses_a_new_tunnel() {
    let client = Client::with(200, PoolSettings { streams_per_tunnel: 2, ..SETTINGS });
    let _first = client.connect(CLOSES_AT_FIFTH_REQUEST).await.unwrap();
    let lose_first_tunnel = async {
        client.wait_until(|now| now.tunnels == 2 && client.requests()[0] == 2).await;
        client.connection(0).serving.abort();
    };
    let (second, ()) = tokio::join!(client.connect(CLOSES_AT_FIFTH_REQUEST), lose_first_tunnel);
    second.unwrap();
    assert_eq!((client.dials(), client.requests()), (3, vec![2, 0, 1]));
}

#[tokio::test]
async fn request_lost_with_new_tunnel_is_not_retried() {
    let client = Client::new();
    let lost = client.connect(CLOSES_AT_FIRST_REQUEST).await;
    assert!(matches!(lost, Err(HboneError::Lost { .. })), "{lost:?}");
    assert_eq!(client.dials(), 1);
}

#[tokio::test]
async fn answered_request_is_not_retried() {
    let client = Client::new();
    let _tunnel = client.stream().await;
    for round in 1..=2 {
        let refused = client.connect(UNAVAILABLE).await;
        assert!(matches!(refused, Err(HboneError::Refused { .. })), "{refused:?}");
        assert_eq!(client.requests()[1], round);
    }
    for round in 1..=2 {
        let reset = client.connect(RESETS_STREAMS).await;
        assert!(matches!(reset, Err(HboneError::Reset { .. })), "{reset:?}");
        assert_eq!(client.requests()[2], round);
    }
    assert_eq!(client.dials(), 3);
}

#[tokio::test]
async fn burst_above_peer_limit_opens_new_tunnels() {
    let client = Client::with(10, SETTINGS);
    let streams = client.streams(60).await;
    assert_eq!(streams.len(), 60);
    assert!(client.dials() <= 8, "{}", client.dials());
}

#[tokio::test]
async fn graceful_goaway_loses_no_request() {
    let client = Client::new();
    let worker = || async {
        for _ in 0..50 {
            client.exchange(SENDS_GOAWAY).await.unwrap();
        }
    };
    join_all((0..20).map(|_| worker())).await;
    let requests = client.requests();
    assert_eq!(requests.iter().sum::<usize>(), 1000);
    assert!(requests.len() >= 20, "{requests:?}");
}

#[tokio::test]
async fn goaway_moves_new_streams_and_finishes_old_ones() {
    let client = Client::new();
    let (mut reader, mut writer) = client.stream().await.split();
    client.connection(0).drain.notify_one();
    for _ in 0..1000 {
        client.exchange(80).await.unwrap();
    }
    assert_eq!(client.dials(), 2);
    writer.write("still open".into()).await.unwrap();
    writer.finish().unwrap();
    assert_eq!(reader.read().await.unwrap(), None);
    drop((reader, writer));
    client.wait_until(|now| now.tunnels == 1 && now.retired == 0).await;
}

#[tokio::test(start_paused = true)]
async fn expired_tunnel_keeps_streams_and_takes_no_new_one() {
    let client = Client::with(200, PoolSettings { max_age: 10 * HOUR, ..SETTINGS });
    let (mut reader, mut writer) = client.stream().await.split();
    sleep(HOUR - 5 * SECOND).await;
    drop(client.stream().await);
    assert_eq!(client.dials(), 1);
    sleep(10 * SECOND).await;
    let expired = client.connect(80).await;
    assert!(expired.is_err(), "{expired:?}");
    assert_eq!((client.dials(), client.pool.statistics().retired), (2, 1));
    writer.finish().unwrap();
    assert_eq!(reader.read().await.unwrap(), None);
}

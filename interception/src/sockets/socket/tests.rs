//! Tests of sockets that need no privileges. `tests/kernel` tests the others.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::io::AsyncReadExt as _;
use underpass_config::{Hint as _, PacedConnections, Sources};

use super::*;

/// Socket options of the profile `none`, which need no privileges.
fn of_no_profile(ipv6: bool) -> Sockets {
    let flags = vec!["interception.profile=none".to_owned()];
    let sources = Sources { file: None, environment: Vec::new(), flags };
    Sockets::new(&sources.load().expect("settings").interception, ipv6)
}

fn unmarked() -> Sockets {
    of_no_profile(crate::namespace::ipv6::ipv6_available())
}

fn listen(sockets: &Sockets) -> BoundListener {
    listen_on(sockets, SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)), Closing::End)
}

fn paced(closing: Closing) -> AcceptedOptions {
    AcceptedOptions { closing, unpaced: false }
}

fn listen_on(sockets: &Sockets, address: SocketAddr, closing: Closing) -> BoundListener {
    let (accepted, purpose, setting) = (paced(closing), "a test", "test.port");
    let request = ListenerRequest {
        address,
        transport: ListenerTransport::Stream,
        may_be_absent: false,
        accepted,
        purpose,
        setting,
    };
    sockets.listen(&enter_current(), request).expect("a free port")
}

fn enter_current() -> Entered {
    Entered::current().expect("a namespace")
}

async fn connect(sockets: &Sockets, to: SocketAddr) -> TcpStream {
    let kind = SocketKind::new(SocketRole::Upstream, to);
    sockets.open(&enter_current(), kind).expect("a socket").connect(to).await.expect("connected")
}

fn loopback(listener: &BoundListener) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, listener.local_addr().expect("bound").port()))
}

#[test]
fn mapped_address_becomes_ipv4() {
    let v4 = SocketAddr::from((Ipv4Addr::new(10, 0, 0, 1), 80));
    let mapped = SocketAddr::from((Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped(), 80));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, 80));
    assert_eq!([v4, mapped, v6].map(canonical), [v4, v4, v6]);
}

#[test]
fn unspecified_address_is_ipv4_without_ipv6() {
    let listener = listen(&of_no_profile(false));
    assert!(listener.local_addr().expect("bound").is_ipv4());
}

#[tokio::test]
async fn end_writing_sends_fin_and_ignores_closed_connection() {
    let sockets = unmarked();
    let listener = listen(&sockets);
    let to = loopback(&listener);
    let listener = listener.register().expect("registered");
    let (near, accepted) = tokio::join!(connect(&sockets, to), listener.accept());
    let mut far = TcpStream::from_std(accepted.expect("accepted").0).expect("registered");
    end_writing(&near).expect("a FIN");
    assert_eq!(far.read(&mut [0]).await.expect("an end"), 0);
    reset_on_close(&far);
    drop(far);
    near.ready(tokio::io::Interest::ERROR).await.expect("the reset");
    end_writing(&near).expect("nothing to end");
}

#[test]
fn bind_error_names_purpose_and_setting() {
    let sockets = unmarked();
    let taken = listen(&sockets).local_addr().expect("bound");
    let _holder = listen_on(&sockets, taken, Closing::End);
    let request = ListenerRequest {
        address: taken,
        transport: ListenerTransport::Stream,
        may_be_absent: false,
        accepted: paced(Closing::End),
        purpose: "captured connections",
        setting: "proxy.port",
    };
    let error = sockets.listen(&enter_current(), request).expect_err("taken");
    let message = error.to_string();
    assert!(
        message.contains("captured connections") && !message.contains("proxy.port"),
        "{message}"
    );
    assert!(error.hint().is_some_and(|hint| hint.contains("proxy.port")), "{message}");
}

#[tokio::test]
async fn dual_stack_listener_reports_ipv4_clients_as_ipv4() {
    let listener = listen(&unmarked());
    let address = loopback(&listener);
    let listener = listener.register().expect("registered");
    let client = connect(&unmarked(), address).await;
    let (_, peer) = listener.accept().await.expect("accepted");
    assert_eq!(peer, client.local_addr().expect("an address"));
}

#[tokio::test]
async fn accepted_stream_is_nonblocking_and_close_on_exec() {
    let listener = listen(&unmarked());
    let address = loopback(&listener);
    let listener = listener.register().expect("registered");
    let _client = connect(&unmarked(), address).await;
    let (stream, _) = listener.accept().await.expect("accepted");
    assert!(SockRef::from(&stream).nonblocking().expect("flags"));
    let flags = fcntl(&stream, FcntlArg::F_GETFD).expect("flags");
    assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
}

#[tokio::test]
async fn unmarked_connection_needs_no_capability() {
    let listener = listen(&unmarked());
    let address = loopback(&listener);
    let foreign = IpAddr::from([192, 0, 2, 1]);
    let sockets = unmarked();
    let kind = SocketKind::new(SocketRole::Workload, address);
    let socket = sockets.open(&enter_current(), kind).expect("a socket");
    sockets.bind_for(&socket, address, foreign).expect("nothing to bind");
    let client = socket.connect(address).await.expect("connected");
    assert_eq!(client.local_addr().expect("an address").ip(), Ipv4Addr::LOCALHOST);
}

/// The accepted connection of a client with the source `from`.
async fn accepted(
    sockets: &Sockets,
    listener: &BoundListener,
    from: IpAddr,
) -> std::net::TcpStream {
    let port = listener.local_addr().expect("bound").port();
    let listener = listener.clone().register().expect("registered");
    let to = SocketAddr::new(from, port);
    let (_client, accepted) = tokio::join!(connect(sockets, to), listener.accept());
    accepted.expect("accepted").0
}

fn is_tuned(stream: &impl AsFd, keepalive: Duration) -> bool {
    let socket = SockRef::from(stream);
    socket.tcp_nodelay().expect("an option")
        && socket.keepalive().expect("an option")
        && socket.tcp_keepalive_time().expect("an option") == keepalive
        && socket.tcp_keepalive_interval().expect("an option") == keepalive
        && socket.tcp_keepalive_retries().expect("an option") == KEEPALIVE_PROBES
}

#[tokio::test]
async fn connections_have_keepalive_and_no_delay() {
    let listener = listen(&unmarked());
    let keepalive = Duration::from_secs(77);
    let sockets = unmarked().with_keepalive(keepalive);
    let client = connect(&sockets, loopback(&listener)).await;
    assert!(is_tuned(&client, keepalive));
    assert_eq!(SockRef::from(&client).linger().expect("an option"), Some(Duration::ZERO));
}

#[tokio::test]
async fn accepted_stream_inherits_listener_options() {
    let keepalive = Duration::from_secs(78);
    let sockets = unmarked().with_keepalive(keepalive);
    let bound = listen(&sockets);
    let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    // A listener as it arrives from another process.
    let handed = BoundListener::from(std::net::TcpListener::bind(any_v4).expect("a free port"));
    let mut clients =
        vec![(&bound, Ipv4Addr::LOCALHOST.into()), (&handed, Ipv4Addr::LOCALHOST.into())];
    if crate::namespace::ipv6::ipv6_available() {
        clients.push((&bound, Ipv6Addr::LOCALHOST.into()));
    }
    for (listener, from) in clients {
        for (closing, linger) in [(Closing::Reset, Some(Duration::ZERO)), (Closing::End, None)] {
            sockets.prepare(listener, paced(closing)).expect("its options");
            let stream = accepted(&sockets, listener, from).await;
            assert!(is_tuned(&stream, keepalive), "{from}");
            assert_eq!(SockRef::from(&stream).linger().expect("an option"), linger, "{from}");
        }
    }
    let of_its_own = listen_on(&sockets, any_v4, Closing::Reset);
    let stream = accepted(&sockets, &of_its_own, any_v4.ip()).await;
    assert_eq!(SockRef::from(&stream).linger().expect("an option"), Some(Duration::ZERO));
    assert!(is_tuned(&stream, keepalive));
}

#[tokio::test]
async fn reset_on_close_sends_rst() {
    let listener = listen(&unmarked());
    let address = loopback(&listener);
    let listener = listener.register().expect("registered");
    let mut client = connect(&unmarked(), address).await;
    let (stream, _) = listener.accept().await.expect("accepted");
    reset_on_close(&stream);
    drop(stream);
    let error = client.read_u8().await.expect_err("reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // Undo it.
    let mut client = connect(&unmarked(), address).await;
    let (stream, _) = listener.accept().await.expect("accepted");
    reset_on_close(&stream);
    end_on_close(&stream);
    drop(stream);
    assert_eq!(client.read(&mut [0; 1]).await.expect("a clean end"), 0);
}

fn congestion_control(stream: &impl AsFd) -> Vec<u8> {
    SockRef::from(stream).tcp_congestion().expect("an option")
}

fn is_unpaced(stream: &impl AsFd) -> bool {
    let name = congestion_control(stream);
    [&b"cubic"[..], b"reno"].iter().any(|unpaced| name.starts_with(unpaced))
}

#[tokio::test]
async fn connections_within_host_do_not_pace() {
    let sockets = unmarked().with_pacing(Some(Pacing::testing(PacedConnections::Distant)));
    let listener = listen(&sockets);
    let default = congestion_control(&listener);
    let client = Ipv4Addr::LOCALHOST.into();
    let anywhere = accepted(&sockets, &listener, client).await;
    assert_eq!(congestion_control(&anywhere), default);
    let options = AcceptedOptions { closing: Closing::End, unpaced: true };
    sockets.prepare(&listener, options).expect("its options");
    assert!(is_unpaced(&accepted(&sockets, &listener, client).await));
    let other = listen(&sockets);
    assert!(is_unpaced(&connect(&sockets, loopback(&other)).await));
    // A process with other settings takes over the listener.
    let sockets = unmarked().with_pacing(Some(Pacing::testing(PacedConnections::All)));
    sockets.prepare(&listener, options).expect("its options");
    for stream in [
        accepted(&sockets, &listener, client).await.into(),
        OwnedFd::from(connect(&sockets, loopback(&other)).await.into_std().expect("a socket")),
    ] {
        assert_eq!(congestion_control(&stream), default);
    }
}

#[tokio::test]
async fn connection_paces_if_peer_is_distant() {
    let sockets = unmarked().with_pacing(Some(Pacing::testing(PacedConnections::Distant)));
    let listener = listen(&sockets);
    let default = congestion_control(&listener);
    let options = AcceptedOptions { closing: Closing::End, unpaced: true };
    sockets.prepare(&listener, options).expect("its options");
    let stream = accepted(&sockets, &listener, Ipv4Addr::LOCALHOST.into()).await;
    let undecided = || sockets.undecided_pacing(&stream).expect("depends on the distance");
    undecided().decide(Duration::from_millis(4));
    assert!(is_unpaced(&stream));
    undecided().decide(Duration::from_millis(5));
    assert_eq!(congestion_control(&stream), default);
    assert!(unmarked().undecided_pacing(&stream).is_none());
}

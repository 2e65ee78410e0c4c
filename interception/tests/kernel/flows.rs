//! Kernel tests of connections through the rules: receiver, original destination, and deciding
//! rule.

use std::fs;
use std::io::ErrorKind::{ConnectionRefused, PermissionDenied};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;

use libtest_mimic::Failed;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;
use tokio::time::timeout;
use underpass_interception::{
    AcceptedOptions, BoundListener, Closing, Entered, KeptCapabilities, ListenerRequest,
    ListenerTransport, Namespace, NamespaceAccess, OriginalDestination, PacketCapture, SocketKind,
    SocketRole, Sockets, TcpSegment, confine_thread, counters,
};

use crate::Case;
use crate::pod::{
    ConnectedPods, DEADLINE, Family, PORTS, V4, V6, equal, inside, prepare, runtime, settings,
    socket_address,
};

pub(crate) const CASES: &[Case] = &[
    ("A1: a connection of the workload is captured (IPv4)", || outbound_is_captured(V4, "a1-v4")),
    ("A1: a connection of the workload is captured (IPv6)", || outbound_is_captured(V6, "a1-v6")),
    ("A2: a plaintext connection to the workload is captured (IPv4)", || {
        plaintext_inbound_is_captured(V4, "a2-v4")
    }),
    ("A2: a plaintext connection to the workload is captured (IPv6)", || {
        plaintext_inbound_is_captured(V6, "a2-v6")
    }),
    ("A3: HBONE reaches its listener without a redirect (IPv4)", || {
        hbone_is_not_redirected(V4, "a3-v4")
    }),
    ("A3: HBONE reaches its listener without a redirect (IPv6)", || {
        hbone_is_not_redirected(V6, "a3-v6")
    }),
    ("A4: the probe address is captured like any other (IPv4)", || {
        probe_address_is_captured(V4, "a4-off-v4")
    }),
    ("A4: the probe address is captured like any other (IPv6)", || {
        probe_address_is_captured(V6, "a4-off-v6")
    }),
    ("A4: an exempt kubelet probe reaches the workload (IPv4)", || {
        kubelet_probe_is_exempt(V4, "a4-v4")
    }),
    ("A4: an exempt kubelet probe reaches the workload (IPv6)", || {
        kubelet_probe_is_exempt(V6, "a4-v6")
    }),
    ("A4: only declared probe ports are exempt (IPv4)", || {
        only_declared_probe_ports_are_exempt(V4, "a4-ports-v4")
    }),
    ("A4: only declared probe ports are exempt (IPv6)", || {
        only_declared_probe_ports_are_exempt(V6, "a4-ports-v6")
    }),
    ("A5: a workload reaches itself directly (IPv4)", || {
        call_to_own_address_is_direct(V4, "a5-v4")
    }),
    ("A5: a workload reaches itself directly (IPv6)", || {
        call_to_own_address_is_direct(V6, "a5-v6")
    }),
    ("A6: the proxy's own connections are not captured (IPv4)", || {
        proxy_connection_is_not_captured(V4, "a6-v4")
    }),
    ("A6: the proxy's own connections are not captured (IPv6)", || {
        proxy_connection_is_not_captured(V6, "a6-v6")
    }),
    ("A7: the workload sees the client's own address (IPv4)", || {
        workload_sees_client_address(V4, "a7-v4")
    }),
    ("A7: the workload sees the client's own address (IPv6)", || {
        workload_sees_client_address(V6, "a7-v6")
    }),
    ("opening a marked or transparent socket requires a capability", opening_requires_capability),
    ("connections survive the installation of the rules (IPv4)", || {
        connection_survives_installation(V4, "older-v4")
    }),
    ("connections survive the installation of the rules (IPv6)", || {
        connection_survives_installation(V6, "older-v6")
    }),
    ("a packet capture sees the segments of a connection", packet_capture_sees_segments),
];

const APP: u16 = 8080;

/// A pod with rules and the proxy's listeners, and an application in the pod and in the remote
/// namespace.
struct Mesh {
    wired: ConnectedPods,
    outbound: BoundListener,
    inbound: BoundListener,
    hbone: BoundListener,
    app: TcpListener,
    remote_app: TcpListener,
}

impl Mesh {
    fn new(name: &str) -> Result<Self, Failed> {
        Self::with(name, "")
    }

    /// Like [`Mesh::new`], with rules for these settings.
    fn with(name: &str, assignments: &str) -> Result<Self, Failed> {
        let wired = ConnectedPods::new(name)?;
        let sockets = Sockets::new(&settings(""), true);
        let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listen = |port| {
            let listener = ListenerRequest {
                address: any(port),
                transport: ListenerTransport::Stream,
                may_be_absent: false,
                accepted: AcceptedOptions { closing: Closing::Reset, unpaced: false },
                purpose: "a test",
                setting: "none",
            };
            wired.pod.run(|| sockets.listen(&Entered::current()?, listener))
        };
        let (outbound, inbound) = (listen(PORTS.outbound)??, listen(PORTS.inbound)??);
        let hbone = listen(PORTS.hbone)??;
        let app = wired.pod.run(|| TcpListener::bind(("::", APP)))??;
        let remote_app = wired.remote.run(|| TcpListener::bind(("::", APP)))??;
        inside(&wired.pod, async || Ok(prepare(assignments).await?.install().await?))?;
        Ok(Self { wired, outbound, inbound, hbone, app, remote_app })
    }

    /// Connects from a namespace, like any program.
    fn plain(&self, from: &Namespace, to: SocketAddr) -> Result<TcpStream, Failed> {
        self.connect(from, to, None)
    }

    /// Connects from a given address of the namespace.
    fn connect(
        &self,
        from: &Namespace,
        to: SocketAddr,
        source: Option<IpAddr>,
    ) -> Result<TcpStream, Failed> {
        let stream = inside(from, async || {
            let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            if let Some(source) = source {
                socket.bind(socket_address(source, 0))?;
            }
            Ok(timeout(DEADLINE, socket.connect(to)).await??.into_std()?)
        })?;
        blocking(stream)
    }

    /// Connects like the proxy: opens a socket in the pod, and connects it from a thread without
    /// capabilities outside of the pod.
    fn proxied(&self, to: SocketAddr, source: Option<IpAddr>) -> Result<TcpStream, Failed> {
        let sockets = Sockets::new(&settings(""), true);
        let role = if source.is_some() { SocketRole::Workload } else { SocketRole::Upstream };
        let kind = SocketKind::new(role, to);
        let open = || sockets.open(&Entered::current()?, kind).map_err(Failed::from);
        let socket = self.wired.pod.run(open)??;
        let stream = without_capabilities(async || {
            if let Some(client) = source {
                sockets.bind_for(&socket, to, client)?;
            }
            Ok(timeout(DEADLINE, socket.connect(to)).await??.into_std()?)
        })?;
        blocking(stream)
    }
}

/// Runs async code on a thread without capabilities.
fn without_capabilities<T: Send>(
    code: impl AsyncFnOnce() -> Result<T, Failed> + Send,
) -> Result<T, Failed> {
    let confined = || {
        confine_thread(KeptCapabilities::Nothing)?;
        let status = fs::read_to_string("/proc/thread-self/status")?;
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        equal("capabilities", effective.map(str::trim), Some("0000000000000000"))?;
        runtime()?.block_on(code())
    };
    thread::scope(|scope| scope.spawn(confined).join().unwrap_or_else(|_| Err("a panic".into())))
}

fn blocking(stream: TcpStream) -> Result<TcpStream, Failed> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    Ok(stream)
}

/// The rules that decided in a pod, with their counters. Without `proxy-zone`, which matches every
/// packet of the proxy, and without jumps to underpass's chains.
fn counted(pod: &Namespace) -> Result<Vec<(String, u64)>, Failed> {
    let all = inside(pod, async || Ok(counters(&NamespaceAccess::current()?).await?))?;
    Ok(all
        .into_iter()
        .filter(|counter| counter.packets > 0)
        .filter(|counter| counter.id != "proxy-zone" && !counter.id.starts_with("enter-"))
        .map(|counter| (counter.id, counter.packets))
        .collect())
}

/// Accepts on a listener of the proxy, and exchanges bytes. Returns client and original
/// destination.
fn accept(
    listener: BoundListener,
    client: &mut TcpStream,
) -> Result<(SocketAddr, SocketAddr), Failed> {
    runtime()?.block_on(async {
        let listener = listener.register()?;
        let (stream, peer) = timeout(DEADLINE, listener.accept()).await??;
        let original = OriginalDestination::redirected(&stream, peer.ip())?.address();
        let mut stream = tokio::net::TcpStream::from_std(stream)?;
        client.write_all(b"?")?;
        equal("the request", timeout(DEADLINE, stream.read_u8()).await??, b'?')?;
        stream.write_all(b"!").await?;
        let mut reply = [0];
        client.read_exact(&mut reply)?;
        equal("the reply", &reply, b"!")?;
        Ok((peer, original))
    })
}

/// Accepts like an application, and exchanges bytes. Returns the client.
fn serve(app: &TcpListener, client: &mut TcpStream) -> Result<IpAddr, Failed> {
    let (mut stream, peer) = app.accept()?;
    stream.set_read_timeout(Some(DEADLINE))?;
    exchange(client, &mut stream)?;
    Ok(peer.ip().to_canonical())
}

fn exchange(client: &mut TcpStream, server: &mut TcpStream) -> Result<(), Failed> {
    let mut byte = [0];
    client.write_all(b"?")?;
    server.read_exact(&mut byte)?;
    equal("the request", &byte, b"?")?;
    server.write_all(b"!")?;
    client.read_exact(&mut byte)?;
    equal("the reply", &byte, b"!")
}

/// Asserts that only this rule matched, once. After bytes were exchanged, this also shows that no
/// mangle rule matches captured connections.
fn assert_only_rule_matched(pod: &Namespace, rule: String) -> Result<(), Failed> {
    equal("rules that matched", counted(pod)?, vec![(rule, 1)])
}

fn outbound_is_captured(family: Family, name: &str) -> Result<(), Failed> {
    let mesh = Mesh::new(name)?;
    let to = socket_address(family.remote, APP);
    let mut client = mesh.plain(&mesh.wired.pod, to)?;
    let (peer, original) = accept(mesh.outbound, &mut client)?;
    equal("the original destination", original, to)?;
    equal("the client", peer, client.local_addr()?)?;
    assert_only_rule_matched(&mesh.wired.pod, family.rule("capture-outbound"))
}

fn plaintext_inbound_is_captured(family: Family, name: &str) -> Result<(), Failed> {
    let mesh = Mesh::new(name)?;
    let to = socket_address(family.pod, APP);
    let mut client = mesh.plain(&mesh.wired.remote, to)?;
    let (peer, original) = accept(mesh.inbound, &mut client)?;
    equal("the original destination", original, to)?;
    equal("the client", peer, client.local_addr()?)?;
    assert_only_rule_matched(&mesh.wired.pod, family.rule("capture-inbound"))
}

fn hbone_is_not_redirected(family: Family, name: &str) -> Result<(), Failed> {
    let mesh = Mesh::new(name)?;
    let to = socket_address(family.pod, PORTS.hbone);
    let mut client = mesh.plain(&mesh.wired.remote, to)?;
    let (peer, original) = accept(mesh.hbone, &mut client)?;
    equal("the original destination", original, to)?;
    equal("the client", peer, client.local_addr()?)?;
    assert_only_rule_matched(&mesh.wired.pod, "hbone-in".to_owned())
}

fn probe_address_is_captured(family: Family, name: &str) -> Result<(), Failed> {
    let mesh = Mesh::new(name)?;
    let to = socket_address(family.pod, APP);
    let mut client = mesh.connect(&mesh.wired.remote, to, Some(family.probe))?;
    let (peer, original) = accept(mesh.inbound, &mut client)?;
    equal("the client", peer.ip(), family.probe)?;
    equal("the destination", original, to)?;
    assert_only_rule_matched(&mesh.wired.pod, family.rule("capture-inbound"))
}

fn only_declared_probe_ports_are_exempt(family: Family, name: &str) -> Result<(), Failed> {
    let mesh = Mesh::with(name, "kubelet_probes=8080,9000-9010")?;
    let mut client =
        mesh.connect(&mesh.wired.remote, socket_address(family.pod, APP), Some(family.probe))?;
    equal("the client", serve(&mesh.app, &mut client)?, family.probe)?;
    let other = socket_address(family.pod, 8081);
    let mut client = mesh.connect(&mesh.wired.remote, other, Some(family.probe))?;
    equal("the destination", accept(mesh.inbound, &mut client)?.1, other)?;
    let rules = ["kubelet-probe-in", "capture-inbound"].map(|rule| (family.rule(rule), 1));
    equal("rules that matched", counted(&mesh.wired.pod)?, rules.into())
}

fn kubelet_probe_is_exempt(family: Family, name: &str) -> Result<(), Failed> {
    let mesh = Mesh::with(name, "kubelet_probes=on")?;
    // Any program may bind to a local address.
    let mut client =
        mesh.connect(&mesh.wired.remote, socket_address(family.pod, APP), Some(family.probe))?;
    equal("the client", serve(&mesh.app, &mut client)?, family.probe)?;
    assert_only_rule_matched(&mesh.wired.pod, family.rule("kubelet-probe-in"))
}

fn call_to_own_address_is_direct(family: Family, name: &str) -> Result<(), Failed> {
    let mesh = Mesh::new(name)?;
    let mut client = mesh.plain(&mesh.wired.pod, socket_address(family.loopback, APP))?;
    equal("the client", serve(&mesh.app, &mut client)?, family.loopback)?;
    equal("rules for loopback", counted(&mesh.wired.pod)?, vec![])?;
    let mut client = mesh.plain(&mesh.wired.pod, socket_address(family.pod, APP))?;
    equal("the client", serve(&mesh.app, &mut client)?, family.pod)?;
    assert_only_rule_matched(&mesh.wired.pod, family.rule("own-pod"))
}

fn proxy_connection_is_not_captured(family: Family, name: &str) -> Result<(), Failed> {
    let mesh = Mesh::new(name)?;
    let mut client = mesh.proxied(socket_address(family.remote, APP), None)?;
    equal("the client", serve(&mesh.remote_app, &mut client)?, family.pod)?;
    equal("rules that matched", counted(&mesh.wired.pod)?, vec![])
}

fn workload_sees_client_address(family: Family, name: &str) -> Result<(), Failed> {
    let mesh = Mesh::new(name)?;
    let mut client = mesh.proxied(socket_address(family.pod, APP), Some(family.remote))?;
    equal("the client", serve(&mesh.app, &mut client)?, family.remote)?;
    let rules: Vec<_> = counted(&mesh.wired.pod)?.into_iter().map(|(rule, _)| rule).collect();
    let expected =
        ["mark-proxy-connection".to_owned(), "return-to-proxy".to_owned(), family.rule("own-pod")];
    equal("rules that matched", rules, expected.to_vec())
}

/// Opening a marked or transparent socket requires a capability. A6 and A7 show that binding and
/// connecting it do not.
fn opening_requires_capability() -> Result<(), Failed> {
    let sockets = Sockets::new(&settings(""), true);
    without_capabilities(async || {
        for role in [SocketRole::Upstream, SocketRole::Workload] {
            for to in [V4.remote, V6.remote] {
                let kind = SocketKind::new(role, socket_address(to, APP));
                let refused = sockets.open(&Entered::current()?, kind).err();
                let kind = refused.map(|error| error.kind());
                equal("refused", kind, Some(PermissionDenied))?;
            }
        }
        Ok(())
    })
}

fn connection_survives_installation(family: Family, name: &str) -> Result<(), Failed> {
    let wired = ConnectedPods::new(name)?;
    let pairs =
        [(&wired.pod, &wired.remote, family.remote), (&wired.remote, &wired.pod, family.pod)];
    let mut streams = Vec::new();
    for (from, into, to) in pairs {
        let app = into.run(|| TcpListener::bind(("::", APP)))??;
        let client =
            from.run(|| TcpStream::connect_timeout(&socket_address(to, APP), DEADLINE))??;
        let (server, _) = app.accept()?;
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(DEADLINE))?;
        }
        streams.push((client, server));
    }
    for (client, server) in &mut streams {
        exchange(client, server)?;
    }
    inside(&wired.pod, async || Ok(prepare("").await?.install().await?))?;
    for (client, server) in &mut streams {
        exchange(client, server)?;
    }
    let mut rules: Vec<_> = counted(&wired.pod)?.into_iter().map(|(rule, _)| rule).collect();
    rules.sort();
    equal(
        "rules that matched",
        rules,
        ["established-in", "established-out"].map(String::from).to_vec(),
    )?;
    // A new connection is captured. Without a proxy, it is refused.
    let new = wired
        .pod
        .run(|| TcpStream::connect_timeout(&socket_address(family.remote, APP), DEADLINE))?;
    equal(
        "a new connection",
        new.map(|_| ()).map_err(|error| error.kind()),
        Err(ConnectionRefused),
    )?;
    let captured =
        counted(&wired.pod)?.iter().any(|(rule, _)| *rule == family.rule("capture-outbound"));
    equal("a new connection is captured", captured, true)
}

fn packet_capture_sees_segments() -> Result<(), Failed> {
    let wired = ConnectedPods::new("capture")?;
    let mut capture = wired.remote.run(|| PacketCapture::open("eth0"))??;
    for family in [V4, V6] {
        let to = socket_address(family.remote, APP);
        let app = wired.remote.run(|| TcpListener::bind(to))??;
        let mut client = wired.pod.run(|| TcpStream::connect_timeout(&to, DEADLINE))??;
        serve(&app, &mut client)?;
        let from = client.local_addr()?;
        let frames = capture.drain()?;
        let segments = frames.iter().filter_map(|frame| TcpSegment::parse(frame));
        let data: Vec<_> = segments
            .filter(|segment| !segment.payload.is_empty())
            .map(|segment| (segment.source, segment.destination, segment.payload))
            .collect();
        equal("the captured segments", data, vec![(from, to, &b"?"[..]), (to, from, &b"!"[..])])?;
    }
    Ok(())
}

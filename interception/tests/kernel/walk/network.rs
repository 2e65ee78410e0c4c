//! Three namespaces (virtual machine, pod, remote host) that listen on all ports and send packets.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use libtest_mimic::Failed;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpSocket;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;
use underpass_interception::{
    Endpoint, Entry, Namespace, OriginalDestination, Ports, Protocol, veth,
};

use super::Attempt;
use crate::pod::{ConnectedPods, command, runtime};

pub(crate) const PORTS: Ports = Ports {
    outbound: 15001,
    inbound: 15006,
    hbone: 15008,
    dns: 15053,
    services: Ports::DEFAULT_SERVICES,
};
/// The destination ports of packets, including the proxy's.
pub(crate) const TCP_PORTS: [u16; 15] =
    [53, 80, 443, 8000, 8080, 15000, 15001, 15006, 15008, 15010, 15020, 15021, 15053, 15090, 15901];
pub(crate) const UDP_PORTS: [u16; 4] = [53, 443, 9999, 15053];

const fn v6(net: u16, host: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(net, 0, 0, 0, 0, 0, 0, host))
}

const fn v4(net: u8, host: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, net, 0, host))
}

/// The pod's addresses at `eth0` and `vm0`.
pub(crate) const POD: [IpAddr; 4] = [v4(0, 1), v6(0xfd00, 1), v4(9, 1), v6(0xfd09, 1)];
/// Two addresses of the remote host in each family.
pub(crate) const REMOTE: [IpAddr; 4] = [v4(0, 2), v6(0xfd00, 2), v4(8, 3), v6(0xfd08, 3)];
pub(crate) const VM: [IpAddr; 2] = [v4(9, 2), v6(0xfd09, 2)];

/// The namespace that sends or receives a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Position {
    Pod,
    Remote,
    Vm,
}

/// The outcome of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Arrived(Arrival),
    Refused,
    /// The packet neither arrived nor was refused.
    Lost,
}

/// The receiver of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Arrival {
    pub(crate) position: Position,
    pub(crate) port: u16,
    /// The original destination that the pod's kernel reports.
    pub(crate) original: Option<SocketAddr>,
}

pub(crate) struct Network {
    pub(crate) pod: Namespace,
    remote: Namespace,
    vm: Namespace,
}

impl Network {
    pub(crate) fn new(name: &str) -> Result<Self, Failed> {
        let ConnectedPods { pod, remote } = ConnectedPods::new(name)?;
        let vm = Namespace::create_named(&format!("{name}-vm"))?;
        let pod_addresses = ["10.9.0.1/24".parse()?, "fd09::1/64".parse()?];
        let vm_addresses = ["10.9.0.2/24".parse()?, "fd09::2/64".parse()?];
        let end = |namespace, interface, addresses, default_route| Endpoint {
            namespace,
            interface,
            addresses,
            default_route,
        };
        let pod_end = end(&pod, "vm0", &pod_addresses[..], false);
        let vm_end = end(&vm, "eth0", &vm_addresses[..], true);
        runtime()?.block_on(veth(&pod_end, &vm_end))?;
        pod.run(|| {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
        })??;
        for address in &REMOTE[2..] {
            let length = if address.is_ipv4() { 32 } else { 128 };
            command(&remote, &format!("ip address add {address}/{length} dev lo"))?;
        }
        Ok(Self { pod, remote, vm })
    }

    fn namespace(&self, position: Position) -> &Namespace {
        match position {
            Position::Pod => &self.pod,
            Position::Remote => &self.remote,
            Position::Vm => &self.vm,
        }
    }

    /// Listens on every port of every namespace.
    pub(crate) fn listen(&self) -> Result<UnboundedReceiver<Arrival>, Failed> {
        let (sender, receiver) = unbounded_channel();
        for position in [Position::Pod, Position::Remote, Position::Vm] {
            let namespace = self.namespace(position);
            for port in TCP_PORTS {
                let listener = namespace.run(|| tcp(port))??;
                let listener = tokio::net::TcpListener::from_std(listener)?;
                tokio::spawn(accept(listener, position, port, sender.clone()));
            }
            for port in UDP_PORTS {
                let socket = namespace.run(|| udp(port))??;
                let socket = tokio::net::UdpSocket::from_std(socket)?;
                tokio::spawn(receive(socket, position, port, sender.clone()));
            }
        }
        Ok(receiver)
    }

    /// Sends a packet, and waits for its outcome.
    pub(crate) async fn send(
        &self,
        attempt: &Attempt,
        max_wait: Duration,
        arrivals: &mut UnboundedReceiver<Arrival>,
    ) -> Result<Outcome, Failed> {
        let to = attempt.packet.destination;
        let socket = self.namespace(attempt.from).run(|| open(attempt))??;
        let reached = match attempt.packet.protocol {
            Protocol::Tcp => connection(socket, to, max_wait, arrivals).await,
            Protocol::Udp => datagram(socket, to, max_wait, arrivals).await,
        };
        match reached {
            Ok(Some(arrival)) => Ok(Outcome::Arrived(arrival)),
            Ok(None) => Ok(Outcome::Lost),
            Err(error) if is_refusal(&error) => match arrivals.try_recv() {
                Ok(arrival) => Err(format!("refused, but arrived: {arrival:?}").into()),
                Err(_) => Ok(Outcome::Refused),
            },
            Err(error) => Err(format!("sending: {error}").into()),
        }
    }
}

/// Connects, and keeps the connection open until the listener has accepted it.
async fn connection(
    socket: Socket,
    to: SocketAddr,
    max_wait: Duration,
    arrivals: &mut UnboundedReceiver<Arrival>,
) -> io::Result<Option<Arrival>> {
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(to);
    let Ok(connected) = timeout(max_wait, connecting).await else {
        return Ok(None);
    };
    // The listener reads conntrack, which needs the open connection.
    let _stream = connected?;
    Ok(timeout(max_wait, arrivals.recv()).await.unwrap_or_default())
}

/// Sends a datagram. Returns whether it arrives or is refused.
async fn datagram(
    socket: Socket,
    to: SocketAddr,
    max_wait: Duration,
    arrivals: &mut UnboundedReceiver<Arrival>,
) -> io::Result<Option<Arrival>> {
    let socket = tokio::net::UdpSocket::from_std(socket.into())?;
    socket.connect(to).await?;
    socket.send(b"?").await?;
    let mut nothing = [0];
    let outcome = async {
        tokio::select! {
            arrival = arrivals.recv() => Ok(arrival),
            // No listener replies, so only an ICMP error ends this wait.
            refused = socket.recv(&mut nothing) => refused.map(|_| None),
        }
    };
    timeout(max_wait, outcome).await.unwrap_or(Ok(None))
}

/// The kernel reports EPERM if a rule rejects a datagram at its sender.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::PermissionDenied)
}

/// Opens the socket for a packet, on a separate thread.
fn open(attempt: &Attempt) -> io::Result<Socket> {
    let packet = &attempt.packet;
    if let Entry::Out { uid, gid, .. } = packet.entry {
        // Change the group first: only root may change it.
        setfsgid(Gid::from_raw(gid));
        setfsuid(Uid::from_raw(uid));
    }
    let kind = match packet.protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    let socket = Socket::new(Domain::for_address(packet.destination), kind.nonblocking(), None)?;
    if packet.mark != 0 {
        socket.set_mark(packet.mark)?;
    }
    let v4 = packet.source.is_ipv4();
    if v4 {
        socket.set_ip_transparent_v4(true)?
    } else {
        socket.set_ip_transparent_v6(true)?
    }
    socket.bind(&packet.source.into())?;
    Ok(socket)
}

/// Returns true if sockets of other users can be opened. A user namespace may have only one user.
pub(crate) fn can_change_user() -> bool {
    const OTHER: u32 = 1337;
    let changed = std::thread::spawn(|| {
        setfsgid(Gid::from_raw(OTHER));
        setfsuid(Uid::from_raw(OTHER));
        // These calls return the previous id, so the second call shows the result of the first.
        (setfsuid(Uid::from_raw(OTHER)).as_raw(), setfsgid(Gid::from_raw(OTHER)).as_raw())
    });
    changed.join().is_ok_and(|ids| ids == (OTHER, OTHER))
}

fn dual_stack(kind: Type, port: u16) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV6, kind.nonblocking(), None)?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    // TPROXY delivers packets for foreign addresses.
    socket.set_ip_transparent_v6(true)?;
    socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port).into())?;
    Ok(socket)
}

fn tcp(port: u16) -> io::Result<TcpListener> {
    let socket = dual_stack(Type::STREAM, port)?;
    socket.listen(16)?;
    Ok(socket.into())
}

fn udp(port: u16) -> io::Result<UdpSocket> {
    dual_stack(Type::DGRAM, port).map(Into::into)
}

async fn accept(
    listener: tokio::net::TcpListener,
    position: Position,
    port: u16,
    arrivals: UnboundedSender<Arrival>,
) {
    while let Ok((stream, client)) = listener.accept().await {
        let original = match position {
            Position::Pod => OriginalDestination::redirected(&stream, client.ip())
                .ok()
                .map(OriginalDestination::address),
            Position::Remote | Position::Vm => None,
        };
        if arrivals.send(Arrival { position, port, original }).is_err() {
            return;
        }
    }
}

async fn receive(
    socket: tokio::net::UdpSocket,
    position: Position,
    port: u16,
    arrivals: UnboundedSender<Arrival>,
) {
    let mut datagram = [0; 16];
    while socket.recv_from(&mut datagram).await.is_ok() {
        if arrivals.send(Arrival { position, port, original: None }).is_err() {
            return;
        }
    }
}

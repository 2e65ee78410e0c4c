//! Random settings and packets. A seed reproduces them.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a missing item of a list of this file fails the test"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use underpass_config::{
    Backend, Dns, InboundCapture, InboundMode, InterceptionSettings, Ipv6, KubeletProbes, OnExit,
    OutboundCapture, PortRange, Profile,
};
use underpass_interception::{
    ConntrackState, Entry, Environment, IpNet, KUBELET_PROBE_V4, KUBELET_PROBE_V6, PROXY_MARK,
    Packet, PolicyRoute, Protocol,
};

use super::Attempt;
use super::network::{POD, Position, REMOTE, TCP_PORTS, UDP_PORTS, VM};

/// The first source port. It is above all listeners, and outside of the kernel's ephemeral range.
const FIRST_SOURCE_PORT: u16 = 20000;
const NETWORKS: [&str; 6] =
    ["10.8.0.0/16", "fd08::/16", "10.0.0.2/32", "fd00::2/128", "10.0.0.0/24", "127.0.0.2/32"];

/// Enough networks with the same prefix length to form a hash set, in each family. The first one
/// contains a remote address.
fn many_networks() -> impl Iterator<Item = IpNet> {
    let network = |address: IpAddr, length| IpNet::new(address, length).expect("a length");
    (0..300).flat_map(move |n| {
        let v4 = Ipv4Addr::from_bits(Ipv4Addr::new(10, 8, 0, 0).to_bits() + (n << 4));
        let v6 = Ipv6Addr::new(0xfd08, 0, 0, 0, 0, 0, u16::try_from(n).expect("few"), 0);
        [network(v4.into(), 28), network(v6.into(), 112)]
    })
}

pub(crate) struct Random {
    state: u64,
    source_port: u16,
    /// The user and group ids that processes can have.
    ids: &'static [u32],
}

impl Random {
    pub(crate) fn new(seed: u64, users: bool) -> Self {
        if !users {
            warn();
        }
        let ids: &[u32] = if users { &[0, 33, 1000, 1337, 1500] } else { &[0] };
        Self { state: seed, source_port: FIRST_SOURCE_PORT, ids }
    }

    /// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).expect("below a usize")
    }

    /// Returns true once in `times` calls on average.
    fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    /// Selects values: usually none, otherwise one or two.
    fn some<T: Clone>(&mut self, from: &[T]) -> Vec<T> {
        let count = [0, 0, 1, 2][self.below(4)];
        (0..count).map(|_| self.pick(from)).collect()
    }

    fn ports(&mut self) -> Vec<PortRange> {
        let ranges = [(80, 80), (443, 443), (8000, 8080), (53, 80), (15010, 15021)];
        self.some(&ranges.map(|(first, last)| PortRange { first, last }))
    }

    fn networks(&mut self) -> Vec<IpNet> {
        self.some(&NETWORKS.map(|text| text.parse().expect("a network")))
    }

    fn interfaces(&mut self) -> Vec<String> {
        self.some(&["eth0".to_owned(), "vm0".to_owned()])
    }

    /// Creates random valid settings.
    pub(crate) fn settings(&mut self, profile: Profile) -> InterceptionSettings {
        let sidecar = profile == Profile::Sidecar;
        let backend = self.pick(&[Backend::Nftables, Backend::Nftables, Backend::Iptables]);
        let dns = if profile != Profile::Osm && self.one_in(2) { Dns::Capture } else { Dns::Off };
        let servers = [REMOTE[0], REMOTE[1]];
        let some = |given: bool, list: Vec<u32>| if given { list } else { Vec::new() };
        let proxy_owners = self.proxy_owners(backend);
        let exact = self.one_in(3);
        let loopback = if sidecar && self.one_in(4) { "127.0.0.0/8" } else { "127.0.0.1/32" };
        InterceptionSettings {
            profile,
            backend,
            exact,
            install: true,
            repair: false,
            ipv6: self.pick(&[Ipv6::Capture, Ipv6::Capture, Ipv6::Reject, Ipv6::Bypass]),
            on_exit: OnExit::Keep,
            allow_host: false,
            outbound: self.outbound(backend, sidecar, exact),
            inbound: self.inbound(sidecar),
            virtual_interfaces: self.virtual_interfaces(profile),
            proxy_uids: some(profile != Profile::Ambient, proxy_owners.clone()),
            proxy_gids: some(sidecar, proxy_owners),
            dns,
            dns_servers: if dns == Dns::Capture { self.some(&servers) } else { Vec::new() },
            drop_invalid: self.one_in(3),
            ingress: profile == Profile::Ambient && self.one_in(4),
            kubelet_probes: self.kubelet_probes(profile, exact),
            loopback_cidr: loopback.parse().expect("a network"),
        }
    }

    fn kubelet_probes(&mut self, profile: Profile, exact: bool) -> KubeletProbes {
        match (profile, self.below(3)) {
            (Profile::Ambient, _) if exact => KubeletProbes::On,
            (Profile::Ambient, 1) => KubeletProbes::On,
            (Profile::Ambient, 2) => KubeletProbes::Ports(vec!["80-443".parse().expect("ports")]),
            _ => KubeletProbes::Off,
        }
    }

    /// Selects users or groups, limited to those that the backend supports.
    fn owners(&mut self, backend: Backend, owners: &[u32]) -> Vec<u32> {
        let nameable = |owner: &&u32| backend == Backend::Nftables || self.ids.contains(owner);
        let owners: Vec<u32> = owners.iter().filter(nameable).copied().collect();
        if owners.is_empty() { owners } else { self.some(&owners) }
    }

    fn proxy_owners(&mut self, backend: Backend) -> Vec<u32> {
        // If there is a single user, either all processes or none belong to the proxy.
        let choices: &[&[u32]] = match self.ids.len() {
            1 if backend == Backend::Nftables => &[&[1337], &[0]],
            1 => &[&[0]],
            _ => &[&[1337], &[1337, 33], &[0]],
        };
        self.pick(choices).to_vec()
    }

    fn outbound(&mut self, backend: Backend, sidecar: bool, exact: bool) -> OutboundCapture {
        let include_cidrs = self.one_in(3).then(|| self.networks());
        let groups = self.owners(backend, &[0, 33, 1000]);
        let include = sidecar && self.one_in(2);
        let (exclude_gids, include_gids) =
            if include { (Vec::new(), groups) } else { (groups, Vec::new()) };
        let mut exclude_cidrs = self.networks();
        // Other backends need a rule or line for each network, so that a round would take seconds.
        if backend == Backend::Nftables && !exact && self.one_in(3) {
            exclude_cidrs.extend(many_networks());
        }
        OutboundCapture {
            exclude_cidrs,
            include_cidrs,
            exclude_ports: self.ports(),
            include_ports: self.ports(),
            exclude_interfaces: if self.one_in(4) { self.interfaces() } else { Vec::new() },
            exclude_uids: self.owners(backend, &[33, 1000]),
            exclude_gids,
            include_gids,
        }
    }

    fn inbound(&mut self, sidecar: bool) -> InboundCapture {
        let tproxy = sidecar && self.one_in(2);
        let include_ports = self.one_in(3).then(|| self.ports());
        InboundCapture {
            mode: if tproxy { InboundMode::Tproxy } else { InboundMode::Redirect },
            exclude_ports: if include_ports.is_none() { self.ports() } else { Vec::new() },
            include_ports,
            exclude_interfaces: if self.one_in(4) { self.interfaces() } else { Vec::new() },
        }
    }

    fn virtual_interfaces(&mut self, profile: Profile) -> Vec<String> {
        if profile != Profile::Osm && self.one_in(3) { vec!["vm0".to_owned()] } else { Vec::new() }
    }

    /// Creates a random packet that can exist.
    pub(crate) fn attempt(
        &mut self,
        settings: &InterceptionSettings,
        environment: &Environment,
        routes: &[PolicyRoute],
    ) -> Attempt {
        self.source_port += 1;
        let v6 = self.one_in(3);
        let family = |addresses: &[IpAddr]| -> Vec<IpAddr> {
            addresses.iter().copied().filter(|address| address.is_ipv6() == v6).collect()
        };
        let udp = self.one_in(4);
        let (protocol, port) = if udp {
            (Protocol::Udp, self.pick(&UDP_PORTS))
        } else {
            (Protocol::Tcp, self.pick(&TCP_PORTS))
        };
        let (from, source, to, mut entry) = match self.below(6) {
            0 => {
                let probe = [KUBELET_PROBE_V4.into(), KUBELET_PROBE_V6.into()];
                let source = if self.one_in(3) { family(&probe) } else { family(&REMOTE[..2]) };
                let to = self.pick(&family(&POD));
                (Position::Remote, source[0], to, Entry::In { interface: "eth0".to_owned() })
            }
            1 => {
                let to = self.pick(&[family(&POD), family(&REMOTE)].concat());
                (Position::Vm, family(&VM)[0], to, Entry::In { interface: "vm0".to_owned() })
            }
            _ => self.local(settings, environment, &family),
        };
        let mark = self.mark(&entry, source);
        // The mark affects the route of the socket.
        if let Entry::Out { interface, .. } = &mut entry
            && routes.iter().any(|route| route.mark.matches(mark))
        {
            "lo".clone_into(interface);
        }
        let packet = Packet {
            protocol,
            source: SocketAddr::new(source, self.source_port),
            destination: SocketAddr::new(to, port),
            entry,
            state: ConntrackState::New,
            mark,
            connection_mark: 0,
        };
        Attempt { from, packet }
    }

    /// Creates a packet from a process of the pod.
    fn local(
        &mut self,
        settings: &InterceptionSettings,
        environment: &Environment,
        family: &impl Fn(&[IpAddr]) -> Vec<IpAddr>,
    ) -> (Position, IpAddr, IpAddr, Entry) {
        let loopback: [IpAddr; 3] = [
            Ipv4Addr::LOCALHOST.into(),
            Ipv4Addr::new(127, 0, 0, 2).into(),
            Ipv6Addr::LOCALHOST.into(),
        ];
        let to =
            self.pick(&[family(&loopback), family(&POD), family(&REMOTE), family(&VM)].concat());
        let last_hop =
            [Ipv4Addr::new(127, 0, 0, 6).into(), Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into()];
        let local = environment.is_local(to);
        let (uid, gid) = (self.pick(self.ids), self.pick(self.ids));
        let source = if local && settings.profile == Profile::Sidecar && self.one_in(3) {
            family(&last_hop)[0]
        } else if preserves_source(settings, to) && self.one_in(3) {
            family(&REMOTE)[0]
        } else if to.is_loopback() {
            family(&[Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()])[0]
        } else if local {
            to
        } else if VM.contains(&to) {
            family(&POD[2..])[0]
        } else {
            family(&POD)[0]
        };
        let interface = environment.interface_to(to).to_owned();
        let entry = Entry::Out { interface, uid, gid };
        (Position::Pod, source, to, entry)
    }

    /// The mark of the socket. A connection from a client's address usually has the proxy's mark,
    /// because replies would be misrouted otherwise.
    fn mark(&mut self, entry: &Entry, source: IpAddr) -> u32 {
        match entry {
            Entry::In { .. } => 0,
            Entry::Out { .. } if REMOTE.contains(&source) && !self.one_in(4) => PROXY_MARK,
            Entry::Out { .. } => self.pick(&[0, 0, 0x1000, PROXY_MARK, 0x1000 | PROXY_MARK]),
        }
    }
}

/// Returns true if the proxy connects to this address of the pod from a client's address.
fn preserves_source(settings: &InterceptionSettings, to: IpAddr) -> bool {
    let tproxy = settings.inbound.mode == InboundMode::Tproxy;
    POD.contains(&to) && (tproxy || settings.profile == Profile::Ambient)
}

#[expect(clippy::print_stderr, reason = "a test that covers less must report it")]
fn warn() {
    eprintln!(
        "walk: NO OTHER USERS HERE: matches of users and groups are tested with user and group 0 only"
    );
}

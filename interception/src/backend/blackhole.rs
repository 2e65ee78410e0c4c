//! The blackhole: ip rules that drop the workload's TCP while the netfilter rules are missing.
//!
//! ```text
//! 1: fwmark 0x539/0xfff goto 3              the proxy's own packets, and excluded traffic
//! 1: ipproto tcp dport 5432 goto 3
//! 2: iif lo ipproto tcp blackhole           traffic that the rules would capture
//! 3: nop
//! ```
//!
//! It cannot be permanent: the kernel routes the first packet before nat OUTPUT redirects it, so a
//! permanent blackhole would break every connection. The local table (priority 0) comes first, so
//! loopback and local addresses work.
//!
//! ip rules cannot express every exemption of netfilter, so the blackhole ignores some: excluded
//! and included groups, included inbound ports, the excluded port 65535, and excluded interfaces,
//! unless a socket is bound to one (SO_BINDTODEVICE).
//!
//! The proxy decides when to install it.

mod messages;

use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;
use nlink::netlink::{Connection, Route as Rtnetlink};
use underpass_config::{
    Dns, InboundMode, InterceptionSettings, Ipv6, KubeletProbes, PortRange, Profile,
};

use self::messages::{BATCH_SIZE, remove_request, send};
use crate::backend::netlink::failed;
use crate::backend::routes::{PROTOCOL, Version, connect};
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::{
    KUBELET_PROBE_IN, KUBELET_PROBE_V4, KUBELET_PROBE_V6, MARK_MASK, Mark, PROXY_MARK, Ports,
    RulePlan,
};
use crate::process::user_ids::UserIds;

/// The priorities of the exemptions, of the blackhole, and of the target of the exemptions. They
/// directly follow the local table and precede all other ip rules.
const EXEMPTION_PRIORITY: u32 = 1;
const BLACKHOLE_PRIORITY: u32 = 2;
const TARGET_PRIORITY: u32 = 3;
/// IPPROTO_TCP and IPPROTO_UDP (include/uapi/linux/in.h).
const TCP: u8 = 6;
const UDP: u8 = 17;
/// The number of exemptions that are installed before the blackhole. Further exemptions are
/// installed after it; until then, their traffic is blocked too.
const MAX_EXEMPTIONS_BEFORE_BLACKHOLE: usize = 4 * BATCH_SIZE;

/// The ip rules that are installed while the netfilter rules are missing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Blackhole {
    rules: Vec<IpRule>,
}

/// An ip rule. A missing selector matches everything.
#[derive(Debug, Clone, PartialEq, Eq)]
struct IpRule {
    version: Version,
    verdict: Verdict,
    selector: Selector,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Continue after the blackhole.
    Exempt,
    /// Drop: `connect` fails with EINVAL, and the packets of open connections are dropped.
    Blackhole,
    /// The target of the exemptions, which does nothing.
    End,
}

/// The selector of an ip rule.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Selector {
    Everything,
    Mark(Mark),
    Uid(u32),
    /// Packets to this network. With `ports`, only TCP packets from these source ports.
    To {
        network: IpNet,
        from: Option<PortRange>,
    },
    Out(String),
    SourcePorts(PortRange),
    DestinationPorts(PortRange),
    /// Packets of this protocol from this interface. `lo` matches packets that the namespace sends.
    From {
        interface: String,
        protocol: u8,
        to: Option<IpNet>,
        ports: Option<PortRange>,
    },
}

impl Blackhole {
    /// Creates the rules that block all traffic that `settings` capture, except the proxy's own.
    pub(crate) fn new(settings: &InterceptionSettings, ports: Ports, plan: &RulePlan) -> Self {
        if settings.profile == Profile::None {
            return Self::default();
        }
        let mut versions = vec![Version::V4];
        if settings.ipv6 != Ipv6::Bypass {
            versions.push(Version::V6);
        }
        let exemptions = exemptions(settings, ports, plan);
        let blocked = blocked(settings);
        let mut rules = Vec::new();
        for version in versions {
            let of_version = |verdict, selectors: &[Selector]| -> Vec<IpRule> {
                let selectors = selectors.iter().filter(|selector| selector.is_of(version));
                let rule =
                    |selector: &Selector| IpRule { version, verdict, selector: selector.clone() };
                selectors.map(rule).collect()
            };
            let exempt = of_version(Verdict::Exempt, &exemptions);
            let (first, rest) = exempt.split_at(exempt.len().min(MAX_EXEMPTIONS_BEFORE_BLACKHOLE));
            rules.push(IpRule { version, verdict: Verdict::End, selector: Selector::Everything });
            rules.extend_from_slice(first);
            rules.extend(of_version(Verdict::Blackhole, &blocked));
            rules.extend_from_slice(rest);
        }
        Self { rules }
    }

    /// Adds the missing ip rules.
    ///
    /// # Errors
    ///
    /// The kernel rejected one of them.
    pub(crate) async fn install(&self, entered: &Entered) -> Result<(), InterceptionError> {
        const OPERATION: &str = "install the blackhole";
        let connection = connect(entered, OPERATION)?;
        let tolerated = [Errno::EEXIST];
        // Skip IPv6 if the kernel lacks it. Skip users outside of the user namespace: the kernel
        // rejects ip rules for them, and they have no processes here.
        let users = UserIds::of_users();
        let rules = self.rules.iter().filter(|rule| match rule.selector {
            _ if rule.version == Version::V6 && !crate::namespace::ipv6::ipv6_available() => false,
            Selector::Uid(uid) => users.contain(uid),
            _ => true,
        });
        let requests: Vec<_> = rules.map(IpRule::add_request).collect();
        send(connection.socket(), requests, &tolerated).await.map_err(failed(OPERATION))?;
        Ok(())
    }
}

/// Removes a blackhole that any process has installed, with any settings. Returns `false` if there
/// is none.
///
/// # Errors
///
/// The kernel rejected the removal.
pub(crate) async fn remove(entered: &Entered) -> Result<bool, InterceptionError> {
    const OPERATION: &str = "remove the blackhole";
    let connection = connect(entered, OPERATION)?;
    let mut installed_rules = installed_rules(&connection).await.map_err(failed(OPERATION))?;
    // Remove the blackhole first: without its exemptions it would block the proxy.
    installed_rules.sort_by_key(|(_, priority)| (*priority != BLACKHOLE_PRIORITY, *priority));
    let requests: Vec<_> = installed_rules
        .iter()
        .map(|(version, priority)| remove_request(*version, *priority))
        .collect();
    let gone = [Errno::ENOENT, Errno::EAFNOSUPPORT];
    send(connection.socket(), requests, &gone).await.map_err(failed(OPERATION))?;
    Ok(!installed_rules.is_empty())
}

/// Returns true while the blackhole is installed.
///
/// # Errors
///
/// The ip rules cannot be listed.
pub(crate) async fn is_installed(entered: &Entered) -> Result<bool, InterceptionError> {
    const OPERATION: &str = "read the ip rules";
    let installed_rules =
        installed_rules(&connect(entered, OPERATION)?).await.map_err(failed(OPERATION))?;
    Ok(installed_rules.iter().any(|(_, priority)| *priority == BLACKHOLE_PRIORITY))
}

/// Lists the ip rules of a blackhole with any settings: family and priority.
async fn installed_rules(connection: &Connection<Rtnetlink>) -> nlink::Result<Vec<(Version, u32)>> {
    let rules = connection.get_rules().await?;
    let ours = rules.iter().filter(|rule| {
        rule.protocol() == Some(PROTOCOL)
            && (EXEMPTION_PRIORITY..=TARGET_PRIORITY).contains(&rule.priority())
    });
    let version = |v4: bool| if v4 { Version::V4 } else { Version::V6 };
    Ok(ours.map(|rule| (version(rule.is_ipv4()), rule.priority())).collect())
}

/// The traffic that is never blocked: the proxy's own, and traffic that the rules do not capture.
fn exemptions(settings: &InterceptionSettings, ports: Ports, plan: &RulePlan) -> Vec<Selector> {
    let (outbound, inbound) = (&settings.outbound, &settings.inbound);
    let mut exemptions = Vec::new();
    // In the sidecar profile with TPROXY, the proxy's connections from a client's address carry the
    // mark.
    if settings.profile == Profile::Ambient || inbound.mode == InboundMode::Tproxy {
        exemptions.push(Selector::Mark(Mark { value: PROXY_MARK, mask: MARK_MASK }));
    }
    if matches!(settings.profile, Profile::Sidecar | Profile::Osm) {
        exemptions.extend(settings.proxy_uids.iter().map(|uid| Selector::Uid(*uid)));
    }
    // The kernel sends a SYN-ACK with the user of the listener: the privileged user that opened it.
    let services = ports.services.map(|service| service.port());
    let own = [ports.outbound, ports.inbound, ports.hbone].into_iter().chain(services);
    let own: Vec<_> = own.map(PortRange::from).collect();
    exemptions.extend(expressible(&own).map(Selector::SourcePorts));
    if plan.rules().iter().any(|rule| rule.id == KUBELET_PROBE_IN) {
        exemptions.extend(probe_replies(&settings.kubelet_probes));
    }
    exemptions.extend(expressible(&inbound.exclude_ports).map(Selector::SourcePorts));
    exemptions.extend(expressible(&outbound.exclude_ports).map(Selector::DestinationPorts));
    exemptions.extend(outbound.exclude_uids.iter().map(|uid| Selector::Uid(*uid)));
    exemptions.extend(outbound.exclude_interfaces.iter().cloned().map(Selector::Out));
    let to = |network: &IpNet| Selector::To { network: *network, from: None };
    exemptions.extend(outbound.exclude_cidrs.iter().map(to));
    exemptions
}

/// The workload's replies to kubelet probes, from the exempted ports.
fn probe_replies(probes: &KubeletProbes) -> Vec<Selector> {
    let from: Vec<_> = match probes {
        KubeletProbes::Ports(ports) => expressible(ports).map(Some).collect(),
        KubeletProbes::Off | KubeletProbes::On => vec![None],
    };
    let addresses: [IpAddr; 2] = [KUBELET_PROBE_V4.into(), KUBELET_PROBE_V6.into()];
    let to = |address: &IpAddr, from| Selector::To { network: (*address).into(), from };
    from.iter().flat_map(|from| addresses.iter().map(move |address| to(address, *from))).collect()
}

/// The part of the port ranges that an ip rule can express: all ports but 0 and 65535
/// (`fib_rule_port_range_valid`, include/net/fib_rules.h).
fn expressible(ports: &[PortRange]) -> impl Iterator<Item = PortRange> {
    let bounded = |range: &PortRange| {
        let (first, last) = (range.first.max(1), range.last.min(u16::MAX - 1));
        (first <= last).then_some(PortRange { first, last })
    };
    ports.iter().filter_map(bounded)
}

/// Traffic that the rules would capture.
fn blocked(settings: &InterceptionSettings) -> Vec<Selector> {
    let outbound = &settings.outbound;
    let mut blocked = Vec::new();
    let own = std::iter::once("lo");
    for interface in own.chain(settings.virtual_interfaces.iter().map(String::as_str)) {
        let refusal = |protocol, to, ports| {
            let interface = interface.to_owned();
            Selector::From { interface, protocol, to, ports }
        };
        match &outbound.include_cidrs {
            None => blocked.push(refusal(TCP, None, None)),
            Some(included) => {
                blocked.extend(included.iter().map(|cidr| refusal(TCP, Some(*cidr), None)));
                // If an ip rule cannot express one of the ranges, block all ports (fail closed).
                let whole = |range: &PortRange| expressible(&[*range]).find(|part| part == range);
                let ports = outbound.include_ports.iter().map(whole);
                blocked.extend(ports.map(|ports| refusal(TCP, None, ports)));
            }
        }
        if settings.dns == Dns::Capture {
            blocked.push(refusal(UDP, None, Some(53.into())));
        }
    }
    blocked
}

impl Selector {
    /// Returns true if the selector can match packets of this IP version.
    fn is_of(&self, version: Version) -> bool {
        let (Self::To { network, .. } | Self::From { to: Some(network), .. }) = self else {
            return true;
        };
        matches!(network, IpNet::V4(_)) == (version == Version::V4)
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::Sources;

    use super::*;

    fn blackhole(assignments: &[&str]) -> Blackhole {
        let flags = assignments.iter().map(|assignment| format!("interception.{assignment}"));
        let sources = Sources { flags: flags.collect(), ..Sources::default() };
        let settings = sources.load().expect("settings");
        let ports = Ports::of(&settings);
        let plan = RulePlan::new(&settings.interception, ports, true);
        Blackhole::new(&settings.interception, ports, &plan)
    }

    fn selectors(blackhole: &Blackhole, version: Version, verdict: Verdict) -> Vec<Selector> {
        let rules = blackhole.rules.iter();
        let wanted = rules.filter(|rule| rule.version == version && rule.verdict == verdict);
        wanted.map(|rule| rule.selector.clone()).collect()
    }

    fn refused(to: Option<&str>, ports: Option<PortRange>) -> Selector {
        let to = to.map(|to| to.parse().expect("a network"));
        Selector::From { interface: "lo".to_owned(), protocol: TCP, to, ports }
    }

    fn to(network: &str) -> Selector {
        Selector::To { network: network.parse().expect("a network"), from: None }
    }

    #[test]
    fn limits_ports_to_range_of_ip_rules() {
        let exempt =
            |settings: &[&str]| selectors(&blackhole(settings), Version::V4, Verdict::Exempt);
        let excluded =
            exempt(&["outbound.exclude_ports=1024-65535", "inbound.exclude_ports=65535"]);
        let range = PortRange { first: 1024, last: 65534 };
        assert!(excluded.contains(&Selector::DestinationPorts(range)), "{excluded:?}");
        assert!(!excluded.contains(&Selector::SourcePorts(65535.into())), "{excluded:?}");
        let included =
            blackhole(&["outbound.include_cidrs=none", "outbound.include_ports=1024-65535"]);
        let blocked = selectors(&included, Version::V4, Verdict::Blackhole);
        assert_eq!(blocked, [refused(None, None)], "all ports are blocked");
    }

    #[test]
    fn exempts_probe_replies_from_declared_ports_only() {
        let exempt = |probes: &str| {
            let blackhole = blackhole(&[&format!("kubelet_probes={probes}")]);
            let exempt = selectors(&blackhole, Version::V4, Verdict::Exempt).into_iter();
            exempt.filter(|selector| matches!(selector, Selector::To { .. })).collect::<Vec<_>>()
        };
        let probe: IpNet = "169.254.7.127/32".parse().expect("a network");
        let answers = |from| vec![Selector::To { network: probe, from }];
        assert_eq!(exempt("off"), []);
        assert_eq!(exempt("on"), answers(None));
        assert_eq!(exempt("8080"), answers(Some(8080.into())));
    }

    #[test]
    fn blocks_unmarked_tcp_in_ambient() {
        let blackhole = blackhole(&["profile=ambient"]);
        for version in [Version::V4, Version::V6] {
            assert_eq!(selectors(&blackhole, version, Verdict::Blackhole), [refused(None, None)]);
            let exempt = selectors(&blackhole, version, Verdict::Exempt);
            assert!(exempt.contains(&Selector::Mark(Mark { value: 0x539, mask: 0xfff })));
            assert!(exempt.contains(&Selector::SourcePorts(15021.into())), "{exempt:?}");
        }
    }

    #[test]
    fn exempts_proxy_users_in_sidecar_and_osm() {
        for (profile, uid) in [("sidecar", 1337), ("osm", 1500)] {
            let blackhole = blackhole(&[&format!("profile={profile}")]);
            let exempt = selectors(&blackhole, Version::V4, Verdict::Exempt);
            assert!(exempt.contains(&Selector::Uid(uid)), "{exempt:?}");
            assert!(!exempt.iter().any(|selector| matches!(selector, Selector::Mark(_))));
        }
    }

    #[test]
    fn exempts_excluded_traffic() {
        let blackhole = blackhole(&[
            "profile=ambient",
            "outbound.exclude_cidrs=10.0.0.0/8,fd00::/8",
            "outbound.exclude_ports=5432,8000-8100",
            "outbound.exclude_uids=7",
            "outbound.exclude_interfaces=eth1",
            "inbound.exclude_ports=22",
        ]);
        let v4 = selectors(&blackhole, Version::V4, Verdict::Exempt);
        for selector in [
            to("10.0.0.0/8"),
            Selector::DestinationPorts(5432.into()),
            Selector::DestinationPorts(PortRange { first: 8000, last: 8100 }),
            Selector::Uid(7),
            Selector::Out("eth1".to_owned()),
            Selector::SourcePorts(22.into()),
        ] {
            assert!(v4.contains(&selector), "{selector:?} is not in {v4:?}");
        }
        let v6 = selectors(&blackhole, Version::V6, Verdict::Exempt);
        assert!(v6.contains(&to("fd00::/8")));
        assert!(!v6.contains(&to("10.0.0.0/8")));
    }

    #[test]
    fn blocks_only_included_networks_and_ports() {
        let blackhole = blackhole(&[
            "profile=sidecar",
            "outbound.include_cidrs=10.0.0.0/8",
            "outbound.include_ports=80",
        ]);
        let expected = [refused(Some("10.0.0.0/8"), None), refused(None, Some(80.into()))];
        assert_eq!(selectors(&blackhole, Version::V4, Verdict::Blackhole), expected);
        let expected = [refused(None, Some(80.into()))];
        assert_eq!(selectors(&blackhole, Version::V6, Verdict::Blackhole), expected);
    }

    #[test]
    fn ignores_ipv6_that_rules_do_not_capture() {
        let blackhole = blackhole(&["profile=ambient", "ipv6=bypass"]);
        assert!(blackhole.rules.iter().all(|rule| rule.version == Version::V4));
    }

    #[test]
    fn proxy_exemptions_are_added_before_blackhole() {
        let cidrs: Vec<_> = (0..200).map(|n| format!("10.0.{n}.0/24")).collect();
        let blackhole =
            blackhole(&["profile=ambient", &format!("outbound.exclude_cidrs={}", cidrs.join(","))]);
        let position = |wanted: &dyn Fn(&IpRule) -> bool| blackhole.rules.iter().position(wanted);
        let refusal = position(&|rule| rule.verdict == Verdict::Blackhole);
        let own = position(&|rule| matches!(rule.selector, Selector::Mark(_)));
        assert!(own < refusal && own.is_some(), "{own:?} {refusal:?}");
        assert!(refusal < Some(MAX_EXEMPTIONS_BEFORE_BLACKHOLE + 2), "{refusal:?}");
    }
}

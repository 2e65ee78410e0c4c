//! Tests of the evaluation: plans that show one behaviour of the kernel each, and the plans of the
//! profiles.

use std::net::{IpAddr, SocketAddr};

use super::super::{Chain, Families, Mark, Origin, PolicyRoute};
use super::*;

const PORT: u16 = 15001;

/// A rule: chain, matches, action. Its id is its index in the list.
type Line = (ChainId, Vec<Match>, Action);

const fn chain(table: Table, name: &'static str) -> ChainId {
    ChainId { table, name }
}

const OUTPUT: ChainId = chain(Table::Nat, "OUTPUT");
const PREROUTING: ChainId = chain(Table::Nat, "PREROUTING");
const INPUT: ChainId = chain(Table::Filter, "INPUT");
const MARKS: ChainId = chain(Table::Mangle, "PREROUTING");
const MARKS_OUT: ChainId = chain(Table::Mangle, "OUTPUT");
const ONE: ChainId = chain(Table::Nat, "ONE");
const TWO: ChainId = chain(Table::Nat, "TWO");

fn plan(lines: Vec<Line>) -> RulePlan {
    let mut chains: Vec<Chain> = Vec::new();
    let mut rules = Vec::new();
    for (number, (chain, matches, action)) in lines.into_iter().enumerate() {
        let hook = match chain.name {
            "PREROUTING" => Some(Hook::Prerouting),
            "INPUT" => Some(Hook::Input),
            "OUTPUT" => Some(Hook::Output),
            _ => None,
        };
        if chains.iter().all(|known| known.id != chain) {
            chains.push(Chain { id: chain, hook });
        }
        rules.push(Rule {
            id: number.to_string(),
            reason: "a test",
            origin: Origin::Mesh,
            chain,
            families: Families::Both,
            matches,
            action,
            nftables_only: false,
        });
    }
    RulePlan { chains, rules, routes: Vec::new(), addresses: Vec::new() }
}

fn pod() -> Environment {
    let interface = |name: &str, addresses: &[&str]| Interface {
        name: name.to_owned(),
        addresses: addresses.iter().map(|text| text.parse().expect("a network")).collect(),
    };
    Environment {
        interfaces: vec![
            interface("lo", &["127.0.0.1/8", "::1/128"]),
            interface("eth0", &["10.0.0.1/24", "fe80::1/64", "fd00::1/64"]),
            interface("vm0", &["10.9.0.1/24"]),
        ],
    }
}

fn at(address: &str) -> SocketAddr {
    address.parse().expect("an address and port")
}

/// A SYN that a process with user and group 0 sends.
fn outgoing(to: &str) -> Packet {
    let destination = at(to);
    let own: IpAddr =
        if destination.is_ipv4() { [10, 0, 0, 1].into() } else { at("[fd00::1]:0").ip() };
    Packet {
        protocol: Protocol::Tcp,
        source: SocketAddr::new(own, 40000),
        destination,
        entry: Entry::Out {
            interface: pod().interface_to(destination.ip()).to_owned(),
            uid: 0,
            gid: 0,
        },
        state: ConntrackState::New,
        mark: 0,
        connection_mark: 0,
    }
}

/// A SYN that arrives at eth0.
fn arriving(to: &str) -> Packet {
    let entry = Entry::In { interface: "eth0".to_owned() };
    Packet { source: at("10.0.0.2:40000"), entry, ..outgoing(to) }
}

fn ids(walk: &Walk<'_>) -> Vec<String> {
    walk.rules().map(|rule| rule.id.clone()).collect()
}

fn passed(walk: &Walk<'_>) -> Vec<String> {
    walk.traversed.iter().map(|chain| chain.chain.nftables_name()).collect()
}

#[test]
fn unmatched_packet_reaches_its_destination() {
    let plan = plan(vec![(OUTPUT, vec![Match::Protocol(Protocol::Udp)], Action::Redirect(PORT))]);
    let packet = outgoing("10.0.0.2:80");
    let walk = plan.walk(&packet, &pod());
    assert_eq!((walk.end, walk.destination), (Verdict::Direct, packet.destination));
    assert_eq!(passed(&walk), ["nat_output"]);
    assert_eq!(ids(&walk), [""; 0]);
}

#[test]
fn redirect_of_sent_packet_leads_to_loopback_once() {
    let everywhere = [OUTPUT, PREROUTING, INPUT];
    let plan = plan(
        everywhere
            .into_iter()
            .map(|chain| {
                (
                    chain,
                    vec![],
                    if chain == INPUT { Action::Accept } else { Action::Redirect(PORT) },
                )
            })
            .collect(),
    );
    for (to, end) in [("10.0.0.2:80", "127.0.0.1:15001"), ("[fd00::2]:80", "[::1]:15001")] {
        let packet = outgoing(to);
        let walk = plan.walk(&packet, &pod());
        assert_eq!((walk.end, walk.destination), (Verdict::Redirected(PORT), at(end)));
        assert_eq!(passed(&walk), ["nat_output", "filter_input"]);
    }
}

#[test]
fn redirect_of_arriving_packet_leads_to_interface_address() {
    let plan = plan(vec![(PREROUTING, vec![], Action::Redirect(PORT))]);
    let mut packet = arriving("192.0.2.1:80");
    packet.entry = Entry::In { interface: "vm0".to_owned() };
    let environment = pod();
    assert_eq!(plan.walk(&packet, &environment).destination, at("10.9.0.1:15001"));
    let v6 = arriving("[fd00::9]:80");
    assert_eq!(plan.walk(&v6, &environment).destination, at("[fd00::1]:15001"));
}

#[test]
fn forwarded_packet_skips_input() {
    let plan = plan(vec![(MARKS, vec![], Action::Return), (INPUT, vec![], Action::Drop)]);
    assert_eq!(plan.walk(&arriving("192.0.2.1:80"), &pod()).end, Verdict::Direct);
    assert_eq!(plan.walk(&arriving("10.0.0.1:80"), &pod()).end, Verdict::Dropped);
}

#[test]
fn nat_sees_only_first_packet_of_connection() {
    let plan = plan(vec![
        (OUTPUT, vec![], Action::Redirect(PORT)),
        (PREROUTING, vec![], Action::Redirect(PORT)),
    ]);
    for (state, captured) in [
        (ConntrackState::New, true),
        (ConntrackState::PickedUp, true),
        (ConntrackState::Established(Direction::Original), false),
        (ConntrackState::Established(Direction::Reply), false),
        (ConntrackState::Invalid, false),
    ] {
        for packet in [outgoing("10.0.0.2:80"), arriving("10.0.0.1:80")] {
            let packet = Packet { state, ..packet };
            let walk = plan.walk(&packet, &pod());
            assert_eq!(!walk.traversed.is_empty(), captured, "{state:?}");
            assert_eq!(walk.end == Verdict::Redirected(PORT), captured, "{state:?}");
        }
    }
}

#[test]
fn chain_returns_to_rule_after_jump() {
    let plan = plan(vec![
        (OUTPUT, vec![], Action::Jump(ONE)),
        (OUTPUT, vec![], Action::Redirect(1)),
        (ONE, vec![], Action::Jump(TWO)),
        (ONE, vec![Match::Uid(vec![0])], Action::Return),
        (ONE, vec![], Action::Redirect(2)),
        (TWO, vec![Match::Uid(vec![7])], Action::Redirect(3)),
    ]);
    let packet = outgoing("10.0.0.2:80");
    let walk = plan.walk(&packet, &pod());
    assert_eq!(ids(&walk), ["0", "2", "3", "1"]);
    assert_eq!(walk.end, Verdict::Redirected(1));
}

#[test]
fn accept_skips_only_the_rest_of_its_table() {
    let plan = plan(vec![
        (OUTPUT, vec![], Action::Jump(ONE)),
        (OUTPUT, vec![], Action::Redirect(1)),
        (ONE, vec![], Action::Accept),
        (chain(Table::Filter, "OUTPUT"), vec![], Action::Reject),
    ]);
    let packet = outgoing("10.0.0.2:80");
    let walk = plan.walk(&packet, &pod());
    assert_eq!(ids(&walk), ["0", "2", "3"]);
    assert_eq!(walk.end, Verdict::Rejected);
}

#[test]
fn return_from_base_chain_ends_it() {
    let plan = plan(vec![(OUTPUT, vec![], Action::Return), (OUTPUT, vec![], Action::Drop)]);
    assert_eq!(plan.walk(&outgoing("10.0.0.2:80"), &pod()).end, Verdict::Direct);
}

#[test]
fn circular_jumps_terminate() {
    let plan = plan(vec![(OUTPUT, vec![], Action::Jump(ONE)), (ONE, vec![], Action::Jump(ONE))]);
    assert_eq!(plan.walk(&outgoing("10.0.0.2:80"), &pod()).end, Verdict::Direct);
}

#[test]
fn tables_run_by_priority() {
    let plan = plan(
        [Table::Filter, Table::Nat, Table::Mangle, Table::Raw]
            .map(|table| (chain(table, "OUTPUT"), vec![], Action::Return))
            .into(),
    );
    let walk = plan.walk(&outgoing("10.0.0.2:80"), &pod());
    assert_eq!(passed(&walk), ["raw_output", "mangle_output", "nat_output", "filter_output"]);
}

#[test]
fn later_rules_match_new_mark_and_other_bits_stay() {
    let ours = Mark { value: 0x111, mask: 0xfff };
    let plan = plan(vec![
        (MARKS_OUT, vec![], Action::MarkPacket(ours)),
        (MARKS_OUT, vec![Match::PacketMark(ours)], Action::SaveMark),
        (OUTPUT, vec![Match::ConnectionMark(Mark::full(0x5111))], Action::Redirect(PORT)),
    ]);
    let packet = Packet { mark: 0x5222, ..outgoing("10.0.0.2:80") };
    let walk = plan.walk(&packet, &pod());
    assert_eq!(ids(&walk), ["0", "1", "2"]);
    assert_eq!((walk.mark, walk.connection_mark), (0x5111, 0x5111));
}

#[test]
fn ip_rule_delivers_reply_to_remote_destination_locally() {
    let ours = Mark { value: 0x111, mask: 0xfff };
    let mut plan = plan(vec![
        (MARKS_OUT, vec![Match::ConnectionMark(ours)], Action::RestoreMark),
        (INPUT, vec![], Action::Return),
    ]);
    plan.routes = vec![PolicyRoute { mark: ours, priority: 32764, table: 100 }];
    let reply = Packet {
        state: ConntrackState::Established(Direction::Reply),
        connection_mark: 0x111,
        ..outgoing("10.0.0.2:80")
    };
    assert_eq!(passed(&plan.walk(&reply, &pod())), ["mangle_output", "filter_input"]);
    let unmarked = Packet { connection_mark: 0, ..reply };
    assert_eq!(passed(&plan.walk(&unmarked, &pod())), ["mangle_output"]);
}

#[test]
fn tproxy_marks_keeps_destination_and_ends_chain() {
    let mark = Mark::full(1337);
    let tproxy = Action::Tproxy(15006, mark);
    let mut plan = plan(vec![
        (MARKS, vec![Match::Protocol(Protocol::Tcp)], tproxy),
        (MARKS, vec![], Action::Drop),
        (PREROUTING, vec![], Action::Return),
        (INPUT, vec![Match::PacketMark(mark)], Action::Return),
    ]);
    plan.routes = vec![PolicyRoute { mark, priority: 1, table: 133 }];
    let packet = arriving("10.0.0.1:80");
    let walk = plan.walk(&packet, &pod());
    assert_eq!(ids(&walk), ["0", "2", "3"]);
    assert_eq!((walk.end, walk.destination), (Verdict::Tproxied(15006), packet.destination));
    // The mark also delivers a packet for another host locally.
    assert_eq!(ids(&plan.walk(&arriving("192.0.2.1:80"), &pod())), ["0", "2", "3"]);
}

#[test]
fn conntrack_state_is_unknown_in_raw_table() {
    for table in [Table::Raw, Table::Mangle] {
        let base = chain(table, "OUTPUT");
        let plan = plan(vec![
            (base, vec![Match::Established], Action::Return),
            (base, vec![Match::Invalid], Action::Return),
            (base, vec![Match::Direction(Direction::Reply)], Action::Return),
            (base, vec![Match::ConnectionMark(Mark::full(0))], Action::Return),
        ]);
        let met = |state| ids(&plan.walk(&Packet { state, ..outgoing("10.0.0.2:80") }, &pod()));
        if table == Table::Raw {
            assert_eq!(met(ConntrackState::Established(Direction::Reply)), [""; 0]);
            assert_eq!(met(ConntrackState::Invalid), [""; 0]);
        } else {
            assert_eq!(met(ConntrackState::Established(Direction::Reply)), ["0"]);
            assert_eq!(met(ConntrackState::Invalid), ["1"]);
            assert_eq!(met(ConntrackState::New), ["3"]);
        }
    }
}

#[test]
fn packet_loses_owner_after_loopback() {
    let by_user = vec![Match::Uid(vec![5]), Match::Gid(vec![6])];
    let by_others = vec![Match::NotUid(vec![5]), Match::NotGid(vec![6])];
    let plan = plan(vec![
        (MARKS_OUT, by_user.clone(), Action::SaveMark),
        (MARKS_OUT, by_others.clone(), Action::SaveMark),
        (MARKS, by_user, Action::SaveMark),
        (MARKS, by_others, Action::SaveMark),
    ]);
    let mut packet = outgoing("127.0.0.1:80");
    packet.entry = Entry::Out { interface: "lo".to_owned(), uid: 5, gid: 6 };
    assert_eq!(ids(&plan.walk(&packet, &pod())), ["0", "3"]);
    packet.entry = Entry::Out { interface: "lo".to_owned(), uid: 5, gid: 5 };
    assert_eq!(ids(&plan.walk(&packet, &pod())), ["3"]);
}

#[test]
fn rules_match_interfaces_of_their_hook() {
    let eth0 = || vec!["eth0".to_owned()];
    let loopback_interface = || vec!["lo".to_owned()];
    let filter_out = chain(Table::Filter, "OUTPUT");
    let plan = plan(vec![
        (OUTPUT, vec![Match::Out(eth0())], Action::Redirect(PORT)),
        (filter_out, vec![Match::Out(eth0())], Action::SaveMark),
        (filter_out, vec![Match::NotOut("lo".to_owned())], Action::SaveMark),
        (filter_out, vec![Match::In(loopback_interface())], Action::SaveMark),
        (MARKS, vec![Match::In(loopback_interface())], Action::SaveMark),
        (MARKS, vec![Match::In(eth0())], Action::SaveMark),
        (MARKS, vec![Match::NotOut("eth0".to_owned())], Action::SaveMark),
    ]);
    assert_eq!(ids(&plan.walk(&outgoing("10.0.0.2:80"), &pod())), ["0", "1", "2", "4"]);
    assert_eq!(ids(&plan.walk(&outgoing("10.0.0.1:80"), &pod())), ["4"]);
    assert_eq!(ids(&plan.walk(&arriving("10.0.0.1:80"), &pod())), ["5"]);
}

#[test]
fn rule_matches_any_address_or_port_of_list() {
    let net = |text: &str| text.parse::<IpNet>().expect("a network");
    let to = |matches| plan(vec![(OUTPUT, matches, Action::Drop)]);
    let dropped =
        |plan: &RulePlan, to: &str| plan.walk(&outgoing(to), &pod()).end == Verdict::Dropped;
    let either = to(vec![Match::Destination(vec![net("10.0.0.2/32"), net("10.8.0.0/16")])]);
    assert!(dropped(&either, "10.0.0.2:80") && dropped(&either, "10.8.1.1:80"));
    assert!(!dropped(&either, "10.0.0.3:80"));
    let port = |first, last| underpass_config::PortRange { first, last };
    let ports = to(vec![Match::DestinationPort(Protocol::Tcp, vec![port(80, 80), port(90, 99)])]);
    assert!(dropped(&ports, "10.0.0.2:80") && dropped(&ports, "10.0.0.2:95"));
    assert!(!dropped(&ports, "10.0.0.2:81"));
    let others =
        to(vec![Match::NotDestinationPort(Protocol::Tcp, vec![port(80, 80), port(90, 99)])]);
    assert!(!dropped(&others, "10.0.0.2:80") && !dropped(&others, "10.0.0.2:95"));
    assert!(dropped(&others, "10.0.0.2:81"));
    let udp = to(vec![Match::NotDestinationPort(Protocol::Udp, vec![port(53, 53)])]);
    assert!(!dropped(&udp, "10.0.0.2:81"), "ports of another protocol");
}

#[test]
fn rule_of_one_family_ignores_other_family() {
    let mut plan = plan(vec![(OUTPUT, vec![], Action::Drop)]);
    plan.rules[0].families = Families::V6;
    assert_eq!(plan.walk(&outgoing("10.0.0.2:80"), &pod()).end, Verdict::Direct);
    assert_eq!(plan.walk(&outgoing("[fd00::2]:80"), &pod()).end, Verdict::Dropped);
}

#[test]
fn environment_selects_interface_with_matching_network() {
    let environment = pod();
    for (address, interface) in [
        ("127.0.0.2", "lo"),
        ("10.0.0.1", "lo"),
        ("10.9.0.1", "lo"),
        ("10.0.0.2", "eth0"),
        ("10.9.0.2", "vm0"),
        ("192.0.2.1", "eth0"),
        ("fd00::2", "eth0"),
        ("::1", "lo"),
    ] {
        let address: IpAddr = address.parse().expect("an address");
        assert_eq!(environment.interface_to(address), interface, "{address}");
    }
    assert_eq!(environment.address(true), Some(at("[fd00::1]:0").ip()), "not the link-local one");
}

#[test]
fn reply_to_preserved_address_needs_mark_and_non_loopback_source() {
    let ours = Mark { value: 0x111, mask: 0xfff };
    let marked = vec![
        (MARKS, vec![], Action::MarkConnection(ours)),
        (MARKS_OUT, vec![Match::ConnectionMark(ours)], Action::RestoreMark),
    ];
    let redirect = (OUTPUT, vec![Match::NotOut("eth0".to_owned())], Action::Redirect(PORT));
    let [direct, direct_marked] = [vec![], marked.clone()].map(plan);
    let [redirected, redirected_marked] =
        [vec![redirect.clone()], [marked, vec![redirect]].concat()].map(plan);
    for (mut plan, v4, v6) in [
        (direct, ReplyOutcome::Misrouted, ReplyOutcome::Misrouted),
        (direct_marked, ReplyOutcome::Delivered, ReplyOutcome::Delivered),
        (redirected, ReplyOutcome::Unroutable, ReplyOutcome::Misrouted),
        (redirected_marked, ReplyOutcome::Unroutable, ReplyOutcome::Delivered),
    ] {
        plan.routes = vec![PolicyRoute { mark: ours, priority: 32764, table: 100 }];
        let reply = |source, to| {
            let packet = Packet { source: at(source), ..outgoing(to) };
            plan.reply(&packet, &plan.walk(&packet, &pod()), &pod())
        };
        assert_eq!(reply("10.0.0.2:40000", "10.0.0.1:80"), Some(v4), "{plan:?}");
        assert_eq!(reply("[fd00::2]:40000", "[fd00::1]:80"), Some(v6), "{plan:?}");
        assert_eq!(
            reply("10.0.0.1:40000", "10.0.0.1:80"),
            Some(ReplyOutcome::Delivered),
            "{plan:?}"
        );
    }
}

#[test]
fn reply_to_forwarded_packet_must_be_forwarded() {
    let ours = Mark { value: 0x539, mask: 0xfff };
    let mut plan = plan(vec![(MARKS, vec![Match::Established], Action::MarkPacket(ours))]);
    let packet =
        Packet { entry: Entry::In { interface: "vm0".to_owned() }, ..arriving("10.0.0.2:80") };
    let packet = Packet { source: at("10.9.0.2:40000"), ..packet };
    let reply = |plan: &RulePlan| plan.reply(&packet, &plan.walk(&packet, &pod()), &pod());
    assert_eq!(reply(&plan), Some(ReplyOutcome::Delivered));
    plan.routes = vec![PolicyRoute { mark: ours, priority: 32765, table: 133 }];
    assert_eq!(reply(&plan), Some(ReplyOutcome::Misrouted));
}

#[test]
fn dropped_and_rejected_packets_have_no_reply() {
    for action in [Action::Drop, Action::Reject] {
        let plan = plan(vec![(OUTPUT, vec![], action)]);
        let packet = outgoing("10.0.0.2:80");
        assert_eq!(plan.reply(&packet, &plan.walk(&packet, &pod()), &pod()), None);
    }
}

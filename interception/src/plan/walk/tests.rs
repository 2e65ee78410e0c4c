//! Walks through plans made by hand, one rule of the kernel each, and through those of the
//! profiles.

use std::net::{IpAddr, SocketAddr};

use super::super::{Chain, Families, Mark, Origin, PolicyRoute};
use super::*;

const PORT: u16 = 15001;

/// Rules as they are written here: chain, matches, action. The id is the number in this list.
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
            reason: "a test asks for it",
            origin: Origin::Seed,
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

/// A SYN that a process of user and group 0 sends.
fn out(to: &str) -> Packet {
    let destination = at(to);
    let own: IpAddr =
        if destination.is_ipv4() { [10, 0, 0, 1].into() } else { at("[fd00::1]:0").ip() };
    Packet {
        protocol: Protocol::Tcp,
        source: SocketAddr::new(own, 40000),
        destination,
        way: Way::Out {
            interface: pod().interface_to(destination.ip()).to_owned(),
            uid: 0,
            gid: 0,
        },
        state: State::New,
        mark: 0,
        connection_mark: 0,
    }
}

/// A SYN that arrives at eth0.
fn arriving(to: &str) -> Packet {
    let way = Way::In { interface: "eth0".to_owned() };
    Packet { source: at("10.0.0.2:40000"), way, ..out(to) }
}

fn ids(walk: &Walk<'_>) -> Vec<String> {
    walk.rules().map(|rule| rule.id.clone()).collect()
}

fn passed(walk: &Walk<'_>) -> Vec<String> {
    walk.passages.iter().map(|passage| passage.chain.nftables_name()).collect()
}

#[test]
fn a_packet_that_nothing_matches_reaches_its_destination() {
    let plan = plan(vec![(OUTPUT, vec![Match::Protocol(Protocol::Udp)], Action::Redirect(PORT))]);
    let packet = out("10.0.0.2:80");
    let walk = plan.walk(&packet, &pod());
    assert_eq!((walk.end, walk.destination), (End::Direct, packet.destination));
    assert_eq!(passed(&walk), ["nat_output"]);
    assert_eq!(ids(&walk), [""; 0]);
}

#[test]
fn a_redirect_of_what_is_sent_leads_to_loopback_and_arrives_there_once() {
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
        let packet = out(to);
        let walk = plan.walk(&packet, &pod());
        assert_eq!((walk.end, walk.destination), (End::Redirected(PORT), at(end)));
        assert_eq!(passed(&walk), ["nat_output", "filter_input"]);
    }
}

#[test]
fn a_redirect_of_what_arrives_leads_to_the_interfaces_own_address() {
    let plan = plan(vec![(PREROUTING, vec![], Action::Redirect(PORT))]);
    let mut packet = arriving("192.0.2.1:80");
    packet.way = Way::In { interface: "vm0".to_owned() };
    let environment = pod();
    assert_eq!(plan.walk(&packet, &environment).destination, at("10.9.0.1:15001"));
    let v6 = arriving("[fd00::9]:80");
    assert_eq!(plan.walk(&v6, &environment).destination, at("[fd00::1]:15001"));
}

#[test]
fn what_is_for_others_passes_no_input() {
    let plan = plan(vec![(MARKS, vec![], Action::Return), (INPUT, vec![], Action::Drop)]);
    assert_eq!(plan.walk(&arriving("192.0.2.1:80"), &pod()).end, End::Direct);
    assert_eq!(plan.walk(&arriving("10.0.0.1:80"), &pod()).end, End::Dropped);
}

#[test]
fn only_the_first_packet_of_a_connection_passes_nat() {
    let plan = plan(vec![
        (OUTPUT, vec![], Action::Redirect(PORT)),
        (PREROUTING, vec![], Action::Redirect(PORT)),
    ]);
    for (state, asked) in [
        (State::New, true),
        (State::PickedUp, true),
        (State::Established(Direction::Original), false),
        (State::Established(Direction::Reply), false),
        (State::Invalid, false),
    ] {
        for packet in [out("10.0.0.2:80"), arriving("10.0.0.1:80")] {
            let packet = Packet { state, ..packet };
            let walk = plan.walk(&packet, &pod());
            assert_eq!(!walk.passages.is_empty(), asked, "{state:?}");
            assert_eq!(walk.end == End::Redirected(PORT), asked, "{state:?}");
        }
    }
}

#[test]
fn a_chain_returns_to_the_rule_after_the_jump() {
    let plan = plan(vec![
        (OUTPUT, vec![], Action::Jump(ONE)),
        (OUTPUT, vec![], Action::Redirect(1)),
        (ONE, vec![], Action::Jump(TWO)),
        (ONE, vec![Match::Uid(vec![0])], Action::Return),
        (ONE, vec![], Action::Redirect(2)),
        (TWO, vec![Match::Uid(vec![7])], Action::Redirect(3)),
    ]);
    let packet = out("10.0.0.2:80");
    let walk = plan.walk(&packet, &pod());
    assert_eq!(ids(&walk), ["0", "2", "3", "1"]);
    assert_eq!(walk.end, End::Redirected(1));
}

#[test]
fn accept_in_a_chain_ends_the_table_and_not_the_next_one() {
    let plan = plan(vec![
        (OUTPUT, vec![], Action::Jump(ONE)),
        (OUTPUT, vec![], Action::Redirect(1)),
        (ONE, vec![], Action::Accept),
        (chain(Table::Filter, "OUTPUT"), vec![], Action::Reject),
    ]);
    let packet = out("10.0.0.2:80");
    let walk = plan.walk(&packet, &pod());
    assert_eq!(ids(&walk), ["0", "2", "3"]);
    assert_eq!(walk.end, End::Rejected);
}

#[test]
fn a_return_from_a_base_chain_ends_it() {
    let plan = plan(vec![(OUTPUT, vec![], Action::Return), (OUTPUT, vec![], Action::Drop)]);
    assert_eq!(plan.walk(&out("10.0.0.2:80"), &pod()).end, End::Direct);
}

#[test]
fn chains_that_jump_in_a_circle_end() {
    let plan = plan(vec![(OUTPUT, vec![], Action::Jump(ONE)), (ONE, vec![], Action::Jump(ONE))]);
    assert_eq!(plan.walk(&out("10.0.0.2:80"), &pod()).end, End::Direct);
}

#[test]
fn tables_come_by_their_priority_whatever_the_order_of_the_plan() {
    let plan = plan(
        [Table::Filter, Table::Nat, Table::Mangle, Table::Raw]
            .map(|table| (chain(table, "OUTPUT"), vec![], Action::Return))
            .into(),
    );
    let walk = plan.walk(&out("10.0.0.2:80"), &pod());
    assert_eq!(passed(&walk), ["raw_output", "mangle_output", "nat_output", "filter_output"]);
}

#[test]
fn a_mark_that_is_set_is_seen_by_later_rules_and_keeps_its_other_bits() {
    let ours = Mark { value: 0x111, mask: 0xfff };
    let plan = plan(vec![
        (MARKS_OUT, vec![], Action::MarkPacket(ours)),
        (MARKS_OUT, vec![Match::PacketMark(ours)], Action::SaveMark),
        (OUTPUT, vec![Match::ConnectionMark(Mark::whole(0x5111))], Action::Redirect(PORT)),
    ]);
    let packet = Packet { mark: 0x5222, ..out("10.0.0.2:80") };
    let walk = plan.walk(&packet, &pod());
    assert_eq!(ids(&walk), ["0", "1", "2"]);
    assert_eq!((walk.mark, walk.connection_mark), (0x5111, 0x5111));
}

#[test]
fn an_ip_rule_brings_a_reply_back_though_its_destination_is_remote() {
    let ours = Mark { value: 0x111, mask: 0xfff };
    let mut plan = plan(vec![
        (MARKS_OUT, vec![Match::ConnectionMark(ours)], Action::RestoreMark),
        (INPUT, vec![], Action::Return),
    ]);
    plan.routes = vec![PolicyRoute { mark: ours, priority: 32764, table: 100 }];
    let reply = Packet {
        state: State::Established(Direction::Reply),
        connection_mark: 0x111,
        ..out("10.0.0.2:80")
    };
    assert_eq!(passed(&plan.walk(&reply, &pod())), ["mangle_output", "filter_input"]);
    let unmarked = Packet { connection_mark: 0, ..reply };
    assert_eq!(passed(&plan.walk(&unmarked, &pod())), ["mangle_output"]);
}

#[test]
fn tproxy_ends_its_chain_marks_and_keeps_the_destination() {
    let mark = Mark::whole(1337);
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
    assert_eq!((walk.end, walk.destination), (End::Tproxied(15006), packet.destination));
    // Also what is for others is delivered here, by its mark.
    assert_eq!(ids(&plan.walk(&arriving("192.0.2.1:80"), &pod())), ["0", "2", "3"]);
}

#[test]
fn connections_are_known_after_the_raw_table_only() {
    for table in [Table::Raw, Table::Mangle] {
        let base = chain(table, "OUTPUT");
        let plan = plan(vec![
            (base, vec![Match::Established], Action::Return),
            (base, vec![Match::Invalid], Action::Return),
            (base, vec![Match::Direction(Direction::Reply)], Action::Return),
            (base, vec![Match::ConnectionMark(Mark::whole(0))], Action::Return),
        ]);
        let met = |state| ids(&plan.walk(&Packet { state, ..out("10.0.0.2:80") }, &pod()));
        if table == Table::Raw {
            assert_eq!(met(State::Established(Direction::Reply)), [""; 0]);
            assert_eq!(met(State::Invalid), [""; 0]);
        } else {
            assert_eq!(met(State::Established(Direction::Reply)), ["0"]);
            assert_eq!(met(State::Invalid), ["1"]);
            assert_eq!(met(State::New), ["3"]);
        }
    }
}

#[test]
fn a_packet_belongs_to_its_sender_until_it_has_looped() {
    let by_user = vec![Match::Uid(vec![5]), Match::Gid(vec![6])];
    let by_others = vec![Match::NotUid(vec![5]), Match::NotGid(vec![6])];
    let plan = plan(vec![
        (MARKS_OUT, by_user.clone(), Action::SaveMark),
        (MARKS_OUT, by_others.clone(), Action::SaveMark),
        (MARKS, by_user, Action::SaveMark),
        (MARKS, by_others, Action::SaveMark),
    ]);
    let mut packet = out("127.0.0.1:80");
    packet.way = Way::Out { interface: "lo".to_owned(), uid: 5, gid: 6 };
    assert_eq!(ids(&plan.walk(&packet, &pod())), ["0", "3"]);
    packet.way = Way::Out { interface: "lo".to_owned(), uid: 5, gid: 5 };
    assert_eq!(ids(&plan.walk(&packet, &pod())), ["3"]);
}

#[test]
fn interfaces_are_seen_where_a_packet_passes_them() {
    let eth0 = || vec!["eth0".to_owned()];
    let lo = || vec!["lo".to_owned()];
    let filter_out = chain(Table::Filter, "OUTPUT");
    let plan = plan(vec![
        (OUTPUT, vec![Match::Out(eth0())], Action::Redirect(PORT)),
        (filter_out, vec![Match::Out(eth0())], Action::SaveMark),
        (filter_out, vec![Match::NotOut("lo".to_owned())], Action::SaveMark),
        (filter_out, vec![Match::In(lo())], Action::SaveMark),
        (MARKS, vec![Match::In(lo())], Action::SaveMark),
        (MARKS, vec![Match::In(eth0())], Action::SaveMark),
        (MARKS, vec![Match::NotOut("eth0".to_owned())], Action::SaveMark),
    ]);
    assert_eq!(ids(&plan.walk(&out("10.0.0.2:80"), &pod())), ["0", "1", "2", "4"]);
    assert_eq!(ids(&plan.walk(&out("10.0.0.1:80"), &pod())), ["4"]);
    assert_eq!(ids(&plan.walk(&arriving("10.0.0.1:80"), &pod())), ["5"]);
}

#[test]
fn addresses_and_ports_are_compared_as_lists() {
    let net = |text: &str| text.parse::<IpNet>().expect("a network");
    let to = |matches| plan(vec![(OUTPUT, matches, Action::Drop)]);
    let dropped = |plan: &RulePlan, to: &str| plan.walk(&out(to), &pod()).end == End::Dropped;
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
fn a_rule_of_one_family_leaves_the_other_alone() {
    let mut plan = plan(vec![(OUTPUT, vec![], Action::Drop)]);
    plan.rules[0].families = Families::V6;
    assert_eq!(plan.walk(&out("10.0.0.2:80"), &pod()).end, End::Direct);
    assert_eq!(plan.walk(&out("[fd00::2]:80"), &pod()).end, End::Dropped);
}

#[test]
fn an_address_leads_to_the_interface_with_its_network() {
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
fn an_answer_to_an_imitated_client_needs_a_mark_and_must_not_come_from_127_0_0_1() {
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
        (direct, Answer::Astray, Answer::Astray),
        (direct_marked, Answer::Returns, Answer::Returns),
        (redirected, Answer::Unroutable, Answer::Astray),
        (redirected_marked, Answer::Unroutable, Answer::Returns),
    ] {
        plan.routes = vec![PolicyRoute { mark: ours, priority: 32764, table: 100 }];
        let answer = |source, to| {
            let packet = Packet { source: at(source), ..out(to) };
            plan.answer(&packet, &plan.walk(&packet, &pod()), &pod())
        };
        assert_eq!(answer("10.0.0.2:40000", "10.0.0.1:80"), Some(v4), "{plan:?}");
        assert_eq!(answer("[fd00::2]:40000", "[fd00::1]:80"), Some(v6), "{plan:?}");
        assert_eq!(answer("10.0.0.1:40000", "10.0.0.1:80"), Some(Answer::Returns), "{plan:?}");
    }
}

#[test]
fn an_answer_to_what_was_passed_on_must_be_passed_on_too() {
    let ours = Mark { value: 0x539, mask: 0xfff };
    let mut plan = plan(vec![(MARKS, vec![Match::Established], Action::MarkPacket(ours))]);
    let packet = Packet { way: Way::In { interface: "vm0".to_owned() }, ..arriving("10.0.0.2:80") };
    let packet = Packet { source: at("10.9.0.2:40000"), ..packet };
    let answer = |plan: &RulePlan| plan.answer(&packet, &plan.walk(&packet, &pod()), &pod());
    assert_eq!(answer(&plan), Some(Answer::Returns));
    plan.routes = vec![PolicyRoute { mark: ours, priority: 32765, table: 133 }];
    assert_eq!(answer(&plan), Some(Answer::Astray));
}

#[test]
fn what_nobody_gets_has_no_answer() {
    for action in [Action::Drop, Action::Reject] {
        let plan = plan(vec![(OUTPUT, vec![], action)]);
        let packet = out("10.0.0.2:80");
        assert_eq!(plan.answer(&packet, &plan.walk(&packet, &pod()), &pod()), None);
    }
}

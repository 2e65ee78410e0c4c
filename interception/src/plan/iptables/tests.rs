//! Tests of the input for `iptables-restore`.

use underpass_config::PortRange;

use super::*;
use crate::plan::{Chain, Families, Hook, Match, Origin};

const OUTPUT: ChainId = ChainId { table: Table::Nat, name: "OUTPUT" };
const OWN_CHAIN: ChainId = ChainId { table: Table::Nat, name: "ISTIO_OUTPUT" };
const MASKED: Mark = Mark { value: 0x539, mask: 0xfff };
const TCP: Match = Match::Protocol(Protocol::Tcp);

fn rule(chain: ChainId, families: Families, matches: Vec<Match>, action: Action) -> Rule {
    Rule {
        id: "rule".to_owned(),
        reason: "a test",
        origin: Origin::Mesh,
        chain,
        families,
        matches,
        action,
        nftables_only: false,
    }
}

fn plan(rules: Vec<Rule>) -> RulePlan {
    let chains =
        vec![Chain { id: OUTPUT, hook: Some(Hook::Output) }, Chain { id: OWN_CHAIN, hook: None }];
    RulePlan { chains, rules, routes: Vec::new(), addresses: Vec::new() }
}

/// The lines of one rule, without the chain.
fn texts_of(family: Family, matches: Vec<Match>, action: Action) -> Vec<String> {
    texts(&rule(OWN_CHAIN, Families::Both, matches, action), family)
}

fn v4(matches: Vec<Match>) -> Vec<String> {
    let texts = texts_of(Family::V4, matches, Action::Return);
    texts.iter().map(|text| text.trim_end_matches("-j RETURN").trim_end().to_owned()).collect()
}

fn nets(nets: &[&str]) -> Vec<IpNet> {
    nets.iter().map(|net| net.parse().unwrap()).collect()
}

fn ports(ports: &[&str]) -> Vec<PortRange> {
    ports.iter().map(|range| range.parse().unwrap()).collect()
}

#[test]
fn plan_prints_restore_input() {
    let plan = plan(vec![
        rule(OUTPUT, Families::Both, vec![TCP], Action::Jump(OWN_CHAIN)),
        rule(
            OWN_CHAIN,
            Families::V4,
            vec![Match::NotDestination("127.0.0.1/32".parse().unwrap())],
            Action::Redirect(15001),
        ),
        rule(
            OWN_CHAIN,
            Families::V6,
            vec![Match::NotDestination("::1/128".parse().unwrap())],
            Action::Redirect(15001),
        ),
    ]);
    let body = |loopback| {
        format!(
            "*nat\n:ISTIO_OUTPUT - [0:0]\n-A OUTPUT -p tcp -j ISTIO_OUTPUT\n\
             -A ISTIO_OUTPUT ! -d {loopback} -j REDIRECT --to-ports 15001\nCOMMIT\n"
        )
    };
    assert_eq!(plan.iptables(Family::V4), body("127.0.0.1/32"));
    assert_eq!(plan.iptables(Family::V6), body("::1/128"));
}

#[test]
fn family_without_rules_prints_nothing() {
    let plan = plan(vec![rule(OUTPUT, Families::V4, vec![], Action::Return)]);
    assert_eq!(plan.iptables(Family::V6), "");
}

#[test]
fn omits_nftables_only_rules() {
    let only =
        Rule { nftables_only: true, ..rule(OWN_CHAIN, Families::Both, vec![], Action::Drop) };
    assert!(plan(vec![only]).lines(Family::V4).is_empty());
}

#[test]
fn conditions_have_the_order_of_iptables_save() {
    let matches = vec![
        TCP,
        Match::Out(vec!["lo".to_owned()]),
        Match::In(vec!["eth0".to_owned()]),
        Match::Destination(nets(&["10.0.0.0/8"])),
        Match::Source(nets(&["10.1.2.3/24"])),
    ];
    assert_eq!(v4(matches), ["-s 10.1.2.0/24 -d 10.0.0.0/8 -i eth0 -o lo -p tcp"]);
}

#[test]
fn match_extensions_keep_the_order_of_the_rule() {
    let port = Match::DestinationPort(Protocol::Udp, ports(&["53"]));
    let mark = Match::NotPacketMark(MASKED);
    let (words, mark_words) = ("-m udp --dport 53", "-m mark ! --mark 0x539/0xfff");
    assert_eq!(v4(vec![mark.clone(), port.clone()]), [format!("-p udp {mark_words} {words}")]);
    assert_eq!(v4(vec![port, mark]), [format!("-p udp {words} {mark_words}")]);
}

#[test]
fn lists_become_one_line_per_combination() {
    let matches =
        vec![Match::In(vec!["eth1".to_owned(), "eth2".to_owned()]), Match::Uid(vec![1, 2])];
    let expected = [
        "-i eth1 -m owner --uid-owner 1",
        "-i eth1 -m owner --uid-owner 2",
        "-i eth2 -m owner --uid-owner 1",
        "-i eth2 -m owner --uid-owner 2",
    ];
    assert_eq!(v4(matches), expected);
}

#[test]
fn negated_owner_list_is_one_line() {
    let matches = vec![Match::NotUid(vec![1, 2]), Match::NotGid(vec![3])];
    let expected = "-m owner ! --uid-owner 1 -m owner ! --uid-owner 2 -m owner ! --gid-owner 3";
    assert_eq!(v4(matches), [expected]);
}

#[test]
fn single_port_or_range_needs_no_multiport() {
    for (given, words) in [("80", "--dport 80"), ("8000-8100", "--dport 8000:8100")] {
        let one = vec![Match::DestinationPort(Protocol::Tcp, ports(&[given]))];
        assert_eq!(v4(one), [format!("-p tcp -m tcp {words}")]);
        let not = vec![Match::NotDestinationPort(Protocol::Tcp, ports(&[given]))];
        assert_eq!(v4(not), [format!("-p tcp -m tcp ! {words}")]);
    }
}

#[test]
fn multiport_splits_after_fifteen_ports() {
    let mut given: Vec<_> = (1..=14).map(PortRange::from).collect();
    given.extend(ports(&["8000-8100", "9000"]));
    let first = "1,2,3,4,5,6,7,8,9,10,11,12,13,14";
    let positive = v4(vec![Match::DestinationPort(Protocol::Tcp, given.clone())]);
    let expected = [
        format!("-p tcp -m multiport --dports {first}"),
        "-p tcp -m multiport --dports 8000:8100,9000".to_owned(),
    ];
    assert_eq!(positive, expected);
    let negative = v4(vec![Match::NotDestinationPort(Protocol::Tcp, given)]);
    let expected =
        format!("-p tcp -m multiport ! --dports {first} -m multiport ! --dports 8000:8100,9000");
    assert_eq!(negative, [expected]);
}

#[test]
fn rule_has_protocol_extension_once() {
    let matches = vec![
        Match::SourcePort(Protocol::Tcp, 53),
        Match::PacketMark(MASKED),
        Match::DestinationPort(Protocol::Tcp, ports(&["80"])),
        Match::NotDestinationPort(Protocol::Tcp, ports(&["81"])),
        Match::NotOpening,
    ];
    let expected = "-p tcp -m tcp --sport 53 --dport 80 ! --tcp-flags FIN,SYN,RST,ACK SYN \
                    -m mark --mark 0x539/0xfff -m multiport ! --dports 81";
    assert_eq!(v4(matches), [expected]);
}

#[test]
fn tcp_module_prints_without_options() {
    let source = Match::Source(nets(&["169.254.7.127/32"]));
    assert_eq!(v4(vec![source, Match::TcpModule]), ["-s 169.254.7.127/32 -p tcp -m tcp"]);
}

#[test]
fn conntrack_matches_use_its_options() {
    for (condition, words) in [
        (Match::Invalid, "--ctstate INVALID"),
        (Match::Established, "--ctstate RELATED,ESTABLISHED"),
        (Match::Direction(Direction::Original), "--ctdir ORIGINAL"),
        (Match::Direction(Direction::Reply), "--ctdir REPLY"),
    ] {
        assert_eq!(v4(vec![condition]), [format!("-m conntrack {words}")]);
    }
}

#[test]
fn network_of_all_addresses_prints_nothing() {
    assert_eq!(v4(vec![Match::Destination(nets(&["0.0.0.0/0"]))]), [""]);
    let not = Match::NotDestination("127.0.0.1/32".parse().unwrap());
    let both = vec![not, Match::Destination(nets(&["0.0.0.0/0", "10.0.0.0/8"]))];
    assert_eq!(v4(both), ["! -d 127.0.0.1/32"]);
}

#[test]
fn several_destination_matches_merge_into_networks() {
    let not = Match::NotDestination("127.0.0.1/32".parse().unwrap());
    let with = |cidrs: &[&str]| v4(vec![not.clone(), Match::Destination(nets(cidrs))]);
    assert_eq!(with(&["10.0.0.0/8", "127.0.0.1/32"]), ["-d 10.0.0.0/8"]);
    assert_eq!(with(&["127.0.0.0/30"]), ["-d 127.0.0.0/32", "-d 127.0.0.2/31"]);
    assert_eq!(with(&["127.0.0.1/32"]), [""; 0]);
    let two = |one: &str, other: &str| {
        v4(vec![Match::Destination(nets(&[one])), Match::Destination(nets(&[other]))])
    };
    assert_eq!(two("10.0.0.0/8", "10.1.0.0/16"), ["-d 10.1.0.0/16"]);
    assert_eq!(two("10.1.0.0/16", "10.0.0.0/8"), ["-d 10.1.0.0/16"]);
    assert_eq!(two("10.1.0.0/16", "10.2.0.0/16"), [""; 0]);
}

#[test]
fn addresses_of_other_family_match_nothing() {
    assert_eq!(v4(vec![Match::Source(nets(&["::1/128"]))]), [""; 0]);
    assert_eq!(v4(vec![Match::NotDestination("::1/128".parse().unwrap())]), [""; 0]);
}

#[test]
fn negated_output_interface_is_removed_from_list() {
    let loopback_interface = || "lo".to_owned();
    assert_eq!(v4(vec![Match::NotOut(loopback_interface())]), ["! -o lo"]);
    let both = vec![
        Match::Out(vec![loopback_interface(), "eth0".to_owned()]),
        Match::NotOut(loopback_interface()),
    ];
    assert_eq!(v4(both), ["-o eth0"]);
}

#[test]
fn reject_fits_protocol_and_family() {
    let reject = |family, matches| texts_of(family, matches, Action::Reject);
    assert_eq!(reject(Family::V4, vec![TCP]), ["-p tcp -j REJECT --reject-with tcp-reset"]);
    assert_eq!(reject(Family::V4, vec![]), ["-j REJECT --reject-with icmp-port-unreachable"]);
    assert_eq!(reject(Family::V6, vec![]), ["-j REJECT --reject-with icmp6-port-unreachable"]);
}

#[test]
fn marks_print_masks() {
    let full = Mark::full(0x539);
    assert_eq!(v4(vec![Match::PacketMark(full)]), ["-m mark --mark 0x539"]);
    assert_eq!(v4(vec![Match::ConnectionMark(MASKED)]), ["-m connmark --mark 0x539/0xfff"]);
    let all = "--nfmask 0xffffffff --ctmask 0xffffffff";
    for (action, words) in [
        (Action::MarkPacket(MASKED), "MARK --set-xmark 0x539/0xfff".to_owned()),
        (Action::MarkPacket(full), "MARK --set-xmark 0x539/0xffffffff".to_owned()),
        (Action::MarkConnection(MASKED), "CONNMARK --set-xmark 0x539/0xfff".to_owned()),
        (Action::SaveMark, format!("CONNMARK --save-mark {all}")),
        (Action::RestoreMark, format!("CONNMARK --restore-mark {all}")),
    ] {
        assert_eq!(texts_of(Family::V4, vec![], action), [format!("-j {words}")]);
    }
}

#[test]
fn actions_print_their_targets() {
    let zone = |direction| Action::Zone(15, direction);
    for (action, words) in [
        (Action::Accept, "ACCEPT"),
        (Action::Drop, "DROP"),
        (Action::Jump(OWN_CHAIN), "ISTIO_OUTPUT"),
        (Action::Redirect(15001), "REDIRECT --to-ports 15001"),
        (
            Action::Tproxy(15006, MASKED),
            "TPROXY --on-port 15006 --on-ip :: --tproxy-mark 0x539/0xfff",
        ),
        (zone(None), "CT --zone 15"),
        (zone(Some(Direction::Original)), "CT --zone-orig 15"),
        (zone(Some(Direction::Reply)), "CT --zone-reply 15"),
    ] {
        assert_eq!(texts_of(Family::V6, vec![], action), [format!("-j {words}")]);
    }
}

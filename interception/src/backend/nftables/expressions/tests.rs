//! Tests of expressions: they print as the text that nft would generate.

use super::*;
use crate::plan::nft::testing::rule as planned;
use crate::plan::{Families, Rule};

/// Prints the expressions of a rule like nft.
fn listed(families: Families, matches: Vec<Match>, action: Action) -> String {
    let planned = Rule { families, action, ..planned("id", matches) };
    let listed = rule(&planned).unwrap().nft_syntax_stateless();
    listed.expect("nlink's syntax").replace(" comment \"id\"", "")
}

#[test]
fn protocol_is_checked_once() {
    let port = Match::DestinationPort(Protocol::Tcp, vec![80.into()]);
    let matches = vec![Match::Protocol(Protocol::Tcp), Match::NotOpening, port];
    let both = Rule { matches, ..planned("id", vec![]) };
    let guards = expressions(&both).unwrap().into_iter();
    let guards = guards.filter(|each| matches!(each, Expr::Meta { key: MetaKey::L4Proto, .. }));
    assert_eq!(guards.count(), 1);
}

#[test]
fn network_match_prints_as_in_nft() {
    for (cidr, listing) in [
        ("10.0.0.1/32", "ip daddr 10.0.0.1 counter accept"),
        ("10.0.0.0/8", "ip daddr 10.0.0.0/8 counter accept"),
        ("172.16.0.0/12", "ip daddr 172.16.0.0/12 counter accept"),
        ("fd00::/16", "ip6 daddr fd00::/16 counter accept"),
        ("fc00::/7", "ip6 daddr fc00::/7 counter accept"),
    ] {
        let matches = vec![Match::Destination(vec![cidr.parse().unwrap()])];
        assert_eq!(listed(Families::Both, matches, Action::Accept), listing);
    }
}

#[test]
fn set_lookups_can_be_inverted() {
    let ports = vec![80.into(), 443.into()];
    let matches = vec![Match::NotDestinationPort(Protocol::Udp, ports)];
    assert_eq!(
        listed(Families::Both, matches, Action::Return),
        "udp dport != @id-ports counter return"
    );
}

#[test]
fn mark_change_keeps_bits_outside_of_mask() {
    let mark = Mark { value: 0x111, mask: 0xfff };
    assert_eq!(
        listed(Families::Both, vec![Match::NotPacketMark(mark)], Action::MarkConnection(mark)),
        "meta mark & 0x00000fff != 0x00000111 counter ct mark set ct mark & 0xfffff111 | 0x00000111"
    );
}

#[test]
fn rule_of_one_family_checks_family() {
    let matches = vec![Match::Protocol(Protocol::Tcp)];
    assert_eq!(
        listed(Families::V6, matches, Action::Redirect(15001)),
        "meta nfproto ipv6 meta l4proto tcp counter redirect to :15001"
    );
}

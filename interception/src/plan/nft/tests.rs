//! Tests of the input for nft.

use super::testing::{NAT_OUTPUT, rule};
use super::*;
use crate::plan::{ChainId, Origin};

const REJECT: ChainId = ChainId { table: Table::Filter, name: "UNDERPASS_REJECT" };

/// The text of a rule between the chain and the comment.
fn text(families: Families, matches: Vec<Match>, action: Action) -> String {
    let text = Rule { families, action, ..rule("id", matches) }.to_string();
    let text = text.strip_prefix("add rule inet underpass nat_output ");
    let text = text.and_then(|text| text.strip_suffix(" comment \"id\""));
    text.expect("the chain, and the comment").to_owned()
}

fn tcp() -> Vec<Match> {
    vec![Match::Protocol(Protocol::Tcp)]
}

#[test]
fn full_mark_prints_without_mask() {
    let full = Mark::full(0x539);
    let masked = Mark { value: 0x111, mask: 0xfff };
    assert_eq!(
        text(Families::Both, vec![Match::PacketMark(full)], Action::MarkConnection(full)),
        "meta mark == 0x539 counter ct mark set 0x539"
    );
    assert_eq!(
        text(Families::Both, vec![Match::ConnectionMark(masked)], Action::MarkPacket(masked)),
        "ct mark & 0xfff == 0x111 counter meta mark set meta mark & 0xfffff000 | 0x111"
    );
}

#[test]
fn rule_of_one_family_without_address_matches_family() {
    let address = vec![Match::NotDestination("::1/128".parse().unwrap())];
    let accept = Action::Accept;
    assert_eq!(text(Families::Both, vec![], accept), "counter accept");
    assert_eq!(text(Families::V6, vec![], accept), "meta nfproto ipv6 counter accept");
    assert_eq!(text(Families::V6, address, accept), "ip6 daddr != ::1 counter accept");
}

#[test]
fn reject_uses_reset_for_tcp_and_icmp_otherwise() {
    for (families, matches, refusal) in [
        (Families::Both, tcp(), "meta l4proto tcp counter reject with tcp reset"),
        (Families::Both, vec![], "counter reject with icmpx port-unreachable"),
        (Families::V4, vec![], "meta nfproto ipv4 counter reject with icmp port-unreachable"),
        (Families::V6, vec![], "meta nfproto ipv6 counter reject with icmpv6 port-unreachable"),
    ] {
        assert_eq!(text(families, matches, Action::Reject), refusal);
    }
}

#[test]
fn tproxy_names_family_of_rule_and_accepts() {
    let action = Action::Tproxy(15006, Mark::full(1337));
    assert_eq!(
        text(Families::Both, tcp(), action),
        "meta l4proto tcp counter tproxy to :15006 meta mark set 0x539 accept"
    );
    assert_eq!(
        text(Families::V4, tcp(), action),
        "meta nfproto ipv4 meta l4proto tcp counter tproxy ip to :15006 meta mark set 0x539 accept"
    );
}

#[test]
fn zone_applies_to_one_or_both_directions() {
    let zone = |direction| text(Families::Both, vec![], Action::Zone(15, direction));
    assert_eq!(zone(None), "counter ct zone set 15");
    assert_eq!(zone(Some(Direction::Original)), "counter ct original zone set 15");
    assert_eq!(zone(Some(Direction::Reply)), "counter ct reply zone set 15");
}

#[test]
fn several_values_form_set_named_after_rule() {
    let several = vec![Match::NotUid(vec![1337, 1338]), Match::Out(vec!["eth0".to_owned()])];
    assert_eq!(
        text(Families::Both, several, Action::Jump(REJECT)),
        "meta skuid != @id-uids oifname \"eth0\" counter jump filter_underpass_reject"
    );
}

#[test]
fn plan_prints_transaction_that_replaces_table() {
    let chains =
        vec![Chain { id: NAT_OUTPUT, hook: Some(Hook::Output) }, Chain { id: REJECT, hook: None }];
    let rules = vec![Rule { origin: Origin::Mesh, ..rule("users", vec![Match::Gid(vec![2, 1])]) }];
    let plan = RulePlan { chains, rules, routes: Vec::new(), addresses: Vec::new() };
    let expected = "\
add table inet underpass
delete table inet underpass
add table inet underpass
add chain inet underpass nat_output { type nat hook output priority -100; policy accept; }
add chain inet underpass filter_underpass_reject
add set inet underpass users-gids { type gid; elements = { 1, 2 } }
add rule inet underpass nat_output meta skgid @users-gids counter accept comment \"users\"
";
    assert_eq!(plan.to_string(), expected);
    let explained = format!("{plan:#}");
    assert!(explained.contains("\n# a test\nadd rule inet underpass nat_output "), "{explained}");
}

#[test]
fn only_mangle_output_chain_has_type_route() {
    let kind = |table, hook| {
        Chain { id: ChainId { table, name: "ANY" }, hook: Some(hook) }.kind().to_string()
    };
    assert_eq!(kind(Table::Mangle, Hook::Output), "route");
    assert_eq!(kind(Table::Mangle, Hook::Prerouting), "filter");
    assert_eq!(kind(Table::Raw, Hook::Output), "filter");
    assert_eq!(kind(Table::Nat, Hook::Prerouting), "nat");
}

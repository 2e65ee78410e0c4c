//! The plan against its golden files, and against what must hold for any plan.

use std::collections::BTreeSet;

use super::*;

const DEFAULT: Ports = Ports { outbound: 15001, inbound: 15006, hbone: 15008 };

fn golden(plan: &RulePlan, text: &str) {
    assert_eq!(plan.to_string(), text, "the golden file in interception/testdata differs");
}

#[test]
fn ambient_for_ipv4_is_the_golden_text() {
    golden(
        &RulePlan::ambient(DEFAULT, Families::V4),
        include_str!("../../testdata/ambient_v4.nft"),
    );
}

#[test]
fn ambient_for_both_families_is_the_golden_text() {
    golden(
        &RulePlan::ambient(DEFAULT, Families::V4AndV6),
        include_str!("../../testdata/ambient_v4_v6.nft"),
    );
}

#[test]
fn ambient_with_other_ports_is_the_golden_text() {
    let ports = Ports { outbound: 25001, inbound: 25006, hbone: 25008 };
    golden(
        &RulePlan::ambient(ports, Families::V4AndV6),
        include_str!("../../testdata/ambient_custom_ports.nft"),
    );
}

#[test]
fn the_alternate_form_gives_every_reason_on_one_line() {
    let plan = RulePlan::ambient(DEFAULT, Families::V4AndV6);
    let text = format!("{plan:#}");
    let reasons = text.lines().filter(|line| line.starts_with("# ")).count();
    assert_eq!(reasons, plan.rules().len());
    assert!(!text.contains("  "), "a reason has a line break in it:\n{text}");
}

#[test]
fn every_id_is_unique() {
    let plan = RulePlan::ambient(DEFAULT, Families::V4AndV6);
    let ids: BTreeSet<_> = plan.rules().iter().map(|rule| rule.id).collect();
    assert_eq!(ids.len(), plan.rules().len());
}

#[test]
fn every_twin_has_its_partner_and_differs_from_it() {
    let plan = RulePlan::ambient(DEFAULT, Families::V4AndV6);
    let twins: Vec<_> =
        plan.rules().iter().filter_map(|rule| Some((rule, rule.id.strip_suffix("-v6")?))).collect();
    assert_eq!(twins.len(), 5);
    for (twin, id) in twins {
        let first = plan.rules().iter().find(|rule| rule.id == id).expect("the IPv4 twin");
        assert_eq!((first.chain, first.action), (twin.chain, twin.action));
        assert_ne!(first.matches, twin.matches);
    }
}

#[test]
fn no_redirect_takes_loopback_or_the_proxys_own_packets() {
    let plan = RulePlan::ambient(DEFAULT, Families::V4AndV6);
    let redirects = plan.rules().iter().filter(|r| matches!(r.action, Action::Redirect(_)));
    for rule in redirects {
        let spares_loopback = rule
            .matches
            .iter()
            .any(|m| matches!(m, Match::NotDestination(address) if address.is_loopback()));
        assert!(spares_loopback, "{}", rule.id);
        assert!(rule.matches.contains(&Match::NotPacketMark(PROXY_MARK)), "{}", rule.id);
    }
}

#[test]
fn each_nat_chain_starts_by_leaving_older_connections_alone() {
    let plan = RulePlan::ambient(DEFAULT, Families::V4AndV6);
    for chain in [Chain::NatPrerouting, Chain::NatOutput] {
        let first = plan.rules().iter().find(|rule| rule.chain == chain).expect("a rule");
        assert_eq!(first.matches, [Match::Tcp, Match::NotOpening]);
        assert_eq!(first.action, Action::Accept);
    }
}

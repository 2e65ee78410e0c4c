//! The rules of `ipv6: reject`: reject the IPv6 connections that `ipv6: capture` would redirect.
//!
//! A nat chain of iptables cannot reject. Therefore the profile's IPv6 rules are copied into filter
//! chains, and each redirect is replaced by a rejection. Connections that the profile exempts stay
//! allowed: loopback, HBONE, the proxy's own, and excluded ones.

use super::build::{Builder, Inputs, LOOPBACK, TCP, chain};
use super::{Action, ChainId, Families, Match, Origin, Rule, Table};

/// The chain that rejects packets, instead of the chain that redirects them.
const REJECT_CHAIN: ChainId = chain(Table::Filter, "UNDERPASS_REJECT");

/// Adds the rules if `ipv6: reject` is set. `nat` builds the rules that would capture IPv6.
pub(super) fn add(b: &mut Builder, inputs: &Inputs<'_>, nat: fn(&mut Builder, &Inputs<'_>)) {
    if !inputs.rejects_v6() {
        return;
    }
    let mut captured = Builder::default();
    nat(&mut captured, &inputs.only_v6());
    let add_rule = |b: &mut Builder, id: &str, reason, matches, action| {
        b.rule(REJECT_CHAIN, id, reason).families(Families::V6).when_all(matches, action);
    };
    let loopback_interface = || vec![LOOPBACK.to_owned()];
    let internal = "traffic within the loopback interface is allowed";
    add_rule(
        b,
        "reject-not-from-loopback",
        internal,
        vec![Match::In(loopback_interface())],
        Action::Return,
    );
    add_rule(
        b,
        "reject-not-to-loopback",
        internal,
        vec![Match::Out(loopback_interface())],
        Action::Return,
    );
    let older = "only a packet that opens a connection is rejected";
    add_rule(b, "reject-not-established", older, vec![TCP, Match::NotOpening], Action::Return);
    add_rule(b, "reject-tcp", "for ipv6: reject", vec![TCP], Action::Reject);
    add_rule(b, "reject-rest", "for ipv6: reject", vec![], Action::Reject);
    b.extend(captured.take_rules().into_iter().map(to_filter_rule));
}

/// Converts a rule of a nat chain to a rule of a filter chain.
fn to_filter_rule(rule: Rule) -> Rule {
    let action = match rule.action {
        Action::Redirect(_) => Action::Jump(REJECT_CHAIN),
        Action::Jump(target) => Action::Jump(filter(target)),
        // In a filter chain, Accept would also skip the rules of other programs.
        Action::Accept => Action::Return,
        action => action,
    };
    let id = format!("reject-{}", rule.id);
    // Neither Istio nor OSM rejects IPv6. Origin `Mesh` keeps these rules even with `exact`.
    Rule { id, action, chain: filter(rule.chain), origin: Origin::Mesh, ..rule }
}

fn filter(chain_id: ChainId) -> ChainId {
    let name = if chain_id.name == "PREROUTING" { "INPUT" } else { chain_id.name };
    chain(Table::Filter, name)
}

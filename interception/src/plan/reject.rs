//! `ipv6: reject`: what would have been caught, had IPv6 been captured, is refused.
//!
//! A nat chain of iptables cannot refuse, so that the rules of the profile for IPv6 stand in filter
//! chains instead, with a refusal for each redirect. Whatever a profile leaves alone stays allowed:
//! loopback, HBONE, the proxy's own, what is excluded.

use super::build::{Builder, Inputs, LOOPBACK, TCP, chain};
use super::{Action, ChainId, Families, Match, Origin, Rule, Table};

/// What is left to decide about a packet that would have been caught.
const REFUSED: ChainId = chain(Table::Filter, "UNDERPASS_REJECT");

/// Adds the rules that refuse IPv6, if the settings say so; `nat` makes those that would catch it.
pub(super) fn add(b: &mut Builder, inputs: &Inputs<'_>, nat: fn(&mut Builder, &Inputs<'_>)) {
    if !inputs.rejects_v6() {
        return;
    }
    let mut caught = Builder::default();
    nat(&mut caught, &inputs.only_v6());
    let refused = |b: &mut Builder, id: &str, reason, matches, action| {
        b.rule(REFUSED, id, reason).families(Families::V6).when_all(matches, action);
    };
    let lo = || vec![LOOPBACK.to_owned()];
    let internal = "what stays on loopback is nobody else's business";
    refused(b, "reject-not-from-loopback", internal, vec![Match::In(lo())], Action::Return);
    refused(b, "reject-not-to-loopback", internal, vec![Match::Out(lo())], Action::Return);
    let older = "only what opens a connection is refused";
    refused(b, "reject-not-established", older, vec![TCP, Match::NotOpening], Action::Return);
    refused(b, "reject-tcp", "ipv6: reject asks for it", vec![TCP], Action::Reject);
    refused(b, "reject-rest", "ipv6: reject asks for it", vec![], Action::Reject);
    b.extend(caught.take_rules().into_iter().map(refuse));
}

/// The rule of a nat chain as one of a filter chain.
fn refuse(rule: Rule) -> Rule {
    let action = match rule.action {
        Action::Redirect(_) => Action::Jump(REFUSED),
        Action::Jump(target) => Action::Jump(filter(target)),
        // In a filter chain it would end the rules of others too.
        Action::Accept => Action::Return,
        action => action,
    };
    let id = format!("reject-{}", rule.id);
    // `exact` knows no rejection, so what makes it up is not left out.
    Rule { id, action, chain: filter(rule.chain), origin: Origin::Seed, ..rule }
}

fn filter(chain_id: ChainId) -> ChainId {
    let name = if chain_id.name == "PREROUTING" { "INPUT" } else { chain_id.name };
    chain(Table::Filter, name)
}

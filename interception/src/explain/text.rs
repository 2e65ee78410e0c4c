//! The explanation as text for a terminal of 100 columns.

use std::fmt;

use super::{Explanation, Flow, Hop, PacketExplanation};
use crate::plan::nft::Statement;
use crate::plan::{
    Action, ChainId, ConntrackState, Direction, LoopbackAddress, Origin, Protocol, ReplyOutcome,
    Rule, TraversedChain, Verdict,
};

/// The assumed width of the terminal in columns.
const WIDTH: usize = 100;
const ARROW: &str = "─▶";
/// Explains the signs before a rule: `*` and `+`.
const LEGEND: &str = "Each line is a rule that matches the packet. * marks the deciding rule, + a rule that underpass adds; the others are those of";

/// The flows, the rules, and the routes and addresses that the rules depend on.
impl fmt::Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flows = self.flows();
        if flows.is_empty() {
            return writeln!(f, "The profile none has no rules and captures nothing.");
        }
        head(f, self)?;
        for flow in &flows {
            writeln!(f)?;
            self::flow(f, self, flow)?;
        }
        rules(f, self, &flows)?;
        routes(f, self)
    }
}

/// The packet's path, its verdict, and the advice.
impl fmt::Display for PacketExplanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hop(f, self.explanation, &self.hop)?;
        writeln!(f)?;
        let end = match self.hop.walk.end {
            Verdict::Direct => "It reaches its destination unmodified".to_owned(),
            Verdict::Redirected(port) => format!("It is redirected to the proxy's port {port}"),
            Verdict::Tproxied(port) => {
                format!("It is delivered unmodified to the proxy's port {port}")
            }
            Verdict::Rejected => "It is rejected".to_owned(),
            Verdict::Dropped => "It is dropped".to_owned(),
        };
        let why = match self.hop.decided_by() {
            Some(rule) => format!("{end}, by the rule {}: {}.", rule.id, rule.reason),
            None => format!("{end}: no rule decides."),
        };
        wrap(f, 0, &why)?;
        self.advice.iter().try_for_each(|advice| wrap(f, 0, advice))
    }
}

fn head(f: &mut fmt::Formatter<'_>, explanation: &Explanation<'_>) -> fmt::Result {
    let whose = match explanation.settings.profile {
        underpass_config::Profile::Osm => "OSM",
        _ => "Istio",
    };
    let count = if explanation.counters.is_some() {
        " The number counts its matches: connections in nat, packets elsewhere."
    } else {
        " The rules are not installed here, so there are no counters."
    };
    wrap(f, 0, &format!("{LEGEND} {whose}.{count}"))
}

fn flow(f: &mut fmt::Formatter<'_>, explanation: &Explanation<'_>, flow: &Flow<'_>) -> fmt::Result {
    writeln!(f, "{}  {}", flow.id, flow.title)?;
    if let Some(article) = flow.article {
        wrap(f, 3, &format!("The article: {article}"))?;
    }
    if let Some(note) = flow.note {
        wrap(f, 3, note)?;
    }
    flow.hops.iter().try_for_each(|hop| self::hop(f, explanation, hop))
}

/// Prints the sender, receiver and path of a packet, and the rules that matched.
fn hop(f: &mut fmt::Formatter<'_>, explanation: &Explanation<'_>, hop: &Hop<'_>) -> fmt::Result {
    let packet = &hop.packet;
    let mut about = String::new();
    if packet.protocol == Protocol::Udp {
        about.push_str(", UDP");
    }
    if packet.mark != 0 {
        about.push_str(&format!(", mark {:#x}", packet.mark));
    }
    about.push_str(match packet.state {
        ConntrackState::New => "",
        ConntrackState::PickedUp => ", not tracked before",
        ConntrackState::Established(Direction::Reply) => ", the reply",
        ConntrackState::Established(Direction::Original) => ", of a tracked connection",
        ConntrackState::Invalid => ", invalid",
    });
    let (from, source, to) = (hop.from, packet.source.ip(), packet.destination);
    writeln!(f, "   {from} {source} {ARROW} {to}{about}")?;
    wrap(f, 6, &path(hop))?;
    if let Some(sentence) = hop.reply.and_then(unanswered_reason) {
        wrap(f, 6, sentence)?;
    }
    let rules: Vec<&Rule> =
        hop.notable_chains().flat_map(|passage| passage.rules.iter().copied()).collect();
    let widest = |width: fn(&Rule) -> usize| rules.iter().map(|rule| width(rule)).max();
    let chain = widest(|rule| location(rule).chars().count()).unwrap_or_default();
    let id = widest(|rule| rule.id.chars().count()).unwrap_or_default();
    for rule in rules {
        let decides = if hop.decided_by() == Some(rule) { '*' } else { ' ' };
        let (origin_sign, count) = (origin_sign(rule), count(explanation, rule));
        let line = format!(
            "{decides}{origin_sign} {:<chain$}  {:<id$}{count}  {}",
            location(rule),
            rule.id,
            rule.reason
        );
        let hanging = 6 + 3 + chain + 2 + id + count.chars().count() + 2;
        write_indented(f, 6, hanging, &line)?;
    }
    Ok(())
}

/// The reason why the reply does not arrive although the first packet does.
fn unanswered_reason(reply: ReplyOutcome) -> Option<&'static str> {
    match reply {
        ReplyOutcome::Delivered => None,
        ReplyOutcome::Misrouted => Some("The reply goes to another host, so the connection fails."),
        ReplyOutcome::Unroutable => Some(
            "The kernel has no route for the reply, from 127.0.0.1 to another host, so the \
             connection fails.",
        ),
    }
}

/// The table and chain of a rule: `nat ISTIO_OUTPUT`.
fn location(rule: &Rule) -> String {
    format!("{} {}", rule.chain.table.name(), rule.chain.name)
}

fn origin_sign(rule: &Rule) -> char {
    match rule.origin {
        Origin::Mesh => ' ',
        Origin::Underpass => '+',
    }
}

fn count(explanation: &Explanation<'_>, rule: &Rule) -> String {
    match (explanation.counters, explanation.counter(rule)) {
        (None, _) => String::new(),
        (Some(_), Some(counter)) => format!("  {:>6}", counter.packets),
        (Some(_), None) => format!("  {:>6}", "-"),
    }
}

/// The path of a packet: `─▶ nat OUTPUT ─▶ ISTIO_OUTPUT ─▶ proxy :15001`.
fn path(hop: &Hop<'_>) -> String {
    let mut stops: Vec<String> = Vec::new();
    for passage in hop.notable_chains() {
        stops.extend(chains(passage).into_iter().map(|chain| name(passage, chain)));
    }
    if stops.is_empty() {
        stops.push(match hop.packet.state {
            ConntrackState::Established(_) => {
                "no rule: nat decided when the connection opened".to_owned()
            }
            ConntrackState::New | ConntrackState::PickedUp | ConntrackState::Invalid => {
                "no rule".to_owned()
            }
        });
    }
    stops.push(end(hop));
    stops.iter().map(|stop| format!("{ARROW} {stop}")).collect::<Vec<_>>().join(" ")
}

/// The chains that a packet enters from this base chain, including the base chain.
pub(super) fn chains(passage: &TraversedChain<'_>) -> Vec<ChainId> {
    let mut chains = vec![passage.chain];
    for rule in &passage.rules {
        chains.push(rule.chain);
        if let Action::Jump(target) = rule.action {
            chains.push(target);
        }
    }
    chains.dedup();
    chains
}

fn name(passage: &TraversedChain<'_>, chain: ChainId) -> String {
    if chain == passage.chain {
        format!("{} {}", chain.table.name(), chain.name)
    } else {
        chain.name.to_owned()
    }
}

/// Describes the packet's receiver and destination.
pub(super) fn end(hop: &Hop<'_>) -> String {
    let who = hop.to.map(|party| party.to_string()).unwrap_or_default();
    match hop.walk.end {
        Verdict::Direct => format!("{who} {}", hop.packet.destination),
        Verdict::Redirected(port) => format!("{who} :{port}"),
        Verdict::Tproxied(port) => format!("{who} :{port} (TPROXY)"),
        Verdict::Rejected => "refused".to_owned(),
        Verdict::Dropped => "dropped".to_owned(),
    }
}

fn rules(
    f: &mut fmt::Formatter<'_>,
    explanation: &Explanation<'_>,
    flows: &[Flow<'_>],
) -> fmt::Result {
    writeln!(f, "\nAll rules (- marks a rule that matches no packet above)")?;
    let hops = || flows.iter().flat_map(|flow| &flow.hops);
    for chain in explanation.plan.chains() {
        writeln!(f, "\n  {} {}", chain.id.table.name(), chain.id.name)?;
        for rule in explanation.plan.rules_in(chain.id) {
            let is_matched = hops().any(|hop| hop.walk.rules().any(|passed| passed.id == rule.id));
            let sign = if is_matched { ' ' } else { '-' };
            writeln!(f, "   {sign}{} {}{}", origin_sign(rule), rule.id, count(explanation, rule))?;
            wrap(f, 8, rule.reason)?;
            write_indented(f, 8, 10, &Statement(rule).to_string())?;
        }
    }
    Ok(())
}

fn routes(f: &mut fmt::Formatter<'_>, explanation: &Explanation<'_>) -> fmt::Result {
    let (routes, addresses) = (explanation.plan.routes(), explanation.plan.addresses());
    if !routes.is_empty() || !addresses.is_empty() {
        writeln!(f, "\nIn addition to the rules")?;
    }
    for route in routes {
        let (mark, table) = (route.mark, route.table);
        writeln!(
            f,
            "  ip rule  from all fwmark {:#x}/{:#x} pref {} lookup {table}",
            mark.value, mark.mask, route.priority
        )?;
        writeln!(f, "  ip route local default dev lo table {table}")?;
    }
    addresses
        .iter()
        .try_for_each(|LoopbackAddress(address)| writeln!(f, "  ip addr  {address}/128 dev lo"))
}

/// Wraps text to lines of at most [`WIDTH`] columns, all with the same indentation.
fn wrap(f: &mut fmt::Formatter<'_>, indent: usize, text: &str) -> fmt::Result {
    write_indented(f, indent, indent, text)
}

/// Wraps text, and indents lines by `hanging` from the second on. Spaces within the text stay.
fn write_indented(
    f: &mut fmt::Formatter<'_>,
    indent: usize,
    hanging: usize,
    text: &str,
) -> fmt::Result {
    let mut line = " ".repeat(indent);
    let mut empty = true;
    for word in text.split(' ') {
        if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            writeln!(f, "{}", line.trim_end())?;
            (line, empty) = (" ".repeat(hanging), true);
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    writeln!(f, "{}", line.trim_end())
}

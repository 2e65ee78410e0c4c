//! The explanation as JSON, for programs.
//!
//! Names of fields are stable; new fields may be added.
//!
//! ```text
//! profile     ambient | sidecar | osm | none
//! flows[]     id, title, article?, note?, hops[]
//!   hops[]    from, to (null: not delivered), protocol, source, destination,
//!             direction (out | in), interface, uid?, gid?, mark, connection_mark,
//!             state (new | picked-up | established | reply | invalid),
//!             traversed[]: table, chain, rules[] (ids)
//!             end: kind (direct | redirected | tproxied | rejected | dropped), port?
//!             reply (delivered | misrouted | unroutable; null: the packet opens no connection,
//!             or is not delivered)
//!             decided_by (id, null: no rule)
//! rules[], routes[], addresses[] as in `plan/json.rs`; an installed rule has packets and bytes
//! ```
//!
//! A single packet is `{"hop": …, "advice": […], "rules": […]}`, with the rules that matched.

use serde_json::{Value, json};

use super::{Explanation, Flow, Hop, PacketExplanation};
use crate::plan::{ConntrackState, Direction, Entry, Protocol, ReplyOutcome, Rule, Verdict};

impl Explanation<'_> {
    /// The flows, the rules, and the routes and addresses that the rules depend on.
    #[must_use]
    pub fn json(&self) -> Value {
        let plan = &self.plan;
        let mut value = plan.json();
        if let Some(fields) = value.as_object_mut() {
            let rules = plan.rules().iter().map(|rule| self.rule(rule));
            fields.insert("rules".to_owned(), rules.collect());
            fields.insert("flows".to_owned(), self.flows().iter().map(flow).collect());
            fields.insert("profile".to_owned(), self.settings.profile.to_string().into());
        }
        value
    }

    fn rule(&self, rule: &Rule) -> Value {
        let mut value = rule.json();
        if let (Some(counter), Some(fields)) = (self.counter(rule), value.as_object_mut()) {
            fields.insert("packets".to_owned(), counter.packets.into());
            fields.insert("bytes".to_owned(), counter.bytes.into());
        }
        value
    }
}

impl PacketExplanation<'_> {
    /// The packet's path, the rules that matched, and the advice.
    #[must_use]
    pub fn json(&self) -> Value {
        let rules = self.hop.walk.rules().map(|rule| self.explanation.rule(rule));
        json!({
            "hop": hop(&self.hop),
            "advice": self.advice,
            "rules": rules.collect::<Vec<_>>(),
        })
    }
}

fn flow(flow: &Flow<'_>) -> Value {
    let mut value = json!({
        "id": flow.id,
        "title": flow.title,
        "hops": flow.hops.iter().map(hop).collect::<Vec<_>>(),
    });
    let texts = [("article", flow.article), ("note", flow.note)];
    if let Some(fields) = value.as_object_mut() {
        for (key, text) in texts.into_iter().filter_map(|(key, text)| Some((key, text?))) {
            fields.insert(key.to_owned(), text.into());
        }
    }
    value
}

fn hop(hop: &Hop<'_>) -> Value {
    let packet = &hop.packet;
    let (direction, interface, owner) = match &packet.entry {
        Entry::Out { interface, uid, gid } => ("out", interface, Some((uid, gid))),
        Entry::In { interface } => ("in", interface, None),
    };
    let traversed = hop.walk.traversed.iter().map(|passage| {
        json!({
            "table": passage.chain.table.name(),
            "chain": passage.chain.name,
            "rules": passage.rules.iter().map(|rule| rule.id.as_str()).collect::<Vec<_>>(),
        })
    });
    let mut value = json!({
        "from": hop.from.to_string(),
        "to": hop.to.map(|party| party.to_string()),
        "protocol": match packet.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        },
        "source": packet.source.to_string(),
        "destination": packet.destination.to_string(),
        "direction": direction,
        "interface": interface,
        "mark": packet.mark,
        "connection_mark": packet.connection_mark,
        "state": state(packet.state),
        "traversed": traversed.collect::<Vec<_>>(),
        "end": end(hop.walk.end),
        "reply": hop.reply.map(reply),
        "decided_by": hop.decided_by().map(|rule| rule.id.as_str()),
    });
    if let (Some((uid, gid)), Some(fields)) = (owner, value.as_object_mut()) {
        fields.insert("uid".to_owned(), (*uid).into());
        fields.insert("gid".to_owned(), (*gid).into());
    }
    value
}

fn state(state: ConntrackState) -> &'static str {
    match state {
        ConntrackState::New => "new",
        ConntrackState::PickedUp => "picked-up",
        ConntrackState::Established(Direction::Original) => "established",
        ConntrackState::Established(Direction::Reply) => "reply",
        ConntrackState::Invalid => "invalid",
    }
}

fn reply(reply: ReplyOutcome) -> &'static str {
    match reply {
        ReplyOutcome::Delivered => "delivered",
        ReplyOutcome::Misrouted => "misrouted",
        ReplyOutcome::Unroutable => "unroutable",
    }
}

fn end(end: Verdict) -> Value {
    match end {
        Verdict::Direct => json!({"kind": "direct"}),
        Verdict::Redirected(port) => json!({"kind": "redirected", "port": port}),
        Verdict::Tproxied(port) => json!({"kind": "tproxied", "port": port}),
        Verdict::Rejected => json!({"kind": "rejected"}),
        Verdict::Dropped => json!({"kind": "dropped"}),
    }
}

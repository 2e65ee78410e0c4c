//! The explanation for programs.
//!
//! Field names are stable; fields may be added.
//!
//! ```text
//! profile     ambient | sidecar | osm | none
//! flows[]     id, title, article?, note?, hops[]
//!   hops[]    from, to (null: nobody), protocol, source, destination, direction (out | in), interface,
//!             uid?, gid?, mark, connection_mark, state (new | picked-up | established | reply | invalid),
//!             passages[]: table, chain, rules[] (ids)
//!             end: kind (direct | redirected | tproxied | rejected | dropped), port?
//!             answer (returns | astray | unroutable; null: it opens no connection, or nobody gets it)
//!             decided_by (id, null: no rule)
//! rules[], routes[], addresses[] as `plan/json.rs` has them; rules with packets?, bytes? (if they are installed)
//! ```
//!
//! One packet is `{"hop": …, "advice": […], "rules": […]}`, the rules being those that it met.

use serde_json::{Value, json};

use super::{Explanation, Flow, Hop, PacketExplanation};
use crate::plan::{Answer, Direction, End, Protocol, Rule, State, Way};

impl Explanation<'_> {
    /// The flows, the rules, and what they rely on.
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
    /// The packet's way, the rules on it, and the advice.
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
    let (direction, interface, owner) = match &packet.way {
        Way::Out { interface, uid, gid } => ("out", interface, Some((uid, gid))),
        Way::In { interface } => ("in", interface, None),
    };
    let passages = hop.walk.passages.iter().map(|passage| {
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
        "passages": passages.collect::<Vec<_>>(),
        "end": end(hop.walk.end),
        "answer": hop.answer.map(answer),
        "decided_by": hop.decided_by().map(|rule| rule.id.as_str()),
    });
    if let (Some((uid, gid)), Some(fields)) = (owner, value.as_object_mut()) {
        fields.insert("uid".to_owned(), (*uid).into());
        fields.insert("gid".to_owned(), (*gid).into());
    }
    value
}

fn state(state: State) -> &'static str {
    match state {
        State::New => "new",
        State::PickedUp => "picked-up",
        State::Established(Direction::Original) => "established",
        State::Established(Direction::Reply) => "reply",
        State::Invalid => "invalid",
    }
}

fn answer(answer: Answer) -> &'static str {
    match answer {
        Answer::Returns => "returns",
        Answer::Astray => "astray",
        Answer::Unroutable => "unroutable",
    }
}

fn end(end: End) -> Value {
    match end {
        End::Direct => json!({"kind": "direct"}),
        End::Redirected(port) => json!({"kind": "redirected", "port": port}),
        End::Tproxied(port) => json!({"kind": "tproxied", "port": port}),
        End::Rejected => json!({"kind": "rejected"}),
        End::Dropped => json!({"kind": "dropped"}),
    }
}

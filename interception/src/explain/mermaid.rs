//! Prints the explanation as a Mermaid flowchart: a subgraph per flow, chains as nodes, rules as
//! edges.

use std::fmt::{self, Write as _};

use super::text::{chains, end};
use super::{Explanation, Flow, Hop, PacketExplanation};
use crate::plan::{ChainId, Rule, TraversedChain};

impl Explanation<'_> {
    /// A `flowchart LR` with a subgraph for each flow.
    #[must_use]
    pub fn mermaid(&self) -> String {
        chart(&self.flows())
    }
}

impl PacketExplanation<'_> {
    /// A `flowchart LR` of the packet's path.
    #[must_use]
    pub fn mermaid(&self) -> String {
        let hop = self.hop.clone();
        let title = format!("{} to {}", hop.from, hop.packet.destination);
        let flow = Flow { id: String::new(), title, article: None, note: None, hops: vec![hop] };
        chart(&[flow])
    }
}

fn chart(flows: &[Flow<'_>]) -> String {
    let mut chart = Chart { text: "flowchart LR\n".to_owned(), nodes: 0 };
    for (number, flow) in flows.iter().enumerate() {
        // Writing to a String cannot fail.
        let _written: fmt::Result = chart.flow(number, flow);
    }
    chart.text
}

struct Chart {
    text: String,
    nodes: usize,
}

impl Chart {
    fn flow(&mut self, number: usize, flow: &Flow<'_>) -> fmt::Result {
        let title = escaped(format!("{}  {}", flow.id, flow.title).trim());
        writeln!(self.text, "  subgraph flow{number}[\"{title}\"]")?;
        writeln!(self.text, "    direction LR")?;
        let mut at = None;
        for hop in &flow.hops {
            let start = match at {
                Some(node) => node,
                None => self.party(&hop.from.to_string())?,
            };
            at = Some(self.hop(start, hop)?);
        }
        writeln!(self.text, "  end")
    }

    /// Draws the path of a packet from its sender. Returns its last node.
    fn hop(&mut self, start: usize, hop: &Hop<'_>) -> Result<usize, fmt::Error> {
        let mut from = start;
        let mut label = hop.packet.destination.to_string();
        for passage in hop.notable_chains() {
            for chain in chains(passage) {
                let to = self.node(&format!("{} {}", chain.table.name(), chain.name))?;
                self.arrow(from, to, &label)?;
                (from, label) = (to, exit_rule(passage, chain));
            }
        }
        let to = self.party(&end(hop))?;
        self.arrow(from, to, &label)?;
        Ok(to)
    }

    fn node(&mut self, label: &str) -> Result<usize, fmt::Error> {
        self.nodes += 1;
        writeln!(self.text, "    n{}[\"{}\"]", self.nodes, escaped(label))?;
        Ok(self.nodes)
    }

    fn party(&mut self, label: &str) -> Result<usize, fmt::Error> {
        self.nodes += 1;
        writeln!(self.text, "    n{}([\"{}\"])", self.nodes, escaped(label))?;
        Ok(self.nodes)
    }

    fn arrow(&mut self, from: usize, to: usize, label: &str) -> fmt::Result {
        if label.is_empty() {
            return writeln!(self.text, "    n{from} --> n{to}");
        }
        writeln!(self.text, "    n{from} -->|\"{}\"| n{to}", escaped(label))
    }
}

/// The rule by which a packet leaves a chain: the last rule that matched in it.
fn exit_rule(passage: &TraversedChain<'_>, chain: ChainId) -> String {
    let of_chain = |rule: &&&Rule| rule.chain == chain;
    passage.rules.iter().rev().find(of_chain).map(|rule| rule.id.clone()).unwrap_or_default()
}

/// Escapes `#`, because Mermaid decodes `#name;` and `#number;` in quoted labels.
fn escaped(label: &str) -> String {
    let mut escaped = String::with_capacity(label.len());
    for character in label.chars() {
        match character {
            '"' => escaped.push_str("#quot;"),
            '#' => escaped.push_str("#35;"),
            '<' => escaped.push_str("#lt;"),
            '>' => escaped.push_str("#gt;"),
            '\n' => escaped.push(' '),
            other => escaped.push(other),
        }
    }
    escaped
}

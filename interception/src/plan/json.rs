//! The plan as JSON, for programs.
//!
//! Names of fields are stable; new fields may be added.
//!
//! ```text
//! rules[]     id, table, chain, families (both | v4 | v6),
//!             origin (mesh: Istio or OSM has the rule | underpass), reason, text (nft syntax)
//! routes[]    mark, mask, priority, table
//! addresses[] added to the loopback interface
//! ```

use serde_json::{Value, json};

use super::nft::Statement;
use super::{Families, LoopbackAddress, Origin, Rule, RulePlan};

impl RulePlan {
    /// The rules in order, and the routes and addresses that they depend on.
    #[must_use]
    pub fn json(&self) -> Value {
        let routes = self.routes.iter().map(|route| {
            json!({
                "mark": route.mark.value,
                "mask": route.mark.mask,
                "priority": route.priority,
                "table": route.table,
            })
        });
        let addresses = self.addresses.iter().map(|LoopbackAddress(address)| address.to_string());
        json!({
            "rules": self.rules.iter().map(Rule::json).collect::<Vec<_>>(),
            "routes": routes.collect::<Vec<_>>(),
            "addresses": addresses.collect::<Vec<_>>(),
        })
    }
}

impl Rule {
    /// The rule with its reason.
    pub(crate) fn json(&self) -> Value {
        json!({
            "id": self.id,
            "table": self.chain.table.name(),
            "chain": self.chain.name,
            "families": match self.families {
                Families::Both => "both",
                Families::V4 => "v4",
                Families::V6 => "v6",
            },
            "origin": match self.origin {
                Origin::Mesh => "mesh",
                Origin::Underpass => "underpass",
            },
            "reason": self.reason,
            "text": Statement(self).to_string(),
        })
    }
}

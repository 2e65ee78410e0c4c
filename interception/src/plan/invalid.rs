//! `drop_invalid`: what conntrack cannot place is dropped. A packet outside of its connection's window would be
//! delivered as it is, past every redirect, and answered with a reset that ends the connection.
//!
//! Istio has it in sidecars, with a chain of that name; it is the same everywhere.

use underpass_config::Profile;

use super::build::{Builder, Inputs, chain};
use super::{Action, ChainId, Match, Table};

const PREROUTING: ChainId = chain(Table::Mangle, "PREROUTING");
const ISTIO_DROP: ChainId = chain(Table::Mangle, "ISTIO_DROP");
const DROP: ChainId = chain(Table::Mangle, "UNDERPASS_DROP");

/// Adds the rules, if the settings ask for them.
pub(super) fn add(b: &mut Builder, inputs: &Inputs<'_>) {
    if !inputs.settings.drop_invalid {
        return;
    }
    let drop = if inputs.settings.profile == Profile::Sidecar { ISTIO_DROP } else { DROP };
    b.rule(
        PREROUTING,
        "invalid",
        "drop_invalid asks for it: a packet outside of its window is dropped, not answered with a reset",
    )
    .families(inputs.neutral())
    .when([Match::Invalid], Action::Jump(drop));
    b.rule(drop, "drop-invalid", "here the packet ends")
        .families(inputs.neutral())
        .when([], Action::Drop);
}

//! The rules of `drop_invalid`: drop packets that conntrack classifies as invalid.
//!
//! Otherwise a packet outside of its connection's TCP window would bypass every redirect, and the
//! local kernel would reply with a RST that ends the connection.
//!
//! Istio's sidecar has these rules in a chain named ISTIO_DROP. They are the same in every profile.

use underpass_config::Profile;

use super::build::{Builder, Inputs, chain};
use super::{Action, ChainId, Match, Table};

const PREROUTING: ChainId = chain(Table::Mangle, "PREROUTING");
const ISTIO_DROP: ChainId = chain(Table::Mangle, "ISTIO_DROP");
const DROP: ChainId = chain(Table::Mangle, "UNDERPASS_DROP");

/// Adds the rules if `drop_invalid` is set.
pub(super) fn add(b: &mut Builder, inputs: &Inputs<'_>) {
    if !inputs.settings.drop_invalid {
        return;
    }
    let drop = if inputs.settings.profile == Profile::Sidecar { ISTIO_DROP } else { DROP };
    b.rule(
        PREROUTING,
        "invalid",
        "for drop_invalid: a packet outside of its TCP window is dropped instead of answered with a RST",
    )
    .families(inputs.captured())
    .when([Match::Invalid], Action::Jump(drop));
    b.rule(drop, "drop-invalid", "drops the packet")
        .families(inputs.captured())
        .when([], Action::Drop);
}

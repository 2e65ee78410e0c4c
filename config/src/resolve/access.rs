//! From `egress`, `egress_exceptions`, `proxy.mtls` and `proxy.mtls_overrides` to what may go out and come in besides tunnels.
//!
//! Not here: which keys exist (`resolve.rs`).

use super::interception::{cidr, port_range};
use crate::read::Cursor;
use crate::settings::{
    Egress, EgressSettings, Mtls, MtlsOverride, MtlsOverrideError, MtlsSettings,
};

/// The keys whose values are lists, as in `interception.rs`.
pub(super) const LISTS: &[&str] =
    &["proxy.mtls_overrides", "egress_exceptions.cidrs", "egress_exceptions.ports"];

/// Reads `egress` and `egress_exceptions`, which stand at the root.
pub(super) fn egress(root: Cursor<'_>) -> EgressSettings {
    let words = [("allow", Egress::Allow), ("mesh-only", Egress::MeshOnly)];
    let (mode, exceptions) = (root.key("egress"), root.key("egress_exceptions"));
    // Of a mode that does not exist, it cannot be said that it needs no exceptions.
    let otherwise = if mode.is_given() { Egress::MeshOnly } else { Egress::Allow };
    let settings = EgressSettings {
        mode: mode.one_of(&words).unwrap_or(otherwise),
        cidrs: exceptions.key("cidrs").list(cidr),
        ports: exceptions.key("ports").list(port_range),
    };
    let has_exceptions = !settings.cidrs.is_empty() || !settings.ports.is_empty();
    if settings.mode == Egress::Allow && has_exceptions {
        exceptions.problem("has a meaning with egress: mesh-only only: everything is allowed");
    }
    settings
}

/// Reads `mtls` and `mtls_overrides` of the section `proxy`; without an identity there are no tunnels.
pub(super) fn mtls(section: Cursor<'_>, has_identity: bool) -> MtlsSettings {
    let (default, overrides) = (section.key("mtls"), section.key("mtls_overrides"));
    let settings = MtlsSettings {
        default: default.one_of(Mtls::WORDS).unwrap_or(Mtls::Permissive),
        overrides: overrides
            .list(|text| text.parse().map_err(|error: MtlsOverrideError| error.to_string())),
    };
    refuse_contradictions(overrides, &settings.overrides);
    if !has_identity && settings.is_strict_somewhere() {
        let place = if settings.default == Mtls::Strict { default } else { overrides };
        place.problem("strict needs an identity: without HBONE nobody could ever connect");
    }
    settings
}

fn refuse_contradictions(place: Cursor<'_>, overrides: &[MtlsOverride]) {
    for (index, one) in overrides.iter().enumerate() {
        let mut before = overrides.iter().take(index);
        if let Some(other) = before.find(|other| other.is_of_same(one)) {
            place.problem(format!("{other} and {one} contradict each other: keep one"));
        }
    }
}

#[cfg(test)]
mod tests;

//! The settings `egress`, `egress_exceptions`, `proxy.mtls` and `proxy.mtls_overrides`.

use ipnet::IpNet;

use crate::settings::declare::{
    CIDRS, Declared, Document, Fallback, Kind, PORTS, given_list, list, parsed, settings, word,
};
use crate::settings::{Egress, EgressSettings, Mtls, MtlsOverride, MtlsSettings, PortRange};

settings! {
    /// whether plaintext connections to the application are accepted: `permissive`: if policies
    /// allow them; `strict`: never, only tunnels (needs an identity)
    MTLS: Mtls = "proxy.mtls", word("`permissive`, `strict`"),
        Fallback::Is(|| Mtls::Permissive), |s| Some(s.proxy.mtls.default);
    /// exceptions from `proxy.mtls`: `NAMESPACE/NAME=MODE`, `NAMESPACE/NAME:PORT=MODE`,
    /// `:PORT=MODE`, see below
    MTLS_OVERRIDES: Vec<MtlsOverride> = "proxy.mtls_overrides", OVERRIDES,
        Fallback::Is(Vec::new), |s| Some(s.proxy.mtls.overrides.clone());
    /// connections to destinations outside the mesh: `allow`: passed through; `mesh-only`: refused
    EGRESS: Egress = "egress", word("`allow`, `mesh-only`"),
        Fallback::Is(|| Egress::Allow), |s| Some(s.egress.mode);
    /// with `mesh-only`: connections to these addresses are passed through
    EGRESS_CIDRS: Vec<IpNet> = "egress_exceptions.cidrs", CIDRS,
        Fallback::Is(Vec::new), |s| Some(s.egress.cidrs.clone());
    /// with `mesh-only`: connections to these ports are passed through, to any address
    EGRESS_PORTS: Vec<PortRange> = "egress_exceptions.ports", PORTS,
        Fallback::Is(Vec::new), |s| Some(s.egress.ports.clone());
}

const OVERRIDES: Kind<Vec<MtlsOverride>> =
    list("list of modes, see below", |cursor, _| given_list(cursor, parsed));

pub(super) fn egress(document: Document<'_>) -> Option<EgressSettings> {
    let settings = EgressSettings {
        // After a mistake in the mode, exceptions are not reported as contradictions.
        mode: EGRESS.read_sound(document).unwrap_or(Egress::MeshOnly),
        cidrs: EGRESS_CIDRS.read(document)?,
        ports: EGRESS_PORTS.read(document)?,
    };
    let has_exceptions = !settings.cidrs.is_empty() || !settings.ports.is_empty();
    if settings.mode == Egress::Allow && has_exceptions {
        let exceptions = document.root.key("egress_exceptions");
        exceptions.problem("has an effect only with egress: mesh-only");
    }
    Some(settings)
}

/// Reads the settings of mTLS. Rejects strict mTLS without an identity, because there would be no
/// tunnels.
pub(super) fn mtls(document: Document<'_>, has_identity: bool) -> Option<MtlsSettings> {
    let settings =
        MtlsSettings { default: MTLS.read(document)?, overrides: MTLS_OVERRIDES.read(document)? };
    refuse_contradictions(document, &settings.overrides);
    if !has_identity && settings.is_strict_somewhere() {
        let strict: &dyn Declared =
            if settings.default == Mtls::Strict { &MTLS } else { &MTLS_OVERRIDES };
        let reason = "strict needs an identity: without HBONE no connection is possible";
        strict.problem(document, reason);
    }
    Some(settings)
}

fn refuse_contradictions(document: Document<'_>, overrides: &[MtlsOverride]) {
    for (index, one) in overrides.iter().enumerate() {
        let mut before = overrides.iter().take(index);
        if let Some(other) = before.find(|other| other.has_same_target(one)) {
            let reason = format!("{other} and {one} contradict each other");
            MTLS_OVERRIDES.problem(document, &reason);
        }
    }
}

#[cfg(test)]
mod tests;

//! What many items of a mesh have in common, kept once: names, identities, localities, gateways, port maps.

use std::sync::Arc;

use crate::mesh::names::{Interned, Map, Name, Names, Set};
use crate::mesh::{Gateway, Locality, PortMap};
use crate::{SpiffeError, SpiffeId, TrustDomain};

#[derive(Debug, Default)]
pub(in crate::mesh) struct Shared {
    pub(super) names: Names,
    pub(super) localities: Interned<Locality>,
    pub(super) gateways: Interned<Gateway>,
    ports: Set<PortMap>,
    identities: Map<[Name; 3], SpiffeId>,
}

impl Shared {
    /// Lets go of what only this holds.
    pub(in crate::mesh) fn forget_unused(&mut self) {
        self.identities.retain(|_, identity| identity.is_shared());
        self.ports.retain(PortMap::is_shared);
        self.gateways.forget_unused();
        self.localities.forget_unused();
        // Those above have names in them.
        self.names.forget_unused();
    }

    pub(super) fn name(&mut self, text: &str) -> Name {
        self.names.shared(text)
    }

    pub(super) fn ports(&mut self, ports: PortMap) -> PortMap {
        if let Some(known) = self.ports.get(&ports) {
            return known.clone();
        }
        self.ports.insert(ports.clone());
        ports
    }

    pub(super) fn gateway(&mut self, gateway: Gateway) -> Arc<Gateway> {
        self.gateways.shared(gateway)
    }

    /// The identity that Istio gives a workload of this trust domain, namespace and service account.
    pub(super) fn identity(&mut self, of: [Name; 3]) -> Result<SpiffeId, SpiffeError> {
        if let Some(known) = self.identities.get(&of) {
            return Ok(known.clone());
        }
        let [trust_domain, namespace, service_account] = &of;
        let trust_domain: TrustDomain = trust_domain.parse()?;
        let identity = SpiffeId::istio(trust_domain, namespace, service_account)?;
        self.identities.insert(of, identity.clone());
        Ok(identity)
    }
}

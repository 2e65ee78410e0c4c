//! Deduplicates values that many items share: names, identities, localities, gateways, port maps.

use std::sync::Arc;

use super::names::{Interned, Map, Name, Names, Set};
use super::service::PortMap;
use super::workload::{Gateway, Locality};
use crate::identity::spiffe::{SpiffeError, SpiffeId, TrustDomain};

/// The values that several items of the mesh share, each allocated once.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) names: Names,
    pub(crate) localities: Interned<Locality>,
    pub(crate) gateways: Interned<Gateway>,
    ports: Set<PortMap>,
    identities: Map<[Name; 3], SpiffeId>,
}

impl Shared {
    /// Drops values without other references.
    pub(crate) fn drop_unused(&mut self) {
        self.identities.retain(|_, identity| identity.is_shared());
        self.ports.retain(PortMap::is_shared);
        self.gateways.drop_unused();
        self.localities.drop_unused();
        // The values above refer to names, so drop the names last.
        self.names.drop_unused();
    }

    pub(crate) fn name(&mut self, text: &str) -> Name {
        self.names.shared(text)
    }

    pub(crate) fn ports(&mut self, ports: PortMap) -> PortMap {
        if let Some(known) = self.ports.get(&ports) {
            return known.clone();
        }
        self.ports.insert(ports.clone());
        ports
    }

    pub(crate) fn gateway(&mut self, gateway: Gateway) -> Arc<Gateway> {
        self.gateways.shared(gateway)
    }

    /// The identity that Istio derives from trust domain, namespace and service account.
    pub(crate) fn identity(&mut self, of: [Name; 3]) -> Result<SpiffeId, SpiffeError> {
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

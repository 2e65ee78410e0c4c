//! What many items of a mesh have in common, kept once: names, identities, localities, gateways, port maps.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::mesh::names::{Interned, Name, Names};
use crate::mesh::{Gateway, Locality, PortMap};
use crate::{SpiffeError, SpiffeId, TrustDomain};

#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) names: Names,
    pub(super) localities: Interned<Locality>,
    pub(super) gateways: Interned<Gateway>,
    ports: HashSet<PortMap>,
    identities: HashMap<[Name; 3], SpiffeId>,
}

impl Shared {
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

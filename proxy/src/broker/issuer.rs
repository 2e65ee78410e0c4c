//! Certificates of the local CA, whose key only the broker has.

use std::sync::Arc;

use underpass_config::SpiffeId;
use underpass_hbone::{CertificateIssuer, IssueFuture, IssuedCertificate};

use crate::broker::message::{Answer, Request};
use crate::broker::operations::Requests;
use crate::broker::served::ServedKeys;

/// Issues certificates for the pods that this process serves.
#[derive(Debug)]
pub(super) struct BrokerIssuer {
    pub(super) requests: Requests,
    pub(super) pods: Arc<ServedKeys>,
    /// The authority in logs.
    pub(super) name: String,
}

impl CertificateIssuer for BrokerIssuer {
    fn name(&self) -> &str {
        &self.name
    }

    fn issue(&self, id: &SpiffeId) -> IssueFuture {
        let pod = self.pods.with_identity(id);
        let (requests, id) = (self.requests.clone(), id.clone());
        Box::pin(async move {
            let pod = pod.ok_or_else(|| format!("no pod with the identity {id} is served"))?;
            match requests.request(Request::Certificate { pod }).await? {
                (Answer::Certificate { chain, key, roots }, _) => {
                    Ok((IssuedCertificate { chain_pem: chain, key_pem: key }, roots))
                }
                _ => Err("the broker sent another answer".to_owned()),
            }
        })
    }
}

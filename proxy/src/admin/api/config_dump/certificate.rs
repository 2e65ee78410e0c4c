//! A certificate with ztunnel's keys.

use serde::Serialize;
use underpass_hbone::{CertificateDescription, Identity};

use crate::admin::api::certificates::identities;
use crate::admin::api::time::rfc3339;
use crate::admin::state::Admin;

/// The certificate of one identity.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct IdentityDump {
    identity: String,
    state: &'static str,
    cert_chain: Vec<CertificateDump>,
    root_certs: Vec<CertificateDump>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct CertificateDump {
    pem: String,
    serial_number: String,
    valid_from: String,
    expiration_time: String,
}

impl From<CertificateDescription> for CertificateDump {
    fn from(described: CertificateDescription) -> Self {
        let CertificateDescription { pem, serial_number, not_before, not_after } = described;
        let (valid_from, expiration_time) = (rfc3339(not_before), rfc3339(not_after));
        Self { pem, serial_number, valid_from, expiration_time }
    }
}

pub(super) fn dump(admin: &Admin) -> Vec<IdentityDump> {
    let dump = |(identity, (issued, _)): (String, (Option<Identity>, Vec<String>))| match issued {
        Some(issued) => IdentityDump {
            identity,
            state: "Available",
            cert_chain: issued.describe_chain().into_iter().map(CertificateDump::from).collect(),
            root_certs: issued.describe_roots().into_iter().map(|(_, root)| root.into()).collect(),
        },
        None => IdentityDump {
            identity,
            state: "Initializing",
            cert_chain: Vec::new(),
            root_certs: Vec::new(),
        },
    };
    identities(admin).into_iter().map(dump).collect()
}

//! Checks that a certificate is the X.509-SVID of a workload (SPIFFE X509-SVID, sections 2 to 4).
//!
//! The same rules apply to peers, to our certificate, and to answers of a CA. webpki checks
//! signatures, validity and extended key usage.
//!
//! Two deviations from the standard: the extension keyUsage may be missing, and additional names of
//! other types (DNS, IP) are accepted, as SPIRE issues them.

use underpass_config::{Quoted, SpiffeId};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use crate::error::SvidProblem;

/// Reads the identity in a leaf certificate. It proves nothing until the chain is verified.
pub(crate) fn workload_id(leaf: &[u8]) -> Result<SpiffeId, SvidProblem> {
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf)
        .map_err(|_| SvidProblem::Malformed("certificate"))?;
    let id = spiffe_id(&leaf)?;
    check_usage(&leaf)?;
    if id.is_workload() {
        Ok(id)
    } else {
        Err(SvidProblem::TrustDomainOnly(id.trust_domain().clone()))
    }
}

/// Reads the SPIFFE ID of a leaf or CA certificate: its only URI name.
pub(crate) fn spiffe_id(certificate: &X509Certificate<'_>) -> Result<SpiffeId, SvidProblem> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| SvidProblem::Malformed("subjectAltName"))?;
    let names = names.map_or(&[][..], |extension| &extension.value.general_names);
    // Otherwise a malformed URI would not count as a URI name.
    if names.iter().any(|name| matches!(name, GeneralName::Invalid(..))) {
        return Err(SvidProblem::Malformed("subjectAltName"));
    }
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let (Some(uri), None) = (uris.next(), uris.next()) else {
        let is_uri = |name: &&GeneralName<'_>| matches!(name, GeneralName::URI(_));
        return Err(SvidProblem::UriNames(names.iter().filter(is_uri).count()));
    };
    uri.parse().map_err(|problem| SvidProblem::Name { name: Quoted::new(uri), problem })
}

fn check_usage(leaf: &X509Certificate<'_>) -> Result<(), SvidProblem> {
    let constraints =
        leaf.basic_constraints().map_err(|_| SvidProblem::Malformed("basicConstraints"))?;
    if constraints.is_some_and(|extension| extension.value.ca) {
        return Err(SvidProblem::Authority);
    }
    let usage = leaf.key_usage().map_err(|_| SvidProblem::Malformed("keyUsage"))?;
    let Some(usage) = usage.map(|extension| extension.value) else { return Ok(()) };
    if usage.key_cert_sign() {
        return Err(SvidProblem::SigningUsage("keyCertSign"));
    }
    if usage.crl_sign() {
        return Err(SvidProblem::SigningUsage("cRLSign"));
    }
    if usage.digital_signature() { Ok(()) } else { Err(SvidProblem::NoDigitalSignature) }
}

#[cfg(test)]
mod tests;

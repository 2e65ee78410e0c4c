//! Describes the certificates of an identity, to show them.

use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use underpass_config::TrustDomain;

use crate::identity::{Identity, pem, system_time};
use crate::trust::bundle::Bundle;

/// One certificate. Contains no key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateDescription {
    /// The certificate in PEM.
    pub pem: String,
    /// The serial number, in decimal digits.
    pub serial_number: String,
    /// The start of its validity.
    pub not_before: SystemTime,
    /// The end of its validity.
    pub not_after: SystemTime,
}

impl CertificateDescription {
    /// Describes a certificate; `None` if it is malformed.
    fn new(der: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let validity = certificate.validity();
        Some(Self {
            pem: pem::of_certificates(std::slice::from_ref(der)),
            serial_number: certificate.serial.to_string(),
            not_before: system_time(validity.not_before),
            not_after: system_time(validity.not_after),
        })
    }
}

impl Identity {
    /// Describes the certificate chain: the leaf, then intermediates.
    pub fn describe_chain(&self) -> Vec<CertificateDescription> {
        self.chain().iter().filter_map(CertificateDescription::new).collect()
    }

    /// Describes the roots that came with the certificate, by trust domain.
    pub fn describe_roots(&self) -> Vec<(TrustDomain, CertificateDescription)> {
        let described = |(domain, bundle): (&TrustDomain, &Bundle)| {
            let roots = bundle.certificates().iter().filter_map(CertificateDescription::new);
            roots.map(|root| (domain.clone(), root)).collect::<Vec<_>>()
        };
        self.bundles().iter().flat_map(described).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{CLIENT, authority, identity};

    #[test]
    fn description_has_pem_and_serial_number_of_chain_and_roots() {
        let authority = authority("td");
        let identity = identity(&authority, CLIENT);
        let chain = identity.describe_chain();
        assert_eq!(chain[0].not_after, identity.expires());
        assert!(chain[0].serial_number.bytes().all(|digit| digit.is_ascii_digit()), "{chain:?}");
        let [(domain, root)] = &identity.describe_roots()[..] else { panic!("one root") };
        assert_eq!(domain.as_str(), "td");
        assert_eq!(root.pem.trim(), authority.roots_pem().trim());
        assert!(root.not_before < root.not_after);
    }
}

//! A certificate signing request (RFC 2986): verifies that the sender has the key, and reads the
//! requested identity.
//!
//! Ignores all other parts, so that they cannot reach the certificate. The server decides whether
//! to grant the request.

use rcgen::SubjectPublicKeyInfo;
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use underpass_config::{Quoted, SpiffeId};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;

use crate::error::RequestProblem;

const MIN_RSA_BITS: usize = 2048;

/// A certificate signing request with a verified signature.
#[derive(Debug, Clone)]
pub struct CertificateRequest {
    public_key: SubjectPublicKeyInfo,
    spiffe_id: Option<SpiffeId>,
}

impl CertificateRequest {
    /// Parses a certificate signing request and verifies its signature.
    ///
    /// # Errors
    /// The problem that makes the request invalid.
    pub fn from_pem(pem: &str) -> Result<Self, RequestProblem> {
        let malformed = |error: String| RequestProblem::Malformed(error);
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| malformed(error.to_string()))?;
        let (rest, request) = X509CertificationRequest::from_der(&der)
            .map_err(|error| malformed(error.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("trailing bytes".to_owned()));
        }
        request.verify_signature().map_err(|error| RequestProblem::Signature(error.to_string()))?;
        let key = &request.certification_request_info.subject_pki;
        let is_strong = match key.parsed() {
            Ok(PublicKey::RSA(rsa)) => rsa.key_size() >= MIN_RSA_BITS,
            // rcgen supports no other weak algorithm.
            Ok(_) => true,
            Err(_) => false,
        };
        if !is_strong {
            return Err(RequestProblem::Key);
        }
        let public_key =
            SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| RequestProblem::Key)?;
        Ok(Self { public_key, spiffe_id: spiffe_id(&request)? })
    }

    /// The requested identity. `None` if the request names no identity.
    pub fn spiffe_id(&self) -> Option<&SpiffeId> {
        self.spiffe_id.as_ref()
    }

    pub(super) fn public_key(&self) -> &SubjectPublicKeyInfo {
        &self.public_key
    }
}

fn spiffe_id(request: &X509CertificationRequest<'_>) -> Result<Option<SpiffeId>, RequestProblem> {
    let names =
        request.requested_extensions().into_iter().flatten().filter_map(
            |extension| match extension {
                ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
                _ => None,
            },
        );
    let uris: Vec<&str> = names
        .flatten()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris.as_slice() {
        [] => Ok(None),
        [uri] => match uri.parse() {
            Ok(id) => Ok(Some(id)),
            Err(_) => Err(RequestProblem::Names(Quoted::new(uri))),
        },
        several => Err(RequestProblem::Names(Quoted::new(several.join(" or ")))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::ca::tests::{TempDir, openssl};
    use crate::testing::{CLIENT, HOUR, authority, id};

    /// Creates a certificate signing request with openssl, with extra attributes.
    fn csr(dir: &TempDir, key: &[&str], digest: &str) -> String {
        let new = ["req", "-new", "-nodes", "-keyout", "key", "-subj", "/O=evil/CN=evil", digest];
        let san = "subjectAltName=URI:spiffe://td/ns/default/sa/client,DNS:evil.test";
        let extensions =
            ["-addext", san, "-addext", "basicConstraints=critical,CA:TRUE", "-newkey"];
        let ran = openssl(&[&new, &extensions[..], key].concat(), &dir.0);
        assert!(ran.status.success(), "{ran:?}");
        String::from_utf8(ran.stdout).unwrap()
    }

    #[test]
    fn certificate_contains_only_the_key_of_the_request() {
        let dir = TempDir::new("request-good");
        let ours = authority("td");
        fs::write(dir.0.join("roots"), ours.roots_pem()).unwrap();
        for (key, digest) in [
            (&["ec", "-pkeyopt", "ec_paramgen_curve:P-256"] as &[&str], "-sha256"),
            (&["ec", "-pkeyopt", "ec_paramgen_curve:P-256"], "-sha384"),
            (&["ec", "-pkeyopt", "ec_paramgen_curve:P-384"], "-sha384"),
            (&["rsa:2048"], "-sha256"),
            (&["ed25519"], "-sha256"),
        ] {
            let request = CertificateRequest::from_pem(&csr(&dir, key, digest)).unwrap();
            assert_eq!(request.spiffe_id(), Some(&id(CLIENT)), "{key:?}");
            let leaf = ours.sign(&request, &id(CLIENT), HOUR).unwrap();
            fs::write(dir.0.join("leaf"), &leaf).unwrap();
            let verify = ["verify", "-x509_strict", "-CAfile", "roots", "leaf"];
            assert!(openssl(&verify, &dir.0).status.success(), "{key:?}");
            let text = openssl(&["x509", "-noout", "-text", "-in", "leaf"], &dir.0).stdout;
            let text = String::from_utf8(text).unwrap();
            assert!(text.contains("CA:FALSE") && !text.contains("evil"), "{key:?}: {text}");
            let of_leaf = openssl(&["x509", "-noout", "-pubkey", "-in", "leaf"], &dir.0).stdout;
            let of_key = openssl(&["pkey", "-pubout", "-in", "key"], &dir.0).stdout;
            assert_eq!(of_leaf, of_key, "{key:?}");
        }
    }

    #[test]
    fn rejects_weak_key_foreign_key_and_malformed_request() {
        let dir = TempDir::new("request-bad");
        let weak = CertificateRequest::from_pem(&csr(&dir, &["rsa:1024"], "-sha256"));
        assert!(matches!(weak, Err(RequestProblem::Signature(_))), "{weak:?}");
        let weak = CertificateRequest::from_pem(&csr(&dir, &["rsa:1024"], "-sha1"));
        assert_eq!(weak.unwrap_err(), RequestProblem::Key);
        let p256 = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
        let secp256k1 = ["ec", "-pkeyopt", "ec_paramgen_curve:secp256k1"];
        CertificateRequest::from_pem(&csr(&dir, &secp256k1, "-sha256")).unwrap_err();
        // Flip one bit of the signature, which is at the end of the last full line.
        let good = csr(&dir, &p256, "-sha256");
        let der = CertificateSigningRequestDer::from_pem_slice(good.as_bytes()).unwrap();
        let mut bytes = der.to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(dir.0.join("der"), &bytes).unwrap();
        let forged = openssl(&["req", "-inform", "DER", "-in", "der"], &dir.0).stdout;
        let forged = CertificateRequest::from_pem(&String::from_utf8(forged).unwrap());
        assert!(matches!(forged, Err(RequestProblem::Signature(_))), "{forged:?}");
        let certificate = authority("td").roots_pem().to_owned();
        for garbage in ["", "garbage", &certificate, good.get(..good.len() / 2).unwrap()] {
            let read = CertificateRequest::from_pem(garbage);
            assert!(matches!(read, Err(RequestProblem::Malformed(_))), "{garbage}: {read:?}");
        }
    }
}

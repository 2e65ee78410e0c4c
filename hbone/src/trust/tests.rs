//! Tests of verification by roots, aliases and revocation lists, and of changes of files.

use std::fs;
use std::sync::Arc;

use rustls::CertificateError;
use rustls_pki_types::CertificateDer;
use tokio::time::timeout;
use underpass_config::{Hint as _, SpiffeId};

use super::*;
use crate::clock;
use crate::error::{CredentialProblem, ExpectedPeer, Fault, SvidProblem};
use crate::identity::Identity;
use crate::testing::pki::{Ca, Files};
use crate::testing::{CLIENT, HOUR, SECOND, SERVER, id};

const FOREIGN: &str = "spiffe://other/any/path/at/all";

fn authorities(identity: &Identity, files: &Files) -> Authorities {
    Authorities::new(identity, files.trust())
}

fn as_client(
    verifier: &Authorities,
    chain: &[CertificateDer<'_>],
) -> Result<SpiffeId, rustls::Error> {
    let now = clock::unix(clock::now());
    verifier.verify_peer(&chain[0], &chain[1..], &verifier.any_member(), now)
}

fn as_server(
    verifier: &Authorities,
    chain: &[CertificateDer<'_>],
    expected: &str,
) -> Result<SpiffeId, rustls::Error> {
    let expected = ExpectedPeer::OneOf([id(expected)].into());
    verifier.verify_peer(&chain[0], &chain[1..], &expected, clock::unix(clock::now()))
}

/// Unwraps our error from the error of rustls.
fn hbone_error(result: Result<SpiffeId, rustls::Error>) -> HboneError {
    match result.unwrap_err() {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => {
            other.0.downcast_ref::<HboneError>().unwrap().clone()
        }
        other => panic!("{other:?}"),
    }
}

fn rustls_error(result: Result<SpiffeId, rustls::Error>) -> CertificateError {
    match result.unwrap_err() {
        rustls::Error::InvalidCertificate(error) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn roots_of_one_domain_do_not_verify_another() {
    let (ours_ca, other) = (Ca::root("ours"), Ca::root("other"));
    let files = Files::new().bundle("other", &other);
    let verifier = authorities(&ours_ca.identity(SERVER, 1), &files);
    assert_eq!(as_client(&verifier, &ours_ca.chain(&[CLIENT], 2)), Ok(id(CLIENT)));
    assert_eq!(as_client(&verifier, &other.chain(&[FOREIGN], 2)), Ok(id(FOREIGN)));
    assert_eq!(as_server(&verifier, &other.chain(&[FOREIGN], 2), FOREIGN), Ok(id(FOREIGN)));
    for (ca, name) in [(&other, CLIENT), (&ours_ca, FOREIGN)] {
        let chain = ca.chain(&[name], 3);
        assert_eq!(rustls_error(as_client(&verifier, &chain)), CertificateError::UnknownIssuer);
        assert_eq!(
            rustls_error(as_server(&verifier, &chain, name)),
            CertificateError::UnknownIssuer
        );
    }
}

#[test]
fn alias_is_verified_by_own_roots() {
    let (ca, other) = (Ca::root("ours"), Ca::root("other"));
    let files = Files::new().alias("old-td").bundle("other", &other);
    let verifier = authorities(&ca.identity(CLIENT, 1), &files);
    let old = "spiffe://old-td/ns/default/sa/server";
    let chain = ca.chain(&[old], 2);
    assert_eq!(as_client(&verifier, &chain), Ok(id(old)), "the presented identity is returned");
    assert_eq!(as_server(&verifier, &chain, SERVER), Ok(id(old)));
    assert_eq!(as_server(&verifier, &ca.chain(&[SERVER], 2), old), Ok(id(SERVER)));
    for wrong in [CLIENT, "spiffe://other/ns/default/sa/server"] {
        let error = hbone_error(as_server(&verifier, &chain, wrong));
        assert!(matches!(error, HboneError::UnexpectedPeer { .. }), "{error:?}");
    }
    let aliases = |peer: &str| {
        verifier.aliases(&id(peer)).iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(
        (aliases(old), aliases(SERVER)),
        (aliases(CLIENT), vec!["td".into(), "old-td".into()])
    );
    assert!(aliases(FOREIGN).is_empty());
    let forged = other.chain(&[old], 2);
    assert_eq!(
        rustls_error(as_server(&verifier, &forged, SERVER)),
        CertificateError::UnknownIssuer
    );
    assert_eq!(rustls_error(as_client(&verifier, &forged)), CertificateError::UnknownIssuer);
}

#[test]
fn rejects_domain_without_roots_and_names_settings() {
    let (ca, other) = (Ca::root("ours"), Ca::root("other"));
    let verifier = authorities(&ca.identity(CLIENT, 1), &Files::new());
    let chain = other.chain(&[FOREIGN], 2);
    for result in [as_client(&verifier, &chain), as_server(&verifier, &chain, FOREIGN)] {
        let error = hbone_error(result);
        assert!(matches!(error, HboneError::UntrustedDomain { .. }), "{error:?}");
        let hint = error.hint().unwrap_or_default();
        let named = ["trust.bundles", "trust.aliases"];
        assert!(named.iter().all(|name| hint.contains(name)), "{hint}");
        assert!(error.to_string().contains("trust domain other"), "{error}");
    }
    let nameless = ca.chain(&["https://example.com"], 2);
    let error = hbone_error(as_client(&verifier, &nameless));
    let HboneError::NotSvid { problem: SvidProblem::Name { name, .. } } = error else {
        panic!("{error:?}")
    };
    assert_eq!(name.as_str(), "https://example.com");
}

#[test]
fn settings_bundles_override_bundles_of_identity() {
    let (ca, spire, settings) = (Ca::root("ours"), Ca::root("spire"), Ca::root("settings"));
    let bundles = [("td", &ca), ("other", &spire), ("third", &spire)]
        .map(|(domain, ca)| (domain.parse().unwrap(), ca.bundle()));
    let own = ca.identity_with(SERVER, 1, clock::now() + HOUR, bundles.into());
    let third = "spiffe://third/workload";
    let verifier = authorities(&own, &Files::new());
    assert_eq!(as_client(&verifier, &spire.chain(&[FOREIGN], 2)), Ok(id(FOREIGN)));
    let files = Files::new().bundle("other", &settings).bundle("td", &settings);
    let verifier = authorities(&own, &files);
    assert_eq!(as_client(&verifier, &settings.chain(&[FOREIGN], 2)), Ok(id(FOREIGN)));
    as_client(&verifier, &spire.chain(&[FOREIGN], 2)).unwrap_err();
    assert_eq!(as_client(&verifier, &spire.chain(&[third], 2)), Ok(id(third)));
    // The roots of our own trust domain come only with the identity.
    assert_eq!(as_client(&verifier, &ca.chain(&[CLIENT], 2)), Ok(id(CLIENT)));
    as_client(&verifier, &settings.chain(&[CLIENT], 2)).unwrap_err();
}

#[test]
fn rejects_revoked_certificate_in_either_role() {
    let ca = Ca::root("ours");
    for name in ["list.pem", "list.der"] {
        let files = Files::new().crl(name, &ca.revoke(&[7, 8]));
        let verifier = authorities(&ca.identity(SERVER, 1), &files);
        as_client(&verifier, &ca.chain(&[CLIENT], 2)).unwrap();
        let revoked = ca.chain(&[CLIENT], 7);
        assert_eq!(rustls_error(as_client(&verifier, &revoked)), CertificateError::Revoked);
        assert_eq!(rustls_error(as_server(&verifier, &revoked, CLIENT)), CertificateError::Revoked);
    }
}

#[test]
fn rejects_chain_with_certificate_that_is_revoked_or_has_no_list() {
    let root = Ca::root("root");
    let middle = root.intermediate("middle", 50);
    let chain = middle.chain(&[CLIENT], 2);
    let judged = |files: Files| as_client(&authorities(&root.identity(SERVER, 1), &files), &chain);
    let both = |serials: &[u64]| {
        Files::new().crl("root", &root.revoke(serials)).crl("middle", &middle.revoke(&[]))
    };
    judged(both(&[])).unwrap();
    assert_eq!(rustls_error(judged(both(&[50]))), CertificateError::Revoked);
    let missing = [
        ("O=root", Files::new().crl("middle", &middle.revoke(&[]))),
        ("O=middle", Files::new().crl("root", &root.revoke(&[]))),
    ];
    for (name, files) in missing {
        let error = hbone_error(judged(files));
        let HboneError::RevocationUnknown { issuer } = &error else { panic!("{error:?}") };
        assert_eq!(issuer.as_str(), name);
        assert!(error.hint().is_some_and(|hint| hint.contains("trust.crls")));
        assert_eq!(error.fault(), Fault::Configuration);
    }
}

#[test]
fn expired_or_wrongly_signed_list_rejects_all() {
    let (ca, impostor) = (Ca::root("ours"), Ca::root("ours"));
    let now = clock::now();
    let judged = |list| {
        let files = Files::new().crl("list.pem", &list);
        let verifier = authorities(&ca.identity(SERVER, 1), &files);
        (hbone_error(as_client(&verifier, &ca.chain(&[CLIENT], 2))), files)
    };
    let (error, files) = judged(ca.revoke_between(&[], now - 2 * HOUR, now - HOUR));
    let HboneError::RevocationListExpired { file, .. } = &error else { panic!("{error:?}") };
    assert_eq!(file, &files.settings.crls[0]);
    let (error, _files) = judged(impostor.revoke(&[]));
    assert!(matches!(error, HboneError::RevocationListUntrusted { .. }), "{error:?}");
}

#[test]
fn newer_list_replaces_older_one_of_the_same_issuer_key() {
    let (ca, former) = (Ca::root("ours"), Ca::root("ours"));
    let now = clock::now();
    let old = ca.revoke_between(&[], now - 2 * HOUR, now + HOUR);
    let (new, other) = (ca.revoke(&[7]), former.revoke(&[]));
    for order in [[&old, &new, &other], [&other, &new, &old]] {
        let mut files = Files::new();
        for (index, list) in order.iter().enumerate() {
            files = files.crl(&index.to_string(), list);
        }
        let verifier = authorities(&ca.identity(SERVER, 1), &files);
        as_client(&verifier, &ca.chain(&[CLIENT], 2)).unwrap();
        let revoked = as_client(&verifier, &ca.chain(&[CLIENT], 7));
        assert_eq!(rustls_error(revoked), CertificateError::Revoked);
    }
}

fn problem(settings: &TrustSettings) -> (std::path::PathBuf, CredentialProblem) {
    match TrustFiles::open(settings, &FileWatcher::default()).unwrap_err() {
        HboneError::Credential { file, what } => (file, what),
        other => panic!("{other:?}"),
    }
}

#[test]
fn start_error_names_missing_or_malformed_file() {
    let ca = Ca::root("ours");
    let list = ca.revoke(&[]);
    let files = Files::new().bundle("other", &ca).crl("list", &list);
    let (bundle, crl) = (files.settings.bundles[0].file.clone(), files.settings.crls[0].clone());
    TrustFiles::open(&files.settings, &FileWatcher::default()).unwrap();
    use CredentialProblem as P;
    let broken = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
    let half = [list.pem().unwrap().as_str(), broken].concat();
    let is = |content: &[u8], expected: fn(&P) -> bool| {
        files.write("list", content);
        let (file, what) = problem(&files.settings);
        assert!(file == crl && expected(&what), "{what:?}");
    };
    is(b"", |what| matches!(what, P::Empty("X509 CRL")));
    is(half.as_bytes(), |what| matches!(what, P::RevocationList(_)));
    is(&list.der()[..100], |what| matches!(what, P::RevocationList(_)));
    is(&[list.der().as_ref(), b"more"].concat(), |what| matches!(what, P::RevocationList(_)));
    fs::remove_file(&crl).unwrap();
    assert!(matches!(problem(&files.settings), (file, P::Io(_)) if file == crl));
    files.write("other", b"nothing");
    assert!(matches!(problem(&files.settings), (file, P::Empty("certificate")) if file == bundle));
}

#[tokio::test(start_paused = true)]
async fn changed_file_is_read_again_and_malformed_file_reported_once() {
    let ca = Ca::root("ours");
    let files = Files::new().crl("list", &ca.revoke(&[]));
    let (mut watched, first) = TrustFiles::open(&files.settings, &FileWatcher::default()).unwrap();
    files.write("list", b"garbage");
    watched.next().await.unwrap_err();
    let silence = timeout(HOUR, watched.next()).await;
    assert!(silence.is_err(), "reported once");
    files.write("list", ca.revoke(&[7]).pem().unwrap().as_bytes());
    let second = watched.next().await.unwrap();
    assert_ne!(first, second);
    let verifier = Authorities::new(&ca.identity(SERVER, 1), second);
    assert_eq!(
        rustls_error(as_client(&verifier, &ca.chain(&[CLIENT], 7))),
        CertificateError::Revoked
    );
}

#[tokio::test(start_paused = true)]
async fn trust_without_files_never_changes() {
    let (mut files, trust) =
        TrustFiles::open(&TrustSettings::default(), &FileWatcher::default()).unwrap();
    timeout(100 * SECOND, files.next()).await.unwrap_err();
    assert_eq!(Arc::strong_count(&trust.0), 1);
}

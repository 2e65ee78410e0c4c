//! Tests with valid and with invalid X.509-SVIDs. The server, the client, and the loading of
//! files must agree on each.

use std::collections::BTreeMap;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose as Usage, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use underpass_config::SpiffeError;

use super::*;
use crate::clock;
use crate::error::{CredentialProblem, ExpectedPeer, HboneError};
use crate::identity::Identity;
use crate::testing::pki::{Ca, Files};
use crate::testing::{CLIENT, SERVER, id};
use crate::trust::Authorities;

type Change = fn(&mut CertificateParams);

/// The results of the three functions that read a leaf: server, client, and loading.
fn check_leaf(ca: &Ca, names: &[&str], change: Change) -> [Result<(), SvidProblem>; 3] {
    let (chain, key) = ca.leaf_with(names, change);
    let authorities = Authorities::new(&ca.identity(SERVER, 1), Files::new().trust());
    let now = clock::unix(clock::now());
    let as_peer = |expected: &ExpectedPeer| match authorities
        .verify_peer(&chain[0], &chain[1..], expected, now)
        .map_err(crate::tls::rejection)
    {
        Ok(_) => Ok(()),
        Err(HboneError::NotSvid { problem }) => Err(problem),
        Err(other) => panic!("{other:?}"),
    };
    let server = as_peer(&authorities.any_member());
    let client = as_peer(&ExpectedPeer::OneOf([id(CLIENT)].into()));
    [server, client, load_identity(ca, &chain, key)]
}

fn load_identity(
    ca: &Ca,
    chain: &[CertificateDer<'static>],
    key: PrivateKeyDer<'static>,
) -> Result<(), SvidProblem> {
    let bundles = BTreeMap::from([("td".parse().unwrap(), ca.bundle())]);
    match Identity::new(Path::new("own"), chain.to_vec(), key, bundles) {
        Ok(_) => Ok(()),
        Err(HboneError::Credential { what: CredentialProblem::Svid(problem), .. }) => Err(problem),
        Err(other) => panic!("{other:?}"),
    }
}

fn usages(params: &mut CertificateParams, usages: &[Usage]) {
    params.key_usages = usages.to_vec();
}

#[test]
fn accepts_leaves_of_other_issuers() {
    let ca = Ca::root("ours");
    let issuers: [(&str, Change); 4] = [
        ("istiod", |leaf| usages(leaf, &[Usage::DigitalSignature, Usage::KeyEncipherment])),
        ("SPIRE", |leaf| {
            usages(leaf, &[Usage::DigitalSignature, Usage::KeyEncipherment, Usage::KeyAgreement]);
            leaf.is_ca = IsCa::ExplicitNoCa;
            leaf.subject_alt_names.push(SanType::DnsName("web.test".try_into().unwrap()));
        }),
        ("cert-manager", |leaf| {
            usages(leaf, &[Usage::DigitalSignature, Usage::KeyEncipherment]);
            leaf.is_ca = IsCa::NoCa;
        }),
        ("without keyUsage", |_| {}),
    ];
    for (issuer, change) in issuers {
        assert_eq!(check_leaf(&ca, &[CLIENT], change), [Ok(()), Ok(()), Ok(())], "{issuer}");
    }
}

#[test]
fn rejects_leaf_with_signing_usage() {
    let ca = Ca::root("ours");
    let cases: [(Change, SvidProblem); 4] = [
        (
            |leaf| usages(leaf, &[Usage::DigitalSignature, Usage::KeyCertSign]),
            SvidProblem::SigningUsage("keyCertSign"),
        ),
        (
            |leaf| usages(leaf, &[Usage::DigitalSignature, Usage::CrlSign]),
            SvidProblem::SigningUsage("cRLSign"),
        ),
        (|leaf| usages(leaf, &[Usage::KeyEncipherment]), SvidProblem::NoDigitalSignature),
        (
            |leaf| {
                usages(leaf, &[Usage::DigitalSignature]);
                leaf.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            },
            SvidProblem::Authority,
        ),
    ];
    for (change, problem) in cases {
        let expected = || Err(problem.clone());
        assert_eq!(check_leaf(&ca, &[CLIENT], change), [expected(), expected(), expected()]);
    }
}

#[test]
fn rejects_leaf_without_exactly_one_workload_id() {
    let ca = Ca::root("ours");
    let other = "spiffe://td/ns/default/sa/other";
    let td = "td".parse().unwrap();
    let long = format!("spiffe://{}", "A".repeat(60_000));
    for (names, problem) in [
        (&[][..], SvidProblem::UriNames(0)),
        (&[CLIENT, other], SvidProblem::UriNames(2)),
        (&[CLIENT, CLIENT], SvidProblem::UriNames(2)),
        (&[CLIENT, "https://example.com"], SvidProblem::UriNames(2)),
        (&["spiffe://td"], SvidProblem::TrustDomainOnly(td)),
        (
            &[long.as_str()],
            SvidProblem::Name { name: Quoted::new(&long), problem: SpiffeError::TooLong },
        ),
    ] {
        let expected = || Err(problem.clone());
        let found = check_leaf(&ca, names, |_| {});
        assert_eq!(found, [expected(), expected(), expected()], "{problem}");
        assert!(problem.to_string().len() < 400);
    }
}

/// A name that does not parse must not be skipped, even if another name parses.
#[test]
fn rejects_leaf_with_malformed_name() {
    let ca = Ca::root("ours");
    let names = |leaf: &mut CertificateParams| {
        leaf.subject_alt_names.clear();
        let names = [&[0x86, 14][..], b"spiffe://td/ns", &[0x86, 1, 0xff]].concat();
        let content = [&[0x30, u8::try_from(names.len()).unwrap()][..], &names].concat();
        leaf.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 17], content));
    };
    let malformed = || Err(SvidProblem::Malformed("subjectAltName"));
    assert_eq!(check_leaf(&ca, &[], names), [malformed(), malformed(), malformed()]);
}

/// The peer chooses the length of these fields, and is not authenticated yet.
#[test]
fn bounds_length_of_errors_about_unverified_certificates() {
    let (ours, stranger) = (Ca::root("ours"), Ca::root("stranger"));
    let authorities = Authorities::new(&ours.identity(SERVER, 1), Files::new().trust());
    let long = format!("spiffe://td/{}", "a".repeat(2000));
    let cases: [(&str, Change); 3] = [
        (&long, |_| {}),
        (CLIENT, |leaf| {
            leaf.extended_key_usages =
                (1..5000).map(|n| ExtendedKeyUsagePurpose::Other(vec![1, 3, 6, n])).collect();
        }),
        (CLIENT, |leaf| {
            leaf.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::Other([vec![1, 3], (1..9000).collect()].concat())];
        }),
    ];
    for (name, change) in cases {
        let (chain, _) = stranger.leaf_with(&[name], change);
        let judged = authorities.verify_peer(
            &chain[0],
            &[],
            &authorities.any_member(),
            clock::unix(clock::now()),
        );
        let error = crate::tls::rejection(judged.unwrap_err());
        let source = std::error::Error::source(&error).map(ToString::to_string);
        let text = format!("{error}{}", source.unwrap_or_default());
        assert!(text.len() < 1000, "{} bytes", text.len());
        assert!(!text.contains("aaaa"), "{text}");
    }
}

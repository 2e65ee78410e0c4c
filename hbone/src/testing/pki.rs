//! A certificate authority for tests: arbitrary serial numbers, names and validity, and revocation
//! lists.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationList,
    CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod,
    KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use time::OffsetDateTime;
use underpass_config::{BundleFile, TrustDomain, TrustSettings};

use super::{HOUR, id};
use crate::ca::tests::TempDir;
use crate::clock;
use crate::identity::Identity;
use crate::trust::Trust;
use crate::trust::bundle::Bundle;

/// A root or intermediate certificate authority.
pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    /// The intermediate certificates. An intermediate CA's own certificate is included, a root's is
    /// not.
    chain: Vec<CertificateDer<'static>>,
    root: CertificateDer<'static>,
    root_pem: String,
}

/// Writes the files of [`TrustSettings`].
pub(crate) struct Files {
    dir: TempDir,
    pub(crate) settings: TrustSettings,
}

impl Files {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("trust-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        Self { dir: TempDir::new(&name), settings: TrustSettings::default() }
    }

    pub(crate) fn alias(mut self, trust_domain: &str) -> Self {
        self.settings.aliases.push(trust_domain.parse().unwrap());
        self
    }

    pub(crate) fn bundle(mut self, trust_domain: &str, ca: &Ca) -> Self {
        let file = self.write(trust_domain, ca.root_pem.as_bytes());
        let trust_domain = trust_domain.parse().unwrap();
        self.settings.bundles.push(BundleFile { trust_domain, file });
        self
    }

    /// Adds a revocation list: in DER if the extension of `name` is `der`, otherwise in PEM.
    pub(crate) fn crl(mut self, name: &str, list: &CertificateRevocationList) -> Self {
        let file = match name.ends_with(".der") {
            true => self.write(name, list.der()),
            false => self.write(name, list.pem().unwrap().as_bytes()),
        };
        self.settings.crls.push(file);
        self
    }

    pub(crate) fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let file = self.dir.0.join(name);
        fs::write(&file, content).unwrap();
        file
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust::read(&self.settings).unwrap()
    }
}

impl Ca {
    pub(crate) fn root(name: &str) -> Self {
        let (params, key) = (ca(name), KeyPair::generate().unwrap());
        let root = params.self_signed(&key).unwrap();
        Self {
            issuer: Issuer::new(params, key),
            chain: Vec::new(),
            root: root.der().clone(),
            root_pem: root.pem(),
        }
    }

    pub(crate) fn intermediate(&self, name: &str, serial: u64) -> Self {
        let (mut params, key) = (ca(name), KeyPair::generate().unwrap());
        params.serial_number = Some(serial.into());
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        let chain = [vec![certificate], self.chain.clone()].concat();
        let (root, root_pem) = (self.root.clone(), self.root_pem.clone());
        Self { issuer: Issuer::new(params, key), chain, root, root_pem }
    }

    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.root.clone()
    }

    pub(crate) fn bundle(&self) -> Bundle {
        Bundle::from_der(Path::new("roots"), [self.root.clone()]).unwrap()
    }

    /// A leaf certificate with these URI names, followed by the intermediates.
    pub(crate) fn chain(&self, names: &[&str], serial: u64) -> Vec<CertificateDer<'static>> {
        self.leaf(names, serial, clock::now() + HOUR).0
    }

    /// An identity with this URI name, which trusts this CA's root for its own trust domain.
    pub(crate) fn identity(&self, who: &str, serial: u64) -> Identity {
        self.identity_until(who, serial, clock::now() + HOUR)
    }

    pub(crate) fn identity_until(&self, who: &str, serial: u64, end: SystemTime) -> Identity {
        let bundles = BTreeMap::from([(id(who).trust_domain().clone(), self.bundle())]);
        self.identity_with(who, serial, end, bundles)
    }

    pub(crate) fn identity_with(
        &self,
        who: &str,
        serial: u64,
        end: SystemTime,
        bundles: BTreeMap<TrustDomain, Bundle>,
    ) -> Identity {
        let (chain, key) = self.leaf(&[who], serial, end);
        Identity::new(Path::new(who), chain, key, bundles).unwrap()
    }

    /// A revocation list that is valid from an hour ago until in an hour.
    pub(crate) fn revoke(&self, serials: &[u64]) -> CertificateRevocationList {
        let now = clock::now();
        self.revoke_between(serials, now - HOUR, now + HOUR)
    }

    pub(crate) fn revoke_between(
        &self,
        serials: &[u64],
        this_update: SystemTime,
        next_update: SystemTime,
    ) -> CertificateRevocationList {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: offset(this_update),
            reason_code: None,
            invalidity_date: None,
        };
        CertificateRevocationListParams {
            this_update: offset(this_update),
            next_update: offset(next_update),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)
        .unwrap()
    }

    /// A leaf certificate with these URI names, changed by `change`.
    pub(crate) fn leaf_with(
        &self,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        self.changed_leaf(names, 99, clock::now() + HOUR, change)
    }

    fn leaf(
        &self,
        names: &[&str],
        serial: u64,
        end: SystemTime,
    ) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        self.changed_leaf(names, serial, end, |_| {})
    }

    fn changed_leaf(
        &self,
        names: &[&str],
        serial: u64,
        end: SystemTime,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names =
            names.iter().map(|name| SanType::URI((*name).try_into().unwrap())).collect();
        params.serial_number = Some(serial.into());
        params.not_before = offset(clock::now() - Duration::from_secs(60));
        params.not_after = offset(end);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        change(&mut params);
        let leaf = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        ([vec![leaf], self.chain.clone()].concat(), key)
    }
}

fn ca(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn offset(time: SystemTime) -> OffsetDateTime {
    // Certificates contain times in whole seconds.
    OffsetDateTime::from(time).replace_nanosecond(0).unwrap()
}

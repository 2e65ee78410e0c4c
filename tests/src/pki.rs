//! Creates certificate files: valid ones, and ones with a single defect.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use underpass_config::{IdentityFiles, SpiffeId, TrustDomain};
use underpass_hbone::{CertificateAuthority, Credentials, Identity, IssuedCertificate, Trust};

use crate::or_fail::OrFail;

const HOUR: Duration = Duration::from_secs(3600);

/// A certificate authority and the folder for its certificates.
#[derive(Debug)]
pub struct Pki {
    ca: CertificateAuthority,
    /// The folder of the authority.
    dir: PathBuf,
    folder: PathBuf,
    roots: PathBuf,
}

impl Pki {
    /// A new authority for `cluster.local`.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self::of(folder, "cluster.local", "roots")
    }

    /// A new authority for `trust_domain`; its roots are in `NAME.pem`.
    #[must_use]
    pub fn of(folder: &Path, trust_domain: &str, name: &str) -> Self {
        let domain: TrustDomain = trust_domain.parse().or_fail("name a trust domain");
        let dir = folder.join(format!("{name}-ca"));
        let ca = CertificateAuthority::init(&dir, domain).or_fail("make a certificate authority");
        let roots = folder.join(format!("{name}.pem"));
        fs::write(&roots, ca.roots_pem()).or_fail("write the roots");
        Self { ca, dir, folder: folder.to_owned(), roots }
    }

    /// The folder of the authority, for `underpass ca`.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Adds certificates to the authority's revocation list.
    pub fn revoke(&self, revoked: &[&IdentityFiles]) -> PathBuf {
        let certificates: Vec<_> = revoked.iter().map(|files| &files.certificate).collect();
        self.ca.revoke(&self.dir, &certificates, &[]).or_fail("revoke a certificate");
        self.dir.join("crl.pem")
    }

    /// Adds the roots of `other` to the roots.
    pub fn trust(&self, other: &Self) {
        let both = format!("{}{}", self.ca.roots_pem(), other.ca.roots_pem());
        fs::write(&self.roots, both).or_fail("write the roots");
    }

    /// The file of root certificates.
    #[must_use]
    pub fn roots(&self) -> &Path {
        &self.roots
    }

    /// The identity of a service account in the namespace `default`.
    #[must_use]
    pub fn id(&self, account: &str) -> SpiffeId {
        SpiffeId::istio(self.ca.trust_domain().clone(), "default", account)
            .or_fail("name a workload")
    }

    /// A valid certificate for `account`: `ACCOUNT.pem` and `ACCOUNT.key`.
    #[must_use]
    pub fn issue(&self, account: &str) -> IdentityFiles {
        let issued = self.ca.issue(&self.id(account), HOUR).or_fail("issue a certificate");
        self.write(account, &issued)
    }

    /// A certificate for a server with this name.
    #[must_use]
    pub fn issue_server(&self, name: &str) -> IdentityFiles {
        let issued = self.ca.issue_server(&[name.to_owned()], HOUR);
        self.write(name, &issued.or_fail("issue a certificate"))
    }

    /// Issues a certificate that expired an hour ago.
    #[must_use]
    pub fn issue_expired(&self, account: &str) -> IdentityFiles {
        let ago = |hours: u32| {
            SystemTime::now().checked_sub(HOUR * hours).expect("it is later than 1970")
        };
        let issued = self.ca.issue_between(&self.id(account), ago(2), ago(1));
        self.write(&format!("{account}-expired"), &issued.or_fail("issue a certificate"))
    }

    /// Issues a certificate that is valid from in an hour on. It replaces the files of
    /// [`Pki::issue`].
    #[must_use]
    pub fn issue_future(&self, account: &str) -> IdentityFiles {
        let now = SystemTime::now();
        let issued = self.ca.issue_between(&self.id(account), now + HOUR, now + HOUR * 2);
        self.write(account, &issued.or_fail("issue a certificate"))
    }

    /// Issues a certificate that expires after `left`, which is the last 20 % of its lifetime. It
    /// replaces the files of [`Pki::issue`].
    #[must_use]
    pub fn issue_expiring(&self, account: &str, left: Duration) -> IdentityFiles {
        let now = SystemTime::now();
        let began = now.checked_sub(left * 4).expect("it is later than 1970");
        let issued = self.ca.issue_between(&self.id(account), began, now + left);
        self.write(account, &issued.or_fail("issue a certificate"))
    }

    /// Loads certificate files as a proxy does.
    #[must_use]
    pub fn credentials(&self, files: &IdentityFiles) -> Credentials {
        let identity = Identity::from_files(files).or_fail("read a certificate");
        Credentials::new(identity, Trust::default()).or_fail("use a certificate")
    }

    fn write(&self, name: &str, issued: &IssuedCertificate) -> IdentityFiles {
        let prefix = self.folder.join(name);
        issued.write(&prefix).or_fail("write a certificate");
        let file = |kind: &str| self.folder.join(format!("{name}.{kind}"));
        IdentityFiles { certificate: file("pem"), key: file("key"), roots: self.roots.clone() }
    }
}

//! Who we are, whom we trust, and how tunnels are kept: the settings of HBONE.
//!
//! Not here: certificates themselves (the hbone crate), and what each key defaults to (`resolve/identity.rs`).

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::identity::spiffe::TrustDomain;

/// Where our certificate comes from, and with it the roots of our own trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentitySettings {
    /// Files that someone else renews.
    Files(IdentityFiles),
    /// A certificate authority's directory: we issue our own certificate.
    LocalCa(LocalCaSettings),
    /// Istio's CA protocol: istiod, or `underpass ca serve`.
    IstioCa(IstioCaSettings),
    /// A SPIRE agent's Workload API.
    Spire(SpireSettings),
}

/// A certificate, its key and the trusted roots, as PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The leaf certificate, then the chain below the root.
    pub certificate: PathBuf,
    /// The private key of the leaf.
    pub key: PathBuf,
    /// The roots that peers must chain to.
    pub roots: PathBuf,
}

/// A certificate authority in a directory, as `underpass ca init` makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalCaSettings {
    /// Where it is.
    pub dir: PathBuf,
    /// How long a certificate is valid.
    pub ttl: Duration,
}

/// How Istio's certificate service is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IstioCaSettings {
    /// `https://HOST:PORT`.
    pub address: String,
    /// The name in the server's certificate, if not the host of `address`.
    pub server_name: Option<String>,
    /// PEM: the roots that the server's certificate chains to. Read again at every connection.
    pub roots: PathBuf,
    /// The file with the token that says who asks. Read again for every request.
    pub token: PathBuf,
    /// The cluster that we are in, as the CA knows it.
    pub cluster_id: String,
    /// Whether the token is a node's, which asks in the name of its workloads.
    pub impersonate: bool,
    /// How long a certificate shall be valid; the CA may decide otherwise.
    pub ttl: Duration,
}

/// Where a SPIRE agent answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpireSettings {
    /// The path of its Unix socket.
    pub socket: PathBuf,
}

/// Whom we trust beyond what comes with our certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustSettings {
    /// Other names of our own trust domain: its roots vouch for these too.
    pub aliases: Vec<TrustDomain>,
    /// The roots of other trust domains (federation).
    pub bundles: Vec<BundleFile>,
    /// Certificate revocation lists. If there is one, a certificate whose issuer has none is refused.
    pub crls: Vec<PathBuf>,
    /// What tunnels may be encrypted with, the first first; never empty.
    pub ciphers: Vec<Cipher>,
}

impl Default for TrustSettings {
    fn default() -> Self {
        let ciphers = Cipher::ALL.to_vec();
        Self { aliases: Vec::new(), bundles: Vec::new(), crls: Vec::new(), ciphers }
    }
}

/// A cipher of TLS 1.3 (RFC 8446 appendix B.4), by its AEAD algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cipher {
    /// `TLS_AES_128_GCM_SHA256`, the one that every implementation has.
    Aes128Gcm,
    /// `TLS_AES_256_GCM_SHA384`.
    Aes256Gcm,
}

impl Cipher {
    /// Those that there are, the fastest first.
    pub const ALL: [Self; 2] = [Self::Aes128Gcm, Self::Aes256Gcm];
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Aes128Gcm => "aes-128-gcm",
            Self::Aes256Gcm => "aes-256-gcm",
        })
    }
}

/// The roots of a foreign trust domain, as PEM.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BundleFile {
    /// Whose roots they are.
    pub trust_domain: TrustDomain,
    /// Where they are.
    pub file: PathBuf,
}

impl fmt::Display for BundleFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.trust_domain, self.file.display())
    }
}

/// How many tunnels there are to a peer, and how long they are used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelSettings {
    /// After this (and up to a tenth less, at random) a tunnel takes no new streams.
    pub max_age: Duration,
    /// How many streams share a tunnel.
    pub streams: usize,
    /// How many tunnels a worker has to one peer at most.
    pub per_peer: usize,
}

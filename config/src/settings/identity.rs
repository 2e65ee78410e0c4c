//! The settings of HBONE: the source of our identity, trust, and tunnels.
//!
//! The hbone crate handles certificates; `resolve/identity.rs` has the defaults.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::identity::spiffe::TrustDomain;

/// The source of our certificate and of the roots of our own trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentitySettings {
    /// Files that another program renews.
    Files(IdentityFiles),
    /// The folder of a certificate authority, with which the proxy issues its own certificate.
    LocalCa(LocalCaSettings),
    /// Istio's CA protocol: istiod, or `underpass ca serve`.
    IstioCa(IstioCaSettings),
    /// A SPIRE agent.
    Spire(SpireSettings),
}

/// A certificate, its key and the trusted roots, as PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The leaf certificate, then the chain below the root.
    pub certificate: PathBuf,
    /// The private key of the leaf certificate.
    pub key: PathBuf,
    /// The roots that verify peers.
    pub roots: PathBuf,
}

/// A certificate authority in a folder, created by `underpass ca init`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalCaSettings {
    /// The folder of the CA's certificate and key.
    pub dir: PathBuf,
    /// The lifetime of a certificate.
    pub ttl: Duration,
}

/// The client of Istio's certificate service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IstioCaSettings {
    /// `https://HOST:PORT`.
    pub address: String,
    /// The name in the server's certificate, if it differs from the host of `address`.
    pub server_name: Option<String>,
    /// PEM: the roots that verify the server's certificate. Read for every connection.
    pub roots: PathBuf,
    /// The file with the bearer token of requests. Read for every request.
    pub token: PathBuf,
    /// The name of our cluster at the CA.
    pub cluster_id: String,
    /// Whether the token belongs to a node, so that the proxy can request certificates for its
    /// pods.
    pub impersonate: bool,
    /// The requested lifetime of a certificate. The CA may choose another.
    pub ttl: Duration,
}

/// A SPIRE agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpireSettings {
    /// The API that issues the certificates.
    pub api: SpireApi,
    /// The path of the API's Unix socket.
    pub socket: PathBuf,
}

/// An API of a SPIRE agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpireApi {
    /// The Workload API, which has the identities of the calling process.
    Workload,
    /// The Delegated Identity API, which has the identities of the workloads of its node.
    DelegatedIdentity,
}

/// Trust in addition to the roots of our certificate's source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustSettings {
    /// Aliases of our own trust domain: its roots verify these too.
    pub aliases: Vec<TrustDomain>,
    /// The roots of other trust domains (federation).
    pub bundles: Vec<BundleFile>,
    /// Certificate revocation lists. If any are given, a certificate whose issuer has none is
    /// refused.
    pub crls: Vec<PathBuf>,
    /// The allowed ciphers in order of preference; never empty.
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
    /// `TLS_AES_128_GCM_SHA256`, which every implementation of TLS 1.3 supports.
    Aes128Gcm,
    /// `TLS_AES_256_GCM_SHA384`.
    Aes256Gcm,
}

impl Cipher {
    /// All ciphers, the fastest first.
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
    /// The trust domain of these roots.
    pub trust_domain: TrustDomain,
    /// The file with the roots.
    pub file: PathBuf,
}

impl fmt::Display for BundleFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.trust_domain, self.file.display())
    }
}

/// Number and lifetime of the tunnels to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelSettings {
    /// The age after which a tunnel accepts no new streams, shortened by up to a tenth at random.
    pub max_age: Duration,
    /// The maximum number of streams in a tunnel.
    pub streams: usize,
    /// The maximum number of tunnels of a worker to one peer.
    pub per_peer: usize,
}

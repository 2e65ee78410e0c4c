//! The typed settings: what the file, the environment and the flags said, with every default filled in.
//!
//! Not here: how they are declared and read (`declare.rs`, `resolve/`), and where they come from
//! (`load.rs`).

pub(crate) mod declare;
mod egress;
mod identity;
mod interception;
mod limits;
pub(crate) mod load;
mod logging;
mod mtls;
pub(crate) mod resolve;
pub(crate) mod show;

use std::net::SocketAddr;
use std::path::PathBuf;

pub use egress::{Egress, EgressSettings};
pub use identity::{
    BundleFile, Cipher, IdentityFiles, IdentitySettings, IstioCaSettings, LocalCaSettings,
    SpireSettings, TrustSettings, TunnelSettings,
};
pub use interception::{
    Backend, Dns, InboundCapture, InboundMode, InterceptionSettings, Ipv6, KubeletProbes, OnExit,
    OutboundCapture, PortRange, PortRangeError, Profile,
};
pub use limits::{Limits, SeriesSettings, TakeOver, Timeouts};
pub use logging::{LogFilter, LogFilterError, LogFormat, Logging};
pub use mtls::{Mtls, MtlsOverride, MtlsOverrideError, MtlsSettings};

use crate::identity::spiffe::{SpiffeId, TrustDomain};

/// A value that is one of a few words.
pub(crate) trait Word: Copy + PartialEq + 'static {
    /// Each word with its value.
    const WORDS: &'static [(&'static str, Self)];

    /// The word of this value.
    fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, value)| *value == self).map_or("", |(word, _)| word)
    }
}

/// All that an operator can tell underpass. `underpass config show` prints it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Who the proxied workload is.
    pub workload: WorkloadSettings,
    /// Where the mesh (who is where, who speaks HBONE) is described; `None`: nobody else is known.
    pub mesh_file: Option<PathBuf>,
    /// Where our certificate and the roots we trust come from; `None`: no HBONE, neither in nor out.
    pub identity: Option<IdentitySettings>,
    /// Whom we trust beyond that.
    pub trust: TrustSettings,
    /// What is caught, and how.
    pub interception: InterceptionSettings,
    /// The ports and the threads of the data path.
    pub proxy: ProxySettings,
    /// Where the workload may connect to outside the mesh.
    pub egress: EgressSettings,
    /// How many tunnels there are to a peer, and how long they are used.
    pub tunnels: TunnelSettings,
    /// What others can make us do at once.
    pub limits: Limits,
    /// How long a peer may let us wait.
    pub timeouts: Timeouts,
    /// Where another process may ask for our listeners.
    pub take_over: TakeOver,
    /// Where Prometheus reads `/metrics`.
    pub metrics: SocketAddr,
    /// How many metric series of connections there are.
    pub series: SeriesSettings,
    /// Where `/healthz/ready` answers.
    pub readiness: SocketAddr,
    /// What is logged, and how it looks.
    pub logging: Logging,
}

/// The workload that this proxy stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadSettings {
    /// Its name, as logs and metrics show it.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// The service account that its certificate is issued to.
    pub service_account: String,
    /// The trust domain of its identity.
    pub trust_domain: TrustDomain,
    /// The network in which its addresses mean something; may be empty.
    pub network: String,
    /// The identity that follows from namespace, service account and trust domain.
    pub spiffe_id: SpiffeId,
}

/// The ports and the threads of the data path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxySettings {
    /// Where caught outbound connections arrive.
    pub outbound_port: u16,
    /// Where caught plaintext inbound connections arrive.
    pub inbound_port: u16,
    /// Where peers connect with HBONE; also the port that peers are expected to listen on.
    pub hbone_port: u16,
    /// Where caught DNS queries arrive.
    pub dns_port: u16,
    /// How many data workers; `None`: as many as CPUs that the process may use.
    pub workers: Option<usize>,
    /// Whether connections that did not come through a tunnel are taken.
    pub mtls: MtlsSettings,
}

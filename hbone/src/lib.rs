//! HBONE: HTTP/2 CONNECT tunnels over mutual TLS between workloads with SPIFFE identities.
//!
//! ```text
//! client  Pool ─ Dial ─ Connector: TLS with expected peer ─ Tunnel: CONNECT ─ 200 ─ TunnelStream
//! server  Acceptor: TLS with a client of a known trust domain ─ ServerTunnel
//!         └─ Incoming: accept with 200, or refuse ─ TunnelStream
//! ```
//!
//! Both use the current [`Credentials`] for each handshake, and terminate a tunnel whose peer later
//! credentials no longer trust.
//!
//! Interoperates with istio/ztunnel. Every wait for a peer has a deadline from the caller, and all
//! resources that a peer can occupy are limited (see [`Http2Settings`]).
//!
//! Not here: sockets ([`Dial`] connects), authorization, and copying bytes.

mod ca;
mod clock;
mod control_plane;
mod crypto;
mod error;
mod https;
mod identity;
mod limits;
mod otlp;
mod pool;
mod task;
#[cfg(test)]
mod testing;
mod tls;
mod trust;
mod tunnel;

pub use ca::{
    CaServer, CaServerSettings, CertificateAuthority, CertificateRequest, IssuedCertificate, Serial,
};
pub use control_plane::{
    ControlPlaneClient, ControlPlaneError, ControlPlaneStream, control_plane_problems,
};
pub use error::{
    CredentialProblem, ExpectedPeer, Fault, HboneError, IssuerProblem, RequestProblem, SvidProblem,
};
pub use https::{HttpsError, HttpsRequest, HttpsResponse, HttpsServer, Pem, without_brackets};
pub use identity::Identity;
pub use identity::credentials::Credentials;
pub use identity::description::CertificateDescription;
pub use identity::identity_pem::IdentityPem;
pub use identity::inspection::Inspection;
pub use identity::rotation::{CredentialRotator, CredentialsEvent, FirstIdentity};
pub use identity::source::{
    DelegatedIdentitySource, FileSource, IdentitySource, IstioCa, IstioCaSource, LocalAuthority,
    LocalCaSource, NextIdentity, NextPem, PemSource, Priority, WorkloadApiSource,
    istio_ca_problems,
};
pub use limits::log_limit::LogLimit;
pub use limits::{
    Budget, ByKey, ConnectionSlot, ConnectionSlots, Exhausted, KeyedBudget, Queue, QueuePermit,
    RequestInProgress, Share, Sharing, SourceNetwork,
};
pub use otlp::{CollectorError, OtlpCollector, collector_problems};
pub use pool::{Dial, PeerTunnels, Pool, PoolEvent, PoolSettings, PoolStatistics, TunnelKey};
pub use task::{Panic, catch_panic, log_panic};
pub use tls::PeerIdentity;
pub use trust::bundle::Bundle;
pub use trust::mutual::{MutualTrust, MutualTrustError};
pub use trust::{Trust, TrustFiles};
pub use tunnel::authority::Authority;
pub use tunnel::client::{ConnectRequest, Connector, Tunnel};
pub use tunnel::headers::{Baggage, Forwarded, HeaderError, RequestHeaders, TraceParent};
pub use tunnel::inspect::TunnelLimit;
pub use tunnel::server::{Acceptor, Incoming, ServerTunnel};
pub use tunnel::settings::{ClientSettings, Http2Settings, KeepaliveSettings, ServerSettings};
pub use tunnel::stream::{TunnelIo, TunnelReader, TunnelStream, TunnelWriter};
pub use tunnel::text::socket_address_text;
pub use tunnel::tunnel_state::RevocationSignal;

/// Entry points for the fuzz targets in `fuzz/`.
#[cfg(feature = "fuzz")]
pub mod fuzz {
    /// Runs a script of a peer's TLS records against the record layer. Panics if the record layer
    /// differs from its model.
    pub fn record_layer(script: &[u8]) {
        crate::tls::run_script(script);
    }
}

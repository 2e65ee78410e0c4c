//! HBONE: HTTP/2 CONNECT tunnels over mutual TLS, between workloads that prove who they are.
//!
//! ```text
//! client  Pool ─ Dial ─ Connector: TLS (is it one of the expected peers?) ─ Tunnel: CONNECT ─ 200 ─ TunnelStream
//! server  Acceptor: TLS (is it of a trust domain that we know?) ─ ServerTunnel ─ Incoming: accept 200 / refuse ─ TunnelStream
//! ```
//!
//! Both take the [`Credentials`] of the moment for each handshake, and cut a tunnel whose peer later ones distrust.
//!
//! Interoperates with istio/ztunnel. Every wait on a peer has a deadline that the caller gives, and
//! everything a peer can make us hold has a cap (see [`Http2Settings`]).
//!
//! Not here: sockets (the caller dials, through [`Dial`]), who may talk to whom, and copying bytes.

mod activity;
mod authority;
mod back_pressure;
mod bundle;
mod ca;
mod client;
mod clock;
mod credentials;
mod crypto;
mod error;
mod files;
mod headers;
mod identity;
mod inspect;
mod io;
mod keepalive;
mod limits;
mod log_limit;
mod overdue;
mod pem;
mod pool;
mod renewal;
mod revocation;
mod rotation;
mod server;
mod settings;
mod source;
mod stream;
mod svid;
#[cfg(test)]
mod testing;
mod tls;
mod token_bucket;
mod trust;
mod tunnel_state;

pub use authority::Authority;
pub use bundle::Bundle;
pub use ca::{
    CaServer, CaServerSettings, CertificateAuthority, CertificateRequest, IssuedCertificate, Serial,
};
pub use client::{ConnectRequest, Connector, Tunnel};
pub use credentials::Credentials;
pub use error::{
    CredentialProblem, ExpectedPeer, Fault, HboneError, IssuerProblem, RequestProblem, SvidProblem,
};
pub use headers::{Baggage, Forwarded, HeaderError, RequestHeaders, TraceParent};
pub use identity::Identity;
pub use inspect::TunnelLimit;
pub use limits::{
    Budget, ByKey, ConnectionSlot, ConnectionSlots, Exhausted, KeyedBudget, Queue,
    RequestInProgress, Share, Sharing, SourceNetwork, Turn,
};
pub use log_limit::LogLimit;
pub use pool::{Dial, Pool, PoolSettings, PoolStatistics, TunnelKey};
pub use rotation::{CredentialRotator, CredentialsEvent};
pub use server::{Acceptor, Incoming, ServerTunnel};
pub use settings::{ClientSettings, Http2Settings, KeepaliveSettings, ServerSettings};
pub use source::{
    FileSource, IdentitySource, IstioCa, IstioCaSource, LocalCaSource, NextIdentity, Priority,
    SpireSource,
};
pub use stream::{TunnelIo, TunnelReader, TunnelStream, TunnelWriter};
pub use tls::PeerIdentity;
pub use trust::{Trust, TrustFiles};
pub use tunnel_state::RevocationSignal;

/// For the fuzz targets in `fuzz/`, and for nothing else.
#[cfg(feature = "fuzz")]
pub mod fuzz {
    /// Plays a script of a peer against the record layer, and panics if that does not do as a model
    /// of it says.
    pub fn record_layer(script: &[u8]) {
        crate::tls::run_script(script);
    }
}

//! HBONE: HTTP/2 CONNECT tunnels over mutual TLS, between workloads that prove who they are.
//!
//! ```text
//! client  Pool ─ Dial ─ Connector: TLS (is it one of the expected peers?) ─ Tunnel: CONNECT ─ 200 ─ TunnelStream
//! server  Acceptor: TLS (is it of our trust domain?) ─ ServerTunnel ─ Incoming: accept 200 / refuse ─ TunnelStream
//! ```
//!
//! Interoperates with istio/ztunnel. Every wait on a peer has a deadline that the caller gives, and
//! everything a peer can make us hold has a cap (see [`Http2Settings`]).
//!
//! Not here: sockets (the caller dials, through [`Dial`]), who may talk to whom, and copying bytes.

mod authority;
mod ca;
mod client;
mod error;
mod identity;
mod keepalive;
mod link;
mod pool;
mod server;
mod settings;
mod stream;
#[cfg(test)]
mod testing;
mod tls;

pub use authority::Authority;
pub use ca::{CertificateAuthority, IssuedCertificate};
pub use client::{ConnectRequest, Connector, Tunnel};
pub use error::{CredentialProblem, ExpectedPeer, Fault, HboneError};
pub use identity::Identity;
pub use pool::{Dial, Pool, PoolSettings, TunnelKey};
pub use server::{Acceptor, Incoming, ServerTunnel};
pub use settings::{ClientSettings, Http2Settings, KeepaliveSettings, ServerSettings};
pub use stream::{TunnelReader, TunnelStream, TunnelWriter};
pub use tls::PeerIdentity;

//! The reasons why a CA or an agent issued no certificate, as messages for the operator.
//!
//! Not here: invalid credentials (`CredentialProblem`).

use std::time::Duration;

use thiserror::Error;
use underpass_config::{Quoted, SpiffeId};

use super::{CredentialProblem, Fault};

/// The reason why an issuer returned no certificate. Always shown with the issuer.
#[derive(Debug, Clone, Error)]
pub enum IssuerProblem {
    /// The setting names no server.
    #[error("it must be https://HOST or https://HOST:PORT (identity.istio_ca.address)")]
    Address,
    /// The host in the setting is not a valid server name.
    #[error("{0:?} is no host name or IP address (identity.istio_ca.server_name)")]
    ServerName(String),
    /// The value of the setting cannot be sent.
    #[error(
        "the cluster is sent in a header and must be visible ASCII (identity.istio_ca.cluster_id)"
    )]
    ClusterId,
    /// No connection to the CA.
    #[error("cannot connect: is it up, and is identity.istio_ca.address right?")]
    Connect,
    /// The connect timed out.
    #[error(
        "no connection after {0:?}: is identity.istio_ca.address right, and the way there open?"
    )]
    ConnectTimeout(Duration),
    /// The CA has the wrong identity, or does not support TLS 1.3 with h2.
    #[error(
        "TLS 1.3 with h2 failed: does identity.istio_ca.roots hold its root, and is identity.istio_ca.server_name in its certificate?"
    )]
    Tls,
    /// The connection was accepted, then closed before the TLS handshake was complete.
    #[error(
        "the connection was closed during the TLS handshake: does a proxy in the CA's pod refuse plaintext there (mTLS \
         strict, a policy)? Its interception.inbound.exclude_ports leaves the CA's port to the CA"
    )]
    HandshakeReset,
    /// The connection was lost before the answer.
    #[error("the connection was lost before it answered")]
    Lost,
    /// The answer timed out.
    #[error("no answer after {0:?}")]
    ReplyTimeout(Duration),
    /// gRPC status 16.
    #[error(
        "it does not know us ({0:?}): is the token in identity.istio_ca.token still valid, and made for this CA?"
    )]
    Unauthenticated(Quoted),
    /// gRPC status 7.
    #[error(
        "it refuses us {id} ({message:?}): may the token's owner be this (identity.istio_ca.impersonate)?"
    )]
    Denied {
        /// The requested identity.
        id: SpiffeId,
        /// The CA's message.
        message: Quoted,
    },
    /// gRPC status 14.
    #[error("it is not available ({0:?}): is identity.istio_ca.address the CA's?")]
    Unavailable(Quoted),
    /// Any other gRPC status.
    #[error("it refused with status {status} ({message:?}): its log may tell more")]
    Refused {
        /// The name of the gRPC status.
        status: &'static str,
        /// The CA's message.
        message: Quoted,
    },
    /// An answer without a leaf or without a root.
    #[error("it answered with {0} certificates: a leaf and at least one root are needed")]
    EmptyResponse(usize),
    /// An answer that is not a certificate for our key.
    #[error(
        "it answered with a certificate that cannot be used: {}",
        Quoted::bounded(.0, Quoted::MAX_CHAIN_BYTES)
    )]
    Answer(CredentialProblem),
    /// A certificate of another identity.
    #[error(
        "it answered with a certificate of {got}, {asked} was asked for: whose token is in identity.istio_ca.token?"
    )]
    WrongIdentity {
        /// The requested identity.
        asked: SpiffeId,
        /// The URI names of the received certificate.
        got: Quoted,
    },
    /// No SPIRE agent at the socket.
    #[error("no SPIRE agent answers: does it run, and is identity.spire.socket its socket?")]
    Agent,
    /// The agent does not answer.
    #[error("the SPIRE agent did not answer in {0:?}")]
    AgentTimeout(Duration),
    /// The agent has no identity for this process.
    #[error(
        "the SPIRE agent has no identity for this process: is there a registration entry whose selectors match it?"
    )]
    NotRegistered,
    /// The agent's stream ended.
    #[error("the SPIRE agent closed its stream")]
    AgentClosed,
}

impl IssuerProblem {
    pub(crate) fn fault(&self) -> Fault {
        match self {
            Self::Address | Self::ServerName(_) | Self::ClusterId => Fault::Configuration,
            // All other problems may end without a change of settings: CAs restart, and register
            // new workloads late.
            _ => Fault::Peer,
        }
    }
}

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
    #[error("its address is not https://HOST or https://HOST:PORT")]
    Address,
    /// The host in the setting is not a valid server name.
    #[error("{0:?} is not a host name or an IP address")]
    ServerName(String),
    /// The value of the setting cannot be sent.
    #[error("the cluster ID is not visible ASCII")]
    ClusterId,
    /// No connection to the CA.
    #[error("cannot connect")]
    Connect,
    /// The connect timed out.
    #[error("no connection after {0:?}")]
    ConnectTimeout(Duration),
    /// The CA has the wrong identity, or does not support TLS 1.3 with h2.
    #[error("TLS 1.3 with h2 failed")]
    Tls,
    /// The connection was accepted, then closed before the TLS handshake was complete.
    #[error("the connection was closed during the TLS handshake")]
    HandshakeReset,
    /// The connection was lost before the answer.
    #[error("the connection was lost before it answered")]
    Lost,
    /// The answer timed out.
    #[error("no answer after {0:?}")]
    ReplyTimeout(Duration),
    /// gRPC status 16.
    #[error("it rejected the token ({0:?})")]
    Unauthenticated(Quoted),
    /// gRPC status 7.
    #[error("it refused a certificate of {id} ({message:?})")]
    Denied {
        /// The requested identity.
        id: SpiffeId,
        /// The CA's message.
        message: Quoted,
    },
    /// gRPC status 14.
    #[error("it is not available ({0:?})")]
    Unavailable(Quoted),
    /// Any other gRPC status.
    #[error("it refused with status {status} ({message:?})")]
    Refused {
        /// The name of the gRPC status.
        status: &'static str,
        /// The CA's message.
        message: Quoted,
    },
    /// An answer without a leaf or without a root.
    #[error("it answered with {0} certificates instead of a leaf and at least one root")]
    EmptyResponse(usize),
    /// An answer that is not a certificate for our key.
    #[error(
        "it answered with a certificate that cannot be used: {}",
        Quoted::bounded(.0, Quoted::MAX_CHAIN_BYTES)
    )]
    Answer(CredentialProblem),
    /// A certificate of another identity.
    #[error("it issued a certificate of {got} instead of {requested}")]
    WrongIdentity {
        /// The requested identity.
        requested: SpiffeId,
        /// The URI names of the received certificate.
        got: Quoted,
    },
    /// No SPIRE agent at the socket.
    #[error("no SPIRE agent answers")]
    Agent,
    /// The agent does not answer.
    #[error("the SPIRE agent did not answer in {0:?}")]
    AgentTimeout(Duration),
    /// The agent has no identity for the workload.
    #[error("the SPIRE agent has no identity for the workload")]
    NotRegistered,
    /// The agent gives this process no identities of other workloads.
    #[error("the SPIRE agent does not accept this process as a delegate ({0:?})")]
    NotDelegate(Quoted),
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

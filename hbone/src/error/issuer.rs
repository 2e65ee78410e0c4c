//! The reasons why a CA or a SPIRE agent issued no certificate.
//!
//! `CredentialProblem` describes certificates that were issued but are invalid.

use std::time::Duration;

use thiserror::Error;
use underpass_config::{Quoted, SpiffeId};

use super::{CredentialProblem, Fault};

/// The reason why a CA or a SPIRE agent issued no certificate. Messages show it after the address.
#[derive(Debug, Clone, Error)]
pub enum IssuerProblem {
    /// The configured address has no host.
    #[error("the address is not https://HOST or https://HOST:PORT")]
    Address,
    /// The host in the address is not a valid server name.
    #[error("{0:?} is not a host name or an IP address")]
    ServerName(String),
    /// The cluster ID contains characters that a header cannot contain.
    #[error("the cluster ID is not visible ASCII")]
    ClusterId,
    /// Connecting to the CA failed.
    #[error("cannot connect")]
    Connect,
    /// Connecting to the CA timed out.
    #[error("no connection after {0:?}")]
    ConnectTimeout(Duration),
    /// The CA's certificate has the wrong name, or the CA does not support TLS 1.3 with h2.
    #[error("TLS 1.3 with h2 failed")]
    Tls,
    /// The CA accepted the connection, then closed it during the TLS handshake.
    #[error("the connection was closed during the TLS handshake")]
    HandshakeReset,
    /// The connection was lost before the answer.
    #[error("the connection was lost before the answer")]
    Lost,
    /// The CA did not answer in time.
    #[error("no answer after {0:?}")]
    ReplyTimeout(Duration),
    /// The CA rejected the token (gRPC status 16).
    #[error("the CA rejected the token ({0:?})")]
    Unauthenticated(Quoted),
    /// The CA refused the identity (gRPC status 7).
    #[error("the CA refused a certificate of {id} ({message:?})")]
    Denied {
        /// The requested identity.
        id: SpiffeId,
        /// The CA's message.
        message: Quoted,
    },
    /// The CA is unavailable (gRPC status 14).
    #[error("the CA is not available ({0:?})")]
    Unavailable(Quoted),
    /// The CA answered with another gRPC status.
    #[error("the CA refused the request with status {status} ({message:?})")]
    Refused {
        /// The name of the gRPC status.
        status: &'static str,
        /// The CA's message.
        message: Quoted,
    },
    /// The answer contains no leaf or no root certificate.
    #[error("the answer contains {0} certificates instead of a leaf and at least one root")]
    EmptyResponse(usize),
    /// The answer contains no certificate for our key.
    #[error(
        "the answer contains an unusable certificate: {}",
        Quoted::bounded(.0, Quoted::MAX_CHAIN_BYTES)
    )]
    Answer(CredentialProblem),
    /// The CA issued a certificate of another identity.
    #[error("the CA issued a certificate of {got} instead of {requested}")]
    WrongIdentity {
        /// The requested identity.
        requested: SpiffeId,
        /// The URI names of the received certificate.
        got: Quoted,
    },
    /// No SPIRE agent listens at the socket.
    #[error("no SPIRE agent answers")]
    Agent,
    /// The SPIRE agent did not answer in time.
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
            // Other problems may end without a change of settings: a CA restarts, or registers a
            // workload later.
            _ => Fault::Peer,
        }
    }
}

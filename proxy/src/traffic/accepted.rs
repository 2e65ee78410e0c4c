//! A connection between accept(2) and the worker that serves it.

use std::net::{IpAddr, SocketAddr, TcpStream};

use underpass_interception::{OriginalDestination, Ports};

use crate::decide::connection_registry::Registration;
use crate::decide::subject::Decision;
use crate::error::ProxyError;
use crate::traffic::copy::aborted;
use crate::traffic::listeners::Kind;

/// An accepted connection that is not registered with a runtime yet.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) kind: Kind,
    pub(crate) stream: TcpStream,
    pub(crate) client: SocketAddr,
    /// The address that the client connected to.
    pub(crate) destination: OriginalDestination,
}

impl Accepted {
    /// Refuses a connection without an original destination, and a connection to the outbound
    /// listener itself, which would loop forever.
    pub(super) fn new(
        kind: Kind,
        stream: TcpStream,
        client: SocketAddr,
        ports: Ports,
    ) -> Result<Self, ProxyError> {
        let destination = match kind {
            Kind::Hbone => OriginalDestination::local(&stream),
            Kind::Outbound | Kind::Plaintext => {
                OriginalDestination::redirected(&stream, client.ip())
            }
        };
        let destination = destination.map_err(ProxyError::NotCaptured)?;
        if kind == Kind::Outbound && destination.address().port() == ports.outbound {
            let here = OriginalDestination::local(&stream).map_err(ProxyError::Client)?;
            if destination == here {
                return Err(ProxyError::OwnListener(destination.address()));
            }
        }
        Ok(Self { kind, stream, client, destination })
    }

    #[cfg(test)]
    pub(crate) fn testing(kind: Kind, stream: TcpStream, client: SocketAddr) -> Self {
        let destination = OriginalDestination::local(&stream).expect("an address");
        Self { kind, stream, client, destination }
    }

    /// Registers the connection with the runtime of the calling worker thread. Fails if the client
    /// has reset it meanwhile: the runtime would notice that only after the upstream was dialled.
    pub(crate) fn register(self) -> Result<Registered, ProxyError> {
        if let Some(error) = self.stream.take_error().map_err(ProxyError::Client)? {
            return Err(ProxyError::Client(error));
        }
        let stream = tokio::net::TcpStream::from_std(self.stream).map_err(ProxyError::Client)?;
        let Self { client, destination, .. } = self;
        Ok(Registered { stream, client, destination })
    }
}

/// The source of a connection that was caught on its way out of the pod.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source {
    /// The pod's own workload. The source has this address, which is one of the pod's.
    Own(IpAddr),
    /// A virtual machine, a container or a client behind the pod.
    Other,
}

/// A connection that is registered with its worker's runtime.
#[derive(Debug)]
pub(crate) struct Registered {
    pub(crate) stream: tokio::net::TcpStream,
    pub(crate) client: SocketAddr,
    pub(crate) destination: OriginalDestination,
}

impl Registered {
    /// Runs `work` until the connection is terminated or the client resets it. The caller pins
    /// `work`: moving it into this future would double its size.
    pub(crate) async fn unless_interrupted<T>(
        &self,
        registration: &Registration<Decision>,
        work: impl Future<Output = Result<T, ProxyError>> + Unpin,
    ) -> Result<T, ProxyError> {
        tokio::select! {
            outcome = registration.termination().or_terminate(work) => outcome,
            // A FIN does not interrupt: the bytes before it must still be delivered.
            error = aborted(&self.stream) => Err(ProxyError::Client(error)),
        }
    }
}

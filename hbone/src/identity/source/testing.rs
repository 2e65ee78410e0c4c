//! A CA client for tests of the CA server, without an identity source.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::uri::PathAndQuery;
use tokio::io::DuplexStream;
use tokio::net::TcpStream;
use tonic::client::Grpc;
use tonic::{Request, Status};
use tonic_prost::ProstCodec;
use underpass_config::IstioCaSettings;

use crate::ca::server::tests::{NAME, TestCa};
use crate::ca::{CREATE_CERTIFICATE, IstioCertificateRequest, IstioCertificateResponse};
pub(crate) use crate::control_plane::endpoint::Connection;
use crate::control_plane::endpoint::{Endpoint, read_roots};
use crate::error::HboneError;
use crate::pool::Dial;

/// Connects to the CA's current address and ignores the configured one.
#[derive(Debug, Clone)]
pub(crate) struct DialCa(pub(crate) Arc<Mutex<SocketAddr>>);

impl DialCa {
    pub(crate) fn new(served: &TestCa) -> Self {
        Self(Arc::new(Mutex::new(served.address)))
    }
}

impl Dial for DialCa {
    type Io = TcpStream;

    async fn dial(&self, _: SocketAddr) -> io::Result<TcpStream> {
        let address = *self.0.lock().unwrap();
        TcpStream::connect(address).await
    }
}

/// The client's settings for a test CA, with the token in the file `token`.
pub(crate) fn settings(served: &TestCa, server_name: &str) -> IstioCaSettings {
    IstioCaSettings {
        address: "https://127.0.0.1:15012".to_owned(),
        server_name: Some(server_name.to_owned()),
        roots: served.file("roots.pem"),
        token: served.file("token"),
        cluster_id: "Kubernetes".to_owned(),
        impersonate: false,
        ttl: Duration::from_secs(600),
    }
}

/// Returns one prepared connection, then fails.
#[derive(Debug)]
pub(crate) struct DialOnce(pub(crate) Mutex<Option<DuplexStream>>);

impl Dial for DialOnce {
    type Io = DuplexStream;

    async fn dial(&self, _: SocketAddr) -> io::Result<DuplexStream> {
        self.0.lock().unwrap().take().ok_or_else(|| io::ErrorKind::ConnectionRefused.into())
    }
}

pub(crate) async fn connect(served: &TestCa, server_name: &str) -> Result<Connection, HboneError> {
    connect_with(served, server_name, &DialCa::new(served)).await
}

pub(crate) async fn connect_with(
    served: &TestCa,
    server_name: &str,
    dial: &impl Dial,
) -> Result<Connection, HboneError> {
    let settings = settings(served, server_name);
    let endpoint = Endpoint::new(&settings.address, settings.server_name.as_deref()).unwrap();
    let roots = read_roots(&settings.roots).unwrap();
    endpoint.connect(dial, roots, None).await
}

/// Sends one request with this `authorization` header on a new connection.
pub(crate) async fn ask(
    served: &TestCa,
    authorization: Option<&'static str>,
    message: IstioCertificateRequest,
) -> Result<IstioCertificateResponse, Status> {
    let origin = "https://ca.test".parse().unwrap();
    let mut grpc = Grpc::with_origin(connect(served, NAME).await.unwrap(), origin);
    let mut request = Request::new(message);
    if let Some(header) = authorization {
        request.metadata_mut().insert("authorization", header.parse().unwrap());
    }
    let path = PathAndQuery::from_static(CREATE_CERTIFICATE);
    Ok(grpc.unary(request, path, ProstCodec::default()).await?.into_inner())
}

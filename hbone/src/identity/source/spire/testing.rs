//! A scripted SPIRE agent for tests: a gRPC server on a Unix socket, whose streams send the test's
//! messages.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::path::Path;
use std::pin::Pin;

use futures_util::{Stream, stream};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::server::ServerStreamingService;
use tonic::{Request, Response, Status};

use crate::ca::CertificateAuthority;
use crate::testing::{HOUR, id};

/// The messages of a stream.
pub(super) type Updates<A> = mpsc::UnboundedReceiver<Result<A, Status>>;

/// Serves gRPC calls on a Unix socket until the handle is aborted.
pub(super) fn serve<F>(
    socket: &Path,
    answer: impl Fn(http::Request<Incoming>) -> F + Clone + Send + 'static,
) -> JoinHandle<()>
where
    F: Future<Output = http::Response<Body>> + Send + 'static,
{
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            let answer = service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let connection = http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), answer);
            tokio::spawn(async { connection.await.ok() });
        }
    })
}

/// Answers a call with the stream that a function chooses for the request.
pub(super) struct Streaming<F>(pub(super) F);

impl<Q, A, F> ServerStreamingService<Q> for Streaming<F>
where
    A: Send + 'static,
    F: FnMut(Request<Q>) -> Result<Updates<A>, Status>,
{
    type Response = A;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let updates = (self.0)(request).map(|updates| {
            let next = async |mut updates: Updates<A>| Some((updates.recv().await?, updates));
            Response::new(Box::pin(stream::unfold(updates, next)) as Self::ResponseStream)
        });
        ready(updates)
    }
}

pub(super) fn der(pem: &str) -> Vec<u8> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

/// A certificate of `who` and its key, both in DER.
pub(super) fn issue(authority: &CertificateAuthority, who: &str) -> (Vec<u8>, Vec<u8>) {
    let issued = authority.issue(&id(who), HOUR).unwrap();
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
    (der(&issued.chain_pem), key.secret_der().to_vec())
}

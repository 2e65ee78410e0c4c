//! A scripted SPIRE agent: a gRPC server of the Delegated Identity API on a Unix socket, with a
//! certificate for each service account of the namespace `default`.
//!
//! It uses no code of underpass; the messages are encoded by hand.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Request, Response};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use crate::control_plane::{field, framed_message};
use crate::or_fail::OrFail;
use crate::pki::Pki;
use crate::tls::{chain, key};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A running agent, stopped on drop.
#[derive(Debug)]
pub struct SpireAgent {
    socket: PathBuf,
    authority: Arc<Authority>,
    serving: JoinHandle<()>,
}

#[derive(Debug)]
struct Authority {
    /// Locked until an issued certificate is read from its file.
    pki: Mutex<Pki>,
    subscriptions: AtomicUsize,
}

impl SpireAgent {
    /// Listens on a socket in `folder`, which also gets the files of a new authority.
    #[must_use]
    pub fn start(folder: &Path) -> Self {
        let folder = folder.join("spire");
        fs::create_dir(&folder).or_fail("make a folder");
        let socket = folder.join("admin.sock");
        let listener = UnixListener::bind(&socket).or_fail("listen on a socket");
        let (pki, subscriptions) = (Mutex::new(Pki::new(&folder)), AtomicUsize::default());
        let authority = Arc::new(Authority { pki, subscriptions });
        let shared = authority.clone();
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let authority = shared.clone();
                tokio::spawn(async move { serve(stream, authority).await.ok() });
            }
        });
        Self { socket, authority, serving }
    }

    /// The section of the settings in YAML.
    #[must_use]
    pub fn settings(&self) -> String {
        format!("identity: {{spire: {{admin_socket: {:?}}}}}", self.socket)
    }

    /// The number of subscriptions to certificates so far.
    #[must_use]
    pub fn subscriptions(&self) -> usize {
        self.authority.subscriptions.load(Relaxed)
    }
}

impl Drop for SpireAgent {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(stream: UnixStream, authority: Arc<Authority>) -> Result<(), Failure> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, respond) = accepted?;
        let authority = authority.clone();
        tokio::spawn(async move { answer(request, respond, &authority).await.ok() });
    }
    Ok(())
}

/// Sends one message, and keeps the stream open until the client ends it.
async fn answer(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    authority: &Authority,
) -> Result<(), Failure> {
    let is_of_bundles = request.uri().path().ends_with("/SubscribeToX509Bundles");
    let (mut body, mut bytes) = (request.into_body(), BytesMut::new());
    while let Some(data) = body.data().await {
        bytes.extend_from_slice(&data?);
    }
    let message = match is_of_bundles {
        true => authority.bundles(),
        false => authority.svids(&account(&bytes)?),
    };
    let headers = Response::builder().header("content-type", "application/grpc").body(())?;
    let mut stream = respond.send_response(headers, false)?;
    stream.send_data(framed_message(&message), false)?;
    std::future::poll_fn(|context| stream.poll_reset(context)).await?;
    Ok(())
}

/// The service account of the selectors `k8s:ns:default` and `k8s:sa:ACCOUNT`.
fn account(request: &[u8]) -> Result<String, Failure> {
    let text = String::from_utf8_lossy(request);
    if !text.contains("ns:default") {
        return Err("not of the namespace default".into());
    }
    let (_, account) = text.split_once("sa:").ok_or("no service account")?;
    Ok(account.to_owned())
}

impl Authority {
    /// `SubscribeToX509SVIDsResponse` with one certificate.
    fn svids(&self, account: &str) -> Vec<u8> {
        self.subscriptions.fetch_add(1, Relaxed);
        let pki = self.pki.lock().or_fail("use the authority");
        let files = pki.issue(account);
        let certificates = chain(&files.certificate).into_iter().flat_map(|der| field(1, der));
        let svid = field(1, certificates.collect::<Vec<u8>>());
        field(1, [svid, field(2, key(&files.key).secret_der())].concat())
    }

    /// `SubscribeToX509BundlesResponse` with the roots of `cluster.local`.
    fn bundles(&self) -> Vec<u8> {
        let pki = self.pki.lock().or_fail("use the authority");
        let roots = CertificateDer::pem_file_iter(pki.roots()).or_fail("read the roots");
        let roots = roots.flat_map(|der| der.or_fail("read a root").to_vec());
        let name = field(1, "spiffe://cluster.local");
        field(1, [name, field(2, roots.collect::<Vec<u8>>())].concat())
    }
}

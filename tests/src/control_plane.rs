//! A scripted control plane: a gRPC server of delta xDS that sends the responses of a test.
//!
//! It uses no code of underpass except for the types of xDS requests and responses. The resources
//! in them are encoded by hand.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Response};
use prost::Message as _;
use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use underpass_config::{Any, DeltaRequest, DeltaResponse, Resource, ResourceType};

use crate::or_fail::OrFail;
use crate::peers::within;
use crate::pki::Pki;
use crate::pods::{Family, Pod};
use crate::tls::{chain, key, provider};

/// The name in the certificate.
const NAME: &str = "istiod.test";

/// A running control plane.
#[derive(Debug)]
pub struct ScriptedControlPlane {
    address: SocketAddr,
    roots: PathBuf,
    events: mpsc::UnboundedReceiver<ControlPlaneEvent>,
    script: Arc<Mutex<Script>>,
    serving: JoinHandle<()>,
}

/// An action of a client.
#[derive(Debug)]
pub enum ControlPlaneEvent {
    /// The client opened a stream with these headers.
    Opened(HeaderMap),
    /// The client sent a request.
    Request(Box<DeltaRequest>),
}

#[derive(Debug, Default)]
struct Script {
    /// The bytes that each new stream sends at once.
    first: Vec<Bytes>,
    /// The open streams; `None` ends one.
    streams: Vec<mpsc::UnboundedSender<Option<Bytes>>>,
    /// The gRPC status with which each new stream is refused.
    refusal: Option<u32>,
}

impl ScriptedControlPlane {
    /// Listens in `pod`. Sends nothing to clients by itself.
    #[must_use]
    pub fn start(pod: &Pod, port: u16, pki: &Pki) -> Self {
        let files = pki.issue_server(NAME);
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .or_fail("set up TLS")
            .with_no_client_auth()
            .with_single_cert(chain(&files.certificate), key(&files.key))
            .or_fail("use a certificate");
        config.alpn_protocols = vec![b"h2".to_vec()];
        let (acceptor, listener) = (TlsAcceptor::from(Arc::new(config)), pod.listen(port));
        let (sender, events) = mpsc::unbounded_channel();
        let script = Arc::<Mutex<Script>>::default();
        let shared = script.clone();
        let serving = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await;
                let serve = serve(acceptor.clone(), tcp, sender.clone(), shared.clone());
                tokio::spawn(async move { serve.await.ok() });
            }
        });
        let (address, roots) = (pod.at(Family::V4, port), pki.roots().to_owned());
        Self { address, roots, events, script, serving }
    }

    /// The settings of a client, in YAML.
    #[must_use]
    pub fn settings(&self) -> String {
        let Self { address, roots, .. } = self;
        format!(
            "mesh: {{xds: {{address: \"https://{address}\", server_name: {NAME}, roots: {roots:?}, \
             headers: [x-test=1]}}}}"
        )
    }

    /// Sends these responses at the start of each later stream.
    pub fn set_first(&self, responses: &[DeltaResponse]) {
        self.script().first = responses.iter().map(framed).collect();
    }

    /// Refuses each later stream with this gRPC status.
    pub fn refuse(&self, status: u32) {
        self.script().refusal = Some(status);
    }

    /// Sends a response on every open stream.
    pub fn send(&self, response: &DeltaResponse) {
        self.send_raw(framed(response));
    }

    /// Sends bytes on every open stream.
    pub fn send_raw(&self, bytes: Bytes) {
        let mut script = self.script();
        script.streams.retain(|stream| stream.send(Some(bytes.clone())).is_ok());
        assert!(!script.streams.is_empty(), "no open stream");
    }

    /// Ends every open stream and its connection.
    pub fn end_stream(&self) {
        let streams = std::mem::take(&mut self.script().streams);
        let ended = streams.into_iter().filter(|stream| stream.send(None).is_ok());
        assert!(ended.count() > 0, "no open stream");
    }

    /// Stops listening, and ends every open stream.
    pub fn stop(self) {
        self.serving.abort();
        self.end_stream();
    }

    /// The headers of the next stream that a client opens. Skips requests.
    pub async fn opened(&mut self) -> HeaderMap {
        loop {
            if let ControlPlaneEvent::Opened(headers) = self.event().await {
                return headers;
            }
        }
    }

    /// The next request of a client.
    pub async fn request(&mut self) -> DeltaRequest {
        loop {
            if let ControlPlaneEvent::Request(request) = self.event().await {
                return *request;
            }
        }
    }

    async fn event(&mut self) -> ControlPlaneEvent {
        within("the control plane's client", self.events.recv()).await.expect("it is served")
    }

    fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.script.lock().or_fail("lock the script")
    }
}

impl Drop for ScriptedControlPlane {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    events: mpsc::UnboundedSender<ControlPlaneEvent>,
    script: Arc<Mutex<Script>>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut connection = h2::server::handshake(acceptor.accept(tcp).await?).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        let refusal = script.lock().map_err(|_| "poisoned")?.refusal;
        if let Some(status) = refusal {
            let headers = Response::builder().header("content-type", "application/grpc");
            let headers = headers.header("grpc-status", status).body(())?;
            respond.send_response(headers, true)?;
            continue;
        }
        let (parts, body) = request.into_parts();
        events.send(ControlPlaneEvent::Opened(parts.headers))?;
        let (stream, commands) = mpsc::unbounded_channel();
        {
            let mut script = script.lock().map_err(|_| "poisoned")?;
            for bytes in &script.first {
                stream.send(Some(bytes.clone()))?;
            }
            script.streams.push(stream);
        }
        tokio::spawn(read(body, events.clone()));
        let writing = write(respond, commands);
        tokio::select! {
            written = writing => return written,
            next = connection.accept() => drop(next),
        }
    }
    Ok(())
}

/// Reports each request. A prefix of five bytes precedes it.
async fn read(mut body: RecvStream, events: mpsc::UnboundedSender<ControlPlaneEvent>) {
    let mut buffer = BytesMut::new();
    while let Some(Ok(data)) = body.data().await {
        body.flow_control().release_capacity(data.len()).ok();
        buffer.extend_from_slice(&data);
        while let Some((_, after)) = buffer.split_first_chunk::<1>()
            && let Some((length, rest)) = after.split_first_chunk::<4>()
            && let Ok(length) = usize::try_from(u32::from_be_bytes(*length))
            && let Some(message) = rest.get(..length)
        {
            let request = DeltaRequest::decode(message).or_fail("decode a request");
            events.send(ControlPlaneEvent::Request(Box::new(request))).ok();
            buffer.advance(5 + length);
        }
    }
}

/// Sends the bytes of the script until it ends the stream.
async fn write(
    mut respond: SendResponse<Bytes>,
    mut commands: mpsc::UnboundedReceiver<Option<Bytes>>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let headers = Response::builder().header("content-type", "application/grpc").body(())?;
    let mut stream: SendStream<Bytes> = respond.send_response(headers, false)?;
    while let Some(Some(bytes)) = commands.recv().await {
        stream.send_data(bytes, false)?;
    }
    Ok(())
}

fn framed(response: &DeltaResponse) -> Bytes {
    framed_message(&response.encode_to_vec())
}

/// A message of gRPC with its prefix.
pub(crate) fn framed_message(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).or_fail("send a message").to_be_bytes();
    [&[0], &length[..], message].concat().into()
}

/// A field of a protobuf message with this content.
#[must_use]
pub fn field(number: u32, content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    let mut bytes = Vec::new();
    prost::encoding::encode_varint(u64::from(number << 3 | 2), &mut bytes);
    prost::encoding::encode_varint(u64::try_from(content.len()).or_fail("count"), &mut bytes);
    bytes.extend_from_slice(content);
    bytes
}

/// A field of a protobuf message with this number.
#[must_use]
pub fn number(number: u32, value: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::encode_varint(u64::from(number << 3), &mut bytes);
    prost::encoding::encode_varint(u64::from(value), &mut bytes);
    bytes
}

/// A resource of this type, name and content. Its version depends on the content, as istiod's.
#[must_use]
pub fn resource(kind: ResourceType, name: &str, content: Vec<u8>) -> Resource {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    let version = format!("{:x}", hasher.finish());
    let any = Any { type_url: kind.url().to_owned(), value: content.into() };
    Resource { version, name: name.to_owned(), resource: Some(any), aliases: Vec::new() }
}

/// A response with these resources.
#[must_use]
pub fn response(kind: ResourceType, resources: Vec<Resource>, removed: &[&str]) -> DeltaResponse {
    DeltaResponse {
        resources: resources.into_iter().map(Into::into).collect(),
        type_url: kind.url().to_owned(),
        nonce: "nonce".to_owned(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
    }
}

/// The HBONE workload of a pod, with the pod's name as its service account.
#[must_use]
pub fn hbone_workload(pod: &Pod) -> Resource {
    let uid = format!("Kubernetes//Pod/default/{}", pod.name());
    let addresses = pod.ips().into_iter().flat_map(|ip| match ip {
        std::net::IpAddr::V4(ip) => field(3, ip.octets()),
        std::net::IpAddr::V6(ip) => field(3, ip.octets()),
    });
    let workload = [
        field(1, pod.name()),
        field(2, "default"),
        addresses.collect(),
        number(5, 1),
        field(7, pod.name()),
        field(20, &uid),
    ];
    resource(ResourceType::Address, &uid, field(1, workload.concat()))
}

/// The policy `default/NAME` of the namespace, which denies connections to `port`.
#[must_use]
pub fn deny_port(name: &str, port: u16) -> Resource {
    let ports = field(9, number(0, u32::from(port)).get(1..).unwrap_or_default());
    let groups = field(5, field(1, field(2, ports)));
    let policy = [field(1, name), field(2, "default"), number(3, 1), number(4, 1), groups];
    let name = format!("default/{name}");
    resource(ResourceType::Authorization, &name, policy.concat())
}

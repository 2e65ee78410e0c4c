//! A scripted API server of Kubernetes: HTTP/1.1 over TLS, with lists in pages and watches.
//!
//! Each page has one object, so that every list has several pages. Versions count the changes.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use underpass_tests::{Pki, Pod, Server, TlsServer};

pub(crate) const PORT: u16 = 6443;
const NAME: &str = "kubernetes.default.svc";
pub(crate) const TOKEN: &str = "token-of-node";

/// A running API server.
pub(crate) struct ApiServer {
    state: Arc<State>,
    kubeconfig: PathBuf,
    _server: Server,
}

struct State {
    cluster: Mutex<Cluster>,
    /// Wakes the watches; a change of the number ends them.
    epoch: watch::Sender<u64>,
}

#[derive(Default)]
struct Cluster {
    version: u64,
    /// The oldest version from which a watch can continue.
    oldest: u64,
    /// The objects, each with the path of its collection and its name.
    objects: Vec<(&'static str, String, Value)>,
    /// The version, the collection and the event of each change.
    events: Vec<(u64, &'static str, Value)>,
    /// The status of every response, while the server refuses requests.
    refusal: Option<(u16, &'static str)>,
    lists: usize,
    bookmarks: usize,
}

impl ApiServer {
    /// Starts a server in the namespace of `node`.
    pub(crate) fn start(node: &Pod, pki: &Pki) -> Self {
        let tls = TlsServer::new(&pki.issue_server(NAME)).without_alpn();
        let state = Arc::new(State { cluster: Mutex::default(), epoch: watch::Sender::new(0) });
        let serving = state.clone();
        let server = Server::start(node, PORT, move |stream, _| {
            let (state, tls) = (serving.clone(), tls.clone());
            async move { state.serve(&tls, stream).await }
        });
        let kubeconfig = node.folder().join("kubeconfig");
        let text = format!(
            "current-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
             clusters:\n- name: k\n  cluster: {{server: 'https://127.0.0.1:{PORT}', \
             certificate-authority: {:?}, tls-server-name: {NAME}}}\n\
             users: [{{name: u, user: {{token: {TOKEN}}}}}]\n",
            pki.roots()
        );
        std::fs::write(&kubeconfig, text).expect("a file");
        let server = Self { state, kubeconfig, _server: server };
        server.namespace("default", json!({}));
        server
    }

    /// The settings of a daemon that uses this server.
    pub(crate) fn settings(&self) -> String {
        format!("node.kubeconfig={}", self.kubeconfig.display())
    }

    /// The settings with another file, in which `from` is replaced by `to`.
    pub(crate) fn changed_settings(&self, from: &str, to: &str) -> String {
        let text = std::fs::read_to_string(&self.kubeconfig).expect("a file");
        assert!(text.contains(from), "{text}");
        let changed = self.kubeconfig.with_extension("changed");
        std::fs::write(&changed, text.replace(from, to)).expect("a file");
        format!("node.kubeconfig={}", changed.display())
    }

    /// Adds or changes a namespace.
    pub(crate) fn namespace(&self, name: &str, labels: Value) {
        self.put("namespaces", name, json!({"metadata": {"name": name, "labels": labels}}));
    }

    /// Adds or changes a pod of the namespace `default`. The service account has the pod's name.
    pub(crate) fn pod(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut pod = json!({
            "metadata": {
                "name": name, "namespace": "default", "uid": format!("uid-{name}"),
                "labels": {}, "annotations": {},
            },
            "spec": {"serviceAccountName": name, "containers": []},
            "status": {},
        });
        change(&mut pod);
        self.put("pods", name, pod);
    }

    /// Deletes a pod.
    pub(crate) fn delete_pod(&self, name: &str) {
        let mut cluster = self.state.cluster();
        let objects = &mut cluster.objects;
        let index = objects.iter().position(|(kind, known, _)| (*kind, &**known) == ("pods", name));
        let (_, _, object) = objects.remove(index.expect("a pod"));
        cluster.record("pods", "DELETED", object);
        drop(cluster);
        self.state.epoch.send_modify(|_| {});
    }

    /// Sets the status with which every request is refused; `None` ends this.
    pub(crate) fn refuse(&self, refusal: Option<(u16, &'static str)>) {
        self.state.cluster().refusal = refusal;
        self.disconnect();
    }

    /// Ends all watches in the middle of their body.
    pub(crate) fn disconnect(&self) {
        self.state.epoch.send_modify(|epoch| *epoch += 1);
    }

    /// Forgets all versions, so that later watches from them get 410 Gone.
    pub(crate) fn forget(&self) {
        let mut cluster = self.state.cluster();
        cluster.version += 1;
        cluster.oldest = cluster.version;
    }

    /// The numbers of complete lists and of sent bookmarks.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let cluster = self.state.cluster();
        (cluster.lists, cluster.bookmarks)
    }

    fn put(&self, kind: &'static str, name: &str, object: Value) {
        let mut cluster = self.state.cluster();
        let known = cluster.objects.iter_mut().find(|known| (known.0, &*known.1) == (kind, name));
        let event = match known {
            Some(known) => {
                known.2 = object.clone();
                "MODIFIED"
            }
            None => {
                cluster.objects.push((kind, name.to_owned(), object.clone()));
                "ADDED"
            }
        };
        cluster.record(kind, event, object);
        drop(cluster);
        self.state.epoch.send_modify(|_| {});
    }
}

impl Cluster {
    fn record(&mut self, kind: &'static str, event: &str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.events.push((self.version, kind, json!({"type": event, "object": object})));
    }

    /// The page that begins with the object `index`.
    fn page(&mut self, kind: &str, index: usize) -> Value {
        let objects = self.objects.iter().filter(|(known, ..)| *known == kind);
        let count = objects.clone().count();
        let items: Vec<&Value> = objects.skip(index).take(1).map(|(_, _, object)| object).collect();
        let next = if index + 1 < count { (index + 1).to_string() } else { String::new() };
        let page = json!({
            "metadata": {"resourceVersion": self.version.to_string(), "continue": next},
            "items": items,
        });
        self.lists += usize::from(next.is_empty());
        page
    }
}

impl State {
    fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().expect("no holder panics")
    }

    async fn serve(&self, tls: &TlsServer, stream: TcpStream) -> io::Result<()> {
        let mut stream = tls.accept(stream).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let path = head.split(' ').nth(1).unwrap_or_default();
        let (status, body) = match self.refusal(&head) {
            Some((status, message)) => (status, json!({"kind": "Status", "message": message})),
            None if query(path, "watch").is_some() => return self.watch(&mut stream, path).await,
            None => {
                let index = query(path, "continue").and_then(|token| token.parse().ok());
                (200, self.cluster().page(kind(path), index.unwrap_or_default()))
            }
        };
        respond(&mut stream, status, &body.to_string()).await
    }

    fn refusal(&self, head: &str) -> Option<(u16, &'static str)> {
        let is_known =
            head.to_ascii_lowercase().contains(&format!("authorization: bearer {TOKEN}"));
        if !is_known {
            return Some((401, "Unauthorized"));
        }
        if kind(head) == "pods" && !head.contains("fieldSelector=spec.nodeName%3Dnode&") {
            return Some((403, "pods is forbidden: only those of the node"));
        }
        self.cluster().refusal
    }

    /// Sends events, and a bookmark after each, until the epoch ends.
    async fn watch(&self, stream: &mut (impl AsyncWrite + Unpin), path: &str) -> io::Result<()> {
        let mut changes = self.epoch.subscribe();
        let epoch = *changes.borrow_and_update();
        let mut version: u64 =
            query(path, "resourceVersion").unwrap_or_default().parse().unwrap_or(0);
        stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
        while *changes.borrow() == epoch {
            let (events, is_gone) = {
                let cluster = self.cluster();
                let pending =
                    cluster.events.iter().filter(|(at, of, _)| *at > version && *of == kind(path));
                let pending: Vec<(u64, Value)> =
                    pending.map(|(at, _, event)| (*at, event.clone())).collect();
                (pending, version < cluster.oldest)
            };
            if is_gone {
                let object = json!({"kind": "Status", "code": 410, "message": "too old"});
                return chunk(stream, &json!({"type": "ERROR", "object": object})).await;
            }
            for (at, event) in events {
                chunk(stream, &event).await?;
                version = at;
                let metadata = json!({"metadata": {"resourceVersion": version.to_string()}});
                chunk(stream, &json!({"type": "BOOKMARK", "object": metadata})).await?;
                self.cluster().bookmarks += 1;
            }
            changes.changed().await.ok();
        }
        Ok(())
    }
}

fn kind(path: &str) -> &'static str {
    if path.contains("/api/v1/pods?") { "pods" } else { "namespaces" }
}

fn query<'a>(path: &'a str, key: &str) -> Option<&'a str> {
    let (_, query) = path.split_once('?')?;
    query.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
}

async fn respond(
    stream: &mut (impl AsyncWrite + Unpin),
    status: u16,
    body: &str,
) -> io::Result<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).await?;
    stream.shutdown().await
}

/// Sends an event in two pieces.
async fn chunk(stream: &mut (impl AsyncWrite + Unpin), event: &Value) -> io::Result<()> {
    let line = format!("{event}\n");
    let (first, second) = line.split_at(line.len() / 2);
    for piece in [first, second] {
        let piece = format!("{:x}\r\n{piece}\r\n", piece.len());
        stream.write_all(piece.as_bytes()).await?;
        stream.flush().await?;
    }
    Ok(())
}

//! Access to the API server of Kubernetes: from a kubeconfig file, or from the service account of
//! the daemon's own pod.
//!
//! Certificates and tokens are read for each connection, because they are rotated. Not supported,
//! and therefore refused: programs that issue tokens, proxies, and servers without verification.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::error::{ConfigErrors, Reason};
use crate::settings::load::read_text;
use crate::yaml::read::{Cursor, Problems};

/// Where Kubernetes mounts the service account of a pod.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The hint for a kubeconfig file that cannot be read.
const FILE_HINT: &str = "correct node.kubeconfig; in a pod with a service account it is not needed";
/// The hint for a kubeconfig file with an unsupported credential.
const CREDENTIAL_HINT: &str = "use a token, a token file or a client certificate";

/// The address and the credentials of the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterAccess {
    /// `https://HOST:PORT`.
    pub server: String,
    /// The name in the server's certificate, if it differs from the host.
    pub server_name: Option<String>,
    /// The roots of the server's certificate, in PEM.
    pub roots: ClusterDocument,
    /// The credential with which the daemon authenticates.
    pub credential: ClusterCredential,
}

/// The credential of the daemon at the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterCredential {
    /// A bearer token.
    Token(ClusterDocument),
    /// A certificate and its key, in PEM.
    Certificate(ClusterDocument, ClusterDocument),
}

/// A certificate, key or token. `Debug` does not contain it.
#[derive(Clone, PartialEq, Eq)]
pub enum ClusterDocument {
    /// A file, which may be replaced.
    File(PathBuf),
    /// A value of the kubeconfig file, with its key.
    Inline(&'static str, Vec<u8>),
}

impl ClusterDocument {
    /// The current content.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        match self {
            Self::File(path) => fs::read(path),
            Self::Inline(_, content) => Ok(content.clone()),
        }
    }

    /// The file, or the key in the kubeconfig file.
    #[must_use]
    pub fn name(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Inline(key, _) => Path::new(key),
        }
    }
}

impl fmt::Debug for ClusterDocument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ClusterDocument").field(&self.name()).finish()
    }
}

impl ClusterAccess {
    /// The access with the service account of this pod; `None` outside a pod or without a service
    /// account.
    #[expect(
        clippy::disallowed_methods,
        reason = "Kubernetes names its API server by these variables in every pod: they are not settings"
    )]
    #[must_use]
    pub fn of_service_account() -> Option<Self> {
        let variable = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = variable("KUBERNETES_SERVICE_PORT")?;
        Self::of_folder(Path::new(SERVICE_ACCOUNT), &host, &port)
    }

    fn of_folder(folder: &Path, host: &str, port: &str) -> Option<Self> {
        let token = folder.join("token");
        if !token.exists() {
            return None;
        }
        // Only IPv6 addresses contain colons.
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        Some(Self {
            server: format!("https://{host}:{port}"),
            server_name: None,
            roots: ClusterDocument::File(folder.join("ca.crt")),
            credential: ClusterCredential::Token(ClusterDocument::File(token)),
        })
    }

    /// Reads the access of the current context from a kubeconfig file. Relative paths refer to its
    /// folder.
    ///
    /// # Errors
    /// All mistakes in the file, or the reason why it cannot be read.
    pub fn of_kubeconfig(path: &Path) -> Result<Self, ConfigErrors> {
        let name = path.display().to_string();
        let text = fs::read_to_string(path).map_err(|error| {
            let reason = format!("{name}: cannot be read: {error}");
            ConfigErrors::one(Reason::with_hint(reason, FILE_HINT), None)
        })?;
        let root = read_text(&name, &text)?;
        let problems = Problems::default();
        let folder = path.parent().unwrap_or_else(|| Path::new(""));
        let access = read(Cursor::root(&root, &problems), folder);
        problems.or_else(access)
    }
}

fn read(root: Cursor<'_>, folder: &Path) -> Option<ClusterAccess> {
    let current = root.key("current-context");
    let context = current.given_or("is missing")?.text()?;
    let (cluster_name, user_name) = named(root, "contexts", "context", context, |context| {
        let text = |key| context.key(key).given_or("is missing").and_then(|cursor| cursor.text());
        Some((text("cluster")?.to_owned(), text("user")?.to_owned()))
    })?;
    let server = named(root, "clusters", "cluster", &cluster_name, |cluster| {
        refuse(cluster, &["insecure-skip-tls-verify", "proxy-url"], "is not supported");
        let server = cluster.key("server").given_or("is missing").and_then(|c| c.text());
        let roots =
            document(cluster, ["certificate-authority", "certificate-authority-data"], folder);
        if roots.is_none() {
            cluster.key("certificate-authority").problem("is missing");
        }
        let name = cluster.key("tls-server-name").text().map(str::to_owned);
        Some((server?.to_owned(), name, roots?))
    });
    let credential = named(root, "users", "user", &user_name, |user| read_credential(user, folder));
    let ((server, server_name, roots), credential) = (server?, credential?);
    Some(ClusterAccess { server, server_name, roots, credential })
}

/// Reads the item of a list with this name.
fn named<T>(
    root: Cursor<'_>,
    list: &str,
    kind: &str,
    name: &str,
    read: impl Fn(Cursor<'_>) -> Option<T>,
) -> Option<T> {
    let list = root.key(list);
    let mut names = Vec::new();
    let found = list.items(|item| {
        let found = item.key("name").text()?.to_owned();
        names.push(format!("{found:?}"));
        (found == name).then(|| read(item.key(kind)))
    });
    match found.into_iter().next() {
        Some(read) => read,
        None => {
            let reason = format!("has no item with the name {name:?}");
            let hint = match names.is_empty() {
                true => "the list is empty".to_owned(),
                false => format!("it has {}", names.join(", ")),
            };
            list.problem(Reason::with_hint(reason, hint));
            None
        }
    }
}

fn read_credential(user: Cursor<'_>, folder: &Path) -> Option<ClusterCredential> {
    refuse(user, &["exec", "auth-provider", "username", "as"], "is not supported");
    let certificate = document(user, ["client-certificate", "client-certificate-data"], folder);
    let key = document(user, ["client-key", "client-key-data"], folder);
    if let (Some(certificate), Some(key)) = (certificate, key) {
        return Some(ClusterCredential::Certificate(certificate, key));
    }
    // kubectl prefers the file too.
    if let Some(file) = user.key("tokenFile").text() {
        return Some(ClusterCredential::Token(ClusterDocument::File(folder.join(file))));
    }
    if let Some(token) = user.key("token").text() {
        let token = ClusterDocument::Inline("token", token.into());
        return Some(ClusterCredential::Token(token));
    }
    user.problem(Reason::with_hint("has no credential", CREDENTIAL_HINT));
    None
}

fn refuse(cursor: Cursor<'_>, keys: &[&str], why: &str) {
    for key in keys {
        let value = cursor.key(key);
        // kubectl writes absent values as "" and false.
        if value.is_given() && !value.is_word("") && !value.is_word("false") {
            value.problem(Reason::with_hint(why, CREDENTIAL_HINT));
        }
    }
}

/// The document in a file, or else in base64.
fn document(
    cursor: Cursor<'_>,
    [file_key, data_key]: [&'static str; 2],
    folder: &Path,
) -> Option<ClusterDocument> {
    let data = cursor.key(data_key);
    if let Some(text) = data.text().filter(|text| !text.is_empty()) {
        return match BASE64_STANDARD.decode(text) {
            Ok(content) => Some(ClusterDocument::Inline(data_key, content)),
            Err(_) => {
                // Without the value, which may be a key.
                cursor.problem(format!("{data_key} is not base64"));
                None
            }
        };
    }
    let file = cursor.key(file_key).text().filter(|file| !file.is_empty())?;
    Some(ClusterDocument::File(folder.join(file)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hint::Hint as _;

    const KUBECONFIG: &str = "apiVersion: v1
kind: Config
current-context: node
contexts:
- {name: other, context: {cluster: c, user: unused}}
- {name: node, context: {cluster: c, user: u, namespace: x}}
clusters:
- {name: c, cluster: {server: 'https://[::1]:6443', certificate-authority: ca.pem, tls-server-name: kubernetes}}
users:
- {name: u, user: USER}
";

    fn parse(text: &str) -> Result<ClusterAccess, ConfigErrors> {
        let root = read_text("kubeconfig", text)?;
        let problems = Problems::default();
        let access = read(Cursor::root(&root, &problems), Path::new("/etc/x"));
        problems.or_else(access)
    }

    fn of_user(user: &str) -> Result<ClusterAccess, ConfigErrors> {
        parse(&KUBECONFIG.replace("USER", user))
    }

    #[test]
    fn current_context_selects_cluster_and_user() {
        let access = of_user("{token: secret}").unwrap();
        assert_eq!(access.server, "https://[::1]:6443");
        assert_eq!(access.server_name.as_deref(), Some("kubernetes"));
        assert_eq!(access.roots, ClusterDocument::File("/etc/x/ca.pem".into()));
        let token = ClusterDocument::Inline("token", b"secret".to_vec());
        assert_eq!(access.credential, ClusterCredential::Token(token));
        assert!(!format!("{access:?}").contains("secret"), "{access:?}");
    }

    #[test]
    fn accepts_token_files_and_client_certificates() {
        let file = |path: &str| ClusterDocument::File(path.into());
        let access = of_user("{tokenFile: /run/token, token: old}").unwrap();
        assert_eq!(access.credential, ClusterCredential::Token(file("/run/token")));
        let user = "{client-certificate: c.pem, client-key-data: a2V5}";
        let key = ClusterDocument::Inline("client-key-data", b"key".to_vec());
        assert_eq!(
            of_user(user).unwrap().credential,
            ClusterCredential::Certificate(file("/etc/x/c.pem"), key)
        );
    }

    #[test]
    fn rejects_unsupported_and_missing_credentials() {
        for (user, problem) in [
            ("{exec: {command: aws}}", "exec: is not supported"),
            ("{auth-provider: {name: gcp}, token: t}", "auth-provider: is not supported"),
            ("{username: admin, password: p}", "is not supported"),
            ("{}", "has no credential"),
            ("{client-certificate-data: '*secret*', client-key: k}", "is not base64"),
        ] {
            let error = of_user(user).unwrap_err().to_string();
            assert!(error.contains(problem), "{user}: {error}");
            assert!(!error.contains("*secret*"), "{error}");
        }
    }

    #[test]
    fn missing_file_and_unknown_names_have_hints() {
        let hint = |error: ConfigErrors| error.hint().unwrap_or_default().into_owned();
        let error = ClusterAccess::of_kubeconfig(Path::new("/no/kubeconfig")).unwrap_err();
        assert!(error.to_string().contains("/no/kubeconfig: cannot be read: No such file"));
        assert!(hint(error).contains("node.kubeconfig"));
        for (from, to, expected) in [
            ("current-context: node", "current-context: gone", "it has \"other\", \"node\""),
            ("cluster: c, user: u", "cluster: c, user: gone", "it has \"u\""),
        ] {
            let text = KUBECONFIG.replace("USER", "{token: t}").replace(from, to);
            let error = parse(&text).unwrap_err();
            assert!(error.to_string().contains("no item with the name \"gone\""), "{error}");
            assert!(hint(error).contains(expected));
        }
    }

    #[test]
    fn rejects_server_that_is_not_verified() {
        let text = KUBECONFIG.replace("USER", "{token: t}");
        for (from, to, problem) in [
            ("certificate-authority: ca.pem, ", "", "certificate-authority: is missing"),
            (
                "certificate-authority: ca.pem",
                "insecure-skip-tls-verify: true, certificate-authority: ca.pem",
                "insecure-skip-tls-verify: \"true\": is not supported",
            ),
            ("current-context: node", "current-context: gone", "no item with the name \"gone\""),
            ("current-context: node", "", "current-context: is missing"),
        ] {
            let error = parse(&text.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn service_account_is_used_if_it_is_mounted() {
        let folder = std::env::temp_dir().join(format!("underpass-sa-{}", std::process::id()));
        assert_eq!(ClusterAccess::of_folder(&folder, "10.96.0.1", "443"), None);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("token"), "t").unwrap();
        let access = ClusterAccess::of_folder(&folder, "fd00::1", "443").unwrap();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(access.server, "https://[fd00::1]:443");
        assert_eq!(access.roots, ClusterDocument::File(folder.join("ca.crt")));
    }
}

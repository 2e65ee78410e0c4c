//! A Unix socket on which this process accepts trusted local processes: for take-overs, for
//! administration, and for the CNI plugin.
//!
//! It has a file, because every process of the network namespace, the workload included, could
//! connect to an abstract name. A take-over hands over the sockets too: the new process has no
//! privilege to create them.

use std::borrow::Cow;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};

use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use underpass_config::{Broker, Hint, LocalSocket, Settings};
use underpass_interception::{Handover, ProxyUser};

/// The folder of the default sockets.
pub(crate) const FOLDER: &str = "/run/underpass";

/// The purpose of a socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SocketPurpose {
    /// The first part of the name of the default socket.
    name: &'static str,
    /// The setting of its path.
    key: &'static str,
}

/// Requests of another process to take over.
pub(crate) const TAKE_OVER: SocketPurpose =
    SocketPurpose { name: "take-over", key: "take_over.socket" };
/// Administration of the running proxy.
pub(crate) const ADMIN: SocketPurpose = SocketPurpose { name: "admin", key: "admin.socket" };

/// Why a socket with a configured path cannot be created.
#[derive(Debug, Error)]
pub(crate) enum SocketError {
    #[error("cannot read the network namespace of this process from /proc")]
    Namespace(#[source] io::Error),
    #[error("cannot listen at {} ({key})", socket.display())]
    Listen { key: &'static str, socket: PathBuf, source: io::Error },
}

impl Hint for SocketError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Namespace(_) => None,
            Self::Listen { key, .. } => Some(format!("correct {key}").into()),
        }
    }
}

/// A listening socket and its path.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Whether to remove the file on drop.
    is_owner: bool,
}

impl ControlSocket {
    /// Listens at `path`, replacing an earlier listener. `user` is the user that the process
    /// changes to later.
    pub(crate) fn bind(path: &Path, user: Option<ProxyUser>) -> io::Result<Self> {
        if path.parent() == Some(Path::new(FOLDER)) {
            create_folder(user)?;
        }
        let new = path.with_extension(format!("{}.new", std::process::id()));
        remove(&new)?;
        let listener = UnixListener::bind(&new)?;
        fs::set_permissions(&new, Permissions::from_mode(0o600))?;
        fs::rename(&new, path)?;
        Ok(Self { listener, path: path.to_owned(), is_owner: true })
    }

    /// Listens at the path of `setting`; `None` if that is off. Uses the socket that was `handed`
    /// over if its path still applies. With `auto`, a failure is only logged, and so is another
    /// process that listens there.
    ///
    /// # Errors
    ///
    /// The socket cannot be created at the given path.
    pub(crate) async fn bind_configured(
        settings: &Settings,
        setting: &LocalSocket,
        purpose: SocketPurpose,
        handed: Option<Self>,
    ) -> Result<Option<Self>, SocketError> {
        let Some(socket) = path(setting, purpose).map_err(SocketError::Namespace)? else {
            return Ok(None);
        };
        if let Some(handed) = handed
            && handed.path == socket
        {
            return Ok(Some(handed));
        }
        let SocketPurpose { name, key } = purpose;
        let is_auto = *setting == LocalSocket::Auto;
        if is_auto && is_listening(&socket).await {
            tracing::info!(
                socket = %socket.display(), key,
                "no {name} socket: another process listens there"
            );
            return Ok(None);
        }
        // A broker keeps its user.
        let user = match settings.privileges.broker {
            Broker::Auto => None,
            Broker::Off => ProxyUser::required(&settings.interception).ok().flatten(),
        };
        match Self::bind(&socket, user) {
            Ok(bound) => Ok(Some(bound)),
            Err(error) if is_auto => {
                tracing::info!(%error, socket = %socket.display(), key, "cannot create the {name} socket");
                Ok(None)
            }
            Err(source) => Err(SocketError::Listen { key, socket, source }),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for a trusted process to connect. Cancel-safe.
    pub(crate) async fn accept(&self) -> io::Result<Handover> {
        Ok(Handover::new(self.listener.accept().await?.0))
    }

    /// A descriptor of the socket, to hand over.
    ///
    /// # Errors
    ///
    /// The process has no free one.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.listener.as_fd().try_clone_to_owned()
    }

    /// Listens on the socket of another process, which still owns the file.
    pub(crate) fn share(path: &Path, socket: OwnedFd) -> io::Result<Self> {
        let listener = StdUnixListener::from(socket);
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        Ok(Self { listener, path: path.to_owned(), is_owner: false })
    }

    /// Sets whether this process removes the file at its end.
    pub(crate) fn own(&mut self, is_owner: bool) {
        self.is_owner = is_owner;
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if self.is_owner
            && let Err(error) = remove(&self.path)
        {
            // Another user owns the folder. The leftover is harmless: a new listener replaces it.
            tracing::debug!(%error, socket = %self.path.display(), "cannot remove a socket");
        }
    }
}

/// Creates the folder, owned by the user that the process changes to, so that the process can
/// remove the socket later.
fn create_folder(user: Option<ProxyUser>) -> io::Result<()> {
    match (DirBuilder::new().mode(0o755).create(FOLDER), user) {
        (Ok(()), Some(ProxyUser { uid, gid })) => chown(FOLDER, Some(uid), Some(gid)),
        (Err(error), _) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The path of the socket; `None` if it is off.
pub(crate) fn path(
    setting: &LocalSocket,
    SocketPurpose { name, .. }: SocketPurpose,
) -> io::Result<Option<PathBuf>> {
    match setting {
        LocalSocket::Off => Ok(None),
        LocalSocket::At(path) => Ok(Some(path.clone())),
        // The inode keeps paths apart: several network namespaces may share a file system.
        LocalSocket::Auto => {
            let namespace = super::namespace().map_err(io::Error::other)?;
            Ok(Some(Path::new(FOLDER).join(format!("{name}-{namespace}.sock"))))
        }
    }
}

/// The default sockets for this purpose, except `path`: those of other network namespaces.
pub(crate) fn others(path: &Path, SocketPurpose { name, .. }: SocketPurpose) -> Vec<PathBuf> {
    let prefix = format!("{name}-");
    let is_default = |entry: &PathBuf| {
        let file = entry.file_name().and_then(|name| name.to_str());
        entry != path
            && file.is_some_and(|file| file.starts_with(&prefix) && file.ends_with(".sock"))
    };
    let entries = fs::read_dir(FOLDER).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut others: Vec<_> = entries.filter(is_default).collect();
    others.sort_unstable();
    others
}

/// Whether a process listens at `path`.
pub(super) async fn is_listening(path: &Path) -> bool {
    matches!(connect(path).await, Ok(Some(_)))
}

/// Connects to the running process; `None` if no process listens.
pub(super) async fn connect(path: &Path) -> io::Result<Option<UnixStream>> {
    match UnixStream::connect(path).await {
        Ok(stream) => Ok(Some(stream)),
        // The socket file of a killed process has no listener.
        Err(error)
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

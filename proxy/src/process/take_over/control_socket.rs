//! A Unix socket on which this process accepts trusted local processes: for take-overs, and for the
//! CNI plugin.
//!
//! It has a file, because every process of the network namespace, the workload included, could
//! connect to an abstract name. A take-over hands over the control socket too: the new process has
//! no privilege to create it.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};
use underpass_config::TakeOver;
use underpass_interception::{Handover, ProxyUser};

/// The folder of the default socket.
const FOLDER: &str = "/run/underpass";

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

    /// Waits for a trusted process to connect. Cancel-safe.
    pub(crate) async fn accept(&self) -> io::Result<Handover> {
        Ok(Handover::new(self.listener.accept().await?.0))
    }

    /// A descriptor of the socket, to hand over; `None` if the process has no free one.
    pub(crate) fn descriptor(&self) -> Option<OwnedFd> {
        self.listener.as_fd().try_clone_to_owned().ok()
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

/// The path of the socket; `None` if take-over is off.
pub(super) fn path(settings: &TakeOver) -> io::Result<Option<PathBuf>> {
    match settings {
        TakeOver::Off => Ok(None),
        TakeOver::At(path) => Ok(Some(path.clone())),
        // The inode keeps paths apart: several network namespaces may share a file system.
        TakeOver::Auto => {
            let name = format!("take-over-{}.sock", super::namespace().map_err(io::Error::other)?);
            Ok(Some(Path::new(FOLDER).join(name)))
        }
    }
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

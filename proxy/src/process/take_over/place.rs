//! The Unix socket at which a running process can be asked.
//!
//! It is a file: an abstract name would be open to every process of the network namespace, the proxied workload's first of all.
//! It goes from process to process with the listeners, since a proxy that has given up its privileges could not make another one.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};
use underpass_config::TakeOver;
use underpass_interception::ProxyUser;

/// Where sockets are that no setting names.
const FOLDER: &str = "/run/underpass";

/// A socket that is listened at.
#[derive(Debug)]
pub(crate) struct Place {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Whether the file goes with this.
    owned: bool,
}

impl Place {
    /// Listens at `path`, replacing an earlier listener. `user` is the user that the process
    /// becomes later.
    pub(super) fn make(path: &Path, user: Option<ProxyUser>) -> io::Result<Self> {
        if path.parent() == Some(Path::new(FOLDER)) {
            make_folder(user)?;
        }
        let new = path.with_extension(format!("{}.new", std::process::id()));
        remove(&new)?;
        let listener = UnixListener::bind(&new)?;
        fs::set_permissions(&new, Permissions::from_mode(0o600))?;
        fs::rename(&new, path)?;
        Ok(Self { listener, path: path.to_owned(), owned: true })
    }

    /// Listens where another process does, which still owns it.
    pub(super) fn share(path: &Path, socket: OwnedFd) -> io::Result<Self> {
        let listener = StdUnixListener::from(socket);
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        Ok(Self { listener, path: path.to_owned(), owned: false })
    }

    pub(super) fn own(&mut self, owned: bool) {
        self.owned = owned;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = remove(&self.path)
        {
            // As another user than the one that made it. It is in nobody's way.
            tracing::debug!(%error, socket = %self.path.display(), "cannot remove a socket");
        }
    }
}

/// A new folder belongs to the user that will have to remove the socket from it.
fn make_folder(user: Option<ProxyUser>) -> io::Result<()> {
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

/// Where the socket is, or shall be; `None` if there shall be none.
pub(super) fn path(settings: &TakeOver) -> io::Result<Option<PathBuf>> {
    match settings {
        TakeOver::Off => Ok(None),
        TakeOver::At(path) => Ok(Some(path.clone())),
        // Several namespaces may share a file system, as those of a test do.
        TakeOver::Auto => {
            let name = format!("take-over-{}.sock", super::namespace().map_err(io::Error::other)?);
            Ok(Some(Path::new(FOLDER).join(name)))
        }
    }
}

/// Connects to who listens there; `None` if nobody does.
pub(super) async fn connect(path: &Path) -> io::Result<Option<UnixStream>> {
    match UnixStream::connect(path).await {
        Ok(stream) => Ok(Some(stream)),
        // A file without a listener is what a killed process leaves.
        Err(error)
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

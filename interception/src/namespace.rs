//! Network namespaces: opens, identifies and enters them.
//!
//! In reading order: [`Namespace`] is a handle, [`NamespaceThread`] runs operations in namespaces,
//! and [`Entered`] proves to an operation which namespace it is in. Every function of this crate
//! that acts on a namespace takes an `&Entered`, so that a call in the wrong namespace does not
//! compile.
//!
//! `setup` creates and connects namespaces; `sandbox` allows that without root.

pub(crate) mod host;
pub(crate) mod ipv6;
pub(crate) mod reverse_path;
pub(crate) mod sandbox;
mod secure_path;
mod setup;
mod thread;

use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use crate::error::InterceptionError;

pub use setup::{Endpoint, veth};
pub use thread::{Entered, NamespaceThread};

/// The namespace of the calling thread. `/proc/self` would be that of the process's first thread.
const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// A handle of a network namespace, which keeps the namespace alive. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Namespace(Arc<NamespaceFile>);

#[derive(Debug)]
struct NamespaceFile {
    file: File,
    id: NamespaceId,
    path: PathBuf,
}

/// The identity of a namespace, unique among the existing namespaces (ioctl_ns(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

impl Namespace {
    /// Opens the namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub fn current() -> Result<Self, InterceptionError> {
        let opened = File::open(OWN_NAMESPACE).and_then(|file| {
            // `OWN_NAMESPACE` means the namespace of the thread that opens it. This path means the
            // same namespace in every thread.
            let path = own_descriptor(&file);
            NamespaceFile::new(file, path)
        });
        opened.map(|file| Self(Arc::new(file))).map_err(failed("open", OWN_NAMESPACE.as_ref()))
    }

    /// Opens the namespace with the file `path`: `/run/netns/NAME`, `/proc/PID/ns/net`, or a
    /// container runtime's file.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`], also if the file is not a namespace.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, InterceptionError> {
        let path = path.into();
        let opened = File::open(&path).and_then(|file| NamespaceFile::new(file, path.clone()));
        opened.map(|file| Self(Arc::new(file))).map_err(failed("open", &path))
    }

    /// Uses a descriptor that another process passed.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`], also if the descriptor is not a namespace.
    pub fn from_descriptor(descriptor: OwnedFd) -> Result<Self, InterceptionError> {
        let path = own_descriptor(&descriptor);
        let opened = NamespaceFile::new(File::from(descriptor), path.clone());
        opened.map(|file| Self(Arc::new(file))).map_err(failed("use", &path))
    }

    /// Wraps a file that is not a namespace and cannot be entered, for tests.
    pub(crate) fn fake(file: File) -> io::Result<Self> {
        let id = NamespaceId::of(&file)?;
        Ok(Self(Arc::new(NamespaceFile { file, id, path: "a stand-in".into() })))
    }

    /// The identity of the namespace.
    #[must_use]
    pub fn id(&self) -> NamespaceId {
        self.0.id
    }

    /// A path by which any process can enter the namespace while this handle lives.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }
}

impl NamespaceFile {
    fn new(file: File, path: PathBuf) -> io::Result<Self> {
        // Accept any kind of namespace here: setns(2) checks the kind.
        if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a namespace"));
        }
        let id = NamespaceId::of(&file)?;
        Ok(Self { file, id, path })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

impl NamespaceId {
    fn of(file: &File) -> io::Result<Self> {
        Ok(Self::of_metadata(&file.metadata()?))
    }

    fn of_metadata(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }

    /// The device number of the namespace's file.
    #[must_use]
    pub fn device(self) -> u64 {
        self.device
    }

    /// The inode of the namespace's file, which `ip netns` and `/proc/PID/ns/net` show.
    #[must_use]
    pub fn inode(self) -> u64 {
        self.inode
    }
}

impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.inode)
    }
}

/// A path by which other processes can open a descriptor of this process.
fn own_descriptor(descriptor: &impl AsRawFd) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), descriptor.as_raw_fd()).into()
}

fn failed<E: Into<io::Error>>(
    operation: &'static str,
    namespace: &Path,
) -> impl FnOnce(E) -> InterceptionError {
    let namespace = namespace.display().to_string();
    move |error| InterceptionError::Namespace { operation, namespace, source: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_file_that_is_no_namespace() {
        let error = Namespace::open("/proc/version").expect_err("not a namespace");
        assert!(format!("{:?}", error).contains("not a namespace"), "{error:?}");
    }

    #[test]
    fn rejects_passed_descriptor_that_is_not_a_namespace() {
        let current = Namespace::current().unwrap();
        let passed = current.as_fd().try_clone_to_owned().unwrap();
        let passed = Namespace::from_descriptor(passed).unwrap();
        assert_eq!(passed.id(), current.id());
        assert_eq!(Namespace::open(passed.path()).unwrap().id(), current.id());
        let other = File::open("/proc/version").unwrap();
        let error = Namespace::from_descriptor(other.into()).expect_err("not a namespace");
        assert!(format!("{error:?}").contains("not a namespace"), "{error:?}");
    }

    #[test]
    fn identifies_one_namespace_opened_twice() {
        let (one, two) = (Namespace::current().unwrap(), Namespace::current().unwrap());
        assert_eq!(one.id(), two.id());
        assert!(one.id().to_string().starts_with("net:["));
    }
}

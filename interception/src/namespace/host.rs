//! Detects the host's network namespace, so that rules never capture a whole node by accident.
//!
//! No system call answers this question. [`NamespaceFacts`] contains what /proc and the interfaces
//! show; a pure function decides.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use crate::error::InterceptionError;
use crate::namespace::{Entered, Namespace, NamespaceId, failed};

/// The inode of the initial network namespace, fixed since [`FIXED_SINCE`] (NET_NS_INIT_INO,
/// include/uapi/linux/nsfs.h). All other namespaces have inodes from 0xf0000000 on, also on older
/// kernels.
const INITIAL_NET: u64 = 0xEFFF_FFF9;
/// The first kernel version with a fixed [`INITIAL_NET`]. From this version on, a namespace with
/// another inode is not the host's.
const FIXED_SINCE: (u32, u32) = (6, 18);
/// The inode of the initial user namespace (PROC_USER_INIT_INO, include/linux/proc_ns.h).
pub(super) const INITIAL_USER: u64 = 0xEFFF_FFFD;
/// The inode of the initial PID namespace (PROC_PID_INIT_INO).
const INITIAL_PID: u64 = 0xEFFF_FFFC;

/// Interfaces that container runtimes and CNIs create on a node but not in a pod.
const NODE_INTERFACES: [&str; 4] = ["docker0", "cni0", "cbr0", "flannel.1"];
/// Prefixes of interfaces that exist only on nodes: Calico's links and Docker's bridges.
const NODE_PREFIXES: [&str; 2] = ["cali", "br-"];
/// The number of veth interfaces from which on the namespace counts as a node. A pod has one or
/// two.
const NODE_VETHS: usize = 3;

/// Rejects the host's network namespace, and a namespace that cannot be classified.
pub(crate) fn reject_host(entered: &Entered) -> Result<(), InterceptionError> {
    evidence(entered).map_or(Ok(()), |why| Err(InterceptionError::HostNamespace { why }))
}

/// The reason why this is, or may be, the host's network namespace. `None` if it is not.
pub(crate) fn evidence(entered: &Entered) -> Option<String> {
    match NamespaceFacts::read_from_system(entered) {
        Ok(facts) => facts.host_evidence(),
        Err(error) => Some(format!("/proc does not identify the network namespace: {error}")),
    }
}

/// The network namespaces that do not belong to a pod: those of this process and of process 1, and
/// the kernel's initial one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostNamespaces {
    own: NamespaceId,
    /// The namespace of process 1. `None` if it cannot be read and [`INITIAL_NET`] is fixed, which
    /// identifies the host's namespace without it.
    init: Option<NamespaceId>,
}

impl HostNamespaces {
    /// Reads the namespaces. Call it before the process drops its capabilities.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`] if the host's namespace cannot be identified.
    pub fn read() -> Result<Self, InterceptionError> {
        const INIT: &str = "/proc/1/ns/net";
        let own = Namespace::current()?.id();
        let is_fixed = version(&release()).is_some_and(|kernel| kernel >= FIXED_SINCE);
        match fs::metadata(INIT) {
            Ok(metadata) => Ok(Self { own, init: Some(NamespaceId::of_metadata(&metadata)) }),
            Err(_) if is_fixed => Ok(Self { own, init: None }),
            Err(error) => Err(failed("recognize", INIT.as_ref())(error)),
        }
    }

    /// Describes a namespace that does not belong to a pod. `None` for other namespaces.
    #[must_use]
    pub fn description(&self, namespace: NamespaceId) -> Option<&'static str> {
        if namespace.inode() == INITIAL_NET {
            return Some("the host's own");
        }
        if namespace == self.own {
            return Some("that of underpass itself");
        }
        (Some(namespace) == self.init).then_some("that of process 1")
    }
}

/// Facts about the current namespaces.
#[derive(Debug, Clone)]
struct NamespaceFacts {
    /// The kernel's major and minor version. Zeros if unknown.
    kernel: (u32, u32),
    net: u64,
    user: u64,
    pid: u64,
    /// The network namespace of process 1. `None` if it cannot be read.
    net_of_init: Option<u64>,
    interfaces: Vec<String>,
}

impl NamespaceFacts {
    fn read_from_system(entered: &Entered) -> io::Result<Self> {
        let inode = |path: &str| fs::metadata(path).map(|file| file.ino());
        Ok(Self {
            kernel: version(&release()).unwrap_or_default(),
            net: entered.namespace().id().inode(),
            user: inode("/proc/thread-self/ns/user")?,
            pid: inode("/proc/thread-self/ns/pid")?,
            net_of_init: inode("/proc/1/ns/net").ok(),
            interfaces: interfaces()?,
        })
    }

    /// The reason why this is, or may be, the host's namespace. `None` if it is not.
    fn host_evidence(&self) -> Option<String> {
        if self.net == INITIAL_NET {
            return Some("it is the kernel's initial one".to_owned());
        }
        if self.kernel >= FIXED_SINCE {
            return None;
        }
        if self.user != INITIAL_USER {
            // In a network namespace of another user namespace, the process cannot change the host.
            return None;
        }
        if self.pid == INITIAL_PID {
            return match self.net_of_init {
                Some(init) if init != self.net => None,
                Some(_) => Some("process 1 of the host is in the same one".to_owned()),
                None => Some(
                    "unknown: the process sees the host's processes, but cannot read /proc/1/ns/net"
                        .to_owned(),
                ),
            };
        }
        self.node_interface().map(|name| format!("the interface {name} exists only on nodes"))
    }

    fn node_interface(&self) -> Option<&str> {
        let named = self.interfaces.iter().find(|name| {
            NODE_INTERFACES.contains(&name.as_str())
                || NODE_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        });
        let mut veths = self.interfaces.iter().filter(|name| name.starts_with("veth"));
        named.or_else(|| veths.nth(NODE_VETHS - 1)).map(String::as_str)
    }
}

/// The kernel's release, such as `6.18.44-generic`. Empty if unknown.
pub(crate) fn release() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    text.trim().to_owned()
}

/// Parses the version at the start of a release such as `6.18.44-generic`.
pub(crate) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn interfaces() -> io::Result<Vec<String>> {
    let interfaces = nix::net::if_::if_nameindex()?;
    Ok(interfaces.iter().map(|interface| interface.name().to_string_lossy().into_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process in an ordinary container, on a kernel before 6.18.
    fn container() -> NamespaceFacts {
        NamespaceFacts {
            kernel: (6, 17),
            net: 0xF000_0100,
            user: INITIAL_USER,
            pid: 0xF000_0101,
            net_of_init: Some(0xF000_0100),
            interfaces: vec!["lo".to_owned(), "eth0".to_owned()],
        }
    }

    fn with_interfaces(names: &[&str]) -> NamespaceFacts {
        NamespaceFacts {
            interfaces: names.iter().map(|&name| name.to_owned()).collect(),
            ..container()
        }
    }

    #[test]
    fn detects_initial_namespace_from_container() {
        let why = NamespaceFacts { net: INITIAL_NET, ..container() }.host_evidence();
        assert!(why.is_some_and(|why| why.contains("initial")));
    }

    #[test]
    fn accepts_container_sharing_namespace_with_its_process_1() {
        assert_eq!(container().host_evidence(), None);
    }

    #[test]
    fn fixed_inode_identifies_host_namespace_on_new_kernels() {
        for (release, expected) in
            [("6.18.44-generic", true), ("7.0.1", true), ("6.17.9", false), ("?", false)]
        {
            let facts = NamespaceFacts {
                kernel: version(release).unwrap_or_default(),
                ..with_interfaces(&["docker0"])
            };
            assert_eq!(facts.host_evidence().is_none(), expected, "{release}");
        }
    }

    #[test]
    fn accepts_rootless_namespace_with_any_interfaces() {
        let facts = NamespaceFacts { user: 0xF000_0102, ..with_interfaces(&["docker0"]) };
        assert_eq!(facts.host_evidence(), None);
    }

    #[test]
    fn detects_host_by_namespace_of_process_1() {
        let beside = NamespaceFacts { pid: INITIAL_PID, ..container() };
        assert!(beside.host_evidence().is_some_and(|why| why.contains("process 1")));
        let own = NamespaceFacts { net_of_init: Some(0xF000_0999), ..beside.clone() };
        assert_eq!(own.host_evidence(), None);
        let unreadable = NamespaceFacts { net_of_init: None, ..beside };
        assert!(unreadable.host_evidence().is_some_and(|why| why.contains("unknown")));
    }

    #[test]
    fn detects_host_by_node_interfaces() {
        for name in ["docker0", "cni0", "cbr0", "flannel.1", "cali1a2b", "br-0123"] {
            let why = with_interfaces(&["lo", "eth0", name]).host_evidence();
            assert!(why.is_some_and(|why| why.contains(name)), "{name}");
        }
    }

    #[test]
    fn detects_host_by_many_veths_only() {
        assert_eq!(with_interfaces(&["lo", "veth0", "veth1"]).host_evidence(), None);
        assert!(with_interfaces(&["lo", "veth0", "veth1", "veth2"]).host_evidence().is_some());
    }
}

//! Tells the host's own network namespace from a pod's, so that the rules never catch a whole node
//! unasked.
//!
//! The kernel has no call that answers this. What it shows is gathered in [`Facts`] and judged
//! purely.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use crate::{Entered, InterceptionError};

/// The inode of the initial network namespace, fixed since [`FIXED_SINCE`] (NET_NS_INIT_INO,
/// include/uapi/linux/nsfs.h). Other namespaces begin at 0xf0000000, on older kernels too.
const INITIAL_NET: u64 = 0xEFFF_FFF9;
/// The first kernel, as major and minor, on which a namespace with another inode is not the host's.
const FIXED_SINCE: (u32, u32) = (6, 18);
/// The inode of the initial user namespace (PROC_USER_INIT_INO, include/linux/proc_ns.h).
const INITIAL_USER: u64 = 0xEFFF_FFFD;
/// The inode of the initial PID namespace (PROC_PID_INIT_INO).
const INITIAL_PID: u64 = 0xEFFF_FFFC;

/// What container runtimes and CNIs create on a node, and pods do not have.
const NODE_INTERFACES: [&str; 4] = ["docker0", "cni0", "cbr0", "flannel.1"];
/// The same, as prefixes: Calico's links and Docker's bridges.
const NODE_PREFIXES: [&str; 2] = ["cali", "br-"];
/// Host ends of pods: one or two may be a pod's own, more are a node's.
const MANY_VETHS: usize = 3;

/// Refuses the host's network namespace, and one of which it cannot be told.
pub(crate) fn refuse(entered: &Entered) -> Result<(), InterceptionError> {
    let why = match Facts::gather(entered) {
        Ok(facts) => facts.host(),
        Err(error) => Some(format!("/proc does not tell which namespace this is: {error}")),
    };
    why.map_or(Ok(()), |why| Err(InterceptionError::HostNamespace { why }))
}

/// What the kernel shows of the namespaces that an operation is in.
#[derive(Debug, Clone)]
struct Facts {
    /// The kernel's major and minor version; zeros if it cannot be read.
    kernel: (u32, u32),
    net: u64,
    user: u64,
    pid: u64,
    /// The network namespace of process 1; `None` where it may not be read.
    net_of_init: Option<u64>,
    interfaces: Vec<String>,
}

impl Facts {
    fn gather(entered: &Entered) -> io::Result<Self> {
        let inode = |path: &str| fs::metadata(path).map(|file| file.ino());
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Ok(Self {
            kernel: version(&release).unwrap_or_default(),
            net: entered.namespace().id().inode(),
            user: inode("/proc/thread-self/ns/user")?,
            pid: inode("/proc/thread-self/ns/pid")?,
            net_of_init: inode("/proc/1/ns/net").ok(),
            interfaces: interfaces()?,
        })
    }

    /// Why this is the host's namespace, or may be; `None` if it is not.
    fn host(&self) -> Option<String> {
        if self.net == INITIAL_NET {
            return Some("it is the kernel's initial one".to_owned());
        }
        if self.kernel >= FIXED_SINCE {
            return None;
        }
        if self.user != INITIAL_USER {
            // Whose network namespace is another user namespace's, has no power over the host's.
            return None;
        }
        if self.pid == INITIAL_PID {
            return match self.net_of_init {
                Some(init) if init != self.net => None,
                Some(_) => Some("process 1 of the host has the same".to_owned()),
                None => Some(
                    "cannot tell: the process sees the host's processes, but may not read /proc/1/ns/net"
                        .to_owned(),
                ),
            };
        }
        self.node_interface().map(|name| format!("the interface {name} is one of a node"))
    }

    fn node_interface(&self) -> Option<&str> {
        let named = self.interfaces.iter().find(|name| {
            NODE_INTERFACES.contains(&name.as_str())
                || NODE_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        });
        let mut veths = self.interfaces.iter().filter(|name| name.starts_with("veth"));
        named.or_else(|| veths.nth(MANY_VETHS - 1)).map(String::as_str)
    }
}

/// The numbers that a release such as `6.18.44-generic` begins with.
fn version(release: &str) -> Option<(u32, u32)> {
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

    /// A process in an ordinary container on a kernel before 6.18.
    fn container() -> Facts {
        Facts {
            kernel: (6, 17),
            net: 0xF000_0100,
            user: INITIAL_USER,
            pid: 0xF000_0101,
            net_of_init: Some(0xF000_0100),
            interfaces: vec!["lo".to_owned(), "eth0".to_owned()],
        }
    }

    fn with_interfaces(names: &[&str]) -> Facts {
        Facts { interfaces: names.iter().map(|&name| name.to_owned()).collect(), ..container() }
    }

    #[test]
    fn the_initial_namespace_is_the_host_even_from_a_container() {
        let why = Facts { net: INITIAL_NET, ..container() }.host();
        assert!(why.is_some_and(|why| why.contains("initial")));
    }

    #[test]
    fn a_container_is_not_the_host_though_its_process_1_is_in_the_same_namespace() {
        assert_eq!(container().host(), None);
    }

    #[test]
    fn a_kernel_with_a_fixed_inode_needs_no_other_sign() {
        for (release, told) in
            [("6.18.44-generic", true), ("7.0.1", true), ("6.17.9", false), ("?", false)]
        {
            let facts = Facts {
                kernel: version(release).unwrap_or_default(),
                ..with_interfaces(&["docker0"])
            };
            assert_eq!(facts.host().is_none(), told, "{release}");
        }
    }

    #[test]
    fn a_rootless_namespace_is_not_the_host_whatever_its_interfaces_are() {
        let facts = Facts { user: 0xF000_0102, ..with_interfaces(&["docker0"]) };
        assert_eq!(facts.host(), None);
    }

    #[test]
    fn a_process_beside_the_hosts_is_told_by_process_1() {
        let beside = Facts { pid: INITIAL_PID, ..container() };
        assert!(beside.host().is_some_and(|why| why.contains("process 1")));
        let own = Facts { net_of_init: Some(0xF000_0999), ..beside.clone() };
        assert_eq!(own.host(), None);
        let unreadable = Facts { net_of_init: None, ..beside };
        assert!(unreadable.host().is_some_and(|why| why.contains("cannot tell")));
    }

    #[test]
    fn interfaces_of_a_node_give_the_host_away() {
        for name in ["docker0", "cni0", "cbr0", "flannel.1", "cali1a2b", "br-0123"] {
            let why = with_interfaces(&["lo", "eth0", name]).host();
            assert!(why.is_some_and(|why| why.contains(name)), "{name}");
        }
    }

    #[test]
    fn veths_are_a_nodes_only_in_bulk() {
        assert_eq!(with_interfaces(&["lo", "veth0", "veth1"]).host(), None);
        assert!(with_interfaces(&["lo", "veth0", "veth1", "veth2"]).host().is_some());
    }
}

//! Pods: named network namespaces, connected with each other. They are deleted when dropped.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use tokio::process::{Child, Command};
use underpass_interception::{Endpoint, IpNet, Namespace, PacketCapture, veth};

use crate::or_fail::OrFail;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The loopback address.
    #[must_use]
    pub fn loopback(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }

    /// The id of a rule's variant for this family.
    #[must_use]
    pub fn rule(self, id: &str) -> String {
        match self {
            Self::V4 => id.to_owned(),
            Self::V6 => format!("{id}-v6"),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// The environment of one trial: unique names, networks and a folder.
#[derive(Debug)]
pub struct World {
    id: u32,
    wires: u8,
    folder: PathBuf,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// An empty world. Its folder is in the sandbox's `/run`.
    #[must_use]
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = NEXT.fetch_add(1, Relaxed);
        let folder = PathBuf::from(format!("/run/underpass-tests/{id}"));
        fs::create_dir_all(&folder)
            .or_fail("make a folder in /run: is the process in its sandbox?");
        Self { id, wires: 0, folder }
    }

    /// The folder for files of the trial.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Creates a pod without connections.
    pub async fn pod(&self, name: &str) -> Pod {
        let namespace =
            Namespace::create_named(&format!("w{}-{name}", self.id)).or_fail("make a pod");
        namespace.set_loopback_up().await.or_fail("set up a pod");
        Pod {
            name: name.to_owned(),
            folder: self.folder.clone(),
            namespace: Some(namespace),
            addresses: Vec::new(),
        }
    }

    /// Connects two pods by interfaces `ethN` with the addresses 10.S.0.1 and fd00:S::1, and
    /// 10.S.0.2 and fd00:S::2. N counts the links of a pod, S those of the world. The first link of
    /// a pod is its default route.
    pub async fn wire(&mut self, a: &mut Pod, b: &mut Pod) {
        self.wires += 1;
        let subnet = self.wires;
        let ip = |host: u8| Addresses {
            v4: Ipv4Addr::new(10, subnet, 0, host),
            v6: Ipv6Addr::new(0xfd00, subnet.into(), 0, 0, 0, 0, 0, host.into()),
        };
        let (ip_a, ip_b) = (ip(1), ip(2));
        let (networks_a, networks_b) = (ip_a.networks(), ip_b.networks());
        let (name_a, name_b) = (a.next_interface(), b.next_interface());
        let wired = veth(&a.end(&name_a, &networks_a), &b.end(&name_b, &networks_b)).await;
        wired.or_fail("connect two pods");
        a.addresses.push(ip_a);
        b.addresses.push(ip_b);
    }
}

/// The addresses of a pod on one of its links.
#[derive(Debug, Clone, Copy)]
struct Addresses {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Addresses {
    fn networks(self) -> [IpNet; 2] {
        [IpNet::new_assert(self.v4.into(), 24), IpNet::new_assert(self.v6.into(), 64)]
    }
}

/// A named network namespace. Dropping it removes the name; the namespace ends with its last user.
#[derive(Debug)]
pub struct Pod {
    name: String,
    folder: PathBuf,
    namespace: Option<Namespace>,
    addresses: Vec<Addresses>,
}

impl Pod {
    /// The pod's name within its world.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder for files of the pod's world.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The network namespace of the pod.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        self.namespace.as_ref().expect("only drop takes it")
    }

    /// The address on the pod's first link.
    #[must_use]
    pub fn ip(&self, family: Family) -> IpAddr {
        let addresses = self.addresses.first().expect("the pod is not wired");
        match family {
            Family::V4 => addresses.v4.into(),
            Family::V6 => addresses.v6.into(),
        }
    }

    /// All addresses of both families.
    #[must_use]
    pub fn ips(&self) -> Vec<IpAddr> {
        self.addresses.iter().flat_map(|ips| [IpAddr::from(ips.v4), ips.v6.into()]).collect()
    }

    /// The facts about this pod in YAML, as `underpass node` reads them from a file. The uid, the
    /// workload and the service account are the pod's name. `more` are further lines.
    #[must_use]
    pub fn facts(&self, more: &str) -> String {
        let (name, netns) = (self.name(), self.namespace().path());
        let ips: Vec<_> = self.ips().iter().map(|ip| format!("\"{ip}\"")).collect();
        let ips = ips.join(", ");
        format!(
            "uid: {name}\nnetns: {netns:?}\nips: [{ips}]\n\
             workload: {{name: {name}, namespace: default, serviceAccount: {name}}}\n{more}"
        )
    }

    /// Writes [`Pod::facts`] to a file in `folder`. Replaces it atomically, because a daemon may
    /// watch the folder.
    pub fn write_facts(&self, folder: &Path, more: &str) {
        let file = folder.join(format!("{}.yaml", self.name));
        let new = file.with_extension("new");
        fs::write(&new, self.facts(more)).or_fail("write the file of a pod");
        fs::rename(&new, &file).or_fail("write the file of a pod");
    }

    /// A socket address with [`Pod::ip`].
    #[must_use]
    pub fn at(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(family), port)
    }

    /// Runs code inside the pod on a new thread. Sockets and processes that it creates belong to
    /// the pod. It must not panic, because the message would be lost.
    pub fn run<T: Send>(&self, code: impl FnOnce() -> T + Send) -> T {
        self.namespace().run(code).or_fail("run code in a pod")
    }

    /// Starts a process inside the pod, on the caller's runtime.
    pub fn spawn(&self, command: &mut Command) -> std::io::Result<Child> {
        let runtime = tokio::runtime::Handle::current();
        self.run(|| {
            let _entered = runtime.enter();
            command.spawn()
        })
    }

    /// Sets a sysctl of the pod's network: `net/ipv6/conf/all/disable_ipv6`.
    pub fn sysctl(&self, key: &str, value: &str) {
        let file = Path::new("/proc/sys").join(key);
        self.run(|| fs::write(&file, value)).or_fail(format!("write {}", file.display()));
    }

    /// Starts a packet capture on the pod's first link.
    #[must_use]
    pub fn capture(&self) -> PacketCapture {
        self.run(|| PacketCapture::open("eth0")).or_fail("capture packets")
    }

    fn next_interface(&self) -> String {
        format!("eth{}", self.addresses.len())
    }

    fn end<'a>(&'a self, interface: &'a str, addresses: &'a [IpNet]) -> Endpoint<'a> {
        let default_route = self.addresses.is_empty();
        Endpoint { namespace: self.namespace(), interface, addresses, default_route }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // A namespace that cannot be deleted ends with the sandbox.
        self.namespace.take().map(Namespace::delete);
    }
}

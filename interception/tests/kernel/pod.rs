//! Helpers of kernel tests: a pod and a remote host in connected namespaces.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use libtest_mimic::Failed;
use underpass_config::{InterceptionSettings, Sources};
use underpass_interception::{
    Endpoint, Interception, KUBELET_PROBE_V4, KUBELET_PROBE_V6, Namespace, NamespaceAccess, Ports,
    veth,
};

/// The timeout of every wait. Reaching it is a failure.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);
pub(crate) const PORTS: Ports = Ports {
    outbound: 15001,
    inbound: 15006,
    hbone: 15008,
    dns: 15053,
    services: Ports::DEFAULT_SERVICES,
};

/// An address family, with the address of each participant.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Family {
    pub(crate) pod: IpAddr,
    pub(crate) remote: IpAddr,
    pub(crate) loopback: IpAddr,
    pub(crate) probe: IpAddr,
    suffix: &'static str,
}

pub(crate) const V4: Family = Family {
    pod: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
    remote: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)),
    loopback: IpAddr::V4(Ipv4Addr::LOCALHOST),
    probe: IpAddr::V4(KUBELET_PROBE_V4),
    suffix: "",
};
pub(crate) const V6: Family = Family {
    pod: IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1)),
    remote: IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2)),
    loopback: IpAddr::V6(Ipv6Addr::LOCALHOST),
    probe: IpAddr::V6(KUBELET_PROBE_V6),
    suffix: "-v6",
};

impl Family {
    /// The id of the rule's variant for this family.
    pub(crate) fn rule(self, id: &str) -> String {
        format!("{id}{}", self.suffix)
    }
}

/// A pod that is connected with a remote namespace.
pub(crate) struct ConnectedPods {
    pub(crate) pod: Namespace,
    pub(crate) remote: Namespace,
}

impl ConnectedPods {
    /// Creates the namespaces. `name` distinguishes those of concurrent tests.
    pub(crate) fn new(name: &str) -> Result<Self, Failed> {
        let pod = Namespace::create_named(&format!("{name}-pod"))?;
        let remote = Namespace::create_named(&format!("{name}-remote"))?;
        let pod_addresses = ["10.0.0.1/24".parse()?, "fd00::1/64".parse()?];
        let remote_addresses = [
            "10.0.0.2/24".parse()?,
            "fd00::2/64".parse()?,
            format!("{KUBELET_PROBE_V4}/32").parse()?,
            format!("{KUBELET_PROBE_V6}/128").parse()?,
        ];
        let ends = [(&pod, &pod_addresses[..]), (&remote, &remote_addresses[..])];
        let [a, b] = ends.map(|(namespace, addresses)| Endpoint {
            namespace,
            interface: "eth0",
            addresses,
            default_route: true,
        });
        runtime()?.block_on(veth(&a, &b))?;
        Ok(Self { pod, remote })
    }
}

/// Creates a namespace with only a loopback interface.
pub(crate) fn isolated_namespace(name: &str) -> Result<Namespace, Failed> {
    let namespace = Namespace::create_named(name)?;
    runtime()?.block_on(namespace.set_loopback_up())?;
    Ok(namespace)
}

pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failed> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Runs async code inside a namespace.
pub(crate) fn inside<T: Send>(
    namespace: &Namespace,
    code: impl AsyncFnOnce() -> Result<T, Failed> + Send,
) -> Result<T, Failed> {
    namespace.run(|| runtime()?.block_on(code()))?
}

/// Runs a program in a namespace. Returns its output.
pub(crate) fn command(namespace: &Namespace, line: &str) -> Result<String, Failed> {
    let mut words = line.split_whitespace();
    let program = words.next().ok_or("a program")?;
    let output = namespace.run(|| Command::new(program).args(words).output())?.map_err(|error| {
        format!("{program} does not run ({error}): these tests need the packages nftables and iproute2")
    })?;
    if !output.status.success() {
        return Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Parses settings of the section `interception`: `profile=sidecar ipv6=bypass`.
#[expect(clippy::expect_used, reason = "the settings of a test are right")]
pub(crate) fn settings(assignments: &str) -> InterceptionSettings {
    let flags = assignments.split_whitespace().map(|text| format!("interception.{text}")).collect();
    let sources = Sources { file: None, environment: Vec::new(), flags };
    sources.load().expect("the settings are right").interception
}

/// Prepares interception in the current namespace.
pub(crate) async fn prepare(assignments: &str) -> Result<Interception, Failed> {
    let prepared =
        Interception::prepare(&NamespaceAccess::current()?, &settings(assignments), PORTS).await?;
    prepared.ok_or_else(|| "the profile has rules".into())
}

pub(crate) fn socket_address(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

/// Compares two values. Fails without a panic, because the message of a panic in a namespace is
/// lost.
pub(crate) fn equal<T: PartialEq + std::fmt::Debug>(
    what: &str,
    found: T,
    expected: T,
) -> Result<(), Failed> {
    if found == expected {
        return Ok(());
    }
    Err(format!("{what}: found {found:?}, expected {expected:?}").into())
}

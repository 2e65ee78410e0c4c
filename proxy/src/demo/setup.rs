//! Namespaces, links, identities and processes that both demonstrations set up.

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use underpass_config::{SpiffeError, SpiffeId, TrustDomain};
use underpass_interception::{Endpoint, IpNet, Namespace, PacketCapture, Sandbox, veth};

use super::{DemoError, STEP_TIMEOUT};
use crate::spawn::ChildProxy;

pub(super) const HTTP_PORT: u16 = 8080;
pub(super) const HBONE_PORT: u16 = 15008;
pub(super) const METRICS_PORT: u16 = 15020;

/// The name of a folder in the sandbox's temporary file system.
pub(super) const FOLDER: &str = "underpass-demo";

pub(super) fn create_namespace(name: &str) -> Result<Namespace, DemoError> {
    Namespace::create_named(name).map_err(DemoError::namespace("make a namespace"))
}

/// Connects two interfaces, each of which may have an address.
pub(super) async fn connect(
    a: (&Namespace, &str, Option<Ipv4Addr>),
    b: (&Namespace, &str, Option<Ipv4Addr>),
) -> Result<(), DemoError> {
    let addresses =
        [a.2, b.2].map(|address| address.map(|address| IpNet::new_assert(IpAddr::V4(address), 24)));
    let [for_a, for_b] = &addresses;
    let end = |(namespace, interface, _), addresses| Endpoint {
        namespace,
        interface,
        addresses,
        default_route: false,
    };
    veth(&end(a, for_a.as_slice()), &end(b, for_b.as_slice()))
        .await
        .map_err(DemoError::namespace("connect the namespaces"))
}

/// Starts a packet capture at an interface.
pub(super) fn capture(namespace: &Namespace, interface: &str) -> Result<PacketCapture, DemoError> {
    let capture = namespace
        .run(|| PacketCapture::open(interface))
        .map_err(DemoError::namespace("enter a namespace"))?;
    capture.map_err(DemoError::io("capture the wire"))
}

pub(super) fn trust_domain() -> Result<TrustDomain, DemoError> {
    "cluster.local".parse().map_err(|error: SpiffeError| {
        DemoError::io("name the trust domain")(io::Error::other(error))
    })
}

/// The identity of a workload in the namespace `demo`.
pub(super) fn identity(workload: &str) -> Result<SpiffeId, DemoError> {
    SpiffeId::istio(trust_domain()?, "demo", workload)
        .map_err(|error| DemoError::io("name a workload")(io::Error::other(error)))
}

/// Starts `underpass COMMAND ARGUMENTS…` in a namespace, and waits until it is ready.
pub(super) async fn start_proxy(
    namespace: &Namespace,
    subject: &'static str,
    command: &str,
    arguments: &[OsString],
) -> Result<ChildProxy, DemoError> {
    let program = std::env::current_exe().map_err(DemoError::io("find this program"))?;
    ChildProxy::start(&program, namespace, command, arguments, STEP_TIMEOUT)
        .await
        .map_err(|source| DemoError::Proxy { subject, source })
}

/// Stops a process; kills it on timeout.
pub(super) async fn stop(proxy: &mut ChildProxy) {
    tokio::time::timeout(STEP_TIMEOUT, proxy.stop()).await.ok();
}

/// A token that is unique, but not secret: a minimal image has no /dev/urandom.
pub(super) fn token() -> String {
    format!("{:032x}", fastrand::u128(..))
}

/// The start of a command line that enters a namespace of the demonstration from another terminal.
pub(super) fn enter_command(sandbox: Sandbox, namespace: &Namespace) -> String {
    // A process cannot enter the user namespace that it is already in.
    let user = match sandbox {
        Sandbox::OfRoot => "",
        Sandbox::InUserNamespace => " -U --preserve-credentials",
    };
    // The namespaces' files exist only in the sandbox's mount namespace, so enter that one first.
    format!(
        "nsenter -t {}{user} -m nsenter --net={}",
        std::process::id(),
        namespace.path().display()
    )
}

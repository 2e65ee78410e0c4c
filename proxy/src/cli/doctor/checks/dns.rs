//! DNS: the servers of resolv.conf, and the names that the configuration contains.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{FutureExt as _, join_all};
use tokio::time::timeout;
use underpass_config::{Dns, IdentitySettings, Settings};
use underpass_hbone::without_brackets;

use crate::cli::doctor::check::{Category, Check, Finding, Info, Outcome, not_applicable};
use crate::cli::doctor::subject::Subject;
use crate::dns::exchange::SocketExchange;
use crate::dns::lookup::HostLookup;
use crate::dns::probe::probe_servers;
use crate::dns::resolv_file::ResolvFile;
use crate::dns::upstream::Upstream;
use crate::error::chain;
use crate::limits::Limits;
use crate::node::sockets::PodSockets;

/// Timeout for a server, and for a name.
const SERVER_TIMEOUT: Duration = Duration::from_secs(3);
const NAME_TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum number of looked up hostnames of workloads.
const MAX_NAMES: usize = 8;

/// The servers of resolv.conf.
pub(super) struct Servers;

impl Check for Servers {
    fn info(&self) -> Info {
        Info::host("dns-servers", Category::Dns)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        async move {
            let file = ResolvFile::new(&subject.settings.dns.resolv_conf);
            let probed = probe_servers(&exchange(subject), &file, SERVER_TIMEOUT).await;
            let path = subject.settings.dns.resolv_conf.display();
            if probed.is_empty() {
                return Some(
                    Finding::warning(format!("{path} names no server: names outside of it and /etc/hosts have no address"))
                        .command(format!("cat {path}")),
                );
            }
            let servers = probed.len();
            let silent: Vec<_> = probed
                .iter()
                .filter_map(|(server, answer)| Some((server.ip(), answer.as_ref().err()?)))
                .collect();
            let Some((first, _)) = silent.first() else {
                return Some(Finding::ok(format!("the servers in {path} answer: {servers}")));
            };
            let details = silent.iter().map(|(server, error)| format!("{server}: {error}"));
            let message = format!("servers in {path} that do not answer: {} of {servers}", silent.len());
            let finding = match silent.len() == servers && needs_servers(subject) {
                true => Finding::failure(message),
                false => Finding::warning(message),
            };
            let mut command = format!("dig @{first} localhost");
            // The rules redirect the query to the DNS proxy, which ignores the addressed server.
            if subject.settings.interception.dns == Dns::Capture && !subject.is_node() {
                command += "  # in a network namespace without rules of underpass";
            }
            Some(
                finding
                    .details(details)
                    .hint("correct the file (dns.resolv_conf), or check the server and firewalls on port 53")
                    .command(command),
            )
        }
        .boxed_local()
    }
}

fn exchange(subject: &Subject) -> SocketExchange {
    let limits = Limits::new(&subject.settings.limits, 1);
    let (network, descriptors) = (subject.network.clone(), limits.descriptors.clone());
    let sockets = PodSockets::new(network, subject.sockets(), descriptors);
    SocketExchange { sockets, limits: limits.pod() }
}

/// The names in the settings, and hostnames of workloads.
pub(super) struct Names;

impl Check for Names {
    fn info(&self) -> Info {
        Info::proxy("dns-names", Category::DnsNames)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let names = all_names(subject);
        if names.is_empty() {
            return not_applicable();
        }
        async move {
            let file = Arc::new(ResolvFile::new(&subject.settings.dns.resolv_conf));
            let lookup = HostLookup::new(file, Upstream::new(Arc::new(exchange(subject))), false);
            let failures = join_all(names.iter().map(|name| failure(&lookup, name))).await;
            let failed = names.iter().zip(failures);
            let failed: Vec<_> = failed.filter_map(|(name, error)| Some((name, error?))).collect();
            let Some((first, _)) = failed.first() else {
                let list = names.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                return Some(Finding::ok(format!("the names in use have addresses: {list}")));
            };
            let command = format!("getent ahosts {first}");
            Some(
                Finding::failure(format!("names without an address: {}", failed.len()))
                    .details(failed.into_iter().map(|(_, error)| error))
                    .hint("check the names in the settings and in the mesh, and the servers (dns-servers)")
                    .command(command),
            )
        }
        .boxed_local()
    }
}

/// Whether the proxy fails without a server: for its own names, or for those of the workload.
fn needs_servers(subject: &Subject) -> bool {
    subject.settings.interception.dns == Dns::Capture || !all_names(subject).is_empty()
}

/// The names in the settings, and hostnames of workloads.
fn all_names(subject: &Subject) -> BTreeSet<String> {
    let mut names = names(&subject.settings);
    let workloads = subject.configuration.mesh.workloads();
    let hostnames = workloads.iter().map(|workload| &*workload.hostname);
    let hostnames = hostnames.filter(|name| !name.is_empty()).take(MAX_NAMES);
    names.extend(hostnames.map(str::to_owned));
    names
}

/// The host names of the control plane and of the CA.
fn names(settings: &Settings) -> BTreeSet<String> {
    let ca = match &settings.identity {
        Some(IdentitySettings::IstioCa(ca)) => Some(&ca.address),
        _ => None,
    };
    let addresses = ca.into_iter().chain(settings.xds.as_ref().map(|xds| &xds.address));
    let host = |address: &String| {
        let uri = address.parse::<http::Uri>().ok()?;
        let host = without_brackets(uri.host()?).to_owned();
        host.parse::<std::net::IpAddr>().is_err().then_some(host)
    };
    addresses.filter_map(host).collect()
}

/// The reason why a name has no address; `None` if it has one.
async fn failure(lookup: &HostLookup, name: &str) -> Option<String> {
    match timeout(NAME_TIMEOUT, lookup.addresses(name)).await {
        Ok(Ok(_)) => None,
        Ok(Err(error)) => Some(format!("{name}: {}", chain(&error))),
        Err(_) => Some(format!("{name}: no answer within {} s", NAME_TIMEOUT.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::Sources;

    use super::*;

    #[test]
    fn names_are_those_of_control_plane_and_authority() {
        let of = |flags: &[&str]| {
            let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
            let settings = Sources { flags, ..Sources::default() }.load().unwrap();
            names(&settings).into_iter().collect::<Vec<_>>().join(" ")
        };
        let xds = ["mesh.xds.address=https://istiod.test:15012", "mesh.xds.roots=/r"];
        assert_eq!(of(&xds), "istiod.test");
        let address = ["mesh.xds.address=https://[fd00::1]:15012", "mesh.xds.roots=/r"];
        assert_eq!(of(&address), "");
        assert_eq!(of(&[]), "");
    }
}

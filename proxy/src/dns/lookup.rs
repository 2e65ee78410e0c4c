//! Looks up the addresses of a hostname for the proxy itself, with the servers of resolv.conf(5).

use std::fs;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::message::{self, CLASS_IN, Layout, Query, RD, RecordType, ResponseCode, is_truncated};
use super::resolv_conf::ResolvConf;
use super::resolv_file::ResolvFile;
use super::response::Transport;
use super::upstream::{Upstream, UpstreamError};
use super::{hosts, name};

/// Names that the host itself defines.
const HOSTS: &str = "/etc/hosts";
/// The lifetime of addresses that have no TTL.
const LOCAL_TTL: Duration = Duration::from_secs(5);

/// Why a hostname has no address.
#[derive(Debug, Clone, Error)]
pub(crate) enum HostLookupError {
    #[error("it is not a domain name")]
    NotADomainName,
    #[error("it does not exist, or has no address")]
    NotFound,
    #[error("the server reports {}", .0.as_str())]
    Response(ResponseCode),
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
}

/// The addresses of a hostname, and how long they may be used.
pub(crate) type Addresses = (Arc<[IpAddr]>, Duration);

/// Looks up hostnames for the proxy itself.
#[derive(Debug)]
pub(crate) struct HostLookup {
    file: Arc<ResolvFile>,
    upstream: Upstream,
    /// Whether servers may be asked over TCP.
    has_tcp: bool,
}

impl HostLookup {
    pub(crate) fn new(file: Arc<ResolvFile>, upstream: Upstream, has_tcp: bool) -> Self {
        Self { file, upstream, has_tcp }
    }

    /// The addresses of `hostname`: an address itself, a name in /etc/hosts, or a name that a
    /// server knows, also with the search path.
    ///
    /// # Errors
    ///
    /// There is none, or no server has answered.
    pub(crate) async fn addresses(&self, hostname: &str) -> Result<Addresses, HostLookupError> {
        if let Ok(address) = hostname.parse::<IpAddr>() {
            return Ok(([address.to_canonical()].into(), LOCAL_TTL));
        }
        // Without the file, there are no such names. A comment need not be UTF-8.
        let hosts = fs::read(HOSTS).unwrap_or_default();
        let local = hosts::addresses(&String::from_utf8_lossy(&hosts), hostname);
        if !local.is_empty() {
            return Ok((local.into(), LOCAL_TTL));
        }
        let settings = self.file.current();
        for name in candidates(hostname, &settings.search) {
            match self.of_name(&settings, &name).await {
                Err(HostLookupError::NotFound) => {}
                outcome => return outcome,
            }
        }
        Err(HostLookupError::NotFound)
    }

    /// The addresses of both families. Those of one suffice.
    async fn of_name(
        &self,
        settings: &ResolvConf,
        name: &str,
    ) -> Result<Addresses, HostLookupError> {
        let [v4, v6] = [RecordType::A, RecordType::AAAA];
        let found =
            tokio::join!(self.of_type(settings, name, v4), self.of_type(settings, name, v6));
        match found {
            (Ok((v4, one)), Ok((v6, other))) => {
                Ok((v4.iter().chain(&*v6).copied().collect(), one.min(other)))
            }
            (Ok(found), Err(_)) | (Err(_), Ok(found)) => Ok(found),
            (Err(HostLookupError::NotFound), Err(error)) | (Err(error), Err(_)) => Err(error),
        }
    }

    async fn of_type(
        &self,
        settings: &ResolvConf,
        name: &str,
        kind: RecordType,
    ) -> Result<Addresses, HostLookupError> {
        let message = query(name, kind).ok_or(HostLookupError::NotADomainName)?;
        let query = Query::read(&message).map_err(|_| HostLookupError::NotADomainName)?;
        let (query, message) = (Arc::new(query), Arc::from(message));
        let is_tcp = settings.use_tcp && self.has_tcp;
        let first = if is_tcp { Transport::Tcp } else { Transport::Udp };
        let mut response = self.upstream.ask(settings, first, &query, &message).await?;
        // Without TCP, the addresses in the truncated response suffice.
        if is_truncated(&response) && self.has_tcp && first == Transport::Udp {
            response = self.upstream.ask(settings, Transport::Tcp, &query, &message).await?;
        }
        let code = message::code(&response);
        match code {
            ResponseCode::NO_ERROR => {}
            ResponseCode::NAME_ERROR => return Err(HostLookupError::NotFound),
            _ => return Err(HostLookupError::Response(code)),
        }
        let layout = Layout::read(&response).ok_or(HostLookupError::Response(code))?;
        let addresses = layout.addresses(&response);
        if addresses.is_empty() {
            return Err(HostLookupError::NotFound);
        }
        // A truncated response must not be cached (RFC 2181 section 9).
        let ttls = layout.answers.iter().map(|answer| answer.ttl);
        let ttl = if is_truncated(&response) { None } else { ttls.min() };
        Ok((addresses.into(), Duration::from_secs(ttl.unwrap_or_default().into())))
    }
}

/// The names to look up, in order. One with a dot is probably complete.
fn candidates(hostname: &str, search: &[String]) -> Vec<String> {
    if hostname.ends_with('.') {
        return vec![hostname.to_owned()];
    }
    let mut names: Vec<_> = search.iter().map(|domain| format!("{hostname}.{domain}")).collect();
    let at = if hostname.contains('.') { 0 } else { names.len() };
    names.insert(at, hostname.to_owned());
    names
}

/// A query with an EDNS record, so that most responses need no TCP.
pub(super) fn query(hostname: &str, kind: RecordType) -> Option<Vec<u8>> {
    let mut message = vec![0, 0];
    message.extend(RD.to_be_bytes());
    message.extend([0, 1, 0, 0, 0, 0, 0, 1]);
    message.extend(name::encode(hostname)?);
    message.extend(kind.number().to_be_bytes());
    message.extend(CLASS_IN.to_be_bytes());
    message.extend(message::opt(false, 0));
    Some(message)
}

#[cfg(test)]
mod tests;

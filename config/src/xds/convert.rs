//! Converts resources of a control plane to items of the mesh.
//!
//! An unknown value that affects routing or policies rejects the resource: ignoring it could widen
//! a policy, or send plaintext to a workload that speaks HBONE.

mod policy;
mod service;
mod workload;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use bytes::Bytes;
use ipnet::IpNet;
use prost::{DecodeError, Message as _};
use thiserror::Error;

pub(super) use self::policy::{policy, substitute};
pub(super) use self::service::{service, service_key};
pub(super) use self::workload::workload;
use super::workload::{
    Address, AddressType, GatewayAddress, GatewayDestination, NetworkAddress, Port,
};
use crate::cidr::canonical;
use crate::identity::spiffe::SpiffeError;
use crate::mesh::shared::Shared;
use crate::mesh::{self, Gateway, NamespacedHostname, NetworkCidr, PortMap};
use crate::yaml::quote::Quoted;

/// The longest name in a workload or service, in bytes. Log lines and labels of metrics contain
/// such names. The longest of Kubernetes have 253 bytes.
const MAX_NAME: usize = 1024;

/// The reason why a resource is rejected. The control plane logs it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Rejection {
    /// The encoding is broken.
    #[error("cannot be decoded: {0}")]
    Decode(DecodeError),
    /// The resource is larger than allowed.
    #[error("has {0} bytes, more than the limit")]
    Size(usize),
    /// The resource has no name.
    #[error("has no name")]
    Nameless,
    /// The resource has no content, or content of another type.
    #[error("has no content of its type")]
    Type,
    /// The name differs from that of the content.
    #[error("its content is named {0}")]
    Name(Quoted),
    /// A field has an unknown or invalid value.
    #[error("{field}: unsupported value {value}")]
    Value {
        /// The field.
        field: &'static str,
        /// The value, shortened.
        value: String,
    },
    /// A name is longer than allowed.
    #[error("{field}: {bytes} bytes, more than {MAX_NAME}")]
    Length {
        /// The field.
        field: &'static str,
        /// The length of the name.
        bytes: usize,
    },
    /// The policy has an unknown field, which may narrow its matches.
    #[error("unknown field {0}")]
    UnknownField(u32),
    /// The identity of the workload is invalid.
    #[error("namespace, service account and trust domain form no SPIFFE id: {0}")]
    Identity(SpiffeError),
}

impl From<DecodeError> for Rejection {
    fn from(error: DecodeError) -> Self {
        Self::Decode(error)
    }
}

impl Rejection {
    fn value(field: &'static str, value: impl fmt::Debug) -> Self {
        const SHOWN: usize = 100;
        Self::Value { field, value: format!("{value:?}").chars().take(SHOWN).collect() }
    }
}

/// Rejects names that are too long.
fn check_lengths(names: &[(&'static str, &str)]) -> Result<(), Rejection> {
    match names.iter().find(|(_, name)| name.len() > MAX_NAME) {
        Some((field, name)) => Err(Rejection::Length { field, bytes: name.len() }),
        None => Ok(()),
    }
}

/// The value for this number in a table.
fn one_of<T: Copy>(field: &'static str, number: i32, table: &[(i32, T)]) -> Result<T, Rejection> {
    let found = table.iter().find(|(known, _)| *known == number);
    found.map(|(_, value)| *value).ok_or_else(|| Rejection::value(field, number))
}

/// An IPv4 or IPv6 address in network order.
fn address(field: &'static str, bytes: &Bytes) -> Result<IpAddr, Rejection> {
    let v4 = <[u8; 4]>::try_from(&**bytes).map(IpAddr::from);
    let address = v4.or_else(|_| <[u8; 16]>::try_from(&**bytes).map(IpAddr::from));
    address.map(|address| address.to_canonical()).map_err(|_| Rejection::value(field, bytes))
}

fn network_address(
    field: &'static str,
    given: &NetworkAddress,
    shared: &mut Shared,
) -> Result<mesh::NetworkAddress, Rejection> {
    let (network, address) = (shared.name(&given.network), address(field, &given.address)?);
    Ok(mesh::NetworkAddress { network, address })
}

/// The readable addresses and ranges of a rejected workload or service, and those of the aliases of
/// its resource. A range with an unusable length is its address.
pub(super) fn addresses_of(
    content: &Bytes,
    aliases: &[String],
    shared: &mut Shared,
) -> Vec<NetworkCidr> {
    let kind = Address::decode(content.clone()).ok().and_then(|address| address.kind);
    let addresses: Vec<_> = match kind {
        Some(AddressType::Workload(workload)) => {
            let network = workload.network;
            let addresses = workload.addresses.into_iter();
            addresses.map(|address| (network.clone(), address, None)).collect()
        }
        Some(AddressType::Service(service)) => {
            let addresses = service.addresses.into_iter();
            addresses.map(|one| (one.network, one.address, one.length)).collect()
        }
        None => Vec::new(),
    };
    let readable = addresses.into_iter().filter_map(|(network, bytes, length)| {
        let one = address("addresses", &bytes).ok()?;
        let cidr = length.and_then(|length| range(&bytes, length)).unwrap_or_else(|| one.into());
        Some(NetworkCidr { network: shared.name(&network), cidr })
    });
    let aliases = aliases.iter().filter_map(|alias| {
        let one = alias.parse::<mesh::NetworkAddress>().ok()?;
        Some(NetworkCidr { network: one.network, cidr: one.address.into() })
    });
    readable.chain(aliases).collect()
}

/// The range of this prefix length, which applies to the address in the form that was sent.
fn range(bytes: &Bytes, length: u32) -> Option<IpNet> {
    let v4 = <[u8; 4]>::try_from(&**bytes).map(IpAddr::from);
    let address = v4.or_else(|_| <[u8; 16]>::try_from(&**bytes).map(IpAddr::from)).ok()?;
    Some(canonical(IpNet::new(address, u8::try_from(length).ok()?).ok()?))
}

/// A TCP port. 0 is allowed only with `allows_zero`.
fn port(field: &'static str, number: u32, allows_zero: bool) -> Result<u16, Rejection> {
    let port = u16::try_from(number).ok().filter(|port| allows_zero || *port != 0);
    port.ok_or_else(|| Rejection::value(field, number))
}

/// A map from ports of a service to target ports. Target 0 is a named port: of a service, or of the
/// workload that stands for a service in another network. The last target of a repeated port
/// counts, as in ztunnel: istiod also sends UDP ports.
fn ports(field: &'static str, given: &[Port], shared: &mut Shared) -> Result<PortMap, Rejection> {
    let pair = |one: &Port| -> Result<_, Rejection> {
        Ok((port(field, one.service_port, false)?, port(field, one.target_port, true)?))
    };
    let pairs: BTreeMap<u16, u16> = given.iter().map(pair).collect::<Result<_, _>>()?;
    Ok(shared.ports(pairs.into_iter().collect()))
}

fn gateway(
    field: &'static str,
    given: Option<&GatewayAddress>,
    shared: &mut Shared,
) -> Result<Option<Gateway>, Rejection> {
    let Some(GatewayAddress { destination, hbone_mtls_port }) = given else { return Ok(None) };
    let destination =
        match destination {
            Some(GatewayDestination::Hostname(name)) => mesh::GatewayDestination::Hostname(
                hostname(field, &name.namespace, &name.hostname, shared)?,
            ),
            Some(GatewayDestination::Address(at)) => {
                mesh::GatewayDestination::Address(network_address(field, at, shared)?)
            }
            None => return Err(Rejection::value(field, "no destination")),
        };
    Ok(Some(Gateway { destination, hbone_port: port(field, *hbone_mtls_port, false)? }))
}

fn hostname(
    field: &'static str,
    namespace: &str,
    hostname: &str,
    shared: &mut Shared,
) -> Result<NamespacedHostname, Rejection> {
    if hostname.is_empty() || hostname.contains('/') || namespace.contains('/') {
        return Err(Rejection::value(field, hostname));
    }
    Ok(NamespacedHostname { namespace: shared.name(namespace), hostname: shared.name(hostname) })
}

#[cfg(test)]
mod tests;

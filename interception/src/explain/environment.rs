//! Reads the interfaces of a namespace from the kernel.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockaddrStorage;

use crate::namespace::Entered;
use crate::plan::{Environment, Interface};

impl Environment {
    /// Reads the interfaces that are up.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn of(_: &Entered) -> io::Result<Self> {
        let mut interfaces: Vec<Interface> = Vec::new();
        for entry in getifaddrs()? {
            if !entry.flags.contains(InterfaceFlags::IFF_UP) {
                continue;
            }
            let name = &entry.interface_name;
            if interfaces.iter().all(|interface| interface.name != *name) {
                interfaces.push(Interface { name: name.clone(), addresses: Vec::new() });
            }
            let interface = interfaces.iter_mut().find(|interface| interface.name == *name);
            if let (Some(interface), Some(network)) = (interface, network(&entry)) {
                interface.addresses.push(network);
            }
        }
        Ok(Self { interfaces })
    }

    /// The interfaces of a typical pod, for explanations outside of a pod.
    #[must_use]
    pub fn example() -> Self {
        let v4 = |octets: [u8; 4], length| IpNet::new(octets.into(), length).ok();
        let v6 = |groups: [u16; 8], length| IpNet::new(groups.into(), length).ok();
        let interface = |name: &str, v4: Option<IpNet>, v6: Option<IpNet>| Interface {
            name: name.to_owned(),
            addresses: v4.into_iter().chain(v6).collect(),
        };
        let own = [0xfd00, 0, 0, 0, 0, 0, 0, 1];
        Self {
            interfaces: vec![
                interface("lo", v4([127, 0, 0, 1], 8), v6([0, 0, 0, 0, 0, 0, 0, 1], 128)),
                interface("eth0", v4([10, 0, 0, 1], 24), v6(own, 64)),
            ],
        }
    }
}

fn network(entry: &InterfaceAddress) -> Option<IpNet> {
    let address = ip(entry.address.as_ref()?)?;
    let length =
        entry.netmask.as_ref().and_then(ip).and_then(|mask| ipnet::ip_mask_to_prefix(mask).ok());
    let full = if address.is_ipv4() { 32 } else { 128 };
    IpNet::new(address, length.unwrap_or(full)).ok()
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn example_has_own_address_in_both_families() {
        let example = Environment::example();
        for v6 in [false, true] {
            let own = example.address(v6).expect("an address");
            assert!(!own.is_loopback() && example.is_local(own));
        }
    }

    #[test]
    fn reads_interfaces_of_current_namespace() {
        let current = Environment::of(&Entered::current().unwrap()).expect("interfaces");
        let names: Vec<_> = current.interfaces.iter().map(|interface| &interface.name).collect();
        let mut unique = names.clone();
        unique.dedup();
        assert_eq!(names, unique, "each interface once");
    }
}

//! Kernel tests of the lookup of local addresses.

use std::net::IpAddr;

use libtest_mimic::Failed;
use underpass_interception::{Entered, LocalAddresses, Namespace};

use crate::Case;
use crate::pod::{command, equal, inside, isolated_namespace};

pub(crate) const CASES: &[Case] = &[
    (
        "addresses of interfaces and of local routes are local",
        interface_and_route_addresses_are_local,
    ),
    ("a removed address is no longer local", removed_address_is_not_local),
];

fn expect_local(local: &LocalAddresses, address: &str, expected: bool) -> Result<(), Failed> {
    let address: IpAddr = address.parse()?;
    equal(&address.to_string(), local.contain(address)?, expected)
}

fn interface_and_route_addresses_are_local() -> Result<(), Failed> {
    let pod = isolated_namespace("local-addresses")?;
    let all = ["192.0.2.7", "198.51.100.77", "2001:db8::7", "2001:db8:1::77"];
    inside(&pod, async || {
        let local = LocalAddresses::open(&Entered::current()?)?;
        all.iter().try_for_each(|address| expect_local(&local, address, false))?;
        for line in [
            "ip address add 192.0.2.7 dev lo",
            "ip address add 2001:db8::7 dev lo",
            "ip route add local 198.51.100.0/24 dev lo",
            "ip route add local 2001:db8:1::/64 dev lo",
            // A route to another host is not local.
            "ip link add eth0 up type veth peer name eth1",
            "ip address add 10.0.0.1/24 dev eth0",
        ] {
            run(&pod, line)?;
        }
        all.iter().try_for_each(|address| expect_local(&local, address, true))?;
        expect_local(&local, "10.0.0.1", true)?;
        expect_local(&local, "::ffff:10.0.0.1", true)?;
        expect_local(&local, "10.0.0.2", false)?;
        expect_local(&local, "10.0.0.255", false)
    })
}

fn removed_address_is_not_local() -> Result<(), Failed> {
    let pod = isolated_namespace("local-removed")?;
    inside(&pod, async || {
        let local = LocalAddresses::open(&Entered::current()?)?;
        run(&pod, "ip address add 192.0.2.7 dev lo")?;
        expect_local(&local, "192.0.2.7", true)?;
        run(&pod, "ip address del 192.0.2.7/32 dev lo")?;
        expect_local(&local, "192.0.2.7", false)
    })
}

fn run(pod: &Namespace, line: &str) -> Result<(), Failed> {
    command(pod, line).map(drop)
}

//! Kernel tests of the blackhole: blocked and exempted connections, and its removal.

use std::net::{IpAddr, TcpListener};
use std::os::fd::AsFd as _;

use libtest_mimic::Failed;
use socket2::{Domain, Socket, Type};
use underpass_interception::PROXY_MARK;

use crate::Case;
use crate::pod::{
    ConnectedPods, DEADLINE, Family, V4, V6, command, equal, inside, isolated_namespace, prepare,
    socket_address,
};

pub(crate) const CASES: &[Case] = &[
    ("the blackhole blocks only unmarked TCP", blocks_unmarked_tcp),
    ("the blackhole exempts excluded users, ports and networks", exempts_exclusions),
    ("the blackhole is removed completely after two installations", removal_is_complete),
    ("the blackhole supports thousands of exemptions", supports_many_exemptions),
    (
        "the blackhole accepts ports and users that ip rules cannot express",
        accepts_inexpressible_settings,
    ),
];

const PORT: u16 = 8080;

/// Connects from the current namespace, with a socket of this user and mark. Returns `false` if
/// blocked.
fn connects(to: IpAddr, port: u16, mark: u32, uid: u32) -> Result<bool, Failed> {
    let address = socket_address(to, port);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_mark(mark)?;
    rustix::fs::fchown(socket.as_fd(), Some(rustix::fs::Uid::from_raw(uid)), None)?;
    match socket.connect_timeout(&address.into(), DEADLINE) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EINVAL as i32) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Listens on these ports in the remote namespace.
fn listeners(
    wired: &ConnectedPods,
    family: Family,
    ports: &[u16],
) -> Result<Vec<TcpListener>, Failed> {
    let listen = || {
        ports.iter().map(|port| TcpListener::bind(socket_address(family.remote, *port))).collect()
    };
    let listeners: std::io::Result<Vec<_>> = wired.remote.run(listen)?;
    Ok(listeners?)
}

fn blocks_unmarked_tcp() -> Result<(), Failed> {
    let wired = ConnectedPods::new("blackhole")?;
    for family in [V4, V6] {
        let _there = listeners(&wired, family, &[PORT])?;
        inside(&wired.pod, async || {
            let _here = TcpListener::bind(socket_address(family.loopback, PORT))?;
            let interception = prepare("").await?;
            equal("it connects before", connects(family.remote, PORT, 0, 0)?, true)?;
            interception.block().await?;
            equal("it is blocked", interception.is_blocked().await?, true)?;
            equal("unmarked", connects(family.remote, PORT, 0, 0)?, false)?;
            equal("marked", connects(family.remote, PORT, PROXY_MARK, 0)?, true)?;
            equal(
                "with a CNI's bits",
                connects(family.remote, PORT, PROXY_MARK | 0x4000, 0)?,
                true,
            )?;
            equal("to loopback", connects(family.loopback, PORT, 0, 0)?, true)?;
            interception.unblock().await?;
            equal("it is blocked", interception.is_blocked().await?, false)?;
            equal("it connects after", connects(family.remote, PORT, 0, 0)?, true)
        })?;
    }
    Ok(())
}

fn exempts_exclusions() -> Result<(), Failed> {
    let wired = ConnectedPods::new("exempt")?;
    for (family, excluded) in [(V4, "10.0.0.2/32"), (V6, "fd00::2/128")] {
        let _there = listeners(&wired, family, &[PORT, 5432])?;
        inside(&wired.pod, async || {
            let blocked = async |settings: &str| -> Result<[bool; 3], Failed> {
                let interception = prepare(settings).await?;
                interception.block().await?;
                let connected = [
                    connects(family.remote, PORT, 0, 0)?,
                    connects(family.remote, 5432, 0, 0)?,
                    connects(family.remote, PORT, 0, 1337)?,
                ];
                interception.unblock().await?;
                Ok(connected)
            };
            equal("ambient", blocked("").await?, [false, false, false])?;
            equal("sidecar", blocked("profile=sidecar").await?, [false, false, true])?;
            let port = "outbound.exclude_ports=5000-5500";
            equal("a port", blocked(port).await?, [false, true, false])?;
            let cidr = format!("outbound.exclude_cidrs={excluded}");
            equal("a network", blocked(&cidr).await?, [true, true, true])?;
            let uid = "outbound.exclude_uids=1337";
            equal("a user", blocked(uid).await?, [false, false, true])?;
            let included =
                format!("outbound.include_cidrs=192.0.2.0/24 outbound.include_ports={PORT}");
            equal("included networks", blocked(&included).await?, [false, true, false])
        })?;
    }
    Ok(())
}

fn removal_is_complete() -> Result<(), Failed> {
    let pod = isolated_namespace("trace")?;
    command(&pod, "ip rule add fwmark 0x7 pref 2 lookup 7")?;
    let rules = || -> Result<_, Failed> {
        Ok([command(&pod, "ip -4 rule")?, command(&pod, "ip -6 rule")?])
    };
    let before = rules()?;
    let block = || inside(&pod, async || Ok(prepare("profile=sidecar").await?.block().await?));
    block()?;
    let once = rules()?;
    block()?;
    equal("after twice", rules()?, once)?;
    inside(&pod, async || {
        let interception = prepare("").await?;
        equal("the blackhole was installed", interception.unblock().await?, true)?;
        equal("the blackhole is still installed", interception.unblock().await?, false)
    })?;
    equal("the ip rules after removal", rules()?, before)
}

fn supports_many_exemptions() -> Result<(), Failed> {
    let pod = isolated_namespace("many-exemptions")?;
    let before = command(&pod, "ip rule")?;
    let cidrs: Vec<_> = (0..2000).map(|n| format!("10.{}.{}.0/24", n / 256, n % 256)).collect();
    inside(&pod, async || {
        let interception = prepare(&format!("outbound.exclude_cidrs={}", cidrs.join(","))).await?;
        interception.block().await?;
        equal("exemptions", command(&pod, "ip rule")?.matches(" to 10.").count(), 2000)?;
        interception.unblock().await?;
        Ok(())
    })?;
    equal("the ip rules after removal", command(&pod, "ip rule")?, before)
}

/// The kernel rejects ip rules with port 65535 or with users outside of the user namespace.
fn accepts_inexpressible_settings() -> Result<(), Failed> {
    let wired = ConnectedPods::new("inexpressible")?;
    let _there = listeners(&wired, V4, &[PORT, 80])?;
    inside(&wired.pod, async || {
        for (settings, expected) in [
            ("outbound.exclude_ports=1024-65535", [true, false]),
            ("outbound.exclude_ports=65535 outbound.exclude_uids=4294967294", [false, false]),
            ("outbound.include_cidrs=none outbound.include_ports=1024-65535", [false, false]),
        ] {
            let interception = prepare(settings).await?;
            interception.block().await?;
            equal("it is blocked", interception.is_blocked().await?, true)?;
            let found = [connects(V4.remote, PORT, 0, 0)?, connects(V4.remote, 80, 0, 0)?];
            equal(settings, found, expected)?;
            equal("marked", connects(V4.remote, 80, PROXY_MARK, 0)?, true)?;
            interception.unblock().await?;
        }
        Ok(())
    })
}

//! The five listeners of a proxy: three for connections, two for who looks at it. Bound before anything runs, or taken over
//! from the process that runs.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};

use underpass_config::Settings;
use underpass_interception::{BoundListener, Closing, InterceptionError, Sockets};

use crate::accept::Kind;

/// What a listener is for, and where the settings say that it listens.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    /// What the listener is called when it is handed over.
    name: &'static str,
    address: SocketAddr,
    closing: Closing,
    purpose: &'static str,
    setting: &'static str,
}

/// All of them, bound.
#[derive(Debug)]
pub(crate) struct Listeners {
    pub(crate) outbound: BoundListener,
    pub(crate) hbone: BoundListener,
    pub(crate) inbound: BoundListener,
    pub(crate) readiness: BoundListener,
    pub(crate) metrics: BoundListener,
}

impl Listeners {
    /// Takes what was `handed` over and is where it should be, and binds the rest.
    pub(crate) fn bind(
        sockets: &Sockets,
        settings: &Settings,
        mut handed: Vec<(String, BoundListener)>,
    ) -> Result<Self, InterceptionError> {
        let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let proxy = &settings.proxy;
        let mut listen = |name, address, closing, purpose, setting| {
            let wanted = Wanted { name, address, closing, purpose, setting };
            take(&mut handed, wanted).map_or_else(|| bind(sockets, wanted), Ok)
        };
        Ok(Self {
            outbound: listen(
                "outbound",
                any(proxy.outbound_port),
                Kind::Outbound.closing(),
                "caught outbound connections",
                "proxy.outbound_port",
            )?,
            hbone: listen(
                "hbone",
                any(proxy.hbone_port),
                Kind::Hbone.closing(),
                "tunnels",
                "proxy.hbone_port",
            )?,
            inbound: listen(
                "inbound",
                any(proxy.inbound_port),
                Kind::Plaintext.closing(),
                "caught inbound connections",
                "proxy.inbound_port",
            )?,
            readiness: listen(
                "readiness",
                settings.readiness,
                Closing::End,
                "readiness",
                "readiness.address",
            )?,
            metrics: listen(
                "metrics",
                settings.metrics,
                Closing::End,
                "metrics",
                "metrics.address",
            )?,
        })
    }

    /// The same listeners once more.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            outbound: self.outbound.try_clone()?,
            hbone: self.hbone.try_clone()?,
            inbound: self.inbound.try_clone()?,
            readiness: self.readiness.try_clone()?,
            metrics: self.metrics.try_clone()?,
        })
    }

    /// Each with the name by which it is handed over.
    pub(crate) fn named(&self) -> [(&'static str, &BoundListener); 5] {
        [
            ("outbound", &self.outbound),
            ("hbone", &self.hbone),
            ("inbound", &self.inbound),
            ("readiness", &self.readiness),
            ("metrics", &self.metrics),
        ]
    }

    /// Those of the data path, to be dealt to workers, and those for readiness and metrics.
    pub(crate) fn split(self) -> ([(Kind, BoundListener); 3], BoundListener, BoundListener) {
        let data = [
            (Kind::Outbound, self.outbound),
            (Kind::Hbone, self.hbone),
            (Kind::Plaintext, self.inbound),
        ];
        (data, self.readiness, self.metrics)
    }
}

fn bind(sockets: &Sockets, wanted: Wanted) -> Result<BoundListener, InterceptionError> {
    let Wanted { address, closing, purpose, setting, .. } = wanted;
    sockets.listen_on(address, closing, purpose, setting)
}

/// The listener that was handed over for this; `None` if it listens elsewhere, or there is none.
fn take(handed: &mut Vec<(String, BoundListener)>, wanted: Wanted) -> Option<BoundListener> {
    let index = handed.iter().position(|(name, listener)| {
        name == wanted.name && listener.local_addr().is_ok_and(|at| is_there(at, wanted.address))
    })?;
    Some(handed.swap_remove(index).1)
}

/// Without IPv6, any address is IPv4's.
fn is_there(at: SocketAddr, wanted: SocketAddr) -> bool {
    let both_any = at.ip().is_unspecified() && wanted.ip().is_unspecified();
    at == wanted || both_any && at.port() == wanted.port() && wanted.is_ipv6()
}

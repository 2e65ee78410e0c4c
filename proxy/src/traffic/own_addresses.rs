//! Checks whether a connection comes from, or goes to, an address of its pod.

use underpass_interception::OriginalDestination;

use crate::error::ProxyError;
use crate::node::worker::seat::Seat;
use crate::observe::metrics;
use crate::traffic::accepted::{Accepted, Source};

impl Accepted {
    /// Refuses an inbound connection whose destination is not an address of this namespace, because
    /// the workload's mTLS mode and policies do not cover it. The rules of `interception.exact`,
    /// and those of other programs, can redirect such connections here.
    pub(crate) fn check_local(self, seat: &Seat) -> Result<Self, ProxyError> {
        let destination = self.destination.address();
        // REDIRECT sets an address of the interface; TPROXY keeps the original one.
        let proven = !seat.pod.sockets.settings().are_transparent()
            && OriginalDestination::local(&self.stream)
                .is_ok_and(|here| here.address().ip() == destination.ip());
        if proven {
            return Ok(self);
        }
        match seat.is_local(destination.ip()) {
            Ok(true) => Ok(self),
            Ok(false) => {
                metrics::not_local();
                Err(ProxyError::NotLocal(destination))
            }
            Err(source) => Err(ProxyError::LocalUnknown { destination, source }),
        }
    }

    /// Refuses an outbound connection whose source is not an address of the pod, unless settings
    /// allow it: virtual interfaces and ingress gateways forward for others.
    pub(crate) fn check_source(&self, seat: &Seat) -> Result<Source, ProxyError> {
        let client = self.client;
        match seat.is_local(client.ip()) {
            Ok(true) => Ok(Source::Own(client.ip())),
            _ if seat.pod.accepts_foreign_sources() => Ok(Source::Other),
            Ok(false) => Err(ProxyError::ForeignSource(client)),
            Err(source) => Err(ProxyError::SourceUnknown { client, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::sync::Arc;

    use super::*;
    use crate::node::testing::{node, pod};
    use crate::node::worker::Worker;
    use crate::traffic::listeners::Kind;

    fn checked(client: &str, settings: &[&str]) -> Result<Source, &'static str> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = Accepted::testing(Kind::Outbound, stream, client.parse().unwrap());
        let seat = Worker::new(node(1), 0, Arc::default()).seat(&pod(settings));
        accepted.check_source(&seat).map_err(|error| error.reason().code)
    }

    #[tokio::test]
    async fn refuses_outbound_connection_from_foreign_address() {
        for own in ["127.0.0.1:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            let source = checked(own, &[]);
            assert!(matches!(source, Ok(Source::Own(ip)) if ip.to_canonical().is_loopback()));
        }
        for foreign in ["192.0.2.1:1", "[2001:db8::1]:1"] {
            assert_eq!(checked(foreign, &[]).err(), Some("foreign_source"), "{foreign}");
        }
    }

    #[tokio::test]
    async fn serves_foreign_source_address_if_setting_allows_it() {
        for setting in ["interception.virtual_interfaces=vm0", "interception.ingress=true"] {
            assert!(matches!(checked("192.0.2.1:1", &[setting]), Ok(Source::Other)), "{setting}");
            assert!(matches!(checked("127.0.0.1:1", &[setting]), Ok(Source::Own(_))), "{setting}");
        }
    }
}

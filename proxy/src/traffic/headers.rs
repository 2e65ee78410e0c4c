//! The headers with which the ends of a tunnel describe a connection: `traceparent`, `baggage`,
//! `forwarded` and, between networks, `x-forwarded-network`. They are for logs and dashboards. No
//! decision depends on them, because they are not proven.

use http::HeaderMap;
use underpass_config::WorkloadSettings;
use underpass_hbone::{Baggage, Forwarded, RequestHeaders};

use crate::observe::party::Party;
use crate::observe::record::Facts;

/// The headers of the CONNECT request for a caught connection.
pub(crate) fn request(facts: &Facts, own: &WorkloadSettings) -> HeaderMap {
    about(facts, own).into_header_map()
}

/// The headers of the CONNECT request for a tunnel into another network. They include the client's
/// network.
pub(crate) fn request_from_network(facts: &Facts, own: &WorkloadSettings) -> HeaderMap {
    let network = Some(own.network.as_str().into());
    RequestHeaders { network, ..about(facts, own) }.into_header_map()
}

fn about(facts: &Facts, own: &WorkloadSettings) -> RequestHeaders {
    RequestHeaders {
        traceparent: facts.trace,
        baggage: Some(baggage(&facts.source, own)),
        forwarded: facts.source.address.map(|client| Forwarded::new(client, None)),
        network: None,
    }
}

/// The headers of the response 200.
pub(crate) fn response(facts: &Facts, own: &WorkloadSettings) -> HeaderMap {
    let baggage = Some(baggage(&facts.destination, own));
    RequestHeaders { baggage, ..RequestHeaders::default() }.into_header_map()
}

/// The workload at the local end, from the mesh or else from the settings.
fn baggage(own_end: &Party, own: &WorkloadSettings) -> Baggage {
    match &own_end.workload {
        Some(workload) => Baggage::from(workload.as_ref()),
        None => Baggage {
            namespace: own.namespace.as_str().into(),
            service: own.name.as_str().into(),
            ..Baggage::default()
        },
    }
}

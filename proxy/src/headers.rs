//! What a tunnel's headers say of its two ends: `traceparent`, `baggage`, `forwarded` and, between networks,
//! `x-forwarded-network`. They are for logs and dashboards: nothing is decided by what a peer claims.

use http::HeaderMap;
use underpass_config::WorkloadSettings;
use underpass_hbone::{Baggage, Forwarded, RequestHeaders};

use crate::record::{ConnectionRecord, Party};

/// The headers of the CONNECT request for a caught connection.
pub(crate) fn request(record: &ConnectionRecord, own: &WorkloadSettings) -> HeaderMap {
    about(record, own).into_header_map()
}

/// The same for a tunnel that crosses into another network: it says which one the connection comes from.
pub(crate) fn request_from_network(record: &ConnectionRecord, own: &WorkloadSettings) -> HeaderMap {
    let network = Some(own.network.as_str().into());
    RequestHeaders { network, ..about(record, own) }.into_header_map()
}

fn about(record: &ConnectionRecord, own: &WorkloadSettings) -> RequestHeaders {
    RequestHeaders {
        traceparent: record.trace(),
        baggage: Some(baggage(&record.source, own)),
        forwarded: record.source.address.map(|client| Forwarded::new(client, None)),
        network: None,
    }
}

/// The headers of the answer 200.
pub(crate) fn response(record: &ConnectionRecord, own: &WorkloadSettings) -> HeaderMap {
    let baggage = Some(baggage(&record.destination, own));
    RequestHeaders { baggage, ..RequestHeaders::default() }.into_header_map()
}

/// Who is at our end: as the mesh knows it, or else as the settings call it.
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

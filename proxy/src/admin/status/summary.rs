//! Adds up the summaries of all workers.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use underpass_config::{Hint as _, Quoted};
use underpass_hbone::PeerTunnels;

use crate::admin::api::connection::Connection;
use crate::admin::api::status::{Connections, Failure, InboundTunnels, OutboundTunnels, Tunnels};
use crate::decide::subject::PeerTunnel;
use crate::node::inspection::{ConnectionKind, OLDEST, Summary};
use crate::observe::pod_name::PodName;
use crate::observe::record::EndedConnection;

/// The sum of the summaries of all workers.
#[derive(Debug, Default)]
pub(super) struct Sum {
    pub(super) tunnels: Tunnels,
    pub(super) connections: Connections,
    pub(super) failures: Vec<Failure>,
}

/// Adds up summaries. Failures are those of `pod`, or of all pods.
pub(super) fn sum(summaries: impl Iterator<Item = Summary>, pod: Option<&PodName>) -> Sum {
    let mut total = Summary::default();
    for summary in summaries {
        for (kind, count) in summary.counts {
            *total.counts.entry(kind).or_default() += count;
        }
        total.opening += summary.opening;
        total.oldest.extend(summary.oldest);
        total.tunnels_of_peers.extend(summary.tunnels_of_peers);
        total.tunnels_to_peers.extend(summary.tunnels_to_peers);
        total.failures.extend(summary.failures);
        total.failed.extend(summary.failed);
    }
    let tunnels = Tunnels {
        outbound: outbound(&total.tunnels_to_peers),
        inbound: inbound(&total.tunnels_of_peers),
    };
    let is_selected = |of: &PodName| pod.is_none_or(|pod| pod == of);
    Sum { tunnels, failures: failures(&total, is_selected), connections: connections(total) }
}

fn connections(mut total: Summary) -> Connections {
    total.oldest.sort_by_key(|connection| connection.accepted);
    let count = |is_inbound, has_tunnel| {
        total.counts.get(&ConnectionKind { is_inbound, has_tunnel }).copied().unwrap_or_default()
    };
    Connections {
        outbound_hbone: count(false, true),
        outbound_tcp: count(false, false),
        inbound_hbone: count(true, true),
        inbound_tcp: count(true, false),
        opening: total.opening,
        oldest: total.oldest.iter().take(OLDEST).map(|open| Connection::open(open)).collect(),
    }
}

/// The failures of the selected pods by reason, the most frequent first.
fn failures(total: &Summary, is_selected: impl Fn(&PodName) -> bool) -> Vec<Failure> {
    let mut counts = BTreeMap::<_, u64>::new();
    for failure in total.failures.iter().filter(|failure| is_selected(&failure.pod)) {
        *counts.entry(failure.reason).or_default() += failure.count;
    }
    let last = |reason: &str| {
        let has_reason = |ended: &&Arc<EndedConnection>| {
            is_selected(&ended.connection.pod) && ended.reason().is_some_and(|of| of.code == reason)
        };
        let last = total.failed.iter().filter(has_reason).max_by_key(|ended| ended.at)?;
        Some(Box::new(Connection::ended(last)))
    };
    let failure = |(reason, count): (&'static str, u64)| Failure {
        reason: reason.to_owned(),
        count,
        last: last(reason),
    };
    let mut failures: Vec<_> = counts.into_iter().map(failure).collect();
    failures.sort_by_key(|failure| std::cmp::Reverse(failure.count));
    failures
}

/// The tunnels to each peer, those with the most streams first.
fn outbound(peers: &[(Arc<PodName>, PeerTunnels)]) -> Vec<OutboundTunnels> {
    let mut sums = BTreeMap::<(String, SocketAddr, Vec<String>), OutboundTunnels>::new();
    for (pod, PeerTunnels { key, counts, back_off }) in peers {
        let identities: Vec<_> = key.peers.iter().map(ToString::to_string).collect();
        let sum = sums.entry((pod.to_string(), key.address, identities)).or_default();
        sum.tunnels += counts.tunnels + counts.retired;
        sum.streams += counts.streams;
        sum.dialing += counts.dialing;
        if let Some((_, error)) = back_off {
            sum.error = Some(Quoted::chain(&**error).to_string());
            sum.hint = error.hint().map(Into::into);
        }
    }
    let named = |((pod, address, identities), sum)| OutboundTunnels {
        pod,
        address: Some(address),
        identities,
        ..sum
    };
    let mut sums: Vec<_> = sums.into_iter().map(named).collect();
    sums.sort_by_key(|sum| std::cmp::Reverse((sum.error.is_some(), sum.streams)));
    sums
}

/// The tunnels of each peer, those with the most tunnels first.
fn inbound(tunnels: &[(Arc<PodName>, PeerTunnel)]) -> Vec<InboundTunnels> {
    let mut sums = BTreeMap::<(String, String), InboundTunnels>::new();
    for (pod, PeerTunnel { client, identity, accepted }) in tunnels {
        let sum = sums.entry((pod.to_string(), identity.to_string())).or_default();
        sum.tunnels += 1;
        if !sum.addresses.contains(&client.ip()) {
            sum.addresses.push(client.ip());
        }
        sum.oldest_seconds = sum.oldest_seconds.max(accepted.elapsed().as_secs());
    }
    let named = |((pod, identity), sum)| InboundTunnels { pod, identity, ..sum };
    let mut sums: Vec<_> = sums.into_iter().map(named).collect();
    sums.sort_by_key(|sum| std::cmp::Reverse(sum.tunnels));
    sums
}

//! The settings `proxy`, except for mTLS (`access.rs`).

use std::collections::BTreeSet;

use crate::settings::declare::{Document, Fallback, Kind, PORT, Written, settings, word};
use crate::settings::{MtlsSettings, PacedConnections, Profile, ProxySettings, SameNode};

settings! {
    /// the listener for captured outbound connections
    OUTBOUND_PORT: u16 = "proxy.outbound_port", PORT,
        Fallback::Is(|| 15001), |s| Some(s.proxy.outbound_port);
    /// the listener for captured inbound plaintext connections
    INBOUND_PORT: u16 = "proxy.inbound_port", PORT,
        Fallback::Varies("15006; `osm` 15003"), |s| Some(s.proxy.inbound_port);
    /// the HBONE port of this proxy and of every peer
    HBONE_PORT: u16 = "proxy.hbone_port", PORT,
        Fallback::Is(|| 15008), |s| Some(s.proxy.hbone_port);
    /// the listener for captured DNS queries
    DNS_PORT: u16 = "proxy.dns_port", PORT, Fallback::Is(|| 15053), |s| Some(s.proxy.dns_port);
    /// the number of data threads; `auto`: the number of CPUs that this process may use, cgroup
    /// limits included
    WORKERS: Option<usize> = "proxy.workers", THREADS,
        Fallback::Is(|| None), |s| Some(s.proxy.workers);
    // Pacing a tunnel within a region takes a third more CPU time for bulk.
    /// the connections that use BBR, if it is in `net.ipv4.tcp_congestion_control`; BBR paces each
    /// segment by a timer: `distant`: those to peers with a round-trip time of 5 ms or more, which
    /// saves CPU time; `all`
    PACING: PacedConnections = "proxy.pacing", word("`distant`, `all`"),
        Fallback::Is(|| PacedConnections::Distant), |s| Some(s.proxy.pacing);
    /// connections between two pods of this process: `tunnel`: like those to any other pod;
    /// `direct`: without encryption inside the node, invisible to the CNI's NetworkPolicy and flow
    /// logs
    SAME_NODE: SameNode = "proxy.same_node", word("`tunnel`, `direct`"),
        Fallback::Is(|| SameNode::Tunnel), |s| Some(s.proxy.same_node);
}

const THREADS: Kind<Option<usize>> = Kind {
    name: "number, `auto`",
    is_list: false,
    read: |cursor, _| match cursor.text()? {
        "auto" => Some(None),
        _ => cursor.number(1..=1024, "auto or a number of threads, 1 to 1024").map(Some),
    },
    write: |threads| threads.map_or_else(|| Written::scalar("auto"), Written::scalar),
};

pub(super) fn proxy(
    document: Document<'_>,
    profile: Profile,
    mtls: MtlsSettings,
) -> Option<ProxySettings> {
    // OSM's sidecar listens on another port than Istio's.
    let inbound_port = if profile == Profile::Osm { 15003 } else { 15006 };
    let settings = ProxySettings {
        outbound_port: OUTBOUND_PORT.read(document)?,
        inbound_port: INBOUND_PORT.read(document).unwrap_or(inbound_port),
        hbone_port: HBONE_PORT.read(document)?,
        dns_port: DNS_PORT.read(document)?,
        workers: WORKERS.read(document)?,
        pacing: PACING.read(document)?,
        same_node: SAME_NODE.read(document)?,
        mtls,
    };
    let ProxySettings { outbound_port, inbound_port, hbone_port, dns_port, .. } = settings;
    if BTreeSet::from([outbound_port, inbound_port, hbone_port, dns_port]).len() < 4 {
        let section = document.root.key("proxy");
        section.problem("outbound_port, inbound_port, hbone_port and dns_port must differ");
        return None;
    }
    Some(settings)
}

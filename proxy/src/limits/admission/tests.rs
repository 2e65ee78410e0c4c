//! Tests of admission, refusal and the release of tickets.

use super::*;
use crate::node::testing::settings;

const SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

/// The limits of two workers with the settings `more` and this limit of open files.
fn limits(files: usize, more: &[&str]) -> Limits {
    let mut limits = Limits::new(&settings(more).limits, 2);
    limits.descriptors = super::super::Descriptors::new(files, 0, 0);
    limits
}

/// Takes tickets until one is refused. Returns the tickets and the refusal.
fn fill(pod: &PodLimits, kind: AdmissionKind, source: IpAddr) -> (Vec<Ticket>, Refusal) {
    let mut tickets = Vec::new();
    loop {
        match pod.admit(kind, source, None) {
            Ok(ticket) => tickets.push(ticket),
            Err(refusal) => return (tickets, refusal),
        }
    }
}

#[test]
fn refuses_only_source_beyond_its_limits() {
    let limits = limits(1000, &["limits.connections_per_source=3", "limits.tunnels_per_source=2"]);
    let pod = limits.pod();
    for kind in [AdmissionKind::Outbound, AdmissionKind::Plaintext] {
        let (tickets, refusal) = fill(&pod, kind, SOURCE);
        assert_eq!((tickets.len(), refusal), (3, Refusal::Source(SOURCE)));
        drop(pod.admit(kind, OTHER, None).unwrap());
    }
    let (tunnels, refusal) = fill(&pod, AdmissionKind::Tunnel, SOURCE);
    assert_eq!((tunnels.len(), refusal), (2, Refusal::TunnelSource(SOURCE)));
    drop(tunnels[0].stream().unwrap());
    let _stream = tunnels[0].stream();
    assert_eq!(tunnels[0].stream().err(), Some(Refusal::Source(SOURCE)), "streams count too");
    drop(tunnels);
    drop(pod.admit(AdmissionKind::Tunnel, SOURCE, None).unwrap());
}

#[test]
fn disabled_limits_admit_any_source() {
    let off = ["limits.connections_per_source=off", "limits.tunnels_per_source=off"];
    let pod = limits(1 << 20, &off).pod();
    let admitted = (0..2000).map(|_| pod.admit(AdmissionKind::Tunnel, SOURCE, None).ok());
    assert!(admitted.collect::<Option<Vec<_>>>().is_some());
}

#[test]
fn refuses_connections_beyond_limit_of_worker() {
    let limits = limits(1000, &["limits.connections_per_worker=2"]);
    let pod = limits.pod();
    let (tickets, refusal) = fill(&pod, AdmissionKind::Outbound, SOURCE);
    assert_eq!((tickets.len(), refusal), (4, Refusal::Worker));
    let mut workers: Vec<_> = tickets.iter().map(Ticket::worker).collect();
    workers.sort_unstable();
    assert_eq!(workers, [0, 0, 1, 1]);
}

#[test]
fn source_leaves_share_of_connections_to_others() {
    let limits = limits(1000, &["limits.connections_per_worker=50"]);
    let pod = limits.pod();
    let (tickets, refusal) = fill(&pod, AdmissionKind::Plaintext, SOURCE);
    assert_eq!(refusal, Refusal::ConnectionShare(SOURCE));
    assert!((50..80).contains(&tickets.len()), "{}", tickets.len());
    drop(pod.admit(AdmissionKind::Plaintext, OTHER, None).unwrap());
}

#[test]
fn source_leaves_descriptors_to_others_and_other_direction() {
    let pod = limits(1064, &[]).pod();
    let (tickets, refusal) = fill(&pod, AdmissionKind::Plaintext, SOURCE);
    assert_eq!(refusal, Refusal::DescriptorShare(SOURCE));
    assert!((200..300).contains(&tickets.len()), "{} connections", tickets.len());
    assert!(pod.has_room(AdmissionKind::Plaintext) && pod.has_room(AdmissionKind::Outbound));
    let tunnel = pod.admit(AdmissionKind::Tunnel, OTHER, None).unwrap();
    let streams: Vec<_> = (0..30).map_while(|_| tunnel.stream().ok()).collect();
    assert_eq!(streams.len(), 30);
    let outbound: Vec<_> =
        (0..50).map_while(|_| pod.admit(AdmissionKind::Outbound, SOURCE, None).ok()).collect();
    assert_eq!(outbound.len(), 50);
}

#[test]
fn dropped_ticket_releases_all_budgets() {
    let limits = limits(1000, &[]);
    let pod = limits.pod();
    let used = || {
        let Directions { outbound, inbound } = &pod.0.descriptors;
        (outbound.used(), inbound.used(), limits.connections.used())
    };
    let mut outbound = pod.admit(AdmissionKind::Outbound, SOURCE, Some(OTHER)).unwrap();
    let plaintext = pod.admit(AdmissionKind::Plaintext, SOURCE, None).unwrap();
    let tunnel = pod.admit(AdmissionKind::Tunnel, SOURCE, None).unwrap();
    let stream = tunnel.stream().unwrap();
    assert_eq!(used(), (2, 4, 4));
    outbound.release_descriptor();
    assert_eq!(used(), (1, 4, 4));
    drop((outbound, plaintext, tunnel, stream));
    assert_eq!(used(), (0, 0, 0));
    let (all, _) = fill(&pod, AdmissionKind::Outbound, SOURCE);
    drop(all);
    assert_eq!(used(), (0, 0, 0), "a refused connection holds no share");
}

#[test]
fn refuses_stream_without_descriptor() {
    let limits = limits(8, &[]);
    let pod = limits.pod();
    let tunnel = pod.admit(AdmissionKind::Tunnel, SOURCE, None).unwrap();
    let _all = pod.hold_outbound();
    let _streams: Vec<_> = (0..3).map_while(|_| tunnel.stream().ok()).collect();
    let refusal = tunnel.stream().err();
    assert!(
        matches!(refusal, Some(Refusal::Descriptors | Refusal::DescriptorShare(_))),
        "{refusal:?}"
    );
}

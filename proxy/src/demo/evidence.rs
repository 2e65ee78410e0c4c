//! Evidence that the demonstrations collect: responses, captured packets, metrics, rules.

use underpass_config::SpiffeId;
use underpass_interception::{
    Namespace, NamespaceAccess, NamespaceThread, RuleCounter, TcpSegment, counters,
};

use super::DemoError;
use super::setup::{HBONE_PORT, HTTP_PORT, METRICS_PORT};
use super::web;

/// One verified property: its subject, the observation, and whether the property holds.
pub(super) struct Finding {
    pub(super) subject: &'static str,
    pub(super) seen: String,
    pub(super) holds: bool,
}

/// Verifies that the captured packets contain TLS to the HBONE port, and no plaintext of the
/// request.
pub(super) fn wire(frames: &[Vec<u8>], token: &str) -> Finding {
    let texts = [token.as_bytes(), b"GET /", b"HTTP/1.1", b"hello from"];
    let clear =
        frames.iter().filter(|frame| texts.iter().any(|text| contains(frame, text))).count();
    let segments = || frames.iter().filter_map(|frame| TcpSegment::parse(frame));
    let to_port = |port: u16| segments().filter(move |segment| segment.destination.port() == port);
    // RFC 8446 section 5.1: a record begins with its type (20 to 23) and the version 3.x.
    let is_tls = |segment: &TcpSegment<'_>| matches!(segment.payload, [20..=23, 3, ..]);
    let tls = to_port(HBONE_PORT).filter(is_tls).count();
    let direct = to_port(HTTP_PORT).count();
    Finding {
        subject: "wire",
        seen: format!(
            "{} frames captured: {tls} with TLS to port {HBONE_PORT}, {direct} to port {HTTP_PORT}, \
             {clear} with anything of the request or response in clear",
            frames.len()
        ),
        holds: tls > 0 && direct == 0 && clear == 0,
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// Whether the proxy in `namespace` has counted a connection between two authenticated identities.
/// `reporter` is `source` or `destination`.
pub(super) fn counted(
    namespace: &Namespace,
    reporter: &str,
    source: &SpiffeId,
    destination: &SpiffeId,
) -> bool {
    let metrics = web::get(namespace, ([127, 0, 0, 1], METRICS_PORT).into(), "/metrics", "");
    let wanted = [
        "istio_tcp_connections_opened_total{".to_owned(),
        format!("reporter=\"{reporter}\""),
        format!("source_principal=\"{source}\""),
        format!("destination_principal=\"{destination}\""),
        "connection_security_policy=\"mutual_tls\"".to_owned(),
    ];
    let is_wanted = |line: &str| wanted.iter().all(|part| line.contains(part));
    metrics.is_ok_and(|text| text.lines().any(is_wanted))
}

/// The counters of the rules in a namespace; empty without rules.
pub(super) async fn read_counters(namespace: &Namespace) -> Result<Vec<RuleCounter>, DemoError> {
    let thread = NamespaceThread::start().map_err(DemoError::io("start a thread"))?;
    counters(&NamespaceAccess::new(namespace.clone(), thread))
        .await
        .map_err(DemoError::namespace("read the rules' counters"))
}

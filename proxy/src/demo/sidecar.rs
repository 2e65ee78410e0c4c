//! The demonstration of `underpass run`: two pods with a proxy each, and a host without one.

pub(super) mod stage;

use http::HeaderMap;
use underpass_hbone::{ClientSettings, ConnectRequest, Connector, HboneError};
use underpass_interception::Namespace;

use super::evidence::{Finding, counted, read_counters, wire};
use super::setup::{HBONE_PORT, HTTP_PORT};
use super::web::{self, Exchange};
use super::{DemoError, STEP_TIMEOUT};
use stage::Stage;

pub(super) const TITLE: &str = "pod client ── proxy ══ mutual TLS ══ proxy ── pod server";

/// Makes one request and verifies its properties.
pub(super) async fn verify(stage: &Stage) -> Result<Vec<Finding>, DemoError> {
    let mut capture = stage.capture()?;
    let server = stage.server_address(HTTP_PORT);
    let exchange = web::exchange(&stage.client, server, stage.token());
    let frames = capture.drain().map_err(DemoError::io("read the capture"))?;
    let stranger = check_stranger(stage).await?;
    Ok(vec![
        check_response(stage, &exchange),
        check_source(stage, &exchange),
        wire(&frames, stage.token()),
        check_identities(stage),
        check_rules(stage).await?,
        stranger,
    ])
}

fn check_response(stage: &Stage, exchange: &Exchange) -> Finding {
    Finding {
        subject: "response",
        seen: exchange.summary(),
        holds: exchange.succeeded(stage.token()),
    }
}

fn check_source(stage: &Stage, exchange: &Exchange) -> Finding {
    let source = exchange.source();
    let seen = source.map_or_else(|| "no address".to_owned(), |source| source.to_string());
    Finding {
        subject: "source",
        seen: format!("the server saw the client itself: {seen}"),
        holds: source.is_some_and(|source| source.ip() == stage.client_ip()),
    }
}

/// Verifies that both proxies have counted one connection between the two authenticated identities.
fn check_identities(stage: &Stage) -> Finding {
    let (source, destination) = stage.identities();
    Finding {
        subject: "identities",
        seen: format!("{source} → {destination}, counted by both proxies"),
        holds: counted(&stage.client, "source", source, destination)
            && counted(&stage.server, "destination", source, destination),
    }
}

/// Verifies the rules that the request must have matched, with one connection each. The rule that
/// matches the mark counts packets instead.
async fn check_rules(stage: &Stage) -> Result<Finding, DemoError> {
    let mut seen = Vec::new();
    let mut holds = true;
    let expected: [(&Namespace, &str, &[&str]); 2] = [
        (&stage.client, "client", &["capture-outbound"]),
        (&stage.server, "server", &["hbone-in", "own-pod", "return-to-proxy"]),
    ];
    for (namespace, pod, rules) in expected {
        let counters = read_counters(namespace).await?;
        let packets = |rule: &str| counters.iter().find(|c| c.id == rule).map_or(0, |c| c.packets);
        let counts: Vec<String> =
            rules.iter().map(|rule| format!("{rule} {}", packets(rule))).collect();
        holds &= rules.iter().all(|rule| packets(rule) > 0);
        seen.push(format!("{pod}: {}", counts.join(", ")));
    }
    Ok(Finding { subject: "rules moved", seen: seen.join("; "), holds })
}

/// Verifies that the handshake of a client without a certificate fails before it reaches the
/// application.
async fn check_stranger(stage: &Stage) -> Result<Finding, DemoError> {
    let address = stage.server_address_for_stranger(HBONE_PORT);
    let stream = stage
        .stranger
        .run(|| std::net::TcpStream::connect_timeout(&address, STEP_TIMEOUT))
        .map_err(DemoError::namespace("enter pod stranger"))?;
    let connected = stream.and_then(|stream| {
        stream.set_nonblocking(true)?;
        tokio::net::TcpStream::from_std(stream)
    });
    let stream = connected.map_err(DemoError::io("connect as a stranger"))?;
    let (refused, said) = match ask_without_certificate(stage, stream).await {
        Err(error) => (matches!(error, HboneError::CertificateRefused { .. }), error.to_string()),
        Ok(()) => (false, "the server accepted it".to_owned()),
    };
    let requests = stage.requests();
    Ok(Finding {
        subject: "stranger",
        seen: format!(
            "without a certificate: {said} ({requests} request reached the server in all)"
        ),
        holds: refused && requests == 1,
    })
}

async fn ask_without_certificate(
    stage: &Stage,
    stream: tokio::net::TcpStream,
) -> Result<(), HboneError> {
    let (_, server) = stage.identities();
    let credentials = stage.client_credentials().clone().fixed();
    let connector = Connector::anonymous(credentials, ClientSettings::default());
    let address = stage.server_address_for_stranger(HBONE_PORT);
    let tunnel =
        connector.open(stream, address, std::slice::from_ref(server), STEP_TIMEOUT).await?;
    let authority = stage.server_address_for_stranger(HTTP_PORT).to_string();
    let request = ConnectRequest { authority, headers: HeaderMap::new() };
    tunnel.connect(request, STEP_TIMEOUT).await.map(drop)
}

//! `underpass demo`: sends real HTTP between two pods with a proxy each, and verifies the result.
//!
//! It uses real namespaces, rules, two processes of the binary and a packet capture. It runs in new
//! namespaces, which end with the process, and does not change the host.

mod stage;
mod web;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::Duration;

use http::HeaderMap;
use thiserror::Error;
use tokio::time::Instant;
use underpass_hbone::{ClientSettings, ConnectRequest, Connector, HboneError};
use underpass_interception::{
    InterceptionError, Namespace, NamespaceAccess, NamespaceThread, RuleCounter, TcpSegment,
    counters, enter_sandbox,
};

use crate::spawn::SpawnError;
use stage::{HBONE_PORT, HTTP_PORT, METRICS_PORT, Stage};

/// Timeout of each step of the demonstration.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  underpass demo --keep")]
pub(crate) struct Arguments {
    /// Keep the demonstration running until Ctrl-C, and print the commands to enter it
    #[arg(long)]
    keep: bool,
}

/// Why the demonstration failed.
#[derive(Debug, Error)]
pub(crate) enum DemoError {
    #[error(transparent)]
    Sandbox(InterceptionError),
    #[error("cannot {doing}")]
    Namespace { doing: &'static str, source: InterceptionError },
    #[error("cannot {doing}")]
    Io { doing: &'static str, source: io::Error },
    #[error("cannot make the certificates")]
    Certificates(#[source] HboneError),
    #[error("the proxy of pod {pod}")]
    Proxy { pod: &'static str, source: SpawnError },
    #[error("the demonstration failed: not every point holds")]
    Disproved,
}

/// One verified property: its subject, the observation, and whether the property holds.
struct Point {
    subject: &'static str,
    seen: String,
    holds: bool,
}

/// Runs the demonstration; fails unless every property holds.
pub(crate) fn run(arguments: &Arguments) -> Result<(), DemoError> {
    // Only a single-threaded process can enter a user namespace.
    let sandbox = enter_sandbox().map_err(DemoError::Sandbox)?;
    let io = |doing| move |source| DemoError::Io { doing, source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(io("start a runtime"))?.block_on(async {
        let began = Instant::now();
        let mut stage = Stage::set_up().await?;
        let points = prove(&stage).await?;
        let holds = points.iter().all(|point| point.holds);
        let enter_commands = arguments.keep.then(|| stage.enter_commands(sandbox));
        show(&points, began.elapsed(), enter_commands.as_deref()).map_err(io("write"))?;
        if arguments.keep {
            tokio::signal::ctrl_c().await.map_err(io("wait for Ctrl-C"))?;
        }
        stage.take_down().await;
        if holds { Ok(()) } else { Err(DemoError::Disproved) }
    })
}

/// Makes one request and verifies every property of it.
async fn prove(stage: &Stage) -> Result<Vec<Point>, DemoError> {
    let mut wire = stage.capture()?;
    let began = Instant::now();
    let answer = web::get(&stage.client, stage.server_address(HTTP_PORT), "/", stage.token());
    let took = began.elapsed();
    let frames =
        wire.drain().map_err(|source| DemoError::Io { doing: "read the capture", source })?;
    let stranger = stranger(stage).await?;
    Ok(vec![
        response(stage, &answer, took),
        source_kept(stage, &answer),
        encrypted(stage, &frames),
        identities(stage),
        caught(stage).await?,
        stranger,
    ])
}

fn response(stage: &Stage, answer: &io::Result<String>, took: Duration) -> Point {
    let (seen, holds) = match answer {
        Ok(text) => {
            let status = text.lines().next().unwrap_or_default();
            let greeting = text.lines().find(|line| line.starts_with("hello")).unwrap_or_default();
            let right = status.contains("200") && text.contains(stage.token());
            (format!("{status}, \"{greeting}\", after {:.1} ms", took.as_secs_f64() * 1e3), right)
        }
        Err(error) => (error.to_string(), false),
    };
    Point { subject: "response", seen, holds }
}

fn source_kept(stage: &Stage, answer: &io::Result<String>) -> Point {
    let line = |text: &String| {
        text.lines().find_map(|line| line.strip_prefix("you are ").map(str::to_owned))
    };
    let seen = answer.as_ref().ok().and_then(line).unwrap_or_default();
    let address: Option<SocketAddr> = seen.parse().ok();
    let holds = address.is_some_and(|address| address.ip() == stage.client_ip());
    Point { subject: "source", seen: format!("the server saw the client itself: {seen}"), holds }
}

/// The captured packets must contain TLS to the HBONE port, and no plaintext of the request.
fn encrypted(stage: &Stage, frames: &[Vec<u8>]) -> Point {
    let said = [stage.token().as_bytes(), b"GET /", b"HTTP/1.1", b"hello from"];
    let clear = frames.iter().filter(|frame| said.iter().any(|text| contains(frame, text))).count();
    let segments = || frames.iter().filter_map(|frame| TcpSegment::parse(frame));
    let to_port = |port: u16| segments().filter(move |segment| segment.destination.port() == port);
    // RFC 8446 section 5.1: a record begins with its type (20 to 23) and the version 3.x.
    let is_tls = |segment: &TcpSegment<'_>| matches!(segment.payload, [20..=23, 3, ..]);
    let tls = to_port(HBONE_PORT).filter(is_tls).count();
    let direct = to_port(HTTP_PORT).count();
    Point {
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

/// Both proxies must have counted one connection between the two authenticated identities.
fn identities(stage: &Stage) -> Point {
    let (source, destination) = stage.identities();
    let counted = |pod: &Namespace, reporter: &str| {
        let metrics = web::get(pod, ([127, 0, 0, 1], METRICS_PORT).into(), "/metrics", "");
        let wanted = [
            "istio_tcp_connections_opened_total{".to_owned(),
            format!("reporter=\"{reporter}\""),
            format!("source_principal=\"{source}\""),
            format!("destination_principal=\"{destination}\""),
            "connection_security_policy=\"mutual_tls\"".to_owned(),
        ];
        let is_wanted = |line: &str| wanted.iter().all(|part| line.contains(part));
        metrics.is_ok_and(|text| text.lines().any(is_wanted))
    };
    Point {
        subject: "identities",
        seen: format!("{source} → {destination}, counted by both proxies"),
        holds: counted(&stage.client, "source") && counted(&stage.server, "destination"),
    }
}

/// The rules that the request must have matched, with one connection each. The rule of the mark
/// counts packets.
async fn caught(stage: &Stage) -> Result<Point, DemoError> {
    let mut seen = Vec::new();
    let mut holds = true;
    let expected: [(&Namespace, &str, &[&str]); 2] = [
        (&stage.client, "client", &["capture-outbound"]),
        (&stage.server, "server", &["hbone-in", "own-pod", "return-to-proxy"]),
    ];
    for (namespace, pod, rules) in expected {
        let counters = read_counters(namespace).await?;
        let moved = |rule: &str| counters.iter().find(|c| c.id == rule).map_or(0, |c| c.packets);
        let moves: Vec<String> =
            rules.iter().map(|rule| format!("{rule} {}", moved(rule))).collect();
        holds &= rules.iter().all(|rule| moved(rule) > 0);
        seen.push(format!("{pod}: {}", moves.join(", ")));
    }
    Ok(Point { subject: "rules moved", seen: seen.join("; "), holds })
}

async fn read_counters(namespace: &Namespace) -> Result<Vec<RuleCounter>, DemoError> {
    let failed = |source| DemoError::Namespace { doing: "read the rules' counters", source };
    let thread = NamespaceThread::start()
        .map_err(|source| DemoError::Io { doing: "start a thread", source })?;
    counters(&NamespaceAccess::new(namespace.clone(), thread)).await.map_err(failed)
}

/// The handshake of a client without a certificate must fail before it reaches the application.
async fn stranger(stage: &Stage) -> Result<Point, DemoError> {
    let address = stage.server_address_for_stranger(HBONE_PORT);
    let stream =
        stage.stranger.run(|| std::net::TcpStream::connect_timeout(&address, STEP_TIMEOUT));
    let stream =
        stream.map_err(|source| DemoError::Namespace { doing: "enter pod stranger", source })?;
    let connected = stream.and_then(|stream| {
        stream.set_nonblocking(true)?;
        tokio::net::TcpStream::from_std(stream)
    });
    let stream =
        connected.map_err(|source| DemoError::Io { doing: "connect as a stranger", source })?;
    let (refused, said) = match ask_without_certificate(stage, stream).await {
        Err(error) => (matches!(error, HboneError::CertificateRefused { .. }), error.to_string()),
        Ok(()) => (false, "it was let in".to_owned()),
    };
    let requests = stage.requests();
    Ok(Point {
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

fn show(points: &[Point], took: Duration, enter_commands: Option<&str>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "underpass demo: pod client ── proxy ══ mutual TLS ══ proxy ── pod server\n")?;
    for point in points {
        let mark = if point.holds { "✓" } else { "✗" };
        writeln!(out, "  {mark} {:<12} {}", point.subject, point.seen)?;
    }
    let proven = points.iter().filter(|point| point.holds).count();
    writeln!(
        out,
        "\n{proven} of {} points hold; {:.1} s, all of it in namespaces of its own.",
        points.len(),
        took.as_secs_f32()
    )?;
    if let Some(enter_commands) = enter_commands {
        writeln!(out, "{enter_commands}")?;
    }
    out.flush()
}

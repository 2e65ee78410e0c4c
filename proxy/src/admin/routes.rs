//! The paths that each listener serves.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use http::{Method, StatusCode, header};

use crate::admin::answer::{Answer, JSON, Refusal, json, stream, text};
use crate::admin::api::{certificates, config_dump, connections, drain, logging, rules, version};
use crate::admin::authority;
use crate::admin::liveness::Liveness;
use crate::admin::page;
use crate::admin::query::Query;
use crate::admin::readiness::Readiness;
use crate::admin::state::Admin;
use crate::admin::status;
use crate::observe::metrics::{Exporter, Format};
use crate::version::VERSION;

/// The paths of administration: their methods and purposes. Only the Unix socket serves POST.
const ADMIN_PATHS: &[(&str, &[Method], &str)] = &[
    ("/", &[Method::GET], "this list; for a browser, a page"),
    ("/version", &[Method::GET], "the program that runs"),
    ("/status", &[Method::GET], "what the proxy does, and its problems: ?pod=NAMESPACE/NAME"),
    ("/connections", &[Method::GET], "open and recent connections: ?pod, ?from, ?to, ?follow, ..."),
    (
        "/config_dump",
        &[Method::GET],
        "mesh, certificates and settings, for istioctl ztunnel-config",
    ),
    ("/certificates", &[Method::GET], "the certificates of the served pods"),
    (
        "/rules",
        &[Method::GET],
        "the interception rules of a pod, with counters: ?pod=NAMESPACE/NAME",
    ),
    (
        "/drain",
        &[Method::GET, Method::POST],
        "takes a pod out of use without cutting its connections: ?pod=NAMESPACE/NAME, ?deadline",
    ),
    ("/undrain", &[Method::POST], "ends the drain of a pod: ?pod=NAMESPACE/NAME"),
    (
        "/renew_tunnels",
        &[Method::POST],
        "replaces the tunnels that a pod has opened: ?pod=NAMESPACE/NAME",
    ),
    (
        "/logging",
        &[Method::GET, Method::POST],
        "the filter of the log: ?filter=info,access=off, ?reset",
    ),
];

/// The paths of one listener.
#[derive(Clone)]
pub(crate) enum Routes {
    Readiness(Readiness, Liveness),
    Metrics(Exporter),
    Admin(Arc<Admin>, Access),
    /// Refuses every request, for this reason.
    Refused(&'static str),
}

/// The permission of the clients of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read: the address, to which every local process can connect.
    Read,
    /// Read and change: the Unix socket.
    Change,
}

impl Routes {
    /// The maximum duration of a connection; `None` without a limit.
    pub(super) fn lifetime(&self) -> Option<Duration> {
        match self {
            Self::Readiness(..) | Self::Metrics(_) | Self::Refused(_) => {
                Some(Duration::from_secs(5))
            }
            // A long answer, or one that continues.
            Self::Admin(_, Access::Read) => Some(Duration::from_secs(600)),
            Self::Admin(_, Access::Change) => None,
        }
    }

    /// The listener in logs.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Readiness(..) => "readiness",
            Self::Metrics(_) => "metrics",
            Self::Admin(_, Access::Read) => "admin.address",
            Self::Admin(_, Access::Change) | Self::Refused(_) => "admin.socket",
        }
    }

    pub(super) async fn answer(&self, request: &Parts) -> Answer {
        let answered = match self {
            Self::Readiness(readiness, liveness) => {
                readiness_answer(readiness, liveness, request).await
            }
            Self::Metrics(exporter) => metrics_answer(exporter, request),
            Self::Admin(admin, access) => admin_answer(admin, *access, request).await,
            Self::Refused(reason) => Err(Refusal::new(StatusCode::FORBIDDEN, *reason)),
        };
        answered.unwrap_or_else(Answer::from)
    }
}

async fn readiness_answer(
    readiness: &Readiness,
    liveness: &Liveness,
    request: &Parts,
) -> Result<Answer, Refusal> {
    only_get(request)?;
    match request.uri.path() {
        "/healthz/ready" => Ok(readiness.answer()),
        "/healthz/live" => Ok(liveness.answer().await),
        "/healthz/pods" => readiness.answer_pods().await.ok_or_else(readiness_paths),
        _ => Err(readiness_paths()),
    }
}

fn readiness_paths() -> Refusal {
    Refusal::new(
        StatusCode::NOT_FOUND,
        "not found: this endpoint serves /healthz/ready and /healthz/live",
    )
}

fn metrics_answer(exporter: &Exporter, request: &Parts) -> Result<Answer, Refusal> {
    only_get(request)?;
    match request.uri.path() {
        "/metrics" | "/stats/prometheus" => {
            let format = Format::accepted(request.headers.get(header::ACCEPT));
            let pages = futures_util::stream::iter(exporter.pages(format));
            Ok(stream(format.content_type(), pages))
        }
        _ => Err(Refusal::new(StatusCode::NOT_FOUND, "not found: this endpoint serves /metrics")),
    }
}

fn only_get(request: &Parts) -> Result<(), Refusal> {
    match request.method {
        Method::GET => Ok(()),
        _ => Err(Refusal::method(&[Method::GET], "only GET")),
    }
}

async fn admin_answer(admin: &Admin, access: Access, request: &Parts) -> Result<Answer, Refusal> {
    if access == Access::Read {
        authority::check(request)?;
    }
    if let (&Method::GET, Some(file)) = (&request.method, page::answer(request)) {
        return Ok(file);
    }
    let path = request.uri.path();
    if logging::only_reads(&request.uri) && request.method == Method::POST {
        return Ok(json(&logging::show()));
    }
    check_method(path, access, &request.method)?;
    let query = Query::of(&request.uri);
    match (path, &request.method) {
        ("/", _) => {
            query.end("no parameters")?;
            Ok(text(StatusCode::OK, index()))
        }
        ("/status", _) => status::status(admin, query).await,
        ("/connections", _) => connections::connections(admin, query).await,
        ("/version", _) => {
            query.end("no parameters")?;
            Ok(json(&version::version(admin)))
        }
        ("/config_dump", _) => {
            query.end("no parameters")?;
            let open = admin.open_connections().await;
            Ok(stream(JSON, config_dump::chunks(admin, open)))
        }
        ("/certificates", _) => {
            query.end("no parameters")?;
            Ok(json(&certificates::certificates(admin)))
        }
        ("/rules", _) => Ok(json(&rules::rules(admin, query).await?)),
        ("/drain", &Method::POST) => Ok(json(&drain::begin(admin, query).await?)),
        ("/drain", _) => Ok(json(&drain::show(admin, query).await?)),
        ("/undrain", _) => Ok(json(&drain::undo(admin, query).await?)),
        ("/renew_tunnels", _) => Ok(json(&drain::renew_tunnels(admin, query).await?)),
        ("/logging", &Method::POST) => Ok(json(&logging::change(query)?)),
        ("/logging", _) => {
            query.end("no parameters")?;
            Ok(json(&logging::show()))
        }
        _ => Err(no_such_path()),
    }
}

/// Refuses an unknown path, and a method that the path does not have or the listener does not
/// serve.
fn check_method(path: &str, access: Access, method: &Method) -> Result<(), Refusal> {
    let known = ADMIN_PATHS.iter().find(|(known, ..)| *known == path);
    let (_, methods, _) = known.ok_or_else(no_such_path)?;
    if !methods.contains(method) {
        let names: Vec<_> = methods.iter().map(Method::as_str).collect();
        let reason = format!("{path} has only {}", names.join(" and "));
        return Err(Refusal::method(methods, reason));
    }
    if method != Method::GET && access == Access::Read {
        let reason = "this address only reads: change through the Unix socket (admin.socket)";
        return Err(Refusal::new(StatusCode::FORBIDDEN, reason));
    }
    Ok(())
}

/// Lists the paths.
fn index() -> String {
    let mut text = format!("underpass {VERSION}\n\n");
    for (path, methods, purpose) in ADMIN_PATHS {
        let methods: Vec<_> = methods.iter().map(Method::as_str).collect();
        // Writing to a String cannot fail.
        writeln!(text, "{path:14} {:9} {purpose}", methods.join(",")).ok();
    }
    text
}

fn no_such_path() -> Refusal {
    let paths: Vec<_> = ADMIN_PATHS.iter().map(|(path, ..)| *path).collect();
    let reason = format!("not found: this endpoint serves {}", paths.join(", "));
    Refusal::new(StatusCode::NOT_FOUND, reason)
}

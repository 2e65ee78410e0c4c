//! The settings `logging.access` and `tracing.otlp`.

use std::path::PathBuf;

use super::identity::is_host;
use crate::settings::declare::{
    Declared as _, Document, FLAG, Fallback, Files, Kind, PATH, TEXT, Written, given_list, list,
    parsed, settings, word,
};
use crate::settings::{AccessLogSettings, LoggedConnections, NamespaceLog, OtlpSettings, Ratio};
use crate::yaml::read::Cursor;

settings! {
    /// the connections that have a line in the access log: `all`; `failures`: those that failed or
    /// could not be opened; `none`
    CONNECTIONS: LoggedConnections = "logging.access.connections", word("`all`, `failures`, `none`"),
        Fallback::Is(|| LoggedConnections::All), |s| Some(s.logging.access.connections);
    /// the fraction of the connections without a failure that have a line; both ends of a tunnel
    /// log the same ones
    SAMPLE: Ratio = "logging.access.sample_ratio", RATIO,
        Fallback::Is(|| Ratio::ALL), |s| Some(s.logging.access.sample_ratio);
    /// exceptions from `connections`, each as `NAMESPACE=all`, `NAMESPACE=failures` or
    /// `NAMESPACE=none`: the first one for the proven namespace of the source or the destination
    /// decides
    NAMESPACES: Vec<NamespaceLog> = "logging.access.namespaces",
        list("list of `NAMESPACE=CONNECTIONS`", namespaces),
        Fallback::Is(Vec::new), |s| Some(s.logging.access.namespaces.clone());
    /// `http://HOST:PORT` or `https://HOST:PORT` of a collector, which gets the traces of
    /// connections (OTLP over HTTP): [operations.md](operations.md#traces)
    ENDPOINT: String = "tracing.otlp.endpoint", COLLECTOR,
        Fallback::Varies("none"), |s| s.otlp.as_ref().map(|otlp| otlp.endpoint.clone());
    /// a file with further headers of each request, one `NAME: VALUE` a line; read for every
    /// request
    HEADERS: PathBuf = "tracing.otlp.headers", PATH,
        Fallback::Varies("none"), |s| s.otlp.as_ref().and_then(|otlp| otlp.headers.clone());
    /// PEM: the roots that verify the collector's certificate; read for every request
    ROOTS: PathBuf = "tracing.otlp.roots", PATH,
        Fallback::Varies("with `https`"), |s| s.otlp.as_ref().and_then(|otlp| otlp.roots.clone());
    /// the fraction of the connections that are traced; inbound, the peer's `traceparent` decides
    TRACED: Ratio = "tracing.otlp.sample_ratio", RATIO,
        Fallback::Is(|| Ratio::ALL), |s| s.otlp.as_ref().map(|otlp| otlp.sample_ratio);
    /// whether the collector gets the events of the log too
    LOGS: bool = "tracing.otlp.logs", FLAG,
        Fallback::Is(|| false), |s| s.otlp.as_ref().map(|otlp| otlp.logs);
}

const RATIO: Kind<Ratio> = Kind {
    name: "fraction",
    is_list: false,
    read: |cursor, _| cursor.parse_explained(),
    write: |ratio| Written::scalar(ratio),
};

const COLLECTOR: Kind<String> =
    Kind { name: "`http://HOST:PORT`, `https://HOST:PORT`", read: endpoint, ..TEXT };

fn namespaces(cursor: Cursor<'_>, _: Files<'_>) -> Option<Vec<NamespaceLog>> {
    given_list(cursor, parsed)
}

fn endpoint(cursor: Cursor<'_>, _: Files<'_>) -> Option<String> {
    let text = cursor.text()?;
    if !is_endpoint(text) {
        cursor
            .problem("must be http://HOST:PORT, such as http://otel-collector.observability:4318");
        return None;
    }
    Some(text.trim_end_matches('/').to_owned())
}

/// Whether the text is a URL of a host with an optional port and an optional path.
fn is_endpoint(text: &str) -> bool {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let Some(rest) = rest else { return false };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (authority, "443"),
    };
    let is_port =
        port.bytes().all(|c| c.is_ascii_digit()) && port.parse().is_ok_and(|port: u16| port > 0);
    let is_path = path.bytes().all(|c| c.is_ascii_alphanumeric() || b"/-_.~".contains(&c));
    is_host(host) && is_port && is_path
}

/// Reads `logging.access`.
pub(super) fn access_log(document: Document<'_>) -> Option<AccessLogSettings> {
    let settings = AccessLogSettings {
        connections: CONNECTIONS.read(document)?,
        sample_ratio: SAMPLE.read(document)?,
        namespaces: NAMESPACES.read(document)?,
    };
    for (index, one) in settings.namespaces.iter().enumerate() {
        let mut before = settings.namespaces.iter().take(index);
        if let Some(other) = before.find(|other| other.namespace == one.namespace) {
            let reason = format!("{other} and {one} contradict each other");
            NAMESPACES.problem(document, &reason);
        }
    }
    Some(settings)
}

/// Reads `tracing.otlp`. Returns `None` if it is absent, or after a mistake in it.
pub(super) fn otlp(document: Document<'_>) -> Option<OtlpSettings> {
    if !document.root.key("tracing").key("otlp").is_given() {
        return None;
    }
    let endpoint = ENDPOINT.needed(document, "is needed to export traces")?;
    let roots = match endpoint.starts_with("https:") {
        true => Some(ROOTS.needed(document, "is needed to verify the collector's certificate")?),
        false => {
            if ROOTS.is_given(document) {
                ROOTS.problem(document, "has an effect only with an https endpoint");
            }
            None
        }
    };
    Some(OtlpSettings {
        endpoint,
        roots,
        headers: HEADERS.given(document),
        sample_ratio: TRACED.read(document)?,
        logs: LOGS.read(document)?,
    })
}

#[cfg(test)]
mod tests {
    use crate::settings::Settings;
    use crate::settings::load::Sources;

    fn load(flags: &[&str]) -> Result<Settings, String> {
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        let sources = Sources { file: None, environment: Vec::new(), flags };
        sources.load().map_err(|errors| errors.to_string())
    }

    #[test]
    fn reads_collector_with_defaults() {
        assert_eq!(load(&[]).unwrap().otlp, None);
        for (given, read) in [
            ("http://otel:4318", "http://otel:4318"),
            ("http://otel", "http://otel"),
            ("http://[::1]:4318/", "http://[::1]:4318"),
            ("http://10.0.0.1:4318/otlp/v1", "http://10.0.0.1:4318/otlp/v1"),
        ] {
            let otlp = load(&[&format!("tracing.otlp.endpoint={given}")]).unwrap().otlp.unwrap();
            assert_eq!((&*otlp.endpoint, otlp.logs), (read, false));
            assert_eq!(otlp.sample_ratio.to_string(), "1");
        }
    }

    #[test]
    fn rejects_incomplete_and_contradictory_settings() {
        let endpoint = |text: &str| format!("tracing.otlp.endpoint={text}");
        let https = endpoint("https://otel:4318");
        for (flags, reason) in [
            (&["tracing.otlp.logs=true"][..], "tracing.otlp.endpoint: is needed"),
            (&[&endpoint("otel:4318")], "must be http://HOST:PORT"),
            (&[&endpoint("http://user@otel:4318")], "must be http://HOST:PORT"),
            (&[&endpoint("http://otel:0")], "must be http://HOST:PORT"),
            (&[&https], "tracing.otlp.roots: is needed"),
            (&[&endpoint("http://otel"), "tracing.otlp.roots=r"], "only with an https endpoint"),
            (&[&https, "tracing.otlp.roots=r", "tracing.otlp.sample_ratio=2"], "from 0 to 1"),
            (&["logging.access.namespaces=a=all,a=none"], "contradict each other"),
            (&["logging.access.namespaces=a"], "must be NAMESPACE=all"),
            (&["logging.access.connections=some"], "logging.access.connections"),
        ] {
            let errors = load(flags).unwrap_err();
            assert!(errors.contains(reason), "{flags:?}: {errors}");
        }
    }
}

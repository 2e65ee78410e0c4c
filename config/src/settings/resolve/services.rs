//! The settings `metrics`, `readiness` and `logging`.

use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::settings::declare::{
    ADDRESS, COUNT, DURATION, Declared, Document, Fallback, Kind, TEXT, Written, settings, word,
};
use crate::settings::{LogFilter, LogFormat, Logging, ProxySettings, SeriesSettings};

settings! {
    /// the address of `/metrics`, for Prometheus
    METRICS: SocketAddr = "metrics.address", ADDRESS,
        Fallback::Is(|| on_all_addresses(15020)), |s| Some(s.metrics);
    /// the maximum number of label sets of connections, about 4 KiB of `/metrics` each; further
    /// connections are counted in a set whose labels are `overflow`
    LABEL_SETS: usize = "metrics.label_sets", COUNT,
        Fallback::Is(|| SeriesSettings::default().limit), |s| Some(s.series.limit);
    /// the time without counts after which a label set is removed, unless it has an open connection
    SERIES_IDLE: Duration = "metrics.idle", DURATION,
        Fallback::Is(|| SeriesSettings::default().idle), |s| Some(s.series.idle);
    /// the address of `/healthz/ready`: 200 when ready; 503 while starting or draining, without
    /// file descriptors, or while another program keeps changing the rules
    READINESS: SocketAddr = "readiness.address", ADDRESS,
        Fallback::Is(|| on_all_addresses(15021)), |s| Some(s.readiness);
    /// levels by target in tracing's syntax: `info,access=off`, `debug`; levels are `off`, `error`,
    /// `warn`, `info`, `debug`, `trace`, and a word without `=` must be one
    FILTER: LogFilter = "logging.filter", LOG_FILTER,
        Fallback::Is(LogFilter::default), |s| Some(s.logging.filter.clone());
    /// `plain` or `json`, one line each, on standard output
    /// ([operations.md](operations.md#log-lines))
    FORMAT: LogFormat = "logging.format", word("`plain`, `json`"),
        Fallback::Is(|| LogFormat::Plain), |s| Some(s.logging.format);
}

const LOG_FILTER: Kind<LogFilter> = Kind {
    name: TEXT.name,
    is_list: false,
    read: |cursor, _| {
        let parsed = cursor.text()?.parse();
        let report =
            |error| cursor.problem(format!("must be like info or info,access=off: {error}"));
        parsed.map_err(report).ok()
    },
    write: |filter| Written::scalar(filter),
};

fn on_all_addresses(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))
}

/// The addresses of metrics and readiness.
pub(super) fn addresses(document: Document<'_>) -> Option<[SocketAddr; 2]> {
    Some([METRICS.read(document)?, READINESS.read(document)?])
}

/// Rejects a metrics or readiness address whose port another listener uses on an overlapping
/// address.
pub(super) fn refuse_shared_ports(
    document: Document<'_>,
    proxy: &ProxySettings,
    [metrics, readiness]: [SocketAddr; 2],
) {
    let taken = [
        (proxy.outbound_port, "proxy.outbound_port"),
        (proxy.inbound_port, "proxy.inbound_port"),
        (proxy.hbone_port, "proxy.hbone_port"),
    ];
    for (setting, address) in [(METRICS, metrics), (READINESS, readiness)] {
        let other = taken.iter().find(|(port, _)| *port == address.port());
        if let Some((port, key)) = other {
            setting.problem(document, &format!("port {port} is that of {key}"));
        }
    }
    let is_any_wildcard = metrics.ip().is_unspecified() || readiness.ip().is_unspecified();
    let is_same_address = is_any_wildcard || metrics.ip() == readiness.ip();
    if metrics.port() != 0 && metrics.port() == readiness.port() && is_same_address {
        let reason = format!("port {} is that of metrics.address", metrics.port());
        READINESS.problem(document, &reason);
    }
}

pub(super) fn series(document: Document<'_>) -> Option<SeriesSettings> {
    Some(SeriesSettings { limit: LABEL_SETS.read(document)?, idle: SERIES_IDLE.read(document)? })
}

pub(super) fn logging(document: Document<'_>) -> Option<Logging> {
    Some(Logging { filter: FILTER.read(document)?, format: FORMAT.read(document)? })
}

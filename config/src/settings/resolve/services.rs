//! The settings `metrics`, `readiness`, `admin` and `logging`.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::telemetry;
use crate::settings::declare::{
    ADDRESS, ADDRESS_OR_OFF, COUNT, DURATION, Declared, Document, Fallback, Files, Kind,
    LOCAL_SOCKET, TEXT, Written, given_list, list, parsed, settings, word,
};
use crate::settings::{
    AdminSettings, LocalSocket, LogFilter, LogFormat, Logging, MetricLabel, NodeSettings,
    ProxySettings, SeriesSettings,
};
use crate::yaml::read::Cursor;

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
    /// labels of `istio_tcp_*` that are left out, such as `source_principal`; connections that
    /// differ only in these share a label set
    OMIT_LABELS: Vec<MetricLabel> = "metrics.omit_labels", list("list of labels", labels),
        Fallback::Is(Vec::new), |s| Some(s.series.omitted.clone());
    /// the address of `/healthz/ready`: 200 when ready, else 503 with the reasons
    READINESS: SocketAddr = "readiness.address", ADDRESS,
        Fallback::Is(|| on_all_addresses(15021)), |s| Some(s.readiness);
    /// the Unix socket that reads and changes the running proxy, for root and the proxy's user;
    /// `auto`: `/run/underpass/admin-N.sock`, where N is the number of the network namespace;
    /// `off`: no socket
    ADMIN_SOCKET: LocalSocket = "admin.socket", LOCAL_SOCKET,
        Fallback::Is(|| LocalSocket::Auto), |s| Some(s.admin.socket.clone());
    /// the address on the loopback interface that reports the state of the running proxy and
    /// changes nothing; every process of the network namespace can read it
    ADMIN_ADDRESS: Option<SocketAddr> = "admin.address", ADDRESS_OR_OFF,
        Fallback::Varies("`127.0.0.1:15000` with `node.pods`, else `off`"),
        |s| Some(s.admin.address);
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

/// The settings of administration. The workload of `underpass run` can connect to the loopback
/// interface, so the address is off there by default.
pub(super) fn admin(document: Document<'_>, node: &NodeSettings) -> Option<AdminSettings> {
    let default = node.pods.is_some().then(|| SocketAddr::from((Ipv4Addr::LOCALHOST, 15000)));
    let address = ADMIN_ADDRESS.read(document).unwrap_or(default);
    if address.is_some_and(|address| !address.ip().is_loopback()) {
        let reason = "must be an address of the loopback interface, such as 127.0.0.1:15000: anyone who can connect can read it";
        ADMIN_ADDRESS.problem(document, reason);
    }
    Some(AdminSettings { socket: ADMIN_SOCKET.read(document)?, address })
}

/// Rejects the address of an endpoint whose port another listener uses on an overlapping address.
pub(super) fn refuse_shared_ports(
    document: Document<'_>,
    proxy: &ProxySettings,
    [metrics, readiness]: [SocketAddr; 2],
    admin: Option<SocketAddr>,
) {
    let taken = [
        (proxy.outbound_port, "proxy.outbound_port"),
        (proxy.inbound_port, "proxy.inbound_port"),
        (proxy.hbone_port, "proxy.hbone_port"),
    ];
    let mut endpoints: Vec<(&dyn Declared, SocketAddr)> = Vec::new();
    let all = [
        (&METRICS as &dyn Declared, Some(metrics)),
        (&READINESS, Some(readiness)),
        (&ADMIN_ADDRESS, admin),
    ];
    for (setting, address) in all {
        let Some(address) = address else { continue };
        let port = address.port();
        let of_proxy = taken.iter().find(|(taken, _)| *taken == port).map(|(_, key)| *key);
        let earlier = endpoints.iter().find(|(_, other)| overlap(address, *other));
        if let Some(key) = of_proxy.or_else(|| earlier.map(|(other, _)| other.key())) {
            setting.problem(document, &format!("port {port} is that of {key}"));
        }
        endpoints.push((setting, address));
    }
}

/// Whether two listeners at these addresses would conflict. The kernel chooses a port for 0.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let is_any_wildcard = one.ip().is_unspecified() || other.ip().is_unspecified();
    let is_same_address = is_any_wildcard || one.ip() == other.ip();
    one.port() != 0 && one.port() == other.port() && is_same_address
}

pub(super) fn series(document: Document<'_>) -> Option<SeriesSettings> {
    let (limit, idle) = (LABEL_SETS.read(document), SERIES_IDLE.read(document));
    let omitted = OMIT_LABELS.read(document);
    Some(SeriesSettings { limit: limit?, idle: idle?, omitted: omitted? })
}

fn labels(cursor: Cursor<'_>, _: Files<'_>) -> Option<Vec<MetricLabel>> {
    given_list(cursor, parsed)
}

pub(super) fn logging(document: Document<'_>) -> Option<Logging> {
    Some(Logging {
        filter: FILTER.read(document)?,
        format: FORMAT.read(document)?,
        access: telemetry::access_log(document)?,
    })
}

//! Prometheus metrics. Connections have series by their labels (`series.rs`, `registry.rs`) and
//! histograms by worker (`timings.rs`). Events that are rarer are counted by the recorder.
//!
//! The `admin` module serves `/metrics`. No histogram may go to the recorder: it would keep each
//! sample until the next scrape, and has no exemplars.

mod budgets;
mod certificates;
pub(crate) mod dns;
mod exposition;
mod histogram;
mod host;
mod hostnames;
mod known;
pub(crate) mod mesh;
pub(crate) mod pods;
mod process;
mod registry;
mod runtimes;
mod series;
mod series_map;
mod timings;

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use metrics::{Gauge, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{BuildError, PrometheusBuilder, PrometheusHandle};
use underpass_config::{Profile, SeriesSettings, SpiffeId};
use underpass_interception::Backend;

pub(crate) use self::budgets::BudgetUse;
pub(crate) use self::exposition::Format;
use self::exposition::Page;
pub(crate) use self::known::KnownSeries;
pub(crate) use self::registry::SeriesRegistry;
pub(crate) use self::series::{Labels, Series};
pub(crate) use self::timings::{Milestone, PoolUse, Timings};
use crate::observe::party::Direction;

const PAUSES: &str = "underpass_accept_paused_total";
const BUILD: &str = "istio_build";
const BUILD_INFO: &str = "underpass_build_info";
const INTERCEPTION: &str = "underpass_interception";
const REPAIRS: &str = "underpass_rules_repairs_total";
const INTACT: &str = "underpass_rules_intact";
const PROBES: &str = "underpass_kubelet_probe_connections_total";
const NOT_LOCAL: &str = "underpass_inbound_not_local_total";
const FOREIGN_SOURCE: &str = "underpass_outbound_foreign_source_total";
const SELF_TEST: &str = "underpass_self_test_passed";
const FOREIGN: &str = "underpass_foreign_rules";
const RENEWALS: &str = "underpass_certificate_renewals_total";
const RENEWALS_FAILED: &str = "underpass_certificate_failures_total";
const TUNNELS: &str = "underpass_tunnels_open";
const TUNNELS_CLOSED: &str = "underpass_tunnels_closed_total";
const REFUSED: &str = "underpass_connections_refused_total";
const HANDSHAKES: &str = "underpass_handshakes_under_way";
const HANDSHAKES_WAITED: &str = "underpass_handshakes_waited_total";
const HANDSHAKES_FAILED: &str = "underpass_handshakes_failed_total";
const LOG_LINES_LOST: &str = "underpass_log_lines_lost_total";
const HANDSHAKES_REFUSED: &str = "underpass_handshakes_refused_total";
const BUFFERS_REFUSED: &str = "underpass_buffers_refused_total";
const BUFFER_BYTES: &str = "underpass_buffer_bytes";
const RESTARTS: &str = "underpass_task_restarts_total";
const DIRECT: &str = "underpass_direct_connections_total";
const ERRORS: &str = "underpass_connection_errors_total";
const REVOKED: &str = "istio_crl_policy_rejections_total";
const EJECTED: &str = "underpass_endpoints_ejected_total";
const TELEMETRY_EXPORTED: &str = "underpass_telemetry_exported_total";
const TELEMETRY_DROPPED: &str = "underpass_telemetry_dropped_total";
const TELEMETRY_FAILED: &str = "underpass_telemetry_failed_requests_total";

/// Renders `/metrics`.
#[derive(Clone)]
pub(crate) struct Exporter {
    recorder: PrometheusHandle,
    /// The counters of connections.
    pub(crate) series: Arc<SeriesRegistry>,
}

impl Exporter {
    /// The response in this format, in parts. Each is rendered when it is requested, so that other
    /// tasks can run in between.
    pub(crate) fn pages(&self, format: Format) -> impl Iterator<Item = Bytes> + Send + use<> {
        let mut page = Page::new(format);
        page.append_recorded(&self.recorder.render());
        certificates::render(&mut page);
        dns::render(&mut page);
        process::render(&mut page);
        host::render(&mut page);
        self.series.render_fixed(&mut page);
        let mut end = Page::new(format);
        end.end();
        let fixed = std::iter::once(page.into_bytes());
        fixed.chain(self.series.pages(format)).chain([end.into_bytes()])
    }

    /// The whole response in Prometheus' format.
    pub(crate) fn render(&self) -> String {
        let pages: Vec<_> = self.pages(Format::Prometheus).collect();
        String::from_utf8_lossy(&pages.concat()).into_owned()
    }
}

/// Installs the metrics recorder of this process.
pub(crate) fn install(settings: SeriesSettings) -> Result<Exporter, BuildError> {
    let recorder = PrometheusBuilder::new().install_recorder()?;
    process::started();
    dns::describe();
    mesh::describe();
    pods::describe();
    describe_counter!(PAUSES, "Pauses of accepting, by the exhausted resource.");
    describe_gauge!(BUILD, "The running version, under ztunnel's name; always 1.");
    describe_gauge!(BUILD_INFO, "The running version; always 1.");
    describe_gauge!(INTERCEPTION, "How traffic is intercepted; always 1.");
    describe_counter!(REPAIRS, "Repairs of rules that another program had changed.");
    describe_gauge!(INTACT, "Whether the rules of every pod are intact: 1, or 0.");
    describe_counter!(
        PROBES,
        "Connections from the kubelet's probe address that bypassed the proxy (interception.kubelet_probes)."
    );
    describe_counter!(
        NOT_LOCAL,
        "Inbound connections refused because they are for an address that is not this pod's."
    );
    counter!(NOT_LOCAL).increment(0);
    describe_counter!(
        FOREIGN_SOURCE,
        "Outbound connections refused because they come from an address that is not this pod's."
    );
    counter!(FOREIGN_SOURCE).increment(0);
    describe_gauge!(SELF_TEST, "Whether the last self-test of every pod's rules passed: 1, or 0.");
    describe_gauge!(FOREIGN, "Rules of other programs that precede the proxy's.");
    describe_counter!(RENEWALS, "Certificates that came into use, including the first one.");
    describe_counter!(
        RENEWALS_FAILED,
        "Certificates, roots or revocation lists that could not be renewed or read."
    );
    describe_gauge!(TUNNELS, "Open HBONE tunnels.");
    describe_counter!(
        TUNNELS_CLOSED,
        "Tunnels of peers that this proxy drained or closed, by reason: age, expiry, idle, drain, or the limit that the peer exceeded."
    );
    describe_counter!(REFUSED, "Connections and streams refused, by the exceeded limit.");
    describe_gauge!(HANDSHAKES, "TLS handshakes with clients in progress.");
    describe_counter!(HANDSHAKES_WAITED, "TLS handshakes that were queued.");
    describe_counter!(HANDSHAKES_REFUSED, "TLS handshakes refused, by the exceeded limit.");
    describe_counter!(
        HANDSHAKES_FAILED,
        "Handshakes of clients that failed, by the reason of the access log."
    );
    describe_counter!(
        LOG_LINES_LOST,
        "Log lines lost because standard output was stalled or full."
    );
    counter!(LOG_LINES_LOST).increment(0);
    describe_counter!(
        BUFFERS_REFUSED,
        "Buffers or pipes that busy connections did not get, by the exhausted resource."
    );
    describe_gauge!(BUFFER_BYTES, "Bytes of memory reserved for buffers of busy connections.");
    describe_counter!(DIRECT, "Connections between two pods of the process without a tunnel.");
    describe_counter!(
        REVOKED,
        "Connections that failed or ended because a certificate is on a revocation list."
    );
    describe_counter!(
        ERRORS,
        "Connections that failed or ended early, by the reason of the access log."
    );
    describe_counter!(EJECTED, "Endpoints ejected because they could not be connected to.");
    describe_counter!(TELEMETRY_EXPORTED, "Items that the collector has taken, by signal.");
    describe_counter!(TELEMETRY_DROPPED, "Items that the collector did not get, by signal.");
    describe_counter!(TELEMETRY_FAILED, "Failed requests to the collector, by signal.");
    describe_counter!(RESTARTS, "Tasks of the proxy that failed and were started again, by task.");
    // Istio's dashboards select the component; the tag tells which proxy this is.
    let tag = concat!("underpass-", env!("CARGO_PKG_VERSION"));
    gauge!(BUILD, "component" => "ztunnel", "tag" => tag).set(1);
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1);
    Ok(Exporter { recorder, series: Arc::new(SeriesRegistry::new(settings)) })
}

/// Counts a pause of a listener for `reason`.
pub(crate) fn accept_paused(listener: &'static str, reason: &'static str) {
    counter!(PAUSES, "listener" => listener, "reason" => reason).increment(1);
}

/// Counts a connection or stream that exceeds a limit.
pub(crate) fn connection_refused(limit: &'static str, listener: &'static str) {
    counter!(REFUSED, "limit" => limit, "listener" => listener).increment(1);
}

/// Reports the profile and the backend of the rules, once they are installed.
pub(crate) fn interception(profile: Profile, backend: Backend) {
    let (profile, backend) = (profile.to_string(), backend.to_string());
    gauge!(INTERCEPTION, "profile" => profile, "backend" => backend).set(1);
    // Without repairs the counter is 0, not absent.
    counter!(REPAIRS).increment(0);
}

/// Counts a repair of the rules.
pub(crate) fn rules_repaired() {
    counter!(REPAIRS).increment(1);
}

/// Reports whether the rules of every pod are intact.
pub(crate) fn rules_intact(intact: bool) {
    gauge!(INTACT).set(f64::from(intact));
}

/// Counts connections of kubelet probes that bypassed the proxy.
pub(crate) fn kubelet_probes(connections: u64) {
    counter!(PROBES).increment(connections);
}

/// Counts an inbound connection to an address that is not this namespace's own.
pub(crate) fn not_local() {
    counter!(NOT_LOCAL).increment(1);
}

/// Counts an outbound connection from an address that is not known to be the pod's own.
pub(crate) fn foreign_source() {
    counter!(FOREIGN_SOURCE).increment(1);
}

/// Reports whether the last self-test of every pod passed.
pub(crate) fn self_test_passed(passed: bool) {
    gauge!(SELF_TEST).set(f64::from(passed));
}

/// Reports the number of rules of other programs that precede ours.
pub(crate) fn foreign_rules(count: usize) {
    gauge!(FOREIGN).set(u32::try_from(count).unwrap_or(u32::MAX));
}

/// Reports the expiry of the certificate that `workload` now uses, with its `identity`.
pub(crate) fn certificate_renewed(workload: &SpiffeId, identity: &SpiffeId, expires: SystemTime) {
    certificates::in_use(workload, identity, expires);
    counter!(RENEWALS).increment(1);
    counter!(RENEWALS_FAILED).increment(0);
}

/// Reports that `workload` no longer has a certificate.
pub(crate) fn certificate_ended(workload: &SpiffeId) {
    certificates::ended(workload);
}

/// Counts a certificate, trust bundle or revocation list that could not be renewed or read.
pub(crate) fn certificate_failed() {
    counter!(RENEWALS_FAILED).increment(1);
}

/// Counts a connection that was refused before its handshake.
pub(crate) fn handshake_refused(limit: &'static str) {
    counter!(HANDSHAKES_REFUSED, "limit" => limit).increment(1);
}

/// Counts a handshake that failed, or whose client was then refused.
pub(crate) fn handshake_failed(reason: &'static str) {
    counter!(HANDSHAKES_FAILED, "reason" => reason).increment(1);
}

/// Counts log lines that were lost.
pub(crate) fn log_lines_lost(lines: u64) {
    counter!(LOG_LINES_LOST).increment(lines);
}

/// Counts a handshake that has to wait for its turn.
pub(crate) fn handshake_waits() {
    counter!(HANDSHAKES_WAITED).increment(1);
}

/// Counts a handshake as in progress until the value is dropped.
pub(crate) fn handshake_in_progress() -> GaugeGuard {
    GaugeGuard::increment(gauge!(HANDSHAKES))
}

/// Counts a buffer or pipe that a busy connection did not get. `short` is the exhausted resource:
/// `limit` or `pipe`.
pub(crate) fn buffer_refused(short: &'static str) {
    counter!(BUFFERS_REFUSED, "short" => short).increment(1);
}

/// The gauge of the memory in buffers of busy connections.
pub(crate) fn buffer_bytes() -> Gauge {
    // Without refusals the counters are 0, not absent.
    counter!(BUFFERS_REFUSED, "short" => "limit").increment(0);
    counter!(BUFFERS_REFUSED, "short" => "pipe").increment(0);
    gauge!(BUFFER_BYTES)
}

/// Counts a restart of a failed task.
pub(crate) fn task_restarted(task: &'static str) {
    counter!(RESTARTS, "task" => task).increment(1);
}

/// Counts a connection that failed, or was open and ended early.
pub(crate) fn connection_error(direction: Direction, reason: &'static str) {
    counter!(ERRORS, "direction" => direction.as_str(), "reason" => reason).increment(1);
    if reason == "revoked" {
        let reporter = match direction {
            Direction::Inbound => "destination",
            Direction::Outbound => "source",
        };
        counter!(REVOKED, "reporter" => reporter).increment(1);
    }
}

/// Initializes the counters of a signal.
pub(crate) fn telemetry_started(signal: &'static str) {
    for name in [TELEMETRY_EXPORTED, TELEMETRY_DROPPED, TELEMETRY_FAILED] {
        counter!(name, "signal" => signal).increment(0);
    }
}

/// Counts items of a signal that the collector has taken.
pub(crate) fn telemetry_exported(signal: &'static str, items: usize) {
    counter!(TELEMETRY_EXPORTED, "signal" => signal).increment(items as u64);
}

/// Counts items of a signal that the collector did not get.
pub(crate) fn telemetry_dropped(signal: &'static str, items: usize) {
    counter!(TELEMETRY_DROPPED, "signal" => signal).increment(items as u64);
}

/// Counts a failed request to the collector.
pub(crate) fn telemetry_failed(signal: &'static str) {
    counter!(TELEMETRY_FAILED, "signal" => signal).increment(1);
}

/// Counts an ejection of an endpoint.
pub(crate) fn endpoint_ejected() {
    counter!(EJECTED).increment(1);
}

/// Counts a connection between two pods of the process without a tunnel.
pub(crate) fn direct_connection() {
    counter!(DIRECT).increment(1);
}

/// Counts a peer's tunnel that the proxy closes.
pub(crate) fn tunnel_closed(reason: &'static str) {
    counter!(TUNNELS_CLOSED, "reason" => reason).increment(1);
}

/// Counts a tunnel as open until the value is dropped.
pub(crate) fn tunnel_open(direction: &'static str) -> GaugeGuard {
    GaugeGuard::increment(gauge!(TUNNELS, "direction" => direction))
}

/// Adds one to a gauge until it is dropped.
pub(crate) struct GaugeGuard(Gauge);

impl GaugeGuard {
    fn increment(gauge: Gauge) -> Self {
        gauge.increment(1);
        Self(gauge)
    }
}

impl std::fmt::Debug for GaugeGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GaugeGuard")
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.decrement(1);
    }
}

//! The registry of all series of connections, which renders them for `/metrics`.
//!
//! Peers control most labels, so the registry bounds the number of series. A series expires after
//! `metrics.idle` without counts and connections. Beyond `metrics.label_sets`, connections are
//! counted in a series with the label value `overflow`.

use std::sync::Arc;

use bytes::Bytes;
use underpass_config::{MetricLabel, SeriesSettings};

use super::budgets::Budgets;
use super::exposition::{Format, Kind, Page};
use super::hostnames::HostnameLookups;
use super::runtimes::Runtimes;
use super::series::{Labels, Metric, Series};
use super::series_map::SeriesMap;
use super::timings::{AllTimings, Timings};
use crate::observe::party::{Direction, Party};

const OPEN: &str = "istio_tcp_sockets_open";
/// The number of series whose lines are rendered at once: about 64 KiB, less than a tenth of a
/// millisecond.
const SERIES_PER_PAGE: usize = 64;
/// The size of a page of [`SERIES_PER_PAGE`] lines with long labels.
const PAGE_SIZE: usize = 64 * 1024;

/// The measurements of all workers.
#[derive(Debug)]
pub(crate) struct SeriesRegistry {
    connections: SeriesMap<Series>,
    hostnames: HostnameLookups,
    omitted: Vec<MetricLabel>,
    timings: AllTimings,
    /// The budgets of the process.
    pub(crate) budgets: Budgets,
    /// The runtimes of the workers.
    pub(crate) runtimes: Runtimes,
}

impl Default for SeriesRegistry {
    fn default() -> Self {
        Self::new(SeriesSettings::default())
    }
}

impl SeriesRegistry {
    pub(crate) fn new(settings: SeriesSettings) -> Self {
        let SeriesSettings { limit, idle, omitted } = settings;
        Self {
            connections: SeriesMap::new(limit, idle),
            hostnames: HostnameLookups::new(limit, idle),
            omitted,
            timings: AllTimings::default(),
            budgets: Budgets::default(),
            runtimes: Runtimes::default(),
        }
    }

    /// The series with these labels, or the overflow series if there are too many.
    pub(super) fn get(&self, labels: &Labels) -> Arc<Series> {
        let new = |is_overflow| move |text| Series::new(labels.direction, text, is_overflow);
        let own = self.connections.get(labels.text(&self.omitted), new(false));
        own.unwrap_or_else(|| {
            self.connections.overflow(labels.overflow_text(&self.omitted), new(true))
        })
    }

    /// Counts a connection from `source` whose destination's hostname is looked up.
    pub(crate) fn hostname_lookup(&self, source: &Party, hostname: &str) {
        self.hostnames.count(source, hostname, &self.omitted);
    }

    /// The measurements of a new worker.
    pub(super) fn timings_of_worker(&self) -> Arc<Timings> {
        self.timings.of_worker()
    }

    /// The measurements that do not depend on the labels of connections.
    pub(super) fn render_fixed(&self, page: &mut Page) {
        self.hostnames.render(page);
        self.timings.render(page);
        self.budgets.render(page);
        self.runtimes.render(page);
    }

    /// All unexpired series of connections, in parts that are rendered when they are requested.
    pub(crate) fn pages(&self, format: Format) -> impl Iterator<Item = Bytes> + Send + use<> {
        let all: Arc<[Arc<Series>]> = self.connections.all().into();
        let open = open_connections(&all, format);
        let of_metrics = Metric::ALL.into_iter().flat_map(move |metric| {
            let all = all.clone();
            // Each family has a page, even without series.
            let starts = (0..all.len().max(1)).step_by(SERIES_PER_PAGE);
            starts.map(move |start| {
                let mut page = Page::with_capacity(format, PAGE_SIZE);
                if start == 0 {
                    page.family(metric.name(), Kind::Counter, metric.help());
                }
                let series = all.iter().skip(start).take(SERIES_PER_PAGE);
                series.for_each(|series| series.render(metric, &mut page));
                page.into_bytes()
            })
        });
        std::iter::once(open).chain(of_metrics)
    }
}

/// The number of open connections, by reporter.
fn open_connections(all: &[Arc<Series>], format: Format) -> Bytes {
    let mut page = Page::new(format);
    page.family(OPEN, Kind::Gauge, "TCP connections open now.");
    for (direction, reporter) in
        [(Direction::Inbound, "destination"), (Direction::Outbound, "source")]
    {
        // A series with an open connection does not expire, so the sum is complete.
        let of_direction = all.iter().filter(|series| series.direction == direction);
        let open: u64 = of_direction.map(|series| series.open()).sum();
        page.line(format_args!("{OPEN}{{reporter=\"{reporter}\"}} {open}"));
    }
    page.into_bytes()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;
    use underpass_config::SpiffeId;

    use super::super::known::KnownSeries;
    use super::*;
    use crate::error::ResponseFlags;
    use crate::observe::party::Party;

    const LIMIT: usize = 100;
    const IDLE: Duration = Duration::from_secs(60);

    fn registry() -> Arc<SeriesRegistry> {
        Arc::new(SeriesRegistry::new(SeriesSettings {
            limit: LIMIT,
            idle: IDLE,
            omitted: Vec::new(),
        }))
    }

    fn render(registry: &SeriesRegistry) -> String {
        let pages = registry.pages(Format::Prometheus);
        pages.map(|page| String::from_utf8(page.into()).unwrap()).collect()
    }

    fn from(peer: usize) -> Labels {
        let identity: SpiffeId = format!("spiffe://td/ns/default/sa/peer-{peer}").parse().unwrap();
        let source = Party { identity: Some(identity), ..Party::default() };
        Labels::new(Direction::Inbound, &source, &Party::default(), None, true)
    }

    /// Opens and closes a connection of a peer.
    fn serve(known: &KnownSeries, peer: usize) {
        let series = known.get(from(peer));
        series.opened();
        series.received(10);
        series.closed(ResponseFlags::None);
    }

    /// The value of a metric for one peer; `None` if the metric has no such line.
    fn value(text: &str, metric: Metric, label: &str) -> Option<u64> {
        let wanted = format!("{}{{", metric.name());
        let mut lines = text.lines().filter(|l| l.starts_with(&wanted) && l.contains(label));
        let found = lines.next()?.rsplit(' ').next()?.parse().ok();
        assert!(lines.next().is_none(), "one line for {label}");
        found
    }

    fn opened(registry: &SeriesRegistry, peer: usize) -> Option<u64> {
        let label = format!("/sa/peer-{peer}\"");
        value(&render(registry), Metric::Opened, &label)
    }

    #[tokio::test(start_paused = true)]
    async fn connections_beyond_series_limit_are_counted_as_overflow() {
        let registry = registry();
        let known = KnownSeries::new(registry.clone());
        (0..2000).for_each(|peer| serve(&known, peer));
        let text = render(&registry);
        let overflow = "source_principal=\"overflow\"";
        assert_eq!(value(&text, Metric::Opened, overflow), Some(1900));
        assert_eq!(value(&text, Metric::Received, overflow), Some(19_000));
        let lines = text.lines().filter(|line| line.starts_with("istio_tcp_connections_opened"));
        assert_eq!(lines.count(), LIMIT + 1);
        assert!(text.len() < 4 * 1024 * (LIMIT + 1), "{}", text.len());
        // After the flood's series have expired, a new peer gets its own series again.
        advance(IDLE).await;
        render(&registry);
        advance(IDLE).await;
        serve(&known, 1999);
        assert_eq!(opened(&registry, 1999), Some(1));
        assert_eq!(value(&render(&registry), Metric::Opened, overflow), Some(1900));
    }

    #[tokio::test(start_paused = true)]
    async fn idle_series_expires_and_counts_again_from_zero() {
        let registry = registry();
        // Two workers, both with the series in their caches.
        let workers = [(); 2].map(|()| KnownSeries::new(registry.clone()));
        workers.iter().for_each(|worker| serve(worker, 1));
        assert_eq!(opened(&registry, 1), Some(2));
        advance(IDLE - Duration::from_millis(1)).await;
        assert_eq!(opened(&registry, 1), Some(2), "not idle for long enough");
        advance(Duration::from_millis(1)).await;
        assert_eq!(opened(&registry, 1), None);
        workers.iter().for_each(|worker| serve(worker, 1));
        assert_eq!(opened(&registry, 1), Some(2), "no worker counts in the expired series");
    }

    #[tokio::test(start_paused = true)]
    async fn series_of_open_connection_does_not_expire() {
        let registry = registry();
        let known = KnownSeries::new(registry.clone());
        let connection = known.get(from(1));
        connection.opened();
        render(&registry);
        advance(IDLE * 10).await;
        assert_eq!(opened(&registry, 1), Some(1));
        connection.received(7);
        connection.closed(ResponseFlags::Connect);
        let text = render(&registry);
        assert_eq!(value(&text, Metric::Received, "peer-1"), Some(7));
        assert_eq!(value(&text, Metric::Closed, "response_flags=\"CONNECT\""), Some(1));
        drop(connection);
        advance(IDLE).await;
        assert_eq!(opened(&registry, 1), None);
    }

    #[tokio::test(start_paused = true)]
    async fn metric_series_survives_between_repeated_connections() {
        let registry = registry();
        let known = KnownSeries::new(registry.clone());
        for count in 1..=5 {
            serve(&known, 1);
            assert_eq!(opened(&registry, 1), Some(count));
            advance(IDLE - Duration::from_millis(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failed_connection_is_counted_without_an_opened_connection() {
        let registry = registry();
        KnownSeries::new(registry.clone()).get(from(1)).failed(ResponseFlags::TlsFailure);
        let text = render(&registry);
        assert_eq!(value(&text, Metric::Failed, "response_flags=\"TLS_FAILURE\""), Some(1));
        assert_eq!(value(&text, Metric::Opened, "peer-1"), None);
        assert_eq!(value(&text, Metric::Closed, "peer-1"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn open_sockets_are_zero_without_connections() {
        let registry = registry();
        let open = |reporter: &str, count: u32| {
            let line = format!("{OPEN}{{reporter=\"{reporter}\"}} {count}");
            render(&registry).lines().any(|found| found == line)
        };
        assert!(open("source", 0) && open("destination", 0));
        let series = KnownSeries::new(registry.clone()).get(from(1));
        series.opened();
        assert!(open("source", 0) && open("destination", 1));
        series.closed(ResponseFlags::None);
        assert!(open("destination", 0));
    }

    #[tokio::test(start_paused = true)]
    async fn omitted_labels_join_series() {
        let omitted = vec!["source_principal".parse().unwrap()];
        let settings = SeriesSettings { omitted, ..SeriesSettings::default() };
        let registry = Arc::new(SeriesRegistry::new(settings));
        let known = KnownSeries::new(registry.clone());
        (0..3).for_each(|peer| serve(&known, peer));
        let text = render(&registry);
        assert!(!text.contains("source_principal"), "{text}");
        assert_eq!(value(&text, Metric::Opened, "destination_principal=\"unknown\""), Some(3));
    }

    #[tokio::test(start_paused = true)]
    async fn pages_contain_each_series_once() {
        let limit = 10 * SERIES_PER_PAGE;
        let settings = SeriesSettings { limit, ..SeriesSettings::default() };
        let registry = Arc::new(SeriesRegistry::new(settings));
        let known = KnownSeries::new(registry.clone());
        (0..limit).for_each(|peer| serve(&known, peer));
        let pages: Vec<_> = registry.pages(Format::OpenMetrics).collect();
        assert!(pages.iter().all(|page| page.len() <= 2 * PAGE_SIZE));
        let text = render(&registry);
        assert_eq!(text.matches("istio_tcp_connections_opened_total{").count(), limit);
        assert_eq!(text.matches("# TYPE istio_tcp_connections_opened_total").count(), 1);
    }
}

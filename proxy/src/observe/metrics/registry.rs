//! The registry of all series of connections, which renders them for `/metrics`.
//!
//! Peers control most labels, so the registry bounds the number of series. A series expires after
//! `metrics.idle` without counts and connections. Beyond `metrics.label_sets`, connections are
//! counted in a series with the label value `overflow`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use underpass_config::SeriesSettings;

use super::series::{Labels, Metric, Series};
use crate::observe::party::Direction;

const OPEN: &str = "istio_tcp_sockets_open";
/// The minimum interval of searches for expired series in a full registry. Each search visits all
/// series.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(1);

/// The series of all workers.
#[derive(Debug)]
pub(crate) struct SeriesRegistry {
    settings: SeriesSettings,
    /// Locked by a worker whose cache lacks a series, and by a scrape.
    registered: Mutex<Registered>,
}

#[derive(Debug)]
struct Registered {
    all: HashMap<Arc<str>, Entry>,
    /// The overflow series by direction and security policy. They do not expire.
    overflow: HashMap<Arc<str>, Arc<Series>>,
    /// The time of the last search for expired series.
    expired_at: Instant,
    /// Whether the log has reported that the limit is reached.
    is_reported: bool,
}

#[derive(Debug)]
struct Entry {
    series: Arc<Series>,
    /// The last seen value of [`Series::events`].
    events: u64,
    changed_at: Instant,
}

impl Default for SeriesRegistry {
    fn default() -> Self {
        Self::new(SeriesSettings::default())
    }
}

impl SeriesRegistry {
    pub(crate) fn new(settings: SeriesSettings) -> Self {
        let registered = Registered {
            all: HashMap::new(),
            overflow: HashMap::new(),
            expired_at: Instant::now(),
            is_reported: false,
        };
        Self { settings, registered: Mutex::new(registered) }
    }

    /// The series with these labels, or the overflow series if there are too many.
    pub(super) fn get(&self, labels: &Labels) -> Arc<Series> {
        let text = labels.text();
        let mut registered = self.lock();
        if let Some(entry) = registered.all.get(&*text) {
            return entry.series.clone();
        }
        let now = Instant::now();
        if self.is_full(&registered) && now >= registered.expired_at + EXPIRY_INTERVAL {
            registered.expire(now, self.settings.idle);
        }
        if self.is_full(&registered) {
            registered.report(self.settings.limit);
            return registered.overflow(labels);
        }
        registered.is_reported = false;
        let text: Arc<str> = text.into();
        let series = Arc::new(Series::new(labels.direction, text.clone(), false));
        let entry = Entry { series: series.clone(), events: 0, changed_at: now };
        registered.all.insert(text, entry);
        series
    }

    /// All unexpired series in Prometheus' text format.
    pub(crate) fn render(&self) -> String {
        let all: Vec<Arc<Series>> = {
            let mut registered = self.lock();
            registered.expire(Instant::now(), self.settings.idle);
            let own = registered.all.values().map(|entry| &entry.series);
            own.chain(registered.overflow.values()).cloned().collect()
        };
        let mut text = String::new();
        for metric in Metric::ALL {
            head(metric.name(), "counter", metric.help(), &mut text);
            all.iter().for_each(|series| series.render(metric, &mut text));
            text.push('\n');
        }
        head(OPEN, "gauge", "TCP connections open now.", &mut text);
        for (direction, reporter) in
            [(Direction::Inbound, "destination"), (Direction::Outbound, "source")]
        {
            // A series with an open connection does not expire, so the sum is complete.
            let of_direction = all.iter().filter(|series| series.direction == direction);
            let open: u64 = of_direction.map(|series| series.open()).sum();
            line(&mut text, format_args!("{OPEN}{{reporter=\"{reporter}\"}} {open}"));
        }
        text.push('\n');
        text
    }

    fn is_full(&self, registered: &Registered) -> bool {
        registered.all.len() >= self.settings.limit
    }

    fn lock(&self) -> MutexGuard<'_, Registered> {
        // No code panics while it holds the lock.
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registered {
    /// Removes the series that have counted nothing for `idle` and have no open connection.
    fn expire(&mut self, now: Instant, idle: Duration) {
        self.expired_at = now;
        let mut expired = Vec::new();
        for (labels, entry) in &mut self.all {
            let events = entry.series.events();
            if events != entry.events {
                (entry.events, entry.changed_at) = (events, now);
            } else if now >= entry.changed_at + idle && Arc::strong_count(&entry.series) == 1 {
                expired.push(labels.clone());
            }
        }
        for labels in expired {
            let Some(Entry { series, events, .. }) = self.all.remove(&labels) else { continue };
            // Fails if a worker has found the series in its cache meanwhile. Otherwise no worker
            // can find it later.
            let kept = match Arc::try_unwrap(series) {
                Ok(series) if series.events() == events => continue,
                Ok(series) => Arc::new(series),
                Err(series) => series,
            };
            self.all.insert(labels, Entry { series: kept, events, changed_at: now });
        }
    }

    fn overflow(&mut self, labels: &Labels) -> Arc<Series> {
        let text: Arc<str> = labels.overflow_text().into();
        let new = || Arc::new(Series::new(labels.direction, text.clone(), true));
        self.overflow.entry(text.clone()).or_insert_with(new).clone()
    }

    fn report(&mut self, limit: usize) {
        if !std::mem::replace(&mut self.is_reported, true) {
            tracing::warn!(
                limit,
                hint = "metrics.label_sets",
                "too many metric series: connections with other labels are counted as overflow"
            );
        }
    }
}

fn head(name: &str, kind: &str, help: &str, text: &mut String) {
    line(text, format_args!("# HELP {name} {help}"));
    line(text, format_args!("# TYPE {name} {kind}"));
}

/// Appends a line.
fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    writeln!(text, "{line}").ok();
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;
    use underpass_config::SpiffeId;

    use super::super::known::KnownSeries;
    use super::*;
    use crate::error::ResponseFlags;
    use crate::observe::party::Party;

    const LIMIT: usize = 100;
    const IDLE: Duration = Duration::from_secs(60);

    fn registry() -> Arc<SeriesRegistry> {
        Arc::new(SeriesRegistry::new(SeriesSettings { limit: LIMIT, idle: IDLE }))
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
        value(&registry.render(), Metric::Opened, &label)
    }

    #[tokio::test(start_paused = true)]
    async fn connections_beyond_series_limit_are_counted_as_overflow() {
        let registry = registry();
        let known = KnownSeries::new(registry.clone());
        (0..2000).for_each(|peer| serve(&known, peer));
        let text = registry.render();
        let overflow = "source_principal=\"overflow\"";
        assert_eq!(value(&text, Metric::Opened, overflow), Some(1900));
        assert_eq!(value(&text, Metric::Received, overflow), Some(19_000));
        let lines = text.lines().filter(|line| line.starts_with("istio_tcp_connections_opened"));
        assert_eq!(lines.count(), LIMIT + 1);
        assert!(text.len() < 4 * 1024 * (LIMIT + 1), "{}", text.len());
        // After the flood's series have expired, a new peer gets its own series again.
        advance(IDLE).await;
        registry.render();
        advance(IDLE).await;
        serve(&known, 1999);
        assert_eq!(opened(&registry, 1999), Some(1));
        assert_eq!(value(&registry.render(), Metric::Opened, overflow), Some(1900));
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
        registry.render();
        advance(IDLE * 10).await;
        assert_eq!(opened(&registry, 1), Some(1));
        connection.received(7);
        connection.closed(ResponseFlags::Connect);
        let text = registry.render();
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
        let text = registry.render();
        assert_eq!(value(&text, Metric::Failed, "response_flags=\"TLS_FAILURE\""), Some(1));
        assert_eq!(value(&text, Metric::Opened, "peer-1"), None);
        assert_eq!(value(&text, Metric::Closed, "peer-1"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn open_sockets_are_zero_without_connections() {
        let registry = registry();
        let open = |reporter: &str, count: u32| {
            let line = format!("{OPEN}{{reporter=\"{reporter}\"}} {count}");
            registry.render().lines().any(|found| found == line)
        };
        assert!(open("source", 0) && open("destination", 0));
        let series = KnownSeries::new(registry.clone()).get(from(1));
        series.opened();
        assert!(open("source", 0) && open("destination", 1));
        series.closed(ResponseFlags::None);
        assert!(open("destination", 0));
    }
}

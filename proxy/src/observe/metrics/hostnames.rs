//! Connections to workloads whose hostname had to be looked up, under ztunnel's name.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use underpass_config::MetricLabel;

use super::exposition::{Kind, Page};
use super::series::{put, source_text};
use super::series_map::{Counted, SeriesMap};
use crate::observe::party::Party;

const LOOKUPS: &str = "istio_on_demand_dns_total";

/// The counters of all sources and hostnames.
#[derive(Debug)]
pub(super) struct HostnameLookups(SeriesMap<Lookups>);

#[derive(Debug)]
struct Lookups {
    labels: Arc<str>,
    count: AtomicU64,
}

impl Counted for Lookups {
    fn events(&self) -> u64 {
        self.count.load(Relaxed)
    }
}

impl HostnameLookups {
    pub(super) fn new(limit: usize, idle: Duration) -> Self {
        Self(SeriesMap::new(limit, idle))
    }

    pub(super) fn count(&self, source: &Party, hostname: &str, omitted: &[MetricLabel]) {
        let new = |labels| Lookups { labels, count: AtomicU64::new(0) };
        let text = |source: &Party, hostname| {
            let mut text = source_text(source, omitted);
            put(&mut text, "hostname", Some(hostname));
            text
        };
        let own = self.0.get(text(source, hostname), new);
        let counted =
            own.unwrap_or_else(|| self.0.overflow(text(&Party::default(), "overflow"), new));
        counted.count.fetch_add(1, Relaxed);
    }

    pub(super) fn render(&self, page: &mut Page) {
        page.family(LOOKUPS, Kind::Counter, "Connections to a workload by its hostname.");
        for Lookups { labels, count } in self.0.all().iter().map(Arc::as_ref) {
            page.line(format_args!("{LOOKUPS}{{{labels}}} {}", count.load(Relaxed)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::exposition::Format;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn hostnames_beyond_limit_are_counted_as_overflow() {
        let lookups = HostnameLookups::new(2, Duration::from_secs(60));
        let source = Party::default();
        for hostname in ["a", "b", "c", "a", "d"] {
            lookups.count(&source, hostname, &[]);
        }
        let mut page = Page::new(Format::Prometheus);
        lookups.render(&mut page);
        let text = page.into_text();
        for (hostname, count) in [("a", 2), ("b", 1), ("overflow", 2)] {
            let end = format!(",hostname=\"{hostname}\"}} {count}");
            assert!(text.lines().any(|line| line.ends_with(&end)), "{end} is not in:\n{text}");
        }
    }
}

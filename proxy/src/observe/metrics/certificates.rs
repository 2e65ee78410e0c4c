//! The gauge of certificates' expiry times, with a series for each identity.
//!
//! The recorder would keep a series forever, but the series of a removed pod must end.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use underpass_config::SpiffeId;

use super::exposition::{Kind, Page};

const CERTIFICATE_EXPIRY: &str = "underpass_certificate_expiry_timestamp_seconds";
const HELP: &str = "When a certificate of the proxy expires, in seconds since 1970.";
/// The maximum number of series. Beyond it, only the certificates that expire first have one.
const MAX_SERIES: usize = 256;

/// The identity and the expiry of each workload's current certificate. Global like the recorder of
/// the process.
static CURRENT: Mutex<BTreeMap<SpiffeId, (SpiffeId, SystemTime)>> = Mutex::new(BTreeMap::new());

fn current() -> MutexGuard<'static, BTreeMap<SpiffeId, (SpiffeId, SystemTime)>> {
    // No code panics while it holds the lock.
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records that `workload` uses a certificate of `identity`.
pub(super) fn in_use(workload: &SpiffeId, identity: &SpiffeId, expires: SystemTime) {
    current().insert(workload.clone(), (identity.clone(), expires));
}

/// Records that `workload` no longer has a certificate.
pub(super) fn ended(workload: &SpiffeId) {
    current().remove(workload);
}

pub(super) fn render(page: &mut Page) {
    let mut certificates: Vec<_> = current().values().cloned().collect();
    if certificates.is_empty() {
        return;
    }
    certificates.sort_by(|(a, first), (b, second)| (first, a).cmp(&(second, b)));
    page.family(CERTIFICATE_EXPIRY, Kind::Gauge, HELP);
    for (identity, expires) in certificates.iter().take(MAX_SERIES) {
        let since_1970 = expires.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        // An identity has no character that needs to be escaped.
        let (name, seconds) = (CERTIFICATE_EXPIRY, since_1970.as_secs());
        page.line(format_args!("{name}{{identity=\"{identity}\"}} {seconds}"));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::exposition::Format;
    use super::*;

    #[test]
    fn certificate_series_is_removed_with_its_workload() {
        let id: SpiffeId = "spiffe://td/ns/metrics/sa/test".parse().unwrap();
        in_use(&id, &id, SystemTime::UNIX_EPOCH + Duration::from_millis(1500));
        let rendered = || {
            let mut page = Page::new(Format::Prometheus);
            render(&mut page);
            page.into_text()
        };
        let line = format!("{CERTIFICATE_EXPIRY}{{identity=\"{id}\"}} 1\n");
        assert!(rendered().contains(&line), "{}", rendered());
        ended(&id);
        assert!(!rendered().contains(&line), "{}", rendered());
    }
}

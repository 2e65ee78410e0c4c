//! The text formats of `/metrics`: Prometheus' text format 0.0.4 and OpenMetrics 1.0.0.
//!
//! OpenMetrics names a family of counters without `_total`, has no empty lines, ends with `# EOF`,
//! and may have exemplars. Its optional `_created` series are omitted, because they double the
//! number of series.

use std::fmt::{Arguments, Write as _};

use bytes::Bytes;
use http::HeaderValue;

/// A text format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Prometheus' text format, version 0.0.4.
    Prometheus,
    /// OpenMetrics, version 1.0.0.
    OpenMetrics,
}

/// The type of a metric family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// The suffix of every counter.
const TOTAL: &str = "_total";
/// The versions of OpenMetrics that a client may name. Text of version 1.0.0 is also valid in the
/// draft 0.0.1.
const OPEN_METRICS_VERSIONS: [&str; 2] = ["1.0.0", "0.0.1"];

impl Format {
    /// The format for a request with this `Accept` header: OpenMetrics only if the client names it
    /// and does not prefer plain text.
    pub(crate) fn accepted(accept: Option<&HeaderValue>) -> Self {
        let accept = accept.and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (mut open_metrics, mut text) = (0.0, 0.0);
        for range in accept.split(',') {
            let MediaRange { media, version, quality } = MediaRange::parse(range);
            let is_known = version.is_none_or(|version| OPEN_METRICS_VERSIONS.contains(&version));
            match media {
                "application/openmetrics-text" if is_known => {
                    open_metrics = quality.max(open_metrics);
                }
                "text/plain" => text = quality.max(text),
                _ => {}
            }
        }
        if open_metrics > 0.0 && open_metrics >= text {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    /// The `Content-Type` of a response.
    pub(crate) fn content_type(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        })
    }

    /// The name of a family in `# HELP` and `# TYPE`.
    fn family(self, name: &str) -> &str {
        match self {
            Self::Prometheus => name,
            Self::OpenMetrics => name.strip_suffix(TOTAL).unwrap_or(name),
        }
    }
}

/// One media range of an `Accept` header (RFC 9110 section 12.5.1).
struct MediaRange<'a> {
    media: &'a str,
    version: Option<&'a str>,
    quality: f32,
}

impl<'a> MediaRange<'a> {
    fn parse(range: &'a str) -> Self {
        let mut parts = range.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default();
        let (mut version, mut quality) = (None, 1.0);
        for (key, value) in parts.filter_map(|part| part.split_once('=')) {
            match key.trim() {
                "version" => version = Some(value.trim().trim_matches('"')),
                "q" => quality = value.trim().parse().unwrap_or(0.0),
                _ => {}
            }
        }
        Self { media, version, quality }
    }
}

/// A part of a response: the text of some families.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) format: Format,
    text: String,
}

impl Page {
    pub(super) fn new(format: Format) -> Self {
        Self::with_capacity(format, 0)
    }

    /// An empty page with room for this number of bytes.
    pub(super) fn with_capacity(format: Format, bytes: usize) -> Self {
        Self { format, text: String::with_capacity(bytes) }
    }

    /// Begins a family. The name of a counter ends with `_total`.
    pub(super) fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let family = self.format.family(name);
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        self.line(format_args!("# HELP {family} {help}"));
        self.line(format_args!("# TYPE {family} {kind}"));
    }

    /// Appends a line.
    pub(super) fn line(&mut self, line: Arguments<'_>) {
        // Writing to a String cannot fail.
        writeln!(self.text, "{line}").ok();
    }

    /// Appends a sample whose labels are the joined `labels`, without the cost of a formatter.
    pub(super) fn sample(&mut self, name: &str, labels: [&str; 4], value: u64) {
        self.text.push_str(name);
        self.text.push('{');
        labels.iter().for_each(|part| self.text.push_str(part));
        // Writing to a String cannot fail.
        writeln!(self.text, "}} {value}").ok();
    }

    /// Appends text of the recorder, which is in Prometheus' format.
    pub(super) fn append_recorded(&mut self, recorded: &str) {
        for line in recorded.lines().filter(|line| !line.is_empty()) {
            let mut words = line.splitn(4, ' ');
            match (words.next(), words.next(), words.next(), words.next()) {
                (Some("#"), Some(keyword), Some(name), Some(rest)) => {
                    let family = self.format.family(name);
                    self.line(format_args!("# {keyword} {family} {rest}"));
                }
                _ => self.line(format_args!("{line}")),
            }
        }
    }

    /// Ends the response.
    pub(super) fn end(&mut self) {
        if self.format == Format::OpenMetrics {
            self.line(format_args!("# EOF"));
        }
    }

    pub(super) fn into_bytes(self) -> Bytes {
        Bytes::from(self.text)
    }

    #[cfg(test)]
    pub(super) fn into_text(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepted(accept: &'static str) -> Format {
        Format::accepted(Some(&HeaderValue::from_static(accept)))
    }

    #[test]
    fn format_follows_accept_header() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                          application/openmetrics-text;version=0.0.1;q=0.5,\
                          text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        assert_eq!(accepted(prometheus), Format::OpenMetrics);
        assert_eq!(accepted("application/openmetrics-text"), Format::OpenMetrics);
        assert_eq!(
            accepted("application/openmetrics-text; version=\"1.0.0\""),
            Format::OpenMetrics
        );
        let others = [
            "application/openmetrics-text;version=2.0.0",
            "application/openmetrics-text;q=0",
            "application/openmetrics-text;q=0.2,text/plain;q=0.5",
            "application/openmetrics-text;q=much",
            "text/plain",
            "*/*",
            "",
            ";;=,,q=",
        ];
        for other in others {
            assert_eq!(accepted(other), Format::Prometheus, "{other}");
        }
        assert_eq!(Format::accepted(None), Format::Prometheus);
    }

    #[test]
    fn recorded_text_becomes_openmetrics() {
        let recorded = "# HELP a_total Some help.\n# TYPE a_total counter\na_total{b=\"c d\"} 1\n\n\
                        # HELP g A gauge.\n# TYPE g gauge\ng 2\n\n";
        let render = |format| {
            let mut page = Page::new(format);
            page.append_recorded(recorded);
            page.end();
            page.into_text()
        };
        assert_eq!(
            render(Format::OpenMetrics),
            "# HELP a Some help.\n# TYPE a counter\na_total{b=\"c d\"} 1\n\
             # HELP g A gauge.\n# TYPE g gauge\ng 2\n# EOF\n"
        );
        assert_eq!(render(Format::Prometheus), recorded.replace("\n\n", "\n"));
    }
}

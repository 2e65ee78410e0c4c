//! Reads a proxy's HTTP endpoints, such as `/metrics`.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::AsyncWriteExt as _;

use crate::or_fail::OrFail;
use crate::peers::{End, read_to_end, within};
use crate::pods::Pod;

/// A scrape of a proxy's metrics.
#[derive(Debug, Clone)]
pub struct Metrics {
    text: String,
}

impl Pod {
    /// Scrapes the proxy's metrics at the default address.
    pub async fn metrics(&self) -> Metrics {
        let (status, text) = http_get(self, (Ipv4Addr::LOCALHOST, 15020).into(), "/metrics").await;
        assert_eq!(status, 200, "/metrics: {text}");
        Metrics { text }
    }
}

impl Metrics {
    /// The sum of a metric over all series that have all of `labels`; `None` if there is no such
    /// series.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels: Vec<_> =
            labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
        let is_wanted = |line: &&str| {
            let series = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']));
            series.is_some_and(|series| labels.iter().all(|label| series.contains(label)))
        };
        let value =
            |line: &str| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
        let values: Vec<f64> = self.text.lines().filter(is_wanted).filter_map(value).collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// The text of the response.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// Whether a word of a document is the name of one of underpass' metrics.
#[must_use]
pub fn is_metric_name(word: &str) -> bool {
    let prefixes = ["underpass_", "istio_", "workload_manager_", "process_", "tokio_"];
    prefixes.iter().any(|prefix| word.starts_with(prefix))
        && word.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

/// Sends a GET request from inside a pod. Returns status and body.
pub async fn http_get(pod: &Pod, server: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = pod.dial(server).await.or_fail(format!("connect to {server}"));
    // HTTP/1.0, so that the body is not in chunks.
    let request = format!("GET {path} HTTP/1.0\r\nHost: {server}\r\n\r\n");
    within("a request is sent", stream.write_all(request.as_bytes()))
        .await
        .or_fail("send a request");
    let (bytes, end) = read_to_end(&mut stream).await;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    assert_eq!(end, End::Fin, "{server} ended its response {text:?}");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no HTTP response: {text:?}")), body.to_owned())
}

//! End-to-end tests of broken situations: each is made for real, and named by all four tools:
//! `underpass status`, `underpass doctor`, the log, and the metrics.
//!
//! In reading order: `situation` is a row of the table, `stage` the place where it is made, `tools`
//! asks the tools. The rows are in the other files, each with the function that makes it.
#![expect(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod certificates;
mod connections;
mod conntrack;
mod control_plane;
mod host;
mod peers;
mod rules;
mod situation;
mod stage;
mod start;
mod tools;

use std::collections::BTreeSet;
use std::process::ExitCode;

use serde_json::Value;
use underpass_tests::{Family, Scene, Suite};

use crate::situation::{Log, Metric, Situation};
use crate::stage::{client_settings, server_settings};

/// All rows of the table.
fn situations() -> impl Iterator<Item = &'static Situation> {
    let tables = [
        connections::SITUATIONS,
        peers::SITUATIONS,
        certificates::SITUATIONS,
        rules::SITUATIONS,
        control_plane::SITUATIONS,
        host::SITUATIONS,
        start::SITUATIONS,
    ];
    tables.into_iter().flatten()
}

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("in a sound scene no tool reports anything", sound);
    let is_small = conntrack::limit().is_some_and(|limit| limit <= conntrack::MAX_LIMIT);
    match is_small {
        true => suite.test(host::FULL_TABLE.name, async || {
            (host::FULL_TABLE.make)().await.assert(&host::FULL_TABLE).await;
        }),
        false => suite.skip(host::FULL_TABLE.name, "net.netfilter.nf_conntrack_max is too large"),
    }
    for situation in situations() {
        suite.test(situation.name, async move || (situation.make)().await.assert(situation).await);
    }
    suite.run()
}

async fn sound() {
    let names: BTreeSet<_> = situations().map(|situation| situation.name).collect();
    assert_eq!(names.len(), situations().count(), "each row has a name of its own");
    for Situation { name, log, metric, .. } in situations() {
        let (Log::Absent(why) | Log::Line(&[why, ..]) | Log::StartError(&[why, ..])) = *log else {
            panic!("{name}: no word of the log is given");
        };
        let of_metric = match *metric {
            Metric::Absent(why) => why,
            Metric::Rises(name, _) | Metric::Is(name, ..) => name,
            Metric::Nearly(name, _) | Metric::Passed(name) => name,
        };
        assert!(!why.is_empty() && !of_metric.is_empty(), "{name}: a reason or a name is missing");
    }
    let scene = Scene::new().await;
    let client = scene.client.proxy(&client_settings(&scene)).await;
    let server = scene.server.proxy(&server_settings(&scene)).await;
    let (_one, _other) = scene.connected(Family::V4).await;
    for (pod, proxy) in [(&scene.client, &client), (&scene.server, &server)] {
        let status = pod.underpass(&["status", "-o", "json"]).await.ok();
        let status: Value = serde_json::from_str(&status).expect("JSON");
        for list in ["/problems", "/notices", "/failures/connections", "/failures/dns"] {
            assert_eq!(status.pointer(list), Some(&Value::Array(Vec::new())), "{status}");
        }
        let doctor = pod.underpass(&["doctor", "-o", "json"]).await.ok();
        let doctor: Value = serde_json::from_str(&doctor).expect("JSON");
        assert_eq!(doctor.pointer("/failures"), Some(&Value::from(0)), "{doctor}");
        for word in [" WARN ", " ERROR ", "hint="] {
            assert_eq!(proxy.count(&[word]), 0, "{}", proxy.log());
        }
        let metrics = pod.metrics().await;
        for situation in situations() {
            let is_true = match situation.metric {
                Metric::Rises(name, labels) => metrics.sum(name, labels) > Some(0.0),
                Metric::Is(name, labels, value) => metrics.sum(name, labels) == Some(value),
                Metric::Nearly(..) | Metric::Passed(_) | Metric::Absent(_) => false,
            };
            assert!(!is_true, "{}: {}", situation.name, metrics.text());
        }
    }
}

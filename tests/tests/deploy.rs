//! Checks that the dashboard and the alert rules in deploy/ use existing metrics and documented
//! sections. Prometheus' own tool checks the rules, and systemd's own tool the units.
#![expect(clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use underpass_tests::{checker, is_metric_name};

const DASHBOARD: &str = "deploy/grafana/underpass.json";
const ALERTS: &str = "deploy/prometheus/alerts.yaml";
const ALERTS_TEST: &str = "deploy/prometheus/alerts_test.yaml";

fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(relative)
}

fn read(relative: &str) -> String {
    let path = path(relative);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The metrics that docs/operations.md lists, which `tidy` compares with the code.
fn documented() -> BTreeSet<String> {
    let text = read("docs/operations.md");
    text.split('`').filter(|name| is_metric_name(name)).map(str::to_owned).collect()
}

/// The metrics of a query that are not documented. A histogram has three series.
fn unknown_metrics(query: &str, documented: &BTreeSet<String>) -> Vec<String> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let is_known = |word: &str| {
        let suffixes = ["_bucket", "_sum", "_count"];
        let of_histogram = suffixes.iter().find_map(|suffix| word.strip_suffix(suffix));
        documented.contains(word)
            || of_histogram
                .is_some_and(|name| name.ends_with("_seconds") && documented.contains(name))
    };
    words.filter(|word| is_metric_name(word) && !is_known(word)).map(str::to_owned).collect()
}

/// The strings of all members with this name.
fn members<'a>(value: &'a Value, name: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(text) if key == name => found.push(text),
                    _ => members(value, name, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| members(item, name, found)),
        _ => {}
    }
}

#[test]
fn dashboard_uses_documented_metrics_only() {
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)).expect("JSON");
    let mut queries = Vec::new();
    members(&dashboard, "expr", &mut queries);
    members(&dashboard, "definition", &mut queries);
    assert!(queries.len() > 40, "{}", queries.len());
    let documented = documented();
    for query in queries {
        let unknown = unknown_metrics(query, &documented);
        assert!(unknown.is_empty(), "{unknown:?} in {query}");
    }
}

#[test]
fn panels_have_title_description_and_selected_instances() {
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let panels: Vec<_> = panels.iter().filter(|panel| panel["type"] != "row").collect();
    assert!(panels.len() > 30, "{}", panels.len());
    for panel in panels {
        let of = |key: &str| panel[key].as_str().unwrap_or_default();
        assert!(!of("title").is_empty() && !of("description").is_empty(), "{panel}");
        let mut queries = Vec::new();
        members(&panel["targets"], "expr", &mut queries);
        assert!(!queries.is_empty(), "{} has no query", of("title"));
        for query in queries {
            let selects_instance = query.contains("instance=~\"$instance\"");
            assert!(selects_instance && query.contains("job=~\"$job\""), "{query}");
        }
    }
}

/// The values of the lines with this key.
fn values<'a>(yaml: &'a str, key: &str) -> Vec<&'a str> {
    let of_line = |line: &'a str| {
        let (found, value) = line.trim_start_matches([' ', '-']).split_once(": ")?;
        (found == key).then_some(value.trim_matches('\''))
    };
    yaml.lines().filter_map(of_line).collect()
}

#[test]
fn alerts_use_documented_metrics_only() {
    let (alerts, documented) = (read(ALERTS), documented());
    let queries = values(&alerts, "expr");
    assert!(queries.len() > 20, "{}", queries.len());
    for query in queries {
        assert!(!query.starts_with(['|', '>']), "`values` reads queries of one line only");
        let unknown = unknown_metrics(query, &documented);
        assert!(unknown.is_empty(), "{unknown:?} in {query}");
    }
}

#[test]
fn alerts_have_a_runbook_section_and_a_test() {
    let (alerts, tests) = (read(ALERTS), read(ALERTS_TEST));
    let (names, runbooks) = (values(&alerts, "alert"), values(&alerts, "runbook_url"));
    assert!(names.len() > 20, "{}", names.len());
    assert_eq!(names.len(), runbooks.len());
    for (name, runbook) in names.iter().zip(runbooks) {
        let (page, section) = runbook.split_once('#').expect("a section");
        assert!(has_section(&read(page), section), "{name}: {page} has no section {section}");
        assert!(tests.contains(&format!("\"{name}\"")), "{name} has no test");
    }
}

/// Whether a page has a heading or an anchor of this name.
fn has_section(page: &str, section: &str) -> bool {
    let anchor = format!("<a id=\"{section}\"></a>");
    let slug = |heading: &str| -> String {
        let kept = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    let mut headings = page.lines().filter(|line| line.starts_with('#'));
    page.contains(&anchor) || headings.any(|heading| slug(heading) == section)
}

#[test]
fn promtool_accepts_alerts_and_their_tests() {
    for (command, file) in [("check", ALERTS), ("test", ALERTS_TEST)] {
        let file = path(file).display().to_string();
        let Some(printed) = checker("promtool", &[command, "rules", &file], "") else { return };
        assert!(printed.status.success(), "{}{}", printed.out, printed.err);
    }
}

const UNITS: [&str; 2] = ["underpass.service", "underpass-node.service"];

#[test]
fn reload_command_sets_period_of_watchdog() {
    for unit in UNITS {
        let text = read(&format!("deploy/systemd/{unit}"));
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        let seconds = value("WatchdogSec=").and_then(|period| period.strip_suffix('s'));
        let seconds: u64 = seconds.and_then(|text| text.parse().ok()).expect("a time in seconds");
        let start = value("ExecStart=").expect("a start command");
        let reload = format!(
            "/usr/bin/env WATCHDOG_USEC={} {start} --take-over --background",
            seconds * 1_000_000
        );
        assert_eq!(value("ExecReload="), Some(reload.as_str()), "{unit}");
    }
}

/// The exposure that systemd rates as medium is 50 or more; below it is OK.
const MAX_EXPOSURE: &str = "--threshold=49";

#[test]
fn systemd_rates_the_units_as_ok() {
    for unit in UNITS {
        let file = path(&format!("deploy/systemd/{unit}")).display().to_string();
        let arguments = ["security", "--offline=true", "--no-pager", MAX_EXPOSURE, &file];
        let Some(printed) = checker("systemd-analyze", &arguments, "") else { return };
        assert!(printed.status.success(), "{}{}", printed.out, printed.err);
    }
}

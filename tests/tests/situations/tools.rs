//! Asks the four tools about a situation, until each names it.

use std::fmt::Write as _;

use serde_json::Value;
use underpass_tests::{DEADLINE, Printed, binary, tool};

use crate::situation::{Doctor, Log, Metric, Situation, Status};
use crate::stage::{Broken, Running};

/// Asks again until the answer names the situation. Panics with the last answer.
async fn eventually(tool: &str, mut ask: impl AsyncFnMut() -> Result<(), String>) {
    let mut last = String::new();
    let asking = async {
        while let Err(why) = ask().await {
            last = why;
            tokio::task::yield_now().await;
        }
    };
    let in_time = tokio::time::timeout(DEADLINE, asking).await;
    assert!(in_time.is_ok(), "{tool} does not name the situation: {last}");
}

impl Broken {
    /// Asserts that all four tools name the situation.
    pub(crate) async fn assert(mut self, situation: &Situation) {
        self.assert_log(situation.log).await;
        eventually("status", async || self.ask_status(situation.status).await).await;
        eventually("/metrics", async || self.ask_metrics(situation.metric).await).await;
        eventually("doctor", async || self.ask_doctor(situation.doctor).await).await;
    }

    async fn assert_log(&mut self, log: Log) {
        let (Log::Line(parts) | Log::StartError(parts)) = log else { return };
        let is_wanted = |text: &str| parts.iter().all(|part| text.contains(part));
        match &mut self.running {
            Running::Ready(proxy) => drop(proxy.line(parts).await),
            Running::Waiting(lines) => {
                let mut log = String::new();
                loop {
                    let line = lines.next().await;
                    if is_wanted(&line) {
                        return;
                    }
                    writeln!(log, "{line}").expect("a String takes everything");
                    assert!(log.len() < 1 << 20, "{parts:?} is not in {log}");
                }
            }
            Running::Ended(log) => {
                let error = underpass_tests::error_of(log);
                assert!(is_wanted(&error), "{parts:?} is not in {error}\n{log}");
            }
        }
    }

    async fn run(&self, arguments: &[&str]) -> Printed {
        let program = match &self.program {
            Some(program) => program.as_path(),
            None => binary(),
        };
        tool(self.pod(), program.to_str().expect("a path in UTF-8"), arguments).await
    }

    async fn ask_status(&self, expected: Status) -> Result<(), String> {
        let Printed { status: exit, out, err } = self.run(&["status", "-o", "json"]).await;
        if let Status::NoProxy(words) = expected {
            let is_named = err.contains("error: no proxy listens at") && err.contains(words);
            return if is_named { Ok(()) } else { Err(format!("{out}{err}")) };
        }
        let status: Value = serde_json::from_str(&out).map_err(|_| format!("{out}{err}"))?;
        let list = |pointer: &str| status.pointer(pointer).and_then(Value::as_array).cloned();
        let text = |value: &Value, pointer: &str| -> String {
            value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let of_part = |one: &Value, part: &str, words: &str| {
            let is_named = text(one, "/part") == part && one.to_string().contains(words);
            is_named && !text(one, "/hint").is_empty()
        };
        let found = match expected {
            Status::Problem(part, words) => {
                let problems = list("/problems").unwrap_or_default();
                exit.code() == Some(3) && problems.iter().any(|one| of_part(one, part, words))
            }
            Status::Notice(part, words) => {
                let notices = list("/notices").unwrap_or_default();
                notices.iter().any(|one| of_part(one, part, words))
            }
            Status::Failure(reason, words) => {
                let failures = list("/failures/connections").unwrap_or_default();
                failures.iter().any(|one| {
                    text(one, "/reason") == reason && text(one, "/last/hint").contains(words)
                })
            }
            Status::Name(name, words) => {
                let names = list("/failures/dns").unwrap_or_default();
                let is_named = |one: &Value| {
                    text(one, "/name") == name
                        && one.to_string().contains(words)
                        && !text(one, "/hint").is_empty()
                };
                names.iter().any(is_named)
            }
            Status::NoProxy(_) => false,
        };
        if found { Ok(()) } else { Err(format!("{exit}: {out}{err}")) }
    }

    async fn ask_metrics(&self, expected: Metric) -> Result<(), String> {
        if let Metric::Absent(_) = expected {
            return Ok(());
        }
        let metrics = self.pod().metrics().await;
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64();
        let is_true = match expected {
            Metric::Rises(name, labels) => metrics.sum(name, labels) > Some(0.0),
            Metric::Is(name, labels, value) => metrics.sum(name, labels) == Some(value),
            Metric::Nearly(name, limit) => {
                let (value, limit) = (metrics.sum(name, &[]), metrics.sum(limit, &[]));
                value.zip(limit).is_some_and(|(value, limit)| value > 0.9 * limit)
            }
            Metric::Passed(name) => metrics.sum(name, &[]).is_some_and(|time| time < now),
            Metric::Absent(_) => true,
        };
        if is_true { Ok(()) } else { Err(metrics.text().to_owned()) }
    }

    async fn ask_doctor(&self, Doctor(id, level, words): Doctor) -> Result<(), String> {
        let settings = self.settings.as_ref().map(|settings| settings.arguments(self.pod()));
        let settings = settings.unwrap_or_default();
        let mut arguments = vec!["doctor", "-o", "json"];
        arguments.extend(settings.iter().map(String::as_str));
        let Printed { out, err, .. } = self.run(&arguments).await;
        let report: Value = serde_json::from_str(&out).map_err(|_| format!("{out}{err}"))?;
        let checks = report.pointer("/checks").and_then(Value::as_array).cloned();
        let is_named = |check: &Value| {
            let has =
                |key: &str, value: &str| check.get(key).and_then(Value::as_str) == Some(value);
            has("id", id) && has("level", level) && check.to_string().contains(words)
        };
        match checks.unwrap_or_default().iter().any(is_named) {
            true => Ok(()),
            false => Err(format!("{out}{err}")),
        }
    }
}

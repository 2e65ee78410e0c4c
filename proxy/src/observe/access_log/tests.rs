//! Tests of the fields of the access log, and of the selection of connections.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use underpass_config::Mesh;

use super::*;
use crate::error::ProxyError;
use crate::observe::ended::Durations;
use crate::observe::party::{Direction, Party};

/// The fields of the events, with their values. Fields without a value are in `declared` only.
#[derive(Debug, Clone, Default)]
struct Fields {
    declared: Arc<Mutex<BTreeSet<String>>>,
    values: Arc<Mutex<Vec<(String, String)>>>,
}

impl<S: tracing::Subscriber> Layer<S> for Fields {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let names = event.metadata().fields().iter().map(|field| field.name().to_owned());
        self.declared.lock().unwrap().extend(names);
        event.record(&mut Values(&mut self.values.lock().unwrap()));
    }
}

struct Values<'a>(&'a mut Vec<(String, String)>);

impl Visit for Values<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.push((field.name().to_owned(), format!("{value:?}")));
    }
}

fn ended<'a>(source: &'a Party, error: Option<&'a ProxyError>) -> Ended<'a> {
    let durations = Durations {
        connect: Some(Duration::from_micros(1500)),
        first_byte: None,
        total: Duration::from_millis(7),
    };
    Ended {
        direction: Direction::Outbound,
        source,
        destination: source,
        service: None,
        hbone: None,
        trace: None,
        durations,
        sent: 1,
        received: 2,
        error,
    }
}

fn logged(ended: &Ended<'_>) -> Fields {
    let fields = Fields::default();
    let subscriber = tracing_subscriber::registry().with(fields.clone());
    tracing::subscriber::with_default(subscriber, || {
        let error = ended.error.is_some();
        write(ended, if error { Level::ERROR } else { Level::INFO });
    });
    fields
}

#[test]
fn documentation_lists_exactly_the_fields_of_a_line() {
    let fields = logged(&ended(&Party::default(), None));
    let mut declared = fields.declared.lock().unwrap().clone();
    assert!(declared.remove("message"));
    let document = include_str!("../../../../docs/operations.md");
    let table = document.split("| field | type | meaning |\n").nth(1).expect("the table");
    let rows = table.lines().skip(1).take_while(|line| line.starts_with('|'));
    let cells = rows.filter_map(|row| row.split('|').nth(1));
    let names = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned);
    assert_eq!(names.collect::<BTreeSet<_>>(), declared);
}

#[test]
fn line_has_times_in_milliseconds_and_reason_of_failure() {
    let fields = logged(&ended(&Party::default(), Some(&ProxyError::Drained)));
    let values = fields.values.lock().unwrap().clone();
    let value = |name: &str| {
        let found = values.iter().find(|(field, _)| field == name);
        found.map(|(_, value)| value.trim_matches('"').to_owned())
    };
    assert_eq!(value("connect_ms").as_deref(), Some("1.5"));
    assert_eq!(value("first_byte_ms"), None);
    assert_eq!(value("duration").as_deref(), Some("7ms"));
    assert_eq!(value("reason").as_deref(), Some("drained"));
}

#[test]
fn claimed_namespace_selects_nothing() {
    let mesh = Mesh::from_text(
        "mesh",
        "workloads: [{name: a, namespace: quiet, workloadIps: [10.0.0.1]}]",
    );
    let workload = mesh.unwrap().workloads()[0].clone();
    let claim = crate::observe::party::Claim::Address(workload.clone());
    let settings = AccessLogSettings {
        namespaces: vec!["quiet=none".parse().unwrap()],
        ..AccessLogSettings::default()
    };
    let claimed = Party { claim: Some(claim), ..Party::default() };
    assert!(selects(&settings, &ended(&claimed, None)));
    let proven = Party { workload: Some(workload), ..Party::default() };
    assert!(!selects(&settings, &ended(&proven, None)));
}

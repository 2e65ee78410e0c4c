//! Tests of the distribution of connections over endpoints.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use underpass_config::Mesh;
use underpass_interception::OriginalDestination;

use crate::decide::endpoint_health::EndpointHealth;
use crate::decide::route::testing::{FixedInputs, best_route, caller, mesh, named, show};
use crate::decide::route::{EndpointSelector, Route, RouteError, outbound};

fn route(mesh: &Mesh, inputs: &mut FixedInputs) -> Result<Route, RouteError> {
    let caller = caller(named(mesh, "client"));
    best_route(([10, 1, 0, 1], 80).into(), mesh, &caller, inputs)
}

/// Selects an endpoint for 10,000 connections, each of which closes at once. Returns the number for
/// each workload.
fn shares(mesh: &Mesh, inputs: &mut FixedInputs) -> BTreeMap<String, u32> {
    let mut shares = BTreeMap::new();
    for _ in 0..10_000 {
        let workload = route(mesh, inputs).unwrap().workload.unwrap();
        *shares.entry(workload.name.to_string()).or_default() += 1;
    }
    shares
}

fn assert_shares(mesh: &Mesh, inputs: &mut FixedInputs, expected: &[(&str, u32)]) {
    let shares = shares(mesh, inputs);
    let names: Vec<&str> = shares.keys().map(String::as_str).collect();
    let expected_names: Vec<&str> = expected.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, expected_names);
    for (name, share) in expected {
        // Four standard deviations of 10,000 draws are at most 200.
        assert!(shares[*name].abs_diff(*share) < 200, "{shares:?}");
    }
}

/// The service at 10.1.0.1 in this mode, with workloads `a`, `b` and so on with these attributes.
fn service(mode: &str, workloads: &[&str]) -> Mesh {
    let mut text = format!(
        "workload client ip=10.0.0.1 region=r zone=z node=n
         service default/s.example vip=/10.1.0.1 sans=s {mode}\n"
    );
    for (words, name) in workloads.iter().zip('a'..='z') {
        text.push_str(&format!("workload {name} {words} of=default/s.example\n"));
    }
    mesh(&text)
}

#[test]
fn idle_endpoints_share_connections_by_capacity() {
    let three = ["ip=10.0.1.1 capacity=1", "ip=10.0.1.2 capacity=3", "ip=10.0.1.3 capacity=6"];
    let expected = [("a", 1000), ("b", 3000), ("c", 6000)];
    assert_shares(&service("", &three), &mut FixedInputs::new(1), &expected);
    assert_shares(&service("mode=failover", &three), &mut FixedInputs::new(2), &expected);
    let idle = ["ip=10.0.1.1 capacity=0", "ip=10.0.1.2", "ip=10.0.1.3"];
    assert_shares(&service("", &idle), &mut FixedInputs::new(3), &[("b", 5000), ("c", 5000)]);
    // One endpoint has almost all of the capacity, so draws hardly ever find a second one.
    let uneven = ["ip=10.0.1.1 capacity=4000000000", "ip=10.0.1.2"];
    assert_shares(&service("", &uneven), &mut FixedInputs::new(4), &[("a", 10_000)]);
}

#[test]
fn selects_endpoint_with_fewer_connections_per_capacity() {
    for mode in ["", "mode=failover"] {
        let two = service(mode, &["ip=10.0.1.1", "ip=10.0.1.2 capacity=10"]);
        for (a, b, expected) in [(1, 0, "b"), (0, 1, "a"), (1, 9, "b"), (1, 11, "a"), (2, 19, "b")]
        {
            let mut inputs = FixedInputs::new(5);
            inputs.open = [("a".into(), a), ("b".into(), b)].into();
            for _ in 0..100 {
                let chosen = route(&two, &mut inputs).unwrap().workload.unwrap();
                assert_eq!(&*chosen.name, expected, "{a} and {b}");
            }
        }
    }
}

#[test]
fn open_connections_spread_by_capacity() {
    let words: Vec<String> =
        (1..=20).map(|n| format!("ip=10.0.1.{n} capacity={}", 1 + n % 2)).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mesh = service("", &words);
    let mut inputs = FixedInputs::new(6);
    for _ in 0..3000 {
        let chosen = route(&mesh, &mut inputs).unwrap().workload.unwrap();
        *inputs.open.entry(chosen.uid.clone()).or_default() += 1;
    }
    for (uid, open) in &inputs.open {
        let capacity = named(&mesh, uid).capacity;
        assert!(open.abs_diff(capacity * 100) <= 4 * capacity, "{:?}", inputs.open);
    }
}

#[test]
fn selects_nearest_endpoints_and_others_when_those_fail() {
    let workloads = [
        "ip=10.0.1.1 region=r zone=z node=n",
        "ip=10.0.1.2 region=r zone=z",
        "ip=10.0.1.3 region=r zone=other",
        // Preferences are compared in order: a zone with the same name in another region is another
        // zone.
        "ip=10.0.1.4 region=other zone=z",
    ];
    let failover = service("mode=failover prefer=region,zone,node", &workloads);
    let mut inputs = FixedInputs::new(7);
    for name in ["a", "b", "c", "d"] {
        assert_shares(&failover, &mut inputs, &[(name, 10_000)]);
        inputs.tried.push(name.into());
    }
    assert_eq!(show(&route(&failover, &mut inputs)), "no endpoint: Tried");
    let strict = service("mode=strict prefer=region,zone", &workloads);
    assert_shares(&strict, &mut FixedInputs::new(8), &[("a", 5000), ("b", 5000)]);
    let distant = service("mode=strict prefer=subzone,region", &["ip=10.0.1.1 region=other"]);
    assert_eq!(show(&route(&distant, &mut FixedInputs::new(9))), "no endpoint: NotNear");
}

#[test]
fn standard_mode_ignores_distance() {
    let workloads = ["ip=10.0.1.1 region=r", "ip=10.0.1.2 region=other", "ip=10.0.1.3"];
    let mesh = service("prefer=region", &workloads);
    let mut inputs = FixedInputs::new(14);
    let all = [("a", 3333), ("b", 3333), ("c", 3333)];
    assert_shares(&mesh, &mut inputs, &all);
    // Now all endpoints are examined.
    inputs.ejected = vec!["a".into(), "b".into(), "c".into()];
    assert_shares(&mesh, &mut inputs, &all);
}

#[test]
fn prefers_own_network_and_compares_others_by_remaining_preferences() {
    let workloads = [
        "ip=10.0.1.1 region=other",
        "net=far gateway=/10.0.0.1@15009 region=other",
        "net=far gateway=/10.0.0.1@15009 region=r",
    ];
    let mesh = service("mode=failover prefer=network,region", &workloads);
    let mut inputs = FixedInputs::new(10);
    for expected in ["a", "c", "b"] {
        let chosen = route(&mesh, &mut inputs).unwrap().endpoint.unwrap().uid;
        assert_eq!(&*chosen, expected);
        inputs.tried.push(chosen);
    }
    let strict = service("mode=strict prefer=network,region", &workloads);
    assert_eq!(show(&route(&strict, &mut FixedInputs::new(11))), "no endpoint: NotNear");
}

#[test]
fn ejected_endpoint_is_selected_only_without_alternative() {
    for mode in ["", "mode=failover prefer=region"] {
        let three = service(mode, &["ip=10.0.1.1 region=r", "ip=10.0.1.2", "ip=10.0.1.3"]);
        let mut inputs = FixedInputs::new(12);
        inputs.ejected = vec!["a".into()];
        assert_shares(&three, &mut inputs, &[("b", 5000), ("c", 5000)]);
        inputs.tried = vec!["b".into(), "c".into()];
        assert_shares(&three, &mut inputs, &[("a", 10_000)]);
        inputs.tried.push("a".into());
        assert_eq!(show(&route(&three, &mut inputs)), "no endpoint: Tried");
    }
}

#[test]
fn waypoints_share_connections_by_weight() {
    let text = "workload client ip=10.0.0.1
        workload a ip=10.0.1.1
        workload b ip=10.0.1.2
        service default/s.example vip=/10.1.0.1 weighted=/10.0.1.1@15008*90,/10.0.1.2@15008*10";
    assert_shares(&mesh(text), &mut FixedInputs::new(13), &[("a", 9000), ("b", 1000)]);
}

#[test]
fn alternatives_list_all_endpoints_and_restored_one_first() {
    let mesh = service("", &["ip=10.0.1.1", "ip=10.0.1.2", "ip=10.0.1.3"]);
    let caller = caller(named(&mesh, "client"));
    let health = Arc::new(EndpointHealth::default());
    let ranked = || {
        let destination = OriginalDestination::new(([10, 1, 0, 1], 80).into());
        let selector = EndpointSelector::new(&health);
        let alternatives = outbound(destination, &mesh, &caller, selector).unwrap();
        let dialled = |route: &Route| route.dialled().unwrap().clone();
        let others = alternatives.others.map(|route| dialled(&route));
        [dialled(&alternatives.best)].into_iter().chain(others).collect::<Vec<_>>()
    };
    let tried = ranked();
    assert_eq!(tried.iter().collect::<HashSet<_>>().len(), 3);
    tried.iter().for_each(|endpoint| health.eject(endpoint.clone(), Duration::from_secs(10)));
    health.restore(&tried[1]);
    assert_eq!(ranked()[0], tried[1]);
    let open = health.open(tried[1].clone());
    assert_eq!(health.open_connections(&tried[1]), 1);
    drop(open);
    assert_eq!(health.open_connections(&tried[1]), 0);
}

#[test]
fn single_endpoint_has_no_alternative() {
    let mesh = service("", &["ip=10.0.1.1"]);
    let caller = caller(named(&mesh, "client"));
    let health = EndpointHealth::default();
    let destination = OriginalDestination::new(([10, 1, 0, 1], 80).into());
    let selector = EndpointSelector::new(&health);
    let mut alternatives = outbound(destination, &mesh, &caller, selector).unwrap();
    assert_eq!(alternatives.best.dialled(), None);
    assert!(alternatives.others.next().is_none());
}

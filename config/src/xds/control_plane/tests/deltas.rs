//! Tests of random deltas against a model, and of random content.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// A description of a mesh that does not depend on the order of its changes.
fn described(mesh: &Mesh) -> String {
    let addresses = (0..8).map(|n| mesh.workload("", at([10, 0, 0, n])).map(|one| one.uid.clone()));
    let policies: Vec<_> = mesh.policies("ns", None).iter().map(|one| format!("{one:?}")).collect();
    let named: Vec<_> = (0..8).map(|n| mesh.workloads_named("ns", &n.to_string()).len()).collect();
    format!(
        "{:?} {:?} {policies:?} {:?} {named:?} {:?}",
        mesh.workloads(),
        mesh.services(),
        addresses.collect::<Vec<_>>(),
        mesh.size()
    )
}

#[derive(Debug, Clone)]
enum Step {
    Workload { n: u8, service: u8, policy: bool },
    Service(u8),
    Policy { n: u8, scope: i32 },
    Remove(u8),
    Snapshot,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..8_u8, 0..4_u8, any::<bool>())
            .prop_map(|(n, service, policy)| Step::Workload { n, service, policy }),
        2 => (0..4_u8).prop_map(Step::Service),
        2 => (0..3_u8, 0..3_i32).prop_map(|(n, scope)| Step::Policy { n, scope }),
        2 => (0..15_u8).prop_map(Step::Remove),
        1 => Just(Step::Snapshot),
    ]
}

fn step_workload(n: u8, service: u8, policy: bool) -> Resource {
    let mut made = behind(&service.to_string(), workload(&n.to_string(), [10, 0, 0, n]));
    if policy {
        made.authorization_policies = vec!["ns/0".into()];
    }
    resource(made)
}

proptest! {
    /// Any sequence of deltas leads to the same mesh as one response with the remaining resources.
    #[test]
    fn deltas_lead_to_same_mesh_as_full_state(steps in prop::collection::vec(step(), 1..40)) {
        let mut client = Client::new();
        let mut left: BTreeMap<(bool, String), Resource> = BTreeMap::new();
        for step in steps {
            let (kind, sent) = match step {
                Step::Workload { n, service, policy } => {
                    (ADDRESS, step_workload(n, service, policy))
                }
                Step::Service(n) => (ADDRESS, resource(service(&n.to_string(), [10, 96, 0, n]))),
                Step::Policy { n, scope } => {
                    (POLICY, resource(policy(&n.to_string(), scope, i32::from(n) % 2)))
                }
                Step::Remove(n) => {
                    let (kind, name) = match n {
                        0..8 => (ADDRESS, format!("cluster//Pod/ns/{n}")),
                        8..12 => (ADDRESS, format!("ns/{}", n - 8)),
                        _ => (POLICY, format!("ns/{}", n - 12)),
                    };
                    client.apply(kind, Vec::new(), &[&name]);
                    left.remove(&(kind == POLICY, name));
                    continue;
                }
                Step::Snapshot => {
                    client.0.snapshot();
                    continue;
                }
            };
            left.insert((kind == POLICY, sent.name.clone()), sent.clone());
            client.apply(kind, vec![sent], &[]);
        }
        let mut whole = Client::new();
        for kind in [POLICY, ADDRESS] {
            let of_kind = left.iter().filter(|((is_policy, _), _)| *is_policy == (kind == POLICY));
            whole.apply(kind, of_kind.map(|(_, sent)| sent.clone()).collect(), &[]);
        }
        prop_assert_eq!(described(&client.0.snapshot()), described(&whole.0.snapshot()));
        let names: BTreeSet<_> = left.keys().map(|(_, name)| name.clone()).collect();
        let retained = client.0.open().into_iter().flat_map(|one| one.initial_resource_versions);
        prop_assert_eq!(retained.map(|(name, _)| name).collect::<BTreeSet<_>>(), names);
    }

    #[test]
    fn accepts_or_rejects_any_content(
        content in prop::collection::vec(any::<u8>(), 0..60),
        flips in prop::collection::vec((0..200_usize, any::<u8>()), 0..6),
    ) {
        let mut client = Client::new();
        let mut valid = [
            (ADDRESS, behind("s", workload("a", [10, 0, 0, 1])).encoded()),
            (ADDRESS, service("s", [10, 96, 0, 1]).encoded()),
            (POLICY, policy("p", NAMESPACE, DENY).encoded()),
        ];
        for (_, encoded) in &mut valid {
            for (at, byte) in &flips {
                let length = encoded.len();
                encoded[at % length] = *byte;
            }
        }
        for (kind, content) in valid.into_iter().chain([(ADDRESS, content.clone()), (POLICY, content)]) {
            client.apply(kind, vec![encoded(kind, "ns/x", content)], &[]);
            client.0.snapshot();
        }
    }
}

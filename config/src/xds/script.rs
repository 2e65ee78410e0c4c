//! The body of the fuzz target and of the property test: interprets bytes as responses of a control
//! plane, and checks the client against a model.
//!
//! A script is a list of messages, each after its length in two octets.

use std::collections::BTreeSet;

use prost::Message as _;

use super::control_plane::{ControlPlane, LocalWorkloads};
use super::message::{DeltaResponse, Node, Resource};
use super::resource_type::ResourceType;

/// Runs `script`. Panics if the client differs from the model, which retains exactly the names of
/// resources that were not removed. The mesh has at most one item for each name.
pub(crate) fn run(script: &[u8]) {
    for on_demand in [false, true] {
        run_client(script, on_demand);
    }
}

fn run_client(script: &[u8], on_demand: bool) {
    let mut plane = ControlPlane::new(Node::default(), LocalWorkloads::default(), on_demand);
    let mut names: [BTreeSet<String>; 2] = Default::default();
    let mut rest = script;
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(after.len());
        let (message, after) = after.split_at(length);
        rest = after;
        let Ok(response) = DeltaResponse::decode(message) else { continue };
        if let Ok(applied) = plane.receive(response.clone()) {
            assert_eq!(applied.answer.response_nonce, response.nonce);
            assert_eq!(applied.answer.error_detail.is_some(), !applied.rejected.is_empty());
            let at = usize::from(applied.kind == ResourceType::Authorization);
            if let Some(names) = names.get_mut(at) {
                names.retain(|name| !response.removed_resources.contains(name));
                let resources = response.resources.into_iter().flat_map(Resource::decode);
                names.extend(resources.map(|one| one.name).filter(|name| !name.is_empty()));
            }
        }
        let mut retained = ResourceType::ALL.map(|kind| plane.retained(kind));
        // A resource without a name is retained under a substitute.
        for names in retained.iter_mut().chain(&mut names) {
            names.retain(|name| !name.starts_with("(no name) "));
        }
        assert!(
            retained.iter().cloned().eq(names.iter().cloned()),
            "other names than in the model"
        );
        let size = plane.snapshot().size();
        assert!(size.workloads + size.services <= names.iter().map(BTreeSet::len).sum());
        assert!(size.policies <= names.iter().map(BTreeSet::len).sum());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{behind, policy, resource, response, service, workload};
    use super::*;

    /// Valid messages, as in the corpus of the fuzz target.
    fn messages() -> Vec<Vec<u8>> {
        let kinds = [ResourceType::Address, ResourceType::Authorization];
        let [address, authorization] = kinds;
        let workload = resource(behind("s", workload("a", [10, 0, 0, 1])));
        let name = workload.name.clone();
        [
            response(address, vec![workload, resource(service("s", [10, 96, 0, 1]))], &[]),
            response(authorization, vec![resource(policy("p", 1, 1))], &[]),
            response(address, Vec::new(), &[&name, "ns/s"]),
            response(authorization, Vec::new(), &["ns/p"]),
        ]
        .map(|response| response.encode_to_vec())
        .into()
    }

    fn script(messages: &[Vec<u8>]) -> Vec<u8> {
        let framed = messages.iter().map(|message| {
            let length = u16::try_from(message.len()).unwrap().to_be_bytes();
            [&length[..], message].concat()
        });
        framed.collect::<Vec<_>>().concat()
    }

    #[test]
    fn client_matches_model_on_valid_script() {
        run(&script(&messages()));
    }

    proptest! {
        #[test]
        fn client_matches_model_on_mutated_script(
            order in prop::collection::vec(0..4_usize, 1..8),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let messages = messages();
            let chosen: Vec<_> = order.iter().map(|at| messages[*at].clone()).collect();
            let mut script = script(&chosen);
            for (at, byte) in flips {
                let at = at.index(script.len());
                script[at] = byte;
            }
            run(&script);
        }

        #[test]
        fn client_matches_model_on_random_script(script in prop::collection::vec(any::<u8>(), 0..200)) {
            run(&script);
        }
    }
}

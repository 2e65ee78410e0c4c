//! Runs the seeds of the fuzz target, and random scripts.

use std::fs;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;

use crate::tls::record::script::run;

#[test]
fn runs_the_corpus_of_the_fuzz_target() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/record_layer");
    let scripts: Vec<_> = fs::read_dir(corpus).unwrap().collect();
    assert!(scripts.len() >= 10);
    for script in scripts {
        run(&fs::read(script.unwrap().path()).unwrap());
    }
}

/// Valid steps, which random bytes alone would rarely contain.
fn script() -> impl Strategy<Value = Vec<u8>> {
    let step = (0_u8..255, prop_oneof![0_u16..64, any::<u16>()], vec(any::<u8>(), 0..4));
    let step = step.prop_map(|(kind, size, bytes)| {
        let [high, low] = size.to_be_bytes();
        let bytes = if matches!(kind % 9, 5 | 6) { bytes } else { Vec::new() };
        [&[kind, high, low], &bytes[..]].concat()
    });
    (any::<u8>(), vec(step, 0..60))
        .prop_map(|(setup, steps)| [vec![setup], steps.concat()].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn random_scripts_match_the_model(script in script()) {
        run(&script);
    }
}

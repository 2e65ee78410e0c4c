//! Why a pod cannot be served.

use thiserror::Error;
use underpass_hbone::HboneError;
use underpass_interception::{Difference, InterceptionError};

use crate::error::chain;
use crate::rules::self_test::SelfTestError;

/// Why a pod cannot be served. It concerns this pod alone.
#[derive(Debug, Error)]
pub(crate) enum PodError {
    #[error(transparent)]
    Interception(#[from] InterceptionError),
    #[error("there is no certificate to begin with (identity, trust)")]
    Identity(#[source] HboneError),
    #[error(
        "interception.dns: capture leads DNS queries to port {port}, but `underpass run` has no DNS proxy yet: they would \
         be refused. Set interception.dns: off; `underpass rules install` can lead them to a DNS proxy of your own"
    )]
    NoDnsProxy { port: u16 },
    #[error("{}{}", chain(error), listed(suspects))]
    SelfTest {
        error: SelfTestError,
        /// Possible causes.
        suspects: Vec<String>,
    },
    #[error("the installed rules are not those of the settings: {0}")]
    Changed(Difference),
}

impl PodError {
    /// A self-test that could not run.
    pub(crate) fn self_test(error: SelfTestError) -> Self {
        Self::SelfTest { error, suspects: Vec::new() }
    }
}

fn listed(suspects: &[String]) -> String {
    let suspects = suspects.iter().map(|suspect| format!("; found here: {suspect}"));
    suspects.collect()
}

//! Errors of serving a pod.

use std::borrow::Cow;
use std::io;
use std::time::Duration;

use thiserror::Error;
use underpass_config::Hint;
use underpass_hbone::HboneError;
use underpass_interception::{Difference, InterceptionError};

use crate::limits::TooManyPods;
use crate::rules::self_test::SelfTestError;

/// The error of serving a pod. It concerns only this pod.
#[derive(Debug, Error)]
pub(crate) enum PodError {
    #[error(transparent)]
    Interception(#[from] InterceptionError),
    #[error("cannot obtain the first certificate")]
    Identity(#[source] HboneError),
    #[error("the self-test of the rules failed")]
    SelfTest {
        #[source]
        error: SelfTestError,
        /// Possible causes.
        suspects: Vec<String>,
    },
    #[error("no certificate was issued within {} s", .0.as_secs())]
    CertificateLate(Duration),
    #[error("the workers cannot accept the pod's connections")]
    Accept(#[source] io::Error),
    #[error("the listener for {purpose} ({setting}) is closed")]
    ListenerClosed { purpose: &'static str, setting: &'static str },
    #[error("the proxy process cannot serve the pod: {0}")]
    ProxyProcess(String),
    #[error(transparent)]
    TooManyPods(#[from] TooManyPods),
    #[error("the installed rules differ from those of the settings: {0}")]
    Changed(Difference),
}

impl PodError {
    /// The error of a self-test that could not run.
    pub(crate) fn self_test(error: SelfTestError) -> Self {
        Self::SelfTest { error, suspects: Vec::new() }
    }
}

impl Hint for PodError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Interception(error) => return error.hint(),
            Self::Identity(error) => return error.hint(),
            Self::SelfTest { error, suspects } => {
                let hint = error.hint()?.into_owned();
                let found = suspects.iter().map(|suspect| format!("; found here: {suspect}"));
                return Some((hint + &found.collect::<String>()).into());
            }
            Self::Accept(_) => return None,
            Self::ListenerClosed { .. } => {
                "another program has closed it, for example with `ss -K`: create the pod again"
            }
            Self::ProxyProcess(_) => "see the log of the proxy process",
            Self::TooManyPods(_) => "raise the limit of open files (`ulimit -n`, LimitNOFILE)",
            Self::CertificateLate(_) => "check the CA (identity.*)",
            Self::Changed(_) => "install the rules with `underpass rules install`",
        };
        Some(fixed.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::chain;

    #[test]
    fn hint_of_failed_self_test_lists_suspects() {
        let destination = ([192, 0, 2, 1], 80).into();
        let source = io::ErrorKind::ConnectionRefused.into();
        let error = SelfTestError::NotCaught { destination, source };
        let error = PodError::SelfTest { error, suspects: vec!["a rule".to_owned()] };
        let hint = error.hint().unwrap_or_default();
        assert!(hint.contains("rules verify") && hint.ends_with("; found here: a rule"), "{hint}");
        assert_eq!(
            chain(&error),
            "the self-test of the rules failed: the rules did not capture a test connection to 192.0.2.1:80: \
             connection refused"
        );
    }
}

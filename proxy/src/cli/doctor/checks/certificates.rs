//! The certificate of the workload, and the configured trust.

use futures_util::future::FutureExt as _;
use underpass_config::{IdentitySettings, Problem};
use underpass_hbone::Credentials;

use crate::cli::config::check::{ConfigCheck, time_left};
use crate::cli::doctor::check::{Category, Check, Finding, Info, Outcome, at_once};
use crate::cli::doctor::subject::Subject;
use crate::cli::layout::age;

/// The certificate, its key and its roots. With a CA or an agent, one is requested, as at a start.
pub(super) struct Own;

impl Check for Own {
    fn info(&self) -> Info {
        Info::files("certificate", Category::Certificates)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        async move {
            if let Some(problems) = problems(&subject.configuration, "identity") {
                return Some(match &subject.settings.identity {
                    Some(IdentitySettings::Files(files)) => {
                        let file = files.certificate.display();
                        let show = "openssl x509 -noout -dates -ext subjectAltName";
                        problems.command(format!("{show} -in {file}"))
                    }
                    _ => problems,
                });
            }
            // `configuration` reports mistakes in the settings.
            subject.configuration.settings.as_ref()?;
            let finding = match subject.credentials().await {
                Ok(Some(credentials)) => sound(credentials),
                Ok(None) => Finding::warning("there is no source of certificates: HBONE is off")
                    .hint("set a source of certificates (identity.*)"),
                Err(error) => {
                    let finding = Finding::of_error(error);
                    let message = format!("there is no certificate: {}", finding.message);
                    Finding { message, ..finding }
                }
            };
            Some(with_warnings(finding, &subject.configuration))
        }
        .boxed_local()
    }
}

fn sound(credentials: &Credentials) -> Finding {
    let identity = credentials.identity();
    let (id, left) = (identity.spiffe_id(), age(time_left(identity).as_secs()));
    Finding::ok(format!("{id}, valid for another {left}"))
}

/// The problems of the files of a section; `None` without one.
fn problems(check: &ConfigCheck, section: &str) -> Option<Finding> {
    let problems = check.problems.iter().filter(|problem| problem.key.starts_with(section));
    let found: Vec<&Problem> = problems.filter(|problem| problem.origin.is_none()).collect();
    let (first, others) = found.split_first()?;
    let mut finding = Finding::failure(first.reason.clone());
    finding.hint = first.hint.clone();
    finding.details = others.iter().map(|problem| problem.with_hint()).collect();
    Some(finding)
}

/// Turns a sound finding into a warning if the configuration check warns of the identity.
fn with_warnings(finding: Finding, check: &ConfigCheck) -> Finding {
    let warnings = check.warnings.iter().filter(|warning| warning.key.starts_with("identity"));
    let mut warnings: Vec<_> = warnings.map(ToString::to_string).collect();
    if warnings.is_empty() || check.identity.is_none() {
        return finding;
    }
    let message = warnings.remove(0);
    Finding::warning(message).details(warnings.into_iter().chain([finding.message]))
}

/// The files of the configured trust.
pub(super) struct Trusted;

impl Check for Trusted {
    fn info(&self) -> Info {
        Info::files("trust", Category::Certificates)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let trust = &subject.settings.trust;
        if let Some(problems) = problems(&subject.configuration, "trust") {
            return at_once(problems);
        }
        let [bundles, lists] = [trust.bundles.len(), trust.crls.len()];
        at_once((bundles + lists + trust.aliases.len() > 0).then(|| {
            Finding::ok(format!(
                "trust bundles: {bundles}, aliases: {}, revocation lists: {lists}",
                trust.aliases.len()
            ))
        }))
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::Sources;

    use super::*;
    use crate::cli::doctor::check::Level;

    #[test]
    fn all_problems_of_an_identity_are_one_failure() {
        let files = ["identity.certificate=/no/a", "identity.key=/no/b", "identity.roots=/no/c"];
        let flags = files.iter().map(|&flag| flag.to_owned()).collect();
        let check = ConfigCheck::of(&Sources { flags, ..Sources::default() });
        let finding = problems(&check, "identity").unwrap();
        assert!(finding.level == Level::Failure && finding.message.starts_with("/no/a: "));
        assert_eq!(finding.details.len(), 2, "{finding:?}");
        assert!(problems(&check, "trust").is_none());
    }
}

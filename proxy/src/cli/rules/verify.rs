//! `underpass rules verify`: compares the installed rules with the expected ones, and lists foreign
//! rules that act before them.

use serde_json::{Value, json};
use underpass_interception::{Difference, ForeignRule};

use super::options::RuleOptions;
use super::sourced_settings::{Source, SourcedSettings};
use super::{Output, differences, prepare, print_json};
use crate::cli::print;
use crate::process::command_error::CommandError;

/// The result of the comparison.
struct Outcome {
    sourced: SourcedSettings,
    difference: Option<Difference>,
    foreign: Vec<ForeignRule>,
    /// Whether ip rules block the TCP of the workload.
    is_blocked: bool,
}

pub(super) async fn run(options: RuleOptions, output: Output) -> Result<(), CommandError> {
    let sourced = SourcedSettings::select(options).await?;
    let interception = prepare(&sourced.settings).await?;
    let outcome = Outcome {
        difference: interception.verify().await?,
        foreign: interception.foreign_rules().await?,
        is_blocked: interception.is_blocked().await?,
        sourced,
    };
    match output {
        Output::Json => print_json(&outcome.json())?,
        Output::Text => print(&outcome.text())?,
    }
    if outcome.difference.is_some() {
        return Err(CommandError::Difference);
    }
    outcome.bypass().map_or(Ok(()), |why| Err(CommandError::Bypassed(why)))
}

impl Outcome {
    fn json(&self) -> Value {
        let foreign = self.foreign.iter().map(|ForeignRule { location, rule, effect }| {
            json!({ "location": location, "rule": rule, "effect": effect.name() })
        });
        self.sourced.with(json!({
            "same": self.difference.is_none(),
            "differences": self.difference.as_ref().map(differences).unwrap_or_default(),
            "foreign": foreign.collect::<Vec<_>>(),
            "blocked": self.is_blocked,
        }))
    }

    fn text(&self) -> String {
        let whose = match &self.sourced.source {
            Source::Given => "the settings".to_owned(),
            Source::Running(running) => format!("the running proxy ({running})"),
            Source::Defaults => "the default settings".to_owned(),
        };
        let mut text = match &self.difference {
            None => format!("the installed rules are those of {whose}\n"),
            Some(difference) => {
                format!(
                    "the installed rules are not those of {whose}; - is missing, + should not be there\n{difference}"
                )
            }
        };
        if self.is_blocked {
            text.push_str(
                "the workload's TCP is blocked by ip rules (priorities 1 to 3) until the rules are installed\n",
            );
        }
        if let Source::Running(running) = &self.sourced.source
            && running.readiness != "ready"
        {
            text.push_str(&format!("the running proxy is {}\n", running.readiness));
        }
        if !self.foreign.is_empty() {
            text.push_str("rules of other programs that act before these:\n");
            text.extend(self.foreign.iter().map(|rule| format!("  {rule}\n")));
        }
        text
    }

    /// The reason why traffic bypasses the proxy although the rules are intact.
    fn bypass(&self) -> Option<String> {
        if let Source::Running(running) = &self.sourced.source
            && running.self_test_failed
        {
            return Some("the last self-test of the running proxy failed".to_owned());
        }
        let profile = self.sourced.settings.interception.profile;
        let mut foreign = self.foreign.iter();
        foreign.find(|rule| rule.exempts_from_capture(profile)).map(ToString::to_string)
    }
}

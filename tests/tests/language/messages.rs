//! Checks messages of errors and of the log: `what failed: cause` in lower case, without a full
//! stop, and without advice, which belongs to the hint.

use syn::visit::{self, Visit};
use syn::{Arm, Attribute, ItemImpl, LitStr, Macro, Meta, Pat};

/// Texts that indicate advice in a message.
const ADVICE: &[&str] = &[
    "?",
    "; ",
    ": add ",
    ": check ",
    ": choose ",
    ": connect to ",
    ": grant ",
    ": name ",
    ": raise ",
    ": remove ",
    ": run ",
    ": see ",
    ": set ",
    ": stop ",
    ": try ",
    ": use ",
];

/// The macros of the log.
const LOG_MACROS: &[&str] = &["error", "warn", "info", "debug", "trace"];

/// Violations in the messages of a source file.
pub(crate) fn message_problems(text: &str) -> Vec<String> {
    let file = syn::parse_file(text).expect("a source file");
    let mut messages = Messages(Vec::new());
    messages.visit_file(&file);
    messages.0
}

/// The violations of the rules in a message.
fn violations(message: &str) -> Vec<String> {
    // `{name:?}` is a format, not a question.
    let text = message.replace(":?}", "}");
    let advice = ADVICE.iter().filter(|advice| text.contains(**advice));
    let mut found: Vec<_> =
        advice.map(|advice| format!(" {message:?} contains advice: `{advice}`")).collect();
    if message.ends_with('.') {
        found.push(format!(" {message:?} ends with a full stop"));
    }
    let word = message.split([' ', ':', '.', ',']).next().unwrap_or_default();
    let is_capitalized = word.starts_with(char::is_uppercase)
        && word.len() > 1
        && word.chars().skip(1).all(char::is_lowercase);
    if is_capitalized {
        found.push(format!(" {message:?} starts with a capital"));
    }
    found
}

/// Visits the attributes `#[error]`, the macros of the log, and implementations of `Hint`.
struct Messages(Vec<String>);

impl<'ast> Visit<'ast> for Messages {
    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if attribute.path().is_ident("error")
            && let Meta::List(list) = &attribute.meta
            && let Some(first) = list.tokens.clone().into_iter().next()
            && let Ok(message) = syn::parse_str::<LitStr>(&first.to_string())
        {
            self.0.extend(violations(&message.value()));
        }
    }

    fn visit_macro(&mut self, log: &'ast Macro) {
        let name = log.path.segments.last().map(|segment| segment.ident.to_string());
        if !name.is_some_and(|name| LOG_MACROS.contains(&&*name)) {
            return;
        }
        let mut before = ",".to_owned();
        for token in log.tokens.clone() {
            let token = token.to_string();
            if before == ","
                && let Ok(message) = syn::parse_str::<LitStr>(&token)
            {
                self.0.extend(violations(&message.value()));
            }
            before = token;
        }
    }

    fn visit_item_impl(&mut self, item: &'ast ItemImpl) {
        let of = item.trait_.as_ref().and_then(|(_, path, _)| path.segments.last());
        if of.is_some_and(|name| name.ident == "Hint") {
            let mut wildcards = Wildcards(0);
            wildcards.visit_item_impl(item);
            if wildcards.0 > 0 {
                self.0.push(" an implementation of `Hint` has the arm `_`".to_owned());
            }
        }
        visit::visit_item_impl(self, item);
    }
}

/// Counts the arms `_`. They would let a new variant of an error have no hint.
struct Wildcards(usize);

impl<'ast> Visit<'ast> for Wildcards {
    fn visit_arm(&mut self, arm: &'ast Arm) {
        self.0 += usize::from(matches!(arm.pat, Pat::Wild(_)));
        visit::visit_arm(self, arm);
    }
}

#[test]
fn message_check_reports_advice_full_stop_and_capital() {
    let error = |message: &str| {
        message_problems(&format!("enum E {{ #[error(\"{message}\", *.0)] A(u8) }}")).len()
    };
    assert_eq!(error("cannot read {}: {cause}"), 0);
    assert_eq!(error("HTTP/2 failed, IPv6 too"), 0);
    for bad in ["cannot read {}: set a key", "is it up?", "it failed.", "Cannot read", "a; b"] {
        assert_eq!(error(bad), 1, "{bad}");
    }
}

#[test]
fn message_check_reads_messages_of_the_log_but_not_its_fields() {
    let log = |arguments: &str| {
        message_problems(&format!("fn f() {{ tracing::warn!({arguments}); }}")).len()
    };
    assert_eq!(log("error, hint = \"is it up? set a; b.\", \"cannot read\""), 0);
    assert_eq!(log("%error, \"cannot read {:?}: is it there?\", name"), 1);
    assert_eq!(log("\"Ready.\""), 2);
}

#[test]
fn message_check_reports_wildcard_in_hint() {
    let hint = |arm: &str| {
        format!("impl Hint for E {{ fn hint(&self) -> X {{ match self {{ {arm} => None }} }} }}")
    };
    assert_eq!(message_problems(&hint("Self::A")), [""; 0]);
    assert_eq!(message_problems(&hint("_")), [" an implementation of `Hint` has the arm `_`"]);
}

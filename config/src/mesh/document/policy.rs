//! Reads the section `policies` of the mesh file, in ztunnel's form and in plain YAML.
//!
//! A value that is not understood rejects the policy: ignoring it would widen a match or weaken the
//! policy. `mesh/policy.rs` defines the meaning.

use ipnet::IpNet;

use crate::cidr;
use crate::error::Reason;
use crate::mesh::names::Names;
use crate::mesh::policy::{
    Condition, Match, Policy, PolicyAction, PolicyScope, Rules, StringMatch, Values,
};
use crate::yaml::document::{Node, Value};
use crate::yaml::read::{Cursor, parse_flag};

const KEYS: &[&str] = &["name", "namespace", "scope", "action", "rules", "dryRun"];

const SCOPES: &[(&str, PolicyScope)] = &[
    ("Global", PolicyScope::Global),
    ("Namespace", PolicyScope::Namespace),
    ("WorkloadSelector", PolicyScope::WorkloadSelector),
];

const ACTIONS: &[(&str, PolicyAction)] =
    &[("Allow", PolicyAction::Allow), ("Deny", PolicyAction::Deny)];

const EXPECTED_MATCH: &str = "must name one kind of match: !Exact TEXT, !Prefix TEXT, !Suffix TEXT or !Presence [], \
                       or exact: TEXT, prefix: TEXT, suffix: TEXT or presence: true";

type Read = fn(Cursor<'_>) -> Values;

/// The conditions of a match: the key, the key of the negation, and the reader.
const CONDITION_KEYS: &[(&str, &str, Read)] = &[
    ("namespaces", "notNamespaces", |list| Values::Namespaces(list.items(string_match))),
    ("serviceAccounts", "notServiceAccounts", |list| {
        Values::ServiceAccounts(list.items(service_account))
    }),
    ("principals", "notPrincipals", |list| Values::Principals(list.items(principal))),
    ("sourceIps", "notSourceIps", |list| Values::SourceIps(list.items(cidr))),
    ("destinationIps", "notDestinationIps", |list| Values::DestinationIps(list.items(cidr))),
    ("destinationPorts", "notDestinationPorts", |list| Values::DestinationPorts(list.items(port))),
];

/// Reads a policy; `None` if it has mistakes.
pub(super) fn policy(item: Cursor<'_>, names: &mut Names) -> Option<Policy> {
    item.only(KEYS);
    let (name, namespace) = (label(item.key("name")), label(item.key("namespace")));
    let scope = require(&item.key("scope")).then(|| item.key("scope").one_of(SCOPES));
    let action = require(&item.key("action")).then(|| item.key("action").one_of(ACTIONS));
    let rules = rules(item.key("rules"));
    let dry_run = match item.key("dryRun") {
        given if given.is_given() => given.flag(),
        _ => Some(false),
    };
    let (namespace, scope) = (namespace?, scope??);
    if namespace.is_empty() && scope == PolicyScope::Namespace {
        item.key("namespace").problem("must not be empty with scope: Namespace");
        return None;
    }
    Some(Policy {
        name: names.shared(name?),
        namespace: names.shared(namespace),
        scope,
        action: action??,
        dry_run: dry_run?,
        rules: rules?,
    })
}

/// Checks that a required key is present. Without it, the policy could apply to other workloads, or
/// to none.
fn require(cursor: &Cursor<'_>) -> bool {
    let reason = match cursor.tag() {
        Some(_) => "must have no tag",
        None if cursor.is_given() => return true,
        None => "is needed",
    };
    cursor.problem(reason);
    false
}

/// Reads a name or namespace, which form `namespace/name` in workloads' references.
fn label<'a>(cursor: Cursor<'a>) -> Option<&'a str> {
    let text = require(&cursor).then(|| cursor.text())??;
    if text.contains('/') {
        cursor.problem("must not contain '/'");
        return None;
    }
    Some(text)
}

fn rules(list: Cursor<'_>) -> Option<Rules> {
    let rules = nested(list, |rule| nested(rule, |clause| nested(clause, one_match)));
    rules.map(Rules::from)
}

/// Reads a required list. An empty rule or clause matches everything, so a missing list must be an
/// error.
fn nested<T>(list: Cursor<'_>, read: impl FnMut(Cursor<'_>) -> Option<T>) -> Option<Vec<T>> {
    require(&list).then(|| list.items(read))
}

fn one_match(item: Cursor<'_>) -> Option<Match> {
    let entries =
        entries(item, "must be a mapping of conditions, such as {destinationPorts: [80]}")?;
    let keys: Vec<&str> =
        CONDITION_KEYS.iter().flat_map(|(key, opposite, _)| [*key, *opposite]).collect();
    item.only(&keys);
    for (key, value) in entries {
        if value.value == Value::Null {
            let hint = "leave the key out, or give it values";
            item.key(key).problem(Reason::with_hint("has no values", hint));
        }
    }
    let conditions = CONDITION_KEYS.iter().flat_map(|(key, opposite, read)| {
        [Condition::any_of(read(item.key(key))), Condition::none_of(read(item.key(opposite)))]
    });
    Some(conditions.collect())
}

/// Reads ztunnel's `!Exact text`, or `exact: text`.
fn string_match(item: Cursor<'_>) -> Option<StringMatch> {
    if let Some(tag) = item.tag() {
        return tagged(item, tag);
    }
    let [(kind, _)] = entries(item, EXPECTED_MATCH)? else {
        item.problem(EXPECTED_MATCH);
        return None;
    };
    item.only(&["exact", "prefix", "suffix", "presence"]);
    let value = item.key(kind);
    let text = || given_text(value);
    match kind.as_str() {
        "exact" => text().map(StringMatch::Exact),
        "prefix" => text().map(StringMatch::Prefix),
        "suffix" => text().map(StringMatch::Suffix),
        "presence" if value.text().and_then(parse_flag) == Some(true) => {
            Some(StringMatch::Presence)
        }
        "presence" => {
            value.problem("must be true");
            None
        }
        _ => None,
    }
}

/// The entries of an untagged mapping. Any other value is a mistake; `expected` is for its message.
fn entries<'a>(item: Cursor<'a>, expected: &str) -> Option<&'a [(String, Node)]> {
    match item.node() {
        Some(Node { value: Value::Mapping(entries), tag: None, .. }) => Some(entries),
        _ => {
            item.problem(expected);
            None
        }
    }
}

fn tagged(item: Cursor<'_>, tag: &str) -> Option<StringMatch> {
    let text = || {
        if !item.is_given() {
            item.problem("needs a text");
        }
        item.text().map(str::to_owned)
    };
    match tag {
        "Exact" => text().map(StringMatch::Exact),
        "Prefix" => text().map(StringMatch::Prefix),
        "Suffix" => text().map(StringMatch::Suffix),
        // serde_yaml writes the variant without values as an empty list, and also reads a null.
        "Presence" if !item.is_given() || item.is_empty_list() => Some(StringMatch::Presence),
        "Presence" => {
            item.problem("must be !Presence []");
            None
        }
        _ => {
            item.problem("must be one of !Exact, !Prefix, !Suffix and !Presence");
            None
        }
    }
}

fn given_text(cursor: Cursor<'_>) -> Option<String> {
    require(&cursor).then(|| cursor.text().map(str::to_owned))?
}

/// Reads an identity in Istio's form. With the scheme it would match no connection, so a deny
/// policy would have no effect.
fn principal(item: Cursor<'_>) -> Option<StringMatch> {
    let found = string_match(item)?;
    let text = match &found {
        StringMatch::Exact(text) | StringMatch::Prefix(text) | StringMatch::Suffix(text) => text,
        StringMatch::Presence => return Some(found),
    };
    if text.starts_with("spiffe:") {
        item.problem(
            "must be written without spiffe://, such as cluster.local/ns/default/sa/client",
        );
        return None;
    }
    Some(found)
}

fn service_account(item: Cursor<'_>) -> Option<(String, String)> {
    entries(item, "must be {namespace: NAMESPACE, serviceAccount: NAME}")?;
    item.only(&["namespace", "serviceAccount"]);
    let name = |key| given_text(item.key(key));
    let (namespace, account) = (name("namespace"), name("serviceAccount"));
    Some((namespace?, account?))
}

fn cidr(item: Cursor<'_>) -> Option<IpNet> {
    let parsed = cidr::parse(require(&item).then(|| item.text())??);
    if parsed.is_none() {
        item.problem("must be a CIDR or an address, such as 10.0.0.0/8, 10.1.2.3 or fd00::/8");
    }
    parsed
}

fn port(item: Cursor<'_>) -> Option<u16> {
    require(&item).then(|| item.port())?
}

#[cfg(test)]
mod tests;

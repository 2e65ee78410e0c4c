//! Converts `istio.security.Authorization`.
//!
//! A policy with an unknown part is never weakened: it is rejected. Without an accepted version, a
//! substitute denies all connections in its scope.

use bytes::Bytes;
use ipnet::IpNet;
use prost::Message as _;

use super::{Rejection, one_of};
use crate::cidr::canonical;
use crate::mesh::shared::Shared;
use crate::mesh::{
    Condition, Match, Policy, PolicyAction, PolicyScope, Rules, StringMatch, Values,
};
use crate::xds::authorization as message;
use crate::yaml::quote::Quoted;

const SCOPES: &[(i32, PolicyScope)] =
    &[(0, PolicyScope::Global), (1, PolicyScope::Namespace), (2, PolicyScope::WorkloadSelector)];
const ACTIONS: &[(i32, PolicyAction)] = &[(0, PolicyAction::Allow), (1, PolicyAction::Deny)];

/// Converts the policy of the resource `key`.
pub(in crate::xds) fn policy(
    key: &str,
    encoded: &Bytes,
    shared: &mut Shared,
) -> Result<Policy, Rejection> {
    let given = message::Authorization::decode(encoded.clone())?;
    if let Some(number) = message::unknown_field(encoded) {
        return Err(Rejection::UnknownField(number));
    }
    let name = format!("{}/{}", given.namespace, given.name);
    if name != key {
        return Err(Rejection::Name(Quoted::new(name)));
    }
    let scope = one_of("scope", given.scope, SCOPES)?;
    if scope == PolicyScope::Namespace && given.namespace.is_empty() {
        return Err(Rejection::value("namespace", ""));
    }
    Ok(Policy {
        name: shared.name(&given.name),
        namespace: shared.name(&given.namespace),
        scope,
        action: one_of("action", given.action, ACTIONS)?,
        dry_run: given.dry_run,
        rules: rules(&given.groups)?,
    })
}

/// A substitute for a rejected policy without an accepted version. It denies all connections in the
/// policy's scope, or everywhere if the scope is unreadable. Returns `None` for a dry-run policy,
/// which denies nothing.
pub(in crate::xds) fn substitute(key: &str, encoded: &Bytes) -> Option<Policy> {
    let given = message::Authorization::decode(encoded.clone()).ok();
    if given.as_ref().is_some_and(|given| given.dry_run) {
        return None;
    }
    let (namespace, name) = key.split_once('/').unwrap_or(("", key));
    // Without a certain namespace the scope is unknown.
    let given = given.filter(|given| !namespace.is_empty() && given.namespace == namespace);
    let scope = given.and_then(|given| one_of("scope", given.scope, SCOPES).ok());
    let name = format!("{name} (rejected)");
    Some(Policy::denying(namespace.into(), &name, scope.unwrap_or(PolicyScope::Global)))
}

fn rules(groups: &[message::Group]) -> Result<Rules, Rejection> {
    let clause = |rules: &message::Rules| rules.matches.iter().map(one_match).collect();
    let rule = |group: &message::Group| group.rules.iter().map(clause).collect();
    let rules: Result<Vec<Vec<Vec<Match>>>, Rejection> = groups.iter().map(rule).collect();
    rules.map(Rules::from)
}

fn one_match(given: &message::Match) -> Result<Match, Rejection> {
    let conditions = [
        Condition::any_of(Values::Namespaces(texts(&given.namespaces)?)),
        Condition::none_of(Values::Namespaces(texts(&given.not_namespaces)?)),
        Condition::any_of(Values::Principals(principals(&given.principals)?)),
        Condition::none_of(Values::Principals(principals(&given.not_principals)?)),
        Condition::any_of(Values::SourceIps(ranges(&given.source_ips)?)),
        Condition::none_of(Values::SourceIps(ranges(&given.not_source_ips)?)),
        Condition::any_of(Values::DestinationIps(ranges(&given.destination_ips)?)),
        Condition::none_of(Values::DestinationIps(ranges(&given.not_destination_ips)?)),
        Condition::any_of(Values::DestinationPorts(ports(&given.destination_ports)?)),
        Condition::none_of(Values::DestinationPorts(ports(&given.not_destination_ports)?)),
        Condition::any_of(Values::ServiceAccounts(accounts(&given.service_accounts)?)),
        Condition::none_of(Values::ServiceAccounts(accounts(&given.not_service_accounts)?)),
    ];
    Ok(conditions.into_iter().collect())
}

fn texts(given: &[message::StringMatch]) -> Result<Vec<StringMatch>, Rejection> {
    let text = |one: &message::StringMatch| match &one.kind {
        Some(message::MatchType::Exact(text)) => Ok(StringMatch::Exact(text.clone())),
        Some(message::MatchType::Prefix(text)) => Ok(StringMatch::Prefix(text.clone())),
        Some(message::MatchType::Suffix(text)) => Ok(StringMatch::Suffix(text.clone())),
        Some(message::MatchType::Presence(_)) => Ok(StringMatch::Presence),
        None => Err(Rejection::value("match_type", "none")),
    };
    given.iter().map(text).collect()
}

/// Identities without the scheme, as Istio sends them. With the scheme they would match no peer, so
/// that a DENY policy would have no effect.
fn principals(given: &[message::StringMatch]) -> Result<Vec<StringMatch>, Rejection> {
    let principals = texts(given)?;
    for one in &principals {
        if let StringMatch::Exact(text) | StringMatch::Prefix(text) | StringMatch::Suffix(text) =
            one
            && text.starts_with("spiffe:")
        {
            return Err(Rejection::value("principals", text));
        }
    }
    Ok(principals)
}

fn ranges(given: &[message::Range]) -> Result<Vec<IpNet>, Rejection> {
    let range = |one: &message::Range| {
        let v4 = <[u8; 4]>::try_from(&*one.address).map(Into::into);
        let address = v4.or_else(|_| <[u8; 16]>::try_from(&*one.address).map(Into::into)).ok()?;
        IpNet::new(address, u8::try_from(one.length).ok()?).ok()
    };
    let checked = |one| match range(one) {
        Some(range) => Ok(canonical(range)),
        None => Err(Rejection::value("address", one)),
    };
    given.iter().map(checked).collect()
}

fn ports(given: &[u32]) -> Result<Vec<u16>, Rejection> {
    given.iter().map(|port| super::port("ports", *port, false)).collect()
}

fn accounts(given: &[message::ServiceAccountMatch]) -> Result<Vec<(String, String)>, Rejection> {
    let account = |one: &message::ServiceAccountMatch| {
        let message::ServiceAccountMatch { namespace, service_account } = one;
        if namespace.contains('/') || service_account.contains('/') {
            return Err(Rejection::value("service_accounts", one));
        }
        Ok((namespace.clone(), service_account.clone()))
    };
    given.iter().map(account).collect()
}

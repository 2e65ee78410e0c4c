//! The options of `interception:` as flags, the same for every `rules` command.
//!
//! Each flag sets one key or two, over the file and the environment; so that what it may be, and what is said when it may
//! not, is the settings' business.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};
use underpass_config::Settings;

use crate::cli::run::SettingsArguments;
use crate::process::command_error::CommandError;

/// A flag with a value: its name, the keys that it sets, what it takes, what it is for.
type Valued = (&'static str, &'static [&'static str], &'static str, &'static str);

const VALUED: &[Valued] = &[
    ("profile", &["interception.profile"], "PROFILE", "Whose scheme: ambient, sidecar or osm"),
    (
        "backend",
        &["interception.backend"],
        "BACKEND",
        "What installs the rules: auto, nftables, iptables or iptables-legacy",
    ),
    ("ipv6", &["interception.ipv6"], "WHAT", "What happens to IPv6: capture, reject or bypass"),
    (
        "outbound-exclude-cidrs",
        &["interception.outbound.exclude_cidrs"],
        "A,B",
        "Destinations, of both families, that are not caught",
    ),
    (
        "outbound-include-cidrs",
        &["interception.outbound.include_cidrs"],
        "A,B",
        "Destinations that alone are caught; * for all, none for none",
    ),
    (
        "outbound-exclude-ports",
        &["interception.outbound.exclude_ports"],
        "P,Q-R",
        "Destination ports that are not caught",
    ),
    (
        "outbound-include-ports",
        &["interception.outbound.include_ports"],
        "P,Q-R",
        "Destination ports that are caught, whatever the address",
    ),
    (
        "outbound-exclude-interfaces",
        &["interception.outbound.exclude_interfaces"],
        "I,J",
        "Interfaces through which what leaves is not caught",
    ),
    (
        "outbound-exclude-uids",
        &["interception.outbound.exclude_uids"],
        "U,V",
        "Users whose connections are not caught",
    ),
    (
        "outbound-exclude-gids",
        &["interception.outbound.exclude_gids"],
        "G,H",
        "Groups whose connections are not caught",
    ),
    (
        "outbound-include-gids",
        &["interception.outbound.include_gids"],
        "G,H",
        "Groups whose connections alone are caught",
    ),
    (
        "inbound-mode",
        &["interception.inbound.mode"],
        "MODE",
        "How inbound connections reach the proxy: redirect or tproxy",
    ),
    (
        "inbound-include-ports",
        &["interception.inbound.include_ports"],
        "P,Q-R",
        "Ports that alone are caught on their way in; * for all, none for none",
    ),
    (
        "inbound-exclude-ports",
        &["interception.inbound.exclude_ports"],
        "P,Q-R",
        "Ports that are not caught on their way in",
    ),
    (
        "inbound-exclude-interfaces",
        &["interception.inbound.exclude_interfaces"],
        "I,J",
        "Interfaces through which what arrives is not caught",
    ),
    (
        "exclude-interfaces",
        &["interception.outbound.exclude_interfaces", "interception.inbound.exclude_interfaces"],
        "I,J",
        "Interfaces that are left alone in both directions",
    ),
    (
        "virtual-interfaces",
        &["interception.virtual_interfaces"],
        "I,J",
        "Interfaces through which virtual machines send: what arrives there is outbound",
    ),
    (
        "kubelet-probes",
        &["interception.kubelet_probes"],
        "off|on|P,Q-R",
        "Ports at which connections from the kubelet's probe address bypass the proxy (ambient)",
    ),
    ("proxy-uids", &["interception.proxy_uids"], "U,V", "The users that the proxy runs as"),
    ("proxy-gids", &["interception.proxy_gids"], "G,H", "The groups that the proxy runs as"),
    ("dns", &["interception.dns"], "WHAT", "What happens to DNS queries: off or capture"),
    (
        "dns-servers",
        &["interception.dns_servers"],
        "A,B",
        "The servers, queries to which alone are caught",
    ),
    (
        "loopback-cidr",
        &["interception.loopback_cidr"],
        "CIDR",
        "What counts as localhost in IPv4, instead of 127.0.0.1/32",
    ),
];

/// Flags that say yes: their name, key, what they are for.
const SWITCHES: &[(&str, &str, &str)] = &[
    (
        "exact",
        "interception.exact",
        "Only Istio's or OSM's own rules, without what makes them safer",
    ),
    ("drop-invalid", "interception.drop_invalid", "Drop packets that fit no connection"),
    ("ingress", "interception.ingress", "Do not catch what comes in in plain (ambient)"),
    ("allow-host", "interception.allow_host", "Allow the host's own network namespace"),
];

/// All that a `rules` command is told of the rules.
#[derive(Debug)]
pub(in crate::cli) struct RuleOptions {
    settings: SettingsArguments,
    assignments: Vec<String>,
}

impl RuleOptions {
    /// Whether the command line names no file and sets nothing.
    pub(super) fn are_empty(&self) -> bool {
        self.assignments.is_empty() && self.settings.are_empty()
    }

    pub(super) fn load(self) -> Result<Settings, CommandError> {
        self.settings.with(self.assignments).load()
    }
}

impl Args for RuleOptions {
    fn augment_args(command: Command) -> Command {
        let command = SettingsArguments::augment_args(command);
        let valued = VALUED.iter().map(|(name, _, value, help)| {
            Arg::new(*name).long(*name).value_name(*value).help(*help).action(ArgAction::Append)
        });
        let switches = SWITCHES.iter().map(|(name, _, help)| {
            Arg::new(*name).long(*name).help(*help).action(ArgAction::SetTrue)
        });
        command.args(valued).args(switches)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for RuleOptions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let settings = SettingsArguments::from_arg_matches(matches)?;
        let mut assignments = Vec::new();
        for (name, keys, ..) in VALUED {
            let Some(values) = matches.get_many::<String>(name) else {
                continue;
            };
            // Given twice, it says both: that is what iptables users expect of a list.
            let value = values.map(String::as_str).collect::<Vec<_>>().join(",");
            assignments.extend(keys.iter().map(|key| format!("{key}={value}")));
        }
        for (name, key, _) in SWITCHES {
            if matches.value_source(name) == Some(ValueSource::CommandLine) {
                assignments.push(format!("{key}=true"));
            }
        }
        Ok(Self { settings, assignments })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

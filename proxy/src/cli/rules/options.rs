//! Defines flags for the settings of `interception:`, shared by all `rules` commands.
//!
//! Each flag sets one or two keys, and overrides the file and the environment. The settings
//! validate the values.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};
use underpass_config::Settings;

use crate::cli::run::SettingsArguments;
use crate::process::command_error::CommandError;

/// A flag with a value: its name, the keys that it sets, the value's name, and the help text.
type FlagWithValue = (&'static str, &'static [&'static str], &'static str, &'static str);

const VALUED: &[FlagWithValue] = &[
    (
        "profile",
        &["interception.profile"],
        "PROFILE",
        "The traffic scheme: ambient, sidecar or osm",
    ),
    (
        "backend",
        &["interception.backend"],
        "BACKEND",
        "The backend: auto, nftables, iptables or iptables-legacy",
    ),
    ("ipv6", &["interception.ipv6"], "WHAT", "The handling of IPv6: capture, reject or bypass"),
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
        "Only these destinations are caught; * for all, none for none",
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
        "Interfaces whose outbound traffic is not caught",
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
        "Only connections of these groups are caught",
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
        "Only these inbound ports are caught; * for all, none for none",
    ),
    (
        "inbound-exclude-ports",
        &["interception.inbound.exclude_ports"],
        "P,Q-R",
        "Inbound ports that are not caught",
    ),
    (
        "inbound-exclude-interfaces",
        &["interception.inbound.exclude_interfaces"],
        "I,J",
        "Interfaces whose inbound traffic is not caught",
    ),
    (
        "exclude-interfaces",
        &["interception.outbound.exclude_interfaces", "interception.inbound.exclude_interfaces"],
        "I,J",
        "Interfaces that are excluded in both directions",
    ),
    (
        "virtual-interfaces",
        &["interception.virtual_interfaces"],
        "I,J",
        "Interfaces of virtual machines: connections that arrive there are treated as outbound",
    ),
    (
        "kubelet-probes",
        &["interception.kubelet_probes"],
        "off|on|P,Q-R",
        "Ports at which connections from the kubelet's probe address bypass the proxy (ambient)",
    ),
    ("proxy-uids", &["interception.proxy_uids"], "U,V", "The users that the proxy runs as"),
    ("proxy-gids", &["interception.proxy_gids"], "G,H", "The groups that the proxy runs as"),
    ("dns", &["interception.dns"], "WHAT", "The handling of DNS queries: off or capture"),
    (
        "dns-servers",
        &["interception.dns_servers"],
        "A,B",
        "Only queries to these servers are caught",
    ),
    (
        "loopback-cidr",
        &["interception.loopback_cidr"],
        "CIDR",
        "The IPv4 range of localhost, instead of 127.0.0.1/32",
    ),
];

/// Flags without a value: the name, the key and the help text.
const SWITCHES: &[(&str, &str, &str)] = &[
    (
        "exact",
        "interception.exact",
        "Only Istio's or OSM's own rules, without the additional safety rules of underpass",
    ),
    ("drop-invalid", "interception.drop_invalid", "Drop packets that belong to no connection"),
    ("ingress", "interception.ingress", "Do not catch inbound plaintext (ambient)"),
    ("allow-host", "interception.allow_host", "Allow the host's own network namespace"),
];

/// The options of a `rules` command that select the settings.
#[derive(Debug)]
pub(in crate::cli) struct RuleOptions {
    settings: SettingsArguments,
    assignments: Vec<String>,
}

impl RuleOptions {
    /// Whether the command line names no settings file and no setting.
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
            // A repeated flag extends the list, as iptables users expect.
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

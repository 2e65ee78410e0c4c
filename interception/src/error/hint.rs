//! The hints of this crate's errors: actions for the operator.

use std::borrow::Cow;
use std::io;

use underpass_config::Hint;

use super::{InterceptionError, SandboxRemedy};

impl Hint for InterceptionError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let hint = match self {
            Self::NotPermitted { capability, .. } => format!(
                "grant it with `securityContext.capabilities.add: [{capability}]` in a pod or `--cap-add {capability}` in a \
                 container, or run as root"
            ),
            Self::HostNamespace { .. } => {
                return fixed(
                    "run in the namespace of a pod or container, or set `interception.allow_host: true` to capture the entire host",
                );
            }
            Self::Unsupported { module, .. } => load(module),
            Self::LoopbackDown { .. } => return fixed("enable it with `ip link set lo up`"),
            Self::InboundDropped { interface } => format!(
                "set the sysctls net.ipv4.conf.all.src_valid_mark and net.ipv4.conf.{interface}.src_valid_mark to 0 (or \
                 net.ipv4.conf.{interface}.accept_local to 1), or interception.inbound.mode: redirect"
            ),
            Self::WrongUser { user, missing, .. } => format!(
                "grant them (`securityContext.capabilities.add: [{missing}]`, `--cap-add`), start the process as that user \
                 (`securityContext.runAsUser: {}`), or set `interception.proxy_uids`",
                user.uid
            ),
            Self::BecomeUser { .. } => {
                return fixed(
                    "set a user and group that this user namespace contains (`interception.proxy_uids`, `interception.proxy_gids`)",
                );
            }
            Self::Listen { source, setting, .. } => listen(source, setting),
            Self::Owned { .. } => {
                return fixed(
                    "stop that program (`nft list ruleset` prints its name): the kernel then removes the table",
                );
            }
            Self::IptablesProgram { source, .. } => return fixed(run_iptables(source)),
            Self::Iptables { module, .. } => return module.map(missing_module),
            Self::IptablesOwner { kind, .. } => format!(
                "set `interception.backend: nftables`, which accepts any id, or choose another id with \
                 `interception.proxy_{}ids` or in `interception.outbound`",
                kind.get(..1).unwrap_or_default()
            ),
            Self::IptablesIncompatible { .. } => {
                return fixed("set `interception.backend: nftables`");
            }
            Self::IptablesNotInstalled { undone: false, .. } => {
                return fixed("remove the rest with `underpass rules remove`");
            }
            Self::IptablesNotInstalled { source, undone: true, .. } => return source.hint(),
            Self::Sandbox { remedy, .. } => return remedy.hint(),
            Self::Netlink { .. }
            | Self::Socket { .. }
            | Self::UnexpectedReply(_)
            | Self::Namespace { .. } => return None,
        };
        Some(hint.into())
    }
}

impl SandboxRemedy {
    fn hint(self) -> Option<Cow<'static, str>> {
        match self {
            Self::SingleThread => fixed("enter the sandbox before the second thread starts"),
            Self::UserNamespaces => fixed(
                "allow user namespaces with `sysctl kernel.unprivileged_userns_clone=1`, \
                 `sysctl kernel.apparmor_restrict_unprivileged_userns=0` or `sysctl user.max_user_namespaces=10000` \
                 (depending on the kernel), or run as root",
            ),
            Self::Unknown => None,
        }
    }
}

fn fixed(hint: &'static str) -> Option<Cow<'static, str>> {
    Some(hint.into())
}

fn load(module: &str) -> String {
    format!("load it on the host with `modprobe {module}`, or build it into the kernel")
}

fn listen(source: &io::Error, setting: &str) -> String {
    match source.kind() {
        io::ErrorKind::AddrInUse => format!(
            "stop the other process that listens there, take over from it if it is underpass (`run --take-over`), or choose \
             another port with `{setting}`"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "grant NET_BIND_SERVICE for a port below 1024 and NET_ADMIN for a marked socket, or choose another port with \
             `{setting}`"
        ),
        _ => format!("correct `{setting}`"),
    }
}

fn run_iptables(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => {
            "install the package `iptables`, or choose another backend with `interception.backend`"
        }
        io::ErrorKind::TimedOut => {
            "stop the program that holds the lock /run/xtables.lock, or choose another backend with `interception.backend`"
        }
        _ => "choose another backend with `interception.backend`",
    }
}

fn missing_module(module: &'static str) -> Cow<'static, str> {
    // Legacy iptables reports a missing table module and a missing NET_RAW alike.
    let capability = if module.contains("table_") {
        ", or grant the capability NET_RAW, which legacy iptables needs in addition to NET_ADMIN"
    } else {
        ""
    };
    format!("if the kernel has no {module}, {}{capability}", load(module)).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::tests::listen;

    fn hint(error: &InterceptionError) -> String {
        let hint = error.hint().unwrap_or_default().into_owned();
        assert!(!hint.is_empty() && !error.to_string().contains(&hint), "{error}");
        hint
    }

    #[test]
    fn hint_of_port_in_use_names_setting_and_take_over() {
        let hint = hint(&listen(io::ErrorKind::AddrInUse));
        assert!(hint.contains("proxy.outbound_port") && hint.contains("--take-over"), "{hint}");
    }

    #[test]
    fn hint_of_privileged_port_names_capability() {
        assert!(hint(&listen(io::ErrorKind::PermissionDenied)).contains("NET_BIND_SERVICE"));
    }

    #[test]
    fn hint_of_host_namespace_names_setting_that_allows_it() {
        let error = InterceptionError::HostNamespace { why: "test".to_owned() };
        assert!(hint(&error).contains("interception.allow_host"));
        assert!(error.is_configuration());
    }

    #[test]
    fn hint_of_partly_installed_rules_is_to_remove_them() {
        let not_installed = |undone| InterceptionError::IptablesNotInstalled {
            family: "IPv4",
            undone,
            source: Box::new(listen(io::ErrorKind::AddrInUse)),
        };
        assert!(hint(&not_installed(false)).contains("rules remove"));
        assert_eq!(hint(&not_installed(true)), hint(&listen(io::ErrorKind::AddrInUse)));
    }
}

//! Kernel tests of the iptables backend, in both variants and both families.
//!
//! The iptables owner match rejects users and groups outside of the user namespace, and the sandbox
//! has only id 0. Therefore the proxy's user is root here.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};

use libtest_mimic::Failed;
use nlink::netlink::nftables::{Family as KernelFamily, NFT_TABLE_F_OWNER};
use nlink::netlink::{Connection, Nftables};
use underpass_config::{Backend, Hint as _, InterceptionSettings, Ipv6, Profile};
use underpass_interception::{
    Family, Interception, InterceptionError, Namespace, NamespaceAccess, RemovalScope, RulePlan,
    remove_everything,
};

use crate::Case;
use crate::plans::{all, maximal_settings, minimal_settings, with_tproxy};
use crate::pod::{DEADLINE, PORTS, command, equal, inside, isolated_namespace};

pub(crate) const CASES: &[Case] = &[
    ("the plans of these tests cover every match and every action", covers_every_match_and_action),
    ("iptables-nft lists a plan exactly as it was printed", || lists_plan_as_printed(NFT)),
    ("iptables-legacy lists a plan exactly as it was printed", || lists_plan_as_printed(LEGACY)),
    ("iptables-nft: installation gives the same rules as loading the printed text", || {
        installs_the_printed_text(NFT)
    }),
    ("iptables-legacy: installation gives the same rules as loading the printed text", || {
        installs_the_printed_text(LEGACY)
    }),
    ("iptables-nft: installing twice gives the same ruleset", || {
        second_installation_changes_nothing(NFT)
    }),
    ("iptables-legacy: installing twice gives the same ruleset", || {
        second_installation_changes_nothing(LEGACY)
    }),
    ("iptables-nft: installation removes other profiles and options", || {
        installation_removes_other_profiles(NFT)
    }),
    ("iptables-legacy: installation removes other profiles and options", || {
        installation_removes_other_profiles(LEGACY)
    }),
    ("iptables-nft: foreign rules keep their positions", || foreign_rules_keep_positions(NFT)),
    ("iptables-legacy: foreign rules keep their positions", || {
        foreign_rules_keep_positions(LEGACY)
    }),
    ("iptables-nft: rejections precede foreign rules", || rejections_precede_foreign_rules(NFT)),
    ("iptables-legacy: rejections precede foreign rules", || {
        rejections_precede_foreign_rules(LEGACY)
    }),
    ("iptables-nft: removal leaves no rule and no chain", || removal_leaves_nothing(NFT)),
    ("iptables-legacy: removal leaves no rule and no chain", || removal_leaves_nothing(LEGACY)),
    ("iptables-nft: counters add both families", || counters_add_both_families(NFT)),
    ("iptables-legacy: counters add both families", || counters_add_both_families(LEGACY)),
    ("iptables-nft: changes are detected and repaired", || changes_are_detected_and_repaired(NFT)),
    ("iptables-legacy: changes are detected and repaired", || {
        changes_are_detected_and_repaired(LEGACY)
    }),
    ("iptables-nft: leftovers of other backends and meshes are found", || {
        leftovers_are_found(NFT, LEGACY)
    }),
    ("iptables-legacy: leftovers of other backends and meshes are found", || {
        leftovers_are_found(LEGACY, NFT)
    }),
    ("detecting iptables creates no table", detection_creates_no_table),
    ("a failure of the second family undoes the first", failure_is_undone),
    ("a table that iptables cannot read is reported", unreadable_table_is_reported),
];

const NFT: Variant = Variant { suffix: "nft", backend: Backend::Iptables };
const LEGACY: Variant = Variant { suffix: "legacy", backend: Backend::IptablesLegacy };
const FAMILIES: [(Family, &str); 2] = [(Family::V4, "iptables"), (Family::V6, "ip6tables")];

#[derive(Debug, Clone, Copy)]
struct Variant {
    suffix: &'static str,
    backend: Backend,
}

impl Variant {
    /// Creates a namespace for a test of this variant.
    fn pod(self, name: &str) -> Result<Namespace, Failed> {
        isolated_namespace(&format!("{name}-{}", self.suffix))
    }

    /// Passes text to an `iptables-restore` program.
    fn load(self, pod: &Namespace, program: &str, text: &str) -> Result<(), Failed> {
        let path = format!("/run/{}.rules", pod.path().file_name().unwrap_or_default().display());
        fs::write(&path, text)?;
        command(pod, &format!("{program}-{}-restore --noflush {path}", self.suffix)).map(|_| ())
    }

    fn run(self, pod: &Namespace, arguments: &str) -> Result<(), Failed> {
        for (_, program) in FAMILIES {
            command(pod, &format!("{program}-{} {arguments}", self.suffix))?;
        }
        Ok(())
    }

    /// Lists the rules of all programs.
    fn saved(self, pod: &Namespace) -> Result<Rules, Failed> {
        let mut rules = Rules::new();
        for (_, program) in FAMILIES {
            let text = command(pod, &format!("{program}-{}-save", self.suffix))?;
            collect(&mut rules, program, &text);
        }
        Ok(rules)
    }

    async fn prepare(self, settings: &InterceptionSettings) -> Result<Interception, Failed> {
        let settings = InterceptionSettings { backend: self.backend, ..settings.clone() };
        let prepared =
            Interception::prepare(&NamespaceAccess::current()?, &settings, PORTS).await?;
        prepared.ok_or_else(|| "the profile has rules".into())
    }

    fn install(self, pod: &Namespace, settings: &InterceptionSettings) -> Result<(), Failed> {
        inside(pod, async || Ok(self.prepare(settings).await?.install().await?))
    }
}

/// Chains by program, table and name. Without empty built-in chains.
type Rules = BTreeMap<(&'static str, String, String), Vec<String>>;

fn collect(rules: &mut Rules, program: &'static str, text: &str) {
    let mut table = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix(':') {
            if let Some((name, "- [0:0]")) = chain.split_once(' ') {
                rules.entry((program, table.to_owned(), name.to_owned())).or_default();
            }
        } else if let Some(chain) = line.strip_prefix("-A ").and_then(|rest| rest.split(' ').next())
        {
            let key = (program, table.to_owned(), chain.to_owned());
            rules.entry(key).or_default().push(line.to_owned());
        }
    }
}

/// The text of a plan in the format of `iptables-save`, without the records of rules in built-in
/// chains.
fn printed(interception: &Interception) -> Rules {
    let mut rules = Rules::new();
    for (family, program) in FAMILIES {
        collect(&mut rules, program, &interception.plan().iptables(family));
    }
    rules
}

fn without_records(rules: Rules) -> Rules {
    let records =
        ["UNDERPASS_OWNER", "UNDERPASS_PREROUTING", "UNDERPASS_INPUT", "UNDERPASS_OUTPUT"];
    rules.into_iter().filter(|((_, _, chain), _)| !records.contains(&chain.as_str())).collect()
}

/// Normalizes addresses, whose abbreviation depends on the C library.
fn canonical(rules: Rules) -> Rules {
    let canonical = |line: String| line.replace("::127.0.0.53", "::7f00:35");
    rules
        .into_iter()
        .map(|(chain, lines)| (chain, lines.into_iter().map(canonical).collect()))
        .collect()
}

fn covers_every_match_and_action() -> Result<(), Failed> {
    let plans: Vec<_> =
        all()?.iter().map(|settings| RulePlan::new(settings, PORTS, true)).collect();
    let rules = || plans.iter().flat_map(RulePlan::rules).filter(|rule| !rule.nftables_only);
    let matches: HashSet<_> =
        rules().flat_map(|rule| &rule.matches).map(std::mem::discriminant).collect();
    let actions: HashSet<_> = rules().map(|rule| std::mem::discriminant(&rule.action)).collect();
    // The numbers of variants of `Match` and `Action`.
    equal("matches and actions", (matches.len(), actions.len()), (22, 12))
}

fn lists_plan_as_printed(variant: Variant) -> Result<(), Failed> {
    for (number, settings) in all()?.iter().enumerate() {
        let pod = variant.pod(&format!("printed-{number}"))?;
        let interception = inside(&pod, async || variant.prepare(settings).await)?;
        for (family, program) in FAMILIES {
            variant.load(&pod, program, &interception.plan().iptables(family))?;
        }
        let saved = canonical(variant.saved(&pod)?);
        equal("the listed rules", saved, canonical(printed(&interception)))?;
        let difference = inside(&pod, async || Ok(interception.verify().await?))?;
        let text = difference.map(|difference| difference.to_string()).unwrap_or_default();
        // The text contains neither the routes nor the records of rules in built-in chains.
        let lines: Vec<_> = text.lines().filter(|line| line.starts_with('+')).collect();
        equal("unexpected lines", lines, vec![])?;
    }
    Ok(())
}

fn installs_the_printed_text(variant: Variant) -> Result<(), Failed> {
    for (number, settings) in all()?.iter().enumerate() {
        let pod = variant.pod(&format!("installed-{number}"))?;
        let interception = inside(&pod, async || {
            let interception = variant.prepare(settings).await?;
            interception.install().await?;
            let difference = interception.verify().await?;
            equal("the difference", difference.map(|d| d.to_string()), None)?;
            Ok(interception)
        })?;
        let saved = canonical(without_records(variant.saved(&pod)?));
        equal("the installed rules", saved, canonical(printed(&interception)))?;
    }
    Ok(())
}

fn second_installation_changes_nothing(variant: Variant) -> Result<(), Failed> {
    for (number, settings) in all()?.iter().enumerate() {
        let pod = variant.pod(&format!("ipt-twice-{number}"))?;
        variant.install(&pod, settings)?;
        let once = variant.saved(&pod)?;
        variant.install(&pod, settings)?;
        equal("the second listing", variant.saved(&pod)?, once)?;
    }
    Ok(())
}

fn installation_removes_other_profiles(variant: Variant) -> Result<(), Failed> {
    let all = all()?;
    let one = variant.pod("others-go")?;
    for (number, settings) in all.iter().enumerate() {
        variant.install(&one, settings)?;
        let fresh = variant.pod(&format!("others-go-{number}"))?;
        variant.install(&fresh, settings)?;
        equal("the listing after others", variant.saved(&one)?, variant.saved(&fresh)?)?;
    }
    Ok(())
}

/// Foreign rules that precede underpass's rules, and a chain with a jump to it.
const FOREIGN: &str = "*nat\n:DOCKER_OUTPUT - [0:0]\n:PROXY_INIT_OUTPUT - [0:0]\n\
    -A DOCKER_OUTPUT -p tcp -j RETURN\n-A OUTPUT -o docker0 -j DOCKER_OUTPUT\n\
    -A OUTPUT -j PROXY_INIT_OUTPUT\nCOMMIT\n*mangle\n-A PREROUTING -i eth9 -j RETURN\nCOMMIT\n\
    *filter\n:THEIRS - [0:0]\n-A OUTPUT -j THEIRS\nCOMMIT\n";

fn foreign_rules_keep_positions(variant: Variant) -> Result<(), Failed> {
    let pod = variant.pod("foreign")?;
    for (_, program) in FAMILIES {
        variant.load(&pod, program, FOREIGN)?;
    }
    variant.install(&pod, &with_tproxy(maximal_settings(Profile::Sidecar)?))?;
    // Some foreign rules are added after underpass's rules.
    variant.run(&pod, "-t nat -A OUTPUT -o later0 -j RETURN")?;
    variant.run(&pod, "-t mangle -A OUTPUT -o later0 -j RETURN")?;
    variant.install(&pod, &with_tproxy(maximal_settings(Profile::Sidecar)?))?;
    let saved = variant.saved(&pod)?;
    variant.install(&pod, &minimal_settings(Profile::Ambient)?)?;
    for (_, program) in FAMILIES {
        let output = |rules: &Rules| {
            let key = (program, "nat".to_owned(), "OUTPUT".to_owned());
            rules.get(&key).cloned().unwrap_or_default()
        };
        let expected = [
            "-A OUTPUT -o docker0 -j DOCKER_OUTPUT",
            "-A OUTPUT -j PROXY_INIT_OUTPUT",
            "-A OUTPUT -o eth1 -j RETURN",
            "-A OUTPUT -o eth2 -j RETURN",
            "-A OUTPUT -j ISTIO_OUTPUT",
            "-A OUTPUT -o later0 -j RETURN",
        ];
        equal("nat OUTPUT", output(&saved), expected.map(str::to_owned).to_vec())?;
        let expected = [&expected[..2], &expected[4..]].concat();
        let expected: Vec<_> = expected.into_iter().map(str::to_owned).collect();
        equal("nat OUTPUT afterwards", output(&variant.saved(&pod)?), expected)?;
    }
    inside(&pod, async || {
        Ok(variant.prepare(&minimal_settings(Profile::Ambient)?).await?.remove().await?)
    })?;
    let mut theirs = Rules::new();
    for (_, program) in FAMILIES {
        collect(&mut theirs, program, FOREIGN);
        let mut add = |table: &str| {
            let key = (program, table.to_owned(), "OUTPUT".to_owned());
            theirs.entry(key).or_default().push("-A OUTPUT -o later0 -j RETURN".to_owned());
        };
        add("nat");
        add("mangle");
    }
    equal("the foreign rules", variant.saved(&pod)?, theirs)
}

fn rejections_precede_foreign_rules(variant: Variant) -> Result<(), Failed> {
    let pod = variant.pod("refusals")?;
    variant.run(&pod, "-A OUTPUT -j ACCEPT")?;
    let settings =
        InterceptionSettings { ipv6: Ipv6::Reject, ..minimal_settings(Profile::Ambient)? };
    variant.install(&pod, &settings)?;
    let rules = variant.saved(&pod)?;
    let output = rules.get(&("ip6tables", "filter".to_owned(), "OUTPUT".to_owned()));
    let expected = ["-A OUTPUT -j ISTIO_OUTPUT", "-A OUTPUT -j ACCEPT"].map(str::to_owned).to_vec();
    equal("filter OUTPUT", output, Some(&expected))
}

fn removal_leaves_nothing(variant: Variant) -> Result<(), Failed> {
    let pod = variant.pod("ipt-removed")?;
    for settings in all()? {
        inside(&pod, async || {
            let interception = variant.prepare(&settings).await?;
            interception.install().await?;
            // The process that removes the rules may have other settings.
            equal(
                "something was removed",
                remove_everything(&NamespaceAccess::current()?, RemovalScope::Own, false).await?,
                true,
            )?;
            equal(
                "something was removed",
                remove_everything(&NamespaceAccess::current()?, RemovalScope::Own, false).await?,
                false,
            )
        })?;
        equal("the rules after removal", variant.saved(&pod)?, Rules::new())?;
    }
    Ok(())
}

fn counters_add_both_families(variant: Variant) -> Result<(), Failed> {
    let pod = variant.pod("ipt-counted")?;
    inside(&pod, async || {
        let interception = variant.prepare(&minimal_settings(Profile::Sidecar)?).await?;
        equal("counters before", interception.counters().await?.len(), 0)?;
        interception.install().await?;
        let counters = interception.counters().await?;
        let ids: Vec<_> = counters.iter().map(|counter| counter.id.as_str()).collect();
        let rules = interception.plan().rules().iter();
        let planned: Vec<_> = rules.map(|rule| rule.id.as_str()).collect();
        equal("the ids", ids, planned)?;
        for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            // No socket listens, but the rules count the connection attempt.
            let refused = TcpStream::connect_timeout(&SocketAddr::new(address, 9), DEADLINE);
            equal("the connection is refused", refused.is_err(), true)?;
        }
        let counters = interception.counters().await?;
        let hit = counters.into_iter().filter(|counter| counter.packets > 0);
        let hit: Vec<_> = hit.map(|counter| (counter.id, counter.packets)).collect();
        let expected = [("enter-outbound", 2), ("4-proxy", 2)];
        equal("rules that matched", hit, expected.map(|(id, n)| (id.to_owned(), n)).to_vec())
    })
}

fn changes_are_detected_and_repaired(variant: Variant) -> Result<(), Failed> {
    for (number, tampering) in [
        "-t nat -D OUTPUT -j ISTIO_OUTPUT",
        "-t nat -F ISTIO_OUTPUT",
        "-t nat -I ISTIO_OUTPUT -j RETURN",
        "-t nat -D OUTPUT -o eth1 -j RETURN",
        "-t mangle -F",
    ]
    .iter()
    .enumerate()
    {
        let pod = variant.pod(&format!("repaired-{number}"))?;
        let settings = with_tproxy(maximal_settings(Profile::Sidecar)?);
        variant.install(&pod, &settings)?;
        let installed = variant.saved(&pod)?;
        variant.run(&pod, "-t nat -A PREROUTING -i foreign0 -j ACCEPT")?;
        inside(&pod, async || {
            let difference = variant.prepare(&settings).await?.verify().await?;
            equal("a foreign rule is a difference", difference.is_some(), false)
        })?;
        variant.run(&pod, tampering)?;
        inside(&pod, async || {
            let interception = variant.prepare(&settings).await?;
            equal("a difference is detected", interception.verify().await?.is_some(), true)?;
            interception.install().await?;
            equal("a difference remains", interception.verify().await?.map(|d| d.to_string()), None)
        })?;
        variant.run(&pod, "-t nat -D PREROUTING -i foreign0 -j ACCEPT")?;
        equal("the repaired rules", variant.saved(&pod)?, installed)?;
    }
    Ok(())
}

fn leftovers_are_found(own: Variant, other: Variant) -> Result<(), Failed> {
    let pod = own.pod("ipt-leftovers")?;
    own.install(&pod, &minimal_settings(Profile::Ambient)?)?;
    let found = || {
        inside(&pod, async || {
            let leftovers =
                own.prepare(&minimal_settings(Profile::Ambient)?).await?.leftovers().await?;
            Ok(leftovers.iter().map(|leftover| leftover.what.clone()).collect::<Vec<_>>())
        })
    };
    equal("leftovers before", found()?, vec![])?;
    other.install(&pod, &minimal_settings(Profile::Osm)?)?;
    command(&pod, "nft add table inet underpass")?;
    command(&pod, "nft add table inet istio-ambient-nat")?;
    command(&pod, &format!("ip6tables-{} -t nat -N OSM_PROXY_INBOUND", own.suffix))?;
    command(&pod, &format!("ip6tables-{} -t nat -N PROXY_INIT_OUTPUT", own.suffix))?;
    command(&pod, &format!("ip6tables-{} -t nat -N ISTIO_OTHER", own.suffix))?;
    let (chains, place) = (
        "PROXY_INBOUND, PROXY_IN_REDIRECT, PROXY_OUTPUT, PROXY_REDIRECT",
        |variant: Variant, v6: bool| match (variant.backend, v6) {
            (Backend::IptablesLegacy, false) => "table nat of iptables-legacy",
            (Backend::IptablesLegacy, true) => "table nat of ip6tables-legacy",
            (_, false) => "nftables table ip nat",
            (_, true) => "nftables table ip6 nat",
        },
    );
    let mut expected = vec![
        format!("the chain ISTIO_OTHER in the {}", place(own, true)),
        format!("the chain OSM_PROXY_INBOUND in the {}", place(own, true)),
        format!("the chain PROXY_INIT_OUTPUT in the {}", place(own, true)),
        format!("the chains {chains} in the {}", place(other, false)),
        format!("the chains {chains} in the {}", place(other, true)),
        "the nftables table inet istio-ambient-nat".to_owned(),
        "the nftables table inet underpass".to_owned(),
    ];
    expected.sort();
    equal("leftovers", found()?, expected)
}

fn detection_creates_no_table() -> Result<(), Failed> {
    let pod = isolated_namespace("looking")?;
    for variant in [NFT, LEGACY] {
        inside(&pod, async || {
            let interception = variant.prepare(&maximal_settings(Profile::Sidecar)?).await?;
            equal("leftovers", interception.leftovers().await?.len(), 0)?;
            equal("a difference", interception.verify().await?.is_some(), true)?;
            equal("counters", interception.counters().await?.len(), 0)?;
            interception.remove().await?;
            for names in ["ip_tables_names", "ip6_tables_names"] {
                let path = format!("/proc/thread-self/net/{names}");
                equal(names, fs::read_to_string(path)?, String::new())?;
            }
            Ok(())
        })?;
    }
    equal("tables of nftables", command(&pod, "nft list ruleset")?, String::new())
}

fn failure_is_undone() -> Result<(), Failed> {
    let pod = isolated_namespace("ipt-undone")?;
    let old = maximal_settings(Profile::Sidecar)?;
    let ipv4 = InterceptionSettings { ipv6: Ipv6::Bypass, ..old };
    NFT.install(&pod, &ipv4)?;
    let before = NFT.saved(&pod)?;
    inside(&pod, async || {
        // Only its owner can change a table with an owner. The table is removed with the owner.
        let owner = Connection::<Nftables>::new()?;
        owner.add_table_with_flags("nat", KernelFamily::Ip6, NFT_TABLE_F_OWNER).await?;
        let result = NFT.prepare(&minimal_settings(Profile::Ambient)?).await?.install().await;
        let undone = matches!(
            result,
            Err(InterceptionError::IptablesNotInstalled { family: "IPv6", undone: true, .. })
        );
        equal("the installation failed and was undone", undone, true)
    })?;
    equal("the restored rules", NFT.saved(&pod)?, before)
}

fn unreadable_table_is_reported() -> Result<(), Failed> {
    let pod = isolated_namespace("incompatible")?;
    command(&pod, "nft add table ip nat")?;
    command(&pod, "nft add chain ip nat OUTPUT { type nat hook output priority -100; }")?;
    command(&pod, "nft add rule ip nat OUTPUT fib daddr type local accept")?;
    let before = command(&pod, "nft list ruleset")?;
    inside(&pod, async || {
        let interception = NFT.prepare(&minimal_settings(Profile::Ambient)?).await?;
        let Err(error) = interception.install().await else {
            return Err("it was installed".into());
        };
        let hint = error.hint().unwrap_or_default();
        equal("the hint names a remedy", hint.contains("interception.backend: nftables"), true)?;
        equal(
            "something was removed",
            remove_everything(&NamespaceAccess::current()?, RemovalScope::Own, false).await?,
            false,
        )
    })?;
    equal("the rules after the failure", command(&pod, "nft list ruleset")?, before)
}

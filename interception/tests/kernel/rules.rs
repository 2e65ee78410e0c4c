//! Kernel tests of installing, listing and removing rules, checked with nft and ip.

use std::os::unix::fs::MetadataExt as _;
use std::{fs, io, thread};

use libtest_mimic::Failed;
use nlink::netlink::nftables::{Family, NFT_TABLE_F_OWNER};
use nlink::netlink::{Connection, Nftables};
use underpass_config::Hint as _;
use underpass_interception::{
    Interception, InterceptionError, Namespace, NamespaceAccess, RemovalScope, TABLE, counters,
    remove_everything,
};

use crate::Case;
use crate::pod::{PORTS, command, equal, inside, isolated_namespace, prepare, settings};

pub(crate) const CASES: &[Case] = &[
    ("installing twice gives the same ruleset and routes", second_installation_changes_nothing),
    ("removal leaves nothing in either family", removal_leaves_nothing),
    ("removal keeps foreign rules and routes", removal_keeps_foreign_rules),
    ("the printed and the installed plan give the same listing", installs_the_printed_plan),
    ("installation replaces the rules of another version", leftovers_are_replaced),
    ("a failed installation leaves nothing", failure_leaves_nothing),
    ("a rejected ruleset undoes its routes", rejected_rules_leave_nothing),
    (
        "ip rules and routes of another mode are a difference and are removed",
        routes_of_other_mode_are_removed,
    ),
    ("a dormant own table is replaced by an active one", dormant_table_is_replaced),
    (
        "IPv6 rules exist while IPv6 is disabled, and their routes are added later (nftables)",
        || disabled_ipv6("nftables"),
    ),
    (
        "IPv6 rules exist while IPv6 is disabled, and their routes are added later (iptables)",
        || disabled_ipv6("iptables"),
    ),
    ("IPv6 rules exist while IPv6 is disabled, and their routes are added later (legacy)", || {
        disabled_ipv6("iptables-legacy")
    }),
    ("ipv6: bypass captures IPv4 only, and keeps the return routes", bypass_captures_only_ipv4),
    ("counters name every rule in order", counters_name_rules_in_order),
    ("a difference is printed readably", difference_is_readable),
    ("foreign rules that precede own rules are listed", foreign_rules),
];

/// The rules, ip rules and local routes of a namespace.
#[derive(Debug, PartialEq)]
struct Listing {
    rules: String,
    policy: [String; 2],
    routes: [String; 2],
}

impl Listing {
    fn of(namespace: &Namespace) -> Result<Self, Failed> {
        Ok(Self {
            rules: command(namespace, "nft --stateless list ruleset")?,
            policy: [command(namespace, "ip -4 rule")?, command(namespace, "ip -6 rule")?],
            routes: [
                command(namespace, "ip -4 route show table all type local default")?,
                command(namespace, "ip -6 route show table all type local default")?,
            ],
        })
    }
}

fn second_installation_changes_nothing() -> Result<(), Failed> {
    let pod = isolated_namespace("twice")?;
    let install = || inside(&pod, async || Ok(prepare("").await?.install().await?));
    install()?;
    let once = Listing::of(&pod)?;
    install()?;
    equal("the second listing", Listing::of(&pod)?, once)?;
    let listing = Listing::of(&pod)?;
    for family in listing.policy.iter().zip(&listing.routes) {
        let rules = family.0.matches("32764:\tfrom all fwmark 0x111/0xfff lookup 100").count();
        let routes = family.1.matches("local default dev lo table 100").count();
        equal("rules and routes of a family", (rules, routes), (1, 1))?;
    }
    Ok(())
}

fn removal_leaves_nothing() -> Result<(), Failed> {
    let pod = isolated_namespace("removal")?;
    let before = Listing::of(&pod)?;
    inside(&pod, async || {
        let interception = prepare("").await?;
        interception.install().await?;
        interception.remove().await?;
        interception.remove().await?;
        equal(
            "something was removed",
            remove_everything(&NamespaceAccess::current()?, RemovalScope::Own, false).await?,
            false,
        )?;
        interception.install().await?;
        equal(
            "something was removed",
            remove_everything(&NamespaceAccess::current()?, RemovalScope::Own, false).await?,
            true,
        )
    })?;
    equal("the listing after removal", Listing::of(&pod)?, before)
}

fn removal_keeps_foreign_rules() -> Result<(), Failed> {
    let pod = isolated_namespace("others")?;
    command(&pod, "nft add table inet theirs")?;
    command(&pod, "ip rule add fwmark 0x111/0xfff pref 32764 lookup 100")?;
    command(&pod, "ip rule add fwmark 0x111/0xfff pref 32765 lookup 101")?;
    command(&pod, "ip -6 route add local default dev lo table 100")?;
    let before = Listing::of(&pod)?;
    inside(&pod, async || {
        let interception = prepare("").await?;
        interception.install().await?;
        Ok(interception.remove().await?)
    })?;
    equal("the listing after removal", Listing::of(&pod)?, before)
}

fn installs_the_printed_plan() -> Result<(), Failed> {
    for (ipv6, name) in [("ipv6=capture", "printed-both"), ("ipv6=bypass", "printed-v4")] {
        let pod = isolated_namespace(name)?;
        let plan = inside(&pod, async || {
            let interception = prepare(ipv6).await?;
            interception.install().await?;
            Ok(interception.plan().clone())
        })?;
        let installed = command(&pod, "nft --stateless list ruleset")?;
        for text in [plan.to_string(), format!("{plan:#}")] {
            let path = format!("/run/{name}.nft");
            fs::write(&path, text)?;
            command(&pod, "nft flush ruleset")?;
            command(&pod, &format!("nft -f {path}"))?;
            command(&pod, &format!("nft -f {path}"))?;
            let printed = command(&pod, "nft --stateless list ruleset")?;
            equal("the listing of the printed plan", &printed, &installed)?;
        }
    }
    Ok(())
}

fn leftovers_are_replaced() -> Result<(), Failed> {
    let pod = isolated_namespace("leftovers")?;
    command(&pod, "nft add table inet underpass")?;
    command(&pod, "nft add chain inet underpass old { type filter hook input priority 0; }")?;
    command(&pod, "nft add rule inet underpass old tcp dport 1 drop")?;
    inside(&pod, async || Ok(prepare("").await?.install().await?))?;
    let rules = command(&pod, "nft list ruleset")?;
    equal("the old chain is there", rules.contains("chain old"), false)
}

fn failure_leaves_nothing() -> Result<(), Failed> {
    let pod = Namespace::create_named("failure")?;
    let before = Listing::of(&pod)?;
    // While the loopback interface is down, the kernel accepts the ip rule but rejects the route.
    let failed = inside(&pod, async || Ok(prepare("").await?.install().await))?;
    let hint = failed.err().and_then(|error| error.hint()).unwrap_or_default();
    equal("the hint of the error", &*hint, "enable it with `ip link set lo up`")?;
    equal("the listing after the failure", Listing::of(&pod)?, before)
}

fn rejected_rules_leave_nothing() -> Result<(), Failed> {
    let pod = isolated_namespace("refusal")?;
    let before = Listing::of(&pod)?;
    inside(&pod, async || {
        // Only its owner can change a table with an owner. The table is removed with the owner.
        let owner = Connection::<Nftables>::new()?;
        owner.add_table_with_flags(TABLE, Family::Inet, NFT_TABLE_F_OWNER).await?;
        let refused = prepare("").await?.install().await.is_err();
        equal("the ruleset was refused", refused, true)
    })?;
    equal("the listing after the failure", Listing::of(&pod)?, before)
}

fn routes_of_other_mode_are_removed() -> Result<(), Failed> {
    let pod = isolated_namespace("other-mode")?;
    inside(&pod, async || {
        prepare("profile=sidecar inbound.mode=tproxy").await?.install().await?;
        Ok(())
    })?;
    // An ip rule of another program is not a difference.
    command(&pod, "ip rule add fwmark 0x539/0xff pref 32765 lookup 133")?;
    let (before, after) = inside(&pod, async || {
        let ambient = prepare("").await?;
        let difference = ambient.verify().await?.ok_or("there is no difference")?;
        ambient.install().await?;
        Ok((difference.to_string(), ambient.verify().await?))
    })?;
    for line in [
        "+ ip -4 rule add fwmark 0x539/0xfff pref 32765 lookup 133",
        "+ ip -6 route add local default dev lo table 133",
    ] {
        equal(line, before.contains(line), true)?;
    }
    equal("a difference after installation", after, None)?;
    equal("foreign ip rules", command(&pod, "ip rule")?.matches("lookup 133").count(), 1)
}

fn dormant_table_is_replaced() -> Result<(), Failed> {
    let pod = isolated_namespace("dormant")?;
    command(&pod, "nft add table inet underpass { flags dormant; }")?;
    inside(&pod, async || Ok(prepare("").await?.install().await?))?;
    let dormant = command(&pod, "nft list ruleset")?.contains("dormant");
    equal("the table is dormant", dormant, false)
}

fn disabled_ipv6(backend: &str) -> Result<(), Failed> {
    let owners = "proxy_uids=0 profile=";
    let tproxy = format!("{owners}sidecar inbound.mode=tproxy");
    let [sidecar, osm] = ["sidecar", "osm"].map(|profile| format!("{owners}{profile}"));
    for (name, profile) in
        [("ambient", "profile=ambient"), ("sidecar", &sidecar), ("tproxy", &tproxy), ("osm", &osm)]
    {
        let pod = isolated_namespace(&format!("disabled-ipv6-{backend}-{name}"))?;
        disabled_ipv6_of(&pod, backend, profile)?;
    }
    Ok(())
}

/// Rules and ip rules exist while IPv6 is disabled. Routes and loopback addresses are added when it
/// is enabled.
fn disabled_ipv6_of(pod: &Namespace, backend: &str, profile: &str) -> Result<(), Failed> {
    inside(pod, async || {
        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")?;
        let mut interception = prepare(&format!("backend={backend} {profile}")).await?;
        interception.install().await?;
        equal("IPv6 is absent", interception.ipv6_absent(), false)?;
        equal("IPv6 is disabled", interception.ipv6_disabled().await?, true)?;
        equal("a difference while it is disabled", interception.verify().await?, None)?;
        let v6 = interception.plan().rules().iter().any(|rule| rule.id.ends_with("-v6"));
        equal("an IPv6 rule", v6, true)?;
        equal("IPv6 has been enabled", interception.follow_ipv6().await?, false)?;

        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "0")?;
        let missing =
            interception.verify().await?.map(|difference| difference.missing_and_unexpected());
        let missing_entries =
            interception.plan().routes().len() + interception.plan().addresses().len();
        equal("missing routes and addresses", missing.unwrap_or_default(), (missing_entries, 0))?;
        equal("IPv6 has been enabled", interception.follow_ipv6().await?, true)?;
        equal("a difference once it is enabled", interception.verify().await?, None)?;
        equal("IPv6 has been enabled again", interception.follow_ipv6().await?, false)?;

        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")?;
        equal("a difference once it is disabled", interception.verify().await?, None)?;
        equal("IPv6 has been enabled", interception.follow_ipv6().await?, false)?;
        interception.install().await?;
        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "0")?;
        equal("IPv6 has been enabled", interception.follow_ipv6().await?, true)?;
        equal("a difference once it is enabled again", interception.verify().await?, None)?;
        Ok(interception.remove().await?)
    })?;
    let rules = command(pod, "ip -6 rule")?;
    equal("an own ip rule", rules.contains("fwmark"), false)
}

fn bypass_captures_only_ipv4() -> Result<(), Failed> {
    let pod = isolated_namespace("bypass")?;
    let rules = inside(&pod, async || {
        let interception = prepare("ipv6=bypass").await?;
        interception.install().await?;
        Ok(counters(&NamespaceAccess::current()?).await?)
    })?;
    equal("an IPv6 rule", rules.iter().any(|rule| rule.id.ends_with("-v6")), false)?;
    equal("ip rules of IPv6", command(&pod, "ip -6 rule")?.contains("0x111/0xfff"), true)
}

fn counters_name_rules_in_order() -> Result<(), Failed> {
    let pod = isolated_namespace("counters")?;
    inside(&pod, async || {
        let interception = prepare("").await?;
        equal("counters before", interception.counters().await?.len(), 0)?;
        interception.install().await?;
        let installed = interception.counters().await?;
        let ids: Vec<_> = installed.iter().map(|counter| counter.id.as_str()).collect();
        let planned: Vec<_> =
            interception.plan().rules().iter().map(|rule| rule.id.as_str()).collect();
        equal("the ids", ids, planned)
    })
}

fn difference_is_readable() -> Result<(), Failed> {
    let pod = isolated_namespace("words")?;
    inside(&pod, async || Ok(prepare("ipv6=bypass").await?.install().await?))?;
    // nlink cannot print this expression or the planned `ct original zone set` in nft syntax.
    command(
        &pod,
        "nft add rule inet underpass raw_istio_output ct reply zone set 7 comment foreign",
    )?;
    let text = inside(&pod, async || {
        let difference = prepare("").await?.verify().await?;
        Ok(difference.ok_or("there is no difference")?.to_string())
    })?;
    for wanted in ["ct original zone set 15", "a rule of the expressions", "comment \"foreign\""] {
        equal(wanted, text.contains(wanted), true)?;
    }
    for debug in ["Register", "Immediate", "Some(", "{ key"] {
        equal(debug, text.contains(debug), false)?;
    }
    Ok(())
}

fn foreign_rules() -> Result<(), Failed> {
    let pod = isolated_namespace("foreign")?;
    for rule in [
        "add table inet other",
        "add chain inet other early { type filter hook output priority -400; }",
        "add chain inet other called",
        "add rule inet other early counter",
        "add rule inet other early jump called",
        "add rule inet other called tcp dport 80 notrack",
        "add chain inet other late { type filter hook output priority 0; }",
        "add rule inet other late meta mark set 1",
        "add chain inet other nat { type nat hook prerouting priority -110; }",
        "add rule inet other nat tcp dport 80 redirect to :81",
    ] {
        command(&pod, &format!("nft {rule}"))?;
    }
    command(&pod, "ip rule add fwmark 0x111 pref 100 lookup 7")?;
    let found = inside(&pod, async || {
        let interception = prepare("").await?;
        interception.install().await?;
        // The blackhole belongs to underpass and is not a foreign rule.
        interception.block().await?;
        let found = interception.foreign_rules().await?;
        interception.unblock().await?;
        Ok(found.iter().map(ToString::to_string).collect::<Vec<_>>())
    })?;
    let expected = [
        "policy routing: ip -4 rule fwmark 0x111/0xffffffff pref 100 lookup 7 (selects a route before underpass' ip rule)",
        "table inet other, chain called (hook output, priority -400): tcp dport 80 notrack (changes connection \
         tracking)",
        "table inet other, chain nat (hook prerouting, priority -110): tcp dport 80 redirect to :81 (changes the \
         destination)",
    ];
    equal("foreign rules", found, expected.map(str::to_owned).to_vec())
}

/// The result of `prepare` in the test's initial namespace, and whether that is the host's.
pub(crate) struct InitialNamespace {
    refused: bool,
    permitted: bool,
    initial: bool,
}

pub(crate) fn prepare_here() -> io::Result<InitialNamespace> {
    const INITIAL: u64 = 0xEFFF_FFF9;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let access = NamespaceAccess::current()?;
        Ok::<_, io::Error>(Interception::prepare(&access, &settings(""), PORTS).await)
    })?;
    // Only a process with one thread can enter a sandbox.
    while fs::read_dir("/proc/self/task")?.count() > 1 {
        thread::yield_now();
    }
    Ok(InitialNamespace {
        refused: matches!(result, Err(InterceptionError::HostNamespace { .. })),
        permitted: !matches!(result, Err(InterceptionError::NotPermitted { .. })),
        initial: fs::metadata("/proc/self/ns/net")?.ino() == INITIAL,
    })
}

pub(crate) fn host_is_refused(outside: &io::Result<InitialNamespace>) -> Result<(), Failed> {
    let outside = outside.as_ref().map_err(|error| error.to_string())?;
    // Without NET_ADMIN, the missing capability is the first error.
    if outside.permitted && outside.initial {
        equal("the host is refused", outside.refused, true)?;
    }
    let pod = isolated_namespace("not-the-host")?;
    inside(&pod, async || prepare("").await.map(|_| ()))
}

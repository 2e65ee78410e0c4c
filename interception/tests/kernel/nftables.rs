//! Kernel tests of the nftables backend: it installs the same rules as nft, and detects changes.

use std::fs;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::Duration;

use libtest_mimic::Failed;
use nlink::ErrorDetail;
use nlink::netlink::nftables::{
    Chain as KernelChain, Expr, Family, NFT_TABLE_F_OWNER, RawExpr, Rule as KernelRule,
};
use nlink::netlink::{Connection, Nftables};
use tokio::time::timeout;
use underpass_config::PortRange;
use underpass_interception::testing::{self, Sections};
use underpass_interception::{
    Action, Chain, ChainId, Direction, Entered, Families, Hook, InterceptionError, IpNet, Mark,
    Match, Namespace, Origin, Protocol, Rule, RulePlan, TABLE, Table,
};

use crate::Case;
use crate::plans;
use crate::pod::{DEADLINE, PORTS, command, equal, inside, isolated_namespace, prepare};

pub(crate) const CASES: &[Case] = &[
    (
        "nftables: nft installs the same rules from the text of every match and action",
        nft_installs_printed_rules,
    ),
    ("nftables: nft installs the same rules from the text of every plan", nft_installs_every_plan),
    (
        "nftables: installed rules equal the expected ones, by netlink and by nft",
        installed_rules_equal_expected_rules,
    ),
    ("nftables: any change to the own table is a difference", tampering_is_detected),
    ("nftables: changes to other tables are no difference", ignores_other_tables),
    ("nftables: ten thousand networks form one set", many_networks_form_one_set),
    ("nftables: changes are reported even if notifications are lost", changes_are_reported),
    (
        "nftables: an owned table is distinguished from a missing capability",
        owned_table_is_reported,
    ),
    ("nftables: the kernel names an unknown expression", kernel_names_unknown_expression),
    ("nftables: rejected rules leave no exemption from conntrack", rejected_rules_leave_no_table),
];

const NAT: ChainId = ChainId { table: Table::Nat, name: "OUTPUT" };
const NAT_REGULAR: ChainId = ChainId { table: Table::Nat, name: "ISTIO_OUTPUT" };
const MANGLE: ChainId = ChainId { table: Table::Mangle, name: "OUTPUT" };
const MANGLE_IN: ChainId = ChainId { table: Table::Mangle, name: "PREROUTING" };
const RAW: ChainId = ChainId { table: Table::Raw, name: "OUTPUT" };
const FILTER: ChainId = ChainId { table: Table::Filter, name: "OUTPUT" };
const FILTER_IN: ChainId = ChainId { table: Table::Filter, name: "INPUT" };

const WHOLE: Mark = Mark { value: 0x539, mask: u32::MAX };
const MASKED: Mark = Mark { value: 0x111, mask: 0xfff };
const TCP: Match = Match::Protocol(Protocol::Tcp);

/// Networks with full and partial octets, the network of all addresses, and adjacent networks, for
/// sets with and without ranges.
const V4_CIDRS: &[&[&str]] = &[
    &["10.0.0.1/32"],
    &["10.0.0.0/8"],
    &["172.16.0.0/12"],
    &["0.0.0.0/0"],
    &["10.0.0.1/32", "10.0.0.9/32"],
    &["10.0.0.0/8", "192.168.1.0/24", "192.168.2.0/23", "255.255.255.0/24"],
];
/// The same variety of IPv6 networks.
const V6_CIDRS: &[&[&str]] = &[
    &["fd00::1/128"],
    &["fd00::/16"],
    &["fc00::/7"],
    &["::/0"],
    &["fd00::1/128", "fd00::9/128"],
    &["::1/128", "fd00::/8", "2001:db8::/32"],
];

fn chains() -> Vec<Chain> {
    let base = [
        (NAT, Hook::Output),
        (MANGLE, Hook::Output),
        (MANGLE_IN, Hook::Prerouting),
        (RAW, Hook::Output),
        (FILTER, Hook::Output),
        (FILTER_IN, Hook::Input),
    ];
    let base = base.map(|(id, hook)| Chain { id, hook: Some(hook) });
    base.into_iter().chain([Chain { id: NAT_REGULAR, hook: None }]).collect()
}

/// All matches and actions in all forms: one or several values, with and without mask, for one or
/// both families. The first rule matches TCP.
fn every_rule() -> Result<RulePlan, Failed> {
    let mut rules: Vec<Rule> = Vec::new();
    let mut add = |chain, families, matches: Vec<Match>, action| {
        let id = format!("rule-{}", rules.len());
        rules.push(Rule { id, chain, families, matches, action, ..rule() });
    };
    for (families, condition) in every_match()? {
        add(NAT_REGULAR, families, vec![condition], Action::Return);
    }
    let together = vec![
        Match::Source(cidrs(&["10.0.0.0/8", "192.168.0.1/32"])?),
        Match::NotDestination("127.0.0.1/32".parse()?),
        TCP,
        Match::DestinationPort(Protocol::Tcp, ports(&["80", "8000-8100"])?),
        Match::NotDestinationPort(Protocol::Tcp, ports(&["81", "8050"])?),
    ];
    add(NAT_REGULAR, Families::V4, together, Action::Accept);
    add(NAT, Families::V6, vec![TCP], Action::Jump(NAT_REGULAR));
    for (chain, action) in [
        (NAT, Action::Redirect(15001)),
        (FILTER, Action::Drop),
        (FILTER, Action::Reject),
        (RAW, Action::Zone(15, Some(Direction::Original))),
        (RAW, Action::Zone(2, Some(Direction::Reply))),
        (RAW, Action::Zone(1, None)),
        (MANGLE, Action::MarkPacket(WHOLE)),
        (MANGLE, Action::MarkPacket(MASKED)),
        (MANGLE, Action::MarkConnection(WHOLE)),
        (MANGLE, Action::MarkConnection(MASKED)),
        (MANGLE, Action::SaveMark),
        (MANGLE, Action::RestoreMark),
    ] {
        add(chain, Families::Both, vec![TCP], action);
    }
    for families in [Families::Both, Families::V4, Families::V6] {
        add(FILTER_IN, families, vec![], Action::Reject);
        for mark in [WHOLE, MASKED] {
            add(MANGLE_IN, families, vec![TCP], Action::Tproxy(15006, mark));
        }
    }
    let exempt = vec![Match::NotDestination("::1/128".parse()?), TCP];
    add(MANGLE_IN, Families::V6, exempt, Action::Tproxy(15006, WHOLE));
    Ok(testing::plan(chains(), rules))
}

fn every_match() -> Result<Vec<(Families, Match)>, Failed> {
    let mut matches = vec![
        TCP,
        Match::Protocol(Protocol::Udp),
        Match::TcpModule,
        Match::NotOpening,
        Match::Invalid,
        Match::Established,
        Match::Direction(Direction::Original),
        Match::Direction(Direction::Reply),
        Match::SourcePort(Protocol::Udp, 53),
        Match::NotOut("lo".to_owned()),
        Match::PacketMark(WHOLE),
        Match::PacketMark(MASKED),
        Match::NotPacketMark(WHOLE),
        Match::NotPacketMark(MASKED),
        Match::ConnectionMark(WHOLE),
        Match::ConnectionMark(MASKED),
    ];
    for list in [&["443"][..], &["53", "443"], &["8000-8100"], &["80", "8000-8100", "65535"]] {
        matches.push(Match::DestinationPort(Protocol::Tcp, ports(list)?));
        matches.push(Match::NotDestinationPort(Protocol::Udp, ports(list)?));
    }
    for list in [&["eth0"][..], &["eth0", "eth1"]] {
        let list: Vec<_> = list.iter().map(ToString::to_string).collect();
        matches.push(Match::In(list.clone()));
        matches.push(Match::Out(list));
    }
    for list in [vec![1337], vec![0, 1000, 1337]] {
        matches.push(Match::Uid(list.clone()));
        matches.push(Match::NotUid(list.clone()));
        matches.push(Match::Gid(list.clone()));
        matches.push(Match::NotGid(list));
    }
    let mut all: Vec<_> = matches.into_iter().map(|each| (Families::Both, each)).collect();
    all.push((Families::V4, Match::Established));
    for (families, lists) in [(Families::V4, V4_CIDRS), (Families::V6, V6_CIDRS)] {
        for list in lists {
            let list = cidrs(list)?;
            let first = list.first().copied().ok_or("a network")?;
            all.push((families, Match::NotDestination(first)));
            all.push((families, Match::Source(list.clone())));
            all.push((families, Match::Destination(list)));
        }
    }
    Ok(all)
}

/// A rule with defaults.
fn rule() -> Rule {
    Rule {
        id: String::new(),
        reason: "a test",
        origin: Origin::Underpass,
        chain: NAT_REGULAR,
        families: Families::Both,
        matches: Vec::new(),
        action: Action::Return,
        nftables_only: false,
    }
}

fn cidrs(texts: &[&str]) -> Result<Vec<IpNet>, Failed> {
    texts.iter().map(|text| Ok(text.parse()?)).collect()
}

fn ports(texts: &[&str]) -> Result<Vec<PortRange>, Failed> {
    texts.iter().map(|text| Ok(text.parse()?)).collect()
}

fn install(namespace: &Namespace, plan: &RulePlan) -> Result<(), Failed> {
    inside(namespace, async || Ok(testing::apply(&Entered::current()?, plan).await?))
}

/// Loads the printed plan with nft, as a user would.
fn load(namespace: &Namespace, name: &str, text: &str) -> Result<(), Failed> {
    let path = format!("/run/{name}.nft");
    fs::write(&path, text)?;
    command(namespace, &format!("nft -f {path}")).map(|_| ())
}

/// Lists the installed and the expected sections.
fn listings(namespace: &Namespace, plan: &RulePlan) -> Result<[Option<Sections>; 2], Failed> {
    inside(namespace, async || Ok(testing::listings(&Entered::current()?, plan).await?))
}

/// Fails with the first line that differs from the plan.
fn assert_same(namespace: &Namespace, plan: &RulePlan) -> Result<(), Failed> {
    let lines = |sections: Option<Sections>| -> Vec<String> {
        let sections = sections.unwrap_or_default().into_iter();
        sections.flat_map(|(head, lines)| [vec![head], lines].concat()).collect()
    };
    let [installed, expected] = listings(namespace, plan)?.map(lines);
    for (installed, expected) in installed.iter().zip(&expected) {
        equal("a line of the listing", installed, expected)?;
    }
    equal("the number of lines", installed.len(), expected.len())
}

fn nft_installs_printed_rules() -> Result<(), Failed> {
    let pod = isolated_namespace("nft-printed")?;
    let plan = every_rule()?;
    install(&pod, &plan)?;
    let installed = command(&pod, "nft --stateless list ruleset")?;
    load(&pod, "nft-printed", &format!("{plan:#}"))?;
    let printed = command(&pod, "nft --stateless list ruleset")?;
    for (printed, installed) in printed.lines().zip(installed.lines()) {
        equal("a line of nft's listing", printed, installed)?;
    }
    equal("nft's listing", printed, installed)
}

fn nft_installs_every_plan() -> Result<(), Failed> {
    for (number, settings) in plans::all()?.iter().enumerate() {
        let name = format!("nft-plan-{number}");
        let (pod, plan) = (isolated_namespace(&name)?, RulePlan::new(settings, PORTS, true));
        install(&pod, &plan)?;
        let installed = command(&pod, "nft --stateless list ruleset")?;
        load(&pod, &name, &plan.to_string())?;
        equal(
            "the loaded rules",
            command(&pod, "nft --stateless list ruleset")?,
            installed.clone(),
        )?;
        // Users save rulesets like this: nft loads its own listing.
        load(&pod, &name, &format!("flush ruleset\n{installed}"))?;
        equal("the restored rules", command(&pod, "nft --stateless list ruleset")?, installed)?;
    }
    Ok(())
}

fn installed_rules_equal_expected_rules() -> Result<(), Failed> {
    let pod = isolated_namespace("nft-expected")?;
    let plan = every_rule()?;
    let [installed, _] = listings(&pod, &plan)?;
    equal("a listing without a table", installed, None)?;
    install(&pod, &plan)?;
    assert_same(&pod, &plan)?;
    load(&pod, "nft-expected", &plan.to_string())?;
    assert_same(&pod, &plan)?;
    // Restoring a backup with nft is not a difference.
    let backup = command(&pod, "nft list ruleset")?;
    load(&pod, "nft-backup", &format!("flush ruleset\n{backup}"))?;
    assert_same(&pod, &plan)?;
    install(&pod, &plan)?;
    assert_same(&pod, &plan)
}

/// Changes to the table. HANDLE is the handle of the first rule, `meta l4proto tcp counter return
/// comment "rule-0"`. SET is a set that contains 10.0.0.0/8.
const TAMPERING: &[&str] = &[
    "delete rule inet underpass nat_istio_output handle HANDLE",
    "add rule inet underpass nat_istio_output tcp dport 1 accept",
    "insert rule inet underpass nat_istio_output tcp dport 1 accept",
    "replace rule inet underpass nat_istio_output handle HANDLE \
     meta l4proto udp counter return comment \"rule-0\"",
    "replace rule inet underpass nat_istio_output handle HANDLE \
     meta l4proto tcp counter accept comment \"rule-0\"",
    "replace rule inet underpass nat_istio_output handle HANDLE \
     meta l4proto tcp return comment \"rule-0\"",
    "replace rule inet underpass nat_istio_output handle HANDLE meta l4proto tcp counter return",
    "delete rule inet underpass nat_istio_output handle HANDLE\n\
     add rule inet underpass nat_istio_output meta l4proto tcp counter return comment \"rule-0\"",
    "flush chain inet underpass nat_istio_output",
    "delete element inet underpass SET { 10.0.0.0/8 }",
    "add element inet underpass SET { 203.0.113.7 }",
    "flush set inet underpass SET",
    "add chain inet underpass filter_output { policy drop; }",
    "add table inet underpass { flags dormant; }",
    "add chain inet underpass extra",
    "add chain inet underpass extra { type filter hook input priority 7; }",
    "add set inet underpass extra { type ipv4_addr; }",
    "add map inet underpass extra { type ipv4_addr : verdict; }",
    "add counter inet underpass extra",
    "delete table inet underpass",
    "flush ruleset",
];

fn tampering_is_detected() -> Result<(), Failed> {
    let pod = isolated_namespace("nft-tampering")?;
    let plan = every_rule()?;
    for tampering in TAMPERING {
        install(&pod, &plan)?;
        assert_same(&pod, &plan)?;
        let chain = command(&pod, "nft -a list chain inet underpass nat_istio_output")?;
        let first = chain.lines().find(|line| line.contains("\"rule-0\"")).ok_or("a rule")?;
        let (_, handle) = first.rsplit_once("handle ").ok_or("a handle")?;
        let sets = command(&pod, "nft list sets")?;
        let set = sets.split("\tset ").find(|set| set.contains("10.0.0.0/8")).ok_or("a set")?;
        let (name, _) = set.split_once(' ').ok_or("its name")?;
        let text = tampering.replace("HANDLE", handle).replace("SET", name);
        load(&pod, "nft-tampering", &text)?;
        let [installed, expected] = listings(&pod, &plan)?;
        equal(tampering, installed == expected, false)?;
    }
    Ok(())
}

fn ignores_other_tables() -> Result<(), Failed> {
    let pod = isolated_namespace("nft-others")?;
    let plan = every_rule()?;
    install(&pod, &plan)?;
    for text in [
        "add table ip underpass { flags dormant; }",
        "add chain ip underpass nat_istio_output",
        "add rule ip underpass nat_istio_output accept",
        "add counter ip underpass extra",
        "add table inet other",
        "add chain inet other extra",
        "add set inet other extra { type ipv4_addr; }",
    ] {
        load(&pod, "nft-others", text)?;
        assert_same(&pod, &plan)?;
    }
    Ok(())
}

fn many_networks_form_one_set() -> Result<(), Failed> {
    let pod = isolated_namespace("nft-many")?;
    let v4 =
        |n: u32, length| IpNet::new(IpAddr::from((0x0a00_0000 + n * 512).to_be_bytes()), length);
    let v6 = |n: u16| IpNet::new(IpAddr::from([0xfd00, n, 0, 0, 0, 0, 0, 0]), 32);
    let of_length = |length| (0..10_000).map(|n| v4(n, length)).collect::<Result<Vec<_>, _>>();
    let mixed = [of_length(24)?, vec!["192.0.2.0/25".parse()?]].concat();
    let lists = [
        (Families::V4, of_length(24)?),
        (Families::V4, of_length(32)?),
        (Families::V4, mixed),
        (Families::V6, (0..10_000).map(v6).collect::<Result<Vec<_>, _>>()?),
    ];
    let rules = lists.into_iter().enumerate().map(|(n, (families, networks))| {
        let matches = vec![Match::Destination(networks)];
        Rule { id: format!("many-{n}"), families, matches, ..rule() }
    });
    let plan = testing::plan(chains(), rules.collect());
    install(&pod, &plan)?;
    assert_same(&pod, &plan)?;
    let installed = command(&pod, "nft --stateless list ruleset")?;
    load(&pod, "nft-many", &plan.to_string())?;
    assert_same(&pod, &plan)?;
    let printed = command(&pod, "nft --stateless list ruleset")?;
    equal("nft lists both alike", printed == installed, true)?;
    install(&pod, &plan)?;
    assert_same(&pod, &plan)
}

fn changes_are_reported() -> Result<(), Failed> {
    let pod = isolated_namespace("nft-changes")?;
    // More notifications than a socket buffers, in transactions of the maximum size.
    let burst = "add table inet other\ndelete table inet other\n".repeat(500);
    inside(&pod, async || {
        let here = Namespace::current()?;
        let mut changes = prepare("").await?.changes().await?;
        // Cancelling a wait loses no change.
        let early = timeout(Duration::ZERO, changes.next()).await;
        equal("a change is reported without a change", early.is_err(), true)?;
        for (text, times) in
            [("add table inet other", 1), (burst.as_str(), 20), ("add table inet another", 1)]
        {
            for _ in 0..times {
                load(&here, "nft-changes", text)?;
            }
            timeout(DEADLINE, changes.next()).await??;
        }
        Ok(())
    })
}

fn owned_table_is_reported() -> Result<(), Failed> {
    let pod = isolated_namespace("nft-owned")?;
    let plan = every_rule()?;
    let refused = inside(&pod, async || {
        let owner = Connection::<Nftables>::new()?;
        owner.add_table_with_flags(TABLE, Family::Inet, NFT_TABLE_F_OWNER).await?;
        Ok(testing::apply(&Entered::current()?, &plan).await)
    })?;
    let owned = matches!(refused, Err(InterceptionError::Owned { .. }));
    equal(&format!("the error names the owner: {refused:?}"), owned, true)
}

/// In a namespace with connections, the exemption of `untracked.rs` precedes the rules.
fn rejected_rules_leave_no_table() -> Result<(), Failed> {
    let pod = isolated_namespace("nft-rejected")?;
    let zone = Rule {
        id: "zone".to_owned(),
        chain: RAW,
        matches: vec![TCP],
        action: Action::Zone(15, Some(Direction::Original)),
        ..rule()
    };
    let missing = ChainId { table: Table::Nat, name: "MISSING" };
    let rejected = Rule { id: "rejected".to_owned(), action: Action::Jump(missing), ..rule() };
    inside(&pod, async || {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let _client = TcpStream::connect(listener.local_addr()?)?;
        let (entered, kernel) = (Entered::current()?, Connection::<Nftables>::new()?);
        let generation = kernel.generation().await?;
        let applied =
            testing::apply(&entered, &testing::plan(chains(), vec![zone.clone(), rejected])).await;
        equal(&format!("the kernel rejects the rules: {applied:?}"), applied.is_err(), true)?;
        equal("the changes are reverted", kernel.generation().await?, generation + 2)?;
        equal("a table", kernel.list_tables_in(Family::Inet).await?.len(), 0)?;
        Ok(testing::apply(&entered, &testing::plan(chains(), vec![zone])).await?)
    })
}

/// The missing module is derived from the name of the expression.
fn kernel_names_unknown_expression() -> Result<(), Failed> {
    let refused = inside(&isolated_namespace("nft-unknown")?, async || {
        let kernel = Connection::<Nftables>::new()?;
        let unknown = KernelRule::new("t", "c")
            .family(Family::Inet)
            .then(Expr::Raw(RawExpr::without_data("nosuch")));
        let transaction = kernel.transaction().add_table("t", Family::Inet);
        let transaction = transaction.add_chain(KernelChain::new("t", "c")?.family(Family::Inet));
        Ok(transaction.add_rule(unknown).commit(&kernel).await)
    })?;
    let Err(error) = refused else { return Err("the kernel accepted it".into()) };
    let ErrorDetail::NftBatch { failures, .. } = error.detail() else {
        return Err(format!("another error: {error}").into());
    };
    let reported: Vec<_> =
        failures.iter().filter_map(|failure| failure.attribute.as_deref()).collect();
    equal("the reported expression", reported, vec!["expression #1 (nosuch)"])
}

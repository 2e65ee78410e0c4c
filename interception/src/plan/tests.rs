//! Compares the plans of many settings with golden files, and checks invariants of every plan.
//!
//! A golden file contains a plan in three formats. `BLESS=1 cargo test -p underpass-interception`
//! rewrites the files; review the difference in git.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use underpass_config::{Settings, Sources};

use super::iptables::Family;
use super::*;
use crate::backend::verify::{Listing, Section};

/// The name of a golden file and its settings.
const SCENARIOS: &[(&str, &[&str])] = &[
    ("ambient", &["profile=ambient"]),
    ("ambient-exact", &["profile=ambient", "exact=true"]),
    ("ambient-exact-dns", &["profile=ambient", "exact=true", "dns=capture"]),
    ("ambient-dns-servers", &["profile=ambient", "dns=capture", "dns_servers=10.9.0.10,fd00::10"]),
    ("ambient-ingress-dns", &["profile=ambient", "ingress=true", "dns=capture"]),
    ("ambient-virtual-interfaces", &["profile=ambient", "virtual_interfaces=tap0,tap1"]),
    ("ambient-exact-virtual", &["profile=ambient", "exact=true", "virtual_interfaces=tap0,tap1"]),
    (
        "ambient-exclusions",
        &[
            "profile=ambient",
            "outbound.exclude_cidrs=192.0.2.0/24,198.51.100.7,2001:db8::/32",
            "outbound.exclude_ports=25,9000-9010",
            "outbound.exclude_interfaces=eth1",
            "outbound.exclude_uids=100,101",
            "outbound.exclude_gids=200",
            "inbound.exclude_ports=22",
            "inbound.exclude_interfaces=eth1,eth2",
            "drop_invalid=true",
        ],
    ),
    (
        "ambient-inclusions",
        &[
            "profile=ambient",
            "outbound.include_cidrs=10.0.0.0/8,fd00::/8",
            "outbound.include_ports=80,443",
            "inbound.include_ports=8080",
        ],
    ),
    ("ambient-kubelet-probes", &["profile=ambient", "kubelet_probes=on"]),
    ("ambient-kubelet-probe-ports", &["profile=ambient", "kubelet_probes=8080,9000-9010"]),
    ("ambient-ipv6-bypass", &["profile=ambient", "ipv6=bypass"]),
    ("ambient-ipv6-reject", &["profile=ambient", "ipv6=reject", "dns=capture"]),
    ("sidecar", &["profile=sidecar"]),
    ("sidecar-exact", &["profile=sidecar", "exact=true"]),
    ("sidecar-owners", &["profile=sidecar", "proxy_uids=3,4", "proxy_gids=1,2"]),
    (
        "sidecar-exact-owners",
        &["profile=sidecar", "exact=true", "proxy_uids=3,4", "proxy_gids=1,2"],
    ),
    (
        "sidecar-lists",
        &[
            "profile=sidecar",
            "outbound.exclude_cidrs=192.0.2.0/24,2001:db8::/32",
            "outbound.include_cidrs=10.0.0.0/8,172.16.0.0/12,fd00::/8",
            "outbound.exclude_ports=25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40,9000-9010",
            "outbound.include_ports=80,443",
            "outbound.exclude_interfaces=eth1",
            "outbound.exclude_uids=100",
            "outbound.include_gids=202,203",
            "inbound.exclude_ports=22,6000-6010",
            "inbound.exclude_interfaces=eth1",
            "virtual_interfaces=tap0,tap1",
            "drop_invalid=true",
        ],
    ),
    (
        "sidecar-exact-lists",
        &[
            "profile=sidecar",
            "exact=true",
            "outbound.exclude_cidrs=192.0.2.0/24,2001:db8::/32",
            "outbound.include_cidrs=10.0.0.0/8,172.16.0.0/12,fd00::/8",
            "outbound.exclude_ports=25,26",
            "outbound.include_ports=80,443",
            "outbound.exclude_interfaces=eth1",
            "outbound.exclude_gids=202,203",
            "inbound.exclude_ports=22,23",
            "inbound.exclude_interfaces=eth1",
            "virtual_interfaces=tap0,tap1",
            "drop_invalid=true",
        ],
    ),
    ("sidecar-include-loopback", &["profile=sidecar", "outbound.include_cidrs=127.1.2.3/32"]),
    ("sidecar-loopback-cidr", &["profile=sidecar", "loopback_cidr=127.0.0.0/8"]),
    ("sidecar-inbound-ports", &["profile=sidecar", "inbound.include_ports=4000,5000"]),
    (
        "sidecar-nothing",
        &["profile=sidecar", "inbound.include_ports=none", "outbound.include_cidrs=none"],
    ),
    ("sidecar-dns", &["profile=sidecar", "dns=capture"]),
    (
        "sidecar-exact-dns-servers",
        &["profile=sidecar", "exact=true", "dns=capture", "dns_servers=127.0.0.53,10.9.0.10"],
    ),
    ("sidecar-tproxy", &["profile=sidecar", "inbound.mode=tproxy", "inbound.exclude_ports=22"]),
    ("sidecar-exact-tproxy", &["profile=sidecar", "exact=true", "inbound.mode=tproxy"]),
    (
        "sidecar-tproxy-virtual",
        &["profile=sidecar", "inbound.mode=tproxy", "virtual_interfaces=tap0,tap1"],
    ),
    (
        "sidecar-tproxy-ports",
        &[
            "profile=sidecar",
            "inbound.mode=tproxy",
            "inbound.include_ports=80,8080",
            "outbound.exclude_interfaces=eth1",
            "inbound.exclude_interfaces=eth1",
        ],
    ),
    ("sidecar-ipv6-reject", &["profile=sidecar", "ipv6=reject", "inbound.mode=tproxy"]),
    ("osm", &["profile=osm"]),
    ("osm-exact", &["profile=osm", "exact=true", "outbound.exclude_cidrs=54.91.118.50/32"]),
    (
        "osm-lists",
        &[
            "profile=osm",
            "outbound.exclude_cidrs=192.0.2.0/24,198.51.100.0/24,2001:db8::/32",
            "outbound.include_cidrs=10.0.0.0/8",
            "outbound.exclude_ports=10,20",
            "outbound.exclude_interfaces=eth1",
            "inbound.exclude_ports=30,40",
            "inbound.exclude_interfaces=eth1",
            "drop_invalid=true",
        ],
    ),
    ("osm-ipv6-bypass", &["profile=osm", "ipv6=bypass"]),
    ("osm-ipv6-reject", &["profile=osm", "ipv6=reject"]),
];

fn settings(assignments: &[&str]) -> Settings {
    let flags = assignments.iter().map(|text| format!("interception.{text}")).collect();
    Sources { file: None, environment: Vec::new(), flags }.load().expect("the settings are right")
}

fn plan(assignments: &[&str]) -> RulePlan {
    let settings = settings(assignments);
    RulePlan::new(&settings.interception, Ports::of(&settings), true)
}

fn every_plan() -> impl Iterator<Item = (&'static str, RulePlan)> {
    SCENARIOS.iter().map(|(name, assignments)| (*name, plan(assignments)))
}

/// Splits a text into lines for a comparison.
fn listing(head: &str, text: &str) -> Listing {
    let lines = text.lines().map(str::to_owned).collect();
    Listing { sections: vec![Section { head: head.to_owned(), lines }] }
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("testdata/{name}.txt"))
}

#[test]
fn plans_equal_golden_files_in_all_formats() {
    #[expect(clippy::disallowed_methods, reason = "a switch of this test alone, not a setting")]
    let bless = std::env::var_os("BLESS").is_some();
    for (name, plan) in every_plan() {
        let (v4, v6) = (plan.iptables(Family::V4), plan.iptables(Family::V6));
        let text = format!("==> nft\n{plan}==> iptables-restore\n{v4}==> ip6tables-restore\n{v6}");
        if bless {
            fs::write(file(name), &text).expect("the golden file is written");
        }
        let golden = fs::read_to_string(file(name)).unwrap_or_default();
        let difference = listing(name, &golden).difference(&listing(name, &text));
        assert!(
            text == golden,
            "interception/testdata/{name}.txt differs; BLESS=1 rewrites it\n{}",
            difference.map(|difference| difference.to_string()).unwrap_or_default()
        );
    }
}

#[test]
fn every_golden_file_has_plan() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let files: BTreeSet<_> = fs::read_dir(folder)
        .expect("the folder")
        .flatten()
        .map(|file| file.file_name().to_string_lossy().into_owned())
        .collect();
    let named: BTreeSet<_> = SCENARIOS.iter().map(|(name, _)| format!("{name}.txt")).collect();
    assert_eq!(files, named);
}

#[test]
fn alternate_format_prints_each_reason_on_one_line() {
    for (name, plan) in every_plan() {
        let text = format!("{plan:#}");
        let reasons = text.lines().filter(|line| line.starts_with("# ")).count();
        assert_eq!(reasons, plan.rules().len(), "{name}");
        assert!(!text.contains("  "), "a reason of {name} has a line break in it:\n{text}");
    }
}

#[test]
fn rule_ids_are_unique() {
    for (name, plan) in every_plan() {
        let ids: BTreeSet<_> = plan.rules().iter().map(|rule| &rule.id).collect();
        assert_eq!(ids.len(), plan.rules().len(), "{name}");
    }
}

#[test]
fn jump_targets_exist_in_the_same_table() {
    for (name, plan) in every_plan() {
        let exists = |id| plan.chains().iter().any(|chain| chain.id == id);
        for rule in plan.rules() {
            assert!(exists(rule.chain), "{name}: {}", rule.id);
            if let Action::Jump(target) = rule.action {
                assert!(exists(target) && target.table == rule.chain.table, "{name}: {}", rule.id);
            }
        }
    }
}

#[test]
fn exact_omits_own_rules_and_default_keeps_mesh_rules() {
    for (name, plan) in every_plan().filter(|(name, _)| name.contains("exact")) {
        let ours = plan.rules().iter().find(|rule| rule.origin == Origin::Underpass);
        assert_eq!(ours, None, "{name}");
    }
    for profile in ["sidecar", "osm"] {
        let exact = plan(&[&format!("profile={profile}"), "exact=true"]);
        let default = plan(&[&format!("profile={profile}")]);
        let theirs: Vec<_> =
            default.rules().iter().filter(|rule| rule.origin == Origin::Mesh).collect();
        assert_eq!(theirs, exact.rules().iter().collect::<Vec<_>>(), "{profile}");
    }
}

#[test]
fn value_lists_are_not_empty_and_match_rule_family() {
    for (name, plan) in every_plan() {
        for rule in plan.rules() {
            for condition in &rule.matches {
                if let Match::Source(networks) | Match::Destination(networks) = condition {
                    assert!(!networks.is_empty(), "{name}: {}", rule.id);
                    let v6 = rule.families == Families::V6;
                    let same = networks.iter().all(|network| network.addr().is_ipv6() == v6);
                    assert!(same && rule.families != Families::Both, "{name}: {}", rule.id);
                }
            }
        }
    }
}

#[test]
fn ten_thousand_excluded_networks_form_one_rule() {
    let networks: Vec<_> =
        (0..10_000).map(|n| format!("10.{}.{}.0/25", n / 250, n % 250)).collect();
    let exclusion = format!("outbound.exclude_cidrs={}", networks.join(","));
    for profile in ["profile=ambient", "profile=sidecar", "profile=osm"] {
        let rules = plan(&[profile, &exclusion]).rules().len();
        assert_eq!(rules, plan(&[profile]).rules().len() + 1, "{profile}");
    }
}

#[test]
fn many_networks_of_one_prefix_length_form_one_rule() {
    let of_length = |length, first: usize, count: usize| {
        (0..count).map(move |n| format!("{first}.{}.{}.0/{length}", n / 200, n % 200))
    };
    let networks: Vec<_> = of_length(24, 10, 300)
        .chain(of_length(26, 11, 400))
        .chain(of_length(25, 12, 3))
        .chain(["13.0.0.0/8".to_owned()])
        .collect();
    let exclusion = format!("outbound.exclude_cidrs={}", networks.join(","));
    for profile in ["profile=ambient", "profile=sidecar", "profile=osm"] {
        let plan = plan(&[profile, &exclusion]);
        let rules = plan.rules().iter().filter(|rule| rule.id.starts_with("exclude-cidrs"));
        let lists = rules.map(|rule| (rule.id.as_str(), excluded(rule)));
        let expected = [("exclude-cidrs", 4), ("exclude-cidrs-2", 300), ("exclude-cidrs-3", 400)];
        assert_eq!(lists.collect::<Vec<_>>(), expected, "{profile}");
    }
}

fn excluded(rule: &Rule) -> usize {
    let mut lists = rule.matches.iter().filter_map(|condition| match condition {
        Match::Destination(networks) => Some(networks.len()),
        _ => None,
    });
    lists.next().unwrap_or_default()
}

#[test]
fn ipv6_setting_captures_rejects_or_bypasses() {
    for profile in ["profile=ambient", "profile=sidecar", "profile=osm"] {
        for (ipv6, caught, refused) in [
            ("ipv6=capture", true, false),
            ("ipv6=reject", false, true),
            ("ipv6=bypass", false, false),
        ] {
            let plan = plan(&[profile, ipv6]);
            let of_v6 = |action: fn(&Action) -> bool| {
                let rules = plan.rules().iter().filter(|rule| rule.families.contains(true));
                rules.into_iter().any(|rule| action(&rule.action))
            };
            assert_eq!(of_v6(|a| matches!(a, Action::Redirect(_))), caught, "{profile} {ipv6}");
            assert_eq!(of_v6(|a| matches!(a, Action::Reject)), refused, "{profile} {ipv6}");
        }
        let absent = settings(&[profile]);
        let plan = RulePlan::new(&absent.interception, Ports::of(&absent), false);
        assert!(plan.rules().iter().all(|rule| rule.families == Families::V4), "{profile}");
    }
}

#[test]
fn drop_invalid_applies_to_every_profile() {
    for profile in ["profile=ambient", "profile=sidecar", "profile=osm"] {
        for exact in ["exact=false", "exact=true"] {
            let drops = |drop_invalid| {
                let plan = plan(&[profile, exact, drop_invalid]);
                plan.rules().iter().any(|rule| rule.id == "drop-invalid")
            };
            assert!(
                drops("drop_invalid=true") && !drops("drop_invalid=false"),
                "{profile} {exact}"
            );
        }
    }
}

#[test]
fn rules_use_configured_ports() {
    let flags = [
        "proxy.outbound_port=25001",
        "proxy.inbound_port=25006",
        "proxy.hbone_port=25008",
        "metrics.address=[::]:25020",
        "readiness.address=[::]:25021",
    ];
    let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
    let settings = Sources { file: None, environment: Vec::new(), flags }.load().expect("settings");
    let plan = RulePlan::new(&settings.interception, Ports::of(&settings), true);
    let text = plan.to_string();
    for port in ["redirect to :25001", "redirect to :25006", "tcp dport 25008", "25020-25021"] {
        assert!(text.contains(port), "{port}");
    }
    assert!(!text.contains(":150") && !text.contains("dport 150"), "{text}");
}

#[test]
fn duplicate_values_count_once() {
    let networks = "outbound.include_cidrs=10.1.0.0/16,10.0.0.0/8,10.0.0.0/8,192.0.2.1,fd00::/8";
    let plan = plan(&["profile=sidecar", networks, "outbound.exclude_uids=100,101,100"]);
    let matches =
        |id: &str| plan.rules().iter().find(|rule| rule.id == id).map(|rule| &rule.matches);
    let expected = ["10.0.0.0/8", "192.0.2.1/32"].map(|cidr| cidr.parse().unwrap());
    assert_eq!(matches("include-cidrs").unwrap(), &[Match::Destination(expected.to_vec())]);
    assert_eq!(matches("exclude-uids").unwrap(), &[Match::Uid(vec![100, 101])]);
}

/// The rules that exempt metrics and readiness at these addresses, as nft text without counter and
/// comment.
fn own_ports(profile: &str, metrics: &str, readiness: &str) -> Vec<String> {
    let flags = [
        format!("interception.{profile}"),
        format!("metrics.address={metrics}"),
        format!("readiness.address={readiness}"),
    ];
    let sources = Sources { file: None, environment: Vec::new(), flags: flags.into() };
    let settings = sources.load().expect("settings");
    let plan = RulePlan::new(&settings.interception, Ports::of(&settings), true);
    let text = plan.iptables(Family::V4) + &plan.iptables(Family::V6);
    let dropped = ["-A ISTIO_PRERT ", "-A ISTIO_INBOUND ", "-A PROXY_INBOUND ", " -j RETURN"];
    let is_own_chain = |line: &&str| line.ends_with(" -j RETURN") && line.contains("dport");
    let of_ours = text
        .lines()
        .filter(is_own_chain)
        .filter(|line| line.contains(" 25") || line.contains(",25"));
    of_ours
        .map(|line| dropped.iter().fold(line.to_owned(), |line, part| line.replace(part, "")))
        .collect()
}

#[test]
fn proxy_services_are_exempt_at_their_addresses() {
    for profile in ["profile=ambient", "profile=sidecar", "profile=osm"] {
        let both = "-p tcp -m multiport --dports 25020,25021";
        assert_eq!(own_ports(profile, "[::]:25020", "[::]:25021"), [both, both], "{profile}");
        let v4_only = own_ports(profile, "0.0.0.0:25020", "127.0.0.1:25021");
        assert_eq!(v4_only, ["-p tcp -m tcp --dport 25020"], "{profile}");
        let outer = own_ports(profile, "10.0.0.1:25020", "[fd00::1]:25021");
        let expected = [
            "-d 10.0.0.1/32 -p tcp -m tcp --dport 25020",
            "-d fd00::1/128 -p tcp -m tcp --dport 25021",
        ];
        assert_eq!(outer, expected, "{profile}");
        assert_eq!(own_ports(profile, "[::1]:25020", "[::]:0"), [""; 0], "{profile}");
    }
}

#[test]
fn own_listeners_in_included_ports_are_not_captured() {
    for profile in
        ["profile=ambient", "profile=sidecar", "profile=sidecar inbound.mode=tproxy", "profile=osm"]
    {
        let assignments: Vec<_> =
            profile.split(' ').chain(["inbound.include_ports=15000-15100"]).collect();
        let plan = plan(&assignments);
        let environment = Environment::example();
        let end = |port: u16| {
            let packet = Packet {
                protocol: Protocol::Tcp,
                source: "10.0.0.9:40000".parse().unwrap(),
                destination: format!("10.0.0.1:{port}").parse().unwrap(),
                entry: Entry::In { interface: "eth0".to_owned() },
                state: ConntrackState::New,
                mark: 0,
                connection_mark: 0,
            };
            plan.walk(&packet, &environment).end
        };
        assert_eq!(end(15020), Verdict::Direct, "{profile}");
        assert_eq!(end(15021), Verdict::Direct, "{profile}");
        assert_ne!(end(15022), Verdict::Direct, "{profile}");
    }
}

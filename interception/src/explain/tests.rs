//! Tests of the flows of each profile, with default and other settings.

use std::net::SocketAddr;

use underpass_config::Sources;

use super::*;
use crate::plan::Protocol;

const PORTS: Ports = Ports {
    outbound: 15001,
    inbound: 15006,
    hbone: 15008,
    dns: 15053,
    services: Ports::DEFAULT_SERVICES,
};

/// Parses settings of the section `interception`: `profile=sidecar ipv6=bypass`.
fn settings(assignments: &str) -> InterceptionSettings {
    let flags = assignments.split_whitespace().map(|text| format!("interception.{text}")).collect();
    let sources = Sources { file: None, environment: Vec::new(), flags };
    sources.load().expect("the settings are right").interception
}

/// Applies `question` to the explanation of these settings in a typical pod.
fn explained<T>(assignments: &str, question: impl FnOnce(&Explanation<'_>) -> T) -> T {
    let (settings, environment) = (settings(assignments), Environment::example());
    question(&Explanation::new(&settings, PORTS, true, &environment, None))
}

/// The ids of the rules that decided a flow's packets, each with the packet's receiver.
fn path(assignments: &str, id: &str) -> Vec<(String, Option<Party>)> {
    explained(assignments, |explanation| {
        let flows = explanation.flows();
        let flow = flows.iter().find(|flow| flow.id == id).expect("the flow");
        let decided = |hop: &Hop<'_>| hop.decided_by().map(|rule| rule.id.clone());
        flow.hops.iter().map(|hop| (decided(hop).unwrap_or_default(), hop.to)).collect()
    })
}

fn assert_path(assignments: &str, id: &str, expected: &[(&str, Party)]) {
    let expected: Vec<_> =
        expected.iter().map(|&(rule, party)| (rule.to_owned(), Some(party))).collect();
    assert_eq!(path(assignments, id), expected, "{assignments}, flow {id}");
}

#[test]
fn sidecar_flows_1_2_and_4_follow_article() {
    for exact in ["profile=sidecar", "profile=sidecar exact=true"] {
        assert_path(exact, "1", &[("capture-inbound", Party::Proxy), ("1-last-hop", Party::App)]);
        assert_path(
            exact,
            "2",
            &[("9-capture-outbound", Party::Proxy), ("4-proxy", Party::Remote)],
        );
        assert_path(
            exact,
            "4",
            &[
                ("9-capture-outbound", Party::Proxy),
                ("2-self-call", Party::Proxy),
                ("1-last-hop", Party::App),
            ],
        );
    }
}

#[test]
fn sidecar_flows_3_5_and_6_deviate_from_article() {
    for exact in ["profile=sidecar", "profile=sidecar exact=true"] {
        assert_path(exact, "3", &[("never-15020", Party::Proxy), ("", Party::Prometheus)]);
        assert_path(exact, "4'", &[("3-app-to-itself", Party::App)]);
        assert_path(exact, "5", &[("4-proxy", Party::Proxy)]);
        assert_path(exact, "6", &[("4-proxy", Party::Istiod)]);
        assert_path(exact, "6'", &[("7-proxy-group", Party::Istiod)]);
    }
}

#[test]
fn sidecar_rules_5_6_and_8_match_no_packet() {
    explained("profile=sidecar", |explanation| {
        let flows = explanation.flows();
        let mut met = flows.iter().flat_map(|flow| &flow.hops).flat_map(|hop| hop.walk.rules());
        let dead = met.find(|rule| ["5-", "6-", "8-"].iter().any(|dead| rule.id.starts_with(dead)));
        assert_eq!(dead, None);
    });
}

#[test]
fn ambient_flows_reach_the_expected_receivers() {
    let ambient = "profile=ambient";
    assert_path(ambient, "A1", &[("capture-outbound", Party::Proxy), ("", Party::Remote)]);
    assert_path(
        ambient,
        "A2",
        &[("capture-inbound", Party::Proxy), ("own-pod", Party::App), ("", Party::Proxy)],
    );
    assert_path(
        ambient,
        "A3",
        &[("hbone-in", Party::Proxy), ("own-pod", Party::App), ("", Party::Proxy)],
    );
    assert_path(ambient, "A4", &[("capture-inbound", Party::Proxy)]);
    for probes in ["kubelet_probes=on", "kubelet_probes=8080"] {
        let ambient = format!("{ambient} {probes}");
        assert_path(&ambient, "A4", &[("kubelet-probe-in", Party::App)]);
    }
    assert_path(ambient, "metrics", &[("own-ports-in", Party::Proxy)]);
    assert_path(ambient, "A5", &[("own-pod", Party::App)]);
    assert_path(ambient, "A5'", &[("", Party::App)]);
    assert_path(ambient, "A5''", &[("own-pod", Party::App)]);
    assert_path(ambient, "A9", &[("", Party::DnsServer)]);
    let dns = "profile=ambient dns=capture";
    assert_path(dns, "A9", &[("capture-dns-udp", Party::Proxy), ("", Party::DnsServer)]);
    assert_path(dns, "A9'", &[("capture-dns-tcp", Party::Proxy), ("", Party::DnsServer)]);
    let ingress = "profile=ambient ingress=true";
    assert_path(ingress, "A2", &[("", Party::App)]);
}

#[test]
fn reply_to_preserved_address_returns_by_mark() {
    explained("profile=ambient", |explanation| {
        let flows = explanation.flows();
        let hops = &flows.iter().find(|flow| flow.id == "A2").expect("A2").hops;
        let met = |hop: &Hop<'_>| hop.walk.rules().map(|rule| rule.id.clone()).collect::<Vec<_>>();
        assert!(met(&hops[1]).contains(&"mark-proxy-connection".to_owned()));
        assert!(met(&hops[2]).contains(&"return-to-proxy".to_owned()));
        assert!(hops[2].walk.local);
    });
}

#[test]
fn osm_flows_reach_the_expected_receivers() {
    let osm = "profile=osm";
    assert_path(osm, "O1", &[("capture-outbound", Party::Proxy), ("proxy", Party::Remote)]);
    assert_path(osm, "O2", &[("capture-inbound", Party::Proxy), ("proxy", Party::App)]);
    assert_path(osm, "O3", &[("never-15010", Party::Proxy)]);
    assert_path(osm, "O4", &[("never-15901", Party::Proxy)]);
    assert_path(osm, "O5", &[("capture-outbound", Party::Proxy), ("proxy", Party::App)]);
    assert_path(osm, "O6", &[("localhost", Party::App)]);
    assert_path(osm, "O7", &[("capture-outbound", Party::Proxy)]);
}

#[test]
fn hbone_is_never_redirected() {
    for (profile, id) in [("ambient", "A3"), ("sidecar", "HBONE"), ("osm", "HBONE")] {
        explained(&format!("profile={profile}"), |explanation| {
            let flows = explanation.flows();
            let flow = flows.iter().find(|flow| flow.id == id).expect("HBONE");
            assert_eq!(
                (flow.hops[0].walk.end, flow.hops[0].to),
                (Verdict::Direct, Some(Party::Proxy))
            );
        });
    }
}

#[test]
fn excluded_traffic_bypasses_the_proxy() {
    for profile in ["ambient", "sidecar", "osm"] {
        for (key, value) in [
            ("outbound.exclude_cidrs", "203.0.113.0/24"),
            ("outbound.include_cidrs", "203.0.113.0/24"),
            ("outbound.exclude_ports", "8080"),
            ("outbound.exclude_interfaces", "eth1"),
            ("outbound.exclude_uids", "1000"),
            ("outbound.exclude_gids", "1000"),
            ("inbound.exclude_ports", "8080"),
            ("inbound.include_ports", "8080"),
            ("inbound.exclude_interfaces", "eth1"),
        ] {
            let (ends, normal) =
                explained(&format!("profile={profile} {key}={value}"), |explanation| {
                    let flows = explanation.flows();
                    let find = |id: &str| flows.iter().find(|flow| flow.id == id).cloned();
                    let flow = find(key).unwrap_or_else(|| panic!("{profile}: {key}"));
                    let normal = ["1", "A2", "O2"].into_iter().find_map(find).expect("a flow");
                    let end = |flow: &Flow<'_>| flow.hops[0].walk.end;
                    (end(&flow), end(&normal))
                });
            assert_eq!(ends, Verdict::Direct, "{profile}: {key}");
            assert_eq!(normal, Verdict::Redirected(15006), "{profile}: {key}");
        }
    }
}

#[test]
fn virtual_machine_traffic_is_outbound() {
    for profile in ["ambient", "sidecar", "sidecar inbound.mode=tproxy"] {
        let path = path(&format!("profile={profile} virtual_interfaces=vm0"), "virtual_interfaces");
        assert_eq!(path[0], ("virtual-outbound".to_owned(), Some(Party::Proxy)), "{profile}");
        assert_eq!(path[1].1, Some(Party::Remote), "{profile}");
    }
}

#[test]
fn ipv6_flows_follow_setting() {
    for profile in ["ambient", "sidecar", "osm"] {
        let end = |ipv6: &str, id: &str| {
            explained(&format!("profile={profile} ipv6={ipv6}"), |explanation| {
                let flows = explanation.flows();
                flows.iter().find(|flow| flow.id == id).expect("IPv6").hops[0].walk.end
            })
        };
        assert_eq!(end("capture", "IPv6 out"), Verdict::Redirected(15001), "{profile}");
        assert_eq!(end("capture", "IPv6 in"), Verdict::Redirected(15006), "{profile}");
        for id in ["IPv6 out", "IPv6 in"] {
            assert_eq!(end("reject", id), Verdict::Rejected, "{profile}");
            assert_eq!(end("bypass", id), Verdict::Direct, "{profile}");
        }
    }
}

#[test]
fn connections_older_than_the_rules_survive_without_exact() {
    for profile in ["ambient", "sidecar", "osm"] {
        for (exact, end) in [(false, Verdict::Direct), (true, Verdict::Redirected(15001))] {
            let found = explained(&format!("profile={profile} exact={exact}"), |explanation| {
                let flows = explanation.flows();
                flows.iter().find(|flow| flow.id == "older out").expect("older").hops[0].walk.end
            });
            assert_eq!(found, end, "{profile}");
        }
    }
}

#[test]
fn replies_arrive_except_with_exact_tproxy() {
    for settings in
        ["ambient", "ambient dns=capture", "sidecar", "sidecar inbound.mode=tproxy", "osm"]
    {
        explained(&format!("profile={settings}"), |explanation| {
            for hop in explanation.flows().iter().flat_map(|flow| &flow.hops) {
                let answered = matches!(hop.reply, None | Some(ReplyOutcome::Delivered));
                assert!(answered, "{settings}: {:?} of {:?}", hop.reply, hop.packet);
            }
        });
    }
    let exact = "profile=sidecar inbound.mode=tproxy exact=true";
    let (text, json) =
        explained(exact, |explanation| (explanation.to_string(), explanation.json()));
    assert!(text.contains("from 127.0.0.1 to another host"), "{text}");
    assert_eq!(json["flows"][0]["hops"][1]["reply"], "unroutable");
}

#[test]
fn text_wraps_at_terminal_width() {
    for assignments in ["profile=ambient dns=capture", "profile=sidecar", "profile=osm"] {
        let text = explained(assignments, |explanation| explanation.to_string());
        let wide =
            text.lines().find(|line| line.chars().count() > 100 && line.trim_start().contains(' '));
        assert_eq!(wide, None, "{assignments}");
    }
}

#[test]
fn text_shows_counters_of_installed_rules() {
    let (settings, environment) = (settings("profile=sidecar"), Environment::example());
    let counters =
        [RuleCounter { id: "9-capture-outbound".to_owned(), packets: 4711, bytes: 60 * 4711 }];
    let explanation = Explanation::new(&settings, PORTS, true, &environment, Some(&counters));
    let text = explanation.to_string();
    let line = text.lines().find(|line| line.contains("9-capture-outbound")).expect("the rule");
    assert!(line.contains("4711"), "{line}");
    let json = explanation.json();
    let rules = json["rules"].as_array().expect("rules");
    let rule = rules.iter().find(|rule| rule["id"] == "9-capture-outbound").expect("the rule");
    assert_eq!((&rule["packets"], &rule["bytes"]), (&4711.into(), &(60 * 4711).into()));
}

#[test]
fn json_contains_every_rule_that_packets_refer_to() {
    for profile in ["ambient", "sidecar", "osm"] {
        let json = explained(&format!("profile={profile}"), |explanation| explanation.json());
        let ids: Vec<_> =
            json["rules"].as_array().expect("rules").iter().map(|rule| &rule["id"]).collect();
        let flows = json["flows"].as_array().expect("flows");
        for hop in flows.iter().flat_map(|flow| flow["hops"].as_array().expect("hops")) {
            let decided = &hop["decided_by"];
            assert!(decided.is_null() || ids.contains(&decided), "{profile}: {decided}");
        }
    }
}

#[test]
fn mermaid_chart_closes_subgraphs_and_declares_nodes() {
    for profile in ["ambient", "sidecar", "osm"] {
        let chart = explained(&format!("profile={profile}"), |explanation| explanation.mermaid());
        assert!(chart.starts_with("flowchart LR\n"));
        let count =
            |start: &str| chart.lines().filter(|line| line.trim_start().starts_with(start)).count();
        assert_eq!(count("subgraph "), chart.lines().filter(|line| *line == "  end").count());
        for line in chart.lines().filter(|line| line.contains("-->")) {
            let words: Vec<_> = line.split_whitespace().collect();
            for node in [words[0], words[words.len() - 1]] {
                let defined = |open: &str| chart.contains(&format!("    {node}{open}"));
                assert!(defined("[\"") || defined("([\""), "{node}");
            }
        }
    }
}

#[test]
fn profile_none_explains_that_it_captures_nothing() {
    let text = explained("profile=none", |explanation| explanation.to_string());
    assert!(text.contains("captures nothing"), "{text}");
}

fn explained_packet(assignments: &str, sender: Sender, to: &str) -> (Verdict, String) {
    let to: SocketAddr = to.parse().expect("an address and port");
    explained(assignments, |explanation| {
        let packet = explanation.packet(sender, Protocol::Tcp, to);
        (packet.hop.walk.end, packet.to_string())
    })
}

#[test]
fn advice_for_excluded_packet_names_excluding_setting() {
    let sidecar = "profile=sidecar outbound.exclude_ports=443";
    let (end, text) = explained_packet(sidecar, Sender::App, "10.0.0.5:443");
    assert_eq!(end, Verdict::Direct);
    assert!(text.contains("`interception.outbound.exclude_ports: 443` decides"), "{text}");
    let included = "profile=ambient outbound.include_cidrs=10.1.0.0/16";
    let (end, text) = explained_packet(included, Sender::App, "10.0.0.5:443");
    assert_eq!(end, Verdict::Direct);
    assert!(text.contains("`interception.outbound.include_cidrs: 10.1.0.0/16` decides"), "{text}");
    let (end, text) =
        explained_packet("profile=ambient ipv6=bypass", Sender::App, "[2001:db8::5]:443");
    assert_eq!(end, Verdict::Direct);
    assert!(text.contains("`interception.ipv6: bypass` decides"), "{text}");
}

#[test]
fn advice_for_captured_packet_names_exempting_settings() {
    let (end, text) = explained_packet("profile=ambient", Sender::App, "10.0.0.5:443");
    assert_eq!(end, Verdict::Redirected(15001));
    assert!(text.contains("`interception.outbound.exclude_cidrs: 10.0.0.5`"), "{text}");
    let (end, text) = explained_packet("profile=osm", Sender::Remote, "10.0.0.1:8080");
    assert_eq!(end, Verdict::Redirected(15006));
    assert!(text.contains("`interception.inbound.exclude_ports: 8080`"), "{text}");
}

#[test]
fn advice_distinguishes_proxy_and_probes() {
    for profile in ["ambient", "sidecar", "osm"] {
        let settings = format!("profile={profile}");
        let (end, text) = explained_packet(&settings, Sender::Proxy, "10.0.0.5:443");
        assert_eq!(end, Verdict::Direct, "{profile}");
        assert!(text.contains("proxy's own connections"), "{text}");
    }
    let probed = |probes: &str, to: &str| {
        explained_packet(&format!("profile=ambient kubelet_probes={probes}"), Sender::Probe, to)
    };
    assert_eq!(probed("on", "10.0.0.1:8080").0, Verdict::Direct);
    assert_eq!(probed("8080", "10.0.0.1:8080").0, Verdict::Direct);
    assert_eq!(probed("8080", "10.0.0.1:8081").0, Verdict::Redirected(15006));
    let (end, text) = probed("off", "10.0.0.1:8080");
    assert_eq!(end, Verdict::Redirected(15006));
    assert!(text.contains("`interception.kubelet_probes: off` decides"), "{text}");
    assert_eq!(
        explained_packet("profile=sidecar", Sender::Probe, "10.0.0.1:8080").0,
        Verdict::Redirected(15006)
    );
}

#[test]
fn impossible_packets_are_reported() {
    let (_, text) = explained_packet("profile=ambient", Sender::Remote, "127.0.0.1:8080");
    assert!(text.contains("No such packet arrives"), "{text}");
    let (_, text) = explained_packet("profile=ambient", Sender::Remote, "192.0.2.77:8080");
    assert!(text.contains("not an address of this namespace: the proxy refuses"), "{text}");
}

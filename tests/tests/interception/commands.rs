//! End-to-end tests of `underpass rules verify`, `render`, `explain` and their options.

use std::fs;

use serde_json::Value;
use underpass_tests::{CLIENT, Pod, Scene, Settings, Suite, tool};

use crate::{AMBIENT, OSM, PROFILES, Profile, SIDECAR};

pub(crate) fn add_tests(suite: &mut Suite) {
    for profile in PROFILES {
        suite.test(
            &format!("{}: `rules verify` prints the difference and exits with 3", profile.name),
            async move || verify(profile).await,
        );
        suite.test(
            &format!(
                "{}: nft loads the output of `rules render` and installs the same rules",
                profile.name
            ),
            async move || render_loads(profile).await,
        );
        suite.test(
            &format!("{}: `rules explain` prints every format", profile.name),
            async move || explain(profile).await,
        );
    }
    suite.test("`rules render` prints the format of each program", render_formats);
    suite.test(
        "a wrong option is reported with its key and exit code 2",
        wrong_options_are_reported,
    );
    suite.test(
        "`rules install` reports foreign rules that capture the same traffic",
        foreign_rules_are_reported,
    );
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| unreachable!("{error}: {text}"))
}

/// Deletes a rule by the id in its comment.
async fn delete(pod: &Pod, id: &str) {
    let text = tool(pod, "nft", &["-s", "-a", "list", "table", "inet", "underpass"]).await.ok();
    let mut chain = "";
    for line in text.lines().map(str::trim) {
        if let Some(head) = line.strip_prefix("chain ") {
            chain = head.split(' ').next().expect("a name");
        } else if line.contains(&format!("comment \"{id}\"")) {
            let (_, handle) = line.rsplit_once(" handle ").expect("a handle");
            let rule = ["delete", "rule", "inet", "underpass", chain, "handle", handle];
            tool(pod, "nft", &rule).await.ok();
            return;
        }
    }
    unreachable!("no rule {id} in\n{text}")
}

async fn verify(profile: Profile) {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = profile.rules();
    let (out, _) = pod.rules("verify", &settings).await.exited(3);
    assert!(out.contains("\n- "), "nothing is installed: {out}");
    let installed = json(&pod.rules("install -o json", &settings).await.ok());
    assert_eq!(installed["profile"], profile.name);
    assert_eq!(installed["backend"], "nftables");
    assert!(installed["rules"].as_u64() > Some(10), "{installed}");
    assert_eq!(installed["leftovers"], Value::Array(vec![]));
    assert_eq!(
        pod.rules("verify", &settings).await.ok(),
        "the installed rules are those of the settings\n"
    );
    let same = json(&pod.rules("verify -o json", &settings).await.ok());
    let expected = serde_json::json!({
        "same": true, "differences": [], "foreign": [], "blocked": false,
        "settings": "given", "proxy": null,
    });
    assert_eq!(same, expected);

    let rule = if profile.name == SIDECAR.name { "4-proxy" } else { "hbone-in" };
    delete(pod, rule).await;
    let (out, err) = pod.rules("verify", &settings).await.exited(3);
    let missing: Vec<_> = out.lines().filter(|line| line.starts_with("- ")).collect();
    let [line] = missing[..] else { unreachable!("not exactly one line is missing:\n{out}") };
    assert!(line.contains(&format!("\"{rule}\"")), "{line}");
    assert_eq!(out.lines().filter(|line| line.starts_with('+')).count(), 0, "{out}");
    let expected = "error: the installed rules differ from those of the settings\n\
                    hint: install the rules with `underpass rules install`\n";
    assert_eq!(err, expected);

    let (out, _) = pod.rules("verify -o json", &settings).await.exited(3);
    let found = json(&out);
    assert_eq!(found["same"], false);
    let differences = found["differences"].as_array().expect("a list");
    let [difference] = &differences[..] else { unreachable!("not exactly one section:\n{out}") };
    assert!(difference["location"].as_str().is_some_and(|place| place.contains("chain ")), "{out}");
    assert_eq!(difference["missing"].as_array().map(Vec::len), Some(1), "{out}");
    assert_eq!(difference["unexpected"], Value::Array(vec![]), "{out}");

    let other = settings.set("interception.outbound.exclude_ports=5432");
    let (out, _) = pod.rules("verify", &other).await.exited(3);
    assert!(out.contains("5432"), "{out}");
}

async fn render_loads(profile: Profile) {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = profile.rules().set("interception.outbound.exclude_ports=5432,8000-8100");
    let text = pod.rules("render", &settings).await.ok();
    let file = pod.folder().join("rules.nft");
    fs::write(&file, text).expect("written");
    tool(pod, "nft", &["-f", file.to_str().expect("a path in UTF-8")]).await.ok();
    let found = json(&pod.rules("verify -o json", &settings).await.out);
    let routes_section = "ip rules, routes and addresses";
    let differences = found["differences"].as_array().expect("a list");
    assert!(
        differences.iter().all(|difference| difference["location"] == routes_section),
        "{found}"
    );
}

async fn render_formats() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = SIDECAR.rules();
    let nft = pod.rules("render --format nft", &settings).await.ok();
    assert!(nft.contains("table inet underpass") && nft.contains("9-capture-outbound"), "{nft}");
    for (format, localhost) in [("iptables", "127.0.0.1/32"), ("ip6tables", "::1/128")] {
        let text = pod.rules(&format!("render -o {format}"), &settings).await.ok();
        for part in ["*nat\n", "-A ISTIO_OUTPUT -j ISTIO_REDIRECT\n", localhost, "COMMIT\n"] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        let file = pod.folder().join(format);
        fs::write(&file, text).expect("written");
        let restore = format!("{format}-nft-restore");
        let file = file.to_str().expect("a path in UTF-8");
        tool(pod, &restore, &["--test", "--noflush", file]).await.ok();
    }
    let rules = json(&pod.rules("render --format json", &settings).await.ok());
    let rules = rules["rules"].as_array().expect("a list of rules");
    for rule in rules {
        for key in ["id", "reason", "origin"] {
            assert!(rule[key].as_str().is_some_and(|text| !text.is_empty()), "{key} in {rule}");
        }
    }
    assert!(rules.iter().any(|rule| rule["id"] == "9-capture-outbound"), "{rules:?}");
}

async fn explain(profile: Profile) {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = profile.rules();
    let one = "explain --from app --to 10.1.0.2:80";
    for installed in [false, true] {
        if installed {
            pod.rules("install", &settings).await.ok();
        }
        let text = pod.rules("explain", &settings).await.ok();
        assert!(text.contains("15001") && text.contains("15008"), "{text}");
        assert!(json(&pod.rules("explain -o json", &settings).await.ok()).is_object());
        let mermaid = pod.rules("explain -o mermaid", &settings).await.ok();
        assert!(mermaid.contains("flowchart"), "{mermaid}");

        let text = pod.rules(one, &settings).await.ok();
        assert!(text.contains("capture-outbound") && text.contains("15001"), "{text}");
        let packet = pod.rules(&format!("{one} -o json"), &settings).await.ok();
        assert!(packet.contains("capture-outbound") && json(&packet).is_object(), "{packet}");
        let mermaid = pod.rules(&format!("{one} -o mermaid"), &settings).await.ok();
        assert!(mermaid.contains("flowchart"), "{mermaid}");
    }
    let explained = pod.rules("explain --from proxy --to 10.1.0.2:80", &settings).await.ok();
    assert!(!explained.contains("redirected"), "{explained}");
}

async fn wrong_options_are_reported() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    for (options, key) in [
        ("--outbound-exclude-ports 0", "interception.outbound.exclude_ports"),
        ("--outbound-exclude-cidrs 10.0.0.0/33", "interception.outbound.exclude_cidrs"),
        ("--profile kuma", "interception.profile"),
        ("--profile osm --inbound-mode tproxy", "interception.inbound.mode"),
        ("--profile sidecar --ingress", "interception.ingress"),
        ("--backend pf", "interception.backend"),
        ("--ipv6 maybe", "interception.ipv6"),
    ] {
        for command in ["render", "install"] {
            let arguments = ["rules", command].into_iter().chain(options.split(' '));
            let arguments: Vec<_> = arguments.collect();
            let (out, err) = pod.underpass(&arguments).await.exited(2);
            assert!(out.is_empty() && err.contains(key), "{command} {options}: {out}{err}");
        }
    }
    let none = Settings::new(CLIENT).set("interception.profile=none");
    for command in ["install", "verify", "watch"] {
        let (_, err) = pod.rules(command, &none).await.exited(2);
        assert!(err.contains("interception.profile"), "{err}");
    }
    assert_eq!(tool(pod, "nft", &["list", "ruleset"]).await.ok(), "");
}

async fn foreign_rules_are_reported() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    pod.rules(
        "install",
        &OSM.rules().set("interception.proxy_uids=0").set("interception.backend=iptables"),
    )
    .await
    .ok();
    let printed = pod.rules("install", &AMBIENT.rules()).await;
    assert!(printed.err.contains("warning: "), "{}{}", printed.out, printed.err);
    let reported = json(&pod.rules("install -o json", &AMBIENT.rules()).await.ok());
    assert!(reported["leftovers"].as_array().is_some_and(|all| !all.is_empty()), "{reported}");
    assert_eq!(pod.underpass(&["rules", "remove"]).await.ok(), "removed\n");
}

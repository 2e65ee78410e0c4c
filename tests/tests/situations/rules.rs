//! The interception rules: changed, removed, fought over, or preceded by those of other programs.

use std::path::Path;

use nix::sys::signal::Signal;
use underpass_tests::{Scene, tool};

use crate::situation::{Doctor, Log, Metric, Situation, Status};
use crate::stage::{Broken, Running, Side, client_only, client_settings};

pub(crate) const SITUATIONS: &[Situation] = &[
    Situation {
        name: "rules that another program flushed are named after their repair",
        make: || Box::pin(changed_by("flush ruleset")),
        status: Status::Notice("rules", "another program has changed the rules; repairs: 1"),
        doctor: Doctor("proxy-problems", "warning", "another program has changed the rules"),
        log: Log::Line(&["WARN", "repaired the rules", "another program", "hint="]),
        metric: Metric::Rises("underpass_rules_repairs_total", &[]),
    },
    Situation {
        name: "one rule that another program added is named after its removal",
        make: || Box::pin(changed_by("insert rule inet underpass nat_output accept")),
        status: Status::Notice("rules", "another program has changed the rules; repairs: 1"),
        doctor: Doctor("proxy-problems", "warning", "another program has changed the rules"),
        log: Log::Line(&["WARN", "repaired the rules", "unexpected=1", "hint="]),
        metric: Metric::Rises("underpass_rules_repairs_total", &[]),
    },
    Situation {
        name: "flushed rules are named with interception.repair off",
        make: || Box::pin(unrepaired()),
        status: Status::Problem("rules", "interception.repair is off"),
        doctor: Doctor("rules-installed", "failure", "not those of the running proxy"),
        log: Log::Line(&["ERROR", "another program has changed the rules", "hint="]),
        metric: Metric::Is("underpass_rules_intact", &[], 0.0),
    },
    Situation {
        name: "a program that changes the rules again and again is named",
        make: || Box::pin(fought()),
        status: Status::Problem("rules", "another program has changed the rules"),
        doctor: Doctor("rules-installed", "failure", ""),
        log: Log::Line(&["ERROR", "another program changes the rules repeatedly", "hint="]),
        metric: Metric::Is("underpass_rules_intact", &[], 0.0),
    },
    Situation {
        name: "a foreign rule that exempts traffic before ours is named",
        make: || Box::pin(preceded()),
        status: Status::Problem("rules", "the self-test of the rules failed"),
        doctor: Doctor("rules-foreign", "failure", "table inet other, chain theirs"),
        log: Log::Line(&[
            "ERROR",
            "the self-test of the rules failed",
            "table inet other",
            "hint=",
        ]),
        metric: Metric::Is("underpass_self_test_passed", &[], 0.0),
    },
    Situation {
        name: "rules without a proxy are named",
        make: || Box::pin(killed()),
        status: Status::NoProxy("start the proxy"),
        doctor: Doctor("proxy-ready", "warning", "but its rules are installed"),
        log: Log::Absent("a killed process logs nothing"),
        metric: Metric::Absent("no process serves metrics"),
    },
];

async fn changed_by(command: &str) -> Broken {
    let (scene, proxy) = client_only().await;
    tool(&scene.client, "nft", &[command]).await.ok();
    Broken::client(scene, proxy)
}

async fn unrepaired() -> Broken {
    let scene = Scene::new().await;
    let settings = client_settings(&scene).set("interception.repair=false");
    let proxy = scene.client.proxy(&settings).await;
    tool(&scene.client, "nft", &["flush ruleset"]).await.ok();
    Broken::client(scene, proxy)
}

async fn fought() -> Broken {
    let (scene, proxy) = client_only().await;
    let script = "while :; do nft flush ruleset; done";
    let program = scene.client.background(Path::new("sh"), &["-c", script]);
    Broken::client(scene, proxy).keep(program)
}

async fn preceded() -> Broken {
    let (scene, proxy) = client_only().await;
    let chain = "type route hook output priority -200";
    let rule =
        format!("table inet other {{\nchain theirs {{\n{chain}\nmeta mark set 0x539\n}}\n}}");
    tool(&scene.client, "nft", &[&rule]).await.ok();
    Broken::client(scene, proxy)
}

async fn killed() -> Broken {
    let (scene, mut proxy) = client_only().await;
    proxy.signal(Signal::SIGKILL);
    proxy.ended().await;
    let settings = client_settings(&scene);
    let ended = Running::Ended(proxy.log());
    Broken::new(scene, Side::Client, ended).doctor_with(settings)
}

//! The host and the program: descriptors, the program file, IPv6, the output of the log.

use std::path::Path;

use underpass_tests::{APP, Family, Scene, Server, binary, tool};

use crate::conntrack;
use crate::situation::{Doctor, Log, Metric, Situation, Status};
use crate::stage::{Broken, client_only, client_settings};

pub(crate) const SITUATIONS: &[Situation] = &[
    Situation {
        name: "a proxy without free descriptors is named",
        make: || Box::pin(out_of_descriptors()),
        status: Status::Problem("readiness", "out of file descriptors"),
        doctor: Doctor("proxy-ready", "failure", "out of file descriptors"),
        log: Log::Line(&["WARN", "the limit of open files is reached", "hint="]),
        metric: Metric::Rises("underpass_accept_paused_total", &[("reason", "descriptors")]),
    },
    Situation {
        name: "an old program after a failed hot restart is named",
        make: || Box::pin(stale_program()),
        status: Status::Notice("program", "the program file was replaced"),
        doctor: Doctor("version-running", "warning", "runs another program than this one"),
        log: Log::Line(&["WARN", "the program file was replaced", "--take-over"]),
        metric: Metric::Is("underpass_program_replaced", &[], 1.0),
    },
    Situation {
        name: "IPv6 that is disabled on the loopback interface is named",
        make: || Box::pin(without_ipv6()),
        status: Status::Notice("ipv6", "captured IPv6 connections fail"),
        doctor: Doctor("sysctl-ipv6", "warning", "captured IPv6 connections fail"),
        log: Log::Line(&["IPv6 is disabled on the loopback interface", "hint="]),
        metric: Metric::Is("underpass_loopback_ipv6_disabled", &[], 1.0),
    },
    Situation {
        name: "a log on a full disk is named",
        make: || Box::pin(full_log()),
        status: Status::Notice("log", "log lines were lost"),
        doctor: Doctor("proxy-problems", "warning", "log lines were lost"),
        log: Log::Absent("no line can be written"),
        metric: Metric::Rises("underpass_log_lines_lost_total", &[]),
    },
];

/// The table of tracked connections is nearly full. On hosts with a large table it is not made.
pub(crate) static FULL_TABLE: Situation = Situation {
    name: "a nearly full table of tracked connections is named",
    make: || Box::pin(full_table()),
    status: Status::Problem("conntrack", "the kernel drops new ones when the table is full"),
    doctor: Doctor("conntrack-limit", "failure", "tracked connections: "),
    log: Log::Line(&["WARN", "tracked connections: ", "nf_conntrack_max"]),
    metric: Metric::Nearly("underpass_conntrack_entries", "underpass_conntrack_entries_limit"),
};

async fn full_table() -> Broken {
    let (scene, proxy) = client_only().await;
    // A completely full table drops the connections of scrapes too.
    conntrack::fill(&scene.client, 97);
    Broken::client(scene, proxy)
}

async fn out_of_descriptors() -> Broken {
    let scene = Scene::new().await;
    let mesh = format!("mesh.file={}", scene.empty_mesh().display());
    let settings = client_settings(&scene).set(&mesh);
    let script = "ulimit -n 100\nexec \"$UNDERPASS\" \"$@\"";
    let proxy = scene.client.try_proxy_through(script, &settings).await.expect("it starts");
    let echo = Server::echo(&scene.server, APP);
    let mut held = Vec::new();
    for _ in 0..100 {
        // Connections wait in the accept queue.
        held.push(scene.client.dial(scene.app(Family::V4)).await.expect("it listens"));
    }
    Broken::client(scene, proxy).keep((held, echo))
}

/// Writes a copy of the program, followed by `more`, and moves it to `file`. Another process writes
/// it: a child that this process starts meanwhile would inherit the open file, and the kernel would
/// refuse to execute it (ETXTBSY).
async fn install(scene: &Scene, file: &Path, more: &str) {
    let program = binary();
    let script =
        format!("cat {program:?} >new; printf '{more}' >>new; chmod 755 new; mv new {file:?}");
    let script = format!("set -e; cd {:?}; {script}", scene.world.folder());
    tool(&scene.client, "sh", &["-c", &script]).await.ok();
}

async fn stale_program() -> Broken {
    let scene = Scene::new().await;
    let installed = scene.world.folder().join("underpass");
    install(&scene, &installed, "").await;
    let settings = client_settings(&scene);
    let script = format!("exec {installed:?} \"$@\"");
    let proxy = scene.client.try_proxy_through(&script, &settings).await.expect("it starts");
    install(&scene, &installed, "newer").await;
    let missing = settings.clone().set("identity.key=/no/such.key").take_over();
    let failed = scene.client.try_proxy_through(&script, &missing).await;
    assert!(failed.is_err(), "the hot restart succeeds");
    let mut broken = Broken::client(scene, proxy);
    broken.program = Some(installed);
    broken
}

async fn without_ipv6() -> Broken {
    let scene = Scene::new().await;
    scene.client.sysctl("net/ipv6/conf/lo/disable_ipv6", "1");
    let proxy = scene.client.proxy(&client_settings(&scene)).await;
    Broken::client(scene, proxy)
}

async fn full_log() -> Broken {
    let scene = Scene::new().await;
    let settings = client_settings(&scene);
    let script = "exec \"$UNDERPASS\" \"$@\" >/dev/full";
    let proxy = scene.client.try_proxy_through(script, &settings).await.expect("it starts");
    Broken::client(scene, proxy)
}

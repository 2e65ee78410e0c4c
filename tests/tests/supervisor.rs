//! End-to-end tests of the protocols between the proxy and its supervisor (systemd): the store of
//! descriptors, the watchdog, and the reload command.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use underpass_tests::{Notification, Proxy, Scene, ScriptedSupervisor, Suite, http_get, within};

/// The periods of the watchdog, in microseconds.
const NO_WATCHDOG: Option<u64> = None;
const WATCHDOG: Option<u64> = Some(200_000);
const READY: &str = "READY=1";
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 15020);
const READINESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15021);

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test(
        "a connection to a listener of a killed process waits for the next process",
        connection_waits_for_next_process,
    );
    suite.test(
        "a process uses no stored listener of another profile, and removes it",
        listener_of_other_profile_is_removed,
    );
    suite.test(
        "a start that fails because of a stored listener removes it",
        failed_start_removes_listener,
    );
    suite.test("a stopping process removes its listeners from the store", stop_clears_store);
    suite.test("the watchdog is notified while the workers answer", watchdog_is_notified);
    suite.test(
        "--background returns once the new process has taken over",
        background_returns_after_takeover,
    );
    suite.test(
        "the watchdog of a reload command is notified by the new process",
        watchdog_is_notified_after_reload,
    );
    suite.test("--background fails if the new process does not serve", background_fails);
    suite.run()
}

/// The stored listeners by name.
fn stored(notifications: Vec<Notification>) -> BTreeMap<String, OwnedFd> {
    let stored = notifications.into_iter().filter_map(|mut notification| {
        let rest = notification.text.strip_prefix("FDSTORE=1\nFDNAME=")?;
        let name = rest.strip_suffix("\nFDPOLL=0").expect("the last line").to_owned();
        Some((name, notification.descriptors.pop().expect("a descriptor")))
    });
    stored.collect()
}

/// The last word of each name: the listener.
fn listeners<T>(stored: &BTreeMap<String, T>) -> Vec<&str> {
    stored.keys().filter_map(|name| name.rsplit(' ').next()).collect()
}

/// The names that were removed from the store.
fn removed(notifications: &[Notification]) -> Vec<&str> {
    let texts = notifications.iter().map(|notification| notification.text.as_str());
    texts.filter_map(|text| text.strip_prefix("FDSTOREREMOVE=1\nFDNAME=")).collect()
}

async fn connection_waits_for_next_process() {
    let scene = Scene::new().await;
    let (pod, settings) = (&scene.client, scene.client_settings());
    let supervisor = ScriptedSupervisor::new(pod);
    let mut first = supervisor.start(pod, &settings, &[], NO_WATCHDOG, None);
    let stored = stored(supervisor.until(READY).await);
    assert_eq!(listeners(&stored), ["hbone", "inbound", "metrics", "outbound", "readiness"]);
    first.signal(Signal::SIGKILL);
    assert_eq!(first.ended().await, None);

    let mut waiting = pod.dial(READINESS).await.expect("the supervisor holds the listener");
    let request = b"GET /healthz/live HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n";
    waiting.write_all(request).await.expect("sent");
    // The other listeners close: the next process binds them itself.
    let readiness = stored.into_iter().find(|(name, _)| name.ends_with(" readiness"));
    let (name, listener) = readiness.expect("the readiness endpoint");
    let _second = supervisor.start(pod, &settings, &[], NO_WATCHDOG, Some((&name, &listener)));
    let mut answer = String::new();
    let reading = within("an answer", waiting.read_to_string(&mut answer));
    reading.await.expect("not reset");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let notifications = supervisor.until(READY).await;
    assert!(removed(&notifications).contains(&name.as_str()), "{notifications:?}");
    assert_eq!(http_get(pod, READINESS, "/healthz/ready").await.0, 200);
}

async fn listener_of_other_profile_is_removed() {
    let scene = Scene::new().await;
    let (pod, settings) = (&scene.client, scene.client_settings());
    let supervisor = ScriptedSupervisor::new(pod);
    let other = pod.run(|| TcpListener::bind("[::]:15999")).expect("a free port");
    let (name, other) = ("1 none redirect metrics", other.into());
    let _process = supervisor.start(pod, &settings, &[], NO_WATCHDOG, Some((name, &other)));
    let notifications = supervisor.until(READY).await;
    assert!(removed(&notifications).contains(&name), "{notifications:?}");
    assert!(listeners(&stored(notifications)).contains(&"metrics"));
}

async fn failed_start_removes_listener() {
    let scene = Scene::new().await;
    let (pod, settings) = (&scene.client, scene.client_settings());
    let supervisor = ScriptedSupervisor::new(pod);
    let other = pod.run(|| TcpListener::bind(METRICS)).expect("a free port");
    let (name, other) = ("1 none redirect metrics", other.into());
    let mut first = supervisor.start(pod, &settings, &[], NO_WATCHDOG, Some((name, &other)));
    supervisor.until(&format!("FDSTOREREMOVE=1\nFDNAME={name}")).await;
    assert_eq!(first.ended().await, Some(1));
    drop(other);
    let _second = supervisor.start(pod, &settings, &[], NO_WATCHDOG, None);
    supervisor.until(READY).await;
}

async fn stop_clears_store() {
    let scene = Scene::new().await;
    let (pod, settings) = (&scene.client, scene.client_settings());
    let supervisor = ScriptedSupervisor::new(pod);
    let mut process = supervisor.start(pod, &settings, &[], NO_WATCHDOG, None);
    let stored = stored(supervisor.until(READY).await);
    process.signal(Signal::SIGTERM);
    supervisor.until("STOPPING=1").await;
    let mut left: Vec<_> = stored.keys().collect();
    while !left.is_empty() {
        let notification = supervisor.next().await;
        let name = notification.text.strip_prefix("FDSTOREREMOVE=1\nFDNAME=");
        left.retain(|left| Some(left.as_str()) != name);
    }
    assert_eq!(process.ended().await, Some(0));
}

async fn watchdog_is_notified() {
    let scene = Scene::new().await;
    let (pod, settings) = (&scene.client, scene.client_settings());
    let supervisor = ScriptedSupervisor::new(pod);
    let _process = supervisor.start(pod, &settings, &[], WATCHDOG, None);
    for _ in 0..3 {
        supervisor.until("WATCHDOG=1").await;
    }
}

/// The process that has taken over from this one.
async fn successor(old: &mut Proxy) -> Pid {
    let line = old.line(&["another process has taken over"]).await;
    let pid = line.split("pid=").nth(1).and_then(|rest| rest.split(' ').next());
    Pid::from_raw(pid.and_then(|pid| pid.parse().ok()).expect("a process id"))
}

async fn background_returns_after_takeover() {
    let scene = Scene::new().await;
    let (pod, settings) = (&scene.client, scene.client_settings());
    let mut old = pod.proxy(&settings).await;
    let supervisor = ScriptedSupervisor::new(pod);
    let more = ["--take-over", "--background"];
    let mut command = supervisor.start(pod, &settings, &more, NO_WATCHDOG, None);
    let ready = supervisor.until(READY);
    let (_, code) = tokio::join!(ready, command.ended());
    assert_eq!(code, Some(0));
    let pid = successor(&mut old).await;
    assert_eq!(http_get(pod, READINESS, "/healthz/ready").await.0, 200);
    assert!(old.ended().await.success(), "{}", old.log());
    kill(pid, Signal::SIGTERM).expect("the new process runs");
    supervisor.until("STOPPING=1").await;
}

async fn watchdog_is_notified_after_reload() {
    let scene = Scene::new().await;
    let (pod, settings) = (&scene.client, scene.client_settings());
    let mut old = pod.proxy(&settings).await;
    let supervisor = ScriptedSupervisor::new(pod);
    let more = ["--take-over", "--background"];
    let mut command = supervisor.start(pod, &settings, &more, WATCHDOG, None);
    assert_eq!(command.ended().await, Some(0));
    let pid = successor(&mut old).await;
    assert!(old.ended().await.success(), "{}", old.log());
    for _ in 0..3 {
        supervisor.until("WATCHDOG=1").await;
    }
    kill(pid, Signal::SIGTERM).expect("the new process runs");
    supervisor.until("STOPPING=1").await;
}

async fn background_fails() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let supervisor = ScriptedSupervisor::new(pod);
    let settings = scene.client_settings().set("proxy.workers=none");
    let mut command = supervisor.start(pod, &settings, &["--background"], NO_WATCHDOG, None);
    assert_eq!(command.ended().await, Some(2));
}

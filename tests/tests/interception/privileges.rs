//! Tests of the privileges of a running proxy: its user, and its few capabilities.

use std::fs;

use underpass_tests::{Proxy, Scene, Suite, tool, until};

use crate::{OSM, PROFILES, Profile, SIDECAR};

/// CAP_NET_ADMIN and CAP_NET_RAW (include/uapi/linux/capability.h), as bits.
const NET_ADMIN: u64 = 1 << 12;
const NET_RAW: u64 = 1 << 13;

pub(crate) fn add_tests(suite: &mut Suite) {
    for profile in PROFILES {
        profile.test(suite, "only the namespaces thread has a capability", async move || {
            confines_every_thread(profile).await
        });
    }
    suite.test(
        "ambient: the proxy keeps NET_RAW with the iptables backend, and repairs rules",
        iptables_in_ambient,
    );
    suite.test(
        "ambient: the proxy's memory is hidden from processes of the same user",
        hides_memory,
    );
    suite.test(
        "ambient: the proxy warns of a process with NET_RAW in its network namespace",
        warns_of_net_raw,
    );
    suite.test_with_users(
        "sidecar: the error names the capabilities that are missing for a change of user",
        names_missing_capabilities,
    );
    for profile in [SIDECAR, OSM] {
        profile.test(suite, "with repair: false no thread has any capability", async move || {
            keeps_no_capability(profile).await;
        });
    }
    suite.test_with_users(
        "sidecar: the proxy keeps NET_RAW with the iptables backend, also for child processes",
        keeps_net_raw_for_iptables,
    );
    suite.test_with_users("sidecar: the proxy removes its socket when it stops", removes_socket);
    suite.test_with_users(
        "sidecar: the proxy removes the rules with on_exit: remove after switching its user",
        removes_rules,
    );
    suite.test_with_users(
        "sidecar: only the namespaces thread keeps NET_ADMIN in TPROXY mode",
        keeps_net_admin_for_tproxy,
    );
}

/// A thread according to the kernel (proc_pid_status(5)).
#[derive(Debug)]
struct Thread {
    name: String,
    users: Vec<u32>,
    groups: Vec<u32>,
    supplementary: String,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
    bounding: u64,
    no_new_privileges: bool,
}

impl Thread {
    fn all(proxy: &Proxy) -> Vec<Self> {
        let folder = format!("/proc/{}/task", proxy.pid());
        let threads = fs::read_dir(&folder).expect("threads").filter_map(|entry| {
            let entry = entry.expect("a thread");
            // A short-lived thread may already have ended.
            let status = fs::read_to_string(entry.path().join("status")).ok()?;
            Some(Self::of(&status))
        });
        threads.collect()
    }

    fn of(status: &str) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.expect(name).trim().to_owned()
        };
        let ids = |name| -> Vec<u32> {
            field(name).split_whitespace().map(|id| id.parse().expect("a number")).collect()
        };
        let bits = |name| u64::from_str_radix(&field(name), 16).expect("a bit mask");
        Self {
            name: field("Name"),
            users: ids("Uid"),
            groups: ids("Gid"),
            supplementary: field("Groups"),
            effective: bits("CapEff"),
            permitted: bits("CapPrm"),
            inheritable: bits("CapInh"),
            ambient: bits("CapAmb"),
            bounding: bits("CapBnd"),
            no_new_privileges: field("NoNewPrivs") == "1",
        }
    }

    fn is_worker(&self) -> bool {
        self.name.starts_with("worker-")
    }

    /// Whether this thread changes rules and opens sockets.
    fn enters_namespaces(&self) -> bool {
        self.name == "namespaces"
    }
}

/// Waits until there are two workers and every thread has exactly the capabilities that `kept`
/// returns. A new thread briefly has those of its creator.
async fn await_confinement(proxy: &Proxy, kept: impl Fn(&Thread) -> u64) -> Vec<Thread> {
    let is_confined = |thread: &Thread| {
        let kept = kept(thread);
        (thread.effective, thread.permitted) == (kept, kept) && thread.no_new_privileges
    };
    let mut last = Vec::new();
    let confined = async || {
        last = Thread::all(proxy);
        last.iter().filter(|thread| thread.is_worker()).count() == 2 && last.iter().all(is_confined)
    };
    until(&format!("every thread of {} is confined", proxy.pid()), confined).await;
    last
}

async fn confines_every_thread(profile: Profile) {
    let scene = Scene::new().await;
    let mut proxy = scene.client.proxy(&profile.of(scene.client_settings())).await;
    let kept = |thread: &Thread| if thread.enters_namespaces() { NET_ADMIN } else { 0 };
    for repairs in 0..2 {
        for thread in await_confinement(&proxy, kept).await {
            let others = (thread.inheritable, thread.ambient, thread.bounding);
            assert_eq!(others, (0, 0, 0), "{thread:?}");
            if let Some(user) = profile.user {
                assert_eq!(thread.users, [user; 4], "{thread:?}");
                assert_eq!((&thread.groups[..], &*thread.supplementary), (&[user; 4][..], ""));
            }
        }
        tool(&scene.client, "nft", &["flush", "ruleset"]).await.ok();
        proxy.more_than(repairs, &["repaired the rules, which another program had changed"]).await;
    }
}

async fn iptables_in_ambient() {
    let scene = Scene::new().await;
    let settings = scene.client_settings().set("interception.backend=iptables");
    let mut proxy = scene.client.proxy(&settings).await;
    let both = NET_ADMIN | NET_RAW;
    let kept = |thread: &Thread| if thread.enters_namespaces() { both } else { 0 };
    for thread in await_confinement(&proxy, kept).await {
        assert_eq!(thread.bounding & !both, 0, "{thread:?}");
    }
    tool(&scene.client, "iptables", &["-t", "nat", "-F"]).await.ok();
    proxy.more_than(0, &["repaired the rules, which another program had changed"]).await;
}

async fn hides_memory() {
    let scene = Scene::new().await;
    let proxy = scene.client.proxy(&scene.client_settings()).await;
    // Root without SYS_PTRACE, but with the proxy's capabilities: with fewer, the kernel would deny
    // access for that reason (ptrace(2)).
    for (file, code) in [("environ", 1), ("status", 0)] {
        let file = format!("/proc/{}/{file}", proxy.pid());
        let arguments = ["--bounding-set=-all,+net_admin", "cat", &file];
        tool(&scene.client, "setpriv", &arguments).await.exited(code);
    }
}

async fn warns_of_net_raw() {
    let scene = Scene::new().await;
    let mut without = scene.client.proxy(&scene.client_settings()).await;
    without.line(&["ready"]).await;
    assert_eq!(without.count(&["can bypass the rules"]), 0, "{}", without.log());
    assert!(without.stop().await.success());
    let arguments = ["--bounding-set=-all,+net_raw", "tail", "-f", "/dev/null"];
    let _workload = scene.client.background("setpriv".as_ref(), &arguments);
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    // The process may be found before or after setpriv has executed the program.
    proxy.line(&["WARN", "can bypass the rules", "processes=1", "NET_RAW"]).await;
}

async fn names_missing_capabilities() {
    let scene = Scene::new().await;
    let settings = SIDECAR.of(scene.client_settings());
    let before = scene.client.traces().await;
    for (dropped, missing) in
        [("-setuid", "[SETUID]"), ("-setgid", "[SETGID]"), ("-setuid,-setgid", "[SETUID, SETGID]")]
    {
        let script = format!("exec setpriv --bounding-set={dropped} $UNDERPASS \"$@\"");
        let error = scene.client.try_proxy_through(&script, &settings).await;
        let error = error.expect_err("the start fails").to_string();
        assert!(error.contains(missing), "{dropped}: {error}");
        assert_eq!(scene.client.traces().await, before, "{dropped}");
    }
}

/// The threads of a proxy that has switched user and group, once each has the capabilities that
/// `kept` returns.
async fn threads(proxy: &Proxy, profile: Profile, kept: impl Fn(&Thread) -> u64) -> Vec<Thread> {
    let threads = await_confinement(proxy, kept).await;
    let user = [profile.user.expect("a user"); 4];
    for thread in &threads {
        assert_eq!((&thread.users[..], &thread.groups[..]), (&user[..], &user[..]), "{thread:?}");
        assert_eq!(thread.supplementary, "", "{thread:?}");
    }
    threads
}

async fn keeps_no_capability(profile: Profile) {
    let scene = Scene::new().await;
    let settings = profile.of(scene.client_settings()).set("interception.repair=false");
    let mut proxy = scene.client.proxy(&settings).await;
    for thread in threads(&proxy, profile, |_| 0).await {
        assert_eq!((thread.inheritable, thread.ambient), (0, 0), "{thread:?}");
    }
    // The proxy repairs nothing, so the rules stay removed.
    tool(&scene.client, "nft", &["flush", "ruleset"]).await.ok();
    assert!(proxy.stop().await.success(), "{}", proxy.log());
    scene.client.rules("verify", &settings).await.exited(3);
}

async fn keeps_net_raw_for_iptables() {
    let scene = Scene::new().await;
    let settings = SIDECAR.of(scene.client_settings()).set("interception.backend=iptables");
    let proxy = scene.client.proxy(&settings).await;
    let kept = |thread: &Thread| if thread.enters_namespaces() { NET_ADMIN | NET_RAW } else { 0 };
    for thread in threads(&proxy, SIDECAR, kept).await {
        let kept = kept(&thread);
        assert_eq!((thread.inheritable, thread.ambient), (kept, kept), "{thread:?}");
    }
}

async fn removes_socket() {
    let scene = Scene::new().await;
    // As in a container, where /run/underpass does not exist.
    let script = "exec unshare -m sh -c '
mount -t tmpfs none /mnt
mkdir /mnt/upper /mnt/work
cp \"$0\" /mnt/underpass
mount -t overlay none -o lowerdir=/run,upperdir=/mnt/upper,workdir=/mnt/work /run
rm -rf /run/underpass
/mnt/underpass \"$@\"
ls /run/underpass | sed s/^/left:/' \"$UNDERPASS\" \"$@\"";
    let settings = SIDECAR.of(scene.client_settings());
    let mut proxy = scene.client.try_proxy_through(script, &settings).await.expect("it starts");
    assert!(proxy.stop().await.success(), "{}", proxy.log());
    proxy.line(&["stopped"]).await;
    assert_eq!(proxy.count(&["left:"]), 0, "{}", proxy.log());
}

async fn removes_rules() {
    let scene = Scene::new().await;
    let before = scene.client.traces().await;
    let settings = SIDECAR
        .of(scene.client_settings())
        .set("interception.on_exit=remove")
        .set("interception.repair=false");
    let mut proxy = scene.client.proxy(&settings).await;
    assert!(proxy.stop().await.success(), "{}", proxy.log());
    assert_eq!(scene.client.traces().await, before);
}

async fn keeps_net_admin_for_tproxy() {
    let scene = Scene::new().await;
    let settings = SIDECAR.of(scene.server_settings()).set("interception.inbound.mode=tproxy");
    let proxy = scene.server.proxy(&settings).await;
    let kept = |thread: &Thread| if thread.enters_namespaces() { NET_ADMIN } else { 0 };
    threads(&proxy, SIDECAR, kept).await;
}

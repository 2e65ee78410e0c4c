//! What the proxy still may do once it runs: the user that its rules know, and hardly any capability.

use std::fs;

use underpass_tests::{Proxy, Scene, Suite, tool, until};

use crate::{OSM, Profile, SIDECAR};

/// CAP_NET_ADMIN and CAP_NET_RAW (include/uapi/linux/capability.h), as bits.
const NET_ADMIN: u64 = 1 << 12;
const NET_RAW: u64 = 1 << 13;

pub(crate) fn add(suite: &mut Suite) {
    for profile in [SIDECAR, OSM] {
        profile.test(
            suite,
            "it runs as its user, and only the thread that keeps the rules has NET_ADMIN",
            async move || keeps_the_rules(profile).await,
        );
        profile.test(suite, "with repair: false no thread has any capability", async move || {
            keeps_nothing(profile).await;
        });
    }
    suite.test_with_users(
        "sidecar: for iptables it also keeps NET_RAW, for programs too",
        for_iptables,
    );
    suite.test_with_users("sidecar: with on_exit: remove it still can, as another user", removes);
    suite.test_with_users("sidecar: in TPROXY mode its workers keep NET_ADMIN alone", for_tproxy);
}

/// A thread as the kernel describes it (proc_pid_status(5)).
#[derive(Debug)]
struct Thread {
    is_first: bool,
    name: String,
    users: Vec<u32>,
    groups: Vec<u32>,
    supplementary: String,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Thread {
    fn all(proxy: &Proxy) -> Vec<Self> {
        let folder = format!("/proc/{}/task", proxy.pid());
        let threads = fs::read_dir(&folder).expect("threads").map(|entry| {
            let entry = entry.expect("a thread");
            let status = fs::read_to_string(entry.path().join("status")).expect("a status");
            Self::of(&status, entry.file_name() == *proxy.pid().to_string())
        });
        threads.collect()
    }

    fn of(status: &str, is_first: bool) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.expect(name).trim().to_owned()
        };
        let ids = |name| -> Vec<u32> {
            field(name).split_whitespace().map(|id| id.parse().expect("a number")).collect()
        };
        let bits = |name| u64::from_str_radix(&field(name), 16).expect("a bit mask");
        Self {
            is_first,
            name: field("Name"),
            users: ids("Uid"),
            groups: ids("Gid"),
            supplementary: field("Groups"),
            effective: bits("CapEff"),
            permitted: bits("CapPrm"),
            inheritable: bits("CapInh"),
            ambient: bits("CapAmb"),
        }
    }

    fn is_worker(&self) -> bool {
        self.name.starts_with("worker-")
    }

    fn may(&self, capabilities: u64) {
        assert_eq!((self.effective, self.permitted), (capabilities, capabilities), "{self:?}");
    }
}

/// The threads of a proxy that is another user now, and of no other group, and whose workers have these capabilities.
async fn threads(proxy: &Proxy, profile: Profile, workers: u64) -> Vec<Thread> {
    // A worker gives up what it does not need when it begins, and others may begin to serve before.
    let has_begun = |thread: &Thread| thread.is_worker() && thread.effective == workers;
    let have_begun = async || Thread::all(proxy).iter().filter(|one| has_begun(one)).count() == 2;
    until(&format!("two workers have begun, with the capabilities {workers:#x}"), have_begun).await;
    let threads = Thread::all(proxy);
    let user = [profile.user.expect("a user"); 4];
    for thread in &threads {
        assert_eq!((&thread.users[..], &thread.groups[..]), (&user[..], &user[..]), "{thread:?}");
        assert_eq!(thread.supplementary, "", "{thread:?}");
    }
    threads
}

async fn keeps_the_rules(profile: Profile) {
    let scene = Scene::new().await;
    let mut proxy = scene.client.proxy(&profile.of(scene.client_settings())).await;
    for repairs in 0..2 {
        for thread in threads(&proxy, profile, 0).await {
            thread.may(if thread.is_first { NET_ADMIN } else { 0 });
            assert_eq!((thread.inheritable, thread.ambient), (0, 0), "{thread:?}");
        }
        tool(&scene.client, "nft", &["flush", "ruleset"]).await.ok();
        proxy.more_than(repairs, &["another program had changed the rules"]).await;
    }
}

async fn keeps_nothing(profile: Profile) {
    let scene = Scene::new().await;
    let settings = profile.of(scene.client_settings()).set("interception.repair=false");
    let mut proxy = scene.client.proxy(&settings).await;
    for thread in threads(&proxy, profile, 0).await {
        thread.may(0);
        assert_eq!((thread.inheritable, thread.ambient), (0, 0), "{thread:?}");
    }
    // What it does not keep, stays changed.
    tool(&scene.client, "nft", &["flush", "ruleset"]).await.ok();
    assert!(proxy.stop().await.success(), "{}", proxy.log());
    scene.client.rules("verify", &settings).await.exited(3);
}

async fn for_iptables() {
    let scene = Scene::new().await;
    let settings = SIDECAR.of(scene.client_settings()).set("interception.backend=iptables");
    let proxy = scene.client.proxy(&settings).await;
    for thread in threads(&proxy, SIDECAR, 0).await {
        let kept = if thread.is_first { NET_ADMIN | NET_RAW } else { 0 };
        thread.may(kept);
        assert_eq!((thread.inheritable, thread.ambient), (kept, kept), "{thread:?}");
    }
}

async fn removes() {
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

async fn for_tproxy() {
    let scene = Scene::new().await;
    let settings = SIDECAR.of(scene.server_settings()).set("interception.inbound.mode=tproxy");
    let proxy = scene.server.proxy(&settings).await;
    for thread in threads(&proxy, SIDECAR, NET_ADMIN).await {
        if thread.is_first || thread.is_worker() {
            thread.may(NET_ADMIN);
        } else {
            thread.may(0);
        }
    }
}

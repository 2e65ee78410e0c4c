//! Measures the memory, the threads and the wake-ups of idle pods. A separate test binary, because
//! other tests in the process would be measured too.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::fs;
use std::future::pending;
use std::process::ExitCode;
use std::time::Duration;

use tokio::time::timeout;
use underpass::testing::TestNode;
use underpass_tests::{Mesh, Pki, Settings, Suite, World, until};

/// The maximum private memory of an idle pod.
const MAX_KIB_PER_POD: u64 = 200;
/// The number of pods that are measured together, after a first one that initializes the process.
const PODS: u64 = 16;
/// The time in which wake-ups are counted: two intervals of the checks that every pod needs.
const COUNTED: Duration = Duration::from_secs(10);
/// The maximum number of wake-ups in that time. One check of one pod wakes the process up to three
/// times, as tokio's timers approach an instant in up to three steps.
const MAX_WAKEUPS: u64 = 2 * PODS;

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("an idle pod needs less than 200 KiB, no thread and no wake-up", idle_pod_cost);
    suite.run()
}

async fn idle_pod_cost() {
    let world = World::new();
    let pki = Pki::new(world.folder());
    let mut pods = Vec::new();
    for number in 0..=PODS {
        pods.push(world.pod(&format!("pod-{number}")).await);
    }
    let first = pods.first().expect("a pod");
    let mesh = Mesh::default().write(first, "mesh");
    let settings = |name: &str| Settings::new(name).identity(&pki.issue(name)).mesh(&mesh);
    let node = TestNode::start(&settings("node").load(first), 2).expect("a node");
    let mut served = Vec::new();
    let (mut memory, mut tasks) = (0, 0);
    for pod in &pods {
        let settings = settings(pod.name()).load(pod);
        served.push(node.add_pod(settings, pod.namespace().clone()).await.expect("a pod"));
        if served.len() == 1 {
            (memory, tasks) = (private_kib(), threads());
        }
    }
    let each = private_kib().saturating_sub(memory) / PODS;
    assert!(each < MAX_KIB_PER_POD, "{each} KiB");
    // Threads that close netlink sockets end by themselves.
    until("as few threads as with one pod", async || threads() <= tasks).await;
    let before = wakeups();
    // Nothing to wait for: the wake-ups of a period are counted.
    timeout(COUNTED, pending::<()>()).await.ok();
    let count = wakeups().saturating_sub(before);
    assert!(count < MAX_WAKEUPS, "{count} wake-ups in {COUNTED:?}");
}

/// The number of times that the threads of this process have waited. Preemptions do not count,
/// because they depend on the load of the machine.
fn wakeups() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").expect("its threads");
    let counts = tasks.filter_map(|task| {
        let status = fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    counts.sum()
}

/// The memory of this process that it shares with no other process (proc_pid_smaps(5)).
fn private_kib() -> u64 {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").expect("its memory");
    let private = rollup.lines().filter(|line| line.starts_with("Private_"));
    let kib = private.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.sum()
}

/// The number of threads, except those that a runtime starts for file operations.
fn threads() -> usize {
    let names = fs::read_dir("/proc/self/task").expect("its threads").filter_map(|task| {
        let name = fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
        Some(name.trim_end().to_owned())
    });
    names.filter(|name| !name.starts_with("tokio-")).count()
}

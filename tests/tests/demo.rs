//! Tests of `underpass demo` and `demo --node`: as root, without privileges, and kept running.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::Command;
use underpass_tests::{binary, skipped, within};

async fn run(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    within("the command ends", output).await.expect("it runs")
}

/// Asserts that a demonstration has `count` checks, and that all passed.
fn assert_checks_passed(output: &Output, count: usize) {
    let printed = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{printed}{error}");
    let points =
        |mark: &str| printed.lines().filter(|line| line.trim_start().starts_with(mark)).count();
    assert_eq!((points("✓"), points("✗")), (count, 0), "{printed}{error}");
}

#[tokio::test]
async fn demo_passes_every_check() {
    if skipped() {
        return;
    }
    assert_checks_passed(&run(Command::new(binary()).arg("demo")).await, 6);
}

#[tokio::test]
async fn node_demo_passes_every_check() {
    if skipped() {
        return;
    }
    assert_checks_passed(&run(Command::new(binary()).args(["demo", "--node"])).await, 8);
}

#[tokio::test]
async fn demos_pass_every_check_without_root() {
    // For an unprivileged caller, the previous test covers this case.
    if skipped() || !geteuid().is_root() {
        return;
    }
    let folder = std::env::temp_dir().join(format!("underpass-demo-{}", std::process::id()));
    let program = folder.join("underpass");
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).expect("readable");
    // Another process copies the binary. A child that this process starts meanwhile would inherit
    // the open file, and the kernel would refuse to execute it (ETXTBSY).
    assert!(run(Command::new("cp").arg(binary()).arg(&program)).await.status.success());
    let unprivileged = ["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"];
    let mut outputs = Vec::new();
    for (demo, points) in [(&["demo"][..], 6), (&["demo", "--node"], 8)] {
        let mut command = Command::new("setpriv");
        outputs.push((run(command.args(unprivileged).arg(&program).args(demo)).await, points));
    }
    std::fs::remove_dir_all(&folder).expect("removed");
    for (output, points) in &outputs {
        assert_checks_passed(output, *points);
    }
}

#[tokio::test]
async fn demo_with_keep_runs_until_ctrl_c() {
    if skipped() {
        return;
    }
    let mut demo = Command::new(binary());
    demo.args(["demo", "--keep"]).stdout(Stdio::piped()).kill_on_drop(true);
    let mut demo = demo.spawn().expect("it runs");
    let mut lines = BufReader::new(demo.stdout.take().expect("a pipe")).lines();
    let mut commands = Vec::new();
    while commands.len() < 4 {
        let line = within("four commands", lines.next_line()).await.expect("it can be read");
        let line = line.expect("the demo prints four commands");
        if line.trim_start().starts_with("nsenter ") {
            commands.push(line.trim().to_owned());
        }
    }
    for (tool, answer) in [
        ("curl -s http://10", "hello from the server"),
        ("nft ", "capture-outbound"),
        ("/metrics", "istio_tcp_"),
    ] {
        let command =
            commands.iter().find(|command| command.contains(tool)).expect("the command is printed");
        let output = run(Command::new("sh").args(["-c", command])).await;
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(
            printed.contains(answer),
            "{command}: {printed}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let pid = demo.id().and_then(|pid| i32::try_from(pid).ok()).expect("the demo is running");
    kill(Pid::from_raw(pid), Signal::SIGINT).expect("a signal");
    let status = within("it ends", demo.wait()).await.expect("it ends");
    assert_eq!(status.code(), Some(0));
    let mut rest = String::new();
    within("the end of its output", lines.into_inner().read_to_string(&mut rest))
        .await
        .expect("text");
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

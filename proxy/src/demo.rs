//! `underpass demo`: sends real HTTP between pods with proxies, and verifies the result.
//!
//! It uses real rules, processes of the binary and a packet capture. Its new namespaces end with
//! the process; the host is not changed.

mod evidence;
mod node;
mod setup;
mod sidecar;
mod web;

use std::io::{self, Write};
use std::time::Duration;

use thiserror::Error;
use tokio::time::Instant;
use underpass_hbone::HboneError;
use underpass_interception::{InterceptionError, Sandbox, enter_sandbox};

use crate::spawn::SpawnError;
use evidence::Finding;

/// Timeout of each step.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: two nodes, and commands to look around\n  underpass demo --node --keep"
)]
pub(crate) struct Arguments {
    /// Demonstrate the node daemon: two nodes with two pods each, instead of two pods with a proxy
    /// each
    #[arg(long)]
    node: bool,
    /// Keep the demonstration running until Ctrl-C, and print the commands to enter it
    #[arg(long)]
    keep: bool,
}

/// Why the demonstration failed.
#[derive(Debug, Error)]
pub(crate) enum DemoError {
    #[error(transparent)]
    Sandbox(InterceptionError),
    #[error("cannot {doing}")]
    Namespace { doing: &'static str, source: InterceptionError },
    #[error("cannot {doing}")]
    Io { doing: &'static str, source: io::Error },
    #[error("cannot create the certificates")]
    Certificates(#[source] HboneError),
    #[error("the proxy of {subject}")]
    Proxy { subject: &'static str, source: SpawnError },
    #[error("the daemon of {node} did not log {line:?} in time, but:\n{log}")]
    Daemon { node: &'static str, line: String, log: String },
    #[error("the demonstration failed: not every check passed")]
    Disproved,
}

impl DemoError {
    fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }

    fn namespace(doing: &'static str) -> impl FnOnce(InterceptionError) -> Self {
        move |source| Self::Namespace { doing, source }
    }
}

/// Runs the demonstration. Fails unless every check passes.
pub(crate) fn run(arguments: &Arguments) -> Result<(), DemoError> {
    // Only a single-threaded process can enter a user namespace.
    let sandbox = enter_sandbox().map_err(DemoError::Sandbox)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(DemoError::io("start a runtime"))?;
    runtime.block_on(async {
        if arguments.node {
            demonstrate_nodes(sandbox, arguments.keep).await
        } else {
            demonstrate_sidecars(sandbox, arguments.keep).await
        }
    })
}

async fn demonstrate_sidecars(sandbox: Sandbox, keep: bool) -> Result<(), DemoError> {
    let began = Instant::now();
    let mut stage = sidecar::stage::Stage::set_up().await?;
    let points = sidecar::verify(&stage).await?;
    let enter = keep.then(|| stage.enter_commands(sandbox));
    conclude(sidecar::TITLE, &points, began, enter).await?;
    stage.take_down().await;
    verdict(&points)
}

async fn demonstrate_nodes(sandbox: Sandbox, keep: bool) -> Result<(), DemoError> {
    let began = Instant::now();
    let mut stage = node::stage::Stage::set_up().await?;
    let points = node::verify(&mut stage).await?;
    let enter = keep.then(|| stage.enter_commands(sandbox));
    conclude(node::TITLE, &points, began, enter).await?;
    stage.take_down().await;
    verdict(&points)
}

/// Prints the result. If there are commands to enter the pods, prints these and waits for Ctrl-C.
async fn conclude(
    title: &str,
    points: &[Finding],
    began: Instant,
    enter_commands: Option<String>,
) -> Result<(), DemoError> {
    show(title, points, began.elapsed(), enter_commands.as_deref())
        .map_err(DemoError::io("write"))?;
    if enter_commands.is_some() {
        tokio::signal::ctrl_c().await.map_err(DemoError::io("wait for Ctrl-C"))?;
    }
    Ok(())
}

fn verdict(points: &[Finding]) -> Result<(), DemoError> {
    if points.iter().all(|point| point.holds) { Ok(()) } else { Err(DemoError::Disproved) }
}

fn show(
    title: &str,
    points: &[Finding],
    took: Duration,
    enter_commands: Option<&str>,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "underpass demo: {title}\n")?;
    for point in points {
        let mark = if point.holds { "✓" } else { "✗" };
        writeln!(out, "  {mark} {:<12} {}", point.subject, point.seen)?;
    }
    let proven = points.iter().filter(|point| point.holds).count();
    writeln!(
        out,
        "\n{proven} of {} points hold; {:.1} s, all of it in namespaces of its own.",
        points.len(),
        took.as_secs_f32()
    )?;
    if let Some(enter_commands) = enter_commands {
        writeln!(out, "{enter_commands}")?;
    }
    out.flush()
}

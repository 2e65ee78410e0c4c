//! `underpass admin`: reads and changes the state of a running proxy.

use std::io::{self, Write as _};
use std::time::Duration;

use http::Method;
use http_body_util::BodyExt as _;
use tokio::time::sleep;

use super::admin_client::{ProxyArguments, with_parameter, with_parameters};
use super::layout::count;
use super::{print, single_threaded_runtime};
use crate::admin::api::drain::{Drain, Renewed, State};
use crate::admin::api::logging::Logging;
use crate::admin::client::AdminClientError;
use crate::process::command_error::CommandError;

/// The interval at which `drain` asks whether it has ended.
const DRAIN_INTERVAL: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Print an answer of the running proxy
    #[command(after_help = "Example:\n  underpass admin get /version")]
    Get {
        /// The path; `/` lists all paths
        path: String,
        #[command(flatten)]
        proxy: ProxyArguments,
    },
    /// Take a pod out of use before maintenance: refuse new inbound connections, wait for the open
    /// ones, and terminate the rest after the deadline
    #[command(
        after_help = "Example:\n  underpass admin drain shop/web-1 --deadline 5m\n\nExit codes: 0 the pod is drained, 1 the drain was ended before, or another failure."
    )]
    Drain {
        /// The pod; by default the only one of `underpass run`
        #[arg(value_name = "NAMESPACE/NAME")]
        pod: Option<String>,
        /// The time for open inbound connections to end, such as 30s; by default timeouts.drain
        #[arg(long, value_name = "DURATION")]
        deadline: Option<String>,
        #[command(flatten)]
        proxy: ProxyArguments,
    },
    /// End the drain of a pod: accept inbound connections again
    #[command(after_help = "Example:\n  underpass admin undrain shop/web-1")]
    Undrain {
        /// The pod; by default the only one of `underpass run`
        #[arg(value_name = "NAMESPACE/NAME")]
        pod: Option<String>,
        #[command(flatten)]
        proxy: ProxyArguments,
    },
    /// Replace the tunnels that a pod has opened: each closes with its last stream, and new
    /// connections open new ones
    #[command(after_help = "Example:\n  underpass admin renew-tunnels shop/web-1")]
    RenewTunnels {
        /// The pod; by default the only one of `underpass run`
        #[arg(value_name = "NAMESPACE/NAME")]
        pod: Option<String>,
        #[command(flatten)]
        proxy: ProxyArguments,
    },
    /// Show or change the filter of the log until the proxy ends
    #[command(
        after_help = "Example:\n  underpass admin log info,access=off\n  underpass admin log --reset"
    )]
    Log {
        /// The new filter, as in logging.filter
        #[arg(conflicts_with = "reset")]
        filter: Option<String>,
        /// Restore the filter of the settings
        #[arg(long)]
        reset: bool,
        #[command(flatten)]
        proxy: ProxyArguments,
    },
}

pub(super) fn run(command: Command) -> Result<(), CommandError> {
    let runtime = single_threaded_runtime()?;
    match command {
        Command::Get { path, proxy } => runtime.block_on(get(&path, proxy)),
        Command::Drain { pod, deadline, proxy } => {
            runtime.block_on(drain(pod.as_deref(), deadline.as_deref(), proxy))
        }
        Command::Undrain { pod, proxy } => runtime.block_on(undrain(pod.as_deref(), proxy)),
        Command::RenewTunnels { pod, proxy } => {
            runtime.block_on(renew_tunnels(pod.as_deref(), proxy))
        }
        Command::Log { filter, reset, proxy } => runtime.block_on(log(filter, reset, proxy)),
    }
}

async fn get(path: &str, proxy: ProxyArguments) -> Result<(), CommandError> {
    let mut client = proxy.connect().await?;
    let mut body = client.request(Method::GET, path).await?.into_body();
    let mut output = io::stdout();
    while let Some(frame) = body.frame().await {
        if let Ok(chunk) = frame.map_err(AdminClientError::from)?.into_data() {
            output.write_all(&chunk).map_err(CommandError::Output)?;
        }
    }
    output.flush().map_err(CommandError::Output)
}

/// Waits for the end of the drain, which goes on if this command is interrupted.
async fn drain(
    pod: Option<&str>,
    deadline: Option<&str>,
    proxy: ProxyArguments,
) -> Result<(), CommandError> {
    let mut client = proxy.connect().await?;
    let begin = with_parameters("/drain", &[("pod", pod), ("deadline", deadline)]);
    let mut drain: Drain = client.json(Method::POST, &begin).await?;
    let path = with_parameters("/drain", &[("pod", Some(&drain.pod))]);
    let mut shown = None;
    while drain.state == State::Draining {
        if drain.inbound > 0 && shown.replace(drain.inbound) != Some(drain.inbound) {
            let Drain { pod, inbound, seconds_left, .. } = &drain;
            let left = seconds_left.map(|left| format!(", {left} s left")).unwrap_or_default();
            print(&format!("draining {pod}: {}{left}\n", inbound_connections(*inbound)))?;
        }
        sleep(DRAIN_INTERVAL).await;
        drain = client.json(Method::GET, &path).await?;
    }
    print(&result(drain)?)
}

/// The line about a drain that has ended.
fn result(Drain { pod, state, terminated, .. }: Drain) -> Result<String, CommandError> {
    match (state, terminated) {
        (State::Drained, 0) => Ok(format!("{pod} is drained\n")),
        (State::Drained, _) => {
            Ok(format!("{pod} is drained: {} terminated\n", inbound_connections(terminated)))
        }
        (State::Serving | State::Draining, _) => Err(CommandError::DrainEnded(pod)),
    }
}

fn inbound_connections(number: usize) -> String {
    count(number, "inbound connection")
}

async fn undrain(pod: Option<&str>, proxy: ProxyArguments) -> Result<(), CommandError> {
    let path = with_parameters("/undrain", &[("pod", pod)]);
    let Drain { pod, .. } = proxy.connect().await?.json(Method::POST, &path).await?;
    print(&format!("{pod} accepts inbound connections\n"))
}

async fn renew_tunnels(pod: Option<&str>, proxy: ProxyArguments) -> Result<(), CommandError> {
    let path = with_parameters("/renew_tunnels", &[("pod", pod)]);
    let Renewed { pod } = proxy.connect().await?.json(Method::POST, &path).await?;
    print(&format!("closing the tunnels of {pod}\n"))
}

async fn log(
    filter: Option<String>,
    reset: bool,
    proxy: ProxyArguments,
) -> Result<(), CommandError> {
    let (method, path) = match filter {
        Some(filter) => (Method::POST, with_parameter("/logging", "filter", &filter)),
        None if reset => (Method::POST, "/logging?reset".to_owned()),
        None => (Method::GET, "/logging".to_owned()),
    };
    let current: Logging = proxy.connect().await?.json(method, &path).await?;
    print(&format!("{}\n", current.filter))
}

#[cfg(test)]
mod tests {
    use std::process::ExitCode;

    use underpass_config::Hint as _;

    use super::*;

    #[test]
    fn drain_that_was_ended_is_an_error_with_a_hint() {
        let ended = |state, terminated| {
            let pod = "shop/web-1".to_owned();
            result(Drain { pod, state, inbound: 0, seconds_left: None, terminated })
        };
        assert_eq!(ended(State::Drained, 0).expect("a line"), "shop/web-1 is drained\n");
        let line = "shop/web-1 is drained: 2 inbound connections terminated\n";
        assert_eq!(ended(State::Drained, 2).expect("a line"), line);
        let error = ended(State::Serving, 0).expect_err("an error");
        assert!(error.to_string().starts_with("the drain of shop/web-1 was ended"), "{error}");
        assert_eq!(error.hint().as_deref(), Some("begin it again with `underpass admin drain`"));
        assert_eq!(error.exit_code(), ExitCode::FAILURE);
    }
}

//! `underpass admin`: reads and changes the state of a running proxy.

use std::io::{self, Write as _};

use http::Method;
use http_body_util::BodyExt as _;

use super::admin_client::{ProxyArguments, with_parameter};
use super::{print, single_threaded_runtime};
use crate::admin::api::drain::Drained;
use crate::admin::api::logging::Logging;
use crate::admin::client::AdminClientError;
use crate::process::command_error::CommandError;

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
    /// Replace the tunnels that a pod has opened: each closes with its last stream, and new
    /// connections open new ones
    #[command(after_help = "Example:\n  underpass admin drain shop/web-1")]
    Drain {
        /// The pod
        #[arg(value_name = "NAMESPACE/NAME")]
        pod: String,
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
        Command::Drain { pod, proxy } => runtime.block_on(drain(&pod, proxy)),
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

async fn drain(pod: &str, proxy: ProxyArguments) -> Result<(), CommandError> {
    let path = with_parameter("/drain", "pod", pod);
    let Drained { pod } = proxy.connect().await?.json(Method::POST, &path).await?;
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

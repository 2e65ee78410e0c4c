//! `underpass status`: what a running proxy does, on one screen.

mod text;

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use http::Method;

use self::text::screen;
use super::admin_client::{ProxyArguments, with_parameter};
use super::rules::Output;
use super::single_threaded_runtime;
use super::style::Style;
use crate::admin::api::status::Status;
use crate::error::Described;
use crate::process::command_error::CommandError;

/// The interval of `--watch`.
const INTERVAL: Duration = Duration::from_secs(2);
/// Clears a terminal, and moves the cursor to its first column (ECMA-48: ED, CUP).
const CLEAR: &str = "\u{1b}[2J\u{1b}[H";

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only this pod of a node: NAMESPACE/NAME
    #[arg(long)]
    pod: Option<String>,
    /// Show the status every two seconds until interrupted
    #[arg(long, short = 'w')]
    watch: bool,
    /// Print no status, only an error if the proxy is not healthy: for the health check of a
    /// container
    #[arg(long, short = 'q', conflicts_with = "watch")]
    quiet: bool,
    /// The output format; with --watch, JSON has one value a line
    #[arg(long, short = 'o', visible_alias = "format", value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(flatten)]
    proxy: ProxyArguments,
}

impl Arguments {
    fn path(&self) -> String {
        match &self.pod {
            Some(pod) => with_parameter("/status", "pod", pod),
            None => "/status".to_owned(),
        }
    }

    async fn ask(&self) -> Result<Status, CommandError> {
        let mut client = self.proxy.clone().connect().await?;
        Ok(client.json(Method::GET, &self.path()).await?)
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<(), CommandError> {
    let runtime = single_threaded_runtime()?;
    if arguments.watch {
        return runtime.block_on(watch(arguments));
    }
    let status = runtime.block_on(arguments.ask())?;
    if !arguments.quiet {
        write(&rendered(&status, arguments.output)?)?;
    }
    match status.problems.len() {
        0 => Ok(()),
        problems => Err(CommandError::Unhealthy { problems }),
    }
}

/// Shows the status again and again. A proxy that does not answer may be restarting.
async fn watch(arguments: &Arguments) -> Result<(), CommandError> {
    let mut ticks = tokio::time::interval(INTERVAL);
    let clear = io::stdout().is_terminal() && arguments.output == Output::Text;
    loop {
        ticks.tick().await;
        let text = match arguments.ask().await {
            Ok(status) => rendered(&status, arguments.output)?,
            Err(error @ CommandError::Config(_)) => return Err(error),
            Err(error) if arguments.output == Output::Text => {
                let Described { error, hint } = Described::new(&error);
                let hint = hint.map(|hint| format!("hint: {hint}\n")).unwrap_or_default();
                format!("error: {error}\n{hint}")
            }
            Err(error) => return Err(error),
        };
        let before = if clear { CLEAR } else { "" };
        write(&format!("{before}{text}"))?;
    }
}

fn rendered(status: &Status, output: Output) -> Result<String, CommandError> {
    match output {
        Output::Text => Ok(screen(status, Style::of_stdout())),
        Output::Json => {
            let json = serde_json::to_string(status).map_err(io::Error::from);
            Ok(json.map_err(CommandError::Output)? + "\n")
        }
    }
}

fn write(text: &str) -> Result<(), CommandError> {
    let mut output = io::stdout();
    output.write_all(text.as_bytes()).and_then(|()| output.flush()).map_err(CommandError::Output)
}

//! How much a command prints.

/// The options `--verbose` and `--quiet`.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub(super) struct Verbosity {
    /// Print details of sound parts too
    #[arg(long, short, conflicts_with = "quiet")]
    pub(super) verbose: bool,
    /// Print nothing about sound parts
    #[arg(long, short)]
    pub(super) quiet: bool,
}

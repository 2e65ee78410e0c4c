//! Runs the iptables programs, and translates their output into errors.
//!
//! A program acts on the network namespace of the thread that starts it. `ruleset` builds the
//! input.

use std::fs::{File, OpenOptions};
use std::io;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use super::Variant;
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::{Family, TABLES};
use crate::process::privileges::lacks_net_admin;

/// The time in seconds that a program waits for the lock, which only the legacy variant has.
const LOCK_WAIT: &str = "30";
/// The timeout of a program, including the wait for the lock.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(60);
/// The lock file of legacy iptables.
const LOCK: &str = "/run/xtables.lock";

/// Prints the rulesets of all programs. Creates no tables, with one exception: a process without
/// root cannot list legacy tables, so it prints each by name, which creates the table.
pub(super) async fn save(
    entered: &Entered,
    operation: &'static str,
    variant: Variant,
    family: Family,
) -> Result<String, InterceptionError> {
    let mut printed = Vec::new();
    for arguments in save_arguments(entered, variant, family) {
        let (program, output) =
            run_variant(entered, variant, family, "save", &arguments, "").await?;
        printed.extend(check(operation, variant, family, program, output)?);
    }
    Ok(String::from_utf8_lossy(&printed).into_owned())
}

/// The command lines whose output together contains all tables.
fn save_arguments(_: &Entered, variant: Variant, family: Family) -> Vec<Vec<&'static str>> {
    let names = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    let unlisted = |error: io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    if variant == Variant::Legacy && File::open(names).is_err_and(unlisted) {
        return TABLES.map(|table| vec!["--counters", "--table", table.name()]).into();
    }
    vec![vec!["--counters"]]
}

/// Applies `body` by `iptables-restore`.
pub(super) async fn restore(
    entered: &Entered,
    operation: &'static str,
    variant: Variant,
    family: Family,
    body: &str,
) -> Result<(), InterceptionError> {
    let arguments: &[&str] = match variant {
        Variant::Legacy => &["--noflush", "--wait", LOCK_WAIT],
        Variant::Nft => &["--noflush"],
    };
    let (program, output) =
        run_variant(entered, variant, family, "restore", arguments, body).await?;
    check(operation, variant, family, program, output).map(|_| ())
}

/// Checks that a variant's programs for this family are installed.
pub(super) async fn find(
    entered: &Entered,
    variant: Variant,
    family: Family,
) -> Result<(), InterceptionError> {
    for tool in ["restore", "save"] {
        run_variant(entered, variant, family, tool, &["--version"], "").await?;
    }
    Ok(())
}

/// Runs a program of a variant: `iptables-legacy-save`, or `iptables-save` if only that is
/// installed and belongs to the variant. Returns its name and output.
async fn run_variant(
    entered: &Entered,
    variant: Variant,
    family: Family,
    tool: &str,
    arguments: &[&str],
    input: &str,
) -> Result<(String, Output), InterceptionError> {
    let base = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    let named = format!("{base}-{}-{tool}", variant.suffix());
    let absent = match run(entered, &named, arguments, input).await {
        Ok(output) => return Ok((named, output)),
        Err(error) if error.is_missing_program() => error,
        Err(error) => return Err(error),
    };
    let plain = format!("{base}-{tool}");
    if plain_variant(entered, &plain).await? != Some(variant) {
        return Err(absent);
    }
    let output = run(entered, &plain, arguments, input).await?;
    Ok((plain, output))
}

/// The variant of a program without a suffix. `None` if it is not installed.
async fn plain_variant(
    entered: &Entered,
    program: &str,
) -> Result<Option<Variant>, InterceptionError> {
    let output = match run(entered, program, &["--version"], "").await {
        Ok(output) => output,
        Err(error) if error.is_missing_program() => return Ok(None),
        Err(error) => return Err(error),
    };
    // `iptables-restore v1.8.9 (nf_tables)`. Versions before 1.8 print no variant and are legacy.
    let version = String::from_utf8_lossy(&output.stdout);
    Ok(Some(if version.contains("nf_tables") { Variant::Nft } else { Variant::Legacy }))
}

async fn run(
    entered: &Entered,
    program: &str,
    arguments: &[&str],
    input: &str,
) -> Result<Output, InterceptionError> {
    let done = timeout(PROGRAM_TIMEOUT, communicate(entered, program, arguments, input)).await;
    let done = done.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    done.map_err(|source| InterceptionError::IptablesProgram {
        program: program.to_owned(),
        source,
    })
}

async fn communicate(
    _: &Entered,
    program: &str,
    arguments: &[&str],
    input: &str,
) -> io::Result<Output> {
    let mut command = Command::new(program);
    command.args(arguments).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if OpenOptions::new().create(true).append(true).open(LOCK).is_err() {
        // The lock file cannot be created on a read-only root file system, so lock the file of the
        // network namespace.
        command.env("XTABLES_LOCKFILE", "/proc/self/ns/net");
    }
    let mut child = command.spawn()?;
    let stdin = child.stdin.take();
    let write = async {
        let Some(mut stdin) = stdin else { return Ok(()) };
        match stdin.write_all(input.as_bytes()).await {
            // The program stopped reading. Its exit status says why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    };
    let (written, output) = tokio::join!(write, child.wait_with_output());
    written?;
    output
}

/// Returns the standard output of a program, or an error if it failed.
fn check(
    operation: &'static str,
    variant: Variant,
    family: Family,
    program: String,
    output: Output,
) -> Result<Vec<u8>, InterceptionError> {
    if output.status.success() {
        return Ok(output.stdout);
    }
    let printed = String::from_utf8_lossy(&output.stderr);
    if printed.contains("Permission denied (you must be root)") {
        // Legacy iptables uses a raw socket, which needs NET_RAW.
        let raw = variant == Variant::Legacy && !lacks_net_admin();
        let capability = if raw { "NET_RAW" } else { "NET_ADMIN" };
        return Err(InterceptionError::NotPermitted { operation, capability });
    }
    let module = missing_module(&printed, family);
    let message = match summary(&printed) {
        message if message.is_empty() => output.status.to_string(),
        message => message,
    };
    Err(InterceptionError::Iptables { operation, program, message, module })
}

/// Joins the output to one line, without advice that does not apply here.
fn summary(printed: &str) -> String {
    let lines = printed.lines().map(str::trim);
    let useful = lines.filter(|line| {
        !line.is_empty() && !line.starts_with("Try `") && !line.starts_with("# Warning")
    });
    useful.collect::<Vec<_>>().join("; ").replace(":; ", ": ")
}

/// The kernel module whose absence explains the output. Often `None`: legacy iptables reports only
/// a line number.
fn missing_module(printed: &str, family: Family) -> Option<&'static str> {
    if let Some((_, rest)) = printed.split_once("unable to initialize table '") {
        let (table, _) = rest.split_once('\'')?;
        return table_module(table, family);
    }
    // libxtables prints: "Extension owner revision 0 not supported, missing kernel module?"
    let extension = printed.lines().find_map(|line| {
        let (_, rest) = line.split_once("Extension ")?;
        rest.contains("missing kernel module").then(|| rest.split(' ').next())?
    });
    if let Some(extension) = extension {
        return extension_module(extension, family);
    }
    let absent = |operation: &str| {
        printed.contains(&format!("{operation} failed (No such file or directory)"))
            || printed.contains(&format!("{operation} failed (Operation not supported)"))
    };
    if printed.contains("Failed to initialize nft") || absent("TABLE_ADD") {
        return Some("nf_tables");
    }
    if absent("CHAIN_ADD") {
        return Some("nft_chain_nat");
    }
    absent("RULE_APPEND").then_some("nft_compat")
}

fn table_module(table: &str, family: Family) -> Option<&'static str> {
    Some(match (table, family) {
        ("nat", Family::V4) => "iptable_nat",
        ("nat", Family::V6) => "ip6table_nat",
        ("mangle", Family::V4) => "iptable_mangle",
        ("mangle", Family::V6) => "ip6table_mangle",
        ("raw", Family::V4) => "iptable_raw",
        ("raw", Family::V6) => "ip6table_raw",
        ("filter", Family::V4) => "iptable_filter",
        ("filter", Family::V6) => "ip6table_filter",
        _ => return None,
    })
}

fn extension_module(extension: &str, family: Family) -> Option<&'static str> {
    Some(match (extension, family) {
        ("tcp" | "udp", _) => "xt_tcpudp",
        ("multiport", _) => "xt_multiport",
        ("owner", _) => "xt_owner",
        ("conntrack", _) => "xt_conntrack",
        ("mark" | "MARK", _) => "xt_mark",
        ("connmark" | "CONNMARK", _) => "xt_connmark",
        ("CT", _) => "xt_CT",
        ("TPROXY", _) => "xt_TPROXY",
        ("REDIRECT", _) => "xt_REDIRECT",
        ("REJECT", Family::V4) => "ipt_REJECT",
        ("REJECT", Family::V6) => "ip6t_REJECT",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_names_missing_module() {
        for (printed, family, module) in [
            (
                "Warning: Extension owner revision 0 not supported, missing kernel module?\n\
                 iptables-restore: line 5 failed",
                Family::V4,
                Some("xt_owner"),
            ),
            (
                "ip6tables-restore v1.8.9 (legacy): ip6tables-restore: unable to initialize table 'nat'",
                Family::V6,
                Some("ip6table_nat"),
            ),
            (
                "CHAIN_ADD failed (No such file or directory): chain OUTPUT",
                Family::V4,
                Some("nft_chain_nat"),
            ),
            (
                "iptables: Failed to initialize nft: Protocol not supported",
                Family::V4,
                Some("nf_tables"),
            ),
            ("iptables-restore: line 5 failed", Family::V4, None),
        ] {
            assert_eq!(missing_module(printed, family), module, "{printed}");
        }
    }

    #[test]
    fn message_is_one_line_without_help_advice() {
        let printed = "iptables-restore v1.8.9 (legacy): Couldn't load target `FOO':No such file or \
                       directory\n\nError occurred at line: 3\nTry `iptables-restore -h' or \
                       'iptables-restore --help' for more information.\n";
        let message = "iptables-restore v1.8.9 (legacy): Couldn't load target `FOO':No such file or \
                       directory; Error occurred at line: 3";
        assert_eq!(summary(printed), message);
    }
}

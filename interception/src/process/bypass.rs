//! Finds processes that can bypass the rules, as far as /proc shows them.
//!
//! NET_ADMIN can change the rules. NET_RAW can set the proxy's mark (socket(7), since Linux 5.17)
//! and send frames that bypass netfilter (packet(7)). SETUID and SETGID can change to the proxy's
//! user. Container runtimes grant the last three by default.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use underpass_config::Profile;

use crate::namespace::Entered;

/// A process that can bypass the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BypassingProcess {
    /// The process id.
    pub pid: u32,
    /// The command name.
    pub name: String,
    /// The capabilities that allow the bypass, without `CAP_`.
    pub capabilities: Vec<&'static str>,
}

impl fmt::Display for BypassingProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, name, capabilities } = self;
        write!(f, "{name:?} (pid {pid}): {}", capabilities.join(", "))
    }
}

/// Finds other processes in this network and user namespace that can bypass the rules of `profile`.
///
/// Misses processes that are unreadable or that the PID namespace hides: an empty result proves
/// nothing. Skips processes with this program's name, which may be another proxy during a hot
/// restart.
///
/// # Errors
///
/// /proc cannot be read.
pub(crate) fn bypassing_processes(
    _: &Entered,
    profile: Profile,
) -> io::Result<Vec<BypassingProcess>> {
    // Read the name of the process, because a thread has its own name. Only the namespaces are the
    // thread's.
    let own = Process::read(Path::new("/proc/self"))?;
    let here = namespaces(Path::new("/proc/thread-self"))?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // The process may have ended, or may be unreadable.
        let Ok(process) = Process::read(&entry.path()) else { continue };
        let capabilities = bypassing_capabilities(profile, process.effective);
        let is_here = process.namespaces == here && process.name != own.name;
        if is_here && !capabilities.is_empty() {
            found.push(BypassingProcess { pid, name: process.name, capabilities });
        }
    }
    Ok(found)
}

/// The capabilities in `effective` that allow bypassing the rules.
fn bypassing_capabilities(profile: Profile, effective: u64) -> Vec<&'static str> {
    /// include/uapi/linux/capability.h.
    const ALL: [(u32, &str); 4] =
        [(12, "NET_ADMIN"), (13, "NET_RAW"), (7, "SETUID"), (6, "SETGID")];
    let rules_match_users = matches!(profile, Profile::Sidecar | Profile::Osm);
    let counted = ALL.into_iter().take(if rules_match_users { 4 } else { 2 });
    counted.filter(|(bit, _)| effective & (1 << bit) != 0).map(|(_, name)| name).collect()
}

/// The facts about a process that /proc shows.
#[derive(Debug)]
struct Process {
    name: String,
    effective: u64,
    /// The network and the user namespace. A capability applies to the namespaces that the user
    /// namespace owns.
    namespaces: [String; 2],
}

impl Process {
    fn read(folder: &Path) -> io::Result<Self> {
        let (name, effective) = status(&fs::read_to_string(folder.join("status"))?)
            .ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { name, effective, namespaces: namespaces(folder)? })
    }
}

fn namespaces(folder: &Path) -> io::Result<[String; 2]> {
    let namespace = |kind: &str| -> io::Result<String> {
        let link = fs::read_link(folder.join("ns").join(kind))?;
        Ok(link.to_string_lossy().into_owned())
    };
    Ok([namespace("net")?, namespace("user")?])
}

/// Parses the name and effective capabilities in a status file (proc_pid_status(5)).
fn status(text: &str) -> Option<(String, u64)> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let effective = u64::from_str_radix(field("CapEff:")?, 16).ok()?;
    Some((field("Name:")?.to_owned(), effective))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_name_and_capabilities_of_a_status_file() {
        let text = "Name:\tsh\nCapPrm:\t0000000000000000\nCapEff:\t0000000000002000\n";
        assert_eq!(status(text), Some(("sh".to_owned(), 1 << 13)));
        assert_eq!(status("Name:\tsh\nCapEff:\tnonsense\n"), None);
    }

    #[test]
    fn setuid_is_a_bypass_only_if_rules_match_users() {
        // Docker's default capabilities (moby/oci/caps/defaults.go) include NET_RAW, SETUID and
        // SETGID.
        let docker = 0xa804_25fb;
        assert_eq!(bypassing_capabilities(Profile::Ambient, docker), ["NET_RAW"]);
        assert_eq!(
            bypassing_capabilities(Profile::Sidecar, docker),
            ["NET_RAW", "SETUID", "SETGID"]
        );
        assert_eq!(bypassing_capabilities(Profile::Osm, 0), [""; 0]);
    }
}

//! Reads the resources of processes from `/proc`.

use std::fs;

/// `USER_HZ`, the unit of times in `/proc/PID/stat` (proc(5)): 100 on every supported architecture.
const TICKS_PER_SECOND: f64 = 100.0;

/// The total CPU time of the processes in seconds, user and system, with a resolution of 10 ms.
///
/// Work in interrupts is attributed to the process that was interrupted.
pub(crate) fn cpu_seconds(processes: &[u32]) -> f64 {
    let ticks = |process: &u32| {
        let stat =
            fs::read_to_string(format!("/proc/{process}/stat")).expect("the proxy still runs");
        cpu_ticks(&stat).expect("/proc/PID/stat is as proc(5) says")
    };
    processes.iter().map(ticks).sum::<f64>() / TICKS_PER_SECOND
}

/// A process and its children, such as a broker and its proxy process.
pub(crate) fn with_children(process: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("the process still runs");
    let children = tasks.flatten().flat_map(|task| {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        let ids = children.split_whitespace().filter_map(|id| id.parse().ok());
        ids.collect::<Vec<u32>>()
    });
    std::iter::once(process).chain(children).collect()
}

/// The resident memory of a process in KiB.
pub(crate) fn resident_kib(process: u32) -> f64 {
    let status =
        fs::read_to_string(format!("/proc/{process}/status")).expect("the proxy still runs");
    resident(&status).expect("/proc/PID/status is as proc(5) says")
}

/// The number of open files of a process.
pub(crate) fn open_files(process: u32) -> f64 {
    let files = fs::read_dir(format!("/proc/{process}/fd")).expect("the proxy still runs");
    f64::from(u32::try_from(files.count()).expect("far fewer"))
}

fn cpu_ticks(stat: &str) -> Option<f64> {
    // The second field is a name in parentheses that may contain any character. utime and stime are
    // fields 14 and 15.
    let (_, after_name) = stat.rsplit_once(") ")?;
    let mut fields = after_name.split(' ').skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn resident(status: &str) -> Option<f64> {
    let value = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    value.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_cpu_time_after_any_process_name() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 3 0 400 1000 200";
        assert_eq!(cpu_ticks(stat), Some(200.0));
    }

    #[test]
    fn parses_resident_memory_in_kib() {
        assert_eq!(resident("Name:\tx\nVmRSS:\t    8012 kB\nThreads:\t3\n"), Some(8012.0));
    }

    #[test]
    fn reads_memory_and_time_of_this_process() {
        assert!(resident_kib(std::process::id()) > 100.0);
        assert!(open_files(std::process::id()) > 2.0);
        assert!(cpu_seconds(&[std::process::id()]) >= 0.0);
    }
}

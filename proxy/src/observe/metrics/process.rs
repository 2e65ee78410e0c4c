//! Metrics of the process, with the names of Prometheus' client libraries.

use std::fs;
use std::sync::OnceLock;
use std::time::SystemTime;

use super::exposition::{Kind, Page};

const OPEN_FDS: &str = "process_open_fds";
const MAX_FDS: &str = "process_max_fds";
const RESIDENT: &str = "process_resident_memory_bytes";
const CPU: &str = "process_cpu_seconds_total";
const START: &str = "process_start_time_seconds";

/// The unit of CPU times in /proc: USER_HZ, 100 a second on every architecture that is supported.
const TICKS_PER_SECOND: f64 = 100.0;

static STARTED_AT: OnceLock<SystemTime> = OnceLock::new();

/// Records the start of the process.
pub(super) fn started() {
    STARTED_AT.get_or_init(SystemTime::now);
}

/// Appends the metrics that /proc shows.
pub(super) fn render(page: &mut Page) {
    let limits = fs::read_to_string("/proc/self/limits").ok();
    let status = fs::read_to_string("/proc/self/status").ok();
    let stat = fs::read_to_string("/proc/self/stat").ok();
    let started = STARTED_AT.get().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    let metrics = [
        (OPEN_FDS, Kind::Gauge, "Open file descriptors.", open_files()),
        (MAX_FDS, Kind::Gauge, "Limit of file descriptors.", limits.as_deref().and_then(max_files)),
        (RESIDENT, Kind::Gauge, "Resident memory.", status.as_deref().and_then(resident)),
        (CPU, Kind::Counter, "CPU time of all threads.", stat.as_deref().and_then(cpu)),
        (
            START,
            Kind::Gauge,
            "Start of the process, in seconds since 1970.",
            started.map(|at| at.as_secs_f64()),
        ),
    ];
    for (name, kind, help, value) in metrics {
        if let Some(value) = value {
            page.family(name, kind, help);
            page.line(format_args!("{name} {value}"));
        }
    }
}

/// The number of open files. The kernel reports it as the size of the folder since Linux 6.2;
/// before that, the entries are counted.
fn open_files() -> Option<f64> {
    const FILES: &str = "/proc/self/fd";
    let reported = fs::metadata(FILES).ok()?.len();
    let count = if reported > 0 { reported } else { fs::read_dir(FILES).ok()?.count() as u64 };
    Some(count as f64)
}

/// The soft limit in /proc/self/limits; `None` without one.
fn max_files(limits: &str) -> Option<f64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn resident(status: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024.0)
}

/// The user and system time in /proc/self/stat (proc_pid_stat(5), fields 14 and 15).
fn cpu(stat: &str) -> Option<f64> {
    // The second field is the name of the program in parentheses, which may contain spaces.
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some((next()? + next()?) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::super::exposition::Format;
    use super::*;

    #[test]
    fn reads_formats_of_proc() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\n\
                      Max open files            1024                 524288               files\n";
        assert_eq!(max_files(limits), Some(1024.0));
        assert_eq!(max_files(&limits.replace("1024", "unlimited")), None);
        assert_eq!(resident("VmPeak:\t 9 kB\nVmRSS:\t    7 kB\n"), Some(7168.0));
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 1 0 9 8 7";
        assert_eq!(cpu(stat), Some(2.0));
        assert_eq!(cpu("7 (a"), None);
    }

    #[test]
    fn own_process_has_all_metrics() {
        started();
        let mut page = Page::new(Format::Prometheus);
        render(&mut page);
        let text = page.into_text();
        for name in [OPEN_FDS, MAX_FDS, RESIDENT, CPU, START] {
            let value = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
            let value = value.unwrap_or_else(|| panic!("{name} is not in:\n{text}"));
            assert!(value.parse::<f64>().is_ok_and(|value| value >= 0.0), "{name} {value}");
        }
    }
}

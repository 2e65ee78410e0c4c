//! Reads the resources of an idle process.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use crate::process::{cpu_seconds, open_files};

/// The resources of a process.
#[derive(Debug, Clone, Copy)]
pub struct Idle {
    /// The memory that the process shares with no other process, in KiB (proc_pid_smaps(5)).
    pub private_kib: f64,
    /// The number of open files.
    pub descriptors: f64,
    /// The number of threads.
    pub threads: usize,
    /// The number of inotify instances.
    pub inotify: usize,
    /// How often the current threads have waited, each since its start. Preemptions do not count,
    /// since they depend on the load of the machine.
    pub wakeups: f64,
    /// The CPU time in seconds.
    pub cpu_seconds: f64,
}

impl Idle {
    /// Reads `/proc/PID` of the process and of its children: a node daemon is two processes.
    ///
    /// # Panics
    /// The process has ended, or belongs to another user.
    #[must_use]
    pub fn read(process: u32) -> Self {
        children(process).into_iter().map(Self::read).fold(Self::of_one(process), Self::plus)
    }

    fn plus(self, other: Self) -> Self {
        Self {
            private_kib: self.private_kib + other.private_kib,
            descriptors: self.descriptors + other.descriptors,
            threads: self.threads + other.threads,
            inotify: self.inotify + other.inotify,
            wakeups: self.wakeups + other.wakeups,
            cpu_seconds: self.cpu_seconds + other.cpu_seconds,
        }
    }

    fn of_one(process: u32) -> Self {
        let proc = PathBuf::from(format!("/proc/{process}"));
        let read = |file: &str| fs::read_to_string(proc.join(file)).expect("the process runs");
        let list = |folder: &str| {
            let entries = fs::read_dir(proc.join(folder)).expect("the process runs");
            entries.flatten().map(|entry| entry.path()).collect::<Vec<_>>()
        };
        let tasks = list("task");
        let status = |task: &PathBuf| fs::read_to_string(task.join("status")).unwrap_or_default();
        let is_inotify = |file: &PathBuf| {
            fs::read_link(file).is_ok_and(|target| target.as_os_str() == "anon_inode:inotify")
        };
        Self {
            private_kib: sum(&read("smaps_rollup"), "Private_"),
            descriptors: open_files(process),
            threads: tasks.len(),
            inotify: list("fd").iter().filter(|file| is_inotify(file)).count(),
            wakeups: tasks.iter().map(|task| wakeups(&status(task))).sum(),
            cpu_seconds: cpu_seconds(&[process]),
        }
    }
}

/// The children of a process (`CONFIG_PROC_CHILDREN`).
fn children(process: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let parse = |text: String| -> Vec<u32> {
        text.split_whitespace().filter_map(|child| child.parse().ok()).collect()
    };
    children.flat_map(parse).collect()
}

impl fmt::Display for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { private_kib, descriptors, threads, inotify, .. } = self;
        write!(
            f,
            "{private_kib} KiB private, {descriptors} descriptors, {threads} threads, {inotify} inotify instances"
        )
    }
}

/// The sum of the values on lines that begin with `start`, such as `Private_Dirty:  12 kB`.
fn sum(text: &str, start: &str) -> f64 {
    let values = text.lines().filter(|line| line.starts_with(start));
    values.filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok()).sum()
}

fn wakeups(status: &str) -> f64 {
    sum(status, "voluntary_ctxt_switches")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_wakeups_and_private_memory() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t2\n";
        assert_eq!(wakeups(status), 7.0);
        let rollup = "Rss: 99 kB\nPrivate_Clean: 10 kB\nPrivate_Dirty: 5 kB\n";
        assert_eq!(sum(rollup, "Private_"), 15.0);
    }

    #[test]
    fn reads_this_process() {
        let idle = Idle::of_one(std::process::id());
        assert!(idle.private_kib > 0.0 && idle.threads > 0 && idle.wakeups > 0.0, "{idle}");
    }
}

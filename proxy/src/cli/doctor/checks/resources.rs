//! Limited resources of the host, and its clock.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use underpass_config::{IdentitySettings, LocalSocket, PodSourceSettings, Settings};
use underpass_interception::{DiskUsage, HostFacts, Inotify, Usage, disk_usage};

use crate::cli::doctor::check::{Category, Check, Finding, Info, Level, Outcome, at_once};
use crate::cli::doctor::subject::Subject;
use crate::cli::layout::age;
use crate::process::take_over::control_socket::FOLDER;

/// From this percentage of a limit on, its use is a warning.
const NEARLY_FULL: u64 = 80;
/// From this percentage of a limit on, its use is a failure.
const FULL: u64 = 95;
/// A file system with less free space than this is full.
const MIN_FREE: u64 = 16 << 20;
/// Each proxied connection has two descriptors, so this serves 30,000 connections.
const MIN_OPEN_FILES: u64 = 65_536;
/// A clock that differs by less is right.
const TOLERANCE: Duration = Duration::from_secs(120);
/// Hardware clocks in local time differ from UTC by multiples of this.
const TIME_ZONE_STEP: u64 = 15 * 60;

/// The tracked connections.
pub(super) struct Conntrack;

impl Check for Conntrack {
    fn info(&self) -> Info {
        Info::host("conntrack-limit", Category::Conntrack)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        at_once(match subject.facts.conntrack {
            Some(usage) => conntrack(usage),
            None => Finding::ok("connection tracking is not in use yet"),
        })
    }
}

fn conntrack(usage: Usage) -> Finding {
    let Usage { used, limit } = usage;
    let message = format!("tracked connections: {used} of {limit}");
    let level = Level::of_use(usage.percent(), NEARLY_FULL, FULL);
    if level == Level::Ok {
        return Finding::ok(message);
    }
    let larger = limit.saturating_mul(2).max(1 << 18);
    Finding::warning(message)
        .at(level)
        .hint("new connections fail when the table is full: raise the limit on the host")
        .command(format!("sysctl -w net.netfilter.nf_conntrack_max={larger}"))
}

/// The clock of the host.
pub(super) struct Clock;

impl Check for Clock {
    fn info(&self) -> Info {
        Info::host("clock", Category::Clock)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let starts = subject.configuration.not_yet_valid;
        at_once(clock(&subject.facts, starts, SystemTime::now()))
    }
}

/// Compares the clock with times that cannot be in the future, and with the hardware clock.
/// `starts` is the start of the validity of our certificate, if it is in the future.
fn clock(facts: &HostFacts, starts: Option<SystemTime>, now: SystemTime) -> Finding {
    let behind = |then: SystemTime| then.duration_since(now).ok().filter(|by| *by > TOLERANCE);
    let wrong = |message: String| {
        Finding::failure(message)
            .hint("start a time service (chronyd, systemd-timesyncd) on the host")
            .command("date -u")
    };
    if let Some(by) = facts.program_written.and_then(behind) {
        let by = age(by.as_secs());
        return wrong(format!(
            "the clock is {by} behind the time at which this program was written"
        ));
    }
    if let Some(by) = starts.and_then(behind) {
        let by = age(by.as_secs());
        return wrong(format!(
            "our certificate begins to be valid only in {by}: this clock, or that of the issuer, is wrong"
        ));
    }
    match facts.hardware_clock.and_then(|hardware| difference(hardware, now)) {
        Some(by) => {
            let by = age(by.as_secs());
            let message = format!("the clock differs from the hardware clock by {by}");
            Finding { level: Level::Warning, ..wrong(message) }
        }
        None => Finding::ok("no sign of a wrong clock"),
    }
}

/// The difference between the hardware clock and `now`, unless it is small or that of a time zone.
fn difference(hardware: SystemTime, now: SystemTime) -> Option<Duration> {
    let by = hardware.duration_since(now).or_else(|_| now.duration_since(hardware)).ok()?;
    let rest = by.as_secs() % TIME_ZONE_STEP;
    let is_zone = rest.min(TIME_ZONE_STEP - rest) <= 2 && by < Duration::from_secs(15 * 3600);
    (by > TOLERANCE && !is_zone).then_some(by)
}

/// The file systems that the proxy uses.
pub(super) struct Disk;

impl Check for Disk {
    fn info(&self) -> Info {
        Info::host("disk-space", Category::Disk)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let used = folders(&subject.settings).into_iter().filter_map(|folder| {
            let usage = disk_usage(&folder.path).ok()?;
            Some((folder, usage))
        });
        at_once(disk(used.collect()))
    }
}

/// A folder that the proxy uses.
struct Folder {
    path: PathBuf,
    /// How severe it is if the proxy cannot write to it.
    if_read_only: Level,
}

/// The folders in which the proxy creates sockets, and from which it reads certificates.
fn folders(settings: &Settings) -> Vec<Folder> {
    let mut folders = Vec::new();
    let mut add = |file: &Path, if_read_only| {
        let path = file.parent().map(Path::to_path_buf);
        folders.extend(path.map(|path| Folder { path, if_read_only }));
    };
    match &settings.identity {
        Some(IdentitySettings::Files(files)) => add(&files.certificate, Level::Ok),
        Some(IdentitySettings::LocalCa(ca)) => add(&ca.dir.join("ca.pem"), Level::Ok),
        Some(IdentitySettings::IstioCa(_) | IdentitySettings::Spire(_)) | None => {}
    }
    for socket in [&settings.take_over, &settings.admin.socket] {
        match socket {
            LocalSocket::At(socket) => add(socket, Level::Failure),
            // The proxy starts without such a socket. Its folder may be a mount of its own.
            LocalSocket::Auto if Path::new(FOLDER).exists() => {
                add(&Path::new(FOLDER).join("socket"), Level::Warning);
            }
            LocalSocket::Auto => add(Path::new(FOLDER), Level::Warning),
            LocalSocket::Off => {}
        }
    }
    if let Some(PodSourceSettings::Cni(socket)) = &settings.node.pods {
        add(socket, Level::Failure);
    }
    folders
}

fn disk(used: Vec<(Folder, DiskUsage)>) -> Finding {
    let line = |(Folder { path, .. }, usage): &(Folder, DiskUsage)| {
        let Usage { used, limit } = usage.bytes;
        let mib = |bytes: u64| bytes >> 20;
        let free = limit.saturating_sub(used);
        format!("{}: {} of {} MiB free", path.display(), mib(free), mib(limit))
    };
    let is_full = |(_, usage): &&(Folder, DiskUsage)| {
        let Usage { used, limit } = usage.bytes;
        limit > 0 && limit.saturating_sub(used) < MIN_FREE.min(limit / 20)
    };
    let full: Vec<_> = used.iter().filter(is_full).collect();
    if let Some((folder, _)) = full.first() {
        return Finding::failure(
            "a file system is full: sockets, certificates and logs cannot be written",
        )
        .details(full.iter().copied().map(line))
        .hint("free some space, or choose another folder (admin.socket, take_over.socket)")
        .command(format!("df {}", folder.path.display()));
    }
    let read_only = used.iter().filter(|(_, usage)| usage.is_read_only);
    match read_only.max_by_key(|(folder, _)| folder.if_read_only) {
        Some((Folder { path, if_read_only }, _)) if *if_read_only > Level::Ok => {
            let path = path.display();
            Finding::warning(format!("{path} is read-only: the proxy cannot create its sockets there"))
                .at(*if_read_only)
                .hint("mount a writable folder there, or choose another one (admin.socket, take_over.socket)")
                .command(format!("findmnt --target {path}"))
        }
        _ => Finding::ok("the file systems in use have free space").details(used.iter().map(line)),
    }
}

/// The limit of open files of this user.
pub(super) struct OpenFiles;

impl Check for OpenFiles {
    fn info(&self) -> Info {
        Info::host("limits-open-files", Category::Limits)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        at_once(subject.facts.open_files.map(|(_, hard)| open_files(hard)))
    }
}

fn open_files(hard: u64) -> Finding {
    let connections = hard / 2;
    let message =
        format!("hard limit of open files: {hard}, for {connections} connections at most");
    if hard >= MIN_OPEN_FILES {
        return Finding::ok(message);
    }
    Finding::warning(message)
        .hint("raise it for the proxy: LimitNOFILE of its service, `--ulimit nofile` of its container, or this command in its shell")
        .command("ulimit -Hn 1048576")
}

/// Whether files can be watched.
pub(super) struct Watches;

impl Check for Watches {
    fn info(&self) -> Info {
        Info::host("limits-inotify", Category::Limits)
    }

    fn run<'a>(&'a self, _: &'a Subject) -> Outcome<'a> {
        at_once(match Inotify::open() {
            Ok(_) => Finding::ok("files can be watched for changes"),
            Err(error) => Finding::failure(format!("files cannot be watched for changes: {error}"))
                .hint("raise the number of inotify instances of this user")
                .command("sysctl -w fs.inotify.max_user_instances=1024"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn nearly_full_table_is_a_warning_and_full_one_a_failure() {
        let level = |used| conntrack(Usage { used, limit: 100 }).level;
        assert_eq!([level(79), level(80), level(95)], [Level::Ok, Level::Warning, Level::Failure]);
    }

    #[test]
    fn clock_before_program_or_certificate_is_a_failure() {
        let now = SystemTime::UNIX_EPOCH + 100 * HOUR;
        let facts = |written| HostFacts { program_written: Some(written), ..HostFacts::default() };
        assert_eq!(clock(&facts(now - HOUR), None, now).level, Level::Ok);
        let finding = clock(&facts(now + HOUR), None, now);
        assert!(
            finding.level == Level::Failure && finding.message.contains("1 h 0 min"),
            "{finding:?}"
        );
        let finding = clock(&facts(now - HOUR), Some(now + 2 * HOUR), now);
        assert!(
            finding.level == Level::Failure && finding.message.contains("2 h 0 min"),
            "{finding:?}"
        );
    }

    #[test]
    fn hardware_clock_in_local_time_is_no_difference() {
        let now = SystemTime::UNIX_EPOCH + 100 * HOUR;
        let second = Duration::from_secs(1);
        assert_eq!(difference(now + 2 * HOUR + second, now), None);
        assert_eq!(difference(now - HOUR, now), None);
        assert_eq!(difference(now + second, now), None);
        let by = Duration::from_secs(1000);
        assert_eq!(difference(now + by, now), Some(by));
        assert_eq!(difference(now - 24 * HOUR, now), Some(24 * HOUR));
    }

    fn level_of_disk(bytes: Usage, if_read_only: Level, is_read_only: bool) -> Level {
        let folder = Folder { path: "/run".into(), if_read_only };
        disk(vec![(folder, DiskUsage { bytes, is_read_only })]).level
    }

    #[test]
    fn full_file_system_is_a_failure() {
        let level = |used, limit| level_of_disk(Usage { used, limit }, Level::Ok, false);
        assert_eq!(level(1000 << 20, 1000 << 20), Level::Failure);
        assert_eq!(level(100 << 20, 1000 << 20), Level::Ok);
        assert_eq!(level(0, 0), Level::Ok, "a file system without a size");
        assert_eq!(level(1 << 20, 10 << 20), Level::Ok, "a small file system");
    }

    #[test]
    fn read_only_folder_is_as_severe_as_what_is_written_to_it() {
        let level = |if_read_only| level_of_disk(Usage { used: 0, limit: 0 }, if_read_only, true);
        for severity in [Level::Ok, Level::Warning, Level::Failure] {
            assert_eq!(level(severity), severity);
        }
    }

    #[test]
    fn few_open_files_are_a_warning() {
        assert_eq!(
            [open_files(1 << 20).level, open_files(1024).level],
            [Level::Ok, Level::Warning]
        );
    }
}

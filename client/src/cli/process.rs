//! Processes that outlive the command that started them, found again by number and start time.

use std::{
    fs::{self, File},
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::sys::{self, Signal};

const POLL: Duration = Duration::from_millis(20);

/// A process, told from a later one with the same number by when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProcessId {
    pub(super) pid: u32,
    /// Clock ticks after boot.
    started: u64,
}

impl ProcessId {
    /// The process that has this number now. `None`: there is none, or it is dead and only waits to be buried.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        start_time(&stat).map(|started| Self { pid, started })
    }

    pub(super) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends `signal`, unless the process has ended.
    pub(super) fn signal(self, signal: Signal) -> io::Result<()> {
        match self.is_alive() {
            true => sys::send_signal(self.pid, signal),
            false => Ok(()),
        }
    }

    /// `false`: it still runs after `patience`.
    pub(super) fn wait_for_end(self, patience: Duration) -> bool {
        let give_up = Instant::now() + patience;
        while self.is_alive() {
            if Instant::now() >= give_up {
                return false;
            }
            thread::sleep(POLL);
        }
        true
    }
}

/// Field 22 of `/proc/PID/stat`, unless field 3 says dead. The name in field 2 may hold anything, also `)`.
fn start_time(stat: &[u8]) -> Option<u64> {
    let end_of_name = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end_of_name + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Where a process's number is remembered.
#[derive(Clone, Debug)]
pub(super) struct PidFile(pub(super) PathBuf);

impl PidFile {
    /// The process that was remembered, if it still runs.
    pub(super) fn running(&self) -> Option<ProcessId> {
        let remembered = parse(&fs::read_to_string(&self.0).ok()?)?;
        remembered.is_alive().then_some(remembered)
    }

    pub(super) fn remember(&self, process: ProcessId) -> io::Result<()> {
        let partial = self.0.with_extension("new");
        fs::write(&partial, format!("{} {}\n", process.pid, process.started))?;
        fs::rename(partial, &self.0)
    }

    pub(super) fn forget(&self) -> io::Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

fn parse(text: &str) -> Option<ProcessId> {
    let mut words = text.split_ascii_whitespace();
    let (pid, started) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    words.next().is_none().then_some(ProcessId { pid, started })
}

/// Starts `program` so that it stays when this command and its terminal go. Its output goes to the end of `log`.
/// `None`: it has ended already.
pub(super) fn start_detached(
    program: &Path,
    arguments: &[&std::ffi::OsStr],
    log: &Path,
) -> io::Result<Option<ProcessId>> {
    let output = File::options().create(true).append(true).open(log)?;
    let child = Command::new(program)
        .args(arguments)
        // Not where the caller happens to be: that may be the mount, which a daemon must neither need nor hold up.
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .spawn()?;
    Ok(ProcessId::of(child.id()))
}

/// The last lines of a log, for somebody who wants to know why.
pub(super) fn last_lines(log: &Path, count: usize) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Other processes that have files or their working directory under `mountpoint`: number and name, at most `limit`.
pub(super) fn users_of(mountpoint: &Path, limit: usize) -> Vec<String> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .map(|entry| entry.path())
        .filter(|process| {
            process.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
        })
        .filter(|process| !process.ends_with(std::process::id().to_string()) && uses(process, mountpoint))
        .take(limit)
        .map(|process| describe(&process))
        .collect()
}

fn uses(process: &Path, mountpoint: &Path) -> bool {
    let points_there = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(mountpoint));
    let mut descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    points_there(&process.join("cwd"))
        || points_there(&process.join("root"))
        || points_there(&process.join("exe"))
        || descriptors.any(|descriptor| points_there(&descriptor.path()))
}

fn describe(process: &Path) -> String {
    let pid = process.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match fs::read_to_string(process.join("comm")) {
        Ok(name) => format!("{} (process {pid})", name.trim()),
        Err(_) => format!("process {pid}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(name: &str, state: &str, started: u64) -> Vec<u8> {
        let between = vec!["1"; 18].join(" ");
        format!("4242 ({name}) {state} {between} {started} 1000 200 more").into_bytes()
    }

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        for name in ["holdfastd", "a b) R 1 (c", "", "()"] {
            assert_eq!(start_time(&stat(name, "S", 98765)), Some(98765), "{name}");
        }
        assert_eq!(start_time(&stat("dead", "Z", 1)), None);
        assert_eq!(start_time(b"4242 (short) S 1 2"), None);
        assert_eq!(start_time(b""), None);
    }

    #[test]
    fn a_remembered_process_is_found_and_a_stranger_with_its_number_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let file = PidFile(directory.path().join("x.pid"));
        assert_eq!(file.running(), None);
        let own = ProcessId::of(std::process::id()).unwrap();
        file.remember(own).unwrap();
        assert_eq!(file.running(), Some(own));
        file.remember(ProcessId { started: own.started + 1, ..own }).unwrap();
        assert_eq!(file.running(), None, "same number, other start: a stranger");
        file.forget().unwrap();
        file.forget().unwrap();
        assert_eq!(file.running(), None);
    }

    #[test]
    fn a_damaged_pid_file_names_nobody() {
        for text in ["", "12", "12 x", "12 34 56", "-1 5"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
        assert_eq!(parse("12 34\n"), Some(ProcessId { pid: 12, started: 34 }));
    }

    #[test]
    fn a_detached_process_is_followed_to_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let process =
            start_detached(Path::new("/bin/sh"), &["-c".as_ref(), "echo started; exec sleep 600".as_ref()], &log)
                .unwrap()
                .unwrap();
        assert!(process.is_alive());
        assert!(!process.wait_for_end(Duration::ZERO));
        process.signal(Signal::Kill).unwrap();
        assert!(process.wait_for_end(Duration::from_secs(10)));
        process.signal(Signal::Kill).unwrap();
    }

    #[test]
    fn the_end_of_a_log_is_shown() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        assert_eq!(last_lines(&log, 3), "");
        fs::write(&log, "a\nb\nc\nd\n").unwrap();
        assert_eq!(last_lines(&log, 2), "c\nd");
        assert_eq!(last_lines(&log, 9), "a\nb\nc\nd");
    }

    #[test]
    fn who_uses_a_directory_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().canonicalize().unwrap();
        assert!(users_of(&path, 5).is_empty());
        let _own = File::create(path.join("own")).unwrap();
        assert!(users_of(&path, 5).is_empty(), "this process does not count");
        let mut other = Command::new("sleep").arg("600").current_dir(&path).spawn().unwrap();
        let users = users_of(&path, 5);
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(users.len(), 1, "{users:?}");
        assert!(users[0].contains(&other.id().to_string()), "{users:?}");
    }
}

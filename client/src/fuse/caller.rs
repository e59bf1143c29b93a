//! What the kernel does not pass on of a caller, but shows in /proc: which system call it is in, and its pending signals.
//!
//! FUSE has messages for both (a flag of SETLK, and INTERRUPT); the library that speaks it for us drops the one and refuses the other.
//! A thread that waits for our answer stays in its system call, so that what /proc shows of it is true until we answer.

use std::{fs, time::Duration};

use holdfast_common::locks::LockClass;

/// How often a waiting caller is looked at, at first.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// As that grows, for one that waits for long.
const LOOK_EVERY_MAX: Duration = Duration::from_millis(400);
/// A caller may not have gone to sleep yet when its request is read: then it has to be looked at again.
/// Mostly it is asleep at the second look.
const RUNNING_LOOKS: u32 = 10;
const RUNNING_PAUSE: Duration = Duration::from_millis(1);

/// Numbers of flock and fcntl among the system calls of 32-bit programs (i386, arm), for which /proc shows those. A 64-bit program that
/// waits for a lock is in none of the calls that have these numbers there.
const COMPAT_FLOCK: i64 = 143;
const COMPAT_FCNTL: [i64; 2] = [55, 221];

/// Which kind of lock the thread asks for. `None` when it cannot be seen (another PID namespace, no right to look).
pub(super) async fn lock_class(thread: u32) -> Option<LockClass> {
    let mut looks = 0;
    loop {
        match fs::read_to_string(format!("/proc/{thread}/syscall")) {
            // It has sent its request and is about to wait.
            Ok(line) if line.trim() == "running" => {
                looks += 1;
                if looks < RUNNING_LOOKS {
                    std::thread::yield_now();
                } else {
                    tokio::time::sleep(RUNNING_PAUSE).await;
                }
            }
            Ok(line) => return class_in(&line),
            Err(error) => {
                tracing::debug!(thread, %error, "it cannot be seen whether a lock is a flock: it counts as both kinds");
                return None;
            }
        }
    }
}

/// From a line of /proc/TID/syscall: number and arguments.
fn class_in(line: &str) -> Option<LockClass> {
    let mut words = line.split_ascii_whitespace();
    let number: i64 = words.next()?.parse().ok()?;
    if number == libc::SYS_flock || number == COMPAT_FLOCK {
        return Some(LockClass::Flock);
    }
    if number != libc::SYS_fcntl && !COMPAT_FCNTL.contains(&number) {
        return None;
    }
    let command = words.nth(1)?.strip_prefix("0x")?;
    let command = i32::try_from(i64::from_str_radix(command, 16).ok()?).ok()?;
    let of_description = matches!(command, libc::F_OFD_GETLK | libc::F_OFD_SETLK | libc::F_OFD_SETLKW);
    Some(if of_description { LockClass::Description } else { LockClass::Process })
}

/// Resolves when the thread has a signal to handle, or is gone. Never, for one that could not be seen from the start.
pub(super) async fn interrupted(thread: u32) {
    if watch(thread, |status| status.is_dead || is_interrupted(status)).await == Seen::Never {
        std::future::pending::<()>().await;
    }
}

/// Resolves when the thread has been killed. Never, for one that cannot be seen.
pub(super) async fn killed(thread: u32) {
    if watch(thread, |status| status.pending & bit(libc::SIGKILL) != 0).await != Seen::Met {
        std::future::pending::<()>().await;
    }
}

/// The process that the thread is of.
pub(super) fn process_of(thread: u32) -> Option<u32> {
    (thread != 0).then(|| Status::of(thread)).flatten().map(|status| status.process)
}

/// Is the thread alive, and of another process than `process`?
pub(super) fn is_of_another_process(thread: u32, process: u32) -> bool {
    Status::of(thread).is_some_and(|status| status.process != process)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Met,
    /// It was there, and is not any more.
    Gone,
    Never,
}

async fn watch(thread: u32, met: impl Fn(&Status) -> bool) -> Seen {
    let (mut pause, mut seen) = (LOOK_EVERY, false);
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOK_EVERY_MAX);
        match (thread != 0).then(|| Status::of(thread)).flatten() {
            Some(status) if met(&status) => return Seen::Met,
            Some(_) => seen = true,
            None if seen => return Seen::Gone,
            None => return Seen::Never,
        }
    }
}

/// A part of /proc/TID/status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Status {
    thread: u32,
    process: u32,
    /// Signals for this thread.
    pending: u64,
    /// Signals for any thread of the process.
    shared: u64,
    blocked: u64,
    ignored: u64,
    is_dead: bool,
}

impl Status {
    fn of(thread: u32) -> Option<Self> {
        Some(Self::parse(&fs::read_to_string(format!("/proc/{thread}/status")).ok()?))
    }

    fn parse(text: &str) -> Self {
        let mut status = Self::default();
        for line in text.lines() {
            let Some((name, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            let mask = || u64::from_str_radix(value, 16).unwrap_or(0);
            match name {
                "Pid" => status.thread = value.parse().unwrap_or(0),
                "Tgid" => status.process = value.parse().unwrap_or(0),
                "SigPnd" => status.pending = mask(),
                "ShdPnd" => status.shared = mask(),
                "SigBlk" => status.blocked = mask(),
                "SigIgn" => status.ignored = mask(),
                "State" => status.is_dead = value.starts_with(['Z', 'X']),
                _ => {}
            }
        }
        status
    }

    fn accepts(&self, signals: u64) -> bool {
        !self.is_dead && signals & !self.blocked != 0
    }
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Will the thread handle a signal when its system call ends? Answering `EINTR` to one that does not would show it an errno that
/// the kernel keeps for itself. A signal for the whole process goes to its first thread if that accepts it, else to any one that
/// does: then only who is alone in that is known.
fn is_interrupted(status: &Status) -> bool {
    if status.pending & !status.blocked & !status.ignored != 0 {
        return true;
    }
    let shared = status.shared & !status.ignored;
    if !status.accepts(shared) {
        return false;
    }
    let threads = threads_of(status.process);
    let accepting = |thread: &u32| Status::of(*thread).is_some_and(|status| status.accepts(shared));
    let candidates: Vec<u32> = threads.into_iter().filter(accepting).collect();
    status.thread == status.process || candidates == [status.thread]
}

fn threads_of(process: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{process}/task")) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, expected: Option<LockClass>) {
        assert_eq!(class_in(line), expected, "{line}");
    }

    #[test]
    fn the_system_call_tells_the_kind_of_lock() {
        let rest = "0x7ffc5a 0x0 0x0 0x0 0x7ffc40 0x7f3e11";
        check(&format!("{} 0x3 0x2 {rest}", libc::SYS_flock), Some(LockClass::Flock));
        check(&format!("{} 0x3 0x7 {rest}", libc::SYS_fcntl), Some(LockClass::Process));
        check(&format!("{} 0x3 0x26 {rest}", libc::SYS_fcntl), Some(LockClass::Description));
        check(&format!("221 0x3 0x25 {rest}"), Some(LockClass::Description));
        check(&format!("143 0x3 0x2 {rest}"), Some(LockClass::Flock));
        for other in ["running", "-1 0x7ffc 0x7f3e", "", "0 0x3 0x2"] {
            check(other, None);
        }
    }

    #[test]
    fn status_is_read_as_the_kernel_writes_it() {
        let text = "Name:\tcat\nState:\tS (sleeping)\nTgid:\t41\nPid:\t42\nSigPnd:\t0000000000000100\n\
                    ShdPnd:\t0000000000000002\nSigBlk:\t0000000000010000\nSigIgn:\t0000000000001000\n";
        let status = Status::parse(text);
        let expected = Status {
            thread: 42,
            process: 41,
            pending: bit(libc::SIGKILL),
            shared: bit(libc::SIGINT),
            blocked: bit(libc::SIGCHLD),
            ignored: bit(libc::SIGPIPE),
            is_dead: false,
        };
        assert_eq!(status, expected);
        assert!(is_interrupted(&status));
        assert!(!Status { is_dead: true, ..status }.accepts(!0));
    }

    #[test]
    fn what_is_blocked_or_ignored_interrupts_nobody() {
        let own = Status::of(std::process::id()).unwrap();
        assert_eq!(own.process, std::process::id());
        let pending = Status { pending: bit(libc::SIGUSR1), ..Status::default() };
        assert!(is_interrupted(&pending));
        assert!(!is_interrupted(&Status { blocked: bit(libc::SIGUSR1), ..pending }));
        assert!(!is_interrupted(&Status { ignored: bit(libc::SIGUSR1), ..pending }));
    }
}

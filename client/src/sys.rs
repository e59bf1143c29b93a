//! The few system calls that the standard library has no safe word for.
#![allow(unsafe_code, reason = "direct system calls, each with its own SAFETY line")]

use std::{
    ffi::{CString, OsStr},
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    process::Command,
};

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a NUL in a path or option"))
}

/// Time since the machine started, with the time in which it was suspended.
pub fn boot_time() -> std::time::Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for writing. The clock exists on every Linux that has FUSE, so it cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    let (seconds, nanos) = (u64::try_from(now.tv_sec), u32::try_from(now.tv_nsec));
    std::time::Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0))
}

/// The effective user.
pub fn effective_uid() -> u32 {
    // SAFETY: takes nothing, changes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

/// The effective group.
pub fn effective_gid() -> u32 {
    // SAFETY: as `effective_uid`.
    unsafe { libc::getegid() }
}

/// Leaves the terminal's session, so that its end does not end this process. Nothing to do for a session leader.
pub fn leave_terminal() {
    // SAFETY: changes only this process's own session; failure means that it leads one already.
    unsafe {
        libc::setsid();
    }
}

/// A signal that a process can be sent from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Terminate,
    Kill,
}

/// Sends `signal` to `pid`. The caller has made sure that this is the process it means.
pub fn send_signal(pid: u32, signal: Signal) -> io::Result<()> {
    let number = match signal {
        Signal::Terminate => libc::SIGTERM,
        Signal::Kill => libc::SIGKILL,
    };
    let pid = i32::try_from(pid).ok().filter(|pid| *pid > 1).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{pid} is no process that can be stopped"))
    })?;
    // SAFETY: plain numbers; `pid` is positive and above 1, so no group and not init.
    check(unsafe { libc::kill(pid, number) })
}

/// What `mount(2)` is asked for.
#[derive(Debug)]
pub struct KernelMount<'a> {
    pub source: &'a str,
    pub target: &'a Path,
    pub kind: &'a str,
    /// MS_* bits.
    pub flags: libc::c_ulong,
    pub data: &'a str,
}

/// Mounts. Needs privilege.
pub fn mount(request: &KernelMount<'_>) -> io::Result<()> {
    let source = c_string(OsStr::new(request.source))?;
    let target = c_string(request.target.as_os_str())?;
    let kind = c_string(OsStr::new(request.kind))?;
    let data = c_string(OsStr::new(request.data))?;
    // SAFETY: four C strings that live to the end of this function, and flags.
    check(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), request.flags, data.as_ptr().cast()) })
}

/// How thoroughly to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// Refused with EBUSY while anything is open.
    WhenIdle,
    /// Out of the tree now; gone when the last open file is closed.
    Lazy,
}

/// Unmounts what is at `target`: directly as root, else by `fusermount3`.
pub fn unmount(target: &Path, how: Unmount) -> io::Result<()> {
    if effective_uid() != 0 {
        return unmount_by_helper(target, how);
    }
    let flags = match how {
        Unmount::WhenIdle => 0,
        Unmount::Lazy => libc::MNT_DETACH,
    };
    let path = c_string(target.as_os_str())?;
    // SAFETY: a C string that lives to the end of this function, and flags.
    check(unsafe { libc::umount2(path.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) })
}

fn unmount_by_helper(target: &Path, how: Unmount) -> io::Result<()> {
    let mut command = Command::new("fusermount3");
    command.arg("-u").args((how == Unmount::Lazy).then_some("-z")).arg("--").arg(target);
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let kind = if text.contains("busy") { io::ErrorKind::ResourceBusy } else { io::ErrorKind::Other };
    Err(io::Error::new(kind, text))
}

/// Major and minor number of a `st_dev`.
pub fn device_numbers(device: u64) -> (u32, u32) {
    (libc::major(device), libc::minor(device))
}

/// Sets an extended attribute of what is at `path`, without following a link there.
pub fn set_attribute(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    let (path, name) = (c_string(path.as_os_str())?, c_string(OsStr::new(name))?);
    // SAFETY: two C strings and `value.len()` bytes that live to the end of this function.
    check(unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) })
}

/// Removes an extended attribute of what is at `path`, without following a link there.
pub fn remove_attribute(path: &Path, name: &str) -> io::Result<()> {
    let (path, name) = (c_string(path.as_os_str())?, c_string(OsStr::new(name))?);
    // SAFETY: two C strings that live to the end of this function.
    check(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) })
}

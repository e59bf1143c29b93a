//! The system calls that the tests need and std does not offer.
#![allow(unsafe_code, reason = "system calls that std does not offer")]

use std::{
    ffi::CString,
    fs::File,
    io,
    os::{fd::AsRawFd, unix::ffi::OsStrExt, unix::process::CommandExt},
    path::Path,
    process::Command,
};

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends `signal`; false if there is no such process.
pub fn kill(pid: u32, signal: libc::c_int) -> bool {
    // SAFETY: takes two numbers, touches no memory.
    unsafe { libc::kill(pid.cast_signed(), signal) == 0 }
}

/// Sends `signal` to every process of the group that `leader` leads.
pub fn kill_group(leader: u32, signal: libc::c_int) -> bool {
    // SAFETY: takes two numbers, touches no memory.
    unsafe { libc::killpg(leader.cast_signed(), signal) == 0 }
}

/// The kernel kills the process when the thread that starts it ends: no daemon outlives its test.
pub fn die_with_parent(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe and touches no memory of ours.
    unsafe {
        command.pre_exec(|| check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)));
    }
}

/// `umount2`, with `flags` as `MNT_FORCE | MNT_DETACH`.
pub fn umount(path: &Path, flags: libc::c_int) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: `path` is NUL-terminated and outlives the call.
    check(unsafe { libc::umount2(path.as_ptr(), flags) })
}

/// `renameat2` with `flags` as `RENAME_NOREPLACE`.
pub fn rename(from: &Path, to: &Path, flags: libc::c_uint) -> io::Result<()> {
    let (from, to) = (c_path(from)?, c_path(to)?);
    // SAFETY: both paths are NUL-terminated and outlive the call.
    check(unsafe { libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags) })
}

/// `mknod` with the file type in `mode`.
pub fn mknod(path: &Path, mode: libc::mode_t, device: libc::dev_t) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: `path` is NUL-terminated and outlives the call.
    check(unsafe { libc::mknod(path.as_ptr(), mode, device) })
}

pub fn set_xattr(path: &Path, name: &str, value: &[u8], flags: libc::c_int) -> io::Result<()> {
    let (path, name) = (c_path(path)?, CString::new(name)?);
    // SAFETY: path and name are NUL-terminated, `value` is valid for its length, all outlive the call.
    check(unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) })
}

pub fn get_xattr(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    let (path, name) = (c_path(path)?, CString::new(name)?);
    let mut value = vec![0u8; 64 << 10];
    // SAFETY: path and name are NUL-terminated, the buffer is valid for the length given.
    let length = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(length).map_err(|_negative| io::Error::last_os_error())?);
    Ok(value)
}

/// Names, as the kernel gives them: each followed by a NUL.
pub fn list_xattrs(path: &Path) -> io::Result<Vec<u8>> {
    let path = c_path(path)?;
    let mut names = vec![0u8; 64 << 10];
    // SAFETY: `path` is NUL-terminated, the buffer is valid for the length given.
    let length = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(length).map_err(|_negative| io::Error::last_os_error())?);
    Ok(names)
}

pub fn remove_xattr(path: &Path, name: &str) -> io::Result<()> {
    let (path, name) = (c_path(path)?, CString::new(name)?);
    // SAFETY: both are NUL-terminated and outlive the call.
    check(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) })
}

/// Sets atime and mtime (seconds, nanoseconds) without following a symbolic link.
pub fn set_times(path: &Path, atime: (i64, i64), mtime: (i64, i64)) -> io::Result<()> {
    let path = c_path(path)?;
    let times = [atime, mtime].map(|(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec });
    // SAFETY: `path` is NUL-terminated, `times` has the two entries that the call reads.
    check(unsafe { libc::utimensat(libc::AT_FDCWD, path.as_ptr(), times.as_ptr(), libc::AT_SYMLINK_NOFOLLOW) })
}

/// `lseek` with `whence` as `SEEK_DATA`.
pub fn seek(file: &File, offset: i64, whence: libc::c_int) -> io::Result<i64> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    if found < 0 { Err(io::Error::last_os_error()) } else { Ok(found) }
}

pub fn fallocate(file: &File, mode: libc::c_int, offset: i64, length: i64) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) })
}

/// `copy_file_range` between explicit offsets; bytes copied.
pub fn copy_range(from: &File, from_offset: i64, to: &File, to_offset: i64, length: usize) -> io::Result<usize> {
    let (mut from_offset, mut to_offset) = (from_offset, to_offset);
    // SAFETY: both descriptors are open and both offsets are valid for the call.
    let copied = unsafe {
        libc::copy_file_range(from.as_raw_fd(), &raw mut from_offset, to.as_raw_fd(), &raw mut to_offset, length, 0)
    };
    usize::try_from(copied).map_err(|_negative| io::Error::last_os_error())
}

pub fn syncfs(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    check(unsafe { libc::syncfs(file.as_raw_fd()) })
}

/// Drops the kernel's clean pages of `file`.
pub fn drop_pages(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

/// Takes the exclusive lock of `file`, waiting for it; gone when `file` is closed.
pub fn lock(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) })
}

/// Room for `bytes` of datagrams that wait; as root past the system's maximum.
pub fn grow_socket_buffers(socket: &std::net::UdpSocket, bytes: libc::c_int) {
    for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE, libc::SO_RCVBUF, libc::SO_SNDBUF] {
        // SAFETY: the value and its size belong together and outlive the call. A refusal leaves the default.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const bytes).cast(),
                u32::try_from(size_of::<libc::c_int>()).unwrap_or(4),
            );
        }
    }
}

pub fn is_root() -> bool {
    // SAFETY: takes nothing, touches no memory.
    unsafe { libc::geteuid() == 0 }
}

/// `flock` with `operation` as `LOCK_EX | LOCK_NB`.
pub fn flock(file: &File, operation: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    check(unsafe { libc::flock(file.as_raw_fd(), operation) })
}

/// `fcntl` with a command on locks, as `F_OFD_SETLKW`. Returns the lock as the kernel leaves it.
pub fn fcntl_lock(file: &File, command: libc::c_int, mut lock: libc::flock) -> io::Result<libc::flock> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and `lock` is valid for reading and writing until the
    // call returns.
    check(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) })?;
    Ok(lock)
}

/// In `delay_ms` this process gets a SIGALRM, which interrupts what it waits for: for good, or (`restart`) to go on with it.
pub fn alarm(delay_ms: u32, restart: bool) -> io::Result<()> {
    extern "C" fn handle(_signal: libc::c_int) {}
    let flags = if restart { libc::SA_RESTART } else { 0 };
    let delay = libc::timeval {
        tv_sec: libc::time_t::from(delay_ms / 1000),
        tv_usec: libc::suseconds_t::from(delay_ms % 1000 * 1000),
    };
    let timer = libc::itimerval { it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 }, it_value: delay };
    // SAFETY: an all-zero sigaction is valid; the handler does nothing; both structures outlive the calls.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = flags;
        check(libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()))?;
        check(libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()))
    }
}

/// A directory that stays open.
#[derive(Debug)]
pub struct OpenDirectory(*mut libc::DIR);

impl OpenDirectory {
    /// Panics when that is not possible.
    pub fn open(path: &Path) -> Self {
        let path = c_path(path).expect("a path");
        // SAFETY: the path is a C string.
        let stream = unsafe { libc::opendir(path.as_ptr()) };
        assert!(!stream.is_null());
        Self(stream)
    }

    /// Goes back to the beginning, and counts what it finds from there.
    pub fn count(&self) -> usize {
        // SAFETY: the stream is open until this is dropped, and no other thread has it.
        unsafe {
            libc::rewinddir(self.0);
            let entries = std::iter::from_fn(|| Some(libc::readdir(self.0)).filter(|entry| !entry.is_null()));
            entries.count() - 2
        }
    }
}

impl Drop for OpenDirectory {
    fn drop(&mut self) {
        // SAFETY: it is open, and not used any more.
        unsafe { libc::closedir(self.0) };
    }
}

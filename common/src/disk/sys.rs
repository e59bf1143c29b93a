//! System calls that std does not offer.
#![allow(unsafe_code, reason = "system calls that std does not offer")]

use std::{
    ffi::CString, fs::File, io, mem::MaybeUninit, os::fd::AsRawFd, os::unix::ffi::OsStrExt, path::Path, sync::LazyLock,
};

use super::{PAGE_LENGTH, Space};

#[allow(clippy::unnecessary_cast, reason = "the types of statvfs differ between platforms")]
pub(super) fn space(directory: &Path) -> io::Result<Space> {
    let path = CString::new(directory.as_os_str().as_bytes())?;
    let mut stat = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` is NUL-terminated and `stat` has room for the whole structure.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: statvfs returned 0, so it has filled the structure.
    let stat = unsafe { stat.assume_init() };
    let unit = stat.f_frsize as u64;
    Ok(Space { capacity: stat.f_blocks as u64 * unit, free: stat.f_bavail as u64 * unit })
}

pub(super) fn read_nowait(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and the one part is `buffer`, which
    // is borrowed for writing until the call returns.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &raw const part, 1, offset.cast_signed(), libc::RWF_NOWAIT) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Linux has RWF_DONTCACHE from 6.14 on. Until 6.15 what was written to a page again while that page went to the disk
/// could be forgotten with it ("gate dropbehind invalidate on folio !dirty && !writeback").
pub(super) fn has_uncached_writes() -> bool {
    static HAS: LazyLock<bool> = LazyLock::new(|| {
        std::fs::read_to_string("/proc/sys/kernel/osrelease").is_ok_and(|release| is_at_least(&release, (6, 16)))
    });
    *HAS
}

pub(super) fn is_at_least(release: &str, wanted: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    numbers.next().zip(numbers.next()).is_some_and(|version| version >= wanted)
}

pub(super) fn write_uncached(file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
    let part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and the one part is `bytes`, which
    // is borrowed until the call returns and only read by it.
    let written =
        unsafe { libc::pwritev2(file.as_raw_fd(), &raw const part, 1, offset.cast_signed(), libc::RWF_DONTCACHE) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

/// Bytes of `offset..offset+length` that are in memory, or `None` if the kernel cannot tell (before Linux 6.5).
pub(super) fn cached(file: &File, offset: u64, length: u64) -> Option<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    let range = [offset, length];
    let mut pages = CacheStat::default();
    // SAFETY: the descriptor is open for as long as `file` is borrowed; the call reads the two numbers of `range` and
    // writes the five of `pages`, both of which outlive it.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), &raw mut pages, 0) };
    (result == 0).then(|| pages.cached * page_length())
}

/// Bytes of a page of the kernel.
fn page_length() -> u64 {
    // SAFETY: no memory is passed.
    let length = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(length).unwrap_or(PAGE_LENGTH)
}

/// struct cachestat of the kernel: numbers of pages.
#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached: u64,
    _dirty: u64,
    _writeback: u64,
    _evicted: u64,
    _recently_evicted: u64,
}

pub(super) fn advise(file: &File, offset: u64, length: u64, advice: libc::c_int) {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    // The result is of no use: this is a hint, and the read that follows reports every real error.
    unsafe {
        libc::posix_fadvise(file.as_raw_fd(), offset.cast_signed(), length.cast_signed(), advice);
    }
}

pub(super) fn start_writeback(file: &File, offset: u64, length: u64) {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    // The result is of no use: this is a hint, and `sync_data` reports every real error.
    unsafe {
        libc::sync_file_range(
            file.as_raw_fd(),
            offset.cast_signed(),
            length.cast_signed(),
            libc::SYNC_FILE_RANGE_WRITE,
        );
    }
}

pub(super) fn allocate(file: &File, length: u64) -> io::Result<()> {
    fallocate(file, 0, 0, length)
}

pub(super) fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length)
}

fn fallocate(file: &File, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset.cast_signed(), length.cast_signed()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

//! The disk as a seam: a handful of methods, real here, hostile in the tests.
//!
//! Both kinds of server keep everything they must not lose behind [`Disk`]: segments, logs, and redb
//! through an adapter. A test's disk loses what was not synced, tears writes, and fails the n-th call.

use std::{
    fs,
    io::{self, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// An open file: positioned, no cursor. Calls from several threads may overlap.
pub trait DiskFile: Send + Sync + std::fmt::Debug {
    /// Fills all of `buffer`, or fails (`UnexpectedEof` past the end).
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// As `read_exact_at`, but only from memory: `WouldBlock` if the disk must be asked, or might have to be.
    fn read_cached_at(&self, _buffer: &mut [u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    /// Starts reading `offset..offset+length` into memory without waiting: a later `read_exact_at` has less to wait for.
    fn start_read(&self, _offset: u64, _length: u64) {}
    /// Forgets what memory has of `offset..offset+length` and the disk as well: a later read asks the disk.
    fn forget_cached(&self, _offset: u64, _length: u64) {}
    /// Writes all of `bytes`, growing the file as needed. Visible at once, durable after `sync_data`.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    fn length(&self) -> io::Result<u64>;
    /// Bytes that it takes on the disk: without its holes.
    fn allocated(&self) -> io::Result<u64> {
        self.length()
    }
    fn set_length(&self, length: u64) -> io::Result<()>;
    /// Data and length are on stable storage when this returns (fdatasync). After an error nothing is known:
    /// the caller must not go on with this file.
    fn sync_data(&self) -> io::Result<()>;
    /// Starts writing `offset..offset+length` to the disk without waiting: a later `sync_data` has less to do.
    fn start_writeback(&self, offset: u64, length: u64);
    /// Gives back the space of `offset..offset+length`; reads there return zeroes.
    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()>;
}

pub trait Disk: Send + Sync + std::fmt::Debug + 'static {
    /// Opens for reading and writing; creates it (empty) if `create` and it is missing. Its name is durable after `sync_directory`.
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>>;
    fn create_directory(&self, path: &Path) -> io::Result<()>;
    /// Full paths of the entries of `directory`, sorted.
    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Names created, renamed and removed in `directory` are on stable storage when this returns.
    fn sync_directory(&self, directory: &Path) -> io::Result<()>;
    fn space(&self, directory: &Path) -> io::Result<Space>;
    /// Changes when what was written and not synced may have been lost: the kernel's boot id.
    fn machine_boot(&self) -> io::Result<String>;
}

/// Bytes of the filesystem that holds a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub capacity: u64,
    pub free: u64,
}

/// The machine's own files.
#[derive(Debug, Default)]
pub struct RealDisk;

/// Of the kernel's memory of files, at least.
const PAGE_LENGTH: u64 = 4096;

#[derive(Debug)]
struct RealFile(fs::File);

impl Disk for RealDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let file = fs::OpenOptions::new().read(true).write(true).create(create).truncate(false).open(path)?;
        Ok(Arc::new(RealFile(file)))
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        paths.sort();
        Ok(paths)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        fs::File::open(directory)?.sync_all()
    }

    fn space(&self, directory: &Path) -> io::Result<Space> {
        sys::space(directory)
    }

    fn machine_boot(&self) -> io::Result<String> {
        Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
    }
}

impl DiskFile for RealFile {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn read_cached_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match sys::read_nowait(&self.0, buffer, offset) {
            Ok(length) if length == buffer.len() => Ok(()),
            // A part, the end of the file, or a filesystem that cannot tell: who may wait will find out.
            Ok(_) | Err(_) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn start_read(&self, offset: u64, length: u64) {
        sys::advise(&self.0, offset, length, libc::POSIX_FADV_WILLNEED);
    }

    fn forget_cached(&self, offset: u64, length: u64) {
        // The kernel forgets whole pages only: those of which a part is meant go too.
        let start = offset / PAGE_LENGTH * PAGE_LENGTH;
        let end = offset.saturating_add(length).next_multiple_of(PAGE_LENGTH);
        sys::advise(&self.0, start, end - start, libc::POSIX_FADV_DONTNEED);
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn length(&self) -> io::Result<u64> {
        (&self.0).seek(SeekFrom::End(0))
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::blocks(&self.0.metadata()?) * 512)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn start_writeback(&self, offset: u64, length: u64) {
        sys::start_writeback(&self.0, offset, length);
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        sys::punch_hole(&self.0, offset, length)
    }
}

#[allow(unsafe_code, reason = "five system calls that std does not offer")]
mod sys {
    use std::{ffi::CString, fs::File, io, mem::MaybeUninit, os::fd::AsRawFd, os::unix::ffi::OsStrExt, path::Path};

    use super::Space;

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
        let read =
            unsafe { libc::preadv2(file.as_raw_fd(), &raw const part, 1, offset.cast_signed(), libc::RWF_NOWAIT) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
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

    pub(super) fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
        match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset.cast_signed(), length.cast_signed()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_just_written_is_read_from_memory_and_nothing_else_pretends_to_be() {
        let directory = tempfile::tempdir().unwrap();
        let file = RealDisk.open(&directory.path().join("f"), true).unwrap();
        file.write_all_at(b"0123456789", 0).unwrap();
        let mut buffer = [0; 4];
        match file.read_cached_at(&mut buffer, 3) {
            Ok(()) => assert_eq!(&buffer, b"3456"),
            // tmpfs and others cannot tell.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        assert_eq!(file.read_cached_at(&mut buffer, 8).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}

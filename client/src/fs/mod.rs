//! The operations of a filesystem in filesystem words, testable without a kernel.
//!
//! Every operation is a future that is ready at the first poll when memory can answer it: the FUSE adapter polls
//! once on its own thread and hands over to the runtime only what must wait for the network.

use bytes::Bytes;
use holdfast_common::{
    Attr, DirEntry, Ino, Kind,
    wire::meta::{RenameMode, SetAttr, StatFs, XattrMode},
};

/// What a program sees when an operation fails: an errno of `libc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

pub type FsResult<T> = Result<T, Errno>;

/// Who asks, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
}

/// An open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileHandle(pub u64);

/// A new inode as the caller asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MakeRequest {
    pub kind: Kind,
    /// Permission bits after the umask, 0..=0o7777.
    pub mode: u32,
    pub rdev: u32,
    /// Symlinks only.
    pub target: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    pub handle: FileHandle,
    /// The kernel's pages of this inode are still true.
    pub keep_cache: bool,
}

/// One page of a directory, with `.` and `..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryPage {
    pub entries: Vec<DirEntry>,
    pub end: bool,
}

/// The mounted filesystem, in place of a kernel's view of it.
#[derive(Debug)]
pub struct Fs {}

#[allow(unused_variables, reason = "signatures first")]
#[allow(clippy::unused_async, reason = "signatures first")]
impl Fs {
    /// How long the kernel may trust attributes and names.
    pub fn attribute_timeout(&self) -> std::time::Duration {
        std::time::Duration::from_secs(1)
    }
    pub async fn lookup(&self, parent: Ino, name: &[u8]) -> FsResult<Attr> {
        Err(Errno(libc::ENOSYS))
    }
    /// The kernel forgot the inode: cached state of it may go.
    pub fn forget(&self, ino: Ino) {}
    pub async fn getattr(&self, ino: Ino) -> FsResult<Attr> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn setattr(&self, caller: Caller, ino: Ino, set: SetAttr) -> FsResult<Attr> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn readlink(&self, ino: Ino) -> FsResult<Vec<u8>> {
        Err(Errno(libc::ENOSYS))
    }
    /// mkdir, mknod, symlink.
    pub async fn make(&self, caller: Caller, parent: Ino, name: &[u8], request: MakeRequest) -> FsResult<Attr> {
        Err(Errno(libc::ENOSYS))
    }
    /// open(2) with O_CREAT. `flags` are open(2)'s.
    pub async fn create(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> FsResult<(Attr, Opened)> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> FsResult<Attr> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn unlink(&self, parent: Ino, name: &[u8]) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn rmdir(&self, parent: Ino, name: &[u8]) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn rename(&self, from: Ino, from_name: &[u8], to: Ino, to_name: &[u8], mode: RenameMode) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn open(&self, caller: Caller, ino: Ino, flags: i32) -> FsResult<Opened> {
        Err(Errno(libc::ENOSYS))
    }
    /// At most `size` bytes from `offset`, shorter only at the end of the file.
    pub async fn read(&self, ino: Ino, handle: FileHandle, offset: u64, size: u32) -> FsResult<Bytes> {
        Err(Errno(libc::ENOSYS))
    }
    /// All of `data` is accepted, or none.
    pub async fn write(&self, caller: Caller, ino: Ino, handle: FileHandle, offset: u64, data: Bytes) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
    /// close(2) of one descriptor: what was written is visible to everyone when this returns.
    pub async fn flush(&self, ino: Ino, handle: FileHandle) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn fsync(&self, ino: Ino, handle: FileHandle, data_only: bool) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
    /// The last close of this open.
    pub async fn release(&self, ino: Ino, handle: FileHandle) {}
    pub async fn opendir(&self, ino: Ino) -> FsResult<FileHandle> {
        Err(Errno(libc::ENOSYS))
    }
    /// Entries after `cookie` (0: from the start); `plus`: with attributes.
    pub async fn readdir(&self, ino: Ino, handle: FileHandle, cookie: u64, plus: bool) -> FsResult<DirectoryPage> {
        Err(Errno(libc::ENOSYS))
    }
    pub fn releasedir(&self, ino: Ino, handle: FileHandle) {}
    /// Names made and removed before are durable when this returns.
    pub async fn fsyncdir(&self, ino: Ino) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn statfs(&self) -> FsResult<StatFs> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn getxattr(&self, ino: Ino, name: &[u8]) -> FsResult<Vec<u8>> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn listxattr(&self, ino: Ino) -> FsResult<Vec<Vec<u8>>> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn removexattr(&self, ino: Ino, name: &[u8]) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
    /// SEEK_DATA (`hole: false`) and SEEK_HOLE.
    pub async fn seek(&self, ino: Ino, offset: u64, hole: bool) -> FsResult<u64> {
        Err(Errno(libc::ENOSYS))
    }
    /// fallocate(2) with its `mode` bits.
    pub async fn fallocate(&self, ino: Ino, handle: FileHandle, offset: u64, length: u64, mode: i32) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
    pub async fn copy_file_range(
        &self,
        from: Ino,
        from_offset: u64,
        to: Ino,
        to_offset: u64,
        length: u64,
    ) -> FsResult<u64> {
        Err(Errno(libc::ENOSYS))
    }
    /// Everything written through this mount is visible, and with `durable` durable, when this returns.
    /// Errors that no descriptor is left to hear are logged.
    pub async fn sync_all(&self, durable: bool) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
    /// Flushes everything and ends the session. For unmount.
    pub async fn shutdown(&self) -> FsResult<()> {
        Err(Errno(libc::ENOSYS))
    }
}

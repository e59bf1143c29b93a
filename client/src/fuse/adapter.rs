//! Every kernel request, as one call of [`Fs`].

use std::{ffi::OsStr, io, os::unix::ffi::OsStrExt, path::Path, sync::Arc, time::SystemTime};

use bytes::Bytes;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle as Fh, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use holdfast_common::{
    Attr, DirEntry, Ino, Kind,
    locks::{LockClass, LockRange},
    wire::meta::SetAttr,
};

use super::{
    caller, convert,
    dispatch::{Dispatcher, Operation, Patience},
    past_end::PastEnd,
};
use crate::fs::{
    Caller, DirectoryPage, Errno, FileHandle, Fs, FsResult, LockAsk, MakeRequest, Opened, OpenedDirectory,
};

/// Inode numbers are never reused, so that one generation is enough.
const GENERATION: Generation = Generation(0);
/// Bytes of one write request: as many as one block holds.
const WRITE_SIZE_MAX: u32 = 1 << 20;
/// Background requests (read-ahead, direct I/O) that the kernel keeps in flight.
const BACKGROUND_MAX: u16 = 128;
const CONGESTION_THRESHOLD: u16 = 96;
/// What is asked of the kernel besides fuser's own choice (ASYNC_READ, BIG_WRITES, MAX_PAGES).
///
/// Left out on purpose: WRITEBACK_CACHE (a write is acknowledged by us, not by the page cache); HANDLE_KILLPRIV (without it the kernel takes setuid and
/// setgid away by a chmod of its own, from fresh attributes; version 2 would need bits that fuser drops); ATOMIC_O_TRUNC
/// (without it truncation is a SetAttr, one code path); AUTO_INVAL_DATA (it throws a writer's own pages away
/// at its next stat; `keep_cache` at open gives close-to-open instead); SETXATTR_EXT and SECURITY_CTX (fuser cannot parse them).
const WANTED: [InitFlags; 10] = [
    // Locks are between mounts.
    InitFlags::FUSE_POSIX_LOCKS,
    InitFlags::FUSE_FLOCK_LOCKS,
    // Lists of permissions are obeyed by the kernel; the umask waits for the server, which knows the directory's default list.
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_DONT_MASK,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
];

fn answer(name: &'static str, request: &Request) -> Operation {
    Operation { name, patience: Patience::Answer, caller: request.pid() }
}

fn flush(name: &'static str, request: &Request) -> Operation {
    Operation { name, patience: Patience::Flush, caller: request.pid() }
}

#[derive(Debug)]
pub(super) struct Adapter {
    fs: Arc<Fs>,
    dispatcher: Dispatcher,
    past_end: Arc<PastEnd>,
}

impl Adapter {
    pub(super) fn new(fs: Arc<Fs>, dispatcher: Dispatcher) -> Self {
        Self { fs, dispatcher, past_end: Arc::default() }
    }

    fn entry(&self, operation: Operation, work: impl Work<Attr>, reply: ReplyEntry) {
        let ttl = self.fs.attribute_timeout();
        self.dispatcher.run(operation, work, move |result| match result {
            Ok(attr) => reply.entry(&ttl, &convert::attr(&attr), GENERATION),
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn attr(&self, operation: Operation, work: impl Work<Attr>, reply: ReplyAttr) {
        let ttl = self.fs.attribute_timeout();
        self.dispatcher.run(operation, work, move |result| match result {
            Ok(attr) => reply.attr(&ttl, &convert::attr(&attr)),
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn empty(&self, operation: Operation, work: impl Work<()>, reply: ReplyEmpty) {
        self.dispatcher.run(operation, work, move |result| match result {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    /// As `empty`, of what is undone if nobody is there to be told.
    fn empty_unclaimed(&self, operation: Operation, work: impl Work<Unclaimed<()>>, reply: ReplyEmpty) {
        self.dispatcher.run(operation, work, move |result| match result.map(Unclaimed::claim) {
            Ok(_done) => reply.ok(),
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn written(&self, operation: Operation, work: impl Work<u32>, reply: ReplyWrite) {
        self.dispatcher.run(operation, work, move |result| match result {
            Ok(count) => reply.written(count),
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn xattr(&self, operation: Operation, work: impl Work<Vec<u8>>, room: u32, reply: ReplyXattr) {
        self.dispatcher.run(operation, work, move |result| {
            match result.as_deref().map_err(|errno| *errno).and_then(|value| convert::xattr_answer(value, room)) {
                Ok(convert::XattrAnswer::Size(size)) => reply.size(size),
                Ok(convert::XattrAnswer::Data(value)) => reply.data(value),
                Err(errno) => reply.error(convert::errno(errno)),
            }
        });
    }

    fn make(&self, operation: Operation, caller: Caller, name: (INodeNo, &OsStr), new: MakeRequest, reply: ReplyEntry) {
        let (fs, parent, name) = (self.fs.clone(), convert::ino(name.0), owned(name.1));
        self.entry(operation, async move { fs.make(caller, parent, &name, new).await }, reply);
    }
}

/// What an operation has done for a caller who has not been told of it yet. If he never is (he was killed meanwhile), it is undone.
struct Unclaimed<T: Send + 'static> {
    value: Option<T>,
    undo: Option<Box<dyn FnOnce(T) + Send>>,
}

impl<T: Send + 'static> Unclaimed<T> {
    fn new(value: T, undo: impl FnOnce(T) + Send + 'static) -> Self {
        Self { value: Some(value), undo: Some(Box::new(undo)) }
    }

    fn claim(mut self) -> Option<T> {
        self.value.take()
    }
}

impl<T: Send + 'static> Drop for Unclaimed<T> {
    fn drop(&mut self) {
        if let (Some(value), Some(undo)) = (self.value.take(), self.undo.take()) {
            undo(value);
        }
    }
}

/// A file that is open for nobody is closed.
fn unclaimed_open(fs: Arc<Fs>, ino: Ino, opened: Opened) -> Unclaimed<Opened> {
    Unclaimed::new(opened, move |opened| {
        in_background(async move { fs.release(ino, opened.handle).await });
    })
}

/// A change of the data that the kernel was not answered: it has not taken the old pages away.
fn unclaimed_change<T: Send + 'static>(fs: Arc<Fs>, ino: Ino, value: T) -> Unclaimed<T> {
    Unclaimed::new(value, move |_| fs.distrust_pages(ino))
}

fn in_background(work: impl Future<Output = ()> + Send + 'static) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        drop(runtime.spawn(work));
    }
}

/// An inode that the kernel named is gone: whoever came to it by a name has to look that up again, which this error makes the
/// kernel do.
fn stale(errno: Errno) -> Errno {
    if errno.0 == libc::ENOENT { Errno(libc::ESTALE) } else { errno }
}

/// An operation that owns all it needs.
trait Work<T>: Future<Output = FsResult<T>> + Send + 'static {}
impl<T, F: Future<Output = FsResult<T>> + Send + 'static> Work<T> for F {}

fn caller_of(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid(), umask: 0 }
}

fn owned(name: &OsStr) -> Vec<u8> {
    name.as_bytes().to_vec()
}

fn handle(handle: Fh) -> FileHandle {
    FileHandle(handle.0)
}

async fn lock_ask(
    fs: &Fs,
    ino: Ino,
    caller: u32,
    owner: LockOwner,
    range: (u64, u64),
    kind: i32,
    pid: u32,
) -> FsResult<LockAsk> {
    // The kernel calls processes and open files by different names, and a process by its own until it closes the file.
    let class = match fs.has_process_locked(ino, owner.0) {
        true => Some(LockClass::Process),
        false => caller::lock_class(caller).await,
    };
    let kind = convert::lock_kind(kind)?;
    Ok(LockAsk { class, process: owner.0, range: LockRange { first: range.0, last: range.1 }, kind, pid })
}

/// A lock that its process did not live to hear of.
async fn let_go(fs: Arc<Fs>, ino: Ino, file: FileHandle, ask: LockAsk) {
    let release = LockAsk { kind: None, ..ask };
    let let_go = fs.set_lock(ino, file, release, false, std::future::pending(), &|_| false).await;
    if let Err(error) = let_go {
        tracing::debug!(%ino, ?error, "the lock of a process that was killed goes with its file");
    }
}

fn open_flags(opened: Opened) -> FopenFlags {
    let keep = if opened.keep_cache { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() };
    let direct = if opened.direct { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::empty() };
    keep | direct | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
}

fn node(kind: Kind, mode: u32, rdev: u32) -> MakeRequest {
    MakeRequest { kind, mode: convert::permissions(mode), rdev, target: Vec::new() }
}

/// The page after `cookie`, with at least one entry unless the directory ends there: to the kernel, an empty
/// page is the end.
async fn directory_page(fs: &Fs, ino: Ino, handle: FileHandle, mut cookie: u64, plus: bool) -> FsResult<Vec<DirEntry>> {
    loop {
        let before = cookie;
        let DirectoryPage { entries, end } = fs.readdir(ino, handle, cookie, plus).await?;
        cookie = entries.last().map_or(before, |entry| entry.cookie);
        if !entries.is_empty() || end || cookie == before {
            return Ok(entries);
        }
    }
}

fn is_dot(name: &[u8]) -> bool {
    matches!(name, b"." | b"..")
}

/// Entries of a page with attributes. `.` and `..` need none; one that came without any and is gone by now is left out.
async fn with_attributes(fs: &Fs, entries: Vec<DirEntry>) -> FsResult<Vec<(DirEntry, fuser::FileAttr)>> {
    let mut complete = Vec::with_capacity(entries.len());
    for entry in entries {
        let attr = match (entry.attr, is_dot(&entry.name)) {
            (Some(attr), _) => convert::attr(&attr),
            (None, true) => convert::bare_directory(entry.ino),
            (None, false) => match fs.getattr(entry.ino).await {
                Ok(attr) => convert::attr(&attr),
                Err(Errno(libc::ENOENT | libc::ESTALE)) => continue,
                Err(errno) => return Err(errno),
            },
        };
        complete.push((entry, attr));
    }
    Ok(complete)
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each of these gives the nearest value that would do when ours does not.
        let _previous = config.set_max_write(WRITE_SIZE_MAX).or_else(|nearest| config.set_max_write(nearest));
        let _previous = config.set_max_background(BACKGROUND_MAX);
        let _previous = config.set_congestion_threshold(CONGESTION_THRESHOLD);
        for flag in WANTED {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "this kernel lacks a FUSE feature");
            }
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (fs, parent, name) = (self.fs.clone(), convert::ino(parent), owned(name));
        let work = async move { fs.lookup(parent, &name).await };
        self.dispatcher.run(answer("lookup", request), work, move |result| match result {
            Ok(found) => reply.entry(&found.valid_for, &convert::attr(&found.attr), GENERATION),
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn forget(&self, _request: &Request, ino: INodeNo, _lookups: u64) {
        self.fs.forget(convert::ino(ino));
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _handle: Option<Fh>, reply: ReplyAttr) {
        let (fs, ino) = (self.fs.clone(), convert::ino(ino));
        self.attr(answer("getattr", request), async move { fs.getattr(ino).await.map_err(stale) }, reply);
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        file: Option<Fh>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr {
            mode: mode.map(convert::permissions),
            uid,
            gid,
            size,
            atime: atime.map(convert::set_time),
            mtime: mtime.map(convert::set_time),
            // The kernel sends the mode without these bits when they must go.
            clear_suid: false,
        };
        let (fs, caller, ino) = (self.fs.clone(), caller_of(request), convert::ino(ino));
        let (open, ttl) = (file.map(handle), self.fs.attribute_timeout());
        let work = async move {
            if let (Some(open), Some(_)) = (open, set.size) {
                fs.check_locks(open)?;
            }
            let attr = fs.setattr(caller, ino, set).await.map_err(stale)?;
            Ok(unclaimed_change(fs, ino, attr))
        };
        self.dispatcher.run(flush("setattr", request), work, move |result| match result.map(Unclaimed::claim) {
            Ok(Some(attr)) => reply.attr(&ttl, &convert::attr(&attr)),
            Ok(None) => reply.error(fuser::Errno::EIO),
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let (fs, ino) = (self.fs.clone(), convert::ino(ino));
        self.dispatcher.run(answer("readlink", request), async move { fs.readlink(ino).await }, move |result| {
            match result {
                Ok(target) => reply.data(&target),
                Err(errno) => reply.error(convert::errno(errno)),
            }
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let caller = Caller { umask, ..caller_of(request) };
        match convert::kind_of_mode(mode) {
            Ok(kind) => self.make(answer("mknod", request), caller, (parent, name), node(kind, mode, rdev), reply),
            Err(errno) => reply.error(convert::errno(errno)),
        }
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let caller = Caller { umask, ..caller_of(request) };
        self.make(answer("mkdir", request), caller, (parent, name), node(Kind::Directory, mode, 0), reply);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let new = MakeRequest { kind: Kind::Symlink, mode: 0o777, rdev: 0, target: owned(target.as_os_str()) };
        self.make(answer("symlink", request), caller_of(request), (parent, name), new, reply);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (fs, parent, name) = (self.fs.clone(), convert::ino(parent), owned(name));
        self.empty(answer("unlink", request), async move { fs.unlink(parent, &name).await }, reply);
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (fs, parent, name) = (self.fs.clone(), convert::ino(parent), owned(name));
        self.empty(answer("rmdir", request), async move { fs.rmdir(parent, &name).await }, reply);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let fs = self.fs.clone();
        let (from, from_name) = (convert::ino(parent), owned(name));
        let (to, to_name) = (convert::ino(new_parent), owned(new_name));
        let work = async move { fs.rename(from, &from_name, to, &to_name, convert::rename_mode(flags)?).await };
        self.empty(answer("rename", request), work, reply);
    }

    fn link(&self, request: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (fs, ino, parent, name) = (self.fs.clone(), convert::ino(ino), convert::ino(parent), owned(name));
        self.entry(answer("link", request), async move { fs.link(ino, parent, &name).await }, reply);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (fs, parent, name) = (self.fs.clone(), convert::ino(parent), owned(name));
        let caller = Caller { umask, ..caller_of(request) };
        let ttl = self.fs.attribute_timeout();
        let mode = convert::permissions(mode);
        let work = async move {
            let (attr, opened) = fs.create(caller, parent, &name, mode, flags).await?;
            Ok((attr, unclaimed_open(fs, attr.ino, opened)))
        };
        self.dispatcher.run(answer("create", request), work, move |result| match result {
            Ok((attr, opened)) => {
                let Some(opened) = opened.claim() else { return reply.error(fuser::Errno::EIO) };
                reply.created(&ttl, &convert::attr(&attr), GENERATION, Fh(opened.handle.0), open_flags(opened));
            }
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (fs, caller, ino) = (self.fs.clone(), caller_of(request), convert::ino(ino));
        let work = async move {
            let opened = fs.open(caller, ino, flags.0).await.map_err(stale)?;
            Ok(unclaimed_open(fs, ino, opened))
        };
        self.dispatcher.run(answer("open", request), work, move |result| match result {
            Ok(opened) => match opened.claim() {
                Some(opened) => reply.opened(Fh(opened.handle.0), open_flags(opened)),
                None => reply.error(fuser::Errno::EIO),
            },
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        file: Fh,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (fs, past_end, ino, file) = (self.fs.clone(), self.past_end.clone(), convert::ino(ino), handle(file));
        let into_pages = flags.0 & libc::O_DIRECT == 0;
        let work = async move {
            let data = fs.read(ino, file, offset, size).await?;
            if data.is_empty()
                && into_pages
                && let Some(end) = fs.end_of_pages(file)
                && past_end.refuses(ino, end, offset..offset.saturating_add(u64::from(size)))
            {
                return Err(Errno(libc::EIO));
            }
            Ok(data)
        };
        self.dispatcher.run(answer("read", request), work, move |result| match result {
            Ok(data) => reply.data(&data),
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        file: Fh,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (fs, caller, ino, file) = (self.fs.clone(), caller_of(request), convert::ino(ino), handle(file));
        // The only copy on the way in: the buffer is the kernel loop's own.
        let data = Bytes::copy_from_slice(data);
        let work = async move {
            let length = u32::try_from(data.len()).map_err(|_| Errno(libc::EINVAL))?;
            fs.write(caller, ino, file, offset, data).await?;
            Ok(length)
        };
        self.written(flush("write", request), work, reply);
    }

    fn flush(&self, request: &Request, ino: INodeNo, file: Fh, owner: LockOwner, reply: ReplyEmpty) {
        let (fs, ino, file) = (self.fs.clone(), convert::ino(ino), handle(file));
        self.empty(flush("flush", request), async move { fs.flush(ino, file, owner.0).await }, reply);
    }

    fn getlk(
        &self,
        request: &Request,
        ino: INodeNo,
        file: Fh,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let (fs, ino, file, caller) = (self.fs.clone(), convert::ino(ino), handle(file), request.pid());
        let work = async move {
            fs.test_lock(ino, file, lock_ask(&fs, ino, caller, owner, (start, end), kind, pid).await?).await
        };
        let own = self.fs.session();
        self.dispatcher.run(answer("getlk", request), work, move |result| match result {
            Ok(None) => reply.locked(start, end, libc::F_UNLCK, 0),
            // A process of another machine has no number here.
            Ok(Some(lock)) => reply.locked(
                lock.range.first,
                lock.range.last,
                convert::lock_type(lock.kind),
                if lock.owner.session == own { lock.pid } else { 0 },
            ),
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn setlk(
        &self,
        request: &Request,
        ino: INodeNo,
        file: Fh,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let (fs, ino, file, caller) = (self.fs.clone(), convert::ino(ino), handle(file), request.pid());
        let operation = Operation { name: "setlk", patience: Patience::Endless, caller };
        let work = async move {
            let ask = lock_ask(&fs, ino, caller, owner, (start, end), kind, pid).await?;
            let process = caller::process_of(caller);
            let is_foreign = |thread: u32| process.is_some_and(|own| caller::is_of_another_process(thread, own));
            fs.set_lock(ino, file, ask, sleep, caller::interrupted(caller), &is_foreign).await?;
            Ok(Unclaimed::new((), move |()| in_background(let_go(fs, ino, file, ask))))
        };
        self.empty_unclaimed(operation, work, reply);
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        file: Fh,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let (fs, ino, file) = (self.fs.clone(), convert::ino(ino), handle(file));
        let work = async move {
            fs.release(ino, file).await;
            Ok(())
        };
        self.empty(flush("release", request), work, reply);
    }

    fn fsync(&self, request: &Request, ino: INodeNo, file: Fh, data_only: bool, reply: ReplyEmpty) {
        let (fs, ino, file) = (self.fs.clone(), convert::ino(ino), handle(file));
        self.empty(flush("fsync", request), async move { fs.fsync(ino, file, data_only).await }, reply);
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let (fs, ino) = (self.fs.clone(), convert::ino(ino));
        let work = async move {
            let opened = fs.opendir(ino).await?;
            Ok(Unclaimed::new(opened, move |opened| fs.releasedir(ino, opened.handle)))
        };
        self.dispatcher.run(answer("opendir", request), work, move |result| match result.map(Unclaimed::claim) {
            Ok(Some(OpenedDirectory { handle, keeps_listing })) => {
                let keeps = if keeps_listing { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() };
                reply.opened(Fh(handle.0), FopenFlags::FOPEN_CACHE_DIR | keeps);
            }
            Ok(None) => reply.error(fuser::Errno::EIO),
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn readdir(&self, request: &Request, ino: INodeNo, directory: Fh, cookie: u64, mut reply: ReplyDirectory) {
        let (fs, ino, directory) = (self.fs.clone(), convert::ino(ino), handle(directory));
        let work = async move { directory_page(&fs, ino, directory, cookie, false).await };
        self.dispatcher.run(answer("readdir", request), work, move |result| match result {
            Ok(entries) => {
                for entry in entries {
                    let (ino, kind) = (INodeNo(entry.ino.0), convert::file_type(entry.kind));
                    if reply.add(ino, entry.cookie, kind, OsStr::from_bytes(&entry.name)) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn readdirplus(&self, request: &Request, ino: INodeNo, directory: Fh, cookie: u64, mut reply: ReplyDirectoryPlus) {
        let (fs, ino, directory) = (self.fs.clone(), convert::ino(ino), handle(directory));
        let ttl = self.fs.attribute_timeout();
        let work = async move {
            let entries = directory_page(&fs, ino, directory, cookie, true).await?;
            with_attributes(&fs, entries).await
        };
        self.dispatcher.run(answer("readdirplus", request), work, move |result| match result {
            Ok(entries) => {
                for (entry, attr) in entries {
                    let name = OsStr::from_bytes(&entry.name);
                    if reply.add(attr.ino, entry.cookie, name, &ttl, &attr, GENERATION) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn releasedir(&self, _request: &Request, ino: INodeNo, directory: Fh, _flags: OpenFlags, reply: ReplyEmpty) {
        self.fs.releasedir(convert::ino(ino), handle(directory));
        reply.ok();
    }

    fn fsyncdir(&self, request: &Request, ino: INodeNo, _directory: Fh, _data_only: bool, reply: ReplyEmpty) {
        let (fs, ino) = (self.fs.clone(), convert::ino(ino));
        self.empty(flush("fsyncdir", request), async move { fs.fsyncdir(ino).await }, reply);
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let fs = self.fs.clone();
        self.dispatcher.run(answer("statfs", request), async move { fs.statfs().await }, move |result| match result {
            Ok(figures) => {
                let shown = convert::statfs(&figures);
                let (size, name_max) = (shown.block_size, 255);
                reply.statfs(shown.blocks, shown.free, shown.free, shown.files, shown.files_free, size, name_max, size);
            }
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        if !convert::xattr_is_kept(name.as_bytes()) {
            return reply.error(fuser::Errno::EOPNOTSUPP);
        }
        let (fs, ino, name, value) = (self.fs.clone(), convert::ino(ino), owned(name), value.to_vec());
        let caller = caller_of(request);
        let work = async move {
            if convert::is_setting(&name) {
                fs.check_owner(caller, ino).await?;
            }
            fs.setxattr(ino, &name, &value, convert::xattr_mode(flags)?).await
        };
        self.empty(answer("setxattr", request), work, reply);
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, room: u32, reply: ReplyXattr) {
        if !convert::xattr_is_kept(name.as_bytes()) {
            return reply.error(fuser::Errno::NO_XATTR);
        }
        let (fs, ino, name) = (self.fs.clone(), convert::ino(ino), owned(name));
        self.xattr(answer("getxattr", request), async move { fs.getxattr(ino, &name).await }, room, reply);
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, room: u32, reply: ReplyXattr) {
        let (fs, ino, uid) = (self.fs.clone(), convert::ino(ino), request.uid());
        let work = async move { Ok(convert::xattr_names(&convert::xattrs_shown(fs.listxattr(ino).await?, uid))) };
        self.xattr(answer("listxattr", request), work, room, reply);
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if !convert::xattr_is_kept(name.as_bytes()) {
            return reply.error(fuser::Errno::NO_XATTR);
        }
        let (fs, ino, name) = (self.fs.clone(), convert::ino(ino), owned(name));
        let caller = caller_of(request);
        let work = async move {
            if convert::is_setting(&name) {
                fs.check_owner(caller, ino).await?;
            }
            match fs.removexattr(ino, &name).await {
                // To take away a list that is not there is no error.
                Err(Errno(libc::ENODATA)) if convert::is_permission_list(&name) => Ok(()),
                result => result,
            }
        };
        self.empty(answer("removexattr", request), work, reply);
    }

    fn lseek(&self, request: &Request, ino: INodeNo, _file: Fh, offset: i64, whence: i32, reply: ReplyLseek) {
        let (fs, ino) = (self.fs.clone(), convert::ino(ino));
        let work = async move {
            let hole = match whence {
                libc::SEEK_DATA => false,
                libc::SEEK_HOLE => true,
                _ => return Err(Errno(libc::EINVAL)),
            };
            let offset = u64::try_from(offset).map_err(|_| Errno(libc::ENXIO))?;
            let found = fs.seek(ino, offset, hole).await?;
            i64::try_from(found).map_err(|_| Errno(libc::EOVERFLOW))
        };
        self.dispatcher.run(flush("lseek", request), work, move |result| match result {
            Ok(offset) => reply.offset(offset),
            Err(errno) => reply.error(convert::errno(errno)),
        });
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        file: Fh,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (fs, ino, file) = (self.fs.clone(), convert::ino(ino), handle(file));
        let work = async move {
            fs.check_locks(file)?;
            fs.fallocate(ino, file, offset, length, mode).await?;
            Ok(unclaimed_change(fs, ino, ()))
        };
        self.empty_unclaimed(flush("fallocate", request), work, reply);
    }

    fn copy_file_range(
        &self,
        request: &Request,
        from: INodeNo,
        from_file: Fh,
        from_offset: u64,
        to: INodeNo,
        to_file: Fh,
        to_offset: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (fs, from, to) = (self.fs.clone(), convert::ino(from), convert::ino(to));
        let (from_file, to_file) = (handle(from_file), handle(to_file));
        // The answer has 32 bits: the caller comes back for the rest.
        let length = length.min(u64::from(COPY_LENGTH_MAX));
        let work = async move {
            fs.check_locks(from_file)?;
            fs.check_locks(to_file)?;
            let copied = fs.copy_file_range(from, from_offset, to, to_offset, length).await?;
            let copied = u32::try_from(copied).map_err(|_| Errno(libc::EIO))?;
            Ok(unclaimed_change(fs, to, copied))
        };
        self.dispatcher.run(flush("copy_file_range", request), work, move |result| {
            match result.map(Unclaimed::claim) {
                Ok(Some(count)) => reply.written(count),
                Ok(None) => reply.error(fuser::Errno::EIO),
                Err(errno) => reply.error(convert::errno(errno)),
            }
        });
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _file: Fh,
        _flags: fuser::IoctlFlags,
        _command: u32,
        _data: &[u8],
        _room: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }

    fn access(&self, _request: &Request, _ino: INodeNo, _mask: fuser::AccessFlags, reply: ReplyEmpty) {
        // Permissions are the kernel's business (default_permissions); this answer makes it stop asking.
        reply.error(fuser::Errno::ENOSYS);
    }

    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _file: Fh,
        _notifier: fuser::PollNotifier,
        _events: fuser::PollEvents,
        _flags: fuser::PollFlags,
        reply: ReplyPoll,
    ) {
        // As for any regular file: always ready. This answer makes the kernel stop asking.
        reply.error(fuser::Errno::ENOSYS);
    }
}

/// Bytes that one copy_file_range answers for: a multiple of the chunk, so that chunks are shared whole.
const COPY_LENGTH_MAX: u32 = 1 << 30;

//! Opening and closing: what is open here, and what the metadata server should know of it.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use holdfast_common::{
    Attr, ChunkIndex, Ino, Kind, Position,
    wire::meta::{MetaAnswer, Op, SetAttr},
};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{
    Caller, Errno, FileHandle, Fs, FsResult, MakeRequest, Opened,
    inode::{Inode, PAGES_UNKNOWN},
    namespace::{Made, new_inode},
    shared::Urgency,
};
use crate::{
    read::{ahead::ReadAhead, map::KnownMap},
    remote::meta::unexpected,
};

/// Chunks whose map comes with the open.
const CHUNKS_WITH_OPEN: u32 = 16;

/// One open of a file.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub inode: Arc<Inode>,
    /// open(2)'s.
    pub flags: i32,
    /// The kernel had pages of the file already.
    pub keeps_pages: bool,
    /// Write errors up to this one have been told to this descriptor.
    pub errors_heard: Mutex<u64>,
    pub ahead: Mutex<ReadAhead>,
    /// Processes that have taken locks through it.
    pub locks: Mutex<BTreeSet<u64>>,
    locks_lost: AtomicBool,
    released: AtomicBool,
}

impl OpenFile {
    /// `EIO` if a lock on the file was lost that was held here: somebody else may have changed the file since.
    pub(super) fn check_locks(&self) -> FsResult<()> {
        if self.locks_lost.load(Ordering::Acquire) { Err(Errno(libc::EIO)) } else { Ok(()) }
    }

    /// Has its last descriptor been closed?
    pub(super) fn is_released(&self) -> bool {
        self.released.load(Ordering::Acquire)
    }

    pub(super) fn lose_locks(&self) {
        self.locks_lost.store(true, Ordering::Release);
    }
}

/// Inodes that are no longer open here and that the server still counts as open.
#[derive(Debug, Default)]
pub(super) struct Releases {
    state: Mutex<ReleaseState>,
    sent: Notify,
}

#[derive(Debug, Default)]
struct ReleaseState {
    waiting: HashSet<Ino>,
    /// On their way in a message: an open of one of these has to wait, or the server might see both in the wrong order.
    in_flight: HashSet<Ino>,
    /// Opens that have begun and not yet been counted in their inode: a last close meanwhile is not the last.
    opening: HashMap<Ino, u32>,
}

/// An open that is being asked for.
pub(super) struct Opening<'a> {
    releases: &'a Releases,
    ino: Ino,
    done: bool,
}

impl Opening<'_> {
    /// The open is counted: nothing of this inode is to be released.
    fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        let mut state = self.releases.state.lock();
        if let Some(count) = state.opening.get_mut(&self.ino) {
            *count -= 1;
            if *count == 0 {
                state.opening.remove(&self.ino);
            }
        }
        if self.done {
            state.waiting.remove(&self.ino);
        }
    }
}

impl Releases {
    fn add(&self, ino: Ino) {
        self.state.lock().waiting.insert(ino);
    }

    /// The server goes on counting the inode as open, or has heard that it is not; from here on nothing tells it so.
    async fn begin_open(&self, ino: Ino) -> Opening<'_> {
        *self.state.lock().opening.entry(ino).or_insert(0) += 1;
        let opening = Opening { releases: self, ino, done: false };
        loop {
            let sent = self.sent.notified();
            tokio::pin!(sent);
            sent.as_mut().enable();
            if !self.state.lock().in_flight.contains(&ino) {
                return opening;
            }
            sent.await;
        }
    }

    pub(super) fn take(&self) -> Vec<Ino> {
        let mut state = self.state.lock();
        let (kept, sent) =
            std::mem::take(&mut state.waiting).into_iter().partition(|ino| state.opening.contains_key(ino));
        state.waiting = kept;
        state.in_flight = sent;
        state.in_flight.iter().copied().collect()
    }

    /// The server could not be told. Before [`Releases::told`].
    pub(super) fn put_back(&self, inos: Vec<Ino>) {
        self.state.lock().waiting.extend(inos);
    }

    pub(super) fn told(&self) {
        self.state.lock().in_flight.clear();
        self.sent.notify_waiters();
    }
}

impl Fs {
    /// open(2) with O_CREAT. `flags` are open(2)'s.
    pub async fn create(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> FsResult<(Attr, Opened)> {
        let request = MakeRequest { kind: Kind::File, mode, rdev: 0, target: Vec::new() };
        let exclusive = flags & libc::O_EXCL != 0;
        let new = new_inode(caller, request);
        if let Some(made) = self.make_ahead(parent, name, &new, true) {
            return Ok((made, self.opened_new(made, None, flags)));
        }
        let op = Op::Make { parent, name: name.to_vec(), new, exclusive, open: true };
        let Made { attr, created, position } = self.made(op).await?;
        if !created {
            return self.open_existing(caller, attr, flags).await;
        }
        self.shared.meta.opened(attr.ino);
        Ok((attr, self.opened_new(attr, Some(position), flags)))
    }

    /// `O_TMPFILE`: a file that has no name in `parent`, and gets one only by `link`, unless `flags` have `O_EXCL`.
    pub async fn create_unnamed(&self, caller: Caller, parent: Ino, mode: u32, flags: i32) -> FsResult<(Attr, Opened)> {
        let request = MakeRequest { kind: Kind::File, mode, rdev: 0, target: Vec::new() };
        let linkable = flags & libc::O_EXCL == 0;
        let op = Op::MakeUnnamed { parent, new: new_inode(caller, request), linkable };
        let Made { attr, position, .. } = self.made(op).await?;
        self.shared.meta.opened(attr.ino);
        Ok((attr, self.opened_new(attr, Some(position), flags)))
    }

    /// It has just been made, at this position or ahead of the server, and is counted as open there, or will be.
    fn opened_new(&self, attr: Attr, made_at: Option<Position>, flags: i32) -> Opened {
        let inode = Inode::new(attr, KnownMap::empty(attr.data_version), attr.data_version);
        {
            let mut state = inode.lock();
            state.begin_with(made_at);
            state.opens += 1;
        }
        self.inodes.lock().insert(attr.ino, Arc::clone(&inode));
        self.opened(inode, flags, true)
    }

    /// Someone else made the name between the kernel's lookup and the create.
    async fn open_existing(&self, caller: Caller, attr: Attr, flags: i32) -> FsResult<(Attr, Opened)> {
        match attr.kind {
            Kind::File => {}
            Kind::Directory => return Err(Errno(libc::EISDIR)),
            _ => return Err(Errno(libc::EEXIST)),
        }
        let opened = self.open(caller, attr.ino, flags).await?;
        if flags & libc::O_TRUNC == 0 {
            return Ok((self.getattr(attr.ino).await?, opened));
        }
        let truncated = self.setattr(caller, attr.ino, SetAttr { size: Some(0), ..SetAttr::default() }).await;
        if truncated.is_err() {
            self.release(attr.ino, opened.handle).await;
        }
        Ok((truncated?, opened))
    }

    pub async fn open(&self, _caller: Caller, ino: Ino, flags: i32) -> FsResult<Opened> {
        let opening = self.releases.begin_open(ino).await;
        let (attr, map) = match self.shared.meta.open(ino, CHUNKS_WITH_OPEN).await? {
            MetaAnswer::Opened { attr, map } => (self.accesses.shown(attr), map),
            other => return Err(unexpected(&other)),
        };
        self.plain.learn(&attr);
        let inode = {
            let mut inodes = self.inodes.lock();
            let pages = || self.kernel_versions.lock().remove(&ino).unwrap_or(PAGES_UNKNOWN);
            let inode = inodes.entry(ino).or_insert_with(|| Inode::new(attr, KnownMap::default(), pages()));
            // Under the same lock: a last close at this moment must not drop the state that this open will use.
            inode.lock().opens += 1;
            Arc::clone(inode)
        };
        opening.done();
        let keep_cache = {
            let mut state = inode.lock();
            state.learn(attr);
            state.learn_map(ChunkIndex(0), CHUNKS_WITH_OPEN, map);
            state.show_pages(attr.data_version)
        };
        if !keep_cache && let Some(kernel) = self.kernel.get() {
            // It may have been told a size a moment ago, and would not read past it.
            kernel.attributes_changed(ino);
        }
        Ok(self.opened(inode, flags, keep_cache))
    }

    fn opened(&self, inode: Arc<Inode>, flags: i32, keep_cache: bool) -> Opened {
        Opened { handle: self.add_file(inode, flags, keep_cache), keep_cache, direct: goes_around_pages(flags) }
    }

    /// A handle for an open that is counted in the inode already.
    fn add_file(&self, inode: Arc<Inode>, flags: i32, keeps_pages: bool) -> FileHandle {
        let errors_heard = Mutex::new(inode.lock().errors());
        let handle = self.new_handle();
        let (ahead, locks, locks_lost) = (Mutex::default(), Mutex::default(), AtomicBool::new(false));
        let released = AtomicBool::new(false);
        let file = OpenFile { inode, flags, keeps_pages, errors_heard, ahead, locks, locks_lost, released };
        self.files.lock().insert(handle, Arc::new(file));
        handle
    }

    pub(super) fn file(&self, handle: FileHandle) -> FsResult<Arc<OpenFile>> {
        self.files.lock().get(&handle).cloned().ok_or(Errno(libc::EBADF))
    }

    /// The size of the file, if the kernel reads what is read through `handle` into its pages.
    pub fn end_of_pages(&self, handle: FileHandle) -> Option<u64> {
        let file = self.file(handle).ok().filter(|file| !goes_around_pages(file.flags))?;
        Some(file.inode.lock().size())
    }

    /// The last close of this open. What is still dirty is stored in the background.
    pub async fn release(&self, _ino: Ino, handle: FileHandle) {
        let Some(file) = self.files.lock().remove(&handle) else { return };
        file.released.store(true, Ordering::Release);
        self.unlock_description(&file, handle).await;
        let closed = {
            let mut state = file.inode.lock();
            state.opens -= 1;
            state.opens == 0
        };
        if !closed {
            return;
        }
        self.shared.start_uploads(&file.inode, super::inode::Which::All, Urgency::Visible);
        self.releases.add(file.inode.ino);
        self.drop_if_idle(&file.inode);
    }

    /// Forgets a file that is neither open nor dirty.
    pub(super) fn drop_if_idle(&self, inode: &Arc<Inode>) {
        let mut inodes = self.inodes.lock();
        let idle = {
            let state = inode.lock();
            state.opens == 0 && state.is_clean()
        };
        if idle && inodes.get(&inode.ino).is_some_and(|known| Arc::ptr_eq(known, inode)) {
            inodes.remove(&inode.ino);
            if let Some(version) = inode.lock().pages_version() {
                self.kernel_versions.lock().insert(inode.ino, version);
            }
        }
    }
}

/// Only this mount's `Fs` knows where the end is that a handle appends at: the kernel keeps no pages of it.
pub(super) fn goes_around_pages(flags: i32) -> bool {
    flags & libc::O_APPEND != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_last_close_during_an_open_is_not_told_to_the_server() {
        let releases = Releases::default();
        let opening = releases.begin_open(Ino(7)).await;
        releases.add(Ino(7));
        releases.add(Ino(8));
        assert_eq!(releases.take(), [Ino(8)]);
        releases.told();
        opening.done();
        assert_eq!(releases.take(), []);
    }

    #[tokio::test]
    async fn an_open_that_fails_leaves_the_release_to_be_told() {
        let releases = Releases::default();
        let opening = releases.begin_open(Ino(7)).await;
        releases.add(Ino(7));
        drop(opening);
        assert_eq!(releases.take(), [Ino(7)]);
    }
}

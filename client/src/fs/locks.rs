//! Advisory locks of programs: between all mounts, and with the data that they protect.
//!
//! What was written under a lock is stored before the lock is let go, and who takes one sees the files as they are then.

use std::{future::Future, pin::Pin, sync::Arc};

use holdfast_common::{
    Ino,
    locks::{Lock, LockClass, LockKind, LockRange},
    wire::meta::Foreign,
};
use tracing::warn;

use super::{Errno, FileHandle, Fs, FsResult, inode::Inode, open::OpenFile, shared::Urgency};
use crate::remote::locks::{LockOutcome, LockWish};

/// What a program asks of a lock.
#[derive(Clone, Copy, Debug)]
pub struct LockAsk {
    /// `None`: it could not be seen.
    pub class: Option<LockClass>,
    /// The process, as the kernel calls it: the same again for another one, some time after it has closed the file.
    pub process: u64,
    pub range: LockRange,
    /// `None`: let go.
    pub kind: Option<LockKind>,
    pub pid: u32,
}

/// Somebody who has asked for fcntl locks on a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    /// Under which the metadata server knows him.
    id: u64,
    /// It was seen that he is a process.
    is_process: bool,
}

impl LockAsk {
    /// What cannot be told apart excludes both kinds of locks. A flock is always of the whole file.
    fn classes(&self) -> &'static [LockClass] {
        match self.class {
            Some(LockClass::Process) => &[LockClass::Process],
            Some(LockClass::Description) => &[LockClass::Description],
            Some(LockClass::Flock) => &[LockClass::Flock],
            None if self.range == LockRange::WHOLE => &[LockClass::Process, LockClass::Flock],
            None => &[LockClass::Process],
        }
    }
}

/// Is the thread surely of another process than the one that asks?
pub type IsForeign<'a> = &'a (dyn Fn(u32) -> bool + Sync);

impl Fs {
    /// Takes, changes or lets go of a lock. With `wait` until it is there, or `interrupted` (then `EINTR`); without, `EAGAIN` if it is
    /// not to be had. `EDEADLK` if whoever has it waits for this owner. What the asking process has written under an exclusive
    /// lock is stored before that is let go; `EIO`, and it is kept, if that fails.
    pub async fn set_lock(
        &self,
        ino: Ino,
        handle: FileHandle,
        ask: LockAsk,
        wait: bool,
        interrupted: impl Future<Output = ()> + Send,
        is_foreign: IsForeign<'_>,
    ) -> FsResult<()> {
        let file = self.file(handle)?;
        let mut interrupted = Box::pin(interrupted);
        for (taken, class) in ask.classes().iter().enumerate() {
            let Some(wish) = self.wish(ino, handle, &file, *class, &ask) else { continue };
            let done = match wish.kind {
                None => self.unlock(&file.inode, wish, is_foreign).await,
                Some(_) => self.take_lock(&file, wish, wait, interrupted.as_mut(), is_foreign).await,
            };
            if let (Err(error), Some(_)) = (done, wish.kind) {
                self.undo(ino, handle, &file, &ask, taken).await;
                return Err(error);
            }
            done?;
        }
        if file.is_released() {
            // Whoever asked was killed meanwhile, and his descriptors are closed already.
            self.unlock_description(&file, handle).await;
        }
        Ok(())
    }

    /// Lets go again of what a wish that was refused had taken in other classes.
    async fn undo(&self, ino: Ino, handle: FileHandle, file: &OpenFile, ask: &LockAsk, taken: usize) {
        let release = LockAsk { kind: None, ..*ask };
        for class in &ask.classes()[..taken] {
            if let Some(wish) = self.wish(ino, handle, file, *class, &release)
                && let Err(error) = self.shared.meta.set_lock(ino, wish, false).await
            {
                warn!(%ino, ?error, "half of a lock could not be let go; it is tried again");
            }
        }
    }

    /// The same, as it is asked of the server: an open file's locks are its handle's, which is never used again. `None`: there is
    /// nothing to let go.
    fn wish(&self, ino: Ino, handle: FileHandle, file: &OpenFile, class: LockClass, ask: &LockAsk) -> Option<LockWish> {
        let owner = match class {
            LockClass::Description | LockClass::Flock => handle.0,
            LockClass::Process => {
                let mut owners = self.lock_owners.lock();
                let known = owners.get(&(ino, ask.process)).map(|owner| owner.id);
                let owner = match (known, ask.kind) {
                    (Some(owner), _) => owner,
                    (None, Some(_)) => {
                        let id = self.new_handle().0;
                        owners.insert((ino, ask.process), Owner { id, is_process: ask.class.is_some() });
                        id
                    }
                    (None, None) => return None,
                };
                if ask.kind.is_some() {
                    file.locks.lock().insert(owner);
                }
                owner
            }
        };
        Some(LockWish { class, owner, range: ask.range, kind: ask.kind, pid: ask.pid })
    }

    async fn take_lock(
        &self,
        file: &OpenFile,
        wish: LockWish,
        wait: bool,
        mut interrupted: Pin<&mut (impl Future<Output = ()> + Send)>,
        is_foreign: IsForeign<'_>,
    ) -> FsResult<()> {
        file.check_locks()?;
        let ino = file.inode.ino;
        if wish.kind == Some(LockKind::Shared) && self.shared.meta.locks_exclusively(ino, &wish) {
            self.store_writes(&file.inode, is_foreign).await?;
        }
        let foreign = loop {
            let mut waiting = match self.shared.meta.set_lock(ino, wish, wait).await? {
                LockOutcome::Granted(foreign) => break foreign,
                LockOutcome::Free => return Ok(()),
                LockOutcome::Held => return Err(Errno(libc::EAGAIN)),
                LockOutcome::Waiting(waiting) => waiting,
            };
            tokio::select! {
                granted = waiting.granted() => {
                    if let Some(foreign) = granted {
                        break foreign;
                    }
                    // The server has forgotten who waits.
                }
                () = &mut interrupted => {
                    let too_late = self.shared.meta.cancel_lock(ino, &wish, &mut waiting).await;
                    break too_late.ok_or(Errno(libc::EINTR))?;
                }
            }
        };
        self.locked(file, &wish, foreign).await
    }

    /// The lock is held: nothing is believed any more that whoever had it before may have changed.
    async fn locked(&self, file: &OpenFile, wish: &LockWish, foreign: Foreign) -> FsResult<()> {
        let caught_up = self.catch_up(foreign).await;
        if caught_up.is_err() {
            let release = LockWish { kind: None, ..*wish };
            self.shared.meta.set_lock(file.inode.ino, release, false).await?;
        }
        caught_up
    }

    /// Somebody who would be in the way of `ask`, which has a kind.
    pub async fn test_lock(&self, ino: Ino, handle: FileHandle, ask: LockAsk) -> FsResult<Option<Lock>> {
        let class = ask.class.unwrap_or(LockClass::Process);
        let owner = match class {
            LockClass::Description | LockClass::Flock => handle.0,
            // Who holds nothing is somebody whom nobody knows.
            LockClass::Process => self.lock_owners.lock().get(&(ino, ask.process)).map_or(0, |owner| owner.id),
        };
        let wish = LockWish { class, owner, range: ask.range, kind: ask.kind, pid: ask.pid };
        self.shared.meta.test_lock(ino, &wish).await
    }

    async fn unlock(&self, inode: &Arc<Inode>, wish: LockWish, is_foreign: IsForeign<'_>) -> FsResult<()> {
        if self.shared.meta.locks_exclusively(inode.ino, &wish) {
            self.store_writes(inode, is_foreign).await?;
        }
        self.shared.meta.set_lock(inode.ino, wish, false).await.map(drop)
    }

    /// Has everything stored that was written under a lock on `inode`: to that file, and by the same process to others.
    async fn store_writes(&self, inode: &Arc<Inode>, is_foreign: IsForeign<'_>) -> FsResult<()> {
        let others: Vec<Arc<Inode>> = self.inodes.lock().values().cloned().collect();
        let is_own = |other: &Arc<Inode>| {
            let state = other.lock();
            !state.is_clean()
                && (other.ino == inode.ino || !state.writers().is_some_and(|w| w.iter().all(|w| is_foreign(*w))))
        };
        let dirty: Vec<Arc<Inode>> = others.into_iter().filter(is_own).collect();
        let store = dirty.iter().map(|inode| async move {
            let errors = inode.lock().errors();
            self.shared.write_out(inode, Urgency::Visible).await;
            if inode.lock().errors() == errors { Ok(()) } else { Err(Errno(libc::EIO)) }
        });
        futures_util::future::try_join_all(store).await.map(drop)
    }

    /// Has the process that the kernel calls so asked for locks on the file since it last closed it?
    pub fn has_process_locked(&self, ino: Ino, process: u64) -> bool {
        self.lock_owners.lock().get(&(ino, process)).is_some_and(|owner| owner.is_process)
    }

    /// The process closes a descriptor of the file: its locks of that file are to go, through whichever descriptor it took them.
    /// From here on a process of the same name in the kernel is another one.
    pub(super) fn take_lock_owner(&self, ino: Ino, process: u64) -> Option<u64> {
        self.lock_owners.lock().remove(&(ino, process)).map(|owner| owner.id)
    }

    pub(super) async fn unlock_process(&self, inode: &Arc<Inode>, owner: Option<u64>) {
        if let Some(owner) = owner {
            self.unlock_owner(inode, LockClass::Process, owner).await;
        }
    }

    /// The last descriptor of an open file is closed: the locks of the open file go, and what is left of those that processes took
    /// through it.
    pub(super) async fn unlock_description(&self, file: &OpenFile, handle: FileHandle) {
        for class in [LockClass::Flock, LockClass::Description] {
            self.unlock_owner(&file.inode, class, handle.0).await;
        }
        let owners = std::mem::take(&mut *file.locks.lock());
        for owner in owners {
            if self.shared.meta.holds_lock(file.inode.ino, LockClass::Process, owner) {
                self.lock_owners.lock().retain(|_, known| known.id != owner);
                self.unlock_owner(&file.inode, LockClass::Process, owner).await;
            }
        }
    }

    async fn unlock_owner(&self, inode: &Arc<Inode>, class: LockClass, owner: u64) {
        if !self.shared.meta.holds_lock(inode.ino, class, owner) {
            return;
        }
        let wish = LockWish { class, owner, range: LockRange::WHOLE, kind: None, pid: 0 };
        // Whoever wrote under it may be gone: all that is dirty may be its.
        if self.shared.meta.locks_exclusively(inode.ino, &wish)
            && let Err(error) = self.store_writes(inode, &|_| false).await
        {
            // Stored later, it would overwrite what the next holder writes.
            warn!(ino = %inode.ino, ?error, "what was written under a lock could not be stored before its file was closed: it is lost");
            let freed = inode.lock().lose_writes(error);
            self.shared.budget.sub(freed);
        }
        if let Err(error) = self.shared.meta.set_lock(inode.ino, wish, false).await {
            warn!(ino = %inode.ino, ?error, "the locks of a closed file could not be let go; it is tried again");
        }
    }

    /// Locks that were held on these files are lost: others may have changed them since. What was open under such a lock does not
    /// work any more, and what was written under it is not stored.
    pub(super) fn lose_locks(&self, inos: &[Ino]) {
        let files: Vec<Arc<OpenFile>> = self.files.lock().values().cloned().collect();
        for file in files.iter().filter(|file| inos.contains(&file.inode.ino)) {
            file.lose_locks();
        }
        for inode in inos.iter().filter_map(|ino| self.inode(*ino)) {
            let freed = inode.lock().lose_writes(Errno(libc::EIO));
            self.shared.budget.sub(freed);
            if let Some(kernel) = self.kernel.get() {
                let kernel = Arc::clone(kernel);
                drop(tokio::task::spawn_blocking(move || kernel.pages_changed(inode.ino)));
            }
        }
    }

    /// A change of the file that its caller was not there to hear of: the kernel's pages may show it as it was.
    pub fn distrust_pages(&self, ino: Ino) {
        if let Some(inode) = self.inode(ino) {
            inode.lock().distrust_pages();
        }
        self.kernel_versions.lock().remove(&ino);
        if let Some(kernel) = self.kernel.get() {
            kernel.attributes_changed(ino);
            let kernel = Arc::clone(kernel);
            drop(tokio::task::spawn_blocking(move || kernel.pages_changed(ino)));
        }
    }

    /// `EIO` if a lock that was held through this open file, or another one of the same file, was lost.
    pub fn check_locks(&self, handle: FileHandle) -> FsResult<()> {
        self.file(handle)?.check_locks()
    }
}

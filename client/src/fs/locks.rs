//! Advisory locks of programs: between all mounts, and with the data that they protect.
//!
//! What was written under a lock is stored before the lock is let go, and who takes one sees the file as it is then.

use std::{future::Future, sync::Arc};

use holdfast_common::{
    Ino,
    locks::{Lock, LockClass, LockRange},
    wire::meta::Foreign,
};
use tracing::warn;

use super::{Errno, FileHandle, Fs, FsResult, inode::Inode, open::OpenFile, shared::Urgency};
use crate::remote::locks::LockOutcome;
pub use crate::remote::locks::LockWish;

impl Fs {
    /// Takes, changes or lets go of a lock. With `wait` until it is there, or `interrupted` (then `EINTR`); without, `EAGAIN` if it is
    /// not to be had. `EDEADLK` if whoever has it waits for this owner.
    pub async fn set_lock(
        &self,
        ino: Ino,
        handle: FileHandle,
        wish: LockWish,
        wait: bool,
        interrupted: impl Future<Output = ()>,
    ) -> FsResult<()> {
        let file = self.file(handle)?;
        if wish.kind.is_none() {
            return self.unlock(&file.inode, wish).await;
        }
        file.check_locks()?;
        tokio::pin!(interrupted);
        loop {
            let mut waiting = match self.shared.meta.set_lock(ino, wish, wait).await? {
                LockOutcome::Granted(foreign) => return self.locked(&file, &wish, foreign).await,
                LockOutcome::Free => return Ok(()),
                LockOutcome::Held => return Err(Errno(libc::EAGAIN)),
                LockOutcome::Waiting(waiting) => waiting,
            };
            tokio::select! {
                granted = waiting.granted() => {
                    if let Some(foreign) = granted {
                        self.shared.meta.note_granted(ino, &wish);
                        return self.locked(&file, &wish, foreign).await;
                    }
                    // The server has forgotten who waits.
                }
                () = &mut interrupted => {
                    let too_late = self.shared.meta.cancel_lock(ino, &wish, &waiting).await;
                    let foreign = too_late.ok_or(Errno(libc::EINTR))?;
                    return self.locked(&file, &wish, foreign).await;
                }
            }
        }
    }

    /// Somebody who would be in the way of `wish`, which has a kind.
    pub async fn test_lock(&self, ino: Ino, wish: LockWish) -> FsResult<Option<Lock>> {
        self.shared.meta.test_lock(ino, &wish).await
    }

    /// The lock is held: nothing is believed any more that whoever had it before may have changed.
    async fn locked(&self, file: &OpenFile, wish: &LockWish, foreign: Foreign) -> FsResult<()> {
        if wish.class != LockClass::Process || wish.range == LockRange::WHOLE {
            // A description's goes with its last close. So does what may be one: see `fuse::caller`.
            file.locks.lock().insert((wish.class, wish.owner));
        }
        self.catch_up(foreign).await
    }

    async fn unlock(&self, inode: &Arc<Inode>, wish: LockWish) -> FsResult<()> {
        if self.shared.meta.locks_exclusively(inode.ino, &wish) && !inode.lock().is_clean() {
            self.shared.write_out(inode, Urgency::Visible).await;
        }
        self.shared.meta.set_lock(inode.ino, wish, false).await.map(drop)
    }

    /// A process has closed a descriptor of the file: its locks of that file go, through whichever descriptor it took them.
    pub(super) async fn unlock_process(&self, inode: &Arc<Inode>, owner: u64) {
        self.unlock_owner(inode, LockClass::Process, owner).await;
    }

    /// The last descriptor of an open file is closed: the locks of the open file go.
    pub(super) async fn unlock_description(&self, file: &OpenFile) {
        let owners = std::mem::take(&mut *file.locks.lock());
        for (class, owner) in owners {
            self.unlock_owner(&file.inode, class, owner).await;
        }
    }

    async fn unlock_owner(&self, inode: &Arc<Inode>, class: LockClass, owner: u64) {
        if !self.shared.meta.holds_lock(inode.ino, class, owner) {
            return;
        }
        let wish = LockWish { class, owner, range: LockRange::WHOLE, kind: None, pid: 0 };
        if let Err(error) = self.unlock(inode, wish).await {
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
}

//! What other mounts have changed is taken out of this mount's caches, and the kernel's.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use holdfast_common::{
    Ino,
    limits::FOREIGN_SPAN,
    wire::meta::{Change, Foreign, MetaAnswer, Query, Reach},
};

use super::{Errno, Fs, FsResult, inode::Inode};
use crate::{remote::meta::unexpected, sys::boot_time};

/// Files that are looked at anew at the same time.
const LOOKS_AT_ONCE: usize = 32;

impl Fs {
    /// From here on nothing is believed in a form that it had before these changes.
    pub(super) async fn catch_up(&self, mut foreign: Foreign) -> FsResult<()> {
        let begun = self.shared.meta.begin_catching_up();
        if begun.1 {
            foreign.reach = Reach::Nothing;
        }
        let inos: BTreeSet<Ino> = foreign.changes.iter().filter_map(changed_inode).collect();
        if !inos.is_empty() || foreign.reach != Reach::Complete {
            self.forget_attributes(&inos, foreign.reach);
            self.forget_listings(self.listings.take_open(Duration::ZERO, boot_time())).await?;
        }
        self.forget_names(foreign.changes).await?;
        if foreign.reach == Reach::Nothing {
            // What is not known to have changed: caches of names and attributes believe nothing for longer.
            tokio::time::sleep(FOREIGN_SPAN).await;
        }
        let stale: Vec<Arc<Inode>> = {
            let inodes = self.inodes.lock();
            let is_stale = |inode: &&Arc<Inode>| foreign.reach != Reach::Complete || inos.contains(&inode.ino);
            inodes.values().filter(is_stale).cloned().collect()
        };
        for some in stale.chunks(LOOKS_AT_ONCE) {
            let looks = some.iter().map(|inode| self.look_anew(inode));
            futures_util::future::try_join_all(looks).await?;
        }
        self.shared.meta.note_foreign_seen(begun, foreign.through);
        Ok(())
    }

    fn forget_attributes(&self, inos: &BTreeSet<Ino>, reach: Reach) {
        self.told.forget_all();
        self.shared.meta.names().distrust_attrs(boot_time());
        if reach != Reach::Complete {
            self.plain.forget_all();
        }
        for ino in inos {
            self.plain.forget(*ino);
            if let Some(kernel) = self.kernel.get() {
                kernel.attributes_changed(*ino);
            }
        }
    }

    /// Has the kernel forget what it may hand out of these directories, which are open, without asking.
    pub(super) async fn forget_listings(&self, inos: Vec<Ino>) -> FsResult<()> {
        let Some(kernel) = self.kernel.get().filter(|_| !inos.is_empty()) else { return Ok(()) };
        let kernel = Arc::clone(kernel);
        let forget = move || inos.into_iter().for_each(|ino| kernel.pages_changed(ino));
        tokio::task::spawn_blocking(forget).await.map_err(|_| Errno(libc::EIO))
    }

    async fn forget_names(&self, changes: Vec<Change>) -> FsResult<()> {
        let is_name = |change: &Change| matches!(change, Change::Name(..));
        let Some(kernel) = self.kernel.get().filter(|_| changes.iter().any(is_name)) else { return Ok(()) };
        let kernel = Arc::clone(kernel);
        let forget = move || {
            for change in changes {
                if let Change::Name(parent, name) = change {
                    kernel.name_changed(parent, &name);
                }
            }
        };
        tokio::task::spawn_blocking(forget).await.map_err(|_| Errno(libc::EIO))
    }

    /// Asks what an open file is now. If others have changed its data, the kernel's pages of it go.
    async fn look_anew(&self, inode: &Arc<Inode>) -> FsResult<()> {
        let ino = inode.ino;
        let attr = match self.shared.meta.query(Query::GetAttr { ino }).await {
            Ok(MetaAnswer::Attr(attr)) => attr,
            Ok(other) => return Err(unexpected(&other)),
            // Closed, and gone, meanwhile.
            Err(Errno(libc::ENOENT | libc::ESTALE)) => return Ok(()),
            Err(error) => return Err(error),
        };
        self.plain.learn(&attr);
        let are_true = {
            let mut state = inode.lock();
            state.learn(self.accesses.shown(attr));
            let are_true = state.pages_are_true();
            if !are_true {
                // Not true before they are gone: whoever looks meanwhile must not believe them.
                state.distrust_pages();
            }
            are_true
        };
        let Some(kernel) = self.kernel.get() else { return Ok(()) };
        kernel.attributes_changed(ino);
        if !are_true {
            let kernel = Arc::clone(kernel);
            tokio::task::spawn_blocking(move || kernel.pages_changed(ino)).await.map_err(|_| Errno(libc::EIO))?;
            inode.lock().show_pages(attr.data_version);
        }
        Ok(())
    }
}

fn changed_inode(change: &Change) -> Option<Ino> {
    match change {
        Change::Inode(ino) => Some(*ino),
        Change::Name(..) => None,
    }
}

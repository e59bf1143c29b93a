//! Names and attributes: one round trip each.

use std::{sync::Arc, time::Duration};

use holdfast_common::{
    Attr, Ino, Kind, Position,
    limits::FILE_SIZE_MAX,
    wire::meta::{MetaAnswer, Mutated, NewInode, Op, Query, RenameMode, SetAttr, StatFs, UMASK_SHIFT, XattrMode},
};
use tracing::error;

use super::{Caller, Errno, FileHandle, Fs, FsResult, MakeRequest, plain};
use crate::{cache::names::Known, fs::shared::Urgency, remote::meta::unexpected, sys::boot_time};

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub attr: Attr,
    /// How long the attributes may be believed.
    pub valid_for: Duration,
}

/// What a create, mkdir, mknod or symlink made or found.
pub(super) struct Made {
    pub attr: Attr,
    pub created: bool,
    pub position: Position,
}

pub(super) fn new_inode(caller: Caller, request: MakeRequest) -> NewInode {
    let MakeRequest { kind, mode, rdev, target } = request;
    let mode = mode | (caller.umask & 0o777) << UMASK_SHIFT;
    NewInode { kind, mode, uid: caller.uid, gid: caller.gid, rdev, target }
}

impl Fs {
    /// What the name stands for. From memory, if this mount has a lease on the directory and knows.
    pub async fn lookup(&self, parent: Ino, name: &[u8]) -> FsResult<Found> {
        match self.shared.meta.names().look(parent, name, boot_time()) {
            Known::Absent => return Err(Errno(libc::ENOENT)),
            // Of an open file this mount may know more.
            Known::Present(attr, age) if self.inode(attr.ino).is_none() => {
                // Nothing is learnt of what is not new.
                return Ok(Found {
                    attr: self.accesses.shown(attr),
                    valid_for: self.attribute_timeout().saturating_sub(age),
                });
            }
            Known::Present(..) | Known::Unknown => {}
            Known::WorthListing(listing) => {
                let meta = Arc::clone(&self.shared.meta);
                drop(tokio::spawn(async move { meta.list(listing).await }));
            }
            Known::WorthAGlimpse(glimpse) => {
                self.listings.note_looked_at(parent, boot_time());
                let meta = Arc::clone(&self.shared.meta);
                drop(tokio::spawn(async move { meta.glimpse(glimpse).await }));
            }
        }
        let attr = self.ask_for_name(parent, name).await?;
        Ok(Found { attr, valid_for: self.attribute_timeout() })
    }

    async fn ask_for_name(&self, parent: Ino, name: &[u8]) -> FsResult<Attr> {
        match self.shared.meta.query(Query::Lookup { parent, name: name.to_vec() }).await? {
            MetaAnswer::Attr(attr) => Ok(self.learn(attr)),
            other => Err(unexpected(&other)),
        }
    }

    /// The kernel forgot the inode: what was kept for its sake may go.
    pub fn forget(&self, ino: Ino) {
        match self.inode(ino) {
            Some(inode) => inode.lock().forget_pages(),
            None => drop(self.kernel_versions.lock().remove(&ino)),
        }
        self.listings.forget(ino);
    }

    pub async fn getattr(&self, ino: Ino) -> FsResult<Attr> {
        if let Some(attr) = self.inode(ino).and_then(|inode| inode.lock().fresh_attr()) {
            return Ok(self.accesses.shown(attr));
        }
        if let Some(attr) = self.told.take(ino) {
            return Ok(self.learn(attr));
        }
        match self.shared.meta.query(Query::GetAttr { ino }).await? {
            MetaAnswer::Attr(attr) => Ok(self.learn(attr)),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn setattr(&self, _caller: Caller, ino: Ino, set: SetAttr) -> FsResult<Attr> {
        if set.atime.is_some() {
            self.accesses.forget(ino);
        }
        let Some(inode) = self.inode(ino) else { return self.change(ino, Op::SetAttr { ino, set }).await };
        // A new size or time must not be undone by bytes that were written before it and are committed after it.
        let cut = set.size.map_or_else(Vec::new, |size| inode.lock().take_dirty(size..u64::MAX));
        let cut_bytes: u64 = cut.iter().map(|(_, extent)| extent.bytes.len() as u64).sum();
        let settled = match set.size.is_some() || set.mtime.is_some() {
            true => self.settle(&inode).await,
            false => Ok(()),
        };
        let changed = match settled {
            Ok(()) => self.change(ino, Op::SetAttr { ino, set }).await,
            Err(error) => Err(error),
        };
        let freed = if changed.is_ok() { cut_bytes } else { inode.lock().put_back_dirty(cut) };
        self.shared.budget.sub(freed);
        changed
    }

    pub async fn readlink(&self, ino: Ino) -> FsResult<Vec<u8>> {
        match self.shared.meta.query(Query::ReadLink { ino }).await? {
            MetaAnswer::Link(target) => {
                self.note_listed(ino);
                Ok(target)
            }
            other => Err(unexpected(&other)),
        }
    }

    /// mkdir, mknod, symlink.
    pub async fn make(&self, caller: Caller, parent: Ino, name: &[u8], request: MakeRequest) -> FsResult<Attr> {
        let new = new_inode(caller, request);
        if let Some(made) = self.make_ahead(parent, name, &new, false) {
            return Ok(made);
        }
        let op = Op::Make { parent, name: name.to_vec(), new, exclusive: true, open: false };
        Ok(self.made(op).await?.attr)
    }

    /// Before the server knows, if that can be.
    pub(super) fn make_ahead(&self, parent: Ino, name: &[u8], new: &NewInode, open: bool) -> Option<Attr> {
        let (made, directory) = self.shared.meta.make_ahead(parent, name, new, open)?;
        self.told.note(&[directory]);
        self.plain.learn(&made);
        Some(made)
    }

    pub(super) async fn made(&self, op: Op) -> FsResult<Made> {
        let applied = self.shared.meta.mutate(op, false).await?;
        self.told.note(&applied.directories);
        match applied.outcome {
            Mutated::Inode { attr, created } => {
                self.plain.learn(&attr);
                Ok(Made { attr, created, position: applied.position })
            }
            other => Err(unanswered(&other)),
        }
    }

    pub async fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> FsResult<Attr> {
        match self.mutate(Op::Link { ino, parent, name: name.to_vec() }).await? {
            Mutated::Inode { attr, .. } => Ok(self.learn(attr)),
            other => Err(unanswered(&other)),
        }
    }

    pub async fn unlink(&self, parent: Ino, name: &[u8]) -> FsResult<()> {
        if self.remove_ahead(parent, name, false) {
            return Ok(());
        }
        self.remove(Op::Unlink { parent, name: name.to_vec() }).await
    }

    pub async fn rmdir(&self, parent: Ino, name: &[u8]) -> FsResult<()> {
        if self.remove_ahead(parent, name, true) {
            return Ok(());
        }
        self.remove(Op::Rmdir { parent, name: name.to_vec() }).await
    }

    /// Before the server knows, if that can be. Of an inode about which this mount may know more, it has to be asked.
    fn remove_ahead(&self, parent: Ino, name: &[u8], is_directory: bool) -> bool {
        let may = |ino| self.inode(ino).is_none();
        let Some((ino, directory)) = self.shared.meta.remove_ahead(parent, name, is_directory, may) else {
            return false;
        };
        self.told.forget(ino);
        self.told.note(&[directory]);
        self.accesses.forget(ino);
        true
    }

    async fn remove(&self, op: Op) -> FsResult<()> {
        match self.mutate(op).await? {
            Mutated::Removed { attr } => {
                self.lost_a_name(attr);
                Ok(())
            }
            other => Err(unanswered(&other)),
        }
    }

    pub async fn rename(&self, from: Ino, from_name: &[u8], to: Ino, to_name: &[u8], mode: RenameMode) -> FsResult<()> {
        let op = Op::Rename { from, from_name: from_name.to_vec(), to, to_name: to_name.to_vec(), mode };
        match self.mutate(op).await? {
            Mutated::Renamed { moved, replaced } => {
                self.learn(moved);
                if let Some(replaced) = replaced {
                    self.lost_a_name(replaced);
                }
                Ok(())
            }
            other => Err(unanswered(&other)),
        }
    }

    /// What nobody can reach any more need not be written out.
    fn lost_a_name(&self, attr: Attr) {
        self.learn(attr);
        let Some(inode) = self.inode(attr.ino) else { return };
        let mut state = inode.lock();
        if attr.nlink == 0 && state.opens == 0 && attr.kind == Kind::File {
            let freed = state.forget_dirty(0..u64::MAX);
            drop(state);
            self.shared.budget.sub(freed);
            self.drop_if_idle(&inode);
        }
    }

    pub async fn statfs(&self) -> FsResult<StatFs> {
        match self.shared.meta.query(Query::StatFs).await? {
            MetaAnswer::StatFs(stat) => Ok(stat),
            other => Err(unexpected(&other)),
        }
    }

    /// `EPERM` unless the caller is root, or owns it.
    pub async fn check_owner(&self, caller: Caller, ino: Ino) -> FsResult<()> {
        if caller.uid == 0 {
            return Ok(());
        }
        match self.shared.meta.query(Query::GetAttr { ino }).await? {
            MetaAnswer::Attr(attr) if attr.uid == caller.uid => Ok(()),
            MetaAnswer::Attr(_) => Err(Errno(libc::EPERM)),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> FsResult<()> {
        self.change_xattr(ino, Op::SetXattr { ino, name: name.to_vec(), value: value.to_vec(), mode }).await
    }

    pub async fn getxattr(&self, ino: Ino, name: &[u8]) -> FsResult<Vec<u8>> {
        if self.plain.lacks(ino, name) {
            return Err(Errno(libc::ENODATA));
        }
        if plain::is_asked_often(name) {
            // The answer is true of all of them, and for a while: before each write of a long row of writes the kernel asks.
            match self.shared.meta.query(Query::GetAttr { ino }).await? {
                MetaAnswer::Attr(attr) => self.plain.learn(&attr),
                other => return Err(unexpected(&other)),
            }
            if self.plain.lacks(ino, name) {
                return Err(Errno(libc::ENODATA));
            }
        }
        match self.shared.meta.query(Query::GetXattr { ino, name: name.to_vec() }).await? {
            MetaAnswer::Bytes(value) => Ok(value),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn listxattr(&self, ino: Ino) -> FsResult<Vec<Vec<u8>>> {
        match self.shared.meta.query(Query::ListXattr { ino }).await? {
            MetaAnswer::Names(names) => Ok(names),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn removexattr(&self, ino: Ino, name: &[u8]) -> FsResult<()> {
        self.change_xattr(ino, Op::RemoveXattr { ino, name: name.to_vec() }).await
    }

    async fn change_xattr(&self, ino: Ino, op: Op) -> FsResult<()> {
        let changed = self.shared.meta.mutate(op, false).await;
        self.plain.forget(ino);
        self.told.forget(ino);
        self.shared.meta.names().distrust_attr(ino, boot_time());
        let applied = changed?;
        if let Some(inode) = self.inode(ino) {
            let mut state = inode.lock();
            state.note_position(applied.position);
            // A list of permissions changes the mode.
            state.distrust_attr();
        }
        Ok(())
    }

    /// SEEK_DATA (`hole: false`) and SEEK_HOLE.
    pub async fn seek(&self, ino: Ino, offset: u64, hole: bool) -> FsResult<u64> {
        if let Some(inode) = self.inode(ino) {
            self.settle(&inode).await?;
        }
        let mut from = offset;
        loop {
            match self.shared.meta.query(Query::Seek { ino, offset: from, hole }).await {
                Ok(MetaAnswer::Offset(found)) => return Ok(found),
                Ok(MetaAnswer::OffsetBeyond(next)) if next > from => from = next,
                Ok(other) => return Err(unexpected(&other)),
                // The file has become shorter than what had been looked at: look again.
                Err(Errno(libc::ENOENT)) if from > offset => from = offset,
                Err(Errno(libc::ENOENT)) => return Err(Errno(libc::ENXIO)),
                Err(error) => return Err(error),
            }
        }
    }

    /// fallocate(2) with its `mode` bits, as far as they make zeroes. Preallocation is refused: what is written later is stored
    /// anew, whatever was set aside, so the promise that it cannot meet a full disk could not be kept.
    pub async fn fallocate(&self, ino: Ino, _handle: FileHandle, offset: u64, length: u64, mode: i32) -> FsResult<()> {
        const HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO_KEEP: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        let end = offset.checked_add(length).filter(|end| *end <= FILE_SIZE_MAX);
        let grows = mode & libc::FALLOC_FL_KEEP_SIZE == 0;
        if grows && end.is_none() {
            return Err(Errno(libc::EFBIG));
        }
        match mode {
            HOLE | ZERO_KEEP => self.punch(ino, offset, length, false).await,
            libc::FALLOC_FL_ZERO_RANGE => self.punch(ino, offset, length, true).await,
            _ => Err(Errno(libc::EOPNOTSUPP)),
        }
    }

    async fn punch(&self, ino: Ino, offset: u64, length: u64, grow: bool) -> FsResult<()> {
        if let Some(inode) = self.inode(ino) {
            self.settle(&inode).await?;
        }
        self.change(ino, Op::Punch { ino, offset, length, grow }).await.map(drop)
    }

    pub async fn copy_file_range(
        &self,
        from: Ino,
        from_offset: u64,
        to: Ino,
        to_offset: u64,
        length: u64,
    ) -> FsResult<u64> {
        for inode in [self.inode(from), self.inode(to)].into_iter().flatten() {
            self.settle(&inode).await?;
        }
        let size = self.getattr(from).await?.size;
        let length = length.min(size.saturating_sub(from_offset));
        if length > 0 {
            self.change(to, Op::CopyRange { from, from_offset, to, to_offset, length }).await?;
        }
        Ok(length)
    }

    /// Applies a change of one inode's attributes or pieces that was not made by writing to it here.
    async fn change(&self, ino: Ino, op: Op) -> FsResult<Attr> {
        let applied = self.shared.meta.mutate(op, false).await?;
        self.told.forget(ino);
        let Mutated::Inode { attr, .. } = applied.outcome else { return Err(unanswered(&applied.outcome)) };
        Ok(self.changed(ino, attr, applied.position))
    }

    /// Lets the state of a file follow a change that this mount made.
    fn changed(&self, ino: Ino, attr: Attr, position: Position) -> Attr {
        let Some(inode) = self.inode(ino) else { return attr };
        let mut state = inode.lock();
        state.note_position(position);
        state.learn_own(attr);
        state.attr()
    }

    /// Stores what is dirty, and waits for it. `EIO` if it could not be stored.
    pub(super) async fn settle(&self, inode: &Arc<super::inode::Inode>) -> FsResult<()> {
        if inode.lock().is_clean() {
            return Ok(());
        }
        let before = inode.lock().errors();
        self.shared.write_out(inode, Urgency::Visible).await;
        let mut heard = before;
        inode.lock().unheard_error(&mut heard).map_or(Ok(()), Err)
    }

    async fn mutate(&self, op: Op) -> FsResult<Mutated> {
        let applied = self.shared.meta.mutate(op, false).await?;
        self.told.note(&applied.directories);
        Ok(applied.outcome)
    }
}

fn unanswered(outcome: &Mutated) -> Errno {
    error!(?outcome, "the metadata server answered another change");
    Errno(libc::EIO)
}

//! Names and attributes: one round trip each.

use holdfast_common::{
    Attr, Ino, Kind,
    wire::meta::{MetaAnswer, Mutated, NewInode, Op, Query, RenameMode, SetAttr, StatFs, XattrMode},
};
use tracing::error;

use super::{Caller, Errno, FileHandle, Fs, FsResult, MakeRequest};
use crate::remote::meta::unexpected;

impl Fs {
    pub async fn lookup(&self, parent: Ino, name: &[u8]) -> FsResult<Attr> {
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
    }

    pub async fn getattr(&self, ino: Ino) -> FsResult<Attr> {
        if let Some(attr) = self.inode(ino).and_then(|inode| inode.lock().fresh_attr()) {
            return Ok(attr);
        }
        match self.shared.meta.query(Query::GetAttr { ino }).await? {
            MetaAnswer::Attr(attr) => Ok(self.learn(attr)),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn setattr(&self, _caller: Caller, ino: Ino, set: SetAttr) -> FsResult<Attr> {
        if let Some(inode) = self.inode(ino) {
            // A new size or time must not be undone by bytes that were written before it and are committed after it.
            if let Some(size) = set.size {
                let freed = inode.lock().forget_dirty(size..u64::MAX);
                self.shared.budget.sub(freed);
            }
            if set.size.is_some() || set.mtime.is_some() {
                self.settle(&inode).await?;
            }
        }
        let attr = self.change(ino, Op::SetAttr { ino, set }).await?;
        Ok(attr)
    }

    pub async fn readlink(&self, ino: Ino) -> FsResult<Vec<u8>> {
        match self.shared.meta.query(Query::ReadLink { ino }).await? {
            MetaAnswer::Link(target) => Ok(target),
            other => Err(unexpected(&other)),
        }
    }

    /// mkdir, mknod, symlink.
    pub async fn make(&self, caller: Caller, parent: Ino, name: &[u8], request: MakeRequest) -> FsResult<Attr> {
        let (attr, _) = self.make_inode(caller, parent, name, request, true, false).await?;
        Ok(attr)
    }

    /// The inode, and whether it is new.
    pub(super) async fn make_inode(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        request: MakeRequest,
        exclusive: bool,
        open: bool,
    ) -> FsResult<(Attr, bool)> {
        let MakeRequest { kind, mode, rdev, target } = request;
        let new = NewInode { kind, mode, uid: caller.uid, gid: caller.gid, rdev, target };
        match self.mutate(Op::Make { parent, name: name.to_vec(), new, exclusive, open }).await? {
            Mutated::Inode { attr, created } => Ok((attr, created)),
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
        self.remove(Op::Unlink { parent, name: name.to_vec() }).await
    }

    pub async fn rmdir(&self, parent: Ino, name: &[u8]) -> FsResult<()> {
        self.remove(Op::Rmdir { parent, name: name.to_vec() }).await
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

    pub async fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> FsResult<()> {
        let op = Op::SetXattr { ino, name: name.to_vec(), value: value.to_vec(), mode };
        self.mutate(op).await.map(drop)
    }

    pub async fn getxattr(&self, ino: Ino, name: &[u8]) -> FsResult<Vec<u8>> {
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
        self.mutate(Op::RemoveXattr { ino, name: name.to_vec() }).await.map(drop)
    }

    /// SEEK_DATA (`hole: false`) and SEEK_HOLE.
    pub async fn seek(&self, ino: Ino, offset: u64, hole: bool) -> FsResult<u64> {
        if let Some(inode) = self.inode(ino) {
            self.settle(&inode).await?;
        }
        match self.shared.meta.query(Query::Seek { ino, offset, hole }).await {
            Ok(MetaAnswer::Offset(offset)) => Ok(offset),
            Ok(other) => Err(unexpected(&other)),
            Err(Errno(libc::ENOENT)) => Err(Errno(libc::ENXIO)),
            Err(error) => Err(error),
        }
    }

    /// fallocate(2) with its `mode` bits. Space is checked, not reserved: a block is stored only when it is written.
    pub async fn fallocate(&self, ino: Ino, _handle: FileHandle, offset: u64, length: u64, mode: i32) -> FsResult<()> {
        const HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO_KEEP: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        match mode {
            0 => self.extend(ino, offset.checked_add(length).ok_or(Errno(libc::EFBIG))?, length).await,
            HOLE | ZERO_KEEP => self.punch(ino, offset, length, false).await,
            libc::FALLOC_FL_ZERO_RANGE => self.punch(ino, offset, length, true).await,
            _ => Err(Errno(libc::EOPNOTSUPP)),
        }
    }

    async fn extend(&self, ino: Ino, end: u64, length: u64) -> FsResult<()> {
        if self.statfs().await?.free_bytes < length {
            return Err(Errno(libc::ENOSPC));
        }
        let size = self.getattr(ino).await?.size;
        if end > size {
            self.punch(ino, size, end - size, true).await?;
        }
        Ok(())
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
        let Mutated::Inode { attr, .. } = applied.outcome else { return Err(unanswered(&applied.outcome)) };
        let Some(inode) = self.inode(ino) else { return Ok(attr) };
        let mut state = inode.lock();
        state.last_position = state.last_position.max(applied.position);
        if attr.data_version > state.map.version() {
            state.map.forget(attr.data_version);
        }
        state.learn_own(attr);
        Ok(state.attr())
    }

    /// Stores what is dirty, and waits for it. `EIO` if it could not be stored.
    pub(super) async fn settle(&self, inode: &std::sync::Arc<super::inode::Inode>) -> FsResult<()> {
        if inode.lock().is_clean() {
            return Ok(());
        }
        let before = inode.lock().errors();
        self.shared.write_out(inode, false).await;
        let mut heard = before;
        inode.lock().unheard_error(&mut heard).map_or(Ok(()), Err)
    }

    async fn mutate(&self, op: Op) -> FsResult<Mutated> {
        Ok(self.shared.meta.mutate(op, false).await?.outcome)
    }
}

fn unanswered(outcome: &Mutated) -> Errno {
    error!(?outcome, "the metadata server answered another change");
    Errno(libc::EIO)
}

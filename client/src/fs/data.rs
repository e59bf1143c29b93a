//! The bytes of files: read, write, flush, fsync.

use std::{collections::BTreeSet, ops::Range, sync::Arc};

use bytes::{Bytes, BytesMut};
use holdfast_common::{
    Attr, ChunkIndex, Ino,
    limits::{CHUNK_SIZE, FILE_SIZE_MAX},
    mode::{HAS_CAPABILITY, PERMISSIONS},
    wire::meta::{Query, SetAttr},
};
use tracing::warn;

use super::{
    Caller, Errno, FileHandle, Fs, FsResult,
    inode::{ChunkPlan, Inode, Which, split},
    open::{OpenFile, goes_around_pages},
};
use crate::{
    fs::shared::{FreshMap, MAP_TRIES, Urgency, unsteady},
    write::budget::{Amount, NoRoom},
};

/// What came of making a file durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sync {
    /// It was.
    Nothing,
    /// It is now.
    Waited,
    /// What was written could not be stored; the file's error says why.
    Failed,
}

/// How long an unmount waits for repairs that its reads have begun.
const MENDING_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

impl Fs {
    /// At most `size` bytes from `offset`, shorter only at the end of the file.
    pub async fn read(&self, _ino: Ino, handle: FileHandle, offset: u64, size: u32) -> FsResult<Bytes> {
        let file = self.file(handle)?;
        file.check_locks()?;
        let file_size = file.inode.lock().size();
        let end = offset.saturating_add(u64::from(size)).min(file_size);
        if offset >= end {
            return Ok(Bytes::new());
        }
        self.note_access(&file.inode);
        let sequential = self.read_ahead(&file, offset, end, file_size);
        let (first, from) = split(offset);
        let (last, to) = split(end - 1);
        if first == last {
            return self.read_chunk(&file.inode, first, from..to + 1, sequential).await;
        }
        self.read_chunks(&file.inode, offset..end, sequential).await
    }

    async fn read_chunks(&self, inode: &Arc<Inode>, range: Range<u64>, sequential: bool) -> FsResult<Bytes> {
        let reads = chunk_ranges(&range).map(|(chunk, within)| self.read_chunk(inode, chunk, within, sequential));
        let mut joined = BytesMut::new();
        for bytes in futures_util::future::join_all(reads).await {
            joined.extend_from_slice(&bytes?);
        }
        Ok(joined.freeze())
    }

    async fn read_chunk(
        &self,
        inode: &Arc<Inode>,
        chunk: ChunkIndex,
        within: Range<u32>,
        sequential: bool,
    ) -> FsResult<Bytes> {
        let mut fresh = FreshMap::default();
        let mut loads = 0;
        loop {
            let plan = inode.lock().plan(chunk, within.clone());
            let assembly = match plan {
                ChunkPlan::Bytes(bytes) => return Ok(bytes),
                ChunkPlan::Assemble(assembly) => assembly,
                ChunkPlan::UnknownMap if loads < MAP_TRIES => {
                    loads += 1;
                    self.shared.load_map(inode, chunk).await?;
                    continue;
                }
                ChunkPlan::UnknownMap => return Err(unsteady(inode)),
            };
            match self.shared.assemble(assembly, sequential).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => {
                    // The holders that are known do not help: there may be others by now, or other blocks.
                    fresh.wait(inode, error, self.shared.io_timeout).await?;
                    loads = 0;
                }
            }
        }
    }

    /// Notes a read, starts fetching what comes next, and tells whether the reader is sequential.
    fn read_ahead(&self, file: &Arc<OpenFile>, offset: u64, end: u64, size: u64) -> bool {
        let advice = file.ahead.lock().note(offset, end, size, self.read_ahead_max);
        for chunk in advice.prefetch {
            let (shared, inode) = (Arc::clone(&self.shared), Arc::clone(&file.inode));
            tokio::spawn(async move {
                if let Err(error) = shared.prefetch(&inode, ChunkIndex(chunk)).await {
                    // The read itself will meet the error, and report it.
                    tracing::debug!(ino = %inode.ino, chunk, ?error, "read-ahead failed");
                }
            });
        }
        // Who reads past the kernel's cache may come back.
        if !advice.passed.is_empty() && file.flags & libc::O_DIRECT == 0 && !goes_around_pages(file.flags) {
            self.shared.forget(&file.inode, advice.passed, advice.coming);
        }
        advice.sequential
    }

    /// All of `data` is accepted, or none. A handle that was opened to append writes at the end, wherever `offset` says.
    pub async fn write(&self, caller: Caller, ino: Ino, handle: FileHandle, offset: u64, data: Bytes) -> FsResult<()> {
        let file = self.file(handle)?;
        file.check_locks()?;
        if data.is_empty() {
            return Ok(());
        }
        self.wait_for_room(&file.inode).await?;
        let appends = file.flags & libc::O_APPEND != 0;
        if appends {
            self.drop_privileges(caller, &file.inode).await?;
            if file.inode.lock().append_offset().is_none() {
                self.settle(&file.inode).await?;
            }
        }
        let full = {
            let mut state = file.inode.lock();
            // Only the commit knows the end for certain. What cannot move is laid where this mount has its end.
            let end = if appends { state.append_offset() } else { None };
            let offset = if appends { end.unwrap_or(state.size()) } else { offset };
            let range = written_range(offset, data.len())?;
            match end {
                Some(_) => state.note_append(range),
                None => state.note_write(&range),
            }
            // A lock may have been lost while there was no room.
            file.check_locks()?;
            state.note_writer(caller.pid);
            let (grown, full) = state.write(offset, data, self.shared.clock.now());
            self.shared.budget.add(grown);
            full
        };
        if full {
            self.shared.start_uploads(&file.inode, Which::Full, Urgency::Visible);
        }
        if file.flags & (libc::O_SYNC | libc::O_DSYNC) != 0 {
            return self.fsync(ino, handle, true).await;
        }
        Ok(())
    }

    /// What the kernel does before it writes to its pages, and leaves out where it goes around them: capabilities go with any
    /// write, setuid and setgid with one by somebody unprivileged.
    async fn drop_privileges(&self, caller: Caller, inode: &Arc<Inode>) -> FsResult<()> {
        let attr = inode.lock().attr();
        if attr.mode & HAS_CAPABILITY != 0 {
            match self.removexattr(inode.ino, b"security.capability").await {
                Ok(()) | Err(Errno(libc::ENODATA)) => {}
                Err(error) => return Err(error),
            }
        }
        let kept = kept_mode(caller, &attr);
        if attr.mode & HAS_CAPABILITY != 0 || kept != attr.mode & PERMISSIONS {
            let set = SetAttr { mode: Some(kept), ..SetAttr::default() };
            self.setattr(caller, inode.ino, set).await?;
            if let Some(kernel) = self.kernel.get() {
                kernel.attributes_changed(inode.ino);
            }
        }
        Ok(())
    }

    /// Past the bound on dirty bytes a writer waits until some have been stored.
    async fn wait_for_room(&self, inode: &Inode) -> FsResult<()> {
        let amount = self.amount_under_way(inode);
        if self.shared.budget.has_room(amount) {
            return Ok(());
        }
        self.write_out_old(std::time::Duration::ZERO);
        self.shared.release_durable();
        self.shared.budget.wait_for_room(amount, self.shared.io_timeout).await.map_err(|no_room| {
            warn!(dirty = self.dirty_bytes(), ?no_room, "a write found no room: what was written before is not stored");
            match no_room {
                NoRoom::Full => Errno(libc::ENOSPC),
                NoRoom::Timeout => Errno(libc::EIO),
            }
        })
    }

    /// How much was written to the file that may not be durable yet.
    fn amount_under_way(&self, inode: &Inode) -> Amount {
        let state = inode.lock();
        let is_durable = state.to_make_durable().is_some_and(|position| self.shared.meta.is_durable(position));
        if state.is_clean() && is_durable { Amount::Little } else { Amount::of(state.written_since_sync()) }
    }

    /// Starts storing what has been dirty for longer than `age`.
    pub(super) fn write_out_old(&self, age: std::time::Duration) {
        let inodes: Vec<Arc<Inode>> = self.inodes.lock().values().cloned().collect();
        for inode in inodes {
            let old = inode.lock().dirty_since().is_some_and(|since| since.elapsed() >= age);
            if old {
                self.shared.start_uploads(&inode, Which::All, Urgency::Visible);
            }
        }
    }

    /// close(2) of one descriptor by the process that the kernel calls `owner`: what was written is visible to everyone when this
    /// returns, and the process has no locks on the file any more.
    pub async fn flush(&self, _ino: Ino, handle: FileHandle, owner: u64) -> FsResult<()> {
        let file = self.file(handle)?;
        let locks = self.take_lock_owner(file.inode.ino, owner);
        self.note_unseen_reads(&file);
        if !file.inode.lock().is_clean() {
            self.shared.write_out(&file.inode, Urgency::Visible).await;
        }
        self.unlock_process(&file.inode, locks).await;
        self.tell_error(&file)
    }

    /// What was written to the file before is on stable storage of its servers, and the metadata that name it are, when this
    /// returns. With `data_only` as well: the size and the map are part of what makes data readable.
    pub async fn fsync(&self, _ino: Ino, handle: FileHandle, _data_only: bool) -> FsResult<()> {
        let file = self.file(handle)?;
        file.check_locks()?;
        let written = file.inode.lock().written_since_sync();
        let syncing = (Amount::of(written) == Amount::Little).then(|| self.shared.budget.begin_sync());
        match self.make_file_durable(&file.inode).await? {
            Sync::Failed => {}
            synced => {
                file.inode.lock().forget_written_since_sync(written);
                if let Some(syncing) = syncing.filter(|_| synced == Sync::Waited) {
                    syncing.over();
                }
            }
        }
        self.tell_error(&file)
    }

    async fn make_file_durable(&self, inode: &Arc<Inode>) -> FsResult<Sync> {
        let (errors, is_inherited, is_clean) = {
            let state = inode.lock();
            (state.errors(), state.is_inherited(), state.is_clean())
        };
        let urgency = if is_inherited { Urgency::DurableBlocks } else { Urgency::Durable };
        self.shared.write_out(inode, urgency).await;
        let (failed, position) = {
            let state = inode.lock();
            (state.errors() > errors, state.to_make_durable())
        };
        if failed {
            return Ok(Sync::Failed);
        }
        if position.is_some_and(|position| self.shared.meta.is_durable(position)) {
            return Ok(if is_clean { Sync::Nothing } else { Sync::Waited });
        }
        self.shared.make_durable().await?;
        self.check_made(inode).await?;
        inode.lock().disinherit();
        Ok(Sync::Waited)
    }

    /// `ESTALE` if the file, which was made ahead of the server, is not there. After a barrier.
    async fn check_made(&self, inode: &Inode) -> FsResult<()> {
        if inode.lock().is_ahead() {
            self.shared.meta.query(Query::GetAttr { ino: inode.ino }).await?;
        }
        Ok(())
    }

    /// What the kernel has in its pages is read without a word. Who opened a file only to read it, and got those, has read it.
    fn note_unseen_reads(&self, file: &OpenFile) {
        if file.keeps_pages && file.flags & libc::O_ACCMODE == libc::O_RDONLY && file.inode.lock().size() > 0 {
            self.note_access(&file.inode);
            if let Some(kernel) = self.kernel.get() {
                kernel.attributes_changed(file.inode.ino);
            }
        }
    }

    fn tell_error(&self, file: &OpenFile) -> FsResult<()> {
        let error = file.inode.lock().unheard_error(&mut file.errors_heard.lock());
        error.map_or(Ok(()), Err)
    }

    /// Everything written through this mount is visible, and with `durable` durable, when this returns.
    pub async fn sync_all(&self, durable: bool) -> FsResult<()> {
        let inodes: Vec<Arc<Inode>> = self.inodes.lock().values().cloned().collect();
        let settle = inodes.iter().map(|inode| self.settle(inode));
        let results = futures_util::future::join_all(settle).await;
        results.into_iter().collect::<FsResult<Vec<()>>>()?;
        if durable {
            self.shared.make_durable().await?;
            self.shared.meta.hear_failure()?;
        }
        Ok(())
    }

    /// Flushes everything and ends the session. For unmount.
    pub async fn shutdown(&self) -> FsResult<()> {
        self.tell_accesses().await;
        let flushed = self.sync_all(true).await;
        if let Err(error) = &flushed {
            tracing::error!(
                dirty = self.dirty_bytes(),
                ?error,
                "data could not be stored before unmounting and are lost"
            );
        }
        self.shared.blocks.mended(MENDING_PATIENCE).await;
        if let Err(error) = self.shared.meta.close().await {
            warn!(?error, "the session could not be closed; it will expire");
        }
        flushed
    }
}

impl super::shared::Shared {
    /// Drops the blocks of chunks `passed` from the cache, but for those that `coming` have as well.
    fn forget(&self, inode: &Arc<Inode>, passed: Range<u32>, coming: Range<u32>) {
        let blocks = |chunks: Range<u32>| {
            let state = inode.lock();
            let mut hashes = BTreeSet::new();
            for chunk in chunks.map(ChunkIndex) {
                if let ChunkPlan::Assemble(assembly) = state.plan(chunk, 0..holdfast_common::limits::BLOCK_SIZE_MAX) {
                    hashes.extend(assembly.parts.iter().map(|(_, place)| place.hash));
                }
            }
            hashes
        };
        blocks(passed).difference(&blocks(coming)).for_each(|hash| self.fetcher.forget(*hash));
    }

    /// Brings one chunk's blocks into the cache.
    async fn prefetch(&self, inode: &Arc<Inode>, chunk: ChunkIndex) -> FsResult<()> {
        for _ in 0..MAP_TRIES {
            let plan = inode.lock().plan(chunk, 0..holdfast_common::limits::BLOCK_SIZE_MAX);
            match plan {
                ChunkPlan::Bytes(_) => return Ok(()),
                ChunkPlan::UnknownMap => self.load_map(inode, chunk).await?,
                ChunkPlan::Assemble(assembly) => {
                    for (_, place) in &assembly.parts {
                        self.fetcher.whole(place).await?;
                    }
                    return Ok(());
                }
            }
        }
        Err(unsteady(inode))
    }
}

fn written_range(offset: u64, length: usize) -> FsResult<Range<u64>> {
    let end = offset.checked_add(length as u64).filter(|end| *end <= FILE_SIZE_MAX);
    Ok(offset..end.ok_or(Errno(libc::EFBIG))?)
}

/// The mode that a file keeps when `caller` writes to it. Setgid without execution by the group goes only with a writer who
/// is not of that group (Linux's `setattr_should_drop_sgid`; further groups of the writer are not known here).
fn kept_mode(caller: Caller, attr: &Attr) -> u32 {
    let mode = attr.mode & PERMISSIONS;
    if caller.uid == 0 {
        return mode;
    }
    let drops_group = mode & libc::S_IXGRP != 0 || caller.gid != attr.gid;
    mode & !libc::S_ISUID & if drops_group { !libc::S_ISGID } else { !0 }
}

/// The chunks that `range` reaches into, and where.
fn chunk_ranges(range: &Range<u64>) -> impl Iterator<Item = (ChunkIndex, Range<u32>)> + use<> {
    let (start, end) = (range.start, range.end);
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (chunk, from) = split(at);
        let to = end.min(at - u64::from(from) + CHUNK_SIZE);
        let length = u32::try_from(to - at).unwrap_or(0);
        at = to;
        Some((chunk, from..from + length))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_at_chunk_borders() {
        let cut = |range: Range<u64>| chunk_ranges(&range).map(|(chunk, within)| (chunk.0, within)).collect::<Vec<_>>();
        let mib = 1 << 20;
        assert_eq!(cut(5..9), [(0, 5..9)]);
        assert_eq!(cut(mib - 1..mib + 1), [(0, (1 << 20) - 1..1 << 20), (1, 0..1)]);
        assert_eq!(cut(mib..3 * mib), [(1, 0..1 << 20), (2, 0..1 << 20)]);
        assert_eq!(cut(7..7), []);
    }
}

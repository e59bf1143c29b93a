//! What the operations on files share: the servers, the queues and the bounds of one mount.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use holdfast_common::{
    Block, BlockHash, ChunkIndex, Position, ServerId,
    clock::Clock,
    enough_replicas,
    limits::{BLOCK_SIZE_MAX, PIECES_PER_CHUNK_COMPACT, PIECES_PER_CHUNK_MAX, REPLICAS, REPLICAS_MAX},
    wire::meta::{BlockPlace, FileCommit, MetaAnswer, Mutated, NewBlock, Op, Query},
};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tracing::warn;

use super::{
    Errno, FsResult,
    inode::{AppendPart, Assembly, ChunkPlan, Inode, Upload, Which},
};
use crate::{
    read::fetch::Fetcher,
    remote::{
        blocks::{BlockClient, TRY_FRESH_MAP, VANISHED},
        meta::{MetaClient, PUT_AGAIN, unexpected},
        retry::Retry,
    },
    write::{
        budget::{DirtyBudget, LITTLE},
        buffer::Extent,
        commit::{Committed, Committer, Item},
        cut::{self, Cut},
        retained::{Retained, RetainedBlock},
    },
};

/// Chunks of one upload that are compacted, unless more have to be: each costs a chunk's worth of reading and memory.
const COMPACT_AT_ONCE: usize = 4;
/// Pieces past which a chunk has to be compacted before the server refuses more.
const PIECES_URGENT: usize = PIECES_PER_CHUNK_MAX / 2;
/// Times that a map may change under a reader before it is given up.
pub(super) const MAP_TRIES: usize = 64;
/// Chunks whose map is asked for at a time.
const MAP_BATCH: u32 = 256;
/// Uploads in flight, and small ones besides; with at most 4 MiB each, and a quarter of one, they bound what is encrypted and queued at a time.
pub(super) const UPLOADS_IN_FLIGHT_MAX: usize = 24;
/// Dirty bytes up to which an fsync lets every put wait for its own fdatasync, which saves a round trip. Beyond, the puts
/// stream and one barrier makes them durable together.
const DURABLE_PUT_BYTES_MAX: u64 = 4 << 20;

/// Blocks that are not durable after this long are looked after: barriers are made every second.
const RETAINED_AGE_MAX: Duration = Duration::from_millis(1500);
/// Blocks that are stored again at a time.
const BLOCKS_AGAIN: usize = 64;

#[derive(Debug)]
pub(super) struct Shared {
    pub meta: Arc<MetaClient>,
    pub blocks: Arc<BlockClient>,
    pub fetcher: Arc<Fetcher>,
    pub committer: Committer,
    pub budget: DirtyBudget,
    pub retained: Mutex<Retained>,
    pub upload_slots: Semaphore,
    pub small_upload_slots: Semaphore,
    pub io_timeout: Duration,
    pub clock: Arc<dyn ClockDebug>,
}

/// A clock that can be shown in debug output.
pub trait ClockDebug: Clock + std::fmt::Debug {}
impl<T: Clock + std::fmt::Debug> ClockDebug for T {}

impl Shared {
    // ---- writing out ----

    /// Starts uploads of what is dirty and not on its way yet.
    pub(super) fn start_uploads(self: &Arc<Self>, inode: &Arc<Inode>, which: Which, urgency: Urgency) {
        let uploads = inode.lock().take_uploads(which, PIECES_PER_CHUNK_COMPACT);
        for upload in uploads {
            // A full chunk is hashed here, on the writer's own thread.
            let cut = (upload.append.is_none() && is_full(&upload)).then(|| cut::cut(&upload.extents));
            let (shared, inode) = (Arc::clone(self), Arc::clone(inode));
            tokio::spawn(async move { shared.upload(&inode, &upload, cut.and_then(Result::ok), urgency).await });
        }
    }

    async fn upload(self: Arc<Self>, inode: &Arc<Inode>, upload: &Upload, cut: Option<Cut>, urgency: Urgency) {
        let stored = self.store(inode, upload, cut, urgency).await;
        let is_stored = stored.is_ok();
        let freed = match stored {
            Ok(stored) => {
                self.budget.set_full(false);
                let mut state = inode.lock();
                state.note_position(stored.committed.position);
                state.finish(upload, &stored.cut.pieces, &stored.places, stored.committed.attr)
            }
            Err(_) if inode.lock().is_severed(upload) => inode.lock().give_up(upload, Errno(libc::EIO)),
            Err(Errno(libc::EBUSY)) if upload.append.is_some() => inode.lock().rebase(upload),
            Err(error @ Errno(libc::ESTALE)) => {
                warn!(ino = %inode.ino, bytes = upload.bytes, "the file is gone, or a lock on it: what was written to it is dropped");
                inode.lock().give_up(upload, error)
            }
            Err(error) => {
                warn!(ino = %inode.ino, bytes = upload.bytes, ?error, "written data could not be stored; it is kept and tried again");
                self.budget.set_full(error.0 == libc::ENOSPC);
                inode.lock().fail(upload, error)
            }
        };
        self.budget.sub(freed);
        inode.settled.notify_waiters();
        if is_stored && upload.append.is_some() {
            // What was appended meanwhile had to wait.
            self.start_uploads(inode, Which::Full, Urgency::Visible);
        }
    }

    /// Puts the upload's blocks and commits its pieces.
    async fn store(&self, inode: &Arc<Inode>, upload: &Upload, cut: Option<Cut>, urgency: Urgency) -> FsResult<Stored> {
        // Whoever closes a small file, or syncs a page, does not wait for all that someone else writes in bulk.
        let is_small = upload.bytes <= LITTLE && upload.scattered.is_empty();
        let slots = if is_small { &self.small_upload_slots } else { &self.upload_slots };
        let slot = tokio::time::timeout(self.io_timeout, slots.acquire());
        let _slot = slot.await.map_err(|_| Errno(libc::EIO))?.map_err(|_| Errno(libc::EIO))?;
        if let Some(part) = &upload.append {
            return self.append(inode, upload, part, urgency).await;
        }
        if let Some(cut) = cut {
            return self.put_and_commit(inode, upload, cut, Vec::new(), urgency).await;
        }
        if let Some((extents, over)) = self.compacted(inode, upload).await? {
            match self.put_and_commit(inode, upload, sealed(&extents)?, over, urgency).await {
                // Another mount changed one of the chunks meanwhile: what was read to rewrite it is old. The plain
                // extents are right over anything.
                Err(Errno(libc::EBUSY)) => {}
                result => return result,
            }
        }
        self.put_and_commit(inode, upload, sealed(&upload.extents)?, Vec::new(), urgency).await
    }

    /// Commits the upload with `part` of it at the end of the file. `EBUSY`: the end is elsewhere, and known by now.
    async fn append(
        &self,
        inode: &Arc<Inode>,
        upload: &Upload,
        part: &AppendPart,
        urgency: Urgency,
    ) -> FsResult<Stored> {
        let appended = match self.compacted(inode, upload).await? {
            Some((extents, over)) => self.put_and_append(inode, upload, part, &extents, over, urgency).await,
            None => self.put_and_append(inode, upload, part, &upload.extents, Vec::new(), urgency).await,
        };
        if matches!(appended, Err(Errno(libc::EBUSY))) {
            match self.meta.query(Query::GetAttr { ino: inode.ino }).await? {
                MetaAnswer::Attr(attr) => inode.lock().learn(attr),
                other => return Err(unexpected(&other)),
            }
        }
        appended
    }

    async fn put_and_append(
        &self,
        inode: &Arc<Inode>,
        upload: &Upload,
        part: &AppendPart,
        extents: &[(ChunkIndex, Extent)],
        only_over: Vec<(ChunkIndex, u64)>,
        urgency: Urgency,
    ) -> FsResult<Stored> {
        let cut = sealed(extents)?;
        // Asked for anew it would be a second record: until it is known whether there is a first one, nothing else is sent.
        let late = || {
            warn!(ino = %inode.ino, "it is not known whether what was appended is stored");
            inode.lock().note_late(upload);
            inode.settled.notify_waiters();
        };
        let mut retry = Retry::within(self.io_timeout);
        let (applied, places, kept) = loop {
            let Put { item: Item { file, blocks, losses }, places, kept } =
                self.put(inode, upload, &cut, only_over.clone(), urgency).await?;
            let op = Op::Append { file, blocks, at_size: part.at_size };
            match self.meta.mutate_until_known(op, losses, late).await {
                Err(PUT_AGAIN) => self.before_another_put(inode, &mut retry).await?,
                applied => break (applied?, places, kept),
            }
        };
        let Mutated::Committed(files) = &applied.outcome else {
            tracing::error!(outcome = ?applied.outcome, "the metadata server answered an append with something else");
            return Err(Errno(libc::EIO));
        };
        let [Ok(attr)] = files[..] else { return Err(Errno(libc::EIO)) };
        self.retain(applied.position, &cut, kept);
        Ok(Stored { cut, places, committed: Committed { attr, position: applied.position } })
    }

    async fn put_and_commit(
        &self,
        inode: &Arc<Inode>,
        upload: &Upload,
        cut: Cut,
        only_over: Vec<(ChunkIndex, u64)>,
        urgency: Urgency,
    ) -> FsResult<Stored> {
        let mut retry = Retry::within(self.io_timeout);
        loop {
            let Put { item, places, kept } = self.put(inode, upload, &cut, only_over.clone(), urgency).await?;
            let committed = match self.committer.commit(item, urgency == Urgency::Durable).await {
                Err(PUT_AGAIN) => {
                    self.before_another_put(inode, &mut retry).await?;
                    continue;
                }
                committed => committed?,
            };
            self.retain(committed.position, &cut, kept);
            return Ok(Stored { cut, places, committed });
        }
    }

    /// Copies do not count any more, or there were too few: more may be wanted than was known here.
    async fn before_another_put(&self, inode: &Arc<Inode>, retry: &mut Retry) -> FsResult<()> {
        retry.pause().await.map_err(|_| Errno(libc::EIO))?;
        match self.meta.query(Query::GetAttr { ino: inode.ino }).await? {
            MetaAnswer::Attr(attr) => inode.lock().learn_replicas(attr.replicas),
            other => return Err(unexpected(&other)),
        }
        Ok(())
    }

    /// Stores the blocks of an upload, as urgently as asked.
    async fn put(
        &self,
        inode: &Arc<Inode>,
        upload: &Upload,
        cut: &Cut,
        only_over: Vec<(ChunkIndex, u64)>,
        urgency: Urgency,
    ) -> FsResult<Put> {
        let wanted = inode.lock().attr().replicas.or(self.replicas());
        let blocks = self.blocks.put(&cut.blocks, urgency != Urgency::Visible, wanted).await?;
        let places = blocks.iter().map(place_of).collect();
        let kept = if urgency == Urgency::Visible { blocks.clone() } else { Vec::new() };
        let file = FileCommit {
            ino: inode.ino,
            pieces: cut.pieces.clone(),
            size_at_least: upload.end(),
            mtime: upload.mtime,
            clear_suid: false,
            only_over,
        };
        // In this order: what is lost after the count was taken is seen by whoever sends the commit.
        let losses = self.meta.lock_losses();
        if inode.lock().is_severed(upload) {
            return Err(Errno(libc::ESTALE));
        }
        Ok(Put { item: Item { file, blocks, losses }, places, kept })
    }

    /// Copies of what has no number of its own, as far as this mount knows: the servers make what is missing, and delete what is too much.
    fn replicas(&self) -> usize {
        self.meta.map().replicas.or(REPLICAS)
    }

    /// Keeps blocks that their servers have not synced, unless they have by now.
    fn retain(&self, position: Position, cut: &Cut, named: Vec<NewBlock>) {
        if named.is_empty() || self.meta.is_durable(position) {
            return;
        }
        let kept = cut.blocks.iter().cloned().zip(named.into_iter().map(|block| block.holders)).collect();
        self.budget.add(self.retained.lock().note(position, kept, std::time::Instant::now()));
    }

    /// Lets go of what is durable by now.
    pub(super) fn release_durable(&self) {
        let freed = self.retained.lock().release_through(self.meta.durable_through());
        if freed > 0 {
            self.budget.sub(freed);
        }
    }

    /// Has everything made durable that is visible, so that its blocks need not be kept.
    pub(super) async fn make_durable(&self) -> FsResult<()> {
        self.meta.barrier().await?;
        self.release_durable();
        Ok(())
    }

    /// Stores blocks again that their servers have lost with their power before they were durable.
    pub(super) async fn store_again(&self) -> FsResult<()> {
        let unseen = self.retained.lock().unseen_for(RETAINED_AGE_MAX, std::time::Instant::now());
        let lost = self.lost(&unseen).await;
        for blocks in lost.chunks(BLOCKS_AGAIN) {
            warn!(blocks = blocks.len(), "storage servers have lost what was not durable: storing it again");
            let named = self.blocks.put(blocks, true, self.replicas()).await?;
            // A commit of no file: it only says who has the blocks now.
            match self.meta.mutate(Op::Commit { files: Vec::new(), blocks: named.clone() }, false).await {
                // One of them is garbage by now, or was a moment ago: looked at again the next time.
                Err(PUT_AGAIN) => continue,
                said => drop(said?),
            }
            let mut retained = self.retained.lock();
            blocks.iter().zip(&named).for_each(|(block, named)| retained.stored_again(block, &named.holders));
        }
        Ok(())
    }

    /// Blocks that fewer servers have than they must.
    async fn lost(&self, unseen: &[RetainedBlock]) -> Vec<Block> {
        let mut asked: BTreeMap<ServerId, BTreeSet<BlockHash>> = BTreeMap::new();
        for kept in unseen {
            for holder in &kept.holders {
                asked.entry(holder.server).or_default().insert(kept.block.hash());
            }
        }
        let questions = asked.into_iter().map(|(server, hashes)| self.blocks.has(server, hashes));
        let present: Vec<BTreeSet<BlockHash>> = futures_util::future::join_all(questions).await;
        let copies = |block: &Block| present.iter().filter(|hashes| hashes.contains(&block.hash())).count();
        let is_lost = |kept: &&RetainedBlock| copies(&kept.block) < enough_replicas(kept.holders.len().max(1));
        unseen.iter().filter(is_lost).map(|kept| kept.block.clone()).collect()
    }

    /// The upload's extents with chunks that have come to be made of too many pieces written whole, and the digests of the
    /// pieces that those were read from. `None`: there is nothing to compact.
    async fn compacted(&self, inode: &Arc<Inode>, upload: &Upload) -> FsResult<Option<Compacted>> {
        let (urgent, rest): (Vec<_>, Vec<_>) = upload.scattered.iter().partition(|(_, pieces)| *pieces > PIECES_URGENT);
        let at_once = rest.into_iter().take(COMPACT_AT_ONCE.saturating_sub(urgent.len()));
        let mut compacted: Option<Compacted> = None;
        for (chunk, _) in urgent.iter().copied().chain(at_once) {
            let pieces = self.chunk_pieces(inode, chunk).await?;
            let new = upload.extents.iter().filter(|(other, _)| *other == chunk).count();
            if pieces + new <= PIECES_PER_CHUNK_COMPACT {
                inode.lock().set_scattered(chunk, pieces + new);
                continue;
            }
            let (whole, digest) = self.runs(inode, chunk).await?;
            inode.lock().set_scattered(chunk, whole.len());
            let (extents, over) = compacted.get_or_insert_with(|| (upload.extents.clone(), Vec::new()));
            over.push((chunk, digest));
            let place = extents.partition_point(|(other, _)| *other < chunk);
            extents.retain(|(other, _)| *other != chunk);
            extents.splice(place..place, whole.into_iter().map(|extent| (chunk, extent)));
        }
        Ok(compacted)
    }

    async fn chunk_pieces(&self, inode: &Arc<Inode>, chunk: ChunkIndex) -> FsResult<usize> {
        for _ in 0..MAP_TRIES {
            if let Some(pieces) = inode.lock().map.pieces(chunk) {
                return Ok(pieces.len());
            }
            self.load_map(inode, chunk).await?;
        }
        Err(unsteady(inode))
    }

    /// All that a chunk holds, committed or on its way in this upload, as few runs; and the digest of the committed pieces.
    async fn runs(&self, inode: &Arc<Inode>, chunk: ChunkIndex) -> FsResult<(Vec<Extent>, u64)> {
        let mut fresh = FreshMap::default();
        for _ in 0..MAP_TRIES {
            let (plan, digest) = inode.lock().plan_sent(chunk);
            match plan {
                ChunkPlan::UnknownMap => self.load_map(inode, chunk).await?,
                ChunkPlan::Bytes(bytes) => return Ok((vec![Extent { offset: 0, bytes }], digest)),
                ChunkPlan::Assemble(assembly) => {
                    let ranges = few(covered(&assembly));
                    let bytes = match self.assemble(assembly, false).await {
                        Err(error) => {
                            fresh.wait(inode, error, self.io_timeout).await?;
                            continue;
                        }
                        Ok(bytes) => bytes,
                    };
                    let cut = |range: Range<u32>| Extent {
                        offset: range.start,
                        bytes: bytes.slice(range.start as usize..range.end as usize),
                    };
                    return Ok((ranges.into_iter().map(cut).collect(), digest));
                }
            }
        }
        Err(unsteady(inode))
    }

    /// Everything written before is stored, and visible to everyone, when this returns, as urgently as asked.
    pub(super) async fn write_out(self: &Arc<Self>, inode: &Arc<Inode>, urgency: Urgency) {
        let few = inode.lock().dirty_bytes() <= DURABLE_PUT_BYTES_MAX;
        let urgency = if few { urgency } else { Urgency::Visible };
        let errors = inode.lock().errors();
        let (writes, start) = (inode.lock().writes(), tokio::time::Instant::now());
        // Again: a chunk that an earlier upload still had is free the next time, and what was appended goes part by part, and
        // perhaps to another end.
        loop {
            self.start_uploads(inode, Which::All, urgency);
            self.wait_for_uploads(inode).await;
            let mut state = inode.lock();
            let late = state.has_late() || start.elapsed() > self.io_timeout;
            if state.errors() > errors || (!state.has_dirty_of(writes) && !state.has_late()) {
                return;
            }
            if late {
                return state.note_error(Errno(libc::EIO));
            }
        }
    }

    async fn wait_for_uploads(&self, inode: &Arc<Inode>) {
        let last = inode.lock().last_upload();
        loop {
            let settled = inode.settled.notified();
            tokio::pin!(settled);
            // Registered before the check, so that an upload that ends in between is not missed.
            settled.as_mut().enable();
            if !inode.lock().uploads_up_to(last) {
                return;
            }
            settled.await;
        }
    }

    // ---- reading ----

    /// Asks for the map from `chunk` on.
    pub(super) async fn load_map(&self, inode: &Arc<Inode>, chunk: ChunkIndex) -> FsResult<()> {
        // Small files whole, so that their map is known to be complete.
        let is_small = chunks_of(inode.lock().size()) <= MAP_BATCH;
        let mut first = if is_small { ChunkIndex(0) } else { chunk };
        let mut count = MAP_BATCH;
        loop {
            match self.meta.query(Query::Pieces { ino: inode.ino, first, count }).await {
                Ok(MetaAnswer::Map(map)) => {
                    inode.lock().learn_map(first, count, map);
                    return Ok(());
                }
                Ok(other) => return Err(unexpected(&other)),
                // More pieces than fit into one answer; those of one chunk always do.
                Err(Errno(libc::E2BIG)) if count > 1 => {
                    first = chunk;
                    count /= 4;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// What was written a moment ago is still here, perhaps nowhere else.
    async fn bytes(&self, place: &BlockPlace, within: &Range<u32>, sequential: bool) -> FsResult<bytes::Bytes> {
        let retained = self.retained.lock().block(place.hash).map(|block| block.bytes().clone());
        match retained {
            Some(bytes) if within.end as usize <= bytes.len() => {
                Ok(bytes.slice(within.start as usize..within.end as usize))
            }
            _ => self.fetcher.bytes(place, within, sequential).await,
        }
    }

    /// Fetches what an assembly lacks and joins it.
    pub(super) async fn assemble(&self, assembly: Assembly, sequential: bool) -> FsResult<bytes::Bytes> {
        let mut fetched = Vec::with_capacity(assembly.parts.len());
        if let [(part, place)] = &assembly.parts[..] {
            fetched.push(self.bytes(place, &part.within, sequential).await?);
        } else {
            let fetches = assembly.parts.iter().map(|(part, place)| self.bytes(place, &part.within, sequential));
            for bytes in futures_util::future::join_all(fetches).await {
                fetched.push(bytes?);
            }
        }
        Ok(assembly.join(&fetched))
    }
}

/// What has to be true when written bytes are said to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    /// Everyone sees them.
    Visible,
    /// And their blocks are on disks; a barrier for the rest follows.
    DurableBlocks,
    /// They survive a power cut.
    Durable,
}

/// Extents, and the digests of the chunks that some of them were read from.
type Compacted = (Vec<(ChunkIndex, Extent)>, Vec<(ChunkIndex, u64)>);

fn sealed(extents: &[(ChunkIndex, Extent)]) -> FsResult<Cut> {
    cut::cut(extents).map_err(|error| {
        tracing::error!(%error, "written bytes could not be cut into blocks");
        Errno(libc::EIO)
    })
}

/// The map did not hold still: others change the file faster than it can be read.
pub(super) fn unsteady(inode: &Inode) -> Errno {
    warn!(ino = %inode.ino, "the map of the file does not agree with what is known of it");
    Errno(libc::EIO)
}

/// How long a block that no server has is asked for.
const VANISHED_PATIENCE: Duration = Duration::from_secs(6);

/// The patience of one reader for whom the map that is known does not do.
#[derive(Debug, Default)]
pub(super) struct FreshMap {
    silent: Option<Retry>,
    vanished: Option<Retry>,
}

impl FreshMap {
    /// After an error of the fetch that a newer map may be free of: forgets the map, after a pause. Any other error, or the end of
    /// the patience, is what a program sees.
    pub(super) async fn wait(&mut self, inode: &Inode, error: Errno, io_timeout: Duration) -> FsResult<()> {
        let (retry, patience) = match error {
            TRY_FRESH_MAP => (&mut self.silent, io_timeout),
            VANISHED => (&mut self.vanished, VANISHED_PATIENCE),
            error => return Err(error),
        };
        if retry.get_or_insert_with(|| Retry::within(patience)).pause().await.is_err() {
            tracing::error!(ino = %inode.ino, ?error, "no server has, or none answers about, what the file is made of");
            return Err(Errno(libc::EIO));
        }
        inode.lock().map.forget_all();
        Ok(())
    }
}

fn covered(assembly: &Assembly) -> Vec<Range<u32>> {
    let parts = assembly.parts.iter().map(|(part, _)| part.offset..part.offset + (part.within.end - part.within.start));
    let over = assembly.overlays.iter().map(|(at, bytes)| *at..*at + crate::write::buffer::length(bytes));
    merged(parts.chain(over).collect())
}

/// Too many runs become one: the gaps are written as the zeroes that they read as.
fn few(ranges: Vec<Range<u32>>) -> Vec<Range<u32>> {
    match (ranges.first(), ranges.last()) {
        (Some(first), Some(last)) if ranges.len() > PIECES_PER_CHUNK_COMPACT / 2 => {
            std::iter::once(first.start..last.end).collect()
        }
        _ => ranges,
    }
}

/// An upload whose blocks are on their servers.
struct Put {
    item: Item,
    places: Vec<BlockPlace>,
    /// Blocks that their servers may still lose, to be kept until they are durable.
    kept: Vec<NewBlock>,
}

/// An upload whose blocks are on their servers and whose pieces are in the file.
struct Stored {
    cut: Cut,
    places: Vec<BlockPlace>,
    committed: Committed,
}

fn is_full(upload: &Upload) -> bool {
    upload.extents.iter().all(|(_, extent)| extent.bytes.len() == BLOCK_SIZE_MAX as usize)
}

/// Chunks that a file of `size` bytes reaches into.
pub(super) fn chunks_of(size: u64) -> u32 {
    u32::try_from(size.div_ceil(u64::from(BLOCK_SIZE_MAX))).unwrap_or(u32::MAX)
}

fn place_of(block: &NewBlock) -> BlockPlace {
    debug_assert!(block.holders.len() <= REPLICAS_MAX);
    let holders = block.holders.iter().map(|holder| holder.server).collect();
    BlockPlace { hash: block.hash, length: block.length, holders }
}

/// Sorted ranges, those that touch made one.
fn merged(mut ranges: Vec<Range<u32>>) -> Vec<Range<u32>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u32>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one_and_too_many_become_one() {
        assert_eq!(merged(vec![5..9, 0..2, 2..4, 8..12]), [0..4, 5..12]);
        let sparse: Vec<Range<u32>> = (0..2048).map(|n| n * 512..n * 512 + 1).collect();
        let one = few(merged(sparse));
        assert_eq!((one.len(), one[0].clone()), (1, 0..2047 * 512 + 1));
        assert_eq!(few(vec![0..1, 5..6]), [0..1, 5..6]);
    }
}

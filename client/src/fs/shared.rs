//! What the operations on files share: the servers, the queues and the bounds of one mount.

use std::{sync::Arc, time::Duration};

use holdfast_common::{
    ChunkIndex,
    clock::Clock,
    limits::{BLOCK_SIZE_MAX, PIECES_PER_CHUNK_COMPACT, REPLICAS},
    wire::meta::{BlockPlace, FileCommit, Holder, MetaAnswer, NewBlock, Query},
};
use tokio::sync::Semaphore;
use tracing::warn;

use super::{
    Errno, FsResult,
    inode::{Assembly, ChunkPlan, Inode, Upload, Which},
};
use crate::{
    read::fetch::Fetcher,
    remote::{blocks::BlockClient, meta::MetaClient, meta::unexpected},
    write::{
        budget::DirtyBudget,
        buffer::Extent,
        commit::{Committed, Committer, Item},
        cut::{self, Cut},
    },
};

/// Chunks whose map is asked for at a time.
const MAP_BATCH: u32 = 256;
/// Uploads in flight; with at most 4 MiB each they bound what is encrypted and queued at a time.
pub(super) const UPLOADS_IN_FLIGHT_MAX: usize = 24;
/// Dirty bytes up to which an fsync lets every put wait for its own fdatasync, which saves a round trip. Beyond, the puts
/// stream and one barrier makes them durable together.
const DURABLE_PUT_BYTES_MAX: u64 = 4 << 20;

#[derive(Debug)]
pub(super) struct Shared {
    pub meta: Arc<MetaClient>,
    pub blocks: Arc<BlockClient>,
    pub fetcher: Fetcher,
    pub committer: Committer,
    pub budget: DirtyBudget,
    pub upload_slots: Semaphore,
    pub io_timeout: Duration,
    pub clock: Arc<dyn ClockDebug>,
}

/// A clock that can be shown in debug output.
pub trait ClockDebug: Clock + std::fmt::Debug {}
impl<T: Clock + std::fmt::Debug> ClockDebug for T {}

impl Shared {
    // ---- writing out ----

    /// Starts uploads of what is dirty and not on its way yet.
    pub(super) fn start_uploads(self: &Arc<Self>, inode: &Arc<Inode>, which: Which, durable: bool) {
        let uploads = inode.lock().take_uploads(which, PIECES_PER_CHUNK_COMPACT);
        for upload in uploads {
            // A full chunk is hashed here, on the writer's own thread.
            let cut = is_full(&upload).then(|| cut::cut(&upload.extents));
            let (shared, inode) = (Arc::clone(self), Arc::clone(inode));
            tokio::spawn(async move { shared.upload(&inode, &upload, cut.and_then(Result::ok), durable).await });
        }
    }

    async fn upload(self: Arc<Self>, inode: &Arc<Inode>, upload: &Upload, cut: Option<Cut>, durable: bool) {
        let freed = match self.store(inode, upload, cut, durable).await {
            Ok(stored) => {
                self.budget.set_full(false);
                let mut state = inode.lock();
                state.last_position = state.last_position.max(stored.committed.position);
                state.finish(upload, &stored.cut.pieces, &stored.places, stored.committed.attr)
            }
            Err(error @ Errno(libc::ESTALE)) => {
                warn!(ino = %inode.ino, bytes = upload.bytes, "the file is gone: what was written to it is dropped");
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
    }

    /// Puts the upload's blocks and commits its pieces.
    async fn store(&self, inode: &Arc<Inode>, upload: &Upload, cut: Option<Cut>, durable: bool) -> FsResult<Stored> {
        let slot = tokio::time::timeout(self.io_timeout, self.upload_slots.acquire());
        let _slot = slot.await.map_err(|_| Errno(libc::EIO))?.map_err(|_| Errno(libc::EIO))?;
        let cut = match cut {
            Some(cut) => cut,
            None => {
                let extents = self.compacted(inode, upload).await?;
                cut::cut(&extents).map_err(|_| Errno(libc::EIO))?
            }
        };
        let holders = self.blocks.put(&cut.blocks, durable).await?;
        let (blocks, places) = named(&cut, holders);
        let file = FileCommit {
            ino: inode.ino,
            pieces: cut.pieces.clone(),
            size_at_least: upload.end(),
            mtime: upload.mtime,
            clear_suid: false,
        };
        let committed = self.committer.commit(Item { file, blocks }, durable).await?;
        Ok(Stored { cut, places, committed })
    }

    /// The upload's extents; a chunk that has come to be made of too many pieces is written whole.
    async fn compacted(&self, inode: &Arc<Inode>, upload: &Upload) -> FsResult<Vec<(ChunkIndex, Extent)>> {
        let mut extents = upload.extents.clone();
        for &chunk in &upload.scattered {
            let pieces = self.chunk_pieces(inode, chunk).await?;
            let new = extents.iter().filter(|(other, _)| *other == chunk).count();
            if pieces + new <= PIECES_PER_CHUNK_COMPACT {
                inode.lock().set_scattered(chunk, pieces + new);
                continue;
            }
            let whole = self.runs(inode, chunk).await?;
            inode.lock().set_scattered(chunk, whole.len());
            let place = extents.partition_point(|(other, _)| *other < chunk);
            extents.retain(|(other, _)| *other != chunk);
            extents.splice(place..place, whole.into_iter().map(|extent| (chunk, extent)));
        }
        Ok(extents)
    }

    async fn chunk_pieces(&self, inode: &Arc<Inode>, chunk: ChunkIndex) -> FsResult<usize> {
        loop {
            if let Some(pieces) = inode.lock().map.pieces(chunk) {
                return Ok(pieces.len());
            }
            self.load_map(inode, chunk).await?;
        }
    }

    /// All that a chunk holds, committed or on its way in this upload, as runs without gaps.
    async fn runs(&self, inode: &Arc<Inode>, chunk: ChunkIndex) -> FsResult<Vec<Extent>> {
        let covered = |assembly: &Assembly| {
            let mut ranges: Vec<_> =
                assembly.parts.iter().map(|(p, _)| p.offset..p.offset + (p.within.end - p.within.start)).collect();
            ranges.extend(assembly.overlays.iter().map(|(at, bytes)| *at..*at + crate::write::buffer::length(bytes)));
            merged(ranges)
        };
        loop {
            let plan = inode.lock().plan_sent(chunk);
            match plan {
                ChunkPlan::UnknownMap => self.load_map(inode, chunk).await?,
                ChunkPlan::Bytes(bytes) => return Ok(vec![Extent { offset: 0, bytes }]),
                ChunkPlan::Assemble(assembly) => {
                    let ranges = covered(&assembly);
                    let bytes = self.assemble(assembly, true).await?;
                    let cut = |range: std::ops::Range<u32>| Extent {
                        offset: range.start,
                        bytes: bytes.slice(range.start as usize..range.end as usize),
                    };
                    return Ok(ranges.into_iter().map(cut).collect());
                }
            }
        }
    }

    /// Everything written before is stored, and visible to everyone, when this returns; with `durable` the puts wait for disks.
    pub(super) async fn write_out(self: &Arc<Self>, inode: &Arc<Inode>, durable: bool) {
        let durable_puts = durable && inode.lock().dirty_bytes() <= DURABLE_PUT_BYTES_MAX;
        let errors = inode.lock().errors();
        // Twice: a chunk that an earlier upload still had the first time is free the second time.
        for _ in 0..2 {
            self.start_uploads(inode, Which::All, durable_puts);
            self.wait_for_uploads(inode).await;
            let state = inode.lock();
            if !state.has_dirty() || state.errors() > errors {
                return;
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
        let chunks = {
            let state = inode.lock();
            chunks_of(state.size())
        };
        // Small files whole, so that their map is known to be complete.
        let first = if chunks <= MAP_BATCH { ChunkIndex(0) } else { chunk };
        let query = Query::Pieces { ino: inode.ino, first, count: MAP_BATCH };
        match self.meta.query(query).await? {
            MetaAnswer::Map(map) => {
                inode.lock().map.learn(first, MAP_BATCH, chunks, map);
                Ok(())
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Fetches what an assembly lacks and joins it.
    pub(super) async fn assemble(&self, assembly: Assembly, sequential: bool) -> FsResult<bytes::Bytes> {
        let mut fetched = Vec::with_capacity(assembly.parts.len());
        if let [(part, place)] = &assembly.parts[..] {
            fetched.push(self.fetcher.bytes(place, &part.within, sequential).await?);
        } else {
            let fetches =
                assembly.parts.iter().map(|(part, place)| self.fetcher.bytes(place, &part.within, sequential));
            for bytes in futures_util::future::join_all(fetches).await {
                fetched.push(bytes?);
            }
        }
        Ok(assembly.join(&fetched))
    }
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

fn named(cut: &Cut, holders: Vec<Vec<Holder>>) -> (Vec<NewBlock>, Vec<BlockPlace>) {
    debug_assert!(holders.iter().all(|holders| holders.len() <= REPLICAS));
    let blocks = cut.blocks.iter().zip(holders);
    blocks
        .map(|(block, holders)| {
            let servers = holders.iter().map(|holder| holder.server).collect();
            let place = BlockPlace { hash: block.hash(), length: block.length(), holders: servers };
            (NewBlock { hash: block.hash(), length: block.length(), holders }, place)
        })
        .unzip()
}

/// Sorted ranges, those that touch made one.
fn merged(mut ranges: Vec<std::ops::Range<u32>>) -> Vec<std::ops::Range<u32>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<std::ops::Range<u32>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

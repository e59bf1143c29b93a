//! Verified bytes of blocks: from the cache, or from the servers into the cache.

use std::{collections::HashMap, ops::Range, sync::Arc};

use bytes::{Bytes, BytesMut};
use holdfast_common::{BlockHash, limits::HASH_GROUP_SIZE, wire::meta::BlockPlace};
use parking_lot::Mutex;

use crate::{cache::BlockCache, fs::FsResult, remote::blocks::BlockClient};

/// A block no longer than this is fetched whole: the proof and the round trips cost more than its bytes.
const WHOLE_MAX: u32 = 64 << 10;
/// After this many partial reads of one block, three quarters of its groups, the rest is fetched too, beside the read.
/// Earlier it would cost a mebibyte for each few KiB of a file that does not fit into the cache.
const PARTIAL_READS_MAX: u8 = 48;
/// Blocks whose partial reads are counted at a time.
const COUNTED_MAX: usize = 8192;

#[derive(Debug)]
pub struct Fetcher {
    blocks: Arc<BlockClient>,
    cache: BlockCache,
    partial_reads: Mutex<HashMap<BlockHash, u8>>,
}

impl Fetcher {
    /// `cache_bytes`: for verified blocks.
    pub fn new(blocks: Arc<BlockClient>, cache_bytes: u64) -> Self {
        Self { blocks, cache: BlockCache::new(cache_bytes), partial_reads: Mutex::default() }
    }

    pub fn cached_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Bytes `within` of a block, if they are in memory.
    pub fn cached(&self, block: BlockHash, within: &Range<u32>) -> Option<Bytes> {
        if let Some(whole) = self.cache.whole(block) {
            return slice(&whole, within);
        }
        self.cached_groups(block, within)
    }

    fn cached_groups(&self, block: BlockHash, within: &Range<u32>) -> Option<Bytes> {
        let first = within.start / HASH_GROUP_SIZE;
        let last = (within.end - 1) / HASH_GROUP_SIZE;
        if first == last {
            let base = first * HASH_GROUP_SIZE;
            return slice(&self.cache.group(block, first)?, &(within.start - base..within.end - base));
        }
        let mut joined = BytesMut::with_capacity(within.len() + 2 * HASH_GROUP_SIZE as usize);
        for group in first..=last {
            joined.extend_from_slice(&self.cache.group(block, group)?);
        }
        let base = first * HASH_GROUP_SIZE;
        slice(&joined.freeze(), &(within.start - base..within.end - base))
    }

    /// Bytes `within` of a block. `sequential`: the rest of the block will be wanted too.
    pub async fn bytes(self: &Arc<Self>, place: &BlockPlace, within: &Range<u32>, sequential: bool) -> FsResult<Bytes> {
        if let Some(bytes) = self.cached(place.hash, within) {
            return Ok(bytes);
        }
        if sequential || place.length <= WHOLE_MAX {
            let whole = self.whole(place).await?;
            return slice(&whole, within).ok_or(crate::fs::Errno(libc::EIO));
        }
        if self.is_read_often(place.hash) {
            self.fetch_rest(place.clone());
        }
        let (start, part) = self.blocks.get_range(place, within.clone()).await?;
        self.keep_groups(place.hash, start, &part);
        slice(&part, &(within.start - start..within.end - start)).ok_or(crate::fs::Errno(libc::EIO))
    }

    /// All of a block; those who ask at once share one fetch.
    pub async fn whole(&self, place: &BlockPlace) -> FsResult<Bytes> {
        match self.cache.whole_or_right(place.hash).await {
            Ok(bytes) => Ok(bytes),
            Err(right) => {
                let block = self.blocks.get(place).await?;
                let bytes = block.bytes().clone();
                // Refused only if someone else has put the same block there meanwhile.
                let _same_block = right.insert(bytes.clone());
                Ok(bytes)
            }
        }
    }

    /// The whole block will hardly be asked for again.
    pub fn forget(&self, block: BlockHash) {
        self.cache.remove(block);
    }

    /// Brings the whole block into the cache while its reader goes on.
    fn fetch_rest(self: &Arc<Self>, place: BlockPlace) {
        let fetcher = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = fetcher.whole(&place).await {
                // Whoever reads those bytes will meet the error, and report it.
                tracing::debug!(block = %place.hash, ?error, "the rest of a block could not be fetched");
            }
        });
    }

    fn keep_groups(&self, block: BlockHash, start: u32, part: &Bytes) {
        let first = start / HASH_GROUP_SIZE;
        if part.len() <= HASH_GROUP_SIZE as usize {
            return self.cache.insert_group(block, first, part.clone());
        }
        for (group, bytes) in (first..).zip(part.chunks(HASH_GROUP_SIZE as usize)) {
            // A copy of its own, so that a cached group does not keep the whole answer alive.
            self.cache.insert_group(block, group, Bytes::copy_from_slice(bytes));
        }
    }

    /// Counts a partial read; true once in `PARTIAL_READS_MAX`.
    fn is_read_often(&self, block: BlockHash) -> bool {
        let mut counts = self.partial_reads.lock();
        if counts.len() >= COUNTED_MAX {
            counts.clear();
        }
        let count = counts.entry(block).or_insert(0);
        *count = (*count + 1) % PARTIAL_READS_MAX;
        *count == 0
    }
}

fn slice(bytes: &Bytes, within: &Range<u32>) -> Option<Bytes> {
    let range = within.start as usize..within.end as usize;
    (range.end <= bytes.len()).then(|| bytes.slice(range))
}

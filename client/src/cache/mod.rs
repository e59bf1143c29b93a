//! Verified blocks in the client's memory: bounded in bytes, resistant to scans.
//!
//! A block never changes, so what is here is valid for ever. Whole blocks and single groups of 16 KiB (the proof's
//! grain, for random reads) share one budget. Eviction is quick_cache's Clock-PRO.

pub mod glimpses;
pub mod names;

use bytes::Bytes;
use holdfast_common::{Block, BlockHash};
use quick_cache::{
    DefaultHashBuilder, Weighter,
    sync::{Cache, DefaultLifecycle, PlaceholderGuard},
};

/// A whole block, or the group of `HASH_GROUP_SIZE` that starts at this number of groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheKey {
    pub block: BlockHash,
    pub group: Option<u32>,
}

#[derive(Clone, Debug)]
pub struct ByBytes;

impl Weighter<CacheKey, Bytes> for ByBytes {
    fn weight(&self, _: &CacheKey, bytes: &Bytes) -> u64 {
        // The entry itself costs about this much beside the bytes.
        bytes.len() as u64 + 160
    }
}

type Inner = Cache<CacheKey, Bytes, ByBytes>;
pub type Absent<'a> =
    PlaceholderGuard<'a, CacheKey, Bytes, ByBytes, DefaultHashBuilder, DefaultLifecycle<CacheKey, Bytes>>;

#[derive(Debug)]
pub struct BlockCache {
    inner: Inner,
}

impl BlockCache {
    pub fn new(capacity_bytes: u64) -> Self {
        let entries = usize::try_from(capacity_bytes / (64 << 10)).unwrap_or(usize::MAX).max(64);
        let options = quick_cache::OptionsBuilder::new()
            // Few shards: a shard smaller than a few blocks could not hold one.
            .shards(2)
            .estimated_items_capacity(entries)
            .weight_capacity(capacity_bytes)
            .build();
        let inner = match options {
            Ok(options) => {
                Cache::with_options(options, ByBytes, DefaultHashBuilder::default(), DefaultLifecycle::default())
            }
            Err(_) => Cache::with_weighter(entries, capacity_bytes, ByBytes),
        };
        Self { inner }
    }

    pub fn whole(&self, block: BlockHash) -> Option<Bytes> {
        self.inner.get(&CacheKey { block, group: None })
    }

    pub fn group(&self, block: BlockHash, group: u32) -> Option<Bytes> {
        self.inner.get(&CacheKey { block, group: Some(group) })
    }

    pub fn insert(&self, block: &Block) {
        self.inner.insert(CacheKey { block: block.hash(), group: None }, block.bytes().clone());
    }

    /// Drops a whole block. One that is being fetched stays.
    pub fn remove(&self, block: BlockHash) {
        self.inner.remove_if(&CacheKey { block, group: None }, |_| true);
    }

    pub fn insert_group(&self, block: BlockHash, group: u32, bytes: Bytes) {
        self.inner.insert(CacheKey { block, group: Some(group) }, bytes);
    }

    /// The block, or the right to fetch it: of all who ask at once, one gets that right and the others wait for it.
    pub async fn whole_or_right(&self, block: BlockHash) -> Result<Bytes, Absent<'_>> {
        self.inner.get_value_or_guard_async(&CacheKey { block, group: None }).await
    }

    pub fn bytes(&self) -> u64 {
        self.inner.weight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_keeps_to_its_bytes_and_can_hold_a_whole_block() {
        let cache = BlockCache::new(8 << 20);
        let mut last = None;
        for n in 0u32..64 {
            let mut bytes = vec![0; 1 << 20];
            bytes[..4].copy_from_slice(&n.to_le_bytes());
            let block = Block::seal(bytes.into()).unwrap();
            cache.insert(&block);
            last = Some(block.hash());
            assert!(cache.bytes() <= 8 << 20, "{} bytes after {n}", cache.bytes());
        }
        assert!(cache.whole(last.unwrap()).is_some());
    }

    #[tokio::test]
    async fn of_many_readers_one_fetches() {
        let cache = std::sync::Arc::new(BlockCache::new(1 << 22));
        let block = Block::seal(Bytes::from_static(b"once")).unwrap();
        let right = cache.whole_or_right(block.hash()).await.unwrap_err();
        let waiting = tokio::spawn({
            let (cache, hash) = (std::sync::Arc::clone(&cache), block.hash());
            async move { cache.whole_or_right(hash).await.ok() }
        });
        tokio::task::yield_now().await;
        right.insert(block.bytes().clone()).unwrap();
        assert_eq!(waiting.await.unwrap(), Some(block.bytes().clone()));
    }
}

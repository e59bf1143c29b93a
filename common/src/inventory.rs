//! What a server has, in buckets of hashes that begin alike, each with a digest: two that have the same need to say no more. Pure.

use serde::{Deserialize, Serialize};

use crate::block::BlockHash;

/// A bucket for each first byte of a hash.
pub const BUCKETS: std::ops::RangeInclusive<u8> = 0..=u8::MAX;

/// What stands for all hashes of a bucket. One can be added or taken away without the others, in any order: the hashes are summed, as
/// in `AdHash` (Bellare and Micciancio, 1997). It finds what was lost, not what somebody chose so that the sums are equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketDigest {
    pub blocks: u64,
    /// Four sums modulo 2^64, little-endian: of the first eight bytes of each hash, the next eight, and so on.
    pub digest: [u8; 32],
}

impl BucketDigest {
    pub fn of<'h>(hashes: impl IntoIterator<Item = &'h BlockHash>) -> Self {
        let mut digest = Self::default();
        hashes.into_iter().for_each(|hash| digest.add(hash));
        digest
    }

    /// One that is not among them.
    pub fn add(&mut self, hash: &BlockHash) {
        self.blocks = self.blocks.wrapping_add(1);
        self.combine(&hash.0, u64::wrapping_add);
    }

    /// One that is among them.
    pub fn take(&mut self, hash: &BlockHash) {
        self.blocks = self.blocks.wrapping_sub(1);
        self.combine(&hash.0, u64::wrapping_sub);
    }

    /// What has to be added to `other` to make this of it.
    #[must_use]
    pub fn minus(mut self, other: &Self) -> Self {
        self.blocks = self.blocks.wrapping_sub(other.blocks);
        self.combine(&other.digest, u64::wrapping_sub);
        self
    }

    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        self.blocks = self.blocks.wrapping_add(other.blocks);
        self.combine(&other.digest, u64::wrapping_add);
        self
    }

    fn combine(&mut self, by: &[u8; 32], with: fn(u64, u64) -> u64) {
        let (sums, words) = (self.digest.as_chunks_mut::<8>().0, by.as_chunks::<8>().0);
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = with(u64::from_le_bytes(*sum), u64::from_le_bytes(*word)).to_le_bytes();
        }
    }
}

pub fn bucket_of(hash: &BlockHash) -> u8 {
    hash.0[0]
}

pub fn is_in(bucket: u8, hash: &BlockHash) -> bool {
    bucket_of(hash) == bucket
}

/// The last possible hash before a bucket; `None`: there is none before the first.
pub fn before(bucket: u8) -> Option<BlockHash> {
    bucket.checked_sub(1).map(|earlier| {
        let mut hash = [u8::MAX; 32];
        hash[0] = earlier;
        BlockHash(hash)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_tells_contents_apart_and_a_bucket_begins_after_the_one_before() {
        let hashes = [BlockHash([7; 32]), BlockHash([8; 32])];
        assert_eq!(BucketDigest::of(&hashes), BucketDigest::of(&hashes));
        assert_ne!(BucketDigest::of(&hashes), BucketDigest::of(&hashes[..1]));
        assert_ne!(BucketDigest::of(&hashes[1..]), BucketDigest::of(&hashes[..1]));
        assert_eq!(BucketDigest::of(&[]), BucketDigest::default());
        assert_eq!(before(0), None);
        let mut first = [0; 32];
        first[0] = 8;
        assert!(before(8).is_some_and(|last| last < BlockHash(first) && is_in(7, &last)));
    }

    #[test]
    fn hashes_come_and_go_in_any_order() {
        let hashes: Vec<BlockHash> = (0_u64..100).map(|n| BlockHash::of(&n.to_le_bytes())).collect();
        let mut digest = BucketDigest::of(hashes.iter().rev());
        assert_eq!(digest, BucketDigest::of(&hashes));
        hashes.iter().skip(1).step_by(2).for_each(|hash| digest.take(hash));
        let rest = BucketDigest::of(hashes.iter().step_by(2));
        assert_eq!(digest, rest);
        let all = BucketDigest::of(&hashes);
        let gone = all.minus(&rest);
        assert_eq!(gone, BucketDigest::of(hashes.iter().skip(1).step_by(2)));
        assert_eq!((rest.plus(&gone), rest.minus(&all).plus(&all)), (all, rest));
    }

    #[test]
    fn the_sums_have_their_golden_bytes() {
        let mut high = [u8::MAX; 32];
        high[8] = 3;
        let digest = BucketDigest::of(&[BlockHash(high), BlockHash([2; 32])]);
        assert_eq!((digest.blocks, digest.digest[..9].to_vec()), (2, vec![1, 2, 2, 2, 2, 2, 2, 2, 5]));
    }
}

//! What a server has, in buckets of hashes that begin alike, each with a digest: two that have the same need to say no more. Pure.

use serde::{Deserialize, Serialize};

use crate::block::BlockHash;

/// A bucket for each first byte of a hash.
pub const BUCKETS: std::ops::RangeInclusive<u8> = 0..=u8::MAX;

/// What stands for all hashes of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketDigest {
    pub blocks: u64,
    /// BLAKE3 of the hashes, in order, one after the other.
    pub digest: [u8; 32],
}

impl BucketDigest {
    /// Of hashes in order.
    pub fn of<'h>(sorted: impl IntoIterator<Item = &'h BlockHash>) -> Self {
        let (mut hasher, mut blocks) = (blake3::Hasher::new(), 0);
        for hash in sorted {
            hasher.update(&hash.0);
            blocks += 1;
        }
        Self { blocks, digest: *hasher.finalize().as_bytes() }
    }
}

pub fn is_in(bucket: u8, hash: &BlockHash) -> bool {
    hash.0[0] == bucket
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
        assert_eq!(BucketDigest::of(&[]).blocks, 0);
        assert_eq!(before(0), None);
        let mut first = [0; 32];
        first[0] = 8;
        assert!(before(8).is_some_and(|last| last < BlockHash(first) && is_in(7, &last)));
    }
}

//! Verifying a part of a block against the block's own hash. Pure.
//!
//! BLAKE3 is a tree hash: a slice with the tree nodes beside it proves itself against the root (the bao construction,
//! O'Connor 2019; here with groups of 16 KiB).

use std::ops::Range;

use bao_tree::{BaoTree, BlockSize, ChunkNum, ChunkRanges, io::BaoContentItem, io::sync::DecodeResponseIter};
use bytes::{Bytes, BytesMut};
use holdfast_common::{BlockHash, limits::HASH_GROUP_SIZE};

/// log2 of the hash chunks (1 KiB) in a group.
const GROUP_LOG: u8 = 4;
const _: () = assert!(1024 << GROUP_LOG == HASH_GROUP_SIZE);

/// The bytes that arrived do not prove to be that part of that block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the slice does not prove to be part of block {block}: {why}")]
pub struct BadProof {
    pub block: BlockHash,
    pub why: String,
}

/// The group-aligned range that has to travel so that `range` of a block of `length` bytes can be proved.
pub fn aligned(range: &Range<u32>, length: u32) -> Range<u32> {
    let start = range.start - range.start % HASH_GROUP_SIZE;
    start..range.end.next_multiple_of(HASH_GROUP_SIZE).min(length)
}

/// Bytes `aligned` of the block of `length` bytes, proved by `encoded` (bao, no length prefix).
pub fn open(block: BlockHash, length: u32, aligned: Range<u32>, encoded: &[u8]) -> Result<Bytes, BadProof> {
    let bad = |why: String| BadProof { block, why };
    let tree = BaoTree::new(u64::from(length), BlockSize::from_chunk_log(GROUP_LOG));
    let chunks = ChunkNum::full_chunks(u64::from(aligned.start))..ChunkNum::chunks(u64::from(aligned.end));
    let ranges = ChunkRanges::from(chunks);
    let mut bytes = BytesMut::with_capacity(aligned.len());
    let mut rest = encoded;
    for item in DecodeResponseIter::new(blake3::Hash::from_bytes(block.0), tree, &mut rest, &ranges) {
        if let BaoContentItem::Leaf(leaf) = item.map_err(|error| bad(error.to_string()))? {
            bytes.extend_from_slice(&leaf.data);
        }
    }
    match (bytes.len() == aligned.len(), rest.is_empty()) {
        (true, true) => Ok(bytes.freeze()),
        (false, _) => Err(bad(format!("{} bytes instead of {}", bytes.len(), aligned.len()))),
        (_, false) => Err(bad(format!("{} bytes too many", rest.len()))),
    }
}

#[cfg(test)]
mod tests {
    use bao_tree::io::{outboard::PreOrderMemOutboard, sync::encode_ranges};
    use proptest::prelude::*;

    use super::*;

    fn encode(data: &[u8], aligned: Range<u32>) -> Vec<u8> {
        let outboard = PreOrderMemOutboard::create(data, BlockSize::from_chunk_log(GROUP_LOG));
        let chunks = ChunkNum::full_chunks(aligned.start.into())..ChunkNum::chunks(aligned.end.into());
        let mut encoded = Vec::new();
        encode_ranges(data, &outboard, &ChunkRanges::from(chunks), &mut encoded).unwrap();
        encoded
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn a_slice_proves_itself_and_any_flipped_bit_is_found(
            length in 1u32..200_000, at in any::<prop::sample::Index>(), size in 1u32..40_000, flip in any::<prop::sample::Index>(),
        ) {
            let data: Vec<u8> = (0..length).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
            let hash = BlockHash::of(&data);
            let start = u32::try_from(at.index(length as usize)).unwrap();
            let range = aligned(&(start..(start + size).min(length)), length);
            let mut encoded = encode(&data, range.clone());
            let opened = open(hash, length, range.clone(), &encoded).unwrap();
            prop_assert_eq!(&opened[..], &data[range.start as usize..range.end as usize]);
            let bit = flip.index(encoded.len() * 8);
            encoded[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(open(hash, length, range.clone(), &encoded).is_err());
            prop_assert!(open(hash, length, range, &encoded[..encoded.len() - 1]).is_err());
        }
    }
}

//! A block on its way into the store: checked against its hash, with its tree. Pure.

use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};
use bytes::Bytes;
use holdfast_common::{
    Block, BlockHash, Epoch, HashMismatch,
    limits::{BLOCK_SIZE_MAX, HASH_GROUP_SIZE},
};

use super::format::tree_length;

/// Bytes that match `hash`, and the hash tree over them: there is no other way to make one.
#[derive(Clone, Debug)]
pub struct CheckedBlock {
    hash: BlockHash,
    epoch: Epoch,
    bytes: Bytes,
    tree: Vec<u8>,
}

impl CheckedBlock {
    /// Hashes `bytes` once, for the check and for the tree.
    pub fn verify(hash: BlockHash, bytes: Bytes, epoch: Epoch) -> Result<Self, HashMismatch> {
        if bytes.len() <= HASH_GROUP_SIZE as usize || bytes.len() > BLOCK_SIZE_MAX as usize {
            let bytes = Block::verify(hash, bytes)?.bytes().clone();
            return Ok(Self { hash, epoch, bytes, tree: Vec::new() });
        }
        let (found, tree) = hash_with_tree(&bytes);
        if found == hash {
            Ok(Self { hash, epoch, bytes, tree })
        } else {
            Err(HashMismatch::Hash { expected: hash, found, length: bytes.len() })
        }
    }

    /// A block that was checked already gets its tree.
    pub fn from_block(block: &Block, epoch: Epoch) -> Self {
        let (hash, bytes) = (block.hash(), block.bytes().clone());
        let is_one_group = bytes.len() <= HASH_GROUP_SIZE as usize;
        let tree = if is_one_group { Vec::new() } else { hash_with_tree(&bytes).1 };
        Self { hash, epoch, bytes, tree }
    }

    pub fn hash(&self) -> BlockHash {
        self.hash
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Pre-order hash pairs of the groups, as `bao_tree` lays them out; empty for one group.
    pub fn tree(&self) -> &[u8] {
        &self.tree
    }

    #[expect(clippy::cast_possible_truncation, reason = "at most BLOCK_SIZE_MAX, by construction")]
    pub fn length(&self) -> u32 {
        self.bytes.len() as u32
    }
}

/// The hash of more than one group of bytes, and the tree above its groups: pairs of chaining values in pre-order,
/// as `bao_tree` lays them out, but without copying the bytes: half as much time.
fn hash_with_tree(bytes: &[u8]) -> (BlockHash, Vec<u8>) {
    let length = u32::try_from(bytes.len()).map_or(0, tree_length);
    let mut tree = Vec::with_capacity(length as usize);
    let (left, right) = push_pair(bytes, 0, &mut tree);
    (BlockHash(*merge_subtrees_root(&left, &right, Mode::Hash).as_bytes()), tree)
}

/// Appends the tree over `bytes` (more than one group, which starts at `offset` of the block), and returns its top pair.
fn push_pair(bytes: &[u8], offset: u64, tree: &mut Vec<u8>) -> (ChainingValue, ChainingValue) {
    let place = tree.len();
    tree.resize(place + 64, 0);
    let middle = left_subtree_len(bytes.len() as u64);
    let (left, right) = bytes.split_at(usize::try_from(middle).unwrap_or(bytes.len()));
    let left = chaining_value(left, offset, tree);
    let right = chaining_value(right, offset + middle, tree);
    tree[place..place + 32].copy_from_slice(&left);
    tree[place + 32..place + 64].copy_from_slice(&right);
    (left, right)
}

fn chaining_value(bytes: &[u8], offset: u64, tree: &mut Vec<u8>) -> ChainingValue {
    if bytes.len() <= HASH_GROUP_SIZE as usize {
        return blake3::Hasher::new().set_input_offset(offset).update(bytes).finalize_non_root();
    }
    let (left, right) = push_pair(bytes, offset, tree);
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

#[cfg(test)]
mod tests {
    use bao_tree::io::outboard::PreOrderMemOutboard;

    use super::{super::format::GROUP, *};

    #[test]
    fn the_tree_is_the_one_that_bao_tree_builds() {
        for length in [16_385, 32_768, 32_769, 49_153, 100_000, 1 << 19, (1 << 20) - 1, 1 << 20] {
            let mut bytes = vec![0; length];
            blake3::Hasher::new().finalize_xof().fill(&mut bytes);
            let expected = PreOrderMemOutboard::create(&bytes, GROUP);
            let (hash, tree) = hash_with_tree(&bytes);
            assert_eq!((hash.0, tree), (*expected.root.as_bytes(), expected.data), "{length}");
        }
    }

    #[test]
    fn bytes_pass_only_under_their_own_hash_at_every_size() {
        for length in [1, 4096, 16_384, 16_385, 100_000, 1 << 20] {
            let bytes = Bytes::from(vec![7; length]);
            let hash = BlockHash::of(&bytes);
            let checked = CheckedBlock::verify(hash, bytes.clone(), Epoch(0)).unwrap();
            assert_eq!(checked.tree().len(), length.div_ceil(16_384).saturating_sub(1) * 64);
            let mut other = bytes.to_vec();
            other[length - 1] ^= 1;
            assert!(CheckedBlock::verify(hash, other.into(), Epoch(0)).is_err(), "{length}");
        }
        for length in [0, (1 << 20) + 1] {
            let bytes = Bytes::from(vec![7; length]);
            assert!(CheckedBlock::verify(BlockHash::of(&bytes), bytes, Epoch(0)).is_err(), "{length}");
        }
    }
}

//! A block on its way into the store: checked against its hash, with its tree. Pure.

use bao_tree::io::outboard::PreOrderMemOutboard;
use bytes::Bytes;
use holdfast_common::{
    Block, BlockHash, Epoch, HashMismatch,
    limits::{BLOCK_SIZE_MAX, HASH_GROUP_SIZE},
};

use super::format::GROUP;

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
        let outboard = PreOrderMemOutboard::create(&bytes, GROUP);
        let found = BlockHash(*outboard.root.as_bytes());
        if found == hash {
            Ok(Self { hash, epoch, bytes, tree: outboard.data })
        } else {
            Err(HashMismatch::Hash { expected: hash, found, length: bytes.len() })
        }
    }

    /// A block that was checked already gets its tree.
    pub fn from_block(block: &Block, epoch: Epoch) -> Self {
        let (hash, bytes) = (block.hash(), block.bytes().clone());
        let tree = match bytes.len() <= HASH_GROUP_SIZE as usize {
            true => Vec::new(),
            false => PreOrderMemOutboard::create(&bytes, GROUP).data,
        };
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

#[cfg(test)]
mod tests {
    use super::*;

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

//! Blocks named by the BLAKE3 of their bytes. Pure.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::limits::BLOCK_SIZE_MAX;

/// BLAKE3 of a block's bytes: its name everywhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockHash(pub [u8; 32]);

impl BlockHash {
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// From 64 hexadecimal digits; `None` for anything else.
    pub fn from_hex(text: &str) -> Option<Self> {
        blake3::Hash::from_hex(text).ok().map(|hash| Self(*hash.as_bytes()))
    }
}

impl std::fmt::Display for BlockHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Bytes that are proved to match their hash: there is no other way to make one.
/// 1..=`BLOCK_SIZE_MAX` bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    hash: BlockHash,
    bytes: Bytes,
}

/// The bytes in hand are not the block that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HashMismatch {
    #[error("{length} bytes hash to {found}, not to {expected}")]
    Hash { expected: BlockHash, found: BlockHash, length: usize },
    #[error("a block has 1 to {BLOCK_SIZE_MAX} bytes, not {length}")]
    Length { length: usize },
}

impl Block {
    /// Names `bytes` by their own hash. Refuses only a length out of range.
    pub fn seal(bytes: Bytes) -> Result<Self, HashMismatch> {
        check_length(bytes.len())?;
        Ok(Self { hash: BlockHash::of(&bytes), bytes })
    }

    pub fn verify(expected: BlockHash, bytes: Bytes) -> Result<Self, HashMismatch> {
        let block = Self::seal(bytes)?;
        if block.hash == expected {
            Ok(block)
        } else {
            Err(HashMismatch::Hash { expected, found: block.hash, length: block.bytes.len() })
        }
    }

    pub fn hash(&self) -> BlockHash {
        self.hash
    }

    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    #[expect(clippy::cast_possible_truncation, reason = "at most BLOCK_SIZE_MAX, by construction")]
    pub fn length(&self) -> u32 {
        self.bytes.len() as u32
    }
}

fn check_length(length: usize) -> Result<(), HashMismatch> {
    if (1..=BLOCK_SIZE_MAX as usize).contains(&length) { Ok(()) } else { Err(HashMismatch::Length { length }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_only_under_their_own_hash() {
        let good = Block::seal(Bytes::from_static(b"abc")).unwrap();
        assert_eq!(good.hash().to_string(), "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85");
        assert!(Block::verify(good.hash(), Bytes::from_static(b"abc")).is_ok());
        assert!(Block::verify(good.hash(), Bytes::from_static(b"abd")).is_err());
        assert!(Block::verify(good.hash(), Bytes::from_static(b"ab")).is_err());
    }

    #[test]
    fn empty_and_oversized_bytes_are_no_block() {
        assert!(Block::seal(Bytes::new()).is_err());
        assert!(Block::seal(Bytes::from(vec![0; BLOCK_SIZE_MAX as usize])).is_ok());
        assert!(Block::seal(Bytes::from(vec![0; BLOCK_SIZE_MAX as usize + 1])).is_err());
    }
}

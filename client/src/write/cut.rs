//! How extents of one file become blocks. Pure.
//!
//! A large run becomes a block of its own; small ones are packed together, so that a thousand scattered 4 KiB writes
//! cost four blocks and not a thousand. A lone small run stays alone, so that equal small files stay one block.

use bytes::{Bytes, BytesMut};
use holdfast_common::{
    Block, BlockHash, ChunkIndex, HashMismatch, Piece,
    limits::{BLOCK_SIZE_MAX, COMMIT_PIECES_MAX},
};

use super::buffer::Extent;

/// A run at least this long is not packed with others.
const ALONE_MIN: usize = 128 << 10;

/// Blocks that hold all the extents, and the pieces that map them.
#[derive(Debug, Default)]
pub struct Cut {
    pub blocks: Vec<Block>,
    pub pieces: Vec<(ChunkIndex, Piece)>,
}

/// Cuts `extents` (at most `COMMIT_PIECES_MAX`) into blocks and hashes them.
pub fn cut(extents: &[(ChunkIndex, Extent)]) -> Result<Cut, HashMismatch> {
    debug_assert!(extents.len() <= COMMIT_PIECES_MAX);
    let mut cut = Cut::default();
    let mut pack: Vec<&(ChunkIndex, Extent)> = Vec::new();
    let mut packed = 0;
    for member in extents {
        let length = member.1.bytes.len();
        if length >= ALONE_MIN {
            cut.add(&[member])?;
            continue;
        }
        if packed + length > BLOCK_SIZE_MAX as usize {
            cut.add(&std::mem::take(&mut pack))?;
            packed = 0;
        }
        pack.push(member);
        packed += length;
    }
    if !pack.is_empty() {
        cut.add(&pack)?;
    }
    Ok(cut)
}

impl Cut {
    fn add(&mut self, members: &[&(ChunkIndex, Extent)]) -> Result<(), HashMismatch> {
        let block = Block::seal(joined(members))?;
        let mut block_offset = 0;
        for (chunk, extent) in members {
            let range = extent.range();
            let length = range.end - range.start;
            let piece = Piece { offset: range.start, length, block: block.hash(), block_offset };
            self.pieces.push((*chunk, piece));
            block_offset += length;
        }
        self.add_block(block);
        Ok(())
    }

    fn add_block(&mut self, block: Block) {
        let known = |hash: BlockHash| self.blocks.iter().any(|other| other.hash() == hash);
        if !known(block.hash()) {
            self.blocks.push(block);
        }
    }
}

fn joined(members: &[&(ChunkIndex, Extent)]) -> Bytes {
    if let [(_, only)] = members {
        return only.bytes.clone();
    }
    let mut bytes = BytesMut::with_capacity(members.iter().map(|(_, extent)| extent.bytes.len()).sum());
    members.iter().for_each(|(_, extent)| bytes.extend_from_slice(&extent.bytes));
    bytes.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(chunk: u32, offset: u32, length: usize, fill: u8) -> (ChunkIndex, Extent) {
        (ChunkIndex(chunk), Extent { offset, bytes: Bytes::from(vec![fill; length]) })
    }

    /// Block lengths, and whether every extent reads back through its piece.
    #[track_caller]
    fn check(extents: &[(ChunkIndex, Extent)], block_lengths: &[u32]) {
        let cut = cut(extents).unwrap();
        assert_eq!(cut.blocks.iter().map(Block::length).collect::<Vec<_>>(), block_lengths);
        for ((chunk, extent), (piece_chunk, piece)) in sorted(extents.to_vec()).iter().zip(sorted_pieces(&cut)) {
            assert_eq!((*chunk, extent.range()), (piece_chunk, piece.offset..piece.end()));
            let block = cut.blocks.iter().find(|block| block.hash() == piece.block).unwrap();
            let from = piece.block_offset as usize;
            assert_eq!(block.bytes()[from..from + piece.length as usize], extent.bytes[..]);
        }
    }

    fn sorted(mut extents: Vec<(ChunkIndex, Extent)>) -> Vec<(ChunkIndex, Extent)> {
        extents.sort_by_key(|(chunk, extent)| (*chunk, extent.offset));
        extents
    }

    fn sorted_pieces(cut: &Cut) -> Vec<(ChunkIndex, Piece)> {
        let mut pieces = cut.pieces.clone();
        pieces.sort_by_key(|(chunk, piece)| (*chunk, piece.offset));
        pieces
    }

    #[test]
    fn large_runs_stand_alone_and_small_ones_share() {
        let full = BLOCK_SIZE_MAX as usize;
        check(&[extent(0, 0, full, 1)], &[BLOCK_SIZE_MAX]);
        check(&[extent(0, 0, 4096, 1)], &[4096]);
        check(&[extent(0, 0, 4096, 1), extent(3, 8192, 4096, 2)], &[8192]);
        check(&[extent(0, 0, full, 1), extent(1, 0, 10, 2), extent(2, 5, 20, 3)], &[BLOCK_SIZE_MAX, 30]);
    }

    #[test]
    fn a_pack_that_would_pass_the_block_size_is_closed() {
        let runs: Vec<_> = (0..=254u8).map(|n| extent(u32::from(n), 0, 4096, n)).collect();
        let runs: Vec<_> = runs.into_iter().chain((0..45).map(|n| extent(300 + n, 0, 4096, 99))).collect();
        check(&runs, &[BLOCK_SIZE_MAX, 4096 * 44]);
    }

    #[test]
    fn equal_bytes_are_one_block() {
        let full = BLOCK_SIZE_MAX as usize;
        check(&[extent(0, 0, full, 9), extent(1, 0, full, 9)], &[BLOCK_SIZE_MAX]);
    }
}

//! Which parts of which blocks answer a read of one chunk. Pure.

use std::ops::Range;

use holdfast_common::{BlockHash, Piece};

/// Bytes `within` of `block` are the bytes of the chunk from `offset` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub offset: u32,
    pub block: BlockHash,
    pub within: Range<u32>,
}

/// Parts that cover `range`, in order; what they leave out is hole.
pub fn parts(pieces: &[Piece], range: &Range<u32>) -> Vec<Part> {
    let first = pieces.partition_point(|piece| piece.end() <= range.start);
    pieces[first..]
        .iter()
        .take_while(|piece| piece.offset < range.end)
        .map(|piece| {
            let from = piece.offset.max(range.start);
            let to = piece.end().min(range.end);
            let start = piece.block_offset + (from - piece.offset);
            Part { offset: from, block: piece.block, within: start..start + (to - from) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_along_its_pieces() {
        let block = BlockHash([1; 32]);
        let pieces = [
            Piece { offset: 10, length: 10, block, block_offset: 100 },
            Piece { offset: 30, length: 5, block, block_offset: 0 },
        ];
        let check = |range: Range<u32>, expected: &[(u32, Range<u32>)]| {
            let got: Vec<_> = parts(&pieces, &range).into_iter().map(|part| (part.offset, part.within)).collect();
            assert_eq!(got, expected, "{range:?}");
        };
        check(0..10, &[]);
        check(0..11, &[(10, 100..101)]);
        check(12..18, &[(12, 102..108)]);
        check(15..40, &[(15, 105..110), (30, 0..5)]);
        check(20..30, &[]);
    }
}

//! The pieces of one chunk: sorted, not overlapping. Pure.

use holdfast_common::{Piece, limits::CHUNK_SIZE};

/// What is left of `pieces` when nothing may cover `start..end`: a piece that crosses an edge is cut there, one
/// that covers both is split in two.
pub fn cut(pieces: &[Piece], start: u32, end: u32) -> Vec<Piece> {
    let mut left = Vec::with_capacity(pieces.len() + 2);
    for piece in pieces {
        if piece.end() <= start || piece.offset >= end {
            left.push(*piece);
            continue;
        }
        if piece.offset < start {
            left.push(Piece { length: start - piece.offset, ..*piece });
        }
        if piece.end() > end {
            left.push(after(piece, end));
        }
    }
    left
}

/// The part of `piece` from `offset` on.
pub fn after(piece: &Piece, offset: u32) -> Piece {
    let skipped = offset - piece.offset;
    Piece { offset, length: piece.length - skipped, block: piece.block, block_offset: piece.block_offset + skipped }
}

/// The part of `piece` within `start..end`, which it must touch.
pub fn within(piece: &Piece, start: u32, end: u32) -> Piece {
    let head = if piece.offset < start { after(piece, start) } else { *piece };
    Piece { length: head.end().min(end) - head.offset, ..head }
}

/// Lays `piece` over the others.
pub fn lay(pieces: &[Piece], piece: Piece) -> Vec<Piece> {
    let mut laid = cut(pieces, piece.offset, piece.end());
    let place = laid.partition_point(|other| other.offset < piece.offset);
    laid.insert(place, piece);
    laid
}

/// Bytes that `pieces` cover.
pub fn covered(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.length)).sum()
}

/// The bounds of a piece, apart from those of its block.
pub fn is_in_bounds(piece: &Piece) -> bool {
    piece.length > 0
        && u64::from(piece.offset) + u64::from(piece.length) <= CHUNK_SIZE
        && piece.block_offset.checked_add(piece.length).is_some()
}

#[cfg(test)]
mod tests {
    use holdfast_common::BlockHash;

    use super::*;

    fn piece(text: &str) -> Piece {
        let numbers: Vec<u32> = text[1..].split('+').map(|n| n.parse().unwrap()).collect();
        Piece {
            block: BlockHash([text.as_bytes()[0]; 32]),
            offset: numbers[0],
            length: numbers[1],
            block_offset: numbers[2],
        }
    }

    fn pieces(text: &str) -> Vec<Piece> {
        text.split_whitespace().map(piece).collect()
    }

    #[test]
    fn a_piece_laid_over_others_cuts_splits_and_covers_them() {
        // block letter, offset + length + offset in block
        for (before, laid, after) in [
            ("", "b5+5+0", "b5+5+0"),
            ("a0+10+0", "b10+5+0", "a0+10+0 b10+5+0"),
            ("a10+5+0", "b0+10+0", "b0+10+0 a10+5+0"),
            ("a0+10+0", "b0+10+0", "b0+10+0"),
            ("a0+10+3", "b4+2+0", "a0+4+3 b4+2+0 a6+4+9"),
            ("a0+10+0", "b0+4+0", "b0+4+0 a4+6+4"),
            ("a0+10+0", "b6+4+0", "a0+6+0 b6+4+0"),
            ("a0+4+0 c4+4+0 d8+4+0", "b2+8+0", "a0+2+0 b2+8+0 d10+2+2"),
            ("a0+4+0 c6+4+0", "b4+2+0", "a0+4+0 b4+2+0 c6+4+0"),
        ] {
            assert_eq!(lay(&pieces(before), piece(laid)), pieces(after), "{laid} over {before}");
        }
    }

    #[test]
    fn a_part_of_a_piece_keeps_its_place_in_the_block() {
        assert_eq!(within(&piece("a10+10+5"), 12, 15), piece("a12+3+7"));
        assert_eq!(within(&piece("a10+10+5"), 0, 15), piece("a10+5+5"));
        assert_eq!(within(&piece("a10+10+5"), 0, 99), piece("a10+10+5"));
    }
}

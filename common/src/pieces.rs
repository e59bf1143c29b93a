//! The pieces of one chunk: sorted by offset, never overlapping; what they leave out is hole. Pure.

use std::ops::Range;

use crate::{limits::BLOCK_SIZE_MAX, types::Piece};

/// Lays `new` over `pieces`: what it covers is dropped, what it touches is cut.
pub fn lay_over(pieces: &mut Vec<Piece>, new: Piece) {
    clear(pieces, new.offset..new.end());
    let place = pieces.partition_point(|piece| piece.offset < new.offset);
    pieces.insert(place, new);
}

/// Makes `range` a hole: a piece that crosses an edge is cut there, one that crosses both is split in two.
pub fn clear(pieces: &mut Vec<Piece>, range: Range<u32>) {
    if range.is_empty() {
        return;
    }
    let first = pieces.partition_point(|piece| piece.end() <= range.start);
    let last = pieces.partition_point(|piece| piece.offset < range.end);
    let touched = first..last.max(first);
    let parts = |piece: &Piece| [part_before(piece, range.start), part_after(piece, range.end)];
    let kept: Vec<Piece> = pieces[touched.clone()].iter().flat_map(parts).flatten().collect();
    drop(pieces.splice(touched, kept));
}

/// The part of `piece` that lies in `range`, with its place in the block.
pub fn within(piece: &Piece, range: Range<u32>) -> Option<Piece> {
    part_after(piece, range.start).and_then(|rest| part_before(&rest, range.end))
}

fn part_before(piece: &Piece, end: u32) -> Option<Piece> {
    (piece.offset < end).then(|| Piece { length: piece.length.min(end - piece.offset), ..*piece })
}

fn part_after(piece: &Piece, start: u32) -> Option<Piece> {
    if piece.end() <= start {
        return None;
    }
    let skipped = start.saturating_sub(piece.offset);
    Some(Piece {
        offset: piece.offset + skipped,
        length: piece.length - skipped,
        block: piece.block,
        block_offset: piece.block_offset + skipped,
    })
}

/// A number that two lists of pieces share if they read alike from the same blocks, and practically only then: 64 bits
/// of the BLAKE3 of the runs, those that go on where the last one ends taken together.
pub fn digest(pieces: &[Piece]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    let mut run: Option<Piece> = None;
    for piece in pieces {
        match &mut run {
            Some(run) if goes_on(run, piece) => run.length += piece.length,
            _ => {
                run.iter().for_each(|run| hash_run(&mut hasher, run));
                run = Some(*piece);
            }
        }
    }
    run.iter().for_each(|run| hash_run(&mut hasher, run));
    let mut word = [0; 8];
    word.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(word)
}

fn goes_on(run: &Piece, piece: &Piece) -> bool {
    run.end() == piece.offset && run.block == piece.block && run.block_offset + run.length == piece.block_offset
}

fn hash_run(hasher: &mut blake3::Hasher, run: &Piece) {
    hasher.update(&run.block.0);
    for number in [run.offset, run.length, run.block_offset] {
        hasher.update(&number.to_le_bytes());
    }
}

/// Bytes that the pieces hold.
pub fn stored(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.length)).sum()
}

/// Whether a piece from outside keeps to the rules, given the length of its block.
pub fn is_sound(piece: &Piece, block_length: u32) -> bool {
    let in_chunk = piece.offset.checked_add(piece.length).is_some_and(|end| end <= BLOCK_SIZE_MAX);
    let in_block = piece.block_offset.checked_add(piece.length).is_some_and(|end| end <= block_length);
    piece.length > 0 && in_chunk && in_block
}

/// Sorted, within the chunk, nothing empty, nothing twice.
pub fn are_ordered(pieces: &[Piece]) -> bool {
    let sound = pieces.iter().all(|piece| piece.length > 0 && piece.end() <= BLOCK_SIZE_MAX);
    sound && pieces.windows(2).all(|pair| pair[0].end() <= pair[1].offset)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::block::BlockHash;

    const SPAN: usize = 64;

    /// Each byte of the chunk as (block, offset in it); the definition of right.
    type Model = Vec<Option<(u8, u32)>>;

    fn piece(offset: u32, length: u32, block: u8, block_offset: u32) -> Piece {
        Piece { offset, length, block: BlockHash([block; 32]), block_offset }
    }

    fn read(pieces: &[Piece]) -> Model {
        let mut model = vec![None; SPAN];
        for piece in pieces {
            for i in 0..piece.length {
                model[(piece.offset + i) as usize] = Some((piece.block.0[0], piece.block_offset + i));
            }
        }
        model
    }

    #[derive(Clone, Debug)]
    enum Step {
        Lay { offset: u32, length: u32 },
        Clear { start: u32, end: u32 },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let span = u32::try_from(SPAN).unwrap();
        let lay = (0..span - 1).prop_flat_map(move |offset| (Just(offset), 1..=span - offset));
        let clear = (0..=span, 0..=span);
        prop::collection::vec(
            prop_oneof![
                lay.prop_map(|(offset, length)| Step::Lay { offset, length }),
                clear.prop_map(|(a, b)| Step::Clear { start: a.min(b), end: a.max(b) }),
            ],
            1..40,
        )
    }

    proptest! {
        #[test]
        fn pieces_read_like_the_bytes_that_were_written(steps in steps()) {
            let (mut pieces, mut model) = (Vec::new(), vec![None; SPAN]);
            for (number, step) in (1u8..).zip(steps) {
                match step {
                    Step::Lay { offset, length } => {
                        for i in 0..length {
                            model[(offset + i) as usize] = Some((number, 7 + i));
                        }
                        lay_over(&mut pieces, piece(offset, length, number, 7));
                    }
                    Step::Clear { start, end } => {
                        // What lies in a range is what clearing it takes away.
                        let inside: Vec<_> = pieces.iter().filter_map(|piece| within(piece, start..end)).collect();
                        let mut expected = vec![None; SPAN];
                        let bytes = start as usize..end as usize;
                        expected[bytes.clone()].clone_from_slice(&model[bytes.clone()]);
                        prop_assert_eq!(&read(&inside), &expected);
                        model[bytes].fill(None);
                        clear(&mut pieces, start..end);
                    }
                }
                prop_assert_eq!(&read(&pieces), &model);
                prop_assert!(are_ordered(&pieces));
                prop_assert_eq!(stored(&pieces), model.iter().flatten().count() as u64);
            }
        }
    }

    #[test]
    fn a_digest_does_not_see_where_a_run_was_cut_but_everything_else() {
        let whole = [piece(0, 10, 1, 5)];
        assert_eq!(digest(&whole), digest(&[piece(0, 4, 1, 5), piece(4, 6, 1, 9)]));
        for other in [[piece(0, 9, 1, 5)], [piece(1, 10, 1, 5)], [piece(0, 10, 2, 5)], [piece(0, 10, 1, 6)]] {
            assert_ne!(digest(&whole), digest(&other));
        }
        assert_ne!(digest(&whole), digest(&[]));
    }

    /// Pieces as `block letter, offset + length + offset in block`.
    fn pieces(text: &str) -> Vec<Piece> {
        let number = |text: &str| text.parse().unwrap();
        let read = |word: &str| {
            let numbers: Vec<u32> = word[1..].split('+').map(number).collect();
            piece(numbers[0], numbers[1], word.as_bytes()[0], numbers[2])
        };
        text.split_whitespace().map(read).collect()
    }

    #[test]
    fn a_piece_laid_over_others_cuts_splits_and_covers_them() {
        for (before, new, after) in [
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
            let mut laid = pieces(before);
            lay_over(&mut laid, pieces(new)[0]);
            assert_eq!(laid, pieces(after), "{new} over {before}");
        }
    }

    #[test]
    fn a_part_of_a_piece_keeps_its_place_in_the_block() {
        let whole = pieces("a10+10+5")[0];
        for (range, part) in [(12..15, "a12+3+7"), (0..15, "a10+5+5"), (0..99, "a10+10+5"), (0..10, ""), (20..30, "")] {
            assert_eq!(within(&whole, range.clone()), pieces(part).first().copied(), "{range:?}");
        }
    }
}

//! The pieces of one chunk: sorted by offset, never overlapping; what they leave out is hole. Pure.

use std::ops::Range;

use crate::{limits::BLOCK_SIZE_MAX, types::Piece};

/// Lays `new` over `pieces`: what it covers is dropped, what it touches is cut.
/// Returns the references to blocks that went away, one for each piece that no longer exists, and those
/// that were added, one for each piece that exists now and did not before (a piece cut in two adds one).
pub fn lay_over(pieces: &mut Vec<Piece>, new: Piece) -> Change {
    let mut change = clear(pieces, new.offset..new.end());
    let place = pieces.partition_point(|piece| piece.offset < new.offset);
    pieces.insert(place, new);
    change.added.push(new);
    change
}

/// Makes `range` a hole.
pub fn clear(pieces: &mut Vec<Piece>, range: Range<u32>) -> Change {
    let mut change = Change::default();
    if range.is_empty() {
        return change;
    }
    let first = pieces.partition_point(|piece| piece.end() <= range.start);
    let last = pieces.partition_point(|piece| piece.offset < range.end);
    let touched: Vec<Piece> = pieces[first..last.max(first)].to_vec();
    let kept = touched.iter().flat_map(|piece| [part_before(piece, range.start), part_after(piece, range.end)]);
    let kept: Vec<Piece> = kept.flatten().collect();
    change.removed = touched;
    change.added.clone_from(&kept);
    pieces.splice(first..last.max(first), kept);
    change
}

/// Pieces that existed and no longer do, and the reverse.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    pub removed: Vec<Piece>,
    pub added: Vec<Piece>,
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
            let (mut pieces, mut model, mut held) = (Vec::new(), vec![None; SPAN], Vec::<Piece>::new());
            for (number, step) in (1u8..).zip(steps) {
                let change = match step {
                    Step::Lay { offset, length } => {
                        for i in 0..length {
                            model[(offset + i) as usize] = Some((number, 7 + i));
                        }
                        lay_over(&mut pieces, piece(offset, length, number, 7))
                    }
                    Step::Clear { start, end } => {
                        model[start as usize..end as usize].fill(None);
                        clear(&mut pieces, start..end)
                    }
                };
                for gone in change.removed {
                    let place = held.iter().position(|piece| *piece == gone).expect("a removed piece was held");
                    held.remove(place);
                }
                held.extend(change.added);
                held.sort_by_key(|piece| piece.offset);
                prop_assert_eq!(&read(&pieces), &model);
                prop_assert_eq!(&held, &pieces);
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

    #[test]
    fn a_write_into_the_middle_cuts_a_piece_in_two() {
        let mut pieces = vec![piece(0, 10, 1, 0)];
        let change = lay_over(&mut pieces, piece(3, 2, 2, 0));
        assert_eq!(pieces, [piece(0, 3, 1, 0), piece(3, 2, 2, 0), piece(5, 5, 1, 5)]);
        assert_eq!((change.removed.len(), change.added.len()), (1, 3));
    }
}

//! Changes that the metadata server has answered, and would lose with its power: kept to be made again (I3). Pure.

use std::collections::BTreeMap;

use holdfast_common::{
    Ino, Position, Sequence, Time,
    limits::HEADER_SIZE_MAX,
    wire::{
        codec,
        meta::{LostChange, Mutated, Op},
    },
};

/// Changes, and bytes of them, past which a mount has a barrier made before it makes more.
const CHANGES_MAX: usize = 64 << 10;
const BYTES_MAX: usize = 64 << 20;
/// Bytes of the changes in one message.
const PART_BYTES_MAX: usize = HEADER_SIZE_MAX / 2;

/// In the order in which they were made.
#[derive(Debug, Default)]
pub struct Undurable {
    changes: BTreeMap<(Position, Sequence), Kept>,
    bytes: usize,
}

#[derive(Debug)]
struct Kept {
    op: Op,
    made: Option<Ino>,
    time: Option<Time>,
    bytes: usize,
}

impl Undurable {
    pub fn note(&mut self, position: Position, sequence: Sequence, op: Op, outcome: &Mutated) {
        let bytes = bytes_of(&op);
        let (made, time) = facts(outcome);
        self.bytes += bytes;
        self.changes.insert((position, sequence), Kept { op, made, time, bytes });
    }

    /// Everything through `position` is durable.
    pub fn forget_through(&mut self, position: Position) {
        let first = self.changes.first_key_value();
        if first.is_some_and(|((first, _), _)| *first <= position) {
            let rest = self.changes.split_off(&(Position(position.0 + 1), Sequence(0)));
            let gone = std::mem::replace(&mut self.changes, rest);
            self.bytes -= gone.values().map(|kept| kept.bytes).sum::<usize>();
        }
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.changes.len() >= CHANGES_MAX || self.bytes >= BYTES_MAX
    }

    /// The older half: nobody could make it durable for so long that there is no more room. Returns how many changes.
    pub fn give_up_half(&mut self) -> usize {
        let half = self.changes.len().div_ceil(2);
        for _ in 0..half {
            if let Some((_, kept)) = self.changes.pop_first() {
                self.bytes -= kept.bytes;
            }
        }
        half
    }

    /// What came after `after`, cut into messages: at least one, perhaps of nothing.
    pub fn lost_after(&self, after: Position) -> Vec<Vec<LostChange>> {
        let mut parts = vec![Vec::new()];
        let mut bytes = 0;
        for ((position, sequence), kept) in self.changes.range((Position(after.0 + 1), Sequence(0))..) {
            if bytes > 0 && bytes + kept.bytes > PART_BYTES_MAX {
                parts.push(Vec::new());
                bytes = 0;
            }
            bytes += kept.bytes;
            let Kept { op, made, time, .. } = kept;
            let change =
                LostChange { position: *position, sequence: *sequence, op: op.clone(), made: *made, time: *time };
            if let Some(part) = parts.last_mut() {
                part.push(change);
            }
        }
        parts
    }

    /// A change has been made again, at another position; or it could not be.
    pub fn moved(&mut self, was: Position, sequence: Sequence, now: Option<Position>) {
        let Some(kept) = self.changes.remove(&(was, sequence)) else { return };
        match now {
            Some(now) => drop(self.changes.insert((now, sequence), kept)),
            None => self.bytes -= kept.bytes,
        }
    }
}

/// What has to be the same when the change is made again.
fn facts(outcome: &Mutated) -> (Option<Ino>, Option<Time>) {
    match outcome {
        Mutated::Inode { attr, created } => (created.then_some(attr.ino), Some(attr.ctime)),
        Mutated::Removed { attr } | Mutated::Renamed { moved: attr, .. } => (None, Some(attr.ctime)),
        Mutated::Committed(files) => (None, files.iter().flatten().next().map(|attr| attr.ctime)),
        Mutated::Done => (None, None),
    }
}

/// On the wire. What did not fit was never sent, so never answered.
fn bytes_of(op: &Op) -> usize {
    match op {
        // Long ones are counted, not encoded: this is on the way of every write.
        Op::Commit { files, blocks } => {
            let files: usize = files.iter().map(|file| 64 + file.pieces.len() * 48 + file.only_over.len() * 12).sum();
            let blocks: usize = blocks.iter().map(|block| 57 + block.holders.len() * 13).sum();
            128 + files + blocks
        }
        other => 128 + codec::encode(other).map_or(0, |bytes| bytes.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unlink(length: usize) -> Op {
        Op::Unlink { parent: Ino::ROOT, name: vec![b'n'; length] }
    }

    fn kept(positions: &[u64]) -> Undurable {
        let mut kept = Undurable::default();
        for position in positions {
            kept.note(Position(*position), Sequence(*position), unlink(10), &Mutated::Done);
        }
        kept
    }

    fn positions(parts: &[Vec<LostChange>]) -> Vec<Vec<u64>> {
        parts.iter().map(|part| part.iter().map(|change| change.position.0).collect()).collect()
    }

    #[test]
    fn what_is_durable_is_forgotten_and_the_rest_is_told_in_order() {
        let mut kept = kept(&[9, 5, 7, 6]);
        kept.forget_through(Position(5));
        kept.forget_through(Position(4));
        assert_eq!(positions(&kept.lost_after(Position(0))), [[6, 7, 9]]);
        assert_eq!(positions(&kept.lost_after(Position(7))), [[9]]);
        assert_eq!(positions(&kept.lost_after(Position(9))), [[0u64; 0]]);
        kept.forget_through(Position(9));
        assert_eq!((kept.is_empty(), kept.bytes), (true, 0));
    }

    #[test]
    fn a_change_that_was_made_again_has_its_new_place() {
        let mut kept = kept(&[6, 7, 8]);
        kept.moved(Position(6), Sequence(6), Some(Position(11)));
        kept.moved(Position(7), Sequence(7), None);
        assert_eq!(positions(&kept.lost_after(Position(0))), [[8, 11]]);
        kept.forget_through(Position(11));
        assert_eq!(kept.bytes, 0);
    }

    #[test]
    fn messages_keep_to_their_limit() {
        let mut kept = Undurable::default();
        let value = vec![7; 60 << 10];
        for n in 1..=100 {
            let op = Op::SetXattr {
                ino: Ino::ROOT,
                name: b"user.a".to_vec(),
                value: value.clone(),
                mode: holdfast_common::wire::meta::XattrMode::Set,
            };
            kept.note(Position(n), Sequence(n), op, &Mutated::Done);
        }
        let parts = kept.lost_after(Position(0));
        assert_eq!(parts.iter().map(Vec::len).sum::<usize>(), 100);
        for changes in &parts {
            assert!(codec::encode(changes).unwrap().len() < HEADER_SIZE_MAX);
        }
        assert!((3..=5).contains(&parts.len()), "{}", parts.len());
        assert_eq!(kept.give_up_half(), 50);
    }

    #[test]
    fn the_size_of_a_commit_is_not_underestimated() {
        use holdfast_common::{BlockHash, BootId, ChunkIndex, Epoch, Piece, ServerId, wire::meta::*};
        let piece = Piece { offset: 0, length: 1, block: BlockHash([1; 32]), block_offset: 0 };
        let holder = Holder { server: ServerId(1), boot: BootId(1), durable: true };
        let file = FileCommit {
            ino: Ino(9),
            pieces: vec![(ChunkIndex(0), piece); 1000],
            size_at_least: 1,
            mtime: Time::default(),
            clear_suid: false,
            only_over: vec![(ChunkIndex(0), 1); 10],
        };
        let block = NewBlock { hash: BlockHash([1; 32]), length: 1, holders: vec![holder; 3], epoch: Epoch(1 << 40) };
        let op = Op::Commit { files: vec![file; 3], blocks: vec![block; 900] };
        assert!(bytes_of(&op) >= codec::encode(&op).unwrap().len());
    }
}

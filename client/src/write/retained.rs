//! Blocks that are stored and named, and not yet durable: kept until they are, to be stored again if their servers lose
//! them with their power (I3). Pure.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use holdfast_common::{Block, BlockHash, Position, wire::meta::Holder};

/// By the position of the commit that names them.
#[derive(Debug, Default)]
pub struct Retained {
    commits: BTreeMap<Position, Vec<RetainedBlock>>,
    /// The same blocks by their names, with how many commits hold each.
    named: BTreeMap<BlockHash, (Block, u32)>,
    bytes: u64,
}

/// One block, and who had it when it was last known.
#[derive(Clone, Debug)]
pub struct RetainedBlock {
    pub block: Block,
    pub holders: Vec<Holder>,
    /// When somebody had it for certain.
    seen: Instant,
}

impl Retained {
    /// Returns how many bytes more are held.
    pub fn note(&mut self, position: Position, blocks: Vec<(Block, Vec<Holder>)>, now: Instant) -> u64 {
        let bytes: u64 = blocks.iter().map(|(block, _)| u64::from(block.length())).sum();
        self.bytes += bytes;
        for (block, _) in &blocks {
            self.named.entry(block.hash()).or_insert_with(|| (block.clone(), 0)).1 += 1;
        }
        let kept = blocks.into_iter().map(|(block, holders)| RetainedBlock { block, holders, seen: now });
        self.commits.entry(position).or_default().extend(kept);
        bytes
    }

    /// Everything through `position` is durable. Returns how many bytes fewer are held.
    pub fn release_through(&mut self, position: Position) -> u64 {
        if self.commits.first_key_value().is_none_or(|(first, _)| *first > position) {
            return 0;
        }
        let rest = self.commits.split_off(&Position(position.0 + 1));
        let gone = std::mem::replace(&mut self.commits, rest);
        let bytes = gone.values().flatten().map(|kept| u64::from(kept.block.length())).sum();
        self.bytes -= bytes;
        gone.values().flatten().for_each(|kept| self.unname(kept.block.hash()));
        bytes
    }

    fn unname(&mut self, hash: BlockHash) {
        if let Some((_, commits)) = self.named.get_mut(&hash) {
            *commits -= 1;
            if *commits == 0 {
                self.named.remove(&hash);
            }
        }
    }

    /// A block that is held, for whoever reads it meanwhile.
    pub fn block(&self, hash: BlockHash) -> Option<&Block> {
        self.named.get(&hash).map(|(block, _)| block)
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The commits after `after` were lost, and have been made again at or before `now`.
    pub fn moved(&mut self, after: Position, now: Position) {
        let lost = self.commits.split_off(&Position(after.0 + 1));
        self.commits.entry(now).or_default().extend(lost.into_values().flatten());
    }

    /// Blocks that have not been seen for `age`; they count as seen now.
    pub fn unseen_for(&mut self, age: Duration, now: Instant) -> Vec<RetainedBlock> {
        let old = self.commits.values_mut().flatten().filter(|kept| now.saturating_duration_since(kept.seen) >= age);
        old.map(|kept| {
            kept.seen = now;
            kept.clone()
        })
        .collect()
    }

    /// A block has been stored again.
    pub fn stored_again(&mut self, block: &Block, holders: &[Holder]) {
        for kept in self.commits.values_mut().flatten().filter(|kept| kept.block.hash() == block.hash()) {
            kept.holders = holders.to_vec();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(seed: u8) -> (Block, Vec<Holder>) {
        (Block::seal(vec![seed; 10].into()).unwrap(), Vec::new())
    }

    fn seeds(blocks: &[RetainedBlock]) -> Vec<u8> {
        blocks.iter().map(|kept| kept.block.bytes()[0]).collect()
    }

    #[test]
    fn blocks_are_held_until_their_commit_is_durable() {
        let (mut retained, now) = (Retained::default(), Instant::now());
        assert_eq!(retained.note(Position(5), vec![block(1), block(2)], now), 20);
        assert_eq!(retained.note(Position(6), vec![block(3)], now), 10);
        assert_eq!(retained.release_through(Position(4)), 0);
        assert_eq!(retained.release_through(Position(5)), 20);
        assert_eq!(retained.bytes(), 10);
        assert_eq!(retained.release_through(Position(9)), 10);
    }

    #[test]
    fn a_block_can_be_read_for_as_long_as_a_commit_holds_it() {
        let (mut retained, now) = (Retained::default(), Instant::now());
        let hash = block(1).0.hash();
        for position in [5, 6, 7] {
            retained.note(Position(position), vec![block(1)], now);
        }
        for (position, held) in [(5, true), (6, true), (7, false)] {
            assert!(retained.block(hash).is_some());
            retained.release_through(Position(position));
            assert_eq!(retained.block(hash).is_some(), held, "after {position}");
        }
    }

    #[test]
    fn a_commit_that_was_made_again_counts_at_its_new_place() {
        let (mut retained, now) = (Retained::default(), Instant::now());
        retained.note(Position(5), vec![block(1)], now);
        retained.note(Position(6), vec![block(2)], now);
        retained.moved(Position(5), Position(9));
        assert_eq!(retained.release_through(Position(8)), 10, "only the one that was not lost");
        assert_eq!(retained.release_through(Position(9)), 10);
    }

    #[test]
    fn blocks_are_looked_after_again_and_again() {
        let (mut retained, start) = (Retained::default(), Instant::now());
        let at = |secs| start + Duration::from_secs(secs);
        retained.note(Position(5), vec![block(1)], start);
        retained.note(Position(6), vec![block(2)], at(2));
        let age = Duration::from_secs(3);
        assert_eq!(seeds(&retained.unseen_for(age, at(3))), [1]);
        assert_eq!(seeds(&retained.unseen_for(age, at(5))), [2]);
        assert_eq!(seeds(&retained.unseen_for(age, at(6))), [1]);
    }
}

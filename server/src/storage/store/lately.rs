//! Which long blocks were read lately. Pure.
//!
//! Most long blocks are read once in a while, and by one client, whose machine keeps them: here they would only drive out what others ask for.
//! So the first read of one passes by the kernel's memory of files, and only a read that comes again soon goes through it
//! (the ghosts of 2Q, Johnson and Shasha 1994).

use std::collections::BTreeSet;

use holdfast_common::BlockHash;

/// Blocks that are remembered: as many, and up to as many again from before.
const GENERATION: usize = 4096;

/// Two generations, of which the older one goes when the younger one is full.
#[derive(Debug, Default)]
pub(super) struct ReadLately {
    young: BTreeSet<BlockHash>,
    old: BTreeSet<BlockHash>,
}

impl ReadLately {
    /// Notes a read. Was there one lately?
    pub(super) fn note(&mut self, block: BlockHash) -> bool {
        let again = self.young.contains(&block) || self.old.contains(&block);
        self.young.insert(block);
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        again
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(number: usize) -> BlockHash {
        BlockHash::of(&number.to_le_bytes())
    }

    #[test]
    fn a_block_is_remembered_for_a_while_and_no_longer() {
        let mut lately = ReadLately::default();
        assert!(!lately.note(block(0)));
        assert!(lately.note(block(0)));
        (1..GENERATION).for_each(|number| assert!(!lately.note(block(number))));
        assert!(lately.note(block(0)), "of the generation before");
        (GENERATION..3 * GENERATION).for_each(|number| assert!(!lately.note(block(number))));
        assert!(!lately.note(block(1)));
        assert!(lately.young.len() + lately.old.len() <= 2 * GENERATION);
    }
}

//! Whether two collections have the same members equally often, without keeping either: the sums of the members' hashes are equal
//! (`AdHash`, Bellare and Micciancio 1997). Two that differ have the same sum once in 2^128. Pure.

use holdfast_common::{BlockHash, Ino};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally(u128);

impl Tally {
    fn add(&mut self, hasher: &blake3::Hasher, times: u64) {
        let hash = hasher.finalize();
        let half: [u8; 16] = hash.as_bytes()[..16].try_into().expect("a hash has 32 bytes");
        self.0 = self.0.wrapping_add(u128::from_le_bytes(half).wrapping_mul(u128::from(times)));
    }

    /// A name, or a link, of an inode.
    pub(super) fn add_name(&mut self, ino: Ino, times: u64) {
        self.add(blake3::Hasher::new().update(&ino.0.to_le_bytes()), times);
    }

    /// A piece of a block, counted under a number of copies of its own, if it has one.
    pub(super) fn add_reference(&mut self, block: BlockHash, own: Option<usize>, times: u64) {
        let own = own.unwrap_or(0) as u64;
        self.add(blake3::Hasher::new().update(&block.0).update(&own.to_le_bytes()), times);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_portions_do_not_matter_and_everything_else_does() {
        let of = |names: &[(u64, u64)]| {
            let mut tally = Tally::default();
            names.iter().for_each(|(ino, times)| tally.add_name(Ino(*ino), *times));
            tally
        };
        assert_eq!(of(&[(1, 1), (2, 3)]), of(&[(2, 2), (1, 1), (2, 1), (3, 0)]));
        assert_ne!(of(&[(1, 1), (3, 1)]), of(&[(2, 2)]));
        assert_ne!(of(&[(1, 1)]), of(&[]));
    }
}

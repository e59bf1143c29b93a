//! Reads that begin past the end of a file.
//!
//! The kernel asks for pages only up to the size that it knows. If it asks for more, another mount has shortened the file
//! since, and the kernel learns the new size from a short answer alone; but it takes the *first* short answer of several
//! that are under way, and disbelieves the rest (`fuse_read_update_size` of Linux, `fs/fuse/file.c`). So an answer
//! past the end must not be that first one. It is refused: read-ahead drops such pages without a word, and whoever still wants one
//! asks for it again, alone, and is then answered with nothing.

use std::{
    collections::VecDeque,
    ops::Range,
    time::{Duration, Instant},
};

use holdfast_common::Ino;
use parking_lot::Mutex;

/// How long the kernel may take to ask again.
const LIFE: Duration = Duration::from_secs(10);
/// Refusals that are remembered. Past it reads are answered at once: better a wrong size for a moment than an error.
const REFUSALS_MAX: usize = 1024;

#[derive(Debug)]
struct Refusal {
    ino: Ino,
    /// Of the file, then.
    size: u64,
    range: Range<u64>,
    at: Instant,
}

#[derive(Debug, Default)]
pub(super) struct PastEnd(Mutex<VecDeque<Refusal>>);

impl PastEnd {
    /// Is a read of `range`, all past the end of `ino` at `size`, to be refused? Not when it asks again.
    pub(super) fn refuses(&self, ino: Ino, size: u64, range: Range<u64>) -> bool {
        let mut refusals = self.0.lock();
        while refusals.front().is_some_and(|oldest| oldest.at.elapsed() > LIFE) {
            refusals.pop_front();
        }
        let asks_again =
            |refusal: &Refusal| refusal.ino == ino && refusal.size == size && refusal.range.contains(&range.start);
        if refusals.len() >= REFUSALS_MAX || refusals.iter().any(asks_again) {
            return false;
        }
        refusals.push_back(Refusal { ino, size, range, at: Instant::now() });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_past_the_end_is_refused_once_for_each_size_of_the_file() {
        let past_end = PastEnd::default();
        assert!(past_end.refuses(Ino(1), 100, 4096..8192));
        assert!(!past_end.refuses(Ino(1), 100, 4096..8192));
        assert!(!past_end.refuses(Ino(1), 100, 8191..9000));
        assert!(past_end.refuses(Ino(1), 100, 8192..9000));
        assert!(past_end.refuses(Ino(2), 100, 4096..8192));
        assert!(past_end.refuses(Ino(1), 99, 4096..8192));
    }

    #[test]
    fn only_so_many_refusals_are_remembered() {
        let past_end = PastEnd::default();
        let refused = (0..2000).filter(|ino| past_end.refuses(Ino(*ino), 0, 0..1)).count();
        assert_eq!(refused, REFUSALS_MAX);
    }
}

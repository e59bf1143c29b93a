//! When to fetch what has not been asked for yet, and when to forget what will not be asked for again. Pure.

use std::ops::Range;

use holdfast_common::limits::CHUNK_SIZE;

/// Reads this close to where the last one ended count as going on: the kernel sends its read-ahead out of order.
const SLACK: u64 = CHUNK_SIZE;
/// As `SLACK`, after a jump: a second read must be nearer to count, or random readers would fetch whole blocks now and then.
const SLACK_AFTER_JUMP: u64 = 128 << 10;

/// Bytes after which a sequential reader will hardly come back for what it has read: the kernel has that, if anybody needs it.
const LONG_RUN: u64 = 16 * CHUNK_SIZE;

/// One open file's reading so far.
#[derive(Debug, Default)]
pub struct ReadAhead {
    next: u64,
    /// Bytes since the last jump.
    run: u64,
    /// First chunk that the reader has not left behind for good.
    behind_to: u32,
    /// Chunks to keep in flight ahead of the reader.
    window: u32,
    /// First chunk that has not been asked for.
    ahead_to: u32,
    /// The last read was not near the one before it.
    jumped: bool,
}

/// What a read tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// Whole blocks are worth fetching.
    pub sequential: bool,
    /// Chunks to fetch in the background.
    pub prefetch: Range<u32>,
    /// Chunks that a long run has left behind.
    pub passed: Range<u32>,
    /// Chunks that are being read, or fetched.
    pub coming: Range<u32>,
}

impl ReadAhead {
    /// Learns of a read of `offset..end` in a file of `size` bytes. The window starts at one chunk and doubles with every
    /// chunk that is read through, up to `window_max`; any jump closes it.
    pub fn note(&mut self, offset: u64, end: u64, size: u64, window_max: u32) -> Advice {
        let slack = if self.jumped { SLACK_AFTER_JUMP } else { SLACK };
        let sequential = offset <= self.next + slack && offset + slack >= self.next;
        let crossed = chunk_of(end) > chunk_of(self.next);
        if !sequential {
            *self = Self { next: end, jumped: true, ..Self::default() };
            return Advice { sequential, prefetch: 0..0, passed: 0..0, coming: 0..0 };
        }
        self.jumped = false;
        self.run += end.saturating_sub(self.next);
        self.next = self.next.max(end);
        if self.window == 0 || crossed {
            self.window = (self.window * 2).clamp(1, window_max.max(1));
        }
        let (prefetch, passed) = (self.advance(size), self.pass());
        Advice { sequential, prefetch, passed, coming: self.behind_to..self.ahead_to }
    }

    /// A read that the kernel sends late may still be as far back as `SLACK`.
    fn pass(&mut self) -> Range<u32> {
        let behind = chunk_of(self.next.saturating_sub(SLACK));
        let from = self.behind_to.min(behind);
        self.behind_to = behind;
        if self.run > LONG_RUN { from..behind } else { behind..behind }
    }

    fn advance(&mut self, size: u64) -> Range<u32> {
        let current = chunk_of(self.next.saturating_sub(1));
        let chunks = chunk_of(size.saturating_add(CHUNK_SIZE - 1));
        let from = self.ahead_to.max(current + 1);
        let to = (current + 1).saturating_add(self.window).min(chunks);
        if from >= to {
            return 0..0;
        }
        self.ahead_to = to;
        from..to
    }
}

fn chunk_of(offset: u64) -> u32 {
    u32::try_from(offset / CHUNK_SIZE).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Reads of `step` bytes at each of `offsets`; the chunks that were fetched ahead by each.
    #[track_caller]
    fn check(step: u64, offsets: &[u64], expected: &[Range<u32>]) {
        let mut ahead = ReadAhead::default();
        let got: Vec<_> = offsets.iter().map(|&at| ahead.note(at, at + step, 100 * MIB, 8).prefetch).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn the_window_grows_with_a_sequential_reader() {
        check(MIB, &[0, MIB, 2 * MIB, 3 * MIB, 4 * MIB], &[1..2, 2..4, 4..7, 7..12, 12..13]);
    }

    #[test]
    fn a_jump_closes_the_window() {
        check(4096, &[50 * MIB, 10 * MIB, 70 * MIB], &[0..0, 0..0, 0..0]);
        check(4096, &[50 * MIB, 50 * MIB + 4096], &[0..0, 51..52]);
        check(4096, &[50 * MIB, 50 * MIB + (512 << 10), 50 * MIB + (516 << 10)], &[0..0, 0..0, 51..52]);
    }

    #[test]
    fn nothing_past_the_end_is_fetched() {
        let mut ahead = ReadAhead::default();
        assert_eq!(ahead.note(0, 4096, 4096, 8).prefetch, 0..0);
        assert_eq!(ahead.note(0, 4096, MIB + 1, 8).prefetch, 1..2);
        assert_eq!(ahead.note(4096, 8192, MIB + 1, 8).prefetch, 0..0);
    }

    #[test]
    fn only_a_long_run_leaves_chunks_behind_and_each_once() {
        let mut ahead = ReadAhead::default();
        let mut passed: Vec<u32> = Vec::new();
        for chunk in 0..40 {
            // The halves of a chunk may come in the wrong order.
            for half in [1, 0] {
                let offset = chunk * MIB + half * MIB / 2;
                passed.extend(ahead.note(offset, offset + MIB / 2, 100 * MIB, 8).passed);
            }
        }
        let kept = LONG_RUN / MIB - 1;
        assert_eq!(passed, (u32::try_from(kept).unwrap()..39).collect::<Vec<_>>());
        let after_a_jump = ahead.note(60 * MIB, 61 * MIB, 100 * MIB, 8).passed;
        assert!(after_a_jump.is_empty() && ahead.note(61 * MIB, 62 * MIB, 100 * MIB, 8).passed.is_empty());
    }
}

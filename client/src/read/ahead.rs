//! When to fetch what has not been asked for yet. Pure.

use std::ops::Range;

use holdfast_common::limits::CHUNK_SIZE;

/// Reads this close to where the last one ended count as going on: the kernel sends its read-ahead out of order.
const SLACK: u64 = CHUNK_SIZE;
/// As `SLACK`, after a jump: a second read must be nearer to count, or random readers would fetch whole blocks now and then.
const SLACK_AFTER_JUMP: u64 = 128 << 10;

/// One open file's reading so far.
#[derive(Debug, Default)]
pub struct ReadAhead {
    next: u64,
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
}

impl ReadAhead {
    /// Learns of a read of `offset..end` in a file of `size` bytes. The window starts at one chunk and doubles with every
    /// chunk that is read through, up to `window_max`; any jump closes it.
    pub fn note(&mut self, offset: u64, end: u64, size: u64, window_max: u32) -> Advice {
        let slack = if self.jumped { SLACK_AFTER_JUMP } else { SLACK };
        let sequential = offset <= self.next + slack && offset + slack >= self.next;
        let crossed = chunk_of(end) > chunk_of(self.next);
        if !sequential {
            *self = Self { next: end, window: 0, ahead_to: 0, jumped: true };
            return Advice { sequential, prefetch: 0..0 };
        }
        self.jumped = false;
        self.next = self.next.max(end);
        if self.window == 0 || crossed {
            self.window = (self.window * 2).clamp(1, window_max.max(1));
        }
        Advice { sequential, prefetch: self.advance(size) }
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
}

//! How fast copies are being made. Pure: time comes in.

use std::{collections::VecDeque, time::Duration};

/// What is longer ago says nothing about now.
const WINDOW: Duration = Duration::from_secs(30);
/// Shorter times say little about the next ones.
const SHORTEST: Duration = Duration::from_secs(1);

/// Copies that were made within the last half minute.
#[derive(Debug, Default)]
pub struct CopyRate(VecDeque<(Duration, u64)>);

impl CopyRate {
    /// `count` copies more. `now`: of a monotonic clock.
    pub fn note(&mut self, count: u64, now: Duration) {
        self.forget(now);
        self.0.push_back((now, count));
    }

    /// Seconds that `owed` copies take at the rate of the last ones; `None`: none was made.
    pub fn secs_for(&mut self, owed: u64, now: Duration) -> Option<u64> {
        self.forget(now);
        let (first, _) = self.0.front()?;
        let made: u64 = self.0.iter().map(|(_, count)| count).sum();
        let took = now.saturating_sub(*first).max(SHORTEST).as_millis();
        let secs = (u128::from(owed) * took).div_ceil(u128::from(made.max(1)) * 1000);
        Some(u64::try_from(secs).unwrap_or(u64::MAX))
    }

    fn forget(&mut self, now: Duration) {
        while self.0.front().is_some_and(|(then, _)| *then + WINDOW < now) {
            self.0.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_owed_takes_as_long_as_the_last_copies_did() {
        let second = Duration::from_secs;
        let mut rate = CopyRate::default();
        assert_eq!(rate.secs_for(10, second(5)), None, "nothing is known");
        (10..20).for_each(|now| rate.note(50, second(now)));
        assert_eq!(rate.secs_for(500, second(20)), Some(10));
        assert_eq!(rate.secs_for(1, second(20)), Some(1), "a part of a second is one");
        assert_eq!(rate.secs_for(0, second(20)), Some(0));
        assert_eq!(rate.secs_for(500, second(40)), Some(30), "slower, if nothing comes");
        assert_eq!(rate.secs_for(500, second(100)), None, "that was long ago");
    }
}

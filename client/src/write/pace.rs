//! How much may be under way while somebody waits for fsyncs of little. Pure.
//!
//! An fsync makes durable all that came before it, so those who write much without one decide how long it takes. The bound on what is under way is halved by an fsync of little that
//! takes longer than it should, at most once for all that run at the same time, and raised by an eighth by each that does not, as
//! congestion control does with a window (Jacobson, 1988), but for the increase: there is no unit of it that suits a fast and a slow disk.

use std::time::{Duration, Instant};

/// What an fsync of little should take.
const TARGET: Duration = Duration::from_millis(50);
/// The bound is not lowered below this, in bytes: the disks of three servers are busy with it while the next blocks are on their way.
pub(super) const BOUND_MIN: u64 = 8 << 20;
/// Of fsyncs, until it is known that less under way would not make them faster.
const SAMPLES: u32 = 8;
/// Nobody has waited for an fsync of little for this long: the bound is the limit again.
const CALM_AFTER: Duration = Duration::from_secs(1);

/// An fsync of little that is over, and was not for nothing.
#[derive(Clone, Copy, Debug)]
pub struct Synced {
    pub begun: Instant,
    pub ended: Instant,
    /// Bytes that were under way when it began.
    pub used: u64,
}

/// The bound, in bytes.
#[derive(Debug)]
pub(super) struct Pace {
    limit: u64,
    bound: u64,
    lowered: Option<Instant>,
    last: Option<Instant>,
    /// What fsyncs take with as little under way as can be, on the average of the last, and of how many: where that is long by itself, less under way does not help.
    at_least: Duration,
    samples: u32,
}

impl Pace {
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, bound: limit, lowered: None, last: None, at_least: Duration::ZERO, samples: 0 }
    }

    /// Takes note of an fsync, and returns the bound.
    pub(super) fn synced(&mut self, synced: Synced) -> u64 {
        let took = synced.ended.saturating_duration_since(synced.begun);
        self.last = Some(synced.ended);
        if self.bound <= BOUND_MIN {
            self.samples = (self.samples + 1).min(SAMPLES);
            self.at_least = (self.at_least * (self.samples - 1) + took) / self.samples;
        }
        if took <= self.target() {
            if synced.used >= self.bound / 2 {
                self.bound = self.bound.saturating_add(self.bound / 8).min(self.limit);
            }
        } else if synced.used > BOUND_MIN && self.lowered.is_none_or(|lowered| synced.begun >= lowered) {
            self.lowered = Some(synced.ended);
            self.bound = self.bound.min((self.bound.min(synced.used) / 2).max(BOUND_MIN));
        }
        self.bound
    }

    fn target(&self) -> Duration {
        let is_slow_by_itself = self.samples == SAMPLES && self.at_least > TARGET;
        if is_slow_by_itself { self.at_least * 2 } else { TARGET }
    }

    /// The bound, after a while in which nothing may have happened.
    pub(super) fn calmed(&mut self, now: Instant) -> u64 {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) >= CALM_AFTER) {
            *self = Self::new(self.limit);
        }
        self.bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const SLOW: Duration = Duration::from_millis(60);
    const FAST: Duration = Duration::from_millis(40);

    /// One fsync after the other.
    struct Mount {
        pace: Pace,
        now: Instant,
    }

    impl Mount {
        fn new(limit: u64) -> Self {
            Self { pace: Pace::new(limit), now: Instant::now() }
        }

        fn sync(&mut self, took: Duration, used: u64) -> u64 {
            let begun = self.now;
            self.now += took;
            self.pace.synced(Synced { begun, ended: self.now, used })
        }
    }

    #[test]
    fn slow_syncs_lower_the_bound_and_fast_ones_raise_it_while_it_matters() {
        let mut mount = Mount::new(256 * MIB);
        assert_eq!(mount.sync(SLOW, 200 * MIB), 100 * MIB, "half of what is used");
        assert_eq!(mount.sync(SLOW, 100 * MIB), 50 * MIB);
        assert_eq!(mount.sync(FAST, 50 * MIB), 50 * MIB * 9 / 8);
        assert_eq!(mount.sync(FAST, 10 * MIB), 50 * MIB * 9 / 8, "it holds nobody back");
        let lowered: Vec<u64> = (0..5).map(|_| mount.sync(SLOW, 50 * MIB)).collect();
        assert_eq!(lowered.last(), Some(&BOUND_MIN), "{lowered:?}");
    }

    #[test]
    fn slowness_that_is_not_of_this_mount_lowers_nothing() {
        let mut mount = Mount::new(256 * MIB);
        assert_eq!(mount.sync(SLOW, BOUND_MIN), 256 * MIB);
        let mut small = Mount::new(4 * MIB);
        assert_eq!(small.sync(SLOW, 4 * MIB), 4 * MIB);
        assert_eq!(small.sync(FAST, 4 * MIB), 4 * MIB);
    }

    #[test]
    fn what_stalls_many_syncs_at_once_lowers_the_bound_once() {
        let mut mount = Mount::new(256 * MIB);
        let begun = mount.now;
        assert_eq!(mount.sync(SLOW, 256 * MIB), 128 * MIB);
        for _ in 0..10 {
            let synced = Synced { begun, ended: mount.now, used: 256 * MIB };
            assert_eq!(mount.pace.synced(synced), 128 * MIB);
        }
    }

    #[test]
    fn where_every_sync_is_slow_twice_its_time_is_allowed() {
        let mut mount = Mount::new(256 * MIB);
        let took = |used: u64| Duration::from_millis(100 + used / MIB);
        let mut bounds = vec![256 * MIB];
        (0..1000).for_each(|n| bounds.push(mount.sync(took(bounds[n]), bounds[n])));
        assert!(bounds.contains(&BOUND_MIN), "it is tried first");
        assert!(bounds[500..].iter().all(|bound| (50 * MIB..135 * MIB).contains(bound)), "{:?}", &bounds[990..]);
    }

    #[test]
    fn a_second_without_any_gives_all_of_the_limit_back() {
        let mut mount = Mount::new(256 * MIB);
        mount.sync(SLOW, 256 * MIB);
        assert_eq!(mount.pace.calmed(mount.now + CALM_AFTER / 2), 128 * MIB);
        assert_eq!(mount.pace.calmed(mount.now + CALM_AFTER), 256 * MIB);
    }
}

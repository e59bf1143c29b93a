//! How long the requests of mounts take.

use std::{
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    time::Duration,
};

/// Each power of two of microseconds is parted in so many: a percentile is right to one in eight.
const PARTS: usize = 8;
const PARTS_LOG: u32 = 3;
/// Up to 2^32 microseconds.
const BUCKETS: usize = 33 * PARTS;

/// Requests of one kind since the last look.
#[derive(Debug)]
pub(super) struct Meter {
    buckets: [AtomicU32; BUCKETS],
    sum_us: AtomicU64,
}

impl Default for Meter {
    fn default() -> Self {
        Self { buckets: [const { AtomicU32::new(0) }; BUCKETS], sum_us: AtomicU64::new(0) }
    }
}

/// What a look has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reading {
    pub count: u32,
    pub sum_us: u64,
    pub p50_us: u32,
    pub p99_us: u32,
}

impl Reading {
    /// 0: there was none.
    pub(super) fn mean_us(&self) -> u32 {
        let mean = self.sum_us.checked_div(u64::from(self.count)).unwrap_or(0);
        u32::try_from(mean).unwrap_or(u32::MAX)
    }
}

impl Meter {
    pub(super) fn note(&self, took: Duration) {
        let us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        self.buckets[bucket(us)].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(u64::from(us), Relaxed);
    }

    /// What came since the last look; begins anew.
    pub(super) fn take(&self) -> Reading {
        let counts: Vec<u32> = self.buckets.iter().map(|bucket| bucket.swap(0, SeqCst)).collect();
        let count: u32 = counts.iter().sum();
        let at = |percent: u64| {
            let rank = (u64::from(count) * percent).div_ceil(100);
            let mut below = 0;
            let found = counts.iter().position(|count| {
                below += u64::from(*count);
                below >= rank.max(1)
            });
            found.map_or(0, upper)
        };
        Reading { count, sum_us: self.sum_us.swap(0, SeqCst), p50_us: at(50), p99_us: at(99) }
    }
}

fn bucket(us: u32) -> usize {
    if (us as usize) < PARTS {
        return us as usize;
    }
    let log = us.ilog2();
    let part = (us >> (log - PARTS_LOG)) as usize - PARTS;
    (log - PARTS_LOG + 1) as usize * PARTS + part
}

/// The longest time of a bucket.
fn upper(bucket: usize) -> u32 {
    if bucket < PARTS {
        return u32::try_from(bucket).unwrap_or(0);
    }
    let (octave, part) = (bucket / PARTS - 1, (bucket % PARTS + PARTS) as u64);
    u32::try_from(((part + 1) << octave) - 1).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_to_one_in_eight() {
        let meter = Meter::default();
        assert_eq!(meter.take(), Reading::default());
        (1..=1000).for_each(|us| meter.note(Duration::from_micros(us)));
        let reading = meter.take();
        assert_eq!((reading.count, reading.sum_us), (1000, 500_500));
        assert!((500..=563).contains(&reading.p50_us) && (990..=1023).contains(&reading.p99_us), "{reading:?}");
        assert_eq!(meter.take(), Reading::default(), "each is told once");
        meter.note(Duration::from_secs(100_000));
        assert_eq!(meter.take().p99_us, u32::MAX);
    }

    #[test]
    fn every_time_is_in_the_bucket_that_ends_at_it_or_later() {
        for us in (0..5000).chain([1 << 20, (1 << 31) + 7, u32::MAX]) {
            let found = bucket(us);
            assert!(upper(found) >= us && (found == 0 || upper(found - 1) < us), "{us}");
        }
    }
}

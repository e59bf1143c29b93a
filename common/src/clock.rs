//! Time as a seam: what the real clock says, or what a test says.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::types::Time;

/// Where time comes from. Servers stamp entries with `now`, and measure with `monotonic`.
pub trait Clock: Send + Sync + 'static {
    /// Time of day.
    fn now(&self) -> Time;
    /// Time that never goes back, from an arbitrary start.
    fn monotonic(&self) -> Duration;
}

/// The nanoseconds of a [`Time`] at most.
const NANOS_MAX: u32 = 999_999_999;

impl Time {
    /// Whether the nanoseconds are less than a second, which bytes from elsewhere do not promise.
    pub fn is_sound(&self) -> bool {
        self.nanos <= NANOS_MAX
    }
}

/// The machine's clock.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self { start: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Time {
        Time::from(SystemTime::now())
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self { secs: after.as_secs().cast_signed(), nanos: after.subsec_nanos() },
            Err(before) => before_epoch(before.duration()),
        }
    }
}

fn before_epoch(distance: Duration) -> Time {
    // 2^63 seconds, the furthest that a SystemTime goes back, is the one number that is its own negative.
    let secs = distance.as_secs().cast_signed().wrapping_neg();
    match distance.subsec_nanos() {
        0 => Time { secs, nanos: 0 },
        nanos => Time { secs: secs.saturating_sub(1), nanos: 1_000_000_000 - nanos },
    }
}

impl From<Time> for SystemTime {
    fn from(time: Time) -> Self {
        let whole = Duration::from_secs(time.secs.unsigned_abs());
        let base = if time.secs >= 0 { UNIX_EPOCH + whole } else { UNIX_EPOCH - whole };
        // A full second would step over the end of time, at the last one.
        base + Duration::from_nanos(u64::from(time.nanos.min(NANOS_MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_and_after_the_epoch_survive_the_round_trip() {
        for (secs, nanos) in [
            (0, 0),
            (1, 1),
            (-1, 999_999_999),
            (-5, 0),
            (4_102_444_800, 7),
            (i64::MAX, 999_999_999),
            (i64::MIN, 0),
            (i64::MIN, 1),
            (i64::MIN + 1, 999_999_999),
        ] {
            let time = Time { secs, nanos };
            assert_eq!(Time::from(SystemTime::from(time)), time);
        }
    }

    #[test]
    fn nanoseconds_past_the_second_end_with_it() {
        for secs in [i64::MIN, 0, i64::MAX] {
            let shown = SystemTime::from(Time { secs, nanos: u32::MAX });
            assert_eq!(Time::from(shown), Time { secs, nanos: 999_999_999 });
        }
    }
}

//! How regularly a server is heard, and what its silence means. Pure: time comes in.
//!
//! Suspicion accrues with silence, measured by the server's own rhythm: the mean of the gaps between its heartbeats and four times their
//! mean deviation, as TCP estimates its timeout (Jacobson, 1988; for failure detectors Bertier, Marin and Sens, 2002). A server that
//! comes and goes is damped: each return within ten minutes doubles the time that it has to stay before it gets new blocks.

use std::time::Duration;

/// A new gap makes one part in so many of the mean, and one in so many of the deviation.
const GAP_PARTS: u32 = 8;
const DEVIATION_PARTS: u32 = 4;
/// Deviations past the mean from which on silence is suspicious.
const DEVIATIONS: u32 = 4;
/// Without a return for so long, the earlier ones are forgotten.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);
/// The longest that a server has to stay before it is trusted.
const PROBATION_MAX: Duration = Duration::from_secs(15);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rhythm {
    /// Of the gaps; zero: not known.
    mean: Duration,
    deviation: Duration,
    /// Returns, each within ten minutes of the one before.
    returns: u32,
    returned: Duration,
}

impl Rhythm {
    /// It was heard `gap` after the last time.
    pub fn heard(&mut self, gap: Duration) {
        if self.mean.is_zero() {
            self.mean = gap;
            return;
        }
        let off = gap.abs_diff(self.mean);
        self.deviation = (self.deviation * (DEVIATION_PARTS - 1) + off) / DEVIATION_PARTS;
        self.mean = (self.mean * (GAP_PARTS - 1) + gap) / GAP_PARTS;
    }

    /// It is back after it had been suspect or down.
    pub fn returned(&mut self, now: Duration) {
        let is_new = self.returns == 0 || now.saturating_sub(self.returned) > FORGIVEN_AFTER;
        self.returns = if is_new { 1 } else { self.returns + 1 };
        self.returned = now;
    }

    /// The silence after which it is suspect: `least`, or longer if it is heard irregularly; at most `most`.
    pub fn suspicious_after(&self, least: Duration, most: Duration) -> Duration {
        (self.mean + self.deviation * DEVIATIONS).max(least).min(most)
    }

    /// Has it stayed for long enough since it came back?
    pub fn is_steady(&self, now: Duration) -> bool {
        // The first return is trusted at once.
        let secs = 1_u64.checked_shl(self.returns.saturating_sub(1)).map_or(u64::MAX, |doubled| doubled - 1);
        now.saturating_sub(self.returned) >= Duration::from_secs(secs).min(PROBATION_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn who_is_heard_irregularly_is_suspected_later() {
        let suspicious = |gaps: &[u64]| {
            let mut rhythm = Rhythm::default();
            gaps.iter().cycle().take(60).for_each(|ms| rhythm.heard(Duration::from_millis(*ms)));
            rhythm.suspicious_after(2 * SECOND, 5 * SECOND)
        };
        assert_eq!(suspicious(&[1000]), 2 * SECOND);
        assert_eq!(suspicious(&[990, 1010]), 2 * SECOND);
        assert!((3 * SECOND..4 * SECOND).contains(&suspicious(&[500, 1500])), "{:?}", suspicious(&[500, 1500]));
        assert_eq!(suspicious(&[100, 4000]), 5 * SECOND, "but not for ever");
        assert_eq!(Rhythm::default().suspicious_after(2 * SECOND, 5 * SECOND), 2 * SECOND);
    }

    #[test]
    fn who_comes_and_goes_has_to_stay_longer_each_time() {
        let mut rhythm = Rhythm::default();
        assert!(rhythm.is_steady(SECOND));
        let mut waits = Vec::new();
        for turn in 1..=8 {
            let now = turn * 100 * SECOND;
            rhythm.returned(now);
            waits.push((0..).find(|secs| rhythm.is_steady(now + *secs * SECOND)).unwrap());
        }
        assert_eq!(waits, [0, 1, 3, 7, 15, 15, 15, 15]);
        rhythm.returned(2000 * SECOND);
        assert!(rhythm.is_steady(2000 * SECOND), "the earlier ones are forgotten");
    }
}

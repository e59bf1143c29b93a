//! How much is done in the background: as much as does not make those wait who read and write.
//!
//! Additive increase, multiplicative decrease, as congestion control has it (Chiu and Jain, 1989), with the time that a request of a
//! mount takes as the signal: what it takes while little is copied is the measure, and twice that is too much. Pure: time comes in.

use std::time::Duration;

/// Copies under way at once, over the whole cluster.
const COPIES_MIN: usize = 1;
const COPIES_MAX: usize = 16;
/// Requests a second, over the whole cluster, from which on somebody counts as waiting.
const REQUESTS_MIN: u64 = 8;
/// Between two steps: heartbeats come every second from every server.
const STEP: Duration = Duration::from_secs(1);
/// The measure follows what requests take while few copies are made, by this part of the difference each step. A workload of another
/// kind is not held against the copies for long: they become few, and the measure that of the new one.
const FOLLOW: f64 = 0.25;
/// Times as long as the measure: too long.
const TOO_LONG: f64 = 2.0;
/// Shorter waits are nobody's trouble.
const TROUBLE_US: f64 = 1000.0;

/// What mounts feel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Foreground {
    /// Puts and gets of mounts in the last second.
    pub requests: u64,
    /// Microseconds that one of them took, on the worst server.
    pub mean_us: u32,
}

#[derive(Debug)]
pub struct Budget {
    copies: usize,
    /// Microseconds that a request takes while little is copied; 0: not known.
    measure_us: f64,
    stepped: Duration,
}

impl Default for Budget {
    fn default() -> Self {
        Self { copies: COPIES_MAX, measure_us: 0.0, stepped: Duration::ZERO }
    }
}

impl Budget {
    /// How many copies may be under way at once.
    pub fn copies_at_once(&self) -> usize {
        self.copies
    }

    /// Takes in how mounts fare. `now`: of a monotonic clock.
    pub fn observe(&mut self, seen: Foreground, now: Duration) {
        if now.saturating_sub(self.stepped) < STEP {
            return;
        }
        self.stepped = now;
        if seen.requests < REQUESTS_MIN {
            self.copies = (self.copies + 2).min(COPIES_MAX);
            return;
        }
        let took = f64::from(seen.mean_us);
        if self.measure_us == 0.0 {
            // What it takes without the copies is found out first.
            if self.copies > COPIES_MIN {
                self.copies = COPIES_MIN;
                return;
            }
            self.measure_us = took;
        }
        if self.copies <= COPIES_MIN + 1 || took < self.measure_us {
            self.measure_us += (took - self.measure_us) * FOLLOW;
        }
        if took > TROUBLE_US && took > TOO_LONG * self.measure_us {
            self.copies = (self.copies / 2).max(COPIES_MIN);
        } else {
            self.copies = (self.copies + 1).min(COPIES_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets `secs` pass in which requests take what `takes` says of the copies under way.
    fn run(budget: &mut Budget, from: u64, secs: u64, requests: u64, takes: impl Fn(usize) -> u32) {
        for second in from..from + secs {
            let seen = Foreground { requests, mean_us: takes(budget.copies_at_once()) };
            budget.observe(seen, Duration::from_secs(second));
        }
    }

    #[test]
    fn who_waits_goes_first_and_gets_it_all_back_when_nobody_does() {
        let mut budget = Budget::default();
        run(&mut budget, 1, 30, 0, |_| 0);
        assert_eq!(budget.copies_at_once(), COPIES_MAX, "nobody is there");
        // Each copy under way makes a request wait a millisecond longer.
        let crowded = |copies: usize| 2000 + 1000 * u32::try_from(copies).unwrap();
        run(&mut budget, 31, 60, 100, crowded);
        let mean: usize = (0..60)
            .map(|second| {
                run(&mut budget, 91 + second, 1, 100, crowded);
                budget.copies_at_once()
            })
            .sum();
        assert!((60..480).contains(&mean), "{mean} in 60 steps: neither stopped nor in the way");
        run(&mut budget, 200, 30, 2, |_| 900_000);
        assert_eq!(budget.copies_at_once(), COPIES_MAX, "two slow requests are nobody");
    }

    #[test]
    fn requests_that_are_slow_for_themselves_do_not_stop_it() {
        let mut budget = Budget::default();
        run(&mut budget, 1, 10, 100, |_| 3000);
        run(&mut budget, 11, 300, 100, |_| 40_000);
        assert!(budget.copies_at_once() > COPIES_MIN, "the copies are not why they take so long");
        run(&mut budget, 311, 100, 100, |_| 40_000);
        assert!(budget.copies_at_once() >= COPIES_MAX / 2, "{}", budget.copies_at_once());
    }
}

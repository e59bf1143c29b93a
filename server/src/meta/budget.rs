//! How much is done in the background: as much as does not make those wait who read and write.
//!
//! Additive increase, multiplicative decrease, as congestion control has it (Chiu and Jain, 1989), with the time that a request of a
//! mount takes as the signal: what it takes while little is copied is the measure, and half as much again is too much, for reads and
//! for writes each: whoever waits for one request after the other keeps two thirds of what he had. Pure: time comes in.

use std::time::Duration;

/// Copies under way at once, over the whole cluster, and how many there may be for each server that is up, if those are more.
const COPIES_MIN: usize = 1;
const COPIES_MAX: usize = 16;
const COPIES_MAX_EACH: usize = 4;
/// The part of the most that is added at once.
const INCREASE: usize = 16;
/// Requests a second, over the whole cluster, from which on somebody counts as waiting.
const REQUESTS_MIN: u64 = 8;
/// Between two steps: heartbeats come every second from every server.
const STEP: Duration = Duration::from_secs(1);
/// The measure follows what requests take while few copies are made, by this part of the difference each step. A workload of another
/// kind is not held against the copies for long: they become few, and the measure that of the new one.
const FOLLOW: f64 = 0.25;
/// Times as long as the measure: too long.
const TOO_LONG: f64 = 1.5;
/// Shorter waits are nobody's trouble.
const TROUBLE_US: f64 = 200.0;

/// What mounts feel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Foreground {
    /// Storage servers that are up.
    pub servers: usize,
    pub puts: Felt,
    pub gets: Felt,
}

/// Requests of one kind in the last second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Felt {
    pub requests: u64,
    /// Microseconds that all of them took together.
    pub sum_us: u64,
}

impl Felt {
    /// With those of one more server.
    #[must_use]
    pub fn and(self, requests: u32, mean_us: u32) -> Self {
        Self {
            requests: self.requests + u64::from(requests),
            sum_us: self.sum_us + u64::from(requests) * u64::from(mean_us),
        }
    }

    /// Microseconds that one took; `None`: there are too few to tell.
    fn mean_us(self) -> Option<f64> {
        (self.requests >= REQUESTS_MIN).then(|| self.sum_us as f64 / self.requests as f64)
    }
}

/// Microseconds that a request of one kind takes while little is copied.
#[derive(Clone, Copy, Debug, Default)]
struct Measure(Option<f64>);

impl Measure {
    /// Takes in what one takes now. `few`: while hardly anything is copied. Returns whether that is too long.
    fn judge(&mut self, took: f64, few: bool) -> bool {
        let usual = self.0.get_or_insert(took);
        if few || took < *usual {
            *usual += (took - *usual) * FOLLOW;
        }
        took > TROUBLE_US && took > TOO_LONG * *usual
    }
}

#[derive(Debug)]
pub struct Budget {
    copies: usize,
    most: usize,
    puts: Measure,
    gets: Measure,
    stepped: Duration,
}

impl Default for Budget {
    fn default() -> Self {
        let (puts, gets) = (Measure::default(), Measure::default());
        Self { copies: COPIES_MAX, most: COPIES_MAX, puts, gets, stepped: Duration::ZERO }
    }
}

impl Budget {
    /// How many copies may be under way at once.
    pub fn copies_at_once(&self) -> usize {
        self.copies
    }

    /// How many of these to one server.
    pub fn copies_to_one(&self) -> usize {
        self.copies.min(COPIES_MAX).div_ceil(2)
    }

    /// Takes in how mounts fare. `now`: of a monotonic clock.
    pub fn observe(&mut self, seen: Foreground, now: Duration) {
        if now.saturating_sub(self.stepped) < STEP {
            return;
        }
        self.stepped = now;
        self.most = COPIES_MAX.max(seen.servers * COPIES_MAX_EACH);
        let step = (self.most / INCREASE).max(1);
        let kinds = [(seen.puts.mean_us(), &mut self.puts), (seen.gets.mean_us(), &mut self.gets)];
        let felt: Vec<(f64, &mut Measure)> = kinds.into_iter().filter_map(|(mean, kind)| Some((mean?, kind))).collect();
        if felt.is_empty() {
            self.copies = (self.copies + 2 * step).min(self.most);
            return;
        }
        let few = self.copies <= COPIES_MIN + 1;
        // What it takes without the copies is found out first.
        if !few && felt.iter().any(|(_, measure)| measure.0.is_none()) {
            self.copies = COPIES_MIN;
            return;
        }
        let too_long = felt.into_iter().fold(false, |any, (took, measure)| measure.judge(took, few) || any);
        self.copies = if too_long { self.copies / 2 } else { self.copies + step }.clamp(COPIES_MIN, self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets `secs` pass in which requests take what `takes` says of the copies under way.
    fn run(budget: &mut Budget, from: u64, secs: u64, requests: u32, takes: impl Fn(usize) -> u32) {
        for second in from..from + secs {
            let puts = Felt::default().and(requests, takes(budget.copies_at_once()));
            let seen = Foreground { servers: 3, puts, gets: Felt::default() };
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
        assert!((60..300).contains(&mean), "{mean} in 60 steps: neither stopped nor in the way");
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

    #[test]
    fn quick_reads_are_not_forgotten_beside_slow_writes() {
        let mut budget = Budget::default();
        let mut most = 0;
        for second in 1..200 {
            let copies = u32::try_from(budget.copies_at_once()).unwrap();
            // Writes do not feel the copies; reads take a tenth longer with each.
            let (puts, gets) = (Felt::default().and(100, 20_000), Felt::default().and(100, 400 + 40 * copies));
            budget.observe(Foreground { servers: 3, puts, gets }, Duration::from_secs(second));
            most = if second > 100 { most.max(budget.copies_at_once()) } else { 0 };
        }
        assert!((2..=9).contains(&most), "{most}: reads would take more than half as long again");
    }

    #[test]
    fn many_servers_may_have_many_copies_under_way_and_one_no_more_than_half_of_a_few() {
        let mut budget = Budget::default();
        for second in 1..60 {
            budget.observe(Foreground { servers: 200, ..Foreground::default() }, Duration::from_secs(second));
        }
        assert_eq!((budget.copies_at_once(), budget.copies_to_one()), (200 * COPIES_MAX_EACH, COPIES_MAX / 2));
        budget.copies = COPIES_MIN;
        assert_eq!(budget.copies_to_one(), 1);
    }
}

//! How long the requests of mounts take on a storage server beside the others, and what part of its weight it has for that. Pure.

use holdfast_common::{limits::REPLICAS, wire::meta::StorageLoad};

/// Puts, gets, syncs.
const KINDS: usize = 3;
/// A server that is as fast as the others has all parts of its weight.
const PARTS: u32 = 8;
/// Slower than the others by so many times: it loses weight.
const SLOWER: f64 = 2.0;
/// With so few parts left it is slow: about five times as slow as the others.
const PARTS_OF_SLOW: u32 = 2;
/// A new figure makes one part in so many of the smoothed one.
const SMOOTHING: u64 = 8;
/// Requests that one figure needs.
const REQUESTS_MIN: u32 = 4;
/// After so many heartbeats with fewer, what was known says nothing any more: it has its whole weight again.
const QUIET_MAX: u32 = 60;
/// Nanoseconds: who is slower than that may be slow, whatever the others are.
const USUAL_MIN_NS: u64 = 500_000;

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mean {
    /// Smoothed; 0: not known.
    ns: u64,
    /// Heartbeats in a row with too few requests to tell.
    quiet: u32,
}

impl Mean {
    fn after(self, requests: u32, mean_us: u32) -> Self {
        let new = u64::from(mean_us) * 1000;
        match self.ns {
            _ if requests < REQUESTS_MIN && self.quiet < QUIET_MAX => Self { quiet: self.quiet + 1, ..self },
            _ if requests < REQUESTS_MIN => Self::default(),
            0 => Self { ns: new, quiet: 0 },
            old => Self { ns: (old * (SMOOTHING - 1) + new) / SMOOTHING, quiet: 0 },
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Of puts, of gets, and of syncs.
    means: [Mean; KINDS],
    /// Of `PARTS`.
    parts: u32,
    /// The weight that it would have alone for the space that is free.
    pub full_weight: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { means: [Mean::default(); KINDS], parts: PARTS, full_weight: 0 }
    }
}

/// Nanoseconds that requests of each kind take on most servers; `None`: that is known of too few.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usual([Option<u64>; KINDS]);

impl Usual {
    pub fn of<'a>(paces: impl Iterator<Item = &'a Pace> + Clone) -> Self {
        Self(std::array::from_fn(|kind| {
            let mut means: Vec<u64> = paces.clone().map(|pace| pace.means[kind].ns).filter(|ns| *ns > 0).collect();
            means.sort_unstable();
            let middle = means.get(means.len().saturating_sub(1) / 2).copied();
            middle.filter(|_| means.len() >= REPLICAS).map(|ns| ns.max(USUAL_MIN_NS))
        }))
    }
}

impl Pace {
    #[must_use]
    pub fn after(self, load: &StorageLoad) -> Self {
        let [puts, gets, syncs] = self.means;
        let puts = puts.after(load.puts, load.put_mean_us);
        let gets = gets.after(load.gets, load.get_mean_us);
        Self { means: [puts, gets, syncs.after(load.syncs, load.sync_mean_us)], ..self }
    }

    /// How many times as long as usual its requests take, of the kind of which that is more. `None`: they cannot be compared.
    /// Nothing is held against whom nothing is known of any more.
    pub fn times(&self, usual: &Usual) -> Option<f64> {
        let known = || self.means.iter().filter(|mean| mean.ns > 0);
        let comparable = self.means.iter().zip(usual.0).filter(|(mean, _)| mean.ns > 0);
        let times = comparable.filter_map(|(mean, usual)| usual.map(|usual| mean.ns as f64 / usual as f64));
        times.reduce(f64::max).or_else(|| known().next().is_none().then_some(1.0))
    }

    /// `true`: it changes the weight. A step of one part alone does not, so that a figure on the edge makes no new maps.
    pub fn compare(&mut self, usual: &Usual) -> bool {
        let Some(times) = self.times(usual) else { return false };
        // At most so many, and at least one.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 1..=PARTS")]
        let parts = (f64::from(PARTS) * SLOWER / times.max(SLOWER)).clamp(1.0, f64::from(PARTS)) as u32;
        let changes = parts.abs_diff(self.parts) > 1 || (parts == PARTS && self.parts != PARTS);
        if changes {
            self.parts = parts;
        }
        changes
    }

    pub fn is_slow(&self) -> bool {
        self.parts <= PARTS_OF_SLOW
    }

    /// Microseconds, of a put, of a get and of a sync.
    pub fn means_us(&self) -> [u64; KINDS] {
        self.means.map(|mean| mean.ns / 1000)
    }

    /// What is left of the weight for the free space.
    pub fn weight(&self) -> u32 {
        let part = u64::from(self.full_weight) * u64::from(self.parts) / u64::from(PARTS);
        u32::try_from(part).unwrap_or(u32::MAX).max(u32::from(self.full_weight > 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(puts: u32, put_mean_us: u32, gets: u32, get_mean_us: u32) -> StorageLoad {
        StorageLoad { puts, gets, put_mean_us, get_mean_us, ..StorageLoad::default() }
    }

    /// Beats of four servers, the last of which has `last`; what comes of that one.
    fn beats(paces: &mut [Pace; 4], count: u32, others: &StorageLoad, last: &StorageLoad) -> Pace {
        for _ in 0..count {
            paces.iter_mut().take(3).for_each(|pace| *pace = pace.after(others));
            paces[3] = paces[3].after(last);
            let usual = Usual::of(paces.iter());
            for pace in paces.iter_mut() {
                pace.compare(&usual);
            }
        }
        paces[3]
    }

    #[test]
    fn puts_are_compared_with_puts_and_gets_with_gets() {
        let mixed = load(50, 4000, 200, 500);
        let mut paces = [Pace::default(); 4];
        assert!(!beats(&mut paces, 60, &mixed, &load(50, 4000, 0, 0)).is_slow(), "it has nothing to read yet");
        assert!(!beats(&mut paces, 60, &mixed, &load(50, 4000, 2, 90_000)).is_slow(), "two say nothing");
        assert!(beats(&mut paces, 60, &mixed, &load(50, 4000, 200, 5000)).is_slow());
        assert_eq!(Pace { full_weight: 800, ..beats(&mut paces, 60, &mixed, &mixed) }.weight(), 800);
        assert!(beats(&mut paces, 60, &mixed, &load(50, 40_000, 200, 500)).is_slow());
    }

    #[test]
    fn who_is_not_asked_any_more_is_not_slow_for_ever() {
        let (usual, slow, nothing) = (load(50, 1000, 0, 0), load(50, 20_000, 0, 0), StorageLoad::default());
        let mut paces = [Pace::default(); 4];
        assert!(beats(&mut paces, 60, &usual, &slow).is_slow());
        assert!(beats(&mut paces, QUIET_MAX, &nothing, &nothing).is_slow(), "for a while it is");
        assert!(!beats(&mut paces, 1, &nothing, &nothing).is_slow());
    }
}

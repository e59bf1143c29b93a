//! What this client has seen of each storage server: how fast it answers, and whether to leave it alone for now.

use std::{collections::HashMap, time::Duration};

use holdfast_common::ServerId;
use parking_lot::Mutex;
use rand::Rng;
use tokio::time::Instant;

/// A server that failed is left alone for this long, doubling up to `AVOID_MAX` while it keeps failing.
const AVOID_MIN: Duration = Duration::from_millis(500);
const AVOID_MAX: Duration = Duration::from_secs(4);
/// A slow answer is forgotten by half in this time, so that a server that has recovered is tried again.
const FORGET_HALF: Duration = Duration::from_secs(3);
/// Short requests to the favourite that are answered as one: they share its wake-ups, and packets.
const TOGETHER: u32 = 4;
/// Another is asked when it would answer in about this part of the time.
const FAVOUR: f64 = 0.5;
/// A server that could not pass a block on is not asked to for this long.
const NO_RELAY: Duration = Duration::from_secs(5);
const HEDGE_MIN: Duration = Duration::from_millis(20);
/// And when too many are already.
const HEDGE_SPARINGLY: Duration = Duration::from_millis(100);
const HEDGE_MAX: Duration = Duration::from_secs(1);
/// Of so many requests one may be asked of a second server early; so many may be saved up. Where all servers are slow because there is
/// so much to do, more requests would make it worse.
const HEDGE_ONE_IN: f64 = 20.0;
const HEDGES_SAVED: f64 = 32.0;

#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Exponentially weighted, seconds.
    latency: f64,
    updated: Instant,
    in_flight: u32,
    failures: u32,
    avoid_until: Option<Instant>,
    no_relay_until: Option<Instant>,
}

impl Seen {
    fn new(now: Instant) -> Self {
        Self { latency: 0.001, updated: now, in_flight: 0, failures: 0, avoid_until: None, no_relay_until: None }
    }

    /// Expected wait of the next request, in seconds: latency times the queue that it would join.
    fn cost(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.updated).as_secs_f64();
        let faded = self.latency * 0.5f64.powf(age / FORGET_HALF.as_secs_f64());
        faded.max(0.000_05) * f64::from(self.in_flight + 1)
    }

    fn favoured_cost(self, now: Instant) -> f64 {
        Self { in_flight: self.in_flight.saturating_sub(TOGETHER - 1), ..self }.cost(now) * FAVOUR
    }

    fn learn(&mut self, latency: Duration, now: Instant) {
        self.latency += (latency.as_secs_f64() - self.latency) * 0.2;
        self.updated = now;
    }
}

#[derive(Debug)]
pub struct Health {
    servers: Mutex<HashMap<ServerId, Seen>>,
    /// Early second requests that may be made.
    hedges: Mutex<f64>,
}

impl Default for Health {
    fn default() -> Self {
        Self { servers: Mutex::default(), hedges: Mutex::new(HEDGES_SAVED) }
    }
}

impl Health {
    fn with<R>(&self, server: ServerId, act: impl FnOnce(&mut Seen, Instant) -> R) -> R {
        let now = Instant::now();
        act(self.servers.lock().entry(server).or_insert_with(|| Seen::new(now)), now)
    }

    pub fn avoided(&self, server: ServerId) -> bool {
        self.with(server, |seen, now| seen.avoid_until.is_some_and(|until| now < until))
    }

    /// Orders by expected latency, those to be avoided last. Chance decides between servers that are about as fast (within
    /// a factor of 1.7), so that no copy is always the one that is read, and none always the one that is not. A `favourite` (for
    /// short requests only) comes first until it would take about twice as long as another.
    pub fn rank(&self, servers: &mut [ServerId], favourite: Option<ServerId>) {
        let now = Instant::now();
        let known = self.servers.lock();
        let mut chance = rand::rng();
        let mut key = |server: ServerId| {
            let seen = known.get(&server).copied().unwrap_or_else(|| Seen::new(now));
            let avoided = seen.avoid_until.is_some_and(|until| now < until);
            let cost = match favourite == Some(server) {
                true => seen.favoured_cost(now),
                false => seen.cost(now) * chance.random_range(0.75..1.3),
            };
            (server, avoided, cost)
        };
        let mut ranked: Vec<(ServerId, bool, f64)> = servers.iter().map(|server| key(*server)).collect();
        ranked.sort_by(|a, b| a.1.cmp(&b.1).then(a.2.total_cmp(&b.2)));
        servers.iter_mut().zip(ranked).for_each(|(server, (ranked, ..))| *server = ranked);
    }

    /// When one more of `servers` should be asked for the same: when the fastest would have answered long ago, if there are not too many
    /// such requests already (the tail at scale, Dean and Barroso, 2013).
    pub fn hedge_after(&self, servers: &[ServerId]) -> Duration {
        let well = servers.iter().copied().filter(|server| !self.avoided(*server));
        // What was seen last, however long ago: silence is no sign of speed.
        let expected = well.map(|server| self.with(server, |seen, _| seen.latency * f64::from(seen.in_flight.max(1))));
        let least = if *self.hedges.lock() >= 1.0 { HEDGE_MIN } else { HEDGE_SPARINGLY };
        Duration::from_secs_f64(expected.fold(1.0, f64::min) * 4.0).clamp(least, HEDGE_MAX)
    }

    /// One more server is asked, early or not.
    pub fn hedged(&self) {
        let mut hedges = self.hedges.lock();
        *hedges = (*hedges - 1.0).max(0.0);
    }

    /// Counts a request as in flight until the guard is dropped.
    pub fn start(&self, server: ServerId) -> InFlight<'_> {
        self.with(server, |seen, _| seen.in_flight += 1);
        {
            let mut hedges = self.hedges.lock();
            *hedges = (*hedges + 1.0 / HEDGE_ONE_IN).min(HEDGES_SAVED);
        }
        InFlight { health: self, server, started: Instant::now() }
    }

    /// It did not answer, or lost its connection.
    pub fn failed(&self, server: ServerId) {
        self.with(server, |seen, now| {
            let pause = (AVOID_MIN * 2u32.saturating_pow(seen.failures.min(8))).min(AVOID_MAX);
            seen.failures = seen.failures.saturating_add(1);
            seen.avoid_until = Some(now + pause);
        });
    }

    /// It could not pass a block on, whoever's fault that was.
    pub fn not_passed_on(&self, server: ServerId) {
        self.with(server, |seen, now| seen.no_relay_until = Some(now + NO_RELAY));
    }

    pub fn may_relay(&self, server: ServerId) -> bool {
        self.with(server, |seen, now| seen.no_relay_until.is_none_or(|until| until <= now))
    }

    /// It has done what was asked of it, by way of another: how long it takes is not known.
    pub fn answered_elsewhere(&self, server: ServerId) {
        self.with(server, |seen, _| {
            seen.failures = 0;
            seen.avoid_until = None;
        });
    }

    /// It is taking so long that another was asked.
    pub fn slow(&self, server: ServerId, waited: Duration) {
        self.with(server, |seen, now| seen.learn(waited * 8, now));
    }
}

/// A request that has been sent and not yet answered.
#[derive(Debug)]
pub struct InFlight<'a> {
    health: &'a Health,
    server: ServerId,
    started: Instant,
}

impl InFlight<'_> {
    pub fn waited(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn answered(&self) {
        let latency = self.waited();
        self.health.with(self.server, |seen, now| {
            seen.learn(latency, now);
            seen.failures = 0;
            seen.avoid_until = None;
        });
    }

    /// It did, after waiting for others: how long it takes itself is not known.
    pub fn answered_with_others(&self) {
        self.health.answered_elsewhere(self.server);
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.health.with(self.server, |seen, _| seen.in_flight -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ServerId = ServerId(1);
    const B: ServerId = ServerId(2);

    fn first(health: &Health) -> ServerId {
        let mut servers = [A, B];
        health.rank(&mut servers, None);
        servers[0]
    }

    fn first_with_favourite(health: &Health) -> ServerId {
        let mut servers = [A, B];
        health.rank(&mut servers, Some(B));
        servers[0]
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_server_is_avoided_and_later_tried_again() {
        let health = Health::default();
        health.start(B).answered();
        health.failed(A);
        assert_eq!((health.avoided(A), first(&health)), (true, B));
        tokio::time::advance(AVOID_MIN).await;
        assert!(!health.avoided(A));
    }

    #[tokio::test(start_paused = true)]
    async fn the_server_with_the_shorter_queue_comes_first() {
        let health = Health::default();
        health.start(A).answered();
        health.start(B).answered();
        let _busy = [health.start(A), health.start(A)];
        assert_eq!(first(&health), B);
    }

    #[tokio::test(start_paused = true)]
    async fn equal_servers_are_read_from_in_equal_parts() {
        let health = Health::default();
        let firsts = (0..1000).filter(|_| first(&health) == A).count();
        assert!((400..600).contains(&firsts), "{firsts} of 1000 reads went to one of two");
    }

    #[tokio::test(start_paused = true)]
    async fn the_favourite_is_asked_until_it_has_too_much_to_do_or_is_slow_or_dead() {
        let health = Health::default();
        let asked: Vec<_> = (0..TOGETHER)
            .map(|_| {
                assert_eq!(first_with_favourite(&health), B);
                health.start(B)
            })
            .collect();
        let more: Vec<_> = (0..4).map(|_| health.start(B)).collect();
        assert_eq!(first_with_favourite(&health), A, "a queue longer than what is answered together");
        drop((asked, more));
        assert_eq!(first_with_favourite(&health), B);
        (0..10).for_each(|_| health.slow(B, Duration::from_millis(1)));
        assert_eq!(first_with_favourite(&health), A, "much slower than the other");
        tokio::time::advance(FORGET_HALF * 20).await;
        assert_eq!(first_with_favourite(&health), B, "that was long ago");
        health.failed(B);
        assert_eq!(first_with_favourite(&health), A);
    }

    #[tokio::test(start_paused = true)]
    async fn the_fastest_says_when_another_is_asked_and_that_is_not_done_for_everything() {
        let health = Health::default();
        health.start(A).answered();
        health.slow(B, Duration::from_millis(500));
        assert_eq!(health.hedge_after(&[B, A]), HEDGE_MIN, "whatever is known of the slow one");
        assert!(health.hedge_after(&[B]) > HEDGE_MIN * 10);
        (0..40).for_each(|_| health.hedged());
        assert_eq!(health.hedge_after(&[B, A]), HEDGE_SPARINGLY, "all are slow");
        health.failed(A);
        assert!(health.hedge_after(&[B, A]) > HEDGE_SPARINGLY, "whoever is avoided says nothing");
        (0..100).for_each(|_| health.start(A).answered());
        let again =
            (0..100).take_while(|_| health.hedge_after(&[B, A]) == HEDGE_MIN).inspect(|_| health.hedged()).count();
        assert!((4..=5).contains(&again), "{again} of a hundred");
    }

    #[tokio::test(start_paused = true)]
    async fn who_cannot_pass_blocks_on_is_not_asked_to_for_a_while_and_nothing_else_is_held_against_it() {
        let health = Health::default();
        assert!(health.may_relay(A));
        health.not_passed_on(A);
        assert_eq!((health.may_relay(A), health.may_relay(B), health.avoided(A)), (false, true, false));
        tokio::time::advance(NO_RELAY).await;
        assert!(health.may_relay(A));
    }

    #[tokio::test(start_paused = true)]
    async fn a_copy_by_way_of_another_server_ends_what_was_held_against_this_one() {
        let health = Health::default();
        (0..5).for_each(|_| health.failed(A));
        assert!(health.avoided(A));
        health.answered_elsewhere(A);
        assert!(!health.avoided(A));
        health.failed(A);
        tokio::time::advance(AVOID_MIN).await;
        assert!(!health.avoided(A), "the pauses begin anew");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_answer_is_forgotten_in_time() {
        let health = Health::default();
        health.start(A).answered();
        health.slow(B, Duration::from_millis(200));
        assert_eq!(first(&health), A);
        tokio::time::advance(FORGET_HALF * 20).await;
        let _busy = [health.start(A)];
        assert_eq!(first(&health), B);
    }
}

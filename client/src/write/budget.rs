//! How many bytes may be written and not yet durable: the bound that makes writers wait.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::pace::{Pace, Synced};

/// A writer of much that has waited for so long may take what is kept for those of little: there may always be some of them.
const TURN_AFTER: Duration = Duration::from_secs(1);

/// Counts the bytes of the whole mount that are dirty, or stored and not yet durable. While fsyncs of little take long, the bound is lower than the limit (`pace`).
#[derive(Debug)]
pub struct DirtyBudget {
    limit: u64,
    bound: AtomicU64,
    pace: Mutex<Pace>,
    /// Fsyncs of little that are under way.
    syncs: AtomicU32,
    used: AtomicU64,
    /// Bytes that have left the budget since it was made.
    drained: AtomicU64,
    /// The servers had no space for what was written before.
    full: AtomicBool,
    changed: Notify,
    /// Half of a lowered bound is used.
    pressed: Notify,
}

/// Somebody waits for an fsync of little.
#[derive(Debug)]
pub struct SyncUnderWay<'a> {
    budget: &'a DirtyBudget,
    begun: Instant,
    /// Bytes that were under way then.
    used: u64,
}

impl SyncUnderWay<'_> {
    /// It is over, and was not for nothing: the bound follows how long it took.
    pub fn over(self) {
        let synced = Synced { begun: self.begun.into_std(), ended: Instant::now().into_std(), used: self.used };
        let mut pace = self.budget.pace.lock();
        self.budget.set_bound(pace.synced(synced));
    }
}

impl Drop for SyncUnderWay<'_> {
    fn drop(&mut self) {
        self.budget.syncs.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Of how much someone waits for the storing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// At most [`LITTLE`].
    Little,
    Much,
}

/// Bytes of a file, written since it was made durable last, up to which it is none that is written in bulk.
pub const LITTLE: u64 = 256 << 10;

impl Amount {
    pub fn of(bytes: u64) -> Self {
        if bytes <= LITTLE { Self::Little } else { Self::Much }
    }
}

/// Why a writer may not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoom {
    /// What was written before could not be stored in time.
    Timeout,
    /// What was written before cannot be stored: the servers are full.
    Full,
}

impl DirtyBudget {
    /// `limit` in bytes. An eighth more is for writers of little, and one write beyond that is let in.
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            bound: AtomicU64::new(limit),
            pace: Mutex::new(Pace::new(limit)),
            syncs: AtomicU32::new(0),
            used: AtomicU64::new(0),
            drained: AtomicU64::new(0),
            full: AtomicBool::new(false),
            changed: Notify::new(),
            pressed: Notify::new(),
        }
    }

    /// Bytes past which writers of much wait now.
    pub fn bound(&self) -> u64 {
        self.bound.load(Ordering::Relaxed)
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether a writer may go on at once. One of little goes on for a while when others have used up the bound: it is not for a small file to wait until what someone writes in
    /// bulk is stored.
    pub fn has_room(&self, amount: Amount) -> bool {
        let bound = self.bound();
        let reserve = if amount == Amount::Little { bound / 8 } else { 0 };
        self.used() < bound.saturating_add(reserve)
    }

    /// Half full: time to make room, before anyone has to wait.
    pub fn is_pressed(&self) -> bool {
        self.used() >= self.bound() / 2
    }

    pub fn add(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        self.tell_pressure();
    }

    fn tell_pressure(&self) {
        if self.bound() < self.limit && self.is_pressed() {
            self.pressed.notify_one();
        }
    }

    /// Waits for `tick`, or until half of a lowered bound is used: who waits for room then should not wait for a tick as well.
    pub async fn until_pressed(&self, tick: Duration) {
        // Whether it was or not, it is time to look.
        drop(tokio::time::timeout(tick, self.pressed.notified()).await);
    }

    /// An fsync of little begins.
    pub fn begin_sync(&self) -> SyncUnderWay<'_> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        SyncUnderWay { budget: self, begun: Instant::now(), used: self.used() }
    }

    /// Lets writers go to the limit again if nobody waits for an fsync of little, or has lately.
    pub fn calm_down(&self, now: Instant) {
        if self.syncs.load(Ordering::Relaxed) == 0 {
            let mut pace = self.pace.lock();
            self.set_bound(pace.calmed(now.into_std()));
        }
    }

    fn set_bound(&self, bound: u64) {
        if self.bound.swap(bound, Ordering::Relaxed) < bound {
            self.changed.notify_waiters();
        }
        self.tell_pressure();
    }

    pub fn sub(&self, bytes: u64) {
        let before = self.used.fetch_sub(bytes, Ordering::Relaxed);
        debug_assert!(before >= bytes, "the dirty budget went below zero");
        self.drained.fetch_add(bytes, Ordering::Relaxed);
        self.changed.notify_waiters();
    }

    /// Whether the servers had space for what was stored last.
    pub fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
        self.changed.notify_waiters();
    }

    /// Waits for room, as [`DirtyBudget::has_room`] says, for as long as there is none and some becomes free at least every `patience`. Nobody waits for servers that are full.
    pub async fn wait_for_room(&self, amount: Amount, patience: Duration) -> Result<(), NoRoom> {
        let (begun, mut drained, mut progress) = (Instant::now(), self.drained.load(Ordering::Relaxed), Instant::now());
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let amount = if begun.elapsed() >= TURN_AFTER { Amount::Little } else { amount };
            if self.has_room(amount) {
                return Ok(());
            }
            if self.full.load(Ordering::Relaxed) {
                return Err(NoRoom::Full);
            }
            let now_drained = self.drained.load(Ordering::Relaxed);
            if now_drained > drained {
                (drained, progress) = (now_drained, Instant::now());
            }
            if tokio::time::timeout_at(progress + patience, changed).await.is_err() {
                return Err(NoRoom::Timeout);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[tokio::test(start_paused = true)]
    async fn a_writer_past_the_limit_waits_until_bytes_are_stored() {
        let budget = Arc::new(DirtyBudget::new(100));
        budget.add(100);
        assert_eq!(budget.wait_for_room(Amount::Much, Duration::from_secs(1)).await, Err(NoRoom::Timeout));
        let writer = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.wait_for_room(Amount::Much, Duration::from_secs(1)).await }
        });
        tokio::task::yield_now().await;
        budget.sub(1);
        assert_eq!(writer.await.unwrap(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_writer_past_the_limit_does_not_wait_for_full_servers() {
        let budget = DirtyBudget::new(100);
        budget.set_full(true);
        assert_eq!(budget.wait_for_room(Amount::Much, Duration::from_secs(1)).await, Ok(()));
        budget.add(100);
        assert_eq!(budget.wait_for_room(Amount::Much, Duration::from_secs(1)).await, Err(NoRoom::Full));
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_writer_for_whom_nothing_becomes_free_is_out_of_patience() {
        let (budget, patience) = (DirtyBudget::new(100), Duration::from_secs(60));
        budget.add(1000);
        let draining = async {
            for _ in 0..10 {
                tokio::time::sleep(patience * 3 / 4).await;
                budget.sub(50);
            }
            for _ in 0..2 {
                tokio::time::sleep(patience * 3 / 4).await;
                // Nothing, but a sign of life.
                budget.sub(0);
            }
        };
        let begun = Instant::now();
        let (room, ()) =
            tokio::join!(async { (budget.wait_for_room(Amount::Much, patience).await, begun.elapsed()) }, draining);
        assert_eq!(room, (Err(NoRoom::Timeout), patience * 15 / 2 + patience));
    }

    #[tokio::test(start_paused = true)]
    async fn slow_syncs_of_little_hold_writers_back_and_calm_lets_them_go() {
        let budget = Arc::new(DirtyBudget::new(256 * MIB));
        budget.add(200 * MIB);
        let syncing = budget.begin_sync();
        tokio::time::advance(Duration::from_millis(100)).await;
        syncing.over();
        assert_eq!(budget.bound(), 100 * MIB);
        assert!(!budget.has_room(Amount::Little) && budget.is_pressed());
        let writer = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.wait_for_room(Amount::Much, Duration::from_secs(60)).await }
        });
        let syncing = budget.begin_sync();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        budget.calm_down(Instant::now());
        assert!(!writer.is_finished() && budget.bound() == 100 * MIB, "somebody waits");
        drop(syncing);
        budget.calm_down(Instant::now());
        assert_eq!(budget.bound(), 256 * MIB);
        assert_eq!(writer.await.unwrap(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn half_of_a_lowered_bound_is_told_at_once_and_half_of_the_limit_at_the_tick() {
        let tick = Duration::from_millis(200);
        let waited_with = async |budget: &DirtyBudget| {
            let begun = Instant::now();
            tokio::join!(budget.until_pressed(tick), async { budget.add(16 * MIB) });
            begun.elapsed()
        };
        let budget = DirtyBudget::new(32 * MIB);
        assert_eq!(waited_with(&budget).await, tick);
        budget.add(32 * MIB);
        let syncing = budget.begin_sync();
        tokio::time::advance(tick).await;
        syncing.over();
        budget.sub(32 * MIB);
        assert_eq!(waited_with(&budget).await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn little_has_room_for_a_while_after_much_and_much_that_has_waited_long_as_well() {
        let budget = DirtyBudget::new(80 * MIB);
        budget.add(80 * MIB);
        assert_eq!([LITTLE, LITTLE + 1].map(Amount::of), [Amount::Little, Amount::Much]);
        assert!(budget.has_room(Amount::Little) && !budget.has_room(Amount::Much));
        let begun = Instant::now();
        let others = async {
            tokio::time::sleep(TURN_AFTER).await;
            budget.sub(1);
            budget.add(1);
        };
        let (room, ()) = tokio::join!(budget.wait_for_room(Amount::Much, 60 * TURN_AFTER), others);
        assert_eq!((room, begun.elapsed()), (Ok(()), TURN_AFTER));
        budget.add(10 * MIB);
        assert!(!budget.has_room(Amount::Little));
    }
}

//! How many bytes may be written and not yet durable: the bound that makes writers wait.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

/// What an fsync of little may take before the writers of much have to be held back for it.
const SYNC_TARGET: Duration = Duration::from_millis(50);
/// The bound is not lowered below this: enough for every disk to be busy while the next blocks are on their way.
const BOUND_MIN: u64 = 8 << 20;
/// A file of which less is counted is none that is written in bulk.
const LITTLE: u64 = 1 << 20;
/// Nobody has waited for an fsync of little for this long: writers may go to the limit again.
const CALM_AFTER: Duration = Duration::from_secs(1);

/// Counts the bytes of the whole mount that are dirty, or stored and not yet durable.
///
/// An fsync waits for all that was stored before it, so those who write much without one decide how long it takes. While fsyncs of little take longer than they should, the
/// bound is lower than the limit: halved by each one that does, raised by an eighth by each that takes less than half of that, as congestion control does with a window.
#[derive(Debug)]
pub struct DirtyBudget {
    limit: u64,
    bound: AtomicU64,
    last_sync: Mutex<Option<Instant>>,
    used: AtomicU64,
    /// The servers had no space for what was written before.
    full: AtomicBool,
    changed: Notify,
    /// Half of a lowered bound is used.
    pressed: Notify,
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
    /// `limit` in bytes. An eighth more is for files of which little is counted, and one write beyond that is let in.
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            bound: AtomicU64::new(limit),
            last_sync: Mutex::new(None),
            used: AtomicU64::new(0),
            full: AtomicBool::new(false),
            changed: Notify::new(),
            pressed: Notify::new(),
        }
    }

    /// Bytes past which writers wait now.
    pub fn bound(&self) -> u64 {
        self.bound.load(Ordering::Relaxed)
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether a writer of a file may go on at once of which `held` bytes are counted. One that has little goes on for a while when others have used up the bound: it is not
    /// for a small file to wait until what someone writes in bulk is stored.
    pub fn has_room(&self, held: u64) -> bool {
        let bound = self.bound();
        self.used() < if held < LITTLE { bound.saturating_add(bound / 8) } else { bound }
    }

    /// Half full: time to make room, before anyone has to wait.
    pub fn is_pressed(&self) -> bool {
        self.used() >= self.bound() / 2
    }

    pub fn add(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        if self.bound() < self.limit && self.is_pressed() {
            self.pressed.notify_one();
        }
    }

    /// Waits for `tick`, or until half of a lowered bound is used: who waits for room then should not wait for a tick as well.
    pub async fn until_pressed(&self, tick: Duration) {
        // Whether it was or not, it is time to look.
        drop(tokio::time::timeout(tick, self.pressed.notified()).await);
    }

    /// An fsync of little, which took so long, is over.
    pub fn note_sync(&self, took: Duration) {
        *self.last_sync.lock() = Some(Instant::now());
        let bound = self.bound();
        let new = if took > SYNC_TARGET {
            (bound.min(self.used()) / 2).max(BOUND_MIN)
        } else if took < SYNC_TARGET / 2 && self.is_pressed() {
            bound.saturating_add(bound / 8)
        } else {
            bound
        };
        self.set_bound(new.min(self.limit));
    }

    /// Lets writers go to the limit again if nobody has waited for an fsync of little lately.
    pub fn calm_down(&self) {
        let mut last = self.last_sync.lock();
        if last.is_some_and(|last| last.elapsed() >= CALM_AFTER) {
            *last = None;
            self.set_bound(self.limit);
        }
    }

    fn set_bound(&self, bound: u64) {
        if self.bound.swap(bound, Ordering::Relaxed) < bound {
            self.changed.notify_waiters();
        }
    }

    pub fn sub(&self, bytes: u64) {
        let before = self.used.fetch_sub(bytes, Ordering::Relaxed);
        debug_assert!(before >= bytes, "the dirty budget went below zero");
        self.changed.notify_waiters();
    }

    /// Whether the servers had space for what was stored last.
    pub fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
        self.changed.notify_waiters();
    }

    /// Waits at most `patience` for room, as [`DirtyBudget::has_room`] says. Past the limit nobody waits for servers that are full.
    pub async fn wait_for_room(&self, held: u64, patience: Duration) -> Result<(), NoRoom> {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if self.has_room(held) {
                    return Ok(());
                }
                if self.full.load(Ordering::Relaxed) {
                    return Err(NoRoom::Full);
                }
                changed.await;
            }
        };
        tokio::time::timeout(patience, wait).await.unwrap_or(Err(NoRoom::Timeout))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_writer_past_the_limit_waits_until_bytes_are_stored() {
        let budget = Arc::new(DirtyBudget::new(100));
        budget.add(100);
        assert_eq!(budget.wait_for_room(LITTLE, Duration::from_secs(1)).await, Err(NoRoom::Timeout));
        let writer = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.wait_for_room(LITTLE, Duration::from_secs(1)).await }
        });
        tokio::task::yield_now().await;
        budget.sub(1);
        assert_eq!(writer.await.unwrap(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_writer_past_the_limit_does_not_wait_for_full_servers() {
        let budget = DirtyBudget::new(100);
        budget.set_full(true);
        assert_eq!(budget.wait_for_room(LITTLE, Duration::from_secs(1)).await, Ok(()));
        budget.add(100);
        assert_eq!(budget.wait_for_room(LITTLE, Duration::from_secs(1)).await, Err(NoRoom::Full));
    }

    const MIB: u64 = 1 << 20;

    #[tokio::test(start_paused = true)]
    async fn slow_syncs_of_little_hold_writers_back_until_nobody_waits_for_one() {
        let budget = DirtyBudget::new(256 * MIB);
        budget.add(200 * MIB);
        budget.note_sync(2 * SYNC_TARGET);
        assert_eq!(budget.bound(), 100 * MIB, "half of what is used");
        assert!(!budget.has_room(LITTLE) && budget.is_pressed());
        (0..20).for_each(|_| budget.note_sync(2 * SYNC_TARGET));
        assert_eq!(budget.bound(), BOUND_MIN);
        budget.note_sync(SYNC_TARGET * 3 / 4);
        assert_eq!(budget.bound(), BOUND_MIN, "about as long as it should take");
        budget.note_sync(SYNC_TARGET / 4);
        assert_eq!(budget.bound(), BOUND_MIN + BOUND_MIN / 8);
        budget.sub(200 * MIB);
        budget.note_sync(SYNC_TARGET / 4);
        assert_eq!(budget.bound(), BOUND_MIN + BOUND_MIN / 8, "raised only when it holds someone back");

        tokio::time::advance(CALM_AFTER / 2).await;
        budget.calm_down();
        assert_eq!(budget.bound(), BOUND_MIN + BOUND_MIN / 8);
        tokio::time::advance(CALM_AFTER).await;
        budget.calm_down();
        assert_eq!(budget.bound(), 256 * MIB);
    }

    #[tokio::test(start_paused = true)]
    async fn a_bound_is_never_above_the_limit_and_a_small_limit_stays() {
        let budget = DirtyBudget::new(4 * MIB);
        budget.add(4 * MIB);
        budget.note_sync(2 * SYNC_TARGET);
        assert_eq!(budget.bound(), 4 * MIB);
        budget.note_sync(Duration::ZERO);
        assert_eq!(budget.bound(), 4 * MIB);
    }

    #[tokio::test(start_paused = true)]
    async fn half_of_a_lowered_bound_is_told_at_once_and_half_of_the_limit_at_the_tick() {
        let tick = Duration::from_millis(200);
        let waited_with = async |budget: &DirtyBudget| {
            let begun = Instant::now();
            tokio::join!(budget.until_pressed(tick), async { budget.add(BOUND_MIN) });
            begun.elapsed()
        };
        let budget = DirtyBudget::new(2 * BOUND_MIN);
        assert_eq!(waited_with(&budget).await, tick);
        budget.note_sync(2 * SYNC_TARGET);
        assert_eq!(waited_with(&budget).await, Duration::ZERO);
    }

    #[test]
    fn a_file_with_little_has_room_for_a_while_after_the_others() {
        let budget = DirtyBudget::new(80 * MIB);
        budget.add(80 * MIB);
        assert!(budget.has_room(LITTLE - 1) && !budget.has_room(LITTLE));
        budget.add(10 * MIB);
        assert!(!budget.has_room(0));
    }
}

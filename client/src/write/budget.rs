//! How many bytes may be written and not yet durable: the bound that makes writers wait.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::sync::Notify;

/// Counts the bytes of the whole mount that are dirty, or stored and not yet durable.
#[derive(Debug)]
pub struct DirtyBudget {
    limit: u64,
    used: AtomicU64,
    /// The servers had no space for what was written before.
    full: AtomicBool,
    changed: Notify,
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
    /// `limit` in bytes. One write beyond it is let in, so the true bound is the limit and one request.
    pub fn new(limit: u64) -> Self {
        Self { limit, used: AtomicU64::new(0), full: AtomicBool::new(false), changed: Notify::new() }
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether a writer may go on at once.
    pub fn has_room(&self) -> bool {
        self.used() < self.limit
    }

    /// Half full: time to make room, before anyone has to wait.
    pub fn is_pressed(&self) -> bool {
        self.used() >= self.limit / 2
    }

    pub fn add(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
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

    /// Waits at most `patience` for room. Past the limit nobody waits for servers that are full.
    pub async fn wait_for_room(&self, patience: Duration) -> Result<(), NoRoom> {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if self.has_room() {
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
        assert_eq!(budget.wait_for_room(Duration::from_secs(1)).await, Err(NoRoom::Timeout));
        let writer = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.wait_for_room(Duration::from_secs(1)).await }
        });
        tokio::task::yield_now().await;
        budget.sub(1);
        assert_eq!(writer.await.unwrap(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_writer_past_the_limit_does_not_wait_for_full_servers() {
        let budget = DirtyBudget::new(100);
        budget.set_full(true);
        assert_eq!(budget.wait_for_room(Duration::from_secs(1)).await, Ok(()));
        budget.add(100);
        assert_eq!(budget.wait_for_room(Duration::from_secs(1)).await, Err(NoRoom::Full));
    }
}

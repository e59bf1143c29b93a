//! How many bytes may be written and not yet stored: the bound that makes writers wait.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::sync::Notify;

/// Counts dirty bytes of the whole mount.
#[derive(Debug)]
pub struct DirtyBudget {
    limit: u64,
    used: AtomicU64,
    freed: Notify,
}

impl DirtyBudget {
    /// `limit` in bytes. One write beyond it is let in, so the true bound is the limit and one request.
    pub fn new(limit: u64) -> Self {
        Self { limit, used: AtomicU64::new(0), freed: Notify::new() }
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether a writer may go on at once.
    pub fn has_room(&self) -> bool {
        self.used() < self.limit
    }

    /// Half full: time to write out what is old, before anyone has to wait.
    pub fn is_pressed(&self) -> bool {
        self.used() >= self.limit / 2
    }

    pub fn add(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn sub(&self, bytes: u64) {
        let before = self.used.fetch_sub(bytes, Ordering::Relaxed);
        debug_assert!(before >= bytes, "the dirty budget went below zero");
        self.freed.notify_waiters();
    }

    /// Waits for room; `false` when there is none within `patience`.
    pub async fn wait_for_room(&self, patience: Duration) -> bool {
        let wait = async {
            loop {
                let freed = self.freed.notified();
                if self.has_room() {
                    return;
                }
                freed.await;
            }
        };
        tokio::time::timeout(patience, wait).await.is_ok()
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
        assert!(!budget.wait_for_room(Duration::from_secs(1)).await);
        let writer = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.wait_for_room(Duration::from_secs(1)).await }
        });
        tokio::task::yield_now().await;
        budget.sub(1);
        assert!(writer.await.unwrap());
    }
}

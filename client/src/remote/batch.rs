//! Take all that waits, do it once, answer all: the queue in front of every shared round trip.

use std::{future::Future, sync::Arc};

use tokio::sync::{mpsc, oneshot};

/// One thing to do, and who waits for it.
#[derive(Debug)]
pub struct Waiting<T, R> {
    pub item: T,
    pub answer: oneshot::Sender<R>,
}

/// A bounded queue whose worker hands over everything that waits, at most `batch_max` items at a time.
#[derive(Debug)]
pub struct Batcher<T, R> {
    queue: mpsc::Sender<Waiting<T, R>>,
}

impl<T: Send + 'static, R: Send + 'static> Batcher<T, R> {
    /// Spawns the worker on the current runtime; it ends when the last handle is dropped. `work` answers every item
    /// (an item dropped unanswered is seen as `None` by who waits). The next batch gathers while one is being done.
    pub fn start<F, Fut>(queue_max: usize, batch_max: usize, work: F) -> Arc<Self>
    where
        F: Fn(Vec<Waiting<T, R>>) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send,
    {
        let (queue, mut waiting) = mpsc::channel(queue_max);
        tokio::spawn(async move {
            let mut batch = Vec::new();
            while waiting.recv_many(&mut batch, batch_max).await > 0 {
                work(std::mem::take(&mut batch)).await;
            }
        });
        Arc::new(Self { queue })
    }

    /// Waits for room in the queue, then for the answer.
    pub async fn ask(&self, item: T) -> Option<R> {
        let (answer, answered) = oneshot::channel();
        self.queue.send(Waiting { item, answer }).await.ok()?;
        answered.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn what_waits_during_one_batch_goes_into_the_next() {
        let batches = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&batches);
        let batcher = Batcher::start(100, 100, move |batch: Vec<Waiting<u32, u32>>| {
            count.fetch_add(1, Ordering::Relaxed);
            async move {
                tokio::task::yield_now().await;
                for waiting in batch {
                    waiting.answer.send(waiting.item * 2).unwrap();
                }
            }
        });
        let asks = (0..50u32).map(|n| {
            let batcher = Arc::clone(&batcher);
            tokio::spawn(async move { batcher.ask(n).await })
        });
        for (n, ask) in (0u32..).zip(asks.collect::<Vec<_>>()) {
            assert_eq!(ask.await.unwrap(), Some(n * 2));
        }
        assert!(batches.load(Ordering::Relaxed) < 10, "50 items took {batches:?} batches");
    }
}

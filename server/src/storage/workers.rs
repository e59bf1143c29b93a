//! A few threads for what would hold up the network: hashing, and disks. Short work goes before long.

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread::JoinHandle,
};

use holdfast_common::work;
use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Debug)]
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("waiting", &self.queue.lock().waiting()).finish_non_exhaustive()
    }
}

/// How long work takes, as far as can be told before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effort {
    /// A slice, a small write, a look into the index: a user may wait for it.
    Short,
    /// A block, or something of which nobody knows.
    Long,
}

#[derive(Default)]
struct Queue {
    short: VecDeque<Job>,
    long: VecDeque<Job>,
    /// Short jobs that were taken while a long one waited.
    in_a_row: u32,
    /// Jobs that wait or run.
    unfinished: usize,
    stopping: bool,
}

impl Queue {
    fn waiting(&self) -> usize {
        self.short.len() + self.long.len()
    }

    fn push(&mut self, effort: Effort, job: Job) {
        match effort {
            Effort::Short => self.short.push_back(job),
            Effort::Long => self.long.push_back(job),
        }
        self.unfinished += 1;
    }

    /// A short one, unless a long one has seen enough of them go before it.
    fn take(&mut self) -> Option<Job> {
        if self.long.is_empty() || (!self.short.is_empty() && self.in_a_row < SHORT_IN_A_ROW) {
            self.in_a_row = if self.long.is_empty() { 0 } else { self.in_a_row + 1 };
            return self.short.pop_front();
        }
        self.in_a_row = 0;
        self.long.pop_front()
    }
}

/// The queue is full, or the job panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum WorkError {
    #[error("too much work is waiting")]
    Full,
    #[error("the work could not be finished")]
    Died,
}

/// Jobs that may wait.
const QUEUE_MAX: usize = 2048;
/// Short jobs that go before a long one.
const SHORT_IN_A_ROW: u32 = 8;

impl Workers {
    pub(super) fn start(count: usize) -> io::Result<Self> {
        let count = if work::is_simulated() { 0 } else { count };
        let mut workers = Self { shared: Arc::default(), threads: Vec::new() };
        for number in 0..count {
            let shared = Arc::clone(&workers.shared);
            let thread = std::thread::Builder::new().name(format!("holdfast-work-{number}"));
            workers.threads.push(thread.spawn(move || shared.work())?);
        }
        Ok(workers)
    }

    /// Nothing waits or runs.
    pub(super) fn is_idle(&self) -> bool {
        self.unfinished() == 0
    }

    pub(super) fn unfinished(&self) -> usize {
        self.shared.queue.lock().unfinished
    }

    /// Runs `work` on one of the threads, if there are any. Dropping the future does not stop it.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        effort: Effort,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, WorkError> {
        if self.threads.is_empty() {
            return work::run(work).await.map_err(|_| WorkError::Died);
        }
        let (sender, receiver) = oneshot::channel();
        let job = move || {
            // Nobody may be waiting any more.
            drop(sender.send(work()));
        };
        self.push(effort, Box::new(job))?;
        receiver.await.map_err(|_| WorkError::Died)
    }

    fn push(&self, effort: Effort, job: Job) -> Result<(), WorkError> {
        let mut queue = self.shared.queue.lock();
        if queue.waiting() >= QUEUE_MAX {
            return Err(WorkError::Full);
        }
        queue.push(effort, job);
        self.shared.wake.notify_one();
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.queue.lock().stopping = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a worker thread panicked");
            }
        }
    }
}

impl Shared {
    fn work(&self) {
        while let Some(job) = self.next() {
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("a job panicked; its request fails");
            }
            self.queue.lock().unfinished -= 1;
        }
    }

    /// The next job; `None` when the pool stops and nothing is left.
    fn next(&self) -> Option<Job> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.take() {
                return Some(job);
            }
            if queue.stopping {
                return None;
            }
            self.wake.wait(&mut queue);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_work_goes_first_and_long_work_is_not_forgotten() {
        let (mut queue, taken) = (Queue::default(), Arc::new(Mutex::new(Vec::new())));
        let job = |name: u32| -> Job {
            let taken = Arc::clone(&taken);
            Box::new(move || taken.lock().push(name))
        };
        const LONG: u32 = 1000;
        [LONG, LONG + 1].into_iter().for_each(|name| queue.push(Effort::Long, job(name)));
        (0..SHORT_IN_A_ROW + 1).for_each(|name| queue.push(Effort::Short, job(name)));
        while let Some(job) = queue.take() {
            job();
        }
        let expected: Vec<u32> = (0..SHORT_IN_A_ROW).chain([LONG, SHORT_IN_A_ROW, LONG + 1]).collect();
        assert_eq!(*taken.lock(), expected);
        assert_eq!((queue.waiting(), queue.in_a_row), (0, 0));
    }

    #[tokio::test]
    async fn what_was_asked_for_comes_back() {
        let workers = Workers::start(2).unwrap();
        let done = tokio::join!(workers.run(Effort::Long, || 1), workers.run(Effort::Short, || 2));
        assert_eq!(done, (Ok(1), Ok(2)));
    }
}

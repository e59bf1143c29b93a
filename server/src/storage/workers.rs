//! A few threads for what would hold up the network: hashing, and disks.

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
        f.debug_struct("Shared").field("waiting", &self.queue.lock().jobs.len()).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Jobs that wait or run.
    unfinished: usize,
    stopping: bool,
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
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, WorkError> {
        if self.threads.is_empty() {
            return work::run(work).await.map_err(|_| WorkError::Died);
        }
        let (sender, receiver) = oneshot::channel();
        self.push(Box::new(move || {
            // Nobody may be waiting any more.
            drop(sender.send(work()));
        }))?;
        receiver.await.map_err(|_| WorkError::Died)
    }

    fn push(&self, job: Job) -> Result<(), WorkError> {
        let mut queue = self.shared.queue.lock();
        if queue.jobs.len() >= QUEUE_MAX {
            return Err(WorkError::Full);
        }
        queue.jobs.push_back(job);
        queue.unfinished += 1;
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
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.stopping {
                return None;
            }
            self.wake.wait(&mut queue);
        }
    }
}

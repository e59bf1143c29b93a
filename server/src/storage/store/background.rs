//! What a store does without being asked: it syncs what somebody waits for, moves changes into the index, and compacts.
//!
//! On threads; in a simulation (`work::is_simulated`) tasks take the same steps.

use std::{future::Future, io, sync::Arc, thread::JoinHandle, time::Duration};

use holdfast_common::work;
use parking_lot::{Condvar, Mutex};
use tokio::{sync::Notify, task::AbortHandle};

use super::{Inner, StoreError, compact::Compaction};

/// Bytes of mostly dead segments that are rewritten between two flushes.
const COMPACT_BYTES: u64 = 16 << 20;

/// Whoever works in the background, until it is stopped.
#[derive(Debug, Default)]
pub(super) struct Background {
    threads: Vec<JoinHandle<()>>,
    tasks: Vec<AbortHandle>,
}

impl Background {
    /// The first to be started and the last to end: what the others do waits for it.
    pub(super) fn start_syncing(&mut self, inner: &Arc<Inner>) -> io::Result<()> {
        let (in_thread, in_task) = (Arc::clone(inner), Arc::clone(inner));
        self.start("holdfast-sync", move || in_thread.sync_loop(), async move { in_task.sync_task().await })
    }

    pub(super) fn start_keeping(&mut self, inner: &Arc<Inner>) -> io::Result<()> {
        let (in_thread, in_task) = (Arc::clone(inner), Arc::clone(inner));
        self.start("holdfast-index", move || in_thread.housekeeping_loop(), async move {
            in_task.housekeeping_task().await;
        })
    }

    /// Hints are for real disks alone.
    pub(super) fn start_hints(&mut self, inner: &Arc<Inner>) -> io::Result<()> {
        let hints = inner.segments.start_hints();
        self.start("holdfast-hints", move || hints.iter().for_each(|hint| hint.follow()), async {})
    }

    fn start(
        &mut self,
        name: &str,
        in_thread: impl FnOnce() + Send + 'static,
        in_task: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        if work::is_simulated() {
            self.tasks.push(tokio::spawn(in_task).abort_handle());
        } else {
            self.threads.push(std::thread::Builder::new().name(name.to_owned()).spawn(in_thread)?);
        }
        Ok(())
    }

    pub(super) fn stop(&mut self, inner: &Inner) {
        self.tasks.drain(..).for_each(|task| task.abort());
        inner.housekeeper.state.lock().stopping = true;
        inner.housekeeper.wake.notify_all();
        inner.segments.stop_hints();
        // The housekeeper may be in a checkpoint, which waits for the sync thread: that one goes last.
        while let Some(thread) = self.threads.pop() {
            if self.threads.is_empty() {
                inner.gate.stop();
            }
            if thread.join().is_err() {
                tracing::error!("a thread of the store panicked");
            }
        }
    }
}

/// When house is kept.
#[derive(Debug, Default)]
pub(super) struct Housekeeper {
    pub(super) state: Mutex<Ticks>,
    wake: Condvar,
    hurry: Notify,
}

#[derive(Debug, Default)]
pub(super) struct Ticks {
    pub(super) stopping: bool,
    hurry: bool,
}

impl Housekeeper {
    pub(super) fn hurry(&self) {
        self.state.lock().hurry = true;
        self.wake.notify_one();
        self.hurry.notify_one();
    }

    /// Waits for the next flush; `false` when the store stops.
    fn next_tick(&self, every: Duration) -> bool {
        let mut ticks = self.state.lock();
        if !ticks.stopping && !ticks.hurry {
            self.wake.wait_for(&mut ticks, every);
        }
        ticks.hurry = false;
        !ticks.stopping
    }
}

/// Where the housekeeper is.
#[derive(Default)]
struct Rounds {
    flushes: u32,
    compaction: Compaction,
}

impl Inner {
    fn sync_loop(&self) {
        while self.gate.next_work() {
            self.sync_once();
        }
    }

    async fn sync_task(&self) {
        while self.gate.next_asked().await {
            work::takes_a_while().await;
            self.sync_once();
        }
    }

    fn housekeeping_loop(&self) {
        let mut rounds = Rounds::default();
        while self.housekeeper.next_tick(self.options.flush_every) && self.gate.failure().is_none() {
            self.keep_house(&mut rounds);
        }
    }

    async fn housekeeping_task(&self) {
        let mut rounds = Rounds::default();
        while self.gate.failure().is_none() {
            tokio::select! {
                biased;
                () = self.housekeeper.hurry.notified() => {}
                () = tokio::time::sleep(self.options.flush_every) => {}
            }
            self.keep_house(&mut rounds);
        }
    }

    fn keep_house(&self, rounds: &mut Rounds) {
        rounds.flushes += 1;
        let durable = rounds.flushes >= self.options.flushes_per_checkpoint;
        if durable {
            rounds.flushes = 0;
        }
        let kept = self.keep_index(durable).and_then(|buried| self.keep_compact(buried > 0, &mut rounds.compaction));
        match kept {
            Ok(false) => {}
            // What was rewritten goes with the next checkpoint.
            Ok(true) => rounds.flushes = self.options.flushes_per_checkpoint,
            Err(error) => tracing::error!(%error, "housekeeping of the block store failed"),
        }
    }

    /// How many dead records were buried.
    fn keep_index(&self, durable: bool) -> Result<usize, StoreError> {
        self.ballast.keep(self.segments.disk.space(&self.directory)?.free);
        self.refresh_room()?;
        let buried = self.bury();
        let unsynced = self.tail.lock().sequence() > self.gate.durable();
        match (durable, self.index.pending() > 0 || unsynced) {
            (true, true) => self.checkpoint()?,
            (false, true) if self.index.pending() > 0 => self.flush(false)?,
            _ => {}
        }
        Ok(buried)
    }

    /// `true`: a segment can go.
    fn keep_compact(&self, has_died: bool, compaction: &mut Compaction) -> Result<bool, StoreError> {
        if has_died && compaction.is_done() {
            self.plan_compaction(compaction)?;
        }
        let was_done = compaction.is_done();
        self.compact(compaction, COMPACT_BYTES)?;
        Ok(!was_done && compaction.is_done())
    }
}

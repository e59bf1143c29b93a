//! Group commit: one fdatasync for everybody who waits.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use tokio::sync::{Notify, watch};

/// Everything that was appended up to and including this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub(super) u64);

#[derive(Debug)]
struct State {
    wanted: u64,
    durable: u64,
    stopping: bool,
    failure: Option<Arc<str>>,
}

impl State {
    /// `None`: not now; `false`: never again.
    fn has_work(&self) -> Option<bool> {
        let is_over = self.stopping || self.failure.is_some();
        (is_over || self.wanted > self.durable).then_some(!is_over)
    }
}

/// Who waits for what to be durable, and whether the store still works.
#[derive(Debug)]
pub(super) struct SyncGate {
    state: Mutex<State>,
    work: Condvar,
    /// As `work`, for those who wait in async code.
    asked: Notify,
    done: Condvar,
    published: watch::Sender<Durable>,
    /// Apart: who waits for a failure is not woken by every sync.
    failed: watch::Sender<Option<Arc<str>>>,
}

/// How far the store is durable, for those who wait in async code.
#[derive(Clone, Debug, Default)]
pub(super) struct Durable {
    pub(super) through: u64,
    pub(super) failure: Option<Arc<str>>,
}

impl SyncGate {
    pub(super) fn new(durable: u64) -> Self {
        Self {
            state: Mutex::new(State { wanted: durable, durable, stopping: false, failure: None }),
            work: Condvar::new(),
            asked: Notify::new(),
            done: Condvar::new(),
            published: watch::Sender::new(Durable { through: durable, failure: None }),
            failed: watch::Sender::new(None),
        }
    }

    /// The sync thread is to sync `ticket`, unless it is durable already. Does not wait.
    pub(super) fn request(&self, ticket: Ticket) {
        let mut state = self.state.lock();
        if state.wanted < ticket.0 {
            state.wanted = ticket.0;
            self.work.notify_one();
            self.asked.notify_one();
        }
    }

    /// Returns when `ticket` is durable, or why it never will be.
    pub(super) fn wait(&self, ticket: Ticket) -> Result<(), Arc<str>> {
        self.request(ticket);
        let mut state = self.state.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(Arc::clone(failure));
            }
            if state.durable >= ticket.0 {
                return Ok(());
            }
            // Nobody syncs any more.
            if state.stopping {
                return Err("the block store has stopped".into());
            }
            self.done.wait(&mut state);
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Durable> {
        self.published.subscribe()
    }

    pub(super) fn subscribe_to_failure(&self) -> watch::Receiver<Option<Arc<str>>> {
        self.failed.subscribe()
    }

    pub(super) fn durable(&self) -> u64 {
        self.state.lock().durable
    }

    pub(super) fn failure(&self) -> Option<Arc<str>> {
        self.state.lock().failure.clone()
    }

    /// Waits for something to sync; `false` when the store stops.
    pub(super) fn next_work(&self) -> bool {
        let mut state = self.state.lock();
        loop {
            match state.has_work() {
                Some(has_work) => return has_work,
                None => self.work.wait(&mut state),
            }
        }
    }

    /// As `next_work`, in async code.
    pub(super) async fn next_asked(&self) -> bool {
        loop {
            let has_work = self.state.lock().has_work();
            match has_work {
                Some(has_work) => return has_work,
                None => self.asked.notified().await,
            }
        }
    }

    pub(super) fn succeeded(&self, through: u64) {
        let mut state = self.state.lock();
        state.durable = state.durable.max(through);
        self.published.send_modify(|durable| durable.through = state.durable);
        self.done.notify_all();
    }

    /// The store must not go on. Only the first reason counts.
    pub(super) fn fail(&self, reason: Arc<str>) {
        let mut state = self.state.lock();
        let reason = state.failure.get_or_insert(reason);
        self.published.send_modify(|durable| durable.failure = Some(Arc::clone(reason)));
        self.failed.send_replace(Some(Arc::clone(reason)));
        self.done.notify_all();
        self.work.notify_all();
    }

    pub(super) fn stop(&self) {
        self.state.lock().stopping = true;
        self.work.notify_all();
        self.done.notify_all();
    }

    /// Somebody has asked for this to be durable.
    #[cfg(test)]
    pub(super) fn is_wanted(&self, ticket: Ticket) -> bool {
        self.state.lock().wanted >= ticket.0
    }
}

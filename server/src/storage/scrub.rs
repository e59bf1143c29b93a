//! Reads every stored byte again from time to time, and finds what has gone bad before somebody needs it.
//!
//! In the order of the hashes, so that one of them says how far a pass has come, also after a restart. Bytes come from the disk and not
//! from memory. What is bad is told to the metadata server, which has this server put a good copy in its place: until there is one, the
//! bad one stays, for it may be the only one of which anything can be read.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::Duration,
};

use holdfast_common::{BlockHash, clock::Clock, disk::Disk, work};
use serde::{Deserialize, Serialize};
use tokio::{sync::mpsc, task::AbortHandle, time::Instant};

use super::{
    service::StorageService,
    store::{Store, StoreError, Verdict},
};

/// Blocks after which the state is written.
const PAGE: usize = 256;
/// While requests are being served, the pass goes at this part of its rate.
const BUSY_DIVISOR: u64 = 4;
/// When it is to be done now, breaks of so many times what a block took, while requests are being served: a sixth of the time is left.
const BUSY_BREAKS: u32 = 5;
/// After a block that could not be checked.
const TROUBLE_PAUSE: Duration = Duration::from_millis(200);
/// How often a scrubber that has nothing to do looks whether it has.
const IDLE_TICK: Duration = Duration::from_millis(200);
const STATE_FILE: &str = "scrub.json";

/// How far scrubbing has come, for reports.
#[derive(Debug, Default)]
pub struct ScrubProgress {
    /// Bytes that this pass has checked; 0 between passes.
    pub checked_bytes: AtomicU64,
    /// Full passes since the data directory was made.
    pub passes: AtomicU64,
    /// When the last one ended, in seconds since 1970; 0: never.
    pub last_pass_secs: AtomicU64,
    /// A pass is to begin now, and to take no breaks.
    wanted: AtomicBool,
}

impl ScrubProgress {
    /// Starts a pass at once, or has the one that is under way go on without breaks.
    pub fn want(&self) {
        self.wanted.store(true, Relaxed);
    }
}

/// What is kept between two lives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// The last block that the pass under way has checked, in hexadecimal digits; none between passes.
    after: Option<String>,
    checked_bytes: u64,
    passes: u64,
    last_pass_secs: u64,
    /// When the first life began: the first pass is due after that.
    since_secs: u64,
}

/// Reads again what is stored.
pub struct Scrubber {
    pub store: Arc<Store>,
    pub service: Arc<StorageService>,
    pub disk: Arc<dyn Disk>,
    pub directory: PathBuf,
    pub clock: Arc<dyn Clock>,
    /// Bytes a second; 0: only when it is asked for.
    pub rate: u64,
    /// From the end of one pass to the next.
    pub every: Duration,
    pub progress: Arc<ScrubProgress>,
    /// Blocks that turned out to be bad here.
    pub bad: mpsc::UnboundedSender<BlockHash>,
}

/// A scrubber at work. It ends when this is dropped.
#[derive(Debug)]
pub struct Scrubbing(AbortHandle);

impl Drop for Scrubbing {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Scrubber {
    /// Inside a tokio runtime.
    pub fn start(self) -> Scrubbing {
        Scrubbing(tokio::spawn(Arc::new(self).run()).abort_handle())
    }

    async fn run(self: Arc<Self>) {
        let loading = Arc::clone(&self);
        let loaded = work::run(move || load(&*loading.disk, &loading.directory)).await;
        // The runtime is stopping: nothing is to be written over what is kept.
        let Ok(mut state) = loaded else { return };
        if state.since_secs == 0 {
            state.since_secs = self.now_secs();
            self.keep(&state).await;
        }
        self.show(&state);
        loop {
            if !self.is_due(&state) {
                tokio::time::sleep(IDLE_TICK).await;
                continue;
            }
            match self.page(&mut state).await {
                Ok(()) => {
                    self.show(&state);
                    self.keep(&state).await;
                }
                Err(error) => {
                    tracing::error!(%error, "scrubbing has to wait");
                    tokio::time::sleep(TROUBLE_PAUSE).await;
                }
            }
        }
    }

    async fn keep(self: &Arc<Self>, state: &State) {
        let (scrubber, state) = (Arc::clone(self), state.clone());
        let kept = work::run(move || save(&*scrubber.disk, &scrubber.directory, &state)).await;
        if let Err(error) = kept.unwrap_or_else(|died| Err(io::Error::other(died))) {
            tracing::warn!(%error, "how far scrubbing has come is not kept: after a restart the pass begins again");
        }
    }

    fn show(&self, state: &State) {
        self.progress.checked_bytes.store(state.checked_bytes, Relaxed);
        self.progress.last_pass_secs.store(state.last_pass_secs, Relaxed);
        self.progress.passes.store(state.passes, Relaxed);
    }

    fn now_secs(&self) -> u64 {
        u64::try_from(self.clock.now().secs).unwrap_or(0)
    }

    fn is_due(&self, state: &State) -> bool {
        let is_under_way = state.after.is_some() && self.rate > 0;
        let last = state.last_pass_secs.max(state.since_secs);
        let now = self.now_secs();
        // A clock that was ahead when the last pass ended, and has been set right since.
        let was_ahead = last > now;
        let is_time = (was_ahead || now >= last.saturating_add(self.every.as_secs())) && self.rate > 0;
        is_under_way || is_time || self.progress.wanted.load(Acquire)
    }

    /// Checks some blocks, and ends the pass after the last.
    async fn page(self: &Arc<Self>, state: &mut State) -> Result<(), StoreError> {
        let after = state.after.as_deref().and_then(BlockHash::from_hex);
        let listing = Arc::clone(&self.store);
        let listed = work::run(move || listing.list(after, PAGE)).await;
        let (hashes, end) = listed.unwrap_or_else(|died| Err(StoreError::Io(io::Error::other(died))))?;
        for (hash, _) in &hashes {
            let (started, requests) = (Instant::now(), self.service.requests());
            let length = match self.checked(*hash).await {
                Ok(length) => length,
                Err(error) => {
                    tracing::error!(block = %hash, %error, "a block cannot be checked: passed over until the next pass");
                    tokio::time::sleep(TROUBLE_PAUSE).await;
                    0
                }
            };
            state.checked_bytes += length;
            state.after = Some(hash.to_string());
            let is_alone = self.service.requests() == requests && self.service.in_flight() == 0;
            self.breathe(length, started.elapsed(), is_alone).await;
        }
        if end {
            let bytes = state.checked_bytes;
            (state.after, state.checked_bytes) = (None, 0);
            (state.passes, state.last_pass_secs) = (state.passes + 1, self.now_secs());
            self.progress.wanted.swap(false, AcqRel);
            tracing::info!(bytes, "every stored block was read and checked");
        }
        Ok(())
    }

    /// Keeps to the rate. If it is to be done now, that is as fast as it can be, and beside requests a part of the time.
    async fn breathe(&self, bytes: u64, took: Duration, is_alone: bool) {
        if self.progress.wanted.load(Relaxed) || self.rate == 0 {
            if !is_alone {
                tokio::time::sleep(took * BUSY_BREAKS).await;
            }
            return;
        }
        let rate = if is_alone { self.rate } else { self.rate / BUSY_DIVISOR };
        self.nap(Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64).saturating_sub(took)).await;
    }

    async fn nap(&self, long: Duration) {
        let until = Instant::now() + long;
        while !self.progress.wanted.load(Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(IDLE_TICK)).await;
        }
    }

    /// The bytes that were read.
    async fn checked(self: &Arc<Self>, hash: BlockHash) -> Result<u64, StoreError> {
        let scrubber = Arc::clone(self);
        let checked = work::run(move || scrubber.check(&hash)).await;
        checked.unwrap_or_else(|died| Err(StoreError::Io(io::Error::other(died))))
    }

    fn check(&self, hash: &BlockHash) -> Result<u64, StoreError> {
        let (length, mut verdict) = self.store.scrub(hash)?;
        if matches!(verdict, Verdict::Damaged(..)) {
            // Disks fail to read for a moment, too.
            verdict = self.store.scrub(hash)?.1;
        }
        match verdict {
            // Deleted meanwhile.
            Verdict::Good | Verdict::Missing => {}
            Verdict::BadTree(block, bad) => {
                tracing::error!(block = %hash, "the hash tree of a copy is bad, its bytes are good: written again");
                self.store.replace(&block, bad)?;
            }
            Verdict::Damaged(_, reason) => {
                tracing::error!(block = %hash, reason, "scrubbing has found a bad copy");
                // Nobody listens only when the server stops: the next pass finds it again.
                if self.bad.send(*hash).is_err() {
                    tracing::debug!(block = %hash, "a bad copy is not reported any more");
                }
            }
        }
        Ok(length)
    }
}

fn load(disk: &dyn Disk, directory: &Path) -> State {
    let read = || -> io::Result<State> {
        let file = disk.open(&directory.join(STATE_FILE), false)?;
        let mut bytes = vec![0; usize::try_from(file.length()?.min(4096)).map_err(io::Error::other)?];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    match read() {
        Ok(state) => state,
        Err(error) if error.kind() == io::ErrorKind::NotFound => State::default(),
        Err(error) => {
            tracing::warn!(%error, "how far scrubbing had come is not known: the pass begins again");
            State::default()
        }
    }
}

/// Not durably: lost with the power it costs a pass.
fn save(disk: &dyn Disk, directory: &Path, state: &State) -> io::Result<()> {
    let path = directory.join(STATE_FILE);
    let new = path.with_added_extension("new");
    let file = disk.open(&new, true)?;
    let bytes = serde_json::to_vec(state)?;
    file.set_length(bytes.len() as u64)?;
    file.write_all_at(&bytes, 0)?;
    disk.rename(&new, &path)
}

//! Blocks in append segments, found through an index that the segments can rebuild.
//!
//! A put is *visible* when it is in the page cache and in the index's memory; it is *durable* after the next sync,
//! which everybody who waits shares. The order of locks: the tail's, then those inside the index.

mod background;
mod boot;
mod checked;
mod compact;
mod format;
mod index;
mod lately;
mod quarantine;
mod read;
mod recover;
mod scan;
mod segment;
mod sync;
#[cfg(test)]
mod test_disk;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{Acquire, Relaxed},
        },
    },
    time::Duration,
};

use holdfast_common::planted::{Bug, is_planted};
use holdfast_common::{
    BlockHash, BootId, Epoch, Refusal,
    disk::{Disk, Space},
    work,
};
use parking_lot::{Mutex, MutexGuard};
use rand::Rng;

use crate::{
    ballast::{Ballast, is_full},
    datadir::DataDir,
};

use self::{
    background::{Background, Housekeeper},
    boot::Boot,
    compact::Compaction,
    format::{Kind, Place, RECORD_HEADER_LENGTH, RecordHeader},
    index::{Entry, INDEX_FILE, Index, IndexError, Saved},
    lately::ReadLately,
    quarantine::Quarantine,
    read::Patience,
    recover::{RecoverError, Recoverer, read_record},
    segment::{NewRecord, Segments, Tail, list_segments, read_segment_key},
    sync::SyncGate,
};
pub use self::{checked::CheckedBlock, read::Plan, recover::Recovery, sync::Ticket};

/// Changes of the index in memory at which they are written to redb without waiting for the next tick.
const FLUSH_AT: usize = 16 << 10;
/// Changes of the index in memory past which puts are refused until redb has caught up.
const PENDING_MAX: usize = 256 << 10;
/// Blocks that reads found damaged, remembered so that a put of the same block replaces them.
const SUSPECTS_MAX: usize = 4096;
/// Tells the next start that redb's file cannot be trusted.
const INDEX_DAMAGED_FILE: &str = "index.damaged";
const PAGE: u64 = 4096;
/// Bytes of a block that is worth being read past the kernel's memory of files.
const LONG: u32 = 512 << 10;
/// Appends that fail in a row, for other reasons than want of space, until the disk counts as broken.
const FAILED_APPENDS_MAX: u32 = 3;
/// Blocks deleted while puts wait.
const DELETED_AT_ONCE: usize = 64;

#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Bytes at which a new segment is started: 64 KiB to 2 GiB.
    pub segment_bytes: u64,
    /// Bytes of blocks past which puts are refused.
    pub capacity_bytes: Option<u64>,
    /// Bytes of the filesystem that stay free.
    pub reserve_bytes: u64,
    /// Bytes of bad copies that are kept for inspection.
    pub quarantine_bytes: u64,
    /// Bytes of redb's page cache.
    pub index_cache_bytes: u64,
    /// How often changes of the index go to redb.
    pub flush_every: Duration,
    /// Dead bytes of a segment below which it is not rewritten.
    pub waste_bytes: u64,
    /// Flushes between two checkpoints (segments synced, redb on stable storage).
    pub flushes_per_checkpoint: u32,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 256 << 20,
            capacity_bytes: None,
            reserve_bytes: 256 << 20,
            quarantine_bytes: 1 << 30,
            index_cache_bytes: 64 << 20,
            flush_every: Duration::from_secs(1),
            waste_bytes: 1 << 20,
            flushes_per_checkpoint: 30,
        }
    }
}

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the block is not here")]
    Missing,
    #[error("the copy here is damaged: {0}")]
    Damaged(String),
    #[error("the range does not lie within the block")]
    Range,
    #[error("the store is full")]
    Full,
    #[error("the index cannot keep up; try again")]
    Busy,
    #[error("the disk would have to be asked")]
    NotCached,
    #[error("the disk failed: {0}")]
    Io(#[from] io::Error),
    /// The store has stopped for good.
    #[error("{0}")]
    Failed(Arc<str>),
}

impl StoreError {
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Missing => Refusal::BlockMissing,
            Self::Damaged(_) => Refusal::BlockDamaged,
            Self::Range => Refusal::BadRequest,
            Self::Full => Refusal::ServerFull,
            Self::Busy | Self::NotCached => Refusal::Unavailable,
            Self::Io(_) | Self::Failed(_) => Refusal::Fault,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot open the block store in {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("cannot open the block store in {path}: {reason}")]
    Index { path: PathBuf, reason: String },
}

/// What the examination of a block's copy found.
#[derive(Debug)]
pub enum Verdict {
    Good,
    Missing,
    /// The bytes are good, and only the hash tree beside them is not: here they are with a good one.
    BadTree(CheckedBlock, BadCopy),
    Damaged(BadCopy, String),
}

/// A copy that was found bad. A put may have replaced it since, so it is not the same as "the block's copy".
#[derive(Clone, Copy, Debug)]
pub struct BadCopy {
    hash: BlockHash,
    entry: Entry,
}

/// For status and heartbeats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub blocks: u64,
    pub stored_bytes: u64,
    pub corrupt_found: u64,
    pub repaired: u64,
    pub quarantined: u64,
}

/// An open store. Dropping it stops its threads and leaves what is not yet durable to the page cache;
/// [`Store::close`] makes everything durable first.
#[derive(Debug)]
pub struct Store {
    inner: Arc<Inner>,
    recovery: Recovery,
    background: Background,
    /// Goes last: nobody else may open the directory before.
    lock: Option<DataDir>,
}

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    options: StoreOptions,
    boot: Boot,
    segments: Segments,
    index: Index,
    ballast: Arc<Ballast>,
    tail: Mutex<Tail>,
    /// The tail's sequence, without its lock.
    appended: Arc<AtomicU64>,
    growing: Arc<AtomicU64>,
    gate: SyncGate,
    quarantine: Quarantine,
    counters: Counters,
    /// Bytes that may be written before the disk counts as full; set by the housekeeper, lowered by puts.
    room: AtomicU64,
    /// In a row, up to now.
    failed_appends: AtomicU32,
    suspects: Mutex<BTreeSet<BlockHash>>,
    lately: Mutex<ReadLately>,
    /// Records that later ones (up to that sequence) replaced or deleted, to be voided once those are durable.
    graves: Mutex<Vec<(u64, BlockHash, Entry)>>,
    flushing: Mutex<()>,
    housekeeper: Housekeeper,
}

#[derive(Debug, Default)]
struct Counters {
    corrupt_found: AtomicU64,
    repaired: AtomicU64,
    quarantined: AtomicU64,
}

impl Store {
    /// Opens the store in `directory` (made if it is missing): reads what the index does not cover, rebuilds the index
    /// if it must, cuts a torn end, and makes what it found durable.
    pub fn open(disk: Arc<dyn Disk>, directory: &Path, options: StoreOptions) -> Result<Self, OpenError> {
        let io_error = |source| OpenError::Io { path: directory.to_owned(), source };
        let (inner, recovery) = Inner::open(disk, directory, options).map_err(|error| match error {
            RecoverError::Io(source) => io_error(source),
            RecoverError::Index(error) => OpenError::Index { path: directory.to_owned(), reason: error.to_string() },
        })?;
        let inner = Arc::new(inner);
        let mut store = Self { inner: Arc::clone(&inner), recovery, background: Background::default(), lock: None };
        store.background.start_syncing(&inner).map_err(io_error)?;
        inner.checkpoint().map_err(|error| io_error(io::Error::other(error.to_string())))?;
        boot::commit(inner.segments.disk.as_ref(), directory, inner.boot).map_err(io_error)?;
        store.background.start_keeping(&inner).map_err(io_error)?;
        store.background.start_hints(&inner).map_err(io_error)?;
        Ok(store)
    }

    /// Keeps `lock` for as long as anybody uses this store, however long that is after the server has stopped.
    #[must_use]
    pub fn locked_by(mut self, lock: DataDir) -> Self {
        self.lock = Some(lock);
        self
    }

    /// What the start found.
    pub fn recovery(&self) -> Recovery {
        self.recovery
    }

    pub fn boot(&self) -> BootId {
        self.inner.boot.id
    }

    /// Appends the blocks that are not here, all or none. They are visible when this returns; durable when the ticket is.
    pub fn put(&self, blocks: &[CheckedBlock]) -> Result<Ticket, StoreError> {
        self.inner.put(self.inner.tail.lock(), blocks)
    }

    /// As `put`, if nobody else writes now; else `None`, because that may take as long as a disk.
    pub fn try_put(&self, blocks: &[CheckedBlock]) -> Option<Result<Ticket, StoreError>> {
        let tail = self.inner.tail.try_lock()?;
        Some(self.inner.put(tail, blocks))
    }

    /// Everything that is visible now. Waits for nothing.
    pub fn ticket(&self) -> Ticket {
        Ticket(self.inner.appended.load(Acquire))
    }

    /// Blocks this thread until `ticket` is on stable storage.
    pub fn wait_durable(&self, ticket: Ticket) -> Result<(), StoreError> {
        self.inner.wait_durable(ticket)
    }

    /// As `wait_durable`, for async code.
    pub async fn durable(&self, ticket: Ticket) -> Result<(), StoreError> {
        if is_planted(Bug::SyncSkipped) {
            return Ok(());
        }
        let mut durable = self.inner.gate.subscribe();
        self.inner.gate.request(ticket);
        let state = durable.wait_for(|durable| durable.through >= ticket.0 || durable.failure.is_some()).await;
        match state {
            Ok(state) => state.failure.clone().map_or(Ok(()), |failure| Err(StoreError::Failed(failure))),
            Err(_) => Err(StoreError::Failed("the store was closed".into())),
        }
    }

    /// Resolves with the reason when the store had to stop: the process should then end.
    pub async fn failed(&self) -> Arc<str> {
        let mut failed = self.inner.gate.subscribe_to_failure();
        let failure = failed.wait_for(Option::is_some).await.ok();
        failure.and_then(|reason| reason.clone()).unwrap_or_else(|| "the store was closed".into())
    }

    /// Reads the whole record and checks it: payload against hash, tree against payload.
    pub fn examine(&self, hash: &BlockHash) -> Result<Verdict, StoreError> {
        self.inner.examine(hash)
    }

    /// As `examine`, of what is on the disk, whatever memory has; with the block's length.
    pub fn scrub(&self, hash: &BlockHash) -> Result<(u64, Verdict), StoreError> {
        let entry = self.inner.index.get(hash).map_err(|error| self.inner.index_failed(&error))?;
        if let Some(entry) = &entry
            && let Ok(file) = self.inner.segments.file(entry.place.segment)
        {
            file.forget_cached(entry.place.offset, entry.record_length());
        }
        Ok((entry.map_or(0, |entry| u64::from(entry.length)), self.examine(hash)?))
    }

    /// As `examine`, for those who want a good copy or an error.
    pub fn verify(&self, hash: &BlockHash) -> Result<(), StoreError> {
        match self.examine(hash)? {
            Verdict::Good => Ok(()),
            Verdict::Missing => Err(StoreError::Missing),
            Verdict::BadTree(..) => Err(StoreError::Damaged("its hash tree is wrong".to_owned())),
            Verdict::Damaged(_, reason) => Err(StoreError::Damaged(reason)),
        }
    }

    /// Puts a good copy in the place of one that was found bad, whose epoch it carries on; the bad one is kept in
    /// quarantine. `None`: that copy is not what is here any more, and nothing was done.
    pub fn replace(&self, good: &CheckedBlock, bad: BadCopy) -> Result<Option<Ticket>, StoreError> {
        self.inner.replace_bad(good, bad)
    }

    /// Counts a copy that was missing and is here again.
    pub fn note_repaired(&self) {
        self.inner.counters.repaired.fetch_add(1, Relaxed);
    }

    /// Stamps a block that is here with at least `epoch`, which takes reading and writing it unless it is already. `None`: it is not
    /// here. Durable when the ticket is.
    pub fn raise(&self, hash: &BlockHash, epoch: Epoch) -> Result<Option<Ticket>, StoreError> {
        self.inner.raise(hash, epoch)
    }

    /// Deletes those of `hashes` whose epoch is below `epoch`, and returns how many.
    pub fn delete(&self, hashes: &[BlockHash], epoch: Epoch) -> Result<u32, StoreError> {
        self.inner.delete(hashes, epoch)
    }

    /// Hashes after `after`, in order, at most `count`, each with its stamp; and whether that was the end.
    pub fn list(&self, after: Option<BlockHash>, count: usize) -> Result<(Vec<(BlockHash, Epoch)>, bool), StoreError> {
        let mut hashes = self.inner.index.list(after, count + 1).map_err(|error| self.inner.index_failed(&error))?;
        let end = hashes.len() <= count;
        hashes.truncate(count);
        Ok((hashes, end))
    }

    pub fn statistics(&self) -> Statistics {
        let (total, counters) = (self.inner.index.total(), &self.inner.counters);
        Statistics {
            blocks: total.blocks,
            stored_bytes: total.bytes,
            corrupt_found: counters.corrupt_found.load(Relaxed),
            repaired: counters.repaired.load(Relaxed),
            quarantined: counters.quarantined.load(Relaxed),
        }
    }

    /// What its disk keeps for the day on which others have filled it.
    pub fn ballast(&self) -> Arc<Ballast> {
        Arc::clone(&self.inner.ballast)
    }

    /// Capacity and free bytes as a client may count on them: within the limit, without the reserve.
    pub fn space(&self) -> io::Result<Space> {
        self.inner.usable_space()
    }

    /// Rewrites all segments that are mostly dead; they go with the next checkpoints.
    pub fn compact(&self) -> Result<(), StoreError> {
        let mut compaction = Compaction::default();
        self.inner.plan_compaction(&mut compaction)?;
        self.inner.compact(&mut compaction, u64::MAX)
    }

    /// Makes everything durable and the index complete.
    pub fn checkpoint(&self) -> Result<(), StoreError> {
        self.inner.checkpoint()
    }

    /// Writes the index's changes to redb, not yet durably.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.inner.flush(false)
    }

    /// Checkpoints and stops.
    pub fn close(self) -> Result<(), StoreError> {
        self.inner.checkpoint()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.background.stop(&self.inner);
    }
}

/// Opening.
impl Inner {
    fn open(disk: Arc<dyn Disk>, directory: &Path, options: StoreOptions) -> Result<(Self, Recovery), RecoverError> {
        let segment_directory = directory.join("segments");
        for path in [directory, &segment_directory] {
            disk.create_directory(path)?;
        }
        disk.sync_directory(directory)?;
        let ballast = Arc::new(Ballast::open(Arc::clone(&disk), directory, options.reserve_bytes)?);
        let boot = boot::decide(disk.as_ref(), directory, || rand::rng().random())?;
        let quarantine = Quarantine::open(Arc::clone(&disk), directory.join("quarantine"), options.quarantine_bytes)?;
        let numbers = list_segments(disk.as_ref(), &segment_directory)?;
        let (index, saved) = open_index(disk.as_ref(), directory, options.index_cache_bytes, &ballast)?;
        let key = find_key(disk.as_ref(), &segment_directory, &numbers)?;
        let segments = Segments::new(Arc::clone(&disk), segment_directory, key);

        let mut recoverer = Recoverer::new(&segments, &index, &quarantine, boot, options.segment_bytes, saved);
        let tail = recoverer.run(&numbers)?;
        let sequence = tail.sequence();
        let graves = recoverer.graves.into_iter().map(|(hash, entry)| (sequence, hash, entry)).collect();
        let (mut saved, mut report) = (recoverer.saved, recoverer.report);
        report.rebuilt = saved.covered == Place::default() && !numbers.is_empty();
        saved.corrupt_found += report.damaged;
        log_recovery(directory, &report);
        let inner = Self {
            directory: directory.to_owned(),
            options,
            boot,
            segments,
            index,
            ballast,
            appended: tail.appended(),
            growing: tail.growing(),
            tail: Mutex::new(tail),
            gate: SyncGate::new(0),
            quarantine,
            counters: Counters::from(saved),
            room: AtomicU64::new(0),
            failed_appends: AtomicU32::new(0),
            suspects: Mutex::default(),
            lately: Mutex::default(),
            graves: Mutex::new(graves),
            flushing: Mutex::default(),
            housekeeper: Housekeeper::default(),
        };
        inner.refresh_room()?;
        Ok((inner, report))
    }
}

impl From<Saved> for Counters {
    fn from(saved: Saved) -> Self {
        Self {
            corrupt_found: saved.corrupt_found.into(),
            repaired: saved.repaired.into(),
            quarantined: saved.quarantined.into(),
        }
    }
}

fn log_recovery(directory: &Path, report: &Recovery) {
    tracing::info!(
        directory = %directory.display(), rebuilt = report.rebuilt, records = report.records,
        cut_bytes = report.cut_bytes, lost = report.lost, damaged = report.damaged,
        "opened the block store"
    );
}

/// Opens the index; one that cannot be used is set aside for inspection, and an empty one takes its place.
fn open_index(
    disk: &dyn Disk,
    directory: &Path,
    cache_bytes: u64,
    ballast: &Arc<Ballast>,
) -> Result<(Index, Saved), RecoverError> {
    let marker = directory.join(INDEX_DAMAGED_FILE);
    let distrusted = disk.open(&marker, false).is_ok();
    if !distrusted {
        match Index::open(disk, directory, cache_bytes, ballast)? {
            Ok(opened) => return Ok(opened),
            Err(full @ IndexError::Full(_)) => return Err(full.into()),
            Err(error) => tracing::error!(%error, "the index cannot be used"),
        }
    }
    tracing::warn!("rebuilding the index from the segments");
    let path = directory.join(INDEX_FILE);
    match disk.rename(&path, &path.with_added_extension("damaged")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    if distrusted {
        disk.remove(&marker)?;
    }
    disk.sync_directory(directory)?;
    Ok(Index::open(disk, directory, cache_bytes, ballast)??)
}

/// The key that the store's segments repeat; a new one if none tells it.
fn find_key(disk: &dyn Disk, directory: &Path, numbers: &[u64]) -> io::Result<format::Key> {
    for number in numbers {
        let file = disk.open(&directory.join(segment::segment_name(*number)), false)?;
        match read_segment_key(file.as_ref(), *number)? {
            Ok(key) => return Ok(key),
            Err(fault) => tracing::warn!(segment = number, %fault, "the header of a segment is bad"),
        }
    }
    Ok(rand::rng().random())
}

/// Writing.
impl Inner {
    fn check_running(&self) -> Result<(), StoreError> {
        self.gate.failure().map_or(Ok(()), |failure| Err(StoreError::Failed(failure)))
    }

    /// redb failed or its file is damaged: the store stops, and its next start rebuilds the index, unless it only had no space.
    fn index_failed(&self, error: &IndexError) -> StoreError {
        let reason: Arc<str> = if self.index.was_full() {
            error.to_string().into()
        } else {
            self.distrust_index();
            format!("{error}; it is rebuilt at the next start").into()
        };
        self.gate.fail(Arc::clone(&reason));
        StoreError::Failed(reason)
    }

    fn distrust_index(&self) {
        if let Err(error) = self.segments.disk.open(&self.directory.join(INDEX_DAMAGED_FILE), true) {
            tracing::error!(%error, "cannot note that the index is damaged: remove {INDEX_FILE} before the next start");
        }
    }

    fn put(&self, mut tail: MutexGuard<'_, Tail>, blocks: &[CheckedBlock]) -> Result<Ticket, StoreError> {
        self.check_running()?;
        if self.index.pending() >= PENDING_MAX {
            return Err(StoreError::Busy);
        }
        let new = self.new_among(blocks)?;
        if !new.is_empty() {
            self.append_blocks(&mut tail, &new)?;
        }
        Ok(Ticket(tail.sequence()))
    }

    /// Those of `blocks` that have to be written, once each.
    fn new_among<'a>(&self, blocks: &'a [CheckedBlock]) -> Result<Vec<NewBlock<'a>>, StoreError> {
        let mut seen: BTreeMap<BlockHash, usize> = BTreeMap::new();
        let mut new: Vec<NewBlock<'_>> = Vec::new();
        for block in blocks {
            if is_planted(Bug::PutForgotten) && block.hash().0[0] < 32 {
                continue;
            }
            if let Some(position) = seen.get(&block.hash()) {
                new[*position].epoch = new[*position].epoch.max(block.epoch());
            } else if let Some(needed) = self.needed(block)? {
                seen.insert(block.hash(), new.len());
                new.push(needed);
            }
        }
        Ok(new)
    }

    /// `None` if the block is here, good as far as its header tells, and stamped late enough. A later stamp is written
    /// with the whole block: changing a header in place could tear it.
    fn needed<'a>(&self, block: &'a CheckedBlock) -> Result<Option<NewBlock<'a>>, StoreError> {
        let hash = block.hash();
        let Some(entry) = self.index.get(&hash).map_err(|error| self.index_failed(&error))? else {
            return Ok(Some(NewBlock { block, epoch: block.epoch(), before: None }));
        };
        let epoch = entry.epoch.max(block.epoch());
        let is_good =
            entry.epoch == epoch && !self.suspects.lock().contains(&hash) && self.header_of(&hash, &entry).is_some();
        Ok((!is_good).then_some(NewBlock { block, epoch, before: Some(entry) }))
    }

    /// The header of the block's record, if that is what stands there.
    fn header_of(&self, hash: &BlockHash, entry: &Entry) -> Option<RecordHeader> {
        let header = self.segments.read_header(entry.place).ok()?.ok()?;
        (header.kind == Kind::Block && header.hash == *hash && header.length == entry.length).then_some(header)
    }

    fn append_blocks(&self, tail: &mut Tail, new: &[NewBlock<'_>]) -> Result<(), StoreError> {
        self.take_room(new.iter().map(|new| u64::from(new.block.length())).sum())?;
        self.append_records(tail, new, false)
    }

    /// What came of an append. A disk that refuses several in a row is broken: the store stops, and others make new copies of what is
    /// on it.
    fn came_of<T>(&self, appended: io::Result<T>) -> Result<T, StoreError> {
        let error = match appended {
            Ok(value) => {
                self.failed_appends.store(0, Relaxed);
                return Ok(value);
            }
            Err(error) if is_full(&error) || error.kind() == io::ErrorKind::FileTooLarge => {
                return Err(StoreError::Full);
            }
            Err(error) => error,
        };
        tracing::error!(%error, "cannot write to a segment");
        if !is_want_of_the_process(&error) && self.failed_appends.fetch_add(1, Relaxed) + 1 >= FAILED_APPENDS_MAX {
            self.gate.fail(format!("its disk cannot be written: {error}").into());
        }
        Err(StoreError::Io(error))
    }

    /// `is_move`: there will be more room after it, so that there has to be some for it.
    fn append_records(&self, tail: &mut Tail, new: &[NewBlock<'_>], is_move: bool) -> Result<(), StoreError> {
        let records: Vec<NewRecord<'_>> = new.iter().map(NewBlock::record).collect();
        let mut append = || tail.append(&self.segments, &records);
        let places = self.came_of(if is_move { self.ballast.spend(append) } else { append() })?;
        for (new, place) in new.iter().zip(places) {
            let (hash, length) = (new.block.hash(), new.block.length());
            self.index.replace(hash, new.before, Some(Entry { place, length, epoch: new.epoch }));
            if let Some(before) = new.before {
                self.suspects.lock().remove(&hash);
                self.graves.lock().push((tail.sequence(), hash, before));
            }
        }
        if self.index.pending() >= FLUSH_AT {
            self.housekeeper.hurry();
        }
        Ok(())
    }

    fn raise(&self, hash: &BlockHash, epoch: Epoch) -> Result<Option<Ticket>, StoreError> {
        if self.has(&[*hash])? != [true] {
            return Ok(None);
        }
        let entry = self.index.get(hash).map_err(|error| self.index_failed(&error))?;
        if entry.is_some_and(|entry| entry.epoch >= epoch) {
            return Ok(Some(Ticket(self.appended.load(Acquire))));
        }
        let bytes = match self.located(hash, |entry| self.read_payload(hash, entry, Patience::Wait)) {
            Err(StoreError::Missing) => return Ok(None),
            bytes => bytes?,
        };
        let damaged = |error: holdfast_common::HashMismatch| StoreError::Damaged(error.to_string());
        let checked = CheckedBlock::verify(*hash, bytes, epoch).map_err(damaged);
        let block = checked.inspect_err(|damage| self.suspect(*hash, damage))?;
        self.put(self.tail.lock(), &[block]).map(Some)
    }

    fn take_room(&self, bytes: u64) -> Result<(), StoreError> {
        let stored = self.index.total().bytes;
        if self.options.capacity_bytes.is_some_and(|capacity| stored + bytes > capacity) {
            return Err(StoreError::Full);
        }
        self.room.fetch_update(Relaxed, Relaxed, |room| room.checked_sub(bytes)).map(drop).map_err(|_| StoreError::Full)
    }

    fn refresh_room(&self) -> io::Result<()> {
        let space = self.segments.disk.space(&self.directory)?;
        self.room.store(space.free.saturating_sub(self.ballast.free_reserve()), Relaxed);
        Ok(())
    }

    fn usable_space(&self) -> io::Result<Space> {
        let space = self.segments.disk.space(&self.directory)?;
        let free = space.free.saturating_sub(self.ballast.free_reserve());
        let stored = self.index.total().bytes;
        Ok(match self.options.capacity_bytes {
            Some(limit) => Space { capacity: limit, free: free.min(limit.saturating_sub(stored)) },
            None => Space { capacity: space.capacity.saturating_sub(self.options.reserve_bytes), free },
        })
    }

    fn delete(&self, hashes: &[BlockHash], epoch: Epoch) -> Result<u32, StoreError> {
        self.check_running()?;
        let mut count = 0;
        // In small parts: whoever puts goes in between.
        for hashes in hashes.iter().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().chunks(DELETED_AT_ONCE) {
            // What the index has to read for it, it reads here, and not while it holds up the puts.
            self.dead_among(hashes, epoch)?;
            let mut tail = self.tail.lock();
            let dead = self.dead_among(hashes, epoch)?;
            self.forget(&mut tail, &dead, epoch)?;
            count += dead.len();
        }
        Ok(u32::try_from(count).unwrap_or(u32::MAX))
    }

    fn dead_among(&self, hashes: &[&BlockHash], epoch: Epoch) -> Result<Vec<(BlockHash, Entry)>, StoreError> {
        let mut dead = Vec::with_capacity(hashes.len());
        for hash in hashes {
            let entry = self.index.get(hash).map_err(|error| self.index_failed(&error))?;
            dead.extend(entry.filter(|entry| entry.epoch < epoch).map(|entry| (**hash, entry)));
        }
        Ok(dead)
    }

    fn forget(&self, tail: &mut Tail, dead: &[(BlockHash, Entry)], epoch: Epoch) -> Result<(), StoreError> {
        let tombstone = |(hash, _): &(BlockHash, Entry)| NewRecord {
            kind: Kind::Delete,
            hash: *hash,
            value: epoch.0,
            tree: &[],
            payload: &[],
        };
        if dead.is_empty() {
            return Ok(());
        }
        let tombstones: Vec<_> = dead.iter().map(tombstone).collect();
        // What is deleted makes room, so that there has to be some for it.
        self.came_of(self.ballast.spend(|| tail.append(&self.segments, &tombstones)))?;
        dead.iter().for_each(|(hash, entry)| self.index.replace(*hash, Some(*entry), None));
        let sequence = tail.sequence();
        self.graves.lock().extend(dead.iter().map(|(hash, entry)| (sequence, *hash, *entry)));
        Ok(())
    }

    /// Turns a record that nothing points to into a void and gives its space back. Only if it really is that block's:
    /// a wrong index must not destroy another one.
    fn void(&self, hash: &BlockHash, entry: &Entry) {
        let Some(header) = self.header_of(hash, entry) else { return };
        if let Err(error) = self.try_void(entry, header.sequence) {
            tracing::warn!(block = %hash, %error, "cannot give back the space of a deleted block");
        }
    }

    fn try_void(&self, entry: &Entry, sequence: u64) -> io::Result<()> {
        let place = entry.place;
        let file = self.segments.file(place.segment)?;
        let length = u32::try_from(entry.record_length() - RECORD_HEADER_LENGTH as u64).map_err(io::Error::other)?;
        let header = RecordHeader { kind: Kind::Void, length, sequence, value: 0, hash: BlockHash([0; 32]) };
        file.write_all_at(&header.encode(&self.segments.key, place), place.offset)?;
        self.tail.lock().touch(place.segment, Arc::clone(&file));
        let first = (place.offset + RECORD_HEADER_LENGTH as u64).next_multiple_of(PAGE);
        let last = (place.offset + entry.record_length()) / PAGE * PAGE;
        if first < last { file.punch_hole(first, last - first) } else { Ok(()) }
    }

    fn examine(&self, hash: &BlockHash) -> Result<Verdict, StoreError> {
        let Some(entry) = self.index.get(hash).map_err(|error| self.index_failed(&error))? else {
            return Ok(Verdict::Missing);
        };
        let bad = BadCopy { hash: *hash, entry };
        match self.check_record(hash, &entry) {
            Ok(None) => Ok(Verdict::Good),
            Ok(Some(block)) => Ok(Verdict::BadTree(block, bad)),
            Err(StoreError::Damaged(reason)) => Ok(Verdict::Damaged(bad, reason)),
            Err(error) => Err(error),
        }
    }

    /// Is the copy still what the index points to?
    fn is_current(&self, bad: BadCopy) -> Result<bool, StoreError> {
        Ok(self.index.get(&bad.hash).map_err(|error| self.index_failed(&error))? == Some(bad.entry))
    }

    fn replace_bad(&self, good: &CheckedBlock, bad: BadCopy) -> Result<Option<Ticket>, StoreError> {
        self.check_running()?;
        // Read before it is replaced: its space is given back after that.
        let bytes = self.bytes_of(bad);
        let mut tail = self.tail.lock();
        if !self.is_current(bad)? {
            return Ok(None);
        }
        let epoch = bad.entry.epoch.max(good.epoch());
        // Not a byte more is stored by it: a server that is full can be mended too.
        self.append_records(&mut tail, &[NewBlock { block: good, epoch, before: Some(bad.entry) }], true)?;
        let ticket = Ticket(tail.sequence());
        drop(tail);
        self.counters.corrupt_found.fetch_add(1, Relaxed);
        self.counters.repaired.fetch_add(1, Relaxed);
        if let Err(error) = self.keep_bad_copy(bad, bytes) {
            tracing::error!(block = %bad.hash, %error, "cannot keep a bad copy that a good one replaced");
        }
        Ok(Some(ticket))
    }

    fn bytes_of(&self, bad: BadCopy) -> io::Result<Vec<u8>> {
        let file = self.segments.file(bad.entry.place.segment)?;
        read_record(file.as_ref(), bad.entry.place, bad.entry.record_length())
    }

    fn keep_bad_copy(&self, bad: BadCopy, bytes: io::Result<Vec<u8>>) -> io::Result<()> {
        match bytes {
            Ok(bytes) => {
                self.quarantine.keep(bad.hash, &bytes)?;
                self.counters.quarantined.fetch_add(1, Relaxed);
            }
            Err(error) => tracing::error!(block = %bad.hash, %error, "nothing of a bad copy can be read"),
        }
        Ok(())
    }
}

/// A block that has to be written.
struct NewBlock<'a> {
    block: &'a CheckedBlock,
    epoch: Epoch,
    /// The copy that it replaces.
    before: Option<Entry>,
}

impl NewBlock<'_> {
    fn record(&self) -> NewRecord<'_> {
        NewRecord {
            kind: Kind::Block,
            hash: self.block.hash(),
            value: self.epoch.0,
            tree: self.block.tree(),
            payload: self.block.bytes(),
        }
    }
}

/// No descriptors, no memory: that says nothing about the disk.
fn is_want_of_the_process(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

/// What the store's own threads do.
impl Inner {
    fn wait_durable(&self, ticket: Ticket) -> Result<(), StoreError> {
        // Nobody else would.
        if work::is_simulated() && self.gate.durable() < ticket.0 {
            self.sync_once();
        }
        self.gate.wait(ticket).map_err(StoreError::Failed)
    }

    fn sync_once(&self) {
        let unsynced = self.tail.lock().take_unsynced();
        let files = unsynced.files.values().try_for_each(|file| file.sync_data());
        let names =
            || if unsynced.names { self.segments.disk.sync_directory(&self.segments.directory) } else { Ok(()) };
        if let Err(error) = files.and_then(|()| names()) {
            // Nobody knows what is on the disk now, and asking again would only seem to succeed.
            boot::forget(self.segments.disk.as_ref(), &self.directory);
            self.gate.fail(format!("a sync of the block store failed: {error}; the server must stop").into());
            return;
        }
        self.gate.succeeded(unsynced.sequence);
        if let Err(error) = self.tail.lock().append_mark(&self.segments, unsynced.sequence) {
            tracing::debug!(%error, "cannot write a durable mark; the next start reads more");
        }
    }

    fn checkpoint(&self) -> Result<(), StoreError> {
        self.bury();
        self.flush(true)
    }

    /// Voids the records that nothing needs any more, not even after a power cut. Has what replaced or deleted the others made
    /// durable, for the next time.
    fn bury(&self) -> usize {
        let durable = self.gate.durable();
        let ready: Vec<_> = {
            let mut graves = self.graves.lock();
            let ready = graves.extract_if(.., |(sequence, ..)| *sequence <= durable).collect();
            graves.last().into_iter().for_each(|(sequence, ..)| self.gate.request(Ticket(*sequence)));
            ready
        };
        ready.iter().for_each(|(_, hash, entry)| self.void(hash, entry));
        ready.len()
    }

    /// Moves the index's changes into redb; if `durable`, all of it onto stable storage after the segments.
    fn flush(&self, durable: bool) -> Result<(), StoreError> {
        self.check_running()?;
        let _one_at_a_time = self.flushing.lock();
        let numbers =
            if durable { list_segments(self.segments.disk.as_ref(), &self.segments.directory)? } else { Vec::new() };
        let (batch, ticket, dead) = {
            let tail = self.tail.lock();
            let older: Vec<u64> = numbers.into_iter().filter(|number| *number < tail.end().segment).collect();
            (self.index.begin(self.saved(&tail)), Ticket(tail.sequence()), self.index.dead_segments(&older))
        };
        if durable {
            self.wait_durable(ticket)?;
        }
        self.index.commit(&batch, durable).map_err(|error| self.index_failed(&error))?;
        dead.into_iter().for_each(|number| self.remove_segment(number));
        Ok(())
    }

    fn saved(&self, tail: &Tail) -> Saved {
        Saved {
            covered: tail.end(),
            sequence: tail.sequence(),
            corrupt_found: self.counters.corrupt_found.load(Relaxed),
            repaired: self.counters.repaired.load(Relaxed),
            quarantined: self.counters.quarantined.load(Relaxed),
        }
    }

    fn remove_segment(&self, number: u64) {
        match self.segments.remove(number) {
            Ok(()) => {
                self.index.forget_segment(number);
                tracing::info!(segment = number, "removed a segment in which nothing lived");
            }
            Err(error) => tracing::warn!(segment = number, %error, "cannot remove a dead segment"),
        }
    }
}

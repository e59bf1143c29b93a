//! Where each block is: a redb table, with what is newer in memory before it.
//!
//! The index may lag behind the segments, never the other way round: a commit to stable storage happens only when
//! the segments up to its `covered` point are on stable storage. What is missing is found by scanning from there.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use holdfast_common::{BlockHash, Epoch, disk::Disk};
use parking_lot::{Mutex, RwLock};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};

use super::format::{Place, RECORD_HEADER_LENGTH, array_at, tree_length, u32_at, u64_at};
use crate::{
    ballast::Ballast,
    redb_file::{self, FirstFailure, Freeze, RedbFile},
};

const BLOCKS: TableDefinition<'_, &[u8; 32], &[u8; 28]> = TableDefinition::new("blocks");
const USAGE: TableDefinition<'_, u64, (u64, u64)> = TableDefinition::new("usage");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
const FORMAT: u64 = 1;

pub(super) const INDEX_FILE: &str = "index.redb";

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) place: Place,
    pub(super) length: u32,
    pub(super) epoch: Epoch,
}

impl Entry {
    fn encode(&self) -> [u8; 28] {
        let mut bytes = [0; 28];
        bytes[..8].copy_from_slice(&self.place.segment.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.place.offset.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.length.to_le_bytes());
        bytes[20..].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; 28]) -> Self {
        let place = Place { segment: u64_at(bytes, 0), offset: u64_at(bytes, 8) };
        Self { place, length: u32_at(bytes, 16), epoch: Epoch(u64::from_le_bytes(array_at(bytes, 20))) }
    }

    /// Bytes of its record before the padding.
    pub(super) fn record_length(&self) -> u64 {
        RECORD_HEADER_LENGTH as u64 + u64::from(tree_length(self.length)) + u64::from(self.length)
    }
}

/// What lives in one segment, or in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) blocks: u64,
    /// Of payload.
    pub(super) bytes: u64,
}

/// Numbers that survive restarts, kept beside the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Saved {
    /// Records before this are in the index.
    pub(super) covered: Place,
    /// Of the last record before `covered`; it is on stable storage when this is.
    pub(super) sequence: u64,
    pub(super) corrupt_found: u64,
    pub(super) repaired: u64,
    pub(super) quarantined: u64,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum IndexError {
    #[error("the block index failed: {0}")]
    Failed(String),
    /// At the start.
    #[error("there is no space for the block index: {0}")]
    Full(String),
}

fn failed(error: impl Into<redb::Error>) -> IndexError {
    IndexError::Failed(error.into().to_string())
}

/// A damaged file must not take the server with it.
fn guarded<T>(work: impl FnOnce() -> Result<T, IndexError>) -> Result<T, IndexError> {
    redb_file::guarded(work).unwrap_or_else(|panic| Err(IndexError::Failed(format!("its file is damaged ({panic})"))))
}

type Changes = BTreeMap<BlockHash, Option<Entry>>;

#[derive(Debug, Default)]
struct Overlay {
    /// Newer than everything else. `None`: deleted.
    active: Changes,
    /// On its way into redb, and older than `active`.
    flushing: Arc<Changes>,
}

#[derive(Debug, Default)]
struct UsageMap {
    segments: BTreeMap<u64, Usage>,
    changed: BTreeSet<u64>,
    total: Usage,
}

impl UsageMap {
    fn add(&mut self, entry: &Entry) {
        let usage = self.segments.entry(entry.place.segment).or_default();
        usage.blocks += 1;
        usage.bytes += u64::from(entry.length);
        self.total.blocks += 1;
        self.total.bytes += u64::from(entry.length);
        self.changed.insert(entry.place.segment);
    }

    fn subtract(&mut self, entry: &Entry) {
        let usage = self.segments.entry(entry.place.segment).or_default();
        for usage in [usage, &mut self.total] {
            usage.blocks = usage.blocks.saturating_sub(1);
            usage.bytes = usage.bytes.saturating_sub(u64::from(entry.length));
        }
        self.changed.insert(entry.place.segment);
    }
}

#[derive(Debug)]
pub(super) struct Index {
    database: Database,
    overlay: RwLock<Overlay>,
    usage: Mutex<UsageMap>,
    /// redb holds commits that must not become durable yet.
    ahead: AtomicBool,
    freeze: Freeze,
    first_failure: Arc<FirstFailure>,
}

/// Dropping redb's database would make its last commits durable, before the segments that they speak of.
impl Drop for Index {
    fn drop(&mut self) {
        if self.ahead.load(SeqCst) {
            self.freeze.freeze();
        }
    }
}

/// Changes on their way into redb.
#[derive(Debug)]
pub(super) struct Batch {
    changes: Arc<Changes>,
    usage: Vec<(u64, Usage)>,
    saved: Saved,
}

impl Index {
    /// Opens the index in `directory`, or makes an empty one.
    pub(super) fn open(
        disk: &dyn Disk,
        directory: &Path,
        cache_bytes: u64,
        ballast: &Arc<Ballast>,
    ) -> io::Result<Result<(Self, Saved), IndexError>> {
        let file = disk.open(&directory.join(INDEX_FILE), true)?;
        let file = RedbFile::new(file).with_ballast(ballast);
        let (freeze, first_failure) = (file.freeze_handle(), file.first_failure());
        let why = Arc::clone(&first_failure);
        let opened = guarded(move || {
            let cache = redb_file::cache_size(cache_bytes);
            let database = redb::Builder::new().set_cache_size(cache).create_with_backend(file).map_err(failed)?;
            let (saved, usage) = load(&database)?;
            let (overlay, usage, ahead) = (RwLock::default(), Mutex::new(usage), AtomicBool::new(false));
            Ok((Self { database, overlay, usage, ahead, freeze, first_failure }, saved))
        });
        Ok(opened.map_err(|error| if why.was_full() { IndexError::Full(error.to_string()) } else { error }))
    }

    /// It failed for want of space, and its file is what the last durable commit made it.
    pub(super) fn was_full(&self) -> bool {
        self.first_failure.was_full()
    }

    pub(super) fn get(&self, hash: &BlockHash) -> Result<Option<Entry>, IndexError> {
        {
            let overlay = self.overlay.read();
            if let Some(change) = overlay.active.get(hash).or_else(|| overlay.flushing.get(hash)) {
                return Ok(*change);
            }
        }
        guarded(|| {
            let read = self.database.begin_read().map_err(failed)?;
            let blocks = read.open_table(BLOCKS).map_err(failed)?;
            Ok(blocks.get(&hash.0).map_err(failed)?.map(|value| Entry::decode(value.value())))
        })
    }

    /// Points `hash` to `entry`, or to nothing, and returns where it pointed before.
    /// The caller holds the lock of the tail: changes are in the order of the records.
    pub(super) fn set(&self, hash: BlockHash, entry: Option<Entry>) -> Result<Option<Entry>, IndexError> {
        let before = self.get(&hash)?;
        self.replace(hash, before, entry);
        Ok(before)
    }

    /// As `set`, by who knows that `hash` points to `before`.
    pub(super) fn replace(&self, hash: BlockHash, before: Option<Entry>, entry: Option<Entry>) {
        let mut usage = self.usage.lock();
        before.iter().for_each(|entry| usage.subtract(entry));
        entry.iter().for_each(|entry| usage.add(entry));
        self.overlay.write().active.insert(hash, entry);
    }

    /// Hashes after `after`, in order, at most `count`, each with its stamp.
    pub(super) fn list(&self, after: Option<BlockHash>, count: usize) -> Result<Vec<(BlockHash, Epoch)>, IndexError> {
        // The overlay first: what moves from it into redb meanwhile is met twice, not missed.
        let changes = self.changes_after(after);
        let stamp = |(hash, change): (&BlockHash, &Option<Entry>)| change.map(|entry| (*hash, entry.epoch));
        let mut hashes: BTreeMap<BlockHash, Epoch> = changes.iter().filter_map(stamp).collect();
        guarded(|| {
            let read = self.database.begin_read().map_err(failed)?;
            let blocks = read.open_table(BLOCKS).map_err(failed)?;
            let start = after.map_or([0; 32], |hash| hash.0);
            let mut found = 0;
            for row in blocks.range::<&[u8; 32]>(&start..).map_err(failed)? {
                let (hash, entry) = row.map_err(failed)?;
                let hash = BlockHash(*hash.value());
                if Some(hash) == after || changes.contains_key(&hash) {
                    continue;
                }
                hashes.insert(hash, Entry::decode(entry.value()).epoch);
                found += 1;
                if found == count {
                    break;
                }
            }
            Ok(())
        })?;
        Ok(hashes.into_iter().take(count).collect())
    }

    fn changes_after(&self, after: Option<BlockHash>) -> Changes {
        let overlay = self.overlay.read();
        let later = |hash: &BlockHash| after.is_none_or(|after| *hash > after);
        let both = overlay.flushing.iter().chain(&overlay.active);
        both.filter(|(hash, _)| later(hash)).map(|(hash, change)| (*hash, *change)).collect()
    }

    /// Changes that are only in memory and not on their way into redb.
    pub(super) fn pending(&self) -> usize {
        self.overlay.read().active.len()
    }

    pub(super) fn total(&self) -> Usage {
        self.usage.lock().total
    }

    /// Segments below `number` in which nothing lives.
    pub(super) fn dead_segments(&self, candidates: &[u64]) -> Vec<u64> {
        let usage = self.usage.lock();
        let is_dead = |number: &u64| usage.segments.get(number).is_none_or(|usage| usage.blocks == 0);
        candidates.iter().copied().filter(is_dead).collect()
    }

    /// What lives in a segment.
    pub(super) fn usage_of(&self, number: u64) -> Usage {
        self.usage.lock().segments.get(&number).copied().unwrap_or_default()
    }

    pub(super) fn forget_segment(&self, number: u64) {
        let mut usage = self.usage.lock();
        usage.segments.remove(&number);
        usage.changed.insert(number);
    }

    /// Takes all changes, to be given to `commit`. One at a time; the caller holds the lock of the tail.
    pub(super) fn begin(&self, saved: Saved) -> Batch {
        let mut overlay = self.overlay.write();
        overlay.flushing = Arc::new(std::mem::take(&mut overlay.active));
        let mut usage = self.usage.lock();
        let changed = std::mem::take(&mut usage.changed);
        let rows = changed.into_iter().map(|number| (number, usage.segments.get(&number).copied().unwrap_or_default()));
        Batch { changes: Arc::clone(&overlay.flushing), usage: rows.collect(), saved }
    }

    /// Writes `batch` into redb; `durable` only when the segments it covers are.
    pub(super) fn commit(&self, batch: &Batch, durable: bool) -> Result<(), IndexError> {
        self.ahead.store(true, SeqCst);
        guarded(|| {
            let mut write = self.database.begin_write().map_err(failed)?;
            write.set_durability(if durable { Durability::Immediate } else { Durability::None }).map_err(failed)?;
            write.set_two_phase_commit(durable);
            write.set_quick_repair(durable);
            store_batch(&write, batch)?;
            write.commit().map_err(failed)
        })?;
        self.ahead.store(!durable, SeqCst);
        self.overlay.write().flushing = Arc::default();
        Ok(())
    }
}

fn load(database: &Database) -> Result<(Saved, UsageMap), IndexError> {
    let write = database.begin_write().map_err(failed)?;
    write.open_table(BLOCKS).map_err(failed)?;
    let usage = load_usage(&write)?;
    let saved = load_saved(&write)?;
    write.commit().map_err(failed)?;
    Ok((saved, usage))
}

fn load_usage(write: &redb::WriteTransaction) -> Result<UsageMap, IndexError> {
    let table = write.open_table(USAGE).map_err(failed)?;
    let mut usage = UsageMap::default();
    for row in table.iter().map_err(failed)? {
        let (number, value) = row.map_err(failed)?;
        let (blocks, bytes) = value.value();
        usage.segments.insert(number.value(), Usage { blocks, bytes });
        usage.total.blocks = usage.total.blocks.saturating_add(blocks);
        usage.total.bytes = usage.total.bytes.saturating_add(bytes);
    }
    Ok(usage)
}

fn load_saved(write: &redb::WriteTransaction) -> Result<Saved, IndexError> {
    let mut table = write.open_table(NUMBERS).map_err(failed)?;
    let format = table.get("format").map_err(failed)?.map(|value| value.value());
    match format {
        Some(FORMAT) => {}
        Some(other) => return Err(IndexError::Failed(format!("it has format {other}, known is {FORMAT}"))),
        None => drop(table.insert("format", FORMAT).map_err(failed)?),
    }
    let number = |name: &str| Ok(table.get(name).map_err(failed)?.map_or(0, |value| value.value()));
    Ok(Saved {
        covered: Place { segment: number("covered_segment")?, offset: number("covered_offset")? },
        sequence: number("sequence")?,
        corrupt_found: number("corrupt_found")?,
        repaired: number("repaired")?,
        quarantined: number("quarantined")?,
    })
}

fn store_batch(write: &redb::WriteTransaction, batch: &Batch) -> Result<(), IndexError> {
    let mut blocks = write.open_table(BLOCKS).map_err(failed)?;
    for (hash, change) in batch.changes.iter() {
        match change {
            Some(entry) => drop(blocks.insert(&hash.0, &entry.encode()).map_err(failed)?),
            None => drop(blocks.remove(&hash.0).map_err(failed)?),
        }
    }
    let mut usage = write.open_table(USAGE).map_err(failed)?;
    for (number, row) in &batch.usage {
        match row.blocks {
            0 => drop(usage.remove(number).map_err(failed)?),
            blocks => drop(usage.insert(number, (blocks, row.bytes)).map_err(failed)?),
        }
    }
    let mut numbers = write.open_table(NUMBERS).map_err(failed)?;
    let saved = &batch.saved;
    for (name, value) in [
        ("covered_segment", saved.covered.segment),
        ("covered_offset", saved.covered.offset),
        ("sequence", saved.sequence),
        ("corrupt_found", saved.corrupt_found),
        ("repaired", saved.repaired),
        ("quarantined", saved.quarantined),
    ] {
        numbers.insert(name, value).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_frozen() {
        let entry = Entry { place: Place { segment: 1, offset: 0x0203 }, length: 4, epoch: Epoch(5) };
        let bytes = entry.encode();
        assert_eq!(bytes, [1, 0, 0, 0, 0, 0, 0, 0, 3, 2, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Entry::decode(&bytes), entry);
    }
}

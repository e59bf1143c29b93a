//! redb on the disk seam: a `StorageBackend` over any [`DiskFile`].
//!
//! It takes no lock: the data directory's lock keeps a second process out.

use std::{
    any::Any,
    cell::Cell,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use holdfast_common::disk::DiskFile;
use redb::StorageBackend;

use crate::ballast::{Ballast, is_full};

#[derive(Debug)]
pub struct RedbFile {
    file: Arc<dyn DiskFile>,
    /// After a write that failed redb does nothing any more, so it had better not hear of a full disk.
    ballast: Option<Arc<Ballast>>,
    frozen: Arc<AtomicBool>,
    first_failure: Arc<FirstFailure>,
}

/// Why a database failed. redb tells it once, to one of those who ask, and anybody else only that it has failed before.
#[derive(Debug, Default)]
pub struct FirstFailure(OnceLock<Failure>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// There was no space for a write: the file is what the last durable commit made it.
    Full,
    /// Nothing is known of the file.
    Other,
}

impl FirstFailure {
    /// It failed, and only for want of space.
    pub fn was_full(&self) -> bool {
        self.0.get() == Some(&Failure::Full)
    }

    fn note(&self, failure: Failure) {
        // The first one counts.
        self.0.get_or_init(|| failure);
    }
}

/// What redb is to be told, so that its cache takes `bytes` of memory: it counts a page of 4 KiB as that, and keeps it behind 16 bytes
/// of its own, for which the allocator gives 5 KiB.
pub fn cache_size(bytes: u64) -> usize {
    usize::try_from(bytes / 5 * 4).unwrap_or(usize::MAX)
}

/// Freezes a database's file: what its last durable commit wrote stays the truth.
///
/// Dropping a `Database` commits what was committed with `Durability::None` *durably*. Where such commits may only
/// become durable after something else did, the file must be frozen before a drop that does not come after a
/// durable commit.
#[derive(Clone, Debug)]
pub struct Freeze(Arc<AtomicBool>);

impl RedbFile {
    pub fn new(file: Arc<dyn DiskFile>) -> Self {
        Self { file, ballast: None, frozen: Arc::default(), first_failure: Arc::default() }
    }

    /// One that takes from `ballast` what a full disk refuses.
    #[must_use]
    pub fn with_ballast(self, ballast: &Arc<Ballast>) -> Self {
        Self { ballast: Some(Arc::clone(ballast)), ..self }
    }

    fn change(&self, work: impl Fn() -> io::Result<()>) -> io::Result<()> {
        self.check_frozen()?;
        let changed = match &self.ballast {
            Some(ballast) => ballast.spend(work),
            None => work(),
        };
        // Before redb hears of it, and with it everybody else.
        changed.inspect_err(|error| {
            self.first_failure.note(if is_full(error) { Failure::Full } else { Failure::Other });
        })
    }

    pub fn first_failure(&self) -> Arc<FirstFailure> {
        Arc::clone(&self.first_failure)
    }

    pub fn freeze_handle(&self) -> Freeze {
        Freeze(Arc::clone(&self.frozen))
    }

    fn check_frozen(&self) -> io::Result<()> {
        if self.frozen.load(SeqCst) { Err(io::Error::other("the database is frozen")) } else { Ok(()) }
    }
}

impl Freeze {
    /// From now on every write and sync of the database fails.
    pub fn freeze(&self) {
        self.0.store(true, SeqCst);
    }
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on a database whose file may be damaged, and returns what it panicked with, if it did: redb checks no
/// checksums when it reads, and may panic on what it finds.
pub fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let outer = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(outer);
    result.map_err(|panic| panic_text(panic.as_ref()))
}

/// Whether a panic on this thread, now, is contained by [`guarded`]: a panic hook must not end the process for it.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no reason given").to_owned()
}

impl StorageBackend for RedbFile {
    fn len(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset).inspect_err(|_| self.first_failure.note(Failure::Other))
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.change(|| self.file.set_length(length))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.check_frozen()?;
        self.file.sync_data().inspect_err(|_| self.first_failure.note(Failure::Other))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(|| self.file.write_all_at(data, offset))
    }
}

#[cfg(test)]
mod tests {
    use holdfast_common::disk::{Disk, RealDisk};
    use redb::{ReadableDatabase, TableDefinition};

    use super::*;

    #[test]
    fn a_panic_under_guard_is_an_answer() {
        assert_eq!(guarded(|| 1), Ok(1));
        assert!(!is_guarded());
        let said = guarded(|| {
            if is_guarded() {
                panic!("page {}", 7)
            }
        });
        assert_eq!(said, Err("page 7".to_owned()));
        assert!(!is_guarded());
    }

    #[test]
    fn a_frozen_database_keeps_what_was_committed_durably() {
        const TABLE: TableDefinition<u64, u64> = TableDefinition::new("t");
        let directory = tempfile::tempdir().unwrap();
        let open = || {
            let file = RedbFile::new(RealDisk.open(&directory.path().join("db"), true).unwrap());
            let freeze = file.freeze_handle();
            (redb::Builder::new().create_with_backend(file).unwrap(), freeze)
        };
        let (database, freeze) = open();
        for (key, durability) in [(1, redb::Durability::Immediate), (2, redb::Durability::None)] {
            let mut write = database.begin_write().unwrap();
            write.set_durability(durability).unwrap();
            write.open_table(TABLE).unwrap().insert(key, 0).unwrap();
            write.commit().unwrap();
        }
        freeze.freeze();
        drop(database);
        let (database, _) = open();
        let table = database.begin_read().unwrap().open_table(TABLE).unwrap();
        assert!(table.get(1).unwrap().is_some());
        assert!(table.get(2).unwrap().is_none());
    }

    #[test]
    fn a_database_survives_being_closed_and_opened() {
        const TABLE: TableDefinition<u64, u64> = TableDefinition::new("t");
        let directory = tempfile::tempdir().unwrap();
        let open = || {
            let file = RealDisk.open(&directory.path().join("db"), true).unwrap();
            redb::Builder::new().create_with_backend(RedbFile::new(file)).unwrap()
        };
        let database = open();
        let write = database.begin_write().unwrap();
        write.open_table(TABLE).unwrap().insert(1, 2).unwrap();
        write.commit().unwrap();
        drop(database);
        let database = open();
        let read = database.begin_read().unwrap();
        assert_eq!(read.open_table(TABLE).unwrap().get(1).unwrap().map(|value| value.value()), Some(2));
    }
}

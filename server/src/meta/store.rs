//! The tables on a disk: opened at the last checkpoint, brought up to date by the log.

use std::{io, mem::ManuallyDrop, path::Path, sync::Arc};

use holdfast_common::{
    Position,
    disk::{Disk, DiskFile},
};
use parking_lot::Mutex;
use redb::{Database, Durability, ReadableDatabase, WriteTransaction};

use super::state::{self, Newest, Rows, StorageError, Tables, View, holdings::Holdings};
use crate::{
    ballast::Ballast,
    redb_file::{RedbFile, cache_size},
};

#[derive(Debug, thiserror::Error)]
pub enum OpenStoreError {
    #[error("cannot open the metadata database {path}: {source}")]
    Open { path: std::path::PathBuf, source: std::io::Error },
    #[error("the metadata database {path} cannot be used: {source}")]
    Unusable { path: std::path::PathBuf, source: StorageError },
}

/// Of a database that is made and closed.
const DRAFT_CACHE_BYTES: u64 = 1 << 20;

/// The database. Never closed by being dropped: redb would then make durable what no barrier has covered (I3).
#[derive(Debug)]
pub struct Store {
    database: ManuallyDrop<Database>,
    newest: Mutex<State>,
}

/// Where the newest rows are. What is written stays in one transaction until somebody needs a view of all of it: committing costs
/// several times what a small change does, and keeps nothing that the log does not.
#[expect(clippy::large_enum_variant, reason = "there is one")]
enum State {
    Committed(Arc<View>),
    /// Holds changes that no view shows yet.
    Open(WriteTransaction, Holdings),
    /// Changes were under way when it failed, and are not whole.
    Failed,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Committed(_) => "Committed",
            Self::Open(..) => "Open",
            Self::Failed => "Failed",
        })
    }
}

fn failed() -> StorageError {
    StorageError::Damaged("a change of it failed half-way".into())
}

impl Store {
    /// Opens the database at its last checkpoint, or makes it. `compact`: gives space back to the disk that deleted rows have left
    /// in its file; as long as it takes to move the rest.
    /// What a full disk refuses is taken from `ballast`.
    pub fn open(
        disk: &dyn Disk,
        path: &Path,
        cache_bytes: u64,
        compact: bool,
        ballast: Option<&Arc<Ballast>>,
    ) -> Result<Self, OpenStoreError> {
        let failed = |source| OpenStoreError::Open { path: path.to_owned(), source };
        match disk.open(path, false) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::make(disk, path)?,
            Err(error) => return Err(failed(error)),
        }
        let file = disk.open(path, false).map_err(failed)?;
        Self::on(file, cache_bytes, compact, ballast)
            .map_err(|source| OpenStoreError::Unusable { path: path.to_owned(), source })
    }

    /// An empty database under its name, whole or not at all: redb cannot open one whose first writes were cut short.
    fn make(disk: &dyn Disk, path: &Path) -> Result<(), OpenStoreError> {
        let failed = |source| OpenStoreError::Open { path: path.to_owned(), source };
        let draft = path.with_extension("new");
        let file = disk.open(&draft, true).map_err(failed)?;
        file.set_length(0).map_err(failed)?;
        Self::on(file, DRAFT_CACHE_BYTES, false, None)
            .map_err(|source| OpenStoreError::Unusable { path: draft.clone(), source })?;
        disk.rename(&draft, path).map_err(failed)?;
        disk.sync_directory(path.parent().unwrap_or(Path::new("/"))).map_err(failed)
    }

    fn on(
        file: Arc<dyn DiskFile>,
        cache_bytes: u64,
        compact: bool,
        ballast: Option<&Arc<Ballast>>,
    ) -> Result<Self, StorageError> {
        let file = RedbFile::new(file);
        let file = match ballast {
            Some(ballast) => file.with_ballast(ballast),
            None => file,
        };
        let mut database = Database::builder().set_cache_size(cache_size(cache_bytes)).create_with_backend(file)?;
        if compact {
            database.compact()?;
        }
        commit_durably(&database, state::initialize)?;
        let newest = Mutex::new(State::Committed(view_of(&database)?));
        Ok(Self { database: ManuallyDrop::new(database), newest })
    }

    /// Runs `work` on the newest rows. What it changes is seen by all who ask after this returns. An error is the end: half of
    /// the work may have been done, and nothing is answered any more.
    pub fn write_visible<T, E: From<StorageError>>(
        &self,
        work: impl FnOnce(&mut Tables<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut newest = self.newest.lock();
        let (transaction, holdings) = match std::mem::replace(&mut *newest, State::Failed) {
            State::Open(transaction, holdings) => (transaction, holdings),
            State::Committed(_) => (self.begin()?, Holdings::default()),
            State::Failed => return Err(failed().into()),
        };
        let mut tables = Tables::resume(&transaction, holdings)?;
        let value = work(&mut tables)?;
        let holdings = tables.pause()?;
        *newest = State::Open(transaction, holdings);
        Ok(value)
    }

    fn begin(&self) -> Result<WriteTransaction, StorageError> {
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(Durability::None)?;
        Ok(transaction)
    }

    /// Asks the newest rows one short question. Nothing is committed for it, and nobody else is served meanwhile: what takes longer
    /// wants a [`Store::view`].
    pub fn ask<T>(&self, question: impl FnOnce(&Newest<'_>) -> Result<T, StorageError>) -> Result<T, StorageError> {
        let newest = self.newest.lock();
        match &*newest {
            State::Open(transaction, holdings) => question(&Newest::open(transaction, holdings)?),
            State::Committed(view) => {
                let view = Arc::clone(view);
                // What is committed can be read beside a checkpoint, and beside anything else.
                drop(newest);
                question(&Newest::committed(&view))
            }
            State::Failed => Err(failed()),
        }
    }

    /// The newest rows as they are now, for as long as they are needed. Commits what is open.
    pub fn view(&self) -> Result<Arc<View>, StorageError> {
        let mut newest = self.newest.lock();
        let view = match std::mem::replace(&mut *newest, State::Failed) {
            State::Committed(view) => view,
            State::Open(transaction, holdings) => {
                Tables::resume(&transaction, holdings)?.finish()?;
                transaction.commit()?;
                view_of(&self.database)?
            }
            State::Failed => return Err(failed()),
        };
        *newest = State::Committed(Arc::clone(&view));
        Ok(view)
    }

    /// The position of the last entry that was applied.
    pub fn applied(&self) -> Result<Position, StorageError> {
        self.ask(|rows| Ok(rows.counters().position))
    }

    /// Puts the state on stable storage. Only when a barrier has covered all of it, and while nobody writes. Waits for the disk;
    /// meanwhile questions are answered.
    pub fn checkpoint(&self) -> Result<(), StorageError> {
        let _committed = self.view()?;
        commit_durably(&self.database, |_| Ok(()))
    }
}

fn view_of(database: &Database) -> Result<Arc<View>, StorageError> {
    Ok(Arc::new(View::open(&database.begin_read()?)?))
}

fn commit_durably(
    database: &Database,
    work: impl FnOnce(&mut Tables<'_>) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    // Names and attributes are chosen by users: a torn commit must not be able to look whole.
    transaction.set_two_phase_commit(true);
    transaction.set_quick_repair(true);
    let mut tables = Tables::open(&transaction)?;
    work(&mut tables)?;
    tables.finish()?;
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use holdfast_common::{BlockHash, Epoch, ServerId, inventory::BucketDigest};

    use super::{
        super::{memory_disk::MemoryDisk, state::rows::BlockRow},
        *,
    };

    const PATH: &str = "/meta.redb";

    fn store(disk: &MemoryDisk) -> Store {
        Store::open(disk, Path::new(PATH), 1 << 20, false, None).unwrap()
    }

    fn count_inodes(store: &Store, more: u64) {
        let work = |tables: &mut Tables<'_>| {
            tables.counters.inodes += more;
            Ok::<(), StorageError>(())
        };
        store.write_visible(work).unwrap();
    }

    fn asked(store: &Store) -> u64 {
        store.ask(|rows| Ok(rows.counters().inodes)).unwrap()
    }

    #[test]
    fn a_question_sees_what_is_newest_and_a_view_holds_still() {
        let disk = MemoryDisk::new();
        let store = store(&disk);
        let first = asked(&store);
        count_inodes(&store, 1);
        assert_eq!(asked(&store), first + 1, "in the open transaction");
        let view = store.view().unwrap();
        count_inodes(&store, 1);
        assert_eq!((view.counters().inodes, asked(&store)), (first + 1, first + 2));
        assert_eq!(store.view().unwrap().counters().inodes, first + 2);
        assert_eq!(asked(&store), first + 2, "committed");
    }

    #[test]
    fn what_servers_are_on_record_for_is_known_at_every_moment() {
        let (store, server, hash) = (store(&MemoryDisk::new()), ServerId(1), BlockHash([3; 32]));
        let held = |hash: BlockHash| {
            let row = BlockRow { holders: vec![server], ..BlockRow::new(1, Epoch(0)) };
            store.write_visible(|tables| state::blocks::store(tables, hash, None, row)).unwrap();
        };
        let asked = || store.ask(|rows| rows.holding(server, 3)).unwrap();
        held(hash);
        assert_eq!(asked(), BucketDigest::of(&[hash]), "in the open transaction");
        let mut other = hash;
        other.0[31] = 9;
        held(other);
        let both = BucketDigest::of(&[hash, other]);
        assert_eq!(asked(), both, "in the next batch of it");
        assert_eq!(store.view().unwrap().holding(server, 3).unwrap(), both);
        assert_eq!(asked(), both, "committed");
        other.0[31] = 10;
        held(other);
        assert_eq!(asked().blocks, 3, "after the commit");
    }

    #[test]
    fn what_no_checkpoint_has_covered_is_not_in_the_tables_after_a_kill() {
        let disk = MemoryDisk::new();
        let killed = store(&disk);
        count_inodes(&killed, 5);
        killed.checkpoint().unwrap();
        let covered = asked(&killed);
        count_inodes(&killed, 7);
        let _committed = killed.view().unwrap();
        count_inodes(&killed, 9);
        assert_eq!(asked(&store(&disk.process_death())), covered);
    }

    #[test]
    fn half_of_a_change_is_shown_to_nobody() {
        let disk = MemoryDisk::new();
        let store = store(&disk);
        count_inodes(&store, 1);
        let failed: Result<(), StorageError> = store.write_visible(|tables| {
            tables.counters.inodes += 1;
            Err(StorageError::Damaged("a row".into()))
        });
        assert!(failed.is_err());
        assert!(store.ask(|_| Ok(())).is_err() && store.view().is_err() && store.checkpoint().is_err());
        assert!(store.write_visible(|_| Ok::<(), StorageError>(())).is_err());
    }
}

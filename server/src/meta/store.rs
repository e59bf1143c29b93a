//! The tables on a disk: opened at the last checkpoint, brought up to date by the log.

use std::{io, mem::ManuallyDrop, path::Path, sync::Arc};

use holdfast_common::{
    Position,
    disk::{Disk, DiskFile},
};
use parking_lot::Mutex;
use redb::{Database, Durability, ReadableDatabase};

use super::state::{self, Rows, StorageError, Tables, View};
use crate::redb_file::RedbFile;

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
    /// A read transaction of the newest state, until the next commit.
    view: Mutex<Option<Arc<View>>>,
}

impl Store {
    /// Opens the database at its last checkpoint, or makes it. `compact`: gives space back to the disk that deleted rows have left
    /// in its file; as long as it takes to move the rest.
    pub fn open(disk: &dyn Disk, path: &Path, cache_bytes: u64, compact: bool) -> Result<Self, OpenStoreError> {
        let failed = |source| OpenStoreError::Open { path: path.to_owned(), source };
        match disk.open(path, false) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::make(disk, path)?,
            Err(error) => return Err(failed(error)),
        }
        let file = disk.open(path, false).map_err(failed)?;
        Self::on(file, cache_bytes, compact)
            .map_err(|source| OpenStoreError::Unusable { path: path.to_owned(), source })
    }

    /// An empty database under its name, whole or not at all: redb cannot open one whose first writes were cut short.
    fn make(disk: &dyn Disk, path: &Path) -> Result<(), OpenStoreError> {
        let failed = |source| OpenStoreError::Open { path: path.to_owned(), source };
        let draft = path.with_extension("new");
        let file = disk.open(&draft, true).map_err(failed)?;
        file.set_length(0).map_err(failed)?;
        Self::on(file, DRAFT_CACHE_BYTES, false)
            .map_err(|source| OpenStoreError::Unusable { path: draft.clone(), source })?;
        disk.rename(&draft, path).map_err(failed)?;
        disk.sync_directory(path.parent().unwrap_or(Path::new("/"))).map_err(failed)
    }

    fn on(file: Arc<dyn DiskFile>, cache_bytes: u64, compact: bool) -> Result<Self, StorageError> {
        let cache = usize::try_from(cache_bytes).unwrap_or(usize::MAX);
        let mut database = Database::builder().set_cache_size(cache).create_with_backend(RedbFile::new(file))?;
        if compact {
            database.compact()?;
        }
        let store = Self { database: ManuallyDrop::new(database), view: Mutex::new(None) };
        store.write(Durability::Immediate, state::initialize)?;
        Ok(store)
    }

    /// Runs `work` in one transaction, which is visible to new views when this returns.
    pub fn write_visible<T, E: From<StorageError>>(
        &self,
        work: impl FnOnce(&mut Tables<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        self.write(Durability::None, work)
    }

    fn write<T, E: From<StorageError>>(
        &self,
        durability: Durability,
        work: impl FnOnce(&mut Tables<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut transaction = self.database.begin_write().map_err(StorageError::from)?;
        transaction.set_durability(durability).map_err(StorageError::from)?;
        if matches!(durability, Durability::Immediate) {
            // Names and attributes are chosen by users: a torn commit must not be able to look whole.
            transaction.set_two_phase_commit(true);
            transaction.set_quick_repair(true);
        }
        let mut tables = Tables::open(&transaction)?;
        let value = work(&mut tables)?;
        tables.finish()?;
        *self.view.lock() = None;
        transaction.commit().map_err(StorageError::from)?;
        *self.view.lock() = None;
        Ok(value)
    }

    /// The newest state.
    pub fn view(&self) -> Result<Arc<View>, StorageError> {
        let mut view = self.view.lock();
        if let Some(newest) = &*view {
            return Ok(Arc::clone(newest));
        }
        let newest = Arc::new(View::open(&self.database.begin_read()?)?);
        *view = Some(Arc::clone(&newest));
        Ok(newest)
    }

    /// The position of the last entry that was applied.
    pub fn applied(&self) -> Result<Position, StorageError> {
        Ok(self.view()?.counters().position)
    }

    /// Puts the state on stable storage. Only when a barrier has covered all of it. Waits for the disk.
    pub fn checkpoint(&self) -> Result<(), StorageError> {
        self.write(Durability::Immediate, |_| Ok(()))
    }
}

//! Makes a metadata server's directory from a backup.
//!
//! The backup is older than what was lost, so that numbers which it knows nothing of may be in use: of inodes, sessions and epochs of
//! garbage. All of them go on far beyond. Blocks that have been deleted since are missing then, and found by comparing; blocks that came
//! since are copies that nobody knows, and go as garbage.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
};

use holdfast_common::{ClusterId, Position, disk::Disk};

use super::{
    backup::{BLOCKS, END, HASH_LENGTH, HEADER_LENGTH, MAGIC, ROW_HEADER_LENGTH, STATE, TRAILER_LENGTH, TREE, VERSION},
    server::DATABASE,
    state::{StorageError, holdings, rows::Counters, tables::key, violations::violations},
    store::{OpenStoreError, Store},
};

/// What may have been given out since the backup, and is not to be given out again.
const NUMBERS_LOST: u64 = 1 << 40;
/// Certificates that may have been issued since.
const NODES_LOST: u32 = 1 << 16;
/// Rows in one transaction, and their bytes.
const BATCH: usize = 64 << 10;
const BATCH_BYTES: usize = 16 << 20;
/// Bytes of a key and of a row: longer ones are not ours.
const KEY_LENGTH_MAX: usize = 4096;
const ROW_LENGTH_MAX: usize = 1 << 20;
/// Sentences about what is wrong with the rows.
const VIOLATIONS_MAX: usize = 10;
const LOG_DIRECTORY: &str = "log";

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("the backup {path} cannot be read: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not a whole backup: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error("{path} is a backup of cluster {found}, not of {expected}")]
    OtherCluster { path: PathBuf, found: ClusterId, expected: ClusterId },
    #[error("there is metadata in {path} already: move it away first")]
    Occupied { path: PathBuf },
    #[error("{path} cannot be used: {source}")]
    Disk { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Store(#[from] OpenStoreError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("the rows of the backup do not go together (--unchecked restores them as they are): {}", .0.join("; "))]
    Unsound(Vec<String>),
}

/// What a backup holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    pub position: Position,
    /// When it was taken, in seconds since 1970.
    pub taken_secs: i64,
    pub rows: u64,
}

/// How to restore.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Memory for the tables.
    pub cache_bytes: u64,
    /// Check every invariant of what was restored, which takes longer.
    pub check: bool,
}

struct Source {
    path: PathBuf,
    file: BufReader<File>,
}

/// Fills `directory`, which belongs to a metadata server of `cluster` and holds no metadata, from the backup `path`.
pub fn restore(
    path: &Path,
    disk: &dyn Disk,
    directory: &Path,
    cluster: ClusterId,
    options: Options,
) -> Result<Contents, RestoreError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| RestoreError::Disk { path, source }
    };
    let (database, log) = (directory.join(DATABASE), directory.join(LOG_DIRECTORY));
    let has_log = disk.list(&log).is_ok_and(|entries| !entries.is_empty());
    if has_log || disk.open(&database, false).is_ok() {
        return Err(RestoreError::Occupied { path: directory.to_owned() });
    }
    check_hash(path)?;
    let mut source = Source::open(path)?;
    let (found, mut contents) = source.header()?;
    if found != cluster {
        return Err(RestoreError::OtherCluster { path: path.to_owned(), found, expected: cluster });
    }
    // Under its name only when it is whole.
    let draft = database.with_added_extension("restored");
    if disk.open(&draft, false).is_ok() {
        disk.remove(&draft).map_err(failed(&draft))?;
    }
    let store = Store::open(disk, &draft, options.cache_bytes, false, None)?;
    contents.rows = source.rows_into(&store)?;
    store.write_visible(holdings::adopt)?;
    if options.check {
        let found = violations(&*store.view()?, VIOLATIONS_MAX)?;
        if !found.is_empty() {
            return Err(RestoreError::Unsound(found));
        }
    }
    store.checkpoint()?;
    disk.rename(&draft, &database).map_err(failed(&database))?;
    disk.sync_directory(directory).map_err(failed(directory))?;
    Ok(contents)
}

/// Before anything is made of it.
fn check_hash(path: &Path) -> Result<(), RestoreError> {
    let read = |source| RestoreError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(read)?;
    let length = file.metadata().map_err(read)?.len();
    let damaged = |reason: &str| RestoreError::Damaged { path: path.to_owned(), reason: reason.to_owned() };
    let hashed = length.checked_sub(HASH_LENGTH as u64).filter(|left| *left >= (HEADER_LENGTH + TRAILER_LENGTH) as u64);
    let hashed = hashed.ok_or_else(|| damaged("it is too short"))?;
    let mut file = BufReader::with_capacity(1 << 20, file);
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader((&mut file).take(hashed)).map_err(read)?;
    let mut hash = [0; HASH_LENGTH];
    file.read_exact(&mut hash).map_err(read)?;
    if *hasher.finalize().as_bytes() == hash { Ok(()) } else { Err(damaged("its hash is another one")) }
}

impl Source {
    fn open(path: &Path) -> Result<Self, RestoreError> {
        let read = |source| RestoreError::Read { path: path.to_owned(), source };
        Ok(Self { path: path.to_owned(), file: BufReader::with_capacity(1 << 20, File::open(path).map_err(read)?) })
    }

    fn damaged(&self, reason: impl Into<String>) -> RestoreError {
        RestoreError::Damaged { path: self.path.clone(), reason: reason.into() }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], RestoreError> {
        let mut bytes = [0; N];
        let read = self.file.read_exact(&mut bytes);
        read.map_err(|source| RestoreError::Read { path: self.path.clone(), source })?;
        Ok(bytes)
    }

    fn bytes(&mut self, length: usize) -> Result<Vec<u8>, RestoreError> {
        let mut bytes = vec![0; length];
        let read = self.file.read_exact(&mut bytes);
        read.map_err(|source| RestoreError::Read { path: self.path.clone(), source })?;
        Ok(bytes)
    }

    fn header(&mut self) -> Result<(ClusterId, Contents), RestoreError> {
        if self.array::<8>()? != *MAGIC {
            return Err(self.damaged("it does not begin as one"));
        }
        let version = u32::from_le_bytes(self.array()?);
        if version != VERSION {
            return Err(self.damaged(format!("its version is {version}, and {VERSION} is known")));
        }
        let cluster = ClusterId(self.array()?);
        let position = Position(u64::from_le_bytes(self.array()?));
        let taken_secs = i64::from_le_bytes(self.array()?);
        Ok((cluster, Contents { position, taken_secs, rows: 0 }))
    }

    /// Puts every row into `store`. Returns how many there are.
    fn rows_into(&mut self, store: &Store) -> Result<u64, RestoreError> {
        let mut rows = 0;
        loop {
            let (batch, end) = self.batch()?;
            rows += batch.len() as u64;
            store.write_visible(|tables| {
                for (table, key, row) in &batch {
                    match *table {
                        TREE => tables.put_tree(key, row)?,
                        BLOCKS => tables.put_blocks(key, row)?,
                        STATE if *key == key::counters() => tables.counters = beyond(Counters::decode(row)?),
                        _ => tables.put_state(key, row)?,
                    }
                }
                Ok::<(), StorageError>(())
            })?;
            if let Some(count) = end {
                return if count == rows { Ok(rows) } else { Err(self.damaged("rows are missing")) };
            }
        }
    }

    /// The next rows, and at the end how many there have to be.
    fn batch(&mut self) -> Result<(Vec<Row>, Option<u64>), RestoreError> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < BATCH && bytes < BATCH_BYTES {
            let [table] = self.array()?;
            if table == END {
                return Ok((batch, Some(u64::from_le_bytes(self.array()?))));
            }
            let lengths: [u8; ROW_HEADER_LENGTH - 1] = self.array()?;
            let (key, row) = lengths.split_at(2);
            let length = |bytes: &[u8]| bytes.iter().rev().fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte));
            let (key, row) = (length(key), length(row));
            if table > STATE || key > KEY_LENGTH_MAX || row > ROW_LENGTH_MAX {
                return Err(self.damaged("a row makes no sense"));
            }
            bytes += key + row;
            batch.push((table, self.bytes(key)?, self.bytes(row)?));
        }
        Ok((batch, None))
    }
}

/// Table, key and value.
type Row = (u8, Vec<u8>, Vec<u8>);

/// Goes on where nothing was given out before the loss.
fn beyond(mut counters: Counters) -> Counters {
    // A mount that lives on has heard of durable changes that the backup does not know.
    counters.position.0 += NUMBERS_LOST;
    counters.ino_next += NUMBERS_LOST;
    counters.session_next += NUMBERS_LOST;
    counters.epoch.0 += NUMBERS_LOST;
    counters.node_next = counters.node_next.map(|next| next + NODES_LOST);
    counters
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use holdfast_common::{Ino, Kind, Time, disk::RealDisk};

    use super::{
        super::{
            backup::Backup,
            state::{
                Command, Rows,
                tests::{self, World},
            },
        },
        *,
    };

    const CLUSTER: ClusterId = ClusterId([7; 16]);
    const OPTIONS: Options = Options { cache_bytes: 1 << 20, check: true };

    /// All rows of a little world, in parts of a few bytes.
    fn a_backup(part: usize) -> (World, Vec<u8>) {
        let mut world = World::new();
        for name in ["a", "b"] {
            let directory = world.make(Ino::ROOT, name, Kind::Directory).unwrap();
            for n in 0..50 {
                world.make(directory, &format!("file {n}"), Kind::File).unwrap();
            }
        }
        world.command(Command::BeginRecovery).unwrap();
        let mut backup = Backup::new(Arc::new(world.view()), CLUSTER, Time { secs: 9, nanos: 0 });
        let mut stream = Vec::new();
        loop {
            let next = backup.next_part(part).unwrap();
            if next.is_empty() {
                return (world, stream);
            }
            stream.extend(next);
        }
    }

    fn restored(stream: &[u8], into: &Path) -> Result<Contents, RestoreError> {
        let file = into.join("a.backup");
        std::fs::write(&file, stream).unwrap();
        let directory = into.join("data");
        std::fs::create_dir_all(&directory).unwrap();
        restore(&file, &RealDisk, &directory, CLUSTER, OPTIONS)
    }

    #[test]
    fn what_is_restored_is_what_there_was_without_sessions_and_with_later_numbers() {
        let (world, stream) = a_backup(100);
        assert_eq!(stream, a_backup(1 << 20).1, "the parts make no difference");
        let directory = tempfile::tempdir().unwrap();
        let contents = restored(&stream, directory.path()).unwrap();
        let before = world.view().counters().clone();
        assert_eq!((contents.position, contents.taken_secs), (before.position, 9));
        let store =
            Store::open(&RealDisk, &directory.path().join("data").join(DATABASE), 1 << 20, false, None).unwrap();
        let view = store.view().unwrap();
        assert_eq!(*view.counters(), beyond(before));
        assert_eq!(super::super::state::session::sessions(&*view).unwrap(), []);
        assert!(!super::super::state::session::sessions(&world.view()).unwrap().is_empty());
        let dump = |stream: &[u8]| stream[HEADER_LENGTH..].to_vec();
        let mut again = Backup::new(Arc::clone(&view), CLUSTER, Time { secs: 9, nanos: 0 });
        let again = again.next_part(1 << 30).unwrap();
        assert_eq!(dump(&again).len(), dump(&stream).len());
    }

    #[test]
    fn a_backup_of_an_earlier_version_is_restored() {
        let mut world = World::new();
        let file = world.make(Ino::ROOT, "file", Kind::File).unwrap();
        world
            .commit(vec![tests::file(file, vec![(0, tests::piece(1, 0, 100, 0))], 0)], vec![tests::block(1, 100, 3)])
            .unwrap();
        tests::holdings::age(&mut world);
        let stream = Backup::new(Arc::new(world.view()), CLUSTER, Time::default()).next_part(1 << 30).unwrap();
        let directory = tempfile::tempdir().unwrap();
        // Which checks every invariant.
        restored(&stream, directory.path()).unwrap();
    }

    #[test]
    fn nothing_is_made_of_a_backup_that_is_not_whole_or_of_another_cluster_or_over_others() {
        let (_, stream) = a_backup(1 << 20);
        for place in (0..stream.len()).step_by(211).chain([stream.len() - 1]) {
            let directory = tempfile::tempdir().unwrap();
            let mut bad = stream.clone();
            bad[place] ^= 4;
            assert!(restored(&bad, directory.path()).is_err(), "bit flipped in byte {place}");
            assert!(restored(&stream[..place], directory.path()).is_err(), "cut off at {place}");
            assert!(!directory.path().join("data").join(DATABASE).exists());
        }
        let directory = tempfile::tempdir().unwrap();
        restored(&stream, directory.path()).unwrap();
        assert!(matches!(restored(&stream, directory.path()), Err(RestoreError::Occupied { .. })));
        let file = directory.path().join("a.backup");
        let other = restore(&file, &RealDisk, &directory.path().join("other"), ClusterId([8; 16]), OPTIONS);
        assert!(matches!(other, Err(RestoreError::OtherCluster { .. })));
    }
}

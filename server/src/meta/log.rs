//! The log of entries: what was applied since the last checkpoint of the tables.
//!
//! One file, `log/<first position>.log`; a checkpoint begins the next and removes it. Appended with plain writes, so
//! that an entry survives the death of the process from the moment it is answered; synced by barriers. All numbers
//! are little-endian:
//!
//! ```text
//! header  "HOLDFLOG" | version u32 | first position u64 | cluster [16] | BLAKE3 of the kernel's boot id [32] | sum [8]
//! record  "HFR1" | kind u8, 0, 0, 0 | length u32 | position u64 | sum [8] | payload
//! ```
//!
//! A sum is the first 8 bytes of the BLAKE3 of what it protects: all of the header before it; a record's head before
//! it and its payload. Kinds: 1, a batch of entries, the first of which has `position`, each behind its length (u32);
//! 2, a durable mark: everything through `position` was on stable storage, blocks included, when it was synced; its
//! payload is the number of bytes of this file that an earlier sync had covered (u64); 3, the last word of a server that
//! stopped in good order, everything through `position` being durable: without a payload.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use holdfast_common::{
    ClusterId, Position,
    disk::{Disk, DiskFile},
    wire::codec,
};

use super::state::Entry;
use crate::ballast::Ballast;

const FILE_MAGIC: &[u8; 8] = b"HOLDFLOG";
const RECORD_MAGIC: &[u8; 4] = b"HFR1";
const VERSION: u32 = 2;
const FILE_HEADER_LENGTH: usize = 8 + 4 + 8 + 16 + 32 + 8;
const RECORD_HEADER_LENGTH: usize = 4 + 4 + 4 + 8 + 8;
const KIND_ENTRIES: u8 = 1;
const KIND_MARK: u8 = 2;
const KIND_CLOSED: u8 = 3;
/// Bytes of a record's payload. A batch is cut before it gets there.
pub const RECORD_LENGTH_MAX: usize = 16 << 20;
/// Bytes read at a time where records do not matter.
const WINDOW: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("cannot {doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "the metadata log {path} is damaged at byte {offset}: {what}; restore it from a copy, or remove this data directory"
    )]
    Damaged { path: PathBuf, offset: u64, what: String },
    #[error("the metadata log {path} has format {found}, newest known is {VERSION}")]
    Version { path: PathBuf, found: u32 },
    #[error("the metadata log {path} belongs to cluster {found}, not to {expected}")]
    Cluster { path: PathBuf, found: ClusterId, expected: ClusterId },
    #[error("the metadata log {path} begins at entry {first}, and the database ends at {applied}: entries are missing")]
    Gap { path: PathBuf, first: Position, applied: Position },
    #[error("an entry does not encode: {0}")]
    Encode(codec::CodecError),
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LogError {
    move |source| LogError::Io { doing, path: path.to_owned(), source }
}

/// Written ahead of the entries.
static BLANK: [u8; 256 << 10] = [0; 256 << 10];

/// Where logs are kept, and what their headers say.
#[derive(Clone, Debug)]
pub struct LogPlace {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
    cluster: ClusterId,
    boot: [u8; 32],
    ballast: Option<Arc<Ballast>>,
}

/// A log that is being written.
#[derive(Debug)]
pub struct Log {
    place: LogPlace,
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    end: u64,
    /// Bytes that a completed sync has covered.
    synced: u64,
    /// Where the last sync began.
    synced_from: u64,
    /// The file is written up to here, if only with zeroes.
    blank_to: u64,
    next: Position,
}

/// A log as it was found.
#[derive(Debug)]
pub struct Found {
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    first: Position,
    same_boot: bool,
    /// The server stopped in good order.
    closed: bool,
    /// Bytes that count, and the last position among them.
    end: u64,
    /// Bytes that were synced for certain.
    synced: u64,
    last: Position,
    /// The last durable mark.
    pub marked: Position,
}

struct Record {
    kind: u8,
    position: Position,
    payload: Vec<u8>,
    end: u64,
}

impl Record {
    /// Bytes of the file that had been synced before this mark was written.
    fn synced(&self) -> u64 {
        u64::from_le_bytes(part(&self.payload, 0))
    }
}

impl LogPlace {
    pub fn new(disk: Arc<dyn Disk>, directory: PathBuf, cluster: ClusterId) -> Result<Self, LogError> {
        disk.create_directory(&directory).map_err(io_error("create", &directory))?;
        let boot = disk.machine_boot().map_err(io_error("learn the kernel's boot id for", &directory))?;
        Ok(Self { disk, directory, cluster, boot: *blake3::hash(boot.as_bytes()).as_bytes(), ballast: None })
    }

    /// One that takes from `ballast` what a full disk refuses.
    #[must_use]
    pub fn with_ballast(self, ballast: &Arc<Ballast>) -> Self {
        Self { ballast: Some(Arc::clone(ballast)), ..self }
    }

    fn spend<T>(&self, mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        match &self.ballast {
            Some(ballast) => ballast.spend(work),
            None => work(),
        }
    }

    /// Finds the log that goes on where the database ends, and what of it counts: all of it if the kernel has been
    /// up ever since (its page cache kept every write); else what the last durable mark covers, because an entry after
    /// it may name a block that never reached a disk (I3). Cuts a torn tail; refuses any other damage.
    pub fn find(&self, applied: Position) -> Result<Option<Found>, LogError> {
        for path in self.files()?.into_iter().rev() {
            let file = self.disk.open(&path, false).map_err(io_error("open", &path))?;
            match self.examine(path, file)? {
                Some(found) if found.first.0 > applied.0 + 1 => {
                    return Err(LogError::Gap { path: found.path, first: found.first, applied });
                }
                Some(found) => return Ok(Some(found)),
                // Its creation was cut short, so the one before it still counts.
                None => {}
            }
        }
        Ok(None)
    }

    fn files(&self) -> Result<Vec<PathBuf>, LogError> {
        let mut files = self.disk.list(&self.directory).map_err(io_error("list", &self.directory))?;
        files.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
        Ok(files)
    }

    fn path(&self, first: Position) -> PathBuf {
        self.directory.join(format!("{:020}.log", first.0))
    }

    /// `None`: the file was never finished.
    fn examine(&self, path: PathBuf, file: Arc<dyn DiskFile>) -> Result<Option<Found>, LogError> {
        let length = file.length().map_err(io_error("read", &path))?;
        let Some((first, boot)) = self.read_header(&path, &*file, length)? else { return Ok(None) };
        let same_boot = boot == self.boot;
        let (mut at, mut next, mut marked) = (FILE_HEADER_LENGTH as u64, first, None);
        let (mut synced, mut closed_at) = (at, None);
        let mut bad = None;
        while at < length && bad.is_none() {
            match read_record(&*file, at, length).map_err(io_error("read", &path))? {
                Ok(record) => match count_entries(&record, next) {
                    Ok(count) => {
                        closed_at = (record.kind == KIND_CLOSED).then_some(at);
                        at = record.end;
                        next.0 += count;
                        if record.kind == KIND_MARK {
                            marked = Some((record.position, at));
                            synced = synced.max(record.synced());
                        }
                    }
                    Err(what) => return Err(LogError::Damaged { path, offset: at, what }),
                },
                Err(what) => bad = Some(what),
            }
        }
        if let Some(what) = bad
            && goes_on_after(&*file, at, length, same_boot).map_err(io_error("read", &path))?
        {
            return Err(LogError::Damaged { path, offset: at, what });
        }
        let before = Position(first.0 - 1);
        let (last, end) = match (same_boot, marked) {
            // Without the last word: whoever goes on writing here has not stopped yet.
            (true, _) => (Position(next.0 - 1), closed_at.unwrap_or(at)),
            (false, Some((position, end))) => (position, end),
            (false, None) => (before, FILE_HEADER_LENGTH as u64),
        };
        let marked = marked.map_or(before, |(position, _)| position);
        let closed = closed_at.is_some();
        Ok(Some(Found { path, file, first, same_boot, closed, end, synced, last, marked }))
    }

    /// `None`: the header is not whole, which only a cut-short creation leaves.
    fn read_header(
        &self,
        path: &Path,
        file: &dyn DiskFile,
        length: u64,
    ) -> Result<Option<(Position, [u8; 32])>, LogError> {
        let mut header = [0; FILE_HEADER_LENGTH];
        if length < header.len() as u64 {
            return Ok(None);
        }
        file.read_exact_at(&mut header, 0).map_err(io_error("read", path))?;
        let (body, checksum) = header.split_at(FILE_HEADER_LENGTH - 8);
        if *checksum != sum(&[body]) || !body.starts_with(FILE_MAGIC) {
            let searched = goes_on_after(file, 0, length, false);
            return match searched.map_err(io_error("read", path))? {
                true => Err(LogError::Damaged { path: path.to_owned(), offset: 0, what: "its header".into() }),
                false => Ok(None),
            };
        }
        let version = u32::from_le_bytes(part(body, 8));
        let cluster = ClusterId(part(body, 20));
        if version != VERSION {
            return Err(LogError::Version { path: path.to_owned(), found: version });
        }
        if cluster != self.cluster {
            return Err(LogError::Cluster { path: path.to_owned(), found: cluster, expected: self.cluster });
        }
        Ok(Some((Position(u64::from_le_bytes(part(body, 12))), part(body, 36))))
    }

    /// Begins a log whose first entry will be `first`, durably, and removes the others: the database must have
    /// everything before `first` on stable storage.
    pub fn begin(&self, first: Position) -> Result<Log, LogError> {
        let path = self.path(first);
        let file = self.spend(|| {
            let file = self.disk.open(&path, true)?;
            file.set_length(0)?;
            file.write_all_at(&self.header(first), 0)?;
            Ok(file)
        });
        let file = file.map_err(io_error("create", &path))?;
        let synced = file.sync_data().and_then(|()| self.disk.sync_directory(&self.directory));
        synced.map_err(io_error("write", &path))?;
        for old in self.files()?.iter().filter(|old| **old != path) {
            self.disk.remove(old).map_err(io_error("remove", old))?;
        }
        Ok(Log {
            place: self.clone(),
            path,
            file,
            end: FILE_HEADER_LENGTH as u64,
            synced: FILE_HEADER_LENGTH as u64,
            synced_from: FILE_HEADER_LENGTH as u64,
            blank_to: FILE_HEADER_LENGTH as u64,
            next: first,
        })
    }

    fn header(&self, first: Position) -> Vec<u8> {
        let mut header = Vec::with_capacity(FILE_HEADER_LENGTH);
        header.extend_from_slice(FILE_MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&first.0.to_le_bytes());
        header.extend_from_slice(&self.cluster.0);
        header.extend_from_slice(&self.boot);
        let checksum = sum(&[&header]);
        header.extend_from_slice(&checksum);
        header
    }
}

impl Found {
    /// Nothing can be missing: the kernel has been up ever since, or there was nothing that it could lose.
    pub fn is_whole(&self) -> bool {
        self.same_boot || self.closed
    }

    /// Shows every entry that counts and is newer than `applied`, in order.
    pub fn replay<E: From<LogError>>(
        &self,
        applied: Position,
        mut visit: impl FnMut(Position, Entry) -> Result<(), E>,
    ) -> Result<(), E> {
        let damaged = |offset, what| LogError::Damaged { path: self.path.clone(), offset, what };
        let mut at = FILE_HEADER_LENGTH as u64;
        while at < self.end {
            let record = read_record(&*self.file, at, self.end).map_err(io_error("read", &self.path))?;
            let record = record.map_err(|what| damaged(at, what))?;
            if record.kind == KIND_ENTRIES {
                let entries = split_entries(&record.payload).ok_or_else(|| damaged(at, "a batch".into()))?;
                for (position, bytes) in (record.position.0..).map(Position).zip(entries) {
                    if position > applied && position <= self.last {
                        let entry = codec::decode(bytes).map_err(|e| damaged(at, format!("entry {position}: {e}")))?;
                        visit(position, entry)?;
                    }
                }
            }
            at = record.end;
        }
        Ok(())
    }

    /// Goes on writing this log, if the kernel has been up ever since and the database is not ahead of it. What it
    /// says is durable when this returns: before, its last mark may be one whose sync never ended, or failed.
    pub fn resume(self, place: &LogPlace, applied: Position) -> Result<Option<Log>, LogError> {
        if !self.same_boot || applied > self.last {
            return Ok(None);
        }
        self.file.set_length(self.end).map_err(io_error("cut the torn tail of", &self.path))?;
        let synced = self.write_again().and_then(|()| place.disk.sync_directory(&place.directory));
        synced.map_err(io_error("sync", &self.path))?;
        let next = Position(self.last.0 + 1);
        Ok(Some(Log {
            place: place.clone(),
            path: self.path,
            file: self.file,
            end: self.end,
            synced: self.synced,
            synced_from: self.end,
            blank_to: self.end,
            next,
        }))
    }

    /// The same bytes once more, and a sync. After a sync that failed, the kernel holds what did not get to the disk
    /// for clean: another sync alone would only seem to succeed.
    fn write_again(&self) -> io::Result<()> {
        let mut window = vec![0; WINDOW];
        let mut at = 0;
        while at < self.end {
            let size = usize::try_from(self.end - at).unwrap_or(WINDOW).min(WINDOW);
            self.file.read_exact_at(&mut window[..size], at)?;
            self.file.write_all_at(&window[..size], at)?;
            at += size as u64;
        }
        self.file.sync_data()
    }
}

impl Log {
    /// Bytes of an entry, as `append` takes them.
    pub fn encode(entry: &Entry) -> Result<Vec<u8>, LogError> {
        codec::encode(entry).map_err(LogError::Encode)
    }

    /// Appends entries, the first of which gets the position that is returned. Together at most `RECORD_LENGTH_MAX`.
    pub fn append<E: AsRef<[u8]>>(&mut self, entries: &[E]) -> Result<Position, LogError> {
        let first = self.next;
        let mut payload = Vec::with_capacity(entries.iter().map(|entry| entry.as_ref().len() + 4).sum());
        for entry in entries.iter().map(AsRef::as_ref) {
            let length = u32::try_from(entry.len()).unwrap_or(u32::MAX);
            payload.extend_from_slice(&length.to_le_bytes());
            payload.extend_from_slice(entry);
        }
        self.write(KIND_ENTRIES, first, &payload)?;
        self.next.0 += entries.len() as u64;
        Ok(first)
    }

    /// Says that everything through `position` is durable. True once the file is synced.
    pub fn mark(&mut self, position: Position) -> Result<(), LogError> {
        self.write(KIND_MARK, position, &self.synced.to_le_bytes())
    }

    /// The last word of a server that stops: all that it had said yes to is durable. Waits for the disk.
    pub fn close(&mut self) -> Result<(), LogError> {
        self.write(KIND_CLOSED, Position(self.next.0 - 1), &[])?;
        self.file.sync_data().map_err(io_error("sync", &self.path))
    }

    /// `file` was synced when it had `end` bytes, the last of them the mark of `position`. A second mark, which waits for
    /// no sync, says so: it tells later damage before it from a sync that was cut short. A file that has been rotated
    /// away no longer matters.
    pub fn note_synced(&mut self, file: &Arc<dyn DiskFile>, end: u64, position: Position) -> Result<(), LogError> {
        if !Arc::ptr_eq(file, &self.file) {
            return Ok(());
        }
        self.synced = self.synced.max(end);
        self.mark(position)
    }

    fn write(&mut self, kind: u8, position: Position, payload: &[u8]) -> Result<(), LogError> {
        let record = encode_record(kind, position, payload);
        let written = self.place.spend(|| self.file.write_all_at(&record, self.end));
        written.map_err(io_error("append to", &self.path))?;
        self.end += record.len() as u64;
        Ok(())
    }

    /// The file to sync, on a thread that may wait, and how much of it that sync will cover.
    ///
    /// When it has grown past what was written ahead, by little since the last sync, zeroes go ahead of it again: a sync of what then lies within the file need not wait for
    /// the filesystem's own journal, which takes a third of its time. Whoever reads the log takes them for its end.
    pub fn to_sync(&mut self) -> (Arc<dyn DiskFile>, u64) {
        let grown = self.end - self.synced_from;
        self.synced_from = self.end;
        if self.end > self.blank_to && grown <= BLANK.len() as u64 / 4 {
            self.blank_to = self.end + BLANK.len() as u64;
            if let Err(error) = self.file.write_all_at(&BLANK, self.end) {
                // Nothing depends on it, and an entry that meets the same will say so.
                tracing::debug!(path = %self.path.display(), %error, "cannot write ahead in the log");
            }
        }
        (Arc::clone(&self.file), self.end)
    }

    #[cfg(test)]
    fn file(&self) -> Arc<dyn DiskFile> {
        Arc::clone(&self.file)
    }

    pub fn length(&self) -> u64 {
        self.end
    }

    /// The position that the next entry will get.
    pub fn next(&self) -> Position {
        self.next
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Begins the next log: the database has everything before it on stable storage.
    pub fn rotate(&mut self) -> Result<(), LogError> {
        *self = self.place.begin(self.next)?;
        Ok(())
    }
}

fn encode_record(kind: u8, position: Position, payload: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(RECORD_HEADER_LENGTH + payload.len());
    record.extend_from_slice(RECORD_MAGIC);
    record.extend_from_slice(&[kind, 0, 0, 0]);
    record.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    record.extend_from_slice(&position.0.to_le_bytes());
    let checksum = sum(&[&record, payload]);
    record.extend_from_slice(&checksum);
    record.extend_from_slice(payload);
    record
}

fn sum(parts: &[&[u8]]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    part(hasher.finalize().as_bytes(), 0)
}

/// `N` bytes of `bytes` from `at` on, zeroes past its end.
fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut taken = [0; N];
    taken.iter_mut().zip(bytes.iter().skip(at)).for_each(|(to, from)| *to = *from);
    taken
}

/// The record at `at`, or what is wrong with it.
fn read_record(file: &dyn DiskFile, at: u64, length: u64) -> io::Result<Result<Record, String>> {
    let mut head = [0; RECORD_HEADER_LENGTH];
    if length - at < head.len() as u64 {
        return Ok(Err("a record's head is cut short".into()));
    }
    file.read_exact_at(&mut head, at)?;
    let payload_length = u32::from_le_bytes(part(&head, 8));
    let end = at + head.len() as u64 + u64::from(payload_length);
    if !head.starts_with(RECORD_MAGIC) || payload_length as usize > RECORD_LENGTH_MAX {
        return Ok(Err("there is no record".into()));
    }
    if end > length {
        return Ok(Err("a record is cut short".into()));
    }
    let mut payload = vec![0; payload_length as usize];
    file.read_exact_at(&mut payload, at + head.len() as u64)?;
    if head[RECORD_HEADER_LENGTH - 8..] != sum(&[&head[..RECORD_HEADER_LENGTH - 8], &payload]) {
        return Ok(Err("a record does not match its sum".into()));
    }
    Ok(Ok(Record { kind: head[4], position: Position(u64::from_le_bytes(part(&head, 12))), payload, end }))
}

/// How many entries a whole record has, which must fit where it stands.
fn count_entries(record: &Record, next: Position) -> Result<u64, String> {
    match record.kind {
        KIND_MARK if record.position < next => Ok(0),
        KIND_CLOSED if record.position.0 + 1 == next.0 => Ok(0),
        KIND_ENTRIES if record.position == next => {
            let entries = split_entries(&record.payload).ok_or("a batch of entries is malformed")?;
            Ok(entries.len() as u64)
        }
        KIND_MARK | KIND_ENTRIES | KIND_CLOSED => {
            Err(format!("it speaks of entry {} where {next} comes next", record.position))
        }
        kind => Err(format!("there is no kind {kind} of record")),
    }
}

fn split_entries(mut payload: &[u8]) -> Option<Vec<&[u8]>> {
    let mut entries = Vec::new();
    while let Some((length, rest)) = payload.split_first_chunk::<4>() {
        let (entry, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        entries.push(entry);
        payload = rest;
    }
    payload.is_empty().then_some(entries)
}

/// Is there, after what is bad at `bad`, a good record that could not be there if the log simply ended? Under the same
/// kernel writes arrive in order, so any. After a power cut a later write may have reached the disk before an earlier
/// one, also a mark whose sync was cut short; but nothing can be missing that a mark says was synced before it.
fn goes_on_after(file: &dyn DiskFile, bad: u64, length: u64, same_boot: bool) -> io::Result<bool> {
    let mut window = vec![0; WINDOW];
    let mut at = bad + 1;
    while at + (RECORD_HEADER_LENGTH as u64) <= length {
        let size = usize::try_from(length - at).unwrap_or(WINDOW).min(WINDOW);
        file.read_exact_at(&mut window[..size], at)?;
        let starts = window[..size].windows(4).enumerate().filter(|(_, bytes)| bytes == RECORD_MAGIC);
        for (offset, _) in starts {
            let is_later = |record: &Record| same_boot || (record.kind == KIND_MARK && record.synced() > bad);
            if read_record(file, at + offset as u64, length)?.is_ok_and(|record| is_later(&record)) {
                return Ok(true);
            }
        }
        // Windows overlap, so that no start is missed at an edge.
        at += (size as u64).saturating_sub(3).max(1);
    }
    Ok(false)
}

#[cfg(test)]
mod tests;

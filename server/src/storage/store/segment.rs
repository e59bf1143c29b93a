//! Segment files: the ones that are open, and the one that grows.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use holdfast_common::{
    BlockHash,
    disk::{Disk, DiskFile},
};
use parking_lot::Mutex;

use super::PAGE;
use super::format::{
    ALIGNMENT, ALIGNMENT_BYTES, FormatFault, Key, Kind, Place, RECORD_HEADER_LENGTH, RecordHeader,
    SEGMENT_HEADER_BYTES, SEGMENT_HEADER_LENGTH, decode_segment_header, encode_segment_header,
};

/// Segment files that are held open at once, besides those that wait for a sync.
const OPEN_FILES_MAX: usize = 256;
/// A payload longer than this is written from where it lies; shorter ones are gathered into one write.
const GATHER_MAX: usize = 64 << 10;
/// Written ahead of short records.
static BLANK: [u8; 256 << 10] = [0; 256 << 10];
/// Bytes after which the disk is told to start writing, so that the next sync finds little to do.
const WRITEBACK_EVERY: u64 = 4 << 20;

/// The files of a store.
#[derive(Debug)]
pub(super) struct Segments {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) directory: PathBuf,
    pub(super) key: Key,
    open: Mutex<OpenFiles>,
    hints: Mutex<Option<SyncSender<Hint>>>,
}

/// A part of a file that should go to the disk soon.
#[derive(Debug)]
pub(super) struct Hint {
    file: Arc<dyn DiskFile>,
    offset: u64,
    length: u64,
}

impl Hint {
    /// May wait for the disk, when its queue is full: not for threads that somebody waits for.
    pub(super) fn follow(&self) {
        self.file.start_writeback(self.offset, self.length);
    }
}

/// Hints that may wait. One that does not fit is dropped: the next sync has more to do.
const HINTS_MAX: usize = 16;

#[derive(Debug, Default)]
struct OpenFiles {
    files: HashMap<u64, (u64, Arc<dyn DiskFile>)>,
    uses: u64,
}

impl OpenFiles {
    fn get(&mut self, number: u64) -> Option<Arc<dyn DiskFile>> {
        self.uses += 1;
        let (used, file) = self.files.get_mut(&number)?;
        *used = self.uses;
        Some(Arc::clone(file))
    }

    fn insert(&mut self, number: u64, file: Arc<dyn DiskFile>) {
        if self.files.len() >= OPEN_FILES_MAX {
            let oldest = self.files.iter().min_by_key(|(_, (used, _))| *used).map(|(number, _)| *number);
            oldest.map(|number| self.files.remove(&number));
        }
        self.uses += 1;
        self.files.insert(number, (self.uses, file));
    }
}

pub(super) fn segment_name(number: u64) -> String {
    format!("{number:016x}.seg")
}

fn segment_number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?.strip_suffix(".seg")?;
    u64::from_str_radix(name, 16).ok().filter(|number| segment_name(*number) == format!("{name}.seg"))
}

/// Numbers of the segments in `directory`, in order. Other files there are left alone.
pub(super) fn list_segments(disk: &dyn Disk, directory: &Path) -> io::Result<Vec<u64>> {
    let mut numbers: Vec<u64> = disk.list(directory)?.iter().filter_map(|path| segment_number(path)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// The header of a segment's file. The outer error is the disk's.
pub(super) fn read_segment_key(file: &dyn DiskFile, number: u64) -> io::Result<Result<Key, FormatFault>> {
    let mut bytes = [0; SEGMENT_HEADER_BYTES];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok(decode_segment_header(&bytes, number)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Err(FormatFault::Short)),
        Err(error) => Err(error),
    }
}

impl Segments {
    pub(super) fn new(disk: Arc<dyn Disk>, directory: PathBuf, key: Key) -> Self {
        Self { disk, directory, key, open: Mutex::default(), hints: Mutex::default() }
    }

    /// Where hints go from now on; it ends with `stop_hints`.
    pub(super) fn start_hints(&self) -> Receiver<Hint> {
        let (sender, receiver) = sync_channel(HINTS_MAX);
        *self.hints.lock() = Some(sender);
        receiver
    }

    pub(super) fn stop_hints(&self) {
        *self.hints.lock() = None;
    }

    fn hint(&self, file: &Arc<dyn DiskFile>, offset: u64, length: u64) {
        let hint = Hint { file: Arc::clone(file), offset, length };
        drop(self.hints.lock().as_ref().map(|hints| hints.try_send(hint)));
    }

    pub(super) fn path(&self, number: u64) -> PathBuf {
        self.directory.join(segment_name(number))
    }

    pub(super) fn file(&self, number: u64) -> io::Result<Arc<dyn DiskFile>> {
        if let Some(file) = self.open.lock().get(number) {
            return Ok(file);
        }
        let file = self.disk.open(&self.path(number), false)?;
        self.open.lock().insert(number, Arc::clone(&file));
        Ok(file)
    }

    /// A new segment with its header. Its name is not durable yet.
    fn create(&self, number: u64) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.disk.open(&self.path(number), true)?;
        file.set_length(0)?;
        file.write_all_at(&encode_segment_header(number, &self.key), 0)?;
        self.open.lock().insert(number, Arc::clone(&file));
        Ok(file)
    }

    pub(super) fn remove(&self, number: u64) -> io::Result<()> {
        self.open.lock().files.remove(&number);
        self.disk.remove(&self.path(number))
    }

    /// Moves a segment that cannot be read out of the way, for inspection.
    pub(super) fn set_aside(&self, number: u64) -> io::Result<()> {
        self.open.lock().files.remove(&number);
        let path = self.path(number);
        self.disk.rename(&path, &path.with_added_extension("damaged"))
    }

    pub(super) fn read_header(&self, place: Place) -> io::Result<Result<RecordHeader, FormatFault>> {
        let mut bytes = [0; RECORD_HEADER_LENGTH];
        match self.file(place.segment).and_then(|file| file.read_exact_at(&mut bytes, place.offset)) {
            Ok(()) => Ok(RecordHeader::decode(&bytes, &self.key, place)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Err(FormatFault::Short)),
            Err(error) => Err(error),
        }
    }
}

/// A record on its way to the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewRecord<'a> {
    pub(super) kind: Kind,
    pub(super) hash: BlockHash,
    pub(super) value: u64,
    pub(super) tree: &'a [u8],
    pub(super) payload: &'a [u8],
}

impl NewRecord<'_> {
    #[expect(clippy::cast_possible_truncation, reason = "a payload is a block, at most BLOCK_SIZE_MAX")]
    fn header(&self, sequence: u64) -> RecordHeader {
        let length = self.payload.len() as u32;
        RecordHeader { kind: self.kind, length, sequence, value: self.value, hash: self.hash }
    }
}

/// The end of the store: the segment that grows, and what waits for a sync.
#[derive(Debug)]
pub(super) struct Tail {
    segment_bytes: u64,
    /// The growing segment. `None`: the next append starts a new one.
    file: Option<Arc<dyn DiskFile>>,
    /// Where the next record goes.
    place: Place,
    /// Where the last record ends that a sync waits for: marks after it may be lost.
    end: Place,
    /// Of the last record that was appended; 0 before the first.
    sequence: u64,
    /// The same, for those who must not wait for whoever holds the tail.
    appended: Arc<AtomicU64>,
    /// The growing segment, for the same.
    growing: Arc<AtomicU64>,
    hinted: u64,
    /// Where the last sync left the end of the growing segment.
    synced_end: u64,
    /// The growing segment is written up to here, if only with zeroes.
    blank_to: u64,
    unsynced: BTreeMap<u64, Arc<dyn DiskFile>>,
    names_unsynced: bool,
}

/// What one sync has to do.
#[derive(Debug)]
pub(super) struct Unsynced {
    /// Everything up to here is durable once all of this is synced.
    pub(super) sequence: u64,
    pub(super) files: BTreeMap<u64, Arc<dyn DiskFile>>,
    pub(super) names: bool,
}

impl Tail {
    /// Goes on at `place` of `file`, after the record `sequence`.
    pub(super) fn new(segment_bytes: u64, place: Place, file: Option<Arc<dyn DiskFile>>, sequence: u64) -> Self {
        let hinted = place.offset;
        Self {
            segment_bytes,
            file,
            place,
            end: place,
            sequence,
            appended: Arc::new(AtomicU64::new(sequence)),
            growing: Arc::new(AtomicU64::new(place.segment)),
            hinted,
            synced_end: place.offset,
            blank_to: place.offset,
            unsynced: BTreeMap::new(),
            names_unsynced: true,
        }
    }

    /// Shows the sequence without the tail's lock, under which a disk is written.
    pub(super) fn appended(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.appended)
    }

    /// Shows the number of the growing segment without the tail's lock.
    pub(super) fn growing(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.growing)
    }

    fn set_sequence(&mut self, sequence: u64) {
        self.sequence = sequence;
        // Before the index shows what was appended: what is visible is always covered.
        self.appended.store(sequence, Ordering::Release);
    }

    /// The end of what is durable when `sequence` is.
    pub(super) fn end(&self) -> Place {
        self.end
    }

    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Appends all of `records` or none, and returns their places, in order.
    pub(super) fn append(&mut self, segments: &Segments, records: &[NewRecord<'_>]) -> io::Result<Vec<Place>> {
        let span = records.iter().map(|record| record.header(0).span()).sum();
        let file = self.file_for(segments, span)?;
        let start = self.place;
        let mut writer = Writer { file: file.as_ref(), buffer: Vec::new(), start: start.offset };
        let mut places = Vec::with_capacity(records.len());
        let mut place = start;
        let mut sequence = self.sequence;
        for record in records {
            sequence += 1;
            let header = record.header(sequence);
            if let Err(error) = writer.record(&header.encode(&segments.key, place), record) {
                self.cut(file.as_ref());
                return Err(error);
            }
            places.push(place);
            place.offset += header.span();
        }
        if let Err(error) = writer.flush() {
            self.cut(file.as_ref());
            return Err(error);
        }
        self.advance(segments, file, place, sequence);
        Ok(places)
    }

    fn advance(&mut self, segments: &Segments, file: Arc<dyn DiskFile>, place: Place, sequence: u64) {
        if place.offset - self.hinted >= WRITEBACK_EVERY {
            segments.hint(&file, self.hinted, place.offset - self.hinted);
            self.hinted = place.offset;
        }
        self.unsynced.entry(place.segment).or_insert(file);
        self.place = place;
        self.end = place;
        self.set_sequence(sequence);
    }

    /// Takes back a failed append. If not even that works, the segment is left as it is, and the next append starts
    /// another: the records before this one are untouched.
    fn cut(&mut self, file: &dyn DiskFile) {
        self.blank_to = self.place.offset;
        if let Err(error) = file.set_length(self.place.offset) {
            tracing::error!(segment = self.place.segment, %error, "cannot cut a segment after a failed write; starting a new one");
            self.file = None;
        }
    }

    fn file_for(&mut self, segments: &Segments, span: u64) -> io::Result<Arc<dyn DiskFile>> {
        let fits = self.place.offset + span <= self.segment_bytes || self.place.offset == SEGMENT_HEADER_LENGTH;
        if let Some(file) = self.file.as_ref().filter(|_| fits) {
            return Ok(Arc::clone(file));
        }
        let number = self.place.segment + 1;
        let file = segments.create(number)?;
        if let Some(full) = self.file.replace(Arc::clone(&file)) {
            segments.hint(&full, self.hinted, self.place.offset - self.hinted);
            self.cut_blank(&full);
        }
        self.growing.store(number, Ordering::Relaxed);
        self.place = Place { segment: number, offset: SEGMENT_HEADER_LENGTH };
        self.hinted = SEGMENT_HEADER_LENGTH;
        self.synced_end = SEGMENT_HEADER_LENGTH;
        self.blank_to = SEGMENT_HEADER_LENGTH;
        self.names_unsynced = true;
        Ok(file)
    }

    /// `file` was written in place: the next sync includes it. Takes a sequence of its own, so that there is
    /// something to wait for.
    pub(super) fn touch(&mut self, number: u64, file: Arc<dyn DiskFile>) {
        self.unsynced.entry(number).or_insert(file);
        self.set_sequence(self.sequence + 1);
    }

    /// Just before a sync. While records are short and synced each for itself, zeroes go ahead of them: a sync of what then lies
    /// within the file need not wait for the filesystem's own journal, which takes a third to a half of its time. They go to the disk with
    /// the first sync that needs the journal anyway.
    fn blank_ahead(&mut self) {
        let appended = self.place.offset - self.synced_end;
        self.synced_end = self.place.offset;
        let end = (self.place.offset + BLANK.len() as u64).min(self.segment_bytes);
        let Some(file) = self.file.as_ref().filter(|_| self.unsynced.contains_key(&self.place.segment)) else { return };
        if self.place.offset <= self.blank_to || appended > BLANK.len() as u64 / 4 || end <= self.place.offset {
            return;
        }
        self.blank_to = end;
        #[expect(clippy::cast_possible_truncation, reason = "at most the length of BLANK")]
        let zeroes = &BLANK[..(end - self.place.offset) as usize];
        if let Err(error) = file.write_all_at(zeroes, self.place.offset) {
            // Nothing depends on it, and a put that meets the same will say so.
            tracing::debug!(%error, "cannot write ahead in a segment");
        }
    }

    /// Gives back what was written ahead of the last record, with the next sync.
    fn cut_blank(&mut self, file: &Arc<dyn DiskFile>) {
        if self.blank_to <= self.place.offset {
            return;
        }
        match file.set_length(self.place.offset) {
            Ok(()) => drop(self.unsynced.entry(self.place.segment).or_insert_with(|| Arc::clone(file))),
            Err(error) => tracing::warn!(segment = self.place.segment, %error, "a segment keeps zeroes at its end"),
        }
    }

    pub(super) fn take_unsynced(&mut self) -> Unsynced {
        self.blank_ahead();
        Unsynced {
            sequence: self.sequence,
            files: std::mem::take(&mut self.unsynced),
            names: std::mem::take(&mut self.names_unsynced),
        }
    }

    /// Says in the growing segment that everything up to `through` is durable. The mark itself needs no sync:
    /// found after a crash it is true, not found it costs some reading.
    pub(super) fn append_mark(&mut self, segments: &Segments, through: u64) -> io::Result<()> {
        let Some(file) = self.file.clone() else { return Ok(()) };
        let mark = NewRecord { kind: Kind::Mark, hash: BlockHash([0; 32]), value: through, tree: &[], payload: &[] };
        let header = mark.header(self.sequence);
        let written = file.write_all_at(&header.encode(&segments.key, self.place), self.place.offset);
        if let Err(error) = written {
            self.cut(file.as_ref());
            return Err(error);
        }
        self.place.offset += header.span();
        Ok(())
    }
}

/// Writes records one after the other, small ones together.
struct Writer<'a> {
    file: &'a dyn DiskFile,
    buffer: Vec<u8>,
    /// Where the buffer's first byte goes.
    start: u64,
}

impl Writer<'_> {
    fn record(&mut self, header: &[u8], record: &NewRecord<'_>) -> io::Result<()> {
        self.buffer.extend_from_slice(header);
        self.buffer.extend_from_slice(record.tree);
        if record.payload.len() <= GATHER_MAX {
            self.buffer.extend_from_slice(record.payload);
            let padded = self.buffer.len().next_multiple_of(ALIGNMENT_BYTES);
            self.buffer.resize(padded, 0);
            return Ok(());
        }
        self.flush()?;
        let end = self.start + record.payload.len() as u64;
        // Memory keeps the page in which the next record begins: it would have to be read for that one.
        let (whole_pages, tail) = record.payload.split_at(record.payload.len() - (end % PAGE) as usize);
        self.file.write_away_at(whole_pages, self.start)?;
        if !tail.is_empty() {
            self.file.write_all_at(tail, end - tail.len() as u64)?;
        }
        self.start = end.next_multiple_of(ALIGNMENT);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.file.write_all_at(&self.buffer, self.start)?;
            self.start += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_segment_names_are_segments() {
        assert_eq!(segment_number(Path::new("/x/00000000000000ff.seg")), Some(255));
        for other in ["ff.seg", "00000000000000FF.seg", "00000000000000ff.seg.new", "index.redb", ".seg"] {
            assert_eq!(segment_number(Path::new(other)), None, "{other}");
        }
    }
}

//! What the segments say that the index does not know yet.
//!
//! From the index's covered point on, every record is read again. Up to the last mark everything was on stable
//! storage: what does not parse there is damage. Past it, bytes may be missing: a killed process leaves at most a torn
//! end, a power cut may take any page that was not synced. After a sync that failed the kernel counts pages as written
//! that the disk never got (Rebello et al., "Can Applications Recover from fsync Failures?", 2020): what is past the
//! mark is written again then.

use std::{io, sync::Arc};

use holdfast_common::{BlockHash, Epoch, disk::DiskFile};

use super::{
    boot::Boot,
    format::{
        ALIGNMENT, FormatFault, Kind, Place, RECORD_HEADER_LENGTH, RecordHeader, SEGMENT_HEADER_LENGTH,
        encode_segment_header, tree_length,
    },
    index::{Entry, Index, IndexError, Saved},
    quarantine::Quarantine,
    scan::{Item, Scan},
    segment::{Segments, Tail, read_segment_key},
};

/// Changes of the index that are collected before they go to redb.
const FLUSH_EVERY: usize = 64 << 10;
/// Bytes of one damaged run that are kept for inspection.
const INSPECTED_MAX: u64 = 2 << 20;
/// Bytes that are written again at a time.
const WRITTEN_AT_ONCE: usize = 1 << 20;

/// What a start found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// The index was missing or unusable and was built anew.
    pub rebuilt: bool,
    /// Records that were read again.
    pub records: u64,
    /// Bytes of torn ends that were cut.
    pub cut_bytes: u64,
    /// Records, or runs of bytes, that had never been synced and did not survive.
    pub lost: u64,
    /// Records, or runs of bytes, that were damaged after they had been written well.
    pub damaged: u64,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum RecoverError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Index(#[from] IndexError),
}

pub(super) struct Recoverer<'a> {
    pub(super) segments: &'a Segments,
    pub(super) index: &'a Index,
    pub(super) quarantine: &'a Quarantine,
    pub(super) cache_survived: bool,
    sync_failed: bool,
    pub(super) segment_bytes: u64,
    pub(super) saved: Saved,
    pub(super) report: Recovery,
    /// Records that a later one replaced.
    pub(super) graves: Vec<(BlockHash, Entry)>,
    /// Of the last record that was met.
    sequence: u64,
    /// Everything up to here was on stable storage.
    marked: u64,
    /// Where the first record of the segment is that is past that.
    unsynced_from: Option<u64>,
}

/// Bytes that never reached the disk.
struct Lost {
    place: Place,
    end: u64,
    sequence: u64,
}

impl<'a> Recoverer<'a> {
    pub(super) fn new(
        segments: &'a Segments,
        index: &'a Index,
        quarantine: &'a Quarantine,
        boot: Boot,
        segment_bytes: u64,
        saved: Saved,
    ) -> Self {
        let (report, graves, sequence, marked) = (Recovery::default(), Vec::new(), saved.sequence, saved.sequence);
        let Boot { cache_survived, sync_failed, .. } = boot;
        let unsynced_from = None;
        Self {
            segments,
            index,
            quarantine,
            cache_survived,
            sync_failed,
            segment_bytes,
            saved,
            report,
            graves,
            sequence,
            marked,
            unsynced_from,
        }
    }

    /// Brings the index up to date with segments `numbers`, and returns where the store goes on.
    pub(super) fn run(&mut self, numbers: &[u64]) -> Result<Tail, RecoverError> {
        let covered = self.saved.covered;
        let uncovered: Vec<u64> = numbers.iter().copied().filter(|number| *number >= covered.segment).collect();
        self.find_mark(&uncovered)?;
        let mut touched = Vec::new();
        let mut tail = (Place { offset: SEGMENT_HEADER_LENGTH, ..covered }, None);
        for number in uncovered {
            tail = self.recover_segment(number, &mut touched)?;
        }
        let (place, file) = tail;
        let file = file.filter(|_| place >= covered && place.offset < self.segment_bytes);
        let place = Place { segment: place.segment.max(covered.segment), ..place };
        let mut tail = Tail::new(self.segment_bytes, place, file, self.sequence);
        touched.into_iter().for_each(|(number, file)| tail.touch(number, file));
        Ok(tail)
    }

    /// The last segment that holds a mark holds the newest one.
    fn find_mark(&mut self, numbers: &[u64]) -> io::Result<()> {
        for number in numbers.iter().rev() {
            let file = self.segments.file(*number)?;
            let mut through = None;
            for item in Scan::new(file.as_ref(), &self.segments.key, self.start_of(*number))? {
                if let Item::Record { header: RecordHeader { kind: Kind::Mark, value, .. }, .. } = item {
                    through = through.max(Some(value));
                }
            }
            if let Some(through) = through {
                self.marked = self.marked.max(through);
                return Ok(());
            }
        }
        Ok(())
    }

    fn start_of(&self, number: u64) -> Place {
        let covered = self.saved.covered;
        let offset = if number == covered.segment { covered.offset } else { 0 };
        Place { segment: number, offset: offset.max(SEGMENT_HEADER_LENGTH) }
    }

    fn recover_segment(
        &mut self,
        number: u64,
        touched: &mut Vec<(u64, Arc<dyn DiskFile>)>,
    ) -> Result<(Place, Option<Arc<dyn DiskFile>>), RecoverError> {
        let file = self.segments.file(number)?;
        let start = self.start_of(number);
        if file.length()? < start.offset && start.offset > SEGMENT_HEADER_LENGTH {
            self.damaged(start, format_args!("the segment is shorter than it was"));
            return Ok((start, None));
        }
        let header = read_segment_key(file.as_ref(), number)?;
        let records_before = self.report.records;
        self.unsynced_from = None;
        let (end, lost, is_blank) = self.replay(&file, start)?;
        if let Err(fault) = header {
            let is_empty = self.report.records == records_before && start.offset == SEGMENT_HEADER_LENGTH;
            if is_empty {
                self.remove_headless(start, file.as_ref(), fault)?;
                return Ok((start, None));
            }
            self.damaged(start, format_args!("the header of the segment is bad ({fault}); writing it again"));
            file.write_all_at(&encode_segment_header(number, &self.segments.key), 0)?;
        }
        self.clear(file.as_ref(), end, &lost)?;
        if is_blank {
            file.set_length(end)?;
        }
        if let Some(from) = self.unsynced_from.filter(|from| self.sync_failed && *from < end) {
            // With the first record goes the header, which is no older.
            write_again(file.as_ref(), if from == SEGMENT_HEADER_LENGTH { 0 } else { from }, end)?;
        }
        if self.sequence > self.marked || !lost.is_empty() || header.is_err() || is_blank {
            touched.push((number, Arc::clone(&file)));
        }
        Ok((Place { segment: number, offset: end }, Some(file)))
    }

    /// A segment in which nothing parses was just being made when the server stopped, or is damaged.
    fn remove_headless(&mut self, start: Place, file: &dyn DiskFile, fault: FormatFault) -> io::Result<()> {
        let header = read_record(file, Place { offset: 0, ..start }, SEGMENT_HEADER_LENGTH)?;
        let unwritten = !self.cache_survived && header.iter().all(|byte| *byte == 0);
        if file.length()? <= SEGMENT_HEADER_LENGTH || unwritten {
            self.report.lost += 1;
            return self.segments.remove(start.segment);
        }
        self.damaged(start, format_args!("nothing in the segment parses ({fault}); setting it aside"));
        self.segments.set_aside(start.segment)
    }

    /// Applies the records from `start` on; returns where the last good one ends, what was lost, and whether there are
    /// zeroes at the end.
    fn replay(&mut self, file: &Arc<dyn DiskFile>, start: Place) -> Result<(u64, Vec<Lost>, bool), RecoverError> {
        let mut end = start.offset;
        let mut lost = Vec::new();
        let mut is_blank = false;
        let mut items = Scan::new(file.as_ref(), &self.segments.key, start)?.peekable();
        while let Some(item) = items.next() {
            match item {
                Item::Record { place, header } => {
                    if header.sequence > self.marked && self.unsynced_from.is_none() {
                        self.unsynced_from = Some(place.offset);
                    }
                    let is_last = matches!(items.peek(), None | Some(Item::Blank { .. }));
                    if self.survived(file.as_ref(), place, &header, is_last)? {
                        end = place.offset + header.span();
                    } else {
                        lost.push(Lost { place, end: place.offset + header.span(), sequence: header.sequence });
                    }
                    self.sequence = self.sequence.max(header.sequence);
                }
                // What had not been used of the zeroes was cut before the next segment was synced.
                Item::Blank { place } => {
                    is_blank = true;
                    if self.sequence < self.marked {
                        self.damaged(place, format_args!("zeroes are where synced records were"));
                    }
                }
                Item::Bad { place, end: bad_end, at_end_of_file } => {
                    let never_synced = self.sequence >= self.marked && (at_end_of_file || !self.cache_survived);
                    if never_synced {
                        lost.push(Lost { place, end: bad_end, sequence: self.sequence });
                    } else {
                        self.damaged(place, format_args!("no record starts in the {} bytes", bad_end - place.offset));
                        self.keep_for_inspection(file.as_ref(), place, BlockHash([0; 32]), bad_end - place.offset);
                        end = bad_end.next_multiple_of(ALIGNMENT);
                    }
                }
            }
        }
        Ok((end, lost, is_blank))
    }

    /// Applies a record, unless it was lost. A damaged one is quarantined, and did survive in that sense.
    fn survived(
        &mut self,
        file: &dyn DiskFile,
        place: Place,
        header: &RecordHeader,
        is_last: bool,
    ) -> Result<bool, RecoverError> {
        let unsure = header.kind == Kind::Block && header.sequence > self.marked;
        if unsure && !is_whole(file, place, header) {
            // The process may have been killed in the middle of its last write.
            if !self.cache_survived || is_last && ends_blank(file, place, header) {
                return Ok(false);
            }
            self.damaged(place, format_args!("the block {} does not match its hash", header.hash));
            self.keep_for_inspection(file, place, header.hash, header.end());
            // Once it is synced, nobody would look at its bytes again before it is indexed.
            self.void(file, &Lost { place, end: place.offset + header.span(), sequence: header.sequence })?;
            return Ok(true);
        }
        self.apply(place, header)?;
        Ok(true)
    }

    fn apply(&mut self, place: Place, header: &RecordHeader) -> Result<(), RecoverError> {
        self.report.records += 1;
        match header.kind {
            Kind::Block => {
                let entry = Entry { place, length: header.length, epoch: Epoch(header.value) };
                let before = self.index.set(header.hash, Some(entry))?;
                self.graves.extend(before.filter(|before| before.place != place).map(|before| (header.hash, before)));
            }
            Kind::Delete => drop(self.index.set(header.hash, None)?),
            Kind::Mark | Kind::Void => {}
        }
        if self.index.pending() >= FLUSH_EVERY {
            self.index.commit(&self.index.begin(self.saved), false)?;
        }
        Ok(())
    }

    fn damaged(&mut self, place: Place, what: std::fmt::Arguments<'_>) {
        self.report.damaged += 1;
        tracing::error!(segment = %self.segments.path(place.segment).display(), offset = place.offset, "damage: {what}");
    }

    fn keep_for_inspection(&mut self, file: &dyn DiskFile, place: Place, hash: BlockHash, length: u64) {
        let bytes = read_record(file, place, length.min(INSPECTED_MAX));
        match bytes.and_then(|bytes| self.quarantine.keep(hash, &bytes)) {
            Ok(()) => self.saved.quarantined += 1,
            Err(error) => tracing::error!(block = %hash, %error, "cannot keep damaged bytes for inspection"),
        }
    }

    /// Cuts what was lost at the end, and voids what was lost before it.
    fn clear(&mut self, file: &dyn DiskFile, end: u64, lost: &[Lost]) -> io::Result<()> {
        self.report.lost += lost.len() as u64;
        for lost in lost.iter().filter(|lost| lost.place.offset < end) {
            self.void(file, lost)?;
        }
        let length = file.length()?;
        if lost.iter().any(|lost| lost.place.offset >= end) && length > end {
            tracing::info!(
                segment = %self.segments.path(lost[0].place.segment).display(), offset = end, bytes = length - end,
                "cut a torn end that was never synced"
            );
            self.report.cut_bytes += length - end;
            file.set_length(end)?;
        }
        Ok(())
    }

    fn void(&self, file: &dyn DiskFile, lost: &Lost) -> io::Result<()> {
        let length = (lost.end - lost.place.offset).saturating_sub(RECORD_HEADER_LENGTH as u64);
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let header =
            RecordHeader { kind: Kind::Void, length, sequence: lost.sequence, value: 0, hash: BlockHash([0; 32]) };
        file.write_all_at(&header.encode(&self.segments.key, lost.place), lost.place.offset)
    }
}

/// A page of which a sync has failed counts as written from then on, and no later sync writes it unless it is changed.
fn write_again(file: &dyn DiskFile, from: u64, end: u64) -> io::Result<()> {
    let mut window = vec![0; WRITTEN_AT_ONCE];
    let mut at = from;
    while at < end {
        let length = usize::try_from(end - at).map_or(WRITTEN_AT_ONCE, |rest| rest.min(WRITTEN_AT_ONCE));
        file.read_exact_at(&mut window[..length], at)?;
        file.write_all_at(&window[..length], at)?;
        at += length as u64;
    }
    Ok(())
}

/// `length` bytes of a record, or fewer if the file is shorter.
pub(super) fn read_record(file: &dyn DiskFile, place: Place, length: u64) -> io::Result<Vec<u8>> {
    let length = length.min(file.length()?.saturating_sub(place.offset));
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, place.offset)?;
    Ok(bytes)
}

fn ends_blank(file: &dyn DiskFile, place: Place, header: &RecordHeader) -> bool {
    let mut last = [1];
    file.read_exact_at(&mut last, place.offset + header.end() - 1).is_ok() && last == [0]
}

fn is_whole(file: &dyn DiskFile, place: Place, header: &RecordHeader) -> bool {
    let skip = RECORD_HEADER_LENGTH + tree_length(header.length) as usize;
    read_record(file, place, header.end())
        .is_ok_and(|bytes| bytes.get(skip..).is_some_and(|payload| BlockHash::of(payload) == header.hash))
}

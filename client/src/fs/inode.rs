//! What this mount knows of one file that is open here or has bytes on their way.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use holdfast_common::{
    Attr, ChunkIndex, Ino, Piece, Position, Replicas, Time,
    limits::{BLOCK_SIZE_MAX, CHUNK_SIZE, COMMIT_PIECES_MAX},
    pieces,
    wire::meta::{BlockPlace, FileMap},
};
use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::Notify, time::Instant};

use super::{Errno, shared::chunks_of};
use crate::{
    read::{
        map::KnownMap,
        plan::{self, Part},
    },
    write::buffer::{DirtyChunk, Extent, copy_overlap},
};

/// How long attributes are answered from memory, as the kernel does.
pub(super) const ATTRIBUTE_LIFE: Duration = Duration::from_secs(1);
/// No version of the data: the kernel has no pages that could be kept.
pub(super) const PAGES_UNKNOWN: u64 = u64::MAX;
/// Bytes of one upload at most, beside its last extent.
const UPLOAD_BYTES_MAX: u64 = 4 << 20;
/// Writing threads of one file that are told apart.
const WRITERS_MAX: usize = 32;
/// Bytes between the places at which what was appended may be cut.
const CUT_BYTES_MIN: u64 = 64 << 10;

#[derive(Debug)]
pub(super) struct Inode {
    pub ino: Ino,
    state: Mutex<State>,
    /// An upload has ended, well or badly.
    pub settled: Notify,
}

#[derive(Debug)]
pub(super) struct State {
    attr: Attr,
    attr_at: Option<Instant>,
    pub opens: u32,
    dirty: BTreeMap<ChunkIndex, DirtyChunk>,
    dirty_since: Option<Instant>,
    dirty_bytes: u64,
    uploads: BTreeMap<u64, Arc<Upload>>,
    /// Chunks that an upload has.
    busy: BTreeSet<ChunkIndex>,
    /// Uploads of which nothing is known.
    late: BTreeSet<u64>,
    next_upload: u64,
    /// Threads that have written what is not stored; `None`: too many to know.
    writers: Option<BTreeSet<u32>>,
    /// Uploads up to this one are given up.
    severed: u64,
    /// Writes so far, and which of them made each dirty chunk dirty.
    writes: u64,
    /// Bytes that were written since the last fsync that succeeded.
    since_sync: u64,
    written: BTreeMap<ChunkIndex, u64>,
    appended: Option<Appended>,
    pub map: KnownMap,
    /// The version of the data that the kernel's pages show.
    pages: u64,
    /// The kernel has forgotten the inode, and its pages with it.
    forgotten: bool,
    /// Extents of each chunk that this mount has written into it bit by bit.
    scattered: BTreeMap<ChunkIndex, usize>,
    errors: u64,
    last_error: i32,
    /// Of the last change of this file by this mount. `None`: it made the file, and has not heard where.
    last_position: Option<Position>,
    /// The file was opened as it was: whether what others (or this mount, before) did to it is durable is not known.
    inherited: bool,
}

/// Bytes that were appended and are not committed: the commit decides where they come to lie, for another mount may append too.
#[derive(Debug)]
struct Appended {
    /// Where this mount takes them to be.
    range: Range<u64>,
    /// Beginnings of records, at which what is sent may end, in order and `CUT_BYTES_MIN` apart.
    cuts: Vec<u64>,
    /// The upload that has the first part. One at a time, or they could change places.
    upload: Option<u64>,
}

impl Appended {
    fn note(&mut self, record: Range<u64>) {
        let last = self.cuts.last().copied().unwrap_or(self.range.start);
        if record.start >= last + CUT_BYTES_MIN {
            self.cuts.push(record.start);
        }
        self.range.end = record.end;
    }

    /// Where the part ends that is sent next: whole records, not many more than `UPLOAD_BYTES_MAX`.
    fn part_end(&self) -> u64 {
        let (start, end) = (self.range.start, self.range.end);
        let fitting = self.cuts.iter().rfind(|cut| **cut <= start + UPLOAD_BYTES_MAX);
        match (end - start > UPLOAD_BYTES_MAX, fitting, self.cuts.first()) {
            (true, Some(cut), _) | (true, None, Some(cut)) => *cut,
            _ => end,
        }
    }

    /// What is left when everything before `start` has gone, by `moved` bytes elsewhere.
    fn rest(self, start: u64, moved: impl Fn(u64) -> u64) -> Self {
        let cuts = self.cuts.into_iter().filter(|cut| *cut > start).map(&moved).collect();
        Self { range: moved(start)..moved(self.range.end), cuts, upload: None }
    }
}

/// The part of an upload that belongs at the end of the file.
#[derive(Clone, Debug)]
pub(super) struct AppendPart {
    pub range: Range<u64>,
    /// The size that the file has to have for that.
    pub at_size: u64,
}

/// Extents on their way: at most one upload at a time has a chunk.
#[derive(Debug)]
pub(super) struct Upload {
    pub id: u64,
    pub extents: Vec<(ChunkIndex, Extent)>,
    pub bytes: u64,
    /// When the last of these bytes was written.
    pub mtime: Time,
    /// Which write of the file the first of these bytes came with, or an earlier one.
    pub written: u64,
    /// Chunks that have been written bit by bit so often that they may need compacting, with the pieces that they
    /// have at most.
    pub scattered: Vec<(ChunkIndex, usize)>,
    /// The part of it that belongs at the end of the file, wherever that is. Whole records: one of another mount may come to lie
    /// before it.
    pub append: Option<AppendPart>,
}

impl Upload {
    /// First offset of the file past these bytes.
    pub(super) fn end(&self) -> u64 {
        // Extents are in the order of the file.
        self.extents.last().map_or(0, |(chunk, extent)| position(*chunk, extent.range().end))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// Chunks that are complete.
    Full,
    All,
}

/// How to answer a read of one chunk.
#[derive(Debug)]
pub(super) enum ChunkPlan {
    Bytes(Bytes),
    /// The map has to be asked first.
    UnknownMap,
    Assemble(Assembly),
}

/// Committed parts, and what was written over them since, oldest first.
#[derive(Debug)]
pub(super) struct Assembly {
    pub range: Range<u32>,
    pub parts: Vec<(Part, Arc<BlockPlace>)>,
    pub overlays: Vec<(u32, Bytes)>,
}

impl Assembly {
    /// Puts the bytes of `parts`, in their order, and the overlays together; the rest is zero.
    pub(super) fn join(self, fetched: &[Bytes]) -> Bytes {
        if let (true, [bytes]) = (self.overlays.is_empty(), fetched)
            && bytes.len() == self.range.len()
        {
            return bytes.clone();
        }
        let mut out = BytesMut::zeroed(self.range.len());
        for ((part, _), bytes) in self.parts.iter().zip(fetched) {
            copy_overlap(part.offset, bytes, &self.range, &mut out);
        }
        for (offset, bytes) in &self.overlays {
            copy_overlap(*offset, bytes, &self.range, &mut out);
        }
        out.freeze()
    }
}

impl Inode {
    pub(super) fn new(attr: Attr, map: KnownMap, pages: u64) -> Arc<Self> {
        let state = State {
            attr,
            attr_at: Some(Instant::now()),
            opens: 0,
            dirty: BTreeMap::new(),
            dirty_since: None,
            dirty_bytes: 0,
            uploads: BTreeMap::new(),
            busy: BTreeSet::new(),
            late: BTreeSet::new(),
            next_upload: 1,
            severed: 0,
            writers: Some(BTreeSet::new()),
            writes: 0,
            since_sync: 0,
            written: BTreeMap::new(),
            appended: None,
            map,
            pages,
            forgotten: false,
            scattered: BTreeMap::new(),
            errors: 0,
            last_error: 0,
            last_position: Some(Position(0)),
            inherited: true,
        };
        Arc::new(Self { ino: attr.ino, state: Mutex::new(state), settled: Notify::new() })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    // ---- attributes ----

    /// The attributes as this mount sees them: the server's, with what has been written here since.
    pub(super) fn attr(&self) -> Attr {
        let mut attr = self.attr;
        attr.size = attr.size.max(self.written_end());
        attr.stored += self.held_bytes();
        attr
    }

    /// The attributes, if they are fresh enough to be answered from memory.
    pub(super) fn fresh_attr(&self) -> Option<Attr> {
        let fresh = self.attr_at.is_some_and(|at| at.elapsed() < ATTRIBUTE_LIFE);
        fresh.then(|| self.attr())
    }

    /// The file has been read.
    pub(super) fn note_access(&mut self, now: Time) {
        self.attr.atime = self.attr.atime.max(now);
    }

    /// The attributes have changed in a way that is not known here.
    pub(super) fn distrust_attr(&mut self) {
        self.attr_at = None;
    }

    /// The server has said how many copies are wanted, while something is being stored.
    pub(super) fn learn_replicas(&mut self, replicas: Replicas) {
        self.attr.replicas = replicas;
    }

    /// Takes in what the server said, unless something newer is known. What is dirty here keeps its times.
    pub(super) fn learn(&mut self, attr: Attr) {
        if attr.data_version < self.attr.data_version {
            return;
        }
        if attr.data_version > self.map.version() {
            // Someone else changed the file: a size that is believed without its map would read as a hole.
            self.map.forget(attr.data_version);
        }
        let written = (self.attr.mtime, self.attr.ctime);
        self.attr = attr;
        self.attr_at = Some(Instant::now());
        if !self.is_clean() {
            (self.attr.mtime, self.attr.ctime) = written;
        }
    }

    /// Takes in the result of a change that came through this mount's kernel, whose pages show it already.
    pub(super) fn learn_own(&mut self, attr: Attr) {
        if attr.data_version == self.pages.wrapping_add(1) {
            self.pages = attr.data_version;
        }
        self.learn(attr);
    }

    /// The kernel opens the file at `version`: whether the pages that it has show that version. If not, it drops them.
    pub(super) fn show_pages(&mut self, version: u64) -> bool {
        self.forgotten = false;
        std::mem::replace(&mut self.pages, version) == version
    }

    /// What the kernel's pages show is not known.
    pub(super) fn distrust_pages(&mut self) {
        self.pages = PAGES_UNKNOWN;
    }

    /// Do the kernel's pages show the data as they are known to be?
    pub(super) fn pages_are_true(&self) -> bool {
        self.pages == self.attr.data_version
    }

    pub(super) fn forget_pages(&mut self) {
        self.forgotten = true;
    }

    /// What to remember when this state goes.
    pub(super) fn pages_version(&self) -> Option<u64> {
        (!self.forgotten && self.pages != PAGES_UNKNOWN).then_some(self.pages)
    }

    /// This mount changed the file at `position`.
    pub(super) fn note_position(&mut self, position: Position) {
        self.last_position = self.last_position.max(Some(position));
    }

    /// What must become durable for an fsync; `None`: nothing may be taken for durable without asking.
    pub(super) fn to_make_durable(&self) -> Option<Position> {
        self.last_position.filter(|_| !self.inherited)
    }

    /// May others have changed the file, or this mount before it was opened?
    pub(super) fn is_inherited(&self) -> bool {
        self.inherited
    }

    /// This mount has just made it, and nobody else has changed it.
    pub(super) fn begin_with(&mut self, made_at: Option<Position>) {
        self.inherited = false;
        self.last_position = made_at;
    }

    /// Is it not known that the server has made it?
    pub(super) fn is_ahead(&self) -> bool {
        self.last_position.is_none()
    }

    /// All that was done to it before is durable.
    pub(super) fn disinherit(&mut self) {
        self.inherited = false;
        self.last_position.get_or_insert(Position(0));
    }

    /// Believes nothing any more that the server has said: it may have lost it. What was written here stays.
    pub(super) fn roll_back(&mut self) {
        self.map = KnownMap::default();
        self.attr.data_version = 0;
        self.attr_at = None;
        self.pages = PAGES_UNKNOWN;
        self.inherited = true;
    }

    /// Takes in an answer about the map of chunks `first..first+count`.
    pub(super) fn learn_map(&mut self, first: ChunkIndex, count: u32, map: FileMap) {
        // The size that is known says how many chunks there are at its own version, and at no other.
        let known = self.attr.data_version == map.data_version;
        let chunks = if known { chunks_of(self.attr.size) } else { u32::MAX };
        self.map.learn(first, count, chunks, map);
    }

    pub(super) fn size(&self) -> u64 {
        self.attr.size.max(self.written_end())
    }

    fn written_end(&self) -> u64 {
        let dirty = self.dirty.last_key_value().and_then(|(chunk, dirty)| Some(position(*chunk, dirty.end()?)));
        let sent = self.uploads.values().map(|upload| upload.end()).max();
        dirty.max(sent).unwrap_or(0)
    }

    // ---- errors ----

    pub(super) fn errors(&self) -> u64 {
        self.errors
    }

    /// The error that a descriptor has not heard of, once.
    pub(super) fn unheard_error(&self, heard: &mut u64) -> Option<Errno> {
        let news = self.errors > *heard;
        *heard = self.errors;
        news.then_some(Errno(self.last_error))
    }

    // ---- writing ----

    pub(super) fn is_clean(&self) -> bool {
        self.dirty.is_empty() && self.uploads.is_empty()
    }

    pub(super) fn dirty_bytes(&self) -> u64 {
        self.dirty_bytes
    }

    fn held_bytes(&self) -> u64 {
        self.dirty_bytes + self.uploads.values().map(|upload| upload.bytes).sum::<u64>()
    }

    pub(super) fn dirty_since(&self) -> Option<Instant> {
        self.dirty_since
    }

    /// Are there uploads up to this one that are worth waiting for?
    pub(super) fn uploads_up_to(&self, id: u64) -> bool {
        self.uploads.range(..=id).any(|(id, _)| !self.late.contains(id))
    }

    /// How many bytes were written that no fsync has made durable, as far as is known.
    pub(super) fn written_since_sync(&self) -> u64 {
        self.since_sync
    }

    /// So many of them are durable. Others may have said so of the same ones.
    pub(super) fn forget_written_since_sync(&mut self, bytes: u64) {
        self.since_sync = self.since_sync.saturating_sub(bytes);
    }

    /// How many writes there have been.
    pub(super) fn writes(&self) -> u64 {
        self.writes
    }

    /// Is something dirty that was written as one of the first `writes`?
    pub(super) fn has_dirty_of(&self, writes: u64) -> bool {
        self.written.values().any(|written| *written <= writes)
    }

    pub(super) fn last_upload(&self) -> u64 {
        self.next_upload - 1
    }

    /// Where the next bytes that are appended go, as far as this mount knows; `None`: what it has written past the end
    /// that the server knows has to be stored first.
    pub(super) fn append_offset(&self) -> Option<u64> {
        match &self.appended {
            Some(appended) => Some(appended.range.end),
            None => (self.written_end() <= self.attr.size).then_some(self.attr.size),
        }
    }

    /// `range`, which begins at [`State::append_offset`], is about to be written by an append.
    pub(super) fn note_append(&mut self, range: Range<u64>) {
        match &mut self.appended {
            Some(appended) => appended.note(range),
            None => self.appended = Some(Appended { range, cuts: Vec::new(), upload: None }),
        }
    }

    /// `range` is about to be written where it is said. What was appended after its start stays where it is taken to be.
    pub(super) fn note_write(&mut self, range: &Range<u64>) {
        if self.appended.as_ref().is_some_and(|appended| range.end > appended.range.start) {
            self.appended = None;
        }
    }

    pub(super) fn note_writer(&mut self, thread: u32) {
        if self.is_clean() {
            self.writers = Some(BTreeSet::new());
        }
        if let Some(writers) = &mut self.writers {
            writers.insert(thread);
            if writers.len() > WRITERS_MAX {
                self.writers = None;
            }
        }
    }

    /// Threads that have written what is not stored, if they are known.
    pub(super) fn writers(&self) -> Option<&BTreeSet<u32>> {
        self.writers.as_ref()
    }

    /// Takes in written bytes. Returns how many more are held, and whether a chunk is now complete.
    pub(super) fn write(&mut self, offset: u64, data: Bytes, now: Time) -> (u64, bool) {
        self.writes += 1;
        self.since_sync += data.len() as u64;
        self.write_since(offset, data, now, self.writes)
    }

    /// As [`State::write`], of bytes that were written as the `since`th.
    fn write_since(&mut self, offset: u64, mut data: Bytes, now: Time, since: u64) -> (u64, bool) {
        let (mut grown, mut full, mut at) = (0, false, offset);
        while !data.is_empty() {
            let (chunk, within) = split(at);
            let room = (BLOCK_SIZE_MAX - within) as usize;
            let head = data.split_to(room.min(data.len()));
            at += head.len() as u64;
            let written = self.written.entry(chunk).or_insert(since);
            *written = (*written).min(since);
            let dirty = self.dirty.entry(chunk).or_default();
            grown += dirty.write(within, head);
            full |= dirty.is_full();
        }
        self.dirty_bytes += grown;
        self.dirty_since.get_or_insert_with(Instant::now);
        (self.attr.mtime, self.attr.ctime) = (now, now);
        (grown, full)
    }

    /// Takes dirty bytes in `range` out, to be put back if what makes them superfluous fails.
    pub(super) fn take_dirty(&mut self, range: Range<u64>) -> Vec<(ChunkIndex, Extent)> {
        let mut taken = Vec::new();
        for (chunk, dirty) in &self.dirty {
            let base = position(*chunk, 0);
            let from = u32::try_from(range.start.saturating_sub(base)).unwrap_or(BLOCK_SIZE_MAX).min(BLOCK_SIZE_MAX);
            let runs = dirty.runs_in(&(from..BLOCK_SIZE_MAX));
            taken.extend(runs.into_iter().map(|(offset, bytes)| (*chunk, Extent { offset, bytes })));
        }
        self.forget_dirty(range);
        taken
    }

    /// Puts back what was taken. Returns how many bytes were given up for newer ones.
    pub(super) fn put_back_dirty(&mut self, taken: Vec<(ChunkIndex, Extent)>) -> u64 {
        let bytes: u64 = taken.iter().map(|(_, extent)| extent.bytes.len() as u64).sum();
        let mut by_chunk: BTreeMap<ChunkIndex, Vec<Extent>> = BTreeMap::new();
        for (chunk, extent) in taken {
            by_chunk.entry(chunk).or_default().push(extent);
        }
        let put_back = |(chunk, extents)| {
            self.written.entry(chunk).or_insert(self.writes);
            self.dirty.entry(chunk).or_default().put_back(extents)
        };
        let given_up = by_chunk.into_iter().map(put_back).sum();
        self.dirty_bytes += bytes - given_up;
        if !self.dirty.is_empty() {
            self.dirty_since = Some(Instant::now());
        }
        given_up
    }

    /// Forgets dirty bytes in `range`. Returns how many.
    pub(super) fn forget_dirty(&mut self, range: Range<u64>) -> u64 {
        if self.appended.as_ref().is_some_and(|appended| range.start < appended.range.end) {
            self.note_write(&range);
        }
        let mut freed = 0;
        let chunks: Vec<ChunkIndex> = self.dirty.keys().copied().collect();
        for chunk in chunks {
            let base = position(chunk, 0);
            let from = range.start.clamp(base, base + CHUNK_SIZE) - base;
            let to = range.end.clamp(base, base + CHUNK_SIZE) - base;
            if let (Ok(from), Ok(to), Some(dirty)) =
                (u32::try_from(from), u32::try_from(to), self.dirty.get_mut(&chunk))
                && from < to
            {
                freed += dirty.forget(from..to);
                if dirty.is_empty() {
                    self.dirty.remove(&chunk);
                    self.written.remove(&chunk);
                }
            }
        }
        if self.dirty.is_empty() {
            self.dirty_since = None;
        }
        self.dirty_bytes -= freed;
        freed
    }

    /// Takes dirty chunks for upload, leaving out those that an earlier upload still has.
    pub(super) fn take_uploads(&mut self, which: Which, compact_from: usize) -> Vec<Arc<Upload>> {
        let appended_from =
            self.appended.as_ref().map_or(ChunkIndex(u32::MAX), |appended| split(appended.range.start).0);
        let ready: Vec<ChunkIndex> = self
            .dirty
            .range(..appended_from)
            .filter(|(chunk, dirty)| !self.busy.contains(chunk) && (which == Which::All || dirty.is_full()))
            .map(|(chunk, _)| *chunk)
            .collect();
        let mut taken = Vec::new();
        let mut batch: Vec<(ChunkIndex, Extent)> = Vec::new();
        let mut bytes = 0;
        for chunk in ready {
            let Some(mut dirty) = self.dirty.remove(&chunk) else { continue };
            let extents = dirty.take();
            let more: u64 = extents.iter().map(|extent| extent.bytes.len() as u64).sum();
            if !batch.is_empty()
                && (bytes + more > UPLOAD_BYTES_MAX || batch.len() + extents.len() > COMMIT_PIECES_MAX / 2)
            {
                taken.push(self.start_upload(std::mem::take(&mut batch), bytes, compact_from));
                bytes = 0;
            }
            bytes += more;
            batch.extend(extents.into_iter().map(|extent| (chunk, extent)));
        }
        if !batch.is_empty() {
            taken.push(self.start_upload(batch, bytes, compact_from));
        }
        taken.extend(self.take_appended(which, compact_from));
        self.dirty_since = if self.dirty.is_empty() { None } else { self.dirty_since };
        taken
    }

    /// Takes what was appended, unless some of it is on its way, or there is too little of it.
    fn take_appended(&mut self, which: Which, compact_from: usize) -> Option<Arc<Upload>> {
        let range = self.appended.as_ref().filter(|appended| appended.upload.is_none())?.range.clone();
        let too_little = which == Which::Full && range.end - range.start < CHUNK_SIZE;
        if too_little || self.busy.range(split(range.start).0..).next().is_some() {
            return None;
        }
        if range.start != self.attr.size {
            self.move_appended(range.start, Vec::new(), self.writes);
        }
        let appended = self.appended.as_ref()?;
        let part = AppendPart { range: appended.range.start..appended.part_end(), at_size: self.attr.size };
        let extents = self.take_up_to(split(part.range.start).0, part.range.end);
        let bytes = extents.iter().map(|(_, extent)| extent.bytes.len() as u64).sum();
        let upload = self.start_upload_of(extents, bytes, compact_from, Some(part));
        if let Some(appended) = &mut self.appended {
            appended.upload = Some(upload.id);
        }
        Some(upload)
    }

    /// Takes what is dirty from `first` on and before `end`.
    fn take_up_to(&mut self, first: ChunkIndex, end: u64) -> Vec<(ChunkIndex, Extent)> {
        let last = split(end - 1).0;
        let chunks: Vec<ChunkIndex> = self.dirty.range(first..=last).map(|(chunk, _)| *chunk).collect();
        let mut taken = Vec::new();
        for chunk in chunks {
            let Some(mut dirty) = self.dirty.remove(&chunk) else { continue };
            let room = u32::try_from(end.saturating_sub(position(chunk, 0))).unwrap_or(BLOCK_SIZE_MAX);
            let mut rest = DirtyChunk::default();
            for Extent { offset, mut bytes } in dirty.take() {
                let later = bytes.split_off((room.saturating_sub(offset) as usize).min(bytes.len()));
                if !later.is_empty() {
                    rest.write(offset.max(room), later);
                }
                if !bytes.is_empty() {
                    taken.push((chunk, Extent { offset, bytes }));
                }
            }
            if !rest.is_empty() {
                self.dirty.insert(chunk, rest);
            }
        }
        taken
    }

    /// Puts what was appended from `start` on, `sent` (written as the `written`th) before what is still dirty, to the end of
    /// the file as it is known now.
    fn move_appended(&mut self, start: u64, sent: Extents, written: u64) {
        let Some(appended) = self.appended.take() else { return };
        let oldest = self.written.values().copied().min().unwrap_or(self.writes);
        let dirty = self.take_dirty(start.max(all_end(&sent))..u64::MAX);
        let end = self.attr.size.max(self.written_end());
        let mtime = self.attr.mtime;
        let sent = sent.into_iter().map(|extent| (extent, written));
        for ((chunk, extent), since) in sent.chain(dirty.into_iter().map(|extent| (extent, oldest))) {
            self.write_since(position(chunk, extent.offset) - start + end, extent.bytes, mtime, since);
        }
        self.appended = Some(appended.rest(start, |at| at - start + end));
    }

    /// Another mount has changed the end of the file, and the attributes are known by now: what was appended goes to the end
    /// that there is. Returns the bytes that are no longer held.
    pub(super) fn rebase(&mut self, upload: &Upload) -> u64 {
        self.end_upload(upload);
        let Some(part) = &upload.append else { return self.put_back(upload, upload.extents.clone()) };
        let is_ours = self.appended.as_ref().is_some_and(|appended| appended.upload == Some(upload.id));
        if !is_ours {
            return self.put_back(upload, upload.extents.clone());
        }
        let (staying, moving) = parted(&upload.extents, part.range.start);
        let given_up = self.put_back(upload, staying);
        self.dirty_since.get_or_insert_with(Instant::now);
        self.move_appended(part.range.start, moving, upload.written);
        given_up
    }

    fn start_upload(&mut self, extents: Vec<(ChunkIndex, Extent)>, bytes: u64, compact_from: usize) -> Arc<Upload> {
        self.start_upload_of(extents, bytes, compact_from, None)
    }

    fn start_upload_of(
        &mut self,
        extents: Vec<(ChunkIndex, Extent)>,
        bytes: u64,
        compact_from: usize,
        append: Option<AppendPart>,
    ) -> Arc<Upload> {
        let id = self.next_upload;
        self.next_upload += 1;
        let written = extents.iter().filter_map(|(chunk, _)| self.written.get(chunk)).min().copied();
        let written = written.unwrap_or(self.writes);
        for (chunk, _) in &extents {
            if !self.dirty.contains_key(chunk) {
                self.written.remove(chunk);
            }
        }
        let scattered = self.note_scattered(&extents, compact_from);
        self.dirty_bytes -= bytes;
        self.busy.extend(extents.iter().map(|(chunk, _)| *chunk));
        let upload = Arc::new(Upload { id, extents, bytes, mtime: self.attr.mtime, scattered, append, written });
        self.uploads.insert(id, Arc::clone(&upload));
        upload
    }

    /// Counts partial writes of each chunk; returns those that have reached `compact_from`.
    fn note_scattered(&mut self, extents: &[(ChunkIndex, Extent)], compact_from: usize) -> Vec<(ChunkIndex, usize)> {
        let mut reached: BTreeMap<ChunkIndex, usize> = BTreeMap::new();
        for (chunk, extent) in extents {
            if extent.bytes.len() == BLOCK_SIZE_MAX as usize {
                self.scattered.remove(chunk);
                continue;
            }
            let count = self.scattered.entry(*chunk).or_insert(0);
            *count += 1;
            if *count >= compact_from {
                reached.insert(*chunk, *count);
            }
        }
        reached.into_iter().collect()
    }

    /// The chunk's pieces have been counted (or rewritten as few): counting starts again from there.
    pub(super) fn set_scattered(&mut self, chunk: ChunkIndex, pieces: usize) {
        self.scattered.insert(chunk, pieces);
    }

    /// The upload has been committed as `pieces`. Returns the bytes that are no longer held.
    pub(super) fn finish(
        &mut self,
        upload: &Upload,
        pieces: &[(ChunkIndex, Piece)],
        places: &[BlockPlace],
        attr: Attr,
    ) -> u64 {
        self.end_upload(upload);
        self.map.commit(attr.data_version, pieces, places);
        self.learn_own(attr);
        if let Some(appended) = self.appended.take_if(|appended| appended.upload == Some(upload.id))
            && let Some(part) = &upload.append
            && part.range.end < appended.range.end
        {
            self.appended = Some(appended.rest(part.range.end, |at| at));
        }
        upload.bytes
    }

    /// The upload failed: its bytes are dirty again, under those written since. Returns the bytes that are no longer held.
    pub(super) fn fail(&mut self, upload: &Upload, error: Errno) -> u64 {
        self.end_upload(upload);
        if let Some(appended) = &mut self.appended
            && appended.upload == Some(upload.id)
        {
            appended.upload = None;
        }
        let freed = self.put_back(upload, upload.extents.clone());
        self.note_error(error);
        freed
    }

    /// The upload can never succeed (the file is gone): its bytes are given up.
    pub(super) fn give_up(&mut self, upload: &Upload, error: Errno) -> u64 {
        self.end_upload(upload);
        self.appended.take_if(|appended| appended.upload == Some(upload.id));
        self.note_error(error);
        upload.bytes
    }

    /// Nothing that was written before is stored any more, if that can still be helped. Returns how many bytes are let go at once.
    pub(super) fn lose_writes(&mut self, error: Errno) -> u64 {
        self.severed = self.last_upload();
        if !self.is_clean() {
            self.note_error(error);
        }
        self.appended = None;
        self.forget_dirty(0..u64::MAX)
    }

    /// Is the upload of what must not be stored any more?
    pub(super) fn is_severed(&self, upload: &Upload) -> bool {
        upload.id <= self.severed
    }

    /// Whether what the upload brought has been stored is not known, and may not be for a while. Nobody waits for it any more.
    pub(super) fn note_late(&mut self, upload: &Upload) {
        self.late.insert(upload.id);
        self.note_error(Errno(libc::EIO));
    }

    /// Is there something that was sent long ago, of which nothing is known?
    pub(super) fn has_late(&self) -> bool {
        !self.late.is_empty()
    }

    /// What the upload had is dirty again, as old as it is. Returns how many bytes were given up for newer ones.
    fn put_back(&mut self, upload: &Upload, extents: Vec<(ChunkIndex, Extent)>) -> u64 {
        for (chunk, _) in &extents {
            let written = self.written.entry(*chunk).or_insert(upload.written);
            *written = (*written).min(upload.written);
        }
        self.put_back_dirty(extents)
    }

    fn end_upload(&mut self, upload: &Upload) {
        self.uploads.remove(&upload.id);
        self.late.remove(&upload.id);
        upload.extents.iter().for_each(|(chunk, _)| {
            self.busy.remove(chunk);
        });
    }

    pub(super) fn note_error(&mut self, error: Errno) {
        self.errors += 1;
        self.last_error = error.0;
    }

    // ---- reading ----

    /// How to read `range` of `chunk`.
    pub(super) fn plan(&self, chunk: ChunkIndex, range: Range<u32>) -> ChunkPlan {
        self.plan_over(chunk, range, self.dirty.get(&chunk))
    }

    fn plan_over(&self, chunk: ChunkIndex, range: Range<u32>, dirty: Option<&DirtyChunk>) -> ChunkPlan {
        if let Some(bytes) = dirty.and_then(|dirty| dirty.covering(&range)) {
            return ChunkPlan::Bytes(bytes);
        }
        let sent = self.sent_extents(chunk, &range);
        if let (None, Some(bytes)) = (dirty.filter(|dirty| dirty.touches(&range)), covering(&sent, &range)) {
            return ChunkPlan::Bytes(bytes);
        }
        let Some(pieces) = self.map.pieces(chunk) else { return ChunkPlan::UnknownMap };
        let mut parts = Vec::new();
        for part in plan::parts(&pieces, &range) {
            match self.map.place(part.block) {
                Some(place) => parts.push((part, place)),
                None => return ChunkPlan::UnknownMap,
            }
        }
        let mut overlays: Vec<(u32, Bytes)> =
            sent.into_iter().map(|extent| (extent.offset, extent.bytes.clone())).collect();
        if let Some(dirty) = dirty.filter(|dirty| dirty.touches(&range)) {
            overlays.extend(dirty.runs_in(&range));
        }
        ChunkPlan::Assemble(Assembly { range, parts, overlays })
    }

    /// How to read all of `chunk` as it will be when the upload that has it is committed: without what is dirty.
    /// And the digest of the committed pieces that this is about.
    pub(super) fn plan_sent(&self, chunk: ChunkIndex) -> (ChunkPlan, u64) {
        let committed = self.map.pieces(chunk).unwrap_or_default();
        (self.plan_over(chunk, 0..BLOCK_SIZE_MAX, None), pieces::digest(&committed))
    }

    fn sent_extents(&self, chunk: ChunkIndex, range: &Range<u32>) -> Vec<&Extent> {
        if !self.busy.contains(&chunk) {
            return Vec::new();
        }
        let of_chunk =
            self.uploads.values().flat_map(|upload| upload.extents.iter().filter(|(other, _)| *other == chunk));
        let touching = of_chunk.filter(|(_, extent)| extent.offset < range.end && range.start < extent.range().end);
        touching.map(|(_, extent)| extent).collect()
    }
}

fn covering(sent: &[&Extent], range: &Range<u32>) -> Option<Bytes> {
    let [extent] = sent else { return None };
    let covers = extent.offset <= range.start && range.end <= extent.range().end;
    covers.then(|| extent.bytes.slice((range.start - extent.offset) as usize..(range.end - extent.offset) as usize))
}

/// First offset of the file past the last of `extents`, which are in order.
fn all_end(extents: &[(ChunkIndex, Extent)]) -> u64 {
    extents.last().map_or(0, |(chunk, extent)| position(*chunk, extent.range().end))
}

type Extents = Vec<(ChunkIndex, Extent)>;

/// What lies before `at`, and the rest.
fn parted(extents: &[(ChunkIndex, Extent)], at: u64) -> (Extents, Extents) {
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for (chunk, Extent { offset, bytes }) in extents {
        let start = position(*chunk, *offset);
        let length = usize::try_from(at.saturating_sub(start)).unwrap_or(usize::MAX).min(bytes.len());
        let (head, tail) = (bytes.slice(..length), bytes.slice(length..));
        if !head.is_empty() {
            before.push((*chunk, Extent { offset: *offset, bytes: head }));
        }
        if !tail.is_empty() {
            let (chunk, offset) = split(start + length as u64);
            after.push((chunk, Extent { offset, bytes: tail }));
        }
    }
    (before, after)
}

/// Chunk and offset in it. Past the last chunk that a file can have, the last one.
pub(super) fn split(offset: u64) -> (ChunkIndex, u32) {
    let chunk = u32::try_from(offset / CHUNK_SIZE).unwrap_or(u32::MAX);
    let within = (offset % CHUNK_SIZE) as u32;
    (ChunkIndex(chunk), within)
}

pub(super) fn position(chunk: ChunkIndex, within: u32) -> u64 {
    u64::from(chunk.0) * CHUNK_SIZE + u64::from(within)
}

#[cfg(test)]
mod tests {
    use holdfast_common::Kind;

    use super::*;

    const MIB: u64 = CHUNK_SIZE;

    fn attr(size: u64, data_version: u64) -> Attr {
        let time = Time { secs: 1, nanos: 0 };
        let example = Attr::example(7, Kind::File);
        Attr { size, stored: size, mtime: time, ctime: time, data_version, ..example }
    }

    fn inode(size: u64) -> Arc<Inode> {
        Inode::new(attr(size, 1), KnownMap::default(), PAGES_UNKNOWN)
    }

    fn append(state: &mut State, length: usize, fill: u8) {
        let start = state.append_offset().unwrap();
        state.note_append(start..start + length as u64);
        state.write(start, vec![fill; length].into(), Time { secs: 2, nanos: 0 });
    }

    /// What an upload has, as runs of (offset in the file, length, first byte).
    fn runs(upload: &Upload) -> Vec<(u64, usize, u8)> {
        let run = |(chunk, extent): &(ChunkIndex, Extent)| {
            (position(*chunk, extent.offset), extent.bytes.len(), extent.bytes[0])
        };
        upload.extents.iter().map(run).collect()
    }

    fn take_one(state: &mut State) -> Arc<Upload> {
        let mut taken = state.take_uploads(Which::All, usize::MAX);
        assert_eq!(taken.len(), 1);
        taken.remove(0)
    }

    #[test]
    fn what_is_refused_at_one_end_goes_to_the_other_in_its_order() {
        // Another mount appends; and another one cuts the file, where the old end was no end any more.
        for end in [250, 0] {
            let inode = inode(100);
            let mut state = inode.lock();
            append(&mut state, 10, 1);
            let upload = take_one(&mut state);
            assert_eq!((runs(&upload), upload.append.as_ref().unwrap().at_size), (vec![(100, 10, 1)], 100));
            append(&mut state, 20, 2);
            assert!(state.take_uploads(Which::All, usize::MAX).is_empty(), "one at a time");
            state.learn(attr(end, 2));
            assert_eq!(state.rebase(&upload), 0);
            let upload = take_one(&mut state);
            assert_eq!(runs(&upload), [(end, 30, 1)]);
            assert_eq!(upload.append.as_ref().unwrap().at_size, end);
            assert_eq!(state.finish(&upload, &[], &[], attr(end + 30, 3)), 30);
            assert!(state.is_clean() && !state.has_dirty_of(u64::MAX));
            assert_eq!(state.append_offset(), Some(end + 30));
        }
    }

    #[test]
    fn what_follows_a_part_that_was_sent_is_sent_after_it() {
        let inode = inode(MIB - 5);
        let mut state = inode.lock();
        append(&mut state, 10, 1);
        let first = take_one(&mut state);
        assert_eq!(runs(&first), [(MIB - 5, 5, 1), (MIB, 5, 1)]);
        let writes = state.writes();
        append(&mut state, 10, 2);
        assert!(!state.has_dirty_of(writes));
        state.finish(&first, &[], &[], attr(MIB + 5, 2));
        let second = take_one(&mut state);
        assert_eq!((runs(&second), second.append.as_ref().unwrap().at_size), (vec![(MIB + 5, 10, 2)], MIB + 5));
        // A failure leaves everything where it was, to be tried again.
        assert_eq!(state.fail(&second, Errno(libc::EIO)), 0);
        assert!(state.has_dirty_of(writes + 1));
        assert_eq!(runs(&take_one(&mut state)), [(MIB + 5, 10, 2)]);
    }

    #[test]
    fn a_long_append_goes_in_parts_of_whole_records() {
        let inode = inode(0);
        let mut state = inode.lock();
        let record = 300_000;
        for n in 0..30 {
            append(&mut state, record, n);
        }
        let (mut sent, mut parts) = (0, 0);
        while !state.is_clean() {
            let upload = take_one(&mut state);
            let bytes: u64 = upload.extents.iter().map(|(_, extent)| extent.bytes.len() as u64).sum();
            assert_eq!((upload.bytes, bytes % record as u64), (bytes, 0), "whole records");
            assert!(bytes <= UPLOAD_BYTES_MAX);
            assert_eq!(runs(&upload)[0].0, sent);
            sent += bytes;
            parts += 1;
            state.finish(&upload, &[], &[], attr(sent, 1 + parts));
        }
        assert_eq!((sent, parts), (9_000_000, 3));
    }

    #[test]
    fn a_write_into_what_was_appended_pins_it() {
        let inode = inode(100);
        let mut state = inode.lock();
        append(&mut state, 10, 1);
        let sent = take_one(&mut state);
        state.note_write(&(104..106));
        state.write(104, vec![9; 2].into(), Time { secs: 3, nanos: 0 });
        state.learn(attr(140, 2));
        append(&mut state, 5, 2);
        // It goes back to where it was taken to be, under what was written since; what was appended later is another matter.
        assert_eq!(state.rebase(&sent), 2);
        let mut uploads = state.take_uploads(Which::All, usize::MAX);
        let runs: Vec<_> = uploads.drain(..).flat_map(|upload| runs(&upload)).collect();
        assert_eq!(runs, [(100, 10, 1), (140, 5, 2)]);
    }

    #[test]
    fn an_upload_of_which_nothing_is_known_is_not_waited_for() {
        let inode = inode(0);
        let mut state = inode.lock();
        append(&mut state, 10, 1);
        let upload = take_one(&mut state);
        assert!(state.uploads_up_to(state.last_upload()) && !state.has_late());
        state.note_late(&upload);
        assert!(!state.uploads_up_to(state.last_upload()) && state.has_late() && !state.is_clean());
        state.finish(&upload, &[], &[], attr(10, 2));
        assert!(!state.has_late() && state.is_clean());
    }
}

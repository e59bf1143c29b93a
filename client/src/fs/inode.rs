//! What this mount knows of one file that is open here or has bytes on their way.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use holdfast_common::{
    Attr, ChunkIndex, Ino, Piece, Position, Time,
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
    next_upload: u64,
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
    /// Of the last change of this file by this mount.
    last_position: Position,
    /// The file was opened as it was: whether what others (or this mount, before) did to it is durable is not known.
    inherited: bool,
}

/// Bytes that were appended and are not committed: the commit decides where they come to lie, for another mount may append too.
#[derive(Debug)]
struct Appended {
    /// Where this mount takes them to be.
    range: Range<u64>,
    /// Its first part is on its way. One at a time, or they could change places.
    sent: bool,
}

/// Extents on their way: at most one upload at a time has a chunk.
#[derive(Debug)]
pub(super) struct Upload {
    pub id: u64,
    pub extents: Vec<(ChunkIndex, Extent)>,
    pub bytes: u64,
    /// When the last of these bytes was written.
    pub mtime: Time,
    /// Chunks that have been written bit by bit so often that they may need compacting, with the pieces that they
    /// have at most.
    pub scattered: Vec<(ChunkIndex, usize)>,
    /// The part of it that belongs at the end of the file, wherever that is. Whole records: one of another mount may come to lie
    /// before it.
    pub append: Option<Range<u64>>,
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
            next_upload: 1,
            appended: None,
            map,
            pages,
            forgotten: false,
            scattered: BTreeMap::new(),
            errors: 0,
            last_error: 0,
            last_position: Position(0),
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

    /// The attributes have changed in a way that is not known here.
    pub(super) fn distrust_attr(&mut self) {
        self.attr_at = None;
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

    pub(super) fn forget_pages(&mut self) {
        self.forgotten = true;
    }

    /// What to remember when this state goes.
    pub(super) fn pages_version(&self) -> Option<u64> {
        (!self.forgotten && self.pages != PAGES_UNKNOWN).then_some(self.pages)
    }

    /// This mount changed the file at `position`.
    pub(super) fn note_position(&mut self, position: Position) {
        self.last_position = self.last_position.max(position);
    }

    /// What must become durable for an fsync; `None`: nothing may be taken for durable without asking.
    pub(super) fn to_make_durable(&self) -> Option<Position> {
        (!self.inherited).then_some(self.last_position)
    }

    /// Nobody but this mount has changed the file before `position`, or all that was done is durable.
    pub(super) fn disinherit(&mut self) {
        self.inherited = false;
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

    pub(super) fn has_dirty(&self) -> bool {
        !self.dirty.is_empty()
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

    pub(super) fn uploads_up_to(&self, id: u64) -> bool {
        self.uploads.first_key_value().is_some_and(|(first, _)| *first <= id)
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
            Some(appended) => appended.range.end = range.end,
            None => self.appended = Some(Appended { range, sent: false }),
        }
    }

    /// `range` is about to be written where it is said. What was appended after its start stays where it is taken to be.
    pub(super) fn note_write(&mut self, range: &Range<u64>) {
        if self.appended.as_ref().is_some_and(|appended| range.end > appended.range.start) {
            self.appended = None;
        }
    }

    /// Takes in written bytes. Returns how many more are held, and whether a chunk is now complete.
    pub(super) fn write(&mut self, offset: u64, mut data: Bytes, now: Time) -> (u64, bool) {
        let (mut grown, mut full, mut at) = (0, false, offset);
        while !data.is_empty() {
            let (chunk, within) = split(at);
            let room = (BLOCK_SIZE_MAX - within) as usize;
            let head = data.split_to(room.min(data.len()));
            at += head.len() as u64;
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
        let put_back = |(chunk, extents)| self.dirty.entry(chunk).or_default().put_back(extents);
        let given_up = by_chunk.into_iter().map(put_back).sum();
        self.dirty_bytes += bytes - given_up;
        if !self.dirty.is_empty() {
            self.dirty_since = Some(Instant::now());
        }
        given_up
    }

    /// Forgets dirty bytes in `range`. Returns how many.
    pub(super) fn forget_dirty(&mut self, range: Range<u64>) -> u64 {
        self.note_write(&range);
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

    /// Takes all that was appended, unless some of it is on its way, or there is too little of it.
    fn take_appended(&mut self, which: Which, compact_from: usize) -> Option<Arc<Upload>> {
        let appended = self.appended.as_ref()?;
        let range = appended.range.clone();
        let from = split(range.start).0;
        let too_little = which == Which::Full && range.end - range.start < CHUNK_SIZE;
        if appended.sent || too_little || self.busy.range(from..).next().is_some() {
            return None;
        }
        let mut extents = Vec::new();
        for (chunk, mut dirty) in self.dirty.split_off(&from) {
            extents.extend(dirty.take().into_iter().map(|extent| (chunk, extent)));
        }
        let bytes = extents.iter().map(|(_, extent)| extent.bytes.len() as u64).sum();
        self.appended = Some(Appended { range: range.clone(), sent: true });
        Some(self.start_upload_of(extents, bytes, compact_from, Some(range)))
    }

    fn start_upload(&mut self, extents: Vec<(ChunkIndex, Extent)>, bytes: u64, compact_from: usize) -> Arc<Upload> {
        self.start_upload_of(extents, bytes, compact_from, None)
    }

    fn start_upload_of(
        &mut self,
        extents: Vec<(ChunkIndex, Extent)>,
        bytes: u64,
        compact_from: usize,
        append: Option<Range<u64>>,
    ) -> Arc<Upload> {
        let id = self.next_upload;
        self.next_upload += 1;
        let scattered = self.note_scattered(&extents, compact_from);
        self.dirty_bytes -= bytes;
        self.busy.extend(extents.iter().map(|(chunk, _)| *chunk));
        let upload = Arc::new(Upload { id, extents, bytes, mtime: self.attr.mtime, scattered, append });
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

    /// The upload has been committed as `pieces`, what was appended `moved` bytes further than it was taken to be. Returns the
    /// bytes that are no longer held.
    pub(super) fn finish(
        &mut self,
        upload: &Upload,
        pieces: &[(ChunkIndex, Piece)],
        places: &[BlockPlace],
        attr: Attr,
        moved: u64,
    ) -> u64 {
        self.end_upload(upload);
        self.map.commit(attr.data_version, pieces, places);
        self.learn_own(attr);
        if let Some(range) = &upload.append {
            self.finish_append(range.end, moved);
        }
        upload.bytes
    }

    /// What was appended up to `end` is committed, and what follows it moves with it.
    fn finish_append(&mut self, end: u64, moved: u64) {
        let Some(Appended { range, .. }) = self.appended.take() else { return };
        if end >= range.end {
            return;
        }
        if moved > 0 {
            let mtime = self.attr.mtime;
            for (chunk, extent) in self.take_dirty(end..u64::MAX) {
                self.write(position(chunk, extent.offset) + moved, extent.bytes, mtime);
            }
        }
        self.appended = Some(Appended { range: end + moved..range.end + moved, sent: false });
    }

    /// The upload failed: its bytes are dirty again, under those written since. Returns the bytes that are no longer held.
    pub(super) fn fail(&mut self, upload: &Upload, error: Errno) -> u64 {
        self.end_upload(upload);
        if let (Some(_), Some(appended)) = (&upload.append, &mut self.appended) {
            appended.sent = false;
        }
        let freed = self.put_back_dirty(upload.extents.clone());
        self.note_error(error);
        freed
    }

    /// The upload can never succeed (the file is gone): its bytes are given up.
    pub(super) fn give_up(&mut self, upload: &Upload, error: Errno) -> u64 {
        self.end_upload(upload);
        self.appended = None;
        self.note_error(error);
        upload.bytes
    }

    fn end_upload(&mut self, upload: &Upload) {
        self.uploads.remove(&upload.id);
        upload.extents.iter().for_each(|(chunk, _)| {
            self.busy.remove(chunk);
        });
    }

    fn note_error(&mut self, error: Errno) {
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

/// Chunk and offset in it. Past the last chunk that a file can have, the last one.
pub(super) fn split(offset: u64) -> (ChunkIndex, u32) {
    let chunk = u32::try_from(offset / CHUNK_SIZE).unwrap_or(u32::MAX);
    let within = (offset % CHUNK_SIZE) as u32;
    (ChunkIndex(chunk), within)
}

pub(super) fn position(chunk: ChunkIndex, within: u32) -> u64 {
    u64::from(chunk.0) * CHUNK_SIZE + u64::from(within)
}

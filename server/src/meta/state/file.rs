//! The bytes of files: commits, truncation, holes, shared ranges; and `setattr`, which can truncate.

use std::{collections::BTreeMap, ops::ControlFlow};

use holdfast_common::{
    ChunkIndex, Ino, Kind, Piece, Refusal, Replicas, Time,
    limits::{ACCESSED_MAX, CHUNK_SIZE, COMMIT_FILES_MAX, COMMIT_PIECES_MAX, FILE_SIZE_MAX, PIECES_PER_CHUNK_MAX},
    mode, pieces,
    wire::meta::{FileCommit, Mutated, NewBlock, SetAttr, SetTime},
};

use super::{
    Rows, Step, StorageError, Tables, acl,
    blocks::Changes,
    existing,
    replicas::Enough,
    rows::{Inode, decode_chunk, decode_pieces, encode_pieces},
    settled,
    tables::{Result, fetch, key, scan},
};

const SETUID: u32 = 0o4000;
const SETGID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;
/// Pieces that one `CopyRange` shares at most.
const COPY_PIECES_MAX: usize = 256 << 10;

/// New data of many files. Each stands alone.
pub(super) fn commit(tables: &mut Tables<'_>, files: &[FileCommit], blocks: &[NewBlock], now: Time) -> Step<Mutated> {
    let pieces: usize = files.iter().map(|file| file.pieces.len()).sum();
    if files.len() > COMMIT_FILES_MAX || pieces > COMMIT_PIECES_MAX || blocks.len() > COMMIT_PIECES_MAX {
        return Err(Refusal::Invalid.into());
    }
    let mut changes = Changes::default();
    let enough = Enough::of(tables, files)?;
    for block in blocks {
        changes.bring(tables, block, enough.copies(block.hash))?;
    }
    let mut answers = Vec::with_capacity(files.len());
    for file in files {
        answers.push(settled(commit_file(tables, &mut changes, file, now))?.map(|inode| inode.attr(file.ino)));
    }
    changes.settle(tables)?;
    Ok(Mutated::Committed(answers))
}

/// New data at the end of a file, if the end is where the writer thinks that it is.
pub(super) fn append(
    tables: &mut Tables<'_>,
    file: &FileCommit,
    blocks: &[NewBlock],
    at_size: u64,
    now: Time,
) -> Step<Mutated> {
    if regular(tables, file.ino)?.size != at_size {
        return Err(Refusal::Busy.into());
    }
    let outcome = commit(tables, std::slice::from_ref(file), blocks, now)?;
    match outcome {
        // One file, one answer.
        Mutated::Committed(ref files) => match files[..] {
            [Err(refusal)] => Err(refusal.into()),
            _ => Ok(outcome),
        },
        other => Ok(other),
    }
}

fn commit_file(tables: &mut Tables<'_>, changes: &mut Changes, file: &FileCommit, now: Time) -> Step<Inode> {
    let mut inode = regular(tables, file.ino)?;
    if file.size_at_least > FILE_SIZE_MAX {
        return Err(Refusal::FileTooLarge.into());
    }
    if !file.mtime.is_sound() {
        return Err(Refusal::Invalid.into());
    }
    for (index, digest) in &file.only_over {
        let now = fetch(tables.tree(), &key::pieces(file.ino, *index), decode_pieces)?.unwrap_or_default();
        if pieces::digest(&now) != *digest {
            return Err(Refusal::Busy.into());
        }
    }
    let mut size = inode.size.max(file.size_at_least);
    let mut rewrite = Rewrite::new(file.ino);
    for (index, piece) in &file.pieces {
        check_piece(tables, changes, *index, piece)?;
        rewrite.lay(tables, *index, *piece)?;
        size = size.max(start_of(*index) + u64::from(piece.end()));
    }
    rewrite.check()?;
    rewrite.finish(tables, &mut inode, changes)?;
    inode.size = size;
    inode.data_version += 1;
    (inode.mtime, inode.ctime) = (file.mtime, now);
    if file.clear_suid {
        clear_suid(&mut inode);
    }
    tables.put_inode(file.ino, inode.clone());
    Ok(inode)
}

fn check_piece(tables: &Tables<'_>, changes: &Changes, index: ChunkIndex, piece: &Piece) -> Step<()> {
    let length = changes.length(tables, piece.block)?;
    if !pieces::is_sound(piece, length) || u64::from(index.0) >= FILE_SIZE_MAX / CHUNK_SIZE {
        return Err(Refusal::Invalid.into());
    }
    Ok(())
}

pub(super) fn set_attr(tables: &mut Tables<'_>, ino: Ino, set: &SetAttr, now: Time) -> Step<Mutated> {
    let mut inode = existing(tables, ino)?;
    check_times(set)?;
    if let Some(size) = set.size {
        inode = regular(tables, ino)?;
        resize(tables, ino, &mut inode, size)?;
        inode.mtime = now;
    }
    if let Some(changed) = set.mode {
        inode.mode = (inode.mode & !mode::PERMISSIONS) | (changed & mode::PERMISSIONS);
        acl::follow_mode(tables, ino, &inode)?;
    }
    inode.uid = set.uid.unwrap_or(inode.uid);
    inode.gid = set.gid.unwrap_or(inode.gid);
    inode.atime = chosen(set.atime, inode.atime, now);
    inode.mtime = chosen(set.mtime, inode.mtime, now);
    inode.ctime = now;
    if set.clear_suid && !inode.is_directory() {
        clear_suid(&mut inode);
    }
    let attr = inode.attr(ino);
    tables.put_inode(ino, inode);
    Ok(Mutated::Inode { attr, created: false })
}

/// Seconds after which an access is noted though the file has not changed since the last one (mount(8), relatime).
const ACCESS_AGE: i64 = 24 * 60 * 60;

pub(super) fn accessed(tables: &mut Tables<'_>, files: &[(Ino, Time)], always: bool) -> Step<Mutated> {
    if files.len() > ACCESSED_MAX || files.iter().any(|(_, at)| !at.is_sound()) {
        return Err(Refusal::Invalid.into());
    }
    for (ino, at) in files {
        let Some(mut inode) = tables.inode(*ino)? else { continue };
        let is_old = inode.atime <= inode.mtime || inode.atime <= inode.ctime;
        let is_due = always || is_old || at.secs.saturating_sub(inode.atime.secs) >= ACCESS_AGE;
        if is_due && *at > inode.atime {
            inode.atime = *at;
            tables.put_inode(*ino, inode);
        }
    }
    Ok(Mutated::Done)
}

fn check_times(set: &SetAttr) -> Result<(), Refusal> {
    let valid = |time: Option<SetTime>| !matches!(time, Some(SetTime::At(at)) if !at.is_sound());
    if valid(set.atime) && valid(set.mtime) { Ok(()) } else { Err(Refusal::Invalid) }
}

fn chosen(set: Option<SetTime>, old: Time, now: Time) -> Time {
    match set {
        None => old,
        Some(SetTime::Now) => now,
        Some(SetTime::At(time)) => time,
    }
}

/// Setgid without group execution once meant mandatory locking, and stays, as in the kernel.
fn clear_suid(inode: &mut Inode) {
    inode.mode &= !SETUID;
    if inode.mode & GROUP_EXECUTE != 0 {
        inode.mode &= !SETGID;
    }
}

fn resize(tables: &mut Tables<'_>, ino: Ino, inode: &mut Inode, size: u64) -> Step<()> {
    if size > FILE_SIZE_MAX {
        return Err(Refusal::FileTooLarge.into());
    }
    if size < inode.size {
        let end = inode.size;
        hole(tables, ino, inode, size..end)?;
    }
    if size != inode.size {
        inode.data_version += 1;
    }
    inode.size = size;
    Ok(())
}

pub(super) fn punch(
    tables: &mut Tables<'_>,
    ino: Ino,
    offset: u64,
    length: u64,
    grow: bool,
    now: Time,
) -> Step<Mutated> {
    let mut inode = regular(tables, ino)?;
    let end = checked_end(offset, length)?;
    let within = offset.min(inode.size)..end.min(inode.size);
    hole(tables, ino, &mut inode, within)?;
    if grow {
        inode.size = inode.size.max(end);
    }
    touch_data(&mut inode, now);
    let attr = inode.attr(ino);
    tables.put_inode(ino, inode);
    Ok(Mutated::Inode { attr, created: false })
}

fn touch_data(inode: &mut Inode, now: Time) {
    inode.data_version += 1;
    (inode.mtime, inode.ctime) = (now, now);
}

fn checked_end(offset: u64, length: u64) -> Result<u64, Refusal> {
    match offset.checked_add(length) {
        _ if length == 0 => Err(Refusal::Invalid),
        Some(end) if end <= FILE_SIZE_MAX => Ok(end),
        _ => Err(Refusal::FileTooLarge),
    }
}

fn hole(tables: &mut Tables<'_>, ino: Ino, inode: &mut Inode, bytes: std::ops::Range<u64>) -> Step<()> {
    let mut changes = Changes::default();
    let mut rewrite = Rewrite::new(ino);
    rewrite.hole(tables, bytes)?;
    rewrite.check()?;
    rewrite.finish(tables, inode, &mut changes)?;
    Ok(changes.settle(tables)?)
}

/// Shares the pieces of a range. What lies past the end of `from` is not copied.
pub(super) fn copy_range(
    tables: &mut Tables<'_>,
    (from, from_offset): (Ino, u64),
    (to, to_offset): (Ino, u64),
    length: u64,
    now: Time,
) -> Step<Mutated> {
    let source = regular(tables, from)?;
    let mut inode = regular(tables, to)?;
    checked_end(from_offset, length)?;
    let length = length.min(source.size.saturating_sub(from_offset));
    if length > 0 {
        let to_end = checked_end(to_offset, length)?;
        if from == to && from_offset < to_end && to_offset < from_offset + length {
            return Err(Refusal::Invalid.into());
        }
        share(tables, &mut inode, (from, from_offset), (to, to_offset), length)?;
        inode.size = inode.size.max(to_end);
        touch_data(&mut inode, now);
        tables.put_inode(to, inode.clone());
    }
    Ok(Mutated::Inode { attr: inode.attr(to), created: false })
}

fn share(
    tables: &mut Tables<'_>,
    inode: &mut Inode,
    (from, from_offset): (Ino, u64),
    (to, to_offset): (Ino, u64),
    length: u64,
) -> Step<()> {
    let shared = pieces_within(tables, from, from_offset..from_offset + length)?;
    let mut rewrite = Rewrite::new(to);
    rewrite.hole(tables, to_offset..to_offset + length)?;
    for (at, piece) in shared {
        rewrite.lay_at(tables, at - from_offset + to_offset, piece)?;
    }
    rewrite.check()?;
    let mut changes = Changes::default();
    rewrite.finish(tables, inode, &mut changes)?;
    Ok(changes.settle(tables)?)
}

/// The parts of pieces within `bytes`, each with its place in the file.
fn pieces_within(tables: &Tables<'_>, ino: Ino, bytes: std::ops::Range<u64>) -> Step<Vec<(u64, Piece)>> {
    let mut found = Vec::new();
    let mut too_many = false;
    scan_chunks(tables, ino, &bytes, |index, pieces, _| {
        let parts = pieces.iter().filter_map(|piece| pieces::within(piece, span(index, &bytes)));
        found.extend(parts.map(|part| (start_of(index) + u64::from(part.offset), part)));
        too_many = found.len() > COPY_PIECES_MAX;
        Ok(if too_many { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    if too_many { Err(Refusal::TooLarge.into()) } else { Ok(found) }
}

/// A regular file's inode.
pub(super) fn regular(rows: &impl Rows, ino: Ino) -> Step<Inode> {
    let inode = existing(rows, ino)?;
    match inode.kind {
        Kind::File => Ok(inode),
        Kind::Directory => Err(Refusal::IsDirectory.into()),
        _ => Err(Refusal::Invalid.into()),
    }
}

pub(super) fn start_of(index: ChunkIndex) -> u64 {
    u64::from(index.0) * CHUNK_SIZE
}

/// The chunk that holds byte `offset`, which is at most `FILE_SIZE_MAX`.
pub(super) fn chunk_of(offset: u64) -> ChunkIndex {
    ChunkIndex((offset.min(FILE_SIZE_MAX) / CHUNK_SIZE) as u32)
}

fn offset_in_chunk(offset: u64) -> u32 {
    (offset % CHUNK_SIZE) as u32
}

/// Where `bytes` begin and end within a chunk that they touch.
fn span(index: ChunkIndex, bytes: &std::ops::Range<u64>) -> std::ops::Range<u32> {
    let start = bytes.start.saturating_sub(start_of(index)).min(CHUNK_SIZE);
    let end = bytes.end.saturating_sub(start_of(index)).min(CHUNK_SIZE);
    start as u32..end as u32
}

/// Shows the chunks that have pieces and touch `bytes`, in order, until `visit` breaks.
pub(super) fn scan_chunks(
    rows: &impl Rows,
    ino: Ino,
    bytes: &std::ops::Range<u64>,
    mut visit: impl FnMut(ChunkIndex, Vec<Piece>, Replicas) -> Result<ControlFlow<()>>,
) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let start = key::pieces(ino, chunk_of(bytes.start));
    let end = key::pieces(ino, ChunkIndex(chunk_of(bytes.end - 1).0 + 1));
    scan(rows.tree(), &start, &end, |key, row| {
        let (pieces, replicas) = decode_chunk(row)?;
        visit(index_of(key)?, pieces, replicas)
    })
}

pub(super) fn index_of(key: &[u8]) -> Result<ChunkIndex> {
    let index = key.last_chunk::<4>().ok_or_else(|| StorageError::Damaged("pieces: key".into()))?;
    Ok(ChunkIndex(u32::from_be_bytes(*index)))
}

/// New pieces of some chunks of one file, worked out before anything is written.
struct Rewrite {
    ino: Ino,
    chunks: BTreeMap<ChunkIndex, Chunk>,
}

#[derive(Default)]
struct Chunk {
    old: Vec<Piece>,
    /// Under which the old ones are counted.
    replicas: Replicas,
    new: Vec<Piece>,
}

impl Rewrite {
    fn new(ino: Ino) -> Self {
        Self { ino, chunks: BTreeMap::new() }
    }

    fn chunk(&mut self, tables: &Tables<'_>, index: ChunkIndex) -> Result<&mut Chunk> {
        if !self.chunks.contains_key(&index) {
            let (old, replicas) =
                fetch(tables.tree(), &key::pieces(self.ino, index), decode_chunk)?.unwrap_or_default();
            self.chunks.insert(index, Chunk { new: old.clone(), old, replicas });
        }
        Ok(self.chunks.entry(index).or_default())
    }

    fn lay(&mut self, tables: &Tables<'_>, index: ChunkIndex, piece: Piece) -> Result<()> {
        pieces::lay_over(&mut self.chunk(tables, index)?.new, piece);
        Ok(())
    }

    /// Lays a piece of any alignment: at an edge of a chunk it is split.
    fn lay_at(&mut self, tables: &Tables<'_>, at: u64, piece: Piece) -> Result<()> {
        let placed = Piece { offset: offset_in_chunk(at), ..piece };
        let room = CHUNK_SIZE - u64::from(placed.offset);
        match u32::try_from(room).ok().filter(|room| *room < piece.length) {
            None => self.lay(tables, chunk_of(at), placed),
            Some(room) => {
                let rest = Piece { length: piece.length - room, block_offset: piece.block_offset + room, ..piece };
                self.lay(tables, chunk_of(at), Piece { length: room, ..placed })?;
                self.lay(tables, chunk_of(at + u64::from(room)), Piece { offset: 0, ..rest })
            }
        }
    }

    fn hole(&mut self, tables: &Tables<'_>, bytes: std::ops::Range<u64>) -> Result<()> {
        let ino = self.ino;
        scan_chunks(tables, ino, &bytes, |index, old, replicas| {
            let mut new = old.clone();
            pieces::clear(&mut new, span(index, &bytes));
            self.chunks.insert(index, Chunk { old, replicas, new });
            Ok(ControlFlow::Continue(()))
        })
    }

    fn check(&self) -> Result<(), Refusal> {
        let full = self.chunks.values().any(|chunk| chunk.new.len() > PIECES_PER_CHUNK_MAX);
        if full { Err(Refusal::TooLarge) } else { Ok(()) }
    }

    fn finish(self, tables: &mut Tables<'_>, inode: &mut Inode, changes: &mut Changes) -> Result<()> {
        for (index, Chunk { old, replicas, new }) in self.chunks {
            if old == new {
                continue;
            }
            inode.stored = inode.stored.wrapping_add(pieces::stored(&new)).wrapping_sub(pieces::stored(&old));
            changes.name(&new, inode.replicas);
            changes.unname(&old, replicas);
            let row = key::pieces(self.ino, index);
            match new.is_empty() {
                true => tables.remove_tree(&row)?,
                false => tables.put_tree(&row, &encode_pieces(&new, inode.replicas))?,
            }
        }
        Ok(())
    }
}

//! What can be asked without changing anything.

use std::{collections::BTreeMap, ops::ControlFlow};

use holdfast_common::{
    Attr, BlockHash, ChunkIndex, DirEntry, Ino, Kind, Piece, Refusal,
    limits::READDIR_PAGE_MAX,
    wire::meta::{BlockPlace, FileMap},
};

use super::{
    Rows, Step, StorageError, blocks, existing,
    file::{index_of, regular, scan_chunks, start_of},
    namespace::{self, check_name},
    rows::{Dentry, decode_pieces},
    tables::{Result, fetch, key, past, scan},
    xattr,
};

/// Chunks in one answer.
const CHUNKS_MAX: u32 = 1024;
/// Pieces that one seek looks at, at most, and then those of one chunk more.
const SEEK_PIECES_MAX: usize = 4 << 10;
/// Pieces in one answer. Asked for more than fit, the answer is `TooLarge`: ask for fewer chunks. One chunk always fits.
const MAP_PIECES_MAX: usize = 24_000;

// A piece has 44 bytes, its block's place 44 and 4 for each holder.
const _: () = assert!(MAP_PIECES_MAX * (44 + 44 + 4 * blocks::HOLDERS_MAX) + (64 << 10) <= HEADER_SIZE_MAX);
const _: () = assert!(MAP_PIECES_MAX >= holdfast_common::limits::PIECES_PER_CHUNK_MAX);
use holdfast_common::limits::HEADER_SIZE_MAX;

pub fn lookup(rows: &impl Rows, parent: Ino, name: &[u8]) -> Step<Attr> {
    check_name(name)?;
    namespace::directory(rows, parent)?;
    let entry = namespace::dentry(rows, parent, name)?.ok_or(Refusal::NotFound)?;
    attr(rows, entry.ino)
}

pub fn attr(rows: &impl Rows, ino: Ino) -> Step<Attr> {
    Ok(existing(rows, ino)?.attr(ino))
}

/// Of those that are still there.
pub fn attrs(rows: &impl Rows, inos: &[Ino]) -> Result<Vec<Attr>> {
    let found = inos.iter().filter_map(|ino| Some(rows.inode(*ino).transpose()?.map(|inode| inode.attr(*ino))));
    found.collect()
}

pub fn read_link(rows: &impl Rows, ino: Ino) -> Step<Vec<u8>> {
    match existing(rows, ino)?.kind {
        Kind::Symlink => {
            Ok(fetch(rows.tree(), &key::symlink(ino), |target| Ok(target.to_vec()))?.ok_or(Refusal::Stale)?)
        }
        _ => Err(Refusal::Invalid.into()),
    }
}

/// Entries of a directory.
#[derive(Debug)]
pub struct Page {
    pub entries: Vec<DirEntry>,
    /// Is it the last?
    pub end: bool,
    /// If it is the first, the directory's parent: its own number if it has none.
    pub parent: Option<Ino>,
    /// At which the directory is.
    pub version: u64,
}

/// A page of entries after `cookie`; none at all if the directory is at the version `unless`.
pub fn read_directory(
    rows: &impl Rows,
    ino: Ino,
    cookie: u64,
    entries_max: u32,
    plus: bool,
    unless: Option<u64>,
) -> Step<Option<Page>> {
    let directory = existing(rows, ino)?;
    if !directory.is_directory() {
        return Err(Refusal::NotDirectory.into());
    }
    let version = directory.data_version;
    if unless == Some(version) {
        return Ok(None);
    }
    let has_parent = directory.nlink > 0 && ino != Ino::ROOT;
    let parent = (cookie == 0).then_some(if has_parent { directory.parent } else { ino });
    let count = usize::try_from(entries_max).unwrap_or(READDIR_PAGE_MAX).clamp(1, READDIR_PAGE_MAX);
    let (mut entries, mut end) = (Vec::new(), true);
    let Some(first) = cookie.checked_add(1) else { return Ok(Some(Page { entries, end, parent, version })) };
    scan(rows.tree(), &key::cookie(ino, first), &past(&key::family(ino, key::COOKIE)), |_, row| {
        if entries.len() == count {
            end = false;
            return Ok(ControlFlow::Break(()));
        }
        let (entry, name) = Dentry::decode_with(row)?;
        let attr = if plus { rows.inode(entry.ino)?.map(|inode| inode.attr(entry.ino)) } else { None };
        entries.push(DirEntry { cookie: entry.cookie, name: name.to_vec(), ino: entry.ino, kind: entry.kind, attr });
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(Some(Page { entries, end, parent, version }))
}

pub fn xattr(rows: &impl Rows, ino: Ino, name: &[u8]) -> Step<Vec<u8>> {
    xattr::check_name(name)?;
    existing(rows, ino)?;
    Ok(xattr::value(rows, ino, name)?.ok_or(Refusal::NoAttribute)?)
}

pub fn xattrs(rows: &impl Rows, ino: Ino) -> Step<Vec<Vec<u8>>> {
    existing(rows, ino)?;
    Ok(xattr::names(rows, ino)?)
}

/// Pieces of `count` chunks from `first` on, with the holders of their blocks.
pub fn file_map(rows: &impl Rows, ino: Ino, first: ChunkIndex, count: u32) -> Step<FileMap> {
    let inode = regular(rows, ino)?;
    if count > CHUNKS_MAX {
        return Err(Refusal::Invalid.into());
    }
    let end = ChunkIndex(first.0.saturating_add(count));
    let (mut chunks, mut pieces_total) = (Vec::new(), 0);
    scan(rows.tree(), &key::pieces(ino, first), &key::pieces(ino, end), |key, row| {
        let pieces = decode_pieces(row)?;
        pieces_total += pieces.len();
        chunks.push((index_of(key)?, pieces));
        Ok(if pieces_total > MAP_PIECES_MAX { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    if pieces_total > MAP_PIECES_MAX {
        return Err(Refusal::TooLarge.into());
    }
    let blocks = places(rows, chunks.iter().flat_map(|(_, pieces)| pieces))?;
    Ok(FileMap { data_version: inode.data_version, chunks, blocks })
}

fn places<'a>(rows: &impl Rows, pieces: impl Iterator<Item = &'a Piece>) -> Result<Vec<BlockPlace>> {
    let mut places: BTreeMap<BlockHash, BlockPlace> = BTreeMap::new();
    for Piece { block: hash, .. } in pieces {
        if !places.contains_key(hash) {
            let row = blocks::block(rows, *hash)?
                .ok_or_else(|| StorageError::Damaged(format!("a piece names block {hash}, which has no row")))?;
            places.insert(*hash, BlockPlace { hash: *hash, length: row.length, holders: row.holders });
        }
    }
    Ok(places.into_values().collect())
}

/// How far a seek has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    Found(u64),
    /// There is none before this offset: ask again from there. A long file never holds up the others.
    Beyond(u64),
}

/// The next byte of data, or of a hole, at or after `offset`. The end of the file counts as a hole.
pub fn seek(rows: &impl Rows, ino: Ino, offset: u64, hole: bool) -> Step<Sought> {
    let inode = regular(rows, ino)?;
    if offset >= inode.size {
        return Err(Refusal::NotFound.into());
    }
    let (mut at, mut found, mut looked_at) = (offset, None, 0);
    // A file without holes need not be walked.
    if hole && inode.stored == inode.size {
        return Ok(Sought::Found(inode.size));
    }
    scan_chunks(rows, ino, &(offset..inode.size), |index, pieces, _| {
        looked_at += pieces.len();
        for piece in pieces {
            let start = start_of(index) + u64::from(piece.offset);
            let end = start + u64::from(piece.length);
            if end <= at {
                continue;
            }
            if !hole {
                found = Some(start.max(at));
                return Ok(ControlFlow::Break(()));
            }
            if start > at {
                return Ok(ControlFlow::Break(()));
            }
            at = end;
        }
        Ok(if looked_at < SEEK_PIECES_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    match (hole, found) {
        (true, _) if looked_at >= SEEK_PIECES_MAX && at < inode.size => Ok(Sought::Beyond(at)),
        (true, _) => Ok(Sought::Found(at.min(inode.size))),
        (false, Some(data)) => Ok(Sought::Found(data)),
        (false, None) => Err(Refusal::NotFound.into()),
    }
}

/// The directory that holds a directory, and its name there.
pub fn parent(rows: &impl Rows, ino: Ino) -> Step<(Ino, Vec<u8>)> {
    let inode = namespace::directory(rows, ino)?;
    if ino == Ino::ROOT {
        return Err(Refusal::NotFound.into());
    }
    let row = fetch(rows.tree(), &key::cookie(inode.parent, inode.parent_cookie), |row| {
        Ok(Dentry::decode_with(row)?.1.to_vec())
    })?;
    Ok((inode.parent, row.ok_or(Refusal::NotFound)?))
}

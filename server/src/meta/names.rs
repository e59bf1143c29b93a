//! From blocks back to the files that name them. There is no index for it: every file is looked at.

use std::{collections::BTreeSet, ops::ControlFlow};

use holdfast_common::{
    BlockHash, ChunkIndex, Ino,
    limits::{CHUNK_SIZE, PATH_SHOWN_MAX, PATHS_MAX},
    wire::meta::LostPath,
};

use super::state::{
    Rows, StorageError, query,
    rows::{Dentry, decode_pieces},
    settled,
    tables::{key, past, scan},
};

/// Files that name any of `blocks`, each by one of its names and the first place: at most `PATHS_MAX`, by path.
pub fn files_of(rows: &impl Rows, blocks: &BTreeSet<BlockHash>) -> Result<Vec<LostPath>, StorageError> {
    let mut found = Vec::new();
    // All inodes, so that the rows of a file are neighbours.
    scan(rows.tree(), &[], &past(&[]), |row, value| {
        let Some((ino, chunk)) = pieces_key(row) else { return Ok(ControlFlow::Continue(())) };
        if found.last().is_some_and(|(last, _)| *last == ino) {
            return Ok(ControlFlow::Continue(()));
        }
        let concerned = decode_pieces(value)?.into_iter().find(|piece| blocks.contains(&piece.block));
        if let Some(piece) = concerned {
            found.push((ino, u64::from(chunk.0) * CHUNK_SIZE + u64::from(piece.offset)));
        }
        Ok(if found.len() == PATHS_MAX { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    let mut wanted: Vec<Ino> = found.iter().map(|(ino, _)| *ino).collect();
    wanted.sort_unstable();
    let names = names_of(rows, &wanted)?;
    let mut paths = Vec::with_capacity(found.len());
    for (ino, offset) in found {
        let name = wanted.binary_search(&ino).ok().and_then(|place| names[place].clone());
        let path = name.map_or(Ok(Vec::new()), |(parent, name)| path_of(rows, parent, &name))?;
        paths.push(LostPath { path, ino, offset });
    }
    paths.sort();
    Ok(paths)
}

fn pieces_key(row: &[u8]) -> Option<(Ino, ChunkIndex)> {
    let (ino, rest) = row.split_first_chunk::<8>()?;
    let (family, chunk) = rest.split_first()?;
    let chunk: [u8; 4] = chunk.try_into().ok().filter(|_| *family == key::PIECES)?;
    Some((Ino(u64::from_be_bytes(*ino)), ChunkIndex(u32::from_be_bytes(chunk))))
}

/// A parent and a name there.
type Name = (Ino, Vec<u8>);

/// Of each of `inos`, which are sorted, one name.
fn names_of(rows: &impl Rows, inos: &[Ino]) -> Result<Vec<Option<Name>>, StorageError> {
    let mut names = vec![None; inos.len()];
    let mut left = inos.len();
    if left == 0 {
        return Ok(names);
    }
    scan(rows.tree(), &[], &past(&[]), |row, value| {
        if let Some((parent, rest)) = row.split_first_chunk::<8>()
            && let Some((&key::DENTRY, name)) = rest.split_first()
            && let Ok(place) = inos.binary_search(&Dentry::decode(value)?.ino)
            && names[place].is_none()
        {
            names[place] = Some((Ino(u64::from_be_bytes(*parent)), name.to_vec()));
            left -= 1;
        }
        Ok(if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    Ok(names)
}

/// From the root; a path that is too long to show begins with `...`.
fn path_of(rows: &impl Rows, mut directory: Ino, name: &[u8]) -> Result<Vec<u8>, StorageError> {
    let mut path = [b"/", name].concat();
    while directory != Ino::ROOT {
        if path.len() + 260 > PATH_SHOWN_MAX {
            return Ok([b"...", path.as_slice()].concat());
        }
        // One that is open, and has no name any more.
        let Ok((parent, name)) = settled(query::parent(rows, directory))? else { break };
        path = [b"/", name.as_slice(), path.as_slice()].concat();
        directory = parent;
    }
    Ok(path)
}

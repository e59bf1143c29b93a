//! How many copies are wanted: of a file, of what is made in a directory, and of everything that has no number of its own.
//!
//! A number belongs to an inode; what is made in a directory begins with the directory's. The row of each block counts the pieces that
//! name it under the number of their files, and wants the most of these. The row of a chunk says under which number its pieces are
//! counted: a file's number changes at once, and its chunks follow, some with each entry ([`recount`]). So do the rows of all blocks when the
//! cluster's number changes ([`retarget`]).

use std::{collections::BTreeMap, ops::ControlFlow};

use holdfast_common::{
    BlockHash, Ino, Kind, Refusal, Replicas, Time, enough_replicas,
    wire::meta::{FileCommit, Mutated, REPLICAS_ATTRIBUTE},
};

use super::{
    Reply, Rows, Step, Tables,
    blocks::{self, Changes, hash_of},
    existing,
    rows::{BlockRow, Inode, decode_chunk, encode_pieces},
    tables::{Result, StorageError, key, past, scan},
};

/// The extended attribute that shows the number of an inode, and sets it. It is not listed: nobody copies it with a file.
pub(super) const ATTRIBUTE: &[u8] = REPLICAS_ATTRIBUTE.as_bytes();

/// Pieces that one entry counts anew, at most, and then those of one chunk more.
const RECOUNT_PIECES: usize = if cfg!(test) { 3 } else { 4096 };
/// Rows of blocks that one entry looks at.
const RETARGET_ROWS: usize = if cfg!(test) { 3 } else { 4096 };

/// Copies without which a new block is refused.
pub(super) enum Enough {
    OfEach(usize),
    /// A block of several files must have enough for each of them.
    ByBlock(BTreeMap<BlockHash, usize>, usize),
}

impl Enough {
    pub(super) fn of(tables: &Tables<'_>, files: &[FileCommit]) -> Result<Self> {
        let default = tables.counters.replicas();
        let mut wanted = Vec::with_capacity(files.len());
        for file in files {
            let replicas = tables.inode(file.ino)?.map_or(Replicas::INHERITED, |inode| inode.replicas);
            wanted.push(enough_replicas(replicas.or(default)));
        }
        let usual = enough_replicas(default);
        if wanted.iter().all(|enough| *enough == usual) {
            return Ok(Self::OfEach(usual));
        }
        let mut by_block: BTreeMap<BlockHash, usize> = BTreeMap::new();
        for (file, enough) in files.iter().zip(wanted) {
            for (_, piece) in &file.pieces {
                by_block.entry(piece.block).and_modify(|most| *most = enough.max(*most)).or_insert(enough);
            }
        }
        Ok(Self::ByBlock(by_block, usual))
    }

    pub(super) fn copies(&self, block: BlockHash) -> usize {
        match self {
            Self::OfEach(enough) => *enough,
            Self::ByBlock(by_block, usual) => by_block.get(&block).copied().unwrap_or(*usual),
        }
    }
}

/// What the attribute says, if the inode has a number of its own.
pub fn shown(inode: &Inode) -> Option<Vec<u8>> {
    inode.replicas.own().map(|count| count.to_string().into_bytes())
}

/// Sets the attribute.
pub(super) fn set(tables: &mut Tables<'_>, ino: Ino, value: &[u8], now: Time) -> Step<Mutated> {
    let count = std::str::from_utf8(value).ok().and_then(|text| text.trim().parse().ok());
    let replicas = count.and_then(Replicas::new).ok_or(Refusal::Invalid)?;
    assign(tables, ino, replicas, now)
}

/// Has the inode follow the cluster's number from now on.
pub(super) fn unset(tables: &mut Tables<'_>, ino: Ino, now: Time) -> Step<Mutated> {
    if existing(tables, ino)?.replicas == Replicas::INHERITED {
        return Err(Refusal::NoAttribute.into());
    }
    assign(tables, ino, Replicas::INHERITED, now)
}

fn assign(tables: &mut Tables<'_>, ino: Ino, replicas: Replicas, now: Time) -> Step<Mutated> {
    let inode = existing(tables, ino)?;
    if !matches!(inode.kind, Kind::File | Kind::Directory) {
        return Err(Refusal::Invalid.into());
    }
    let has_chunks = inode.stored > 0;
    tables.put_inode(ino, Inode { replicas, ctime: now, ..inode });
    if has_chunks {
        tables.put_state(&key::recount(ino), &0u32.to_be_bytes())?;
        recount(tables, &[ino])?;
    }
    Ok(Mutated::Done)
}

/// Counts pieces of these files under their numbers, as far as the bound of one entry allows.
pub(super) fn recount(tables: &mut Tables<'_>, inos: &[Ino]) -> Result<Reply> {
    let mut budget = RECOUNT_PIECES;
    let mut changes = Changes::default();
    let mut unfinished = false;
    for ino in inos {
        unfinished = !recount_file(tables, *ino, &mut budget, &mut changes)?;
        if unfinished {
            break;
        }
    }
    changes.settle(tables)?;
    Ok(Reply::Reclaimed { unfinished })
}

/// `false`: the budget was used up before the end of this file.
fn recount_file(tables: &mut Tables<'_>, ino: Ino, budget: &mut usize, changes: &mut Changes) -> Result<bool> {
    let Some(from) = super::tables::fetch(tables.state(), &key::recount(ino), |row| Ok(row.to_vec()))? else {
        return Ok(true);
    };
    let Some(inode) = tables.inode(ino)? else {
        tables.remove_state(&key::recount(ino))?;
        return Ok(true);
    };
    let family = key::family(ino, key::PIECES);
    let (start, mut chunks, mut next) = ([&family[..], &from].concat(), Vec::new(), None);
    scan(tables.tree(), &start, &past(&family), |key, row| {
        if *budget == 0 {
            next = Some(key[family.len()..].to_vec());
            return Ok(ControlFlow::Break(()));
        }
        let (pieces, replicas) = decode_chunk(row)?;
        *budget = budget.saturating_sub(pieces.len());
        if replicas != inode.replicas {
            chunks.push((key.to_vec(), pieces, replicas));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    for (key, pieces, replicas) in chunks {
        changes.name(&pieces, inode.replicas);
        changes.unname(&pieces, replicas);
        tables.put_tree(&key, &encode_pieces(&pieces, inode.replicas))?;
    }
    match &next {
        Some(next) => tables.put_state(&key::recount(ino), next)?,
        None => tables.remove_state(&key::recount(ino))?,
    }
    Ok(next.is_none())
}

/// Up to `count` files some of whose chunks are still counted under another number.
pub fn recounted_first(rows: &impl Rows, count: usize) -> Result<Vec<Ino>> {
    let mut files = Vec::new();
    scan(rows.state(), &[key::RECOUNT], &past(&[key::RECOUNT]), |key, _| {
        if files.len() == count {
            return Ok(ControlFlow::Break(()));
        }
        let ino = key[1..].try_into().map_err(|_| StorageError::Damaged("recount: key".into()))?;
        files.push(Ino(u64::from_be_bytes(ino)));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(files)
}

/// Changes the cluster's number. The rows of blocks follow.
pub(super) fn set_default(tables: &mut Tables<'_>, replicas: Replicas) -> Result<Reply> {
    if tables.counters.replicas() != replicas.or(tables.counters.replicas()) {
        tables.counters.replicas = replicas;
        tables.counters.retargeted = Some(BlockHash([0; 32]));
    }
    Ok(Reply::Done)
}

/// Has the next rows of blocks want what they should, if the cluster's number has changed.
pub(super) fn retarget(tables: &mut Tables<'_>) -> Result<Reply> {
    let Some(after) = tables.counters.retargeted else { return Ok(Reply::Reclaimed { unfinished: false }) };
    let default = tables.counters.replicas();
    let (mut looked, mut last, mut changed) = (0, after, Vec::new());
    scan(tables.blocks(), &past(&key::block(after)), &past(&[key::BLOCK]), |key, row| {
        let (hash, row) = (hash_of(key)?, BlockRow::decode(row)?);
        if row.most_wanted(default) != row.wanted {
            changed.push((hash, row));
        }
        (looked, last) = (looked + 1, hash);
        Ok(if looked == RETARGET_ROWS { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    for (hash, old) in changed {
        blocks::store(tables, hash, Some(&old), old.clone())?;
    }
    let unfinished = looked == RETARGET_ROWS;
    tables.counters.retargeted = unfinished.then_some(last);
    Ok(Reply::Reclaimed { unfinished })
}

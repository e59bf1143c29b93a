//! Garbage: a block that no piece names any more is condemned, deleted by its servers, and forgotten.
//!
//! Every copy is stamped with the epoch of its last put, and every condemnation has an epoch of its own, later than all stamps
//! that mounts could know before. A server deletes what was condemned at an epoch only if its stamp is earlier; so a copy
//! that was put *with* that epoch, or a later one, stays, however late an order to delete arrives. Commits count only such copies:
//! what was put before a condemnation may be gone, and is refused `BlockGone`. That is decided here alone ([`admitted`]).

use std::ops::ControlFlow;

use holdfast_common::{BlockHash, Epoch, Position, Refusal, ServerId};

use super::{
    Reply, Rows, Tables,
    blocks::{self, block, hash_of, is_unnamed},
    rows::BlockRow,
    servers,
    tables::{Result, StorageError, key, past, scan},
};

/// The row to which a commit adds the holders that it names for a block, whose copies are stamped with `epoch` or later.
/// `forgotten` is the latest epoch under which a block was forgotten.
pub fn admitted(old: Option<&BlockRow>, length: u32, epoch: Epoch, forgotten: Epoch) -> Result<BlockRow, Refusal> {
    match old {
        // It may be one of those.
        None if epoch < forgotten => Err(Refusal::BlockGone),
        None => Ok(BlockRow::new(length, forgotten)),
        Some(row) if epoch < row.epoch => Err(Refusal::BlockGone),
        // No piece names one that is condemned, as far as is known.
        Some(row) if row.condemned => {
            let (refs, refs_by_replicas) = (row.refs, row.refs_by_replicas);
            Ok(BlockRow { refs, refs_by_replicas, ..BlockRow::new(length, row.epoch) })
        }
        Some(row) => Ok(row.clone()),
    }
}

/// May a copy that the system had made, with this stamp, be put on record?
pub fn counts(row: &BlockRow, epoch: Epoch) -> bool {
    !row.condemned && epoch >= row.epoch
}

/// Condemns those of `hashes` that no piece has named after `unnamed_through`.
pub(super) fn condemn(tables: &mut Tables<'_>, hashes: &[BlockHash], unnamed_through: Position) -> Result<Reply> {
    let epoch = Epoch(tables.counters.epoch.0 + 1);
    for hash in hashes {
        let Some(old) = block(tables, *hash)?.filter(is_unnamed) else { continue };
        if unnamed_since(tables, *hash)?.is_some_and(|since| since <= unnamed_through) {
            let new = BlockRow { epoch, condemned: true, ..old.clone() };
            blocks::store(tables, *hash, Some(&old), new)?;
            tables.counters.epoch = epoch;
        }
    }
    Ok(Reply::Condemned(Some(epoch).filter(|epoch| tables.counters.epoch == *epoch)))
}

/// Condemns copies of blocks that are not known, on the one server that turned out to have them; and has copies there of blocks that
/// it is not on record for count no more, unless these are short of copies. Answers with those whose copies there may be deleted at
/// this epoch: nothing else may.
pub(super) fn condemn_strays(tables: &mut Tables<'_>, server: ServerId, hashes: &[BlockHash]) -> Result<Reply> {
    let epoch = Epoch(tables.counters.epoch.0 + 1);
    let mut condemned = Vec::new();
    if !servers::is_registered(tables, server)? {
        return Ok(Reply::Strays { epoch, condemned });
    }
    for hash in hashes {
        let old = block(tables, *hash)?;
        let new = match &old {
            // Nobody has said how long it is.
            None => BlockRow { condemned: true, holders: vec![server], ..BlockRow::new(0, epoch) },
            Some(row) if row.holders.contains(&server) || blocks::is_owed(row) => continue,
            // It goes with the others, at the epoch at which these were condemned, and at no later one.
            Some(row) if row.condemned => {
                let mut new = row.clone();
                blocks::add_holder(&mut new, server);
                blocks::store(tables, *hash, Some(row), new)?;
                continue;
            }
            Some(row) => BlockRow { epoch, ..row.clone() },
        };
        blocks::store(tables, *hash, old.as_ref(), new)?;
        tables.counters.epoch = epoch;
        condemned.push(*hash);
    }
    Ok(Reply::Strays { epoch, condemned })
}

/// Takes a server off the record of those of `hashes` of which enough others of `counting` have copies, and has its own count no
/// more. Answers with those whose copies there may be deleted. Decided here, because somebody else may just have taken another off.
pub(super) fn retire(
    tables: &mut Tables<'_>,
    server: ServerId,
    hashes: &[BlockHash],
    counting: &[ServerId],
) -> Result<Reply> {
    let epoch = Epoch(tables.counters.epoch.0 + 1);
    let mut condemned = Vec::new();
    for hash in hashes {
        let Some(old) = block(tables, *hash)?.filter(|row| row.refs > 0 && row.holders.contains(&server)) else {
            continue;
        };
        let others = old.holders.iter().filter(|holder| **holder != server && counting.contains(holder)).count();
        if others < old.wanted {
            continue;
        }
        let mut new = BlockRow { epoch, ..old.clone() };
        new.holders.retain(|holder| *holder != server);
        blocks::store(tables, *hash, Some(&old), new)?;
        tables.counters.epoch = epoch;
        condemned.push(*hash);
    }
    Ok(Reply::Strays { epoch, condemned })
}

/// A server has deleted what was condemned at `epoch`. What has been put and named again since is not concerned.
pub(super) fn deleted(tables: &mut Tables<'_>, server: ServerId, hashes: &[BlockHash], epoch: Epoch) -> Result<Reply> {
    for hash in hashes {
        if block(tables, *hash)?.is_some_and(|row| row.condemned && row.epoch == epoch) {
            blocks::unhold(tables, *hash, server)?;
        }
    }
    Ok(Reply::Done)
}

/// Every copy of `hashes` that was condemned at `epoch` is deleted, and nobody who had begun to put one before is still at it.
pub(super) fn forget(tables: &mut Tables<'_>, hashes: &[BlockHash], epoch: Epoch) -> Result<Reply> {
    for hash in hashes {
        // One that pieces name all the same is kept, so that somebody is told.
        let is_deleted =
            |row: &BlockRow| row.condemned && row.epoch == epoch && row.holders.is_empty() && row.refs == 0;
        let Some(row) = block(tables, *hash)?.filter(is_deleted) else { continue };
        blocks::remove(tables, *hash, &row)?;
        tables.counters.forgotten = tables.counters.forgotten.max(epoch);
        tables.counters.collected += 1;
    }
    Ok(Reply::Done)
}

fn unnamed_since(rows: &impl Rows, hash: BlockHash) -> Result<Option<Position>> {
    super::tables::fetch(rows.blocks(), &key::unnamed(hash), stamp_of)
}

/// Bytes of the time of day, which versions before kept in these rows.
const TIME_LENGTH: usize = 13;

/// Of a row of the list of unnamed blocks: the position since which nothing names one. Of a version before: long ago by now.
fn stamp_of(row: &[u8]) -> Result<Position> {
    match <[u8; 8]>::try_from(row) {
        Ok(bytes) => Ok(Position(u64::from_be_bytes(bytes))),
        Err(_) if row.len() == TIME_LENGTH => Ok(Position(0)),
        Err(_) => Err(StorageError::Damaged(format!("unnamed block: {} bytes", row.len()))),
    }
}

/// Blocks that no piece has named after `through`: looks at up to `count` rows after `after`, in order, and tells where
/// to go on; `None` at the end.
pub fn unnamed_after(
    rows: &impl Rows,
    after: Option<BlockHash>,
    count: usize,
    through: Position,
) -> Result<(Vec<BlockHash>, Option<BlockHash>)> {
    let start = after.map_or(vec![key::UNNAMED], |hash| past(&key::unnamed(hash)));
    let (mut found, mut looked, mut last) = (Vec::new(), 0, None);
    scan(rows.blocks(), &start, &past(&[key::UNNAMED]), |key, row| {
        let hash = hash_of(key)?;
        if stamp_of(row)? <= through {
            found.push(hash);
        }
        looked += 1;
        last = Some(hash);
        Ok(if looked == count { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    Ok((found, last.filter(|_| looked == count)))
}

/// Up to `count` condemned blocks that somebody has after `after`, in the order of their epochs.
pub fn condemned_after(
    rows: &impl Rows,
    after: Option<(Epoch, BlockHash)>,
    count: usize,
) -> Result<Vec<(Epoch, BlockHash)>> {
    listed_after(rows, key::CONDEMNED, after, count)
}

/// Up to `count` condemned blocks that are deleted everywhere after `after`, in the order of their epochs.
pub fn deleted_after(
    rows: &impl Rows,
    after: Option<(Epoch, BlockHash)>,
    count: usize,
) -> Result<Vec<(Epoch, BlockHash)>> {
    listed_after(rows, key::DELETED, after, count)
}

fn listed_after(
    rows: &impl Rows,
    list: u8,
    after: Option<(Epoch, BlockHash)>,
    count: usize,
) -> Result<Vec<(Epoch, BlockHash)>> {
    let start = after.map_or(vec![list], |(epoch, hash)| past(&key::condemned(list, epoch, hash)));
    let mut found = Vec::new();
    scan(rows.blocks(), &start, &past(&[list]), |key, _| {
        if found.len() == count {
            return Ok(ControlFlow::Break(()));
        }
        let epoch = key.get(1..9).and_then(|bytes| bytes.try_into().ok());
        let epoch = epoch.ok_or_else(|| StorageError::Damaged("condemned: key".into()))?;
        found.push((Epoch(u64::from_be_bytes(epoch)), hash_of(key)?));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

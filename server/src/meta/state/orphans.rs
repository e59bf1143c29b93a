//! Inodes without a name: kept while somebody has them open (I9), then reclaimed piecemeal.

use std::ops::ControlFlow;

use holdfast_common::Ino;

use super::{
    Reply, Rows, StorageError, Tables,
    blocks::Changes,
    rows::decode_chunk,
    tables::{Result, key, past, scan},
};

/// Pieces and other rows that one entry deletes, at most, and then one row more: a huge file's end never holds up
/// the others.
const RECLAIM_ROWS_MAX: usize = 4096;

/// Key and row.
type Row = (Vec<u8>, Vec<u8>);

pub(super) fn add(tables: &mut Tables<'_>, ino: Ino) -> Result<()> {
    tables.put_state(&key::orphan(ino), &[])
}

/// It has a name again.
pub(super) fn remove(tables: &mut Tables<'_>, ino: Ino) -> Result<()> {
    tables.remove_state(&key::orphan(ino))
}

/// Deletes inodes that have lost their last name, as far as the bound of one entry allows.
pub(super) fn reclaim(tables: &mut Tables<'_>, inos: &[Ino]) -> Result<Reply> {
    let mut budget = RECLAIM_ROWS_MAX;
    let mut changes = Changes::default();
    let mut unfinished = false;
    for ino in inos {
        let orphan = tables.inode(*ino)?.is_some_and(|inode| inode.nlink == 0);
        if orphan && !delete_rows(tables, *ino, &mut budget, &mut changes)? {
            unfinished = true;
            break;
        }
    }
    changes.settle(tables)?;
    Ok(Reply::Reclaimed { unfinished })
}

/// `false`: the budget was used up before the end of this inode.
fn delete_rows(tables: &mut Tables<'_>, ino: Ino, budget: &mut usize, changes: &mut Changes) -> Result<bool> {
    let (rows, all) = first_rows(tables, ino, budget)?;
    let mut stored = 0;
    for (row_key, row) in &rows {
        if row_key[8] == key::PIECES {
            let (pieces, replicas) = decode_chunk(row)?;
            stored += pieces.iter().map(|piece| u64::from(piece.length)).sum::<u64>();
            changes.unname(&pieces, replicas);
        }
        tables.remove_tree(row_key)?;
    }
    if !all {
        let inode = tables.inode(ino)?;
        let mut inode = inode.ok_or_else(|| StorageError::Damaged(format!("orphan {ino} has no inode")))?;
        inode.stored = inode.stored.wrapping_sub(stored);
        tables.put_inode(ino, inode);
        return Ok(false);
    }
    tables.remove_inode(ino);
    tables.remove_state(&key::orphan(ino))?;
    tables.remove_state(&key::recount(ino))?;
    tables.counters.inodes = tables.counters.inodes.wrapping_sub(1);
    Ok(true)
}

/// The inode's rows but its own, which goes last, as far as `budget` goes; and whether these are all.
fn first_rows(tables: &Tables<'_>, ino: Ino, budget: &mut usize) -> Result<(Vec<Row>, bool)> {
    let (start, end) = (key::family(ino, key::SYMLINK), past(&ino.0.to_be_bytes()));
    let (mut rows, mut all) = (Vec::new(), true);
    scan(tables.tree(), &start, &end, |key, row| {
        if *budget == 0 {
            all = false;
            return Ok(ControlFlow::Break(()));
        }
        *budget = budget.saturating_sub(1 + row.len() / 64);
        rows.push((key.to_vec(), row.to_vec()));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok((rows, all))
}

/// Up to `count` orphans after `after`, in order.
pub fn orphans_after(rows: &impl Rows, after: Ino, count: usize) -> Result<Vec<Ino>> {
    let mut orphans = Vec::new();
    scan(rows.state(), &past(&key::orphan(after)), &past(&[key::ORPHAN]), |key, _| {
        if orphans.len() == count {
            return Ok(ControlFlow::Break(()));
        }
        let ino = key[1..].try_into().map_err(|_| StorageError::Damaged("orphan: key".into()))?;
        orphans.push(Ino(u64::from_be_bytes(ino)));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(orphans)
}

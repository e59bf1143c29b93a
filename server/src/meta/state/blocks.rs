//! Blocks: who holds them, and how many pieces name them. All counting of references is here.

use std::{collections::BTreeMap, ops::ControlFlow};

use holdfast_common::{
    BlockHash, Piece, Refusal, ServerId, Time,
    limits::{BLOCK_SIZE_MAX, REPLICAS, REPLICAS_MIN},
    wire::meta::NewBlock,
};

use super::{
    Rows, Step, StorageError, Tables,
    rows::{BlockRow, encode_time},
    servers,
    tables::{Result, fetch, key, past, scan},
};

/// Holders of one block that are put on record; further copies are left to anti-entropy.
pub const HOLDERS_MAX: usize = 8;

/// What one operation changes about blocks, gathered so that each block's row is written once.
#[derive(Debug, Default)]
pub(super) struct Changes {
    references: BTreeMap<BlockHash, i64>,
    fresh: BTreeMap<BlockHash, (u32, Vec<ServerId>)>,
}

impl Changes {
    /// Takes note of a block that a commit brings. Refused if it is named with too few copies.
    pub(super) fn bring(&mut self, tables: &Tables<'_>, new: &NewBlock) -> Step<()> {
        if new.length == 0 || new.length > BLOCK_SIZE_MAX || new.holders.len() > HOLDERS_MAX {
            return Err(Refusal::Invalid.into());
        }
        let mut holders = Vec::with_capacity(new.holders.len());
        for holder in &new.holders {
            if !holders.contains(&holder.server) && servers::is_registered(tables, holder.server)? {
                holders.push(holder.server);
            }
        }
        match self.length(tables, new.hash)? {
            Some(length) if length != new.length => return Err(Refusal::Invalid.into()),
            Some(_) => {}
            None if holders.len() < REPLICAS_MIN => return Err(Refusal::TooFewReplicas.into()),
            None => {}
        }
        let entry = self.fresh.entry(new.hash).or_insert_with(|| (new.length, Vec::new()));
        entry.1.extend(holders);
        Ok(())
    }

    /// The length of a block that is known, or that this commit brings.
    pub(super) fn length(&self, tables: &Tables<'_>, hash: BlockHash) -> Result<Option<u32>> {
        match self.fresh.get(&hash) {
            Some((length, _)) => Ok(Some(*length)),
            None => Ok(block(tables, hash)?.map(|row| row.length)),
        }
    }

    pub(super) fn name(&mut self, pieces: &[Piece]) {
        pieces.iter().for_each(|piece| *self.references.entry(piece.block).or_default() += 1);
    }

    pub(super) fn unname(&mut self, pieces: &[Piece]) {
        pieces.iter().for_each(|piece| *self.references.entry(piece.block).or_default() -= 1);
    }

    /// Writes everything.
    pub(super) fn settle(self, tables: &mut Tables<'_>, now: Time) -> Result<()> {
        let Self { mut references, fresh } = self;
        for (hash, (length, holders)) in fresh {
            let old = block(tables, hash)?;
            let mut new = old.clone().unwrap_or(BlockRow { length, refs: 0, holders: Vec::new() });
            holders.into_iter().for_each(|holder| add_holder(&mut new, holder));
            new.refs = recount(new.refs, references.remove(&hash).unwrap_or(0), hash)?;
            store(tables, hash, old.as_ref(), &new, now)?;
        }
        for (hash, delta) in references {
            if delta != 0 {
                let old = known(tables, hash)?;
                let new = BlockRow { refs: recount(old.refs, delta, hash)?, ..old.clone() };
                store(tables, hash, Some(&old), &new, now)?;
            }
        }
        Ok(())
    }
}

fn recount(refs: u64, delta: i64, hash: BlockHash) -> Result<u64> {
    refs.checked_add_signed(delta)
        .ok_or_else(|| StorageError::Damaged(format!("block {hash}: more pieces went than were counted")))
}

fn known(tables: &Tables<'_>, hash: BlockHash) -> Result<BlockRow> {
    block(tables, hash)?.ok_or_else(|| StorageError::Damaged(format!("a piece names block {hash}, which has no row")))
}

fn add_holder(row: &mut BlockRow, holder: ServerId) {
    if let Err(place) = row.holders.binary_search(&holder)
        && row.holders.len() < HOLDERS_MAX
    {
        row.holders.insert(place, holder);
    }
}

/// Puts a server on record as a holder. `false`: nothing to do.
pub(super) fn hold(tables: &mut Tables<'_>, hash: BlockHash, server: ServerId, now: Time) -> Result<bool> {
    let Some(old) = block(tables, hash)? else { return Ok(false) };
    let mut new = old.clone();
    add_holder(&mut new, server);
    if new == old {
        return Ok(false);
    }
    store(tables, hash, Some(&old), &new, now)?;
    Ok(true)
}

/// Takes a server off the record, unless it is the last. `false`: nothing changed.
pub(super) fn unhold(tables: &mut Tables<'_>, hash: BlockHash, server: ServerId, now: Time) -> Result<bool> {
    let Some(old) = block(tables, hash)? else { return Ok(false) };
    if old.holders.len() < 2 || !old.holders.contains(&server) {
        return Ok(false);
    }
    let mut new = old.clone();
    new.holders.retain(|holder| *holder != server);
    store(tables, hash, Some(&old), &new, now)?;
    Ok(true)
}

/// Writes a block's row, and the indexes and counters that follow from it.
fn store(tables: &mut Tables<'_>, hash: BlockHash, old: Option<&BlockRow>, new: &BlockRow, now: Time) -> Result<()> {
    let were: &[ServerId] = old.map_or(&[], |row| &row.holders);
    for gone in were.iter().filter(|server| !new.holders.contains(server)) {
        tables.remove_blocks(&key::held(*gone, hash))?;
    }
    for added in new.holders.iter().filter(|server| !were.contains(server)) {
        tables.put_blocks(&key::held(*added, hash), &[])?;
    }
    mark(tables, &key::owed(hash), old.is_some_and(is_owed), is_owed(new), &[])?;
    mark(tables, &key::unnamed(hash), old.is_some_and(is_unnamed), is_unnamed(new), &encode_time(now))?;
    if let Some(old) = old {
        count(tables, old, false);
    }
    count(tables, new, true);
    tables.put_blocks(&key::block(hash), &new.encode())
}

fn mark(tables: &mut Tables<'_>, key: &[u8], was: bool, is: bool, row: &[u8]) -> Result<()> {
    match (was, is) {
        (false, true) => tables.put_blocks(key, row),
        (true, false) => tables.remove_blocks(key),
        _ => Ok(()),
    }
}

fn count(tables: &mut Tables<'_>, row: &BlockRow, up: bool) {
    let counters = &mut tables.counters;
    let step = |counter: &mut u64| if up { *counter += 1 } else { *counter -= 1 };
    if is_unnamed(row) {
        return step(&mut counters.unnamed);
    }
    step(&mut counters.blocks_by_copies[row.holders.len().min(REPLICAS)]);
    if is_owed(row) {
        step(&mut counters.owed);
    }
}

/// A block that pieces name and that has fewer copies than it should.
pub fn is_owed(row: &BlockRow) -> bool {
    row.refs > 0 && row.holders.len() < REPLICAS
}

pub fn is_unnamed(row: &BlockRow) -> bool {
    row.refs == 0
}

pub fn block(rows: &impl Rows, hash: BlockHash) -> Result<Option<BlockRow>> {
    fetch(rows.blocks(), &key::block(hash), BlockRow::decode)
}

/// Up to `count` blocks that are owed a copy, in order, after `after`.
pub fn owed_after(rows: &impl Rows, after: Option<BlockHash>, count: usize) -> Result<Vec<BlockHash>> {
    let start = after.map_or(vec![key::OWED], |hash| past(&key::owed(hash)));
    let mut owed = Vec::new();
    scan(rows.blocks(), &start, &past(&[key::OWED]), |key, _| {
        if owed.len() == count {
            return Ok(ControlFlow::Break(()));
        }
        owed.push(hash_of(key)?);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(owed)
}

/// Up to `count` blocks that a server is on record for, in order, after `after`.
pub fn held_after(
    rows: &impl Rows,
    server: ServerId,
    after: Option<BlockHash>,
    count: usize,
) -> Result<Vec<BlockHash>> {
    let all = key::held_by(server);
    let start = after.map_or(all.clone(), |hash| past(&key::held(server, hash)));
    let mut held = Vec::new();
    scan(rows.blocks(), &start, &past(&all), |key, _| {
        if held.len() == count {
            return Ok(ControlFlow::Break(()));
        }
        held.push(hash_of(key)?);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(held)
}

/// The hash at the end of a key.
pub(super) fn hash_of(key: &[u8]) -> Result<BlockHash> {
    let hash = key.last_chunk::<32>().ok_or_else(|| StorageError::Damaged("block: key".into()))?;
    Ok(BlockHash(*hash))
}

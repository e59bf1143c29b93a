//! Blocks: who holds them, and how many pieces name them. All counting of references is here.

use std::{collections::BTreeMap, ops::ControlFlow};

use holdfast_common::planted::{Bug, is_planted};
use holdfast_common::{
    BlockHash, Epoch, Piece, Refusal, Replicas, ServerId,
    limits::{BLOCK_SIZE_MAX, REPLICAS, REPLICAS_MAX},
    wire::meta::NewBlock,
};

use super::{
    Rows, Step, StorageError, Tables, garbage,
    rows::BlockRow,
    servers,
    tables::{Result, fetch, key, past, scan},
};

/// Holders of one block that are put on record; further copies are left to anti-entropy.
pub const HOLDERS_MAX: usize = 8;
/// Owed blocks that are looked at in one step for those that are lost.
const LOST_PAGE: usize = 4096;

/// What one operation changes about blocks, gathered so that each block's row is written once.
#[derive(Debug, Default)]
pub(super) struct Changes {
    references: BTreeMap<BlockHash, Delta>,
    fresh: BTreeMap<BlockHash, (u32, Vec<ServerId>)>,
}

/// By how much references grow: all of them, and those from files that have a number of copies of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Delta {
    all: i64,
    by_replicas: [i64; REPLICAS_MAX],
}

impl Delta {
    fn add(&mut self, count: i64, replicas: Replicas) {
        self.all += count;
        if let Some(own) = replicas.own() {
            self.by_replicas[own - 1] += count;
        }
    }
}

impl Changes {
    /// Takes note of a block that a commit brings. Refused if it is named with fewer than `enough` copies.
    pub(super) fn bring(&mut self, tables: &Tables<'_>, new: &NewBlock, enough: usize) -> Step<()> {
        if new.length == 0 || new.length > BLOCK_SIZE_MAX || new.holders.len() > HOLDERS_MAX {
            return Err(Refusal::Invalid.into());
        }
        let mut holders = Vec::with_capacity(new.holders.len());
        for holder in &new.holders {
            if !holders.contains(&holder.server) && servers::is_registered(tables, holder.server)? {
                holders.push(holder.server);
            }
        }
        let old = block(tables, new.hash)?;
        let row = garbage::admitted(old.as_ref(), new.length, new.epoch, tables.counters.forgotten)?;
        if row.length != new.length || self.fresh.get(&new.hash).is_some_and(|(length, _)| *length != new.length) {
            return Err(Refusal::Invalid.into());
        }
        if row.holders.is_empty() && holders.len() < enough {
            return Err(Refusal::TooFewReplicas.into());
        }
        let entry = self.fresh.entry(new.hash).or_insert_with(|| (new.length, Vec::new()));
        entry.1.extend(holders);
        Ok(())
    }

    /// The length of a block that is known, or that this commit brings.
    pub(super) fn length(&self, tables: &Tables<'_>, hash: BlockHash) -> Step<u32> {
        if let Some((length, _)) = self.fresh.get(&hash) {
            return Ok(*length);
        }
        match block(tables, hash)? {
            Some(row) if row.condemned => Err(Refusal::BlockGone.into()),
            Some(row) => Ok(row.length),
            None => Err(Refusal::UnknownBlock.into()),
        }
    }

    /// Pieces of a file that wants so many copies.
    pub(super) fn name(&mut self, pieces: &[Piece], replicas: Replicas) {
        pieces.iter().for_each(|piece| self.references.entry(piece.block).or_default().add(1, replicas));
    }

    pub(super) fn unname(&mut self, pieces: &[Piece], replicas: Replicas) {
        if is_planted(Bug::ReferencesLeak) {
            return;
        }
        pieces.iter().for_each(|piece| self.references.entry(piece.block).or_default().add(-1, replicas));
    }

    /// Writes everything.
    pub(super) fn settle(self, tables: &mut Tables<'_>) -> Result<()> {
        let Self { mut references, fresh } = self;
        for (hash, (length, holders)) in fresh {
            let old = block(tables, hash)?;
            // Admitted when it was brought.
            let admitted = garbage::admitted(old.as_ref(), length, Epoch(u64::MAX), tables.counters.forgotten);
            let mut new = admitted.map_err(|_| StorageError::Damaged(format!("block {hash}: not admitted")))?;
            holders.into_iter().for_each(|holder| add_holder(&mut new, holder));
            recount(&mut new, references.remove(&hash).unwrap_or_default());
            store(tables, hash, old.as_ref(), new)?;
        }
        for (hash, delta) in references {
            // A block without a row is lost, and `fsck` tells who names it: that there is one more or less matters to nobody.
            let old = if delta == Delta::default() { None } else { block(tables, hash)? };
            if let Some(old) = old {
                let mut new = old.clone();
                recount(&mut new, delta);
                store(tables, hash, Some(&old), new)?;
            }
        }
        Ok(())
    }
}

/// Counts that are wrong stay wrong by as much: `fsck` tells, and nothing stops for it.
fn recount(row: &mut BlockRow, delta: Delta) {
    row.refs = row.refs.wrapping_add_signed(delta.all);
    for (count, delta) in row.refs_by_replicas.iter_mut().zip(delta.by_replicas) {
        *count = count.wrapping_add_signed(delta);
    }
}

pub(super) fn add_holder(row: &mut BlockRow, holder: ServerId) {
    if let Err(place) = row.holders.binary_search(&holder)
        && row.holders.len() < HOLDERS_MAX
    {
        row.holders.insert(place, holder);
    }
}

/// Puts a server on record as a holder of a copy with this stamp. `false`: nothing to do, or the copy does not count.
pub(super) fn hold(tables: &mut Tables<'_>, hash: BlockHash, server: ServerId, epoch: Epoch) -> Result<bool> {
    let Some(old) = block(tables, hash)?.filter(|row| garbage::counts(row, epoch)) else { return Ok(false) };
    let mut new = old.clone();
    add_holder(&mut new, server);
    if new == old {
        return Ok(false);
    }
    store(tables, hash, Some(&old), new)?;
    Ok(true)
}

/// Takes a server off the record, unless it is the last of a block that is not condemned. `false`: nothing changed.
pub(super) fn unhold(tables: &mut Tables<'_>, hash: BlockHash, server: ServerId) -> Result<bool> {
    match block(tables, hash)? {
        Some(old) if old.holders.len() >= 2 || old.condemned => take_off(tables, hash, &old, server),
        _ => Ok(false),
    }
}

/// Takes a server off the record, also if it is the last. `false`: nothing changed.
pub(super) fn unhold_last(tables: &mut Tables<'_>, hash: BlockHash, server: ServerId) -> Result<bool> {
    block(tables, hash)?.map_or(Ok(false), |old| take_off(tables, hash, &old, server))
}

fn take_off(tables: &mut Tables<'_>, hash: BlockHash, old: &BlockRow, server: ServerId) -> Result<bool> {
    if !old.holders.contains(&server) {
        return Ok(false);
    }
    let mut new = old.clone();
    new.holders.retain(|holder| *holder != server);
    store(tables, hash, Some(old), new)?;
    Ok(true)
}

/// Writes a block's row, with the number of copies that it should have now, and the indexes and counters that follow from it.
pub(in crate::meta) fn store(
    tables: &mut Tables<'_>,
    hash: BlockHash,
    old: Option<&BlockRow>,
    mut new: BlockRow,
) -> Result<()> {
    new.wanted = new.most_wanted(tables.counters.replicas());
    index(tables, hash, old, Some(&new))?;
    tables.put_blocks(&key::block(hash), &new.encode())
}

/// Removes a block's row, and what follows from it.
pub(super) fn remove(tables: &mut Tables<'_>, hash: BlockHash, old: &BlockRow) -> Result<()> {
    index(tables, hash, Some(old), None)?;
    tables.remove_blocks(&key::block(hash))
}

fn index(tables: &mut Tables<'_>, hash: BlockHash, old: Option<&BlockRow>, new: Option<&BlockRow>) -> Result<()> {
    let holders = |row: Option<&BlockRow>| row.map_or(Vec::new(), |row| row.holders.clone());
    let (were, are) = (holders(old), holders(new));
    for gone in were.iter().filter(|server| !are.contains(server)) {
        tables.change_holding(*gone, &hash, false)?;
    }
    for added in are.iter().filter(|server| !were.contains(server)) {
        tables.change_holding(*added, &hash, true)?;
    }
    mark(tables, &key::owed(hash), old.is_some_and(is_owed), new.is_some_and(is_owed), &[])?;
    mark(tables, &key::last_copy(hash), old.is_some_and(has_one_copy_left), new.is_some_and(has_one_copy_left), &[])?;
    mark(tables, &key::surplus(hash), old.is_some_and(has_surplus), new.is_some_and(has_surplus), &[])?;
    // That of the entry which is being applied.
    let stamp = (tables.counters.position.0 + 1).to_be_bytes();
    mark(tables, &key::unnamed(hash), old.is_some_and(is_unnamed), new.is_some_and(is_unnamed), &stamp)?;
    let (was, is) = (condemned_key(hash, old), condemned_key(hash, new));
    if was != is {
        was.map_or(Ok(()), |key| tables.remove_blocks(&key))?;
        is.map_or(Ok(()), |key| tables.put_blocks(&key, &[]))?;
    }
    if let Some(old) = old {
        count(tables, old, false);
    }
    if let Some(new) = new {
        count(tables, new, true);
    }
    Ok(())
}

/// Has a block in those lists in which it belongs, and in no other, wherever it was. `None`: it has no row.
pub(super) fn list_anew(tables: &mut Tables<'_>, hash: BlockHash, row: Option<&BlockRow>) -> Result<()> {
    let stamp = (tables.counters.position.0 + 1).to_be_bytes();
    let nothing: &[u8] = &[];
    for (key, belongs, new) in [
        (key::owed(hash), row.is_some_and(is_owed), nothing),
        (key::last_copy(hash), row.is_some_and(has_one_copy_left), nothing),
        (key::surplus(hash), row.is_some_and(has_surplus), nothing),
        (key::unnamed(hash), row.is_some_and(is_unnamed), stamp.as_slice()),
    ] {
        let is_listed = fetch(tables.blocks(), &key, |_| Ok(()))?.is_some();
        mark(tables, &key, is_listed, belongs, new)?;
    }
    match condemned_key(hash, row) {
        Some(key) => tables.put_blocks(&key, &[]),
        None => Ok(()),
    }
}

fn condemned_key(hash: BlockHash, row: Option<&BlockRow>) -> Option<Vec<u8>> {
    let list = |row: &BlockRow| if row.holders.is_empty() { key::DELETED } else { key::CONDEMNED };
    row.filter(|row| row.condemned).map(|row| key::condemned(list(row), row.epoch, hash))
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
    // One that is wrong stays wrong by as much, until somebody takes that out.
    let step = |counter: &mut u64| *counter = counter.wrapping_add_signed(if up { 1 } else { -1 });
    if row.condemned {
        return step(&mut counters.condemned);
    }
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
    row.refs > 0 && row.holders.len() < row.wanted
}

/// A block that pieces name and that would be lost with one more server, though it should not.
pub fn has_one_copy_left(row: &BlockRow) -> bool {
    row.refs > 0 && row.holders.len() == 1 && row.wanted > 1
}

/// A block that pieces name and that has more copies than it should.
pub fn has_surplus(row: &BlockRow) -> bool {
    row.refs > 0 && row.holders.len() > row.wanted
}

/// A block that no piece names, and that is not condemned for it yet.
pub fn is_unnamed(row: &BlockRow) -> bool {
    row.refs == 0 && !row.condemned
}

pub fn block(rows: &impl Rows, hash: BlockHash) -> Result<Option<BlockRow>> {
    fetch(rows.blocks(), &key::block(hash), BlockRow::decode)
}

/// Blocks that have fewer copies than they should, or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Debts {
    All,
    /// Those with one copy left.
    LastCopies,
    /// Those that are owed less than nothing.
    Surplus,
}

/// Up to `count` of these blocks, in order, after `after`.
pub fn owed_after(rows: &impl Rows, debts: Debts, after: Option<BlockHash>, count: usize) -> Result<Vec<BlockHash>> {
    let (list, key): (u8, fn(BlockHash) -> Vec<u8>) = match debts {
        Debts::All => (key::OWED, key::owed),
        Debts::LastCopies => (key::LAST_COPY, key::last_copy),
        Debts::Surplus => (key::SURPLUS, key::surplus),
    };
    listed_after(rows, &[list], after.map(key), count)
}

/// The next blocks that pieces name and that nobody is on record for.
pub fn lost_after(rows: &impl Rows, mut after: Option<BlockHash>, count: usize) -> Result<Vec<BlockHash>> {
    let mut lost = Vec::new();
    loop {
        let page = owed_after(rows, Debts::All, after, LOST_PAGE)?;
        for hash in &page {
            if lost.len() < count && block(rows, *hash)?.is_some_and(|row| row.holders.is_empty()) {
                lost.push(*hash);
            }
        }
        after = page.last().copied();
        if page.len() < LOST_PAGE || lost.len() == count {
            return Ok(lost);
        }
    }
}

/// The next rows of blocks, in the order of their hashes.
pub fn rows_after(rows: &impl Rows, after: Option<BlockHash>, count: usize) -> Result<Vec<(BlockHash, BlockRow)>> {
    let start = after.map_or(vec![key::BLOCK], |hash| past(&key::block(hash)));
    let mut found = Vec::new();
    scan(rows.blocks(), &start, &past(&[key::BLOCK]), |key, row| {
        if found.len() == count {
            return Ok(ControlFlow::Break(()));
        }
        found.push((hash_of(key)?, BlockRow::decode(row)?));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

/// Up to `count` blocks of the list whose keys begin with `list`, after the key `after`.
fn listed_after(rows: &impl Rows, list: &[u8], after: Option<Vec<u8>>, count: usize) -> Result<Vec<BlockHash>> {
    let start = after.map_or(list.to_vec(), |key| past(&key));
    let mut listed = Vec::new();
    scan(rows.blocks(), &start, &past(list), |key, _| {
        if listed.len() == count {
            return Ok(ControlFlow::Break(()));
        }
        listed.push(hash_of(key)?);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(listed)
}

/// The hash at the end of a key.
pub(super) fn hash_of(key: &[u8]) -> Result<BlockHash> {
    let hash = key.last_chunk::<32>().ok_or_else(|| StorageError::Damaged("block: key".into()))?;
    Ok(BlockHash(*hash))
}

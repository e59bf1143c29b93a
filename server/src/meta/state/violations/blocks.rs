//! What must hold of blocks, and of the lists of those that something is to be done about.

use std::{collections::BTreeSet, ops::ControlFlow};

use holdfast_common::{BlockHash, Epoch, ServerId, limits::REPLICAS};

use super::{Found, tally::Tally};
use crate::meta::state::{
    Rows, StorageError, blocks,
    rows::BlockRow,
    servers,
    tables::{Result, fetch, key, past, scan},
};

/// What counts across the tables.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) blocks: u64,
    pub(super) by_copies: [u64; REPLICAS + 1],
    pub(super) owed: u64,
    pub(super) unnamed: u64,
    pub(super) condemned: u64,
    /// Pieces, as blocks count them.
    pub(super) references: Tally,
    /// Copies, as blocks know them.
    pub(super) holders: Tally,
    /// The same, as the index of holders does.
    pub(super) held: Tally,
}

pub(super) fn check(rows: &impl Rows, found: &mut Found) -> Result<Seen> {
    let servers = servers::servers(rows)?.into_iter().map(|(id, _)| id).collect();
    let mut walk = Walk { rows, found, servers, seen: Seen::default() };
    scan(rows.blocks(), &[key::BLOCK], &past(&[key::BLOCK]), |key, row| {
        walk.take(blocks::hash_of(key)?, &BlockRow::decode(row)?).map(ControlFlow::Continue)
    })?;
    walk.lists()?;
    let (newest, forgotten) = (rows.counters().epoch, rows.counters().forgotten);
    if forgotten > newest {
        walk.found.push(format!("blocks of epoch {forgotten} are forgotten, the newest is {newest}"));
    }
    Ok(walk.seen)
}

struct Walk<'a, R> {
    rows: &'a R,
    found: &'a mut Found,
    servers: BTreeSet<ServerId>,
    seen: Seen,
}

impl<R: Rows> Walk<'_, R> {
    fn take(&mut self, hash: BlockHash, row: &BlockRow) -> Result<()> {
        self.seen.blocks += 1;
        self.count(hash, row);
        self.check_holders(hash, row);
        self.check_wanted(hash, row);
        self.check_condemned(hash, row)?;
        if blocks::is_owed(row) {
            self.seen.owed += 1;
            self.is_listed(&key::owed(hash), || format!("block {hash} and the list of owed blocks disagree"))?;
        }
        if blocks::is_unnamed(row) {
            self.seen.unnamed += 1;
            self.is_listed(&key::unnamed(hash), || format!("block {hash} and the list of unnamed blocks disagree"))?;
        }
        Ok(())
    }

    fn is_listed(&mut self, key: &[u8], sentence: impl FnOnce() -> String) -> Result<()> {
        if fetch(self.rows.blocks(), key, |_| Ok(()))?.is_none() {
            self.found.push(sentence());
        }
        Ok(())
    }

    fn count(&mut self, hash: BlockHash, row: &BlockRow) {
        let (mut of_the_cluster, tally) = (row.refs, &mut self.seen.references);
        for (copies, refs) in (1..).zip(row.refs_by_replicas) {
            of_the_cluster = of_the_cluster.wrapping_sub(refs);
            if refs > 0 {
                tally.add_reference(hash, Some(copies), refs);
            }
        }
        tally.add_reference(hash, None, of_the_cluster);
        row.holders.iter().for_each(|holder| self.seen.holders.add_copy(*holder, hash));
        if row.refs > 0 {
            self.seen.by_copies[row.holders.len().min(REPLICAS)] += 1;
        }
    }

    fn check_holders(&mut self, hash: BlockHash, row: &BlockRow) {
        if row.holders.is_empty() && !row.condemned {
            self.found.push(format!("block {hash} has no copy on record"));
        }
        if row.holders.len() > blocks::HOLDERS_MAX || !row.holders.is_sorted_by(|a, b| a < b) {
            self.found.push(format!("block {hash} has holders {:?}", row.holders));
        }
        if row.holders.iter().any(|holder| !self.servers.contains(holder)) {
            self.found.push(format!("block {hash} is held by a server that never was: {:?}", row.holders));
        }
    }

    /// While numbers that have changed are still being followed, what has not followed yet is as it was.
    fn check_wanted(&mut self, hash: BlockHash, row: &BlockRow) {
        let counters = self.rows.counters();
        let follows = counters.retargeted.is_none_or(|through| hash <= through);
        let wanted = row.most_wanted(counters.replicas());
        if follows && row.wanted != wanted {
            self.found.push(format!("block {hash} wants {} copies, and should want {wanted}", row.wanted));
        }
    }

    fn check_condemned(&mut self, hash: BlockHash, row: &BlockRow) -> Result<()> {
        let newest = self.rows.counters().epoch;
        if row.epoch > newest {
            self.found.push(format!("block {hash} is of epoch {}, the newest is {newest}", row.epoch));
        }
        if !row.condemned {
            return Ok(());
        }
        self.seen.condemned += 1;
        if row.refs > 0 {
            self.found.push(format!("block {hash} is condemned, and {} pieces name it", row.refs));
        }
        let key = key::condemned(condemned_list(row), row.epoch, hash);
        self.is_listed(&key, || disagreement(hash, row.epoch))
    }

    /// That every block of a list belongs there. The other way round was looked at with the blocks.
    fn lists(&mut self) -> Result<()> {
        scan(self.rows.blocks(), &past(&[key::BLOCK]), &past(&[]), |key, _| {
            self.take_listed(key).map(ControlFlow::Continue)
        })
    }

    fn take_listed(&mut self, key: &[u8]) -> Result<()> {
        let damaged = || StorageError::Damaged("blocks: key".into());
        let hash = blocks::hash_of(key)?;
        let (test, list): (fn(&BlockRow) -> bool, _) = match key[0] {
            key::HELD => {
                let server = key[1..].first_chunk::<4>().ok_or_else(damaged)?;
                self.seen.held.add_copy(ServerId(u32::from_be_bytes(*server)), hash);
                return Ok(());
            }
            list @ (key::CONDEMNED | key::DELETED) => {
                let epoch = Epoch(u64::from_be_bytes(*key[1..].first_chunk::<8>().ok_or_else(damaged)?));
                let row = blocks::block(self.rows, hash)?;
                let belongs = |row: BlockRow| row.condemned && row.epoch == epoch && condemned_list(&row) == list;
                if !row.is_some_and(belongs) {
                    self.found.push(disagreement(hash, epoch));
                }
                return Ok(());
            }
            key::OWED => (blocks::is_owed, "the list of owed blocks disagree"),
            // One that came to have one copy left before there was a list of those is in the other list only.
            key::LAST_COPY => (blocks::has_one_copy_left, "the list of last copies disagree"),
            key::SURPLUS => (blocks::has_surplus, "the list of those with too many copies disagree"),
            key::UNNAMED => (blocks::is_unnamed, "the list of unnamed blocks disagree"),
            _ => return Err(damaged()),
        };
        if !blocks::block(self.rows, hash)?.is_some_and(|row| test(&row)) {
            self.found.push(format!("block {hash} and {list}"));
        }
        Ok(())
    }
}

/// Deleted everywhere, or still to be.
fn condemned_list(row: &BlockRow) -> u8 {
    if row.holders.is_empty() { key::DELETED } else { key::CONDEMNED }
}

fn disagreement(hash: BlockHash, epoch: Epoch) -> String {
    format!("block {hash} and the list of condemned blocks disagree, at epoch {epoch}")
}

//! What must hold of blocks, and of the lists of those that something is to be done about.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
};

use holdfast_common::{
    BlockHash, Epoch, ServerId,
    inventory::{BucketDigest, bucket_of},
    limits::REPLICAS,
};

use super::{Correction, Found, tally::Tally};
use crate::meta::state::{
    Rows, StorageError, blocks,
    rows::{BlockRow, decode_holding},
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
}

pub(super) fn check(rows: &impl Rows, found: &mut Found) -> Result<Seen> {
    let servers = servers::servers(rows)?.into_iter().map(|(id, _)| id).collect();
    let mut walk = Walk { rows, found, servers, seen: Seen::default(), holdings: BTreeMap::new() };
    scan(rows.blocks(), &[key::BLOCK], &past(&[key::BLOCK]), |key, row| {
        walk.take(blocks::hash_of(key)?, &BlockRow::decode(row)?).map(ControlFlow::Continue)
    })?;
    walk.lists()?;
    walk.holdings_are_told();
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
    /// What servers are on record for, as blocks know it, and not found in the digests yet.
    holdings: BTreeMap<(ServerId, u8), BucketDigest>,
}

impl<R: Rows> Walk<'_, R> {
    fn take(&mut self, hash: BlockHash, row: &BlockRow) -> Result<()> {
        self.seen.blocks += 1;
        self.count(hash, row);
        self.check_holders(hash, row);
        self.check_wanted(hash, row);
        self.check_condemned(hash, row)?;
        if blocks::is_owed(row) {
            self.seen.owed += u64::from(!row.condemned);
            self.is_listed(hash, &key::owed(hash), || format!("block {hash} and the list of owed blocks disagree"))?;
        }
        if blocks::is_unnamed(row) {
            self.seen.unnamed += 1;
            let sentence = || format!("block {hash} and the list of unnamed blocks disagree");
            self.is_listed(hash, &key::unnamed(hash), sentence)?;
        }
        Ok(())
    }

    fn is_listed(&mut self, block: BlockHash, key: &[u8], sentence: impl FnOnce() -> String) -> Result<()> {
        if fetch(self.rows.blocks(), key, |_| Ok(()))?.is_none() {
            self.found.push_mended(sentence(), Correction::Lists { block });
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
        for holder in &row.holders {
            self.holdings.entry((*holder, bucket_of(&hash))).or_default().add(&hash);
        }
        if row.refs > 0 && !row.condemned {
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
            self.found.push_mended(
                format!("block {hash} wants {} copies, and should want {wanted}", row.wanted),
                Correction::Lists { block: hash },
            );
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
        self.is_listed(hash, &key, || disagreement(hash, row.epoch))
    }

    /// That every block of a list belongs there. The other way round was looked at with the blocks.
    fn lists(&mut self) -> Result<()> {
        scan(self.rows.blocks(), &past(&[key::BLOCK]), &past(&[]), |key, row| {
            match key[0] {
                key::HOLDING => self.take_holding(key, &decode_holding(row)?)?,
                _ => self.take_listed(key)?,
            }
            Ok(ControlFlow::Continue(()))
        })
    }

    fn take_holding(&mut self, key: &[u8], digest: &BucketDigest) -> Result<()> {
        let [_, server @ .., bucket] = <[u8; 6]>::try_from(key).map_err(|_| damaged())?;
        let server = ServerId(u32::from_be_bytes(server));
        let is = self.holdings.remove(&(server, bucket)).unwrap_or_default();
        if is != *digest {
            self.wrong_holding(server, bucket, is.minus(digest));
        }
        Ok(())
    }

    /// Those that were not found are missing.
    fn holdings_are_told(&mut self) {
        for ((server, bucket), is) in std::mem::take(&mut self.holdings) {
            self.wrong_holding(server, bucket, is);
        }
    }

    fn wrong_holding(&mut self, server: ServerId, bucket: u8, by: BucketDigest) {
        self.found.push_mended(
            format!("the digest of what server {server} is on record for in bucket {bucket} is not that of its blocks"),
            Correction::Holding { server, bucket, by },
        );
    }

    fn take_listed(&mut self, key: &[u8]) -> Result<()> {
        if is_rightly_listed(self.rows, key)? {
            return Ok(());
        }
        let hash = blocks::hash_of(key)?;
        let sentence = match key[0] {
            key::CONDEMNED | key::DELETED => disagreement(hash, epoch_of(key)?),
            key::OWED => format!("block {hash} and the list of owed blocks disagree"),
            key::LAST_COPY => format!("block {hash} and the list of last copies disagree"),
            key::SURPLUS => format!("block {hash} and the list of those with too many copies disagree"),
            _ => format!("block {hash} and the list of unnamed blocks disagree"),
        };
        self.found.push_mended(sentence, Correction::Listed { key: key.to_vec() });
        Ok(())
    }
}

/// Whether what a row of a list says is so.
pub(super) fn is_rightly_listed(rows: &impl Rows, key: &[u8]) -> Result<bool> {
    let row = blocks::block(rows, blocks::hash_of(key)?)?;
    let belongs: fn(&BlockRow) -> bool = match key[0] {
        list @ (key::CONDEMNED | key::DELETED) => {
            let epoch = epoch_of(key)?;
            return Ok(row.is_some_and(|row| row.condemned && row.epoch == epoch && condemned_list(&row) == list));
        }
        key::OWED => blocks::is_owed,
        // One that came to have one copy left before there was a list of those is in the other list only.
        key::LAST_COPY => blocks::has_one_copy_left,
        key::SURPLUS => blocks::has_surplus,
        key::UNNAMED => blocks::is_unnamed,
        _ => return Err(damaged()),
    };
    Ok(row.is_some_and(|row| belongs(&row)))
}

fn epoch_of(key: &[u8]) -> Result<Epoch> {
    Ok(Epoch(u64::from_be_bytes(*key[1..].first_chunk::<8>().ok_or_else(damaged)?)))
}

fn damaged() -> StorageError {
    StorageError::Damaged("blocks: key".into())
}

/// Deleted everywhere, or still to be.
fn condemned_list(row: &BlockRow) -> u8 {
    if row.holders.is_empty() { key::DELETED } else { key::CONDEMNED }
}

fn disagreement(hash: BlockHash, epoch: Epoch) -> String {
    format!("block {hash} and the list of condemned blocks disagree, at epoch {epoch}")
}

//! What each storage server is on record for: a digest of each bucket of hashes, which says whether that is what the server has without
//! looking at any block, and in which buckets its blocks are.
//!
//! A row for each server and block would be shorter to ask. But hashes come in no order: with many blocks each of a file's three would
//! be a page of the disk by itself, and these were three of the eight rows of a small file. Who wants the blocks of one server reads
//! the rows of blocks in its buckets: those of all servers, but a row is read much faster than what is done about it.

use std::{
    collections::BTreeMap,
    ops::{ControlFlow, RangeInclusive},
};

use holdfast_common::{
    BlockHash, ServerId,
    inventory::{BucketDigest, bucket_of},
};
use redb::{ReadableTable, Table};

use super::{
    Rows, Tables, blocks,
    rows::{BlockRow, decode_holding, encode_holding},
    tables::{Raw, Result, fetch, key, past, scan},
};

/// Rows of blocks that are read for one page, at most.
pub(super) const ROWS_MAX: usize = 1 << 12;

/// Digests that were changed, and are not in their rows yet: one server's change with every block.
#[derive(Debug, Default)]
pub struct Holdings(BTreeMap<(ServerId, u8), BucketDigest>);

impl Holdings {
    /// The newest digest.
    pub(super) fn of(
        &self,
        table: &impl ReadableTable<Raw, Raw>,
        server: ServerId,
        bucket: u8,
    ) -> Result<BucketDigest> {
        match self.0.get(&(server, bucket)) {
            Some(changed) => Ok(*changed),
            None => stored(table, server, bucket),
        }
    }

    /// A server has come on record for a block (`true`), or off it.
    pub(super) fn change(
        &mut self,
        table: &impl ReadableTable<Raw, Raw>,
        server: ServerId,
        hash: &BlockHash,
        comes: bool,
    ) -> Result<()> {
        let mut digest = self.of(table, server, bucket_of(hash))?;
        if comes {
            digest.add(hash)
        } else {
            digest.take(hash)
        }
        self.0.insert((server, bucket_of(hash)), digest);
        Ok(())
    }

    /// Corrects one that is wrong.
    pub(super) fn add(
        &mut self,
        table: &impl ReadableTable<Raw, Raw>,
        server: ServerId,
        bucket: u8,
        by: &BucketDigest,
    ) -> Result<()> {
        let digest = self.of(table, server, bucket)?.plus(by);
        self.0.insert((server, bucket), digest);
        Ok(())
    }

    /// Puts everything into its row.
    pub(super) fn write(self, table: &mut Table<'_, Raw, Raw>) -> Result<()> {
        for ((server, bucket), digest) in self.0 {
            let key = key::holding(server, bucket);
            // A server that has nothing leaves no row behind.
            match digest == BucketDigest::default() {
                true => drop(table.remove(key.as_slice())?),
                false => drop(table.insert(key.as_slice(), encode_holding(&digest).as_slice())?),
            }
        }
        Ok(())
    }
}

/// What the row says.
pub(super) fn stored(table: &impl ReadableTable<Raw, Raw>, server: ServerId, bucket: u8) -> Result<BucketDigest> {
    Ok(fetch(table, &key::holding(server, bucket), decode_holding)?.unwrap_or_default())
}

/// Some of the blocks that a server is on record for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// In order.
    pub blocks: Vec<BlockHash>,
    /// After which hash to go on; `None`: there are no more.
    pub next: Option<BlockHash>,
}

/// Up to `count` blocks that a server is on record for, after `after`; fewer, or none, if the blocks of others lie between them.
pub fn held_after(rows: &impl Rows, server: ServerId, after: Option<BlockHash>, count: usize) -> Result<Page> {
    let first = after.as_ref().map_or(0, bucket_of);
    held_among(rows, server, first..=u8::MAX, after, count)
}

/// The same in one bucket.
pub fn held_in(rows: &impl Rows, server: ServerId, bucket: u8, after: Option<BlockHash>, count: usize) -> Result<Page> {
    held_among(rows, server, bucket..=bucket, after, count)
}

fn held_among(
    rows: &impl Rows,
    server: ServerId,
    buckets: RangeInclusive<u8>,
    after: Option<BlockHash>,
    count: usize,
) -> Result<Page> {
    let (mut page, mut read, mut last) = (Page::default(), 0, after);
    for bucket in buckets {
        if rows.holding(server, bucket)? == BucketDigest::default() {
            continue;
        }
        let bucket = vec![key::BLOCK, bucket];
        let start = after.map_or(bucket.clone(), |hash| past(&key::block(hash)).max(bucket.clone()));
        scan(rows.blocks(), &start, &past(&bucket), |key, row| {
            if page.blocks.len() == count || read == ROWS_MAX {
                page.next = last;
                return Ok(ControlFlow::Break(()));
            }
            let hash = blocks::hash_of(key)?;
            (read, last) = (read + 1, Some(hash));
            if BlockRow::decode(row)?.holders.contains(&server) {
                page.blocks.push(hash);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        if page.next.is_some() {
            break;
        }
    }
    Ok(page)
}

/// Whether a server is on record for no block.
pub fn is_empty(rows: &impl Rows, server: ServerId) -> Result<bool> {
    for bucket in 0..=u8::MAX {
        if rows.holding(server, bucket)? != BucketDigest::default() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Tables of versions that had a row for each server and block, instead of digests: makes these of the rows of blocks.
pub fn adopt(tables: &mut Tables<'_>) -> Result<()> {
    if !tables.has_old_holdings()? {
        return Ok(());
    }
    tracing::info!("the metadata were written by an earlier version: its list of who has which block becomes digests");
    tables.drop_old_holdings()?;
    let mut after = None;
    loop {
        let page = blocks::rows_after(tables, after, ROWS_MAX)?;
        let Some((last, _)) = page.last() else { return Ok(()) };
        after = Some(*last);
        for (hash, row) in &page {
            for holder in &row.holders {
                tables.change_holding(*holder, hash, true)?;
            }
        }
    }
}

//! Storage servers that have reported themselves, and what happens to their copies.

use std::{net::SocketAddr, ops::ControlFlow};

use holdfast_common::{
    BlockHash, Epoch, Refusal, ServerId, cluster::Standing, limits::STORAGE_SERVERS_MAX, wire::meta::CopyFault,
};

use super::{
    Reply, Rows, Step, StorageError, Tables, blocks, holdings,
    rows::ServerRow,
    tables::{Result, fetch, key, past, scan},
};

/// Bytes of the name of a zone.
const ZONE_LENGTH_MAX: usize = 255;

pub(super) fn register(tables: &mut Tables<'_>, id: ServerId, address: SocketAddr, zone: &str) -> Step<Reply> {
    if zone.len() > ZONE_LENGTH_MAX {
        return Err(Refusal::NameTooLong.into());
    }
    if is_removed(tables, id)? {
        return Err(Refusal::NotPermitted.into());
    }
    let known = server(tables, id)?;
    if known.is_none() && servers(tables)?.len() >= STORAGE_SERVERS_MAX {
        return Err(Refusal::NoSpace.into());
    }
    let standing = known.map_or(Standing::Serving, |row| row.standing);
    tables.put_state(&key::server(id), &ServerRow { address, zone: zone.to_owned(), standing }.encode())?;
    Ok(Reply::Done)
}

/// Says what is wanted of a server. Refused `Busy` for the removal of one that is on record for blocks.
pub(super) fn stand(tables: &mut Tables<'_>, id: ServerId, standing: Standing) -> Step<Reply> {
    let row = server(tables, id)?.ok_or(Refusal::NotFound)?;
    if standing != Standing::Removed {
        tables.put_state(&key::server(id), &ServerRow { standing, ..row }.encode())?;
        return Ok(Reply::Done);
    }
    if !holdings::is_empty(tables, id)? {
        return Err(Refusal::Busy.into());
    }
    tables.remove_state(&key::server(id))?;
    tables.put_state(&key::removed(id), &[])?;
    Ok(Reply::Done)
}

fn server(rows: &impl Rows, id: ServerId) -> Result<Option<ServerRow>> {
    fetch(rows.state(), &key::server(id), ServerRow::decode)
}

fn is_removed(rows: &impl Rows, id: ServerId) -> Result<bool> {
    Ok(fetch(rows.state(), &key::removed(id), |_| Ok(()))?.is_some())
}

pub(super) fn holder_added(
    tables: &mut Tables<'_>,
    server: ServerId,
    hashes: &[BlockHash],
    epoch: Epoch,
) -> Result<Reply> {
    if is_registered(tables, server)? {
        for hash in hashes {
            if blocks::hold(tables, *hash, server, epoch)? {
                tables.counters.copies_made += 1;
            }
        }
    }
    Ok(Reply::Done)
}

pub(super) fn holder_lost(tables: &mut Tables<'_>, server: ServerId, hashes: &[BlockHash]) -> Result<Reply> {
    let mut lost = 0;
    for hash in hashes {
        lost += usize::from(blocks::unhold(tables, *hash, server)?);
    }
    Ok(Reply::Lost(lost))
}

pub(super) fn give_up(tables: &mut Tables<'_>, server: ServerId, hashes: &[BlockHash]) -> Result<Reply> {
    let row = fetch(tables.state(), &key::server(server), ServerRow::decode)?;
    if row.is_none_or(|row| row.standing != Standing::Leaving) {
        // The operator has called it back meanwhile.
        return Ok(Reply::Lost(0));
    }
    let mut lost = 0;
    for hash in hashes {
        lost += usize::from(blocks::unhold_last(tables, *hash, server)?);
    }
    Ok(Reply::Lost(lost))
}

/// Counts a bad copy that a reader met. One that could not be replaced on the spot is off the record, and so owed.
pub(super) fn bad_copy(
    tables: &mut Tables<'_>,
    server: ServerId,
    hash: BlockHash,
    fault: CopyFault,
    repaired: bool,
) -> Result<Reply> {
    match fault {
        CopyFault::Missing => tables.counters.missing_met += 1,
        CopyFault::Damaged => tables.counters.corrupt_met += 1,
    }
    if repaired {
        tables.counters.repaired += 1;
        tables.counters.copies_made += 1;
    } else {
        blocks::unhold(tables, hash, server)?;
    }
    Ok(Reply::Done)
}

pub(super) fn is_registered(rows: &impl Rows, id: ServerId) -> Result<bool> {
    Ok(fetch(rows.state(), &key::server(id), |_| Ok(()))?.is_some())
}

/// Every server that has ever reported itself, by id.
pub fn servers(rows: &impl Rows) -> Result<Vec<(ServerId, ServerRow)>> {
    let prefix = [key::SERVER];
    let mut all = Vec::new();
    scan(rows.state(), &prefix, &past(&prefix), |key, row| {
        let id = key[1..].try_into().map_err(|_| StorageError::Damaged("server: key".into()))?;
        all.push((ServerId(u32::from_be_bytes(id)), ServerRow::decode(row)?));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(all)
}

//! Whether a metadata server that has lost its power still waits for mounts to say again what it has lost (I3).
//!
//! A row of the tables, and not memory: a server that is killed while it waits has to go on waiting.

use holdfast_common::Position;

use super::{
    Reply, Rows, StorageError, Tables,
    tables::{Result, fetch, key},
};

/// Everything after the last entry was lost. One that is still open began earlier, and so covers more.
pub(super) fn begin(tables: &mut Tables<'_>) -> Result<Reply> {
    if open(tables)?.is_none() {
        let after = tables.counters.position;
        tables.put_state(&key::recovery(), &after.0.to_le_bytes())?;
    }
    Ok(Reply::Done)
}

pub(super) fn end(tables: &mut Tables<'_>) -> Result<Reply> {
    tables.remove_state(&key::recovery())?;
    Ok(Reply::Done)
}

/// The position after which changes were lost, while they are still waited for.
pub fn open(rows: &impl Rows) -> Result<Option<Position>> {
    let decode = |bytes: &[u8]| {
        let after = bytes.try_into().map_err(|_| StorageError::Damaged("recovery: position".into()))?;
        Ok(Position(u64::from_le_bytes(after)))
    };
    fetch(rows.state(), &key::recovery(), decode)
}

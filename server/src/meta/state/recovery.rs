//! What a metadata server that has lost its power still has to hear from its mounts (I3).
//!
//! Rows of the tables, and not memory: a server that is killed while it waits has to go on waiting, and a mount that was away
//! owes what it had done for as long as its session lives.

use std::{ops::ControlFlow, ops::Range};

use holdfast_common::{Ino, Position, SessionId};

use super::{
    Reply, Rows, StorageError, Tables, session,
    tables::{Result, fetch, key, past, scan},
};

/// Numbers of inodes that may have been given out and lost: nobody else gets these, for a mount may still know one.
const NUMBERS_LOST: u64 = 1 << 24;
/// Epochs that may have been told and lost: copies may be stamped with them, which a condemnation under the same number
/// would leave behind.
const EPOCHS_LOST: u64 = 1 << 24;

/// What a mount has to say again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owed {
    /// Everything that it had done after this.
    pub after: Position,
    /// Numbers of inodes that may have been lost: from the first on, and none from the second on.
    pub lost: (Ino, Ino),
}

impl Owed {
    fn encode(&self) -> [u8; 24] {
        let mut row = [0; 24];
        let fields = [self.after.0, self.lost.0.0, self.lost.1.0];
        row.chunks_exact_mut(8).zip(fields).for_each(|(place, field)| place.copy_from_slice(&field.to_le_bytes()));
        row
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        // Before the end was kept, there was one range.
        let widened = |old: &[u8; 16]| {
            let first = old[8..].iter().rev().fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte));
            let mut row = [0; 24];
            row[..16].copy_from_slice(old);
            row[16..].copy_from_slice(&(first + NUMBERS_LOST).to_le_bytes());
            row
        };
        let row = match <[u8; 16]>::try_from(bytes) {
            Ok(old) => widened(&old),
            Err(_) => bytes.try_into().map_err(|_| StorageError::Damaged("recovery: row".into()))?,
        };
        let number =
            |field: usize| row[8 * field..8 * field + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        Ok(Self { after: Position(number(0)), lost: (Ino(number(1)), Ino(number(2))) })
    }

    /// Numbers of inodes that were lost.
    pub fn numbers(&self) -> Range<u64> {
        self.lost.0.0..self.lost.1.0
    }
}

/// Everything after the last entry was lost. One that is still open began earlier, and so covers more; so does what a mount
/// owes from before. But its end may have been lost with the power, and what was done after that too: numbers that were given out then
/// are lost as well.
pub(super) fn begin(tables: &mut Tables<'_>) -> Result<Reply> {
    let first = Ino(tables.counters.ino_next);
    tables.counters.ino_next += NUMBERS_LOST;
    tables.counters.epoch.0 += EPOCHS_LOST;
    let end = Ino(tables.counters.ino_next);
    let widened = |owed: Owed| Owed { lost: (owed.lost.0, end), ..owed };
    let new = Owed { after: tables.counters.position, lost: (first, end) };
    let owed = fetch(tables.state(), &key::recovery(), Owed::decode)?.map_or(new, widened);
    tables.put_state(&key::recovery(), &owed.encode())?;
    for (session, _) in session::sessions(tables)? {
        let owed = owed_by(tables, session)?.map_or_else(|| owed.clone(), widened);
        tables.put_state(&key::owed_by(session), &owed.encode())?;
    }
    Ok(Reply::Done)
}

pub(super) fn end(tables: &mut Tables<'_>) -> Result<Reply> {
    tables.remove_state(&key::recovery())?;
    Ok(Reply::Done)
}

/// The mount has said all that it had done, or has gone.
pub(super) fn settle(tables: &mut Tables<'_>, session: SessionId) -> Result<Reply> {
    tables.remove_state(&key::owed_by(session))?;
    Ok(Reply::Done)
}

/// The position after which changes were lost, while everybody waits for them.
pub fn open(rows: &impl Rows) -> Result<Option<Position>> {
    Ok(fetch(rows.state(), &key::recovery(), Owed::decode)?.map(|owed| owed.after))
}

pub fn owed_by(rows: &impl Rows, session: SessionId) -> Result<Option<Owed>> {
    fetch(rows.state(), &key::owed_by(session), Owed::decode)
}

/// Every session that owes something, by id.
pub fn owing(rows: &impl Rows) -> Result<Vec<(SessionId, Owed)>> {
    let prefix = [key::OWED_BY];
    let mut all = Vec::new();
    scan(rows.state(), &prefix, &past(&prefix), |key, row| {
        let id = key[1..].try_into().map_err(|_| StorageError::Damaged("recovery: key".into()))?;
        all.push((SessionId(u64::from_be_bytes(id)), Owed::decode(row)?));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(all)
}

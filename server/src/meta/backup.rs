//! Backups of the metadata: all rows of one moment, in one stream, taken while the server works.
//!
//! The stream, integers little-endian: `HFBACKUP`, a version (u32), the cluster's id (16 bytes), position (u64) and time (seconds since
//! 1970, i64) of the moment; each row as table (u8), length of its key (u16) and of its value (u32), key, value, in order; a table
//! number of 255 with the count of rows (u64); and the BLAKE3 hash of everything before it (32 bytes).
//!
//! Sessions, what is kept for them, and tokens are left out: whoever finds a metadata server that was restored opens a new one.

use std::{ops::ControlFlow, sync::Arc};

use holdfast_common::{ClusterId, Position, Time};

use super::state::{
    Rows, StorageError, View,
    tables::{key, past, scan},
};

pub const MAGIC: &[u8; 8] = b"HFBACKUP";
pub const VERSION: u32 = 1;
pub const HEADER_LENGTH: usize = 44;
/// Bytes before the key of a row.
pub const ROW_HEADER_LENGTH: usize = 7;
/// In the place of a table's number: the end.
pub const END: u8 = 255;
/// Bytes from the mark of the end on, without the hash.
pub const TRAILER_LENGTH: usize = 9;
pub const HASH_LENGTH: usize = 32;

/// Numbers of the tables in the stream.
pub const TREE: u8 = 0;
pub const BLOCKS: u8 = 1;
pub const STATE: u8 = 2;

/// A backup that is being read.
pub struct Backup {
    view: Arc<View>,
    table: u8,
    /// The last key of that table that was read.
    after: Option<Vec<u8>>,
    rows: u64,
    hasher: blake3::Hasher,
    begun: bool,
    ended: bool,
    cluster: ClusterId,
    time: Time,
}

impl std::fmt::Debug for Backup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backup").field("rows", &self.rows).finish_non_exhaustive()
    }
}

impl Backup {
    /// Of what `view` shows.
    pub fn new(view: Arc<View>, cluster: ClusterId, time: Time) -> Self {
        let hasher = blake3::Hasher::new();
        Self { view, table: TREE, after: None, rows: 0, hasher, begun: false, ended: false, cluster, time }
    }

    pub fn position(&self) -> Position {
        self.view.counters().position
    }

    /// The next part of the stream, of about `length` bytes; empty after the last. Reads from the disk.
    pub fn next_part(&mut self, length: usize) -> Result<Vec<u8>, StorageError> {
        let mut part = Vec::with_capacity(length + (64 << 10));
        if !self.begun {
            self.begun = true;
            part.extend_from_slice(MAGIC);
            part.extend_from_slice(&VERSION.to_le_bytes());
            part.extend_from_slice(&self.cluster.0);
            part.extend_from_slice(&self.position().0.to_le_bytes());
            part.extend_from_slice(&self.time.secs.to_le_bytes());
        }
        while part.len() < length && self.table <= STATE {
            self.read_rows(&mut part, length)?;
        }
        if self.table > STATE && !self.ended {
            self.ended = true;
            part.push(END);
            part.extend_from_slice(&self.rows.to_le_bytes());
            self.hasher.update(&part);
            part.extend_from_slice(self.hasher.finalize().as_bytes());
        } else {
            self.hasher.update(&part);
        }
        Ok(part)
    }

    /// Rows of the present table, until the part is long enough or the table ends.
    fn read_rows(&mut self, part: &mut Vec<u8>, length: usize) -> Result<(), StorageError> {
        // The first key that is longer than the last one.
        let start = self.after.as_ref().map_or(Vec::new(), |last| [last.as_slice(), &[0]].concat());
        let (table, mut last, mut rows, mut full) = (self.table, None, 0, false);
        let visit = |key: &[u8], value: &[u8]| {
            if part.len() >= length {
                full = true;
                return Ok(ControlFlow::Break(()));
            }
            last = Some(key.to_vec());
            if is_kept(table, key) {
                let lengths = u16::try_from(key.len()).ok().zip(u32::try_from(value.len()).ok());
                let (key_length, value_length) =
                    lengths.ok_or_else(|| StorageError::Damaged("a row is too long".into()))?;
                part.push(table);
                part.extend_from_slice(&key_length.to_le_bytes());
                part.extend_from_slice(&value_length.to_le_bytes());
                part.extend_from_slice(key);
                part.extend_from_slice(value);
                rows += 1;
            }
            Ok(ControlFlow::Continue(()))
        };
        match table {
            TREE => scan(self.view.tree(), &start, &past(&[]), visit)?,
            BLOCKS => scan(self.view.blocks(), &start, &past(&[]), visit)?,
            _ => scan(self.view.state(), &start, &past(&[]), visit)?,
        }
        self.rows += rows;
        if full {
            self.after = last.or(self.after.take());
        } else {
            self.table += 1;
            self.after = None;
        }
        Ok(())
    }
}

fn is_kept(table: u8, row: &[u8]) -> bool {
    // A token that is used after the backup was taken must not be good again.
    let left_out = [key::SESSION, key::INSTANCE, key::REPLY, key::RECOVERY, key::OWED_BY, key::TOKEN];
    table != STATE || !row.first().is_some_and(|family| left_out.contains(family))
}

//! The redb tables of the metadata, and the keys of their rows.
//!
//! Three tables, so that one operation opens few trees. Every key is bytes whose order is the order of what
//! they encode (big-endian), and begins so that the rows of one operation are neighbours:
//!
//! | table    | key                        | row |
//! |----------|----------------------------|-----|
//! | `tree`   | ino, 0                     | inode |
//! |          | ino, 1                     | target of a symlink |
//! |          | ino, 2, name               | extended attribute |
//! |          | ino, 3, name               | dentry |
//! |          | ino, 4, cookie             | dentry with its name, in the order of reading |
//! |          | ino, 5, chunk              | pieces |
//! | `blocks` | 0, hash                    | block |
//! |          | 2, hash                    | (owed a copy) |
//! |          | 3, hash                    | when the last piece that named it went |
//! |          | 4, epoch, hash             | (condemned, to be deleted) |
//! |          | 5, epoch, hash             | (condemned, deleted everywhere) |
//! |          | 6, hash                    | (has one copy left) |
//! |          | 7, hash                    | (has too many copies) |
//! |          | 8, server, bucket          | digest of what the server is on record for |
//! | `state`  | 0                          | counters |
//! |          | 1, session                 | session |
//! |          | 2, role, node, instance    | session that this mount opened |
//! |          | 3, session, sequence       | kept reply |
//! |          | 4, ino                     | (orphan) |
//! |          | 5, server                  | registered storage server |
//! |          | 6, hash of the secret      | token |
//! |          | 7                          | what was lost, while everybody waits for mounts to say it again |
//! |          | 8, session                 | what this mount has to say again |
//! |          | 9, server                  | (removed storage server) |
//! |          | 10, ino                    | from which chunk on its pieces are counted under another number |
//! |          | 11                         | position of the last entry that corrected rows |

use std::{
    borrow::Borrow,
    collections::BTreeMap,
    ops::{ControlFlow, RangeBounds},
};

use holdfast_common::{BlockHash, ChunkIndex, Epoch, Ino, Sequence, ServerId, SessionId, inventory::BucketDigest};
use redb::{
    AccessGuard, Range, ReadOnlyTable, ReadTransaction, ReadableTable, ReadableTableMetadata, Table, TableDefinition,
    TableStats, WriteTransaction,
};

use super::{
    holdings::{self, Holdings},
    rows::{Counters, Inode},
};

pub type Raw = &'static [u8];

const TREE: TableDefinition<'static, Raw, Raw> = TableDefinition::new("tree");
const BLOCKS: TableDefinition<'static, Raw, Raw> = TableDefinition::new("blocks");
const STATE: TableDefinition<'static, Raw, Raw> = TableDefinition::new("state");

/// A fault below the state machine: the replica must stop. Never an answer.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("the metadata database cannot be used: {0}")]
    Redb(#[source] Box<redb::Error>),
    #[error("a row of the metadata database is damaged: {0}")]
    Damaged(String),
}

macro_rules! from_redb {
    ($($error:ty),*) => {$(
        impl From<$error> for StorageError {
            fn from(error: $error) -> Self {
                Self::Redb(Box::new(error.into()))
            }
        }
    )*};
}
from_redb!(redb::StorageError, redb::TableError, redb::TransactionError, redb::CommitError, redb::DatabaseError);
from_redb!(redb::SetDurabilityError, redb::CompactionError);

pub type Result<T, E = StorageError> = std::result::Result<T, E>;

/// What every kind of transaction can be asked.
pub trait Rows {
    type Table: ReadableTable<Raw, Raw>;
    fn tree(&self) -> &Self::Table;
    fn blocks(&self) -> &Self::Table;
    fn state(&self) -> &Self::Table;
    fn inode(&self, ino: Ino) -> Result<Option<Inode>>;
    fn counters(&self) -> &Counters;
    /// Of the blocks of one bucket that a server is on record for.
    fn holding(&self, server: ServerId, bucket: u8) -> Result<BucketDigest>;
}

/// The tables of one write transaction. Inodes and counters are written back by [`Tables::finish`], so that
/// a batch that makes a hundred files in one directory writes the directory's row once.
pub struct Tables<'t> {
    tree: Table<'t, Raw, Raw>,
    blocks: Table<'t, Raw, Raw>,
    state: Table<'t, Raw, Raw>,
    pub(in crate::meta) counters: Counters,
    counters_were: Counters,
    inodes: BTreeMap<Ino, Option<Inode>>,
    holdings: Holdings,
    /// First sequence of a session whose reply may still be asked for, where this transaction moved it.
    pub(super) watermarks: BTreeMap<SessionId, Sequence>,
}

/// The tables of one read transaction.
pub struct View {
    tree: ReadOnlyTable<Raw, Raw>,
    blocks: ReadOnlyTable<Raw, Raw>,
    state: ReadOnlyTable<Raw, Raw>,
    counters: Counters,
}

/// The newest rows, wherever they are: in a transaction that is still open, or committed.
pub struct Newest<'t> {
    tree: NewestTable<'t>,
    blocks: NewestTable<'t>,
    state: NewestTable<'t>,
    counters: Counters,
    /// What is not in the rows yet.
    holdings: Option<&'t Holdings>,
}

/// A table of [`Newest`].
pub enum NewestTable<'t> {
    Open(Table<'t, Raw, Raw>),
    Committed(&'t ReadOnlyTable<Raw, Raw>),
}

/// One expression about a table, of whichever kind it is.
macro_rules! of_either {
    ($newest:expr, $table:ident => $what:expr) => {
        match $newest {
            NewestTable::Open($table) => $what,
            NewestTable::Committed(table) => {
                let $table: &ReadOnlyTable<Raw, Raw> = table;
                $what
            }
        }
    };
}

type Row<'a> = (AccessGuard<'a, Raw>, AccessGuard<'a, Raw>);

impl ReadableTableMetadata for NewestTable<'_> {
    fn stats(&self) -> redb::Result<TableStats> {
        of_either!(self, table => table.stats())
    }
    fn len(&self) -> redb::Result<u64> {
        of_either!(self, table => table.len())
    }
}

impl ReadableTable<Raw, Raw> for NewestTable<'_> {
    fn get<'a>(&self, key: impl Borrow<&'a [u8]>) -> redb::Result<Option<AccessGuard<'_, Raw>>> {
        of_either!(self, table => ReadableTable::get(table, key))
    }
    fn range<'a, K>(&self, range: impl RangeBounds<K> + 'a) -> redb::Result<Range<'_, Raw, Raw>>
    where
        K: Borrow<&'a [u8]> + 'a,
    {
        of_either!(self, table => ReadableTable::range(table, range))
    }
    fn first(&self) -> redb::Result<Option<Row<'_>>> {
        of_either!(self, table => ReadableTable::first(table))
    }
    fn last(&self) -> redb::Result<Option<Row<'_>>> {
        of_either!(self, table => ReadableTable::last(table))
    }
}

impl<'t> Newest<'t> {
    /// All that has been written in `transaction` so far, and what [`Tables::pause`] has returned.
    pub fn open(transaction: &'t WriteTransaction, holdings: &'t Holdings) -> Result<Self> {
        let state = transaction.open_table(STATE)?;
        let counters = load_counters(&state)?;
        let [tree, blocks] = [transaction.open_table(TREE)?, transaction.open_table(BLOCKS)?];
        let [tree, blocks, state] = [tree, blocks, state].map(NewestTable::Open);
        Ok(Self { tree, blocks, state, counters, holdings: Some(holdings) })
    }

    pub fn committed(view: &'t View) -> Self {
        let [tree, blocks, state] = [&view.tree, &view.blocks, &view.state].map(NewestTable::Committed);
        Self { tree, blocks, state, counters: view.counters.clone(), holdings: None }
    }
}

impl<'t> Rows for Newest<'t> {
    type Table = NewestTable<'t>;

    fn tree(&self) -> &Self::Table {
        &self.tree
    }
    fn blocks(&self) -> &Self::Table {
        &self.blocks
    }
    fn state(&self) -> &Self::Table {
        &self.state
    }
    fn inode(&self, ino: Ino) -> Result<Option<Inode>> {
        fetch(&self.tree, &key::inode(ino), Inode::decode)
    }
    fn counters(&self) -> &Counters {
        &self.counters
    }
    fn holding(&self, server: ServerId, bucket: u8) -> Result<BucketDigest> {
        match self.holdings {
            Some(holdings) => holdings.of(&self.blocks, server, bucket),
            None => holdings::stored(&self.blocks, server, bucket),
        }
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("counters", &self.counters).finish_non_exhaustive()
    }
}

impl View {
    pub fn open(transaction: &ReadTransaction) -> Result<Self> {
        let state = transaction.open_table(STATE)?;
        let counters = load_counters(&state)?;
        Ok(Self { tree: transaction.open_table(TREE)?, blocks: transaction.open_table(BLOCKS)?, state, counters })
    }
}

impl Rows for View {
    type Table = ReadOnlyTable<Raw, Raw>;

    fn tree(&self) -> &Self::Table {
        &self.tree
    }
    fn blocks(&self) -> &Self::Table {
        &self.blocks
    }
    fn state(&self) -> &Self::Table {
        &self.state
    }
    fn inode(&self, ino: Ino) -> Result<Option<Inode>> {
        fetch(&self.tree, &key::inode(ino), Inode::decode)
    }
    fn counters(&self) -> &Counters {
        &self.counters
    }
    fn holding(&self, server: ServerId, bucket: u8) -> Result<BucketDigest> {
        holdings::stored(&self.blocks, server, bucket)
    }
}

impl<'t> Rows for Tables<'t> {
    type Table = Table<'t, Raw, Raw>;

    fn tree(&self) -> &Self::Table {
        &self.tree
    }
    fn blocks(&self) -> &Self::Table {
        &self.blocks
    }
    fn state(&self) -> &Self::Table {
        &self.state
    }
    fn inode(&self, ino: Ino) -> Result<Option<Inode>> {
        match self.inodes.get(&ino) {
            Some(cached) => Ok(cached.clone()),
            None => fetch(&self.tree, &key::inode(ino), Inode::decode),
        }
    }
    fn counters(&self) -> &Counters {
        &self.counters
    }
    fn holding(&self, server: ServerId, bucket: u8) -> Result<BucketDigest> {
        self.holdings.of(&self.blocks, server, bucket)
    }
}

impl<'t> Tables<'t> {
    pub fn open(transaction: &'t WriteTransaction) -> Result<Self> {
        Self::resume(transaction, Holdings::default())
    }

    /// In a transaction that was written in before: with what [`Tables::pause`] has returned.
    pub fn resume(transaction: &'t WriteTransaction, holdings: Holdings) -> Result<Self> {
        let state = transaction.open_table(STATE)?;
        let counters = load_counters(&state)?;
        Ok(Self {
            tree: transaction.open_table(TREE)?,
            blocks: transaction.open_table(BLOCKS)?,
            state,
            counters_were: counters.clone(),
            counters,
            inodes: BTreeMap::new(),
            holdings,
            watermarks: BTreeMap::new(),
        })
    }

    /// Writes back what was kept in memory. Nothing is complete without it.
    pub fn finish(mut self) -> Result<()> {
        std::mem::take(&mut self.holdings).write(&mut self.blocks)?;
        self.pause().map(drop)
    }

    /// Writes back what questions need, and returns what the transaction has to be given again, or finished with.
    pub fn pause(mut self) -> Result<Holdings> {
        for (ino, inode) in std::mem::take(&mut self.inodes) {
            match inode {
                Some(inode) => put(&mut self.tree, &key::inode(ino), &inode.encode())?,
                None => drop(self.tree.remove(key::inode(ino).as_slice())?),
            }
        }
        for (id, first) in std::mem::take(&mut self.watermarks) {
            super::session::store_watermark(&mut self, id, first)?;
        }
        if self.counters != self.counters_were {
            put(&mut self.state, &key::counters(), &self.counters.encode())?;
        }
        Ok(self.holdings)
    }

    /// A server has come on record for a block (`true`), or off it.
    pub(super) fn change_holding(&mut self, server: ServerId, hash: &BlockHash, comes: bool) -> Result<()> {
        self.holdings.change(&self.blocks, server, hash, comes)
    }

    /// Corrects a digest that is wrong.
    pub(super) fn add_to_holding(&mut self, server: ServerId, bucket: u8, by: &BucketDigest) -> Result<()> {
        self.holdings.add(&self.blocks, server, bucket, by)
    }

    /// Whether the tables have rows for each server and block, as those of earlier versions.
    pub(super) fn has_old_holdings(&self) -> Result<bool> {
        let (start, end) = (key::OLD_HOLDINGS, past(&key::OLD_HOLDINGS));
        Ok(self.blocks.range::<&[u8]>(start.as_slice()..end.as_slice())?.next().is_some())
    }

    /// And the digests, which such a version has not kept.
    pub(super) fn drop_old_holdings(&mut self) -> Result<()> {
        self.holdings = Holdings::default();
        for family in [key::OLD_HOLDINGS, [key::HOLDING]] {
            let end = past(&family);
            self.blocks.retain_in::<&[u8], _>(family.as_slice()..end.as_slice(), |_, _| false)?;
        }
        Ok(())
    }

    pub(super) fn put_inode(&mut self, ino: Ino, inode: Inode) {
        self.inodes.insert(ino, Some(inode));
    }

    pub(super) fn remove_inode(&mut self, ino: Ino) {
        self.inodes.insert(ino, None);
    }

    pub(in crate::meta) fn put_tree(&mut self, key: &[u8], row: &[u8]) -> Result<()> {
        put(&mut self.tree, key, row)
    }

    pub(super) fn remove_tree(&mut self, key: &[u8]) -> Result<()> {
        drop(self.tree.remove(key)?);
        Ok(())
    }

    pub(in crate::meta) fn put_blocks(&mut self, key: &[u8], row: &[u8]) -> Result<()> {
        put(&mut self.blocks, key, row)
    }

    pub(super) fn remove_blocks(&mut self, key: &[u8]) -> Result<()> {
        drop(self.blocks.remove(key)?);
        Ok(())
    }

    pub(in crate::meta) fn put_state(&mut self, key: &[u8], row: &[u8]) -> Result<()> {
        put(&mut self.state, key, row)
    }

    pub(super) fn remove_state(&mut self, key: &[u8]) -> Result<()> {
        drop(self.state.remove(key)?);
        Ok(())
    }
}

fn put(table: &mut Table<'_, Raw, Raw>, key: &[u8], row: &[u8]) -> Result<()> {
    drop(table.insert(key, row)?);
    Ok(())
}

fn load_counters(state: &impl ReadableTable<Raw, Raw>) -> Result<Counters> {
    Ok(fetch(state, &key::counters(), Counters::decode)?.unwrap_or_default())
}

/// The row under `key`, decoded.
pub fn fetch<T>(
    table: &impl ReadableTable<Raw, Raw>,
    key: &[u8],
    decode: impl FnOnce(&[u8]) -> Result<T>,
) -> Result<Option<T>> {
    table.get(key)?.map(|row| decode(row.value())).transpose()
}

/// Shows the rows of `start..end` in order to `visit`, until it breaks.
pub fn scan(
    table: &impl ReadableTable<Raw, Raw>,
    start: &[u8],
    end: &[u8],
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>>,
) -> Result<()> {
    if start >= end {
        return Ok(());
    }
    for row in table.range::<&[u8]>(start..end)? {
        let (key, value) = row?;
        if visit(key.value(), value.value())?.is_break() {
            break;
        }
    }
    Ok(())
}

/// The first key that does not begin with `prefix`.
pub fn past(prefix: &[u8]) -> Vec<u8> {
    let mut key = prefix.to_vec();
    while let Some(last) = key.pop() {
        if last < u8::MAX {
            key.push(last + 1);
            return key;
        }
    }
    // An empty prefix: a key that is past every one in use.
    vec![u8::MAX; 512]
}

/// Keys, and the prefixes of families of them.
pub mod key {
    use holdfast_common::net::identity::{NodeName, Role};

    use super::{BlockHash, ChunkIndex, Epoch, Ino, Sequence, ServerId, SessionId};

    pub const INODE: u8 = 0;
    pub const SYMLINK: u8 = 1;
    pub const XATTR: u8 = 2;
    pub const DENTRY: u8 = 3;
    pub const COOKIE: u8 = 4;
    pub const PIECES: u8 = 5;

    pub const BLOCK: u8 = 0;
    pub const OWED: u8 = 2;
    pub const UNNAMED: u8 = 3;
    pub const CONDEMNED: u8 = 4;
    pub const DELETED: u8 = 5;
    pub const LAST_COPY: u8 = 6;
    pub const SURPLUS: u8 = 7;
    pub const HOLDING: u8 = 8;
    /// Of rows `server, hash`, which are not made any more.
    pub const OLD_HOLDINGS: [u8; 1] = [1];

    pub const COUNTERS: u8 = 0;
    pub const SESSION: u8 = 1;
    pub const INSTANCE: u8 = 2;
    pub const REPLY: u8 = 3;
    pub const ORPHAN: u8 = 4;
    pub const SERVER: u8 = 5;
    pub const TOKEN: u8 = 6;
    pub const RECOVERY: u8 = 7;
    pub const OWED_BY: u8 = 8;
    pub const REMOVED: u8 = 9;
    pub const RECOUNT: u8 = 10;
    pub const CORRECTED: u8 = 11;

    /// All rows of a family of an inode: `ino, tag`.
    pub fn family(ino: Ino, tag: u8) -> Vec<u8> {
        let mut key = Vec::with_capacity(32);
        key.extend_from_slice(&ino.0.to_be_bytes());
        key.push(tag);
        key
    }

    fn of(ino: Ino, tag: u8, rest: &[u8]) -> Vec<u8> {
        let mut key = Vec::with_capacity(9 + rest.len());
        key.extend_from_slice(&ino.0.to_be_bytes());
        key.push(tag);
        key.extend_from_slice(rest);
        key
    }

    fn tagged(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let mut key = Vec::with_capacity(48);
        key.push(tag);
        parts.iter().for_each(|part| key.extend_from_slice(part));
        key
    }

    pub fn inode(ino: Ino) -> Vec<u8> {
        of(ino, INODE, &[])
    }
    pub fn symlink(ino: Ino) -> Vec<u8> {
        of(ino, SYMLINK, &[])
    }
    pub fn xattr(ino: Ino, name: &[u8]) -> Vec<u8> {
        of(ino, XATTR, name)
    }
    pub fn dentry(parent: Ino, name: &[u8]) -> Vec<u8> {
        of(parent, DENTRY, name)
    }
    pub fn cookie(parent: Ino, cookie: u64) -> Vec<u8> {
        of(parent, COOKIE, &cookie.to_be_bytes())
    }
    pub fn pieces(ino: Ino, chunk: ChunkIndex) -> Vec<u8> {
        of(ino, PIECES, &chunk.0.to_be_bytes())
    }

    pub fn block(hash: BlockHash) -> Vec<u8> {
        tagged(BLOCK, &[&hash.0])
    }
    pub fn holding(server: ServerId, bucket: u8) -> Vec<u8> {
        tagged(HOLDING, &[&server.0.to_be_bytes(), &[bucket]])
    }
    pub fn owed(hash: BlockHash) -> Vec<u8> {
        tagged(OWED, &[&hash.0])
    }
    pub fn last_copy(hash: BlockHash) -> Vec<u8> {
        tagged(LAST_COPY, &[&hash.0])
    }
    pub fn surplus(hash: BlockHash) -> Vec<u8> {
        tagged(SURPLUS, &[&hash.0])
    }
    pub fn unnamed(hash: BlockHash) -> Vec<u8> {
        tagged(UNNAMED, &[&hash.0])
    }
    /// Of a condemned block: in the list `CONDEMNED` or `DELETED`.
    pub fn condemned(list: u8, epoch: Epoch, hash: BlockHash) -> Vec<u8> {
        tagged(list, &[&epoch.0.to_be_bytes(), &hash.0])
    }

    pub fn counters() -> Vec<u8> {
        vec![COUNTERS]
    }
    pub fn session(id: SessionId) -> Vec<u8> {
        tagged(SESSION, &[&id.0.to_be_bytes()])
    }
    pub fn instance(node: NodeName, instance: &[u8; 16]) -> Vec<u8> {
        tagged(INSTANCE, &[&[role(node.role)], &node.id.to_be_bytes(), instance])
    }
    pub fn reply(session: SessionId, sequence: Sequence) -> Vec<u8> {
        tagged(REPLY, &[&session.0.to_be_bytes(), &sequence.0.to_be_bytes()])
    }
    pub fn replies(session: SessionId) -> Vec<u8> {
        tagged(REPLY, &[&session.0.to_be_bytes()])
    }
    pub fn orphan(ino: Ino) -> Vec<u8> {
        tagged(ORPHAN, &[&ino.0.to_be_bytes()])
    }
    pub fn recount(ino: Ino) -> Vec<u8> {
        tagged(RECOUNT, &[&ino.0.to_be_bytes()])
    }
    pub fn server(id: ServerId) -> Vec<u8> {
        tagged(SERVER, &[&id.0.to_be_bytes()])
    }
    pub fn removed(id: ServerId) -> Vec<u8> {
        tagged(REMOVED, &[&id.0.to_be_bytes()])
    }
    pub fn corrected() -> Vec<u8> {
        vec![CORRECTED]
    }
    pub fn token(secret_hash: &[u8; 32]) -> Vec<u8> {
        tagged(TOKEN, &[secret_hash])
    }

    pub fn recovery() -> Vec<u8> {
        vec![RECOVERY]
    }
    pub fn owed_by(session: SessionId) -> Vec<u8> {
        tagged(OWED_BY, &[&session.0.to_be_bytes()])
    }

    /// A role's byte on disk.
    pub fn role(role: Role) -> u8 {
        match role {
            Role::Meta => 0,
            Role::Storage => 1,
            Role::Client => 2,
            Role::Admin => 3,
        }
    }
}

//! What is done about an invariant that is broken, where the rest of the tables says how it should be.
//!
//! Names, inodes, pieces and the holders of blocks are what is; indexes, lists, counts and digests follow from them and can be made
//! again. What does not follow from anything (a name without its inode, an inode without a name, a piece of a block that nobody knows,
//! a condemned block that is named) is left as it is: a person has to judge, and goes on being told.
//!
//! What is wrong is found in a view, while changes go on. So a correction never says what a row is to be. Either it names the place, and
//! what belongs there is decided when it is applied, from the rows as they are then; or it says by how much a number is wrong, for every
//! change moves a wrong number by as much as it would a right one. Such a difference may be added once only: corrections that were found
//! before others were made are not made any more ([`correct`]).
//!
//! Which inodes have no name is only known when nothing else is wrong: they are corrected last, by themselves. A row that is lost leaves
//! others that say more than there is, each by itself right: these are not corrected (`Found::into_makeable`).

use holdfast_common::{BlockHash, Epoch, Ino, Kind, Position, ServerId, inventory::BucketDigest, limits::REPLICAS_MAX};
use serde::{Deserialize, Serialize};

use super::{
    blocks::is_rightly_listed,
    is_wanted_reply,
    tree::{is_named_unlinked, is_stale_cookie, may_be_put},
};
use crate::meta::state::{
    Reply, Rows, StorageError, Tables, blocks, namespace, orphans,
    rows::{Counters, Dentry},
    tables::{Result, fetch, key},
};

/// New ones go to the end: the number is on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Correction {
    /// The row of a name in the order of reading.
    Cookie { directory: Ino, name: Vec<u8> },
    /// A row in that order that leads to no name.
    StaleCookie { directory: Ino, cookie: u64 },
    /// What the directory of that name says about where it is.
    Place { directory: Ino, name: Vec<u8> },
    /// From which cookie on the next names of a directory get theirs.
    CookiesFrom { directory: Ino, cookie: u64 },
    /// From which number on the next inodes get theirs.
    InodesFrom { ino: Ino },
    /// By how much these are too small.
    Inode { ino: Ino, nlink: i64, size: i64, stored: i64 },
    /// Chunks are counted under another number of copies than their file wants.
    Recount { ino: Ino },
    /// Whether an inode is listed as one without a name.
    Orphan { ino: Ino },
    /// By how much the pieces of a block, as of this epoch, are too few.
    References { block: BlockHash, epoch: Epoch, refs: i64, by_replicas: [i64; REPLICAS_MAX] },
    /// How many copies of a block are wanted, and the lists in which it is.
    Lists { block: BlockHash },
    /// A row of a list of blocks that says what is not so.
    Listed { key: Vec<u8> },
    /// What has to be added to the digest of what a server is on record for.
    Holding { server: ServerId, bucket: u8, by: BucketDigest },
    /// What is counted across the tables.
    Counters(Differences),
    /// A reply that nobody will ask for.
    Reply { key: Vec<u8> },
}

/// By how much each is too small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differences {
    pub(super) inodes: i64,
    pub(super) blocks_by_copies: [i64; 4],
    pub(super) owed: i64,
    pub(super) unnamed: i64,
    pub(super) condemned: i64,
}

/// Corrections are made in this order.
pub(super) const TURNS: usize = 4;
/// The turn of what inodes and blocks count.
pub(super) const COUNTS: usize = 1;

/// Makes those that were found in a view of `seen`, unless others have been made since.
pub(in crate::meta::state) fn correct(
    tables: &mut Tables<'_>,
    seen: Position,
    corrections: &[Correction],
) -> Result<Reply> {
    let last = fetch(tables.state(), &key::corrected(), position_of)?;
    if last.is_some_and(|last| last > seen) {
        return Ok(Reply::Corrected { made: 0 });
    }
    let mut made = 0;
    for correction in corrections {
        made += u64::from(correction.make(tables)?);
    }
    let now = tables.counters.position.0 + 1;
    tables.put_state(&key::corrected(), &now.to_be_bytes())?;
    Ok(Reply::Corrected { made })
}

fn position_of(row: &[u8]) -> Result<Position> {
    let bytes = row.try_into().map_err(|_| StorageError::Damaged("corrected: row".into()))?;
    Ok(Position(u64::from_be_bytes(bytes)))
}

impl Correction {
    /// Before those of the next turn, from 0; of the last, by themselves.
    pub(super) fn turn(&self) -> usize {
        match self {
            Self::CookiesFrom { .. } | Self::InodesFrom { .. } => 0,
            Self::Inode { .. } | Self::References { .. } => COUNTS,
            Self::Orphan { .. } => TURNS - 1,
            _ => 2,
        }
    }

    /// `false`: as things are now there is nothing to do, or a person has to.
    fn make(&self, tables: &mut Tables<'_>) -> Result<bool> {
        match self {
            Self::Cookie { directory, name } => cookie(tables, *directory, name),
            Self::StaleCookie { directory, cookie } => stale_cookie(tables, *directory, *cookie),
            Self::Place { directory, name } => place(tables, *directory, name),
            Self::CookiesFrom { directory, cookie } => cookies_from(tables, *directory, *cookie),
            Self::InodesFrom { ino } => {
                let next = &mut tables.counters.ino_next;
                Ok(std::mem::replace(next, ino.0.max(*next)) < ino.0)
            }
            Self::Inode { ino, nlink, size, stored } => inode(tables, *ino, *nlink, *size, *stored),
            Self::Recount { ino } => recount(tables, *ino),
            Self::Orphan { ino } => orphan(tables, *ino),
            Self::References { block, epoch, refs, by_replicas } => {
                references(tables, *block, *epoch, *refs, by_replicas)
            }
            Self::Lists { block } => lists(tables, *block),
            Self::Listed { key } => {
                let is_wrong = !is_rightly_listed(tables, key)?;
                if is_wrong {
                    tables.remove_blocks(key)?;
                }
                Ok(is_wrong)
            }
            Self::Holding { server, bucket, by } => tables.add_to_holding(*server, *bucket, by).map(|()| true),
            Self::Counters(differences) => Ok(differences.add_to(&mut tables.counters)),
            Self::Reply { key } => {
                let is_useless = !is_wanted_reply(tables, key)?;
                if is_useless {
                    tables.remove_state(key)?;
                }
                Ok(is_useless)
            }
        }
    }
}

// ---- names and inodes ----

/// A name keeps its cookie unless that leads to another name, or to an inode that may have lost one.
fn cookie(tables: &mut Tables<'_>, directory: Ino, name: &[u8]) -> Result<bool> {
    let Some(mut entry) = namespace::dentry(tables, directory, name)? else { return Ok(false) };
    let at = key::cookie(directory, entry.cookie);
    let there = fetch(tables.tree(), &at, |row| Dentry::decode_with(row).map(|(it, name)| (it, name.to_vec())))?;
    if there.as_ref().is_some_and(|(it, of)| *it == entry && of == name) {
        return Ok(false);
    }
    let Some(mut of) = tables.inode(directory)?.filter(|inode| inode.is_directory()) else { return Ok(false) };
    let leads_elsewhere = match there {
        Some((it, other)) if other != name => {
            !is_stale_cookie(tables, directory, entry.cookie, &it.encode_with(&other))?
        }
        _ => false,
    };
    // Who has listed it lists it again.
    of.data_version += 1;
    if leads_elsewhere {
        entry.cookie = of.cookie_next;
        of.cookie_next += 1;
        tables.put_tree(&key::dentry(directory, name), &entry.encode())?;
    }
    tables.put_inode(directory, of);
    tables.put_tree(&key::cookie(directory, entry.cookie), &entry.encode_with(name))?;
    Ok(true)
}

fn stale_cookie(tables: &mut Tables<'_>, directory: Ino, cookie: u64) -> Result<bool> {
    let at = key::cookie(directory, cookie);
    let row = fetch(tables.tree(), &at, |row| Ok(row.to_vec()))?;
    let is_stale = match row {
        Some(row) => is_stale_cookie(tables, directory, cookie, &row)?,
        None => false,
    };
    if is_stale {
        tables.remove_tree(&at)?;
        if let Some(mut of) = tables.inode(directory)? {
            of.data_version += 1;
            tables.put_inode(directory, of);
        }
    }
    Ok(is_stale)
}

/// A directory that says it is where it has no name is where this name is.
fn place(tables: &mut Tables<'_>, directory: Ino, name: &[u8]) -> Result<bool> {
    let entry = namespace::dentry(tables, directory, name)?.filter(|entry| entry.kind == Kind::Directory);
    let Some(entry) = entry else { return Ok(false) };
    let Some(mut inode) = tables.inode(entry.ino)?.filter(|inode| inode.is_directory()) else { return Ok(false) };
    if !may_be_put(tables, entry.ino, &inode, directory)? {
        return Ok(false);
    }
    (inode.parent, inode.parent_cookie) = (directory, entry.cookie);
    tables.put_inode(entry.ino, inode);
    Ok(true)
}

fn cookies_from(tables: &mut Tables<'_>, directory: Ino, cookie: u64) -> Result<bool> {
    let Some(mut inode) = tables.inode(directory)?.filter(|it| it.is_directory() && it.cookie_next < cookie) else {
        return Ok(false);
    };
    inode.cookie_next = cookie;
    tables.put_inode(directory, inode);
    Ok(true)
}

/// No file loses its last link by that: it would be deleted. A directory that was removed has none, and gets none.
fn inode(tables: &mut Tables<'_>, ino: Ino, nlink: i64, size: i64, stored: i64) -> Result<bool> {
    let Some(mut inode) = tables.inode(ino)? else { return Ok(false) };
    let Ok(nlink) = i32::try_from(nlink) else { return Ok(false) };
    let links = inode.nlink.wrapping_add_signed(nlink);
    let is_gone =
        inode.is_directory() && inode.nlink == 0 && ino != Ino::ROOT && !is_named_unlinked(tables, ino, &inode)?;
    if nlink != 0 && (links == 0 || is_gone) {
        return Ok(false);
    }
    inode.nlink = links;
    inode.size = inode.size.wrapping_add_signed(size);
    inode.stored = inode.stored.wrapping_add_signed(stored);
    tables.put_inode(ino, inode);
    Ok(true)
}

/// From its first chunk on, by who does so when the number of a file has changed.
fn recount(tables: &mut Tables<'_>, ino: Ino) -> Result<bool> {
    let is_there = tables.inode(ino)?.is_some();
    if is_there {
        tables.put_state(&key::recount(ino), &0u32.to_be_bytes())?;
    }
    Ok(is_there)
}

/// A directory without a name is not taken for one that nobody wants: it may be full.
fn orphan(tables: &mut Tables<'_>, ino: Ino) -> Result<bool> {
    match tables.inode(ino)? {
        Some(inode) if inode.nlink == 0 && inode.is_directory() => return Ok(false),
        Some(inode) if inode.nlink == 0 => orphans::add(tables, ino)?,
        _ => orphans::remove(tables, ino)?,
    }
    Ok(true)
}

// ---- blocks ----

fn references(
    tables: &mut Tables<'_>,
    block: BlockHash,
    epoch: Epoch,
    refs: i64,
    by_replicas: &[i64; REPLICAS_MAX],
) -> Result<bool> {
    let Some(old) = blocks::block(tables, block)?.filter(|row| row.epoch == epoch && !row.condemned) else {
        return Ok(false);
    };
    let mut new = old.clone();
    let counts = std::iter::once((&mut new.refs, refs)).chain(new.refs_by_replicas.iter_mut().zip(*by_replicas));
    counts.for_each(|(count, by)| *count = count.wrapping_add_signed(by));
    blocks::store(tables, block, Some(&old), new)?;
    Ok(true)
}

fn lists(tables: &mut Tables<'_>, block: BlockHash) -> Result<bool> {
    let old = blocks::block(tables, block)?;
    if let Some(old) = &old {
        // Which says anew how many are wanted.
        blocks::store(tables, block, Some(old), old.clone())?;
    }
    let new = blocks::block(tables, block)?;
    blocks::list_anew(tables, block, new.as_ref())?;
    Ok(true)
}

impl Differences {
    fn add_to(&self, counters: &mut Counters) -> bool {
        let add = |counter: &mut u64, by: i64| *counter = counter.wrapping_add_signed(by);
        add(&mut counters.inodes, self.inodes);
        add(&mut counters.owed, self.owed);
        add(&mut counters.unnamed, self.unnamed);
        add(&mut counters.condemned, self.condemned);
        counters.blocks_by_copies.iter_mut().zip(self.blocks_by_copies).for_each(|(counter, by)| add(counter, by));
        true
    }
}

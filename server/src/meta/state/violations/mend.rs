//! Rows that follow from others and do not say what these say, and what they should be.
//!
//! Names, inodes, pieces and the holders of blocks are what is; indexes, lists and counts follow from them and can be made again. What
//! does not follow from anything (a name without its inode, an inode without a name, a piece of a block that nobody knows, a condemned
//! block that is named) is left as it is: a person has to judge, and goes on being told.
//!
//! Corrections are found in a snapshot, while changes go on, and each is made only if its row still is what it was there. So they
//! are looked for until there are none.

use std::ops::ControlFlow;

use holdfast_common::{BlockHash, Ino, Kind, pieces};
use serde::{Deserialize, Serialize};

use super::{Found, blocks as block_rules, culprits, each_useless_reply, tree};
use crate::meta::state::{
    Reply, Rows, StorageError, Tables, blocks, orphans,
    rows::{BlockRow, Counters, Dentry, Inode, decode_chunk},
    tables::{Result, fetch, key, past, scan},
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Correction {
    /// `None`: there is no such row, or should not be.
    Row {
        table: Place,
        key: Vec<u8>,
        is: Option<Vec<u8>>,
        should_be: Option<Vec<u8>>,
    },
    Counters(Differences),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    Tree,
    Blocks,
    State,
}

/// By how much each is too small.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differences {
    inodes: i64,
    blocks_by_copies: Vec<i64>,
    owed: i64,
    unnamed: i64,
    condemned: i64,
}

/// At most `count` rows to be corrected; if there are none, the counters. None at all: all that follows from others is right.
pub fn corrections(rows: &impl Rows, count: usize) -> Result<Vec<Correction>> {
    let mut mender = Mender { rows, found: Vec::new(), count };
    mender.tree()?;
    mender.orphans()?;
    mender.counts()?;
    mender.blocks()?;
    mender.lists()?;
    mender.replies()?;
    if mender.found.is_empty() {
        mender.counters()?;
    }
    Ok(mender.found)
}

/// Makes those whose rows are still what they were.
pub(in crate::meta::state) fn correct(tables: &mut Tables<'_>, corrections: &[Correction]) -> Result<Reply> {
    let mut made = 0;
    for correction in corrections {
        made += u64::from(match correction {
            Correction::Row { table, key, is, should_be } => {
                replace(tables, *table, key, is.as_deref(), should_be.as_deref())?
            }
            Correction::Counters(differences) => differences.add_to(&mut tables.counters),
        });
    }
    Ok(Reply::Corrected { made })
}

fn replace(
    tables: &mut Tables<'_>,
    table: Place,
    key: &[u8],
    is: Option<&[u8]>,
    should_be: Option<&[u8]>,
) -> Result<bool> {
    // Inodes may have changed in this transaction already.
    if let (Place::Tree, Some((ino, [key::INODE]))) = (table, key.split_first_chunk::<8>()) {
        let ino = Ino(u64::from_be_bytes(*ino));
        let Some(new) = should_be.map(Inode::decode).transpose()? else { return Ok(false) };
        let unchanged = tables.inode(ino)?.map(|inode| inode.encode()).as_deref() == is;
        if unchanged {
            tables.put_inode(ino, new);
        }
        return Ok(unchanged);
    }
    let now = row(tables, table, key)?;
    if now.as_deref() != is {
        return Ok(false);
    }
    match (table, should_be) {
        (Place::Tree, Some(row)) => tables.put_tree(key, row)?,
        (Place::Tree, None) => tables.remove_tree(key)?,
        (Place::Blocks, Some(row)) => tables.put_blocks(key, row)?,
        (Place::Blocks, None) => tables.remove_blocks(key)?,
        (Place::State, Some(row)) => tables.put_state(key, row)?,
        (Place::State, None) => tables.remove_state(key)?,
    }
    Ok(true)
}

fn row(rows: &impl Rows, table: Place, key: &[u8]) -> Result<Option<Vec<u8>>> {
    let table = match table {
        Place::Tree => rows.tree(),
        Place::Blocks => rows.blocks(),
        Place::State => rows.state(),
    };
    fetch(table, key, |row| Ok(row.to_vec()))
}

impl Differences {
    fn between(counted: &Counters, tree: &tree::Seen, seen: &block_rules::Seen) -> Self {
        let difference = |is: u64, counted: u64| is.wrapping_sub(counted).cast_signed();
        let by_copies = seen.by_copies.iter().zip(counted.blocks_by_copies);
        Self {
            inodes: difference(tree.inodes, counted.inodes),
            blocks_by_copies: by_copies.map(|(is, counted)| difference(*is, counted)).collect(),
            owed: difference(seen.owed, counted.owed),
            unnamed: difference(seen.unnamed, counted.unnamed),
            condemned: difference(seen.condemned, counted.condemned),
        }
    }

    fn is_none(&self) -> bool {
        self.blocks_by_copies
            .iter()
            .chain([&self.inodes, &self.owed, &self.unnamed, &self.condemned])
            .all(|by| *by == 0)
    }

    fn add_to(&self, counters: &mut Counters) -> bool {
        let add = |counter: &mut u64, by: i64| *counter = counter.wrapping_add_signed(by);
        add(&mut counters.inodes, self.inodes);
        add(&mut counters.owed, self.owed);
        add(&mut counters.unnamed, self.unnamed);
        add(&mut counters.condemned, self.condemned);
        counters.blocks_by_copies.iter_mut().zip(&self.blocks_by_copies).for_each(|(counter, by)| add(counter, *by));
        true
    }
}

struct Mender<'a, R> {
    rows: &'a R,
    found: Vec<Correction>,
    count: usize,
}

/// What the rows of one inode, which are neighbours, say of it.
#[derive(Default)]
struct Group {
    inode: Option<Inode>,
    names: u64,
    subdirectories: u32,
    stored: u64,
}

impl<R: Rows> Mender<'_, R> {
    fn is_full(&self) -> bool {
        self.found.len() >= self.count
    }

    fn goes_on(&self) -> ControlFlow<()> {
        if self.is_full() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn want(&mut self, table: Place, key: Vec<u8>, should_be: Option<Vec<u8>>) -> Result<()> {
        let is = row(self.rows, table, &key)?;
        if is != should_be && !self.is_full() {
            self.found.push(Correction::Row { table, key, is, should_be });
        }
        Ok(())
    }

    /// That there is such a row, or not; `row`: what is in it if it has to be made.
    fn want_listed(&mut self, table: Place, key: Vec<u8>, is_listed: bool, row: &[u8]) -> Result<()> {
        let found = self::row(self.rows, table, &key)?;
        if found.is_some() == is_listed {
            return Ok(());
        }
        self.want(table, key, is_listed.then(|| row.to_vec()))
    }

    // ---- inodes and names ----

    fn tree(&mut self) -> Result<()> {
        let damaged = || StorageError::Damaged("tree: key".into());
        let rows = self.rows;
        let (mut of, mut group) = (None, Group::default());
        scan(rows.tree(), &[], &past(&[]), |key, row| {
            let (ino, rest) = key.split_first_chunk::<8>().ok_or_else(damaged)?;
            let ino = Ino(u64::from_be_bytes(*ino));
            let (tag, rest) = rest.split_first().ok_or_else(damaged)?;
            if of != Some(ino) {
                self.end_group(of, std::mem::take(&mut group))?;
                of = Some(ino);
            }
            match *tag {
                key::INODE => group.inode = Some(Inode::decode(row)?),
                key::DENTRY => {
                    let entry = Dentry::decode(row)?;
                    group.names += 1;
                    group.subdirectories += u32::from(entry.kind == Kind::Directory);
                    self.want(Place::Tree, key::cookie(ino, entry.cookie), Some(entry.encode_with(rest)))?;
                }
                key::COOKIE => self.cookie(ino, key, row)?,
                key::PIECES => group.stored += pieces::stored(&decode_chunk(row)?.0),
                _ => {}
            }
            Ok(self.goes_on())
        })?;
        if self.is_full() { Ok(()) } else { self.end_group(of, group) }
    }

    /// One that leads to a name which is under another, or to an inode which is not there. If just the name is missing, a person
    /// has to say whether it should be.
    fn cookie(&mut self, directory: Ino, key: &[u8], row: &[u8]) -> Result<()> {
        let (entry, name) = Dentry::decode_with(row)?;
        let named = fetch(self.rows.tree(), &key::dentry(directory, name), Dentry::decode)?;
        let is_stale = match named {
            Some(named) => key::cookie(directory, named.cookie) != key,
            None => self.rows.inode(entry.ino)?.is_none(),
        };
        if is_stale { self.want(Place::Tree, key.to_vec(), None) } else { Ok(()) }
    }

    fn end_group(&mut self, ino: Option<Ino>, group: Group) -> Result<()> {
        let (Some(ino), Some(inode)) = (ino, group.inode) else { return Ok(()) };
        let mut right = inode.clone();
        right.stored = group.stored;
        if inode.is_directory() {
            right.size = group.names;
            if inode.nlink > 0 || ino == Ino::ROOT {
                right.nlink = 2 + group.subdirectories;
            }
        }
        if right != inode {
            self.want(Place::Tree, key::inode(ino), Some(right.encode()))?;
        }
        if inode.nlink == 0 { self.want_listed(Place::State, key::orphan(ino), true, &[]) } else { Ok(()) }
    }

    fn orphans(&mut self) -> Result<()> {
        const PAGE: usize = 4096;
        let mut after = Ino(0);
        while !self.is_full() {
            let page = orphans::orphans_after(self.rows, after, PAGE)?;
            let Some(last) = page.last() else { break };
            after = *last;
            for ino in page {
                let is_orphan = self.rows.inode(ino)?.is_some_and(|inode| inode.nlink == 0);
                self.want_listed(Place::State, key::orphan(ino), is_orphan, &[])?;
            }
        }
        Ok(())
    }

    /// Links of files, and pieces of blocks: counted across the tables, if the sums are wrong.
    fn counts(&mut self) -> Result<()> {
        let rows = self.rows;
        let mut told = Found { sentences: Vec::new(), count: 0 };
        let (of_tree, of_blocks) = (tree::check(rows, &mut told)?, block_rules::check(rows, &mut told)?);
        if of_tree.names != of_tree.links {
            culprits::each_link(rows, of_tree.inodes, |ino, inode, names| {
                // One without any name is not taken for one that nobody wants.
                if !inode.is_directory() && names > 0 {
                    let right = Inode { nlink: names, ..inode.clone() };
                    self.want(Place::Tree, key::inode(ino), Some(right.encode()))?;
                }
                Ok(self.goes_on())
            })?;
        }
        if of_tree.references != of_blocks.references {
            culprits::each_reference(rows, of_blocks.blocks, |hash, row, refs, refs_by_replicas| {
                let is_told = row.condemned && refs > 0;
                if !is_told && (row.refs, row.refs_by_replicas) != (refs, refs_by_replicas) {
                    let right = BlockRow { refs, refs_by_replicas, ..row.clone() };
                    self.want(Place::Blocks, key::block(hash), Some(right.encode()))?;
                }
                Ok(self.goes_on())
            })?;
        }
        Ok(())
    }

    // ---- blocks ----

    fn blocks(&mut self) -> Result<()> {
        let rows = self.rows;
        let counters = rows.counters();
        scan(rows.blocks(), &[key::BLOCK], &past(&[key::BLOCK]), |key, row| {
            let (hash, row) = (blocks::hash_of(key)?, BlockRow::decode(row)?);
            let wanted = row.most_wanted(counters.replicas());
            if counters.retargeted.is_none_or(|through| hash <= through) && row.wanted != wanted {
                let right = BlockRow { wanted, ..row.clone() };
                self.want(Place::Blocks, key.to_vec(), Some(right.encode()))?;
            }
            self.lists_of(hash, &row)?;
            Ok(self.goes_on())
        })
    }

    /// That the block is in every list in which it belongs.
    fn lists_of(&mut self, hash: BlockHash, row: &BlockRow) -> Result<()> {
        // That of the entry before; what garbage there is waits for its time from now on.
        let (nothing, stamp): (&[u8], _) = (&[], self.rows.counters().position.0.to_be_bytes());
        let lists = [
            (key::owed(hash), blocks::is_owed(row), nothing),
            (key::last_copy(hash), blocks::has_one_copy_left(row), nothing),
            (key::surplus(hash), blocks::has_surplus(row), nothing),
            (key::unnamed(hash), blocks::is_unnamed(row), stamp.as_slice()),
        ];
        for (key, _, row) in lists.into_iter().filter(|(_, belongs, _)| *belongs) {
            self.want_listed(Place::Blocks, key, true, row)?;
        }
        if row.condemned {
            let list = block_rules::condemned_list(row);
            self.want_listed(Place::Blocks, key::condemned(list, row.epoch, hash), true, &[])?;
        }
        for holder in &row.holders {
            self.want_listed(Place::Blocks, key::held(*holder, hash), true, &[])?;
        }
        Ok(())
    }

    /// That nothing is in a list in which it does not belong.
    fn lists(&mut self) -> Result<()> {
        let rows = self.rows;
        scan(rows.blocks(), &past(&[key::BLOCK]), &past(&[]), |key, _| {
            if !block_rules::is_rightly_listed(rows, key)? {
                self.want(Place::Blocks, key.to_vec(), None)?;
            }
            Ok(self.goes_on())
        })
    }

    // ---- the rest ----

    fn replies(&mut self) -> Result<()> {
        each_useless_reply(self.rows, |key, _, _| self.want(Place::State, key.to_vec(), None))
    }

    fn counters(&mut self) -> Result<()> {
        let mut told = Found { sentences: Vec::new(), count: 0 };
        let (of_tree, of_blocks) = (tree::check(self.rows, &mut told)?, block_rules::check(self.rows, &mut told)?);
        let differences = Differences::between(self.rows.counters(), &of_tree, &of_blocks);
        if !differences.is_none() {
            self.found.push(Correction::Counters(differences));
        }
        Ok(())
    }
}

//! What must hold of inodes, names and pieces.

use std::{
    collections::{BTreeSet, HashMap},
    ops::ControlFlow,
};

use holdfast_common::{
    BlockHash, ChunkIndex, Ino, Kind, Piece, Replicas,
    limits::{FILE_SIZE_MAX, PIECES_PER_CHUNK_MAX},
    pieces,
};

use super::{Correction, Found, tally::Tally};
use crate::meta::state::{
    Rows, StorageError, blocks,
    file::{index_of, start_of},
    orphans, replicas,
    rows::{Dentry, Inode, decode_chunk},
    tables::{Result, fetch, key, past, scan},
};

/// Orphans that are looked at in one go.
const PAGE: usize = 4096;

/// What counts across the tables.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) inodes: u64,
    /// Of the numbers that were given in order.
    highest: u64,
    /// Names of inodes, as there are.
    pub(super) names: Tally,
    /// The same, as inodes count them.
    pub(super) links: Tally,
    /// Pieces of blocks.
    pub(super) references: Tally,
    /// Each that has a name, with the one it says it is in; in order.
    directories: Vec<(Ino, Ino)>,
}

/// The rows of one inode, which are neighbours.
#[derive(Default)]
struct Group {
    ino: Ino,
    inode: Option<Inode>,
    symlink: u64,
    names: u64,
    cookies: u64,
    subdirectories: u32,
    stored: u64,
    /// From which on its cookies should be given, if its row says something else.
    cookies_from: u64,
}

pub(super) fn check(rows: &impl Rows, found: &mut Found) -> Result<Seen> {
    let recounted = replicas::recounted_first(rows, usize::MAX)?.into_iter().collect();
    let mut walk = Walk { rows, found, recounted, seen: Seen::default(), group: None };
    scan(rows.tree(), &[], &past(&[]), |key, row| walk.take(key, row).map(ControlFlow::Continue))?;
    walk.end_group()?;
    let Walk { seen, .. } = walk;
    if seen.highest >= rows.counters().ino_next {
        let ino = Ino(seen.highest + 1);
        found.push_mended(
            format!("inode number {} will be given twice", rows.counters().ino_next),
            Correction::InodesFrom { ino },
        );
    }
    hang_together(&seen.directories, found);
    orphans_have_no_name(rows, found)?;
    Ok(seen)
}

struct Walk<'a, R> {
    rows: &'a R,
    found: &'a mut Found,
    /// Files of which some chunks are still counted under another number.
    recounted: BTreeSet<Ino>,
    seen: Seen,
    group: Option<Group>,
}

fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

impl<R: Rows> Walk<'_, R> {
    fn take(&mut self, key: &[u8], row: &[u8]) -> Result<()> {
        let damaged = || StorageError::Damaged("tree: key".into());
        let (ino, rest) = key.split_first_chunk::<8>().ok_or_else(damaged)?;
        let ino = Ino(u64::from_be_bytes(*ino));
        let (tag, rest) = rest.split_first().ok_or_else(damaged)?;
        if self.group.as_ref().is_none_or(|group| group.ino != ino) {
            self.end_group()?;
            self.begin_group(ino);
        }
        let group = self.group.as_mut().ok_or_else(damaged)?;
        match *tag {
            key::INODE => group.inode = Some(Inode::decode(row)?),
            key::SYMLINK => group.symlink = row.len() as u64,
            key::XATTR => {}
            key::DENTRY => return self.take_name(ino, rest, Dentry::decode(row)?),
            key::COOKIE => group.cookies += 1,
            key::PIECES => {
                let (pieces, replicas) = decode_chunk(row)?;
                return self.take_chunk(ino, index_of(key)?, &pieces, replicas);
            }
            _ => return Err(damaged()),
        }
        Ok(())
    }

    fn begin_group(&mut self, ino: Ino) {
        self.group = Some(Group { ino, ..Group::default() });
    }

    fn take_name(&mut self, parent: Ino, name: &[u8], entry: Dentry) -> Result<()> {
        let inode = self.rows.inode(entry.ino)?;
        let indexed = fetch(self.rows.tree(), &key::cookie(parent, entry.cookie), |row| {
            Ok(Dentry::decode_with(row)?.0 == entry && Dentry::decode_with(row)?.1 == name)
        })?;
        self.seen.names.add_name(entry.ino, 1);
        let Some(group) = &mut self.group else { return Ok(()) };
        group.names += 1;
        group.subdirectories += u32::from(entry.kind == Kind::Directory);
        let (shown, found) = (show(name), &mut *self.found);
        match inode {
            None => {
                found.more_said_than_there.inodes = true;
                found.push(format!("{shown:?} in directory {parent} names inode {}, which is not there", entry.ino));
            }
            Some(inode) if inode.kind != entry.kind => {
                let (said, is) = (entry.kind, inode.kind);
                found.push(format!("{shown:?} in directory {parent} says {said:?}, inode {} is {is:?}", entry.ino));
            }
            // Of which it is told elsewhere that it is not where it says.
            Some(inode) if inode.is_directory() && may_be_put(self.rows, entry.ino, &inode, parent)? => {
                found.mend(Correction::Place { directory: parent, name: name.to_vec() });
            }
            Some(_) => {}
        }
        match &group.inode {
            Some(directory) if directory.is_directory() && directory.nlink > 0 => {}
            _ => found.push(format!("{shown:?} is in {parent}, which is not a directory in the tree")),
        }
        let is_of_directory = group.inode.as_ref().is_some_and(Inode::is_directory);
        if indexed != Some(true) {
            found.push(format!("{shown:?} in directory {parent} is not under its cookie {}", entry.cookie));
            if is_of_directory {
                found.mend(Correction::Cookie { directory: parent, name: name.to_vec() });
            }
        }
        if group.inode.as_ref().is_some_and(|directory| directory.cookie_next <= entry.cookie) {
            found.push(format!("cookie {} of directory {parent} will be given twice", entry.cookie));
            group.cookies_from = group.cookies_from.max(entry.cookie.saturating_add(1));
        }
        Ok(())
    }

    fn take_chunk(&mut self, ino: Ino, index: ChunkIndex, pieces: &[Piece], counted: Replicas) -> Result<()> {
        let Some(group) = &mut self.group else { return Ok(()) };
        group.stored += pieces::stored(pieces);
        let (place, found) = (format!("chunk {index} of inode {ino}"), &mut *self.found);
        if pieces.is_empty() || pieces.len() > PIECES_PER_CHUNK_MAX {
            found.push(format!("{place} has {} pieces", pieces.len()));
        }
        if pieces.windows(2).any(|pair| pair[0].end() > pair[1].offset) {
            found.push(format!("pieces of {place} overlap or are out of order"));
        }
        let end = pieces.last().map_or(0, |piece| start_of(index) + u64::from(piece.end()));
        if group.inode.as_ref().is_some_and(|inode| inode.kind != Kind::File || end > inode.size) {
            found.push(format!("a piece of {place} lies past the end of the file"));
        }
        let own = group.inode.as_ref().map(|inode| inode.replicas);
        if own != Some(counted) && !self.recounted.contains(&ino) {
            found.push(format!("chunk {index} of inode {ino} is counted under {counted:?}, not {own:?}"));
            if own.is_some() {
                found.mend(Correction::Recount { ino });
            }
        }
        // A chunk often has many pieces of one block.
        let mut lengths: HashMap<BlockHash, Option<u32>> = HashMap::new();
        for piece in pieces {
            self.seen.references.add_reference(piece.block, counted.own(), 1);
            let length = match lengths.get(&piece.block) {
                Some(known) => *known,
                None => blocks::block(self.rows, piece.block)?.map(|row| row.length),
            };
            lengths.insert(piece.block, length);
            match length {
                None => found.push(format!("block {} is named by pieces and is not known", piece.block)),
                Some(length) if !pieces::is_sound(piece, length) => {
                    found.push(format!("a piece of {place} is out of bounds of block {}", piece.block));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn end_group(&mut self) -> Result<()> {
        let Some(group) = self.group.take() else { return Ok(()) };
        let ino = group.ino;
        if group.cookies != group.names {
            self.found.push(format!("there are {} cookies for {} names in {ino}", group.cookies, group.names));
            self.find_stale_cookies(ino)?;
        }
        let Some(inode) = &group.inode else {
            self.found.more_said_than_there.inodes = true;
            self.found.push(format!("there are rows of inode {ino}, which is not there"));
            return Ok(());
        };
        self.seen.inodes += 1;
        if group.cookies_from > 0 && inode.is_directory() {
            self.found.mend(Correction::CookiesFrom { directory: ino, cookie: group.cookies_from });
        }
        sizes_are_true(&group, inode, self.found);
        self.count_links(&group, inode)?;
        let is_listed = inode.nlink > 0 || fetch(self.rows.state(), &key::orphan(ino), |_| Ok(()))?.is_some();
        if !is_listed {
            self.found.push(format!("inode {ino} has no name and is not listed as an orphan"));
            // A directory may be full.
            if !inode.is_directory() {
                self.found.mend(Correction::Orphan { ino });
            }
        }
        if inode.is_directory() && inode.nlink > 0 && ino != Ino::ROOT {
            self.seen.directories.push((ino, inode.parent));
            if !is_where_it_says(self.rows, ino, inode)? {
                self.found.push(format!("directory {ino} is not where it says, in {}", inode.parent));
            }
        }
        if !ino.is_chosen() {
            self.seen.highest = self.seen.highest.max(ino.0);
        }
        Ok(())
    }

    fn find_stale_cookies(&mut self, directory: Ino) -> Result<()> {
        let family = key::family(directory, key::COOKIE);
        scan(self.rows.tree(), &family, &past(&family), |key, row| {
            let cookie = key.last_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
            if is_stale_cookie(self.rows, directory, cookie, row)? {
                self.found.mend(Correction::StaleCookie { directory, cookie });
            }
            Ok(ControlFlow::Continue(()))
        })
    }

    /// A directory has one name, and counts that, itself, and those above whom it is.
    fn count_links(&mut self, group: &Group, inode: &Inode) -> Result<()> {
        let names = match (inode.is_directory(), group.ino == Ino::ROOT) {
            (true, true) => 0,
            (true, false) => u64::from(inode.nlink.min(1)),
            (false, _) => u64::from(inode.nlink),
        };
        self.seen.links.add_name(group.ino, names);
        let expected = 2 + group.subdirectories;
        let is_in_the_tree =
            inode.nlink > 0 || group.ino == Ino::ROOT || is_named_unlinked(self.rows, group.ino, inode)?;
        if inode.is_directory() && is_in_the_tree && inode.nlink != expected {
            let nlink = i64::from(expected.wrapping_sub(inode.nlink).cast_signed());
            self.found.more_said_than_there.links |= nlink < 0;
            self.found.push_mended(
                format!("inode {} counts {} links, and has {expected}", group.ino, inode.nlink),
                Correction::Inode { ino: group.ino, nlink, size: 0, stored: 0 },
            );
        }
        Ok(())
    }
}

/// A directory that counts no links, but is where it says, and was never removed: those below it were, one too many.
pub(super) fn is_named_unlinked(rows: &impl Rows, ino: Ino, inode: &Inode) -> Result<bool> {
    let is_unlinked = inode.is_directory() && inode.nlink == 0 && ino != Ino::ROOT;
    Ok(is_unlinked
        && fetch(rows.state(), &key::orphan(ino), |_| Ok(()))?.is_none()
        && is_where_it_says(rows, ino, inode)?)
}

/// Whether a directory that is not where it says can be where this one names it.
pub(super) fn may_be_put(rows: &impl Rows, ino: Ino, inode: &Inode, into: Ino) -> Result<bool> {
    Ok(ino != Ino::ROOT && !is_where_it_says(rows, ino, inode)? && hangs_from_the_root_without(rows, into, ino)?)
}

/// Whether the way from a directory up to the root does not lead through another one, nor in a circle.
fn hangs_from_the_root_without(rows: &impl Rows, directory: Ino, without: Ino) -> Result<bool> {
    let (mut at, mut passed) = (directory, BTreeSet::new());
    while at != Ino::ROOT {
        let above = rows.inode(at)?.filter(Inode::is_directory).map(|inode| inode.parent);
        match above {
            Some(above) if at != without && passed.insert(at) => at = above,
            _ => return Ok(false),
        }
    }
    Ok(true)
}

fn sizes_are_true(group: &Group, inode: &Inode, found: &mut Found) {
    let size = match inode.kind {
        Kind::Directory => group.names,
        Kind::Symlink if inode.nlink > 0 => group.symlink,
        Kind::File => inode.size.min(FILE_SIZE_MAX),
        _ => inode.size,
    };
    if (inode.size, inode.stored) != (size, group.stored) {
        found.push(format!(
            "inode {} says size {} and stored {}, and has {size} and {}",
            group.ino, inode.size, inode.stored, group.stored
        ));
        let less = |says: u64, has: u64| has.wrapping_sub(says).cast_signed();
        let stored = less(inode.stored, group.stored);
        // How long a file is nothing else says, nor what a symlink said that has lost its target.
        let size = if inode.is_directory() { less(inode.size, size) } else { 0 };
        found.more_said_than_there.stored |= stored < 0;
        found.more_said_than_there.names |= size < 0;
        if size != 0 || stored != 0 {
            found.mend(Correction::Inode { ino: group.ino, nlink: 0, size, stored });
        }
    }
}

/// Whether the place at which a directory says it is leads to it.
fn is_where_it_says(rows: &impl Rows, ino: Ino, inode: &Inode) -> Result<bool> {
    let at = key::cookie(inode.parent, inode.parent_cookie);
    let named = fetch(rows.tree(), &at, |row| Ok(Dentry::decode_with(row)?.0.ino))?;
    Ok(named == Some(ino))
}

/// Whether a row in the order of reading leads to a name that has another place there, or to an inode that is not there. If just the
/// name is missing, a person has to say whether it should be.
pub(super) fn is_stale_cookie(rows: &impl Rows, directory: Ino, cookie: u64, row: &[u8]) -> Result<bool> {
    let (entry, name) = Dentry::decode_with(row)?;
    match fetch(rows.tree(), &key::dentry(directory, name), Dentry::decode)? {
        Some(named) => Ok(named.cookie != cookie),
        None => Ok(rows.inode(entry.ino)?.is_none()),
    }
}

/// From every directory upwards, until one is met that hangs from the root.
fn hang_together(directories: &[(Ino, Ino)], found: &mut Found) {
    let number = |ino: Ino| directories.binary_search_by_key(&ino, |(ino, _)| *ino).ok();
    // Looked at already, whatever was found.
    let mut known = vec![false; directories.len()];
    let mut way = Vec::new();
    for start in 0..directories.len() {
        let mut at = Some(start);
        while let Some(next) = at.filter(|next| !known[*next]) {
            known[next] = true;
            way.push(next);
            let parent = directories[next].1;
            at = number(parent);
            // A parent that is known from this very way: a circle.
            let is_circle = at.is_some_and(|at| known[at] && way.contains(&at));
            if is_circle || (at.is_none() && parent != Ino::ROOT) {
                found.push(format!("directory {} does not hang from the root", directories[start].0));
            }
        }
        way.clear();
    }
}

fn orphans_have_no_name(rows: &impl Rows, found: &mut Found) -> Result<()> {
    let mut after = Ino(0);
    loop {
        let page = orphans::orphans_after(rows, after, PAGE)?;
        let Some(last) = page.last() else { return Ok(()) };
        after = *last;
        for ino in page {
            if rows.inode(ino)?.is_none_or(|inode| inode.nlink > 0) {
                found.push_mended(
                    format!("inode {ino} is listed as an orphan, and is none"),
                    Correction::Orphan { ino },
                );
            }
        }
    }
}

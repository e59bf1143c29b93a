//! Every invariant of the tables, as a function that tells in sentences where it is broken.
//!
//! The same list serves the tests after every step, and `holdfast fsck`.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
};

use holdfast_common::{
    BlockHash, ChunkIndex, Epoch, Ino, Kind, Piece, Replicas, ServerId, SessionId,
    limits::{FILE_SIZE_MAX, PIECES_PER_CHUNK_MAX, REPLICAS, REPLICAS_MAX},
    pieces,
};

use super::{
    Rows, StorageError, blocks,
    file::{index_of, start_of},
    replicas,
    rows::{BlockRow, Dentry, Inode, decode_chunk},
    servers, session,
    tables::{Result, key, past, scan},
};

/// Everything that the invariants speak about, read once.
#[derive(Default)]
struct Facts {
    inodes: BTreeMap<Ino, Inode>,
    symlinks: BTreeMap<Ino, u64>,
    dentries: BTreeMap<(Ino, Vec<u8>), Dentry>,
    cookies: BTreeMap<(Ino, u64), (Dentry, Vec<u8>)>,
    pieces: BTreeMap<(Ino, ChunkIndex), (Vec<Piece>, Replicas)>,
    others: BTreeSet<Ino>,
    blocks: BTreeMap<BlockHash, BlockRow>,
    held: BTreeSet<(ServerId, BlockHash)>,
    owed: BTreeSet<BlockHash>,
    last_copies: BTreeSet<BlockHash>,
    surplus: BTreeSet<BlockHash>,
    unnamed: BTreeSet<BlockHash>,
    /// With whether they are deleted everywhere.
    condemned: BTreeSet<(Epoch, BlockHash, bool)>,
    orphans: BTreeSet<Ino>,
    servers: BTreeSet<ServerId>,
}

/// At most `count` sentences; none: all is well.
pub fn violations(rows: &impl Rows, count: usize) -> Result<Vec<String>> {
    let facts = Facts::gather(rows)?;
    let mut found = Vec::new();
    names_lead_to_inodes(&facts, &mut found);
    cookies_match_names(&facts, &mut found);
    links_are_counted(&facts, &mut found);
    directories_hang_together(&facts, &mut found);
    orphans_are_those_without_a_name(&facts, &mut found);
    rows_have_an_inode(&facts, &mut found);
    sizes_are_true(&facts, &mut found);
    pieces_are_in_order(&facts, &mut found);
    references_are_counted(&facts, &mut found);
    holders_are_indexed(&facts, &mut found);
    debts_are_on_record(&facts, &mut found);
    copies_are_wanted_as_said(&facts, rows, &mut found)?;
    nothing_condemned_is_named(&facts, rows, &mut found);
    counters_are_true(&facts, rows, &mut found);
    replies_belong_to_sessions(rows, &mut found)?;
    found.truncate(count);
    Ok(found)
}

impl Facts {
    fn gather(rows: &impl Rows) -> Result<Self> {
        let mut facts = Self::default();
        scan(rows.tree(), &[], &past(&[]), |key, row| facts.take_tree(key, row).map(|()| ControlFlow::Continue(())))?;
        scan(rows.blocks(), &[], &past(&[]), |key, row| {
            facts.take_block(key, row).map(|()| ControlFlow::Continue(()))
        })?;
        facts.orphans = super::orphans::orphans_after(rows, Ino(0), usize::MAX)?.into_iter().collect();
        facts.servers = servers::servers(rows)?.into_iter().map(|(id, _)| id).collect();
        Ok(facts)
    }

    fn take_tree(&mut self, key: &[u8], row: &[u8]) -> Result<()> {
        let damaged = || StorageError::Damaged("tree: key".into());
        let (ino, rest) = key.split_first_chunk::<8>().ok_or_else(damaged)?;
        let ino = Ino(u64::from_be_bytes(*ino));
        let (tag, rest) = rest.split_first().ok_or_else(damaged)?;
        match *tag {
            key::INODE => drop(self.inodes.insert(ino, Inode::decode(row)?)),
            key::SYMLINK => drop(self.symlinks.insert(ino, row.len() as u64)),
            key::XATTR => drop(self.others.insert(ino)),
            key::DENTRY => drop(self.dentries.insert((ino, rest.to_vec()), Dentry::decode(row)?)),
            key::COOKIE => {
                let (entry, name) = Dentry::decode_with(row)?;
                let cookie = u64::from_be_bytes(rest.try_into().map_err(|_| damaged())?);
                self.cookies.insert((ino, cookie), (entry, name.to_vec()));
            }
            key::PIECES => drop(self.pieces.insert((ino, index_of(key)?), decode_chunk(row)?)),
            _ => return Err(damaged()),
        }
        Ok(())
    }

    fn take_block(&mut self, key: &[u8], row: &[u8]) -> Result<()> {
        let damaged = || StorageError::Damaged("blocks: key".into());
        let hash = blocks::hash_of(key)?;
        match key[0] {
            key::BLOCK => drop(self.blocks.insert(hash, BlockRow::decode(row)?)),
            key::HELD => {
                let server = key[1..].first_chunk::<4>().ok_or_else(damaged)?;
                self.held.insert((ServerId(u32::from_be_bytes(*server)), hash));
            }
            key::OWED => drop(self.owed.insert(hash)),
            key::LAST_COPY => drop(self.last_copies.insert(hash)),
            key::SURPLUS => drop(self.surplus.insert(hash)),
            key::UNNAMED => drop(self.unnamed.insert(hash)),
            list @ (key::CONDEMNED | key::DELETED) => {
                let epoch = key[1..].first_chunk::<8>().ok_or_else(damaged)?;
                self.condemned.insert((Epoch(u64::from_be_bytes(*epoch)), hash, list == key::DELETED));
            }
            _ => return Err(damaged()),
        }
        Ok(())
    }
}

fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

fn names_lead_to_inodes(facts: &Facts, found: &mut Vec<String>) {
    for ((parent, name), entry) in &facts.dentries {
        let name = show(name);
        match facts.inodes.get(&entry.ino) {
            None => found.push(format!("{name:?} in directory {parent} names inode {}, which is not there", entry.ino)),
            Some(inode) if inode.kind != entry.kind => {
                found.push(format!(
                    "{name:?} in directory {parent} says {:?}, inode {} is {:?}",
                    entry.kind, entry.ino, inode.kind
                ));
            }
            Some(_) => {}
        }
        match facts.inodes.get(parent) {
            Some(directory) if directory.is_directory() && directory.nlink > 0 => {}
            _ => found.push(format!("{name:?} is in {parent}, which is not a directory in the tree")),
        }
    }
}

fn cookies_match_names(facts: &Facts, found: &mut Vec<String>) {
    for ((parent, name), entry) in &facts.dentries {
        let indexed = facts.cookies.get(&(*parent, entry.cookie));
        if indexed.is_none_or(|(other, other_name)| other != entry || other_name != name) {
            found.push(format!("{:?} in directory {parent} is not under its cookie {}", show(name), entry.cookie));
        }
        if facts.inodes.get(parent).is_some_and(|directory| directory.cookie_next <= entry.cookie) {
            found.push(format!("cookie {} of directory {parent} will be given twice", entry.cookie));
        }
    }
    if facts.cookies.len() != facts.dentries.len() {
        found.push(format!("there are {} cookies for {} names", facts.cookies.len(), facts.dentries.len()));
    }
}

fn links_are_counted(facts: &Facts, found: &mut Vec<String>) {
    let mut names: BTreeMap<Ino, u32> = BTreeMap::new();
    let mut subdirectories: BTreeMap<Ino, u32> = BTreeMap::new();
    for ((parent, _), entry) in &facts.dentries {
        *names.entry(entry.ino).or_default() += 1;
        *subdirectories.entry(*parent).or_default() += u32::from(entry.kind == Kind::Directory);
    }
    for (ino, inode) in &facts.inodes {
        let names = names.get(ino).copied().unwrap_or(0) + u32::from(*ino == Ino::ROOT);
        let expected = match (inode.is_directory(), names) {
            (true, 1) => 2 + subdirectories.get(ino).copied().unwrap_or(0),
            (true, 2..) => {
                found.push(format!("directory {ino} has {names} names"));
                continue;
            }
            _ => names,
        };
        if inode.nlink != expected {
            found.push(format!("inode {ino} counts {} links, and has {expected}", inode.nlink));
        }
    }
}

fn directories_hang_together(facts: &Facts, found: &mut Vec<String>) {
    let mut reach: BTreeSet<Ino> = BTreeSet::from([Ino::ROOT]);
    for (ino, inode) in facts.inodes.iter().filter(|(_, inode)| inode.is_directory() && inode.nlink > 0) {
        if *ino == Ino::ROOT {
            continue;
        }
        match facts.cookies.get(&(inode.parent, inode.parent_cookie)) {
            Some((entry, _)) if entry.ino == *ino => {}
            _ => found.push(format!("directory {ino} is not where it says, in {}", inode.parent)),
        }
        let mut way = vec![*ino];
        while let Some(at) = way.last().copied().filter(|at| !reach.contains(at)) {
            match facts.inodes.get(&at).map(|inode| inode.parent) {
                Some(parent) if !way.contains(&parent) => way.push(parent),
                _ => {
                    found.push(format!("directory {ino} does not hang from the root"));
                    break;
                }
            }
        }
        reach.extend(way);
    }
}

fn orphans_are_those_without_a_name(facts: &Facts, found: &mut Vec<String>) {
    for ino in &facts.orphans {
        if facts.inodes.get(ino).is_none_or(|inode| inode.nlink > 0) {
            found.push(format!("inode {ino} is listed as an orphan, and is none"));
        }
    }
    for (ino, _) in facts.inodes.iter().filter(|(_, inode)| inode.nlink == 0) {
        if !facts.orphans.contains(ino) {
            found.push(format!("inode {ino} has no name and is not listed as an orphan"));
        }
    }
}

fn rows_have_an_inode(facts: &Facts, found: &mut Vec<String>) {
    let owners = facts.symlinks.keys().chain(&facts.others).chain(facts.pieces.keys().map(|(ino, _)| ino));
    for ino in owners.chain(facts.dentries.keys().map(|(ino, _)| ino)) {
        if !facts.inodes.contains_key(ino) {
            found.push(format!("there are rows of inode {ino}, which is not there"));
        }
    }
}

fn sizes_are_true(facts: &Facts, found: &mut Vec<String>) {
    let mut entries: BTreeMap<Ino, u64> = BTreeMap::new();
    facts.dentries.keys().for_each(|(parent, _)| *entries.entry(*parent).or_default() += 1);
    let mut stored: BTreeMap<Ino, u64> = BTreeMap::new();
    for ((ino, _), (pieces, _)) in &facts.pieces {
        *stored.entry(*ino).or_default() += pieces::stored(pieces);
    }
    for (ino, inode) in &facts.inodes {
        let of = |map: &BTreeMap<Ino, u64>| map.get(ino).copied().unwrap_or(0);
        let size = match inode.kind {
            Kind::Directory => of(&entries),
            Kind::Symlink if inode.nlink > 0 => of(&facts.symlinks),
            Kind::File if inode.size <= FILE_SIZE_MAX => inode.size,
            Kind::File => FILE_SIZE_MAX,
            _ => inode.size,
        };
        if (inode.size, inode.stored) != (size, of(&stored)) {
            let stored = of(&stored);
            found.push(format!(
                "inode {ino} says size {} and stored {}, and has {size} and {stored}",
                inode.size, inode.stored
            ));
        }
    }
}

fn pieces_are_in_order(facts: &Facts, found: &mut Vec<String>) {
    for ((ino, index), (pieces, _)) in &facts.pieces {
        let place = format!("chunk {index} of inode {ino}");
        if pieces.is_empty() || pieces.len() > PIECES_PER_CHUNK_MAX {
            found.push(format!("{place} has {} pieces", pieces.len()));
        }
        if pieces.windows(2).any(|pair| pair[0].end() > pair[1].offset) {
            found.push(format!("pieces of {place} overlap or are out of order"));
        }
        let end = pieces.last().map_or(0, |piece| start_of(*index) + u64::from(piece.end()));
        if facts.inodes.get(ino).is_some_and(|inode| inode.kind != Kind::File || end > inode.size) {
            found.push(format!("a piece of {place} lies past the end of the file"));
        }
        for piece in pieces {
            let length = facts.blocks.get(&piece.block).map_or(0, |row| row.length);
            if !pieces::is_sound(piece, length) {
                found.push(format!("a piece of {place} is out of bounds of block {}", piece.block));
            }
        }
    }
}

fn references_are_counted(facts: &Facts, found: &mut Vec<String>) {
    let mut references: BTreeMap<BlockHash, (u64, [u64; REPLICAS_MAX])> = BTreeMap::new();
    for (pieces, replicas) in facts.pieces.values() {
        for piece in pieces {
            let (all, by_replicas) = references.entry(piece.block).or_default();
            *all += 1;
            replicas.own().into_iter().for_each(|own| by_replicas[own - 1] += 1);
        }
    }
    for hash in references.keys().filter(|hash| !facts.blocks.contains_key(hash)) {
        found.push(format!("block {hash} is named by pieces and is not known"));
    }
    for (hash, row) in &facts.blocks {
        let (expected, by_replicas) = references.get(hash).copied().unwrap_or_default();
        if row.refs != expected {
            found.push(format!("block {hash} counts {} pieces, and {expected} name it", row.refs));
        }
        if row.refs_by_replicas != by_replicas {
            let counted = row.refs_by_replicas;
            found.push(format!("block {hash} counts {counted:?} pieces by copies wanted, and {by_replicas:?} name it"));
        }
    }
}

fn holders_are_indexed(facts: &Facts, found: &mut Vec<String>) {
    let mut expected = BTreeSet::new();
    for (hash, row) in &facts.blocks {
        let nowhere = row.holders.is_empty() && !row.condemned;
        if nowhere || row.holders.len() > blocks::HOLDERS_MAX || !row.holders.is_sorted_by(|a, b| a < b) {
            found.push(format!("block {hash} has holders {:?}", row.holders));
        }
        if row.holders.iter().any(|holder| !facts.servers.contains(holder)) {
            found.push(format!("block {hash} is held by a server that never was: {:?}", row.holders));
        }
        expected.extend(row.holders.iter().map(|holder| (*holder, *hash)));
    }
    for (server, hash) in expected.symmetric_difference(&facts.held) {
        found.push(format!("block {hash} and the index disagree about holder {server}"));
    }
}

fn debts_are_on_record(facts: &Facts, found: &mut Vec<String>) {
    let with = |test: fn(&BlockRow) -> bool| -> BTreeSet<BlockHash> {
        facts.blocks.iter().filter(|(_, row)| test(row)).map(|(hash, _)| *hash).collect()
    };
    for hash in with(blocks::is_owed).symmetric_difference(&facts.owed) {
        found.push(format!("block {hash} and the list of owed blocks disagree"));
    }
    // One that came to have one copy left before there was a list of those is in the other list only.
    for hash in facts.last_copies.difference(&with(blocks::has_one_copy_left)) {
        found.push(format!("block {hash} is in the list of last copies, and has others"));
    }
    for hash in facts.surplus.difference(&with(blocks::has_surplus)) {
        found.push(format!("block {hash} is in the list of those with too many copies, and has not"));
    }
    for hash in with(blocks::is_unnamed).symmetric_difference(&facts.unnamed) {
        found.push(format!("block {hash} and the list of unnamed blocks disagree"));
    }
}

/// While numbers that have changed are still being followed, what has not followed yet is as it was.
fn copies_are_wanted_as_said(facts: &Facts, rows: &impl Rows, found: &mut Vec<String>) -> Result<()> {
    let counters = rows.counters();
    let follows = |hash: &BlockHash| counters.retargeted.is_none_or(|through| *hash <= through);
    for (hash, row) in facts.blocks.iter().filter(|(hash, _)| follows(hash)) {
        let wanted = row.most_wanted(counters.replicas());
        if row.wanted != wanted {
            found.push(format!("block {hash} wants {} copies, and should want {wanted}", row.wanted));
        }
    }
    let recounted: BTreeSet<Ino> = replicas::recounted_first(rows, usize::MAX)?.into_iter().collect();
    for ((ino, index), (_, counted)) in &facts.pieces {
        let own = facts.inodes.get(ino).map(|inode| inode.replicas);
        if own != Some(*counted) && !recounted.contains(ino) {
            found.push(format!("chunk {index} of inode {ino} is counted under {counted:?}, not {own:?}"));
        }
    }
    Ok(())
}

fn nothing_condemned_is_named(facts: &Facts, rows: &impl Rows, found: &mut Vec<String>) {
    let (newest, forgotten) = (rows.counters().epoch, rows.counters().forgotten);
    let mut condemned = BTreeSet::new();
    for (hash, row) in &facts.blocks {
        if row.condemned {
            condemned.insert((row.epoch, *hash, row.holders.is_empty()));
        }
        if row.condemned && row.refs > 0 {
            found.push(format!("block {hash} is condemned, and {} pieces name it", row.refs));
        }
        if row.epoch > newest {
            found.push(format!("block {hash} is of epoch {}, the newest is {newest}", row.epoch));
        }
    }
    for (epoch, hash, _) in condemned.symmetric_difference(&facts.condemned) {
        found.push(format!("block {hash} and the list of condemned blocks disagree, at epoch {epoch}"));
    }
    if forgotten > newest {
        found.push(format!("blocks of epoch {forgotten} are forgotten, the newest is {newest}"));
    }
}

fn counters_are_true(facts: &Facts, rows: &impl Rows, found: &mut Vec<String>) {
    let counters = rows.counters();
    let mut by_copies = [0; REPLICAS + 1];
    for row in facts.blocks.values().filter(|row| row.refs > 0) {
        by_copies[row.holders.len().min(REPLICAS)] += 1;
    }
    let length = |set: usize| set as u64;
    let counted = (counters.inodes, counters.blocks_by_copies, counters.owed, counters.unnamed, counters.condemned);
    let unnamed = (length(facts.unnamed.len()), length(facts.condemned.len()));
    let true_ones = (length(facts.inodes.len()), by_copies, length(facts.owed.len()), unnamed.0, unnamed.1);
    if counted != true_ones {
        found.push(format!(
            "inodes, blocks by copies, owed, unnamed, condemned are counted as {counted:?}, and are {true_ones:?}"
        ));
    }
    if facts.inodes.keys().any(|ino| !ino.is_chosen() && ino.0 >= counters.ino_next) {
        found.push(format!("inode number {} will be given twice", counters.ino_next));
    }
}

fn replies_belong_to_sessions(rows: &impl Rows, found: &mut Vec<String>) -> Result<()> {
    let sessions: BTreeMap<SessionId, _> = session::sessions(rows)?.into_iter().collect();
    let mut instances = 0;
    scan(rows.state(), &[key::INSTANCE], &past(&[key::INSTANCE]), |_, _| {
        instances += 1;
        Ok(ControlFlow::Continue(()))
    })?;
    if instances != sessions.len() {
        found.push(format!("there are {instances} instances for {} sessions", sessions.len()));
    }
    scan(rows.state(), &[key::REPLY], &past(&[key::REPLY]), |key, _| {
        let word = |at: usize| key.get(at..at + 8).and_then(|word| word.try_into().ok()).map(u64::from_be_bytes);
        let (id, sequence) = (SessionId(word(1).unwrap_or(0)), word(9).unwrap_or(0));
        match sessions.get(&id) {
            Some(row) if sequence >= row.answered_below.0 => {}
            _ => found.push(format!("reply {sequence} is kept for session {id}, which has no use for it")),
        }
        Ok(ControlFlow::Continue(()))
    })
}

//! Names: make, link, unlink, rmdir, rename.
//!
//! Permissions are the kernel's matter. Everything that two mounts could race for is decided here. In each
//! operation all refusals come before the first change.

use std::ops::Range;

use holdfast_common::{
    Ino, Kind, Refusal, Replicas, Time,
    limits::{LINK_COUNT_MAX, NAME_LENGTH_MAX, SYMLINK_LENGTH_MAX},
    mode,
    wire::meta::{Mutated, NewInode, RenameMode, UMASK_SHIFT},
};

use super::{
    Rows, Step, StorageError, Tables, acl, existing, orphans,
    rows::{Dentry, Inode},
    tables::{Result, fetch, key},
};

/// A name in a directory.
type Place<'a> = (Ino, &'a [u8]);

/// The root of a new filesystem.
pub(super) fn root(now: Time) -> Inode {
    Inode { mode: 0o755, ..fresh(Kind::Directory, now) }
}

fn fresh(kind: Kind, now: Time) -> Inode {
    Inode {
        kind,
        mode: 0,
        uid: 0,
        gid: 0,
        nlink: if kind == Kind::Directory { 2 } else { 1 },
        rdev: 0,
        size: 0,
        stored: 0,
        data_version: 0,
        replicas: Replicas::INHERITED,
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        parent: Ino(0),
        parent_cookie: 0,
        cookie_next: 1,
    }
}

pub(super) fn check_name(name: &[u8]) -> Result<(), Refusal> {
    match name {
        [] | b"." | b".." => Err(Refusal::Invalid),
        _ if name.len() > NAME_LENGTH_MAX => Err(Refusal::NameTooLong),
        _ if name.contains(&b'/') || name.contains(&0) => Err(Refusal::Invalid),
        _ => Ok(()),
    }
}

/// A directory that still has a place in the tree.
pub(super) fn directory(rows: &impl Rows, ino: Ino) -> Step<Inode> {
    let inode = rows.inode(ino)?.ok_or(Refusal::NotFound)?;
    match inode.is_directory() {
        false => Err(Refusal::NotDirectory.into()),
        true if inode.nlink == 0 => Err(Refusal::NotFound.into()),
        true => Ok(inode),
    }
}

pub fn dentry(rows: &impl Rows, parent: Ino, name: &[u8]) -> Result<Option<Dentry>> {
    fetch(rows.tree(), &key::dentry(parent, name), Dentry::decode)
}

fn named(rows: &impl Rows, (parent, name): Place<'_>) -> Step<Dentry> {
    Ok(dentry(rows, parent, name)?.ok_or(Refusal::NotFound)?)
}

/// The inode that a dentry names. Refused `Stale` if it is lost, which `fsck` tells.
fn target(rows: &impl Rows, dentry: &Dentry) -> Step<Inode> {
    Ok(rows.inode(dentry.ino)?.ok_or(Refusal::Stale)?)
}

pub(super) fn make(
    tables: &mut Tables<'_>,
    (parent, name): Place<'_>,
    new: &NewInode,
    exclusive: bool,
    number: &Number,
    now: Time,
) -> Step<Mutated> {
    check_name(name)?;
    let mut directory = directory(tables, parent)?;
    if let Some(taken) = dentry(tables, parent, name)? {
        // Asked for again, in another session.
        let is_same = matches!(number, Number::Chosen(ino) if *ino == taken.ino);
        if is_same {
            return Ok(Mutated::Inode { attr: target(tables, &taken)?.attr(taken.ino), created: false });
        }
        if exclusive {
            return Err(Refusal::Exists.into());
        }
        return Ok(Mutated::Inode { attr: target(tables, &taken)?.attr(taken.ino), created: false });
    }
    check_new(new)?;
    let inherited = acl::inherited(tables, parent, &directory, new)?;
    let mut inode = child(new, inherited.mode, &directory, now);
    check_room(&directory, inode.kind)?;
    let ino = take_number(tables, number)?;
    tables.counters.inodes = tables.counters.inodes.wrapping_add(1);
    if inode.kind == Kind::Symlink {
        tables.put_tree(&key::symlink(ino), &new.target)?;
    }
    inherited.store(tables, ino)?;
    enter(tables, (parent, name), &mut directory, ino, &mut inode, now)?;
    let attr = inode.attr(ino);
    tables.put_inode(ino, inode);
    tables.put_inode(parent, directory);
    Ok(Mutated::Inode { attr, created: true })
}

/// A file that nobody can find: it lives for as long as it is open, or is given a name.
pub(super) fn make_unnamed(
    tables: &mut Tables<'_>,
    parent: Ino,
    new: &NewInode,
    linkable: bool,
    number: &Number,
    now: Time,
) -> Step<Mutated> {
    let directory = directory(tables, parent)?;
    check_new(new)?;
    if new.kind != Kind::File {
        return Err(Refusal::Invalid.into());
    }
    let inherited = acl::inherited(tables, parent, &directory, new)?;
    let flag = if linkable { mode::IS_LINKABLE } else { 0 };
    let inode = Inode { nlink: 0, ..child(new, inherited.mode | flag, &directory, now) };
    let ino = take_number(tables, number)?;
    tables.counters.inodes = tables.counters.inodes.wrapping_add(1);
    inherited.store(tables, ino)?;
    orphans::add(tables, ino)?;
    let attr = inode.attr(ino);
    tables.put_inode(ino, inode);
    Ok(Mutated::Inode { attr, created: true })
}

/// The number that a new inode gets.
#[derive(Clone, Debug)]
pub(super) enum Number {
    Next,
    /// One that a mount has chosen.
    Chosen(Ino),
    /// The one that it had before it was lost, which is one of `lost`; `None`: it was not made then, but found.
    Before {
        made: Option<Ino>,
        lost: Range<u64>,
    },
}

fn take_number(tables: &mut Tables<'_>, number: &Number) -> Step<Ino> {
    match number {
        Number::Next => {
            let ino = Ino(tables.counters.ino_next);
            tables.counters.ino_next += 1;
            Ok(ino)
        }
        Number::Chosen(ino) if !ino.is_chosen() => Err(Refusal::Invalid.into()),
        Number::Chosen(ino) if tables.inode(*ino)?.is_some() => Err(Refusal::Exists.into()),
        Number::Chosen(ino) => Ok(*ino),
        Number::Before { made: None, .. } => Err(Refusal::NotFound.into()),
        Number::Before { made: Some(ino), lost } if !lost.contains(&ino.0) => Err(Refusal::Invalid.into()),
        Number::Before { made: Some(ino), .. } if tables.inode(*ino)?.is_some() => Err(Refusal::Exists.into()),
        Number::Before { made: Some(ino), .. } => Ok(*ino),
    }
}

fn check_new(new: &NewInode) -> Result<(), Refusal> {
    let is_symlink = new.kind == Kind::Symlink;
    match new.target.len() {
        _ if new.mode & !(mode::PERMISSIONS | 0o777 << UMASK_SHIFT) != 0 => Err(Refusal::Invalid),
        length if is_symlink && length > SYMLINK_LENGTH_MAX => Err(Refusal::NameTooLong),
        length if is_symlink != (length > 0) || new.target.contains(&0) => Err(Refusal::Invalid),
        _ => Ok(()),
    }
}

/// A setgid directory gives its group to what is made in it, and its setgid bit to directories.
fn child(new: &NewInode, permissions: u32, directory: &Inode, now: Time) -> Inode {
    let inherits = directory.mode & mode::SETGID != 0;
    let setgid = if inherits && new.kind == Kind::Directory { mode::SETGID } else { 0 };
    Inode {
        mode: permissions | setgid,
        uid: new.uid,
        gid: if inherits { directory.gid } else { new.gid },
        rdev: if matches!(new.kind, Kind::CharDevice | Kind::BlockDevice) { new.rdev } else { 0 },
        size: new.target.len() as u64,
        replicas: directory.replicas,
        ..fresh(new.kind, now)
    }
}

/// Each subdirectory is a link to its parent, by its `..`.
fn check_room(directory: &Inode, kind: Kind) -> Result<(), Refusal> {
    let full = kind == Kind::Directory && directory.nlink >= LINK_COUNT_MAX;
    if full { Err(Refusal::TooManyLinks) } else { Ok(()) }
}

/// The directory is not listed as before.
fn changed(directory: &mut Inode, now: Time) {
    directory.data_version += 1;
    (directory.mtime, directory.ctime) = (now, now);
}

/// Gives `inode` the name, with the next cookie of `directory`. The caller puts both inodes.
fn enter(
    tables: &mut Tables<'_>,
    (parent, name): Place<'_>,
    directory: &mut Inode,
    ino: Ino,
    inode: &mut Inode,
    now: Time,
) -> Result<()> {
    let entry = Dentry { ino, kind: inode.kind, cookie: directory.cookie_next };
    directory.cookie_next += 1;
    directory.size = directory.size.wrapping_add(1);
    changed(directory, now);
    if inode.is_directory() {
        directory.nlink = directory.nlink.wrapping_add(1);
        (inode.parent, inode.parent_cookie) = (parent, entry.cookie);
    }
    write(tables, (parent, name), &entry)
}

/// Both rows of a name: by name, and in the order of reading.
fn write(tables: &mut Tables<'_>, (parent, name): Place<'_>, entry: &Dentry) -> Result<()> {
    tables.put_tree(&key::dentry(parent, name), &entry.encode())?;
    tables.put_tree(&key::cookie(parent, entry.cookie), &entry.encode_with(name))
}

/// Takes the name away. The caller puts `directory`.
fn leave(
    tables: &mut Tables<'_>,
    (parent, name): Place<'_>,
    directory: &mut Inode,
    entry: &Dentry,
    now: Time,
) -> Result<()> {
    // A count that is wrong stays wrong by as much, until `fsck --repair` takes that out.
    directory.size = directory.size.wrapping_sub(1);
    changed(directory, now);
    if entry.kind == Kind::Directory {
        directory.nlink = directory.nlink.wrapping_sub(1);
    }
    tables.remove_tree(&key::dentry(parent, name))?;
    tables.remove_tree(&key::cookie(parent, entry.cookie))
}

/// One name less. The last one makes an orphan, which stays for as long as somebody has it open.
fn unlinked(tables: &mut Tables<'_>, ino: Ino, mut inode: Inode, now: Time) -> Result<Inode> {
    inode.nlink = if inode.is_directory() { 0 } else { inode.nlink.wrapping_sub(1) };
    inode.ctime = now;
    if inode.nlink == 0 {
        orphans::add(tables, ino)?;
    }
    tables.put_inode(ino, inode.clone());
    Ok(inode)
}

pub(super) fn link(tables: &mut Tables<'_>, ino: Ino, parent: Ino, name: &[u8], now: Time) -> Step<Mutated> {
    check_name(name)?;
    let mut directory = directory(tables, parent)?;
    let mut inode = existing(tables, ino)?;
    match inode.nlink {
        _ if dentry(tables, parent, name)?.is_some() => return Err(Refusal::Exists.into()),
        _ if inode.is_directory() => return Err(Refusal::NotPermitted.into()),
        0 if inode.mode & mode::IS_LINKABLE == 0 => return Err(Refusal::NotFound.into()),
        LINK_COUNT_MAX.. => return Err(Refusal::TooManyLinks.into()),
        _ => {}
    }
    enter(tables, (parent, name), &mut directory, ino, &mut inode, now)?;
    if inode.nlink == 0 {
        orphans::remove(tables, ino)?;
        inode.mode &= !mode::IS_LINKABLE;
    }
    inode.nlink = inode.nlink.wrapping_add(1);
    inode.ctime = now;
    let attr = inode.attr(ino);
    tables.put_inode(ino, inode);
    tables.put_inode(parent, directory);
    Ok(Mutated::Inode { attr, created: false })
}

pub(super) fn unlink(tables: &mut Tables<'_>, parent: Ino, name: &[u8], now: Time) -> Step<Mutated> {
    check_name(name)?;
    let directory = directory(tables, parent)?;
    let entry = named(tables, (parent, name))?;
    if entry.kind == Kind::Directory {
        return Err(Refusal::IsDirectory.into());
    }
    remove(tables, (parent, name), directory, &entry, now)
}

pub(super) fn rmdir(tables: &mut Tables<'_>, parent: Ino, name: &[u8], now: Time) -> Step<Mutated> {
    check_name(name)?;
    let directory = directory(tables, parent)?;
    let entry = named(tables, (parent, name))?;
    check_empty(tables, &entry)?;
    remove(tables, (parent, name), directory, &entry, now)
}

/// As `unlink` or `rmdir`, if the name stands for `ino`.
pub(super) fn remove_inode(tables: &mut Tables<'_>, (parent, name): Place<'_>, ino: Ino, now: Time) -> Step<Mutated> {
    check_name(name)?;
    let directory = directory(tables, parent)?;
    let entry = named(tables, (parent, name))?;
    match entry.kind {
        _ if entry.ino != ino => return Err(Refusal::NotFound.into()),
        Kind::Directory => check_empty(tables, &entry)?,
        _ => {}
    }
    remove(tables, (parent, name), directory, &entry, now)
}

fn check_empty(tables: &Tables<'_>, entry: &Dentry) -> Step<()> {
    if entry.kind != Kind::Directory {
        return Err(Refusal::NotDirectory.into());
    }
    if target(tables, entry)?.size > 0 {
        return Err(Refusal::NotEmpty.into());
    }
    Ok(())
}

fn remove(
    tables: &mut Tables<'_>,
    (parent, name): Place<'_>,
    mut directory: Inode,
    entry: &Dentry,
    now: Time,
) -> Step<Mutated> {
    let inode = target(tables, entry)?;
    leave(tables, (parent, name), &mut directory, entry, now)?;
    tables.put_inode(parent, directory);
    let inode = unlinked(tables, entry.ino, inode, now)?;
    Ok(Mutated::Removed { attr: inode.attr(entry.ino) })
}

pub(super) fn rename(
    tables: &mut Tables<'_>,
    (from, from_name): (Ino, &[u8]),
    (to, to_name): (Ino, &[u8]),
    mode: RenameMode,
    now: Time,
) -> Step<Mutated> {
    if mode == RenameMode::Whiteout {
        return rename_away(tables, (from, from_name), (to, to_name), now);
    }
    check_name(from_name)?;
    check_name(to_name)?;
    directory(tables, from)?;
    directory(tables, to)?;
    let moved = named(tables, (from, from_name))?;
    let taken = dentry(tables, to, to_name)?;
    for entry in taken.iter().chain([&moved]) {
        target(tables, entry)?;
    }
    match (mode, taken) {
        (RenameMode::NoReplace, Some(_)) => Err(Refusal::Exists.into()),
        (RenameMode::Exchange, None) => Err(Refusal::NotFound.into()),
        // Two names of one inode: POSIX wants both kept.
        (_, Some(taken)) if taken.ino == moved.ino => unmoved(tables, &moved),
        (RenameMode::Exchange, Some(taken)) => {
            exchange(tables, ((from, from_name), moved), ((to, to_name), taken), now)
        }
        (_, Some(taken)) => replace(tables, ((from, from_name), moved), ((to, to_name), taken), now),
        (_, None) => relocate(tables, ((from, from_name), moved), (to, to_name), now),
    }
}

/// Two names of one inode stay as they are; else the old name becomes that of a whiteout.
fn rename_away(tables: &mut Tables<'_>, from: Place<'_>, to: Place<'_>, now: Time) -> Step<Mutated> {
    let outcome = rename(tables, from, to, RenameMode::Replace, now)?;
    if dentry(tables, from.0, from.1)?.is_none() {
        let target = Vec::new();
        let whiteout = NewInode { kind: Kind::CharDevice, mode: 0, uid: 0, gid: 0, rdev: 0, target };
        make(tables, from, &whiteout, true, &Number::Next, now)?;
    }
    Ok(outcome)
}

fn unmoved(tables: &Tables<'_>, moved: &Dentry) -> Step<Mutated> {
    Ok(Mutated::Renamed { moved: target(tables, moved)?.attr(moved.ino), replaced: None })
}

/// A directory cannot go into itself or below.
fn check_not_below(tables: &Tables<'_>, moved: &Dentry, to: Ino) -> Step<()> {
    if moved.kind == Kind::Directory && is_at_or_below(tables, to, moved.ino)? {
        return Err(Refusal::Invalid.into());
    }
    Ok(())
}

fn is_at_or_below(rows: &impl Rows, ino: Ino, ancestor: Ino) -> Result<bool> {
    let mut at = ino;
    while at != Ino::ROOT {
        if at == ancestor {
            return Ok(true);
        }
        let inode = rows.inode(at)?;
        at = inode
            .ok_or_else(|| StorageError::Damaged(format!("directory {at} on the way to the root is gone")))?
            .parent;
    }
    Ok(ancestor == Ino::ROOT)
}

/// Would `to` have one subdirectory too many if `moved` came from another directory?
fn check_room_to_move(tables: &Tables<'_>, moved: &Dentry, (from, to): (Ino, Ino), taken: Option<Kind>) -> Step<()> {
    if from != to && taken != Some(Kind::Directory) {
        check_room(&directory(tables, to)?, moved.kind)?;
    }
    Ok(())
}

fn replace(
    tables: &mut Tables<'_>,
    (source, moved): (Place<'_>, Dentry),
    (destination, taken): (Place<'_>, Dentry),
    now: Time,
) -> Step<Mutated> {
    check_not_below(tables, &moved, destination.0)?;
    match (moved.kind == Kind::Directory, taken.kind == Kind::Directory) {
        (true, false) => return Err(Refusal::NotDirectory.into()),
        (false, true) => return Err(Refusal::IsDirectory.into()),
        (true, true) => check_empty(tables, &taken)?,
        (false, false) => {}
    }
    check_room_to_move(tables, &moved, (source.0, destination.0), Some(taken.kind))?;
    let mut directory = directory(tables, destination.0)?;
    leave(tables, destination, &mut directory, &taken, now)?;
    tables.put_inode(destination.0, directory);
    let lost = target(tables, &taken)?;
    let lost = unlinked(tables, taken.ino, lost, now)?;
    let inode = carry(tables, (source, moved), destination, now)?;
    Ok(Mutated::Renamed { moved: inode.attr(moved.ino), replaced: Some(lost.attr(taken.ino)) })
}

fn relocate(
    tables: &mut Tables<'_>,
    (source, moved): (Place<'_>, Dentry),
    destination: Place<'_>,
    now: Time,
) -> Step<Mutated> {
    check_not_below(tables, &moved, destination.0)?;
    check_room_to_move(tables, &moved, (source.0, destination.0), None)?;
    let inode = carry(tables, (source, moved), destination, now)?;
    Ok(Mutated::Renamed { moved: inode.attr(moved.ino), replaced: None })
}

/// Moves a name to a place that is free. Nothing here refuses any more.
fn carry(
    tables: &mut Tables<'_>,
    (source, moved): (Place<'_>, Dentry),
    destination: Place<'_>,
    now: Time,
) -> Step<Inode> {
    let mut inode = target(tables, &moved)?;
    let mut left = directory(tables, source.0)?;
    leave(tables, source, &mut left, &moved, now)?;
    tables.put_inode(source.0, left);
    let mut entered = directory(tables, destination.0)?;
    enter(tables, destination, &mut entered, moved.ino, &mut inode, now)?;
    tables.put_inode(destination.0, entered);
    // A directory is listed with its parent.
    inode.data_version += u64::from(inode.is_directory());
    inode.ctime = now;
    tables.put_inode(moved.ino, inode.clone());
    Ok(inode)
}

/// Two names change places; each keeps its cookie.
fn exchange(
    tables: &mut Tables<'_>,
    (one_place, one): (Place<'_>, Dentry),
    (other_place, other): (Place<'_>, Dentry),
    now: Time,
) -> Step<Mutated> {
    check_not_below(tables, &one, other_place.0)?;
    check_not_below(tables, &other, one_place.0)?;
    let between = (one_place.0, other_place.0);
    check_room_to_move(tables, &one, between, Some(other.kind))?;
    check_room_to_move(tables, &other, (between.1, between.0), Some(one.kind))?;
    let moved = put_in(tables, one_place, &one, (other_place, &other), now)?;
    let replaced = put_in(tables, other_place, &other, (one_place, &one), now)?;
    Ok(Mutated::Renamed { moved: moved.attr(one.ino), replaced: Some(replaced.attr(other.ino)) })
}

/// Puts what `entry` names where `held` was, and counts the subdirectories of the new parent anew.
fn put_in(
    tables: &mut Tables<'_>,
    (from, _): Place<'_>,
    entry: &Dentry,
    ((to, to_name), held): (Place<'_>, &Dentry),
    now: Time,
) -> Step<Inode> {
    let mut parent = directory(tables, to)?;
    if from != to {
        parent.nlink = parent.nlink.wrapping_add(u32::from(entry.kind == Kind::Directory));
        parent.nlink = parent.nlink.wrapping_sub(u32::from(held.kind == Kind::Directory));
    }
    changed(&mut parent, now);
    tables.put_inode(to, parent);
    let placed = Dentry { cookie: held.cookie, ..*entry };
    write(tables, (to, to_name), &placed)?;
    let mut inode = target(tables, entry)?;
    if inode.is_directory() {
        (inode.parent, inode.parent_cookie) = (to, held.cookie);
        inode.data_version += 1;
    }
    inode.ctime = now;
    tables.put_inode(entry.ino, inode.clone());
    Ok(inode)
}

//! The model: directories, files and links in a few maps, with the errnos of Linux.

use std::collections::BTreeMap;

use super::{Answer, Op, RenameKind, SLOTS, Shape, System, Time, XattrKind, payload};

type Id = usize;

const ROOT: Id = 0;

#[derive(Clone, Debug)]
enum Body {
    File(Vec<u8>),
    Directory(BTreeMap<String, Id>),
    Symlink(String),
    Socket,
}

#[derive(Clone, Debug)]
struct Node {
    body: Body,
    mode: u32,
    nlink: u32,
    owner: (u32, u32),
    /// `None`: a moment ago.
    modified: Option<Time>,
    xattrs: BTreeMap<&'static str, Vec<u8>>,
}

impl Node {
    fn new(body: Body, mode: u32, nlink: u32) -> Self {
        Self { body, mode, nlink, owner: (0, 0), modified: None, xattrs: BTreeMap::new() }
    }
}

#[derive(Clone, Debug)]
pub struct Memory {
    nodes: Vec<Node>,
    held: [Option<Id>; SLOTS],
}

impl Default for Memory {
    fn default() -> Self {
        Self { nodes: vec![Node::new(Body::Directory(BTreeMap::new()), 0o755, 2)], held: [None; SLOTS] }
    }
}

/// A place in a directory, taken or not.
struct Place {
    parent: Id,
    name: String,
    found: Option<Id>,
}

impl Memory {
    fn directory(&self, id: Id) -> Result<&BTreeMap<String, Id>, i32> {
        match &self.nodes[id].body {
            Body::Directory(entries) => Ok(entries),
            Body::File(_) | Body::Socket => Err(libc::ENOTDIR),
            // Links point nowhere in this world, and are followed within a path.
            Body::Symlink(_) => Err(libc::ENOENT),
        }
    }

    /// Its entries, which are about to be changed.
    fn entries(&mut self, id: Id) -> &mut BTreeMap<String, Id> {
        self.nodes[id].modified = None;
        match &mut self.nodes[id].body {
            Body::Directory(entries) => entries,
            _ => unreachable!("only directories are given out as parents"),
        }
    }

    fn place(&self, path: &str) -> Result<Place, i32> {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let mut parent = ROOT;
        for step in directory.split('/').filter(|step| !step.is_empty()) {
            parent = *self.directory(parent)?.get(step).ok_or(libc::ENOENT)?;
        }
        let found = self.directory(parent)?.get(name).copied();
        Ok(Place { parent, name: name.into(), found })
    }

    fn find(&self, path: &str) -> Result<Id, i32> {
        if path.is_empty() { Ok(ROOT) } else { self.place(path)?.found.ok_or(libc::ENOENT) }
    }

    fn make(&mut self, path: &str, mode: u32, body: Body) -> Result<Answer, i32> {
        let place = self.place(path)?;
        if place.found.is_some() {
            return Err(libc::EEXIST);
        }
        self.nodes.push(Node::new(body, mode, 1));
        let id = self.nodes.len() - 1;
        self.entries(place.parent).insert(place.name, id);
        Ok(Answer::Done)
    }

    /// As open(2) with `O_NOFOLLOW` does.
    fn file(&mut self, path: &str, writes: bool) -> Result<&mut Vec<u8>, i32> {
        let id = self.find(path)?;
        match &mut self.nodes[id].body {
            Body::File(bytes) => Ok(bytes),
            Body::Directory(_) if writes => Err(libc::EISDIR),
            Body::Directory(_) => Err(libc::EISDIR),
            Body::Symlink(_) => Err(libc::ELOOP),
            Body::Socket => Err(libc::ENXIO),
        }
    }

    /// The same, to be changed.
    fn changed_file(&mut self, path: &str) -> Result<&mut Vec<u8>, i32> {
        self.file(path, true)?;
        let id = self.find(path)?;
        self.nodes[id].modified = None;
        self.file(path, true)
    }

    fn write(&mut self, path: &str, offset: Option<u64>, bytes: &[u8]) -> Result<Answer, i32> {
        let file = self.changed_file(path)?;
        let start = offset.map_or(file.len(), index);
        lay_over(file, start, bytes);
        Ok(Answer::Count(bytes.len() as u64))
    }

    fn read(&mut self, path: &str, offset: u64, length: usize) -> Result<Answer, i32> {
        Ok(Answer::Bytes(part(self.file(path, false)?, offset, length).to_vec()))
    }

    fn punch(&mut self, path: &str, offset: u64, length: u64) -> Result<Answer, i32> {
        let file = self.changed_file(path)?;
        let end = index(offset + length).min(file.len());
        file[index(offset).min(end)..end].fill(0);
        Ok(Answer::Done)
    }

    fn zero(&mut self, path: &str, offset: u64, length: u64, keeps: bool) -> Result<Answer, i32> {
        self.punch(path, offset, length)?;
        let file = self.changed_file(path)?;
        if !keeps && file.len() < index(offset + length) {
            file.resize(index(offset + length), 0);
        }
        Ok(Answer::Done)
    }

    fn copy(&mut self, from: (&str, u64), to: (&str, u64), length: usize) -> Result<Answer, i32> {
        let source = self.file(from.0, false)?.clone();
        let target = self.find(to.0)?;
        self.file(to.0, true)?;
        let bytes = part(&source, from.1, length).to_vec();
        let (same, count) = (self.find(from.0)? == target, bytes.len() as u64);
        if same && from.1 < to.1 + count && to.1 < from.1 + count {
            return Err(libc::EINVAL);
        }
        if !bytes.is_empty() {
            lay_over(self.changed_file(to.0)?, index(to.1), &bytes);
        }
        Ok(Answer::Count(bytes.len() as u64))
    }

    fn fsync(&mut self, path: &str) -> Result<Answer, i32> {
        match self.nodes[self.find(path)?].body {
            Body::Symlink(_) => Err(libc::ELOOP),
            Body::Socket => Err(libc::ENXIO),
            _ => Ok(Answer::Done),
        }
    }

    fn remove(&mut self, path: &str, directory: bool) -> Result<Answer, i32> {
        let place = self.place(path)?;
        let id = place.found.ok_or(libc::ENOENT)?;
        match (&self.nodes[id].body, directory) {
            (Body::Directory(_), false) => return Err(libc::EISDIR),
            (Body::Directory(entries), true) if !entries.is_empty() => return Err(libc::ENOTEMPTY),
            (Body::File(_) | Body::Symlink(_) | Body::Socket, true) => return Err(libc::ENOTDIR),
            _ => {}
        }
        self.entries(place.parent).remove(&place.name);
        self.nodes[id].nlink -= 1;
        Ok(Answer::Done)
    }

    /// The checks of `do_renameat2` and `vfs_rename`, in their order.
    fn rename(&mut self, from: &str, to: &str, kind: RenameKind) -> Result<Answer, i32> {
        let (old, new) = (self.place(from)?, self.place(to)?);
        let moved = old.found.ok_or(libc::ENOENT)?;
        match (kind, new.found) {
            (RenameKind::NoReplace, Some(_)) => return Err(libc::EEXIST),
            (RenameKind::Exchange, None) => return Err(libc::ENOENT),
            _ => {}
        }
        if lies_below(to, from) {
            return Err(libc::EINVAL);
        }
        if lies_below(from, to) {
            return Err(if kind == RenameKind::Exchange { libc::EINVAL } else { libc::ENOTEMPTY });
        }
        match new.found {
            Some(target) if target == moved => return Ok(Answer::Done),
            Some(target) if kind == RenameKind::Exchange => {
                self.entries(old.parent).insert(old.name, target);
            }
            Some(target) => {
                self.may_replace(moved, target)?;
                self.nodes[target].nlink -= 1;
                self.entries(old.parent).remove(&old.name);
            }
            None => {
                self.entries(old.parent).remove(&old.name);
            }
        }
        self.entries(new.parent).insert(new.name, moved);
        Ok(Answer::Done)
    }

    fn may_replace(&self, moved: Id, target: Id) -> Result<(), i32> {
        match (&self.nodes[moved].body, &self.nodes[target].body) {
            (Body::Directory(_), Body::Directory(entries)) if !entries.is_empty() => Err(libc::ENOTEMPTY),
            (Body::Directory(_), Body::Directory(_)) => Ok(()),
            (Body::Directory(_), _) => Err(libc::ENOTDIR),
            (_, Body::Directory(_)) => Err(libc::EISDIR),
            _ => Ok(()),
        }
    }

    fn link(&mut self, from: &str, to: &str) -> Result<Answer, i32> {
        let id = self.find(from)?;
        let place = self.place(to)?;
        if place.found.is_some() {
            return Err(libc::EEXIST);
        }
        if matches!(self.nodes[id].body, Body::Directory(_)) {
            return Err(libc::EPERM);
        }
        self.nodes[id].nlink += 1;
        self.entries(place.parent).insert(place.name, id);
        Ok(Answer::Done)
    }

    fn stat(&self, id: Id) -> Answer {
        let node = &self.nodes[id];
        let (shape, size) = match &node.body {
            Body::File(bytes) => (Shape::File, bytes.len()),
            Body::Directory(_) => (Shape::Directory, 0),
            Body::Symlink(target) => (Shape::Symlink, target.len()),
            Body::Socket => (Shape::Socket, 0),
        };
        let mode = if id == ROOT { 0 } else { node.mode };
        let nlink = if shape == Shape::Directory { 0 } else { node.nlink };
        Answer::Stat { shape, mode, size: size as u64, nlink, owner: node.owner, modified: node.modified }
    }

    /// What takes attributes of users: not links, not special files.
    fn may_have_xattrs(&self, id: Id) -> bool {
        matches!(self.nodes[id].body, Body::File(_) | Body::Directory(_))
    }

    fn set_xattr(&mut self, path: &str, name: &'static str, value: &[u8], kind: XattrKind) -> Result<Answer, i32> {
        let id = self.find(path)?;
        if !self.may_have_xattrs(id) {
            return Err(libc::EPERM);
        }
        let xattrs = &mut self.nodes[id].xattrs;
        match (kind, xattrs.contains_key(name)) {
            (XattrKind::Create, true) => return Err(libc::EEXIST),
            (XattrKind::Replace, false) => return Err(libc::ENODATA),
            _ => xattrs.insert(name, value.to_vec()),
        };
        Ok(Answer::Done)
    }

    fn get_xattr(&self, path: &str, name: &str) -> Result<Answer, i32> {
        let id = self.find(path)?;
        self.nodes[id].xattrs.get(name).cloned().map(Answer::Bytes).ok_or(libc::ENODATA)
    }

    fn remove_xattr(&mut self, path: &str, name: &str) -> Result<Answer, i32> {
        let id = self.find(path)?;
        if !self.may_have_xattrs(id) {
            return Err(libc::EPERM);
        }
        self.nodes[id].xattrs.remove(name).map(|_| Answer::Done).ok_or(libc::ENODATA)
    }

    fn hold(&mut self, slot: usize, path: &str) -> Result<Answer, i32> {
        self.held[slot] = None;
        self.file(path, true)?;
        self.held[slot] = Some(self.find(path)?);
        Ok(Answer::Done)
    }

    fn held(&mut self, slot: usize) -> Result<&mut Node, i32> {
        let id = self.held[slot].ok_or(libc::EBADF)?;
        Ok(&mut self.nodes[id])
    }

    fn held_bytes(&mut self, slot: usize) -> Result<&mut Vec<u8>, i32> {
        match &mut self.held(slot)?.body {
            Body::File(bytes) => Ok(bytes),
            _ => unreachable!("only files are held"),
        }
    }

    fn chmod(&mut self, path: &str, mode: u32) -> Result<Answer, i32> {
        let id = self.find(path)?;
        if matches!(self.nodes[id].body, Body::Symlink(_)) {
            return Err(libc::EOPNOTSUPP);
        }
        self.nodes[id].mode = mode;
        Ok(Answer::Done)
    }
}

fn lies_below(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("test files are small")
}

fn part(bytes: &[u8], offset: u64, length: usize) -> &[u8] {
    let start = index(offset).min(bytes.len());
    &bytes[start..(start + length).min(bytes.len())]
}

fn lay_over(file: &mut Vec<u8>, start: usize, bytes: &[u8]) {
    if file.len() < start + bytes.len() {
        file.resize(start + bytes.len(), 0);
    }
    file[start..start + bytes.len()].copy_from_slice(bytes);
}

impl System for Memory {
    fn apply(&mut self, op: &Op) -> Result<Answer, i32> {
        match op {
            Op::Create { path, mode } => self.make(path, *mode, Body::File(Vec::new())),
            Op::Write { path, offset, length, seed } => self.write(path, Some(*offset), &payload(*seed, *length)),
            Op::Append { path, length, seed } => self.write(path, None, &payload(*seed, *length)),
            Op::Truncate { path, size } => {
                self.changed_file(path)?.resize(index(*size), 0);
                Ok(Answer::Done)
            }
            Op::Read { path, offset, length } => self.read(path, *offset, *length),
            Op::Punch { path, offset, length } => self.punch(path, *offset, *length),
            Op::Copy { from, from_offset, to, to_offset, length } => {
                self.copy((from, *from_offset), (to, *to_offset), *length)
            }
            Op::Fsync { path } => self.fsync(path),
            Op::Mkdir { path, mode } => self.make(path, *mode, Body::Directory(BTreeMap::new())),
            Op::Rmdir { path } => self.remove(path, true),
            Op::Unlink { path } => self.remove(path, false),
            Op::Rename { from, to, kind } => self.rename(from, to, *kind),
            Op::Link { from, to } => self.link(from, to),
            Op::Symlink { target, path } => self.make(path, 0o777, Body::Symlink(target.clone())),
            Op::Readlink { path } => match &self.nodes[self.find(path)?].body {
                Body::Symlink(target) => Ok(Answer::Target(target.clone())),
                _ => Err(libc::EINVAL),
            },
            Op::Chmod { path, mode } => self.chmod(path, *mode),
            Op::Chown { path, uid, gid } => {
                let id = self.find(path)?;
                self.nodes[id].owner = (*uid, *gid);
                Ok(Answer::Done)
            }
            Op::SetTime { path, time } => {
                let id = self.find(path)?;
                self.nodes[id].modified = Some(*time);
                Ok(Answer::Done)
            }
            Op::MakeSocket { path, mode } => self.make(path, *mode, Body::Socket),
            Op::Zero { path, offset, length, keeps } => self.zero(path, *offset, *length, *keeps),
            Op::SetXattr { path, name, value, kind } => self.set_xattr(path, name, value, *kind),
            Op::GetXattr { path, name } => self.get_xattr(path, name),
            Op::RemoveXattr { path, name } => self.remove_xattr(path, name),
            Op::ListXattrs { path } => {
                let id = self.find(path)?;
                Ok(Answer::Names(self.nodes[id].xattrs.keys().map(|name| (*name).to_owned()).collect()))
            }
            Op::Hold { slot, path } => self.hold(*slot, path),
            Op::HeldWrite { slot, offset, length, seed } => {
                lay_over(self.held_bytes(*slot)?, index(*offset), &payload(*seed, *length));
                self.held(*slot)?.modified = None;
                Ok(Answer::Count(*length as u64))
            }
            Op::HeldRead { slot, offset, length } => {
                Ok(Answer::Bytes(part(self.held_bytes(*slot)?, *offset, *length).to_vec()))
            }
            Op::HeldStat { slot } => {
                let id = self.held[*slot].ok_or(libc::EBADF)?;
                Ok(self.stat(id))
            }
            Op::Drop { slot } => {
                self.held[*slot] = None;
                Ok(Answer::Done)
            }
            Op::Stat { path } => Ok(self.stat(self.find(path)?)),
            Op::List { path } => {
                let id = self.find(path)?;
                match &self.nodes[id].body {
                    Body::Directory(entries) => Ok(Answer::Names(entries.keys().cloned().collect())),
                    _ => Err(libc::ENOTDIR),
                }
            }
        }
    }
}

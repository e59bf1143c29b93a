//! The model: directories, files and links in a few maps, with the errnos of Linux.

use std::collections::BTreeMap;

use super::{Answer, Op, RenameKind, Shape, System, payload};

type Id = usize;

const ROOT: Id = 0;

#[derive(Clone, Debug)]
enum Body {
    File(Vec<u8>),
    Directory(BTreeMap<String, Id>),
    Symlink(String),
}

#[derive(Clone, Debug)]
struct Node {
    body: Body,
    mode: u32,
    nlink: u32,
}

#[derive(Clone, Debug)]
pub struct Memory {
    nodes: Vec<Node>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { nodes: vec![Node { body: Body::Directory(BTreeMap::new()), mode: 0o755, nlink: 2 }] }
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
            Body::File(_) => Err(libc::ENOTDIR),
            // Links point nowhere in this world, and are followed within a path.
            Body::Symlink(_) => Err(libc::ENOENT),
        }
    }

    fn entries(&mut self, id: Id) -> &mut BTreeMap<String, Id> {
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
        self.nodes.push(Node { body, mode, nlink: 1 });
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
        }
    }

    fn write(&mut self, path: &str, offset: Option<u64>, bytes: &[u8]) -> Result<Answer, i32> {
        let file = self.file(path, true)?;
        let start = offset.map_or(file.len(), index);
        lay_over(file, start, bytes);
        Ok(Answer::Count(bytes.len() as u64))
    }

    fn read(&mut self, path: &str, offset: u64, length: usize) -> Result<Answer, i32> {
        Ok(Answer::Bytes(part(self.file(path, false)?, offset, length).to_vec()))
    }

    fn punch(&mut self, path: &str, offset: u64, length: u64) -> Result<Answer, i32> {
        let file = self.file(path, true)?;
        let end = index(offset + length).min(file.len());
        file[index(offset).min(end)..end].fill(0);
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
            lay_over(self.file(to.0, true)?, index(to.1), &bytes);
        }
        Ok(Answer::Count(bytes.len() as u64))
    }

    fn fsync(&mut self, path: &str) -> Result<Answer, i32> {
        match self.nodes[self.find(path)?].body {
            Body::Symlink(_) => Err(libc::ELOOP),
            _ => Ok(Answer::Done),
        }
    }

    fn remove(&mut self, path: &str, directory: bool) -> Result<Answer, i32> {
        let place = self.place(path)?;
        let id = place.found.ok_or(libc::ENOENT)?;
        match (&self.nodes[id].body, directory) {
            (Body::Directory(_), false) => return Err(libc::EISDIR),
            (Body::Directory(entries), true) if !entries.is_empty() => return Err(libc::ENOTEMPTY),
            (Body::File(_) | Body::Symlink(_), true) => return Err(libc::ENOTDIR),
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
        match &node.body {
            Body::File(bytes) => stat(Shape::File, node.mode, bytes.len(), node.nlink),
            Body::Directory(_) => stat(Shape::Directory, if id == ROOT { 0 } else { node.mode }, 0, 0),
            Body::Symlink(target) => stat(Shape::Symlink, 0o777, target.len(), node.nlink),
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

fn stat(shape: Shape, mode: u32, size: usize, nlink: u32) -> Answer {
    Answer::Stat { shape, mode, size: size as u64, nlink }
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
                self.file(path, true)?.resize(index(*size), 0);
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

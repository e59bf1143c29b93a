//! A directory of a real filesystem, through the system calls that programs use.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink},
    path::{Path, PathBuf},
};

use super::{Answer, Op, RECENT, RenameKind, SLOTS, Shape, System, XattrKind, payload};
use crate::sys;

#[derive(Debug)]
pub struct RealTree {
    root: PathBuf,
    held: [Option<File>; SLOTS],
}

impl RealTree {
    /// `root` is made, and must not exist yet.
    pub fn new(root: PathBuf) -> Self {
        fs::create_dir(&root).expect("make the root of the comparison");
        Self::seen_at(root)
    }

    /// The tree that another one made, seen from elsewhere: at `root`.
    pub fn seen_at(root: PathBuf) -> Self {
        Self { root, held: Default::default() }
    }

    /// Closes what is held open.
    pub fn drop_held(&mut self) {
        self.held = Default::default();
    }

    fn hold(&mut self, slot: usize, path: &str) -> io::Result<Answer> {
        self.held[slot] = None;
        self.held[slot] = Some(self.open(path, OpenOptions::new().read(true).write(true))?);
        Ok(Answer::Done)
    }

    fn held(&self, slot: usize) -> io::Result<&File> {
        self.held[slot].as_ref().ok_or(io::Error::from_raw_os_error(libc::EBADF))
    }

    fn at(&self, path: &str) -> PathBuf {
        if path.is_empty() { self.root.clone() } else { self.root.join(path) }
    }

    fn open(&self, path: &str, options: &mut OpenOptions) -> io::Result<File> {
        options.custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC).open(self.at(path))
    }

    fn writer(&self, path: &str) -> io::Result<File> {
        self.open(path, OpenOptions::new().write(true))
    }

    fn reader(&self, path: &str) -> io::Result<File> {
        self.open(path, OpenOptions::new().read(true))
    }

    fn create(&self, path: &str, mode: u32) -> io::Result<Answer> {
        let file = self.open(path, OpenOptions::new().write(true).create_new(true).mode(mode))?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        Ok(Answer::Done)
    }

    fn append(&self, path: &str, bytes: &[u8]) -> io::Result<Answer> {
        self.open(path, OpenOptions::new().append(true))?.write_all(bytes)?;
        Ok(Answer::Count(bytes.len() as u64))
    }

    fn read(&self, path: &str, offset: u64, length: usize) -> io::Result<Answer> {
        read(&self.reader(path)?, offset, length)
    }

    fn fallocate(&self, path: &str, mode: libc::c_int, offset: u64, length: u64) -> io::Result<Answer> {
        sys::fallocate(&self.writer(path)?, mode, offset.cast_signed(), length.cast_signed())?;
        Ok(Answer::Done)
    }

    fn copy(&self, from: (&str, u64), to: (&str, u64), length: usize) -> io::Result<Answer> {
        // The model looks at both names before it looks at what they are.
        let source = self.reader(from.0)?;
        if source.metadata()?.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        }
        let target = self.writer(to.0)?;
        // Within one file the copy makes more to copy: one call would not go on to that.
        let there = source.metadata()?.len().saturating_sub(from.1);
        let mut done = 0;
        while done < length {
            let (from_offset, to_offset) = (from.1 + done as u64, to.1 + done as u64);
            match sys::copy_range(&source, from_offset.cast_signed(), &target, to_offset.cast_signed(), length - done)?
            {
                0 => break,
                count => done += count,
            }
            if done as u64 >= there {
                break;
            }
        }
        Ok(Answer::Count(done as u64))
    }

    fn chmod(&self, path: &str, mode: u32) -> io::Result<Answer> {
        if fs::symlink_metadata(self.at(path))?.is_symlink() {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        fs::set_permissions(self.at(path), fs::Permissions::from_mode(mode))?;
        Ok(Answer::Done)
    }

    fn stat(&self, path: &str) -> io::Result<Answer> {
        Ok(stat(&fs::symlink_metadata(self.at(path))?, path.is_empty()))
    }

    fn list_xattrs(&self, path: &str) -> io::Result<Answer> {
        let names = sys::list_xattrs(&self.at(path))?;
        let names = names.split(|byte| *byte == 0).map(|name| String::from_utf8_lossy(name).into_owned());
        let mut names: Vec<String> = names.filter(|name| name.starts_with("user.")).collect();
        names.sort();
        Ok(Answer::Names(names))
    }

    fn make_socket(&self, path: &str, mode: u32) -> io::Result<Answer> {
        sys::mknod(&self.at(path), libc::S_IFSOCK | mode, 0)?;
        fs::set_permissions(self.at(path), fs::Permissions::from_mode(mode))?;
        Ok(Answer::Done)
    }

    fn list(&self, path: &str) -> io::Result<Answer> {
        let directory = self.at(path);
        if fs::symlink_metadata(&directory)?.is_symlink() {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(directory)? {
            names.push(entry?.file_name().into_string().expect("test names are UTF-8"));
        }
        names.sort();
        Ok(Answer::Names(names))
    }

    fn mkdir(&self, path: &str, mode: u32) -> io::Result<Answer> {
        fs::DirBuilder::new().mode(mode).create(self.at(path))?;
        fs::set_permissions(self.at(path), fs::Permissions::from_mode(mode))?;
        Ok(Answer::Done)
    }

    fn perform(&mut self, op: &Op) -> io::Result<Answer> {
        match op {
            Op::Create { path, mode } => self.create(path, *mode),
            Op::Write { path, offset, length, seed } => {
                self.writer(path)?.write_all_at(&payload(*seed, *length), *offset)?;
                Ok(Answer::Count(*length as u64))
            }
            Op::Append { path, length, seed } => self.append(path, &payload(*seed, *length)),
            Op::Truncate { path, size } => done(self.writer(path)?.set_len(*size)),
            Op::Read { path, offset, length } => self.read(path, *offset, *length),
            Op::Punch { path, offset, length } => {
                self.fallocate(path, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, *offset, *length)
            }
            Op::Zero { path, offset, length, keeps } => {
                let keep = if *keeps { libc::FALLOC_FL_KEEP_SIZE } else { 0 };
                self.fallocate(path, libc::FALLOC_FL_ZERO_RANGE | keep, *offset, *length)
            }
            Op::Copy { from, from_offset, to, to_offset, length } => {
                self.copy((from, *from_offset), (to, *to_offset), *length)
            }
            Op::Fsync { path } => done(self.reader(path)?.sync_all()),
            Op::Mkdir { path, mode } => self.mkdir(path, *mode),
            Op::Rmdir { path } => done(fs::remove_dir(self.at(path))),
            Op::Unlink { path } => done(fs::remove_file(self.at(path))),
            Op::Rename { from, to, kind } => done(sys::rename(&self.at(from), &self.at(to), flags(*kind))),
            Op::Link { from, to } => done(fs::hard_link(self.at(from), self.at(to))),
            Op::Symlink { target, path } => done(symlink(target, self.at(path))),
            Op::Readlink { path } => {
                let target = fs::read_link(self.at(path))?;
                Ok(Answer::Target(target.into_os_string().into_string().expect("test targets are UTF-8")))
            }
            Op::Chmod { path, mode } => self.chmod(path, *mode),
            Op::Chown { path, uid, gid } => done(lchown(self.at(path), Some(*uid), Some(*gid))),
            Op::SetTime { path, time } => done(sys::set_times(&self.at(path), *time, *time)),
            Op::MakeSocket { path, mode } => self.make_socket(path, *mode),
            Op::SetXattr { path, name, value, kind } => {
                done(sys::set_xattr(&self.at(path), name, value, xattr_flags(*kind)))
            }
            Op::GetXattr { path, name } => sys::get_xattr(&self.at(path), name).map(Answer::Bytes),
            Op::RemoveXattr { path, name } => done(sys::remove_xattr(&self.at(path), name)),
            Op::ListXattrs { path } => self.list_xattrs(path),
            Op::Hold { slot, path } => self.hold(*slot, path),
            Op::HeldWrite { slot, offset, length, seed } => {
                self.held(*slot)?.write_all_at(&payload(*seed, *length), *offset)?;
                Ok(Answer::Count(*length as u64))
            }
            Op::HeldRead { slot, offset, length } => read(self.held(*slot)?, *offset, *length),
            Op::HeldStat { slot } => Ok(stat(&self.held(*slot)?.metadata()?, false)),
            Op::Drop { slot } => {
                self.held[*slot] = None;
                Ok(Answer::Done)
            }
            Op::Stat { path } => self.stat(path),
            Op::List { path } => self.list(path),
        }
    }
}

fn stat(meta: &fs::Metadata, is_root: bool) -> Answer {
    let shape = match meta.file_type() {
        kind if kind.is_dir() => Shape::Directory,
        kind if kind.is_symlink() => Shape::Symlink,
        kind if kind.is_socket() => Shape::Socket,
        _ => Shape::File,
    };
    let mode = if is_root { 0 } else { meta.mode() & 0o7777 };
    let nlink = u32::try_from(meta.nlink()).expect("few links");
    let (size, nlink) = if shape == Shape::Directory { (0, 0) } else { (meta.len(), nlink) };
    let modified = Some((meta.mtime(), meta.mtime_nsec())).filter(|(seconds, _)| *seconds < RECENT);
    Answer::Stat { shape, mode, size, nlink, owner: (meta.uid(), meta.gid()), modified }
}

fn read(file: &File, offset: u64, length: usize) -> io::Result<Answer> {
    let (mut bytes, mut done) = (vec![0; length], 0);
    loop {
        match file.read_at(&mut bytes[done..], offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    bytes.truncate(done);
    Ok(Answer::Bytes(bytes))
}

fn xattr_flags(kind: XattrKind) -> libc::c_int {
    match kind {
        XattrKind::Set => 0,
        XattrKind::Create => libc::XATTR_CREATE,
        XattrKind::Replace => libc::XATTR_REPLACE,
    }
}

fn done(result: io::Result<()>) -> io::Result<Answer> {
    result.map(|()| Answer::Done)
}

fn flags(kind: RenameKind) -> libc::c_uint {
    match kind {
        RenameKind::Replace => 0,
        RenameKind::NoReplace => libc::RENAME_NOREPLACE,
        RenameKind::Exchange => libc::RENAME_EXCHANGE,
    }
}

impl System for RealTree {
    fn apply(&mut self, op: &Op) -> Result<Answer, i32> {
        self.perform(op).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// One directory on two mounts, used in turn, each time under one lock: as one mount must it be. Without a lock it is for what
/// close-to-open coherence promises.
#[derive(Debug)]
pub struct InTurn {
    sides: [(RealTree, Option<File>); 2],
    count: usize,
}

impl InTurn {
    /// The sides of the operations, over and over.
    const TURNS: [usize; 7] = [0, 1, 0, 0, 1, 1, 1];

    /// `name` is made below both `mounts`, which are of one cluster. The lock is a file beside it.
    pub fn new(mounts: [&Path; 2], name: &str) -> Self {
        let lock = |mount: &Path| {
            let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
            options.open(mount.join("lock")).expect("open the lock")
        };
        let first = (RealTree::new(mounts[0].join(name)), Some(lock(mounts[0])));
        let second = (RealTree::seen_at(mounts[1].join(name)), Some(lock(mounts[1])));
        Self { sides: [first, second], count: 0 }
    }

    /// `name` is there below both `mounts`.
    pub fn without_lock(mounts: [&Path; 2], name: &str) -> Self {
        Self { sides: mounts.map(|mount| (RealTree::seen_at(mount.join(name)), None)), count: 0 }
    }
}

impl System for InTurn {
    fn apply(&mut self, op: &Op) -> Result<Answer, i32> {
        // What is held open stays on its side.
        let side = match op {
            Op::Hold { slot, .. }
            | Op::HeldWrite { slot, .. }
            | Op::HeldRead { slot, .. }
            | Op::HeldStat { slot }
            | Op::Drop { slot } => slot % 2,
            _ => Self::TURNS[self.count % Self::TURNS.len()],
        };
        self.count += 1;
        let (tree, lock) = &mut self.sides[side];
        if let Some(lock) = lock {
            sys::flock(lock, libc::LOCK_EX).expect("lock");
        }
        let answer = tree.apply(op);
        if let Some(lock) = lock {
            sys::flock(lock, libc::LOCK_UN).expect("unlock");
        }
        answer
    }
}

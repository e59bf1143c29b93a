//! The filesystem called directly, where a kernel would be: it walks paths and makes the checks that a kernel makes.

use std::{
    path::Path,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use bytes::Bytes;
use holdfast_client::{
    fs::{AccessTimes, Caller, Duties, Errno, FileHandle, Fs, FsOptions, MakeRequest},
    remote::meta::MountName,
};
use holdfast_common::{
    Attr, Ino, Kind,
    clock::SystemClock,
    config::Relaying,
    mode::PERMISSIONS,
    net::{
        Endpoint,
        identity::{NodeName, Role},
        quic::{NetOptions, Node},
        tls::Credentials,
    },
    wire::meta::{RenameMode, SetAttr, SetTime, XattrMode},
};

use super::{Answer, Op, RECENT, RenameKind, SLOTS, Shape, System, Time, XattrKind, payload};

const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
/// No operation of a test may take longer.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes that a kernel asks for at once.
const READ_SIZE: u32 = 128 << 10;

type Result<T> = std::result::Result<T, Errno>;

/// A directory of a filesystem that no kernel has mounted.
#[derive(Clone, Debug)]
pub struct DirectTree {
    fs: Arc<Fs>,
    runtime: tokio::runtime::Handle,
    root: Ino,
    held: Held,
}

type Held = [Option<(Ino, FileHandle)>; SLOTS];

/// Where a name is, or would be.
struct Place {
    parent: Ino,
    name: Vec<u8>,
    found: Option<Attr>,
}

impl DirectTree {
    /// Connects as a mount does, to the metadata server at `meta`, with the credentials in `tls`.
    pub fn connect(meta: &str, tls: &Path) -> Self {
        let (sender, receiver) = mpsc::sync_channel(1);
        let (address, tls) = (meta.parse().expect("an address"), tls.to_owned());
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let handle = runtime.handle().clone();
            runtime.block_on(async move {
                let credentials = Credentials::load(&tls).expect("a client has credentials");
                let peers =
                    Node::bind(([127, 0, 0, 1], 0).into(), credentials, NetOptions::default()).expect("a free port");
                let server = Endpoint { address, name: NodeName { role: Role::Meta, id: 1 } };
                let name = MountName { host: "test".into(), mountpoint: "none".into() };
                let options = FsOptions {
                    cache_bytes: 32 << 20,
                    dirty_bytes: 32 << 20,
                    io_timeout: LIMIT,
                    connect_timeout: LIMIT,
                    relay: Relaying::Auto,
                    access_times: AccessTimes::default(),
                };
                let fs = Fs::connect(peers, server, name, options, Arc::new(SystemClock::default())).await;
                let fs = fs.unwrap_or_else(|error| panic!("connect to {address}: {error}"));
                sender.send((Arc::clone(&fs), handle)).expect("the test waits");
                Duties::run(fs).await;
            });
        });
        let (fs, runtime) = receiver.recv().expect("the connection is made");
        Self { fs, runtime, root: Ino::ROOT, held: Held::default() }
    }

    /// The same filesystem below a new directory of its root.
    pub fn below(&self, name: &str) -> Self {
        let request = MakeRequest { kind: Kind::Directory, mode: 0o755, rdev: 0, target: Vec::new() };
        let (fs, name) = (Arc::clone(&self.fs), name.to_owned());
        let made = self.wait(async move { fs.make(CALLER, Ino::ROOT, name.as_bytes(), request).await });
        Self { root: made.expect("make the root of the comparison").ino, held: Held::default(), ..self.clone() }
    }

    /// A file without a name in the root, with `content`; then it gets the name, if there is one.
    pub fn make_unnamed(&self, content: &'static [u8], name: Option<&str>) -> Result<Ino> {
        let (this, name) = (self.clone(), name.map(str::to_owned));
        self.wait(async move {
            let (attr, opened) = this.fs.create_unnamed(CALLER, this.root, 0o600, libc::O_RDWR).await?;
            this.fs.write(CALLER, attr.ino, opened.handle, 0, Bytes::from_static(content)).await?;
            this.fs.fsync(attr.ino, opened.handle, false).await?;
            if let Some(name) = name {
                this.fs.link(attr.ino, this.root, name.as_bytes()).await?;
            }
            this.close(attr.ino, opened.handle).await?;
            Ok(attr.ino)
        })
    }

    fn wait<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.runtime.spawn(async move { sender.send(future.await) });
        receiver.recv_timeout(LIMIT).expect("an operation ends in time")
    }

    async fn place(&self, path: &str) -> Result<Place> {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let mut parent = self.root;
        for step in directory.split('/').filter(|step| !step.is_empty()) {
            let attr = self.fs.lookup(parent, step.as_bytes()).await?.attr;
            match attr.kind {
                Kind::Directory => parent = attr.ino,
                // Links point nowhere in this world.
                Kind::Symlink => return Err(Errno(libc::ENOENT)),
                _ => return Err(Errno(libc::ENOTDIR)),
            }
        }
        let found = match self.fs.lookup(parent, name.as_bytes()).await {
            Ok(found) => Some(found.attr),
            Err(Errno(libc::ENOENT)) => None,
            Err(error) => return Err(error),
        };
        Ok(Place { parent, name: name.into(), found })
    }

    async fn find(&self, path: &str) -> Result<Attr> {
        match path {
            "" => self.fs.getattr(self.root).await,
            _ => self.place(path).await?.found.ok_or(Errno(libc::ENOENT)),
        }
    }

    async fn free(&self, path: &str) -> Result<Place> {
        let place = self.place(path).await?;
        if place.found.is_some() { Err(Errno(libc::EEXIST)) } else { Ok(place) }
    }

    async fn file(&self, path: &str) -> Result<Attr> {
        let attr = self.find(path).await?;
        match attr.kind {
            Kind::Directory => Err(Errno(libc::EISDIR)),
            Kind::Symlink => Err(Errno(libc::ELOOP)),
            Kind::Socket => Err(Errno(libc::ENXIO)),
            _ => Ok(attr),
        }
    }

    async fn hold(&mut self, slot: usize, path: &str) -> Result<Answer> {
        self.drop_held(slot).await?;
        let attr = self.file(path).await?;
        let handle = self.fs.open(CALLER, attr.ino, libc::O_RDWR).await?.handle;
        self.held[slot] = Some((attr.ino, handle));
        Ok(Answer::Done)
    }

    async fn drop_held(&mut self, slot: usize) -> Result<Answer> {
        if let Some((ino, handle)) = self.held[slot].take() {
            self.close(ino, handle).await?;
        }
        Ok(Answer::Done)
    }

    fn held(&self, slot: usize) -> Result<(Ino, FileHandle)> {
        self.held[slot].ok_or(Errno(libc::EBADF))
    }

    /// Links and special files have no attributes of users, which the kernel knows.
    async fn with_xattrs(&self, path: &str, otherwise: i32) -> Result<Attr> {
        let attr = self.find(path).await?;
        if matches!(attr.kind, Kind::File | Kind::Directory) { Ok(attr) } else { Err(Errno(otherwise)) }
    }

    async fn set_xattr(&self, path: &str, name: &str, value: &[u8], kind: XattrKind) -> Result<Answer> {
        let attr = self.with_xattrs(path, libc::EPERM).await?;
        let mode = match kind {
            XattrKind::Set => XattrMode::Set,
            XattrKind::Create => XattrMode::Create,
            XattrKind::Replace => XattrMode::Replace,
        };
        self.fs.setxattr(attr.ino, name.as_bytes(), value, mode).await?;
        Ok(Answer::Done)
    }

    async fn list_xattrs(&self, path: &str) -> Result<Answer> {
        let attr = self.find(path).await?;
        let names = self.fs.listxattr(attr.ino).await?;
        let mut names: Vec<String> =
            names.into_iter().map(|name| String::from_utf8(name).expect("test names are UTF-8")).collect();
        names.sort();
        Ok(Answer::Names(names))
    }

    async fn close(&self, ino: Ino, handle: FileHandle) -> Result<()> {
        let flushed = self.fs.flush(ino, handle, 0).await;
        self.fs.release(ino, handle).await;
        flushed
    }

    async fn create(&self, path: &str, mode: u32) -> Result<Answer> {
        let place = self.free(path).await?;
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY;
        let (attr, opened) = self.fs.create(CALLER, place.parent, &place.name, mode, flags).await?;
        self.close(attr.ino, opened.handle).await?;
        Ok(Answer::Done)
    }

    async fn write(&self, path: &str, offset: Option<u64>, data: Vec<u8>) -> Result<Answer> {
        let attr = self.file(path).await?;
        let flags = libc::O_WRONLY | if offset.is_none() { libc::O_APPEND } else { 0 };
        let handle = self.fs.open(CALLER, attr.ino, flags).await?.handle;
        let offset = offset.unwrap_or(self.fs.getattr(attr.ino).await?.size);
        let length = data.len() as u64;
        let written = self.fs.write(CALLER, attr.ino, handle, offset, Bytes::from(data)).await;
        self.close(attr.ino, handle).await?;
        written.map(|()| Answer::Count(length))
    }

    async fn read(&self, path: &str, offset: u64, length: usize) -> Result<Answer> {
        let ino = self.file(path).await?.ino;
        let handle = self.fs.open(CALLER, ino, libc::O_RDONLY).await?.handle;
        let bytes = self.read_open(ino, handle, offset, length).await?;
        self.close(ino, handle).await?;
        Ok(Answer::Bytes(bytes))
    }

    async fn read_open(&self, ino: Ino, handle: FileHandle, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let size = u32::try_from(length - bytes.len()).unwrap_or(READ_SIZE).min(READ_SIZE);
            let part = self.fs.read(ino, handle, offset + bytes.len() as u64, size).await?;
            bytes.extend_from_slice(&part);
            if part.len() < size as usize {
                break;
            }
        }
        Ok(bytes)
    }

    async fn fallocate(&self, path: &str, mode: i32, offset: u64, length: u64) -> Result<Answer> {
        let ino = self.file(path).await?.ino;
        let handle = self.fs.open(CALLER, ino, libc::O_WRONLY).await?.handle;
        let punched = self.fs.fallocate(ino, handle, offset, length, mode).await;
        self.close(ino, handle).await?;
        punched.map(|()| Answer::Done)
    }

    /// With what the kernel checks: no more than there is, and no overlap within one file.
    async fn copy(&self, from: (&str, u64), to: (&str, u64), length: u64) -> Result<Answer> {
        let source = self.file(from.0).await?;
        let target = self.file(to.0).await?;
        let count = length.min(source.size.saturating_sub(from.1));
        if source.ino == target.ino && from.1 < to.1 + count && to.1 < from.1 + count {
            return Err(Errno(libc::EINVAL));
        }
        let mut done = 0;
        while done < count {
            let (from_offset, to_offset) = (from.1 + done, to.1 + done);
            match self.fs.copy_file_range(source.ino, from_offset, target.ino, to_offset, count - done).await? {
                0 => break,
                copied => done += copied,
            }
        }
        Ok(Answer::Count(done))
    }

    async fn fsync(&self, path: &str) -> Result<Answer> {
        let attr = self.find(path).await?;
        match attr.kind {
            Kind::Symlink => return Err(Errno(libc::ELOOP)),
            Kind::Socket => return Err(Errno(libc::ENXIO)),
            Kind::Directory => self.fs.fsyncdir(attr.ino).await?,
            _ => {
                let handle = self.fs.open(CALLER, attr.ino, libc::O_RDONLY).await?.handle;
                self.fs.fsync(attr.ino, handle, false).await?;
                self.close(attr.ino, handle).await?;
            }
        }
        Ok(Answer::Done)
    }

    async fn make(&self, path: &str, kind: Kind, mode: u32, target: &str) -> Result<Answer> {
        let place = self.free(path).await?;
        let request = MakeRequest { kind, mode, rdev: 0, target: target.into() };
        self.fs.make(CALLER, place.parent, &place.name, request).await?;
        Ok(Answer::Done)
    }

    async fn remove(&self, path: &str, directory: bool) -> Result<Answer> {
        let place = self.place(path).await?;
        let attr = place.found.ok_or(Errno(libc::ENOENT))?;
        match (attr.kind == Kind::Directory, directory) {
            (true, false) => return Err(Errno(libc::EISDIR)),
            (false, true) => return Err(Errno(libc::ENOTDIR)),
            (true, true) => self.fs.rmdir(place.parent, &place.name).await?,
            (false, false) => self.fs.unlink(place.parent, &place.name).await?,
        }
        Ok(Answer::Done)
    }

    async fn rename(&self, from: &str, to: &str, kind: RenameKind) -> Result<Answer> {
        let (old, new) = (self.place(from).await?, self.place(to).await?);
        let moved = old.found.ok_or(Errno(libc::ENOENT))?;
        let below =
            |path: &str, directory: &str| path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'));
        match (kind, new.found) {
            (RenameKind::NoReplace, Some(_)) => return Err(Errno(libc::EEXIST)),
            (RenameKind::Exchange, None) => return Err(Errno(libc::ENOENT)),
            _ if below(to, from) => return Err(Errno(libc::EINVAL)),
            (RenameKind::Exchange, _) if below(from, to) => return Err(Errno(libc::EINVAL)),
            _ if below(from, to) => return Err(Errno(libc::ENOTEMPTY)),
            (_, Some(target)) if target.ino == moved.ino => return Ok(Answer::Done),
            _ => {}
        }
        let mode = match kind {
            RenameKind::Replace => RenameMode::Replace,
            RenameKind::NoReplace => RenameMode::NoReplace,
            RenameKind::Exchange => RenameMode::Exchange,
        };
        self.fs.rename(old.parent, &old.name, new.parent, &new.name, mode).await?;
        Ok(Answer::Done)
    }

    async fn link(&self, from: &str, to: &str) -> Result<Answer> {
        let attr = self.find(from).await?;
        let place = self.free(to).await?;
        if attr.kind == Kind::Directory {
            return Err(Errno(libc::EPERM));
        }
        self.fs.link(attr.ino, place.parent, &place.name).await?;
        Ok(Answer::Done)
    }

    async fn readlink(&self, path: &str) -> Result<Answer> {
        let attr = self.find(path).await?;
        if attr.kind != Kind::Symlink {
            return Err(Errno(libc::EINVAL));
        }
        let target = self.fs.readlink(attr.ino).await?;
        Ok(Answer::Target(String::from_utf8(target).expect("test targets are UTF-8")))
    }

    async fn set(&self, attr: Attr, set: SetAttr) -> Result<Answer> {
        self.fs.setattr(CALLER, attr.ino, set).await?;
        Ok(Answer::Done)
    }

    async fn chmod(&self, path: &str, mode: u32) -> Result<Answer> {
        let attr = self.find(path).await?;
        if attr.kind == Kind::Symlink {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        self.set(attr, SetAttr { mode: Some(mode), ..SetAttr::default() }).await
    }

    async fn stat(&self, path: &str) -> Result<Answer> {
        let found = self.find(path).await?;
        Ok(stat(&self.fs.getattr(found.ino).await?, path.is_empty()))
    }

    async fn list(&self, path: &str) -> Result<Answer> {
        let attr = self.find(path).await?;
        if attr.kind != Kind::Directory {
            return Err(Errno(libc::ENOTDIR));
        }
        let handle = self.fs.opendir(attr.ino).await?.handle;
        let (mut names, mut cookie) = (Vec::new(), 0);
        loop {
            let page = self.fs.readdir(attr.ino, handle, cookie, false).await?;
            cookie = page.entries.last().map_or(cookie, |entry| entry.cookie);
            names.extend(page.entries.into_iter().map(|entry| String::from_utf8(entry.name).expect("UTF-8")));
            if page.end {
                break;
            }
        }
        self.fs.releasedir(attr.ino, handle);
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(Answer::Names(names))
    }

    async fn perform(&mut self, op: Op) -> Result<Answer> {
        match op {
            Op::Create { path, mode } => self.create(&path, mode).await,
            Op::Write { path, offset, length, seed } => self.write(&path, Some(offset), payload(seed, length)).await,
            Op::Append { path, length, seed } => self.write(&path, None, payload(seed, length)).await,
            Op::Truncate { path, size } => {
                self.set(self.file(&path).await?, SetAttr { size: Some(size), ..SetAttr::default() }).await
            }
            Op::Read { path, offset, length } => self.read(&path, offset, length).await,
            Op::Punch { path, offset, length } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                self.fallocate(&path, mode, offset, length).await
            }
            Op::Zero { path, offset, length, keeps } => {
                let keep = if keeps { libc::FALLOC_FL_KEEP_SIZE } else { 0 };
                self.fallocate(&path, libc::FALLOC_FL_ZERO_RANGE | keep, offset, length).await
            }
            Op::Copy { from, from_offset, to, to_offset, length } => {
                self.copy((&from, from_offset), (&to, to_offset), length as u64).await
            }
            Op::Fsync { path } => self.fsync(&path).await,
            Op::Mkdir { path, mode } => self.make(&path, Kind::Directory, mode, "").await,
            Op::Rmdir { path } => self.remove(&path, true).await,
            Op::Unlink { path } => self.remove(&path, false).await,
            Op::Rename { from, to, kind } => self.rename(&from, &to, kind).await,
            Op::Link { from, to } => self.link(&from, &to).await,
            Op::Symlink { target, path } => self.make(&path, Kind::Symlink, 0o777, &target).await,
            Op::Readlink { path } => self.readlink(&path).await,
            Op::Chmod { path, mode } => self.chmod(&path, mode).await,
            Op::Chown { path, uid, gid } => {
                let set = SetAttr { uid: Some(uid), gid: Some(gid), ..SetAttr::default() };
                self.set(self.find(&path).await?, set).await
            }
            Op::SetTime { path, time } => {
                let set = SetAttr { mtime: Some(SetTime::At(wire_time(time))), ..SetAttr::default() };
                self.set(self.find(&path).await?, set).await
            }
            Op::MakeSocket { path, mode } => self.make(&path, Kind::Socket, mode, "").await,
            Op::SetXattr { path, name, value, kind } => self.set_xattr(&path, name, &value, kind).await,
            Op::GetXattr { path, name } => {
                let attr = self.with_xattrs(&path, libc::ENODATA).await?;
                self.fs.getxattr(attr.ino, name.as_bytes()).await.map(Answer::Bytes)
            }
            Op::RemoveXattr { path, name } => {
                let attr = self.with_xattrs(&path, libc::EPERM).await?;
                self.fs.removexattr(attr.ino, name.as_bytes()).await?;
                Ok(Answer::Done)
            }
            Op::ListXattrs { path } => self.list_xattrs(&path).await,
            Op::Hold { slot, path } => self.hold(slot, &path).await,
            Op::HeldWrite { slot, offset, length, seed } => {
                let (ino, handle) = self.held(slot)?;
                self.fs.write(CALLER, ino, handle, offset, Bytes::from(payload(seed, length))).await?;
                Ok(Answer::Count(length as u64))
            }
            Op::HeldRead { slot, offset, length } => {
                let (ino, handle) = self.held(slot)?;
                self.read_open(ino, handle, offset, length).await.map(Answer::Bytes)
            }
            Op::HeldStat { slot } => Ok(stat(&self.fs.getattr(self.held(slot)?.0).await?, false)),
            Op::Drop { slot } => self.drop_held(slot).await,
            Op::Stat { path } => self.stat(&path).await,
            Op::List { path } => self.list(&path).await,
        }
    }
}

fn stat(attr: &Attr, is_root: bool) -> Answer {
    let shape = match attr.kind {
        Kind::Directory => Shape::Directory,
        Kind::Symlink => Shape::Symlink,
        Kind::Socket => Shape::Socket,
        _ => Shape::File,
    };
    let mode = if is_root { 0 } else { attr.mode & PERMISSIONS };
    let (size, nlink) = if shape == Shape::Directory { (0, 0) } else { (attr.size, attr.nlink) };
    let modified = Some((attr.mtime.secs, i64::from(attr.mtime.nanos))).filter(|(seconds, _)| *seconds < RECENT);
    Answer::Stat { shape, mode, size, nlink, owner: (attr.uid, attr.gid), modified }
}

fn wire_time((secs, nanos): Time) -> holdfast_common::Time {
    holdfast_common::Time { secs, nanos: u32::try_from(nanos).expect("nanoseconds") }
}

impl System for DirectTree {
    fn apply(&mut self, op: &Op) -> std::result::Result<Answer, i32> {
        let (mut this, op) = (self.clone(), op.clone());
        let (held, answer) = self.wait(async move {
            let answer = this.perform(op).await;
            (this.held, answer)
        });
        self.held = held;
        answer.map_err(|Errno(code)| code)
    }
}

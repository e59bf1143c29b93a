//! The kernel against a metadata server of three entries: what a mount is before anything is stored in it.

use std::{
    ffi::CString,
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
    sync::{Arc, mpsc},
    time::Duration,
};

use holdfast_common::{
    Attr, DirEntry, Ino, Kind, Position, Refusal, SessionId, Time,
    clock::SystemClock,
    cluster::ClusterMap,
    config::Relaying,
    net::{
        BoxFuture, CallError, Endpoint, Frame, Peers,
        identity::{NodeName, Role},
    },
    wire::{
        codec::{decode, encode},
        meta::{MetaAnswer, MetaReply, MetaRequest, Query, SessionRequest, StatFs},
    },
};

use super::{KernelSession, MountFlags, MountPlan};
use crate::{
    fs::{Fs, FsOptions},
    mount::{runtime::NetworkThread, table},
    remote::meta::MountName,
    sys::Unmount,
};

const IO_TIMEOUT: Duration = Duration::from_secs(5);
const LINK_TARGET: &[u8] = b"../some\xffwhere";

/// A root with a directory `sub` and a symbolic link `link`.
struct ThreeEntries;

fn attr(ino: u64, kind: Kind, size: u64) -> Attr {
    let time = Time { secs: -2, nanos: 800_000_000 };
    let times = Attr { atime: time, mtime: time, ctime: time, btime: time, ..Attr::example(ino, kind) };
    Attr { uid: 7, gid: 8, nlink: 2, size, stored: 1000, data_version: 1, ..times }
}

fn child(name: &[u8]) -> Option<(u64, Attr)> {
    match name {
        b"sub" => Some((1, attr(2, Kind::Directory, 0))),
        b"link" => Some((2, attr(3, Kind::Symlink, LINK_TARGET.len() as u64))),
        _ => None,
    }
}

fn directory(plus: bool) -> MetaAnswer {
    let entry = |name: &[u8]| {
        let (cookie, attr) = child(name)?;
        Some(DirEntry { cookie, name: name.to_vec(), ino: attr.ino, kind: attr.kind, attr: plus.then_some(attr) })
    };
    let entries = [&b"sub"[..], b"link"].into_iter().filter_map(entry).collect();
    MetaAnswer::Directory { entries, end: true, parent: Some(Ino::ROOT), version: 1 }
}

fn query(query: Query) -> Result<MetaAnswer, Refusal> {
    match query {
        Query::GetAttr { ino } if ino == Ino::ROOT => Ok(MetaAnswer::Attr(attr(1, Kind::Directory, 0))),
        Query::GetAttr { ino: Ino(2) } => Ok(MetaAnswer::Attr(attr(2, Kind::Directory, 0))),
        Query::Lookup { parent, name } if parent == Ino::ROOT => {
            child(&name).map(|(_, attr)| MetaAnswer::Attr(attr)).ok_or(Refusal::NotFound)
        }
        Query::ReadLink { ino: Ino(3) } => Ok(MetaAnswer::Link(LINK_TARGET.to_vec())),
        Query::ReadDir { ino, cookie: 0, plus, .. } if ino == Ino::ROOT => Ok(directory(plus)),
        Query::ReadDir { .. } => {
            Ok(MetaAnswer::Directory { entries: Vec::new(), end: true, parent: Some(Ino::ROOT), version: 1 })
        }
        Query::StatFs => {
            Ok(MetaAnswer::StatFs(StatFs { capacity_bytes: 4096 * 1000, free_bytes: 4096 * 600, inodes: 3 }))
        }
        Query::GetXattr { name, .. } if name == b"user.colour" => Ok(MetaAnswer::Bytes(b"blue".to_vec())),
        Query::ListXattr { .. } => Ok(MetaAnswer::Names(vec![b"user.colour".to_vec()])),
        Query::ClusterMap { .. } => Ok(MetaAnswer::ClusterMap(ClusterMap::default())),
        _ => Err(Refusal::NotFound),
    }
}

fn answer(request: MetaRequest) -> Result<MetaAnswer, Refusal> {
    match request {
        MetaRequest::Session(SessionRequest::Open { .. }) => {
            Ok(MetaAnswer::Session { session: SessionId(1), renew_every_ms: 1000 })
        }
        MetaRequest::Query { query: asked, .. } => query(asked),
        MetaRequest::Mutate { .. } => Err(Refusal::NoSpace),
        _ => Ok(MetaAnswer::Done),
    }
}

impl Peers for ThreeEntries {
    fn call(&self, to: Endpoint, request: Frame, _deadline: Duration) -> BoxFuture<'_, Result<Frame, CallError>> {
        Box::pin(async move {
            let malformed =
                |error: holdfast_common::wire::codec::CodecError| CallError::Malformed(to.address, error.to_string());
            let result = answer(decode(&request.header).map_err(malformed)?);
            let reply = MetaReply {
                server_instance: 1,
                map_version: 0,
                durable_through: Position(0),
                epoch: holdfast_common::Epoch(0),
                result,
            };
            Ok(Frame { header: encode(&reply).map_err(malformed)?, payload: Vec::new() })
        })
    }
}

fn plan(mountpoint: &Path) -> MountPlan {
    let flags = MountFlags {
        read_only: false,
        suid: true,
        dev: false,
        exec: true,
        atime: false,
        synchronous: false,
        directories_synchronous: false,
    };
    let mountpoint = mountpoint.canonicalize().unwrap();
    MountPlan { source: "three entries".to_owned(), mountpoint, flags, allow_other: true, io_timeout: IO_TIMEOUT }
}

async fn connect(mountpoint: String) -> Arc<Fs> {
    let server = Endpoint { address: ([127, 0, 0, 1], 1).into(), name: NodeName { role: Role::Meta, id: 1 } };
    let name = MountName { host: "test".to_owned(), mountpoint };
    let options = FsOptions {
        cache_bytes: 8 << 20,
        dirty_bytes: 8 << 20,
        io_timeout: IO_TIMEOUT,
        connect_timeout: IO_TIMEOUT,
        relay: Relaying::default(),
        access_times: crate::fs::AccessTimes::default(),
    };
    Fs::connect(Arc::new(ThreeEntries), server, name, options, Arc::new(SystemClock::default())).await.unwrap()
}

/// Unmounts also when a test fails, so that nothing is left behind.
struct Guard<'a>(&'a KernelSession);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        drop(self.0.unmount(Unmount::Lazy));
    }
}

/// Mounts, lets `use_it` use the mount, unmounts, and waits for the end of the session.
fn mounted(use_it: impl FnOnce(&Path)) {
    let directory = tempfile::tempdir().unwrap();
    let network = NetworkThread::start().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let fs = network.wait(connect(place.display().to_string())).unwrap();
    let (ended, end) = mpsc::channel();
    let session =
        KernelSession::start(fs, network.handle(), &plan(&place), move |result| ended.send(result).unwrap()).unwrap();
    let guard = Guard(&session);
    session.prove().unwrap();
    use_it(&place);
    session.unmount(Unmount::WhenIdle).unwrap();
    end.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
    std::mem::forget(guard);
    assert!(!table::is_ours(&place));
}

/// Mounting needs root and the device: without them there is no kernel to test against.
fn kernel_is_here() -> bool {
    crate::sys::effective_uid() == 0 && super::check_device().is_ok()
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn the_kernel_sees_names_attributes_and_links() {
    if !kernel_is_here() {
        return;
    }
    mounted(|root| {
        let ours = table::our_mounts().unwrap();
        assert!(ours.iter().any(|mount| mount.source == "three entries" && mount.mountpoint == root), "{ours:?}");

        let mut names: Vec<_> = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["link", "sub"]);
        assert_eq!(fs::read_dir(root.join("sub")).unwrap().count(), 0);

        let sub = fs::symlink_metadata(root.join("sub")).unwrap();
        assert!(sub.is_dir());
        assert_eq!((sub.ino(), sub.uid(), sub.gid(), sub.blocks(), sub.blksize()), (2, 7, 8, 2, 128 << 10));
        assert_eq!((sub.mtime(), sub.mtime_nsec()), (-2, 800_000_000));
        assert_eq!(fs::read_link(root.join("link")).unwrap().as_os_str().as_bytes(), LINK_TARGET);
        assert_eq!(errno(fs::metadata(root.join("none"))), Some(libc::ENOENT));
    });
}

#[test]
fn a_refused_change_is_the_errno_that_the_program_gets() {
    if !kernel_is_here() {
        return;
    }
    mounted(|root| {
        assert_eq!(errno(fs::create_dir(root.join("new"))), Some(libc::ENOSPC));
        assert_eq!(errno(fs::write(root.join("new"), "x")), Some(libc::ENOSPC));
        assert_eq!(errno(std::os::unix::fs::symlink("x", root.join("new"))), Some(libc::ENOSPC));
        assert_eq!(errno(fs::remove_dir(root.join("sub"))), Some(libc::ENOSPC));
        assert_eq!(errno(fs::rename(root.join("sub"), root.join("other"))), Some(libc::ENOSPC));
    });
}

#[test]
fn room_and_extended_attributes_are_told_as_they_are() {
    if !kernel_is_here() {
        return;
    }
    mounted(|root| {
        let output =
            std::process::Command::new("stat").args(["-f", "-c", "%S %b %f %a %c %d %l"]).arg(root).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "4096 1000 600 600 603 600 255\n");

        assert_eq!(xattr(root, "user.colour", 64), Ok(b"blue".to_vec()));
        assert_eq!(xattr(root, "user.colour", 0), Ok(vec![0; 4]), "a buffer of size zero asks for the size");
        assert_eq!(xattr(root, "user.colour", 3), Err(libc::ERANGE));
        assert_eq!(xattr(root, "user.none", 64).unwrap_err(), libc::ENOENT);
        assert_eq!(xattr(root, "security.capability", 64), Err(libc::ENODATA));
    });
}

/// `room` 0: as many zeroes as the value has bytes.
#[allow(unsafe_code, reason = "the standard library has no word for extended attributes")]
fn xattr(path: &Path, name: &str, room: usize) -> Result<Vec<u8>, i32> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let name = CString::new(name).unwrap();
    let mut value = vec![0_u8; room];
    // SAFETY: two C strings and a buffer of `room` bytes, all alive for the call.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), room) };
    match usize::try_from(length) {
        Ok(length) => {
            value.resize(length, 0);
            Ok(value)
        }
        Err(_) => Err(std::io::Error::last_os_error().raw_os_error().unwrap()),
    }
}

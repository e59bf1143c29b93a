//! A mount that stays alive: while every server loses its power it loses nothing, fsynced or not (I3); while much is written it does not keep those waiting who write little.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use holdfast_client::{
    fs::{AccessTimes, Caller, Duties, Errno, FileHandle, Fs, FsOptions, FsResult, MakeRequest},
    remote::meta::MountName,
};
use holdfast_common::{
    Attr, BlockHash, Ino, Kind, Refusal, ServerId,
    clock::SystemClock,
    config::Relaying,
    net::{CallError, Endpoint, Frame, Peers, identity::Role},
    wire::codec::{decode, encode},
    wire::meta::AdminRequest,
    wire::meta::MetaAnswer,
    wire::meta::MetaRequest,
    wire::storage::{StorageAnswer, StorageReply, StorageRequest},
};
use holdfast_tests::{fault::random_bytes, sim_disk::SimDisk};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::node::{Life, Network, STORAGE_SERVERS, run};

const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
const PATIENCE: Duration = Duration::from_secs(40);

/// A mount, until it is dropped.
struct Mount {
    fs: Arc<Fs>,
    duties: tokio::task::JoinHandle<()>,
}

impl std::ops::Deref for Mount {
    type Target = Fs;
    fn deref(&self) -> &Fs {
        &self.fs
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.duties.abort();
    }
}

async fn mount(network: &Network, id: u32) -> Mount {
    mount_through(network.of_client(id), id, 8 << 20).await
}

async fn mount_through(peers: Arc<dyn Peers>, id: u32, dirty_bytes: u64) -> Mount {
    mount_that_relays(Relaying::Never, peers, id, dirty_bytes).await
}

async fn mount_that_relays(relay: Relaying, peers: Arc<dyn Peers>, id: u32, dirty_bytes: u64) -> Mount {
    let options = FsOptions {
        cache_bytes: 8 << 20,
        dirty_bytes,
        io_timeout: PATIENCE,
        connect_timeout: Duration::from_secs(10),
        relay,
        access_times: AccessTimes::default(),
    };
    let name = MountName { host: "sim".into(), mountpoint: format!("/mnt-{id}") };
    let clock = Arc::new(SystemClock::default());
    let fs = Fs::connect(peers, Network::meta(), name, options, clock).await.expect("a session");
    let duties = tokio::spawn(Duties::run(Arc::clone(&fs)));
    Mount { fs, duties }
}

async fn create(fs: &Fs, parent: Ino, name: &str) -> (Attr, FileHandle) {
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
    let (attr, opened) = fs.create(CALLER, parent, name.as_bytes(), 0o644, flags).await.expect("create");
    (attr, opened.handle)
}

/// Makes a file that everybody sees; nothing is fsynced.
async fn write_file(fs: &Fs, parent: Ino, name: &str, content: &[u8]) -> Attr {
    let (attr, handle) = create(fs, parent, name).await;
    fs.write(CALLER, attr.ino, handle, 0, Bytes::copy_from_slice(content)).await.expect("write");
    fs.flush(attr.ino, handle, 0).await.expect("close");
    fs.release(attr.ino, handle).await;
    attr
}

async fn read_file(fs: &Fs, parent: Ino, name: &str) -> FsResult<Bytes> {
    let attr = fs.lookup(parent, name.as_bytes()).await?.attr;
    let opened = fs.open(CALLER, attr.ino, libc::O_RDONLY).await?;
    let bytes = fs.read(attr.ino, opened.handle, 0, 1 << 20).await;
    fs.release(attr.ino, opened.handle).await;
    bytes
}

async fn assert_reads(fs: &Fs, parent: Ino, name: &str, content: &[u8], when: &str) {
    match read_file(fs, parent, name).await {
        Ok(bytes) => assert!(bytes == content, "{when}: {name} has other bytes"),
        Err(Errno(errno)) => panic!("{when}: {name} cannot be read: errno {errno}"),
    }
}

async fn violations(life: &Life) -> Vec<String> {
    match life.meta(MetaRequest::Admin(AdminRequest::Check)).await {
        Some(Ok(MetaAnswer::Violations(found))) => found,
        other => panic!("the check was answered with {other:?}"),
    }
}

/// Which disks lose what they had not synced; the processes of all die.
fn after(disks: &[SimDisk], meta: bool, storage: bool, seed: u64) -> Vec<SimDisk> {
    let cut = |n: usize| if n == 0 { meta } else { storage };
    let numbered = disks.iter().enumerate();
    numbered.map(|(n, disk)| if cut(n) { disk.after_power_cut(seed + n as u64) } else { disk.after_kill() }).collect()
}

/// Two mounts work in one tree, every server dies, and both go on.
async fn check(meta: bool, storage: bool, seed: u64) {
    let when = format!("power cut of the metadata server: {meta}, of the storage servers: {storage}, seed {seed}");
    let network = Network::default();
    let disks = SimDisk::rack(1 + STORAGE_SERVERS.count());
    let life = Life::start_on(disks.clone(), network.clone()).await.expect("a start");
    let (a, b) = (mount(&network, 1).await, mount(&network, 2).await);
    let contents: Vec<Vec<u8>> =
        (0..4).zip([3000, 23_000, 43_000, 63_000]).map(|(n, length)| random_bytes(seed * 10 + n, length)).collect();
    let request = MakeRequest { kind: Kind::Directory, mode: 0o755, rdev: 0, target: Vec::new() };
    let directory = a.make(CALLER, Ino::ROOT, b"d", request).await.expect("mkdir").ino;
    let first = write_file(&b, directory, "from-b", &contents[0]).await;
    write_file(&a, directory, "from-a", &contents[1]).await;
    a.rename(directory, b"from-b", directory, b"renamed", holdfast_common::wire::meta::RenameMode::Replace)
        .await
        .expect("rename");
    // Open, written, committed and dirty, and unlinked by the other mount.
    let (open, handle) = create(&a, directory, "open").await;
    a.write(CALLER, open.ino, handle, 0, Bytes::from(contents[2].clone())).await.expect("write");
    a.flush(open.ino, handle, 0).await.expect("flush");
    a.write(CALLER, open.ino, handle, 0, Bytes::from(contents[3][..100].to_vec())).await.expect("write");
    b.unlink(directory, b"open").await.expect("unlink");

    drop(life);
    let disks = after(&disks, meta, storage, seed);
    let life = Life::start_on(disks.clone(), network.clone()).await.expect("a start");
    for fs in [&*a, &*b] {
        assert_reads(fs, directory, "renamed", &contents[0], &when).await;
        assert_reads(fs, directory, "from-a", &contents[1], &when).await;
        assert!(fs.lookup(directory, b"open").await.is_err(), "{when}: an unlinked file is there again");
    }
    assert_eq!(a.lookup(directory, b"renamed").await.map(|found| found.attr.ino), Ok(first.ino), "{when}");
    let mut expected = contents[2].clone();
    expected[..100].copy_from_slice(&contents[3][..100]);
    let found = a.read(open.ino, handle, 0, 1 << 20).await.expect("a file that is open");
    assert!(found == expected, "{when}: the open file has other bytes");
    a.fsync(open.ino, handle, false).await.expect("fsync");
    write_file(&b, directory, "later", &contents[3]).await;
    b.sync_all(true).await.expect("sync");
    assert_eq!(violations(&life).await, Vec::<String>::new(), "{when}");

    // All that was fsynced survives without the mounts.
    drop((life, a, b));
    let life = Life::start_on(after(&disks, true, true, seed + 50), network.clone()).await.expect("a start");
    let fresh = mount(&network, 3).await;
    for (name, content) in [("renamed", &contents[0]), ("from-a", &contents[1]), ("later", &contents[3])] {
        assert_reads(&fresh, directory, name, content, &when).await;
    }
    assert_eq!(violations(&life).await, Vec::<String>::new(), "{when}");
}

#[test]
fn a_mount_that_stays_alive_loses_nothing_when_the_metadata_server_loses_its_power() {
    (0..4).for_each(|seed| run(check(true, false, seed)));
}

#[test]
fn a_mount_that_stays_alive_loses_nothing_when_all_storage_servers_lose_their_power() {
    (0..4).for_each(|seed| run(check(false, true, seed)));
}

#[test]
fn a_mount_that_stays_alive_loses_nothing_when_every_server_loses_its_power() {
    (0..4).for_each(|seed| run(check(true, true, seed)));
}

const DIRTY: u64 = 32 << 20;
/// More than may be dirty.
const LONG: usize = 40 << 20;
const BLOCK: usize = 1 << 20;
/// Longer than an fsync should take.
const SLOW: Duration = Duration::from_millis(60);

/// Keeps what is long on its way until it is opened, and makes everything slow.
struct Gate {
    peers: Arc<dyn Peers>,
    is_open: watch::Sender<bool>,
    /// Long requests that have come to it.
    held: watch::Sender<usize>,
}

impl Peers for Gate {
    fn call(&self, to: Endpoint, request: Frame, deadline: Duration) -> BoxFuture<'_, Result<Frame, CallError>> {
        Box::pin(async move {
            if request.payload.iter().map(Bytes::len).sum::<usize>() > 512 << 10 {
                self.held.send_modify(|held| *held += 1);
                self.is_open.subscribe().wait_for(|is_open| *is_open).await.expect("the gate is there");
            }
            tokio::time::sleep(SLOW).await;
            self.peers.call(to, request, deadline).await
        })
    }
}

async fn write_bulk(mount: &Mount, file: &(Attr, FileHandle), content: &[u8]) {
    let (attr, handle) = file;
    for (number, part) in (0..).zip(content.chunks(1 << 20)) {
        mount.write(CALLER, attr.ino, *handle, number << 20, Bytes::copy_from_slice(part)).await.expect("write");
    }
    mount.fsync(attr.ino, *handle, false).await.expect("fsync");
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

async fn write_little(mount: &Mount, gate: &Gate) {
    until("the long one is held up", || mount.dirty_bytes() >= DIRTY && *gate.held.borrow() > 0).await;
    assert_eq!(mount.dirty_bound(), DIRTY);
    write_file(mount, Ino::ROOT, "closed", &[1; 5000]).await;
    let (attr, handle) = create(mount, Ino::ROOT, "synced").await;
    mount.write(CALLER, attr.ino, handle, 0, Bytes::from_static(&[2; 5000])).await.expect("write");
    mount.fsync(attr.ino, handle, false).await.expect("fsync");
    assert!(mount.dirty_bytes() >= DIRTY, "nothing of the long one is stored");
    assert_eq!(mount.dirty_bound(), DIRTY / 2, "it took long, with much under way");
    gate.is_open.send_replace(true);
}

#[test]
fn a_small_file_is_stored_and_synced_while_no_block_of_a_long_one_arrives() {
    run(async {
        let network = Network::default();
        let _life = Life::start_on(SimDisk::rack(1 + STORAGE_SERVERS.count()), network.clone()).await.expect("a start");
        let (is_open, held) = (watch::Sender::new(false), watch::Sender::new(0));
        let gate = Arc::new(Gate { peers: network.of_client(1), is_open, held });
        let mount = mount_through(Arc::clone(&gate) as Arc<dyn Peers>, 1, DIRTY).await;
        let bulk = create(&mount, Ino::ROOT, "bulk").await;
        let content = random_bytes(1, LONG);
        let both = async { tokio::join!(write_bulk(&mount, &bulk, &content), write_little(&mount, &gate)) };
        // Less than the patience of a mount: nobody has waited for that.
        tokio::time::timeout(PATIENCE * 3 / 4, both).await.expect("nobody waits for what does not come");
        let last = LONG - (1 << 20);
        let found = mount.read(bulk.0.ino, bulk.1, last as u64, 1 << 20).await.expect("read");
        assert!(found == content[last..], "the long one has other bytes");
        until("the bound is the limit again", || mount.dirty_bound() == DIRTY).await;
    });
}

/// How the servers that get blocks passed on fare, as a mount sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Others {
    Well,
    /// They do not hear the one that is to pass on.
    Apart,
    /// The first of them has no room.
    Full,
    /// The first of them has stopped.
    Silent,
    /// Nobody has heard of passing on: servers of an earlier version.
    Old,
}

/// Counts what a mount sends, and lets `others` be seen.
struct Watched {
    peers: Arc<dyn Peers>,
    others: Others,
    payload_bytes: AtomicUsize,
    /// The server in trouble, once a block was to be passed on to it.
    troubled: Mutex<Option<ServerId>>,
    /// Questions that it has not answered.
    unanswered: watch::Sender<usize>,
}

impl Watched {
    async fn relay(&self, to: Endpoint, request: Frame, deadline: Duration) -> Result<Frame, CallError> {
        if self.others == Others::Old {
            return Ok(reply(Err(Refusal::BadRequest)));
        }
        let (Others::Full | Others::Silent) = self.others else { return self.peers.call(to, request, deadline).await };
        let Ok(StorageRequest::Relay { block, durable, to: mut others, patience_ms }) = decode(&request.header) else {
            panic!("not to be passed on")
        };
        *self.troubled.lock() = Some(others.remove(0).server);
        let less = StorageRequest::Relay { block, durable, to: others, patience_ms };
        let request = Frame { header: encode(&less).expect("a short request"), payload: request.payload };
        let answer = self.peers.call(to, request, deadline).await?;
        let Ok(StorageReply(Ok(StorageAnswer::Relayed { mut copies }))) = decode(&answer.header) else {
            panic!("not passed on")
        };
        let refusal = if self.others == Others::Full { Refusal::ServerFull } else { Refusal::Unavailable };
        copies.insert(1, Err(refusal));
        if self.others == Others::Silent {
            self.unanswered.subscribe().wait_for(|count| *count == 2).await.expect("it is there");
        }
        Ok(reply(Ok(StorageAnswer::Relayed { copies })))
    }
}

fn reply(result: Result<StorageAnswer, Refusal>) -> Frame {
    Frame { header: encode(&StorageReply(result)).expect("a short answer"), payload: Vec::new() }
}

impl Peers for Watched {
    fn call(&self, to: Endpoint, request: Frame, deadline: Duration) -> BoxFuture<'_, Result<Frame, CallError>> {
        Box::pin(async move {
            self.payload_bytes.fetch_add(request.payload.iter().map(Bytes::len).sum(), Ordering::Relaxed);
            let is_storage = to.name.role == Role::Storage;
            if is_storage && matches!(decode(&request.header), Ok(StorageRequest::Relay { .. })) {
                return self.relay(to, request, deadline).await;
            }
            let is_troubled = *self.troubled.lock() == Some(ServerId(to.name.id));
            if is_storage && is_troubled && self.others == Others::Silent {
                tokio::time::sleep(deadline).await;
                self.unanswered.send_modify(|count| *count += 1);
                return Err(CallError::Deadline(to.address, deadline));
            }
            self.peers.call(to, request, deadline).await
        })
    }
}

/// For a file of one block, which is synced: how many times its bytes leave the mount, and how many servers have it then.
async fn sent_and_stored(others: Others) -> (usize, usize) {
    let network = Network::default();
    let life = Life::start_on(SimDisk::rack(1 + STORAGE_SERVERS.count()), network.clone()).await.expect("a start");
    if others == Others::Apart {
        network.part_storage();
    }
    let peers = Arc::new(Watched {
        peers: network.of_client(1),
        others,
        payload_bytes: AtomicUsize::new(0),
        troubled: Mutex::default(),
        unanswered: watch::Sender::new(0),
    });
    let mount = mount_that_relays(Relaying::Always, Arc::clone(&peers) as Arc<dyn Peers>, 1, DIRTY).await;
    let content = random_bytes(7, BLOCK);
    let file = create(&mount, Ino::ROOT, "file").await;
    write_bulk(&mount, &file, &content).await;
    let sent = peers.payload_bytes.load(Ordering::Relaxed);
    assert_eq!(sent % BLOCK, 0);
    let mut stored = 0;
    for server in STORAGE_SERVERS {
        let has = StorageRequest::Has { blocks: vec![BlockHash::of(&content)] };
        let (answer, _) = life.storage(server, has, Bytes::new()).await.expect("the power is on");
        let Ok(StorageAnswer::Has { present, .. }) = answer else { panic!("server {server}: {answer:?}") };
        stored += usize::from(present[0]);
    }
    mount.shutdown().await.expect("nothing is left to be stored");
    (sent / BLOCK, stored)
}

#[test]
fn a_long_block_leaves_the_mount_once_and_is_on_three_servers() {
    assert_eq!(run(sent_and_stored(Others::Well)), (1, 3));
}

#[test]
fn what_a_server_cannot_pass_on_is_sent_by_the_mount_itself() {
    assert_eq!(run(sent_and_stored(Others::Apart)), (3, 3));
}

#[test]
fn servers_that_do_not_know_how_to_pass_on_get_a_block_each() {
    assert_eq!(run(sent_and_stored(Others::Old)), (4, 3));
}

/// Two copies are enough for now; the third is owed.
#[test]
fn who_has_no_room_for_what_it_is_passed_is_not_asked_again() {
    assert_eq!(run(sent_and_stored(Others::Full)), (1, 2));
}

#[test]
fn who_falls_silent_while_it_is_passed_a_block_is_not_waited_for_again() {
    assert_eq!(run(sent_and_stored(Others::Silent)), (1, 2));
}

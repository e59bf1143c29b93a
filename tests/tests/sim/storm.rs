//! A whole cluster on one thread, with two mounts in use, while machines lose their power, disks turn bits and fill up, clocks jump, and the
//! network loses, repeats, delays and cuts.
//!
//! Servers and mounts are the real code, QUIC included; disks, datagrams, time and chance are simulated. A seed is one history: it happens
//! again exactly. Each mount works in a directory of its own and knows what must be there. At the end everything is mended,
//! then all machines lose their power, and a new mount finds what the others had, three copies of everything and nothing else.
//!
//! `HOLDFAST_STORM_SEED=n` runs one seed, `HOLDFAST_STORM_SEEDS=n` so many, `HOLDFAST_STORM_SECS=n` as many as begin in that time, from
//! `HOLDFAST_STORM_FIRST` on. `one_history` alone, with `HOLDFAST_STORM_SEED=n` and `HOLDFAST_LOG=debug`, says all that happens.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::FutureExt;
use holdfast_client::{
    fs::{AccessTimes, Caller, Duties, Errno, FileHandle, Fs, FsOptions, FsResult, MakeRequest},
    remote::meta::MountName,
};
use holdfast_common::{
    Attr, BlockHash, Ino, Kind, Replicas, ServerId,
    clock::{Clock, SystemClock},
    disk::{Disk, Space},
    inventory::BUCKETS,
    net::{
        Frame, Peers, Serve,
        identity::{NodeName, Role},
    },
    telemetry,
    wire::{
        codec::{decode, encode},
        meta::{
            AdminRequest, ClusterStatus, Comparison, MetaAnswer, MetaReply, MetaRequest, RenameMode, SetAttr,
            StorageLoad, StorageNotice,
        },
    },
};
use holdfast_server::{
    meta::server::{Options, Running},
    storage::{Backups, Scrubber, Scrubbing, StorageService, start_service, store::Store},
};
use holdfast_tests::{fault::random_bytes, sim_disk::SimDisk, sys::die_with_parent};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    ether::{Counts, Ether, Host, Sent, Weather},
    node::{CLUSTER, DIRECTORY, FLUSH_BUSILY, FLUSH_LAZILY, open_store, start_meta},
    world::{JumpingClock, simulated},
};

const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
/// Of an operation, and of a cluster that mends itself.
const PATIENCE: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_millis(100);
const STORAGE: std::ops::RangeInclusive<u32> = 1..=4;
const MOUNTS: u32 = 2;
/// Faults of one history.
const FAULTS: u32 = 12;
const SEEDS: u64 = 30;
/// Before all machines lose their power.
const LAST_STEPS: u32 = 40;
const FILES_MAX: usize = 8;
/// Suspected, down, replaced, and time to begin with it.
const GIVEN_UP_AFTER: Duration = Duration::from_millis(1600);

/// What nobody names is condemned and deleted by then.
const DELETED_AFTER: Duration = Duration::from_millis(2500);
/// Bytes a second, and how often a pass begins.
const SCRUB_RATE: u64 = 1 << 20;
const SCRUB_EVERY: Duration = Duration::from_secs(2);
/// Seconds, either way.
const CLOCK_JUMP_MAX: i64 = 86_400;

/// Kinds of faults, with those that are likelier counted more than once; and those by which copies get lost.
const HONEST_FAULTS: u32 = 13;
const DISHONEST_FAULTS: u32 = 5;

/// What is wrong with a history.
type Wrong = String;

fn options() -> Options {
    Options {
        cluster: CLUSTER,
        cache_bytes: 1 << 20,
        checkpoint_log_bytes: 4 << 10,
        session_timeout: Duration::from_secs(8),
        recovery_window: Duration::from_millis(2500),
        reserve_bytes: 0,
        suspect_after: Duration::from_millis(400),
        down_after: Duration::from_millis(900),
        replace_after: Duration::from_millis(500),
        garbage_grace: Duration::from_millis(300),
        compare_every: Duration::from_secs(1),
        backup_every: Duration::ZERO,
    }
}

fn storage(id: u32) -> NodeName {
    NodeName { role: Role::Storage, id }
}

fn mount(id: u32) -> NodeName {
    NodeName { role: Role::Client, id }
}

const META: NodeName = NodeName { role: Role::Meta, id: 1 };

/// A metadata server.
struct Meta {
    disk: SimDisk,
    host: Arc<Host>,
    _running: Running,
}

/// A storage server, with all that it does by itself.
struct Storage {
    disk: SimDisk,
    host: Arc<Host>,
    store: Arc<Store>,
    service: Arc<StorageService>,
    bad: mpsc::UnboundedReceiver<BlockHash>,
    _scrubbing: Scrubbing,
}

/// The machines.
struct Machines {
    ether: Ether,
    clock: Arc<JumpingClock>,
    meta: Option<Meta>,
    storage: BTreeMap<u32, Storage>,
    /// Of storage servers.
    flush_every: Duration,
    /// Storage servers' disks neither lie nor lose anything: then no copy may ever be missed.
    honest: bool,
    /// How often each fault struck.
    faults: BTreeMap<String, u32>,
}

/// A copy that gets lost by mistake is made again soon, from the others: only where none can get lost it tells something.
fn is_honest(seed: u64) -> bool {
    seed.is_multiple_of(3)
}

/// Whoever makes everything durable all the time shows nothing of a bug by which that is forgotten.
fn flush_every(seed: u64) -> Duration {
    if cfg!(feature = "planted") || seed.is_multiple_of(2) { FLUSH_LAZILY } else { FLUSH_BUSILY }
}

impl Machines {
    fn start(ether: Ether, seed: u64) -> Self {
        let mut machines = Self {
            ether,
            clock: Arc::default(),
            meta: None,
            storage: BTreeMap::new(),
            flush_every: flush_every(seed),
            honest: is_honest(seed),
            faults: BTreeMap::new(),
        };
        STORAGE.for_each(|id| machines.start_storage(id, SimDisk::new()));
        machines.start_meta(SimDisk::new());
        machines
    }

    fn start_storage(&mut self, id: u32, disk: SimDisk) {
        let host = self.ether.host(storage(id));
        let (peers, seam): (Arc<dyn Peers>, Arc<dyn Disk>) = (Arc::clone(&host) as _, Arc::new(disk.clone()));
        let store = open_store(&seam, self.flush_every).expect("its disk works");
        let backups = Backups::new(Arc::clone(&seam), Path::new(DIRECTORY), 0);
        let service = start_service(Arc::clone(&store), peers, id, backups).expect("no threads are needed");
        let (told, bad) = mpsc::unbounded_channel();
        let scrubber = Scrubber {
            store: Arc::clone(&store),
            service: Arc::clone(&service),
            disk: seam,
            directory: DIRECTORY.into(),
            clock: Arc::clone(&self.clock) as Arc<dyn Clock>,
            rate: SCRUB_RATE,
            every: SCRUB_EVERY,
            progress: Arc::clone(service.scrub_progress()),
            bad: told,
        };
        host.serve(Arc::clone(&service) as Arc<dyn Serve>);
        self.storage.insert(id, Storage { disk, host, store, service, bad, _scrubbing: scrubber.start() });
    }

    fn start_meta(&mut self, disk: SimDisk) {
        let host = self.ether.host(META);
        let peers = Arc::clone(&host) as Arc<dyn Peers>;
        let clock = Arc::clone(&self.clock) as Arc<dyn Clock>;
        let running = start_meta(&disk, peers, clock, &options()).expect("its disk works");
        host.serve(Arc::clone(&running.service) as Arc<dyn Serve>);
        self.meta = Some(Meta { disk, host, _running: running });
    }

    /// What is left of a storage server's disk. `seed`: its machine loses its power.
    fn stop_storage(&mut self, id: u32, seed: Option<u64>) -> SimDisk {
        let stopped = self.storage.remove(&id).expect("it runs");
        stopped.host.die();
        seed.map_or_else(|| stopped.disk.after_kill(), |seed| stopped.disk.after_power_cut(seed))
    }

    /// As a service manager does with a server that had to end.
    fn restart_failed(&mut self) {
        let failed = |storage: &Storage| storage.store.failed().now_or_never().is_some();
        let ids: Vec<u32> = self.storage.iter().filter(|(_, storage)| failed(storage)).map(|(id, _)| *id).collect();
        for id in ids {
            let disk = self.stop_storage(id, None);
            self.start_storage(id, disk);
        }
    }

    fn stop_meta(&mut self, seed: Option<u64>) -> SimDisk {
        let stopped = self.meta.take().expect("it runs");
        stopped.host.die();
        seed.map_or_else(|| stopped.disk.after_kill(), |seed| stopped.disk.after_power_cut(seed))
    }
}

/// Every storage server that runs says so, and which bad copies it has found.
async fn beat(machines: Arc<Mutex<Machines>>) {
    loop {
        for (id, storage) in &mut machines.lock().storage {
            let space = storage.store.space().unwrap_or(Space { capacity: 0, free: 0 });
            let load = StorageLoad { capacity_bytes: space.capacity, free_bytes: space.free, ..StorageLoad::default() };
            let (address, zone, boot) = (storage.host.endpoint().address, String::new(), storage.service.boot());
            let mut notices = vec![StorageNotice::Heartbeat { address, zone, boot, load }];
            let blocks: Vec<BlockHash> = std::iter::from_fn(|| storage.bad.try_recv().ok()).collect();
            if !blocks.is_empty() {
                tracing::debug!(id, blocks = blocks.len(), "bad copies are told");
                notices.push(StorageNotice::BadCopies { blocks });
            }
            tokio::spawn(say(Arc::clone(&storage.host), Arc::clone(&storage.service), notices));
        }
        tokio::time::sleep(HEARTBEAT).await;
    }
}

async fn say(host: Arc<Host>, service: Arc<StorageService>, notices: Vec<StorageNotice>) {
    for notice in notices {
        match ask_meta(&*host, &MetaRequest::Storage(notice)).await {
            Ok(reply) => service.hear(reply.epoch),
            Err(wrong) => tracing::debug!(%wrong, "a notice is not heard"),
        }
    }
}

async fn ask_meta(peers: &dyn Peers, request: &MetaRequest) -> Result<MetaReply, Wrong> {
    let frame = Frame { header: encode(request).expect("a short request"), payload: Vec::new() };
    let to = Ether::endpoint(META);
    let answer = peers.call(to, frame, Duration::from_secs(5)).await.map_err(|error| error.to_string())?;
    Ok(decode(&answer.header).expect("an answer"))
}

/// A mount, and what it knows that must be there.
struct User {
    mount: Mount,
    directory: Ino,
    files: Files,
    /// What there was since all of it was made durable, step by step, at the end of a history.
    states: Option<Vec<Files>>,
    /// What was deleted, and when: storing it again at the right moment meets the orders to delete it.
    deleted: VecDeque<(Instant, Vec<u8>)>,
    random: StdRng,
    made: u64,
}

type Files = BTreeMap<String, Vec<u8>>;

/// A mount, until it is dropped.
struct Mount {
    fs: Arc<Fs>,
    host: Arc<Host>,
    duties: tokio::task::JoinHandle<()>,
}

impl Mount {
    async fn new(ether: &Ether, id: u32) -> Result<Self, Wrong> {
        let options = FsOptions {
            cache_bytes: 1 << 20,
            dirty_bytes: 8 << 20,
            io_timeout: PATIENCE,
            connect_timeout: PATIENCE,
            access_times: AccessTimes::default(),
        };
        let name = MountName { host: "sim".into(), mountpoint: format!("/mnt-{id}") };
        let host = ether.host(mount(id));
        let peers = Arc::clone(&host) as Arc<dyn Peers>;
        let clock = Arc::new(SystemClock::default());
        let fs = Fs::connect(peers, Ether::endpoint(META), name, options, clock).await;
        let fs = fs.map_err(|error| format!("a mount does not connect: {error}"))?;
        let duties = tokio::spawn(Duties::run(Arc::clone(&fs)));
        Ok(Self { fs, host, duties })
    }

    /// Its machine loses its power.
    fn die(&self) {
        self.duties.abort();
        self.host.die();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.die();
    }
}

fn wrong(what: &str, name: &str, result: Errno) -> Wrong {
    format!("{what} of {name}: errno {}", result.0)
}

impl User {
    async fn new(ether: &Ether, id: u32, seed: u64) -> Result<Self, Wrong> {
        let mount = Mount::new(ether, id).await?;
        let request = MakeRequest { kind: Kind::Directory, mode: 0o755, rdev: 0, target: Vec::new() };
        let name = format!("dir-{id}");
        let made = mount.fs.make(CALLER, Ino::ROOT, name.as_bytes(), request).await;
        let directory = made.map_err(|error| wrong("mkdir", &name, error))?.ino;
        let random = StdRng::seed_from_u64(seed * 100 + u64::from(id));
        Ok(Self { mount, directory, files: Files::new(), states: None, deleted: VecDeque::new(), random, made: 0 })
    }

    fn pick(&mut self) -> Option<String> {
        let count = self.files.len();
        (count > 0).then(|| self.random.random_range(0..count)).and_then(|n| self.files.keys().nth(n).cloned())
    }

    /// Mostly of few different ones, so that what is deleted is stored again a moment later.
    fn content(&mut self) -> Vec<u8> {
        let (which, length) = (self.random.random_range(0..7), [700, 5000, 40_000][self.random.random_range(0..3)]);
        match which {
            0..4 => random_bytes(which, length),
            4 => self.deleted_content().unwrap_or_else(|| self.new_content()),
            _ => self.new_content(),
        }
    }

    /// That servers are about to delete.
    fn deleted_content(&mut self) -> Option<Vec<u8>> {
        let is_due = |(at, _): &(Instant, _)| at.elapsed() >= DELETED_AFTER;
        self.deleted.pop_front_if(|deleted| is_due(deleted)).map(|(_, content)| content)
    }

    /// That no server can have already.
    fn new_content(&mut self) -> Vec<u8> {
        random_bytes(self.random.random(), 5000)
    }

    async fn step(&mut self) -> Result<(), Wrong> {
        let step = async {
            match self.random.random_range(0..100) {
                0..35 => self.create().await,
                35..50 => self.overwrite().await,
                50..70 => self.read().await,
                70..80 => self.rename().await,
                80..87 => self.truncate().await,
                _ => self.delete().await,
            }
        };
        let done = tokio::time::timeout(2 * PATIENCE, step).await;
        done.unwrap_or_else(|_| Err("an operation does not end".to_owned()))?;
        self.note(None);
        if self.files.len() > FILES_MAX {
            self.delete().await?;
            self.note(None);
        }
        Ok(())
    }

    /// Remembers what there is, and `empty`, which is just made.
    fn note(&mut self, empty: Option<&str>) {
        if let Some(states) = &mut self.states {
            let mut state = self.files.clone();
            state.extend(empty.map(|name| (name.to_owned(), Vec::new())));
            states.push(state);
        }
    }

    async fn written(&self, attr: Attr, handle: FileHandle, at: u64, content: &[u8], sync: bool) -> FsResult<()> {
        let content = Bytes::copy_from_slice(content);
        self.mount.fs.write(CALLER, attr.ino, handle, at, content).await?;
        if sync {
            self.mount.fs.fsync(attr.ino, handle, false).await?
        } else {
            self.mount.fs.flush(attr.ino, handle, 0).await?
        }
        self.mount.fs.release(attr.ino, handle).await;
        Ok(())
    }

    /// Now and then; at the end, never.
    fn wants_sync(&mut self) -> bool {
        self.states.is_none() && self.random.random()
    }

    async fn create(&mut self) -> Result<(), Wrong> {
        let (content, sync) = (self.content(), self.wants_sync());
        self.create_file(content, sync).await
    }

    async fn create_file(&mut self, content: Vec<u8>, sync: bool) -> Result<(), Wrong> {
        self.made += 1;
        let name = format!("file-{}", self.made);
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        let made = self.mount.fs.create(CALLER, self.directory, name.as_bytes(), 0o644, flags).await;
        let (attr, opened) = made.map_err(|error| wrong("create", &name, error))?;
        self.note(Some(&name));
        let written = self.written(attr, opened.handle, 0, &content, sync).await;
        written.map_err(|error| wrong("write", &name, error))?;
        self.files.insert(name, content);
        Ok(())
    }

    async fn overwrite(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        let (new, sync) = (self.content(), self.wants_sync());
        let at = self.random.random_range(0..=self.files[&name].len());
        let written = async {
            let attr = self.mount.fs.lookup(self.directory, name.as_bytes()).await?.attr;
            let opened = self.mount.fs.open(CALLER, attr.ino, libc::O_RDWR).await?;
            self.written(attr, opened.handle, at as u64, &new, sync).await
        };
        written.await.map_err(|error| wrong("overwrite", &name, error))?;
        let content = self.files.get_mut(&name).expect("picked");
        content.resize(content.len().max(at + new.len()), 0);
        content[at..at + new.len()].copy_from_slice(&new);
        Ok(())
    }

    async fn read(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        check_file(&self.mount.fs, self.directory, &name, &self.files[&name]).await
    }

    async fn rename(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        self.made += 1;
        let new = format!("file-{}", self.made);
        let directory = self.directory;
        let renamed =
            self.mount.fs.rename(directory, name.as_bytes(), directory, new.as_bytes(), RenameMode::Replace).await;
        renamed.map_err(|error| wrong("rename", &name, error))?;
        let content = self.files.remove(&name).expect("picked");
        self.files.insert(new, content);
        Ok(())
    }

    async fn truncate(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        let length = self.random.random_range(0..=self.files[&name].len());
        let cut = async {
            let attr = self.mount.fs.lookup(self.directory, name.as_bytes()).await?.attr;
            let set = SetAttr { size: Some(length as u64), ..SetAttr::default() };
            self.mount.fs.setattr(CALLER, attr.ino, set).await
        };
        cut.await.map_err(|error| wrong("truncate", &name, error))?;
        self.files.get_mut(&name).expect("picked").truncate(length);
        Ok(())
    }

    async fn delete(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        let gone = self.mount.fs.unlink(self.directory, name.as_bytes()).await;
        gone.map_err(|error| wrong("unlink", &name, error))?;
        let content = self.files.remove(&name).expect("picked");
        self.deleted.push_back((Instant::now(), content));
        Ok(())
    }
}

async fn read_file(fs: &Fs, directory: Ino, name: &str) -> FsResult<Bytes> {
    let attr = fs.lookup(directory, name.as_bytes()).await?.attr;
    let opened = fs.open(CALLER, attr.ino, libc::O_RDONLY).await?;
    let bytes = fs.read(attr.ino, opened.handle, 0, 1 << 20).await;
    fs.release(attr.ino, opened.handle).await;
    bytes
}

async fn check_file(fs: &Fs, directory: Ino, name: &str, content: &[u8]) -> Result<(), Wrong> {
    let found = read_file(fs, directory, name).await.map_err(|error| wrong("read", name, error))?;
    if found == content {
        Ok(())
    } else {
        Err(format!("{name} has wrong bytes: {} for {}", found.len(), content.len()))
    }
}

/// What goes wrong, one thing after another; they overlap where they last.
async fn spoil(machines: &Arc<Mutex<Machines>>, admin: &Host, random: &mut StdRng, rotten: u32) {
    let victim = random.random_range(STORAGE);
    let long = Duration::from_millis(random.random_range(20..700));
    let honest = machines.lock().honest;
    let power = random.random::<bool>().then(|| random.random());
    let power_of_storage = power.filter(|_| !honest);
    let kinds = if honest { HONEST_FAULTS } else { HONEST_FAULTS + DISHONEST_FAULTS };
    let fault = match random.random_range(0..kinds) {
        0 | 1 => {
            let disk = machines.lock().stop_storage(victim, power_of_storage);
            tokio::time::sleep(long).await;
            machines.lock().start_storage(victim, disk);
            "a storage server dies"
        }
        // The disk that turns bits is replaced by an empty one: what it held is elsewhere.
        13 => {
            machines.lock().stop_storage(rotten, None);
            tokio::time::sleep(long).await;
            machines.lock().start_storage(rotten, SimDisk::new());
            "a disk is replaced"
        }
        // Long enough to be given up, and back with all that it had.
        9 => {
            let disk = machines.lock().stop_storage(victim, power_of_storage);
            tokio::time::sleep(GIVEN_UP_AFTER + long).await;
            machines.lock().start_storage(victim, disk);
            "a storage server is given up"
        }
        2 | 3 => {
            let disk = machines.lock().stop_meta(power);
            tokio::time::sleep(long / 4).await;
            machines.lock().start_meta(disk);
            "the metadata server dies"
        }
        4 | 5 | 8 => {
            let ends = if random.random() { mount(random.random_range(1..=MOUNTS)) } else { META };
            let other = if ends != META && random.random() { META } else { storage(victim) };
            let mut cut = vec![(ends, other), (other, ends)];
            // Both ways, or one of them.
            if random.random_range(0..3) > 0 {
                cut.remove(random.random_range(0..2));
            }
            for_a_while(machines, long * random.random_range(1..6), |weather| weather.cut.extend(cut)).await;
            "a partition"
        }
        6 | 7 => {
            let (lost, repeated, late) =
                (random.random_range(0..10), random.random_range(0..10), random.random_range(0..60));
            let [calls_lost, answers_lost, calls_twice, calls_late] = [(); 4].map(|()| random.random_range(0..8));
            let cut = BTreeSet::new();
            let bad = Weather { lost, repeated, late, calls_lost, answers_lost, calls_twice, calls_late, cut };
            for_a_while(machines, long, |weather| *weather = bad).await;
            "a bad network"
        }
        10 => {
            // Refused while servers are away, and lost now and then. Two at least: one may be on the rotten disk.
            drop(set_replicas(admin, random.random_range(2..=4)).await);
            "another number of copies"
        }
        11 => {
            machines.lock().clock.jump(random.random_range(-CLOCK_JUMP_MAX..=CLOCK_JUMP_MAX));
            "the clock jumps"
        }
        12 => {
            let disk = machines.lock().storage[&victim].disk.clone();
            disk.fill(true);
            tokio::time::sleep(long).await;
            disk.fill(false);
            machines.lock().restart_failed();
            "a disk is full"
        }
        14 | 15 => {
            lose_power_together(machines, random, long).await;
            "several machines lose their power"
        }
        // One disk turns bits, and no other: of three copies two are as they should be.
        _ => {
            let disk = machines.lock().storage[&rotten].disk.clone();
            let segments = disk.list(Path::new("/storage/segments")).unwrap_or_default();
            for path in segments {
                let length = disk.open(&path, false).and_then(|file| file.length()).unwrap_or(0);
                if length > 4096 {
                    // A segment may go at any time.
                    drop(disk.flip_bit(&path, random.random_range(100..length)));
                }
            }
            "bits turn"
        }
    };
    *machines.lock().faults.entry(fault.to_owned()).or_default() += 1;
}

/// Some storage servers, or all, and perhaps the metadata server: those who use them go on.
async fn lose_power_together(machines: &Arc<Mutex<Machines>>, random: &mut StdRng, long: Duration) {
    let seed: u64 = random.random();
    let with_meta = random.random::<bool>();
    let spared = random.random_range(0..=STORAGE.count());
    let struck: Vec<u32> = STORAGE.filter(|id| usize::try_from(*id) != Ok(spared)).collect();
    let (disks, meta) = {
        let mut machines = machines.lock();
        let meta = with_meta.then(|| machines.stop_meta(Some(seed)));
        let disks: Vec<(u32, SimDisk)> =
            struck.into_iter().map(|id| (id, machines.stop_storage(id, Some(seed.wrapping_add(id.into()))))).collect();
        (disks, meta)
    };
    tokio::time::sleep(long / 2).await;
    let mut machines = machines.lock();
    disks.into_iter().for_each(|(id, disk)| machines.start_storage(id, disk));
    meta.into_iter().for_each(|disk| machines.start_meta(disk));
}

async fn for_a_while(machines: &Arc<Mutex<Machines>>, long: Duration, change: impl FnOnce(&mut Weather)) {
    let ether = machines.lock().ether.clone();
    ether.change(change);
    tokio::time::sleep(long).await;
    ether.clear_up();
}

/// What happened in a history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Told {
    /// By the clock of the simulation.
    pub(crate) took: Duration,
    pub(crate) counts: Counts,
    pub(crate) faults: BTreeMap<String, u32>,
    pub(crate) sent: Vec<Sent>,
}

/// One history. `Err`: something was wrong.
pub(crate) fn history(seed: u64) -> Result<Told, Wrong> {
    simulated(seed, || async move {
        let begun = tokio::time::Instant::now();
        let ether = Ether::new(seed);
        let machines = Arc::new(Mutex::new(Machines::start(ether.clone(), seed)));
        let beating = tokio::spawn(beat(Arc::clone(&machines)));
        let admin = ether.host(NodeName { role: Role::Admin, id: 1 });
        let outcome = survive(&machines, &ether, &admin, seed).await;
        beating.abort();
        outcome.map_err(|wrong| format!("seed {seed}: {wrong}"))?;
        let faults = machines.lock().faults.clone();
        Ok(Told { took: begun.elapsed(), counts: ether.counts(), faults, sent: ether.sent() })
    })
}

async fn survive(machines: &Arc<Mutex<Machines>>, ether: &Ether, admin: &Host, seed: u64) -> Result<(), Wrong> {
    until_up(admin).await?;
    let mut users = Vec::new();
    for id in 1..=MOUNTS {
        users.push(User::new(ether, id, seed).await?);
    }
    let mut random = StdRng::seed_from_u64(seed);
    let rotten = random.random_range(STORAGE);
    let over = std::cell::Cell::new(false);
    let faults = async {
        for _ in 0..FAULTS {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..150))).await;
            spoil(machines, admin, &mut random, rotten).await;
        }
        over.set(true);
        Ok(())
    };
    let honest = machines.lock().honest;
    let audit = async {
        while honest && !over.get() {
            nothing_is_missed(admin).await?;
            tokio::time::sleep(HEARTBEAT).await;
        }
        Ok(())
    };
    let work = users.iter_mut().map(|user| async {
        while !over.get() {
            user.step().await?;
            // Whoever waits for nothing still lets the others run.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok::<(), Wrong>(())
    });
    let (_, (), ()) = tokio::try_join!(futures_util::future::try_join_all(work), faults, audit)?;
    ether.clear_up();
    until(|| set_replicas(admin, 3)).await?;
    for user in &mut users {
        // Something that only the last sync makes durable.
        let content = user.new_content();
        user.create_file(content, false).await?;
        user.mount.fs.sync_all(true).await.map_err(|error| wrong("sync", "everything", error))?;
        user.states = Some(vec![user.files.clone()]);
    }
    for user in &mut users {
        // And what nothing has made durable: of that the last may be lost.
        for _ in 0..random.random_range(0..LAST_STEPS) {
            user.step().await?;
        }
    }
    lose_all_power(machines, &users, seed);
    ether.change(|weather| weather.calls_late = 0);
    until_up(admin).await?;
    let fresh = Mount::new(ether, 9).await?;
    check_everything(&fresh.fs, &users).await?;
    until_whole(admin).await
}

/// Every machine, and the mounts with theirs.
fn lose_all_power(machines: &Arc<Mutex<Machines>>, users: &[User], seed: u64) {
    users.iter().for_each(|user| user.mount.die());
    let mut machines = machines.lock();
    let meta = machines.stop_meta(Some(seed));
    let disks: Vec<(u32, SimDisk)> =
        STORAGE.map(|id| (id, machines.stop_storage(id, Some(seed + u64::from(id))))).collect();
    disks.into_iter().for_each(|(id, disk)| machines.start_storage(id, disk));
    machines.start_meta(meta);
}

/// Each directory is as it was after all was made durable, or after one of the steps since.
async fn check_everything(fs: &Fs, users: &[User]) -> Result<(), Wrong> {
    for user in users {
        let found = files_in(fs, user.directory).await.map_err(|wrong| format!("after a power cut: {wrong}"))?;
        let states = user.states.as_deref().unwrap_or_default();
        if !states.contains(&found) {
            let known: Vec<Vec<(&String, usize)>> = states.iter().chain([&found]).map(sizes).collect();
            return Err(format!(
                "after a power cut there is what never was; there were, and the last is there: {known:?}"
            ));
        }
    }
    Ok(())
}

fn sizes(files: &Files) -> Vec<(&String, usize)> {
    files.iter().map(|(name, content)| (name, content.len())).collect()
}

async fn files_in(fs: &Fs, directory: Ino) -> Result<Files, Wrong> {
    let opened = fs.opendir(directory).await.map_err(|error| wrong("opendir", "a directory", error))?;
    let page = fs.readdir(directory, opened.handle, 0, false).await.map_err(|error| wrong("readdir", "it", error))?;
    fs.releasedir(directory, opened.handle);
    let mut found = Files::new();
    for entry in page.entries.iter().filter(|entry| !entry.name.starts_with(b".")) {
        let name = String::from_utf8_lossy(&entry.name).into_owned();
        let content = read_file(fs, directory, &name).await.map_err(|error| wrong("read", &name, error))?;
        found.insert(name, content.to_vec());
    }
    Ok(found)
}

async fn ask(admin: &Host, request: AdminRequest) -> Result<MetaAnswer, Wrong> {
    let reply = ask_meta(admin, &MetaRequest::Admin(request)).await?;
    reply.result.map_err(|refusal| refusal.to_string())
}

/// Nobody has found a copy missing or bad: not a mount that wanted to read it, nor who compares servers with the record.
async fn nothing_is_missed(admin: &Host) -> Result<(), Wrong> {
    let Ok(MetaAnswer::Journal(entries)) = ask(admin, AdminRequest::Journal { after: 0 }).await else { return Ok(()) };
    let missed = entries.iter().find(|entry| entry.what.contains("does not have") || entry.what.contains("bad copies"));
    if let Some(entry) = missed {
        return Err(format!("{} {}, though no disk has lost anything", entry.place, entry.what));
    }
    let Ok(ClusterStatus { corrupt_copies_met, missing_copies_met, .. }) = status(admin).await else { return Ok(()) };
    match corrupt_copies_met + missing_copies_met {
        0 => Ok(()),
        missed => Err(format!("mounts have found {missed} copies missing or bad, though no disk has lost anything")),
    }
}

async fn set_replicas(admin: &Host, count: usize) -> Result<(), Wrong> {
    let replicas = Replicas::new(count).expect("a number in the range");
    match ask(admin, AdminRequest::SetReplicas { replicas }).await? {
        MetaAnswer::Done => Ok(()),
        other => Err(format!("{count} copies: {other:?}")),
    }
}

async fn status(admin: &Host) -> Result<ClusterStatus, Wrong> {
    match ask(admin, AdminRequest::Status).await? {
        MetaAnswer::Status(status) => Ok(*status),
        other => Err(format!("a status was {other:?}")),
    }
}

/// Asks again until it is so.
async fn until<F: Future<Output = Result<(), Wrong>>>(mut look: impl FnMut() -> F) -> Result<(), Wrong> {
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        match look().await {
            Ok(()) => return Ok(()),
            Err(wrong) if tokio::time::Instant::now() > until => return Err(wrong),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn until_up(admin: &Host) -> Result<(), Wrong> {
    until(|| async {
        let up = status(admin)
            .await?
            .servers
            .iter()
            .filter(|it| it.state == holdfast_common::cluster::ServerState::Up)
            .count();
        if up == STORAGE.count() { Ok(()) } else { Err(format!("{up} servers are up")) }
    })
    .await
}

/// Three copies of everything, where they are on record, and nothing else.
async fn until_whole(admin: &Host) -> Result<(), Wrong> {
    until(|| async {
        let status = status(admin).await?;
        let ClusterStatus { owed, unnamed, condemned, blocks_by_copies: [none, one, two, _], .. } = status;
        if status.replicas_followed_percent != 100 {
            return Err(format!("{} % follow the number of copies", status.replicas_followed_percent));
        }
        if [owed, unnamed, condemned, none, one, two] != [0; 6] {
            return Err(format!("{owed} owed, {unnamed} unnamed, {condemned} condemned, copies {none} {one} {two}"));
        }
        match ask(admin, AdminRequest::Check).await? {
            MetaAnswer::Violations(found) if found.is_empty() => {}
            other => return Err(format!("{other:?}")),
        }
        for server in STORAGE.map(ServerId) {
            for bucket in BUCKETS {
                let request = AdminRequest::Compare { server, bucket, mend: false };
                match ask(admin, request).await? {
                    MetaAnswer::Compared(Comparison { missing: 0, extra: 0, .. }) => {}
                    other => return Err(format!("server {server}: {other:?}")),
                }
            }
        }
        Ok(())
    })
    .await
}

/// The environment of a process that runs one history.
const SEED: &str = "HOLDFAST_STORM_SEED";

/// A history, in a process of its own: what else there was in this one would have a part in it. `Err`: what was wrong, as it said.
pub(crate) fn told_by_a_process(seed: u64, environment: &[(&str, String)]) -> Result<Told, Wrong> {
    let mut command = Command::new(std::env::current_exe().map_err(|error| error.to_string())?);
    command.args(["--exact", "storm::one_history", "--ignored", "--nocapture"]).env(SEED, seed.to_string());
    command.envs(environment.iter().map(|(name, value)| (name, value))).stdout(Stdio::piped()).stderr(Stdio::piped());
    die_with_parent(&mut command);
    let output = command.output().map_err(|error| error.to_string())?;
    let (out, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let told = said.lines().find_map(|line| line.strip_prefix(TOLD)).map(serde_json::from_str);
    match told {
        Some(Ok(told)) if output.status.success() => Ok(told),
        _ => Err(format!("seed {seed} (run it again with {SEED}={seed}): {said}\n{out}")),
    }
}

/// Before what a history tells.
const TOLD: &str = "told: ";

#[test]
#[ignore = "one history, which the tests below run in a process of its own"]
fn one_history() {
    if std::env::var_os("HOLDFAST_LOG").is_some() {
        telemetry::init(telemetry::LogLevel::default(), telemetry::LogFormat::default()).expect("the first subscriber");
    }
    #[cfg(feature = "planted")]
    crate::planted::plant_chosen();
    let seed = number(SEED).unwrap_or(1);
    let told = history(seed).unwrap_or_else(|wrong| panic!("{wrong}"));
    eprintln!("{TOLD}{}", serde_json::to_string(&told).expect("numbers and names"));
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// What many histories tell together.
#[derive(Debug, Default)]
struct Together {
    histories: u64,
    took: Duration,
    counts: Counts,
    faults: BTreeMap<String, u32>,
}

impl Together {
    fn add(&mut self, told: Told) {
        self.histories += 1;
        self.took += told.took;
        self.counts.add(told.counts);
        for (fault, count) in told.faults {
            *self.faults.entry(fault).or_default() += count;
        }
    }
}

/// On all processors, as long as there are seeds.
fn tell(seeds: impl Iterator<Item = u64> + Send) -> Together {
    let (seeds, together) = (Mutex::new(seeds), Mutex::new(Together::default()));
    let next = || seeds.lock().next();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(seed) = next() {
                    let told = told_by_a_process(seed, &[]).unwrap_or_else(|wrong| panic!("{wrong}"));
                    together.lock().add(told);
                }
            });
        }
    });
    together.into_inner()
}

#[test]
fn whatever_goes_wrong_what_was_acknowledged_is_there_with_three_copies_and_nothing_else() {
    let first = number("HOLDFAST_STORM_FIRST").unwrap_or(1);
    let begun = Instant::now();
    let seeds: Box<dyn Iterator<Item = u64> + Send> = match (number(SEED), number("HOLDFAST_STORM_SECS")) {
        (Some(seed), _) => Box::new(std::iter::once(seed)),
        (None, Some(secs)) => Box::new((first..).take_while(move |_| begun.elapsed() < Duration::from_secs(secs))),
        (None, None) => Box::new(first..first + number("HOLDFAST_STORM_SEEDS").unwrap_or(SEEDS)),
    };
    let Together { histories, took, counts, faults } = tell(seeds);
    let (simulated, real) = (took.as_secs(), begun.elapsed().as_secs());
    eprintln!("{histories} histories of {simulated} s together, in {real} s: {faults:?}, {counts:?}");
    assert!(faults.values().sum::<u32>() >= u32::try_from(histories).expect("not so many") * FAULTS / 2);
}

#[test]
fn a_history_happens_again_exactly() {
    let [first, again] = [(); 2].map(|()| told_by_a_process(3, &[]).unwrap_or_else(|wrong| panic!("{wrong}")));
    let pairs = first.sent.iter().zip(&again.sent);
    let differing = pairs.enumerate().find(|(_, (first, again))| first != again);
    assert_eq!(differing, None, "of {} datagrams that one is the first to be another", first.sent.len());
    assert!(first == again, "one history goes on longer than the other");
    assert!(first.counts.datagrams > 1000, "hardly anything happened: {:?}", first.counts);
}

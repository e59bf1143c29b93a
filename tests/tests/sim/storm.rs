//! A whole cluster in one process, with two mounts in use, while machines lose their power, disks turn bits and the network loses,
//! repeats and cuts.
//!
//! Servers and mounts are the real code; disks and network are simulated. A seed is one history of operations and faults: what the
//! mounts do, and what goes wrong when. (Threads of the servers run as the machine lets them, so that a seed narrows a failure down and
//! does not always repeat it.) Each mount works in a directory of its own and knows what must be there. At the end everything is mended,
//! then all machines lose their power, and a new mount finds what the others had, three copies of everything and nothing else.
//!
//! `HOLDFAST_STORM_SEED=n` runs one seed, `HOLDFAST_STORM_SEEDS=n` so many, `HOLDFAST_STORM_SECS=n` as many as begin in that time, from
//! `HOLDFAST_STORM_FIRST` on; with `HOLDFAST_LOG=debug` everybody says what happens.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use holdfast_client::{
    fs::{AccessTimes, Caller, Duties, Errno, FileHandle, Fs, FsOptions, FsResult, MakeRequest},
    remote::meta::MountName,
};
use holdfast_common::{
    Attr, Ino, Kind, Replicas, ServerId,
    clock::SystemClock,
    disk::Disk,
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
    storage::StorageService,
};
use holdfast_tests::{fault::random_bytes, sim_disk::SimDisk};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::node::{CLUSTER, FLUSH_BUSILY, FLUSH_LAZILY, Fate, Network, endpoint, run, start_meta, start_storage};

const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
/// Of an operation, and of a cluster that mends itself.
const PATIENCE: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_millis(100);
const STORAGE: std::ops::RangeInclusive<u32> = 1..=4;
const MOUNTS: u32 = 2;
/// Faults of one history.
const FAULTS: u32 = 12;
const SEEDS: u64 = 4;
const FILES_MAX: usize = 8;
/// Suspected, down, replaced, and time to begin with it.
const GIVEN_UP_AFTER: Duration = Duration::from_millis(1600);

/// What is wrong with a history.
type Wrong = String;

fn options() -> Options {
    Options {
        cluster: CLUSTER,
        cache_bytes: 1 << 20,
        checkpoint_log_bytes: 16 << 10,
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

/// What the network does now.
#[derive(Debug, Default)]
struct Weather {
    random: Option<StdRng>,
    /// In a hundred messages.
    lost: u32,
    answers_lost: u32,
    twice: u32,
    /// Nothing goes from the first to the second.
    cut: BTreeSet<(NodeName, NodeName)>,
}

impl Weather {
    fn of(&mut self, from: NodeName, to: NodeName) -> Fate {
        if self.cut.contains(&(from, to)) {
            return Fate::Lost;
        }
        if self.cut.contains(&(to, from)) {
            return Fate::AnswerLost;
        }
        let Some(random) = &mut self.random else { return Fate::Arrives };
        let drawn = random.random_range(0..100);
        match drawn {
            _ if drawn < self.lost => Fate::Lost,
            _ if drawn < self.lost + self.answers_lost => Fate::AnswerLost,
            _ if drawn < self.lost + self.answers_lost + self.twice => Fate::Twice,
            _ => Fate::Arrives,
        }
    }

    fn clear_up(&mut self) {
        *self = Self { random: self.random.take(), ..Self::default() };
    }
}

fn storage(id: u32) -> NodeName {
    NodeName { role: Role::Storage, id }
}

const META: NodeName = NodeName { role: Role::Meta, id: 1 };

/// The machines.
struct Machines {
    network: Network,
    weather: Arc<Mutex<Weather>>,
    meta: Option<(SimDisk, Running)>,
    storage: BTreeMap<u32, (SimDisk, Arc<StorageService>)>,
    /// Of storage servers.
    flush_every: Duration,
}

/// Whoever makes everything durable all the time shows nothing of a bug by which that is forgotten.
fn flush_every(seed: u64) -> Duration {
    if cfg!(feature = "planted") || seed.is_multiple_of(2) { FLUSH_LAZILY } else { FLUSH_BUSILY }
}

impl Machines {
    fn start(seed: u64) -> Self {
        let weather = Arc::new(Mutex::new(Weather { random: Some(StdRng::seed_from_u64(seed)), ..Weather::default() }));
        let deciding = Arc::clone(&weather);
        let network = Network::with_weather(Arc::new(move |from, to| deciding.lock().of(from, to)));
        let mut machines =
            Self { network, weather, meta: None, storage: BTreeMap::new(), flush_every: flush_every(seed) };
        STORAGE.for_each(|id| machines.start_storage(id, SimDisk::new()));
        machines.start_meta(SimDisk::new());
        machines
    }

    fn start_storage(&mut self, id: u32, disk: SimDisk) {
        let peers = self.network.of(Role::Storage, id);
        let service = start_storage(Arc::new(disk.clone()), id, peers, self.flush_every).expect("its disk works");
        self.network.attach(Role::Storage, id, &(Arc::clone(&service) as Arc<dyn Serve>));
        self.storage.insert(id, (disk, service));
    }

    fn start_meta(&mut self, disk: SimDisk) {
        let running = start_meta(&disk, &self.network, &options()).expect("its disk works");
        self.meta = Some((disk, running));
    }

    /// What is left of a storage server's disk. `seed`: its machine loses its power.
    fn stop_storage(&mut self, id: u32, seed: Option<u64>) -> SimDisk {
        self.network.detach(Role::Storage, id);
        let (disk, _) = self.storage.remove(&id).expect("it runs");
        seed.map_or_else(|| disk.after_kill(), |seed| disk.after_power_cut(seed))
    }

    fn stop_meta(&mut self, seed: Option<u64>) -> SimDisk {
        self.network.detach(Role::Meta, 1);
        let (disk, _) = self.meta.take().expect("it runs");
        seed.map_or_else(|| disk.after_kill(), |seed| disk.after_power_cut(seed))
    }
}

/// Every storage server that runs says so.
async fn beat(machines: Arc<Mutex<Machines>>) {
    loop {
        let (network, running): (Network, Vec<(u32, Arc<StorageService>)>) = {
            let machines = machines.lock();
            let running = machines.storage.iter().map(|(id, (_, service))| (*id, Arc::clone(service)));
            (machines.network.clone(), running.collect())
        };
        for (id, service) in running {
            let peers = network.of(Role::Storage, id);
            tokio::spawn(async move {
                let load = StorageLoad { capacity_bytes: 1 << 40, free_bytes: 1 << 39, ..StorageLoad::default() };
                let (address, zone, boot) = (endpoint(Role::Storage, id).address, String::new(), service.boot());
                let beat = MetaRequest::Storage(StorageNotice::Heartbeat { address, zone, boot, load });
                if let Ok(reply) = ask_meta(&*peers, &beat).await {
                    service.hear(reply.epoch);
                }
            });
        }
        tokio::time::sleep(HEARTBEAT).await;
    }
}

async fn ask_meta(peers: &dyn Peers, request: &MetaRequest) -> Result<MetaReply, Wrong> {
    let frame = Frame { header: encode(request).expect("a short request"), payload: Vec::new() };
    let answer = peers.call(Network::meta(), frame, Duration::from_secs(5)).await.map_err(|error| error.to_string())?;
    Ok(decode(&answer.header).expect("an answer"))
}

/// A mount, and what it knows that must be there.
struct User {
    fs: Arc<Fs>,
    duties: tokio::task::JoinHandle<()>,
    directory: Ino,
    files: BTreeMap<String, Vec<u8>>,
    random: StdRng,
    made: u64,
}

impl Drop for User {
    fn drop(&mut self) {
        self.duties.abort();
    }
}

async fn connect(network: &Network, id: u32) -> FsResult<(Arc<Fs>, tokio::task::JoinHandle<()>)> {
    let options = FsOptions {
        cache_bytes: 1 << 20,
        dirty_bytes: 8 << 20,
        io_timeout: PATIENCE,
        connect_timeout: PATIENCE,
        access_times: AccessTimes::default(),
    };
    let name = MountName { host: "sim".into(), mountpoint: format!("/mnt-{id}") };
    let fs = Fs::connect(network.of_client(id), Network::meta(), name, options, Arc::new(SystemClock::default())).await;
    let fs = fs.map_err(|_| Errno(libc::ENOTCONN))?;
    let duties = tokio::spawn(Duties::run(Arc::clone(&fs)));
    Ok((fs, duties))
}

fn wrong(what: &str, name: &str, result: Errno) -> Wrong {
    format!("{what} of {name}: errno {}", result.0)
}

impl User {
    async fn new(network: &Network, id: u32, seed: u64) -> Result<Self, Wrong> {
        let (fs, duties) = connect(network, id).await.map_err(|error| wrong("connect", "a mount", error))?;
        let request = MakeRequest { kind: Kind::Directory, mode: 0o755, rdev: 0, target: Vec::new() };
        let name = format!("dir-{id}");
        let made = fs.make(CALLER, Ino::ROOT, name.as_bytes(), request).await;
        let directory = made.map_err(|error| wrong("mkdir", &name, error))?.ino;
        let random = StdRng::seed_from_u64(seed * 100 + u64::from(id));
        Ok(Self { fs, duties, directory, files: BTreeMap::new(), random, made: 0 })
    }

    fn pick(&mut self) -> Option<String> {
        let count = self.files.len();
        (count > 0).then(|| self.random.random_range(0..count)).and_then(|n| self.files.keys().nth(n).cloned())
    }

    /// Mostly of few different ones, so that what is deleted is stored again a moment later.
    fn content(&mut self) -> Vec<u8> {
        let (which, length) = (self.random.random_range(0..7), [700, 5000, 40_000][self.random.random_range(0..3)]);
        if which < 5 { random_bytes(which, length) } else { self.new_content() }
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
        if self.files.len() > FILES_MAX { self.delete().await } else { Ok(()) }
    }

    async fn written(&self, attr: Attr, handle: FileHandle, at: u64, content: &[u8], sync: bool) -> FsResult<()> {
        let content = Bytes::copy_from_slice(content);
        self.fs.write(CALLER, attr.ino, handle, at, content).await?;
        if sync {
            self.fs.fsync(attr.ino, handle, false).await?
        } else {
            self.fs.flush(attr.ino, handle, 0).await?
        }
        self.fs.release(attr.ino, handle).await;
        Ok(())
    }

    async fn create(&mut self) -> Result<(), Wrong> {
        let (content, sync) = (self.content(), self.random.random());
        self.create_file(content, sync).await
    }

    async fn create_file(&mut self, content: Vec<u8>, sync: bool) -> Result<(), Wrong> {
        self.made += 1;
        let name = format!("file-{}", self.made);
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        let made = self.fs.create(CALLER, self.directory, name.as_bytes(), 0o644, flags).await;
        let (attr, opened) = made.map_err(|error| wrong("create", &name, error))?;
        let written = self.written(attr, opened.handle, 0, &content, sync).await;
        written.map_err(|error| wrong("write", &name, error))?;
        self.files.insert(name, content);
        Ok(())
    }

    async fn overwrite(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        let (new, sync) = (self.content(), self.random.random());
        let at = self.random.random_range(0..=self.files[&name].len());
        let written = async {
            let attr = self.fs.lookup(self.directory, name.as_bytes()).await?.attr;
            let opened = self.fs.open(CALLER, attr.ino, libc::O_RDWR).await?;
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
        check_file(&self.fs, self.directory, &name, &self.files[&name]).await
    }

    async fn rename(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        self.made += 1;
        let new = format!("file-{}", self.made);
        let directory = self.directory;
        let renamed = self.fs.rename(directory, name.as_bytes(), directory, new.as_bytes(), RenameMode::Replace).await;
        renamed.map_err(|error| wrong("rename", &name, error))?;
        let content = self.files.remove(&name).expect("picked");
        self.files.insert(new, content);
        Ok(())
    }

    async fn truncate(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        let length = self.random.random_range(0..=self.files[&name].len());
        let cut = async {
            let attr = self.fs.lookup(self.directory, name.as_bytes()).await?.attr;
            let set = SetAttr { size: Some(length as u64), ..SetAttr::default() };
            self.fs.setattr(CALLER, attr.ino, set).await
        };
        cut.await.map_err(|error| wrong("truncate", &name, error))?;
        self.files.get_mut(&name).expect("picked").truncate(length);
        Ok(())
    }

    async fn delete(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        let gone = self.fs.unlink(self.directory, name.as_bytes()).await;
        gone.map_err(|error| wrong("unlink", &name, error))?;
        self.files.remove(&name);
        Ok(())
    }
}

async fn check_file(fs: &Fs, directory: Ino, name: &str, content: &[u8]) -> Result<(), Wrong> {
    let read = async {
        let attr = fs.lookup(directory, name.as_bytes()).await?.attr;
        let opened = fs.open(CALLER, attr.ino, libc::O_RDONLY).await?;
        let bytes = fs.read(attr.ino, opened.handle, 0, 1 << 20).await;
        fs.release(attr.ino, opened.handle).await;
        bytes
    };
    let found = read.await.map_err(|error| wrong("read", name, error))?;
    if found == content {
        Ok(())
    } else {
        Err(format!("{name} has wrong bytes: {} for {}", found.len(), content.len()))
    }
}

/// What goes wrong, one thing after another; they overlap where they last.
async fn spoil(machines: &Arc<Mutex<Machines>>, random: &mut StdRng, rotten: u32) {
    let victim = random.random_range(STORAGE);
    let long = Duration::from_millis(random.random_range(20..700));
    let power = random.random::<bool>().then(|| random.random());
    match random.random_range(0..11) {
        0 | 1 => {
            let disk = machines.lock().stop_storage(victim, power);
            tokio::time::sleep(long).await;
            machines.lock().start_storage(victim, disk);
        }
        // The disk that turns bits is replaced by an empty one: what it held is elsewhere.
        8 => {
            machines.lock().stop_storage(rotten, None);
            tokio::time::sleep(long).await;
            machines.lock().start_storage(rotten, SimDisk::new());
        }
        // Long enough to be given up, and back with all that it had.
        9 => {
            let disk = machines.lock().stop_storage(victim, power);
            tokio::time::sleep(GIVEN_UP_AFTER + long).await;
            machines.lock().start_storage(victim, disk);
        }
        2 | 3 => {
            let disk = machines.lock().stop_meta(power);
            tokio::time::sleep(long / 4).await;
            machines.lock().start_meta(disk);
        }
        4 => {
            let mount = NodeName { role: Role::Client, id: random.random_range(1..=MOUNTS) };
            let other = if random.random() { META } else { storage(victim) };
            let way = if random.random() { (mount, other) } else { (other, mount) };
            for_a_while(machines, long, |weather| weather.cut.extend([way])).await;
        }
        5 => {
            let way = if random.random() { (META, storage(victim)) } else { (storage(victim), META) };
            for_a_while(machines, long, |weather| weather.cut.extend([way])).await;
        }
        6 => {
            let (lost, answers_lost, twice) =
                (random.random_range(0..8), random.random_range(0..8), random.random_range(0..8));
            for_a_while(machines, long, |weather| {
                (weather.lost, weather.answers_lost, weather.twice) = (lost, answers_lost, twice);
            })
            .await;
        }
        10 => {
            let network = machines.lock().network.clone();
            // Refused while servers are away, and lost now and then. Two at least: one may be on the rotten disk.
            drop(set_replicas(&network, random.random_range(2..=4)).await);
        }
        // One disk turns bits, and no other: of three copies two are as they should be.
        _ => {
            let disk = machines.lock().storage[&rotten].0.clone();
            let segments = disk.list(Path::new("/storage/segments")).unwrap_or_default();
            for path in segments {
                let length = disk.open(&path, false).and_then(|file| file.length()).unwrap_or(0);
                if length > 4096 {
                    // A segment may go at any time.
                    drop(disk.flip_bit(&path, random.random_range(100..length)));
                }
            }
        }
    }
}

async fn for_a_while(machines: &Arc<Mutex<Machines>>, long: Duration, change: impl FnOnce(&mut Weather)) {
    let weather = Arc::clone(&machines.lock().weather);
    change(&mut weather.lock());
    tokio::time::sleep(long).await;
    weather.lock().clear_up();
}

/// One history. `Err`: something was wrong.
pub(crate) async fn history(seed: u64) -> Result<(), Wrong> {
    let machines = Arc::new(Mutex::new(Machines::start(seed)));
    let beating = tokio::spawn(beat(Arc::clone(&machines)));
    let network = machines.lock().network.clone();
    let outcome = survive(&machines, &network, seed).await;
    beating.abort();
    outcome.map_err(|wrong| format!("seed {seed}: {wrong}"))
}

async fn survive(machines: &Arc<Mutex<Machines>>, network: &Network, seed: u64) -> Result<(), Wrong> {
    until_up(network).await?;
    let mut users = Vec::new();
    for id in 1..=MOUNTS {
        users.push(User::new(network, id, seed).await?);
    }
    let mut random = StdRng::seed_from_u64(seed);
    let rotten = random.random_range(STORAGE);
    let over = std::cell::Cell::new(false);
    let faults = async {
        for _ in 0..FAULTS {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..150))).await;
            spoil(machines, &mut random, rotten).await;
        }
        over.set(true);
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
    let (_, _): (Vec<()>, ()) = tokio::try_join!(futures_util::future::try_join_all(work), faults)?;
    machines.lock().weather.lock().clear_up();
    until(|| set_replicas(network, 3)).await?;
    for user in &mut users {
        // Something that only the last sync makes durable.
        let content = user.new_content();
        user.create_file(content, false).await?;
        user.fs.sync_all(true).await.map_err(|error| wrong("sync", "everything", error))?;
    }
    lose_all_power(machines, &mut users, seed);
    until_up(network).await?;
    let (fs, duties) = connect(network, 9).await.map_err(|error| wrong("connect", "a new mount", error))?;
    let found = check_everything(&fs, &users).await;
    duties.abort();
    found?;
    until_whole(network).await
}

/// Every machine, and the mounts with theirs.
fn lose_all_power(machines: &Arc<Mutex<Machines>>, users: &mut [User], seed: u64) {
    users.iter().for_each(|user| user.duties.abort());
    let mut machines = machines.lock();
    let meta = machines.stop_meta(Some(seed));
    let disks: Vec<(u32, SimDisk)> =
        STORAGE.map(|id| (id, machines.stop_storage(id, Some(seed + u64::from(id))))).collect();
    disks.into_iter().for_each(|(id, disk)| machines.start_storage(id, disk));
    machines.start_meta(meta);
}

async fn check_everything(fs: &Fs, users: &[User]) -> Result<(), Wrong> {
    for user in users {
        for (name, content) in &user.files {
            check_file(fs, user.directory, name, content)
                .await
                .map_err(|wrong| format!("after a power cut: {wrong}"))?;
        }
        let opened = fs.opendir(user.directory).await.map_err(|error| wrong("opendir", "a directory", error))?;
        let handle = opened.handle;
        let page = fs.readdir(user.directory, handle, 0, false).await.map_err(|error| wrong("readdir", "it", error))?;
        fs.releasedir(user.directory, handle);
        let names: BTreeSet<String> =
            page.entries.iter().map(|it| String::from_utf8_lossy(&it.name).into_owned()).collect();
        let expected: BTreeSet<String> = user.files.keys().cloned().collect();
        if names.iter().filter(|name| !name.starts_with('.')).cloned().collect::<BTreeSet<_>>() != expected {
            return Err(format!("after a power cut: there is {names:?}, and should be {expected:?}"));
        }
    }
    Ok(())
}

async fn admin(network: &Network, request: AdminRequest) -> Result<MetaAnswer, Wrong> {
    let reply = ask_meta(&*network.of(Role::Admin, 1), &MetaRequest::Admin(request)).await?;
    reply.result.map_err(|refusal| refusal.to_string())
}

async fn set_replicas(network: &Network, count: usize) -> Result<(), Wrong> {
    let replicas = Replicas::new(count).expect("a number in the range");
    match admin(network, AdminRequest::SetReplicas { replicas }).await? {
        MetaAnswer::Done => Ok(()),
        other => Err(format!("{count} copies: {other:?}")),
    }
}

async fn status(network: &Network) -> Result<ClusterStatus, Wrong> {
    match admin(network, AdminRequest::Status).await? {
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

async fn until_up(network: &Network) -> Result<(), Wrong> {
    until(|| async {
        let up = status(network)
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
async fn until_whole(network: &Network) -> Result<(), Wrong> {
    until(|| async {
        let status = status(network).await?;
        let ClusterStatus { owed, unnamed, condemned, blocks_by_copies: [none, one, two, _], .. } = status;
        if status.replicas_followed_percent != 100 {
            return Err(format!("{} % follow the number of copies", status.replicas_followed_percent));
        }
        if [owed, unnamed, condemned, none, one, two] != [0; 6] {
            return Err(format!("{owed} owed, {unnamed} unnamed, {condemned} condemned, copies {none} {one} {two}"));
        }
        match admin(network, AdminRequest::Check).await? {
            MetaAnswer::Violations(found) if found.is_empty() => {}
            other => return Err(format!("{other:?}")),
        }
        for server in STORAGE.map(ServerId) {
            for bucket in BUCKETS {
                let request = AdminRequest::Compare { server, bucket, mend: false };
                match admin(network, request).await? {
                    MetaAnswer::Compared(Comparison { missing: 0, extra: 0, .. }) => {}
                    other => return Err(format!("server {server}: {other:?}")),
                }
            }
        }
        Ok(())
    })
    .await
}

#[test]
fn whatever_goes_wrong_what_was_acknowledged_is_there_with_three_copies_and_nothing_else() {
    if std::env::var_os("HOLDFAST_LOG").is_some() {
        telemetry::init(telemetry::LogLevel::default(), telemetry::LogFormat::default()).expect("the first subscriber");
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let first = number("HOLDFAST_STORM_FIRST").unwrap_or(1);
    let begun = Instant::now();
    let seeds: Box<dyn Iterator<Item = u64>> = match (number("HOLDFAST_STORM_SEED"), number("HOLDFAST_STORM_SECS")) {
        (Some(seed), _) => Box::new(std::iter::once(seed)),
        (None, Some(secs)) => Box::new((first..).take_while(move |_| begun.elapsed() < Duration::from_secs(secs))),
        (None, None) => Box::new(first..first + number("HOLDFAST_STORM_SEEDS").unwrap_or(SEEDS)),
    };
    let mut histories = 0;
    for seed in seeds {
        if let Err(wrong) = run(history(seed)) {
            panic!("{wrong}");
        }
        histories += 1;
    }
    eprintln!("{histories} histories in {} s", begun.elapsed().as_secs());
}

//! A whole metadata server on a disk that forgets and beside storage servers that fail.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::Duration,
};

use holdfast_common::{
    Attr, BlockHash, BootId, ClusterId, Epoch, Ino, Kind, Position, Refusal, Sequence, ServerId, SessionId, Time,
    clock::Clock,
    disk::Disk,
    net::{
        BoxFuture, CallError, Endpoint, Frame, Peers, Serve,
        enrol::Enrol,
        identity::{NodeName, PeerIdentity, Role},
        tls::{Ca, NodeKey},
    },
    wire::{
        codec,
        enrol::EnrolRequest,
        meta::{
            AdminRequest, Changed, Event, FileCommit, Holder, LostChange, MetaAnswer, MetaReply, MetaRequest, Mutated,
            NewBlock, Op, Query, RenameMode, Replayed, SessionRequest, StorageLoad, StorageNotice,
        },
        storage::{StorageAnswer, StorageReply, StorageRequest},
    },
};
use parking_lot::Mutex;

use super::{
    core::{Core, Fault},
    leases::OLD_LEASES,
    memory_disk::MemoryDisk,
    server::{Authority, Options, Running, recover},
    state::{Rows, blocks, tests as words, violations::violations},
};

#[path = "recovery_tests.rs"]
mod recovery_tests;

const CLUSTER: ClusterId = ClusterId([9; 16]);
const MOUNT: NodeName = NodeName { role: Role::Client, id: 1 };
const ADMIN: NodeName = NodeName { role: Role::Admin, id: 1 };

/// A clock that tests move.
#[derive(Debug, Default)]
struct TestClock(Mutex<Duration>);

impl TestClock {
    fn advance(&self, by: Duration) {
        *self.0.lock() += by;
    }
}

impl Clock for TestClock {
    fn now(&self) -> Time {
        Time { secs: 1_700_000_000 + self.monotonic().as_secs().cast_signed(), nanos: 0 }
    }
    fn monotonic(&self) -> Duration {
        *self.0.lock()
    }
}

#[derive(Debug, Clone, Default)]
struct Storage {
    boot: u64,
    dead: bool,
    visible: BTreeSet<BlockHash>,
    durable: BTreeSet<BlockHash>,
    stamps: BTreeMap<BlockHash, Epoch>,
    syncs: u32,
}

impl Storage {
    fn stamp(&self, hash: &BlockHash) -> Epoch {
        self.stamps.get(hash).copied().unwrap_or_default()
    }

    fn raise(&mut self, hash: BlockHash, epoch: Epoch) {
        let stamp = self.stamps.entry(hash).or_default();
        *stamp = (*stamp).max(epoch);
    }
}

/// Storage servers 1 to 4, by what they answer to the metadata server.
#[derive(Debug, Clone, Default)]
struct Storages(Arc<Mutex<BTreeMap<u32, Storage>>>);

impl Storages {
    fn with<T>(&self, id: u32, change: impl FnOnce(&mut Storage) -> T) -> T {
        change(self.0.lock().entry(id).or_insert_with(|| Storage { boot: 1, ..Storage::default() }))
    }

    fn can_send(&self, id: u32, block: &BlockHash) -> bool {
        self.with(id, |storage| !storage.dead && storage.visible.contains(block))
    }

    fn answer(&self, id: u32, request: StorageRequest) -> Option<Result<StorageAnswer, Refusal>> {
        if let StorageRequest::Obtain { block, sources, .. } = &request
            && !sources.iter().any(|source| self.can_send(source.server.0, block))
        {
            return Some(Err(Refusal::Unavailable));
        }
        self.with(id, |storage| {
            if storage.dead {
                return None;
            }
            let boot = BootId(storage.boot);
            Some(match request {
                StorageRequest::Sync => {
                    storage.syncs += 1;
                    storage.durable = storage.visible.clone();
                    Ok(StorageAnswer::Sync { boot })
                }
                StorageRequest::Has { blocks } => {
                    let present = blocks.iter().map(|hash| storage.visible.contains(hash)).collect();
                    Ok(StorageAnswer::Has { boot, present })
                }
                StorageRequest::Obtain { block, sources, epoch } => {
                    assert!(sources.iter().all(|source| source.server.0 != id));
                    storage.visible.insert(block);
                    storage.durable.insert(block);
                    storage.raise(block, epoch);
                    Ok(StorageAnswer::Obtained { boot })
                }
                StorageRequest::List { after } => {
                    let rest = storage.visible.iter().filter(|hash| after.is_none_or(|after| **hash > after));
                    let stamped = |hash: &BlockHash| (*hash, storage.stamp(hash));
                    let blocks: Vec<(BlockHash, Epoch)> = rest.map(stamped).take(2).collect();
                    Ok(StorageAnswer::List { end: blocks.len() < 2, blocks })
                }
                StorageRequest::Digest { bucket } => {
                    let here = storage.visible.iter().filter(|hash| hash.0[0] == bucket);
                    Ok(StorageAnswer::Digest(holdfast_common::inventory::BucketDigest::of(here)))
                }
                StorageRequest::Delete { blocks, epoch } => {
                    let mut count = 0;
                    for hash in blocks {
                        if storage.stamp(&hash) < epoch && storage.visible.remove(&hash) {
                            storage.durable.remove(&hash);
                            count += 1;
                        }
                    }
                    Ok(StorageAnswer::Deleted { count })
                }
                other => panic!("{other:?}"),
            })
        })
    }

    /// Loses what was not synced.
    fn reboot(&self, id: u32) {
        self.with(id, |storage| {
            storage.boot += 1;
            storage.visible = storage.durable.clone();
        });
    }
}

impl Peers for Storages {
    fn call(&self, to: Endpoint, request: Frame, _: Duration) -> BoxFuture<'_, Result<Frame, CallError>> {
        Box::pin(async move {
            let request = codec::decode(&request.header).unwrap();
            match self.answer(to.name.id, request) {
                None => Err(CallError::Connect(to.address, "dead".into())),
                Some(answer) => {
                    Ok(Frame { header: codec::encode(&StorageReply(answer)).unwrap(), payload: Vec::new() })
                }
            }
        })
    }
}

fn options() -> Options {
    Options {
        cluster: CLUSTER,
        cache_bytes: 4 << 20,
        checkpoint_log_bytes: 1 << 40,
        session_timeout: Duration::from_secs(60),
        recovery_window: Duration::from_secs(6),
        reserve_bytes: 0,
        suspect_after: Duration::from_secs(2),
        down_after: Duration::from_secs(10),
        replace_after: Duration::from_secs(300),
        garbage_grace: Duration::from_secs(3600),
        compare_every: Duration::from_secs(3600),
        backup_every: Duration::ZERO,
        spread_after: Duration::from_secs(10),
    }
}

/// A server, and one mount that talks to it.
struct Cluster {
    disk: MemoryDisk,
    storages: Storages,
    clock: Arc<TestClock>,
    options: Options,
    running: Running,
    session: SessionId,
    sequence: u64,
}

fn start(disk: &MemoryDisk, storages: &Storages, clock: &Arc<TestClock>, options: &Options) -> Result<Running, String> {
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let clock = Arc::clone(clock) as Arc<dyn Clock>;
    let core = recover(&shared, Path::new("/data"), clock, options).map_err(|error| error.to_string())?;
    let ca = Ca::create(CLUSTER, Time { secs: 1_600_000_000, nanos: 0 }).unwrap();
    let authority = Authority { ca_fingerprint: ca.fingerprint(), ca: Some(ca), secrets: Box::new(rand::random) };
    Ok(Running::start(core, Arc::new(storages.clone()), authority, options))
}

impl Cluster {
    async fn new() -> Self {
        Self::on(MemoryDisk::new(), options()).await
    }

    async fn on(disk: MemoryDisk, options: Options) -> Self {
        let (storages, clock) = (Storages::default(), Arc::new(TestClock::default()));
        let running = start(&disk, &storages, &clock, &options).unwrap();
        let mut cluster = Self { disk, storages, clock, options, running, session: SessionId(0), sequence: 0 };
        for server in 1..=3 {
            cluster.heartbeat(server).await;
        }
        cluster.session = cluster.open_session().await;
        cluster
    }

    /// The same cluster after its metadata server came up again on `disk`.
    fn restarted(self, disk: MemoryDisk) -> Self {
        let running = start(&disk, &self.storages, &self.clock, &self.options).unwrap();
        Self { disk, running, ..self }
    }

    fn core(&self) -> &Core {
        &self.running.service.core
    }

    async fn ask(&self, node: NodeName, request: MetaRequest) -> Result<MetaAnswer, Refusal> {
        let frame = Frame { header: codec::encode(&request).unwrap(), payload: Vec::new() };
        let identity = PeerIdentity { cluster: CLUSTER, node };
        let answer = Arc::clone(&self.running.service).serve(identity, frame).await;
        codec::decode::<MetaReply>(&answer.header).unwrap().result
    }

    async fn heartbeat(&self, server: u32) {
        let load = StorageLoad { capacity_bytes: 1 << 40, free_bytes: 1 << 39, ..StorageLoad::default() };
        let boot = BootId(self.storages.with(server, |storage| storage.boot));
        let address = ([127, 0, 0, 1], 7000 + u16::try_from(server).unwrap()).into();
        let beat = StorageNotice::Heartbeat { address, zone: String::new(), boot, load };
        let node = NodeName { role: Role::Storage, id: server };
        assert_eq!(self.ask(node, MetaRequest::Storage(beat)).await, Ok(MetaAnswer::Done));
    }

    async fn open_session(&self) -> SessionId {
        let (host, mountpoint) = ("host".into(), "/mnt".into());
        let open = SessionRequest::Open { instance: [1; 16], host, mountpoint };
        match self.ask(MOUNT, MetaRequest::Session(open)).await {
            Ok(MetaAnswer::Session { session, .. }) => session,
            other => panic!("{other:?}"),
        }
    }

    async fn mutate(&mut self, durable: bool, op: Op) -> Result<Mutated, Refusal> {
        self.sequence += 1;
        self.mutate_as(self.sequence, durable, op).await
    }

    async fn mutate_as(&self, sequence: u64, durable: bool, op: Op) -> Result<Mutated, Refusal> {
        self.say_what_is_open().await;
        let (session, sequence, answered_below) = (self.session, Sequence(sequence), Sequence(1));
        match self.ask(MOUNT, MetaRequest::Mutate { session, sequence, answered_below, durable, op }).await? {
            MetaAnswer::Mutated { outcome, .. } | MetaAnswer::MutatedIn { outcome, .. } => Ok(outcome),
            other => panic!("{other:?}"),
        }
    }

    /// What a mount tells a server that has restarted, before it changes anything.
    async fn say_what_is_open(&self) {
        let session = self.session;
        let knows = self.core().sessions.lock().is_confirmed(session);
        if !knows && self.core().sessions.lock().exists(session) {
            let reopen = SessionRequest::Reopen { session, opens: Vec::new(), instance: None, is_behind: false };
            self.ask(MOUNT, MetaRequest::Session(reopen)).await.unwrap();
        }
    }

    async fn create(&mut self, name: &str, durable: bool) -> Result<Ino, Refusal> {
        match self.mutate(durable, words::make(Ino::ROOT, name, Kind::File)).await? {
            Mutated::Inode { attr, .. } => Ok(attr.ino),
            other => panic!("{other:?}"),
        }
    }

    /// Puts a block on `servers`, without a sync, and commits it as all of `ino`.
    async fn write(&mut self, ino: Ino, seed: u8, servers: &[u32], durable: bool) -> Result<Mutated, Refusal> {
        let op = self.put(ino, seed, servers);
        self.mutate(durable, op).await
    }

    fn put(&self, ino: Ino, seed: u8, servers: &[u32]) -> Op {
        let holder = |id: &u32| {
            let boot = self.storages.with(*id, |storage| {
                storage.visible.insert(words::hash(seed));
                storage.boot
            });
            Holder { server: ServerId(*id), boot: BootId(boot), durable: false }
        };
        let block = NewBlock {
            hash: words::hash(seed),
            length: 8,
            holders: servers.iter().map(holder).collect(),
            epoch: Epoch(0),
        };
        let file: FileCommit = words::file(ino, vec![(0, words::piece(seed, 0, 8, 0))], 8);
        Op::Commit { files: vec![file], blocks: vec![block] }
    }

    /// A file that is open and has no name any more.
    async fn hold_unlinked(&mut self, name: &str) {
        let op = match words::make(Ino::ROOT, name, Kind::File) {
            Op::Make { parent, name, new, exclusive, .. } => Op::Make { parent, name, new, exclusive, open: true },
            other => other,
        };
        self.mutate(false, op).await.unwrap();
        let unlink = Op::Unlink { parent: Ino::ROOT, name: name.as_bytes().to_vec() };
        self.mutate(true, unlink).await.unwrap();
    }

    fn names(&self) -> BTreeSet<String> {
        let view = self.core().store.view().unwrap();
        let page = super::state::settled(super::state::query::read_directory(&*view, Ino::ROOT, 0, 4096, false, None));
        page.unwrap()
            .unwrap()
            .unwrap()
            .entries
            .into_iter()
            .map(|entry| String::from_utf8(entry.name).unwrap())
            .collect()
    }

    fn holders(&self, seed: u8) -> Vec<u32> {
        let row = blocks::block(&*self.core().store.view().unwrap(), words::hash(seed)).unwrap();
        row.map_or(Vec::new(), |row| row.holders.iter().map(|id| id.0).collect())
    }

    fn check(&self) {
        assert_eq!(violations(&*self.core().store.view().unwrap(), 100).unwrap(), Vec::<String>::new());
    }

    /// Waits for what the server does unasked.
    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let waited = tokio::time::timeout(Duration::from_secs(20), async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        assert!(waited.await.is_ok(), "waited in vain until {what}");
    }
}

#[tokio::test]
async fn what_is_visible_survives_the_process_and_what_is_durable_the_power() {
    let mut cluster = Cluster::new().await;
    cluster.create("durable", true).await.unwrap();
    let before = cluster.disk.power_cut(0);
    cluster.create("visible", false).await.unwrap();
    let after_death = cluster.disk.process_death();
    let cluster = cluster.restarted(before);
    assert_eq!(cluster.names(), ["durable".to_owned()].into());
    cluster.check();
    let mut cluster = cluster.restarted(after_death);
    assert_eq!(cluster.names(), ["durable".to_owned(), "visible".to_owned()].into());
    // I5 across the restart: the same answer, not Exists.
    let again = cluster.mutate_as(2, true, words::make(Ino::ROOT, "visible", Kind::File)).await;
    assert!(matches!(again, Ok(Mutated::Inode { created: true, .. })), "{again:?}");
    let cut = cluster.disk.power_cut(0);
    cluster = cluster.restarted(cut);
    assert_eq!(cluster.names().len(), 2, "a retry can ask for more durability than the first");
    cluster.check();
}

#[tokio::test]
async fn a_barrier_syncs_every_server_that_was_named_and_only_once_for_all() {
    let mut cluster = Cluster::new().await;
    let inos = [cluster.create("a", false).await.unwrap(), cluster.create("b", false).await.unwrap()];
    cluster.write(inos[0], 1, &[1, 2, 3], false).await.unwrap();
    cluster.write(inos[1], 2, &[1, 2], true).await.unwrap();
    for (server, durable) in [(1, vec![1, 2]), (2, vec![1, 2]), (3, vec![1])] {
        let synced = cluster.storages.with(server, |storage| storage.durable.clone());
        assert_eq!(synced, durable.into_iter().map(words::hash).collect(), "on {server}");
    }
    let cut = cluster.disk.power_cut(0);
    let cluster = cluster.restarted(cut);
    assert_eq!(cluster.holders(1), [1, 2, 3]);
    cluster.check();
}

#[tokio::test]
async fn unsynced_copies_are_remembered_when_the_process_dies() {
    let mut cluster = Cluster::new().await;
    let ino = cluster.create("a", true).await.unwrap();
    cluster.write(ino, 1, &[1, 2, 3], false).await.unwrap();
    let disk = cluster.disk.process_death();
    // Before the first barrier of this life can have run.
    assert!(cluster.storages.with(1, |storage| storage.durable.is_empty()));
    let mut cluster = cluster.restarted(disk);
    cluster.mutate(true, words::make(Ino::ROOT, "b", Kind::File)).await.unwrap();
    assert!(cluster.storages.with(1, |storage| storage.durable.contains(&words::hash(1))));
}

impl Cluster {
    /// Lets the servers be heard, and time go by, until `condition` holds.
    async fn while_heard(&self, servers: &[u32], what: &str, condition: impl Fn(&Self) -> bool) {
        for _ in 0..400 {
            if condition(self) {
                return;
            }
            for server in servers {
                self.heartbeat(*server).await;
            }
            self.clock.advance(Duration::from_millis(100));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("waited in vain until {what}");
    }

    fn owed(&self) -> u64 {
        self.core().store.view().unwrap().counters().owed
    }
}

fn soon_replaced() -> Options {
    let (suspect_after, down_after) = (Duration::from_secs(1), Duration::from_secs(2));
    Options { suspect_after, down_after, replace_after: Duration::from_secs(3), ..options() }
}

#[tokio::test]
async fn a_server_that_stays_away_is_replaced_by_another() {
    let mut cluster = Cluster::on(MemoryDisk::new(), soon_replaced()).await;
    let ino = cluster.create("a", false).await.unwrap();
    cluster.write(ino, 1, &[1, 2, 3], true).await.unwrap();
    cluster.heartbeat(4).await;
    cluster.storages.with(3, |storage| storage.dead = true);
    let began = cluster.clock.monotonic();
    cluster.while_heard(&[1, 2, 4], "it has another copy", |cluster| cluster.holders(1) == [1, 2, 4]).await;
    assert!(cluster.clock.monotonic() - began >= Duration::from_secs(5), "too early: it might have come back");
    assert!(cluster.storages.with(4, |storage| storage.durable.contains(&words::hash(1))));
    assert_eq!(cluster.owed(), 0);
    cluster.check();
}

#[tokio::test]
async fn nothing_is_taken_off_the_record_when_there_is_nowhere_to_copy_it_to() {
    let mut cluster = Cluster::on(MemoryDisk::new(), soon_replaced()).await;
    let ino = cluster.create("a", false).await.unwrap();
    cluster.write(ino, 1, &[1, 2, 3], true).await.unwrap();
    cluster.storages.with(3, |storage| storage.dead = true);
    let until = cluster.clock.monotonic() + Duration::from_secs(12);
    cluster.while_heard(&[1, 2], "time has passed", |cluster| cluster.clock.monotonic() > until).await;
    assert_eq!(cluster.core().cluster.lock().up(), [ServerId(1), ServerId(2)]);
    assert_eq!(cluster.holders(1), [1, 2, 3]);
}

#[tokio::test]
async fn a_server_that_comes_back_is_on_record_again_for_what_is_still_owed() {
    let mut cluster = Cluster::on(MemoryDisk::new(), soon_replaced()).await;
    let inos = [cluster.create("a", false).await.unwrap(), cluster.create("b", false).await.unwrap()];
    for (ino, seeds) in [(inos[0], [1, 2]), (inos[1], [3, 4])] {
        for seed in seeds {
            cluster.write(ino, seed, &[1, 2, 3], true).await.unwrap();
        }
    }
    // It is up, but copies cannot be made there.
    cluster.heartbeat(4).await;
    cluster.storages.with(4, |storage| storage.dead = true);
    cluster.storages.with(3, |storage| storage.dead = true);
    // A file's second block has taken the place of its first.
    cluster.while_heard(&[1, 2, 4], "its blocks are owed", |cluster| cluster.owed() == 2).await;
    assert_eq!(cluster.holders(2), [1, 2]);
    cluster.storages.with(3, |storage| {
        storage.dead = false;
        storage.visible.remove(&words::hash(4));
    });
    cluster.while_heard(&[1, 2, 3, 4], "what it has counts", |cluster| cluster.holders(2) == [1, 2, 3]).await;
    // What it has lost meanwhile is copied there.
    cluster.while_heard(&[1, 2, 3], "nothing is owed", |cluster| cluster.owed() == 0).await;
    assert_eq!(cluster.holders(4), [1, 2, 3]);
    cluster.check();
}

#[tokio::test]
async fn a_server_that_dies_before_its_sync_is_given_up_and_owed() {
    let mut cluster = Cluster::new().await;
    let ino = cluster.create("a", true).await.unwrap();
    cluster.storages.with(3, |storage| storage.dead = true);
    cluster.write(ino, 1, &[1, 2, 3], true).await.unwrap();
    assert_eq!(cluster.holders(1), [1, 2]);
    assert_eq!(cluster.core().store.view().unwrap().counters().owed, 1);
    cluster.check();
    let cut = cluster.disk.power_cut(0);
    let cluster = cluster.restarted(cut);
    assert_eq!(cluster.holders(1), [1, 2], "what is durable names no copy that is not");
    // It comes back, and gets its third copy.
    cluster.storages.with(3, |storage| storage.dead = false);
    cluster.heartbeat(3).await;
    for server in [1, 2] {
        cluster.heartbeat(server).await;
    }
    cluster.until("the debt is paid", |cluster| cluster.holders(1) == [1, 2, 3]).await;
    cluster.check();
}

#[tokio::test]
async fn a_server_that_lost_its_unsynced_data_is_asked_what_it_still_has() {
    let mut cluster = Cluster::new().await;
    let ino = cluster.create("a", true).await.unwrap();
    cluster.write(ino, 1, &[1, 2, 3], true).await.unwrap();
    let op = cluster.put(ino, 2, &[1, 2, 3]);
    cluster.storages.reboot(2);
    cluster.mutate(true, op).await.unwrap();
    assert_eq!((cluster.holders(1), cluster.holders(2)), (vec![1, 2, 3], vec![1, 3]));
    cluster.until("the lost copy is made again", |cluster| cluster.holders(2) == [1, 2, 3]).await;
    cluster.check();
}

#[tokio::test]
async fn with_too_few_durable_copies_others_are_made_before_anything_is_durable() {
    let mut cluster = Cluster::new().await;
    cluster.heartbeat(4).await;
    let ino = cluster.create("a", true).await.unwrap();
    let op = cluster.put(ino, 1, &[1, 2]);
    cluster.storages.with(2, |storage| storage.dead = true);
    cluster.mutate(true, op).await.unwrap();
    let holders = cluster.holders(1);
    assert!(holders.contains(&1) && holders.len() >= 2 && !holders.contains(&2), "{holders:?}");
    cluster.check();
}

#[tokio::test]
async fn a_block_that_everybody_lost_does_not_hold_up_the_others() {
    for silent_first in [false, true] {
        let mut cluster = Cluster::new().await;
        let ino = cluster.create("a", true).await.unwrap();
        let op = cluster.put(ino, 1, &[1, 2]);
        cluster.storages.reboot(1);
        cluster.storages.reboot(2);
        cluster.storages.with(2, |storage| storage.dead = silent_first);
        cluster.mutate(false, op).await.unwrap();
        if silent_first {
            cluster.until("the first loss is known", |cluster| cluster.holders(1) == [2]).await;
            cluster.storages.with(2, |storage| storage.dead = false);
        }
        cluster.until("the loss is known", |cluster| !cluster.core().vanished.lock().is_empty()).await;
        assert!(cluster.core().durable() < cluster.core().applied(), "a mount may still have it");
        cluster.clock.advance(Duration::from_secs(20));
        let later = tokio::time::timeout(Duration::from_secs(10), cluster.create("b", true)).await;
        assert!(matches!(later, Ok(Ok(_))), "silent first: {silent_first}: {later:?}");
        cluster.check();
    }
}

#[tokio::test]
async fn unlinked_and_open_stays_until_it_is_released() {
    let mut cluster = Cluster::new().await;
    let ino = cluster.create("a", true).await.unwrap();
    let session = cluster.session;
    let open = Query::Open { ino, chunks: 1 };
    assert!(cluster.ask(MOUNT, MetaRequest::Query { session, query: open.clone() }).await.is_ok());
    cluster.mutate(true, Op::Unlink { parent: Ino::ROOT, name: b"a".to_vec() }).await.unwrap();
    cluster.create("b", true).await.unwrap();
    cluster.mutate(true, Op::Unlink { parent: Ino::ROOT, name: b"b".to_vec() }).await.unwrap();
    let inodes = |cluster: &Cluster| cluster.core().store.view().unwrap().counters().inodes;
    cluster.until("b is reclaimed", |cluster| inodes(cluster) == 2).await;
    // One that a mount has made and opened before this server knew.
    let new = match words::make(Ino::ROOT, "c", Kind::File) {
        Op::Make { new, .. } => new,
        other => panic!("{other:?}"),
    };
    let placed = Ino::chosen(session, 1).unwrap();
    let time = holdfast_common::Time::default();
    let place = Op::PlaceOpen { parent: Ino::ROOT, name: b"c".to_vec(), new, ino: placed, time };
    cluster.mutate(true, place).await.unwrap();
    cluster.mutate(true, Op::Unlink { parent: Ino::ROOT, name: b"c".to_vec() }).await.unwrap();
    cluster.create("d", true).await.unwrap();
    cluster.mutate(true, Op::Unlink { parent: Ino::ROOT, name: b"d".to_vec() }).await.unwrap();
    cluster.until("d is reclaimed", |cluster| inodes(cluster) <= 3).await;
    let placed_is_there = MetaRequest::Query { session, query: Query::GetAttr { ino: placed } };
    assert!(cluster.ask(MOUNT, placed_is_there).await.is_ok(), "it is open");
    let release = SessionRequest::Opens { session, opened: vec![], released: vec![placed] };
    cluster.ask(MOUNT, MetaRequest::Session(release)).await.unwrap();
    cluster.until("c is reclaimed", |cluster| inodes(cluster) == 2).await;
    assert!(
        cluster.ask(MOUNT, MetaRequest::Query { session, query: open.clone() }).await.is_ok(),
        "held open by this session"
    );
    // A restart: nothing goes before the mount has said what it holds.
    let disk = cluster.disk.process_death();
    let cluster = cluster.restarted(disk);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(inodes(&cluster), 2);
    let reopen = SessionRequest::Reopen { session, opens: vec![ino], instance: None, is_behind: false };
    cluster.ask(MOUNT, MetaRequest::Session(reopen)).await.unwrap();
    assert!(cluster.ask(MOUNT, MetaRequest::Query { session, query: open.clone() }).await.is_ok());
    let release = SessionRequest::Opens { session, opened: vec![], released: vec![ino] };
    cluster.ask(MOUNT, MetaRequest::Session(release)).await.unwrap();
    cluster.until("a is reclaimed", |cluster| inodes(cluster) == 1).await;
    assert!(cluster.ask(MOUNT, MetaRequest::Query { session, query: open }).await.is_err());
    cluster.check();
}

#[tokio::test]
async fn a_mount_that_holds_very_many_files_open_can_say_so_after_a_restart_and_let_them_go() {
    let cluster = Cluster::new().await;
    let (session, disk) = (cluster.session, cluster.disk.process_death());
    let cluster = cluster.restarted(disk);
    let opens: Vec<Ino> = (0..super::sessions::OPENS_MAX as u64).map(Ino).collect();
    for is_behind in [true, false] {
        let reopen = SessionRequest::Reopen { session, opens: opens.clone(), instance: None, is_behind };
        assert!(cluster.ask(MOUNT, MetaRequest::Session(reopen)).await.is_ok());
    }
    let release = SessionRequest::Opens { session, opened: vec![], released: opens };
    assert!(cluster.ask(MOUNT, MetaRequest::Session(release)).await.is_ok());
}

#[tokio::test]
async fn a_session_whose_opening_never_became_durable_expires_too() {
    let options = Options { session_timeout: Duration::from_secs(3), ..options() };
    let mut cluster = Cluster::on(MemoryDisk::new(), options).await;
    let ino = cluster.create("a", true).await.unwrap();
    // Nothing becomes durable: neither of its servers answers.
    let op = cluster.put(ino, 1, &[1, 2]);
    (1..=3).for_each(|id| cluster.storages.with(id, |storage| storage.dead = true));
    cluster.mutate(false, op).await.unwrap();
    let open = SessionRequest::Open { instance: [2; 16], host: "host".into(), mountpoint: "/mnt".into() };
    let opening = cluster.ask(MOUNT, MetaRequest::Session(open));
    assert!(tokio::time::timeout(Duration::from_millis(300), opening).await.is_err());
    let sessions =
        |cluster: &Cluster| super::state::session::sessions(&*cluster.core().store.view().unwrap()).unwrap().len();
    assert_eq!(sessions(&cluster), 2);
    cluster
        .until("both sessions have ended", |cluster| {
            cluster.clock.advance(Duration::from_millis(5));
            sessions(cluster) == 0
        })
        .await;
}

#[tokio::test]
async fn a_silent_mount_expires_with_all_that_it_held() {
    let options = Options { session_timeout: Duration::from_secs(3), ..options() };
    let mut cluster = Cluster::on(MemoryDisk::new(), options).await;
    cluster.hold_unlinked("a").await;
    let inodes = |cluster: &Cluster| cluster.core().store.view().unwrap().counters().inodes;
    cluster
        .until("what it held is reclaimed", |cluster| {
            cluster.clock.advance(Duration::from_millis(5));
            inodes(cluster) == 1
        })
        .await;
    assert_eq!(cluster.create("b", false).await, Err(Refusal::SessionExpired));
    cluster.check();
}

#[tokio::test]
async fn a_server_that_did_not_run_holds_it_against_nobody() {
    let mut cluster = Cluster::new().await;
    cluster.hold_unlinked("a").await;
    cluster.clock.advance(Duration::from_secs(1000));
    // It has had the time to judge.
    cluster
        .until("ticks have passed", |cluster| {
            cluster.core().sessions.lock().status(Duration::from_secs(1000))[0].silent_ms < 60_000
        })
        .await;
    cluster.create("b", true).await.unwrap();
    assert_eq!(cluster.core().store.view().unwrap().counters().inodes, 3, "it holds the first open");
    assert!((1..=3).all(|server| cluster.core().cluster.lock().is_up(ServerId(server))));
    // Whoever was judged before, and is heard before the judgement is carried out, stays.
    let early = cluster.running.proposer().expire(cluster.session, Duration::from_secs(60)).await;
    assert_eq!(early.unwrap_err(), Refusal::Unavailable);
    cluster.create("c", true).await.unwrap();
    cluster.check();
}

#[tokio::test]
async fn every_request_is_answered_only_to_the_right_role() {
    let cluster = Cluster::new().await;
    let storage = NodeName { role: Role::Storage, id: 1 };
    let meta = NodeName { role: Role::Meta, id: 2 };
    let stat = || MetaRequest::Query { session: SessionId(0), query: Query::GetAttr { ino: Ino::ROOT } };
    let beat = MetaRequest::Storage(StorageNotice::Heartbeat {
        address: ([127, 0, 0, 1], 1).into(),
        zone: String::new(),
        boot: BootId(1),
        load: StorageLoad::default(),
    });
    let token = MetaRequest::Admin(AdminRequest::IssueToken { role: Role::Admin, valid_secs: 10 });
    for (node, request) in [
        (storage, stat()),
        (meta, stat()),
        (MOUNT, beat.clone()),
        (ADMIN, beat),
        (MOUNT, token.clone()),
        (storage, token),
        (MOUNT, MetaRequest::Admin(AdminRequest::Check)),
        (storage, MetaRequest::Admin(AdminRequest::Status)),
        (NodeName { id: 2, ..MOUNT }, MetaRequest::Barrier { session: cluster.session }),
    ] {
        assert_eq!(cluster.ask(node, request.clone()).await, Err(Refusal::WrongRole), "{node}: {request:?}");
    }
    assert!(cluster.ask(ADMIN, stat()).await.is_ok());
    assert!(cluster.ask(MOUNT, MetaRequest::Admin(AdminRequest::Status)).await.is_ok());
    assert_eq!(cluster.ask(ADMIN, MetaRequest::Admin(AdminRequest::Check)).await, Ok(MetaAnswer::Violations(vec![])));
    let foreign = PeerIdentity { cluster: ClusterId([1; 16]), node: ADMIN };
    let frame = Frame { header: codec::encode(&stat()).unwrap(), payload: Vec::new() };
    let answer = Arc::clone(&cluster.running.service).serve(foreign, frame).await;
    assert_eq!(codec::decode::<MetaReply>(&answer.header).unwrap().result, Err(Refusal::WrongCluster));
    let garbage = Frame { header: vec![0xff; 40], payload: Vec::new() };
    let identity = PeerIdentity { cluster: CLUSTER, node: MOUNT };
    let answer = Arc::clone(&cluster.running.service).serve(identity, garbage).await;
    assert_eq!(codec::decode::<MetaReply>(&answer.header).unwrap().result, Err(Refusal::BadRequest));
}

#[tokio::test]
async fn a_token_becomes_one_certificate() {
    let cluster = Cluster::new().await;
    let issue = MetaRequest::Admin(AdminRequest::IssueToken { role: Role::Storage, valid_secs: 60 });
    let Ok(MetaAnswer::Token { secret, .. }) = cluster.ask(ADMIN, issue).await else { panic!("no token") };
    let csr = NodeKey::generate().unwrap().csr().unwrap();
    let enrol = |csr: Vec<u8>, secret| Arc::clone(&cluster.running.service).enrol(EnrolRequest { secret, csr });
    let enrolled = enrol(csr.clone(), secret).await.0.unwrap();
    assert_eq!((enrolled.role, enrolled.id, enrolled.cluster), (Role::Storage, 1, CLUSTER));
    assert_eq!(enrol(csr.clone(), secret).await.0.unwrap().id, 1, "the answer was lost");
    let other = NodeKey::generate().unwrap().csr().unwrap();
    assert_eq!(enrol(other, secret).await.0, Err(Refusal::BadToken));
    assert_eq!(enrol(csr, [0; 32]).await.0, Err(Refusal::BadToken));
}

#[tokio::test]
async fn duplicates_in_one_batch_are_applied_once() {
    let cluster = Cluster::new().await;
    let op = || words::make(Ino::ROOT, "a", Kind::File);
    let (one, two, three) = tokio::join!(
        cluster.mutate_as(1, false, op()),
        cluster.mutate_as(1, true, op()),
        cluster.mutate_as(1, false, op())
    );
    assert!(matches!(one, Ok(Mutated::Inode { created: true, .. })));
    assert_eq!((&one, &one), (&two, &three));
    cluster.check();
}

#[tokio::test]
async fn a_stop_leaves_a_checkpoint_and_an_empty_log() {
    let mut cluster = Cluster::new().await;
    cluster.create("a", false).await.unwrap();
    let applied = cluster.core().applied();
    let Cluster { running, disk, storages, clock, options, .. } = cluster;
    running.stop().await.unwrap();
    let logs = disk.list(Path::new("/data/log")).unwrap();
    assert_eq!(logs, [Path::new("/data/log").join(format!("{:020}.log", applied.0 + 1))]);
    let again = start(&disk.power_cut(0), &storages, &clock, &options).unwrap();
    assert_eq!((again.service.core.applied(), again.service.core.durable()), (applied, applied));
}

/// The answer, unless the disk fails first.
async fn in_time<T>(disk: &MemoryDisk, answer: impl Future<Output = Result<T, Refusal>>) -> Option<T> {
    let failure = async {
        while !disk.stopped() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    tokio::select! {
        answer = answer => answer.ok(),
        () = failure => None,
    }
}

/// Does things until the disk fails. Returns which names were acknowledged as durable, and how it ended.
async fn work(disk: &MemoryDisk, stop_at: u64) -> (BTreeSet<String>, BTreeSet<u8>, bool) {
    let mut cluster = Cluster::on(disk.clone(), Options { checkpoint_log_bytes: 1500, ..options() }).await;
    let (mut names, mut blocks) = (BTreeSet::new(), BTreeSet::new());
    disk.stop_at(stop_at);
    for round in 0..12u8 {
        let (name, durable) = (format!("file-{round}"), round % 3 == 0);
        let Some(ino) = in_time(disk, cluster.create(&name, durable)).await else { break };
        if durable {
            names.insert(name);
        }
        let durable = round % 4 == 1;
        if in_time(disk, cluster.write(ino, round, &[1, 2, 3], durable)).await.is_none() {
            break;
        }
        if durable {
            names.extend((0..=round).map(|n| format!("file-{n}")));
            blocks.extend(0..=round);
        }
    }
    if disk.stopped() {
        let fault = tokio::time::timeout(Duration::from_secs(5), cluster.running.failed()).await;
        assert!(matches!(fault, Ok(Fault::Storage(_) | Fault::Log(_) | Fault::Sync(_))), "{fault:?}");
    }
    (names, blocks, disk.stopped())
}

#[tokio::test]
async fn whatever_write_is_the_last_what_was_acknowledged_as_durable_is_there() {
    let mut stop_at = 1;
    loop {
        let disk = MemoryDisk::new();
        let (names, blocks, stopped) = work(&disk, stop_at).await;
        for after in [disk.power_cut(0), disk.power_cut(37), disk.process_death()] {
            let (storages, clock) = (Storages::default(), Arc::new(TestClock::default()));
            let running = start(&after, &storages, &clock, &options());
            let running = running.unwrap_or_else(|error| panic!("after write {stop_at}: {error}"));
            let cluster = Cluster {
                disk: after,
                storages,
                clock,
                options: options(),
                running,
                session: SessionId(1),
                sequence: 0,
            };
            assert!(names.is_subset(&cluster.names()), "after write {stop_at}: {names:?} of {:?}", cluster.names());
            for seed in &blocks {
                assert_eq!(cluster.holders(*seed), [1, 2, 3], "after write {stop_at}");
            }
            cluster.check();
        }
        if !stopped {
            break;
        }
        stop_at += 1;
    }
    assert!(stop_at > 50, "the work had only {stop_at} writes");
}

#[tokio::test]
async fn whatever_write_is_the_last_what_the_next_life_calls_durable_survives_the_power() {
    let mut stop_at = 1;
    loop {
        let disk = MemoryDisk::new();
        let (.., stopped) = work(&disk, stop_at).await;
        let after = disk.process_death();
        let life = |disk: &MemoryDisk| {
            let shared: Arc<dyn Disk> = Arc::new(disk.clone());
            recover(&shared, Path::new("/data"), Arc::new(TestClock::default()), &options()).unwrap()
        };
        let durable = life(&after).durable();
        let left = life(&after.power_cut(0)).applied();
        assert!(left >= durable, "after write {stop_at}: {durable} was durable, {left} is left");
        if !stopped {
            break;
        }
        stop_at += 1;
    }
}

#[tokio::test]
async fn a_status_tells_what_is() {
    let mut cluster = Cluster::new().await;
    let ino = cluster.create("a", false).await.unwrap();
    cluster.write(ino, 1, &[1, 2], true).await.unwrap();
    cluster.until("the third copy is made", |cluster| cluster.holders(1).len() == 3).await;
    let Ok(MetaAnswer::Status(status)) = cluster.ask(ADMIN, MetaRequest::Admin(AdminRequest::Status)).await else {
        panic!("no status")
    };
    assert_eq!((status.inodes, status.blocks, status.blocks_by_copies), (2, 1, [0, 0, 0, 1]));
    assert_eq!((status.owed, status.copies_made, status.servers.len(), status.mounts.len()), (0, 1, 3, 1));
    assert!(status.log_position >= status.durable_through && status.durable_through > Position(0));
    let space = cluster.ask(MOUNT, MetaRequest::Query { session: SessionId(0), query: Query::StatFs }).await;
    assert!(matches!(space, Ok(MetaAnswer::StatFs(space)) if space.capacity_bytes == 1 << 40 && space.inodes == 2));
}

fn soon_collected() -> Options {
    Options { garbage_grace: Duration::from_secs(5), ..options() }
}

impl Cluster {
    fn copies(&self, seed: u8) -> Vec<u32> {
        let has = |id: &u32| self.storages.with(*id, |storage| storage.visible.contains(&words::hash(seed)));
        (1..=4).filter(has).collect()
    }

    fn counters(&self) -> super::state::rows::Counters {
        self.core().store.view().unwrap().counters().clone()
    }
}

#[tokio::test]
async fn what_no_file_names_is_deleted_after_its_grace_and_nothing_else() {
    let mut cluster = Cluster::on(MemoryDisk::new(), soon_collected()).await;
    let inos = [cluster.create("a", false).await.unwrap(), cluster.create("b", false).await.unwrap()];
    for (ino, seed) in [(inos[0], 1), (inos[0], 2), (inos[1], 3)] {
        cluster.write(ino, seed, &[1, 2, 3], true).await.unwrap();
    }
    let began = cluster.clock.monotonic();
    cluster
        .while_heard(&[1, 2, 3], "what was overwritten is forgotten", |cluster| cluster.counters().collected == 1)
        .await;
    assert!(cluster.clock.monotonic() - began >= Duration::from_secs(7), "its grace, and time to hear of the epoch");
    assert_eq!([1, 2, 3].map(|seed| cluster.copies(seed)), [vec![], vec![1, 2, 3], vec![1, 2, 3]]);
    cluster.mutate(true, Op::Unlink { parent: Ino::ROOT, name: b"a".to_vec() }).await.unwrap();
    cluster
        .while_heard(&[1, 2, 3], "what was in a deleted file is, too", |cluster| cluster.counters().collected == 2)
        .await;
    assert_eq!([2, 3].map(|seed| cluster.copies(seed)), [vec![], vec![1, 2, 3]]);
    assert_eq!((cluster.counters().unnamed, cluster.counters().condemned), (0, 0));
    cluster.check();
}

#[tokio::test]
async fn what_is_put_again_before_it_is_deleted_stays() {
    let mut cluster = Cluster::on(MemoryDisk::new(), soon_collected()).await;
    let ino = cluster.create("a", false).await.unwrap();
    cluster.write(ino, 1, &[1, 2, 3], true).await.unwrap();
    cluster.storages.with(2, |storage| storage.dead = true);
    cluster.write(ino, 2, &[1, 3], true).await.unwrap();
    cluster.while_heard(&[1, 3], "the first is condemned", |cluster| cluster.counters().condemned == 1).await;
    assert_eq!(cluster.write(ino, 1, &[1, 3], false).await, Err(Refusal::BlockGone));
    let epoch = cluster.core().epoch();
    [1, 3].iter().for_each(|id| cluster.storages.with(*id, |storage| storage.raise(words::hash(1), epoch)));
    let again = match cluster.put(ino, 1, &[1, 3]) {
        Op::Commit { files, blocks } => {
            Op::Commit { files, blocks: blocks.into_iter().map(|block| NewBlock { epoch, ..block }).collect() }
        }
        other => other,
    };
    cluster.mutate(true, again).await.unwrap();
    cluster.storages.with(2, |storage| storage.dead = false);
    cluster.while_heard(&[1, 2, 3], "the other is collected", |cluster| cluster.counters().collected == 1).await;
    assert!(cluster.copies(1).contains(&1) && cluster.copies(1).contains(&3) && cluster.copies(2).is_empty());
    cluster.check();
}

#[tokio::test]
async fn what_no_file_names_is_kept_for_the_grace_also_after_a_long_rest() {
    let mut cluster = Cluster::on(MemoryDisk::new(), soon_collected()).await;
    let ino = cluster.create("a", false).await.unwrap();
    cluster.write(ino, 1, &[1, 2, 3], true).await.unwrap();
    let rested = cluster.clock.monotonic() + 2 * soon_collected().garbage_grace;
    cluster
        .while_heard(&[1, 2, 3], "nothing has happened for long", |cluster| cluster.clock.monotonic() > rested)
        .await;
    let before = cluster.clock.monotonic();
    cluster.write(ino, 2, &[1, 2, 3], true).await.unwrap();
    let is_condemned = |cluster: &Cluster| cluster.counters().condemned + cluster.counters().collected > 0;
    cluster.while_heard(&[1, 2, 3], "the first is condemned", is_condemned).await;
    let kept = cluster.clock.monotonic() - before;
    assert!(kept >= soon_collected().garbage_grace, "it was kept for {kept:?}");
}

#[tokio::test]
async fn a_condemned_block_waits_for_a_holder_that_is_down_and_goes_on_after_a_restart() {
    let mut cluster =
        Cluster::on(MemoryDisk::new(), Options { session_timeout: Duration::from_secs(20), ..soon_collected() }).await;
    let ino = cluster.create("a", false).await.unwrap();
    for seed in [1, 2] {
        cluster.write(ino, seed, &[1, 2, 3], true).await.unwrap();
    }
    cluster.storages.with(2, |storage| storage.dead = true);
    cluster.while_heard(&[1, 3], "it is deleted where it can be", |cluster| cluster.copies(1) == [2]).await;
    assert_eq!(cluster.counters().condemned, 1);
    let cut = cluster.disk.power_cut(0);
    let cluster = cluster.restarted(cut);
    cluster.storages.with(2, |storage| storage.dead = false);
    let is_there = |cluster: &Cluster| cluster.copies(1) == [2];
    cluster.while_heard(&[1, 2, 3], "the mount is waited for no more", |cluster| !cluster.core().is_recovering()).await;
    assert!(is_there(&cluster) && !cluster.core().may_collect(), "it may still say again what it had done");
    cluster.while_heard(&[1, 2, 3], "it is deleted everywhere", |cluster| cluster.counters().collected == 1).await;
    assert_eq!((cluster.copies(1), cluster.copies(2)), (vec![], vec![1, 2, 3]));
    cluster.check();
}

fn soon_compared() -> Options {
    Options { garbage_grace: Duration::from_secs(4), compare_every: Duration::from_secs(6), ..options() }
}

#[tokio::test]
async fn what_a_server_turns_out_not_to_have_is_copied_there_again() {
    let mut cluster =
        Cluster::on(MemoryDisk::new(), Options { garbage_grace: options().garbage_grace, ..soon_compared() }).await;
    let ino = cluster.create("a", false).await.unwrap();
    cluster.write(ino, 1, &[1, 2, 3], true).await.unwrap();
    // Silently: its boot id is the same, and nobody reads.
    cluster.storages.with(3, |storage| {
        storage.visible.clear();
        storage.durable.clear();
    });
    cluster.while_heard(&[1, 2, 3], "it is there again", |cluster| cluster.copies(1) == [1, 2, 3]).await;
    cluster.while_heard(&[1, 2, 3], "and on record", |cluster| cluster.holders(1) == [1, 2, 3]).await;
    assert_eq!(cluster.counters().copies_made, 1);
    cluster.check();
}

#[tokio::test]
async fn a_server_that_comes_up_with_another_boot_id_is_compared_at_once() {
    let mut cluster = Cluster::new().await;
    let ino = cluster.create("a", false).await.unwrap();
    cluster.write(ino, 1, &[1, 2, 3], true).await.unwrap();
    cluster.storages.with(3, |storage| {
        storage.durable.clear();
    });
    cluster.storages.reboot(3);
    let began = cluster.clock.monotonic();
    cluster.while_heard(&[1, 2, 3], "it is there again", |cluster| cluster.copies(1) == [1, 2, 3]).await;
    assert!(cluster.clock.monotonic() - began < Duration::from_secs(60), "not only when its time has come");
}

#[tokio::test]
async fn copies_that_nobody_needs_are_deleted_and_those_that_are_short_counted() {
    let mut cluster = Cluster::on(MemoryDisk::new(), soon_compared()).await;
    cluster.heartbeat(4).await;
    let inos = [cluster.create("a", false).await.unwrap(), cluster.create("b", false).await.unwrap()];
    cluster.write(inos[0], 1, &[1, 2, 3], true).await.unwrap();
    cluster.storages.with(3, |storage| storage.dead = true);
    cluster.storages.with(4, |storage| {
        // A put without a commit, a copy too many, and one that will be short of copies.
        storage.visible.extend([50, 1, 2].map(words::hash));
        storage.dead = true;
    });
    cluster.write(inos[1], 2, &[1, 2], true).await.unwrap();
    assert_eq!((cluster.owed(), cluster.copies(50)), (1, vec![4]));
    cluster.storages.with(3, |storage| storage.dead = false);
    cluster.storages.with(4, |storage| storage.dead = false);
    cluster
        .while_heard(&[1, 2, 3, 4], "the useless ones are gone", |cluster| {
            cluster.copies(50).is_empty() && !cluster.copies(1).contains(&4)
        })
        .await;
    assert_eq!((cluster.copies(1), cluster.holders(1)), (vec![1, 2, 3], vec![1, 2, 3]));
    cluster
        .while_heard(&[1, 2, 3, 4], "nothing is owed, and left over", |cluster| {
            cluster.owed() == 0 && cluster.counters().condemned == 0 && cluster.copies(2).len() == 3
        })
        .await;
    cluster.check();
}

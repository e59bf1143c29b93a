//! The servers, on machines that can be stopped.

use super::*;

/// Bytes a second, and how often a pass begins.
const SCRUB_RATE: u64 = 1 << 20;
const SCRUB_EVERY: Duration = Duration::from_secs(2);

/// Every second cluster has three zones, two of its servers in one of them.
pub(super) fn zone(seed: u64, id: u32) -> &'static str {
    if (seed / 4).is_multiple_of(2) { "" } else { ["a", "a", "b", "c"][id as usize - 1] }
}

/// Every third puts copies of its metadata on its storage servers.
fn options(seed: u64) -> Options {
    let backup_every = if seed.is_multiple_of(3) { Duration::from_secs(1) } else { Duration::ZERO };
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
        backup_every,
        spread_after: Duration::from_millis(500),
    }
}

/// A metadata server.
pub(super) struct Meta {
    pub(super) disk: SimDisk,
    pub(super) host: Arc<Host>,
    pub(super) _running: Running,
}

/// A storage server, with all that it does by itself.
pub(super) struct Storage {
    pub(super) disk: SimDisk,
    pub(super) host: Arc<Host>,
    pub(super) store: Arc<Store>,
    pub(super) service: Arc<StorageService>,
    pub(super) bad: mpsc::UnboundedReceiver<BlockHash>,
    pub(super) _scrubbing: Scrubbing,
}

/// The machines.
pub(super) struct Machines {
    pub(super) ether: Ether,
    pub(super) clock: Arc<JumpingClock>,
    pub(super) meta: Option<Meta>,
    pub(super) storage: BTreeMap<u32, Storage>,
    pub(super) seed: u64,
    /// Of storage servers.
    pub(super) flush_every: Duration,
    /// Storage servers' disks neither lie nor lose anything: then no copy may ever be missed.
    pub(super) honest: bool,
    /// How often each fault struck.
    pub(super) faults: BTreeMap<String, u32>,
}

/// A copy that gets lost by mistake is made again soon, from the others: only where none can get lost it tells something.
pub(super) fn is_honest(seed: u64) -> bool {
    (seed / 2).is_multiple_of(2)
}

/// Whoever makes everything durable all the time shows nothing of a bug by which that is forgotten.
pub(super) fn flush_every(seed: u64) -> Duration {
    if cfg!(feature = "planted") || seed.is_multiple_of(2) { FLUSH_LAZILY } else { FLUSH_BUSILY }
}

impl Machines {
    pub(super) fn start(ether: Ether, seed: u64) -> Self {
        let mut machines = Self {
            ether,
            clock: Arc::default(),
            meta: None,
            storage: BTreeMap::new(),
            seed,
            flush_every: flush_every(seed),
            honest: is_honest(seed),
            faults: BTreeMap::new(),
        };
        STORAGE.for_each(|id| machines.start_storage(id, SimDisk::new()));
        machines.start_meta(SimDisk::new());
        machines
    }

    pub(super) fn start_storage(&mut self, id: u32, disk: SimDisk) {
        let host = self.ether.host(storage(id));
        let (peers, seam): (Arc<dyn Peers>, Arc<dyn Disk>) = (Arc::clone(&host) as _, Arc::new(disk.clone()));
        let store = open_store(&seam, self.flush_every).expect("its disk works");
        let backups = Backups::new(Arc::clone(&seam), Path::new(DIRECTORY), store.ballast());
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

    pub(super) fn start_meta(&mut self, disk: SimDisk) {
        let host = self.ether.host(META);
        let peers = Arc::clone(&host) as Arc<dyn Peers>;
        let clock = Arc::clone(&self.clock) as Arc<dyn Clock>;
        let running = start_meta(&disk, peers, clock, &options(self.seed)).expect("its disk works");
        host.serve(Arc::clone(&running.service) as Arc<dyn Serve>);
        self.meta = Some(Meta { disk, host, _running: running });
    }

    /// What is left of a storage server's disk. `seed`: its machine loses its power.
    pub(super) fn stop_storage(&mut self, id: u32, seed: Option<u64>) -> SimDisk {
        let stopped = self.storage.remove(&id).expect("it runs");
        stopped.host.die();
        seed.map_or_else(|| stopped.disk.after_kill(), |seed| stopped.disk.after_power_cut(seed))
    }

    /// As a service manager does with a server that had to end.
    pub(super) fn restart_failed(&mut self) {
        let failed = |storage: &Storage| storage.store.failed().now_or_never().is_some();
        let ids: Vec<u32> = self.storage.iter().filter(|(_, storage)| failed(storage)).map(|(id, _)| *id).collect();
        for id in ids {
            let disk = self.stop_storage(id, None);
            self.start_storage(id, disk);
        }
    }

    pub(super) fn stop_meta(&mut self, seed: Option<u64>) -> SimDisk {
        let stopped = self.meta.take().expect("it runs");
        stopped.host.die();
        seed.map_or_else(|| stopped.disk.after_kill(), |seed| stopped.disk.after_power_cut(seed))
    }
}

/// Every storage server that runs says so, and which bad copies it has found.
pub(super) async fn beat(machines: Arc<Mutex<Machines>>) {
    loop {
        beat_once(&mut machines.lock());
        tokio::time::sleep(HEARTBEAT).await;
    }
}

fn beat_once(machines: &mut Machines) {
    let seed = machines.seed;
    for (id, storage) in &mut machines.storage {
        let space = storage.store.space().unwrap_or(Space { capacity: 0, free: 0 });
        let load = storage.service.load();
        let load = StorageLoad { capacity_bytes: space.capacity, free_bytes: space.free, ..load };
        let (address, zone) = (storage.host.endpoint().address, zone(seed, *id).to_owned());
        let boot = storage.service.boot();
        let mut notices = vec![StorageNotice::Heartbeat { address, zone, boot, load }];
        let blocks: Vec<BlockHash> = std::iter::from_fn(|| storage.bad.try_recv().ok()).collect();
        if !blocks.is_empty() {
            tracing::debug!(id, blocks = blocks.len(), "bad copies are told");
            notices.push(StorageNotice::BadCopies { blocks });
        }
        tokio::spawn(say(Arc::clone(&storage.host), Arc::clone(&storage.service), notices));
    }
}

pub(super) async fn say(host: Arc<Host>, service: Arc<StorageService>, notices: Vec<StorageNotice>) {
    for notice in notices {
        match ask_meta(&*host, &MetaRequest::Storage(notice)).await {
            Ok(reply) => service.hear(reply.epoch),
            Err(wrong) => tracing::debug!(%wrong, "a notice is not heard"),
        }
    }
}

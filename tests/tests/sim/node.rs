//! The servers of a simulated cluster: real services on simulated disks, with function calls for a network.

use std::{
    collections::BTreeMap,
    future::Future,
    ops::RangeInclusive,
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use holdfast_common::{
    ClusterId, Refusal,
    clock::{Clock, SystemClock},
    disk::Disk,
    net::{
        BoxFuture, CallError, Endpoint, Frame, Peers, Serve,
        identity::{NodeName, PeerIdentity, Role},
        tls::Fingerprint,
    },
    wire::{
        codec::{decode, encode},
        meta::{MetaAnswer, MetaReply, MetaRequest, StorageLoad, StorageNotice},
        storage::{StorageAnswer, StorageReply, StorageRequest},
    },
};
use holdfast_server::{
    meta::server::{Authority, Options, Running, recover},
    storage::{
        Backups, StorageService, start_service,
        store::{Store, StoreOptions},
    },
};
use holdfast_tests::sim_disk::SimDisk;
use parking_lot::Mutex;
use tokio::sync::watch;

pub(crate) const STORAGE_SERVERS: RangeInclusive<u32> = 1..=3;
/// Of a storage server, on its disk.
pub(crate) const DIRECTORY: &str = "/storage";
pub(crate) const CLUSTER: ClusterId = ClusterId([7; 16]);
/// How often a storage server does by itself what its disk needs. All the time, so that much happens in a short history; or hardly
/// ever, so that what is durable is what somebody has asked for.
pub(crate) const FLUSH_BUSILY: Duration = Duration::from_millis(1);
pub(crate) const FLUSH_LAZILY: Duration = Duration::from_secs(10);
/// How often a caller looks whether there still is power.
const POWER_POLL: Duration = Duration::from_millis(2);

/// Runs `future` on a runtime of its own; what it left running ends with it.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

type Services = Arc<Mutex<BTreeMap<NodeName, Attached>>>;

/// Who answers for a node.
struct Attached {
    service: Weak<dyn Serve>,
    /// Whoever waits for an answer hears when this goes.
    life: watch::Sender<()>,
}

/// Where callers find the services of the life that goes on.
#[derive(Clone, Default)]
pub(crate) struct Network {
    services: Services,
    /// Storage servers do not hear each other; everybody else hears everybody.
    storage_apart: Arc<AtomicBool>,
}

impl Network {
    /// As a node has it.
    pub(crate) fn of(&self, role: Role, id: u32) -> Arc<dyn Peers> {
        Arc::new(Calls { from: identity(role, id), network: self.clone() })
    }

    /// As a mount has it.
    pub(crate) fn of_client(&self, id: u32) -> Arc<dyn Peers> {
        self.of(Role::Client, id)
    }

    pub(crate) fn meta() -> Endpoint {
        endpoint(Role::Meta, 1)
    }

    /// Cuts every storage server off from the others, and from nobody else.
    pub(crate) fn part_storage(&self) {
        self.storage_apart.store(true, Ordering::Relaxed);
    }

    fn is_cut(&self, from: NodeName, to: NodeName) -> bool {
        from.role == Role::Storage && to.role == Role::Storage && self.storage_apart.load(Ordering::Relaxed)
    }

    /// From now on, calls to that node are answered by `service`, for as long as that lives.
    pub(crate) fn attach(&self, role: Role, id: u32, service: &Arc<dyn Serve>) {
        let attached = Attached { service: Arc::downgrade(service), life: watch::Sender::new(()) };
        self.services.lock().insert(NodeName { role, id }, attached);
    }
}

/// The network as one node has it.
#[derive(Clone)]
struct Calls {
    from: PeerIdentity,
    network: Network,
}

impl Peers for Calls {
    fn call(&self, to: Endpoint, request: Frame, deadline: Duration) -> BoxFuture<'_, Result<Frame, CallError>> {
        Box::pin(async move {
            if self.network.is_cut(self.from.node, to.name) {
                return Err(CallError::Connect(to.address, "no way".into()));
            }
            let found =
                self.network.services.lock().get(&to.name).map(|it| (it.service.upgrade(), it.life.subscribe()));
            let Some((Some(service), mut life)) = found else {
                return Err(CallError::Connect(to.address, "nobody is there".into()));
            };
            let answer = tokio::select! {
                biased;
                // Whoever has died says nothing any more.
                _ = life.changed() => Err(CallError::Lost(to.address, "it has died".into())),
                answer = service.serve(self.from, in_one_part(request)) => Ok(in_one_part(answer)),
                () = tokio::time::sleep(deadline) => Err(CallError::Deadline(to.address, deadline)),
            };
            answer
        })
    }
}

/// As the payload of a frame arrives from a network.
fn in_one_part(frame: Frame) -> Frame {
    let payload: Vec<u8> = frame.payload.concat();
    Frame { header: frame.header, payload: if payload.is_empty() { Vec::new() } else { vec![payload.into()] } }
}

fn identity(role: Role, id: u32) -> PeerIdentity {
    PeerIdentity { cluster: CLUSTER, node: NodeName { role, id } }
}

pub(crate) fn endpoint(role: Role, id: u32) -> Endpoint {
    Endpoint {
        address: ([127, 0, 0, 1], 7000 + u16::try_from(id).expect("few servers")).into(),
        name: NodeName { role, id },
    }
}

/// A cluster from its start to its end.
pub(crate) struct Life {
    disk: SimDisk,
    network: Network,
    _meta: Running,
    _storage: Vec<Arc<dyn Serve>>,
}

impl Life {
    /// `disks`: the metadata server's, then one for each storage server. `None`: the power is gone.
    pub(crate) async fn start(disks: Vec<SimDisk>) -> Option<Self> {
        Self::start_on(disks, Network::default()).await
    }

    /// On a network that others use too.
    pub(crate) async fn start_on(disks: Vec<SimDisk>, network: Network) -> Option<Self> {
        let mut storage: Vec<Arc<dyn Serve>> = Vec::new();
        for id in STORAGE_SERVERS {
            let disk = Arc::new(disks[id as usize].clone());
            let peers = network.of(Role::Storage, id);
            let service: Arc<dyn Serve> = start_storage(disk, id, peers, FLUSH_BUSILY)?;
            network.attach(Role::Storage, id, &service);
            storage.push(service);
        }
        let options = Options {
            cluster: CLUSTER,
            cache_bytes: 1 << 20,
            // Small, so that a short history has checkpoints.
            checkpoint_log_bytes: 4096,
            // Mounts say every half second that they are alive.
            session_timeout: Duration::from_secs(15),
            recovery_window: Duration::from_millis(1500),
            reserve_bytes: 0,
            suspect_after: Duration::from_secs(20),
            down_after: Duration::from_secs(60),
            replace_after: Duration::from_secs(300),
            garbage_grace: Duration::from_secs(3600),
            compare_every: Duration::from_secs(3600),
            backup_every: Duration::ZERO,
            spread_after: Duration::from_secs(10),
        };
        let meta = start_meta(&disks[0], network.of(Role::Meta, 1), Arc::new(SystemClock::default()), &options)?;
        network.attach(Role::Meta, 1, &(Arc::clone(&meta.service) as Arc<dyn Serve>));
        let life = Self { disk: disks[0].clone(), network, _meta: meta, _storage: storage };
        life.introduce().await.then_some(life)
    }

    /// Every storage server tells that it is there.
    async fn introduce(&self) -> bool {
        for id in STORAGE_SERVERS {
            let has = StorageRequest::Has { blocks: Vec::new() };
            let Some((Ok(StorageAnswer::Has { boot, .. }), _)) = self.storage(id, has, Bytes::new()).await else {
                return false;
            };
            let address = endpoint(Role::Storage, id).address;
            let load = StorageLoad { capacity_bytes: 1 << 40, free_bytes: 1 << 39, ..StorageLoad::default() };
            let beat = StorageNotice::Heartbeat { address, zone: String::new(), boot, load };
            let request = MetaRequest::Storage(beat);
            if !matches!(self.ask_meta(Role::Storage, id, request).await, Some(Ok(_))) {
                return false;
            }
        }
        true
    }

    /// `None`: the power went before an answer came.
    async fn call(&self, from: PeerIdentity, to: Endpoint, frame: Frame) -> Option<Frame> {
        let calls = Calls { from, network: self.network.clone() };
        let answer = calls.call(to, frame, Duration::from_secs(20));
        tokio::select! {
            answer = answer => answer.ok(),
            () = self.power_cut() => None,
        }
    }

    async fn power_cut(&self) {
        while !self.disk.has_struck() {
            tokio::time::sleep(POWER_POLL).await;
        }
        // What was answered in the same moment may still arrive.
        tokio::time::sleep(POWER_POLL).await;
    }

    async fn ask_meta(&self, role: Role, id: u32, request: MetaRequest) -> Option<Result<MetaAnswer, Refusal>> {
        let header = encode(&request).expect("a short request");
        let frame = Frame { header, payload: Vec::new() };
        let answer = self.call(identity(role, id), endpoint(Role::Meta, 1), frame).await?;
        Some(decode::<MetaReply>(&answer.header).expect("a metadata server's answer").result)
    }

    pub(crate) async fn meta(&self, request: MetaRequest) -> Option<Result<MetaAnswer, Refusal>> {
        let role = if matches!(request, MetaRequest::Admin(_)) { Role::Admin } else { Role::Client };
        self.ask_meta(role, 1, request).await
    }

    pub(crate) async fn storage(
        &self,
        server: u32,
        request: StorageRequest,
        payload: Bytes,
    ) -> Option<(Result<StorageAnswer, Refusal>, Bytes)> {
        let role = match request {
            StorageRequest::Has { .. } => Role::Meta,
            _ => Role::Client,
        };
        let payload = if payload.is_empty() { Vec::new() } else { vec![payload] };
        let frame = Frame { header: encode(&request).expect("a short request"), payload };
        let answer = self.call(identity(role, 1), endpoint(Role::Storage, server), frame).await?;
        let reply: StorageReply = decode(&answer.header).expect("a storage server's answer");
        Some((reply.0, answer.payload.concat().into()))
    }
}

/// `None`: the power is gone.
pub(crate) fn start_meta(
    disk: &SimDisk,
    peers: Arc<dyn Peers>,
    clock: Arc<dyn Clock>,
    options: &Options,
) -> Option<Running> {
    let seam: Arc<dyn Disk> = Arc::new(disk.clone());
    // As a data directory does, which is opened before.
    for path in ["/", "/meta"] {
        seam.create_directory(Path::new(path)).and_then(|()| seam.sync_directory(Path::new("/"))).ok()?;
    }
    let core = match recover(&seam, Path::new("/meta"), clock, options) {
        Ok(core) => core,
        Err(_) if disk.has_struck() => return None,
        Err(error) => panic!("the metadata does not recover: {error}"),
    };
    let authority = Authority { ca: None, ca_fingerprint: Fingerprint([0; 32]), secrets: Box::new(rand::random) };
    Some(Running::start(core, peers, authority, options))
}

/// `None`: the power is gone.
pub(crate) fn start_storage(
    disk: Arc<dyn Disk>,
    id: u32,
    peers: Arc<dyn Peers>,
    flush_every: Duration,
) -> Option<Arc<StorageService>> {
    let store = open_store(&disk, flush_every)?;
    let backups = Backups::new(disk, Path::new(DIRECTORY), store.ballast());
    Some(start_service(store, peers, id, backups).expect("threads can be started"))
}

/// `None`: the power is gone.
pub(crate) fn open_store(disk: &Arc<dyn Disk>, flush_every: Duration) -> Option<Arc<Store>> {
    let options = StoreOptions {
        segment_bytes: 64 << 10,
        reserve_bytes: 0,
        flush_every,
        flushes_per_checkpoint: 3,
        ..StoreOptions::default()
    };
    Store::open(Arc::clone(disk), Path::new(DIRECTORY), options).ok().map(Arc::new)
}

//! Both roles over real QUIC, in one process.

use std::{
    future::Future,
    net::{SocketAddr, UdpSocket},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use holdfast_common::{
    BlockHash, ChunkIndex, ClusterId, Ino, Kind, Piece, Refusal, Sequence, ServerId, SessionId, Time,
    clock::{Clock, SystemClock},
    cluster::ServerState,
    config::{MetaConfig, MetaOptions, StorageConfig, StorageOptions},
    disk::RealDisk,
    net::{
        Endpoint, Frame, Peers,
        identity::{NodeName, Role},
        quic::{NetOptions, Node},
        tls::{Ca, NODE_VALIDITY},
    },
    wire::{
        codec,
        meta::{
            AdminRequest, ClusterStatus, FileCommit, Holder, MetaAnswer, MetaReply, MetaRequest, Mutated, NewBlock,
            NewInode, Op, Query, SessionRequest,
        },
        storage::{PutBlock, StorageAnswer, StorageReply, StorageRequest},
    },
};
use tokio::{sync::oneshot, task::JoinHandle};

const DEADLINE: Duration = Duration::from_secs(20);

struct Daemon {
    stop: oneshot::Sender<()>,
    ended: JoinHandle<()>,
}

impl Daemon {
    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.ended.await.unwrap();
    }
}

/// Starts a daemon and waits until it is ready. `run` gets what it must call then, and what ends it.
async fn start<F: Future<Output = ()> + Send + 'static>(
    run: impl FnOnce(Box<dyn FnOnce() + Send>, oneshot::Receiver<()>) -> F,
) -> Daemon {
    let (ready, is_ready) = oneshot::channel();
    let (stop, stopped) = oneshot::channel();
    let ended = tokio::spawn(run(Box::new(move || ready.send(()).unwrap()), stopped));
    tokio::time::timeout(DEADLINE, is_ready).await.unwrap().unwrap();
    Daemon { stop, ended }
}

fn free_address() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

struct Ground {
    directory: tempfile::TempDir,
    ca: Ca,
    meta: SocketAddr,
    storages: Vec<SocketAddr>,
}

impl Ground {
    fn new() -> Self {
        let ca = Ca::create(ClusterId([3; 16]), SystemClock::default().now()).unwrap();
        let (meta, storages) = (free_address(), (0..3).map(|_| free_address()).collect());
        let ground = Self { directory: tempfile::tempdir().unwrap(), ca, meta, storages };
        for (role, id) in [(Role::Meta, 1), (Role::Storage, 1), (Role::Storage, 2), (Role::Storage, 3)] {
            let node = NodeName { role, id };
            ground.credentials(node).save(&ground.path(node).join("tls")).unwrap();
        }
        ground
    }

    fn credentials(&self, node: NodeName) -> holdfast_common::net::tls::Credentials {
        self.ca.issue_credentials(node, SystemClock::default().now(), NODE_VALIDITY).unwrap()
    }

    fn path(&self, node: NodeName) -> std::path::PathBuf {
        Path::new(self.directory.path()).join(node.to_string())
    }

    async fn start_meta(&self) -> Daemon {
        let data_dir = Some(self.path(NodeName { role: Role::Meta, id: 1 }));
        let options = MetaOptions { data_dir, listen: Some(self.meta), ..MetaOptions::default() };
        let config = MetaConfig::resolve(options).unwrap();
        let (disk, clock) = (Arc::new(RealDisk), Arc::new(SystemClock::default()));
        start(|ready, stopped| async move {
            crate::meta::run(config, disk, clock, ready, async { stopped.await.unwrap() }).await.unwrap();
        })
        .await
    }

    async fn start_storage(&self, id: u32) -> Daemon {
        let options = StorageOptions {
            data_dir: Some(vec![self.path(NodeName { role: Role::Storage, id })]),
            listen: Some(self.storages[id as usize - 1]),
            meta: Some(self.meta.to_string()),
            ..StorageOptions::default()
        };
        let config = StorageConfig::resolve_all(options).unwrap().remove(0);
        let (disk, clock) = (Arc::new(RealDisk), Arc::new(SystemClock::default()));
        start(|ready, stopped| async move {
            crate::storage::run(config, disk, clock, ready, async { stopped.await.unwrap() }).await.unwrap();
        })
        .await
    }
}

/// A mount, as far as the servers can tell.
struct Mount<'a> {
    ground: &'a Ground,
    node: Arc<Node>,
    admin: Arc<Node>,
    session: SessionId,
    sequence: u64,
}

impl<'a> Mount<'a> {
    async fn new(ground: &'a Ground) -> Self {
        let [node, admin] = [Role::Client, Role::Admin].map(|role| {
            let credentials = ground.credentials(NodeName { role, id: 1 });
            Node::bind("127.0.0.1:0".parse().unwrap(), credentials, NetOptions::default()).unwrap()
        });
        let mut mount = Self { ground, node, admin, session: SessionId(0), sequence: 0 };
        let (host, mountpoint) = ("here".into(), "/mnt".into());
        let open = SessionRequest::Open { instance: [1; 16], host, mountpoint };
        match mount.ask(MetaRequest::Session(open)).await {
            Ok(MetaAnswer::Session { session, .. }) => mount.session = session,
            other => panic!("{other:?}"),
        }
        mount
    }

    /// Administrative requests go under the admin's certificate.
    async fn ask(&self, request: MetaRequest) -> Result<MetaAnswer, Refusal> {
        let from = if matches!(request, MetaRequest::Admin(_)) { &self.admin } else { &self.node };
        let to = Endpoint { address: self.ground.meta, name: NodeName { role: Role::Meta, id: 1 } };
        let frame = Frame { header: codec::encode(&request).unwrap(), payload: Vec::new() };
        let answer = from.call(to, frame, DEADLINE).await.unwrap();
        codec::decode::<MetaReply>(&answer.header).unwrap().result
    }

    async fn mutate(&mut self, durable: bool, op: Op) -> Mutated {
        self.sequence += 1;
        let (session, sequence, answered_below) = (self.session, Sequence(self.sequence), Sequence(1));
        match self.ask(MetaRequest::Mutate { session, sequence, answered_below, durable, op }).await {
            Ok(MetaAnswer::Mutated { outcome, .. } | MetaAnswer::MutatedIn { outcome, .. }) => outcome,
            other => panic!("{other:?}"),
        }
    }

    async fn create(&mut self, name: &str) -> Ino {
        let new = NewInode { kind: Kind::File, mode: 0o644, uid: 0, gid: 0, rdev: 0, target: Vec::new() };
        let op = Op::Make { parent: Ino::ROOT, name: name.into(), new, exclusive: true, open: false };
        match self.mutate(false, op).await {
            Mutated::Inode { attr, .. } => attr.ino,
            other => panic!("{other:?}"),
        }
    }

    async fn put(&self, id: u32, bytes: &Bytes) -> Holder {
        let name = NodeName { role: Role::Storage, id };
        let to = Endpoint { address: self.ground.storages[id as usize - 1], name };
        let length = u32::try_from(bytes.len()).unwrap();
        let block = PutBlock { hash: BlockHash::of(bytes), length, epoch: holdfast_common::Epoch(0) };
        let request = StorageRequest::Put { blocks: vec![block], durable: false };
        let frame = Frame { header: codec::encode(&request).unwrap(), payload: vec![bytes.clone()] };
        let answer = self.node.call(to, frame, DEADLINE).await.unwrap();
        match codec::decode::<StorageReply>(&answer.header).unwrap().0 {
            Ok(StorageAnswer::Put { boot, durable }) => Holder { server: ServerId(id), boot, durable },
            other => panic!("{other:?}"),
        }
    }

    /// Writes `bytes` to `servers` and has them durable.
    async fn write(&mut self, ino: Ino, bytes: &'static [u8], servers: &[u32]) -> Mutated {
        let bytes = Bytes::from_static(bytes);
        let mut holders = Vec::new();
        for id in servers {
            holders.push(self.put(*id, &bytes).await);
        }
        let (hash, length) = (BlockHash::of(&bytes), u32::try_from(bytes.len()).unwrap());
        let piece = Piece { offset: 0, length, block: hash, block_offset: 0 };
        let file = FileCommit {
            ino,
            pieces: vec![(ChunkIndex(0), piece)],
            size_at_least: u64::from(length),
            mtime: Time::default(),
            clear_suid: false,
            only_over: Vec::new(),
        };
        self.mutate(
            true,
            Op::Commit {
                files: vec![file],
                blocks: vec![NewBlock { hash, length, holders, epoch: holdfast_common::Epoch(0) }],
            },
        )
        .await
    }

    async fn status(&self) -> ClusterStatus {
        match self.ask(MetaRequest::Admin(AdminRequest::Status)).await {
            Ok(MetaAnswer::Status(status)) => *status,
            other => panic!("{other:?}"),
        }
    }

    async fn until(&self, what: &str, condition: impl Fn(&ClusterStatus) -> bool) {
        let waited = tokio::time::timeout(DEADLINE, async {
            while !condition(&self.status().await) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        assert!(waited.await.is_ok(), "waited in vain until {what}: {:?}", self.status().await);
    }
}

fn up(status: &ClusterStatus) -> usize {
    status.servers.iter().filter(|server| server.state == ServerState::Up).count()
}

#[tokio::test]
async fn three_storage_servers_and_a_metadata_server_keep_a_file_through_restarts() {
    let ground = Ground::new();
    let meta = ground.start_meta().await;
    let mut storages = Vec::new();
    for id in 1..=3 {
        storages.push(ground.start_storage(id).await);
    }
    let mut mount = Mount::new(&ground).await;
    mount.until("all servers are up", |status| up(status) == 3).await;

    let ino = mount.create("a").await;
    let written = mount.write(ino, b"first", &[1, 2, 3]).await;
    assert!(matches!(&written, Mutated::Committed(files) if files[0].is_ok()), "{written:?}");
    let status = mount.status().await;
    assert_eq!((status.blocks_by_copies, status.owed), ([0, 0, 0, 1], 0));
    assert!(status.durable_through >= status.log_position);

    // One is away for a write, comes back, and gets its copy.
    storages.pop().unwrap().stop().await;
    mount.write(ino, b"second", &[1, 2]).await;
    assert_eq!(mount.status().await.owed, 1);
    storages.push(ground.start_storage(3).await);
    mount.until("the debt is paid", |status| status.owed == 0 && status.copies_made == 1).await;

    // The metadata server restarts: the mount's session and its file are still there.
    meta.stop().await;
    let meta = ground.start_meta().await;
    mount.until("all servers are up again", |status| up(status) == 3).await;
    let Ok(MetaAnswer::Map(map)) = mount
        .ask(MetaRequest::Query { session: SessionId(0), query: Query::Pieces { ino, first: ChunkIndex(0), count: 1 } })
        .await
    else {
        panic!("no map")
    };
    assert_eq!((map.blocks.len(), map.blocks[0].holders.len()), (1, 3), "the second write covers the first");
    assert_eq!(mount.ask(MetaRequest::Admin(AdminRequest::Check)).await, Ok(MetaAnswer::Violations(Vec::new())));
    let session = mount.session;
    let reopen = SessionRequest::Reopen { session, opens: vec![ino], instance: None, is_behind: false };
    assert_eq!(mount.ask(MetaRequest::Session(reopen)).await, Ok(MetaAnswer::Reopened { replay_after: None }));
    mount.create("b").await;
    meta.stop().await;
    for storage in storages {
        storage.stop().await;
    }
}

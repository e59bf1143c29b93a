use std::{collections::HashMap, fs, net::SocketAddr, path::Path};

use bytes::Bytes;
use holdfast_common::{
    Block, BlockHash, ClusterId, Epoch, Refusal, ServerId,
    clock::SystemClock,
    config::StorageOptions,
    disk::RealDisk,
    net::{BoxFuture, CallError, Endpoint, Frame, identity::PeerIdentity, tls::Ca},
    wire::{
        codec,
        meta::{MetaAnswer, MetaReply, MetaRequest, StorageNotice},
        storage::{ByteRange, PutBlock, Source, StorageAnswer, StorageReply, StorageRequest},
    },
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::{relay::PASSING_MAX, *};

const CLUSTER: ClusterId = ClusterId([3; 16]);

fn identity(role: Role, id: u32) -> PeerIdentity {
    PeerIdentity { cluster: CLUSTER, node: NodeName { role, id } }
}

/// Servers that reach each other without a network.
#[derive(Default)]
struct Room {
    servers: Mutex<HashMap<u32, Arc<StorageService>>>,
}

impl Peers for Room {
    fn call(&self, to: Endpoint, request: Frame, _: Duration) -> BoxFuture<'_, Result<Frame, CallError>> {
        let server = self.servers.lock().get(&to.name.id).cloned();
        Box::pin(async move {
            match server {
                Some(server) => Ok(server.serve(identity(Role::Storage, 99), request).await),
                None => Err(CallError::Connect(to.address, "nobody is there".to_owned())),
            }
        })
    }
}

struct Server {
    directory: tempfile::TempDir,
    store: Arc<Store>,
    service: Arc<StorageService>,
}

impl Server {
    fn start(room: &Arc<Room>, id: u32) -> Self {
        let server = Self::start_among(Arc::clone(room) as Arc<dyn Peers>, id);
        room.servers.lock().insert(id, Arc::clone(&server.service));
        server
    }

    fn start_among(peers: Arc<dyn Peers>, id: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = StoreOptions { reserve_bytes: 0, ..StoreOptions::default() };
        let store = Arc::new(Store::open(Arc::new(RealDisk), directory.path(), options).unwrap());
        let backups = Backups::new(Arc::new(RealDisk), directory.path(), store.ballast());
        let service = start_service(Arc::clone(&store), peers, id, backups).unwrap();
        Self { directory, store, service }
    }

    async fn ask(
        &self,
        role: Role,
        request: StorageRequest,
        payload: &[Bytes],
    ) -> (Result<StorageAnswer, Refusal>, Bytes) {
        let frame = Frame { header: codec::encode(&request).unwrap(), payload: payload.to_vec() };
        let answer = Arc::clone(&self.service).serve(identity(role, 1), frame).await;
        (codec::decode::<StorageReply>(&answer.header).unwrap().0, replicate::joined(answer.payload))
    }

    async fn put(&self, blocks: &[Block]) -> Result<StorageAnswer, Refusal> {
        let list = blocks.iter().map(put_block).collect();
        let payload: Vec<Bytes> = blocks.iter().map(|block| block.bytes().clone()).collect();
        self.ask(Role::Client, StorageRequest::Put { blocks: list, durable: true }, &payload).await.0
    }

    async fn get(&self, block: &Block) -> Result<Bytes, Refusal> {
        let request = StorageRequest::Get { block: block.hash(), range: None };
        let (answer, payload) = self.ask(Role::Client, request, &[]).await;
        answer.map(|_| payload)
    }

    /// Flips a bit of the block's bytes in the file that holds them.
    fn damage(&self, block: &Block) {
        let path = self.directory.path().join("segments/0000000000000001.seg");
        let mut bytes = fs::read(&path).unwrap();
        let position = bytes.windows(32).position(|window| window == &block.bytes()[..32]).unwrap();
        bytes[position] ^= 1;
        fs::write(&path, bytes).unwrap();
    }
}

pub(super) fn block(n: u8, length: usize) -> Block {
    let bytes: Vec<u8> = (0..length).map(|i| u8::try_from((i / 7 + i % 5) % 256).unwrap() ^ n).collect();
    Block::seal(bytes.into()).unwrap()
}

pub(super) fn put_block(block: &Block) -> PutBlock {
    PutBlock { hash: block.hash(), length: block.length(), epoch: Epoch(0) }
}

fn source(id: u32) -> Source {
    Source { server: ServerId(id), address: ([127, 0, 0, 1], 1).into() }
}

#[tokio::test]
async fn blocks_that_were_put_are_there_for_those_who_may_have_them() {
    let server = Server::start(&Arc::default(), 1);
    let blocks = [block(1, 10), block(2, 4096), block(3, 300_000)];
    let boot = server.store.boot();
    assert_eq!(server.put(&blocks).await, Ok(StorageAnswer::Put { boot, durable: true }));
    for block in &blocks {
        assert_eq!(server.get(block).await.unwrap(), block.bytes());
    }
    let hashes: Vec<_> = blocks.iter().map(Block::hash).chain([BlockHash([0; 32])]).collect();
    let (has, _) = server.ask(Role::Meta, StorageRequest::Has { blocks: hashes }, &[]).await;
    assert_eq!(has, Ok(StorageAnswer::Has { boot, present: vec![true, true, true, false] }));
    let range = Some(ByteRange { offset: 100_000, length: 10 });
    let request = StorageRequest::Get { block: blocks[2].hash(), range };
    let (answer, encoding) = server.ask(Role::Storage, request, &[]).await;
    assert_eq!(answer, Ok(StorageAnswer::Get { block_length: 300_000 }));
    assert!((16_384..18_000).contains(&encoding.len()), "{}", encoding.len());
    let (answer, _) = server.ask(Role::Meta, StorageRequest::Sync, &[]).await;
    assert_eq!(answer, Ok(StorageAnswer::Sync { boot }));
    let (answer, _) = server.ask(Role::Meta, StorageRequest::List { after: None }, &[]).await;
    assert!(matches!(answer, Ok(StorageAnswer::List { blocks, end: true }) if blocks.len() == 3));
}

fn relay(block: &Block, to: &[u32]) -> StorageRequest {
    let to = to.iter().map(|id| source(*id)).collect();
    StorageRequest::Relay { block: put_block(block), durable: true, to, patience_ms: 1000 }
}

#[tokio::test]
async fn a_block_is_passed_on_and_what_each_server_said_is_told() {
    let room = Arc::default();
    let servers = [1, 2, 3].map(|id| Server::start(&room, id));
    let boots = [0, 1, 2].map(|i: usize| Ok(servers[i].store.boot()));
    let (block, other) = (block(1, 300_000), block(2, 300_000));
    let (answer, _) = servers[1].ask(Role::Client, relay(&block, &[3, 1]), &[block.bytes().clone()]).await;
    assert_eq!(answer, Ok(StorageAnswer::Relayed { copies: vec![boots[1], boots[2], boots[0]] }));
    for server in &servers {
        assert_eq!(server.get(&block).await.as_ref(), Ok(block.bytes()));
    }
    room.servers.lock().remove(&3);
    let (answer, _) = servers[0].ask(Role::Client, relay(&other, &[3, 2]), &[other.bytes().clone()]).await;
    let copies = vec![boots[0], Err(Refusal::Unavailable), boots[1]];
    assert_eq!(answer, Ok(StorageAnswer::Relayed { copies }));
    assert_eq!(servers[1].get(&other).await.as_ref(), Ok(other.bytes()));
}

/// Takes what is passed on to it, and never answers.
struct Silence;

impl Peers for Silence {
    fn call(&self, _: Endpoint, _: Frame, _: Duration) -> BoxFuture<'_, Result<Frame, CallError>> {
        Box::pin(std::future::pending())
    }
}

#[tokio::test]
async fn servers_that_wait_for_each_other_still_take_blocks() {
    let server = Server::start_among(Arc::new(Silence), 1);
    let ask = |n: usize| {
        let block = block(u8::try_from(n).unwrap(), 1000);
        let frame =
            Frame { header: codec::encode(&relay(&block, &[2])).unwrap(), payload: vec![block.bytes().clone()] };
        Arc::clone(&server.service).serve(identity(Role::Client, 1), frame)
    };
    let mut waiting: Vec<_> = (0..PASSING_MAX).map(ask).collect();
    for request in &mut waiting {
        assert!(futures_util::poll!(request).is_pending());
    }
    let answer = ask(PASSING_MAX).await;
    let copies = vec![Ok(server.store.boot()), Err(Refusal::Unavailable)];
    assert_eq!(codec::decode::<StorageReply>(&answer.header).unwrap().0, Ok(StorageAnswer::Relayed { copies }));
    assert_eq!(server.service.in_flight(), PASSING_MAX);
}

#[tokio::test]
async fn what_is_not_the_block_is_refused_by_all_that_it_is_passed_on_to() {
    let room = Arc::default();
    let servers = [1, 2].map(|id| Server::start(&room, id));
    let (block, other) = (block(1, 300_000), block(2, 300_000));
    let (answer, _) = servers[0].ask(Role::Client, relay(&block, &[2]), &[other.bytes().clone()]).await;
    let copies = vec![Err(Refusal::HashMismatch), Err(Refusal::HashMismatch)];
    assert_eq!(answer, Ok(StorageAnswer::Relayed { copies }));
    for server in &servers {
        assert_eq!(server.get(&block).await, Err(Refusal::BlockMissing));
    }
}

#[tokio::test]
async fn each_role_may_send_only_what_it_needs() {
    let server = Server::start(&Arc::default(), 1);
    let hash = BlockHash([1; 32]);
    let requests = [
        (StorageRequest::Put { blocks: vec![], durable: false }, [false, true, true, false]),
        (StorageRequest::Get { block: hash, range: None }, [false, true, true, false]),
        (StorageRequest::Repair { block: hash, sources: vec![] }, [true, true, true, false]),
        (StorageRequest::Sync, [true, false, false, false]),
        (StorageRequest::Has { blocks: vec![] }, [true, true, true, false]),
        (StorageRequest::Obtain { block: hash, sources: vec![], epoch: Epoch(0) }, [true, false, false, false]),
        (StorageRequest::Delete { blocks: vec![], epoch: Epoch(1) }, [true, false, false, false]),
        (StorageRequest::List { after: None }, [true, false, false, false]),
        (relay(&block(1, 10), &[]), [false, false, true, false]),
    ];
    for (request, allowed) in requests {
        for (role, allowed) in [Role::Meta, Role::Storage, Role::Client, Role::Admin].into_iter().zip(allowed) {
            let (answer, _) = server.ask(role, request.clone(), &[]).await;
            assert_eq!(answer != Err(Refusal::WrongRole), allowed, "{role}: {request:?}");
        }
    }
}

#[tokio::test]
async fn a_batch_with_one_bad_block_is_refused_whole() {
    let server = Server::start(&Arc::default(), 1);
    for length in [100, 100_000] {
        let (good, bad) = (block(1, length), block(2, length));
        let blocks = vec![put_block(&good), PutBlock { hash: BlockHash([9; 32]), ..put_block(&bad) }];
        let payload = [good.bytes().clone(), bad.bytes().clone()];
        let (answer, _) = server.ask(Role::Client, StorageRequest::Put { blocks, durable: false }, &payload).await;
        assert_eq!(answer, Err(Refusal::HashMismatch));
        assert_eq!(server.get(&good).await, Err(Refusal::BlockMissing));
    }
}

#[tokio::test]
async fn nonsense_is_a_bad_request() {
    let server = Server::start(&Arc::default(), 1);
    let block = block(1, 100);
    let put = |blocks: Vec<PutBlock>| StorageRequest::Put { blocks, durable: false };
    let of_length = |length| PutBlock { length, ..put_block(&block) };
    let hash = block.hash();
    for request in [
        put(vec![]),
        put(vec![of_length(99)]),
        put(vec![of_length(101)]),
        put(vec![of_length(0), of_length(100)]),
        put(vec![of_length(u32::MAX), of_length(u32::MAX)]),
        put(vec![of_length(1); 257]),
        StorageRequest::Repair { block: hash, sources: vec![source(2); 17] },
        relay(&block, &[]),
        relay(&block, &[2; 9]),
        StorageRequest::Relay { block: of_length(99), durable: true, to: vec![source(2)], patience_ms: 1 },
    ] {
        let (answer, _) = server.ask(Role::Client, request.clone(), &[block.bytes().clone()]).await;
        assert_eq!(answer, Err(Refusal::BadRequest), "{request:?}");
    }
    server.put(std::slice::from_ref(&block)).await.unwrap();
    let get = StorageRequest::Get { block: hash, range: Some(ByteRange { offset: 90, length: 20 }) };
    assert_eq!(server.ask(Role::Client, get, &[]).await.0, Err(Refusal::BadRequest));
    let frame = Frame { header: vec![0xff; 40], payload: vec![] };
    let answer = Arc::clone(&server.service).serve(identity(Role::Client, 1), frame).await;
    assert_eq!(codec::decode::<StorageReply>(&answer.header).unwrap().0, Err(Refusal::BadRequest));
}

#[tokio::test]
async fn a_bad_copy_is_replaced_from_the_first_good_source() {
    let room = Arc::new(Room::default());
    let servers = [1, 2, 3].map(|id| Server::start(&room, id));
    let block = block(1, 50_000);
    for server in &servers {
        server.put(std::slice::from_ref(&block)).await.unwrap();
    }
    servers[0].damage(&block);
    servers[1].damage(&block);
    let repair = |sources| StorageRequest::Repair { block: block.hash(), sources };
    let sources = vec![source(1), source(77), source(2), source(3)];
    let (answer, _) = servers[0].ask(Role::Client, repair(sources.clone()), &[]).await;
    assert_eq!(answer, Ok(StorageAnswer::Repaired { replaced: true }));
    assert_eq!(servers[0].get(&block).await.unwrap(), block.bytes());
    let found = servers[0].store.statistics();
    assert_eq!((found.corrupt_found, found.repaired, found.quarantined), (1, 1, 1));
    let (answer, _) = servers[0].ask(Role::Client, repair(sources), &[]).await;
    assert_eq!(answer, Ok(StorageAnswer::Repaired { replaced: false }));
    let (answer, _) = servers[1].ask(Role::Client, repair(vec![source(88)]), &[]).await;
    assert_eq!(answer, Err(Refusal::Unavailable));
    let (there, _) = servers[1].ask(Role::Meta, StorageRequest::Has { blocks: vec![block.hash()] }, &[]).await;
    let boot = servers[1].store.boot();
    assert_eq!(there, Ok(StorageAnswer::Has { boot, present: vec![true] }), "it may be better than none");
    assert_eq!(servers[1].store.statistics().quarantined, 0);
    let (answer, _) = servers[1].ask(Role::Meta, repair(vec![source(3)]), &[]).await;
    assert_eq!(answer, Ok(StorageAnswer::Repaired { replaced: true }), "until there is a good one");
    assert_eq!(servers[1].get(&block).await.unwrap(), block.bytes());
}

#[tokio::test]
async fn a_block_is_obtained_once() {
    let room = Arc::new(Room::default());
    let (has, wants) = (Server::start(&room, 1), Server::start(&room, 2));
    let block = block(4, 1 << 20);
    has.put(std::slice::from_ref(&block)).await.unwrap();
    let obtain = |sources| StorageRequest::Obtain { block: block.hash(), sources, epoch: Epoch(0) };
    let boot = wants.store.boot();
    assert_eq!(wants.ask(Role::Meta, obtain(vec![]), &[]).await.0, Err(Refusal::Unavailable));
    for sources in [vec![source(1)], vec![]] {
        assert_eq!(wants.ask(Role::Meta, obtain(sources), &[]).await.0, Ok(StorageAnswer::Obtained { boot }));
    }
    assert_eq!(wants.get(&block).await.unwrap(), block.bytes());
}

#[tokio::test]
async fn blocks_are_deleted_below_an_epoch() {
    let server = Server::start(&Arc::default(), 1);
    let blocks = [block(1, 5), block(2, 5)];
    server.put(&blocks).await.unwrap();
    let hashes: Vec<_> = blocks.iter().map(Block::hash).collect();
    let delete = |epoch| StorageRequest::Delete { blocks: hashes.clone(), epoch: Epoch(epoch) };
    assert_eq!(server.ask(Role::Meta, delete(0), &[]).await.0, Ok(StorageAnswer::Deleted { count: 0 }));
    assert_eq!(server.ask(Role::Meta, delete(1), &[]).await.0, Ok(StorageAnswer::Deleted { count: 2 }));
}

/// A metadata server that only listens to heartbeats.
struct Ear(mpsc::UnboundedSender<(u32, StorageNotice)>);

impl Serve for Ear {
    fn serve(self: Arc<Self>, from: PeerIdentity, request: Frame) -> BoxFuture<'static, Frame> {
        assert_eq!(from.node.role, Role::Storage);
        let Ok(MetaRequest::Storage(notice)) = codec::decode(&request.header) else { panic!("not a notice") };
        self.0.send((from.node.id, notice)).unwrap();
        let reply = MetaReply {
            server_instance: 1,
            map_version: 1,
            durable_through: holdfast_common::Position(0),
            epoch: Epoch(0),
            result: Ok(MetaAnswer::Done),
        };
        Box::pin(async move { Frame { header: codec::encode(&reply).unwrap(), payload: vec![] } })
    }
}

/// What a test needs of a cluster: its authority, and a metadata server that hears heartbeats.
pub(super) struct Cluster {
    pub(super) ca: Ca,
    pub(super) meta: SocketAddr,
    /// Of which server.
    pub(super) heard: mpsc::UnboundedReceiver<(u32, StorageNotice)>,
    client: Arc<Node>,
}

pub(super) fn credentials(ca: &Ca, role: Role, id: u32) -> Credentials {
    ca.issue_credentials(NodeName { role, id }, SystemClock::default().now(), Duration::from_secs(3600)).unwrap()
}

fn bind(ca: &Ca, role: Role, id: u32) -> Arc<Node> {
    Node::bind(([127, 0, 0, 1], 0).into(), credentials(ca, role, id), NetOptions::default()).unwrap()
}

pub(super) fn cluster() -> Cluster {
    let ca = Ca::create(CLUSTER, SystemClock::default().now()).unwrap();
    let meta = bind(&ca, Role::Meta, 1);
    let (sender, heard) = mpsc::unbounded_channel();
    tokio::spawn(meta.serve(Arc::new(Ear(sender)), None).unwrap());
    let client = bind(&ca, Role::Client, 1);
    Cluster { meta: meta.local_address().unwrap(), ca, heard, client }
}

fn config(directory: &Path, meta: SocketAddr) -> StorageConfig {
    let mut configs = StorageConfig::resolve_all(StorageOptions {
        data_dir: Some(vec![directory.to_owned()]),
        listen: Some(([127, 0, 0, 1], 0).into()),
        meta: Some(meta.to_string()),
        zone: Some("rack 4".to_owned()),
        ..StorageOptions::default()
    })
    .unwrap();
    configs.remove(0)
}

fn spawn_run(config: StorageConfig) -> (oneshot::Sender<()>, tokio::task::JoinHandle<Result<(), RunError>>) {
    let (stop, stopped) = oneshot::channel();
    let running = run(config, Arc::new(RealDisk), Arc::new(SystemClock::default()), || {}, async {
        stopped.await.unwrap();
    });
    (stop, tokio::spawn(running))
}

pub(super) async fn call(
    cluster: &Cluster,
    id: u32,
    address: SocketAddr,
    request: &StorageRequest,
    payload: Bytes,
) -> Result<(StorageReply, Bytes), CallError> {
    let to = Endpoint { address, name: NodeName { role: Role::Storage, id } };
    let frame = Frame { header: codec::encode(request).unwrap(), payload: vec![payload] };
    let answer = cluster.client.call(to, frame, Duration::from_secs(5)).await?;
    Ok((codec::decode(&answer.header).unwrap(), replicate::joined(answer.payload)))
}

#[tokio::test]
async fn a_server_registers_serves_stops_and_comes_back_with_its_blocks() {
    let mut cluster = cluster();
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path(), cluster.meta);
    credentials(&cluster.ca, Role::Storage, 7).save(&config.tls_dir).unwrap();
    let block = block(1, 200_000);
    let mut boots = Vec::new();
    for life in 0..2 {
        let (stop, ended) = spawn_run(config.clone());
        let Some((7, StorageNotice::Heartbeat { address, zone, boot, load })) = cluster.heard.recv().await else {
            panic!()
        };
        assert_eq!((zone.as_str(), load.blocks), ("rack 4", life));
        assert!(load.capacity_bytes > 0 && load.memory_bytes > 0);
        boots.push(boot);
        if life == 0 {
            let put = StorageRequest::Put { blocks: vec![put_block(&block)], durable: false };
            let (reply, _) = call(&cluster, 7, address, &put, block.bytes().clone()).await.unwrap();
            assert_eq!(reply.0, Ok(StorageAnswer::Put { boot, durable: false }));
        }
        let get = StorageRequest::Get { block: block.hash(), range: None };
        assert_eq!(call(&cluster, 7, address, &get, Bytes::new()).await.unwrap().1, block.bytes());
        let (second, refused) = spawn_run(config.clone());
        assert!(matches!(refused.await.unwrap(), Err(RunError::DataDir(DataDirError::Locked { .. }))));
        drop(second);
        stop.send(()).unwrap();
        ended.await.unwrap().unwrap();
        while cluster.heard.try_recv().is_ok() {}
    }
    assert_eq!(boots[0], boots[1]);
}

#[tokio::test]
async fn a_wrong_certificate_or_directory_is_refused_with_a_sentence() {
    let cluster = cluster();
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path(), cluster.meta);
    let end = async |config: StorageConfig| spawn_run(config).1.await.unwrap().unwrap_err().to_string();
    assert!(end(config.clone()).await.contains("cannot use the certificate in"));
    credentials(&cluster.ca, Role::Client, 7).save(&config.tls_dir).unwrap();
    assert!(end(config.clone()).await.contains("is that of 7.client, not of a storage server"));
    credentials(&cluster.ca, Role::Storage, 7).save(&config.tls_dir).unwrap();
    let busy = StorageConfig { listen: cluster.meta, ..config.clone() };
    assert!(end(busy).await.contains("in use by another process"));
    credentials(&cluster.ca, Role::Storage, 8).save(&config.tls_dir).unwrap();
    assert!(end(config).await.contains("belongs to node 7.storage of this cluster, not to node 8.storage"));
}

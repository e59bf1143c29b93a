//! The storage servers as the client sees them: puts to three at once, reads verified, hedged and repaired.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream::FuturesUnordered};
use holdfast_common::planted::{Bug, is_planted};
use holdfast_common::{
    Block, BlockHash, Epoch, Refusal, ServerId,
    cluster::{ClusterMap, ServerInfo, ServerState},
    enough_replicas,
    limits::{BLOCK_SIZE_MAX, HASH_LIST_MAX, PUT_BATCH_MAX},
    net::{
        CallError, Endpoint, Frame, Peers,
        identity::{NodeName, Role},
        probe::until_mute,
    },
    placement,
    wire::{
        codec,
        meta::{BlockPlace, CopyFault, Holder, NewBlock, StorageNotice},
        storage::{ByteRange, PutBlock, Source, StorageAnswer, StorageReply, StorageRequest},
    },
};
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::{health::Health, meta::MetaClient, near::Near, retry::Retry};
use crate::{
    fs::{Errno, FsResult},
    read::proof,
};

/// No holder that is known has an answer, and there may be others: the caller should read the file's map again.
pub const TRY_FRESH_MAP: Errno = Errno(libc::EAGAIN);
/// Every holder that is known answered, and none has the block. The caller should read the file's map again: the block may have
/// been deleted since others overwrote it; or the servers have lost it with their power, and whoever wrote it is about to store
/// it again.
pub const VANISHED: Errno = Errno(libc::ENODATA);
/// Bytes of a read that costs more by being asked for than by being sent.
const SHORT_READ_MAX: u32 = 64 << 10;
/// Rounds over all holders before that is said.
const ROUNDS: usize = 3;

pub struct BlockClient {
    peers: Arc<dyn Peers>,
    meta: Arc<MetaClient>,
    health: Health,
    near: Near,
    io_timeout: Duration,
    repairs: AtomicU64,
    /// Repairs that have been ordered and not yet reported.
    mending: watch::Sender<usize>,
}

impl std::fmt::Debug for BlockClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockClient").field("health", &self.health).finish_non_exhaustive()
    }
}

/// Why one copy could not be had.
#[derive(Debug)]
enum CopyTrouble {
    /// The server answered, and its copy is no good.
    Bad(CopyFault),
    /// The server did not answer, or could not say.
    Silent,
}

/// A part of a block, or (with `range` none) all of it.
#[derive(Clone, Debug)]
struct Wanted {
    hash: BlockHash,
    length: u32,
    /// Group-aligned.
    range: Option<Range<u32>>,
}

impl BlockClient {
    pub fn new(peers: Arc<dyn Peers>, meta: Arc<MetaClient>, io_timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            peers,
            meta,
            health: Health::default(),
            near: Near::default(),
            io_timeout,
            repairs: AtomicU64::new(0),
            mending: watch::Sender::new(0),
        })
    }

    /// Bad copies that this client had replaced.
    pub fn repairs(&self) -> u64 {
        self.repairs.load(Ordering::Relaxed)
    }

    /// Waits until every repair that a read has begun is done and reported, at most `patience`.
    pub async fn mended(&self, patience: Duration) {
        let mut mending = self.mending.subscribe();
        let done = mending.wait_for(|count| *count == 0);
        if tokio::time::timeout(patience, done).await.is_err() {
            warn!(unfinished = *self.mending.borrow(), "repairs were not finished in time");
        }
    }

    fn endpoint(&self, server: ServerId) -> Option<Endpoint> {
        let map = self.meta.map();
        let info = map.server(server)?;
        Some(Endpoint { address: info.address, name: NodeName { role: Role::Storage, id: server.0 } })
    }

    // ---- writing ----

    /// Puts each block on as many servers as are `wanted`, or on fewer, but enough, when no others can take it (the commit will owe them).
    /// With fewer it retries until the mount's patience ends: then `EIO`, or `ENOSPC` if servers that are there are full; that at once when too
    /// few servers are left that are not, even with those that are away.
    /// The answer: for each block its holders, as a commit names them.
    pub async fn put(&self, blocks: &[Block], durable: bool, wanted: usize) -> FsResult<Vec<NewBlock>> {
        let (epoch, enough) = (self.meta.epoch(), enough_replicas(wanted));
        let mut puts: Vec<PutState> = blocks.iter().map(|block| PutState::new(block, epoch, wanted)).collect();
        let mut retry = Retry::within(self.io_timeout);
        loop {
            self.put_rounds(&mut puts, durable).await;
            if puts.iter().all(|put| put.holders.len() >= enough) {
                return Ok(puts.into_iter().map(PutState::into_named).collect());
            }
            let map = self.meta.map();
            let lacks_room = |awaited| puts.iter().any(|put| put.lacks_room(&map, enough, awaited));
            if lacks_room(Awaited::Everybody) {
                error!("the storage servers are full");
                return Err(Errno(libc::ENOSPC));
            }
            let (paused, ()) = tokio::join!(retry.pause(), self.meta.refresh_map());
            if paused.is_err() && lacks_room(Awaited::Nobody) {
                error!(within = ?self.io_timeout, "the storage servers that are there are full");
                return Err(Errno(libc::ENOSPC));
            }
            if paused.is_err() {
                error!(within = ?self.io_timeout, "fewer than {enough} storage servers took the data");
                return Err(Errno(libc::EIO));
            }
            puts.iter_mut().for_each(PutState::forget_failures);
        }
    }

    /// Which of `hashes` the server has; none, if it does not answer.
    pub async fn has(&self, server: ServerId, hashes: BTreeSet<BlockHash>) -> BTreeSet<BlockHash> {
        let hashes: Vec<BlockHash> = hashes.into_iter().collect();
        let mut present = BTreeSet::new();
        for part in hashes.chunks(HASH_LIST_MAX) {
            let Some(request) = frame(&StorageRequest::Has { blocks: part.to_vec() }) else { continue };
            match self.call_watched(server, request, self.io_timeout).await {
                Ok(StorageReply(Ok(StorageAnswer::Has { present: has, .. }))) => {
                    present.extend(part.iter().zip(has).filter(|(_, has)| *has).map(|(hash, _)| *hash));
                }
                other => warn!(%server, ?other, "a server does not tell what it still has"),
            }
        }
        present
    }

    /// Rounds of parallel puts until every block has its copies or has run out of candidates.
    async fn put_rounds(&self, puts: &mut [PutState<'_>], durable: bool) {
        loop {
            let round = self.assign(puts);
            if round.is_empty() {
                return;
            }
            let mut calls: FuturesUnordered<_> = round
                .into_iter()
                .flat_map(|(server, members)| batches(members, puts).into_iter().map(move |batch| (server, batch)))
                .map(|(server, batch)| {
                    let request = put_request(puts, &batch, durable);
                    async move { (server, batch, self.put_batch(server, request).await) }
                })
                .collect();
            while let Some((server, batch, result)) = calls.next().await {
                for member in batch {
                    puts[member].learn(server, result);
                }
            }
        }
    }

    /// Who should be asked next for what: server -> indexes into `puts`.
    fn assign(&self, puts: &[PutState<'_>]) -> BTreeMap<ServerId, Vec<usize>> {
        let map = self.meta.map();
        let mut round: BTreeMap<ServerId, Vec<usize>> = BTreeMap::new();
        for (member, put) in puts.iter().enumerate() {
            let mut holders: Vec<ServerId> = put.holders.iter().map(|holder| holder.server).collect();
            let missing = put.wanted.saturating_sub(holders.len());
            let next = |holders: &[ServerId], avoided: bool| {
                placement::candidates_beside(&map, put.block.hash(), holders, |server| {
                    put.tried.contains(&server) || holders.contains(&server) || self.health.avoided(server) != avoided
                })
            };
            let well = next(&holders, false);
            holders.extend(well.into_iter().take(missing));
            // A server that has just failed is asked only when the block would not be safe without it.
            let needed = enough_replicas(put.wanted).saturating_sub(holders.len());
            if needed > 0 {
                let avoided = next(&holders, true);
                holders.extend(avoided.into_iter().take(needed));
            }
            for server in holders.into_iter().skip(put.holders.len()) {
                round.entry(server).or_default().push(member);
            }
        }
        round
    }

    async fn put_batch(&self, server: ServerId, request: Frame) -> Result<Holder, PutTrouble> {
        let reply = self.call_watched(server, request, self.io_timeout).await.map_err(|error| {
            warn!(%server, %error, "a put failed");
            PutTrouble::Failed
        })?;
        match reply.0 {
            Ok(StorageAnswer::Put { boot, durable }) => Ok(Holder { server, boot, durable }),
            Err(Refusal::ServerFull | Refusal::NoSpace) => Err(PutTrouble::Full),
            other => {
                warn!(%server, ?other, "a put was refused");
                Err(PutTrouble::Failed)
            }
        }
    }

    // ---- reading ----

    /// All of a block, from the best copy that proves itself. `EIO` when all are damaged, `TRY_FRESH_MAP` when nobody answers,
    /// `VANISHED` when nobody has it.
    pub async fn get(self: &Arc<Self>, place: &BlockPlace) -> FsResult<Block> {
        match self.fetch(place, None).await? {
            Verified::Whole(block) => Ok(block),
            Verified::Part(_) => Err(Errno(libc::EIO)),
        }
    }

    /// The group-aligned part of a block that holds `range`, and where in the block it starts.
    pub async fn get_range(self: &Arc<Self>, place: &BlockPlace, range: Range<u32>) -> FsResult<(u32, Bytes)> {
        let aligned = proof::aligned(&range, place.length);
        let start = aligned.start;
        match self.fetch(place, Some(aligned)).await? {
            Verified::Part(bytes) => Ok((start, bytes)),
            Verified::Whole(block) => Ok((0, block.bytes().clone())),
        }
    }

    async fn fetch(self: &Arc<Self>, place: &BlockPlace, range: Option<Range<u32>>) -> FsResult<Verified> {
        let wanted = Wanted { hash: place.hash, length: place.length, range };
        let mut retry = Retry::within(self.io_timeout);
        let mut bad: Vec<(ServerId, CopyFault)> = Vec::new();
        let mut rounds = 0;
        while rounds < ROUNDS {
            let round = self.ask_holders(&wanted, &place.holders).await;
            if round.is_vanished() {
                return Err(VANISHED);
            }
            let news = |copy: &&(ServerId, CopyFault)| bad.iter().all(|(server, _)| *server != copy.0);
            let news: Vec<(ServerId, CopyFault)> = round.bad.iter().filter(news).copied().collect();
            bad.extend(&news);
            self.mend(place, &news, &bad);
            match round.found {
                Some(found) => return Ok(found),
                None if round.silent == 0 => {
                    error!(block = %place.hash, holders = ?place.holders, "every copy of the block is missing or damaged");
                    return Err(Errno(libc::EIO));
                }
                None if retry.pause().await.is_err() => break,
                None => rounds += 1,
            }
        }
        warn!(block = %place.hash, holders = ?place.holders, "no server that holds the block answered");
        Err(TRY_FRESH_MAP)
    }

    /// Asks the holders in order of expected latency: the next one when a copy is bad, a server silent, or an answer late.
    async fn ask_holders(&self, wanted: &Wanted, holders: &[ServerId]) -> Round {
        let mut order = holders.to_vec();
        self.health.rank(&mut order, self.favourite(wanted, holders));
        let mut waiting = order.iter().copied();
        let mut asked = FuturesUnordered::new();
        let mut round = Round::default();
        let mut latest = None;
        loop {
            if asked.is_empty() {
                let Some(server) = waiting.next() else { return round };
                latest = Some(server);
                asked.push(self.ask_one(server, wanted));
            }
            let hedge = self.health.hedge_after(&order);
            tokio::select! {
                Some((server, answer)) = asked.next() => match answer {
                    Ok(found) => { round.found = Some(found); return round }
                    Err(CopyTrouble::Bad(fault)) => round.bad.push((server, fault)),
                    Err(CopyTrouble::Silent) => round.silent += 1,
                },
                () = tokio::time::sleep(hedge), if waiting.len() > 0 => {
                    if let Some(late) = latest {
                        self.health.slow(late, hedge);
                    }
                    if let Some(server) = waiting.next() {
                        self.health.hedged();
                        latest = Some(server);
                        asked.push(self.ask_one(server, wanted));
                    }
                }
            }
        }
    }

    /// Who is asked for what is short, if any of the holders is on this machine.
    fn favourite(&self, wanted: &Wanted, holders: &[ServerId]) -> Option<ServerId> {
        let length = wanted.range.as_ref().map_or(wanted.length, |range| range.end - range.start);
        if length > SHORT_READ_MAX {
            return None;
        }
        let map = self.meta.map();
        let address = |server: &ServerId| Some((*server, map.server(*server)?.address.ip()));
        let well = holders.iter().filter(|server| !self.health.avoided(**server));
        self.near.favourite(well.filter_map(address))
    }

    async fn ask_one(&self, server: ServerId, wanted: &Wanted) -> (ServerId, Result<Verified, CopyTrouble>) {
        (server, self.copy_from(server, wanted).await)
    }

    async fn copy_from(&self, server: ServerId, wanted: &Wanted) -> Result<Verified, CopyTrouble> {
        let range =
            wanted.range.as_ref().map(|range| ByteRange { offset: range.start, length: range.end - range.start });
        let request = frame(&StorageRequest::Get { block: wanted.hash, range }).ok_or(CopyTrouble::Silent)?;
        let answer = self.call_watched_with_payload(server, request, self.io_timeout).await.map_err(|error| {
            warn!(%server, %error, block = %wanted.hash, "a read from one server failed");
            CopyTrouble::Silent
        })?;
        match answer {
            (StorageReply(Ok(StorageAnswer::Get { .. })), payload) => wanted.verify(payload).map_err(|why| {
                warn!(%server, block = %wanted.hash, why, "a server sent bytes that are not the block");
                CopyTrouble::Bad(CopyFault::Damaged)
            }),
            (StorageReply(Err(Refusal::BlockMissing)), _) => Err(CopyTrouble::Bad(CopyFault::Missing)),
            (StorageReply(Err(Refusal::BlockDamaged)), _) => Err(CopyTrouble::Bad(CopyFault::Damaged)),
            (other, _) => {
                warn!(%server, ?other, "a read was refused");
                Err(CopyTrouble::Silent)
            }
        }
    }

    /// Has bad copies replaced from the others, while the reader goes on with a good one.
    fn mend(self: &Arc<Self>, place: &BlockPlace, news: &[(ServerId, CopyFault)], bad: &[(ServerId, CopyFault)]) {
        for &(server, fault) in news {
            let (client, place) = (Arc::clone(self), place.clone());
            let others: Vec<ServerId> =
                place.holders.iter().copied().filter(|holder| bad.iter().all(|(bad, _)| bad != holder)).collect();
            self.mending.send_modify(|count| *count += 1);
            tokio::spawn(async move {
                client.mend_one(place.hash, server, fault, others).await;
                client.mending.send_modify(|count| *count -= 1);
            });
        }
    }

    async fn mend_one(self: &Arc<Self>, block: BlockHash, server: ServerId, fault: CopyFault, others: Vec<ServerId>) {
        let repaired = !others.is_empty() && self.order_repair(block, server, &others).await;
        if repaired {
            self.repairs.fetch_add(1, Ordering::Relaxed);
            info!(%block, %server, ?fault, "a bad copy was replaced by a good one");
        } else {
            error!(%block, %server, ?fault, "a bad copy could not be replaced yet");
        }
        if let Err(error) = self.meta.report(StorageNotice::BadCopy { block, server, fault, repaired }).await {
            error!(%block, %server, ?error, "a bad copy could not be reported to the metadata server");
        }
    }

    async fn order_repair(&self, block: BlockHash, server: ServerId, others: &[ServerId]) -> bool {
        let source = |server: &ServerId| Some(Source { server: *server, address: self.endpoint(*server)?.address });
        let sources = others.iter().filter_map(source).collect();
        let Some(request) = frame(&StorageRequest::Repair { block, sources }) else { return false };
        match self.call_watched(server, request, self.io_timeout).await {
            Ok(StorageReply(Ok(StorageAnswer::Repaired { .. }))) => true,
            other => {
                warn!(%block, %server, ?other, "a repair order failed");
                false
            }
        }
    }

    // ---- calling ----

    async fn call_watched(&self, server: ServerId, request: Frame, limit: Duration) -> Result<StorageReply, CallError> {
        self.call_watched_with_payload(server, request, limit).await.map(|(reply, _)| reply)
    }

    /// A call that is given up when the server turns out to be dead rather than slow.
    async fn call_watched_with_payload(
        &self,
        server: ServerId,
        request: Frame,
        limit: Duration,
    ) -> Result<(StorageReply, Bytes), CallError> {
        let Some(endpoint) = self.endpoint(server) else {
            return Err(CallError::Connect(
                ([0, 0, 0, 0], 0).into(),
                format!("storage server {server} is not in the map"),
            ));
        };
        super::on_network_thread().await;
        let in_flight = self.health.start(server);
        let result = tokio::select! {
            result = self.peers.call(endpoint, request, limit) => result,
            error = until_mute(&*self.peers, endpoint) => Err(error),
        };
        match result.and_then(|frame| decoded(endpoint, frame)) {
            Ok(reply) => {
                in_flight.answered();
                Ok(reply)
            }
            Err(error) => {
                self.health.failed(server);
                Err(error)
            }
        }
    }
}

/// Bytes that were proved against the hash that was asked for.
#[derive(Debug)]
enum Verified {
    Whole(Block),
    Part(Bytes),
}

impl Wanted {
    fn verify(&self, payload: Bytes) -> Result<Verified, String> {
        match &self.range {
            None if is_planted(Bug::ReadsUnverified) => {
                Block::seal(payload).map(Verified::Whole).map_err(|e| e.to_string())
            }
            None => Block::verify(self.hash, payload).map(Verified::Whole).map_err(|e| e.to_string()),
            Some(range) => proof::open(self.hash, self.length, range.clone(), &payload)
                .map(Verified::Part)
                .map_err(|e| e.to_string()),
        }
    }
}

/// What asking every holder once has brought.
#[derive(Debug, Default)]
struct Round {
    found: Option<Verified>,
    bad: Vec<(ServerId, CopyFault)>,
    silent: usize,
}

impl Round {
    /// Everybody answered, and nobody has it; a damaged copy is another matter.
    fn is_vanished(&self) -> bool {
        self.found.is_none() && self.silent == 0 && self.bad.iter().all(|(_, fault)| *fault == CopyFault::Missing)
    }
}

/// One block on its way to its servers.
struct PutState<'a> {
    block: &'a Block,
    epoch: Epoch,
    /// Copies.
    wanted: usize,
    holders: Vec<Holder>,
    tried: Vec<ServerId>,
    /// They have refused it for want of room.
    full: Vec<ServerId>,
}

/// Whether servers that are away may still come back in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaited {
    Everybody,
    Nobody,
}

#[derive(Clone, Copy, Debug)]
enum PutTrouble {
    Full,
    Failed,
}

impl<'a> PutState<'a> {
    fn new(block: &'a Block, epoch: Epoch, wanted: usize) -> Self {
        let (holders, tried) = (Vec::with_capacity(wanted), Vec::with_capacity(wanted));
        Self { block, epoch, wanted, holders, tried, full: Vec::new() }
    }

    fn into_named(self) -> NewBlock {
        let Self { block, epoch, holders, .. } = self;
        NewBlock { hash: block.hash(), length: block.length(), holders, epoch }
    }

    /// Servers are full, and without them not enough are left, even if those took it that have just failed.
    fn lacks_room(&self, map: &ClusterMap, enough: usize, awaited: Awaited) -> bool {
        let holds = |server: &ServerInfo| self.holders.iter().any(|holder| holder.server == server.id);
        // Those who have said that they have no room are not even asked.
        let is_full = |server: &ServerInfo| {
            self.full.contains(&server.id) || server.state == ServerState::Up && server.weight == 0
        };
        let is_there = |server: &ServerInfo| server.state == ServerState::Up || awaited == Awaited::Everybody;
        let (mut full, mut left) = (0, 0);
        for server in &map.servers {
            match holds(server) {
                true => left += 1,
                false if is_full(server) => full += 1,
                false => left += usize::from(is_there(server)),
            }
        }
        full > 0 && left < enough
    }

    fn learn(&mut self, server: ServerId, result: Result<Holder, PutTrouble>) {
        self.tried.push(server);
        match result {
            Ok(holder) => self.holders.push(holder),
            Err(PutTrouble::Full) => self.full.push(server),
            Err(PutTrouble::Failed) => {}
        }
    }

    /// Before another try: only those that have the block stay ruled out.
    fn forget_failures(&mut self) {
        self.tried = self.holders.iter().map(|holder| holder.server).collect();
        self.full.clear();
    }
}

/// Cuts what one server gets into messages that keep to the limits.
fn batches(members: Vec<usize>, puts: &[PutState<'_>]) -> Vec<Vec<usize>> {
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut bytes = 0;
    for member in members {
        let length = puts[member].block.length();
        match batches.last_mut() {
            Some(batch) if batch.len() < PUT_BATCH_MAX && bytes + length <= BLOCK_SIZE_MAX => batch.push(member),
            _ => {
                bytes = 0;
                batches.push(vec![member]);
            }
        }
        bytes += length;
    }
    batches
}

fn put_request(puts: &[PutState<'_>], batch: &[usize], durable: bool) -> Frame {
    let head = |put: &PutState<'_>| PutBlock { hash: put.block.hash(), length: put.block.length(), epoch: put.epoch };
    let heads = batch.iter().map(|&member| head(&puts[member]));
    let blocks = batch.iter().map(|&member| puts[member].block);
    let request = StorageRequest::Put { blocks: heads.collect(), durable };
    Frame { header: frame(&request).unwrap_or_default().header, payload: blocks.map(|b| b.bytes().clone()).collect() }
}

/// `None` only for a request longer than any that this client makes.
fn frame(request: &StorageRequest) -> Option<Frame> {
    match codec::encode(request) {
        Ok(header) => Some(Frame { header, payload: Vec::new() }),
        Err(error) => {
            error!(%error, "a request does not fit into a message");
            None
        }
    }
}

fn decoded(from: Endpoint, frame: Frame) -> Result<(StorageReply, Bytes), CallError> {
    let reply = codec::decode(&frame.header).map_err(|e| CallError::Malformed(from.address, e.to_string()))?;
    Ok((reply, frame.payload.into_iter().next().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use holdfast_common::BootId;

    use super::*;

    fn map(servers: &[(ServerState, u32)]) -> ClusterMap {
        let servers = servers.iter().zip(1..).map(|(&(state, weight), id)| ServerInfo {
            id: ServerId(id),
            state,
            weight,
            ..ServerInfo::example()
        });
        ClusterMap { servers: servers.collect(), ..ClusterMap::default() }
    }

    #[test]
    fn a_write_finds_no_room_when_too_few_servers_are_left_that_are_not_full() {
        use Awaited::{Everybody, Nobody};
        use ServerState::{Down, Up};
        let block = Block::seal(Bytes::from_static(b"block")).expect("a short block");
        let put = |holders: &[u32], full: &[u32]| {
            let mut put = PutState::new(&block, Epoch(0), 3);
            holders.iter().for_each(|id| {
                put.learn(ServerId(*id), Ok(Holder { server: ServerId(*id), boot: BootId(1), durable: true }));
            });
            full.iter().for_each(|id| put.learn(ServerId(*id), Err(PutTrouble::Full)));
            put
        };
        let [all_up, one_known_full] = [map(&[(Up, 9); 4]), map(&[(Up, 9), (Up, 9), (Up, 9), (Up, 0)])];
        assert!(!put(&[1], &[2]).lacks_room(&all_up, 2, Nobody), "two may take it yet");
        // What a simulated history found: one holds it, one has just failed, and two are full.
        assert!(!put(&[1], &[2]).lacks_room(&one_known_full, 2, Nobody), "who has failed may take it yet");
        assert!(put(&[1], &[2, 3]).lacks_room(&one_known_full, 2, Everybody));
        assert!(put(&[], &[1, 2, 3]).lacks_room(&all_up, 2, Everybody), "one alone is not enough");
        let one_away = map(&[(Up, 9), (Down, 0), (Up, 0), (Up, 0)]);
        assert!(!put(&[1], &[]).lacks_room(&one_away, 2, Everybody), "it may come back");
        assert!(put(&[1], &[]).lacks_room(&one_away, 2, Nobody), "it has not");
        let all_away = map(&[(Up, 9), (Down, 0), (Down, 0)]);
        assert!(!put(&[1], &[]).lacks_room(&all_away, 2, Nobody), "room is not what is missing");
    }
}

//! The storage servers as the client sees them: reads verified, hedged and repaired.

use std::{
    collections::BTreeSet,
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
    Block, BlockHash, Refusal, ServerId,
    config::Relaying,
    limits::HASH_LIST_MAX,
    net::{
        CallError, Endpoint, Frame, Peers,
        identity::{NodeName, Role},
        probe::until_mute,
    },
    wire::{
        codec,
        meta::{BlockPlace, CopyFault, StorageNotice},
        storage::{ByteRange, Source, StorageAnswer, StorageReply, StorageRequest},
    },
};
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::{
    health::{Health, InFlight},
    meta::MetaClient,
    near::Near,
    retry::Retry,
};
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
    pub(super) peers: Arc<dyn Peers>,
    pub(super) meta: Arc<MetaClient>,
    pub(super) health: Health,
    pub(super) near: Near,
    pub(super) relaying: Relaying,
    pub(super) io_timeout: Duration,
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
    pub fn new(peers: Arc<dyn Peers>, meta: Arc<MetaClient>, io_timeout: Duration, relaying: Relaying) -> Arc<Self> {
        Arc::new(Self {
            peers,
            meta,
            health: Health::default(),
            near: Near::default(),
            relaying,
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

    pub(super) fn endpoint(&self, server: ServerId) -> Option<Endpoint> {
        let map = self.meta.map();
        let info = map.server(server)?;
        Some(Endpoint { address: info.address, name: NodeName { role: Role::Storage, id: server.0 } })
    }

    pub(super) fn source(&self, server: ServerId) -> Option<Source> {
        Some(Source { server, address: self.endpoint(server)?.address })
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
        let sources = others.iter().filter_map(|server| self.source(*server)).collect();
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

    pub(super) async fn call_watched(
        &self,
        server: ServerId,
        request: Frame,
        limit: Duration,
    ) -> Result<StorageReply, CallError> {
        self.call_watched_with_payload(server, request, limit).await.map(|(reply, _)| reply)
    }

    async fn call_watched_with_payload(
        &self,
        server: ServerId,
        request: Frame,
        limit: Duration,
    ) -> Result<(StorageReply, Bytes), CallError> {
        self.call_in_flight(server, request, limit).await.map(|(in_flight, reply)| {
            in_flight.answered();
            reply
        })
    }

    /// A call whose answer is that of other servers as well: how long it took says nothing about this one.
    pub(super) async fn call_relay(&self, server: ServerId, request: Frame) -> Result<StorageReply, CallError> {
        self.call_in_flight(server, request, self.io_timeout).await.map(|(in_flight, (reply, _))| {
            in_flight.answered_with_others();
            reply
        })
    }

    /// A call that is given up when the server turns out to be dead rather than slow.
    async fn call_in_flight(
        &self,
        server: ServerId,
        request: Frame,
        limit: Duration,
    ) -> Result<(InFlight<'_>, (StorageReply, Bytes)), CallError> {
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
            Ok(reply) => Ok((in_flight, reply)),
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

/// `None` only for a request longer than any that this client makes.
pub(super) fn frame(request: &StorageRequest) -> Option<Frame> {
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

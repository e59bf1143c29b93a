//! Answers requests to a storage server: who may ask, what is asked, what comes back.

use std::{
    sync::{
        Arc,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::Duration,
};

use bytes::Bytes;
use holdfast_common::{
    BlockHash, BootId, Epoch, Refusal,
    inventory::{self, BucketDigest},
    limits::{BLOCK_SIZE_MAX, HASH_LIST_MAX, PAYLOAD_SIZE_MAX, PUT_BATCH_MAX},
    net::{
        BoxFuture, Frame, Serve,
        identity::{PeerIdentity, Role},
    },
    wire::{
        codec,
        meta::StorageLoad,
        storage::{ByteRange, PutBlock, Source, StorageAnswer, StorageReply, StorageRequest},
    },
};
use tokio::{sync::Mutex, time::Instant};

use super::{
    backups::Backups,
    meter::{Meter, Reading},
    relay::{self, Passing, Relay},
    replicate::{Fetcher, SOURCES_MAX, joined},
    scrub::ScrubProgress,
    store::{CheckedBlock, Plan, Store, StoreError, Verdict},
    workers::{Effort, WorkError, Workers},
};

/// A put of at most so many bytes is hashed and written where it arrives, if no other work waits: handing it to a
/// thread costs more than doing it.
const INLINE_BYTES_MAX: usize = 64 << 10;
/// Bytes that are read where they are asked for, if no thread has to wait for them.
const INLINE_READ_MAX: u32 = 64 << 10;
/// Hashes that are looked up as short work.
const HASHES_SHORT: usize = 256;
/// Repairs of blocks whose hashes start alike are done one after the other, so that none is done twice.
const REPAIR_LANES: usize = 64;
/// How often a repair judges the copy anew that a put replaced under it.
const VERDICTS_MAX: usize = 4;

pub struct StorageService {
    store: Arc<Store>,
    workers: Workers,
    fetcher: Fetcher,
    relay: Relay,
    repairs: Vec<Mutex<()>>,
    in_flight: AtomicUsize,
    /// Of these, reads for which no thread waits.
    reads_here: AtomicUsize,
    /// Since the start.
    requests: AtomicU64,
    /// One more than the latest epoch that this server has heard of; 0 before the first.
    heard: AtomicU64,
    scrub: Arc<ScrubProgress>,
    backups: Arc<Backups>,
    /// Of mounts, passed on by other servers or not.
    puts: Meter,
    /// Of mounts.
    gets: Meter,
    /// Of the metadata server's barriers.
    syncs: Meter,
}

type Answer = Result<(StorageAnswer, Vec<Bytes>), Refusal>;

impl Serve for StorageService {
    fn serve(self: Arc<Self>, from: PeerIdentity, request: Frame) -> BoxFuture<'static, Frame> {
        Box::pin(async move {
            self.in_flight.fetch_add(1, Relaxed);
            self.requests.fetch_add(1, Relaxed);
            let (reply, payload) = match self.answer(from, request).await {
                Ok((answer, payload)) => (Ok(answer), payload),
                Err(refusal) => (Err(refusal), Vec::new()),
            };
            self.in_flight.fetch_sub(1, Relaxed);
            encode_reply(reply, payload)
        })
    }
}

fn encode_reply(reply: Result<StorageAnswer, Refusal>, payload: Vec<Bytes>) -> Frame {
    match codec::encode(&StorageReply(reply)) {
        Ok(header) => Frame { header, payload },
        Err(error) => {
            tracing::error!(%error, "an answer does not fit its frame");
            Frame::default()
        }
    }
}

/// See the table at [`StorageRequest`].
fn may(role: Role, request: &StorageRequest) -> bool {
    match request {
        StorageRequest::Put { .. } | StorageRequest::Get { .. } => matches!(role, Role::Client | Role::Storage),
        StorageRequest::Repair { .. } => matches!(role, Role::Client | Role::Storage | Role::Meta),
        StorageRequest::Relay { .. } => role == Role::Client,
        StorageRequest::Has { .. } => matches!(role, Role::Meta | Role::Storage | Role::Client),
        StorageRequest::KeepBackup { .. }
        | StorageRequest::Sync
        | StorageRequest::Obtain { .. }
        | StorageRequest::Delete { .. }
        | StorageRequest::List { .. }
        | StorageRequest::Digest { .. }
        | StorageRequest::Scrub => role == Role::Meta,
    }
}

impl StorageService {
    pub(super) fn new(store: Arc<Store>, workers: Workers, fetcher: Fetcher, relay: Relay, backups: Backups) -> Self {
        let repairs = (0..REPAIR_LANES).map(|_| Mutex::new(())).collect();
        Self {
            store,
            workers,
            fetcher,
            relay,
            repairs,
            in_flight: AtomicUsize::new(0),
            reads_here: AtomicUsize::new(0),
            requests: AtomicU64::new(0),
            heard: AtomicU64::new(0),
            scrub: Arc::default(),
            backups: Arc::new(backups),
            puts: Meter::default(),
            gets: Meter::default(),
            syncs: Meter::default(),
        }
    }

    /// Under which puts are acknowledged now.
    pub fn boot(&self) -> BootId {
        self.store.boot()
    }

    pub fn scrub_progress(&self) -> &Arc<ScrubProgress> {
        &self.scrub
    }

    /// The metadata server is at `epoch`, or was.
    pub fn hear(&self, epoch: Epoch) {
        self.heard.fetch_max(epoch.0.saturating_add(1), AcqRel);
    }

    /// A stamp that no order to delete which this server may still get is later than, for a block that is on record here: whatever
    /// epoch the block was put on record with was heard of by then, in this life with the put, or with the first report after it.
    fn stamp(&self) -> Result<Epoch, Refusal> {
        self.heard.load(Acquire).checked_sub(1).map(Epoch).ok_or(Refusal::Unavailable)
    }

    /// Requests being served, waiting ones included.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Relaxed)
    }

    /// How requests fared since the last look, and what is stored. What is known of the machine is left out.
    pub fn load(&self) -> StorageLoad {
        let (puts, gets, syncs) = (self.puts.take(), self.gets.take(), self.syncs.take());
        let both = Reading { count: puts.count.saturating_add(gets.count), sum_us: puts.sum_us + gets.sum_us, ..puts };
        let statistics = self.store.statistics();
        StorageLoad {
            stored_bytes: statistics.stored_bytes,
            blocks: statistics.blocks,
            corrupt_found: statistics.corrupt_found,
            repaired: statistics.repaired,
            quarantined: statistics.quarantined,
            queue_depth: u32::try_from(self.in_flight()).unwrap_or(u32::MAX),
            scrub_checked_bytes: self.scrub.checked_bytes.load(Relaxed),
            scrub_passes: self.scrub.passes.load(Relaxed),
            scrub_last_pass_secs: self.scrub.last_pass_secs.load(Relaxed),
            puts: puts.count,
            gets: gets.count,
            request_mean_us: both.mean_us(),
            put_p50_us: puts.p50_us,
            put_p99_us: puts.p99_us,
            get_p50_us: gets.p50_us,
            get_p99_us: gets.p99_us,
            put_mean_us: puts.mean_us(),
            get_mean_us: gets.mean_us(),
            syncs: syncs.count,
            sync_mean_us: syncs.mean_us(),
            ..StorageLoad::default()
        }
    }

    /// Requests that came since the start.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    async fn answer(&self, from: PeerIdentity, frame: Frame) -> Answer {
        let request = codec::decode::<StorageRequest>(&frame.header).map_err(|error| {
            tracing::warn!(peer = %from.node, %error, "a request does not decode");
            Refusal::BadRequest
        })?;
        if !may(from.node.role, &request) {
            tracing::warn!(peer = %from.node, "a request that this role may not send");
            return Err(Refusal::WrongRole);
        }
        let meter = match &request {
            StorageRequest::Get { .. } if from.node.role == Role::Client => Some(&self.gets),
            StorageRequest::Sync => Some(&self.syncs),
            _ => None,
        };
        let started = Instant::now();
        let answer = self.carry_out(request, frame.payload).await;
        if let Some(meter) = meter {
            meter.note(started.elapsed());
        }
        answer
    }

    async fn carry_out(&self, request: StorageRequest, payload: Vec<Bytes>) -> Answer {
        match request {
            StorageRequest::Put { blocks, durable } => {
                let boot = self.put(blocks, durable, joined(payload)).await?;
                Ok((StorageAnswer::Put { boot, durable }, Vec::new()))
            }
            StorageRequest::Relay { block, durable, to, patience_ms } => {
                let patience = Duration::from_millis(patience_ms.into());
                self.put_and_pass_on(Passing { block, bytes: joined(payload), durable, patience }, &to).await
            }
            StorageRequest::Get { block, range } => self.get(block, range).await,
            StorageRequest::Sync => self.sync().await,
            StorageRequest::Has { blocks } => self.has(blocks).await,
            StorageRequest::Repair { block, sources } => self.repair(block, &sources).await,
            StorageRequest::Obtain { block, sources, epoch } => self.obtain(block, &sources, epoch).await,
            StorageRequest::Delete { blocks, epoch } => self.delete(blocks, epoch).await,
            StorageRequest::List { after } => self.list(after).await,
            StorageRequest::Digest { bucket } => self.digest(bucket).await,
            StorageRequest::Scrub => {
                self.scrub.want();
                Ok((StorageAnswer::Scrubbing, Vec::new()))
            }
            StorageRequest::KeepBackup { number, offset, end } => {
                let (backups, part) = (Arc::clone(&self.backups), joined(payload));
                let keep = move || backups.keep(number, offset, &part, end);
                self.workers.run(Effort::Long, keep).await.map_err(work_refusal)??;
                Ok((StorageAnswer::Kept, Vec::new()))
            }
        }
    }

    /// Runs `work` on a worker's thread.
    async fn blocking<T: Send + 'static>(
        &self,
        effort: Effort,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = Arc::clone(&self.store);
        match self.workers.run(effort, move || work(&store)).await {
            Ok(result) => result,
            Err(WorkError::Full) => Err(StoreError::Busy),
            Err(WorkError::Died) => Err(std::io::Error::other(WorkError::Died).into()),
        }
    }

    async fn put_and_pass_on(&self, passing: Passing, to: &[Source]) -> Answer {
        relay::check(to)?;
        check_batch(&[passing.block], passing.bytes.len())?;
        let here = self.put(vec![passing.block], passing.durable, passing.bytes.clone());
        let (here, others) = tokio::join!(here, self.relay.pass_on(&passing, to));
        let copies = std::iter::once(here).chain(others).collect();
        Ok((StorageAnswer::Relayed { copies }, Vec::new()))
    }

    async fn put(&self, blocks: Vec<PutBlock>, durable: bool, payload: Bytes) -> Result<BootId, Refusal> {
        let started = Instant::now();
        let put = self.put_now(blocks, durable, payload).await;
        self.puts.note(started.elapsed());
        put
    }

    async fn put_now(&self, blocks: Vec<PutBlock>, durable: bool, payload: Bytes) -> Result<BootId, Refusal> {
        check_batch(&blocks, payload.len())?;
        // Not a bare zero, which nobody has to have been told.
        let latest = blocks.iter().map(|block| block.epoch).max().filter(|epoch| epoch.0 > 0);
        latest.into_iter().for_each(|epoch| self.hear(epoch));
        let effort = if payload.len() <= INLINE_BYTES_MAX { Effort::Short } else { Effort::Long };
        let ticket = if effort == Effort::Short && self.is_idle() {
            let checked = check_blocks(&blocks, &payload)?;
            match self.store.try_put(&checked) {
                Some(put) => put.map_err(logged)?,
                None => self.blocking(effort, move |store| store.put(&checked)).await.map_err(logged)?,
            }
        } else {
            let store = Arc::clone(&self.store);
            let put = move || check_blocks(&blocks, &payload).and_then(|checked| store.put(&checked).map_err(logged));
            self.workers.run(effort, put).await.map_err(work_refusal)??
        };
        if durable {
            self.store.durable(ticket).await.map_err(logged)?;
        }
        Ok(self.store.boot())
    }

    /// What is short is read where it was asked for, if no thread has to wait for the disk there; everything else elsewhere.
    async fn get(&self, block: BlockHash, range: Option<ByteRange>) -> Answer {
        let plan = self.store.plan(&block, range).map_err(logged)?;
        let is_short = plan.length() <= INLINE_READ_MAX;
        let here = if is_short { self.get_here(&plan).await } else { None };
        let bytes = match here {
            Some(bytes) => bytes,
            None => {
                let effort = if is_short { Effort::Short } else { Effort::Long };
                let read = move |store: &Store| match range {
                    None => store.get(&block),
                    Some(range) => store.get_range(&block, range).map(|(bytes, _)| bytes),
                };
                self.blocking(effort, read).await.map_err(logged)?
            }
        };
        Ok((StorageAnswer::Get { block_length: plan.block_length() }, vec![bytes]))
    }

    /// `None` if it cannot be done without waiting, or did not bring what it should.
    async fn get_here(&self, plan: &Plan) -> Option<Bytes> {
        match self.store.read_soon(plan) {
            Some(reading) => {
                self.reads_here.fetch_add(1, Relaxed);
                let found = reading.await;
                self.reads_here.fetch_sub(1, Relaxed);
                found
            }
            None => self.store.read_cached(plan),
        }
    }

    /// Nothing else waits for the disk.
    fn is_idle(&self) -> bool {
        self.workers.is_idle() && self.reads_here.load(Relaxed) == 0
    }

    async fn sync(&self) -> Answer {
        self.store.durable(self.store.ticket()).await.map_err(logged)?;
        Ok((StorageAnswer::Sync { boot: self.store.boot() }, Vec::new()))
    }

    async fn has(&self, blocks: Vec<BlockHash>) -> Answer {
        check_list(&blocks)?;
        // No blocks: a probe, which must not wait for a disk behind the others.
        let present = match blocks.is_empty() {
            true => Vec::new(),
            false => {
                let effort = if blocks.len() <= HASHES_SHORT { Effort::Short } else { Effort::Long };
                self.blocking(effort, move |store| store.has(&blocks)).await.map_err(logged)?
            }
        };
        Ok((StorageAnswer::Has { boot: self.store.boot(), present }, Vec::new()))
    }

    async fn delete(&self, blocks: Vec<BlockHash>, epoch: Epoch) -> Answer {
        check_list(&blocks)?;
        let count = self.blocking(Effort::Long, move |store| store.delete(&blocks, epoch)).await.map_err(logged)?;
        Ok((StorageAnswer::Deleted { count }, Vec::new()))
    }

    async fn list(&self, after: Option<BlockHash>) -> Answer {
        let (blocks, end) =
            self.blocking(Effort::Long, move |store| store.list(after, HASH_LIST_MAX)).await.map_err(logged)?;
        Ok((StorageAnswer::List { blocks, end }, Vec::new()))
    }

    async fn digest(&self, bucket: u8) -> Answer {
        let digest = self.blocking(Effort::Long, move |store| digest_of(store, bucket)).await.map_err(logged)?;
        Ok((StorageAnswer::Digest(digest), Vec::new()))
    }

    async fn obtain(&self, hash: BlockHash, sources: &[Source], epoch: Epoch) -> Answer {
        check_sources(sources)?;
        self.hear(epoch);
        let _one_at_a_time = self.lane(&hash).lock().await;
        let here = self.blocking(Effort::Long, move |store| store.raise(&hash, epoch)).await;
        match here {
            Ok(Some(ticket)) => self.store.durable(ticket).await.map_err(logged)?,
            Ok(None) | Err(StoreError::Damaged(_)) => self.fetch_and_store(hash, sources, epoch).await?,
            Err(error) => return Err(logged(error)),
        }
        Ok((StorageAnswer::Obtained { boot: self.store.boot() }, Vec::new()))
    }

    async fn repair(&self, hash: BlockHash, sources: &[Source]) -> Answer {
        check_sources(sources)?;
        let _one_at_a_time = self.lane(&hash).lock().await;
        for _ in 0..VERDICTS_MAX {
            let (good, bad) =
                match self.blocking(Effort::Long, move |store| store.examine(&hash)).await.map_err(logged)? {
                    Verdict::Good => return Ok((StorageAnswer::Repaired { replaced: false }, Vec::new())),
                    Verdict::Missing => {
                        self.fetch_and_store(hash, sources, self.stamp()?).await?;
                        self.store.note_repaired();
                        return Ok((StorageAnswer::Repaired { replaced: true }, Vec::new()));
                    }
                    Verdict::BadTree(block, bad) => {
                        tracing::error!(block = %hash, "the hash tree of a copy is bad, its bytes are good");
                        (Some(block), bad)
                    }
                    Verdict::Damaged(bad, reason) => {
                        tracing::error!(block = %hash, reason, "a copy is bad");
                        let fetched = self.fetcher.fetch(hash, sources).await;
                        (fetched.map(|block| CheckedBlock::from_block(&block, Epoch(0))), bad)
                    }
                };
            // A bad copy may be the only one of which anything can be read: it stays until there is a good one.
            let good = good.ok_or(Refusal::Unavailable)?;
            if let Some(ticket) =
                self.blocking(Effort::Long, move |store| store.replace(&good, bad)).await.map_err(logged)?
            {
                self.store.durable(ticket).await.map_err(logged)?;
                tracing::info!(block = %hash, "a good copy is here again");
                return Ok((StorageAnswer::Repaired { replaced: true }, Vec::new()));
            }
        }
        Err(Refusal::Unavailable)
    }

    async fn fetch_and_store(&self, hash: BlockHash, sources: &[Source], epoch: Epoch) -> Result<(), Refusal> {
        let block = self.fetcher.fetch(hash, sources).await.ok_or(Refusal::Unavailable)?;
        let put = move |store: &Store| store.put(&[CheckedBlock::from_block(&block, epoch)]);
        let ticket = self.blocking(Effort::Long, put).await.map_err(logged)?;
        self.store.durable(ticket).await.map_err(logged)
    }

    fn lane(&self, hash: &BlockHash) -> &Mutex<()> {
        &self.repairs[usize::from(hash.0[0]) % REPAIR_LANES]
    }
}

fn digest_of(store: &Store, bucket: u8) -> Result<BucketDigest, StoreError> {
    let (mut digest, mut after) = (BucketDigest::default(), inventory::before(bucket));
    loop {
        let (page, end) = store.list(after, HASH_LIST_MAX)?;
        after = page.last().map(|(hash, _)| *hash);
        page.iter()
            .map(|(hash, _)| hash)
            .filter(|hash| inventory::is_in(bucket, hash))
            .for_each(|hash| digest.add(hash));
        if end || after.is_none_or(|last| !inventory::is_in(bucket, &last)) {
            return Ok(digest);
        }
    }
}

fn check_batch(blocks: &[PutBlock], payload: usize) -> Result<(), Refusal> {
    let lengths_fit = blocks.iter().all(|block| (1..=BLOCK_SIZE_MAX).contains(&block.length));
    let sum: u64 = blocks.iter().map(|block| u64::from(block.length)).sum();
    let fits = (1..=PUT_BATCH_MAX).contains(&blocks.len()) && payload <= PAYLOAD_SIZE_MAX && sum == payload as u64;
    if lengths_fit && fits { Ok(()) } else { Err(Refusal::BadRequest) }
}

fn check_list(blocks: &[BlockHash]) -> Result<(), Refusal> {
    if blocks.len() <= HASH_LIST_MAX { Ok(()) } else { Err(Refusal::BadRequest) }
}

fn check_sources(sources: &[Source]) -> Result<(), Refusal> {
    if sources.len() <= SOURCES_MAX { Ok(()) } else { Err(Refusal::BadRequest) }
}

/// Checks each block of a batch whose lengths were checked.
fn check_blocks(blocks: &[PutBlock], payload: &Bytes) -> Result<Vec<CheckedBlock>, Refusal> {
    let mut start = 0;
    let mut checked = Vec::with_capacity(blocks.len());
    for block in blocks {
        let end = start + block.length as usize;
        let bytes = payload.slice(start..end);
        checked.push(CheckedBlock::verify(block.hash, bytes, block.epoch).map_err(|_| Refusal::HashMismatch)?);
        start = end;
    }
    Ok(checked)
}

fn work_refusal(error: WorkError) -> Refusal {
    match error {
        WorkError::Full => Refusal::Unavailable,
        WorkError::Died => Refusal::Fault,
    }
}

/// The refusal for `error`, which is logged if it is the server's own fault.
fn logged(error: StoreError) -> Refusal {
    if matches!(error, StoreError::Io(_) | StoreError::Failed(_)) {
        tracing::error!(%error, "a request failed");
    }
    error.refusal()
}

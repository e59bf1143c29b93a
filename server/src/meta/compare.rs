//! Compares what each storage server has with what it is on record for, and mends the difference (anti-entropy).
//!
//! Both sides sort the hashes of a bucket and hash them; only where the digests differ is a list sent. What is on record and not there
//! is taken off, and so owed, and copied. What is there and not on record, twice and a grace apart, is put on record where copies are
//! short, and condemned where nobody needs it: it may be a put whose commit is still on its way, so that it goes as garbage does.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use holdfast_common::{
    BlockHash, BootId, Epoch, ServerId,
    inventory::{self, BUCKETS},
    limits::{HASH_LIST_MAX, LOST_MAX},
    net::Peers,
    wire::{
        meta::Severity,
        storage::{StorageAnswer, StorageRequest},
    },
    work,
};

use super::{
    committer::Proposer,
    copier::{self, Order},
    core::{Core, Fault, ask},
    journal::Note,
    state::{Command, Reply, Rows, View, blocks, garbage, holdings},
    strays,
};

/// How the journal says that a storage server turned out not to have copies.
pub const MISSES_COPIES: &str = "does not have";
const TICK: Duration = Duration::from_secs(1);
/// After a bucket of more than so many blocks: who reads and writes goes first.
const MANY: u64 = 64;
const PAUSE: Duration = Duration::from_millis(5);
const DEADLINE: Duration = Duration::from_secs(10);
/// Blocks that one entry changes.
const BATCH: usize = 1024;
/// Copies that are nowhere on record, remembered until they are met again.
const STRAYS_MAX: usize = 1 << 20;

/// Where one bucket of one server differs.
#[derive(Debug, Default)]
pub struct Difference {
    /// Blocks that the server is on record for.
    pub on_record: u64,
    /// On record, and not there.
    pub missing: Vec<BlockHash>,
    /// There and not on record, with its stamp.
    pub extra: Vec<(BlockHash, Epoch)>,
}

/// Looks at one bucket. `None`: the server did not answer.
pub async fn look(core: &Core, peers: &dyn Peers, server: ServerId, bucket: u8) -> Result<Option<Difference>, Fault> {
    // The record first: what is put and committed from here on is extra for a moment, and never missing.
    let record = core.store.view()?;
    let holding = record.holding(server, bucket)?;
    let mut difference = Difference { on_record: holding.blocks, ..Difference::default() };
    match question(core, peers, server, &StorageRequest::Digest { bucket }).await {
        Some(StorageAnswer::Digest(digest)) if digest == holding => return Ok(Some(difference)),
        Some(StorageAnswer::Digest(_)) => {}
        _ => return Ok(None),
    }
    let held = held_in(&record, server, bucket).await?;
    drop(record);
    let Some(here) = list(core, peers, server, bucket).await else { return Ok(None) };
    let view = core.store.view()?;
    for (looked, hash) in held.iter().filter(|hash| !here.contains_key(hash)).enumerate() {
        give_way(looked).await;
        let row = blocks::block(&*view, *hash)?;
        if row.is_some_and(|row| !row.condemned && row.holders.contains(&server)) {
            difference.missing.push(*hash);
        }
    }
    let extra = here.into_iter().filter(|(hash, _)| held.binary_search(hash).is_err());
    for (looked, (hash, epoch)) in extra.enumerate() {
        give_way(looked).await;
        let row = blocks::block(&*view, hash)?;
        if row.is_none_or(|row| !row.holders.contains(&server)) {
            difference.extra.push((hash, epoch));
        }
    }
    drop(view);
    Ok(retain_missing(core, peers, server, &mut difference).await.then_some(difference))
}

/// Has whoever else needs this thread go in between, once a batch.
async fn give_way(looked: usize) {
    if looked % BATCH == BATCH - 1 {
        tokio::task::yield_now().await;
    }
}

/// Asks once more for what was not in the list: it may have been put again meanwhile. `false`: no answer.
async fn retain_missing(core: &Core, peers: &dyn Peers, server: ServerId, difference: &mut Difference) -> bool {
    if difference.missing.is_empty() {
        return true;
    }
    let mut still_missing = Vec::new();
    for blocks in difference.missing.chunks(HASH_LIST_MAX) {
        let request = StorageRequest::Has { blocks: blocks.to_vec() };
        let Some(StorageAnswer::Has { present, .. }) = question(core, peers, server, &request).await else {
            return false;
        };
        let here = blocks.iter().zip(present);
        still_missing.extend(here.filter(|(_, present)| !present).map(|(hash, _)| *hash));
    }
    difference.missing = still_missing;
    true
}

async fn held_in(record: &Arc<View>, server: ServerId, bucket: u8) -> Result<Vec<BlockHash>, Fault> {
    let (mut held, mut after) = (Vec::new(), None);
    loop {
        let view = Arc::clone(record);
        let page = work::run(move || holdings::held_in(&*view, server, bucket, after, BATCH)).await;
        let page = page.map_err(|_| Fault::Thread)??;
        held.extend(page.blocks);
        after = page.next;
        if after.is_none() {
            return Ok(held);
        }
    }
}

async fn list(core: &Core, peers: &dyn Peers, server: ServerId, bucket: u8) -> Option<BTreeMap<BlockHash, Epoch>> {
    let (mut all, mut after) = (BTreeMap::new(), inventory::before(bucket));
    loop {
        let answer = question(core, peers, server, &StorageRequest::List { after }).await?;
        let StorageAnswer::List { blocks, end } = answer else { return None };
        after = blocks.last().map(|(hash, _)| *hash);
        all.extend(blocks.into_iter().filter(|(hash, _)| inventory::is_in(bucket, hash)));
        if end || after.is_none_or(|last| !inventory::is_in(bucket, &last)) {
            return Some(all);
        }
    }
}

async fn question(core: &Core, peers: &dyn Peers, server: ServerId, request: &StorageRequest) -> Option<StorageAnswer> {
    let to = core.cluster.lock().endpoint(server)?;
    match ask(peers, to, request, DEADLINE).await {
        Ok(Ok(answer)) => Some(answer),
        other => {
            tracing::debug!(%server, ?other, "a storage server does not say what it has");
            None
        }
    }
}

/// Those of `missing` that files name, at most `LOST_MAX` of them, with how many servers are on record for each: what none of these
/// has is lost.
pub fn named_among(core: &Core, missing: &[BlockHash]) -> Result<Vec<(BlockHash, u32)>, Fault> {
    let view = core.store.view()?;
    let mut named = Vec::new();
    for hash in missing.iter().take(LOST_MAX) {
        if let Some(row) = blocks::block(&*view, *hash)?.filter(|row| row.refs > 0) {
            named.push((*hash, u32::try_from(row.holders.len()).unwrap_or(u32::MAX)));
        }
    }
    Ok(named)
}

/// Takes what is missing off the record, so that it is owed. Returns how many could be: not those of which it was the last copy.
pub async fn mend_missing(core: &Core, proposer: &Proposer, server: ServerId, missing: Vec<BlockHash>) -> usize {
    let mut mended = 0;
    for batch in missing.chunks(BATCH) {
        let command = Command::HolderLost { server, blocks: batch.to_vec() };
        match proposer.propose(command).await {
            Ok((_, Ok(Reply::Lost(count)))) => mended += count,
            Ok(_) => {}
            Err(refusal) => tracing::debug!(%server, %refusal, "missing copies could not be taken off the record yet"),
        }
        core.copies_wanted.notify_one();
    }
    mended
}

/// Compares every server with the record: when it has been started anew, and then from time to time.
pub struct Comparer {
    core: Arc<Core>,
    proposer: Proposer,
    peers: Arc<dyn Peers>,
    every: Duration,
    grace: Duration,
    /// In which life a server was compared, and when it is due again.
    due: BTreeMap<ServerId, ((BootId, u64), Duration)>,
    /// Copies that are nowhere on record, and since when that is known.
    strays: BTreeMap<(ServerId, BlockHash), Duration>,
}

impl std::fmt::Debug for Comparer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Comparer").field("due", &self.due).finish_non_exhaustive()
    }
}

impl Comparer {
    /// `every`: how often without a reason. `grace`: how long the commit of a put may take.
    pub fn new(core: Arc<Core>, proposer: Proposer, peers: Arc<dyn Peers>, every: Duration, grace: Duration) -> Self {
        Self { core, proposer, peers, every, grace, due: BTreeMap::new(), strays: BTreeMap::new() }
    }

    pub async fn run(mut self) -> Result<(), Fault> {
        loop {
            tokio::time::sleep(TICK).await;
            if !self.core.may_collect() {
                continue;
            }
            let up = self.core.cluster.lock().up();
            self.strays.retain(|(server, _), _| up.contains(server));
            for server in up {
                self.compare_if_due(server).await?;
            }
        }
    }

    async fn compare_if_due(&mut self, server: ServerId) -> Result<(), Fault> {
        let Some(life) = self.core.cluster.lock().life(server) else { return Ok(()) };
        let now = self.core.clock.monotonic();
        if self.core.compare_soon.lock().remove(&server) {
            self.due.remove(&server);
        }
        if self.due.get(&server).is_some_and(|(compared, due)| *compared == life && now < *due) {
            return Ok(());
        }
        if let Some(missed) = self.compare(server).await? {
            let has_strays =
                self.strays.range((server, BlockHash([0; 32]))..=(server, BlockHash([255; 32]))).next().is_some();
            // Mounts may have mended meanwhile what was taken off the record: then it has copies that nobody knows.
            let wait = if has_strays || missed { self.grace.min(self.every) } else { self.every };
            self.due.insert(server, (life, self.core.clock.monotonic() + wait));
        }
        Ok(())
    }

    /// Whether copies were missing; `None`: the server stopped answering.
    async fn compare(&mut self, server: ServerId) -> Result<Option<bool>, Fault> {
        let (mut blocks, mut missing, mut mended) = (0, 0, 0);
        for bucket in BUCKETS {
            let Some(difference) = look(&self.core, &*self.peers, server, bucket).await? else { return Ok(None) };
            let pause = if difference.on_record > MANY { PAUSE } else { Duration::ZERO };
            blocks += difference.on_record;
            missing += difference.missing.len();
            mended += mend_missing(&self.core, &self.proposer, server, difference.missing).await;
            self.mend_extra(server, bucket, difference.extra).await?;
            tokio::time::sleep(pause).await;
        }
        tracing::info!(%server, blocks, missing, "a storage server was compared with the record");
        if missing > 0 {
            let lost = missing - mended;
            tracing::warn!(%server, missing, lost, "a storage server does not have what it is on record for: copies are made");
            let what = format!("{MISSES_COPIES} {missing} of the blocks that it is on record for");
            let note = Note::new(
                if lost > 0 { Severity::Error } else { Severity::Warning },
                format!("storage server {server}"),
                what,
            );
            let note = match lost {
                0 => note.meaning("these blocks are short of a copy"),
                _ => note.meaning(format!("{lost} blocks are lost: `holdfast fsck` names the files")),
            };
            self.core.tell(note.doing(format!("copies of {mended} are made from others")));
        }
        Ok(Some(missing > 0))
    }

    async fn mend_extra(&mut self, server: ServerId, bucket: u8, extra: Vec<(BlockHash, Epoch)>) -> Result<(), Fault> {
        let now = self.core.clock.monotonic();
        let here: BTreeSet<BlockHash> = extra.iter().map(|(hash, _)| *hash).collect();
        self.strays
            .retain(|(owner, hash), _| *owner != server || !inventory::is_in(bucket, hash) || here.contains(hash));
        let (mut wanted, mut unwanted): (BTreeMap<Epoch, Vec<BlockHash>>, Vec<BlockHash>) = Default::default();
        // Short of copies, and stamped too early to count: stamped anew, which needs no other copy.
        let mut early = Vec::new();
        let counting = self.core.cluster.lock().counting();
        {
            let view = self.core.store.view()?;
            for (hash, epoch) in extra {
                if self.strays.len() >= STRAYS_MAX && !self.strays.contains_key(&(server, hash)) {
                    continue;
                }
                let since = *self.strays.entry((server, hash)).or_insert(now);
                if now.saturating_sub(since) < self.grace {
                    continue;
                }
                self.strays.remove(&(server, hash));
                match blocks::block(&*view, hash)? {
                    Some(row) if blocks::is_owed(&row) && garbage::counts(&row, epoch) => {
                        wanted.entry(epoch).or_default().push(hash);
                    }
                    Some(row) if blocks::is_owed(&row) => {
                        early.push(Order { block: hash, target: server, sources: Vec::new(), epoch: row.epoch });
                    }
                    // Its holders may be away for good: then this copy counts.
                    Some(row)
                        if row.refs > 0
                            && row.holders.iter().filter(|it| counting.contains(it)).count() < row.wanted => {}
                    _ => unwanted.push(hash),
                }
            }
        }
        self.put_on_record(server, wanted).await;
        copier::make(&self.core, &self.proposer, &self.peers, early).await?;
        let deleted = strays::delete(&self.core, &self.proposer, &*self.peers, server, &unwanted).await;
        if deleted > 0 {
            self.core.tell(
                Note::new(
                    Severity::Info,
                    format!("storage server {server}"),
                    format!("has {deleted} copies that nobody needs"),
                )
                .doing("they are deleted"),
            );
        }
        Ok(())
    }

    async fn put_on_record(&self, server: ServerId, wanted: BTreeMap<Epoch, Vec<BlockHash>>) {
        let Some(boot) = self.core.cluster.lock().boot(server) else { return };
        for (epoch, blocks) in wanted {
            // Whether they are durable there is not known: the next barrier asks.
            blocks.iter().for_each(|hash| self.core.unsynced.lock().add(server, boot, *hash));
            for batch in blocks.chunks(BATCH) {
                let command = Command::HolderAdded { server, blocks: batch.to_vec(), epoch };
                if let Err(refusal) = self.proposer.propose(command).await {
                    tracing::debug!(%server, %refusal, "copies that were found could not be recorded yet");
                }
            }
        }
    }
}

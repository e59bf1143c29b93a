//! What a metadata server does unasked: judges servers and sessions by their silence, reclaims orphans, and has
//! owed copies made.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use holdfast_common::{
    BlockHash, BootId, Epoch, Ino, ServerId,
    limits::REPLICAS,
    net::Peers,
    placement::candidates,
    wire::storage::{Source, StorageAnswer, StorageRequest},
};
use tokio::task::JoinSet;

use super::{
    committer::Proposer,
    core::{Core, Fault, ask},
    state::{Command, Reply, blocks, orphans},
};

const TICK: Duration = Duration::from_millis(200);
const SPACE_INTERVAL: Duration = Duration::from_millis(500);
/// Orphans that one entry reclaims.
const RECLAIM_BATCH: usize = 256;
/// Wait before owed blocks are looked at again of which none could be paid.
const OWED_INTERVAL: Duration = Duration::from_secs(1);
/// Owed blocks looked at in one round, and copies under way at once.
const OWED_ROUND: usize = 1024;
const COPIES_AT_ONCE: usize = 16;
const OBTAIN_DEADLINE: Duration = Duration::from_secs(30);

/// Judges silence and reclaims what it leaves behind.
pub async fn watch(core: Arc<Core>, proposer: Proposer, session_timeout: Duration) -> Result<(), Fault> {
    // Apart, because what waits for the committer must not look like a time in which nobody could be heard.
    let judging = async {
        loop {
            tokio::time::sleep(TICK).await;
            judge_servers(&core);
        }
    };
    let reclaiming = async {
        loop {
            tokio::time::sleep(TICK).await;
            expire_sessions(&core, &proposer, session_timeout).await;
            reclaim_orphans(&core, &proposer).await?;
        }
    };
    tokio::select! {
        never = judging => never,
        fault = reclaiming => fault,
    }
}

/// Notices when the metadata's own disk has no room left for growth, before writes to it fail.
pub async fn watch_space(core: Arc<Core>, reserve_bytes: u64) -> Result<(), Fault> {
    loop {
        let looking = Arc::clone(&core);
        let space = tokio::task::spawn_blocking(move || looking.disk.space(&looking.directory)).await;
        match space.map_err(|_| Fault::Thread)? {
            Ok(space) => note_space(&core, space.free, reserve_bytes),
            Err(error) => tracing::warn!(%error, "the space on the metadata's disk is not known"),
        }
        tokio::time::sleep(SPACE_INTERVAL).await;
    }
}

fn note_space(core: &Core, free_bytes: u64, reserve_bytes: u64) {
    let full = free_bytes < reserve_bytes;
    match (core.full.swap(full, Ordering::Relaxed), full) {
        (false, true) => {
            tracing::error!(free_bytes, reserve_bytes, directory = %core.directory.display(), "the metadata's disk is full: what needs more of it is refused; delete something and restart this server, or make room there");
        }
        (true, false) => tracing::info!(free_bytes, "there is room again on the metadata's disk"),
        _ => {}
    }
}

fn judge_servers(core: &Core) {
    let now = core.judging_time();
    let changed = core.cluster.lock().tick(now);
    for (server, state) in changed {
        tracing::warn!(%server, %state, "a storage server has been silent for too long");
    }
}

async fn expire_sessions(core: &Core, proposer: &Proposer, timeout: Duration) {
    if core.is_recovering() {
        // Who has said what it had done waits for the others in silence.
        return;
    }
    let now = core.judging_time();
    let expired = core.sessions.lock().expired(now, timeout);
    for session in expired {
        tracing::warn!(%session, "a mount has been silent for too long: its session ends");
        match proposer.expire(session, timeout).await {
            Ok(_) => {}
            Err(refusal) => tracing::debug!(%session, %refusal, "the end of a session could not be recorded yet"),
        }
    }
}

/// Deletes what has no name and is open nowhere. After a restart not before every mount has said what it holds open.
async fn reclaim_orphans(core: &Core, proposer: &Proposer) -> Result<(), Fault> {
    let mut after = Ino(0);
    while !core.is_recovering() && core.sessions.lock().all_confirmed() {
        let page = orphans::orphans_after(&*core.store.view()?, after, RECLAIM_BATCH)?;
        let Some(last) = page.last().copied() else { break };
        let mut inos = page;
        inos.retain(|ino| !core.sessions.lock().is_open(*ino));
        if !inos.is_empty() {
            match proposer.propose(Command::Reclaim { inos }).await {
                // The same page again: the rest of a huge file.
                Ok((_, Ok(Reply::Reclaimed { unfinished: true }))) => continue,
                Ok(_) => {}
                Err(_) => break,
            }
        }
        after = last;
    }
    Ok(())
}

/// Has copies made of blocks that have too few.
pub struct Copier {
    core: Arc<Core>,
    proposer: Proposer,
    peers: Arc<dyn Peers>,
}

impl std::fmt::Debug for Copier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copier").finish_non_exhaustive()
    }
}

/// One copy to be made.
struct Order {
    block: BlockHash,
    target: ServerId,
    sources: Vec<Source>,
    /// What the copy is to be stamped with.
    epoch: Epoch,
}

impl Copier {
    pub fn new(core: Arc<Core>, proposer: Proposer, peers: Arc<dyn Peers>) -> Self {
        Self { core, proposer, peers }
    }

    pub async fn run(self) -> Result<(), Fault> {
        let mut after = None;
        loop {
            let (made, next) = self.round(after).await?;
            after = next;
            if made == 0 && after.is_none() {
                tokio::select! {
                    () = self.core.copies_wanted.notified() => {}
                    () = tokio::time::sleep(OWED_INTERVAL) => {}
                }
            }
        }
    }

    /// Looks at one page of what is owed. Returns how many copies were made, and where the next page begins.
    pub async fn round(&self, after: Option<BlockHash>) -> Result<(usize, Option<BlockHash>), Fault> {
        let (orders, next) = self.orders(after)?;
        let made = self.carry_out(orders).await?;
        let mut count = 0;
        for ((server, boot, epoch), blocks) in made {
            count += blocks.len();
            // Made copies are durable; noting them costs a sync at most, and trusts nobody.
            blocks.iter().for_each(|hash| self.core.unsynced.lock().add(server, boot, *hash));
            if let Err(refusal) = self.proposer.propose(Command::HolderAdded { server, blocks, epoch }).await {
                tracing::debug!(%server, %refusal, "copies could not be recorded yet");
            }
        }
        if count > 0 {
            tracing::info!(copies = count, "owed copies were made");
        }
        Ok((count, next))
    }

    fn orders(&self, after: Option<BlockHash>) -> Result<(Vec<Order>, Option<BlockHash>), Fault> {
        let view = self.core.store.view()?;
        let owed = blocks::owed_after(&*view, after, OWED_ROUND)?;
        let next = if owed.len() == OWED_ROUND { owed.last().copied() } else { None };
        let thin: BTreeSet<BlockHash> = self.core.thin.lock().iter().take(OWED_ROUND).copied().collect();
        let cluster = self.core.cluster.lock();
        let map = cluster.map();
        let mut orders = Vec::new();
        for block in owed.into_iter().chain(thin).collect::<BTreeSet<_>>() {
            let Some(row) = blocks::block(&*view, block)? else { continue };
            let sources = cluster.sources(&row.holders);
            let up = row.holders.iter().filter(|holder| cluster.is_up(**holder)).count();
            let target = candidates(&map, block).into_iter().find(|server| !row.holders.contains(server));
            if let Some(target) = target
                && row.refs > 0
                && up < REPLICAS
                && row.holders.len() < blocks::HOLDERS_MAX
                && !sources.is_empty()
            {
                orders.push(Order { block, target, sources, epoch: row.epoch });
            }
        }
        Ok((orders, next))
    }

    /// Returns who now has which, under which boot, and stamped with what.
    async fn carry_out(&self, orders: Vec<Order>) -> Result<Made, Fault> {
        let mut made = Made::new();
        let mut running = JoinSet::new();
        let mut orders = orders.into_iter();
        loop {
            while running.len() < COPIES_AT_ONCE
                && let Some(order) = orders.next()
            {
                let (core, peers) = (Arc::clone(&self.core), Arc::clone(&self.peers));
                running.spawn(async move { obtain(&core, &*peers, order).await });
            }
            let Some(outcome) = running.join_next().await else { return Ok(made) };
            if let Some((server, boot, epoch, block)) = outcome.map_err(|_| Fault::Thread)? {
                made.entry((server, boot, epoch)).or_default().push(block);
            }
        }
    }
}

type Made = BTreeMap<(ServerId, BootId, Epoch), Vec<BlockHash>>;

async fn obtain(core: &Core, peers: &dyn Peers, order: Order) -> Option<(ServerId, BootId, Epoch, BlockHash)> {
    let Order { block, target, sources, epoch } = order;
    let to = core.cluster.lock().endpoint(target)?;
    match ask(peers, to, &StorageRequest::Obtain { block, sources, epoch }, OBTAIN_DEADLINE).await {
        Ok(Ok(StorageAnswer::Obtained { boot })) => Some((target, boot, epoch, block)),
        Ok(Ok(other)) => {
            tracing::warn!(%block, server = %target, ?other, "an answer that does not fit an order for a copy");
            None
        }
        Ok(Err(refusal)) => {
            tracing::warn!(%block, server = %target, %refusal, "an owed copy could not be made");
            None
        }
        Err(error) => {
            tracing::debug!(%block, server = %target, %error, "an owed copy could not be made");
            None
        }
    }
}

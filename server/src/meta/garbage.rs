//! Collects garbage: has blocks condemned that no file names any more, deleted by their servers, and forgotten.
//!
//! Nothing is deleted before its condemnation is durable: a metadata server that came back from a power cut without it would
//! count on the copies. What is deleted is forgotten only after another grace: until then a commit that is refused for it is one of that
//! very block, and not of any that took so long. See [`super::state::garbage`] for why what is put meanwhile stays.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use holdfast_common::planted::{Bug, is_planted};
use holdfast_common::{
    BlockHash, Epoch, Position, ServerId,
    limits::HASH_LIST_MAX,
    net::Peers,
    wire::storage::{StorageAnswer, StorageRequest},
};
use tokio::task::JoinSet;

use super::{
    committer::Proposer,
    core::{Core, Fault, ask},
    state::{Command, Reply, blocks, garbage},
};

const TICK: Duration = Duration::from_millis(500);
/// Blocks that are looked at or deleted in one step, and steps of one tick: what is asked of the servers meanwhile waits little.
const PAGE: usize = 1024;
const PAGES_A_TICK: usize = 16;
/// Before a list is gone through again of which nothing could be deleted: their servers are down.
const STUCK_INTERVAL: Duration = Duration::from_secs(5);
/// Between a condemnation and the first deletion. By then mounts have heard of the epoch, and put with it.
const DELETE_DELAY: Duration = Duration::from_secs(2);
const DELETE_DEADLINE: Duration = Duration::from_secs(30);
const _: () = assert!(PAGE <= HASH_LIST_MAX);

pub struct Collector {
    core: Arc<Core>,
    proposer: Proposer,
    peers: Arc<dyn Peers>,
    /// How long a block is kept that no file names, and how long its name is after that.
    grace: Duration,
    /// Of the last condemnation before this life, what was applied when it began, and when that was.
    started: (Epoch, Position, Duration),
    /// Where and when this life condemned, or met a condemnation that another part of this server had made.
    condemned: BTreeMap<Epoch, (Position, Duration)>,
    /// What was applied when, back to a grace ago. By a clock that only goes forward: the time of day jumps.
    applied: VecDeque<(Duration, Position)>,
    unnamed_cursor: Option<BlockHash>,
    condemned_cursor: Option<(Epoch, BlockHash)>,
    /// Nothing can be deleted before.
    stuck_until: Duration,
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collector").field("condemned", &self.condemned).finish_non_exhaustive()
    }
}

impl Collector {
    pub fn new(core: Arc<Core>, proposer: Proposer, peers: Arc<dyn Peers>, grace: Duration) -> Self {
        let started = (core.epoch(), core.applied(), core.clock.monotonic());
        Self {
            core,
            proposer,
            peers,
            grace,
            started,
            condemned: BTreeMap::new(),
            applied: VecDeque::new(),
            unnamed_cursor: None,
            condemned_cursor: None,
            stuck_until: Duration::ZERO,
        }
    }

    pub async fn run(mut self) -> Result<(), Fault> {
        loop {
            tokio::time::sleep(TICK).await;
            if !self.core.may_collect() {
                continue;
            }
            self.condemn().await?;
            self.delete().await?;
            self.forget().await?;
        }
    }

    /// Condemns what no file has named for the grace.
    async fn condemn(&mut self) -> Result<(), Fault> {
        let Some(through) = self.applied_a_grace_ago() else { return Ok(()) };
        for _ in 0..PAGES_A_TICK {
            let view = self.core.store.view()?;
            let (blocks, next) = garbage::unnamed_after(&*view, self.unnamed_cursor, PAGE, through)?;
            drop(view);
            self.unnamed_cursor = next;
            if !blocks.is_empty() {
                self.propose_condemnation(Command::CondemnUnnamed { blocks, unnamed_through: through }).await;
            }
            if next.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// `None`: this life has not lasted that long.
    fn applied_a_grace_ago(&mut self) -> Option<Position> {
        let now = self.core.clock.monotonic();
        let is_past = |at: Duration| now.saturating_sub(at) >= self.grace;
        while self.applied.get(1).is_some_and(|(at, _)| is_past(*at)) {
            self.applied.pop_front();
        }
        let found = self.applied.front().filter(|(at, _)| is_past(*at)).map(|(_, position)| *position);
        self.applied.push_back((now, self.core.applied()));
        found
    }

    async fn propose_condemnation(&mut self, command: Command) {
        match self.proposer.propose(command).await {
            Ok((position, Ok(Reply::Condemned(Some(epoch))))) => {
                self.condemned.insert(epoch, (position, self.core.clock.monotonic()));
                self.stuck_until = Duration::ZERO;
            }
            Ok(_) => {}
            Err(refusal) => tracing::debug!(%refusal, "garbage could not be condemned yet"),
        }
    }

    /// Has copies deleted that are condemned.
    async fn delete(&mut self) -> Result<(), Fault> {
        if self.core.clock.monotonic() < self.stuck_until || is_planted(Bug::GarbageKept) {
            return Ok(());
        }
        let mut ordered = false;
        for _ in 0..PAGES_A_TICK {
            let (orders, is_last) = self.due()?;
            ordered |= !orders.is_empty();
            self.carry_out(orders).await?;
            if is_last {
                if !ordered && !self.condemned.values().any(|(_, at)| self.is_young(*at)) {
                    self.stuck_until = self.core.clock.monotonic() + STUCK_INTERVAL;
                }
                break;
            }
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    fn is_young(&self, condemned: Duration) -> bool {
        self.core.clock.monotonic().saturating_sub(condemned) < DELETE_DELAY + TICK
    }

    /// Forgets what has been deleted everywhere for long enough.
    async fn forget(&mut self) -> Result<(), Fault> {
        let mut after = None;
        for _ in 0..PAGES_A_TICK {
            let view = self.core.store.view()?;
            let mut page = garbage::deleted_after(&*view, after, PAGE)?;
            after = page.last().copied();
            let all = page.len();
            let old_enough =
                |epoch: Epoch| self.core.clock.monotonic().saturating_sub(self.seen(epoch).1) >= self.grace;
            page.retain(|(epoch, _)| old_enough(*epoch));
            let mut forgotten: BTreeMap<Epoch, Vec<BlockHash>> = BTreeMap::new();
            for (epoch, hash) in &page {
                // One that pieces name all the same is kept: fsck tells.
                if blocks::block(&*view, *hash)?.is_some_and(|row| row.refs == 0) {
                    forgotten.entry(*epoch).or_default().push(*hash);
                }
            }
            drop(view);
            for (epoch, blocks) in forgotten {
                if let Err(refusal) = self.proposer.propose(Command::Forget { blocks, epoch }).await {
                    tracing::debug!(%refusal, "what is deleted could not be forgotten yet");
                    return Ok(());
                }
            }
            if page.len() < all || all < PAGE {
                break;
            }
        }
        self.drop_old_epochs()
    }

    /// Of which no block is left.
    fn drop_old_epochs(&mut self) -> Result<(), Fault> {
        let view = self.core.store.view()?;
        let first = |page: Vec<(Epoch, BlockHash)>| page.first().map(|(epoch, _)| *epoch);
        let firsts =
            [first(garbage::condemned_after(&*view, None, 1)?), first(garbage::deleted_after(&*view, None, 1)?)];
        match firsts.into_iter().flatten().min() {
            Some(oldest) => self.condemned = self.condemned.split_off(&oldest),
            None => self.condemned.clear(),
        }
        Ok(())
    }

    /// Where and when something was condemned: at the latest then.
    fn seen(&self, epoch: Epoch) -> (Position, Duration) {
        let (before, position, at) = self.started;
        match self.condemned.get(&epoch) {
            Some(seen) => *seen,
            None if epoch <= before => (position, at),
            // Not met yet.
            None => (self.core.applied(), self.core.clock.monotonic()),
        }
    }

    /// Orders for the next page of what is condemned, as far as it may be deleted by now and is where servers answer; and whether
    /// that was the last page.
    fn due(&mut self) -> Result<(Orders, bool), Fault> {
        let view = self.core.store.view()?;
        let page = garbage::condemned_after(&*view, self.condemned_cursor, PAGE)?;
        self.condemned_cursor = page.last().copied().filter(|_| page.len() == PAGE);
        let is_last = self.condemned_cursor.is_none();
        let mut orders = Orders::new();
        for (epoch, hash) in page {
            let seen = self.seen(epoch);
            if epoch > self.started.0 {
                self.condemned.entry(epoch).or_insert(seen);
            }
            // One that pieces name all the same is kept: fsck tells.
            let row = blocks::block(&*view, hash)?.filter(|row| row.refs == 0 && self.may_delete(epoch));
            let Some(row) = row else { continue };
            let cluster = self.core.cluster.lock();
            for holder in row.holders.into_iter().filter(|holder| cluster.is_up(*holder)) {
                orders.entry((holder, epoch)).or_default().push(hash);
            }
        }
        Ok((orders, is_last))
    }

    fn may_delete(&self, epoch: Epoch) -> bool {
        let (position, at) = self.seen(epoch);
        let waited = self.core.clock.monotonic().saturating_sub(at);
        self.core.durable() >= position && (epoch <= self.started.0 || waited >= DELETE_DELAY)
    }

    /// Has blocks deleted, and records what is. Holders that are down are asked when they are back, or are replaced.
    async fn carry_out(&self, orders: Orders) -> Result<(), Fault> {
        let mut running = JoinSet::new();
        for ((server, epoch), blocks) in orders {
            let (core, peers) = (Arc::clone(&self.core), Arc::clone(&self.peers));
            running.spawn(async move { (server, epoch, delete(&core, &*peers, server, epoch, blocks).await) });
        }
        while let Some(answer) = running.join_next().await {
            let (server, epoch, blocks) = answer.map_err(|_| Fault::Thread)?;
            if blocks.is_empty() {
                continue;
            }
            if let Err(refusal) = self.proposer.propose(Command::Deleted { server, blocks, epoch }).await {
                tracing::debug!(%refusal, "what is deleted could not be recorded yet");
            }
        }
        Ok(())
    }
}

/// Who has to delete what was condemned when.
type Orders = BTreeMap<(ServerId, Epoch), Vec<BlockHash>>;

/// Those of `blocks` that the server has deleted: all or none.
async fn delete(
    core: &Core,
    peers: &dyn Peers,
    server: ServerId,
    epoch: Epoch,
    blocks: Vec<BlockHash>,
) -> Vec<BlockHash> {
    let Some(to) = core.cluster.lock().endpoint(server) else { return Vec::new() };
    let request = StorageRequest::Delete { blocks: blocks.clone(), epoch };
    match ask(peers, to, &request, DELETE_DEADLINE).await {
        Ok(Ok(StorageAnswer::Deleted { .. })) => blocks,
        other => {
            tracing::debug!(%server, ?other, "garbage could not be deleted yet");
            Vec::new()
        }
    }
}

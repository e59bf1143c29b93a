//! Collects garbage: has blocks condemned that no file names any more, deleted by their servers, and forgotten.
//!
//! Nothing is deleted before its condemnation is durable: a metadata server that came back from a power cut without it would
//! count on the copies. See [`super::state::garbage`] for why what is put meanwhile stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use holdfast_common::{
    BlockHash, Epoch, Position, ServerId, Time,
    limits::HASH_LIST_MAX,
    net::Peers,
    wire::storage::{StorageAnswer, StorageRequest},
};
use tokio::task::JoinSet;

use super::{
    committer::Proposer,
    core::{Core, Fault, ask},
    state::{Command, Reply, Rows, blocks, garbage},
};

const TICK: Duration = Duration::from_millis(500);
/// Blocks that are looked at or deleted in one step, and steps of one tick: what is asked of the servers meanwhile waits little.
const PAGE: usize = 1024;
const PAGES_A_TICK: usize = 16;
/// Between a condemnation and the first deletion. By then mounts have heard of the epoch, and put with it.
const DELETE_DELAY: Duration = Duration::from_secs(2);
const DELETE_DEADLINE: Duration = Duration::from_secs(30);
const _: () = assert!(PAGE <= HASH_LIST_MAX);

pub struct Collector {
    core: Arc<Core>,
    proposer: Proposer,
    peers: Arc<dyn Peers>,
    /// How long a block is kept that no file names.
    grace: Duration,
    /// What was applied when this server started: older condemnations are among it.
    started: Position,
    /// Where and when this life condemned.
    condemned: BTreeMap<Epoch, (Position, Duration)>,
    unnamed_cursor: Option<BlockHash>,
    condemned_cursor: Option<(Epoch, BlockHash)>,
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collector").field("condemned", &self.condemned).finish_non_exhaustive()
    }
}

impl Collector {
    pub fn new(core: Arc<Core>, proposer: Proposer, peers: Arc<dyn Peers>, grace: Duration) -> Self {
        let started = core.applied();
        Self {
            core,
            proposer,
            peers,
            grace,
            started,
            condemned: BTreeMap::new(),
            unnamed_cursor: None,
            condemned_cursor: None,
        }
    }

    pub async fn run(mut self) -> Result<(), Fault> {
        loop {
            tokio::time::sleep(TICK).await;
            if self.core.is_recovering() {
                continue;
            }
            self.condemn().await?;
            self.delete().await?;
        }
    }

    /// Condemns what no file has named for the grace.
    async fn condemn(&mut self) -> Result<(), Fault> {
        let before = earlier(self.core.clock.now(), self.grace);
        for _ in 0..PAGES_A_TICK {
            let view = self.core.store.view()?;
            let (blocks, next) = garbage::unnamed_after(&*view, self.unnamed_cursor, PAGE, before)?;
            drop(view);
            self.unnamed_cursor = next;
            if !blocks.is_empty() {
                self.propose_condemnation(Command::Condemn { blocks, unnamed_before: before }).await;
            }
            if next.is_none() {
                break;
            }
        }
        Ok(())
    }

    async fn propose_condemnation(&mut self, command: Command) {
        match self.proposer.propose(command).await {
            Ok((position, Ok(Reply::Condemned(Some(epoch))))) => {
                self.condemned.insert(epoch, (position, self.core.clock.monotonic()));
            }
            Ok(_) => {}
            Err(refusal) => tracing::debug!(%refusal, "garbage could not be condemned yet"),
        }
    }

    /// Has copies deleted that are condemned, and forgets blocks of which all are.
    async fn delete(&mut self) -> Result<(), Fault> {
        for _ in 0..PAGES_A_TICK {
            let due = self.due()?;
            let deleted = self.deleted(due.orders).await?;
            self.note_deleted(&due.holders, &deleted).await;
            if due.page < PAGE {
                break;
            }
        }
        Ok(())
    }

    async fn note_deleted(
        &self,
        holders: &BTreeMap<(Epoch, BlockHash), Vec<ServerId>>,
        deleted: &BTreeSet<(ServerId, BlockHash)>,
    ) {
        let mut forgotten: BTreeMap<Epoch, Vec<BlockHash>> = BTreeMap::new();
        let mut partly: BTreeMap<ServerId, Vec<BlockHash>> = BTreeMap::new();
        for ((epoch, hash), holders) in holders {
            let done: Vec<ServerId> =
                holders.iter().copied().filter(|holder| deleted.contains(&(*holder, *hash))).collect();
            if done.len() == holders.len() {
                forgotten.entry(*epoch).or_default().push(*hash);
            } else {
                done.into_iter().for_each(|server| partly.entry(server).or_default().push(*hash));
            }
        }
        let forget = forgotten.into_iter().map(|(epoch, blocks)| Command::Forget { blocks, epoch });
        // The others are down: when they are back, or have been replaced, only they are asked.
        let lost = partly.into_iter().map(|(server, blocks)| Command::HolderLost { server, blocks });
        for command in forget.chain(lost) {
            if let Err(refusal) = self.proposer.propose(command).await {
                tracing::debug!(%refusal, "what is deleted could not be recorded yet");
            }
        }
    }

    /// The next page of what is condemned; of it, what may be deleted by now and is where servers answer.
    fn due(&mut self) -> Result<Due, Fault> {
        let view = self.core.store.view()?;
        let page = garbage::condemned_after(&*view, self.condemned_cursor, PAGE)?;
        let mut due = Due { page: page.len(), ..Due::default() };
        self.condemned_cursor = page.last().copied().filter(|_| page.len() == PAGE);
        if self.condemned_cursor.is_none() && page.is_empty() && view.counters().condemned == 0 {
            self.condemned.clear();
        }
        let cluster = self.core.cluster.lock();
        for (epoch, hash) in page {
            let Some(row) = blocks::block(&*view, hash)? else { continue };
            let up: Vec<ServerId> = row.holders.iter().copied().filter(|holder| cluster.is_up(*holder)).collect();
            if !self.may_delete(epoch) || (up.is_empty() && !row.holders.is_empty()) {
                continue;
            }
            for holder in up {
                due.orders.entry((holder, epoch)).or_default().push(hash);
            }
            due.holders.insert((epoch, hash), row.holders);
        }
        Ok(due)
    }

    fn may_delete(&self, epoch: Epoch) -> bool {
        match self.condemned.get(&epoch) {
            Some((position, at)) => {
                let waited = self.core.clock.monotonic().saturating_sub(*at);
                self.core.durable() >= *position && waited >= DELETE_DELAY
            }
            None => self.core.durable() >= self.started,
        }
    }

    /// What the servers say is deleted.
    async fn deleted(
        &self,
        orders: BTreeMap<(ServerId, Epoch), Vec<BlockHash>>,
    ) -> Result<BTreeSet<(ServerId, BlockHash)>, Fault> {
        let mut running = JoinSet::new();
        let mut deleted = BTreeSet::new();
        for ((server, epoch), blocks) in orders {
            let (core, peers) = (Arc::clone(&self.core), Arc::clone(&self.peers));
            running.spawn(async move { (server, delete(&core, &*peers, server, epoch, blocks).await) });
        }
        while let Some(answer) = running.join_next().await {
            let (server, blocks) = answer.map_err(|_| Fault::Thread)?;
            deleted.extend(blocks.into_iter().map(|hash| (server, hash)));
        }
        Ok(deleted)
    }
}

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

/// One page of condemned blocks, sorted by who has to delete what.
#[derive(Debug, Default)]
struct Due {
    /// Blocks that were looked at.
    page: usize,
    orders: BTreeMap<(ServerId, Epoch), Vec<BlockHash>>,
    holders: BTreeMap<(Epoch, BlockHash), Vec<ServerId>>,
}

fn earlier(now: Time, by: Duration) -> Time {
    let secs = i64::try_from(by.as_secs()).unwrap_or(i64::MAX);
    Time { secs: now.secs.saturating_sub(secs), nanos: now.nanos }
}

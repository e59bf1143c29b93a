//! Has copies made: of blocks that have too few, and for whoever else wants a block somewhere.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use holdfast_common::planted::{Bug, is_planted};
use holdfast_common::{
    BlockHash, BootId, Epoch, ServerId,
    net::Peers,
    placement::candidates_beside,
    wire::storage::{Source, StorageAnswer, StorageRequest},
};
use tokio::task::JoinSet;

use super::{
    committer::Proposer,
    core::{Core, Fault, ask},
    state::{
        Command,
        blocks::{self, Debts},
    },
};

/// Wait before owed blocks are looked at again of which none could be paid.
const OWED_INTERVAL: Duration = Duration::from_secs(1);
/// Owed blocks looked at in one round.
const OWED_ROUND: usize = 1024;
/// Pages of last copies in a row of which none could be copied.
const PAGES_IN_VAIN: u32 = 8;
const OBTAIN_DEADLINE: Duration = Duration::from_secs(30);

/// One copy to be made.
#[derive(Debug)]
pub struct Order {
    pub block: BlockHash,
    pub target: ServerId,
    pub sources: Vec<Source>,
    /// What the copy is to be stamped with.
    pub epoch: Epoch,
}

/// Pays what is owed.
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

impl Copier {
    pub fn new(core: Arc<Core>, proposer: Proposer, peers: Arc<dyn Peers>) -> Self {
        Self { core, proposer, peers }
    }

    pub async fn run(self) -> Result<(), Fault> {
        let (mut after, mut last) = (None, None);
        loop {
            let saved = self.save_last_copies(&mut last).await?;
            let (made, next) = self.round(Debts::All, after).await?;
            after = next;
            if saved + made == 0 && after.is_none() {
                tokio::select! {
                    () = self.core.copies_wanted.notified() => {}
                    () = tokio::time::sleep(OWED_INTERVAL) => {}
                }
            }
        }
    }

    /// What would be lost with one more server goes before everything else that is owed, however much that is; but for what cannot be copied
    /// now, nothing else waits for long. Begins where it ended the last time.
    async fn save_last_copies(&self, after: &mut Option<BlockHash>) -> Result<usize, Fault> {
        let (mut saved, mut in_vain) = (0, 0);
        while in_vain < PAGES_IN_VAIN {
            let (made, next) = self.round(Debts::LastCopies, *after).await?;
            *after = next;
            saved += made;
            in_vain = if made > 0 { 0 } else { in_vain + 1 };
            if after.is_none() && made == 0 {
                break;
            }
        }
        Ok(saved)
    }

    /// Looks at one page of what is owed. Returns how many copies were made, and where the next page begins.
    async fn round(&self, debts: Debts, after: Option<BlockHash>) -> Result<(usize, Option<BlockHash>), Fault> {
        if is_planted(Bug::OwedForgotten) {
            return Ok((0, None));
        }
        // There may be many pages of which nothing can be copied.
        tokio::task::yield_now().await;
        let (orders, next) = self.orders(debts, after)?;
        let count = make(&self.core, &self.proposer, &self.peers, orders).await?;
        if count > 0 {
            tracing::info!(copies = count, "owed copies were made");
        }
        Ok((count, next))
    }

    /// Blocks with one copy that counts go first, within a page: others may be on record with servers that are down.
    fn orders(&self, debts: Debts, after: Option<BlockHash>) -> Result<(Vec<Order>, Option<BlockHash>), Fault> {
        let view = self.core.store.view()?;
        let owed = blocks::owed_after(&*view, debts, after, OWED_ROUND)?;
        let next = if owed.len() == OWED_ROUND { owed.last().copied() } else { None };
        let thin: BTreeSet<BlockHash> = self.core.thin.lock().iter().take(OWED_ROUND).copied().collect();
        let cluster = self.core.cluster.lock();
        let map = cluster.map();
        let mut orders = Vec::new();
        for block in owed.into_iter().chain(thin).collect::<BTreeSet<_>>() {
            let Some(row) = blocks::block(&*view, block)? else { continue };
            let sources = cluster.sources(block, &row.holders);
            let counting: Vec<ServerId> =
                row.holders.iter().copied().filter(|holder| cluster.counts(*holder)).collect();
            let good = counting.len();
            let targets = candidates_beside(&map, block, &counting, |server| row.holders.contains(&server));
            if let Some(target) = targets.first().copied()
                && row.refs > 0
                && good < row.wanted
                && row.holders.len() < blocks::HOLDERS_MAX
                && !sources.is_empty()
            {
                orders.push((good, Order { block, target, sources, epoch: row.epoch }));
            }
        }
        orders.sort_by_key(|(good, _)| *good);
        Ok((orders.into_iter().map(|(_, order)| order).collect(), next))
    }
}

/// Carries out orders, as many at once as the budget allows, and puts the copies on record. Returns how many were made.
pub async fn make(
    core: &Arc<Core>,
    proposer: &Proposer,
    peers: &Arc<dyn Peers>,
    orders: Vec<Order>,
) -> Result<usize, Fault> {
    let mut count = 0;
    for ((server, boot, epoch), blocks) in carry_out(core, peers, orders).await? {
        count += blocks.len();
        core.copy_rate.lock().note(blocks.len() as u64, core.clock.monotonic());
        // Made copies are durable; noting them costs a sync at most, and trusts nobody.
        blocks.iter().for_each(|hash| core.unsynced.lock().add(server, boot, *hash));
        if let Err(refusal) = proposer.propose(Command::HolderAdded { server, blocks, epoch }).await {
            tracing::debug!(%server, %refusal, "copies could not be recorded yet");
        }
    }
    Ok(count)
}

/// Orders that nobody carries out yet, and how many each server is carrying out: one that hangs is not to hold up the others.
struct Waiting {
    orders: VecDeque<Order>,
    under_way: BTreeMap<ServerId, usize>,
}

impl Waiting {
    fn new(orders: Vec<Order>) -> Self {
        Self { orders: orders.into(), under_way: BTreeMap::new() }
    }

    /// The first of those whose servers carry out fewer than `most`.
    fn next(&mut self, most: usize) -> Option<Order> {
        let has_room = |order: &Order| self.under_way.get(&order.target).is_none_or(|count| *count < most);
        let order = self.orders.remove(self.orders.iter().position(has_room)?)?;
        *self.under_way.entry(order.target).or_default() += 1;
        Some(order)
    }

    fn done(&mut self, target: ServerId) {
        self.under_way.entry(target).and_modify(|count| *count -= 1);
    }
}

type Made = BTreeMap<(ServerId, BootId, Epoch), Vec<BlockHash>>;

/// Returns who now has which, under which boot, and stamped with what.
async fn carry_out(core: &Arc<Core>, peers: &Arc<dyn Peers>, orders: Vec<Order>) -> Result<Made, Fault> {
    let mut made = Made::new();
    let mut running = JoinSet::new();
    let mut waiting = Waiting::new(orders);
    loop {
        while running.len() < core.budget.lock().copies_at_once()
            && let Some(order) = waiting.next(core.budget.lock().copies_to_one())
        {
            let (core, peers) = (Arc::clone(core), Arc::clone(peers));
            running.spawn(async move { (order.target, obtain(&core, &*peers, order).await) });
        }
        let Some(outcome) = running.join_next().await else { return Ok(made) };
        let (target, copy) = outcome.map_err(|_| Fault::Thread)?;
        waiting.done(target);
        if let Some((server, boot, epoch, block)) = copy {
            made.entry((server, boot, epoch)).or_default().push(block);
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_hangs_leaves_room_for_the_others() {
        let order = |block, target| Order {
            block: BlockHash([block; 32]),
            target: ServerId(target),
            sources: Vec::new(),
            epoch: Epoch(0),
        };
        let mut waiting = Waiting::new(vec![order(1, 1), order(2, 1), order(3, 1), order(4, 2), order(5, 1)]);
        let next = |waiting: &mut Waiting| waiting.next(2).map(|order| order.block.0[0]);
        assert_eq!([0; 4].map(|_| next(&mut waiting)), [Some(1), Some(2), Some(4), None]);
        waiting.done(ServerId(1));
        assert_eq!([0; 2].map(|_| next(&mut waiting)), [Some(3), None]);
        waiting.done(ServerId(1));
        assert_eq!([0; 2].map(|_| next(&mut waiting)), [Some(5), None]);
    }
}

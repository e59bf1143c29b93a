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
use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::{
    budget::Budget,
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
/// Copies that are put on record together.
const RECORDED_AT_ONCE: usize = 256;
/// Between two looks for a place, when others have all.
pub const PLACE_INTERVAL: Duration = Duration::from_millis(20);

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
    let (mut count, mut waiting) = (0, Waiting(orders.into()));
    while !waiting.0.is_empty() {
        for ((server, boot, epoch), blocks) in carry_out(core, peers, &mut waiting).await? {
            count += blocks.len();
            core.copy_rate.lock().note(blocks.len() as u64, core.clock.monotonic());
            // Made copies are durable; noting them costs a sync at most, and trusts nobody.
            blocks.iter().for_each(|hash| core.unsynced.lock().add(server, boot, *hash));
            if let Err(refusal) = proposer.propose(Command::HolderAdded { server, blocks, epoch }).await {
                tracing::debug!(%server, %refusal, "copies could not be recorded yet");
            }
        }
    }
    Ok(count)
}

/// Copies that are under way, whoever wants them: all duties share one budget.
#[derive(Debug, Default)]
pub struct UnderWay(Mutex<BTreeMap<ServerId, usize>>);

/// A place for one copy, until it is dropped.
#[derive(Debug)]
pub struct Place {
    all: Arc<UnderWay>,
    target: ServerId,
}

impl UnderWay {
    /// `None`: there are as many already as there may be, all together or to this server.
    pub fn begin(self: &Arc<Self>, target: ServerId, budget: &Budget) -> Option<Place> {
        let mut all = self.0.lock();
        let is_full = all.values().sum::<usize>() >= budget.copies_at_once();
        if is_full || all.get(&target).is_some_and(|count| *count >= budget.copies_to_one()) {
            return None;
        }
        *all.entry(target).or_default() += 1;
        Some(Place { all: Arc::clone(self), target })
    }
}

/// Takes out the first of `waiting` for whose server there is a place.
pub fn first_with_place<T>(
    waiting: &mut VecDeque<T>,
    server_of: impl Fn(&T) -> ServerId,
    mut begin: impl FnMut(ServerId) -> Option<Place>,
) -> Option<(T, Place)> {
    let mut refused = BTreeSet::new();
    let (at, place) = waiting.iter().map(server_of).enumerate().find_map(|(at, server)| {
        let place = if refused.contains(&server) { None } else { begin(server) };
        if place.is_none() {
            refused.insert(server);
        }
        place.map(|place| (at, place))
    })?;
    Some((waiting.remove(at)?, place))
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.all.0.lock();
        if let Some(count) = all.get_mut(&self.target) {
            *count -= 1;
        }
        all.retain(|_, count| *count > 0);
    }
}

/// Orders that nobody carries out yet.
struct Waiting(VecDeque<Order>);

impl Waiting {
    fn next(&mut self, begin: impl FnMut(ServerId) -> Option<Place>) -> Option<(Order, Place)> {
        first_with_place(&mut self.0, |order| order.target, begin)
    }

    /// It does not answer: whatever else it was to get comes again with the next round.
    fn give_up(&mut self, target: ServerId) {
        self.0.retain(|order| order.target != target);
    }
}

type Made = BTreeMap<(ServerId, BootId, Epoch), Vec<BlockHash>>;

/// What came of an order.
enum Outcome {
    Copied(BootId),
    /// The target says why not.
    Refused,
    Mute,
}

/// Carries out some. Returns who now has which, under which boot, and stamped with what.
async fn carry_out(core: &Arc<Core>, peers: &Arc<dyn Peers>, waiting: &mut Waiting) -> Result<Made, Fault> {
    let (mut made, mut begun) = (Made::new(), 0);
    let mut running = JoinSet::new();
    loop {
        while begun < RECORDED_AT_ONCE
            && let Some((order, place)) = waiting.next(|target| core.copies.begin(target, &core.budget.lock()))
        {
            begun += 1;
            let (core, peers) = (Arc::clone(core), Arc::clone(peers));
            running.spawn(async move {
                let copy = (order.target, order.epoch, order.block);
                let outcome = obtain(&core, &*peers, order).await;
                drop(place);
                (copy, outcome)
            });
        }
        let Some(outcome) = running.join_next().await else {
            if begun == 0 && !waiting.0.is_empty() {
                // Others have all the places.
                tokio::time::sleep(PLACE_INTERVAL).await;
                continue;
            }
            return Ok(made);
        };
        let ((server, epoch, block), outcome) = outcome.map_err(|_| Fault::Thread)?;
        match outcome {
            Outcome::Copied(boot) => made.entry((server, boot, epoch)).or_default().push(block),
            Outcome::Refused => {}
            Outcome::Mute => waiting.give_up(server),
        }
    }
}

async fn obtain(core: &Core, peers: &dyn Peers, order: Order) -> Outcome {
    let Order { block, target, sources, epoch } = order;
    let Some(to) = core.cluster.lock().endpoint(target) else { return Outcome::Mute };
    match ask(peers, to, &StorageRequest::Obtain { block, sources, epoch }, OBTAIN_DEADLINE).await {
        Ok(Ok(StorageAnswer::Obtained { boot })) => Outcome::Copied(boot),
        Ok(Ok(other)) => {
            tracing::warn!(%block, server = %target, ?other, "an answer that does not fit an order for a copy");
            Outcome::Refused
        }
        Ok(Err(refusal)) => {
            tracing::warn!(%block, server = %target, %refusal, "an owed copy could not be made");
            Outcome::Refused
        }
        Err(error) => {
            tracing::debug!(%block, server = %target, %error, "an owed copy could not be made");
            Outcome::Mute
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
        let (copies, budget) = (Arc::<UnderWay>::default(), Budget::default());
        let to_one = u8::try_from(budget.copies_to_one()).expect("few");
        let orders = (0..to_one + 2).map(|block| order(block, 1)).chain([order(100, 2), order(101, 1)]);
        let mut waiting = Waiting(orders.collect());
        let mut places = Vec::new();
        let next = |waiting: &mut Waiting, places: &mut Vec<Place>| {
            let (order, place) = waiting.next(|target| copies.begin(target, &budget))?;
            places.push(place);
            Some(order.block.0[0])
        };
        let begun: Vec<u8> = std::iter::from_fn(|| next(&mut waiting, &mut places)).collect();
        assert_eq!(begun, (0..to_one).chain([100]).collect::<Vec<_>>());
        places.remove(0);
        assert_eq!(next(&mut waiting, &mut places), Some(to_one));
        waiting.give_up(ServerId(1));
        assert!(waiting.0.is_empty());
        places.clear();
        assert!(copies.0.lock().is_empty());
    }
}

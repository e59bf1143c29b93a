//! Follows the numbers of copies that are wanted: has the rows of blocks count anew what has changed, and deletes copies that are too many.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use holdfast_common::{BlockHash, Position, ServerId, cluster::ClusterMap, net::Peers, placement};

use super::{
    committer::Proposer,
    core::{Core, Fault},
    relocate,
    state::{
        Command, Rows,
        blocks::{self, Debts},
        replicas,
    },
};

/// Between two looks. What has too many copies in two of them is trimmed: whoever moves a copy has two for a moment.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Blocks of one step.
const PAGE: usize = 512;
/// Blocks that are remembered from one look to the next: the others wait.
const SEEN_MAX: usize = 64 << 10;
/// Files of one entry.
const RECOUNT_BATCH: usize = 256;

pub struct Surplus {
    core: Arc<Core>,
    proposer: Proposer,
    peers: Arc<dyn Peers>,
    seen: BTreeSet<BlockHash>,
    /// Applied by the end of the last look: what was seen is of no later entry.
    seen_through: Position,
    /// Where a look begins: after those of which none could be trimmed.
    begin: Option<BlockHash>,
}

impl Surplus {
    pub fn new(core: Arc<Core>, proposer: Proposer, peers: Arc<dyn Peers>) -> Self {
        Self { core, proposer, peers, seen: BTreeSet::new(), seen_through: Position(0), begin: None }
    }

    pub async fn run(mut self) -> Result<(), Fault> {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if !self.core.is_recovering() && self.has_work()? {
                self.follow().await?;
                self.trim().await?;
            }
        }
    }

    fn has_work(&self) -> Result<bool, Fault> {
        Ok(self.core.store.ask(|rows| Ok(followed_percent(rows)? < 100))?)
    }

    /// Until all rows want and count what they should, or the committer takes nothing.
    async fn follow(&self) -> Result<(), Fault> {
        loop {
            let command = {
                let view = self.core.store.view()?;
                match view.counters().retargeted {
                    Some(_) => Command::Retarget,
                    None => Command::Recount { inos: replicas::recounted_first(&*view, RECOUNT_BATCH)? },
                }
            };
            if matches!(&command, Command::Recount { inos } if inos.is_empty()) {
                return Ok(());
            }
            if let Err(refusal) | Ok((_, Err(refusal))) = self.proposer.propose(command).await {
                tracing::debug!(%refusal, "a number of copies could not be followed yet");
                return Ok(());
            }
            self.core.copies_wanted.notify_one();
        }
    }

    /// Takes copies that are too many off the record, and has them deleted.
    async fn trim(&mut self) -> Result<(), Fault> {
        let before = std::mem::take(&mut self.seen);
        // Until they are durable, copies that are may be all that there will be. What a barrier is syncing is in no list.
        let is_durable = self.core.durable() >= self.seen_through;
        let (mut after, mut again, mut trimmed) = (self.begin, false, 0);
        while self.seen.len() < SEEN_MAX {
            let view = self.core.store.view()?;
            let page = blocks::owed_after(&*view, Debts::Surplus, after, PAGE)?;
            let Some(last) = page.last().copied() else {
                after = None;
                break;
            };
            after = Some(last);
            let map = self.core.cluster.lock().map();
            let mut chosen: BTreeMap<ServerId, Vec<BlockHash>> = BTreeMap::new();
            for block in page.iter().filter(|block| is_durable && before.contains(block)) {
                again = true;
                if self.core.unsynced.lock().servers_of(*block).is_empty()
                    && let Some(row) = blocks::block(&*view, *block)?
                    && let Some(server) = least_needed(&map, *block, &row.holders)
                {
                    chosen.entry(server).or_default().push(*block);
                }
            }
            drop(view);
            self.seen.extend(page);
            for (server, blocks) in chosen {
                let off = relocate::retire(&self.core, &self.proposer, &*self.peers, server, &blocks).await?;
                tracing::info!(%server, copies = off, "copies that were too many are deleted");
                trimmed += off;
            }
        }
        self.seen_through = self.core.applied();
        if self.seen.is_empty() || (again && trimmed == 0) {
            self.begin = after;
        }
        Ok(())
    }
}

/// Whose copy of a block with too many goes first: that of a server which takes no blocks (it is away, or to be emptied), else one without
/// which the others are in as many zones, and of these that of the one which placement would choose last.
pub fn least_needed(map: &ClusterMap, block: BlockHash, holders: &[ServerId]) -> Option<ServerId> {
    let order = placement::candidates(map, block);
    let rank = |holder: ServerId| order.iter().position(|server| *server == holder);
    let zones_without = |holder: ServerId| {
        placement::zones(map, holders.iter().copied().filter(|other| *other != holder && rank(*other).is_some()))
    };
    holders.iter().copied().max_by_key(|holder| (rank(*holder).is_none(), zones_without(*holder), rank(*holder)))
}

/// Is everything as it is wanted, but for what is owed? Else, how much of the metadata has been looked through, in percent.
pub fn followed_percent(rows: &impl Rows) -> Result<u32, super::state::StorageError> {
    if let Some(through) = rows.counters().retargeted {
        // Hashes are spread evenly.
        return Ok(u32::from(through.0[0]) * 100 / 256);
    }
    let waits = !replicas::recounted_first(rows, 1)?.is_empty();
    let has_surplus = !blocks::owed_after(rows, Debts::Surplus, None, 1)?.is_empty();
    Ok(if waits || has_surplus { 99 } else { 100 })
}

#[cfg(test)]
mod tests {
    use holdfast_common::{
        Replicas,
        cluster::{ServerInfo, ServerState},
    };

    use super::*;

    fn map(zones: [&str; 4]) -> ClusterMap {
        let server =
            |(id, zone): (u32, &str)| ServerInfo { id: ServerId(id), zone: zone.into(), ..ServerInfo::example() };
        ClusterMap { version: 1, servers: (1..).zip(zones).map(server).collect(), replicas: Replicas::INHERITED }
    }

    fn losers(map: &ClusterMap) -> BTreeMap<ServerId, usize> {
        let holders: Vec<ServerId> = (1..=4).map(ServerId).collect();
        let mut losers = BTreeMap::new();
        for number in 0..400_u32 {
            let block = BlockHash::of(&number.to_le_bytes());
            *losers.entry(least_needed(map, block, &holders).expect("one")).or_default() += 1;
        }
        losers
    }

    #[test]
    fn equal_servers_lose_equally_many() {
        let losers = losers(&map([""; 4]));
        assert!(losers.len() == 4 && losers.values().all(|count| (70..130).contains(count)), "{losers:?}");
    }

    #[test]
    fn a_zone_that_has_another_loses_and_one_that_takes_no_blocks_first() {
        let mut map = map(["a", "b", "c", "c"]);
        let found = losers(&map);
        assert!(
            found.keys().all(|server| [ServerId(3), ServerId(4)].contains(server)) && found.len() == 2,
            "{found:?}"
        );
        map.servers[0].state = ServerState::Draining;
        assert_eq!(losers(&map), BTreeMap::from([(ServerId(1), 400)]));
        assert_eq!(least_needed(&map, BlockHash([1; 32]), &[]), None);
        // Placement prefers one of these for some blocks: the only one of its zone stays all the same.
        let map = self::map(["a", "a", "b", "b"]);
        for number in 0..100_u32 {
            let loser =
                least_needed(&map, BlockHash::of(&number.to_le_bytes()), &[ServerId(1), ServerId(2), ServerId(4)]);
            assert!([Some(ServerId(1)), Some(ServerId(2))].contains(&loser), "{number}: {loser:?}");
        }
    }
}

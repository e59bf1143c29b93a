//! Moves copies to zones in which a block has none, where its other copies share one.
//!
//! Copies are made where there is room at the time: while a zone is away, all go to the others; and servers come, go, and change
//! zones. Whenever the servers or their zones are others than they were, all blocks are looked through once.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use holdfast_common::{
    BlockHash, ServerId,
    cluster::{ClusterMap, ServerState},
    net::Peers,
    placement::{candidates_beside, zones},
    wire::meta::Severity,
};

use super::{
    committer::Proposer,
    copier::{self, Order},
    core::{Core, Fault},
    journal::Note,
    relocate,
    state::{
        Rows,
        blocks::{self, HOLDERS_MAX},
        rows::BlockRow,
    },
    surplus::least_needed,
};

const PLACE: &str = "storage servers";
const TICK: Duration = Duration::from_secs(1);
/// Blocks that are looked at in one step.
const PAGE: usize = 256;
/// Times as long as a step took that the next one waits.
const IDLE_TIMES: u32 = 4;
/// What could not be moved is tried again after so many times what the servers have to be the same.
const REST_TIMES: u32 = 30;

/// One copy's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    pub from: ServerId,
    pub to: ServerId,
}

/// How the copies of a block come to be in one zone more than now. `None`: they are in as many as can be.
pub fn better(map: &ClusterMap, block: BlockHash, row: &BlockRow) -> Option<Move> {
    let all = || row.holders.iter().copied();
    let to = candidates_beside(map, block, &row.holders, |server| row.holders.contains(&server)).first().copied()?;
    let from = least_needed(map, block, &row.holders)?;
    let after = all().filter(|holder| *holder != from).chain([to]);
    (zones(map, after) > zones(map, all())).then_some(Move { from, to })
}

/// What a look through all blocks depends on: who takes blocks, and where.
fn layout(map: &ClusterMap) -> Vec<(ServerId, String)> {
    let takes = map.servers.iter().filter(|server| server.state == ServerState::Up && server.weight > 0);
    takes.map(|server| (server.id, server.zone.clone())).collect()
}

/// Somebody says where his servers are, and not all are in one place.
fn has_zones(layout: &[(ServerId, String)]) -> bool {
    layout.iter().any(|(_, zone)| layout.first().is_some_and(|(_, first)| first != zone))
}

pub struct Spreader {
    core: Arc<Core>,
    proposer: Proposer,
    peers: Arc<dyn Peers>,
    /// The servers have to be the same for so long.
    settled_after: Duration,
    /// All blocks are as well spread as they can be over these.
    done: Vec<(ServerId, String)>,
    /// A look that was interrupted: over which, and what came of it as far as it had come.
    begun: (Vec<(ServerId, String)>, Option<BlockHash>, Outcome),
    /// Something could not be moved: not before then.
    resting_until: Duration,
}

impl std::fmt::Debug for Spreader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spreader").field("done", &self.done).finish_non_exhaustive()
    }
}

/// What came of one look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Outcome {
    moved: usize,
    left: usize,
}

impl Spreader {
    pub fn new(core: Arc<Core>, proposer: Proposer, peers: Arc<dyn Peers>, settled_after: Duration) -> Self {
        Self {
            core,
            proposer,
            peers,
            settled_after,
            done: Vec::new(),
            begun: Default::default(),
            resting_until: Duration::ZERO,
        }
    }

    pub async fn run(mut self) -> Result<(), Fault> {
        let (mut seen, mut since) = (Vec::new(), Duration::ZERO);
        loop {
            tokio::time::sleep(TICK).await;
            let (layout, now) = (layout(&self.core.cluster.lock().map()), self.core.clock.monotonic());
            if layout != seen {
                (seen, since) = (layout, now);
                // What is written meanwhile may be where it need not be.
                self.begun = Default::default();
            }
            let is_due = seen != self.done && now >= self.resting_until && now >= since + self.settled_after;
            if is_due && self.may_move()? {
                self.look_through(seen.clone()).await?;
            }
        }
    }

    /// Who is short of copies goes first.
    fn may_move(&self) -> Result<bool, Fault> {
        Ok(self.core.may_collect() && self.core.store.view()?.counters().payable() == 0)
    }

    /// Begun again when the servers change meanwhile; it waits while copies are owed.
    async fn look_through(&mut self, begun_with: Vec<(ServerId, String)>) -> Result<(), Fault> {
        let (layout_then, after, outcome) = std::mem::take(&mut self.begun);
        let (mut after, mut outcome) = if layout_then == begun_with { (after, outcome) } else { Default::default() };
        while has_zones(&begun_with) {
            let began = self.core.clock.monotonic();
            let page = blocks::rows_after(&*self.core.store.view()?, after, PAGE)?;
            let Some((last, _)) = page.last() else { break };
            after = Some(*last);
            let of_page = self.spread(&page).await?;
            outcome = Outcome { moved: outcome.moved + of_page.moved, left: outcome.left + of_page.left };
            tokio::time::sleep((self.core.clock.monotonic() - began) * IDLE_TIMES).await;
            if layout(&self.core.cluster.lock().map()) != begun_with {
                return Ok(());
            }
            if !self.may_move()? {
                self.begun = (begun_with, after, outcome);
                return Ok(());
            }
        }
        self.tell(outcome);
        if outcome.left == 0 {
            self.done = begun_with;
        } else {
            self.resting_until = self.core.clock.monotonic() + self.settled_after * REST_TIMES;
        }
        Ok(())
    }

    async fn spread(&self, page: &[(BlockHash, BlockRow)]) -> Result<Outcome, Fault> {
        let (mut orders, mut moves) = (Vec::new(), BTreeMap::<ServerId, Vec<BlockHash>>::new());
        {
            let cluster = self.core.cluster.lock();
            let map = cluster.map();
            let may_move = |row: &BlockRow| {
                row.refs > 0 && row.holders.len() >= row.wanted.max(2) && row.holders.len() < HOLDERS_MAX
            };
            for (block, row) in page.iter().filter(|(_, row)| may_move(row)) {
                let Some(step) = better(&map, *block, row) else { continue };
                let sources = cluster.sources(*block, &row.holders);
                orders.push(Order { block: *block, target: step.to, sources, epoch: row.epoch });
                moves.entry(step.from).or_default().push(*block);
            }
        }
        let wanted = orders.len();
        if wanted == 0 {
            return Ok(Outcome::default());
        }
        copier::make(&self.core, &self.proposer, &self.peers, orders).await?;
        let mut moved = 0;
        for (from, blocks) in &moves {
            moved += relocate::retire(&self.core, &self.proposer, &*self.peers, *from, blocks).await?;
        }
        Ok(Outcome { moved, left: wanted.saturating_sub(moved) })
    }

    fn tell(&self, Outcome { moved, left }: Outcome) {
        if moved + left == 0 {
            return;
        }
        let what = format!("had {} blocks with copies in fewer zones than there are", moved + left);
        let note = match left {
            0 => Note::new(Severity::Info, PLACE, what),
            _ => Note::new(Severity::Warning, PLACE, what)
                .meaning(format!("{left} of them are still so, and a zone that is lost takes more copies with it")),
        };
        self.core.tell(note.doing(format!("{moved} were moved; what is left is tried again in five minutes")));
    }
}

#[cfg(test)]
mod tests {
    use holdfast_common::{Epoch, Replicas, cluster::ServerInfo};

    use super::*;

    fn map(zones: &[&str]) -> ClusterMap {
        let server =
            |(id, zone): (u32, &&str)| ServerInfo { id: ServerId(id), zone: (*zone).into(), ..ServerInfo::example() };
        ClusterMap { version: 1, servers: (1..).zip(zones).map(server).collect(), replicas: Replicas::INHERITED }
    }

    fn row(holders: &[u32]) -> BlockRow {
        let holders = holders.iter().copied().map(ServerId).collect();
        BlockRow { refs: 1, wanted: 3, holders, ..BlockRow::new(1, Epoch(1)) }
    }

    #[test]
    fn a_zone_without_a_copy_gets_one_of_two_that_share_theirs_and_then_all_is_well() {
        let map = map(&["a", "a", "b", "c", "c"]);
        for number in 0..200_u32 {
            let block = BlockHash::of(&number.to_le_bytes());
            let crowded = row(&[1, 2, 3]);
            let step = better(&map, block, &crowded).expect("there is a third zone");
            assert!([1, 2].contains(&step.from.0) && [4, 5].contains(&step.to.0), "{step:?}");
            let mut after: Vec<u32> =
                crowded.holders.iter().filter(|holder| **holder != step.from).map(|it| it.0).collect();
            after.push(step.to.0);
            assert_eq!(better(&map, block, &row(&after)), None);
        }
    }

    #[test]
    fn nothing_moves_without_zones_or_to_a_server_that_takes_no_blocks() {
        let block = BlockHash([7; 32]);
        assert_eq!(better(&map(&["", "", "", ""]), block, &row(&[1, 2, 3])), None);
        assert_eq!(better(&map(&["a", "a", "a", "a"]), block, &row(&[1, 2, 3])), None);
        let mut away = map(&["a", "a", "b", "c"]);
        away.servers[3].state = ServerState::Suspect;
        assert_eq!(better(&away, block, &row(&[1, 2, 3])), None);
        assert!(!has_zones(&layout(&map(&["", ""]))) && !has_zones(&layout(&map(&["a", "a"]))));
        assert!(has_zones(&layout(&map(&["a", "b"]))) && has_zones(&layout(&map(&["a", ""]))));
    }
}

//! Bad copies that their own servers have found: each server is told to put a good one in its place.
//!
//! A bad copy stays where it is until then. It may be the only one of which anything can be read.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use holdfast_common::{
    BlockHash, Refusal, ServerId,
    net::Peers,
    wire::{
        meta::{CopyFault, Severity},
        storage::{StorageAnswer, StorageRequest},
    },
};
use tokio::task::JoinSet;

use super::{
    committer::Proposer,
    core::{Core, Fault, ask},
    journal::Note,
    state::{Command, blocks},
};

/// Copies that wait to be replaced: more are found again by the next pass of scrubbing.
/// How the journal says that copies turned out to be bad.
pub const HAS_BAD_COPIES: &str = "bad copies on its disk";
const WAITING_MAX: usize = 1 << 20;
/// Copies that are replaced in one round.
const ROUND: usize = 256;
const TICK: Duration = Duration::from_millis(500);
const REPAIR_DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub struct BadCopies(BTreeSet<(ServerId, BlockHash)>);

impl BadCopies {
    /// `Unavailable`: there is no room for more now.
    pub fn add(&mut self, server: ServerId, blocks: Vec<BlockHash>) -> Result<(), Refusal> {
        if self.0.len() + blocks.len() > WAITING_MAX {
            return Err(Refusal::Unavailable);
        }
        self.0.extend(blocks.into_iter().map(|block| (server, block)));
        Ok(())
    }

    fn take(&mut self) -> BTreeSet<(ServerId, BlockHash)> {
        let rest = self.0.iter().nth(ROUND).copied().map(|first| self.0.split_off(&first)).unwrap_or_default();
        std::mem::replace(&mut self.0, rest)
    }
}

pub struct Mender {
    core: Arc<Core>,
    proposer: Proposer,
    peers: Arc<dyn Peers>,
}

impl std::fmt::Debug for Mender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mender").finish_non_exhaustive()
    }
}

impl Mender {
    pub fn new(core: Arc<Core>, proposer: Proposer, peers: Arc<dyn Peers>) -> Self {
        Self { core, proposer, peers }
    }

    pub async fn run(self) -> Result<(), Fault> {
        loop {
            let bad = if self.core.is_recovering() { BTreeSet::new() } else { self.core.bad_copies.lock().take() };
            if bad.is_empty() {
                tokio::time::sleep(TICK).await;
            } else {
                self.replace(bad).await?;
            }
        }
    }

    async fn replace(&self, bad: BTreeSet<(ServerId, BlockHash)>) -> Result<(), Fault> {
        let mut counts: BTreeMap<ServerId, (u64, u64)> = BTreeMap::new();
        let mut running = JoinSet::new();
        let mut waiting = bad.into_iter();
        loop {
            while running.len() < self.core.budget.lock().copies_at_once()
                && let Some((server, block)) = waiting.next()
            {
                let (core, peers) = (Arc::clone(&self.core), Arc::clone(&self.peers));
                running.spawn(async move { (server, block, repair(&core, &*peers, server, block).await) });
            }
            let Some(outcome) = running.join_next().await else { break };
            let (server, block, repaired) = outcome.map_err(|_| Fault::Thread)?;
            let (mended, left) = counts.entry(server).or_default();
            if repaired? {
                *mended += 1;
                self.record(server, block).await;
            } else {
                // It stays on record, for it may be better than none.
                *left += 1;
            }
        }
        counts.into_iter().for_each(|(server, counts)| self.core.tell(note(server, counts)));
        Ok(())
    }

    async fn record(&self, server: ServerId, block: BlockHash) {
        let command = Command::BadCopy { server, block, fault: CopyFault::Damaged, repaired: true };
        if let Err(refusal) = self.proposer.propose(command).await {
            tracing::debug!(%server, %refusal, "a bad copy could not be counted");
        }
    }
}

fn note(server: ServerId, (mended, left): (u64, u64)) -> Note {
    let place = format!("storage server {server}");
    let what = format!("has found {} {HAS_BAD_COPIES}", mended + left);
    match left {
        0 => Note::new(Severity::Warning, place, what)
            .meaning("none was read")
            .doing("good copies took their place; the bad ones are in quarantine"),
        _ => Note::new(Severity::Error, place, what)
            .meaning(format!("of {left} there is no good copy now"))
            .doing("they stay, in case that parts of them can be read, and are tried again by the next pass"),
    }
}

/// `false`: it is still bad there.
async fn repair(core: &Core, peers: &dyn Peers, server: ServerId, block: BlockHash) -> Result<bool, Fault> {
    let Some(row) = blocks::block(&*core.store.view()?, block)? else { return Ok(true) };
    let (to, sources) = {
        let cluster = core.cluster.lock();
        let others: Vec<ServerId> = row.holders.into_iter().filter(|holder| *holder != server).collect();
        (cluster.endpoint(server), cluster.sources(&others))
    };
    let Some(to) = to else { return Ok(false) };
    match ask(peers, to, &StorageRequest::Repair { block, sources }, REPAIR_DEADLINE).await {
        Ok(Ok(StorageAnswer::Repaired { .. })) => Ok(true),
        other => {
            tracing::warn!(%block, %server, ?other, "a bad copy could not be replaced");
            Ok(false)
        }
    }
}

//! Bad copies that their own servers have found: each server is told to put a good one in its place.
//!
//! A bad copy stays where it is until then. It may be the only one of which anything can be read.

use std::{
    collections::{BTreeMap, VecDeque},
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
    copier::{PLACE_INTERVAL, first_with_place},
    core::{Core, Fault, ask},
    journal::Note,
    state::{Command, blocks},
};

/// How the journal says that copies turned out to be bad.
pub const HAS_BAD_COPIES: &str = "bad copies on its disk";
/// Copies that wait to be replaced: more are found again by the next pass of scrubbing.
const WAITING_MAX: usize = 1 << 20;
/// Before one is tried again of which there was no good copy: at first, and at most.
const RETRY_FIRST: Duration = Duration::from_secs(10);
const RETRY_MAX: Duration = Duration::from_secs(600);
/// Copies that are replaced in one round.
const ROUND: usize = 256;
const TICK: Duration = Duration::from_millis(500);
const REPAIR_DEADLINE: Duration = Duration::from_secs(30);

type Copy = (ServerId, BlockHash);

/// Bad copies, each with what it has waited for its last attempt.
#[derive(Debug, Default)]
pub struct BadCopies {
    due: BTreeMap<Copy, Duration>,
    /// With when they are due again, of a monotonic clock.
    later: BTreeMap<Copy, (Duration, Duration)>,
    /// Taken by the mender.
    in_work: usize,
}

impl BadCopies {
    /// `Unavailable`: there is no room for more now.
    pub fn add(&mut self, server: ServerId, blocks: Vec<BlockHash>) -> Result<(), Refusal> {
        if self.count() + blocks.len() > WAITING_MAX {
            return Err(Refusal::Unavailable);
        }
        for block in blocks {
            self.later.remove(&(server, block));
            self.due.insert((server, block), Duration::ZERO);
        }
        Ok(())
    }

    /// In whose place there is no good one yet.
    pub fn count(&self) -> usize {
        self.due.len() + self.later.len() + self.in_work
    }

    fn take(&mut self, now: Duration) -> BTreeMap<Copy, Duration> {
        for (copy, (_, waited)) in self.later.extract_if(.., |_, (due, _)| *due <= now) {
            self.due.insert(copy, waited);
        }
        let rest = self.due.keys().nth(ROUND).copied().map(|first| self.due.split_off(&first)).unwrap_or_default();
        let taken = std::mem::replace(&mut self.due, rest);
        self.in_work = taken.len();
        taken
    }

    /// What was taken is done with, but for what `failed`.
    fn finish(&mut self, failed: impl IntoIterator<Item = (Copy, Duration)>, now: Duration) {
        self.in_work = 0;
        for (copy, waited) in failed {
            let wait = (waited * 2).clamp(RETRY_FIRST, RETRY_MAX);
            // It may have been found again meanwhile, and be due at once.
            if !self.due.contains_key(&copy) {
                self.later.insert(copy, (now + wait, wait));
            }
        }
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
            let now = self.core.clock.monotonic();
            let bad = if self.core.is_recovering() { BTreeMap::new() } else { self.core.bad_copies.lock().take(now) };
            if bad.is_empty() {
                tokio::time::sleep(TICK).await;
            } else {
                self.replace(bad).await?;
            }
        }
    }

    async fn replace(&self, bad: BTreeMap<Copy, Duration>) -> Result<(), Fault> {
        let mut counts: BTreeMap<ServerId, (u64, u64)> = BTreeMap::new();
        let mut failed = Vec::new();
        let mut running = JoinSet::new();
        let mut waiting: VecDeque<(Copy, Duration)> = bad.into_iter().collect();
        loop {
            while let Some((((server, block), waited), place)) = first_with_place(
                &mut waiting,
                |((server, _), _)| *server,
                |server| self.core.copies.begin(server, &self.core.budget.lock()),
            ) {
                let (core, peers) = (Arc::clone(&self.core), Arc::clone(&self.peers));
                running.spawn(async move {
                    let repaired = repair(&core, &*peers, server, block).await;
                    drop(place);
                    (server, block, waited, repaired)
                });
            }
            let Some(outcome) = running.join_next().await else {
                if waiting.is_empty() {
                    break;
                }
                // Others have all the places.
                tokio::time::sleep(PLACE_INTERVAL).await;
                continue;
            };
            let (server, block, waited, repaired) = outcome.map_err(|_| Fault::Thread)?;
            match repaired? {
                Repair::Done => {
                    counts.entry(server).or_default().0 += 1;
                    self.record(server, block).await;
                }
                Repair::Moot => {}
                outcome @ (Repair::Failed | Repair::Mute) => {
                    if outcome == Repair::Mute {
                        // Nobody waits for one that hangs more than once in a round.
                        let (of_server, rest): (VecDeque<_>, VecDeque<_>) =
                            waiting.into_iter().partition(|((other, _), _)| *other == server);
                        waiting = rest;
                        let untold = of_server.iter().filter(|(_, waited)| waited.is_zero()).count();
                        counts.entry(server).or_default().1 += untold as u64;
                        failed.extend(of_server);
                    }
                    // It stays on record, for it may be better than none. That it is still bad is not told again.
                    if waited.is_zero() {
                        counts.entry(server).or_default().1 += 1;
                    }
                    failed.push(((server, block), waited));
                }
            }
        }
        self.core.bad_copies.lock().finish(failed, self.core.clock.monotonic());
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
            .doing("they stay, in case that parts of them can be read; a good copy is looked for again and again"),
    }
}

/// What came of the order to put a good copy in the place of a bad one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repair {
    Done,
    /// Nobody needs it any more: the block is gone, or the server, or it is not on record for it.
    Moot,
    /// It is still bad there.
    Failed,
    /// The same, and the server does not answer.
    Mute,
}

async fn repair(core: &Core, peers: &dyn Peers, server: ServerId, block: BlockHash) -> Result<Repair, Fault> {
    let row = blocks::block(&*core.store.view()?, block)?;
    let Some(row) = row.filter(|row| row.holders.contains(&server)) else { return Ok(Repair::Moot) };
    let (to, sources) = {
        let cluster = core.cluster.lock();
        let others: Vec<ServerId> = row.holders.into_iter().filter(|holder| *holder != server).collect();
        // Nobody waits for one that is away: it is tried again later.
        (cluster.endpoint(server).filter(|_| cluster.is_up(server)), cluster.sources(block, &others))
    };
    let Some(to) = to else { return Ok(Repair::Failed) };
    match ask(peers, to, &StorageRequest::Repair { block, sources }, REPAIR_DEADLINE).await {
        Ok(Ok(StorageAnswer::Repaired { .. })) => Ok(Repair::Done),
        other => {
            tracing::warn!(%block, %server, ?other, "a bad copy could not be replaced");
            Ok(if other.is_err() { Repair::Mute } else { Repair::Failed })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_could_not_be_mended_is_tried_again_ever_more_rarely_and_counts_until_it_is() {
        let mut bad = BadCopies::default();
        let copy = (ServerId(1), BlockHash([7; 32]));
        bad.add(copy.0, vec![copy.1]).expect("there is room");
        let (mut now, mut waits) = (SECOND, Vec::new());
        for _ in 0..9 {
            let taken = bad.take(now);
            assert_eq!((taken.len(), bad.count()), (1, 1));
            bad.finish(taken, now);
            let failed_at = now;
            while bad.due.is_empty() && bad.later.values().all(|(due, _)| *due > now) {
                assert!(bad.take(now).is_empty());
                bad.finish([], now);
                now += SECOND;
            }
            waits.push((now - failed_at).as_secs());
        }
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 600, 600, 600]);
        bad.add(copy.0, vec![copy.1]).expect("there is room");
        assert_eq!((bad.take(now).len(), bad.count()), (1, 1), "found again: at once");
        bad.finish([], now);
        assert_eq!(bad.count(), 0);
    }

    #[test]
    fn a_round_takes_so_many_and_there_is_a_bound() {
        let mut bad = BadCopies::default();
        let hashes = |from: u32, count: u32| (from..from + count).map(|n| BlockHash::of(&n.to_le_bytes())).collect();
        bad.add(ServerId(1), hashes(0, 600)).expect("there is room");
        let taken: Vec<usize> = (0..3).map(|_| bad.take(SECOND).len()).collect();
        assert_eq!(taken, [ROUND, ROUND, 600 - 2 * ROUND]);
        bad.finish([], SECOND);
        let count = u32::try_from(WAITING_MAX).expect("fits");
        bad.add(ServerId(2), hashes(0, count)).expect("there is room");
        assert_eq!(bad.add(ServerId(1), hashes(count, 1)), Err(Refusal::Unavailable));
    }
}

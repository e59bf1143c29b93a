//! Barriers: what turns visible into durable, for all who wait at once.
//!
//! (a) take the position N; (b) every storage server that holds copies named up to N and not yet synced syncs, in
//! parallel; (c) the log says "durable through N" and is synced, once; (d) all who waited are told.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use holdfast_common::planted::{Bug, is_planted};
use holdfast_common::{
    BlockHash, BootId, Position, ServerId,
    limits::HASH_LIST_MAX,
    net::{Peers, probe},
    wire::storage::{StorageAnswer, StorageRequest},
    work,
};
use tokio::task::JoinSet;

use super::{
    committer::Proposer,
    core::{Core, Fault, ask},
    state::{Command, blocks, rows::BlockRow},
};

/// Nothing that was applied stays longer than this without a barrier having been tried.
const INTERVAL: Duration = Duration::from_secs(1);
/// A sync may take as long as a disk needs, if only the server is heard meanwhile.
const SYNC_DEADLINE: Duration = Duration::from_secs(60);
/// How often a server that syncs is looked after.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);
/// What a server gets that has not been heard lately.
const CHANCE: Duration = Duration::from_secs(1);
/// For questions that no disk holds up.
const QUESTION_DEADLINE: Duration = Duration::from_secs(3);
/// Wait before a barrier is tried again that could not be had.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// How long a mount has to store a block again that no server has any more.
const VANISHED_PATIENCE: Duration = Duration::from_secs(20);

type Copies = BTreeMap<BootId, BTreeSet<BlockHash>>;

#[derive(Clone)]
pub struct Barrier {
    core: Arc<Core>,
    peers: Arc<dyn Peers>,
    proposer: Proposer,
}

impl std::fmt::Debug for Barrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Barrier").finish_non_exhaustive()
    }
}

/// What one server made of the request to sync.
enum Synced {
    /// Everything that it acknowledged is durable, but for these copies, which it lost.
    But(BTreeSet<BlockHash>),
    /// It does not answer, so nothing is known.
    Silent,
}

/// What comes of a round of syncs.
#[derive(Default)]
struct Verdict {
    lost: BTreeMap<ServerId, Vec<BlockHash>>,
    /// Some copies must be asked for again.
    waits: bool,
}

impl Verdict {
    fn lose(&mut self, server: ServerId, hash: BlockHash) {
        self.lost.entry(server).or_default().push(hash);
    }
}

/// Is this copy, as far as the round told, not durable?
fn is_bad(
    copies: &BTreeMap<ServerId, Copies>,
    outcomes: &BTreeMap<ServerId, Synced>,
    server: ServerId,
    hash: &BlockHash,
) -> bool {
    match outcomes.get(&server) {
        Some(Synced::Silent) => copies.get(&server).is_some_and(|of| of.values().any(|hashes| hashes.contains(hash))),
        Some(Synced::But(missing)) => missing.contains(hash),
        None => false,
    }
}

/// Does the server say itself that it does not have this copy any more?
fn is_lost(outcomes: &BTreeMap<ServerId, Synced>, server: ServerId, hash: &BlockHash) -> bool {
    matches!(outcomes.get(&server), Some(Synced::But(missing)) if missing.contains(hash))
}

impl Barrier {
    pub fn new(core: Arc<Core>, peers: Arc<dyn Peers>, proposer: Proposer) -> Self {
        Self { core, peers, proposer }
    }

    pub async fn run(self) -> Result<(), Fault> {
        loop {
            tokio::select! {
                () = self.core.barrier_wanted.notified() => {}
                () = tokio::time::sleep(INTERVAL) => {}
            }
            if self.core.applied() > self.core.durable() && !self.attempt().await? {
                tokio::time::sleep(RETRY_AFTER).await;
                self.core.barrier_wanted.notify_one();
            }
        }
    }

    /// `false`: not everything that was named is on enough disks.
    pub async fn attempt(&self) -> Result<bool, Fault> {
        let position = self.core.applied();
        let copies = self.core.unsynced.lock().take();
        let outcomes = self.sync_all(&copies).await?;
        let verdict = self.settle(copies, outcomes)?;
        let mut complete = verdict.lost.is_empty() && !verdict.waits;
        for (server, blocks) in verdict.lost {
            tracing::warn!(%server, blocks = blocks.len(), "copies that were never synced are given up; they are owed");
            for part in blocks.chunks(HASH_LIST_MAX) {
                complete &= self.propose(Command::HolderLost { server, blocks: part.to_vec() }).await;
            }
        }
        // What was given up is an entry of its own, which the next attempt covers.
        if !complete || self.is_thin()? {
            return Ok(false);
        }
        self.sync_log(position).await?;
        self.core.set_durable(position);
        Ok(true)
    }

    async fn propose(&self, command: Command) -> bool {
        match self.proposer.propose(command).await {
            Ok(_) => true,
            Err(refusal) => {
                tracing::debug!(%refusal, "the committer did not take an entry");
                false
            }
        }
    }

    async fn sync_all(&self, copies: &BTreeMap<ServerId, Copies>) -> Result<BTreeMap<ServerId, Synced>, Fault> {
        let mut calls = JoinSet::new();
        for (server, copies) in copies {
            let (barrier, server, copies) = (self.clone(), *server, copies.clone());
            calls.spawn(async move { (server, barrier.sync_watched(server, &copies).await) });
        }
        let mut outcomes = BTreeMap::new();
        while let Some(outcome) = calls.join_next().await {
            let (server, outcome) = outcome.map_err(|_| Fault::Thread)?;
            outcomes.insert(server, outcome);
        }
        Ok(outcomes)
    }

    /// Waits for a slow disk, but not for a silent server.
    async fn sync_watched(&self, server: ServerId, copies: &Copies) -> Synced {
        let is_up = || self.core.cluster.lock().is_up(server);
        let gone = async {
            if !is_up() {
                tokio::time::sleep(CHANCE).await;
            }
            while is_up() {
                tokio::time::sleep(WATCH_INTERVAL).await;
            }
        };
        tokio::select! {
            synced = self.sync(server, copies) => synced,
            () = gone => Synced::Silent,
            () = self.until_mute(server) => Synced::Silent,
        }
    }

    async fn until_mute(&self, server: ServerId) {
        let to = self.core.cluster.lock().endpoint(server);
        if let Some(to) = to {
            let error = probe::until_mute(&*self.peers, to).await;
            tracing::debug!(%server, %error, "a storage server is mute while a barrier waits for it");
        }
    }

    async fn sync(&self, server: ServerId, copies: &Copies) -> Synced {
        if is_planted(Bug::BarrierAsksNobody) {
            return Synced::But(BTreeSet::new());
        }
        let Some(boot) = self.sync_once(server).await else { return Synced::Silent };
        let doubtful: BTreeSet<BlockHash> =
            copies.iter().filter(|(known, _)| **known != boot).flat_map(|(_, hashes)| hashes.iter().copied()).collect();
        if doubtful.is_empty() {
            return Synced::But(BTreeSet::new());
        }
        // It has lost unsynced data since. What it still has may have been put again: hence the second sync.
        match self.missing(server, boot, doubtful).await {
            Some(missing) if self.sync_once(server).await == Some(boot) => Synced::But(missing),
            _ => Synced::Silent,
        }
    }

    async fn sync_once(&self, server: ServerId) -> Option<BootId> {
        match self.ask(server, &StorageRequest::Sync, SYNC_DEADLINE).await? {
            StorageAnswer::Sync { boot } => Some(boot),
            other => {
                tracing::warn!(%server, ?other, "an answer that does not fit a sync");
                None
            }
        }
    }

    /// Which of `hashes` the server does not have.
    async fn missing(
        &self,
        server: ServerId,
        boot: BootId,
        hashes: BTreeSet<BlockHash>,
    ) -> Option<BTreeSet<BlockHash>> {
        let hashes: Vec<BlockHash> = hashes.into_iter().collect();
        let mut missing = BTreeSet::new();
        for part in hashes.chunks(HASH_LIST_MAX) {
            let request = StorageRequest::Has { blocks: part.to_vec() };
            match self.ask(server, &request, QUESTION_DEADLINE).await? {
                StorageAnswer::Has { boot: now, present } if now == boot && present.len() == part.len() => {
                    missing.extend(part.iter().zip(present).filter(|(_, present)| !present).map(|(hash, _)| *hash));
                }
                _ => return None,
            }
        }
        Some(missing)
    }

    async fn ask(&self, server: ServerId, request: &StorageRequest, deadline: Duration) -> Option<StorageAnswer> {
        let to = self.core.cluster.lock().endpoint(server)?;
        match ask(&*self.peers, to, request, deadline).await {
            Ok(Ok(answer)) => Some(answer),
            Ok(Err(refusal)) => {
                tracing::warn!(%server, %refusal, "a storage server refuses a request of a barrier");
                None
            }
            Err(error) => {
                tracing::debug!(%server, %error, "a storage server does not answer a barrier");
                None
            }
        }
    }

    /// Decides what is lost. Copies of which nothing is known are given up if enough others are durable, else they are
    /// waited for, and the duties make others meanwhile.
    fn settle(
        &self,
        copies: BTreeMap<ServerId, Copies>,
        outcomes: BTreeMap<ServerId, Synced>,
    ) -> Result<Verdict, Fault> {
        let mut verdict = Verdict::default();
        let mut vanished = BTreeSet::new();
        for (server, of_server) in &copies {
            for (boot, hash) in of_server.iter().flat_map(|(boot, hashes)| hashes.iter().map(move |hash| (boot, hash)))
            {
                if !is_bad(&copies, &outcomes, *server, hash) {
                    continue;
                }
                let row = self.core.store.ask(|rows| blocks::block(rows, *hash))?;
                let enough = row.as_ref().map_or(0, BlockRow::enough);
                let holders = row.map_or(Vec::new(), |row| row.holders);
                let good = holders.iter().filter(|holder| !is_bad(&copies, &outcomes, **holder, hash)).count();
                let is_known = is_lost(&outcomes, *server, hash);
                if !holders.contains(server) {
                    continue;
                }
                if holders.iter().all(|holder| is_lost(&outcomes, *holder, hash)) {
                    vanished.insert(*hash);
                    if self.is_hopeless(*hash) {
                        self.give_up(*server, *hash);
                        if holders.len() > 1 {
                            verdict.lose(*server, *hash);
                        }
                    } else {
                        verdict.waits = true;
                        self.core.unsynced.lock().add(*server, *boot, *hash);
                    }
                    continue;
                }
                match holders.len() {
                    _ if good >= enough => verdict.lose(*server, *hash),
                    _ if is_known => verdict.lose(*server, *hash),
                    _ => {
                        verdict.waits = true;
                        self.core.unsynced.lock().add(*server, *boot, *hash);
                    }
                }
                if good < enough && holders.len() > 1 {
                    self.core.thin.lock().insert(*hash);
                    self.core.copies_wanted.notify_one();
                }
            }
        }
        self.core.vanished.lock().retain(|hash, _| vanished.contains(hash));
        Ok(verdict)
    }

    /// Nobody has it, and no mount has stored it again in all the time that it had for that.
    fn is_hopeless(&self, hash: BlockHash) -> bool {
        let now = self.core.clock.monotonic();
        let mut vanished = self.core.vanished.lock();
        let since = *vanished
            .entry(hash)
            .and_modify(|since| *since = if self.core.is_recovering() { now } else { *since })
            .or_insert(now);
        now.saturating_sub(since) >= VANISHED_PATIENCE
    }

    /// No copy can be made of a block that nobody has: to wait for some would hold up every barrier from now on.
    fn give_up(&self, server: ServerId, hash: BlockHash) {
        tracing::error!(%server, block = %hash, "the last copy of a block is lost, before it was ever durable");
        self.core.thin.lock().remove(&hash);
    }

    /// Are there blocks without enough durable copies? Forgets those that have them by now.
    fn is_thin(&self) -> Result<bool, Fault> {
        let thin: Vec<BlockHash> = self.core.thin.lock().iter().copied().collect();
        for hash in thin {
            let row = self.core.store.ask(|rows| blocks::block(rows, hash))?;
            let waited_for = self.core.unsynced.lock().servers_of(hash);
            let enough = row.is_none_or(|row| {
                row.refs == 0
                    || row.holders.iter().filter(|holder| !waited_for.contains(holder)).count() >= row.enough()
            });
            if enough {
                self.core.thin.lock().remove(&hash);
            }
        }
        Ok(!self.core.thin.lock().is_empty())
    }

    async fn sync_log(&self, position: Position) -> Result<(), Fault> {
        let (file, end) = {
            let mut log = self.core.log.lock();
            log.mark(position)?;
            log.to_sync()
        };
        let syncing = Arc::clone(&file);
        let synced = work::run(move || syncing.sync_data()).await;
        synced.map_err(|_| Fault::Thread)?.map_err(Fault::Sync)?;
        Ok(self.core.log.lock().note_synced(&file, end, position)?)
    }
}

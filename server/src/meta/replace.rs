//! Servers that stay away are replaced, and looked through when they come back.
//!
//! A server that has been down for long enough is taken off the record of all its blocks: from then on these are owed a copy, which
//! the `Copier` has made elsewhere. It keeps what it has, and when it comes back, whatever is still short of copies counts again there.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use holdfast_common::{
    BlockHash, Epoch, ServerId,
    net::Peers,
    wire::{
        meta::Severity,
        storage::{StorageAnswer, StorageRequest},
    },
};

use super::{
    committer::Proposer,
    core::{Core, Fault, ask},
    journal::Note,
    state::{Command, blocks, garbage},
};

const TICK: Duration = Duration::from_millis(500);
/// Blocks that one entry changes.
const BATCH: usize = 1024;
/// A server answers which blocks it has within this, a page at a time.
const LIST_DEADLINE: Duration = Duration::from_secs(10);

pub struct Replacer {
    core: Arc<Core>,
    proposer: Proposer,
    peers: Arc<dyn Peers>,
    /// Of a server that is down.
    after: Duration,
    /// Servers that are up, and have been looked through since they came up.
    seen: BTreeSet<ServerId>,
    /// Servers that are down, and of which nothing more can be taken off the record.
    replaced: BTreeSet<ServerId>,
}

impl std::fmt::Debug for Replacer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replacer").field("replaced", &self.replaced).finish_non_exhaustive()
    }
}

impl Replacer {
    pub fn new(core: Arc<Core>, proposer: Proposer, peers: Arc<dyn Peers>, after: Duration) -> Self {
        Self { core, proposer, peers, after, seen: BTreeSet::new(), replaced: BTreeSet::new() }
    }

    pub async fn run(mut self) -> Result<(), Fault> {
        loop {
            tokio::time::sleep(TICK).await;
            if !self.core.is_recovering() {
                self.round().await?;
            }
        }
    }

    /// Looks at every server once.
    pub async fn round(&mut self) -> Result<(), Fault> {
        let now = self.core.clock.monotonic();
        let (up, gone, replicas) = {
            let cluster = self.core.cluster.lock();
            (cluster.up(), cluster.down_for(self.after, now), cluster.replicas())
        };
        // Who was down between two looks is looked through again.
        {
            let cluster = self.core.cluster.lock();
            self.seen.retain(|server| up.contains(server) && cluster.was_looked_through(*server));
        }
        self.replaced.retain(|server| gone.contains(server));
        for server in up.iter().copied().filter(|server| !self.seen.contains(server)).collect::<Vec<_>>() {
            if self.look_through(server).await? {
                self.core.cluster.lock().looked_through(server, now);
                self.seen.insert(server);
            }
        }
        // With fewer there is nowhere to put another copy.
        if up.len() >= replicas {
            for server in gone.into_iter().filter(|server| !self.replaced.contains(server)).collect::<Vec<_>>() {
                if self.take_off(server).await? {
                    self.replaced.insert(server);
                }
            }
        }
        Ok(())
    }

    /// `false`: it could not be done to the end, or the server is back.
    async fn take_off(&self, server: ServerId) -> Result<bool, Fault> {
        let (mut after, mut taken) = (None, 0);
        loop {
            let page = self.core.held_after(server, after, BATCH).await?;
            if self.core.cluster.lock().is_up(server) {
                return Ok(false);
            }
            if !page.blocks.is_empty() {
                taken += page.blocks.len();
                let lost = Command::HolderLost { server, blocks: page.blocks };
                if let Err(refusal) = self.proposer.propose(lost).await {
                    tracing::debug!(%server, %refusal, "the copies of a lost server could not be taken off the record yet");
                    return Ok(false);
                }
                self.core.copies_wanted.notify_one();
            }
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        if taken > 0 {
            tracing::warn!(%server, blocks = taken, "a storage server has been down for too long: its blocks get copies elsewhere");
            let what = format!("stays away: it was on record for {taken} blocks");
            let note = Note::new(Severity::Warning, format!("storage server {server}"), what);
            self.core.tell(note.meaning("these blocks are one copy short").doing("they are copied to other servers"));
        }
        Ok(true)
    }

    /// Puts a server that is up on record for what it has of the blocks that are short of copies. `false`: it did not answer.
    async fn look_through(&self, server: ServerId) -> Result<bool, Fault> {
        let (mut after, mut found) = (None, 0);
        // Else all that it has is on record, here or on enough others.
        while self.is_something_owed()? {
            let Some((page, end)) = self.list(server, after).await else { return Ok(false) };
            after = page.last().map(|(hash, _)| *hash);
            for (epoch, hashes) in self.short_without(server, &page)? {
                found += hashes.len();
                if !self.put_on(server, hashes, epoch).await {
                    return Ok(false);
                }
            }
            if end || after.is_none() {
                break;
            }
        }
        if found > 0 {
            tracing::info!(%server, blocks = found, "a storage server has come back with copies that were owed");
            let what = format!("has come back with copies of {found} blocks that were short of one");
            self.core
                .tell(Note::new(Severity::Info, format!("storage server {server}"), what).doing("they count again"));
        }
        Ok(true)
    }

    fn is_something_owed(&self) -> Result<bool, Fault> {
        Ok(!blocks::owed_after(&*self.core.store.view()?, blocks::Debts::All, None, 1)?.is_empty())
    }

    async fn list(&self, server: ServerId, after: Option<BlockHash>) -> Option<(Vec<(BlockHash, Epoch)>, bool)> {
        let to = self.core.cluster.lock().endpoint(server)?;
        match ask(&*self.peers, to, &StorageRequest::List { after }, LIST_DEADLINE).await {
            Ok(Ok(StorageAnswer::List { blocks, end })) => Some((blocks, end)),
            other => {
                tracing::debug!(%server, ?other, "a storage server does not say what it has");
                None
            }
        }
    }

    /// Those of `page` that have too few copies, none of them on record for the server, by their stamps. What was condemned since it
    /// was stamped does not count: the copier has such copies stamped anew.
    fn short_without(
        &self,
        server: ServerId,
        page: &[(BlockHash, Epoch)],
    ) -> Result<BTreeMap<Epoch, Vec<BlockHash>>, Fault> {
        let view = self.core.store.view()?;
        let mut short: BTreeMap<Epoch, Vec<BlockHash>> = BTreeMap::new();
        for (hash, epoch) in page {
            if let Some(row) = blocks::block(&*view, *hash)?
                && blocks::is_owed(&row)
                && garbage::counts(&row, *epoch)
                && !row.holders.contains(&server)
            {
                short.entry(*epoch).or_default().push(*hash);
            }
        }
        Ok(short)
    }

    async fn put_on(&self, server: ServerId, hashes: Vec<BlockHash>, epoch: Epoch) -> bool {
        let Some(boot) = self.core.cluster.lock().boot(server) else { return false };
        // Whether they are durable there is not known: the next barrier asks.
        hashes.iter().for_each(|hash| self.core.unsynced.lock().add(server, boot, *hash));
        let mut batches = hashes.chunks(BATCH);
        loop {
            let Some(batch) = batches.next() else { return true };
            let command = Command::HolderAdded { server, blocks: batch.to_vec(), epoch };
            if let Err(refusal) = self.proposer.propose(command).await {
                tracing::debug!(%server, %refusal, "copies that came back could not be recorded yet");
                return false;
            }
        }
    }
}

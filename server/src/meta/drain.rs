//! Empties storage servers that the operator wants empty: each of their blocks gets enough copies elsewhere, and goes.
//!
//! What is done is on record after each page, so that it can be interrupted anywhere: an emptied server is one that is on record for
//! nothing. One that is to leave is removed then.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use holdfast_common::{
    BlockHash, ServerId, cluster::Standing, limits::REPLICAS, net::Peers, placement::candidates, wire::meta::Severity,
};

use super::{
    committer::Proposer,
    copier::{self, Order},
    core::{Core, Fault},
    journal::Note,
    relocate,
    state::blocks,
};

const TICK: Duration = Duration::from_millis(500);
/// Blocks that are looked at in one step.
const PAGE: usize = 256;

pub struct Drainer {
    core: Arc<Core>,
    proposer: Proposer,
    peers: Arc<dyn Peers>,
}

impl std::fmt::Debug for Drainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Drainer").finish_non_exhaustive()
    }
}

impl Drainer {
    pub fn new(core: Arc<Core>, proposer: Proposer, peers: Arc<dyn Peers>) -> Self {
        Self { core, proposer, peers }
    }

    pub async fn run(self) -> Result<(), Fault> {
        let mut were_leaving = BTreeSet::new();
        loop {
            tokio::time::sleep(TICK).await;
            if !self.core.may_collect() {
                continue;
            }
            let leaving = self.core.cluster.lock().leaving();
            for (server, standing) in &leaving {
                self.empty(*server, *standing).await?;
            }
            let are_leaving = leaving.into_iter().map(|(server, _)| server).collect();
            for server in were_leaving.difference(&are_leaving).copied().collect::<Vec<ServerId>>() {
                self.trim(server).await?;
            }
            were_leaving = are_leaving;
        }
    }

    /// Looks at all that a server is on record for, once.
    async fn empty(&self, server: ServerId, standing: Standing) -> Result<(), Fault> {
        let (mut after, mut left) = (None, 0);
        loop {
            let page = blocks::held_after(&*self.core.store.view()?, server, after, PAGE)?;
            let Some(last) = page.last().copied() else { break };
            after = Some(last);
            left += (page.len() - self.move_off(server, &page).await?) as u64;
            if self.core.cluster.lock().standing(server) != Some(standing) {
                return Ok(());
            }
        }
        let knew = self.core.cluster.lock().note_left(server, left);
        if left == 0 && standing == Standing::Leaving {
            self.remove(server).await;
        } else if left == 0 && knew != Some(0) {
            let note =
                Note::new(Severity::Info, format!("storage server {server}"), "is drained: it has no block any more");
            self.core.tell(note.doing("it stays empty until `holdfast undrain`"));
        }
        Ok(())
    }

    /// Returns how many blocks the server is no longer on record for.
    async fn move_off(&self, server: ServerId, page: &[BlockHash]) -> Result<usize, Fault> {
        let orders = self.orders(page)?;
        copier::make(&self.core, &self.proposer, &self.peers, orders).await?;
        relocate::retire(&self.core, &self.proposer, &*self.peers, server, page).await
    }

    /// Copies of those that have too few on servers that stay.
    fn orders(&self, page: &[BlockHash]) -> Result<Vec<Order>, Fault> {
        let view = self.core.store.view()?;
        let cluster = self.core.cluster.lock();
        let map = cluster.map();
        let mut orders = Vec::new();
        for block in page {
            let Some(row) = blocks::block(&*view, *block)?.filter(|row| row.refs > 0) else { continue };
            if row.holders.iter().filter(|holder| cluster.stays(**holder)).count() >= REPLICAS {
                continue;
            }
            let sources = cluster.sources(&row.holders);
            let target = candidates(&map, *block).into_iter().find(|candidate| !row.holders.contains(candidate));
            if let Some(target) = target.filter(|_| !sources.is_empty() && row.holders.len() < blocks::HOLDERS_MAX) {
                orders.push(Order { block: *block, target, sources, epoch: row.epoch });
            }
        }
        Ok(orders)
    }

    /// A server serves again that was to be emptied: what has got enough copies elsewhere meanwhile is not needed on it.
    async fn trim(&self, server: ServerId) -> Result<(), Fault> {
        let mut after = None;
        loop {
            let page = blocks::held_after(&*self.core.store.view()?, server, after, PAGE)?;
            let Some(last) = page.last().copied() else { return Ok(()) };
            after = Some(last);
            relocate::retire(&self.core, &self.proposer, &*self.peers, server, &page).await?;
        }
    }

    async fn remove(&self, server: ServerId) {
        match self.core.stand(&self.proposer, server, Standing::Removed).await {
            Ok(()) => {
                tracing::info!(%server, "a storage server is empty, and removed");
                let note = Note::new(Severity::Info, format!("storage server {server}"), "is empty, and removed");
                self.core.tell(note.meaning("its number is not let in again").doing("its daemon can be stopped"));
            }
            Err(refusal) => {
                tracing::debug!(%server, %refusal, "the removal of a storage server could not be recorded yet")
            }
        }
    }
}

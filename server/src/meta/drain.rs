//! Empties storage servers that the operator wants empty: each of their blocks gets enough copies elsewhere, and goes.
//!
//! What is done is on record after each page, so that it can be interrupted anywhere: an emptied server is one that is on record for
//! nothing. One that is to leave is removed then.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use holdfast_common::{
    BlockHash, ServerId, cluster::Standing, net::Peers, placement::candidates_beside, wire::meta::Severity,
};

use super::{
    committer::Proposer,
    copier::{self, Order},
    core::{Core, Fault},
    journal::Note,
    relocate,
    state::{Command, Reply, blocks},
};

const TICK: Duration = Duration::from_millis(500);
/// Before a server is looked at again of which nothing could be moved.
const STUCK_INTERVAL: Duration = Duration::from_secs(5);
const STUCK_INTERVAL_MAX: Duration = Duration::from_secs(300);
/// Blocks that are looked at in one step.
const PAGE: usize = 256;

/// Blocks of a server that cannot be moved off it now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stuck {
    /// No copy can be read.
    without_source: u64,
    /// No server that could take a copy has none.
    without_target: u64,
}

impl std::fmt::Display for Stuck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self { without_source: 0, without_target: 0 } => {
                f.write_str("copies cannot be made: servers do not answer")
            }
            Self { without_source: 0, without_target } => {
                write!(
                    f,
                    "{without_target} blocks are to have more copies than there are other servers that take blocks"
                )
            }
            Self { without_source, .. } => {
                write!(f, "of {without_source} blocks there is no copy that could be read now")
            }
        }
    }
}

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

/// Until all is looked at again, of which looking alone took so long: a small part of the time.
fn stuck_interval(looking: Duration) -> Duration {
    (looking * 10).clamp(STUCK_INTERVAL, STUCK_INTERVAL_MAX)
}

impl Drainer {
    pub fn new(core: Arc<Core>, proposer: Proposer, peers: Arc<dyn Peers>) -> Self {
        Self { core, proposer, peers }
    }

    pub async fn run(self) -> Result<(), Fault> {
        let mut were_leaving = BTreeSet::new();
        // Of which nothing could be moved: looked at again later.
        let mut stuck: BTreeMap<ServerId, Duration> = BTreeMap::new();
        loop {
            tokio::time::sleep(TICK).await;
            if !self.core.may_collect() {
                continue;
            }
            let leaving = self.core.cluster.lock().leaving();
            let now = self.core.clock.monotonic();
            stuck.retain(|_, until| *until > now);
            for (server, standing) in &leaving {
                if stuck.contains_key(server) {
                    continue;
                }
                if let Some(looking) = self.empty(*server, *standing).await? {
                    stuck.insert(*server, self.core.clock.monotonic() + stuck_interval(looking));
                }
            }
            let are_leaving = leaving.into_iter().map(|(server, _)| server).collect();
            for server in were_leaving.difference(&are_leaving).copied().collect::<Vec<ServerId>>() {
                self.trim(server).await?;
            }
            were_leaving = are_leaving;
        }
    }

    /// Looks at all that a server is on record for, once. If nothing could be done: how long it took to find it.
    async fn empty(&self, server: ServerId, standing: Standing) -> Result<Option<Duration>, Fault> {
        let (mut after, mut left, mut off, mut stuck) = (None, 0, 0, Stuck::default());
        let mut looking = Duration::ZERO;
        loop {
            let began = self.core.clock.monotonic();
            let page = self.core.held_after(server, after, PAGE).await?;
            looking += self.core.clock.monotonic().saturating_sub(began);
            if !page.blocks.is_empty() {
                let moved = self.move_off(server, &page.blocks, &mut stuck).await?;
                left += page.blocks.len().saturating_sub(moved) as u64;
                off += moved;
            }
            if self.core.cluster.lock().standing(server) != Some(standing) {
                return Ok(None);
            }
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        let hindered = if left > 0 && off == 0 { stuck.to_string() } else { String::new() };
        let knew = self.core.cluster.lock().note_left(server, left, hindered);
        if left == 0 && standing == Standing::Leaving {
            self.remove(server).await;
        } else if left == 0 && knew != Some(0) {
            let note =
                Note::new(Severity::Info, format!("storage server {server}"), "is drained: it has no block any more");
            self.core.tell(note.doing("it stays empty until `holdfast undrain`"));
        }
        Ok(Some(looking).filter(|_| off == 0))
    }

    /// Returns how many blocks the server is no longer on record for.
    async fn move_off(&self, server: ServerId, page: &[BlockHash], stuck: &mut Stuck) -> Result<usize, Fault> {
        let orders = self.orders(page, stuck)?;
        copier::make(&self.core, &self.proposer, &self.peers, orders).await?;
        let retired = relocate::retire(&self.core, &self.proposer, &*self.peers, server, page).await?;
        Ok(retired + self.give_up(server, page).await?)
    }

    /// What no file names is deleted as garbage, but not by a server that is away: it is taken off the record of that. And of what it
    /// alone has, if the operator said so.
    async fn give_up(&self, server: ServerId, page: &[BlockHash]) -> Result<usize, Fault> {
        if self.core.cluster.lock().is_up(server) {
            return Ok(0);
        }
        // Who is late for a moment is not gone.
        let gone: BTreeSet<ServerId> = {
            let cluster = self.core.cluster.lock();
            self.core.given_up.lock().iter().copied().filter(|given_up| cluster.is_down(*given_up)).collect()
        };
        let is_given_up = gone.contains(&server);
        let view = self.core.store.view()?;
        let mut given_up = Vec::new();
        for block in page {
            let Some(row) = blocks::block(&*view, *block)? else { continue };
            if row.refs == 0 || (is_given_up && row.holders.iter().all(|holder| gone.contains(holder))) {
                given_up.push(*block);
            }
        }
        drop(view);
        if given_up.is_empty() {
            return Ok(0);
        }
        let command = match is_given_up {
            true => Command::GiveUp { server, blocks: given_up },
            false => Command::HolderLost { server, blocks: given_up },
        };
        match self.proposer.propose(command).await {
            Ok((_, Ok(Reply::Lost(count)))) => Ok(count),
            Ok(_) => Ok(0),
            Err(refusal) => {
                tracing::debug!(%server, %refusal, "copies could not be taken off the record yet");
                Ok(0)
            }
        }
    }

    /// Copies of those that have too few on servers that stay.
    fn orders(&self, page: &[BlockHash], stuck: &mut Stuck) -> Result<Vec<Order>, Fault> {
        let view = self.core.store.view()?;
        let cluster = self.core.cluster.lock();
        let map = cluster.map();
        let mut orders = Vec::new();
        for block in page {
            let Some(row) = blocks::block(&*view, *block)?.filter(|row| row.refs > 0) else { continue };
            let staying: Vec<ServerId> = row.holders.iter().copied().filter(|holder| cluster.stays(*holder)).collect();
            if staying.len() >= row.wanted {
                continue;
            }
            let sources = cluster.sources(*block, &row.holders);
            let targets = candidates_beside(&map, *block, &staying, |server| row.holders.contains(&server));
            let target = targets.first().copied().filter(|_| row.holders.len() < blocks::HOLDERS_MAX);
            match target {
                Some(target) if !sources.is_empty() => {
                    orders.push(Order { block: *block, target, sources, epoch: row.epoch });
                }
                Some(_) => stuck.without_source += 1,
                None => stuck.without_target += 1,
            }
        }
        Ok(orders)
    }

    /// A server serves again that was to be emptied: what has got enough copies elsewhere meanwhile is not needed on it.
    async fn trim(&self, server: ServerId) -> Result<(), Fault> {
        let mut after = None;
        loop {
            let page = self.core.held_after(server, after, PAGE).await?;
            if !page.blocks.is_empty() {
                relocate::retire(&self.core, &self.proposer, &*self.peers, server, &page.blocks).await?;
            }
            after = page.next;
            if after.is_none() {
                return Ok(());
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_needs_long_to_look_looks_less_often() {
        let secs = Duration::from_secs;
        assert_eq!(stuck_interval(Duration::from_millis(3)), STUCK_INTERVAL);
        assert_eq!(stuck_interval(secs(10)), secs(100));
        assert_eq!(stuck_interval(secs(3600)), STUCK_INTERVAL_MAX);
    }
}

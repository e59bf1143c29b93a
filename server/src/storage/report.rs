//! Tells the metadata server, every second, that this server lives and how loaded it is.

use std::{fs, net::SocketAddr, sync::Arc, time::Duration};

use holdfast_common::{
    BlockHash, Epoch,
    limits::HASH_LIST_MAX,
    net::{
        CallError, Endpoint, Frame, Peers,
        identity::{NodeName, Role},
    },
    refusal::Refusal,
    wire::{
        codec::{self, CodecError},
        meta::{MetaReply, MetaRequest, StorageLoad, StorageNotice},
    },
};

use tokio::sync::mpsc;

use super::{service::StorageService, store::Store, vitals::Watch};

const EVERY: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(2);
/// Bad copies in one report.
const BAD_TOLD_AT_ONCE: usize = 1024;
const _: () = assert!(BAD_TOLD_AT_ONCE <= HASH_LIST_MAX);
/// Number of the metadata server in its certificate, as `holdfast init` gives it.
const META_ID: u32 = 1;

pub(super) struct Reporter {
    pub(super) peers: Arc<dyn Peers>,
    pub(super) meta: SocketAddr,
    pub(super) address: SocketAddr,
    pub(super) zone: String,
    pub(super) store: Arc<Store>,
    pub(super) service: Arc<StorageService>,
    /// When this process started, in milliseconds since 1970.
    pub(super) started_ms: u64,
    pub(super) watch: Watch,
}

#[derive(Debug, thiserror::Error)]
enum ReportError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("it refused: {0}")]
    Refused(Refusal),
}

async fn tell(peers: &dyn Peers, meta: SocketAddr, notice: StorageNotice) -> Result<Epoch, ReportError> {
    let header = codec::encode(&MetaRequest::Storage(notice))?;
    let to = Endpoint { address: meta, name: NodeName { role: Role::Meta, id: META_ID } };
    let answer = peers.call(to, Frame { header, payload: Vec::new() }, DEADLINE).await?;
    let reply = codec::decode::<MetaReply>(&answer.header)?;
    reply.result.map(|_| reply.epoch).map_err(ReportError::Refused)
}

/// The last word of a server that has to stop. Nothing reports after it.
pub(super) async fn tell_failure(peers: &dyn Peers, meta: SocketAddr, why: String) {
    if let Err(error) = tell(peers, meta, StorageNotice::Failed { why }).await {
        tracing::warn!(%meta, %error, "the metadata server does not know why this server stops: it will notice the silence");
    }
}

impl Reporter {
    /// Reports until it is dropped; a metadata server that does not answer is tried again.
    /// What comes from `bad` is reported too.
    pub(super) async fn run(mut self, mut bad: mpsc::UnboundedReceiver<BlockHash>) {
        let mut untold = Vec::new();
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut was_heard = None;
        loop {
            ticks.tick().await;
            let result = self.report().await;
            while untold.len() < BAD_TOLD_AT_ONCE
                && let Ok(hash) = bad.try_recv()
            {
                untold.push(hash);
            }
            if result.is_ok()
                && !untold.is_empty()
                && self.tell(StorageNotice::BadCopies { blocks: untold.clone() }).await.is_ok()
            {
                untold.clear();
            }
            let is_heard = result.is_ok();
            match result {
                Ok(()) if was_heard != Some(true) => {
                    tracing::info!(meta = %self.meta, "registered with the metadata server")
                }
                Err(error) if was_heard != Some(false) => {
                    tracing::warn!(meta = %self.meta, %error, "the metadata server does not hear this server; trying on");
                }
                _ => {}
            }
            was_heard = Some(is_heard);
        }
    }

    async fn report(&mut self) -> Result<(), ReportError> {
        let load = self.load();
        let (address, zone, boot) = (self.address, self.zone.clone(), self.store.boot());
        let notice = StorageNotice::Heartbeat { address, zone, boot, load };
        let epoch = self.tell(notice).await?;
        self.service.hear(epoch);
        Ok(())
    }

    async fn tell(&self, notice: StorageNotice) -> Result<Epoch, ReportError> {
        tell(&*self.peers, self.meta, notice).await
    }

    fn load(&mut self) -> StorageLoad {
        let vitals = self.watch.look();
        let space = self.store.space().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot tell how much space is left");
            holdfast_common::disk::Space { capacity: 0, free: 0 }
        });
        StorageLoad {
            capacity_bytes: space.capacity,
            free_bytes: space.free,
            load_percent: fs::read_to_string("/proc/loadavg").ok().and_then(|text| load_percent(&text)).unwrap_or(0),
            memory_bytes: fs::read_to_string("/proc/self/status").ok().and_then(|text| resident(&text)).unwrap_or(0),
            started_ms: self.started_ms,
            cpu_percent: vitals.cpu_percent,
            disk_busy_percent: vitals.disk_busy_percent,
            memory_available_bytes: vitals.memory_available_bytes,
            network_bytes: vitals.network_bytes,
            ..self.service.load()
        }
    }
}

/// The one-minute load average × 100, from /proc/loadavg.
fn load_percent(text: &str) -> Option<u32> {
    let (whole, hundredths) = text.split_whitespace().next()?.split_once('.')?;
    whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(hundredths.parse().ok()?)
}

/// Resident bytes, from /proc/self/status.
fn resident(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_and_memory_are_read_from_proc() {
        assert_eq!(load_percent("1.25 0.80 0.50 2/345 678\n"), Some(125));
        assert_eq!(load_percent(""), None);
        assert_eq!(resident("Name:\tx\nVmRSS:\t    2048 kB\nThreads:\t1\n"), Some(2 << 20));
        assert_eq!(resident("Name:\tx\n"), None);
    }
}

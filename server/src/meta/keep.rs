//! Keeps copies of the metadata on the storage servers, so that the loss of this server's disk costs minutes and not everything.

use std::{sync::Arc, time::Duration};

use holdfast_common::{
    Position, ServerId, Time,
    limits::REPLICAS,
    net::{Frame, Peers},
    wire::{
        codec,
        meta::Severity,
        storage::{StorageAnswer, StorageReply, StorageRequest},
    },
    work,
};
use parking_lot::Mutex;

use super::{
    backup::Backup,
    core::{Core, Fault},
    duties::METADATA_SERVER,
    journal::Note,
};

/// Bytes of one message.
const PART_LENGTH: usize = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_secs(1);
/// The first copy of a life comes sooner than the others, by this part of the time between two.
const FIRST_PART: u32 = 10;
/// A backup takes at most this part of the time: if there is very much metadata, they are made less often.
const SHARE: u32 = 20;

pub struct Keeper {
    core: Arc<Core>,
    peers: Arc<dyn Peers>,
    every: Duration,
    /// What the last copy has.
    kept: Option<Position>,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl Keeper {
    /// `every`: zero for never.
    pub fn new(core: Arc<Core>, peers: Arc<dyn Peers>, every: Duration) -> Self {
        Self { core, peers, every, kept: None }
    }

    pub async fn run(mut self) -> Result<(), Fault> {
        if self.every.is_zero() {
            return std::future::pending().await;
        }
        let mut due = self.core.clock.monotonic() + self.every / FIRST_PART;
        loop {
            tokio::time::sleep(TICK).await;
            let now = self.core.clock.monotonic();
            if now < due || self.core.is_recovering() || self.kept == Some(self.core.applied()) {
                continue;
            }
            self.keep().await?;
            let ended = self.core.clock.monotonic();
            due = ended + self.every.max((ended - now) * SHARE);
        }
    }

    async fn keep(&mut self) -> Result<(), Fault> {
        let now = self.core.clock.now();
        let mut to = self.targets(now);
        let backup = Backup::new(self.core.store.view()?, self.core.cluster_id, now);
        let position = backup.position();
        let backup = Arc::new(Mutex::new(backup));
        let (mut offset, began, asked) = (0, self.core.clock.monotonic(), to.len());
        loop {
            let reading = Arc::clone(&backup);
            let part = work::run(move || reading.lock().next_part(PART_LENGTH)).await;
            let part = part.map_err(|_| Fault::Thread)??;
            let end = part.is_empty();
            // Only what is durable is worth coming back to.
            if end && self.core.until_durable(position, DEADLINE).await.is_err() {
                to.clear();
            }
            if to.is_empty() {
                break;
            }
            let request = StorageRequest::KeepBackup { number: u64::try_from(now.secs).unwrap_or(0), offset, end };
            offset += part.len() as u64;
            to = self.sent(to, &request, part).await;
            if end {
                break;
            }
        }
        self.tell(&to, asked, offset, began);
        if !to.is_empty() {
            self.kept = Some(position);
            *self.core.backed_up.lock() = Some(now);
        }
        Ok(())
    }

    /// Other servers each time, so that one that cannot take it is not all there is.
    fn targets(&self, now: Time) -> Vec<ServerId> {
        let cluster = self.core.cluster.lock();
        let mut up = cluster.up();
        if !up.is_empty() {
            let first = usize::try_from(now.secs.unsigned_abs()).unwrap_or(0) % up.len();
            up.rotate_left(first);
        }
        up.sort_by_key(|server| !cluster.takes_blocks(*server));
        up.truncate(REPLICAS);
        up
    }

    /// Those that have taken this part.
    async fn sent(&self, to: Vec<ServerId>, request: &StorageRequest, part: Vec<u8>) -> Vec<ServerId> {
        let part = bytes::Bytes::from(part);
        let mut took = Vec::with_capacity(to.len());
        for server in to {
            let endpoint = self.core.cluster.lock().endpoint(server);
            let (Some(endpoint), Ok(header)) = (endpoint, codec::encode(request)) else { continue };
            let frame = Frame { header, payload: vec![part.clone()] };
            let answer = self.peers.call(endpoint, frame, DEADLINE).await.ok();
            match answer.and_then(|answer| codec::decode::<StorageReply>(&answer.header).ok()) {
                Some(StorageReply(Ok(StorageAnswer::Kept))) => took.push(server),
                other => tracing::warn!(%server, ?other, "a storage server has not taken a copy of the metadata"),
            }
        }
        took
    }

    fn tell(&self, took: &[ServerId], asked: usize, bytes: u64, began: Duration) {
        let lasted = self.core.clock.monotonic().saturating_sub(began);
        tracing::info!(servers = took.len(), bytes, ?lasted, "a copy of the metadata was made");
        if took.len() < asked || took.is_empty() {
            let what = format!("a copy of the metadata reached {} of {asked} storage servers", took.len());
            let note = Note::new(Severity::Warning, METADATA_SERVER, what);
            self.core.tell_rarely(
                note.meaning("after a loss of its disk less can be restored").doing("the next copy is made in time"),
            );
        }
    }
}

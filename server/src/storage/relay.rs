//! Passing a block on: who writes sends it to one server, and that one to the others.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use holdfast_common::{
    BootId, Refusal,
    limits::PASSED_ON_MAX,
    net::{
        Endpoint, Frame, Peers,
        identity::{NodeName, Role},
        probe::until_mute,
    },
    wire::{
        codec,
        storage::{PutBlock, Source, StorageAnswer, StorageReply, StorageRequest},
    },
};
use tokio::sync::Semaphore;

use super::replicate::PeerError;

/// Blocks that are being passed on at once. Each keeps a place and memory of this server until others have given theirs: if all of these could
/// be kept so, servers would wait for each other.
pub(super) const PASSING_MAX: usize = 64;

/// Hands blocks to other servers, for somebody who waits for it.
pub(super) struct Relay {
    peers: Arc<dyn Peers>,
    places: Semaphore,
}

/// What is passed on, and how.
pub(super) struct Passing {
    pub block: PutBlock,
    pub bytes: Bytes,
    pub durable: bool,
    pub patience: Duration,
}

impl Relay {
    pub(super) fn new(peers: Arc<dyn Peers>) -> Self {
        Self { peers, places: Semaphore::new(PASSING_MAX) }
    }

    /// To all of `to` at the same time; what each said, in their order. `Unavailable`: too much is being passed on already; or it did not
    /// answer, for which `patience` is waited at most, or less if it is mute.
    pub(super) async fn pass_on(&self, passing: &Passing, to: &[Source]) -> Vec<Result<BootId, Refusal>> {
        let Ok(_place) = self.places.try_acquire() else {
            return vec![Err(Refusal::Unavailable); to.len()];
        };
        tracing::debug!(block = %passing.block.hash, servers = to.len(), "a block is passed on");
        join_all(to.iter().map(|server| self.pass_to(passing, *server))).await
    }

    async fn pass_to(&self, passing: &Passing, to: Source) -> Result<BootId, Refusal> {
        self.put(passing, to).await.map_err(|error| {
            if let PeerError::Refused(refusal @ (Refusal::ServerFull | Refusal::NoSpace)) = error {
                return refusal;
            }
            tracing::warn!(block = %passing.block.hash, server = %to.server, %error, "a block could not be passed on");
            match error {
                PeerError::Refused(refusal) => refusal,
                _ => Refusal::Unavailable,
            }
        })
    }

    async fn put(&self, passing: &Passing, to: Source) -> Result<BootId, PeerError> {
        let header = codec::encode(&StorageRequest::Put { blocks: vec![passing.block], durable: passing.durable })?;
        let request = Frame { header, payload: vec![passing.bytes.clone()] };
        let endpoint = Endpoint { address: to.address, name: NodeName { role: Role::Storage, id: to.server.0 } };
        let answer = tokio::select! {
            answer = self.peers.call(endpoint, request, passing.patience) => answer?,
            error = until_mute(&*self.peers, endpoint) => return Err(error.into()),
        };
        match codec::decode::<StorageReply>(&answer.header)?.0 {
            Ok(StorageAnswer::Put { boot, durable }) if durable == passing.durable => Ok(boot),
            Ok(_) => Err(PeerError::Nonsense),
            Err(refusal) => Err(PeerError::Refused(refusal)),
        }
    }
}

pub(super) fn check(to: &[Source]) -> Result<(), Refusal> {
    if (1..=PASSED_ON_MAX).contains(&to.len()) { Ok(()) } else { Err(Refusal::BadRequest) }
}

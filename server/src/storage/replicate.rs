//! Good copies from other storage servers.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use holdfast_common::{
    Block, BlockHash, Refusal,
    net::{
        CallError, Endpoint, Frame, Peers,
        identity::{NodeName, Role},
    },
    wire::{
        codec::{self, CodecError},
        storage::{Source, StorageAnswer, StorageReply, StorageRequest},
    },
};

/// Sources that one request may name.
pub(super) const SOURCES_MAX: usize = 16;
/// How long one source has to send one block.
const SOURCE_DEADLINE: Duration = Duration::from_secs(5);

/// Asks other servers for blocks.
pub(super) struct Fetcher {
    peers: Arc<dyn Peers>,
    me: u32,
}

/// Why another server did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum PeerError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("it refused: {0}")]
    Refused(Refusal),
    #[error("it answered something else")]
    Nonsense,
    #[error("its copy is bad: {0}")]
    Bad(#[from] holdfast_common::HashMismatch),
}

impl Fetcher {
    pub(super) fn new(peers: Arc<dyn Peers>, me: u32) -> Self {
        Self { peers, me }
    }

    /// The block from the first of `sources` that has a good copy.
    pub(super) async fn fetch(&self, hash: BlockHash, sources: &[Source]) -> Option<Block> {
        for source in sources.iter().filter(|source| source.server.0 != self.me) {
            match self.fetch_from(hash, source).await {
                Ok(block) => return Some(block),
                Err(error) => {
                    tracing::warn!(block = %hash, server = %source.server, %error, "cannot fetch a copy from a server");
                }
            }
        }
        tracing::error!(block = %hash, sources = sources.len(), "no source has a good copy");
        None
    }

    async fn fetch_from(&self, hash: BlockHash, source: &Source) -> Result<Block, PeerError> {
        let header = codec::encode(&StorageRequest::Get { block: hash, range: None })?;
        let name = NodeName { role: Role::Storage, id: source.server.0 };
        let to = Endpoint { address: source.address, name };
        let answer = self.peers.call(to, Frame { header, payload: Vec::new() }, SOURCE_DEADLINE).await?;
        match codec::decode::<StorageReply>(&answer.header)?.0 {
            Ok(StorageAnswer::Get { .. }) => Ok(Block::verify(hash, joined(answer.payload))?),
            Ok(_) => Err(PeerError::Nonsense),
            Err(refusal) => Err(PeerError::Refused(refusal)),
        }
    }
}

/// The payload as one; it usually is already.
pub(super) fn joined(mut parts: Vec<Bytes>) -> Bytes {
    match parts.len() {
        0 => Bytes::new(),
        1 => parts.swap_remove(0),
        _ => parts.concat().into(),
    }
}

//! Deleting copies that a server has and is not on record for.

use std::time::Duration;

use holdfast_common::{
    BlockHash, Refusal, ServerId,
    limits::HASH_LIST_MAX,
    net::Peers,
    wire::storage::{StorageAnswer, StorageRequest},
};

use super::{
    committer::{Answer, Proposer},
    core::{Core, ask},
    state::{Command, Reply},
};

/// Blocks that one entry changes.
const BATCH: usize = 1024;
/// Past it the rest is left to the next comparison.
const DURABLE_DEADLINE: Duration = Duration::from_secs(30);
const DELETE_DEADLINE: Duration = Duration::from_secs(30);
/// Questions to a server that does not answer.
const TRIES: usize = 3;
const _: () = assert!(BATCH <= HASH_LIST_MAX);

/// Condemns copies on `server`, and has them deleted there when that is durable. Those that are not known go as garbage; those that
/// are only here too many, at once. What cannot be done now is met again by a comparison, which comes soon then. Returns how many are deleted.
pub async fn delete(
    core: &Core,
    proposer: &Proposer,
    peers: &dyn Peers,
    server: ServerId,
    blocks: &[BlockHash],
) -> usize {
    let mut deleted = 0;
    for batch in blocks.chunks(BATCH) {
        let answer = proposer.propose(Command::CondemnStrays { server, blocks: batch.to_vec() }).await;
        deleted += delete_condemned(core, peers, server, answer).await;
    }
    deleted
}

/// Has copies deleted that `answer` says are condemned on `server`. Returns how many are.
pub async fn delete_condemned(
    core: &Core,
    peers: &dyn Peers,
    server: ServerId,
    answer: Result<Answer, Refusal>,
) -> usize {
    let (position, epoch, blocks) = match answer {
        Ok((position, Ok(Reply::Strays { epoch, condemned }))) if !condemned.is_empty() => (position, epoch, condemned),
        Ok(_) => return 0,
        Err(refusal) => {
            tracing::debug!(%server, %refusal, "copies that nobody needs could not be condemned yet");
            return 0;
        }
    };
    let count = blocks.len();
    let to = core.cluster.lock().endpoint(server);
    let Some(to) = to else { return 0 };
    if core.until_durable(position, DURABLE_DEADLINE).await.is_err() {
        return 0;
    }
    let request = StorageRequest::Delete { blocks, epoch };
    for _ in 0..TRIES {
        match ask(peers, to, &request, DELETE_DEADLINE).await {
            Ok(Ok(StorageAnswer::Deleted { .. })) => {
                tracing::info!(%server, blocks = count, "copies that nobody needs are deleted");
                return count;
            }
            // A server that has just been started anew, say.
            Err(error) => tracing::debug!(%server, %error, "copies that nobody needs could not be deleted yet"),
            Ok(other) => {
                tracing::warn!(%server, ?other, "copies that nobody needs could not be deleted yet");
                break;
            }
        }
    }
    core.compare_soon.lock().insert(server);
    0
}

//! Telling a storage server that is slow from one that is dead, stopped or cut off, while an answer of it is waited for.

use std::time::Duration;

use super::{CallError, Endpoint, Frame, Peers};
use crate::wire::{codec, storage::StorageRequest};

/// An answer that takes longer is asked after.
const PROBE_AFTER: Duration = Duration::from_millis(250);
/// A question that needs no disk is answered within the first, or else the next one within the second: one may get lost, or meet a
/// machine or a network that is very busy. Together a second, for which whoever reads or writes stalls at most.
const PROBE_DEADLINES: [Duration; 2] = [Duration::from_millis(250), Duration::from_millis(500)];

/// Ends when the storage server `to` no longer answers even what needs no disk: questions in a row, as long as it takes.
pub async fn until_mute(peers: &dyn Peers, to: Endpoint) -> CallError {
    loop {
        tokio::time::sleep(PROBE_AFTER).await;
        let [first, second] = PROBE_DEADLINES;
        if probe(peers, to, first).await.is_err()
            && let Err(error) = probe(peers, to, second).await
        {
            return error;
        }
    }
}

async fn probe(peers: &dyn Peers, to: Endpoint, deadline: Duration) -> Result<(), CallError> {
    let probe = StorageRequest::Has { blocks: Vec::new() };
    let header = codec::encode(&probe).map_err(|error| CallError::Malformed(to.address, error.to_string()))?;
    peers.call(to, Frame { header, payload: Vec::new() }, deadline).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::net::{
        BoxFuture,
        identity::{NodeName, Role},
    };

    /// Answers as long as there are answers.
    struct Answers(Mutex<Vec<bool>>);

    impl Peers for Answers {
        fn call(&self, to: Endpoint, _: Frame, deadline: Duration) -> BoxFuture<'_, Result<Frame, CallError>> {
            Box::pin(async move {
                if self.0.lock().expect("no panic").pop() == Some(true) {
                    return Ok(Frame::default());
                }
                tokio::time::sleep(deadline).await;
                Err(CallError::Deadline(to.address, deadline))
            })
        }
    }

    async fn took(mut answers: Vec<bool>) -> Duration {
        answers.reverse();
        let to = Endpoint { address: ([127, 0, 0, 1], 1).into(), name: NodeName { role: Role::Storage, id: 1 } };
        let began = tokio::time::Instant::now();
        let error = until_mute(&Answers(Mutex::new(answers)), to).await;
        assert!(matches!(error, CallError::Deadline(..)));
        began.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn who_misses_two_in_a_row_is_mute_and_nobody_else() {
        let step = Duration::from_millis(250);
        assert_eq!(took(vec![]).await, step * 4);
        assert_eq!(took(vec![true, true]).await, step * 6, "slow, then dead");
        assert_eq!(took(vec![false, true]).await, step * 6, "one was missed, and the next was not");
    }
}

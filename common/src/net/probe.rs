//! Telling a storage server that is slow from one that is dead, stopped or cut off, while an answer of it is waited for.

use std::time::Duration;

use super::{CallError, Endpoint, Frame, Peers};
use crate::wire::{codec, storage::StorageRequest};

/// An answer that takes longer is asked after.
const PROBE_AFTER: Duration = Duration::from_millis(250);
/// A question that needs no disk is answered within this, on any network that mounts can use.
const PROBE_DEADLINE: Duration = Duration::from_millis(250);
/// One may get lost, or meet a machine that is very busy.
const PROBES_MISSED: u32 = 2;
const _: () = assert!(
    PROBE_AFTER.as_millis() + PROBE_DEADLINE.as_millis() * PROBES_MISSED as u128 <= 1000,
    "whoever reads or writes stalls for a second at most"
);

/// Ends when the storage server `to` no longer answers even what needs no disk: questions in a row, as long as it takes.
pub async fn until_mute(peers: &dyn Peers, to: Endpoint) -> CallError {
    loop {
        tokio::time::sleep(PROBE_AFTER).await;
        let mut missed = 0;
        while let Err(error) = probe(peers, to).await {
            missed += 1;
            if missed == PROBES_MISSED {
                return error;
            }
        }
    }
}

async fn probe(peers: &dyn Peers, to: Endpoint) -> Result<(), CallError> {
    let probe = StorageRequest::Has { blocks: Vec::new() };
    let header = codec::encode(&probe).map_err(|error| CallError::Malformed(to.address, error.to_string()))?;
    peers.call(to, Frame { header, payload: Vec::new() }, PROBE_DEADLINE).await.map(drop)
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
        assert_eq!(took(vec![]).await, step * 3);
        assert_eq!(took(vec![true, true]).await, step * 5, "slow, then dead");
        assert_eq!(took(vec![false, true]).await, step * 5, "one was missed, and the next was not");
    }
}

//! After a loss of power: mounts say again what they had done and was lost, and it is done again in its old order (I3).
//!
//! The design is that of Lustre's recovery: until every mount that had a session has spoken, or has been silent for
//! a window, nobody else is answered, so that nobody sees or changes a state that is about to be overtaken.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use holdfast_common::{
    Position, Refusal, Sequence, SessionId,
    wire::meta::{LostChange, Mutated, Replayed},
};

use super::{
    committer::Proposer,
    core::{Core, Fault},
    state::{Command, Outcome, Reply},
};

/// Changes of all mounts together that are kept until it is their turn: bounds this server's memory.
const CHANGES_MAX: usize = 1 << 20;
/// Parts in which a mount tells its changes.
const PARTS_MAX: u32 = 4096;
const TICK: Duration = Duration::from_millis(20);
/// Before a change is tried again for which the committer has no room.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// Who has been heard, and what has to be done again. Pure: time comes in.
#[derive(Debug)]
pub struct Recovery {
    /// What came after this is lost.
    after: Position,
    began: Duration,
    /// How long a mount may be silent.
    window: Duration,
    /// How long one that has been heard may take.
    patience: Duration,
    awaited: BTreeMap<SessionId, Progress>,
    changes: BTreeMap<(Position, SessionId, Sequence), LostChange>,
}

#[derive(Debug, Default)]
struct Progress {
    heard: bool,
    parts: BTreeSet<u32>,
    done: bool,
}

impl Recovery {
    pub fn new(
        after: Position,
        sessions: impl Iterator<Item = SessionId>,
        now: Duration,
        window: Duration,
        patience: Duration,
    ) -> Self {
        let awaited = sessions.map(|session| (session, Progress::default())).collect();
        Self { after, began: now, window, patience, awaited, changes: BTreeMap::new() }
    }

    pub fn after(&self) -> Position {
        self.after
    }

    /// The mount is alive, and about to say what it had done.
    pub fn heard(&mut self, session: SessionId) {
        if let Some(progress) = self.awaited.get_mut(&session) {
            progress.heard = true;
        }
    }

    /// Takes one of `parts` parts of what a mount had done.
    pub fn take(&mut self, session: SessionId, part: u32, parts: u32, changes: Vec<LostChange>) -> Result<(), Refusal> {
        if part >= parts || parts > PARTS_MAX {
            return Err(Refusal::Invalid);
        }
        if self.changes.len() + changes.len() > CHANGES_MAX {
            return Err(Refusal::TooLarge);
        }
        let keyed = changes.into_iter().map(|change| ((change.position, session, change.sequence), change));
        self.changes.extend(keyed);
        let progress = self.awaited.entry(session).or_default();
        progress.heard = true;
        progress.parts.insert(part);
        progress.done = progress.parts.len() == parts as usize;
        Ok(())
    }

    /// Is there nobody left to wait for? `lives`: the session has not ended.
    pub fn is_complete(&self, now: Duration, lives: impl Fn(SessionId) -> bool) -> bool {
        let waited = now.saturating_sub(self.began);
        let settled = |session: SessionId, progress: &Progress| {
            let limit = if progress.heard { self.patience } else { self.window };
            progress.done || waited >= limit || !lives(session)
        };
        self.awaited.iter().all(|(session, progress)| settled(*session, progress))
    }

    /// Sessions that have not said all that they had done.
    fn silent(&self) -> usize {
        self.awaited.values().filter(|progress| !progress.done).count()
    }
}

/// Waits for the mounts, does again what they had done, and lets everybody in.
pub async fn run(core: Arc<Core>, proposer: Proposer) -> Result<(), Fault> {
    while core.is_recovering() && !is_complete(&core) {
        tokio::time::sleep(TICK).await;
    }
    // From here on, what comes too late is done at once, after everything that came in time.
    let Some(recovery) = core.take_recovery() else { return std::future::pending().await };
    let silent = recovery.silent();
    if silent > 0 {
        tracing::warn!(
            mounts = silent,
            "mounts have not been heard since the power was lost: what they had not made durable is lost"
        );
    }
    let (mut done, mut refused) = (0_u64, 0_u64);
    for ((_, session, _), change) in recovery.changes {
        match replay(&proposer, session, change).await {
            Some(Replayed { result: Ok(_), .. }) => done += 1,
            Some(_) => refused += 1,
            None => return std::future::pending().await,
        }
    }
    loop {
        match proposer.propose(Command::EndRecovery).await {
            Ok(_) => break,
            Err(_) => tokio::time::sleep(RETRY_AFTER).await,
        }
    }
    tracing::info!(done, refused, "what mounts had done before the power was lost is done again");
    core.end_recovery();
    std::future::pending().await
}

fn is_complete(core: &Core) -> bool {
    let now = core.clock.monotonic();
    let sessions = core.sessions.lock();
    core.recovery.lock().as_ref().is_none_or(|recovery| recovery.is_complete(now, |session| sessions.exists(session)))
}

/// Does one change again. `None`: the server is stopping.
pub async fn replay(proposer: &Proposer, session: SessionId, change: LostChange) -> Option<Replayed> {
    let LostChange { position, sequence, op, made, time } = change;
    loop {
        let command = Command::Replay { session, sequence, op: op.clone(), made, time };
        match proposer.propose(command).await {
            Ok((now, outcome)) => {
                let result = whole(outcome).map(|()| now);
                if let Err(refusal) = result {
                    tracing::error!(%session, %sequence, was = %position, %refusal, "a change from before the power was lost cannot be made again");
                }
                return Some(Replayed { sequence, result });
            }
            Err(_) if proposer.is_closed() => return None,
            Err(_) => tokio::time::sleep(RETRY_AFTER).await,
        }
    }
}

/// A commit has an answer for each of its files.
fn whole(outcome: Outcome) -> Result<(), Refusal> {
    match outcome? {
        Reply::Mutated(Mutated::Committed(files)) => files.into_iter().try_for_each(|file| file.map(drop)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_common::{Ino, wire::meta::Op};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn recovery(sessions: &[u64]) -> Recovery {
        let sessions = sessions.iter().copied().map(SessionId);
        Recovery::new(Position(10), sessions, 100 * SECOND, 6 * SECOND, 60 * SECOND)
    }

    fn change(position: u64, sequence: u64) -> LostChange {
        let op = Op::Unlink { parent: Ino::ROOT, name: b"a".to_vec() };
        LostChange { position: Position(position), sequence: Sequence(sequence), op, made: None, time: None }
    }

    #[test]
    fn everybody_is_waited_for_the_silent_for_a_window_and_the_slow_for_longer() {
        let mut recovery = recovery(&[1, 2, 3]);
        let is_complete = |recovery: &Recovery, secs: u32| recovery.is_complete(secs * SECOND, |it| it != SessionId(3));
        recovery.take(SessionId(1), 0, 1, Vec::new()).unwrap();
        assert!(!is_complete(&recovery, 101));
        assert!(is_complete(&recovery, 106), "session 2 was silent, session 3 has ended");
        recovery.heard(SessionId(2));
        assert!(!is_complete(&recovery, 159));
        recovery.take(SessionId(2), 1, 2, Vec::new()).unwrap();
        recovery.take(SessionId(2), 1, 2, Vec::new()).unwrap();
        assert!(!is_complete(&recovery, 159), "the same part twice is one part");
        recovery.take(SessionId(2), 0, 2, Vec::new()).unwrap();
        assert!(is_complete(&recovery, 101));
    }

    #[test]
    fn changes_are_in_their_old_order_whoever_tells_them_first_and_once() {
        let mut recovery = recovery(&[1, 2]);
        for _ in 0..2 {
            recovery.take(SessionId(2), 0, 1, vec![change(12, 5), change(14, 6)]).unwrap();
            recovery.take(SessionId(1), 0, 1, vec![change(13, 9), change(11, 8)]).unwrap();
        }
        let order: Vec<u64> = recovery.changes.keys().map(|(position, ..)| position.0).collect();
        assert_eq!(order, [11, 12, 13, 14]);
    }

    #[test]
    fn parts_are_bounded() {
        let mut recovery = recovery(&[1]);
        for (part, parts) in [(0, 0), (1, 1), (0, PARTS_MAX + 1)] {
            assert_eq!(
                recovery.take(SessionId(1), part, parts, Vec::new()),
                Err(Refusal::Invalid),
                "{part} of {parts}"
            );
        }
    }
}

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
    wire::meta::{LostChange, Mutated, Op, Replayed},
};

use super::{
    committer::{Answer, Proposer},
    core::{Core, Fault},
    leases::ChangingNames,
    state::{Command, Reply},
};

/// Bytes, as they came, of changes that are kept until it is their turn: bounds this server's memory.
const BYTES_MAX: usize = 1 << 30;
/// Parts in which a mount tells its changes.
const PARTS_MAX: u32 = 4096;
const TICK: Duration = Duration::from_millis(20);
/// Before a change is tried again for which the committer has no room.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// Who has been heard, and what has to be done again. Pure: time comes in.
#[derive(Debug)]
pub struct Recovery {
    began: Duration,
    /// How long a mount may be silent while everybody waits.
    window: Duration,
    /// How long one that has been heard may take.
    patience: Duration,
    owing: BTreeMap<SessionId, Progress>,
    changes: BTreeMap<(Position, SessionId, Sequence), LostChange>,
    bytes: usize,
    /// What became of the changes, for whoever asks again.
    results: BTreeMap<(SessionId, Sequence), Result<Position, Refusal>>,
}

#[derive(Debug)]
struct Progress {
    /// It owes what it had done after this.
    after: Position,
    heard: bool,
    parts: BTreeSet<u32>,
    /// All parts are here.
    told: bool,
    /// All of it is done again.
    finished: bool,
}

impl Recovery {
    pub fn new(
        owing: impl Iterator<Item = (SessionId, Position)>,
        now: Duration,
        window: Duration,
        patience: Duration,
    ) -> Self {
        let progress = |after| Progress { after, heard: false, parts: BTreeSet::new(), told: false, finished: false };
        let owing = owing.map(|(session, after)| (session, progress(after))).collect();
        let (changes, results) = (BTreeMap::new(), BTreeMap::new());
        Self { began: now, window, patience, owing, changes, bytes: 0, results }
    }

    /// The mount is alive, and about to say what it had done.
    pub fn heard(&mut self, session: SessionId) {
        if let Some(progress) = self.owing.get_mut(&session) {
            progress.heard = true;
        }
    }

    /// Takes one of `parts` parts, of `bytes`, of what a mount had done. Refused if it owes nothing.
    pub fn take(
        &mut self,
        session: SessionId,
        (part, parts): (u32, u32),
        changes: Vec<LostChange>,
        bytes: usize,
    ) -> Result<(), Refusal> {
        let progress = self.owing.get_mut(&session).ok_or(Refusal::Invalid)?;
        if part >= parts || parts > PARTS_MAX || changes.iter().any(|change| change.position <= progress.after) {
            return Err(Refusal::Invalid);
        }
        if progress.told || progress.parts.contains(&part) {
            return Ok(());
        }
        if self.bytes + bytes > BYTES_MAX {
            return Err(Refusal::TooLarge);
        }
        self.bytes += bytes;
        progress.heard = true;
        progress.parts.insert(part);
        progress.told = progress.parts.len() == parts as usize;
        self.changes.extend(changes.into_iter().map(|change| ((change.position, session, change.sequence), change)));
        Ok(())
    }

    /// Is there nobody left to wait for? `lives`: the session has not ended.
    pub fn is_complete(&self, now: Duration, lives: impl Fn(SessionId) -> bool) -> bool {
        let waited = now.saturating_sub(self.began);
        let settled = |session: SessionId, progress: &Progress| {
            let limit = if progress.heard { self.patience } else { self.window };
            progress.told || waited >= limit || !lives(session)
        };
        self.owing.iter().all(|(session, progress)| settled(*session, progress))
    }

    /// Mounts that have told everything that is not done again yet, and what that is, in its old order.
    fn take_told(&mut self) -> (Vec<SessionId>, Vec<(SessionId, LostChange)>) {
        let told: Vec<SessionId> = self
            .owing
            .iter()
            .filter(|(_, progress)| progress.told && !progress.finished)
            .map(|(session, _)| *session)
            .collect();
        let (ready, rest) =
            std::mem::take(&mut self.changes).into_iter().partition(|((_, session, _), _)| told.contains(session));
        self.changes = rest;
        if self.changes.is_empty() {
            self.bytes = 0;
        }
        let ready: BTreeMap<_, LostChange> = ready;
        (told, ready.into_iter().map(|((_, session, _), change)| (session, change)).collect())
    }

    fn note(&mut self, session: SessionId, sequence: Sequence, result: Result<Position, Refusal>) {
        self.results.insert((session, sequence), result);
    }

    fn finish(&mut self, sessions: &[SessionId]) {
        for session in sessions {
            if let Some(progress) = self.owing.get_mut(session) {
                progress.finished = true;
            }
        }
    }

    /// What became of these changes of a mount, when all of its are done again.
    pub fn answer(&self, session: SessionId, sequences: &[Sequence]) -> Option<Vec<Replayed>> {
        self.owing.get(&session).filter(|progress| progress.finished)?;
        let result = |sequence: &Sequence| {
            let result = self.results.get(&(session, *sequence)).copied().unwrap_or(Err(Refusal::Invalid));
            Replayed { sequence: *sequence, result }
        };
        Some(sequences.iter().map(result).collect())
    }

    /// Mounts that have not said all that they had done.
    fn silent(&self) -> usize {
        self.owing.values().filter(|progress| !progress.told).count()
    }
}

/// Waits for the mounts, does again what they had done, and lets everybody in. Mounts that come later have theirs done then.
pub async fn run(core: Arc<Core>, proposer: Proposer) -> Result<(), Fault> {
    let redo = Redo { core, proposer };
    if redo.core.is_recovering() && redo.everybody().await.is_none() {
        return std::future::pending().await;
    }
    loop {
        redo.core.replays_wanted.notified().await;
        if redo.told().await.is_none() {
            return std::future::pending().await;
        }
    }
}

struct Redo {
    core: Arc<Core>,
    proposer: Proposer,
}

impl Redo {
    /// `None`: the server is stopping.
    async fn everybody(&self) -> Option<()> {
        while !self.is_complete() {
            tokio::time::sleep(TICK).await;
        }
        let silent = self.core.recovery.lock().silent();
        if silent > 0 {
            tracing::warn!(mounts = silent, "mounts have not been heard since the power was lost");
        }
        let told = self.redo().await?;
        self.record(Command::EndRecovery).await?;
        self.core.sessions.lock().hear_all(self.core.clock.monotonic());
        self.core.recovery.lock().finish(&told);
        self.core.end_recovery();
        Some(())
    }

    async fn told(&self) -> Option<()> {
        let told = self.redo().await?;
        self.core.recovery.lock().finish(&told);
        self.core.note_replayed();
        Some(())
    }

    fn is_complete(&self) -> bool {
        let now = self.core.clock.monotonic();
        let sessions = self.core.sessions.lock();
        self.core.recovery.lock().is_complete(now, |session| sessions.exists(session))
    }

    /// Does again what has been told, and returns by whom.
    async fn redo(&self) -> Option<Vec<SessionId>> {
        let (told, changes) = self.core.recovery.lock().take_told();
        let (mut done, mut refused) = (0_u64, 0_u64);
        for (session, change) in changes {
            let sequence = change.sequence;
            let result = self.replay(session, change).await?;
            *if result.is_ok() { &mut done } else { &mut refused } += 1;
            self.core.recovery.lock().note(session, sequence, result);
        }
        for session in &told {
            self.record(Command::Settled { session: *session }).await?;
            self.core.sessions.lock().settle(*session);
        }
        if !told.is_empty() {
            tracing::info!(
                mounts = told.len(),
                done,
                refused,
                "what mounts had done before the power was lost is done again"
            );
        }
        Some(told)
    }

    async fn replay(&self, session: SessionId, change: LostChange) -> Option<Result<Position, Refusal>> {
        let LostChange { position: was, sequence, op, made, time } = change;
        // One that comes late meets mounts that have leases by now.
        let _changing = self.begin_change(session, &op).await?;
        let (position, outcome) = self.decree(Command::Replay { session, sequence, op, made, time }).await?;
        if let Err(refusal) = &outcome {
            tracing::error!(%session, %sequence, %was, %refusal, "a change from before the power was lost cannot be made again");
        }
        if let Ok(Reply::Mutated(Mutated::Committed(files))) = &outcome {
            for refusal in files.iter().filter_map(|file| file.as_ref().err()) {
                tracing::warn!(%session, %sequence, %was, %refusal, "a file of a commit is not as it was before the power was lost");
            }
        }
        Some(outcome.map(|_| position))
    }

    /// Waits until names may be changed. `None`: the server is stopping.
    async fn begin_change(&self, session: SessionId, op: &Op) -> Option<Option<ChangingNames>> {
        loop {
            match self.core.begin_change(session, op).await {
                Ok(changing) => return Some(changing),
                Err(_) if self.proposer.is_closed() => return None,
                Err(_) => tokio::time::sleep(RETRY_AFTER).await,
            }
        }
    }

    /// Of what cannot be refused.
    async fn record(&self, command: Command) -> Option<()> {
        let (_, outcome) = self.decree(command).await?;
        if let Err(refusal) = outcome {
            tracing::error!(%refusal, "the progress of a recovery could not be recorded");
        }
        Some(())
    }

    /// Proposes until there is room. `None`: the server is stopping.
    async fn decree(&self, command: Command) -> Option<Answer> {
        loop {
            match self.proposer.propose(command.clone()).await {
                Ok(answer) => return Some(answer),
                Err(_) if self.proposer.is_closed() => return None,
                Err(_) => tokio::time::sleep(RETRY_AFTER).await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use holdfast_common::Ino;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn recovery(sessions: &[u64]) -> Recovery {
        let owing = sessions.iter().map(|session| (SessionId(*session), Position(10)));
        Recovery::new(owing, 100 * SECOND, 6 * SECOND, 60 * SECOND)
    }

    fn change(position: u64, sequence: u64) -> LostChange {
        let op = Op::Unlink { parent: Ino::ROOT, name: b"a".to_vec() };
        LostChange { position: Position(position), sequence: Sequence(sequence), op, made: None, time: None }
    }

    #[test]
    fn everybody_is_waited_for_the_silent_for_a_window_and_the_slow_for_longer() {
        let mut recovery = recovery(&[1, 2, 3]);
        let is_complete = |recovery: &Recovery, secs: u32| recovery.is_complete(secs * SECOND, |it| it != SessionId(3));
        recovery.take(SessionId(1), (0, 1), Vec::new(), 0).unwrap();
        assert!(!is_complete(&recovery, 101));
        assert!(is_complete(&recovery, 106), "session 2 was silent, session 3 has ended");
        recovery.heard(SessionId(2));
        assert!(!is_complete(&recovery, 159));
        recovery.take(SessionId(2), (1, 2), Vec::new(), 0).unwrap();
        recovery.take(SessionId(2), (1, 2), Vec::new(), 0).unwrap();
        assert!(!is_complete(&recovery, 159), "the same part twice is one part");
        recovery.take(SessionId(2), (0, 2), Vec::new(), 0).unwrap();
        assert!(is_complete(&recovery, 101));
    }

    #[test]
    fn changes_are_in_their_old_order_whoever_tells_them_first_and_once() {
        let mut recovery = recovery(&[1, 2, 3]);
        for _ in 0..2 {
            recovery.take(SessionId(2), (0, 1), vec![change(12, 5), change(14, 6)], 9).unwrap();
            recovery.take(SessionId(1), (0, 1), vec![change(13, 9), change(11, 8)], 9).unwrap();
            recovery.take(SessionId(3), (0, 2), vec![change(15, 1)], 9).unwrap();
        }
        assert_eq!(recovery.bytes, 27);
        let (told, changes) = recovery.take_told();
        let order: Vec<u64> = changes.iter().map(|(_, change)| change.position.0).collect();
        assert_eq!((told, order), (vec![SessionId(1), SessionId(2)], vec![11, 12, 13, 14]));
        assert_eq!(recovery.answer(SessionId(1), &[]), None, "not done yet");
        recovery.note(SessionId(1), Sequence(8), Ok(Position(20)));
        recovery.finish(&[SessionId(1), SessionId(2)]);
        let answer = recovery.answer(SessionId(1), &[Sequence(8)]).unwrap();
        assert_eq!(answer, [Replayed { sequence: Sequence(8), result: Ok(Position(20)) }]);
        assert_eq!(recovery.take_told().0, [], "once");
        recovery.take(SessionId(3), (1, 2), vec![], 0).unwrap();
        assert_eq!(recovery.take_told().1.len(), 1);
    }

    #[test]
    fn only_what_is_owed_is_taken() {
        let mut recovery = recovery(&[1]);
        for (part, parts) in [(0, 0), (1, 1), (0, PARTS_MAX + 1)] {
            let taken = recovery.take(SessionId(1), (part, parts), Vec::new(), 0);
            assert_eq!(taken, Err(Refusal::Invalid), "{part} of {parts}");
        }
        assert_eq!(recovery.take(SessionId(2), (0, 1), Vec::new(), 0), Err(Refusal::Invalid), "it owes nothing");
        let old = recovery.take(SessionId(1), (0, 1), vec![change(10, 1)], 0);
        assert_eq!(old, Err(Refusal::Invalid), "it was not lost");
        assert_eq!(recovery.take(SessionId(1), (0, 1), Vec::new(), BYTES_MAX + 1), Err(Refusal::TooLarge));
    }
}

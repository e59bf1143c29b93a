//! The one that applies entries: takes all that wait, applies them in one transaction, logs them, answers all.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use holdfast_common::{
    Attr, Ino, Position, Refusal, SessionId, Time,
    planted::{Bug, is_planted},
    wire::meta::{Lease, Mutated, Op},
    work,
};
use tokio::sync::{mpsc, oneshot};

use super::{
    core::{Core, Fault},
    leases::ChangingNames,
    log::{Log, RECORD_LENGTH_MAX},
    recent::changes_of,
    state::{Applied, Command, Entry, Outcome, Reply, Rows, apply, query},
};

/// A clock that is behind by more seconds has been set back; by less, it is only being adjusted.
const SET_BACK_SECS: i64 = 1;

/// Proposals that wait; more make their senders wait.
const QUEUE_MAX: usize = 4096;
/// Entries, and their bytes, in one batch.
const BATCH_ENTRIES_MAX: usize = 1024;
const BATCH_BYTES_MAX: usize = RECORD_LENGTH_MAX / 2;
/// How long a checkpoint may hold up mutations while it waits for its barrier.
const CHECKPOINT_BARRIER_TIMEOUT: Duration = Duration::from_secs(2);
/// Wait before a checkpoint is tried again whose barrier did not come, in bytes of further log.
const CHECKPOINT_RETRY_BYTES: u64 = 8 << 20;

/// The position of an entry, and its answer.
pub type Answer = (Position, Outcome);

/// What came of a command.
#[derive(Debug)]
pub struct Changed {
    pub position: Position,
    pub outcome: Outcome,
    /// The directories whose entries it changes, as they were right after it.
    pub directories: Vec<Attr>,
    /// That its session has by it.
    pub leases: Vec<Lease>,
}

struct Proposal {
    command: Command,
    condition: Condition,
    asker: Asker,
}

/// Who waits for what comes of a command.
struct Asker {
    answer: oneshot::Sender<Result<Changed, Refusal>>,
    /// Until then, though whoever asked may have gone away.
    changing: Option<ChangingNames>,
}

impl Asker {
    fn refuse(self, refusal: Refusal) {
        let _gone = self.answer.send(Err(refusal));
    }
}

/// What must still be so when it is a command's turn.
#[derive(Clone, Copy)]
enum Condition {
    Always,
    /// The session has not been heard for so long.
    Silent(SessionId, Duration),
}

#[expect(
    clippy::large_enum_variant,
    reason = "nearly every message is the large one: a box would be one more allocation"
)]
enum Message {
    Propose(Proposal),
    /// Make everything durable, put it into the tables, and end.
    Stop,
}

/// Where commands are proposed.
#[derive(Clone, Debug)]
pub struct Proposer(mpsc::Sender<Message>);

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Propose(_) => "Propose",
            Self::Stop => "Stop",
        })
    }
}

/// A command that has its place in the order.
#[derive(Debug)]
pub struct Begun(oneshot::Receiver<Result<Changed, Refusal>>);

impl Begun {
    pub async fn ended(self) -> Result<Changed, Refusal> {
        self.0.await.map_err(|_| Refusal::Unavailable)?
    }
}

impl Proposer {
    /// Applies `command` in order. `Unavailable`: the server is stopping, or cannot take it now; it was not applied.
    pub async fn propose(&self, command: Command) -> Result<Answer, Refusal> {
        self.change(command, None).await.map(|changed| (changed.position, changed.outcome))
    }

    /// As [`Proposer::propose`], of a command that changes names, if it is `changing` some, and says more.
    pub async fn change(&self, command: Command, changing: Option<ChangingNames>) -> Result<Changed, Refusal> {
        self.begin(command, changing).await?.ended().await
    }

    /// As [`Proposer::change`], without waiting for what comes of it: what is begun after this is applied after it.
    pub async fn begin(&self, command: Command, changing: Option<ChangingNames>) -> Result<Begun, Refusal> {
        self.begin_if(Condition::Always, command, changing).await
    }

    /// Will nothing be applied any more?
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Ends a session, if it has not been heard for `timeout` when it is this command's turn.
    pub async fn expire(&self, session: SessionId, timeout: Duration) -> Result<Answer, Refusal> {
        let condition = Condition::Silent(session, timeout);
        let begun = self.begin_if(condition, Command::EndSession { session }, None).await?;
        begun.ended().await.map(|changed| (changed.position, changed.outcome))
    }

    async fn begin_if(
        &self,
        condition: Condition,
        command: Command,
        changing: Option<ChangingNames>,
    ) -> Result<Begun, Refusal> {
        let (answer, answered) = oneshot::channel();
        let proposal = Message::Propose(Proposal { command, condition, asker: Asker { answer, changing } });
        self.0.send(proposal).await.map_err(|_| Refusal::Unavailable)?;
        Ok(Begun(answered))
    }

    /// After everything proposed before: a last barrier and a checkpoint, then the committer ends.
    pub async fn stop(&self) {
        // It can only fail when the committer has ended already.
        let _ended = self.0.send(Message::Stop).await;
    }
}

#[derive(Debug)]
pub struct Committer {
    core: Arc<Core>,
    queue: mpsc::Receiver<Message>,
    checkpoint_log_bytes: u64,
    next_checkpoint_at: u64,
    /// Entries never go back in time, whatever the clock does.
    time: Time,
}

impl Committer {
    pub fn new(core: Arc<Core>, checkpoint_log_bytes: u64) -> (Self, Proposer) {
        let (sender, queue) = mpsc::channel(QUEUE_MAX);
        let next_checkpoint_at = checkpoint_log_bytes;
        let committer = Self { core, queue, checkpoint_log_bytes, next_checkpoint_at, time: Time::default() };
        (committer, Proposer(sender))
    }

    /// Runs until it is stopped, or can no longer keep its promises.
    pub async fn run(mut self) -> Result<(), Fault> {
        let mut waiting = Vec::new();
        while self.queue.recv_many(&mut waiting, 1).await > 0 {
            // Let whoever is about to propose do so: one batch for all costs little more than one for the first.
            tokio::task::yield_now().await;
            while waiting.len() < BATCH_ENTRIES_MAX
                && let Ok(message) = self.queue.try_recv()
            {
                waiting.push(message);
            }
            let stop = self.commit_all(waiting.drain(..))?;
            let length = self.core.log.lock().length();
            if stop {
                return self.stop(length).await;
            }
            if length >= self.next_checkpoint_at {
                self.checkpoint(length).await?;
            }
        }
        Ok(())
    }

    /// `true`: somebody asked to stop.
    fn commit_all(&mut self, messages: impl Iterator<Item = Message>) -> Result<bool, Fault> {
        let mut batch = Batch::default();
        let mut stop = false;
        for message in messages {
            match message {
                Message::Stop => stop = true,
                Message::Propose(proposal) => self.admit(proposal, &mut batch)?,
            }
        }
        self.commit(batch)?;
        Ok(stop)
    }

    fn admit(&mut self, proposal: Proposal, batch: &mut Batch) -> Result<(), Fault> {
        let Proposal { mut command, condition, asker } = proposal;
        if let Err(refusal) = self.hold_true(condition).and_then(|()| self.check(&mut command)) {
            asker.refuse(refusal);
            return Ok(());
        }
        self.time = stamp(self.time, self.core.clock.now());
        let entry = Entry { time: self.time, command };
        match Log::encode(&entry) {
            Err(_) => asker.refuse(Refusal::TooLarge),
            Ok(bytes) => {
                if batch.bytes + bytes.len() > BATCH_BYTES_MAX {
                    self.commit(std::mem::take(batch))?;
                }
                batch.bytes += bytes.len();
                batch.proposed.push((entry, bytes, asker));
            }
        }
        Ok(())
    }

    fn hold_true(&self, condition: Condition) -> Result<(), Refusal> {
        let now = self.core.judging_time();
        match condition {
            Condition::Silent(session, timeout) if !self.core.sessions.lock().is_expired(session, now, timeout) => {
                Err(Refusal::Unavailable)
            }
            Condition::Silent(..) | Condition::Always => Ok(()),
        }
    }

    /// What depends on this server's memory, and so must be settled before the entry exists.
    fn check(&self, command: &mut Command) -> Result<(), Refusal> {
        match command {
            Command::Mutate { op, .. } if op.grows() && self.core.full.load(Ordering::Relaxed) => Err(Refusal::NoSpace),
            Command::Mutate { op, .. } if !op.new_blocks().is_empty() && self.core.unsynced.lock().is_full() => {
                self.core.barrier_wanted.notify_one();
                Err(Refusal::Unavailable)
            }
            Command::OpenSession { .. } if self.core.sessions.lock().is_full() => {
                tracing::warn!("there are as many sessions as there may be: a mount is refused");
                Err(Refusal::Unavailable)
            }
            Command::Mutate { session, op: Op::Make { open: true, .. } | Op::MakeUnnamed { .. }, .. } => {
                self.core.sessions.lock().admit_opens(*session, 1)
            }
            Command::Reclaim { inos } => {
                let sessions = self.core.sessions.lock();
                inos.retain(|ino| !sessions.is_open(*ino));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn commit(&mut self, batch: Batch) -> Result<(), Fault> {
        if batch.proposed.is_empty() {
            return Ok(());
        }
        let core = &self.core;
        let (applied, epoch) = core.store.write_visible(|tables| {
            let mut applied = Vec::with_capacity(batch.proposed.len());
            for (entry, ..) in &batch.proposed {
                let result = apply(tables, entry)?;
                applied.push((result, query::attrs(tables, &entry.command.directories())?));
            }
            log_changes(core, &batch, &applied)?;
            Ok::<_, Fault>((applied, Rows::counters(tables).epoch))
        })?;
        core.set_applied(Position(core.log.lock().next().0 - 1), epoch);
        for ((entry, _, asker), (applied, directories)) in batch.proposed.into_iter().zip(applied) {
            self.remember(&entry.command, &applied);
            let leases = self.lease(&entry.command, &applied);
            let Applied { position, outcome, .. } = applied;
            drop(asker.changing);
            // Whoever asked may have gone away; the entry stands.
            let _gone = asker.answer.send(Ok(Changed { position, outcome, directories, leases }));
        }
        Ok(())
    }

    /// What this server must know at once, before anything else can happen to it.
    fn remember(&self, command: &Command, applied: &Applied) {
        let (session, op) = match command {
            Command::Mutate { session, op, .. } | Command::Replay { session, op, .. } => (session, op),
            Command::OpenSession { node, host, mountpoint, .. } => {
                // Before it is durable: who gives up waiting for that leaves a session that expires like any other.
                if let Ok(Reply::Session(session)) = applied.outcome {
                    let now = self.core.clock.monotonic();
                    let mut sessions = self.core.sessions.lock();
                    sessions.opened(session, *node, host.clone(), mountpoint.clone(), now);
                    sessions.begin(session, applied.position);
                }
                return;
            }
            Command::EndSession { session } => {
                self.core.sessions.lock().end(*session);
                return self.core.locking.end(*session);
            }
            _ => return,
        };
        if let (true, Ok(Reply::Mutated(outcome))) = (applied.changed, &applied.outcome) {
            let now = self.core.clock.monotonic();
            self.core.recent.lock().note(applied.position, *session, changes_of(op, outcome), now);
        }
        match (op, &applied.outcome) {
            (op, Ok(_)) if applied.changed && !op.new_blocks().is_empty() => {
                self.core.unsynced.lock().note(op.new_blocks());
                // Stored again: whoever does that may need time for more.
                self.core.vanished.lock().clear();
            }
            (
                Op::Make { open: true, .. } | Op::PlaceOpen { .. } | Op::MakeUnnamed { .. },
                Ok(Reply::Mutated(Mutated::Inode { attr, .. })),
            ) => {
                self.hold_open(*session, attr.ino);
            }
            _ => {}
        }
    }

    /// In the order of the changes: whoever makes a directory has a lease on it before anybody else can have changed it.
    fn lease(&self, command: &Command, applied: &Applied) -> Vec<Lease> {
        let (Command::Mutate { session, op, .. }, true, Ok(Reply::Mutated(outcome))) =
            (command, applied.changed, &applied.outcome)
        else {
            return Vec::new();
        };
        let directories = op.directories();
        if directories.is_empty() {
            return Vec::new();
        }
        let (made, now) = (op.made_directory(outcome), self.core.clock.monotonic());
        let mut leases = self.core.leases.applied(*session, &directories, made, now);
        if self.core.full.load(Ordering::Relaxed) {
            // What a mount's programs have been told is made cannot be refused: so they are not told any more.
            leases.iter_mut().for_each(|lease| lease.sole = 0);
        }
        leases
    }

    fn hold_open(&self, session: SessionId, ino: Ino) {
        if let Err(refusal) = self.core.sessions.lock().hold_made(session, ino) {
            tracing::warn!(%session, %ino, %refusal, "a new file is not on record as open");
        }
    }

    /// Leaves nothing to be lost, if that can be had in time.
    async fn stop(&mut self, length: u64) -> Result<(), Fault> {
        if self.checkpoint(length).await? {
            let core = Arc::clone(&self.core);
            work::run(move || core.log.lock().close()).await.map_err(|_| Fault::Thread)??;
        }
        Ok(())
    }

    /// Puts everything into the tables, on stable storage, and begins a new log. Nothing is applied meanwhile, so that
    /// the tables never get ahead of what a barrier has covered (I3). `false`: the barrier could not be had.
    async fn checkpoint(&mut self, length: u64) -> Result<bool, Fault> {
        let core = Arc::clone(&self.core);
        let position = core.applied();
        if !is_planted(Bug::CheckpointUncovered)
            && core.until_durable(position, CHECKPOINT_BARRIER_TIMEOUT).await.is_err()
        {
            tracing::warn!(%position, "no checkpoint: what it would contain is not durable yet");
            self.next_checkpoint_at = length + CHECKPOINT_RETRY_BYTES;
            return Ok(false);
        }
        let started = core.clock.monotonic();
        let checkpointed = Arc::clone(&core);
        work::run(move || {
            checkpointed.store.checkpoint()?;
            checkpointed.log.lock().rotate()?;
            Ok::<(), Fault>(())
        })
        .await
        .map_err(|_| Fault::Thread)??;
        self.next_checkpoint_at = self.checkpoint_log_bytes;
        tracing::info!(%position, log_bytes = length, took = ?core.clock.monotonic().saturating_sub(started), "checkpoint");
        Ok(true)
    }
}

/// The time of the next entry: not before that of the last one, unless the clock has been set back.
fn stamp(last: Time, now: Time) -> Time {
    if last.secs.saturating_sub(now.secs) > SET_BACK_SECS { now } else { last.max(now) }
}

#[derive(Default)]
struct Batch {
    /// Each with its bytes for the log.
    proposed: Vec<(Entry, Vec<u8>, Asker)>,
    bytes: usize,
}

/// Appends what changed the tables, in the order in which it did.
fn log_changes(core: &Core, batch: &Batch, applied: &[(Applied, Vec<Attr>)]) -> Result<(), Fault> {
    let changed = || batch.proposed.iter().zip(applied).filter(|(_, (applied, _))| applied.changed);
    let Some((_, (first, _))) = changed().next() else { return Ok(()) };
    let entries: Vec<&[u8]> = changed().map(|((_, bytes, _), _)| bytes.as_slice()).collect();
    core.note_logged(entries.iter().map(|entry| entry.len() as u64).sum());
    let position = core.log.lock().append(&entries)?;
    if position != first.position {
        return Err(Fault::Diverged { log: position, database: first.position });
    }
    Ok(())
}

#[cfg(test)]
mod stamp_tests {
    use super::*;

    #[test]
    fn times_do_not_go_back_unless_the_clock_is_set_back() {
        let at = |secs, nanos| Time { secs, nanos };
        assert_eq!(stamp(at(100, 5), at(100, 7)), at(100, 7));
        assert_eq!(stamp(at(100, 5), at(99, 0)), at(100, 5), "adjusted");
        assert_eq!(stamp(at(100, 5), at(98, 9)), at(98, 9), "set back: what is written now is not of the future");
    }
}

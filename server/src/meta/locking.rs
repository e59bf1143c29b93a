//! Advisory locks between mounts, and what mounts are told of them. Time comes in.
//!
//! This is memory, not state: after a restart the mounts tell again what they hold. Until all have, or have been silent for the
//! grace, nobody gets a new lock; one that comes later finds what others may have taken meanwhile.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use holdfast_common::{
    Ino, Refusal, Sequence, SessionId,
    limits::{EVENTS_MAX, RELOCK_MAX, REPLIES_KEPT_PER_SESSION},
    locks::{Lock, LockClass, LockKind, LockOwner, LockRange, LockTable, Ticket, Verdict},
};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// What is asked of one file's locks, see `LockRequest::Set`.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    pub ino: Ino,
    pub class: LockClass,
    pub owner: u64,
    pub range: LockRange,
    pub kind: Option<LockKind>,
    pub pid: u32,
    pub wait: bool,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Granted,
    Held(Lock),
    Waiting,
}

#[derive(Debug)]
pub struct Locking {
    state: Mutex<State>,
    /// By the server's clock.
    grace_ends: Duration,
}

#[derive(Debug, Default)]
struct State {
    table: LockTable,
    mounts: BTreeMap<SessionId, Mount>,
}

#[derive(Debug, Default)]
struct Mount {
    /// Below this everything has been answered.
    answered_below: u64,
    answers: BTreeMap<u64, Result<Outcome, Refusal>>,
    /// Tickets that were granted, each with the number of its event.
    events: VecDeque<(u64, Sequence)>,
    event_count: u64,
    news: Arc<Notify>,
}

impl Locking {
    pub fn new(grace_ends: Duration) -> Self {
        Self { state: Mutex::default(), grace_ends }
    }

    /// May locks be given to who did not have them before? Not while somebody may come who had.
    pub fn is_open(&self, all_confirmed: bool, now: Duration) -> bool {
        all_confirmed || now >= self.grace_ends
    }

    /// Executes a wish once: asked again under the same sequence it has the same outcome.
    pub fn set(
        &self,
        session: SessionId,
        sequence: Sequence,
        answered_below: Sequence,
        wish: &Wish,
    ) -> Result<Outcome, Refusal> {
        if !wish.range.is_valid() {
            return Err(Refusal::Invalid);
        }
        let mut state = self.state.lock();
        let mount = state.mounts.entry(session).or_default();
        mount.forget_below(answered_below.0);
        if let Some(known) = mount.answers.get(&sequence.0) {
            return *known;
        }
        let fits = sequence.0 - mount.answered_below.min(sequence.0) < REPLIES_KEPT_PER_SESSION;
        if sequence.0 < mount.answered_below || !fits {
            return Err(Refusal::BadRequest);
        }
        let outcome = state.execute(session, sequence, wish);
        state.mounts.entry(session).or_default().answers.insert(sequence.0, outcome);
        state.tell_woken();
        outcome
    }

    /// Stops waiting: `false`, if the lock is granted and its mount has not heard of that yet. Asked again it says the same.
    pub fn cancel(&self, session: SessionId, ticket: Sequence) -> bool {
        let mut state = self.state.lock();
        state.table.cancel(Ticket { session, number: ticket.0 });
        let granted = |mount: &Mount| mount.events.iter().any(|(_, granted)| *granted == ticket);
        !state.mounts.get(&session).is_some_and(granted)
    }

    pub fn test(&self, session: SessionId, wish: &Wish) -> Result<Option<Lock>, Refusal> {
        let kind = wish.kind.filter(|_| wish.range.is_valid()).ok_or(Refusal::Invalid)?;
        Ok(self.state.lock().table.test(wish.ino, &wish.lock(session, kind)))
    }

    /// Takes back what a mount held in the server's last life. Returns the files of which something is lost: all, if it comes so late
    /// that somebody may have had the locks in between.
    pub fn restore(&self, session: SessionId, locks: Vec<(Ino, Lock)>, in_time: bool) -> Result<Vec<Ino>, Refusal> {
        if locks.len() > RELOCK_MAX || locks.iter().any(|(_, lock)| !lock.range.is_valid()) {
            return Err(Refusal::BadRequest);
        }
        let mut state = self.state.lock();
        let mut lost = Vec::new();
        for (ino, lock) in locks {
            let lock = Lock { owner: LockOwner { session, ..lock.owner }, ..lock };
            // Told twice, it has been kept.
            let kept = state.table.is_held(ino, &lock) || (in_time && state.table.restore(ino, lock));
            if !kept {
                tracing::warn!(%session, %ino, "a mount came too late to keep a lock that it held");
                lost.push(ino);
            }
        }
        lost.dedup();
        Ok(lost)
    }

    /// Everything that the session held is free.
    pub fn end(&self, session: SessionId) {
        let mut state = self.state.lock();
        state.table.end_session(session);
        if let Some(mount) = state.mounts.remove(&session) {
            mount.news.notify_waiters();
        }
        state.tell_woken();
    }

    /// What the mount has to be told after event `heard`, if anything within `patience`.
    pub async fn events(&self, session: SessionId, heard: u64, patience: Duration) -> Vec<(u64, Sequence)> {
        let news = Arc::clone(&self.state.lock().mounts.entry(session).or_default().news);
        let told = news.notified();
        tokio::pin!(told);
        told.as_mut().enable();
        let waiting = self.events_after(session, heard);
        if !waiting.is_empty() {
            return waiting;
        }
        // Whether news came or patience ended, what there is says.
        let _news = tokio::time::timeout(patience, told).await;
        self.events_after(session, heard)
    }

    fn events_after(&self, session: SessionId, heard: u64) -> Vec<(u64, Sequence)> {
        let mut state = self.state.lock();
        let Some(mount) = state.mounts.get_mut(&session) else { return Vec::new() };
        mount.events.retain(|(number, _)| *number > heard);
        mount.events.iter().take(EVENTS_MAX).copied().collect()
    }
}

impl Wish {
    fn lock(&self, session: SessionId, kind: LockKind) -> Lock {
        Lock { owner: self.owner(session), range: self.range, kind, pid: self.pid }
    }

    fn owner(&self, session: SessionId) -> LockOwner {
        LockOwner { session, class: self.class, id: self.owner }
    }
}

impl State {
    fn execute(&mut self, session: SessionId, sequence: Sequence, wish: &Wish) -> Result<Outcome, Refusal> {
        let Some(kind) = wish.kind else {
            self.table.unlock(wish.ino, wish.owner(session), wish.range);
            return Ok(Outcome::Granted);
        };
        let ticket = wish.wait.then_some(Ticket { session, number: sequence.0 });
        match self.table.lock(wish.ino, wish.lock(session, kind), ticket) {
            Verdict::Granted => Ok(Outcome::Granted),
            Verdict::Blocked(lock) => Ok(Outcome::Held(lock)),
            Verdict::Waiting => Ok(Outcome::Waiting),
            Verdict::Deadlock => Err(Refusal::Deadlock),
            Verdict::TooMany => Err(Refusal::TooManyLocks),
        }
    }

    fn tell_woken(&mut self) {
        for Ticket { session, number } in self.table.take_woken() {
            let Some(mount) = self.mounts.get_mut(&session) else { continue };
            mount.event_count += 1;
            mount.events.push_back((mount.event_count, Sequence(number)));
            mount.news.notify_waiters();
        }
    }
}

impl Mount {
    fn forget_below(&mut self, answered_below: u64) {
        if answered_below > self.answered_below {
            self.answered_below = answered_below;
            self.answers = self.answers.split_off(&answered_below);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);

    fn wish(kind: Option<LockKind>, wait: bool) -> Wish {
        let (class, range) = (LockClass::Process, LockRange::WHOLE);
        Wish { ino: Ino(7), class, owner: 1, range, kind, pid: 1, wait }
    }

    fn set(locking: &Locking, session: SessionId, sequence: u64, wish: &Wish) -> Result<Outcome, Refusal> {
        locking.set(session, Sequence(sequence), Sequence(1), wish)
    }

    const TAKE: Option<LockKind> = Some(LockKind::Exclusive);

    #[test]
    fn a_wish_is_executed_once_however_often_it_arrives() {
        let locking = Locking::new(Duration::ZERO);
        let take = wish(TAKE, false);
        assert_eq!(set(&locking, A, 1, &take), Ok(Outcome::Granted));
        assert_eq!(set(&locking, A, 2, &wish(None, false)), Ok(Outcome::Granted));
        assert_eq!(set(&locking, A, 1, &take), Ok(Outcome::Granted), "its answer was lost");
        assert_eq!(set(&locking, B, 1, &take), Ok(Outcome::Granted), "an old message took the lock again");
        assert_eq!(locking.set(A, Sequence(3), Sequence(3), &wish(None, false)), Ok(Outcome::Granted));
        assert_eq!(set(&locking, A, 2, &take), Err(Refusal::BadRequest), "answered long ago");
        assert_eq!(set(&locking, A, 1 << 40, &take), Err(Refusal::BadRequest));
    }

    #[tokio::test]
    async fn who_waits_is_told_until_it_has_heard() {
        let locking = Locking::new(Duration::ZERO);
        assert_eq!(set(&locking, A, 1, &wish(TAKE, true)), Ok(Outcome::Granted));
        assert_eq!(set(&locking, B, 1, &wish(TAKE, true)), Ok(Outcome::Waiting));
        assert_eq!(locking.events(B, 0, Duration::ZERO).await, []);
        let listening = locking.events(B, 0, Duration::from_secs(60));
        let unlocking = async { assert_eq!(set(&locking, A, 2, &wish(None, false)), Ok(Outcome::Granted)) };
        let (events, ()) = tokio::join!(listening, unlocking);
        let expected = [(1, Sequence(1))];
        assert_eq!(events, expected);
        assert_eq!(locking.events(B, 0, Duration::ZERO).await, expected, "the answer was lost");
        assert_eq!(locking.events(B, 1, Duration::ZERO).await, []);
    }

    #[tokio::test]
    async fn who_stops_waiting_knows_if_it_was_too_late_however_often_it_asks() {
        let locking = Locking::new(Duration::ZERO);
        set(&locking, A, 1, &wish(TAKE, true)).unwrap();
        for (ticket, late) in [(1, false), (2, true)] {
            assert_eq!(set(&locking, B, ticket, &wish(TAKE, true)), Ok(Outcome::Waiting));
            if late {
                set(&locking, A, 2, &wish(None, false)).unwrap();
            }
            for _again in 0..2 {
                assert_eq!(locking.cancel(B, Sequence(ticket)), !late);
            }
            assert_eq!(locking.events(B, 0, Duration::ZERO).await.len(), usize::from(late));
        }
        assert!(locking.test(A, &wish(TAKE, false)).unwrap().is_some());
        assert!(locking.cancel(B, Sequence(99)), "one that nobody knows was not granted");
    }

    #[tokio::test]
    async fn the_end_of_a_session_serves_those_who_wait() {
        let locking = Locking::new(Duration::ZERO);
        set(&locking, A, 1, &wish(TAKE, true)).unwrap();
        set(&locking, B, 1, &wish(TAKE, true)).unwrap();
        locking.end(A);
        assert_eq!(locking.events(B, 0, Duration::ZERO).await.len(), 1);
        assert_eq!(
            set(&locking, A, 1, &wish(TAKE, false)).map(|outcome| matches!(outcome, Outcome::Held(_))),
            Ok(true)
        );
    }

    #[test]
    fn what_is_told_again_is_held_again_unless_it_came_too_late() {
        let locking = Locking::new(Duration::from_secs(6));
        assert!(!locking.is_open(false, Duration::from_secs(5)) && locking.is_open(true, Duration::ZERO));
        assert!(locking.is_open(false, Duration::from_secs(6)));
        let lock = wish(TAKE, false).lock(SessionId(99), LockKind::Exclusive);
        assert_eq!(locking.restore(A, vec![(Ino(7), lock)], true), Ok(vec![]));
        assert_eq!(
            locking.restore(A, vec![(Ino(8), lock), (Ino(7), lock)], false),
            Ok(vec![Ino(8)]),
            "too late, and twice"
        );
        assert_eq!(locking.restore(B, vec![(Ino(7), lock)], true), Ok(vec![Ino(7)]));
        let backwards = Lock { range: LockRange { first: 1, last: 0 }, ..lock };
        assert_eq!(locking.restore(A, vec![(Ino(7), backwards)], true), Err(Refusal::BadRequest));
    }
}

//! Advisory locks between mounts, and what mounts are told of them. Time comes in.
//!
//! A file whose locks only one mount uses is delegated to that mount, as in NFSv4: it grants them by itself, until the file is
//! recalled for the sake of others. Then it tells what it has granted, and the server is the one that knows again.
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
    limits::{DELEGATED_LOCKS_MAX, EVENTS_MAX, RELOCK_MAX, REPLIES_KEPT_PER_SESSION},
    locks::{Lock, LockClass, LockKind, LockOwner, LockRange, LockTable, Ticket, Verdict},
    wire::meta::Lease,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

/// Locks of a file that one mount has to take in a row, and nobody else in between, before the file is delegated to it. Doubled
/// each time that it had to be recalled.
const ROW_BEFORE_DELEGATION: u32 = 3;
const RECALLS_COUNTED_MAX: u32 = 8;
/// Files of which it is known who uses their locks; past it all are forgotten.
const USES_MAX: usize = 64 << 10;
/// Files delegated to one mount; past it the oldest one is asked back for each new one.
const DELEGATIONS_PER_SESSION_MAX: usize = 4096;
/// Ranges of a file with which it may be delegated: there is room for as many more.
const DELEGATED_WITH_MAX: usize = DELEGATED_LOCKS_MAX / 2;
/// The owner of what a mount might hold that has been asked for a file, and has not answered yet.
const UNKNOWN_OWNER: u64 = u64::MAX;

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
    /// With a number: the mount's own from here on.
    Delegated(u64),
    Held(Lock),
    Waiting,
}

#[derive(Debug)]
pub struct Locking {
    state: Mutex<State>,
    /// By the server's clock.
    grace_ends: Duration,
}

/// What a mount is told without having asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    Granted(Sequence),
    Recall { ino: Ino, number: u64 },
    AskAgain(Sequence),
    RecallLease(Lease),
}

#[derive(Debug, Default)]
struct State {
    table: LockTable,
    mounts: BTreeMap<SessionId, Mount>,
    delegations: BTreeMap<Ino, Delegation>,
    delegation_count: u64,
    uses: BTreeMap<Ino, Use>,
}

/// A file whose locks a mount decides on.
#[derive(Debug)]
struct Delegation {
    session: SessionId,
    number: u64,
    is_recalled: bool,
    /// Closed when it is given back.
    given_back: watch::Sender<()>,
}

/// Who takes a file's locks.
#[derive(Clone, Copy, Debug)]
struct Use {
    session: SessionId,
    in_a_row: u32,
    recalls: u32,
}

#[derive(Debug, Default)]
struct Mount {
    /// Below this everything has been answered.
    answered_below: u64,
    answers: BTreeMap<u64, Result<Outcome, Refusal>>,
    /// Each with its number.
    events: VecDeque<(u64, News)>,
    event_count: u64,
    news: Arc<Notify>,
    delegations: usize,
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
        let granted = |mount: &Mount| mount.events.iter().any(|(_, news)| *news == News::Granted(ticket));
        !state.mounts.get(&session).is_some_and(granted)
    }

    pub fn test(&self, session: SessionId, wish: &Wish) -> Result<Option<Lock>, Refusal> {
        let kind = wish.kind.filter(|_| wish.range.is_valid()).ok_or(Refusal::Invalid)?;
        Ok(self.state.lock().table.test(wish.ino, &wish.lock(session, kind)))
    }

    /// Has the file's locks decided on here, for `session`: if another mount does, it is asked to give the file back. One that does not
    /// within `patience` may hold any of its locks.
    pub async fn recall(&self, session: SessionId, ino: Ino, patience: Duration) {
        let Some(mut given_back) = self.state.lock().recall(session, ino) else { return };
        // Nothing is ever sent: it ends when the delegation does.
        let _given_back = tokio::time::timeout(patience, given_back.changed()).await;
    }

    /// The mount has decided on the file's locks so far, and holds these.
    pub fn give_back(&self, session: SessionId, ino: Ino, number: u64, locks: &[Lock]) -> Result<(), Refusal> {
        if locks.len() > DELEGATED_LOCKS_MAX || locks.iter().any(|lock| !lock.range.is_valid()) {
            return Err(Refusal::BadRequest);
        }
        let mut state = self.state.lock();
        let is_its =
            state.delegations.get(&ino).is_some_and(|known| (known.session, known.number) == (session, number));
        if is_its {
            state.end_delegation(ino);
            let own = locks.iter().map(|lock| Lock { owner: LockOwner { session, ..lock.owner }, ..*lock });
            for Ticket { session, number } in state.table.replace(ino, session, own) {
                state.tell(session, News::AskAgain(Sequence(number)));
            }
            state.tell_woken();
        }
        Ok(())
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
        state.delegations.retain(|_, known| known.session != session);
        state.table.end_session(session);
        if let Some(mount) = state.mounts.remove(&session) {
            mount.news.notify_waiters();
        }
        state.tell_woken();
    }

    /// Has the mount told that it has to give a lease on a directory back.
    pub fn recall_lease(&self, session: SessionId, lease: Lease) {
        let mut state = self.state.lock();
        state.mounts.entry(session).or_default();
        state.tell(session, News::RecallLease(lease));
    }

    /// What the mount was told, through event `heard`, and has heard: it is not told again.
    pub fn take_heard(&self, session: SessionId, heard: u64) -> Vec<News> {
        let mut state = self.state.lock();
        let Some(mount) = state.mounts.get_mut(&session) else { return Vec::new() };
        let through = mount.events.partition_point(|(number, _)| *number <= heard);
        mount.events.drain(..through).map(|(_, news)| news).collect()
    }

    /// What the mount has to be told after event `heard`, if anything within `patience`.
    pub async fn events(&self, session: SessionId, heard: u64, patience: Duration) -> Vec<(u64, News)> {
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

    fn events_after(&self, session: SessionId, heard: u64) -> Vec<(u64, News)> {
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
        if self.delegations.get(&wish.ino).is_some_and(|known| known.session == session) {
            // It has not heard that the file is its own: so it has decided on nothing yet.
            self.end_delegation(wish.ino);
            for class in [LockClass::Process, LockClass::Flock] {
                self.table.unlock(wish.ino, LockOwner { session, class, id: UNKNOWN_OWNER }, LockRange::WHOLE);
            }
        }
        let Some(kind) = wish.kind else {
            self.table.unlock(wish.ino, wish.owner(session), wish.range);
            return Ok(Outcome::Granted);
        };
        let ticket = wish.wait.then_some(Ticket { session, number: sequence.0 });
        // Whoever asked before has waited for the answer; it may have been delegated once more since.
        let _others = self.recall(session, wish.ino);
        self.note_use(session, wish.ino);
        match self.table.lock(wish.ino, wish.lock(session, kind), ticket) {
            Verdict::Granted => Ok(self.delegate(session, wish.ino).map_or(Outcome::Granted, Outcome::Delegated)),
            Verdict::Blocked(lock) => Ok(Outcome::Held(lock)),
            Verdict::Waiting => Ok(Outcome::Waiting),
            Verdict::Deadlock => Err(Refusal::Deadlock),
            Verdict::TooMany => Err(Refusal::TooManyLocks),
        }
    }

    fn tell_woken(&mut self) {
        for Ticket { session, number } in self.table.take_woken() {
            self.tell(session, News::Granted(Sequence(number)));
        }
    }

    fn tell(&mut self, session: SessionId, news: News) {
        let Some(mount) = self.mounts.get_mut(&session) else { return };
        mount.event_count += 1;
        mount.events.push_back((mount.event_count, news));
        mount.news.notify_waiters();
    }

    /// Somebody takes a lock of the file.
    fn note_use(&mut self, session: SessionId, ino: Ino) {
        if self.uses.len() >= USES_MAX && !self.uses.contains_key(&ino) {
            self.uses.clear();
        }
        let known = self.uses.entry(ino).or_insert(Use { session, in_a_row: 0, recalls: 0 });
        let in_a_row = if known.session == session { known.in_a_row.saturating_add(1) } else { 1 };
        *known = Use { session, in_a_row, ..*known };
    }

    /// Lets the mount decide on the file's locks, if nobody else seems to care for them and it knows of all its own.
    fn delegate(&mut self, session: SessionId, ino: Ino) -> Option<u64> {
        let known = self.uses.get(&ino)?;
        let mount = self.mounts.get(&session)?;
        let is_its = known.in_a_row >= ROW_BEFORE_DELEGATION << known.recalls
            && mount.events.iter().all(|(_, news)| matches!(news, News::RecallLease(_)))
            && !self.delegations.contains_key(&ino)
            && self.table.is_alone(ino, session)
            && self.table.held_of(ino).nth(DELEGATED_WITH_MAX).is_none();
        if !is_its {
            return None;
        }
        if mount.delegations >= DELEGATIONS_PER_SESSION_MAX {
            self.make_room(session);
            return None;
        }
        self.mounts.get_mut(&session)?.delegations += 1;
        self.delegation_count += 1;
        let number = self.delegation_count;
        let given_back = watch::Sender::new(());
        self.delegations.insert(ino, Delegation { session, number, is_recalled: false, given_back });
        Some(number)
    }

    /// Asks for the oldest of the mount's files: its locks may not be used any more.
    fn make_room(&mut self, session: SessionId) {
        let own = self.delegations.iter().filter(|(_, known)| known.session == session && !known.is_recalled);
        if let Some(ino) = own.min_by_key(|(_, known)| known.number).map(|(ino, _)| *ino) {
            self.ask_back(ino);
        }
    }

    /// Asks another mount than `session` for the file, if one decides on it. Resolves when that has given it back.
    fn recall(&mut self, session: SessionId, ino: Ino) -> Option<watch::Receiver<()>> {
        let known = self.delegations.get(&ino).filter(|known| known.session != session)?;
        let given_back = known.given_back.subscribe();
        if !known.is_recalled
            && let Some(used) = self.uses.get_mut(&ino)
        {
            used.recalls = (used.recalls + 1).min(RECALLS_COUNTED_MAX);
        }
        self.ask_back(ino);
        Some(given_back)
    }

    fn ask_back(&mut self, ino: Ino) {
        let Some(known) = self.delegations.get_mut(&ino) else { return };
        let (holder, number) = (known.session, known.number);
        if !std::mem::replace(&mut known.is_recalled, true) {
            for class in [LockClass::Process, LockClass::Flock] {
                let owner = LockOwner { session: holder, class, id: UNKNOWN_OWNER };
                let anything = Lock { owner, range: LockRange::WHOLE, kind: LockKind::Exclusive, pid: 0 };
                self.table.record(ino, anything);
            }
        }
        // Told once more if it has heard of it, and has not answered.
        let recall = News::Recall { ino, number };
        let is_told =
            self.mounts.get(&holder).is_some_and(|mount| mount.events.iter().any(|(_, news)| *news == recall));
        if !is_told {
            self.tell(holder, recall);
        }
    }

    /// What the table says of the mount's locks of the file is as old as the delegation: whoever ends that puts it right.
    fn end_delegation(&mut self, ino: Ino) {
        let Some(Delegation { session, .. }) = self.delegations.remove(&ino) else { return };
        if let Some(mount) = self.mounts.get_mut(&session) {
            mount.delegations = mount.delegations.saturating_sub(1);
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
        let expected = [(1, News::Granted(Sequence(1)))];
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

    const FILE: Ino = Ino(7);

    /// Lets go and takes `times`; the last answer to the taking.
    fn use_alone(locking: &Locking, session: SessionId, from: u64, times: u64) -> Outcome {
        let mut last = Outcome::Waiting;
        for number in 0..times {
            set(locking, session, from + 2 * number, &wish(None, false)).unwrap();
            last = set(locking, session, from + 2 * number + 1, &wish(TAKE, false)).unwrap();
        }
        last
    }

    fn held_by(session: SessionId, owner: u64) -> Lock {
        Wish { owner, ..wish(TAKE, false) }.lock(session, LockKind::Exclusive)
    }

    #[tokio::test]
    async fn a_file_that_one_mount_alone_locks_becomes_its_own_until_another_asks() {
        let locking = Locking::new(Duration::ZERO);
        assert_eq!(use_alone(&locking, A, 1, 2), Outcome::Granted);
        assert_eq!(set(&locking, A, 5, &wish(TAKE, false)), Ok(Outcome::Delegated(1)));
        assert_eq!(set(&locking, A, 5, &wish(TAKE, false)), Ok(Outcome::Delegated(1)), "its answer was lost");
        locking.recall(A, FILE, Duration::MAX).await;
        let asked = locking.recall(B, FILE, Duration::from_secs(60));
        let gives_back = async {
            assert_eq!(locking.events(A, 0, Duration::ZERO).await, [(1, News::Recall { ino: FILE, number: 1 })]);
            // It might hold anything meanwhile.
            let is_held = |outcome| matches!(outcome, Ok(Outcome::Held(_)));
            let flock = Wish { class: LockClass::Flock, ..wish(TAKE, false) };
            assert!(is_held(set(&locking, B, 1, &flock)));
            locking.give_back(A, FILE, 2, &[]).unwrap();
            assert!(is_held(set(&locking, B, 2, &flock)), "given back under another number");
            assert_eq!(set(&locking, B, 3, &wish(TAKE, true)), Ok(Outcome::Waiting));
            locking.give_back(A, FILE, 1, &[held_by(SessionId(99), 44)]).unwrap();
        };
        tokio::join!(asked, gives_back);
        assert_eq!(set(&locking, B, 4, &wish(TAKE, false)), Ok(Outcome::Held(held_by(A, 44))));
        assert_eq!(locking.events(B, 0, Duration::ZERO).await, [], "granted under somebody's lock");
        locking.give_back(A, FILE, 1, &[]).unwrap();
        assert_eq!(locking.events(B, 0, Duration::ZERO).await, [], "an old message");
        let unlock = Wish { owner: 44, ..wish(None, false) };
        set(&locking, A, 7, &unlock).unwrap();
        assert_eq!(locking.events(B, 0, Duration::ZERO).await, [(1, News::Granted(Sequence(3)))]);
    }

    #[tokio::test]
    async fn who_waits_for_itself_by_what_came_too_late_has_to_ask_again() {
        let locking = Locking::new(Duration::ZERO);
        let (first, second) = (Ino(7), Ino(8));
        let of = |ino, kind, pid| Wish { ino, pid, owner: u64::from(pid), ..wish(kind, true) };
        for number in 0..3 {
            set(&locking, A, 2 * number + 1, &of(first, None, 9)).unwrap();
            set(&locking, A, 2 * number + 2, &of(first, TAKE, 9)).unwrap();
        }
        assert_eq!(set(&locking, B, 1, &of(second, TAKE, 2)), Ok(Outcome::Granted));
        // B's process waits for whatever A may hold, and A's for what B's holds: nobody knows yet that they are the same two.
        locking.recall(B, first, Duration::ZERO).await;
        assert_eq!(set(&locking, B, 2, &of(first, TAKE, 2)), Ok(Outcome::Waiting));
        assert_eq!(set(&locking, A, 7, &of(second, TAKE, 1)), Ok(Outcome::Waiting));
        let held = of(first, TAKE, 1).lock(A, LockKind::Exclusive);
        locking.give_back(A, first, 1, &[held]).unwrap();
        assert_eq!(locking.events(B, 0, Duration::ZERO).await, [(1, News::AskAgain(Sequence(2)))]);
        assert_eq!(set(&locking, B, 3, &of(first, TAKE, 2)), Err(Refusal::Deadlock));
    }

    #[tokio::test]
    async fn a_recall_is_told_again_to_who_has_heard_of_it_and_says_nothing() {
        let locking = Locking::new(Duration::ZERO);
        assert_eq!(use_alone(&locking, A, 1, 3), Outcome::Delegated(1));
        let recall = News::Recall { ino: FILE, number: 1 };
        for number in 1..4 {
            locking.recall(B, FILE, Duration::ZERO).await;
            assert_eq!(locking.events(A, number - 1, Duration::ZERO).await, [(number, recall)]);
            assert_eq!(locking.events(A, number, Duration::ZERO).await, []);
        }
    }

    #[tokio::test]
    async fn one_mount_is_delegated_so_many_files_and_then_gives_the_oldest_back() {
        let locking = Locking::new(Duration::ZERO);
        let mut sequence = 0;
        let mut take = |ino| {
            sequence += 1;
            locking
                .set(A, Sequence(sequence), Sequence(sequence), &Wish { ino: Ino(ino), ..wish(TAKE, false) })
                .unwrap()
        };
        let files = DELEGATIONS_PER_SESSION_MAX as u64;
        for ino in 1..=files {
            take(ino);
            take(ino);
            assert_eq!(take(ino), Outcome::Delegated(ino));
        }
        assert_eq!([take(0), take(0), take(0)], [Outcome::Granted; 3]);
        assert_eq!(locking.events(A, 0, Duration::ZERO).await, [(1, News::Recall { ino: Ino(1), number: 1 })]);
        locking.give_back(A, Ino(1), 1, &[]).unwrap();
        assert_eq!(locking.events(A, 1, Duration::ZERO).await, []);
        assert_eq!(take(0), Outcome::Delegated(files + 1));
    }

    #[test]
    fn a_file_with_many_ranges_is_not_delegated() {
        let locking = Locking::new(Duration::ZERO);
        for number in 0..2000 {
            let range = LockRange { first: 2 * number, last: 2 * number };
            let outcome = set(&locking, A, number + 1, &Wish { range, ..wish(TAKE, false) }).unwrap();
            // Each answer that says so is taken as not heard by what comes next.
            let expected = number >= 2 && number < DELEGATED_WITH_MAX as u64;
            assert_eq!(matches!(outcome, Outcome::Delegated(_)), expected, "range {number}");
        }
    }

    #[tokio::test]
    async fn a_file_that_was_recalled_is_delegated_later_the_next_time() {
        let locking = Locking::new(Duration::ZERO);
        assert_eq!(use_alone(&locking, A, 1, 3), Outcome::Delegated(1));
        locking.recall(B, FILE, Duration::ZERO).await;
        locking.give_back(A, FILE, 1, &[]).unwrap();
        use_alone(&locking, B, 1, 1);
        assert_eq!(use_alone(&locking, B, 3, 4), Outcome::Granted);
        assert_eq!(use_alone(&locking, B, 11, 1), Outcome::Delegated(2));
        // A has not been heard since it was recalled: what it knows is not known.
        locking.recall(A, FILE, Duration::ZERO).await;
        locking.give_back(B, FILE, 2, &[]).unwrap();
        assert_eq!(use_alone(&locking, A, 7, 20), Outcome::Granted);
        assert!(!locking.events(A, 0, Duration::ZERO).await.is_empty());
        assert_eq!(locking.events(A, 1, Duration::ZERO).await, []);
        assert_eq!(set(&locking, A, 47, &wish(TAKE, false)), Ok(Outcome::Delegated(3)));
    }

    #[tokio::test]
    async fn a_file_is_delegated_to_nobody_while_others_hold_or_wait_for_its_locks() {
        let locking = Locking::new(Duration::ZERO);
        let other = |kind| Wish { range: LockRange { first: 5, last: 5 }, ..wish(kind, false) };
        let own = |kind| Wish { range: LockRange { first: 0, last: 4 }, ..wish(kind, false) };
        set(&locking, B, 1, &other(TAKE)).unwrap();
        for number in 0..10 {
            assert_eq!(set(&locking, A, number + 1, &own(TAKE)), Ok(Outcome::Granted));
        }
        set(&locking, B, 2, &Wish { wait: true, ..own(TAKE) }).unwrap();
        set(&locking, B, 3, &other(None)).unwrap();
        assert_eq!(set(&locking, A, 11, &own(TAKE)), Ok(Outcome::Granted), "somebody waits");
        assert!(locking.cancel(B, Sequence(2)));
        assert_eq!(use_alone(&locking, A, 12, 1), Outcome::Granted);
        assert_eq!(set(&locking, A, 14, &own(TAKE)), Ok(Outcome::Delegated(1)));
    }

    #[tokio::test]
    async fn a_delegation_ends_with_its_session_or_when_its_mount_has_not_heard_of_it() {
        let locking = Locking::new(Duration::ZERO);
        assert_eq!(use_alone(&locking, A, 1, 3), Outcome::Delegated(1));
        assert_eq!(set(&locking, A, 9, &wish(TAKE, false)), Ok(Outcome::Delegated(2)), "the answer never came");
        locking.recall(B, FILE, Duration::ZERO).await;
        assert_eq!(set(&locking, B, 1, &wish(TAKE, true)), Ok(Outcome::Waiting));
        locking.end(A);
        assert_eq!(locking.events(B, 0, Duration::ZERO).await, [(1, News::Granted(Sequence(1)))]);
        locking.recall(B, FILE, Duration::MAX).await;
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

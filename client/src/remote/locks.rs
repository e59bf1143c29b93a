//! Advisory locks as this mount has them from the metadata server.
//!
//! A file that is delegated to this mount is its own to decide on: what nothing here is in the way of is granted here, without a
//! message. Whoever would have to wait, or whom the server asks for the file, has the file given back first, with all that is held
//! of it. Without an answer of the server for as long as it says, nothing is granted here either: it may have given the file up.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use holdfast_common::{
    Ino, Position, Refusal, Sequence, SessionId,
    limits::{DELEGATED_LOCKS_MAX, DIRECTORY_LEASE, LISTEN_PATIENCE, RELOCK_MAX},
    locks::{Lock, LockClass, LockKind, LockOwner, LockRange, LockTable},
    wire::meta::{Event, Foreign, LockAnswer, LockRequest, MetaAnswer, MetaRequest, Reach, SessionRequest},
};
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedMutexGuard, oneshot};
use tracing::{debug, error};

use super::{
    meta::{ATTEMPT, Failure, MetaClient, Trouble, unexpected},
    retry::Retry,
};
use crate::{
    fs::{Errno, FsResult},
    sys::boot_time,
};

const DOUBTS_EVERY: Duration = Duration::from_millis(500);
/// The server answers within `LISTEN_PATIENCE`.
const LISTEN_ATTEMPT: Duration = LISTEN_PATIENCE.saturating_add(ATTEMPT);

/// A change of what one owner holds of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockWish {
    pub class: LockClass,
    /// Told apart by the kernel.
    pub owner: u64,
    pub range: LockRange,
    /// `None`: let go.
    pub kind: Option<LockKind>,
    pub pid: u32,
}

impl LockWish {
    /// As this mount keeps it: its session is understood.
    fn lock_owner(&self) -> LockOwner {
        LockOwner { session: SessionId(0), class: self.class, id: self.owner }
    }

    fn lock(&self, kind: LockKind) -> Lock {
        Lock { owner: self.lock_owner(), range: self.range, kind, pid: self.pid }
    }
}

/// What became of a wish.
#[derive(Debug)]
pub enum LockOutcome {
    /// With what others have changed since this mount last knew.
    Granted(Foreign),
    /// It is let go.
    Free,
    /// Somebody else has it.
    Held,
    Waiting(LockWait),
}

/// A lock that will be granted some time.
#[derive(Debug)]
pub struct LockWait {
    ticket: Sequence,
    session: SessionId,
    granted: oneshot::Receiver<Foreign>,
}

impl LockWait {
    /// Resolves when it is granted; to `None` when it has to be asked for anew.
    pub async fn granted(&mut self) -> Option<Foreign> {
        (&mut self.granted).await.ok()
    }
}

#[derive(Debug)]
pub(super) struct Locks {
    state: Mutex<State>,
    /// Changes of one file's locks are made one after the other, so that this mount and the server see them in one order. Of files
    /// of which some are under way.
    lanes: Mutex<HashMap<Ino, Arc<tokio::sync::Mutex<()>>>>,
    /// Somebody waits, or something may be asked for, so the server has to be listened to.
    wanted: Notify,
    foreign_seen: AtomicU64,
    /// The caches may hold anything of what others have changed.
    foreign_doubted: AtomicBool,
    /// Changes with every restart of the server: positions and tickets from before mean nothing.
    epoch: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// In which the sequences count.
    session: SessionId,
    next: u64,
    in_flight: BTreeSet<u64>,
    held: LockTable,
    waiting: HashMap<u64, Waiter>,
    delegated: HashMap<Ino, Delegation>,
    /// When the last request was sent that has been answered and kept the session alive.
    answered: Option<Duration>,
    /// The last event that has arrived, and the last one of which the server knows that: of this life of the server.
    instance: u64,
    heard: u64,
    acknowledged: u64,
    /// Of which it is not known whether the server agrees with `held`.
    doubts: Vec<Doubt>,
    /// Files of which locks were lost, and when: as a count of losses.
    lost: HashMap<Ino, u64>,
    losses: u64,
    /// Up to this loss any file counts as one whose lock was lost.
    all_lost: u64,
}

/// Somebody for whom a lock is granted some time.
#[derive(Debug)]
struct Waiter {
    ino: Ino,
    wish: LockWish,
    granted: oneshot::Sender<Foreign>,
}

/// A file on whose locks this mount decides.
#[derive(Clone, Copy, Debug)]
struct Delegation {
    number: u64,
    /// It is being given back, and the server may know that.
    ending: bool,
    valid: Duration,
    /// What others had changed until then has to be out of the caches first.
    through: Position,
}

/// A wish that may have been carried out by the server, or may be yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Doubt {
    session: SessionId,
    ino: Ino,
    class: LockClass,
    owner: u64,
    range: LockRange,
    /// Under which it may be waited for.
    ticket: Option<Sequence>,
}

/// Files past which every file counts as one whose lock was lost.
const LOST_MAX: usize = 64 << 10;

impl Default for Locks {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            lanes: Mutex::default(),
            wanted: Notify::new(),
            foreign_seen: AtomicU64::new(0),
            foreign_doubted: AtomicBool::new(false),
            epoch: AtomicU64::new(0),
        }
    }
}

fn doubt(session: SessionId, ino: Ino, wish: &LockWish, ticket: Option<Sequence>) -> Doubt {
    Doubt { session, ino, class: wish.class, owner: wish.owner, range: wish.range, ticket }
}

impl State {
    /// Does somebody wait for what the server may say, or the server for this mount?
    fn has_to_listen(&self) -> bool {
        !self.waiting.is_empty() || !self.delegated.is_empty() || self.acknowledged < self.heard
    }

    fn note_lost(&mut self, inos: &BTreeSet<Ino>) {
        if inos.is_empty() {
            return;
        }
        self.losses += 1;
        let losses = self.losses;
        self.lost.extend(inos.iter().map(|ino| (*ino, losses)));
        if self.lost.len() > LOST_MAX {
            self.lost.clear();
            self.all_lost = losses;
        }
    }
}

impl Locks {
    /// What this mount takes the owner to have in the range: parts, and what of it is free.
    fn believed(&self, doubt: &Doubt) -> Vec<(LockRange, Option<LockKind>)> {
        let owner = LockOwner { session: SessionId(0), class: doubt.class, id: doubt.owner };
        let state = self.state.lock();
        let mut parts = Vec::new();
        let mut next = doubt.range.first;
        for lock in state.held.held_by(doubt.ino, owner) {
            let (first, last) = (lock.range.first.max(doubt.range.first), lock.range.last.min(doubt.range.last));
            if first > last {
                continue;
            }
            if next < first {
                parts.push((LockRange { first: next, last: first - 1 }, None));
            }
            parts.push((LockRange { first, last }, Some(lock.kind)));
            next = last + 1;
        }
        if next <= doubt.range.last {
            parts.push((LockRange { first: next, last: doubt.range.last }, None));
        }
        parts
    }

    /// There is something that the server may ask for.
    pub(super) fn want_to_listen(&self) {
        self.wanted.notify_one();
    }

    /// What this mount had in its old session is lost. Returns the files of which it held something.
    pub(super) fn begin_session(&self, session: SessionId, instance: u64) -> Vec<Ino> {
        let mut state = self.state.lock();
        let inos: BTreeSet<Ino> = state.held.held().map(|(ino, _)| ino).collect();
        if state.session != SessionId::default() {
            // What others have changed since the old session was heard last is not known.
            self.foreign_doubted.store(true, Ordering::Release);
        }
        let (lost, losses, all_lost) = (std::mem::take(&mut state.lost), state.losses, state.all_lost);
        *state = State { session, instance, next: 1, lost, losses, all_lost, ..State::default() };
        state.note_lost(&inos);
        inos.into_iter().collect()
    }

    /// Locks on these files are lost: this mount has none on them any more, and tells the server so.
    fn lose(&self, inos: &BTreeSet<Ino>) {
        let mut state = self.state.lock();
        let held: Vec<(Ino, Lock)> = state.held.held().filter(|(ino, _)| inos.contains(ino)).collect();
        for (ino, lock) in held {
            state.held.unlock(ino, lock.owner, LockRange::WHOLE);
            let (session, class, owner) = (state.session, lock.owner.class, lock.owner.id);
            state.doubts.push(Doubt { session, ino, class, owner, range: LockRange::WHOLE, ticket: None });
        }
        state.note_lost(inos);
    }

    /// A restarted server knows of no delegation. What was granted under one is held, and is told with the rest.
    pub(super) fn forget_delegations(&self) {
        let mut state = self.state.lock();
        state.delegated.clear();
        state.answered = None;
    }

    /// The server, in its life `instance`, knows nothing any more of who waits.
    pub(super) fn forget_waiters(&self, instance: u64) {
        self.forget_delegations();
        let mut state = self.state.lock();
        state.instance = instance;
        let in_flight = std::mem::take(&mut state.in_flight);
        // Who has no answer yet asks the new server under the same number.
        state.waiting.retain(|sequence, _| in_flight.contains(sequence));
        state.in_flight = in_flight;
        state.heard = 0;
        state.acknowledged = 0;
        self.epoch.fetch_add(1, Ordering::AcqRel);
        // Positions after a loss of power are not those from before.
        self.foreign_seen.store(0, Ordering::Release);
    }

    pub(super) fn held(&self) -> Vec<(Ino, Lock)> {
        self.state.lock().held.held().collect()
    }

    /// Waits until it is one's turn to change the file's locks.
    async fn turn(&self, ino: Ino) -> Turn<'_> {
        let lane = Arc::clone(self.lanes.lock().entry(ino).or_default());
        Turn { locks: self, ino, guard: Some(lane.lock_owned().await) }
    }
}

/// Nobody else changes the file's locks.
struct Turn<'a> {
    locks: &'a Locks,
    ino: Ino,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut lanes = self.locks.lanes.lock();
        self.guard.take();
        // Who waits has it too.
        if lanes.get(&self.ino).is_some_and(|lane| Arc::strong_count(lane) == 1) {
            lanes.remove(&self.ino);
        }
    }
}

/// A sequence that is given back when it has been answered, or given up.
struct Numbered<'a> {
    locks: &'a Locks,
    session: SessionId,
    sequence: u64,
    granted: Option<oneshot::Receiver<Foreign>>,
}

impl<'a> Numbered<'a> {
    fn begin(locks: &'a Locks, ino: Ino, wish: &LockWish) -> Self {
        let (granted, receiver) = oneshot::channel();
        let mut state = locks.state.lock();
        let sequence = state.next;
        state.next += 1;
        state.in_flight.insert(sequence);
        // Before it is asked for: it may be granted before the answer that says it has to be waited for.
        state.waiting.insert(sequence, Waiter { ino, wish: *wish, granted });
        Self { locks, session: state.session, sequence, granted: Some(receiver) }
    }

    fn answered_below(&self) -> u64 {
        let state = self.locks.state.lock();
        if state.session == self.session { state.in_flight.first().copied().unwrap_or(state.next) } else { 1 }
    }

    /// It is waited for on.
    fn waits(mut self) -> Option<LockWait> {
        let granted = self.granted.take()?;
        Some(LockWait { ticket: Sequence(self.sequence), session: self.session, granted })
    }
}

impl Drop for Numbered<'_> {
    fn drop(&mut self) {
        let mut state = self.locks.state.lock();
        if state.session == self.session {
            state.in_flight.remove(&self.sequence);
            if self.granted.is_some() {
                state.waiting.remove(&self.sequence);
            }
        }
    }
}

impl MetaClient {
    /// Nothing that others have changed through this position is in a cache of this mount in its old form.
    fn foreign_seen(&self) -> Position {
        Position(self.locks.foreign_seen.load(Ordering::Acquire))
    }

    /// To be told to [`MetaClient::note_foreign_seen`]; and whether nothing is known of what others have changed.
    pub fn begin_catching_up(&self) -> (u64, bool) {
        (self.locks.epoch.load(Ordering::Acquire), self.locks.foreign_doubted.load(Ordering::Acquire))
    }

    /// All that others have changed through `through` has been taken out of the caches, begun at `begun`.
    pub fn note_foreign_seen(&self, begun: (u64, bool), through: Position) {
        if begun.0 != self.locks.epoch.load(Ordering::Acquire) {
            return;
        }
        if begun.1 {
            self.locks.foreign_doubted.store(false, Ordering::Release);
        }
        self.locks.foreign_seen.fetch_max(through.0, Ordering::AcqRel);
    }

    /// How often locks have been lost so far.
    pub fn lock_losses(&self) -> u64 {
        self.locks.state.lock().losses
    }

    /// Was a lock on one of these files lost after there had been `losses`?
    pub(super) fn lost_lock_since(&self, losses: u64, inos: &[Ino]) -> bool {
        let state = self.locks.state.lock();
        let is_lost = |ino: &Ino| state.all_lost > losses || state.lost.get(ino).is_some_and(|at| *at > losses);
        state.losses > losses && inos.iter().any(is_lost)
    }

    /// Does this mount hold a lock of `owner` on the file?
    pub fn holds_lock(&self, ino: Ino, class: LockClass, owner: u64) -> bool {
        let owner = LockOwner { session: SessionId(0), class, id: owner };
        self.locks.state.lock().held.held_by(ino, owner).next().is_some()
    }

    /// Does the owner hold any lock on the file exclusively?
    pub fn locks_exclusively(&self, ino: Ino, wish: &LockWish) -> bool {
        let state = self.locks.state.lock();
        state.held.held_by(ino, wish.lock_owner()).any(|lock| lock.kind == LockKind::Exclusive)
    }

    /// Takes, changes or lets go of a lock. `EDEADLK`, `ENOLCK`, or `EIO` when the server does not answer.
    pub async fn set_lock(self: &Arc<Self>, ino: Ino, wish: LockWish, wait: bool) -> FsResult<LockOutcome> {
        let _turn = self.locks.turn(ino).await;
        if let Some(outcome) = self.decide_here(ino, &wish) {
            return Ok(outcome);
        }
        if let Err(error) = self.give_back(ino, None).await {
            if wish.kind.is_none() {
                // Whoever lets go may be gone: it is seen to.
                self.note_lock(ino, &wish);
                let mut state = self.locks.state.lock();
                let doubt = doubt(state.session, ino, &wish, None);
                state.doubts.push(doubt);
            }
            return Err(error);
        }
        loop {
            let numbered = Numbered::begin(&self.locks, ino, &wish);
            match self.ask_lock(ino, &wish, wait, &numbered).await {
                Ok(LockAnswer::Granted(foreign)) => {
                    self.note_lock(ino, &wish);
                    return Ok(LockOutcome::Granted(foreign));
                }
                Ok(LockAnswer::Delegated { foreign, number, valid_ms }) => {
                    self.note_lock(ino, &wish);
                    self.note_delegated(numbered.session, ino, number, valid_ms, foreign.through);
                    return Ok(LockOutcome::Granted(foreign));
                }
                Ok(LockAnswer::Free) => {
                    self.note_lock(ino, &wish);
                    return Ok(LockOutcome::Free);
                }
                Ok(LockAnswer::Held(_)) => {
                    self.note_let_go_first(ino, &wish);
                    return Ok(LockOutcome::Held);
                }
                Ok(LockAnswer::Waiting) => {
                    self.note_let_go_first(ino, &wish);
                    self.locks.wanted.notify_one();
                    match numbered.waits() {
                        Some(wait) => return Ok(LockOutcome::Waiting(wait)),
                        None => return Err(Errno(libc::EIO)),
                    }
                }
                Err(Failure::Expired { session, .. }) => {
                    self.reenter(session).await;
                    if wish.kind.is_none() {
                        // It went with the session.
                        return Ok(LockOutcome::Free);
                    }
                }
                Err(failure @ Failure::Late { .. }) => {
                    if wish.kind.is_none() {
                        self.note_lock(ino, &wish);
                    }
                    let ticket = wait.then_some(Sequence(numbered.sequence));
                    self.locks.state.lock().doubts.push(doubt(numbered.session, ino, &wish, ticket));
                    return Err(failure.into());
                }
                Err(failure @ Failure::Errno(_)) => return Err(failure.into()),
            }
        }
    }

    /// Decides on the wish, if this mount may and nothing here is in its way.
    fn decide_here(&self, ino: Ino, wish: &LockWish) -> Option<LockOutcome> {
        let mut state = self.locks.state.lock();
        self.decides_on(&state, ino).then_some(())?;
        // One change makes two ranges of one at most.
        state.held.held_of(ino).nth(DELEGATED_LOCKS_MAX - 3).is_none().then_some(())?;
        match wish.kind {
            None => {
                state.held.unlock(ino, wish.lock_owner(), wish.range);
                Some(LockOutcome::Free)
            }
            Some(kind) => {
                let is_free = state.held.test(ino, &wish.lock(kind)).is_none();
                let has_caught_up = state.delegated.get(&ino).is_some_and(|known| self.foreign_seen() >= known.through);
                (is_free && has_caught_up).then_some(())?;
                state.held.record(ino, wish.lock(kind));
                // Nobody else can have had it since this mount had: there is nothing new to know.
                let foreign = Foreign { through: self.foreign_seen(), changes: Vec::new(), reach: Reach::Complete };
                Some(LockOutcome::Granted(foreign))
            }
        }
    }

    fn decides_on(&self, state: &State, ino: Ino) -> bool {
        let known = state.delegated.get(&ino);
        let is_certain =
            |known: &Delegation| state.answered.is_some_and(|asked| boot_time().saturating_sub(asked) < known.valid);
        known.is_some_and(|known| !known.ending && is_certain(known))
    }

    /// The server has answered what was asked then (by [`boot_time`]), and kept the session alive by it.
    pub(super) fn note_answered(&self, session: SessionId, asked: Duration) {
        let mut state = self.locks.state.lock();
        if state.session == session {
            state.answered = state.answered.max(Some(asked));
        }
    }

    fn note_delegated(&self, session: SessionId, ino: Ino, number: u64, valid_ms: u64, through: Position) {
        let mut state = self.locks.state.lock();
        if state.session == session {
            let valid = Duration::from_millis(valid_ms);
            state.delegated.insert(ino, Delegation { number, ending: false, valid, through });
            self.locks.wanted.notify_one();
        }
    }

    /// Gives the file back, if it is delegated to this mount, or the server says so with `recalled`. The file's lane is taken.
    async fn give_back(self: &Arc<Self>, ino: Ino, recalled: Option<u64>) -> FsResult<()> {
        let (session, number) = {
            let mut state = self.locks.state.lock();
            let number = match (state.delegated.get_mut(&ino), recalled) {
                // The server has been told already: it has delegated the file anew since.
                (Some(known), Some(recalled)) if known.number != recalled => return Ok(()),
                (Some(known), _) => {
                    known.ending = true;
                    known.number
                }
                // Its answer that said so has not arrived.
                (None, Some(recalled)) => recalled,
                (None, None) => return Ok(()),
            };
            (state.session, number)
        };
        let epoch = self.locks.epoch.load(Ordering::Acquire);
        let request = || {
            let state = self.locks.state.lock();
            // Whoever was to get it has not survived.
            if epoch != self.locks.epoch.load(Ordering::Acquire) || state.session != session {
                return Err(Errno(libc::ESTALE));
            }
            let locks = state.held.held_of(ino).collect();
            Ok(MetaRequest::Lock { session, request: LockRequest::Return { ino, number, locks } })
        };
        self.until_behind_settled().await?;
        match self.ask_if(ATTEMPT, request).await {
            Ok(MetaAnswer::Lock(LockAnswer::Free)) => {}
            Ok(other) => return Err(unexpected(&other)),
            Err(Failure::Expired { session, .. }) => self.reenter(session).await,
            Err(Failure::Errno(Errno(libc::ESTALE))) => {}
            Err(failure) => return Err(failure.into()),
        }
        let mut state = self.locks.state.lock();
        if state.delegated.get(&ino).is_some_and(|known| known.number == number) {
            state.delegated.remove(&ino);
        }
        Ok(())
    }

    /// Others want locks of the file.
    async fn answer_recall(self: &Arc<Self>, ino: Ino, number: u64) {
        let mut retry = Retry::endless();
        loop {
            let turn = self.locks.turn(ino).await;
            match self.give_back(ino, Some(number)).await {
                Ok(()) => return,
                Err(error) => debug!(%ino, ?error, "the locks of a file could not be given back yet"),
            }
            drop(turn);
            retry.wait().await;
        }
    }

    async fn ask_lock(
        self: &Arc<Self>,
        ino: Ino,
        wish: &LockWish,
        wait: bool,
        numbered: &Numbered<'_>,
    ) -> Result<LockAnswer, Failure> {
        let LockWish { class, owner, range, kind, pid } = *wish;
        let request = || LockRequest::Set {
            sequence: Sequence(numbered.sequence),
            answered_below: Sequence(numbered.answered_below()),
            ino,
            class,
            owner,
            range,
            kind,
            pid,
            wait,
            since: self.foreign_seen(),
        };
        let session = numbered.session;
        self.until_behind_settled().await.map_err(Failure::Errno)?;
        // Not after the attempt that will be answered was sent.
        let asked = boot_time();
        match self.ask_or_expire(ATTEMPT, || MetaRequest::Lock { session, request: request() }).await? {
            MetaAnswer::Lock(answer) => {
                self.note_answered(session, asked);
                Ok(answer)
            }
            other => Err(Failure::Errno(unexpected(&other))),
        }
    }

    /// Keeps what the server keeps.
    fn note_lock(&self, ino: Ino, wish: &LockWish) {
        let mut state = self.locks.state.lock();
        let owner = wish.lock_owner();
        match wish.kind {
            None => state.held.unlock(ino, owner, wish.range),
            Some(kind) => state.held.record(ino, Lock { owner, range: wish.range, kind, pid: wish.pid }),
        }
    }

    /// A flock that is wanted in its other kind is let go first, also if that is not to be had.
    fn note_let_go_first(&self, ino: Ino, wish: &LockWish) {
        if wish.class == LockClass::Flock {
            self.note_lock(ino, &LockWish { kind: None, ..*wish });
        }
    }

    /// Stops waiting. What others have changed, if it came too late and the lock is held.
    pub async fn cancel_lock(self: &Arc<Self>, ino: Ino, wish: &LockWish, wait: &mut LockWait) -> Option<Foreign> {
        let _turn = self.locks.turn(ino).await;
        let answer = self.ask_cancel(wait.session, wait.ticket).await;
        {
            let mut state = self.locks.state.lock();
            if state.session == wait.session {
                state.waiting.remove(&wait.ticket.0);
            }
        }
        let foreign = match (answer, wait.granted.try_recv()) {
            // Heard of before it was asked.
            (_, Ok(foreign)) | (Ok(LockAnswer::Granted(foreign)), Err(_)) => foreign,
            (Ok(_) | Err(Failure::Expired { .. } | Failure::Errno(_)), Err(_)) => return None,
            (Err(Failure::Late { .. }), Err(_)) => {
                // It may be granted some time, to nobody.
                self.locks.state.lock().doubts.push(doubt(wait.session, ino, wish, Some(wait.ticket)));
                return None;
            }
        };
        self.note_lock(ino, wish);
        Some(foreign)
    }

    async fn ask_cancel(self: &Arc<Self>, session: SessionId, ticket: Sequence) -> Result<LockAnswer, Failure> {
        let cancel = || LockRequest::Cancel { ticket, since: self.foreign_seen() };
        match self.ask_or_expire(ATTEMPT, || MetaRequest::Lock { session, request: cancel() }).await? {
            MetaAnswer::Lock(answer) => Ok(answer),
            other => Err(Failure::Errno(unexpected(&other))),
        }
    }

    /// Somebody who would be in the way.
    pub async fn test_lock(self: &Arc<Self>, ino: Ino, wish: &LockWish) -> FsResult<Option<Lock>> {
        let LockWish { class, owner, range, kind, .. } = *wish;
        let kind = kind.ok_or(Errno(libc::EINVAL))?;
        {
            let state = self.locks.state.lock();
            if self.decides_on(&state, ino) {
                let own = |lock: Lock| Lock { owner: LockOwner { session: state.session, ..lock.owner }, ..lock };
                return Ok(state.held.test(ino, &wish.lock(kind)).map(own));
            }
        }
        if self.locks.state.lock().delegated.contains_key(&ino) {
            let _turn = self.locks.turn(ino).await;
            self.give_back(ino, None).await?;
        }
        let test = || LockRequest::Test { ino, class, owner, range, kind };
        loop {
            let session = self.session();
            match self.ask_or_expire(ATTEMPT, || MetaRequest::Lock { session, request: test() }).await {
                Ok(MetaAnswer::Lock(LockAnswer::Held(lock))) => return Ok(Some(lock)),
                Ok(MetaAnswer::Lock(LockAnswer::Free)) => return Ok(None),
                Ok(other) => return Err(unexpected(&other)),
                Err(Failure::Expired { session, .. }) => self.reenter(session).await,
                Err(failure) => return Err(failure.into()),
            }
        }
    }

    /// Hears what the server has to say for as long as it may have something to say, and clears up what the server may hold for nobody.
    pub async fn keep_locks(self: &Arc<Self>) {
        tokio::join!(self.listen(), self.settle_doubts());
    }

    async fn listen(self: &Arc<Self>) {
        let mut retry = Retry::endless();
        loop {
            if !self.locks.state.lock().has_to_listen() && !self.names().has_leases(boot_time()) {
                self.locks.wanted.notified().await;
            }
            let (session, instance, heard) = {
                let state = self.locks.state.lock();
                (state.session, state.instance, state.heard)
            };
            let request =
                MetaRequest::Session(SessionRequest::Listen { session, heard, instance, since: self.foreign_seen() });
            let asked = boot_time();
            match self.once(&request, LISTEN_ATTEMPT).await {
                Ok(MetaAnswer::Events(events)) => {
                    self.note_answered(session, asked);
                    retry = Retry::endless();
                    let has_recalled = events.iter().any(|(_, event)| matches!(event, Event::RecallLease(_)));
                    self.hear((session, instance), heard, events);
                    if has_recalled {
                        // Nobody waits longer than a lease lasts.
                        let _late = tokio::time::timeout(DIRECTORY_LEASE, self.until_behind_settled()).await;
                    }
                }
                Ok(other) => error!(?other, "the metadata server answered another question"),
                Err(Trouble::Refused(Refusal::SessionExpired)) => self.reenter(session).await,
                Err(trouble) => {
                    debug!(?trouble, "the metadata server cannot be listened to");
                    retry.wait().await;
                }
            }
        }
    }

    /// Events after `acknowledged`.
    fn hear(self: &Arc<Self>, life: (SessionId, u64), acknowledged: u64, events: Vec<(u64, Event)>) {
        let mut state = self.locks.state.lock();
        if (state.session, state.instance) != life {
            return;
        }
        state.acknowledged = acknowledged;
        for (number, event) in events {
            if number <= state.heard {
                continue;
            }
            state.heard = number;
            match event {
                Event::Granted { ticket, foreign } => {
                    let Some(Waiter { ino, wish, granted }) = state.waiting.remove(&ticket.0) else { continue };
                    if let Some(kind) = wish.kind {
                        state.held.record(ino, wish.lock(kind));
                    }
                    // Who has just been interrupted asks the server, which knows.
                    let _interrupted = granted.send(foreign);
                }
                // Whose wait ends without a word asks anew.
                Event::AskAgain { ticket } => drop(state.waiting.remove(&ticket.0)),
                // Heard of, with the next question, it is given back.
                Event::RecallLease(lease) => self.names().recall(lease, boot_time()),
                Event::Recall { ino, number } => {
                    let client = Arc::clone(self);
                    drop(tokio::spawn(async move { client.answer_recall(ino, number).await }));
                }
            }
        }
    }

    /// Has the server agree where it may not.
    async fn settle_doubts(self: &Arc<Self>) {
        loop {
            tokio::time::sleep(DOUBTS_EVERY).await;
            let doubts = std::mem::take(&mut self.locks.state.lock().doubts);
            for doubt in doubts {
                if let Err(failure) = self.settle_doubt(&doubt).await {
                    debug!(ino = %doubt.ino, error = ?Errno::from(failure), "a lock may be held for nobody still");
                    self.locks.state.lock().doubts.push(doubt);
                }
            }
        }
    }

    async fn settle_doubt(self: &Arc<Self>, doubt: &Doubt) -> Result<(), Failure> {
        let _turn = self.locks.turn(doubt.ino).await;
        if self.locks.state.lock().session != doubt.session {
            // All that was held and waited for then is gone with its session.
            return Ok(());
        }
        if let Some(ticket) = doubt.ticket {
            self.ask_cancel(doubt.session, ticket).await?;
        }
        let ending = self.locks.state.lock().delegated.get(&doubt.ino).map(|known| known.ending);
        if ending == Some(false) {
            // All that is held of the file will be told with it.
            return Ok(());
        }
        // If it is being given back, the server may have been told too much already.
        self.give_back(doubt.ino, None).await.map_err(Failure::Errno)?;
        for (range, kind) in self.locks.believed(doubt) {
            let wish = LockWish { class: doubt.class, owner: doubt.owner, range, kind, pid: 0 };
            let numbered = Numbered::begin(&self.locks, doubt.ino, &wish);
            if let LockAnswer::Delegated { number, valid_ms, foreign } =
                self.ask_lock(doubt.ino, &wish, false, &numbered).await?
            {
                // The rest is told when it is given back.
                self.note_delegated(numbered.session, doubt.ino, number, valid_ms, foreign.through);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Tells a restarted server which locks are held here. Returns the files of which some could not be kept.
    pub(super) async fn relock(self: &Arc<Self>, session: SessionId) -> Result<Vec<Ino>, Trouble> {
        self.locks.forget_waiters(self.server_instance());
        let mut all_lost = BTreeSet::new();
        for locks in self.locks.held().chunks(RELOCK_MAX) {
            let request = SessionRequest::Relock { session, locks: locks.to_vec() };
            match self.once(&MetaRequest::Session(request), ATTEMPT).await? {
                MetaAnswer::Relocked { lost } => all_lost.extend(lost),
                other => return Err(self.malformed(&other)),
            }
        }
        self.locks.lose(&all_lost);
        Ok(all_lost.into_iter().collect())
    }
}

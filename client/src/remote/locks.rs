//! Advisory locks as this mount has them from the metadata server.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use holdfast_common::{
    Ino, Position, Refusal, Sequence, SessionId,
    limits::{LISTEN_PATIENCE, RELOCK_MAX},
    locks::{Lock, LockClass, LockKind, LockOwner, LockRange, LockTable},
    wire::meta::{Event, Foreign, LockAnswer, LockRequest, MetaAnswer, MetaRequest, SessionRequest},
};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tracing::{debug, error};

use super::{
    meta::{ATTEMPT, Failure, MetaClient, Trouble, unexpected},
    retry::Retry,
};
use crate::fs::{Errno, FsResult};

/// Changes of one file's locks are made one after the other, so that this mount and the server see them in one order.
const LANES: usize = 64;
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
    lanes: Vec<tokio::sync::Mutex<()>>,
    /// Somebody waits, so the server has to be listened to.
    wanted: Notify,
    foreign_seen: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// In which the sequences count.
    session: SessionId,
    next: u64,
    in_flight: BTreeSet<u64>,
    held: LockTable,
    waiting: HashMap<u64, oneshot::Sender<Foreign>>,
    /// The last event that has arrived.
    heard: u64,
    /// Owners that are gone, and whose locks could not be let go yet.
    gone: BTreeSet<(Ino, LockClass, u64)>,
}

impl Default for Locks {
    fn default() -> Self {
        let lanes = (0..LANES).map(|_| tokio::sync::Mutex::default()).collect();
        Self { state: Mutex::default(), lanes, wanted: Notify::new(), foreign_seen: AtomicU64::new(0) }
    }
}

impl Locks {
    /// What this mount had in its old session is lost. Returns the files of which it held something.
    pub(super) fn begin_session(&self, session: SessionId) -> Vec<Ino> {
        let mut state = self.state.lock();
        let lost: BTreeSet<Ino> = state.held.held().map(|(ino, _)| ino).collect();
        *state = State { session, next: 1, ..State::default() };
        lost.into_iter().collect()
    }

    /// The server knows nothing any more of who waits.
    pub(super) fn forget_waiters(&self) {
        let mut state = self.state.lock();
        state.waiting.clear();
        state.heard = 0;
        // Positions after a loss of power are not those from before.
        self.foreign_seen.store(0, Ordering::Release);
    }

    pub(super) fn held(&self) -> Vec<(Ino, Lock)> {
        self.state.lock().held.held().collect()
    }

    fn lane(&self, ino: Ino) -> &tokio::sync::Mutex<()> {
        let lane = usize::try_from(ino.0 % LANES as u64).unwrap_or(0);
        &self.lanes[lane]
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
    fn begin(locks: &'a Locks) -> Self {
        let (sender, receiver) = oneshot::channel();
        let mut state = locks.state.lock();
        let sequence = state.next;
        state.next += 1;
        state.in_flight.insert(sequence);
        // Before it is asked for: it may be granted before the answer that says it has to be waited for.
        state.waiting.insert(sequence, sender);
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

    /// All that others have changed through `through` has been taken out of the caches.
    pub fn note_foreign_seen(&self, through: Position) {
        self.locks.foreign_seen.fetch_max(through.0, Ordering::AcqRel);
    }

    /// Does this mount hold a lock of `owner` on the file?
    pub fn holds_lock(&self, ino: Ino, class: LockClass, owner: u64) -> bool {
        let owner = LockOwner { session: SessionId(0), class, id: owner };
        self.locks.state.lock().held.held_by(ino, owner).next().is_some()
    }

    /// Does this mount hold any lock on the file exclusively?
    pub fn locks_exclusively(&self, ino: Ino, wish: &LockWish) -> bool {
        let state = self.locks.state.lock();
        state.held.held_by(ino, wish.lock_owner()).any(|lock| lock.kind == LockKind::Exclusive)
    }

    /// Takes, changes or lets go of a lock. `EDEADLK`, `ENOLCK`, or `EIO` when the server does not answer.
    pub async fn set_lock(self: &Arc<Self>, ino: Ino, wish: LockWish, wait: bool) -> FsResult<LockOutcome> {
        let _in_turn = self.locks.lane(ino).lock().await;
        loop {
            let numbered = Numbered::begin(&self.locks);
            match self.ask_lock(ino, &wish, wait, &numbered).await {
                Ok(LockAnswer::Granted(foreign)) => {
                    self.note_lock(ino, &wish);
                    return Ok(LockOutcome::Granted(foreign));
                }
                Ok(LockAnswer::Free) => {
                    self.note_lock(ino, &wish);
                    return Ok(LockOutcome::Free);
                }
                Ok(LockAnswer::Held(_)) => return Ok(LockOutcome::Held),
                Ok(LockAnswer::Waiting) => {
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
                Err(failure) => {
                    if wish.kind.is_none() {
                        self.locks.state.lock().gone.insert((ino, wish.class, wish.owner));
                    }
                    return Err(failure.into());
                }
            }
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
        match self.ask_or_expire(ATTEMPT, || MetaRequest::Lock { session, request: request() }).await? {
            MetaAnswer::Lock(answer) => Ok(answer),
            other => Err(Failure::Errno(unexpected(&other))),
        }
    }

    /// Keeps what the server keeps.
    fn note_lock(&self, ino: Ino, wish: &LockWish) {
        let mut state = self.locks.state.lock();
        let owner = wish.lock_owner();
        state.gone.remove(&(ino, wish.class, wish.owner));
        match wish.kind {
            None => state.held.unlock(ino, owner, wish.range),
            Some(kind) => {
                // Nobody else is known here, so nothing is in the way; the server counts what is too much.
                let _granted = state.held.lock(ino, Lock { owner, range: wish.range, kind, pid: wish.pid }, None);
            }
        }
    }

    /// The lock that was waited for is granted.
    pub fn note_granted(&self, ino: Ino, wish: &LockWish) {
        self.note_lock(ino, wish);
    }

    /// Stops waiting. What others have changed, if it came too late and the lock is held.
    pub async fn cancel_lock(self: &Arc<Self>, ino: Ino, wish: &LockWish, wait: &LockWait) -> Option<Foreign> {
        let (session, ticket) = (wait.session, wait.ticket);
        let _in_turn = self.locks.lane(ino).lock().await;
        self.locks.state.lock().waiting.remove(&ticket.0);
        let request =
            || MetaRequest::Lock { session, request: LockRequest::Cancel { ticket, since: self.foreign_seen() } };
        match self.ask_or_expire(ATTEMPT, request).await {
            Ok(MetaAnswer::Lock(LockAnswer::Granted(foreign))) => {
                self.note_lock(ino, wish);
                Some(foreign)
            }
            Ok(_) | Err(Failure::Expired { .. }) => None,
            Err(_) => {
                // It may be granted some time, to nobody: it is let go as soon as that can be said.
                self.note_lock(ino, wish);
                self.locks.state.lock().gone.insert((ino, wish.class, wish.owner));
                None
            }
        }
    }

    /// Somebody who would be in the way.
    pub async fn test_lock(self: &Arc<Self>, ino: Ino, wish: &LockWish) -> FsResult<Option<Lock>> {
        let LockWish { class, owner, range, kind, .. } = *wish;
        let kind = kind.ok_or(Errno(libc::EINVAL))?;
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

    /// Hears what the server has to say for as long as somebody waits for a lock, and lets go for those who are gone.
    pub async fn keep_locks(self: &Arc<Self>) {
        tokio::join!(self.listen(), self.let_go());
    }

    async fn listen(self: &Arc<Self>) {
        let mut retry = Retry::endless();
        loop {
            if self.locks.state.lock().waiting.is_empty() {
                self.locks.wanted.notified().await;
            }
            let (session, heard) = {
                let state = self.locks.state.lock();
                (state.session, state.heard)
            };
            let request = MetaRequest::Session(SessionRequest::Listen { session, heard, since: self.foreign_seen() });
            match self.once(&request, LISTEN_ATTEMPT).await {
                Ok(MetaAnswer::Events(events)) => {
                    retry = Retry::endless();
                    self.hear(session, events);
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

    fn hear(&self, session: SessionId, events: Vec<(u64, Event)>) {
        let mut state = self.locks.state.lock();
        if state.session != session {
            return;
        }
        for (number, event) in events {
            if number <= state.heard {
                continue;
            }
            state.heard = number;
            let Event::Granted { ticket, foreign } = event;
            if let Some(waiter) = state.waiting.remove(&ticket.0) {
                // Who has just been interrupted asks the server, which knows.
                let _interrupted = waiter.send(foreign);
            }
        }
    }

    async fn let_go(self: &Arc<Self>) {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let gone: Vec<_> = self.locks.state.lock().gone.iter().copied().collect();
            for (ino, class, owner) in gone {
                let wish = LockWish { class, owner, range: LockRange::WHOLE, kind: None, pid: 0 };
                if let Err(error) = self.set_lock(ino, wish, false).await {
                    debug!(%ino, ?error, "the lock of somebody who is gone could not be let go yet");
                }
            }
        }
    }

    /// Tells a restarted server which locks are held here. Returns the files of which some could not be kept.
    pub(super) async fn relock(self: &Arc<Self>, session: SessionId) -> Result<Vec<Ino>, Trouble> {
        self.locks.forget_waiters();
        let mut all_lost = Vec::new();
        for locks in self.locks.held().chunks(RELOCK_MAX) {
            let request = SessionRequest::Relock { session, locks: locks.to_vec() };
            match self.once(&MetaRequest::Session(request), ATTEMPT).await? {
                MetaAnswer::Relocked { lost } => all_lost.extend(lost),
                other => return Err(self.malformed(&other)),
            }
        }
        Ok(all_lost)
    }
}

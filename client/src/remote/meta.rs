//! The metadata server as the client sees it: queries, mutations exactly once, one session.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use holdfast_common::planted::{Bug, is_planted};
use holdfast_common::{
    Attr, Epoch, Ino, Position, Refusal, Sequence, SessionId, Time,
    cluster::ClusterMap,
    limits::{MUTATIONS_MAX, REPLIES_KEPT_PER_SESSION},
    net::{CallError, Endpoint, Frame, Peers},
    wire::{
        codec,
        meta::{
            Changed, LostChange, MetaAnswer, MetaReply, MetaRequest, Mutated, NewInode, Op, Query, Replayed,
            SessionRequest, StorageNotice,
        },
    },
};
use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};
use tracing::{debug, error, info, warn};

use super::{
    behind::Behind,
    locks::Locks,
    retry::{OutOfTime, Retry},
    undurable::Undurable,
};
use crate::{
    cache::{
        glimpses::Glimpse,
        names::{Asked, Listing, Names},
    },
    fs::{Errno, FsResult},
    sys::boot_time,
};

/// One attempt of a request that needs no disk.
pub(super) const ATTEMPT: Duration = Duration::from_secs(5);
/// Of a request that is answered when every mount has told what the server has lost.
const REPLAY_ATTEMPT: Duration = Duration::from_secs(130);
/// How long a new mount waits for a server that waits for others.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(80);
/// One attempt to get a newer map, by somebody who will try again anyway.
const REFRESH: Duration = Duration::from_secs(1);
/// How far the newest mutation may be ahead of the oldest that has no answer: the server keeps replies for no more, and
/// one that waits for a slow disk must not make those after it fail.
const SEQUENCE_SPAN_MAX: u64 = 1024;
/// Files that are open here beyond which none is made and opened before the server knows: it cannot refuse that, and refuses less of others.
const OPENS_AHEAD_MAX: usize = 1 << 17;
const _: () = assert!(SEQUENCE_SPAN_MAX * 2 <= REPLIES_KEPT_PER_SESSION);
const _: () = assert!(MUTATIONS_MAX as u64 <= SEQUENCE_SPAN_MAX);

/// The blocks of a commit may have been deleted as garbage since they were put, or are on too few servers for what is wanted by now: the
/// caller puts them again, and commits again.
pub const PUT_AGAIN: Errno = Errno(libc::EREMCHG);

/// Entries of a directory asked for at a time when it is to be known whole, and of how many it may have.
const LISTED_PAGE: u32 = 1024;
const LISTED_MAX: usize = 16 << 10;

/// How this mount introduces itself.
#[derive(Clone, Debug)]
pub struct MountName {
    pub host: String,
    pub mountpoint: String,
}

pub struct MetaClient {
    peers: Arc<dyn Peers>,
    server: Endpoint,
    name: MountName,
    io_timeout: Duration,
    session: Mutex<Session>,
    map: RwLock<Arc<ClusterMap>>,
    map_being_fetched: AtomicBool,
    durable_through: AtomicU64,
    /// The latest that the server has told.
    epoch: AtomicU64,
    /// What this session has changed and the server might still lose.
    undurable: Mutex<Undurable>,
    recovering: watch::Sender<Recovering>,
    rolled_back: OnceLock<RolledBack>,
    /// A mutation has been answered, or given up.
    room: Notify,
    /// Inodes that the server should know as open by this session.
    opens: Mutex<HashSet<Ino>>,
    /// False while the server has not taken in `opens` since a new session began.
    opens_told: AtomicBool,
    entering: tokio::sync::Mutex<()>,
    pub(super) locks: Locks,
    locks_lost: OnceLock<LocksLost>,
    /// In directories on which this mount has leases.
    names: Names,
    /// Names that are gone, which the server has not heard of.
    behind: Behind,
}

/// Is this mount telling a restarted server what that has to know before anything else?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recovering {
    No,
    Yes,
    /// It has restarted once more meanwhile.
    Again,
}

/// Told when the server has lost changes: all after the first position. Those of this mount have been made again, at or before
/// the second; those of others may have come out differently.
pub type RolledBack = Box<dyn Fn(Position, Position) + Send + Sync>;

/// Told of files of which locks that were held here are lost: somebody else may have had them since.
pub type LocksLost = Box<dyn Fn(&[Ino]) + Send + Sync>;

impl std::fmt::Debug for MetaClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MetaClient").field("server", &self.server).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Session {
    id: SessionId,
    renew_every: Duration,
    next: u64,
    in_flight: BTreeSet<u64>,
    server_instance: u64,
}

impl Session {
    fn first_unanswered(&self) -> u64 {
        self.in_flight.first().copied().unwrap_or(self.next)
    }

    /// The next sequence, unless it would be too far ahead of one that waits for its answer.
    fn take_sequence(&mut self) -> Option<(SessionId, Sequence)> {
        self.take_sequences(1).map(|(session, first)| (session, Sequence(first)))
    }

    /// As many in a row, or none: who holds some while he waits for others is waited for himself.
    fn take_sequences(&mut self, count: u64) -> Option<(SessionId, u64)> {
        let first = self.next;
        if first + count - 1 - self.first_unanswered() >= SEQUENCE_SPAN_MAX {
            return None;
        }
        self.next += count;
        self.in_flight.extend(first..self.next);
        Some((self.id, first))
    }
}

/// A mutation that has been applied.
#[derive(Clone, Debug)]
pub struct Applied {
    pub position: Position,
    pub outcome: Mutated,
    /// The directories whose entries it changed, as they are after it.
    pub directories: Vec<Attr>,
}

impl MetaClient {
    /// Opens a session. Fails with one sentence when no server answers within `patience`.
    pub async fn connect(
        peers: Arc<dyn Peers>,
        server: Endpoint,
        name: MountName,
        io_timeout: Duration,
        patience: Duration,
    ) -> Result<Arc<Self>, String> {
        let client = Arc::new(Self {
            peers,
            server,
            name,
            io_timeout,
            session: Mutex::default(),
            map: RwLock::default(),
            map_being_fetched: AtomicBool::new(false),
            durable_through: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            undurable: Mutex::default(),
            recovering: watch::Sender::new(Recovering::No),
            rolled_back: OnceLock::new(),
            room: Notify::new(),
            opens: Mutex::default(),
            opens_told: AtomicBool::new(true),
            entering: tokio::sync::Mutex::default(),
            locks: Locks::default(),
            locks_lost: OnceLock::new(),
            names: Names::default(),
            behind: Behind::default(),
        });
        client.first_contact(patience).await?;
        client.await_service().await?;
        Ok(client)
    }

    async fn first_contact(self: &Arc<Self>, patience: Duration) -> Result<(), String> {
        let mut retry = Retry::within(patience);
        loop {
            let trouble = match self.open_session(retry.remaining()).await {
                Ok(()) => {
                    return self.fetch_map().await.map_err(|e| format!("the cluster map could not be read: {e:?}"));
                }
                Err(Trouble::Refused(Refusal::Unavailable)) => "it is not ready".to_owned(),
                Err(Trouble::Refused(refusal)) => return Err(refusal.to_string()),
                Err(Trouble::Call(error @ CallError::Untrusted(..))) => return Err(error.to_string()),
                Err(Trouble::Call(error)) => error.to_string(),
            };
            if retry.pause().await.is_err() {
                return Err(format!("no metadata server answers: {trouble}"));
            }
        }
    }

    /// A server that has lost its power answers nothing before the mounts that it knew have spoken, or have been silent for too
    /// long: a mount that is made meanwhile waits for that, and is not there before.
    async fn await_service(self: &Arc<Self>) -> Result<(), String> {
        let mut retry = Retry::within(RECOVERY_PATIENCE);
        let request = MetaRequest::Query { session: self.session(), query: Query::GetAttr { ino: Ino::ROOT } };
        while matches!(self.once(&request, ATTEMPT).await, Err(Trouble::Refused(Refusal::Unavailable))) {
            if retry.pause().await.is_err() {
                return Err("the metadata server lost its power, and still waits for the mounts that it knew".into());
            }
        }
        Ok(())
    }

    pub fn session(&self) -> SessionId {
        self.session.lock().id
    }

    /// What is known of names without asking.
    pub fn names(&self) -> &Names {
        &self.names
    }

    pub fn renew_every(&self) -> Duration {
        self.session.lock().renew_every
    }

    pub fn map(&self) -> Arc<ClusterMap> {
        Arc::clone(&self.map.read())
    }

    /// Whether everything up to `position` survives a power cut, as far as this client has heard.
    pub fn is_durable(&self, position: Position) -> bool {
        position.0 <= self.durable_through.load(Ordering::Acquire)
    }

    /// What blocks are stamped with that are put now: no commit that comes in time is refused for garbage then.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    pub(super) fn server_instance(&self) -> u64 {
        self.session.lock().server_instance
    }

    /// Everything up to here survives a power cut.
    pub fn durable_through(&self) -> Position {
        Position(self.durable_through.load(Ordering::Acquire))
    }

    /// `rolled_back` hears of every loss of the server. The first one counts.
    pub fn tell_rolled_back(&self, rolled_back: RolledBack) {
        self.rolled_back.get_or_init(|| rolled_back);
    }

    /// `locks_lost` hears of every lock that this mount held and has lost. The first one counts.
    pub fn tell_locks_lost(&self, locks_lost: LocksLost) {
        self.locks_lost.get_or_init(|| locks_lost);
    }

    fn lose_locks(&self, inos: &[Ino]) {
        if inos.is_empty() {
            return;
        }
        error!(files = inos.len(), "locks are lost: what is open of these files does not work any more");
        if let Some(locks_lost) = self.locks_lost.get() {
            locks_lost(inos);
        }
    }

    pub async fn query(self: &Arc<Self>, query: Query) -> FsResult<MetaAnswer> {
        self.until_settled(self.behind.settled_for(&query)).await?;
        self.ask(ATTEMPT, || MetaRequest::Query { session: self.session(), query: query.clone() }).await
    }

    /// Learns all names in a directory, unless they are too many.
    pub async fn list(self: &Arc<Self>, listing: Listing) {
        let (ino, asked) = (listing.directory, boot_time());
        let (mut listed, mut cookie) = (Vec::new(), 0);
        loop {
            let page = Query::ReadDir { ino, cookie, entries_max: LISTED_PAGE, plus: true, unless: None };
            let Ok(MetaAnswer::Directory { entries, end, .. }) = self.query(page).await else {
                return self.names.give_up_listing(listing, false);
            };
            cookie = entries.last().map_or(cookie, |entry| entry.cookie);
            listed.extend(entries);
            if end {
                return self.names.list(listing, listed, asked);
            }
            if listed.len() > LISTED_MAX {
                return self.names.give_up_listing(listing, true);
            }
        }
    }

    /// Learns names in a directory, for a moment.
    pub async fn glimpse(self: &Arc<Self>, glimpse: Glimpse) {
        let (ino, asked) = (glimpse.directory, boot_time());
        let page = Query::ReadDir { ino, cookie: 0, entries_max: LISTED_PAGE, plus: true, unless: None };
        let listed = match self.query(page).await {
            Ok(MetaAnswer::Directory { entries, end, .. }) => Some((entries, end)),
            Ok(_) | Err(_) => None,
        };
        self.names.put_glimpse(glimpse, listed, asked);
    }

    /// Registers the open with the query, so that it is known again after the server restarted.
    pub async fn open(self: &Arc<Self>, ino: Ino, chunks: u32) -> FsResult<MetaAnswer> {
        let added = self.opens.lock().insert(ino);
        let answer = self.query(Query::Open { ino, chunks }).await;
        if answer.is_err() && added {
            self.opens.lock().remove(&ino);
        }
        answer
    }

    /// The server registers this open by itself (a create).
    pub fn opened(&self, ino: Ino) {
        self.opens.lock().insert(ino);
    }

    /// Nobody on this mount has these open any more.
    pub async fn released(self: &Arc<Self>, inos: Vec<Ino>) -> FsResult<()> {
        // Or one of them would be opened after it.
        self.until_behind_settled().await?;
        {
            let mut opens = self.opens.lock();
            for ino in &inos {
                opens.remove(ino);
            }
        }
        let opens =
            |released: Vec<Ino>| SessionRequest::Opens { session: self.session(), opened: Vec::new(), released };
        self.ask(ATTEMPT, || MetaRequest::Session(opens(inos.clone()))).await.map(drop)
    }

    pub async fn renew(self: &Arc<Self>, dirty_bytes: u64, repairs: u64) -> FsResult<()> {
        if !self.opens_told.load(Ordering::Acquire) {
            self.tell_opens().await;
        }
        let (session, asked) = (self.session(), boot_time());
        let request = || SessionRequest::Renew { session: self.session(), dirty_bytes, repairs };
        self.ask(ATTEMPT, || MetaRequest::Session(request())).await?;
        self.note_answered(session, asked);
        Ok(())
    }

    pub async fn close(self: &Arc<Self>) -> FsResult<()> {
        self.until_behind_settled().await?;
        let request = MetaRequest::Session(SessionRequest::Close { session: self.session() });
        self.once(&request, Duration::from_secs(2)).await.map(drop).map_err(|_| Errno(libc::EIO))
    }

    pub async fn report(self: &Arc<Self>, notice: StorageNotice) -> FsResult<()> {
        self.ask(ATTEMPT, || MetaRequest::Storage(notice.clone())).await.map(drop)
    }

    /// Everything applied for this session before is durable when this returns.
    pub async fn barrier(self: &Arc<Self>) -> FsResult<()> {
        self.until_behind_settled().await?;
        self.ask(self.io_timeout, || MetaRequest::Barrier { session: self.session() }).await.map(drop)
    }

    /// Applies `op` exactly once, however often the reply is lost (I5).
    pub async fn mutate(self: &Arc<Self>, op: Op, durable: bool) -> FsResult<Applied> {
        self.mutate_unless_lost(op, durable, self.lock_losses()).await
    }

    /// As [`MetaClient::mutate`], of what was written when locks had been lost `losses` times: `ESTALE`, and nothing is changed, if
    /// a lock on one of its files has been lost since.
    pub async fn mutate_unless_lost(self: &Arc<Self>, op: Op, durable: bool, losses: u64) -> FsResult<Applied> {
        self.until_behind_settled().await?;
        if self.undurable.lock().is_full() {
            self.make_room().await;
        }
        match self.mutate_in_session(&op, durable, losses).await {
            Err(Failure::Expired { session, perhaps_applied: false }) => {
                self.reenter(session).await;
                Ok(self.mutate_in_session(&op, durable, losses).await?)
            }
            result => Ok(result?),
        }
    }

    /// As [`MetaClient::mutate`], of a change that must not be asked for anew while it may have been made: goes on until its
    /// outcome is known, and says `late` each time that the mount's patience ends before.
    pub async fn mutate_until_known(self: &Arc<Self>, op: Op, losses: u64, late: impl Fn()) -> FsResult<Applied> {
        while self.until_behind_settled().await.is_err() {
            late();
        }
        if self.undurable.lock().is_full() {
            self.make_room().await;
        }
        let mut perhaps_applied = false;
        loop {
            let mutation = Mutation::begin(self).await;
            loop {
                match self.attempt(&mutation, &op, false, losses).await {
                    Err(Failure::Late { perhaps_applied: perhaps }) if perhaps || perhaps_applied => {
                        perhaps_applied = true;
                        late();
                    }
                    Err(Failure::Expired { session, perhaps_applied: false }) if !perhaps_applied => {
                        self.reenter(session).await;
                        break;
                    }
                    result => return Ok(result?),
                }
            }
        }
    }

    /// Takes a name away, and has the server do so later, if nobody can tell the difference. Returns what the name stood for, and the directory
    /// as it is now; `None`: nothing is done, and the server has to be asked.
    /// `may`: is there nothing against it that the server does not know?
    pub fn remove_ahead(
        self: &Arc<Self>,
        parent: Ino,
        name: &[u8],
        is_directory: bool,
        may: impl FnOnce(Ino) -> bool,
    ) -> Option<(Ino, Attr)> {
        let times = self.may_go_ahead()?;
        let mut has_to_begin = false;
        let removed = self.names.remove_ahead((parent, name), is_directory, times, may, |op| {
            has_to_begin = self.behind.push(op);
        });
        if has_to_begin {
            self.begin_to_catch_up();
        }
        removed
    }

    /// As [`MetaClient::remove_ahead`], of something new, which is `open` here then. Returns what is made, and the directory.
    pub fn make_ahead(self: &Arc<Self>, parent: Ino, name: &[u8], new: &NewInode, open: bool) -> Option<(Attr, Attr)> {
        let times = self.may_go_ahead()?;
        if open && self.opens.lock().len() >= OPENS_AHEAD_MAX {
            return None;
        }
        let ino = self.behind.choose(self.session())?;
        let mut has_to_begin = false;
        let made = self.names.make_ahead((parent, name), new, ino, times, |time| {
            let (name, new) = (name.to_vec(), new.clone());
            has_to_begin = self.behind.push(match open {
                true => {
                    self.opened(ino);
                    Op::PlaceOpen { parent, name, new, ino, time }
                }
                false => Op::Place { parent, name, new, ino, time },
            });
        });
        if has_to_begin {
            self.begin_to_catch_up();
        }
        made
    }

    /// The time, here and at the server, if changes may be begun that it does not know.
    fn may_go_ahead(&self) -> Option<(Duration, Time)> {
        let now = boot_time();
        let clock = self.behind.server_time(now)?;
        let is_calm = *self.recovering.borrow() == Recovering::No && self.behind.has_room();
        (is_calm && !self.undurable.lock().is_full()).then_some((now, clock))
    }

    fn begin_to_catch_up(self: &Arc<Self>) {
        let client = Arc::clone(self);
        drop(tokio::spawn(async move { client.catch_up().await }));
    }

    /// `EIO`, once, if a name is still there that a program was told is gone. After a [`MetaClient::barrier`].
    pub fn hear_failure(&self) -> FsResult<()> {
        if self.behind.take_failure() { Err(Errno(libc::EIO)) } else { Ok(()) }
    }

    /// Ends when the server has made what is behind. `EIO` when the mount's patience ends before.
    pub(super) async fn until_behind_settled(&self) -> FsResult<()> {
        self.until_settled(self.behind.settled()).await
    }

    async fn until_settled(&self, settled: impl Future<Output = ()>) -> FsResult<()> {
        match timeout(self.io_timeout, settled).await {
            Ok(()) => Ok(()),
            Err(_) => {
                error!("changes of names could not be made at the server within {:?}", self.io_timeout);
                Err(Errno(libc::EIO))
            }
        }
    }

    /// Has the server make what is behind, until nothing is.
    async fn catch_up(self: &Arc<Self>) {
        loop {
            let ops = self.behind.take(MUTATIONS_MAX);
            if ops.is_empty() {
                break;
            }
            let has_failed = self.make_behind(&ops).await;
            self.behind.end(&ops, has_failed);
        }
        if self.behind.is_waited_for() {
            self.tell_opens().await;
        }
    }

    /// Goes on until it is known what came of each. Returns whether any could not be made.
    async fn make_behind(self: &Arc<Self>, ops: &[Op]) -> bool {
        loop {
            let mutations = Mutation::begin_all(self, ops.len()).await;
            let Some(session) = mutations.first().map(|mutation| mutation.session) else { return false };
            let changes = || ops.iter().zip(&mutations).map(|(op, mutation)| (mutation.sequence, op.clone())).collect();
            let asked = Asked { at: boot_time(), session, answered_below: self.answered_below(session) };
            let request = || {
                Ok(MetaRequest::MutateMany {
                    session,
                    answered_below: self.answered_below(session),
                    changes: changes(),
                })
            };
            let mut perhaps_applied = false;
            let answer = loop {
                match self.ask_if(ATTEMPT, request).await {
                    Err(Failure::Late { perhaps_applied: perhaps }) => {
                        perhaps_applied |= perhaps;
                        warn!(changes = ops.len(), "names are changed here, and not at the server yet")
                    }
                    answer => break answer,
                }
            };
            let results = match answer {
                Ok(MetaAnswer::MutatedMany(results)) if results.len() == ops.len() => results,
                // In another session they are asked for anew; but what may have been made may have been undone by others since.
                Err(Failure::Expired { session, perhaps_applied: false }) if !perhaps_applied => {
                    self.reenter(session).await;
                    continue;
                }
                other => {
                    error!(
                        ?other,
                        changes = ops.len(),
                        "changes of names that programs were told of are not made at the server"
                    );
                    ops.iter().filter_map(Op::ahead).for_each(|place| self.names.caught_up(place, None));
                    return true;
                }
            };
            let made = ops.iter().zip(&mutations).zip(results);
            // All of them, whatever came of the first.
            return made.fold(false, |failed, ((op, mutation), result)| {
                failed | !self.note_made_behind(op, mutation.sequence, result, asked)
            });
        }
    }

    /// Returns whether it has been made.
    fn note_made_behind(&self, op: &Op, sequence: Sequence, result: Result<Changed, Refusal>, asked: Asked) -> bool {
        let Some(place) = op.ahead() else { return false };
        match result {
            Ok(Changed { position, outcome, directories, leases }) => {
                self.names.note_change(op, &outcome, position, &leases, asked);
                self.names.caught_up(place, Some((position, &directories)));
                if !self.is_durable(position) {
                    self.undurable.lock().note(position, sequence, op.clone(), &outcome);
                }
                true
            }
            Err(refusal) => {
                self.names.caught_up(place, None);
                // It has been made before, or somebody else has come first, when this mount was cut off for long.
                let is_gone = matches!(op, Op::Remove { .. }) && refusal == Refusal::NotFound;
                if !is_gone {
                    error!(?op, %refusal, "a change of names that a program was told of is not made");
                }
                is_gone
            }
        }
    }

    /// Has so much made durable that there is room for more changes. Without servers that can, the oldest go without.
    async fn make_room(self: &Arc<Self>) {
        let made = matches!(tokio::time::timeout(ATTEMPT, self.barrier()).await, Ok(Ok(())));
        // While the server is away, what is kept for it is kept.
        if !made && *self.recovering.borrow() == Recovering::No && self.query(Query::StatFs).await.is_ok() {
            let mut undurable = self.undurable.lock();
            if undurable.is_full() {
                let changes = undurable.give_up_half();
                warn!(
                    changes,
                    "nothing becomes durable: a power cut of the metadata server would take the oldest changes"
                );
            }
        }
    }

    async fn mutate_in_session(self: &Arc<Self>, op: &Op, durable: bool, losses: u64) -> Result<Applied, Failure> {
        let mutation = Mutation::begin(self).await;
        self.attempt(&mutation, op, durable, losses).await
    }

    async fn attempt(
        self: &Arc<Self>,
        mutation: &Mutation<'_>,
        op: &Op,
        durable: bool,
        losses: u64,
    ) -> Result<Applied, Failure> {
        let attempt = if durable { self.io_timeout } else { ATTEMPT };
        let written = op.written_files();
        let session = mutation.session;
        let changing = self.names.begin_change(op, session, mutation.sequence);
        let asked = Asked { at: boot_time(), session, answered_below: self.answered_below(session) };
        let request = || {
            if self.lost_lock_since(losses, &written) {
                return Err(Errno(libc::ESTALE));
            }
            Ok(MetaRequest::Mutate {
                session: mutation.session,
                sequence: mutation.sequence,
                answered_below: self.answered_below(mutation.session),
                durable,
                op: op.clone(),
            })
        };
        let answer =
            self.ask_if(attempt, request).await.inspect(|answer| self.names.note_attrs(&answer.attrs(), asked.at));
        let (position, outcome, directories, leases) = match answer {
            Ok(MetaAnswer::Mutated { position, outcome }) => (position, outcome, Vec::new(), Vec::new()),
            Ok(MetaAnswer::MutatedIn { position, outcome, directories, leases }) => {
                (position, outcome, directories, leases)
            }
            Ok(other) => return Err(Failure::Errno(unexpected(&other))),
            Err(failure) => {
                // Refused, so nothing has changed. For want of trust or room, also what was done when it was asked for before.
                if matches!(failure, Failure::Errno(Errno(errno)) if ![libc::EACCES, libc::ENOSPC].contains(&errno)) {
                    changing.settle();
                }
                return Err(failure);
            }
        };
        self.names.note_change(op, &outcome, position, &leases, asked);
        self.names.note_attrs(&directories.iter().collect::<Vec<_>>(), asked.at);
        self.behind.note_time(&outcome, boot_time());
        changing.settle();
        if !leases.is_empty() {
            self.locks.want_to_listen();
        }
        if !self.is_durable(position) {
            self.undurable.lock().note(position, mutation.sequence, op.clone(), &outcome);
        }
        Ok(Applied { position, outcome, directories })
    }

    /// Of `session`; nothing of it is given up once another has taken its place.
    fn answered_below(&self, session: SessionId) -> Sequence {
        let current = self.session.lock();
        if current.id == session { Sequence(current.first_unanswered()) } else { Sequence(1) }
    }

    /// Asks until there is an answer or the mount's patience ends. Faults of the path are retried, refusals are answers.
    async fn ask(self: &Arc<Self>, attempt: Duration, request: impl Fn() -> MetaRequest) -> FsResult<MetaAnswer> {
        Ok(self.ask_or_expire(attempt, request).await?)
    }

    pub(super) async fn ask_or_expire(
        self: &Arc<Self>,
        attempt: Duration,
        request: impl Fn() -> MetaRequest,
    ) -> Result<MetaAnswer, Failure> {
        self.ask_if(attempt, || Ok(request())).await
    }

    /// As [`MetaClient::ask_or_expire`], of a request that may have become pointless by the time it is sent, or sent again.
    pub(super) async fn ask_if(
        self: &Arc<Self>,
        attempt: Duration,
        request: impl Fn() -> FsResult<MetaRequest>,
    ) -> Result<MetaAnswer, Failure> {
        let mut retry = Retry::within(self.io_timeout);
        let mut perhaps_applied = false;
        loop {
            if self.until_recovered(retry.remaining()).await.is_err() {
                return Err(Failure::Late { perhaps_applied });
            }
            let request = request().map_err(Failure::Errno)?;
            match self.once(&request, attempt.min(retry.remaining())).await {
                Ok(answer) => return Ok(answer),
                Err(Trouble::Refused(Refusal::Unavailable)) => {}
                Err(Trouble::Refused(Refusal::SessionExpired)) => match (session_of(&request), &request) {
                    (
                        Some(session),
                        MetaRequest::Mutate { .. } | MetaRequest::MutateMany { .. } | MetaRequest::Lock { .. },
                    ) => {
                        return Err(Failure::Expired { session, perhaps_applied });
                    }
                    (session, _) => self.reenter(session.unwrap_or_else(|| self.session())).await,
                },
                Err(Trouble::Refused(refusal)) => return Err(Failure::Errno(refused(refusal))),
                Err(Trouble::Call(CallError::Untrusted(address, why))) => {
                    error!(%address, why, "the metadata server is not trusted, or does not trust this mount");
                    return Err(Failure::Errno(Errno(libc::EACCES)));
                }
                Err(Trouble::Call(_)) => perhaps_applied = true,
            }
            if retry.pause().await.is_err() {
                error!(server = %self.server.address, "the metadata server did not answer within {:?}", self.io_timeout);
                return Err(Failure::Late { perhaps_applied });
            }
        }
    }

    pub(super) async fn once(
        self: &Arc<Self>,
        request: &MetaRequest,
        deadline: Duration,
    ) -> Result<MetaAnswer, Trouble> {
        let malformed = |e: codec::CodecError| CallError::Malformed(self.server.address, e.to_string());
        let header = codec::encode(request).map_err(|_| Trouble::Refused(Refusal::BadRequest))?;
        let frame = Frame { header, payload: Vec::new() };
        super::on_network_thread().await;
        let asked = boot_time();
        let reply = self.peers.call(self.server, frame, deadline).await.map_err(Trouble::Call)?;
        let reply: MetaReply = codec::decode(&reply.header).map_err(malformed).map_err(Trouble::Call)?;
        self.note(&reply);
        // What came of a change may be what came of it when it was first asked for.
        let is_change = matches!(request, MetaRequest::Mutate { .. } | MetaRequest::MutateMany { .. });
        if let (Ok(answer), false) = (&reply.result, is_change) {
            self.names.note_attrs(&answer.attrs(), asked);
        }
        reply.result.map_err(Trouble::Refused)
    }

    /// Learns from a reply's envelope.
    fn note(self: &Arc<Self>, reply: &MetaReply) {
        let restarted = self.is_new_instance(reply.server_instance);
        if restarted {
            self.locks.forget_delegations();
            self.names.distrust(boot_time());
            info!("the metadata server has restarted: telling it what it has to know");
            // It counts the versions of its map anew, perhaps from below.
            let old = Arc::clone(&self.map.read());
            *self.map.write() =
                Arc::new(ClusterMap { version: 0, servers: old.servers.clone(), replicas: old.replicas });
            self.begin_recovery();
        }
        self.epoch.fetch_max(reply.epoch.0, Ordering::AcqRel);
        // A server that has lost changes counts on from where it came to itself: until those are made again, its positions
        // are not those that they were answered with.
        if *self.recovering.borrow() == Recovering::No {
            let known = self.durable_through.fetch_max(reply.durable_through.0, Ordering::AcqRel);
            if reply.durable_through.0 > known {
                self.undurable.lock().forget_through(reply.durable_through);
            }
        }
        if reply.map_version > self.map.read().version && !self.map_being_fetched.swap(true, Ordering::AcqRel) {
            let client = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = client.fetch_map().await {
                    warn!(?error, "the cluster map could not be read");
                }
                client.map_being_fetched.store(false, Ordering::Release);
            });
        }
    }

    /// Notices a restart once.
    fn is_new_instance(&self, instance: u64) -> bool {
        let mut session = self.session.lock();
        let is_new = session.server_instance != 0 && session.server_instance != instance;
        session.server_instance = instance;
        is_new
    }

    fn begin_recovery(self: &Arc<Self>) {
        let mut begun = false;
        self.recovering.send_modify(|recovering| {
            begun = *recovering == Recovering::No;
            *recovering = if begun { Recovering::Yes } else { Recovering::Again };
        });
        if begun {
            let client = Arc::clone(self);
            tokio::spawn(async move { client.recover().await });
        }
    }

    /// Until a server that has restarted knows what it has to, nothing else is asked of it.
    async fn until_recovered(&self, patience: Duration) -> Result<(), OutOfTime> {
        if *self.recovering.borrow() == Recovering::No {
            return Ok(());
        }
        let mut recovering = self.recovering.subscribe();
        let recovered = recovering.wait_for(|recovering| *recovering == Recovering::No);
        match tokio::time::timeout(patience, recovered).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => {
                error!(server = %self.server.address, "the metadata server has not recovered within {:?}", self.io_timeout);
                Err(OutOfTime)
            }
        }
    }

    /// Tries for as long as it takes: what a server has lost, nobody else can give back to it.
    async fn recover(self: &Arc<Self>) {
        let mut retry = Retry::endless();
        let mut lost = false;
        loop {
            self.recovering.send_replace(Recovering::Yes);
            let session = self.session();
            match self.recover_once(session, &mut lost).await {
                Ok(()) => {}
                Err(Trouble::Refused(Refusal::SessionExpired)) => {
                    self.reenter(session).await;
                    // What it had is durable by now, or gone.
                    self.roll_back(Position(0), Position(0));
                }
                Err(trouble) => {
                    warn!(?trouble, "the restarted metadata server does not know what it has to yet");
                    retry.wait().await;
                    continue;
                }
            }
            let mut done = false;
            self.recovering.send_modify(|recovering| {
                done = *recovering == Recovering::Yes;
                if done {
                    *recovering = Recovering::No;
                }
            });
            if done {
                return;
            }
        }
    }

    /// `lost`: this mount knows by now that something was lost.
    async fn recover_once(self: &Arc<Self>, session: SessionId, lost: &mut bool) -> Result<(), Trouble> {
        let lost_locks = self.relock(session).await?;
        self.lose_locks(&lost_locks);
        match self.send_opens(session).await? {
            Some(after) => {
                *lost = true;
                self.replay(session, after).await
            }
            None if *lost => self.settle(session).await,
            None => Ok(()),
        }
    }

    /// All has been made again, and the answer that said where was lost: when everything is durable, that does not matter.
    async fn settle(self: &Arc<Self>, session: SessionId) -> Result<(), Trouble> {
        self.once(&MetaRequest::Barrier { session }, self.io_timeout).await?;
        *self.undurable.lock() = Undurable::default();
        self.roll_back(Position(0), Position(0));
        Ok(())
    }

    fn roll_back(&self, after: Position, through: Position) {
        self.names.distrust(boot_time());
        if let Some(rolled_back) = self.rolled_back.get() {
            rolled_back(after, through);
        }
    }

    /// Has made again what came after `after` and was lost. The answer comes when every mount's has been.
    async fn replay(self: &Arc<Self>, session: SessionId, after: Position) -> Result<(), Trouble> {
        let mut lost = self.undurable.lock().lost_after(after);
        if is_planted(Bug::ReplaySkipped) {
            lost = vec![Vec::new()];
        }
        let parts = u32::try_from(lost.len()).unwrap_or(u32::MAX);
        let changes: usize = lost.iter().map(Vec::len).sum();
        warn!(%after, changes, "the metadata server has lost what was not durable: having it made again");
        let ask = |(part, changes): (u32, &Vec<LostChange>)| {
            let replay = SessionRequest::Replay { session, part, parts, changes: changes.clone() };
            async move { self.once(&MetaRequest::Session(replay), REPLAY_ATTEMPT).await }
        };
        let answers = futures_util::future::try_join_all((0..).zip(&lost).map(ask)).await?;
        let mut through = after;
        for (changes, answer) in lost.iter().zip(answers) {
            let MetaAnswer::Replayed(replayed) = answer else { return Err(self.malformed(&answer)) };
            for (change, replayed) in changes.iter().zip(replayed) {
                through = through.max(self.take_replayed(change, &replayed));
            }
        }
        self.roll_back(after, through);
        Ok(())
    }

    /// Returns where the change is now.
    fn take_replayed(&self, change: &LostChange, replayed: &Replayed) -> Position {
        if let Err(refusal) = replayed.result {
            error!(op = ?change.op, %refusal, "a change that the metadata server has lost could not be made again");
        }
        self.undurable.lock().moved(change.position, change.sequence, replayed.result.ok());
        replayed.result.unwrap_or(Position(0))
    }

    pub(super) fn malformed(&self, answer: &MetaAnswer) -> Trouble {
        Trouble::Call(CallError::Malformed(self.server.address, format!("{answer:?}")))
    }

    /// Tells the server what is open here. What fails is tried again with the next renewal.
    async fn tell_opens(self: &Arc<Self>) {
        let session = self.session();
        match self.send_opens(session).await {
            Ok(_) => {}
            Err(Trouble::Refused(Refusal::SessionExpired)) => self.reenter(session).await,
            Err(trouble) => warn!(?trouble, "the open files are not registered with the metadata server yet"),
        }
    }

    /// Returns the position after which the server has lost everything, if it has.
    async fn send_opens(self: &Arc<Self>, session: SessionId) -> Result<Option<Position>, Trouble> {
        let opens: Vec<Ino> = self.opens.lock().iter().copied().collect();
        let (instance, is_behind) = (Some(self.server_instance()), self.behind.say_if_any());
        let reopen = SessionRequest::Reopen { session, opens, instance, is_behind };
        let answer = self.once(&MetaRequest::Session(reopen), ATTEMPT).await?;
        let MetaAnswer::Reopened { replay_after } = answer else { return Err(self.malformed(&answer)) };
        self.opens_told.store(true, Ordering::Release);
        Ok(replay_after)
    }

    /// A new session in place of `expired`, with the same opens.
    pub(super) async fn reenter(self: &Arc<Self>, expired: SessionId) {
        let _one_at_a_time = self.entering.lock().await;
        if self.session() != expired {
            return;
        }
        warn!(session = %expired, "the session expired: opening another");
        self.names.distrust(boot_time());
        let undurable = std::mem::take(&mut *self.undurable.lock());
        if !undurable.is_empty() {
            // They are its own: in another session they might be made twice.
            warn!("what was not durable in the old session is not made again, should the metadata server lose it");
        }
        if let Err(trouble) = self.open_session(ATTEMPT).await {
            return warn!(?trouble, "no new session yet");
        }
        self.opens_told.store(false, Ordering::Release);
        if let Err(trouble) = self.send_opens(self.session()).await {
            warn!(?trouble, "the open files are not registered with the new session yet");
        }
    }

    async fn open_session(self: &Arc<Self>, deadline: Duration) -> Result<(), Trouble> {
        let request = MetaRequest::Session(SessionRequest::Open {
            instance: rand::random(),
            host: self.name.host.clone(),
            mountpoint: self.name.mountpoint.clone(),
        });
        match self.once(&request, deadline).await? {
            MetaAnswer::Session { session, renew_every_ms } => {
                let mut state = self.session.lock();
                state.id = session;
                state.renew_every = Duration::from_millis(renew_every_ms.clamp(100, 60_000));
                state.next = 1;
                state.in_flight.clear();
                drop(state);
                let lost_locks = self.locks.begin_session(session, self.server_instance());
                self.lose_locks(&lost_locks);
                self.room.notify_waiters();
                Ok(())
            }
            other => Err(self.malformed(&other)),
        }
    }

    async fn fetch_map(self: &Arc<Self>) -> FsResult<()> {
        let have = self.map.read().version;
        let answer = self.query(Query::ClusterMap { have }).await?;
        self.take_map(answer)
    }

    /// Asks once for the map as it is now. For whoever found no server that would do: which servers are up may have
    /// changed, and no other answer may come by for a while to say so.
    pub async fn refresh_map(self: &Arc<Self>) {
        let have = self.map.read().version;
        let request = MetaRequest::Query { session: self.session(), query: Query::ClusterMap { have } };
        match self.once(&request, REFRESH).await {
            Ok(answer) => {
                if let Err(error) = self.take_map(answer) {
                    warn!(?error, "the cluster map could not be read");
                }
            }
            Err(trouble) => debug!(?trouble, "the cluster map could not be read"),
        }
    }

    fn take_map(&self, answer: MetaAnswer) -> FsResult<()> {
        match answer {
            MetaAnswer::ClusterMap(map) => {
                let mut current = self.map.write();
                if map.version > current.version {
                    *current = Arc::new(map);
                }
                Ok(())
            }
            other => Err(unexpected(&other)),
        }
    }
}

#[derive(Debug)]
pub(super) enum Trouble {
    Refused(Refusal),
    Call(CallError),
}

/// Why a request ended without an answer that counts.
#[derive(Debug)]
pub(super) enum Failure {
    Errno(Errno),
    /// The mount's patience has ended.
    Late {
        perhaps_applied: bool,
    },
    /// The session is no longer known, so neither is whether an earlier, lost attempt of a mutation was applied.
    Expired {
        session: SessionId,
        perhaps_applied: bool,
    },
}

impl From<Failure> for Errno {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Errno(errno) => errno,
            Failure::Late { .. } => Self(libc::EIO),
            Failure::Expired { .. } => {
                error!("the session expired in the middle of a change: whether it was made is not known");
                Self(libc::EIO)
            }
        }
    }
}

/// The session in whose name a request was made.
fn session_of(request: &MetaRequest) -> Option<SessionId> {
    match request {
        MetaRequest::Mutate { session, .. }
        | MetaRequest::Lock { session, .. }
        | MetaRequest::Barrier { session }
        | MetaRequest::MutateMany { session, .. }
        | MetaRequest::Query { session, query: Query::Open { .. } }
        | MetaRequest::Session(
            SessionRequest::Renew { session, .. }
            | SessionRequest::Reopen { session, .. }
            | SessionRequest::Close { session }
            | SessionRequest::Opens { session, .. }
            | SessionRequest::Replay { session, .. }
            | SessionRequest::Relock { session, .. }
            | SessionRequest::Listen { session, .. },
        ) => Some(*session),
        _ => None,
    }
}

fn refused(refusal: Refusal) -> Errno {
    if matches!(refusal, Refusal::BlockGone | Refusal::TooFewReplicas) {
        return PUT_AGAIN;
    }
    if refusal.errno() == libc::EIO {
        error!(%refusal, "the metadata server refused");
    }
    Errno(refusal.errno())
}

/// An answer of the wrong kind is the server's bug: logged here, `EIO` to the program.
pub fn unexpected(answer: &MetaAnswer) -> Errno {
    error!(?answer, "the metadata server answered another question");
    Errno(libc::EIO)
}

/// A sequence number that is given back when the mutation has been answered, or given up.
struct Mutation<'a> {
    client: &'a MetaClient,
    session: SessionId,
    sequence: Sequence,
}

impl<'a> Mutation<'a> {
    async fn begin(client: &'a MetaClient) -> Self {
        let (session, sequence) = Self::once_there_is_room(client, Session::take_sequence).await;
        Self { client, session, sequence }
    }

    /// As many in one session, at most `SEQUENCE_SPAN_MAX`.
    async fn begin_all(client: &'a MetaClient, count: usize) -> Vec<Self> {
        let count = count as u64;
        let (session, first) = Self::once_there_is_room(client, |session| session.take_sequences(count)).await;
        (first..first + count).map(|sequence| Self { client, session, sequence: Sequence(sequence) }).collect()
    }

    async fn once_there_is_room<T>(client: &MetaClient, take: impl Fn(&mut Session) -> Option<T>) -> T {
        loop {
            let room = client.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            let taken = take(&mut client.session.lock());
            if let Some(taken) = taken {
                return taken;
            }
            room.await;
        }
    }
}

impl Drop for Mutation<'_> {
    fn drop(&mut self) {
        {
            let mut state = self.client.session.lock();
            if state.id == self.session {
                state.in_flight.remove(&self.sequence.0);
            }
        }
        self.client.room.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mutation_without_an_answer_holds_back_those_too_far_ahead_of_it() {
        let mut session = Session { id: SessionId(1), next: 1, ..Session::default() };
        for expected in 1..=SEQUENCE_SPAN_MAX {
            assert_eq!(session.take_sequence(), Some((SessionId(1), Sequence(expected))));
            if expected > 1 {
                session.in_flight.remove(&expected);
            }
        }
        assert_eq!((session.first_unanswered(), session.take_sequence()), (1, None));
        session.in_flight.remove(&1);
        assert_eq!(session.take_sequence(), Some((SessionId(1), Sequence(SEQUENCE_SPAN_MAX + 1))));
    }
}

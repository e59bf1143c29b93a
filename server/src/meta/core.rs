//! What the tasks of a metadata server share.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use holdfast_common::planted::{Bug, is_planted};
use holdfast_common::{
    BlockHash, ClusterId, Epoch, Ino, Kind, Position, Refusal, Replicas, Sequence, ServerId, SessionId, Time,
    clock::Clock,
    cluster::Standing,
    disk::Disk,
    net::{CallError, Endpoint, Frame, Peers},
    wire::{
        codec,
        meta::{JournalEntry, Lease, Op, Replayed},
        storage::{StorageAnswer, StorageReply, StorageRequest},
    },
    work,
};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};
use tokio::sync::{Notify, watch};

use super::{
    budget::Budget,
    cluster::Cluster,
    committer::Proposer,
    copier::UnderWay,
    copy_rate::CopyRate,
    journal::{Journal, Note},
    leases::{ChangingNames, Leases},
    locking::Locking,
    log::{Log, LogError},
    mend::BadCopies,
    recent::Recent,
    recovery::Recovery,
    sessions::Sessions,
    state::{Command, StorageError, holdings, query, settled},
    store::Store,
    unsynced::Unsynced,
};
use crate::ballast::Ballast;

/// Silence is judged several times a second, if this process runs.
const JUDGED_EVERY_MAX: Duration = Duration::from_secs(1);

/// Bytes of log after which the space on the disk is looked at again.
const SPACE_LOOK_BYTES: u64 = 1 << 20;
/// Until the operator's word is durable.
const STAND_DEADLINE: Duration = Duration::from_secs(30);

/// Why a metadata server must stop: it can no longer keep its promises.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("the log could not be synced: {0}")]
    Sync(#[source] std::io::Error),
    #[error("the log is at entry {log} and the database at {database}: they no longer go together")]
    Diverged { log: Position, database: Position },
    #[error("a thread of the metadata server ended unexpectedly")]
    Thread,
}

/// State, log and memory of one metadata server. Locks are held for moments, never across an await.
pub struct Core {
    pub store: Store,
    pub log: Mutex<Log>,
    pub clock: Arc<dyn Clock>,
    pub cluster_id: ClusterId,
    pub cluster: Mutex<Cluster>,
    /// How long a server has to be down before it is replaced.
    pub replace_after: Duration,
    /// How much is done in the background.
    pub budget: Mutex<Budget>,
    /// What happened, for people.
    journal: Mutex<Journal>,
    pub sessions: Mutex<Sessions>,
    pub locking: Locking,
    pub leases: Arc<Leases>,
    /// How long a restarted server waits for mounts to say which locks they hold.
    pub lock_grace: Duration,
    pub recent: Mutex<Recent>,
    pub unsynced: Mutex<Unsynced>,
    /// Servers on which something was left that should be deleted.
    pub compare_soon: Mutex<BTreeSet<ServerId>>,
    /// The operator wants all servers equally full.
    pub balance_wanted: AtomicBool,
    /// Bytes that are still to be moved for that.
    pub balance_left: AtomicU64,
    /// When the metadata was last copied to storage servers.
    pub backed_up: Mutex<Option<Time>>,
    /// Bad copies that their servers have found, to be replaced.
    pub bad_copies: Mutex<BadCopies>,
    /// Servers that are to leave also if nobody else has what they have.
    pub given_up: Mutex<BTreeSet<ServerId>>,
    /// Copies that are being made.
    pub copies: Arc<UnderWay>,
    /// How many have been made lately.
    pub copy_rate: Mutex<CopyRate>,
    /// Why the servers cannot be made equally full; empty: nothing hinders.
    pub balance_hindered: Mutex<String>,
    /// Blocks whose durable copies are too few for a barrier: the duties make more.
    pub thin: Mutex<BTreeSet<BlockHash>>,
    /// Where the tables and the log are.
    pub disk: Arc<dyn Disk>,
    pub directory: PathBuf,
    /// What that disk keeps for the day on which others have filled it.
    pub ballast: Arc<Ballast>,
    /// There is less room on that disk than has to stay free.
    pub full: AtomicBool,
    /// What mounts say again, and what became of it.
    pub recovery: Mutex<Recovery>,
    recovering: watch::Sender<bool>,
    /// A mount has said all that it had done.
    pub replays_wanted: Notify,
    /// Counts how often something that mounts had said is done.
    replayed: watch::Sender<u64>,
    /// Blocks that none of their holders has any more, though none was ever durable, and since when that is known.
    pub vanished: Mutex<BTreeMap<BlockHash, Duration>>,
    /// When silence was last judged.
    judged: Mutex<Duration>,
    applied: AtomicU64,
    epoch: AtomicU64,
    durable: watch::Sender<Position>,
    /// Somebody waits for durability.
    pub barrier_wanted: Notify,
    /// The space on the disk is to be looked at.
    pub space_wanted: Notify,
    /// Bytes that the log has grown by since that was last wanted.
    logged: AtomicU64,
    /// There are copies to be made.
    pub copies_wanted: Notify,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("applied", &self.applied()).finish_non_exhaustive()
    }
}

/// What the last life left, on disk and by memory of it.
#[derive(Debug)]
pub struct Recovered {
    pub disk: Arc<dyn Disk>,
    pub directory: PathBuf,
    pub ballast: Arc<Ballast>,
    pub store: Store,
    pub log: Log,
    pub cluster: Cluster,
    pub replace_after: Duration,
    pub sessions: Sessions,
    pub unsynced: Unsynced,
    pub durable: Position,
    pub epoch: Epoch,
    pub recovery: Recovery,
    /// Everybody waits until it is over.
    pub recovering: bool,
    /// How long mounts may take to say which locks they hold.
    pub lock_grace: Duration,
}

impl Core {
    pub fn new(clock: Arc<dyn Clock>, cluster_id: ClusterId, recovered: Recovered) -> Arc<Self> {
        let Recovered {
            disk,
            directory,
            ballast,
            store,
            log,
            cluster,
            replace_after,
            sessions,
            unsynced,
            durable,
            epoch,
            recovery,
            recovering,
            lock_grace,
        } = recovered;
        let journal = Mutex::new(Journal::open(Arc::clone(&disk), &directory));
        let applied = log.next().0 - 1;
        let judged = Mutex::new(clock.monotonic());
        let recent = Mutex::new(Recent::new(Position(applied), clock.monotonic()));
        let locking = Locking::new(clock.monotonic() + lock_grace);
        let leases = Arc::new(Leases::new(clock.monotonic()));
        Arc::new(Self {
            disk,
            directory,
            ballast,
            full: AtomicBool::new(false),
            judged,
            store,
            log: Mutex::new(log),
            clock,
            cluster_id,
            cluster: Mutex::new(cluster),
            replace_after,
            budget: Mutex::default(),
            journal,
            sessions: Mutex::new(sessions),
            locking,
            leases,
            lock_grace,
            recent,
            unsynced: Mutex::new(unsynced),
            compare_soon: Mutex::default(),
            balance_wanted: AtomicBool::new(false),
            balance_left: AtomicU64::new(0),
            backed_up: Mutex::default(),
            bad_copies: Mutex::default(),
            given_up: Mutex::default(),
            copies: Arc::default(),
            copy_rate: Mutex::default(),
            balance_hindered: Mutex::default(),
            thin: Mutex::default(),
            recovering: watch::Sender::new(recovering),
            replays_wanted: Notify::new(),
            replayed: watch::Sender::new(0),
            recovery: Mutex::new(recovery),
            vanished: Mutex::default(),
            applied: AtomicU64::new(applied),
            epoch: AtomicU64::new(epoch.0),
            durable: watch::Sender::new(durable),
            barrier_wanted: Notify::new(),
            space_wanted: Notify::new(),
            logged: AtomicU64::new(0),
            copies_wanted: Notify::new(),
        })
    }

    /// Writes into the journal what happened.
    pub fn tell(&self, note: Note) {
        self.journal.lock().add(self.clock.now(), note);
    }

    /// The same, of what may happen often.
    pub fn tell_rarely(&self, note: Note) {
        self.journal.lock().add_rarely(self.clock.now(), note);
    }

    /// Entries of the journal after `number`, one page of them.
    pub fn told_after(&self, number: u64) -> Vec<JournalEntry> {
        self.journal.lock().after(number)
    }

    /// Records what is wanted of a storage server, durably, and has it count.
    pub async fn stand(&self, proposer: &Proposer, server: ServerId, standing: Standing) -> Result<(), Refusal> {
        let (position, outcome) = proposer.propose(Command::Stand { server, standing }).await?;
        outcome?;
        self.cluster.lock().stand(server, standing, self.clock.monotonic());
        if standing != Standing::Leaving {
            self.given_up.lock().remove(&server);
        }
        self.until_durable(position, STAND_DEADLINE).await
    }

    /// Records how many copies are to be kept of what has no number of its own, durably, and has it count.
    pub async fn set_replicas(&self, proposer: &Proposer, replicas: Replicas) -> Result<(), Refusal> {
        let (position, outcome) = proposer.propose(Command::SetReplicas { replicas }).await?;
        outcome?;
        self.cluster.lock().set_replicas(replicas);
        self.until_durable(position, STAND_DEADLINE).await
    }

    /// The time by which to judge somebody's silence. Time in which this process did not run (it was stopped, or its
    /// machine was suspended) is held against nobody: they could not be heard.
    pub fn judging_time(&self) -> Duration {
        let now = self.clock.monotonic();
        let gap = now.saturating_sub(std::mem::replace(&mut *self.judged.lock(), now));
        if gap > JUDGED_EVERY_MAX {
            tracing::warn!(?gap, "this process did not run for a while: nobody's silence in that time counts");
            self.cluster.lock().forgive(gap, now);
            self.sessions.lock().forgive(gap, now);
        }
        now
    }

    /// May locks be given to who did not have them before this server's start?
    pub fn gives_locks(&self) -> bool {
        self.locking.is_open(self.sessions.lock().all_confirmed(), self.clock.monotonic())
    }

    /// Returns when the session may change the names that `op` changes, if any: nobody else answers for names in those directories until
    /// what this returns is dropped. `Unavailable` while another mount may do so by a lease that this life of the server knows nothing of.
    pub async fn begin_change(&self, session: SessionId, op: &Op) -> Result<Option<ChangingNames>, Refusal> {
        let directories = op.directories();
        if directories.is_empty() {
            return Ok(None);
        }
        self.check_old_leases(session)?;
        let now = || self.clock.monotonic();
        loop {
            let target = self.removed_directory(op);
            let all = directories.iter().copied().chain(target).collect();
            let changing = self.leases.change(session, all, now, |holder, lease| self.recall(holder, lease)).await;
            if self.removed_directory(op) == target {
                return Ok(Some(changing));
            }
        }
    }

    /// The directory that the change takes away, if it is one and is there: a mount may know more of what is in it than this server.
    fn removed_directory(&self, op: &Op) -> Option<Ino> {
        let (parent, name) = match op {
            Op::Rmdir { parent, name } | Op::Remove { parent, name, .. } => (*parent, name),
            Op::Rename { to, to_name, .. } => (*to, to_name),
            _ => return None,
        };
        // A fault will be met by whoever applies the change.
        let found = self.store.ask(|rows| settled(query::lookup(rows, parent, name))).ok()?.ok()?;
        (found.kind == Kind::Directory).then_some(found.ino)
    }

    /// Returns when this server knows all that any mount but `session` has told its programs of names in `directory`. `Unavailable` as above.
    pub async fn begin_look(&self, session: SessionId, directory: Ino) -> Result<(), Refusal> {
        self.check_old_leases(session)?;
        let now = || self.clock.monotonic();
        self.leases.look(session, directory, now, |holder, lease| self.recall(holder, lease)).await;
        Ok(())
    }

    fn check_old_leases(&self, session: SessionId) -> Result<(), Refusal> {
        let may_be_old =
            self.leases.may_be_old(self.clock.monotonic()) && !self.sessions.lock().rely_on_nothing(session);
        if may_be_old { Err(Refusal::Unavailable) } else { Ok(()) }
    }

    fn recall(&self, holder: SessionId, lease: Lease) {
        let sessions = self.sessions.lock();
        // Who has ended hears nothing any more.
        if sessions.exists(holder) {
            self.locking.recall_lease(holder, lease);
        }
    }

    /// Do mounts still say again what was lost?
    pub fn is_recovering(&self) -> bool {
        *self.recovering.borrow()
    }

    /// Some of the blocks that a server is on record for ([`holdings::held_after`]), as of now. Others are served meanwhile.
    pub async fn held_after(
        &self,
        server: ServerId,
        after: Option<BlockHash>,
        count: usize,
    ) -> Result<holdings::Page, Fault> {
        let view = self.store.view()?;
        let page = work::run(move || holdings::held_after(&*view, server, after, count)).await;
        Ok(page.map_err(|_| Fault::Thread)??)
    }

    /// May anything be deleted that no file names? Not while what a mount may still say again could name it.
    pub fn may_collect(&self) -> bool {
        !self.is_recovering() && !self.sessions.lock().is_anything_owed()
    }

    /// Nobody is waited for any more.
    pub fn end_recovery(&self) {
        self.leases.await_old(self.clock.monotonic());
        self.recovering.send_replace(false);
        self.note_replayed();
    }

    /// Something that mounts had said is done again.
    pub fn note_replayed(&self) {
        self.replayed.send_modify(|count| *count += 1);
    }

    /// Waits until all that the mount had done is done again. `Unavailable` past the deadline.
    pub async fn replayed(
        &self,
        session: SessionId,
        sequences: &[Sequence],
        deadline: Duration,
    ) -> Result<Vec<Replayed>, Refusal> {
        let mut replayed = self.replayed.subscribe();
        let done = async {
            loop {
                replayed.borrow_and_update();
                if let Some(answer) = self.recovery.lock().answer(session, sequences) {
                    return Some(answer);
                }
                replayed.changed().await.ok()?;
            }
        };
        tokio::time::timeout(deadline, done).await.ok().flatten().ok_or(Refusal::Unavailable)
    }

    /// Everything through this is visible.
    pub fn applied(&self) -> Position {
        Position(self.applied.load(Ordering::Acquire))
    }

    /// The log has grown, and the tables with it: a disk may be full before the next time that its space is looked at by itself.
    pub fn note_logged(&self, bytes: u64) {
        if self.logged.fetch_add(bytes, Ordering::Relaxed) + bytes >= SPACE_LOOK_BYTES {
            self.logged.store(0, Ordering::Relaxed);
            self.space_wanted.notify_one();
        }
    }

    pub fn set_applied(&self, position: Position, epoch: Epoch) {
        self.epoch.store(epoch.0, Ordering::Release);
        self.applied.store(position.0, Ordering::Release);
    }

    /// Of the newest condemnation that is visible.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// Everything through this survives a power cut.
    pub fn durable(&self) -> Position {
        *self.durable.borrow()
    }

    pub fn set_durable(&self, position: Position) {
        self.durable.send_if_modified(|durable| {
            let later = position > *durable;
            *durable = (*durable).max(position);
            later
        });
    }

    /// Waits until `position` is durable; asks for a barrier if need be. `Unavailable` past the deadline.
    pub async fn until_durable(&self, position: Position, deadline: Duration) -> Result<(), Refusal> {
        let mut durable = self.durable.subscribe();
        if *durable.borrow_and_update() >= position || is_planted(Bug::DurableTooEarly) {
            return Ok(());
        }
        self.barrier_wanted.notify_one();
        match tokio::time::timeout(deadline, durable.wait_for(|durable| *durable >= position)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Refusal::Unavailable),
        }
    }
}

/// Asks a storage server. A refusal is an answer.
pub async fn ask(
    peers: &dyn Peers,
    to: Endpoint,
    request: &StorageRequest,
    deadline: Duration,
) -> Result<Result<StorageAnswer, Refusal>, CallError> {
    let malformed = |e: codec::CodecError| CallError::Malformed(to.address, e.to_string());
    let frame = Frame { header: codec::encode(request).map_err(malformed)?, payload: Vec::new() };
    let answer = peers.call(to, frame, deadline).await?;
    Ok(codec::decode::<StorageReply>(&answer.header).map_err(malformed)?.0)
}

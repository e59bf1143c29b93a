//! Answers requests: who may ask what, and where the answer comes from.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use holdfast_common::{
    BlockHash, ChunkIndex, Ino, Kind, Position, Refusal, Replicas, Sequence, ServerId, SessionId, Time,
    cluster::Standing,
    limits::{HASH_LIST_MAX, HEADER_SIZE_MAX, LISTEN_PATIENCE, MUTATIONS_MAX},
    net::{
        BoxFuture, Frame, Peers, Serve,
        enrol::Enrol,
        identity::{NodeName, PeerIdentity, Role},
        tls::{Ca, Fingerprint, NODE_VALIDITY},
    },
    wire::{
        codec,
        enrol::{EnrolReply, EnrolRequest, Enrolled},
        meta::{
            self, AdminRequest, ClusterStatus, Comparison, CopyFault, Event, FileMap, Foreign, LockAnswer, LockRequest,
            LostChange, MetaAnswer, MetaReply, MetaRequest, Op, Query, Replayed, SessionRequest, Severity,
            StorageNotice,
        },
        storage::StorageRequest,
    },
    work,
};

use tokio::sync::mpsc;

use super::{
    backup::Backup,
    cluster::Heartbeat,
    committer::{Changed, Proposer},
    compare,
    core::{Core, ask},
    journal::Note,
    leases::ChangingNames,
    locking::{News, Outcome, Wish},
    names, operate,
    server::Authority,
    sessions::OPENS_MAX,
    state::{
        Command, Newest, Reply, Rows, Step, StorageError, View, blocks, query, settled,
        violations::{corrections, violations},
    },
    surplus,
};

/// How long a mutation or a barrier may wait to become durable.
const DURABLE_DEADLINE: Duration = Duration::from_secs(30);
/// How long a mount that has said what it had done may wait for the others.
const REPLAY_DEADLINE: Duration = Duration::from_secs(120);
/// Bytes of what a storage server says about its failure.
const COMPLAINT_MAX: usize = 500;
/// Renewals of a session in the time after which it would end.
const RENEWALS_PER_TIMEOUT: u32 = 30;
/// A storage server takes an order to scrub within this.
const SCRUB_DEADLINE: Duration = Duration::from_secs(1);
/// Sentences in an answer to `Check`.
const VIOLATIONS_MAX: usize = 1000;
/// Corrections of a kind that are made with one entry.
const CORRECTIONS_MAX: usize = 4000;
/// A token is good for at most a year.
const TOKEN_VALIDITY_MAX: u64 = 366 * 86_400;

/// Bytes of one part of a backup.
const BACKUP_PART_LENGTH: usize = 1 << 20;
/// Backups that are read at the same time: each keeps the tables of its moment.
const BACKUPS_MAX: usize = 2;
/// A backup of which nothing has been asked for so long is given up.
const BACKUP_PATIENCE: Duration = Duration::from_secs(60);

/// A backup that somebody reads.
struct Reading {
    number: u64,
    backup: Backup,
    /// The one that was read last.
    part: u32,
    last: Vec<u8>,
    asked: Duration,
}

/// 32 bytes that nobody can guess: the seam for chance.
pub type Secrets = Box<dyn Fn() -> [u8; 32] + Send + Sync>;

pub struct Service {
    pub core: Arc<Core>,
    pub proposer: Proposer,
    pub peers: Arc<dyn Peers>,
    /// Told in every reply: a new one means that opens must be told again.
    pub instance: u64,
    pub session_timeout: Duration,
    /// Here if nodes can enrol here.
    pub ca: Option<Ca>,
    /// Of the CA in this server's own credentials.
    pub ca_fingerprint: Fingerprint,
    pub secrets: Secrets,
    /// Who holds it looks through all tables, for long: one at a time.
    looking_at_everything: tokio::sync::Mutex<()>,
    /// Backups that are being read, by their numbers.
    backups: parking_lot::Mutex<BTreeMap<u64, Arc<tokio::sync::Mutex<Reading>>>>,
    /// Where a fault is told that must end the process.
    pub faults: mpsc::UnboundedSender<StorageError>,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("instance", &self.instance).finish_non_exhaustive()
    }
}

type Answer = Result<MetaAnswer, Refusal>;

/// How long somebody who asks for a lock waits for the mount that decides on the file.
const RECALL_PATIENCE: Duration = Duration::from_secs(2);

impl Serve for Service {
    fn serve(self: Arc<Self>, from: PeerIdentity, request: Frame) -> BoxFuture<'static, Frame> {
        Box::pin(async move {
            let result = self.answer(from, &request).await;
            self.envelope(result)
        })
    }
}

impl Service {
    pub fn new(
        core: Arc<Core>,
        proposer: Proposer,
        peers: Arc<dyn Peers>,
        session_timeout: Duration,
        authority: Authority,
        faults: mpsc::UnboundedSender<StorageError>,
    ) -> Self {
        let Authority { ca, ca_fingerprint, secrets } = authority;
        let [a, b, c, d, e, f, g, h, ..] = secrets();
        let instance = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let (looking_at_everything, backups) = Default::default();
        Self {
            core,
            proposer,
            peers,
            instance,
            session_timeout,
            ca,
            ca_fingerprint,
            secrets,
            looking_at_everything,
            backups,
            faults,
        }
    }

    fn envelope(&self, result: Answer) -> Frame {
        let durable_through = self.core.durable();
        let map_version = self.core.cluster.lock().version();
        let epoch = self.core.epoch();
        let reply = |result| MetaReply { server_instance: self.instance, map_version, durable_through, epoch, result };
        let header = codec::encode(&reply(result)).or_else(|error| {
            tracing::error!(%error, "an answer does not fit into a message of {HEADER_SIZE_MAX} bytes");
            codec::encode(&reply(Err(Refusal::TooLarge)))
        });
        Frame { header: header.unwrap_or_default(), payload: Vec::new() }
    }

    async fn answer(&self, from: PeerIdentity, request: &Frame) -> Answer {
        if from.cluster != self.core.cluster_id {
            return Err(Refusal::WrongCluster);
        }
        let bytes = request.header.len();
        let request: MetaRequest = codec::decode(&request.header).map_err(|error| {
            tracing::warn!(peer = %from.node, %error, "a request does not decode");
            Refusal::BadRequest
        })?;
        check_role(from.node.role, &request).inspect_err(|_| {
            tracing::warn!(peer = %from.node, "a request that its role does not allow");
        })?;
        if self.core.is_recovering() && !is_for_recovery(&request) {
            return Err(Refusal::Unavailable);
        }
        match request {
            MetaRequest::Query { session, query } => self.query(from.node, session, query).await,
            MetaRequest::Mutate { session, sequence, answered_below, durable, op } => {
                self.check_settled(session, from.node)?;
                let changing = self.core.begin_change(session, &op).await?;
                self.mutate(Command::Mutate { session, sequence, answered_below, op }, changing, durable).await
            }
            MetaRequest::MutateMany { session, answered_below, changes } => {
                self.check_settled(session, from.node)?;
                self.mutate_many(session, answered_below, changes).await
            }
            MetaRequest::Session(request) => self.session(from.node, request, bytes).await,
            MetaRequest::Barrier { session } => {
                self.check_settled(session, from.node)?;
                self.core.until_durable(self.core.applied(), DURABLE_DEADLINE).await?;
                Ok(MetaAnswer::Done)
            }
            MetaRequest::Storage(notice) => self.storage(from.node, notice).await,
            MetaRequest::Admin(request) => self.admin(request).await,
            MetaRequest::Lock { session, request } => {
                self.check_settled(session, from.node)?;
                self.core.sessions.lock().heard(session, self.core.clock.monotonic());
                let answer = self.lock(session, request).await;
                self.still_there(session)?;
                answer.map(MetaAnswer::Lock)
            }
        }
    }

    async fn lock(&self, session: SessionId, request: LockRequest) -> Result<LockAnswer, Refusal> {
        let locking = &self.core.locking;
        match request {
            LockRequest::Set { sequence, answered_below, ino, class, owner, range, kind, pid, wait, since } => {
                if kind.is_some() && !self.core.gives_locks() {
                    return Err(Refusal::Unavailable);
                }
                let wish = Wish { ino, class, owner, range, kind, pid, wait };
                if kind.is_some() {
                    locking.recall(session, ino, RECALL_PATIENCE).await;
                }
                Ok(match locking.set(session, sequence, answered_below, &wish)? {
                    Outcome::Granted if kind.is_none() => LockAnswer::Free,
                    Outcome::Granted => LockAnswer::Granted(self.foreign(session, since)),
                    Outcome::Delegated(number) => {
                        let foreign = self.foreign(session, since);
                        LockAnswer::Delegated { foreign, number, valid_ms: self.delegations_valid_ms() }
                    }
                    Outcome::Held(lock) => LockAnswer::Held(lock),
                    Outcome::Waiting => LockAnswer::Waiting,
                })
            }
            LockRequest::Cancel { ticket, .. } if locking.cancel(session, ticket) => Ok(LockAnswer::Free),
            LockRequest::Cancel { since, .. } => Ok(LockAnswer::Granted(self.foreign(session, since))),
            LockRequest::Test { ino, class, owner, range, kind } => {
                if !self.core.gives_locks() {
                    return Err(Refusal::Unavailable);
                }
                let wish = Wish { ino, class, owner, range, kind: Some(kind), pid: 0, wait: false };
                locking.recall(session, ino, RECALL_PATIENCE).await;
                Ok(locking.test(session, &wish)?.map_or(LockAnswer::Free, LockAnswer::Held))
            }
            LockRequest::Return { ino, number, locks } => {
                locking.give_back(session, ino, number, &locks)?;
                Ok(LockAnswer::Free)
            }
        }
    }

    /// Whoever has not been heard for so long may be taken for dead soon, or another life of this server may have begun.
    fn delegations_valid_ms(&self) -> u64 {
        let certain = self.core.lock_grace.min(self.session_timeout) / 2;
        u64::try_from(certain.as_millis()).unwrap_or(u64::MAX)
    }

    fn foreign(&self, session: SessionId, since: Position) -> Foreign {
        let since = since.max(self.core.sessions.lock().began(session));
        self.core.recent.lock().foreign(session, since, self.core.clock.monotonic())
    }

    async fn events(&self, session: SessionId, heard: u64, since: Position) -> Vec<(u64, Event)> {
        for news in self.core.locking.take_heard(session, heard) {
            if let News::RecallLease(lease) = news {
                self.core.leases.give_back(session, lease);
            }
        }
        let events = self.core.locking.events(session, heard, LISTEN_PATIENCE).await;
        let told = |news| match news {
            News::Granted(ticket) => Event::Granted { ticket, foreign: self.foreign(session, since) },
            News::Recall { ino, number } => Event::Recall { ino, number },
            News::AskAgain(ticket) => Event::AskAgain { ticket },
            News::RecallLease(lease) => Event::RecallLease(lease),
        };
        events.into_iter().map(|(number, news)| (number, told(news))).collect()
    }

    fn check_session(&self, session: SessionId, node: NodeName) -> Result<(), Refusal> {
        self.core.sessions.lock().check(session, node)
    }

    /// As above; and a mount that has not said yet what it holds, or owes what it had done before the power was lost, does nothing
    /// new before.
    fn check_settled(&self, session: SessionId, node: NodeName) -> Result<(), Refusal> {
        let sessions = self.core.sessions.lock();
        sessions.check(session, node)?;
        let settled = sessions.is_confirmed(session) && sessions.owes(session).is_none();
        if settled { Ok(()) } else { Err(Refusal::Unavailable) }
    }

    /// A session that has ended while it was served leaves nothing behind.
    fn still_there(&self, session: SessionId) -> Result<(), Refusal> {
        if self.core.sessions.lock().exists(session) {
            return Ok(());
        }
        self.core.locking.end(session);
        Err(Refusal::SessionExpired)
    }

    /// A fault of the tables ends the process; whoever asked is told that much.
    fn fault(&self, fault: StorageError) -> Refusal {
        // The receiver goes only with the process.
        let _stopping = self.faults.send(fault);
        Refusal::Fault
    }

    fn view(&self) -> Result<Arc<View>, Refusal> {
        self.core.store.view().map_err(|fault| self.fault(fault))
    }

    fn ask<T>(&self, question: impl FnOnce(&Newest<'_>) -> Step<T>) -> Result<T, Refusal> {
        self.core.store.ask(|rows| settled(question(rows))).unwrap_or_else(|fault| Err(self.fault(fault)))
    }

    async fn mutate(&self, command: Command, changing: Option<ChangingNames>, durable: bool) -> Answer {
        let Changed { position, outcome, directories, leases } = self.proposer.change(command, changing).await?;
        let Reply::Mutated(outcome) = outcome? else { return Err(Refusal::Fault) };
        if durable {
            self.core.until_durable(position, DURABLE_DEADLINE).await?;
        }
        if directories.is_empty() {
            return Ok(MetaAnswer::Mutated { position, outcome });
        }
        Ok(MetaAnswer::MutatedIn { position, outcome, directories, leases })
    }

    async fn mutate_many(&self, session: SessionId, answered_below: Sequence, changes: Vec<(Sequence, Op)>) -> Answer {
        if changes.len() > MUTATIONS_MAX {
            return Err(Refusal::TooLarge);
        }
        let mut begun = Vec::with_capacity(changes.len());
        for (sequence, op) in changes {
            let changing = self.core.begin_change(session, &op).await?;
            let command = Command::Mutate { session, sequence, answered_below, op };
            begun.push(self.proposer.begin(command, changing).await?);
        }
        let mut changed = Vec::with_capacity(begun.len());
        for change in begun {
            let Changed { position, outcome, directories, leases } = change.ended().await?;
            changed.push(match outcome {
                Ok(Reply::Mutated(outcome)) => Ok(meta::Changed { position, outcome, directories, leases }),
                Ok(_) => return Err(Refusal::Fault),
                // None of the rest is made: all that is asked for again in another session is found to be made, or is made.
                Err(Refusal::SessionExpired) => return Err(Refusal::SessionExpired),
                Err(refusal) => Err(refusal),
            });
        }
        Ok(MetaAnswer::MutatedMany(changed))
    }

    /// Proposes, and answers when the entry is durable.
    async fn decree(&self, command: Command) -> Result<Reply, Refusal> {
        let (position, outcome) = self.proposer.propose(command).await?;
        let reply = outcome?;
        self.core.until_durable(position, DURABLE_DEADLINE).await?;
        Ok(reply)
    }

    async fn query(&self, node: NodeName, session: SessionId, query: Query) -> Answer {
        match query {
            Query::Lookup { parent, name } => {
                self.core.begin_look(session, parent).await?;
                self.ask(|view| query::lookup(view, parent, &name)).map(MetaAnswer::Attr)
            }
            Query::GetAttr { ino } => self.ask(|view| query::attr(view, ino)).map(MetaAnswer::Attr),
            Query::Open { ino, chunks } => self.open(node, session, ino, chunks),
            Query::ReadLink { ino } => self.ask(|view| query::read_link(view, ino)).map(MetaAnswer::Link),
            Query::ReadDir { ino, cookie, entries_max, plus, unless } => {
                self.core.begin_look(session, ino).await?;
                self.ask(|view| query::read_directory(view, ino, cookie, entries_max, plus, unless)).map(|page| {
                    match page {
                        Some(query::Page { entries, end, parent, version }) => {
                            MetaAnswer::Directory { entries, end, parent, version }
                        }
                        None => MetaAnswer::Unchanged,
                    }
                })
            }
            Query::GetXattr { ino, name } => self.ask(|view| query::xattr(view, ino, &name)).map(MetaAnswer::Bytes),
            Query::ListXattr { ino } => self.ask(|view| query::xattrs(view, ino)).map(MetaAnswer::Names),
            Query::Pieces { ino, first, count } => {
                self.ask(|view| query::file_map(view, ino, first, count)).map(MetaAnswer::Map)
            }
            Query::Seek { ino, offset, hole } => {
                self.ask(|view| query::seek(view, ino, offset, hole)).map(|sought| match sought {
                    query::Sought::Found(offset) => MetaAnswer::Offset(offset),
                    query::Sought::Beyond(offset) => MetaAnswer::OffsetBeyond(offset),
                })
            }
            Query::StatFs => {
                let inodes = self.ask(|rows| Ok(rows.counters().inodes))?;
                Ok(MetaAnswer::StatFs(self.core.cluster.lock().space(inodes)))
            }
            Query::ClusterMap { have: _ } => Ok(MetaAnswer::ClusterMap(self.core.cluster.lock().map())),
        }
    }

    fn open(&self, node: NodeName, session: SessionId, ino: Ino, chunks: u32) -> Answer {
        self.check_settled(session, node)?;
        let (attr, map) = self.ask(|rows| {
            let attr = query::attr(rows, ino)?;
            let map = match chunks > 0 && attr.kind == Kind::File {
                false => FileMap { data_version: attr.data_version, ..FileMap::default() },
                true => query::file_map(rows, ino, ChunkIndex(0), chunks)?,
            };
            Ok((attr, map))
        })?;
        let mut sessions = self.core.sessions.lock();
        if attr.nlink == 0 && !sessions.holds(session, ino) {
            return Err(Refusal::NotFound);
        }
        sessions.hold(session, &[ino])?;
        Ok(MetaAnswer::Opened { attr, map })
    }

    /// `bytes`: of the request.
    async fn session(&self, node: NodeName, request: SessionRequest, bytes: usize) -> Answer {
        let now = self.core.clock.monotonic();
        match request {
            SessionRequest::Open { instance, host, mountpoint } => {
                let command = Command::OpenSession { node, instance, host, mountpoint };
                let Reply::Session(session) = self.decree(command).await? else { return Err(Refusal::Fault) };
                tracing::info!(%session, peer = %node, "a mount opened a session");
                // Often enough that a mount which has nothing else to say notices a restart within the recovery window.
                let renew_every = self.session_timeout / RENEWALS_PER_TIMEOUT;
                return Ok(MetaAnswer::Session { session, renew_every_ms: super::cluster::millis(renew_every) });
            }
            SessionRequest::Renew { session, dirty_bytes, repairs } => {
                self.check_session(session, node)?;
                self.core.sessions.lock().renew(session, dirty_bytes, repairs, now);
            }
            SessionRequest::Reopen { session, opens, instance, is_behind } => {
                self.check_session(session, node)?;
                if instance.is_some_and(|instance| instance != self.instance) {
                    return Err(Refusal::Unavailable);
                }
                self.core.sessions.lock().reopen(session, bounded(&opens)?, is_behind, now)?;
                if is_behind {
                    self.core.leases.await_old(now);
                }
                self.core.recovery.lock().heard(session);
                let replay_after = self.core.sessions.lock().owes(session);
                return Ok(MetaAnswer::Reopened { replay_after });
            }
            SessionRequest::Replay { session, part, parts, changes } => {
                self.check_session(session, node)?;
                return self.replay(session, (part, parts), changes, bytes).await.map(MetaAnswer::Replayed);
            }
            SessionRequest::Relock { session, locks } => {
                self.check_session(session, node)?;
                let in_time = !self.core.locking.is_open(false, now);
                let lost = self.core.locking.restore(session, locks, in_time)?;
                self.still_there(session)?;
                return Ok(MetaAnswer::Relocked { lost });
            }
            SessionRequest::Listen { session, heard, instance, since } => {
                self.check_session(session, node)?;
                self.core.sessions.lock().heard(session, now);
                let heard = if instance == self.instance { heard } else { 0 };
                let events = self.events(session, heard, since).await;
                self.still_there(session)?;
                return Ok(MetaAnswer::Events(events));
            }
            SessionRequest::Opens { session, opened, released } => {
                self.check_session(session, node)?;
                let mut sessions = self.core.sessions.lock();
                sessions.hold(session, bounded(&opened)?)?;
                sessions.release(session, bounded(&released)?);
            }
            SessionRequest::Close { session } => {
                self.check_session(session, node)?;
                self.proposer.propose(Command::EndSession { session }).await?.1?;
                self.core.leases.end(session);
                tracing::info!(%session, peer = %node, "a mount closed its session");
            }
        }
        Ok(MetaAnswer::Done)
    }

    async fn replay(
        &self,
        session: SessionId,
        part: (u32, u32),
        changes: Vec<LostChange>,
        bytes: usize,
    ) -> Result<Vec<Replayed>, Refusal> {
        let sequences: Vec<Sequence> = changes.iter().map(|change| change.sequence).collect();
        self.core.recovery.lock().take(session, part, changes, bytes)?;
        self.core.replays_wanted.notify_one();
        self.core.replayed(session, &sequences, REPLAY_DEADLINE).await
    }

    async fn storage(&self, node: NodeName, notice: StorageNotice) -> Answer {
        match notice {
            StorageNotice::Heartbeat { address, zone, boot, load } => {
                self.heartbeat(ServerId(node.id), Heartbeat { address, zone, boot, load }).await?;
            }
            StorageNotice::BadCopy { block, server, fault, repaired } => {
                tracing::warn!(%block, %server, ?fault, repaired, reporter = %node, "a reader met a bad copy");
                let what = format!(
                    "a reader met a copy that is {}",
                    if fault == CopyFault::Missing { "missing" } else { "damaged" }
                );
                let note = Note::new(Severity::Warning, format!("storage server {server}"), what);
                let done = if repaired {
                    "a good copy took its place"
                } else {
                    "it is off the record, and a copy is made elsewhere"
                };
                self.core.tell_rarely(note.meaning("none: it read another copy").doing(done));
                self.proposer.propose(Command::BadCopy { server, block, fault, repaired }).await?.1?;
                self.core.copies_wanted.notify_one();
            }
            StorageNotice::BadCopies { blocks } => self.bad_copies(ServerId(node.id), blocks)?,
            StorageNotice::Failed { why } => self.failed(ServerId(node.id), why),
        }
        Ok(MetaAnswer::Done)
    }

    fn failed(&self, server: ServerId, mut why: String) {
        why.truncate(why.floor_char_boundary(COMPLAINT_MAX));
        tracing::error!(%server, why, "a storage server has to stop");
        self.core.cluster.lock().failed(server, why.clone(), self.core.clock.monotonic());
        let note = Note::new(Severity::Error, format!("storage server {server}"), format!("has to stop: {why}"));
        let after = self.core.replace_after.as_secs();
        self.core.tell_rarely(note.meaning("blocks that it has are one copy short while it is away").doing(format!(
            "mounts go to others at once; its blocks are copied to others if it stays away for {after} s"
        )));
    }

    fn bad_copies(&self, server: ServerId, blocks: Vec<BlockHash>) -> Result<(), Refusal> {
        if blocks.len() > HASH_LIST_MAX {
            return Err(Refusal::BadRequest);
        }
        tracing::warn!(%server, blocks = blocks.len(), "a storage server has found bad copies: good ones are made");
        self.core.bad_copies.lock().add(server, blocks)
    }

    async fn heartbeat(&self, server: ServerId, beat: Heartbeat) -> Result<(), Refusal> {
        let is_news = self.core.cluster.lock().is_news(server, &beat);
        if is_news {
            let (address, zone) = (beat.address, beat.zone.clone());
            tracing::info!(%server, %address, zone, "a storage server is registered");
            self.proposer.propose(Command::RegisterServer { server, address, zone }).await?.1?;
        }
        self.expire_backups();
        let now = self.core.clock.monotonic();
        let mut cluster = self.core.cluster.lock();
        let was_up = cluster.is_up(server);
        cluster.heard(server, beat, now);
        let foreground = cluster.foreground();
        drop(cluster);
        self.core.budget.lock().observe(foreground, now);
        if !was_up {
            tracing::info!(%server, "a storage server is up");
            self.core.tell(Note::new(Severity::Info, format!("storage server {server}"), "is up"));
            self.core.copies_wanted.notify_one();
        }
        Ok(())
    }

    async fn admin(&self, request: AdminRequest) -> Answer {
        match request {
            AdminRequest::Status => self.status().map(|status| MetaAnswer::Status(Box::new(status))),
            AdminRequest::IssueToken { role, valid_secs } => self.issue_token(role, valid_secs).await,
            AdminRequest::Check => {
                let Ok(_alone) = self.looking_at_everything.try_lock() else { return Err(Refusal::Unavailable) };
                let view = self.view()?;
                let checked = work::run(move || violations(&*view, VIOLATIONS_MAX)).await;
                let found = checked.map_err(|_| Refusal::Fault)?.map_err(|fault| self.fault(fault))?;
                Ok(MetaAnswer::Violations(found))
            }
            AdminRequest::Mend => self.mend().await,
            AdminRequest::Compare { server, bucket, mend } => self.compare(server, bucket, mend).await,
            AdminRequest::Scrub => self.scrub().await,
            AdminRequest::Stand { server, standing } => self.stand(server, standing, false).await,
            AdminRequest::StandDespite { server, standing } => self.stand(server, standing, true).await,
            AdminRequest::Journal { after } => Ok(MetaAnswer::Journal(self.core.told_after(after))),
            AdminRequest::Names { blocks } => self.names(blocks).await,
            AdminRequest::Lost { after } => self.lost(after).await,
            AdminRequest::Backup { backup, part } => self.backup(backup, part).await,
            AdminRequest::Rebalance => self.rebalance(),
            AdminRequest::SetReplicas { replicas } => self.set_replicas(replicas).await,
        }
    }

    /// Nobody else looks for corrections meanwhile, nor finds what is being made.
    async fn mend(&self) -> Answer {
        let Ok(_alone) = self.looking_at_everything.try_lock() else { return Err(Refusal::Unavailable) };
        if !self.core.may_collect() {
            return Err(Refusal::Unavailable);
        }
        let view = self.view()?;
        let seen = view.counters().position;
        let looked = work::run(move || corrections(&*view, CORRECTIONS_MAX)).await;
        let corrections = looked.map_err(|_| Refusal::Fault)?.map_err(|fault| self.fault(fault))?;
        let found = corrections.len() as u64;
        if found == 0 {
            return Ok(MetaAnswer::Mended { found, made: 0 });
        }
        tracing::warn!(found, first = ?corrections.first(), "metadata that follows from other metadata is made again");
        let (position, corrected) = self.proposer.propose(Command::Correct { seen, corrections }).await?;
        self.core.until_durable(position, DURABLE_DEADLINE).await?;
        match corrected? {
            Reply::Corrected { made } => Ok(MetaAnswer::Mended { found, made }),
            _ => Err(Refusal::Fault),
        }
    }

    fn rebalance(&self) -> Answer {
        let owed = self.view()?.counters().payable();
        if owed > 0 {
            return Ok(MetaAnswer::Declined(vec![format!("{owed} blocks are owed a copy, which go first")]));
        }
        self.core.balance_wanted.store(true, Ordering::Relaxed);
        Ok(MetaAnswer::Done)
    }

    async fn set_replicas(&self, replicas: Replicas) -> Answer {
        let Some(count) = replicas.own() else { return Err(Refusal::Invalid) };
        let (before, reasons) = {
            let cluster = self.core.cluster.lock();
            (cluster.replicas(), operate::objections_to_replicas(&cluster, count))
        };
        if !reasons.is_empty() {
            return Ok(MetaAnswer::Declined(reasons));
        }
        self.core.set_replicas(&self.proposer, replicas).await?;
        tracing::info!(before, count, "the operator wants another number of copies");
        self.core.tell(operate::note_of_replicas(before, count));
        Ok(MetaAnswer::Done)
    }

    /// `despite`: whatever speaks against it.
    async fn stand(&self, server: ServerId, standing: Standing, despite: bool) -> Answer {
        if self.core.cluster.lock().standing(server).is_none() {
            return Ok(MetaAnswer::Declined(vec![format!("there is no storage server {server}")]));
        }
        if standing == Standing::Removed {
            // Who is empty is removed by the drainer.
            return Err(Refusal::Invalid);
        }
        if !despite {
            let reasons = self.objections(server, standing).await?;
            if !reasons.is_empty() {
                return Ok(MetaAnswer::Declined(reasons));
            }
        }
        self.core.stand(&self.proposer, server, standing).await?;
        if despite && standing == Standing::Leaving {
            self.core.given_up.lock().insert(server);
        }
        tracing::info!(%server, %standing, "the operator wants something else of a storage server");
        self.core.tell(operate::note(server, standing));
        Ok(MetaAnswer::Done)
    }

    async fn objections(&self, server: ServerId, standing: Standing) -> Result<Vec<String>, Refusal> {
        if standing == Standing::Serving {
            return Ok(Vec::new());
        }
        let core = Arc::clone(&self.core);
        let surveyed = work::run(move || operate::survey(&core, server)).await.map_err(|_| Refusal::Fault)?;
        let survey = surveyed.map_err(|fault| self.fault(fault))?;
        Ok(operate::objections(&self.core.cluster.lock(), server, standing, &survey))
    }

    /// The next part of the backup `number`, or again the one before; 0 begins one.
    async fn backup(&self, number: u64, part: u32) -> Answer {
        let reading = match number {
            0 => self.begin_backup()?,
            _ => self.backups.lock().get(&number).cloned().ok_or(Refusal::NotFound)?,
        };
        let mut reading = reading.lock_owned().await;
        reading.asked = self.core.clock.monotonic();
        if part == reading.part && part > 0 {
            let bytes = reading.last.clone();
            return Ok(MetaAnswer::BackupPart { backup: reading.number, bytes });
        }
        if part != reading.part + 1 && part != 0 {
            return Err(Refusal::Invalid);
        }
        let read = work::run(move || {
            reading.last = reading.backup.next_part(BACKUP_PART_LENGTH)?;
            reading.part = part;
            Ok::<_, StorageError>(reading)
        });
        let reading = read.await.map_err(|_| Refusal::Fault)?.map_err(|fault| self.fault(fault))?;
        if reading.last.is_empty() {
            self.core.until_durable(reading.backup.position(), DURABLE_DEADLINE).await?;
            self.backups.lock().remove(&reading.number);
        }
        Ok(MetaAnswer::BackupPart { backup: reading.number, bytes: reading.last.clone() })
    }

    fn begin_backup(&self) -> Result<Arc<tokio::sync::Mutex<Reading>>, Refusal> {
        let now = self.core.clock.monotonic();
        let backup = Backup::new(self.view()?, self.core.cluster_id, self.core.clock.now());
        let mut backups = self.backups.lock();
        if backups.len() >= BACKUPS_MAX {
            return Err(Refusal::Unavailable);
        }
        let [a, b, c, d, e, f, g, h, ..] = (self.secrets)();
        let number = u64::from_le_bytes([a, b, c, d, e, f, g, h]).max(1);
        let reading = Reading { number, backup, part: 0, last: Vec::new(), asked: now };
        Ok(Arc::clone(backups.entry(number).or_insert(Arc::new(tokio::sync::Mutex::new(reading)))))
    }

    /// Gives up backups of which nobody asks the next part: each keeps the tables of its moment from being reused.
    fn expire_backups(&self) {
        let now = self.core.clock.monotonic();
        // One that is being read is used.
        let is_used = |reading: &Reading| now.saturating_sub(reading.asked) < BACKUP_PATIENCE;
        self.backups.lock().retain(|_, reading| reading.try_lock().map_or(true, |reading| is_used(&reading)));
    }

    async fn lost(&self, after: Option<BlockHash>) -> Answer {
        let view = self.view()?;
        let found = work::run(move || blocks::lost_after(&*view, after, HASH_LIST_MAX)).await;
        Ok(MetaAnswer::Blocks(found.map_err(|_| Refusal::Fault)?.map_err(|fault| self.fault(fault))?))
    }

    async fn names(&self, blocks: Vec<BlockHash>) -> Answer {
        if blocks.len() > HASH_LIST_MAX {
            return Err(Refusal::BadRequest);
        }
        let Ok(_alone) = self.looking_at_everything.try_lock() else { return Err(Refusal::Unavailable) };
        let view = self.view()?;
        let found = work::run(move || names::files_of(&*view, &blocks.into_iter().collect())).await;
        Ok(MetaAnswer::Paths(found.map_err(|_| Refusal::Fault)?.map_err(|fault| self.fault(fault))?))
    }

    async fn scrub(&self) -> Answer {
        let up = self.core.cluster.lock().up();
        for server in up {
            let Some(to) = self.core.cluster.lock().endpoint(server) else { continue };
            match ask(&*self.peers, to, &StorageRequest::Scrub, SCRUB_DEADLINE).await {
                Ok(Ok(_)) => {}
                other => {
                    tracing::warn!(%server, ?other, "a storage server was not told to scrub");
                    return Err(Refusal::Unavailable);
                }
            }
        }
        Ok(MetaAnswer::Done)
    }

    async fn compare(&self, server: ServerId, bucket: u8, mend: bool) -> Answer {
        let looked = compare::look(&self.core, &*self.peers, server, bucket).await;
        let difference = looked.map_err(|fault| {
            tracing::error!(%fault, "a storage server could not be compared with the record");
            Refusal::Fault
        })?;
        let difference = difference.ok_or(Refusal::Unavailable)?;
        let (missing, extra) = (difference.missing.len() as u64, difference.extra.len() as u64);
        let named = compare::named_among(&self.core, &difference.missing).map_err(|fault| {
            tracing::error!(%fault, "what is lost could not be found out");
            Refusal::Fault
        })?;
        let mended = match mend {
            true => compare::mend_missing(&self.core, &self.proposer, server, difference.missing).await as u64,
            false => 0,
        };
        Ok(MetaAnswer::Compared(Comparison { on_record: difference.on_record, missing, mended, extra, named }))
    }

    fn status(&self) -> Result<ClusterStatus, Refusal> {
        let view = self.view()?;
        let counters = view.counters();
        let now = self.core.clock.monotonic();
        let followed_percent = surplus::followed_percent(&*view).map_err(|fault| self.fault(fault))?;
        let cluster = self.core.cluster.lock();
        Ok(ClusterStatus {
            cluster: self.core.cluster_id,
            map_version: cluster.version(),
            servers: cluster.status(now),
            mounts: self.core.sessions.lock().status(now),
            inodes: counters.inodes,
            blocks: counters.blocks_by_copies.iter().fold(0, |sum: u64, blocks| sum.saturating_add(*blocks)),
            blocks_by_copies: counters.blocks_by_copies,
            owed: counters.payable(),
            copies_made: counters.copies_made,
            corrupt_copies_met: counters.corrupt_met,
            missing_copies_met: counters.missing_met,
            copies_repaired: counters.repaired,
            unnamed: counters.unnamed,
            condemned: counters.condemned,
            collected: counters.collected,
            log_position: self.core.applied(),
            durable_through: self.core.durable(),
            replicas: cluster.replicas() as u64,
            replicas_followed_percent: followed_percent,
            owed_secs: self.core.copy_rate.lock().secs_for(counters.payable(), now),
            balance_hindered: self.core.balance_hindered.lock().clone(),
            bad_copies_waiting: self.core.bad_copies.lock().count() as u64,
            // Asked for, and not planned yet: something.
            balance_left_bytes: self
                .core
                .balance_left
                .load(Ordering::Relaxed)
                .max(u64::from(self.core.balance_wanted.load(Ordering::Relaxed))),
            backup_secs: self.core.backed_up.lock().map_or(0, |time| time.secs),
        })
    }

    async fn issue_token(&self, role: Role, valid_secs: u64) -> Answer {
        if self.ca.is_none() {
            tracing::warn!("a token was asked for, but ca_dir is not set: nobody can enrol here");
            return Err(Refusal::NotSupported);
        }
        let secret = (self.secrets)();
        let now = self.core.clock.now();
        let valid = valid_secs.min(TOKEN_VALIDITY_MAX).cast_signed();
        let expires = Time { secs: now.secs.saturating_add(valid), ..now };
        self.decree(Command::IssueToken { secret_hash: secret_hash(&secret), role, expires }).await?;
        tracing::info!(%role, valid_secs, "a token was issued");
        Ok(MetaAnswer::Token { secret, ca_fingerprint: self.ca_fingerprint.0 })
    }

    async fn certify(&self, request: EnrolRequest) -> Result<Enrolled, Refusal> {
        let Some(ca) = &self.ca else {
            tracing::warn!("somebody wants to enrol, but ca_dir is not set: nobody can enrol here");
            return Err(Refusal::NotSupported);
        };
        let csr_hash = *blake3::hash(&request.csr).as_bytes();
        let command = Command::UseToken { secret_hash: secret_hash(&request.secret), csr_hash };
        let Reply::Enrolled { role, id } = self.decree(command).await? else { return Err(Refusal::Fault) };
        let issued = ca.issue(NodeName { role, id }, &request.csr, self.core.clock.now(), NODE_VALIDITY);
        let certificate = issued.map_err(|error| {
            tracing::warn!(%error, "a certificate could not be issued");
            Refusal::BadRequest
        })?;
        let cluster = self.core.cluster_id;
        Ok(Enrolled { cluster, role, id, certificate, ca: ca.certificate().to_vec() })
    }
}

impl Enrol for Service {
    fn enrol(self: Arc<Self>, request: EnrolRequest) -> BoxFuture<'static, EnrolReply> {
        Box::pin(async move { EnrolReply(self.certify(request).await) })
    }
}

/// Only the hash is kept: whoever reads the tables cannot enrol.
fn secret_hash(secret: &[u8; 32]) -> [u8; 32] {
    *blake3::hash(secret).as_bytes()
}

fn bounded(inos: &[Ino]) -> Result<&[Ino], Refusal> {
    if inos.len() <= OPENS_MAX { Ok(inos) } else { Err(Refusal::TooLarge) }
}

/// What is answered while mounts say again what was lost: what tells, and what changes nothing that they could have seen.
fn is_for_recovery(request: &MetaRequest) -> bool {
    match request {
        // What a mount has said is done before it may go.
        MetaRequest::Session(SessionRequest::Close { .. }) => false,
        MetaRequest::Session(_)
        | MetaRequest::Storage(_)
        | MetaRequest::Admin(_)
        | MetaRequest::Query { query: Query::ClusterMap { .. }, .. } => true,
        MetaRequest::Query { .. }
        | MetaRequest::Mutate { .. }
        | MetaRequest::MutateMany { .. }
        | MetaRequest::Barrier { .. }
        | MetaRequest::Lock { .. } => false,
    }
}

/// Who may send what. No `_` arm: a new request must say who may.
fn check_role(role: Role, request: &MetaRequest) -> Result<(), Refusal> {
    let is_client = matches!(role, Role::Client | Role::Admin);
    let allowed = match request {
        MetaRequest::Query { query: Query::ClusterMap { .. }, .. } => is_client || role == Role::Storage,
        MetaRequest::Session(_)
        | MetaRequest::Query { .. }
        | MetaRequest::Mutate { .. }
        | MetaRequest::MutateMany { .. }
        | MetaRequest::Barrier { .. }
        | MetaRequest::Lock { .. } => is_client,
        MetaRequest::Storage(
            StorageNotice::Heartbeat { .. } | StorageNotice::BadCopies { .. } | StorageNotice::Failed { .. },
        ) => role == Role::Storage,
        MetaRequest::Storage(StorageNotice::BadCopy { .. }) => is_client,
        MetaRequest::Admin(AdminRequest::Status) => is_client,
        MetaRequest::Admin(
            AdminRequest::IssueToken { .. }
            | AdminRequest::Check
            | AdminRequest::Mend
            | AdminRequest::Compare { .. }
            | AdminRequest::Scrub
            | AdminRequest::SetReplicas { .. }
            | AdminRequest::Stand { .. }
            | AdminRequest::StandDespite { .. }
            | AdminRequest::Journal { .. }
            | AdminRequest::Names { .. }
            | AdminRequest::Lost { .. }
            | AdminRequest::Backup { .. }
            | AdminRequest::Rebalance,
        ) => role == Role::Admin,
    };
    if allowed { Ok(()) } else { Err(Refusal::WrongRole) }
}

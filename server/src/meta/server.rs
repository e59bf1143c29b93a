//! The life of a metadata server: recovered from its disk, serving, stopped.

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use holdfast_common::planted::{Bug, is_planted};
use holdfast_common::{
    ClusterId, Position, Time,
    clock::Clock,
    config::MetaConfig,
    disk::Disk,
    net::{
        Peers,
        enrol::Enrol,
        identity::{NodeName, Role},
        quic::{BindError, NetOptions, Node},
        tls::{Ca, Credentials, Fingerprint, TlsError},
    },
    wire::meta::Severity,
};
use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};

use super::{
    balance::Balancer,
    barrier::Barrier,
    cluster::Cluster,
    committer::{Committer, Proposer},
    compare::Comparer,
    copier::Copier,
    core::{Core, Fault, Recovered},
    drain::Drainer,
    duties::{self, METADATA_SERVER},
    garbage::Collector,
    journal::Note,
    keep::Keeper,
    log::LogPlace,
    mend::Mender,
    recovery::{self, Recovery},
    replace::Replacer,
    restore::{self, Contents, RestoreError},
    service::{Secrets, Service},
    sessions::Sessions,
    spread::Spreader,
    state::{self, Command, Entry, Rows, StorageError, apply, servers, session},
    store::{OpenStoreError, Store},
    surplus::Surplus,
    unsynced::Unsynced,
};
use crate::{
    ballast::Ballast,
    datadir::{DataDir, DataDirError},
};

/// Name of the database in the data directory.
pub const DATABASE: &str = "meta.redb";
/// Entries replayed in one transaction.
const REPLAY_BATCH: usize = 1024;
/// How long a stop may take before the rest is left to the next start's replay.
const STOP_TIMEOUT: Duration = Duration::from_secs(8);
/// Requests served at once: those that wait for durability wait here.
const REQUESTS_MAX: usize = 8192;

/// Why a metadata server did not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("the certificate in {path} cannot be used: {source}")]
    Credentials { path: PathBuf, source: TlsError },
    #[error("the certificate in {path} is that of {node}, not of a metadata server")]
    Role { path: PathBuf, node: NodeName },
    #[error("the CA in {path} cannot be used: {source}")]
    Ca { path: PathBuf, source: TlsError },
    #[error("the CA in {path} is that of cluster {found}, not of {expected}")]
    OtherCa { path: PathBuf, found: ClusterId, expected: ClusterId },
    #[error(transparent)]
    Store(#[from] OpenStoreError),
    #[error("cannot sync the data directory {path}: {source}")]
    Names { path: PathBuf, source: std::io::Error },
    #[error("cannot learn what room {path} has: {source}")]
    Ballast { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("TLS cannot be set up: {0}")]
    Tls(TlsError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("the metadata server had to stop: {0}")]
    Fault(#[from] Fault),
}

impl From<StorageError> for RunError {
    fn from(fault: StorageError) -> Self {
        Self::Fault(fault.into())
    }
}

impl From<super::log::LogError> for RunError {
    fn from(fault: super::log::LogError) -> Self {
        Self::Fault(fault.into())
    }
}

/// What a server is told about itself, apart from its seams.
#[derive(Clone, Debug)]
pub struct Options {
    pub cluster: ClusterId,
    pub cache_bytes: u64,
    pub checkpoint_log_bytes: u64,
    pub session_timeout: Duration,
    pub recovery_window: Duration,
    pub reserve_bytes: u64,
    pub suspect_after: Duration,
    pub down_after: Duration,
    /// A server that has been down for so long is replaced.
    pub replace_after: Duration,
    /// A block that no file names is kept for so long.
    pub garbage_grace: Duration,
    /// How often what a storage server has is compared with what it is on record for.
    pub compare_every: Duration,
    /// Zero: never.
    pub backup_every: Duration,
    /// The storage servers and their zones have to be the same for so long before blocks are looked through for copies that share one.
    pub spread_after: Duration,
}

/// Who is late for a moment is no reason to look at everything.
const SPREAD_AFTER: Duration = Duration::from_secs(10);

/// Brings back what the last life left in `directory`: the tables as of the last checkpoint, and the log on top.
pub fn recover(
    disk: &Arc<dyn Disk>,
    directory: &Path,
    clock: Arc<dyn Clock>,
    options: &Options,
) -> Result<Arc<Core>, RunError> {
    let ballast = Ballast::open(Arc::clone(disk), directory, options.reserve_bytes)
        .map_err(|source| RunError::Ballast { path: directory.to_owned(), source })?;
    let ballast = Arc::new(ballast);
    let free = disk.space(directory).map_or(u64::MAX, |space| space.free.saturating_add(ballast.held()));
    let short = free < options.reserve_bytes;
    if short {
        tracing::warn!(
            free,
            reserve = options.reserve_bytes,
            "the metadata's disk is full: giving back what its database does not need"
        );
    }
    let store = Store::open(&**disk, &directory.join(DATABASE), options.cache_bytes, short, Some(&ballast))?;
    let place = LogPlace::new(Arc::clone(disk), directory.join("log"), options.cluster)?.with_ballast(&ballast);
    let checkpointed = store.applied()?;
    let (mut durable, mut unsynced, mut log) = (checkpointed, Unsynced::default(), None);
    let mut rolled_back = false;
    if let Some(found) = place.find(checkpointed)? {
        rolled_back = !found.is_whole();
        durable = durable.max(found.marked);
        replay(&store, &found, checkpointed, durable, &mut unsynced)?;
        log = found.resume(&place, store.applied()?)?;
    }
    let applied = store.applied()?;
    let log = match log {
        Some(log) => log,
        None => {
            // Another boot, or no log: all that is here is durable.
            if rolled_back && !is_planted(Bug::PowerCutUnnoticed) && !session::sessions(&*store.view()?)?.is_empty() {
                begin_recovery(&store, clock.now())?;
            }
            store.checkpoint()?;
            durable = store.applied()?;
            place.begin(Position(durable.0 + 1))?
        }
    };
    // The names of the database and of the log's directory: without them, what they hold is not durable either.
    disk.sync_directory(directory).map_err(|source| RunError::Names { path: directory.to_owned(), source })?;
    tracing::info!(%checkpointed, %applied, %durable, "the metadata is recovered");
    let (now, view) = (clock.monotonic(), store.view()?);
    let recovering = state::recovery::open(&*view)?;
    if let Some(after) = recovering {
        tracing::warn!(%after, "the power was lost: mounts are waited for, to say again what was not durable");
    }
    let lost_power = recovering;
    let recovering = recovering.is_some();
    let owing: Vec<_> = state::recovery::owing(&*view)?.into_iter().map(|(id, owed)| (id, owed.after)).collect();

    let version = u64::try_from(clock.now().secs).unwrap_or(0) * 1000;
    let mut cluster = Cluster::new(version, servers::servers(&*view)?, now, options.suspect_after, options.down_after);
    cluster.set_replicas(view.counters().replicas);
    let mut sessions = Sessions::restored(session::sessions(&*view)?, now);
    owing.iter().for_each(|(session, after)| sessions.owe(*session, *after));
    let recovery = Recovery::new(owing.into_iter(), now, options.recovery_window, options.session_timeout);
    let core = Core::new(
        clock,
        options.cluster,
        Recovered {
            disk: Arc::clone(disk),
            directory: directory.to_owned(),
            ballast,
            store,
            log,
            cluster,
            replace_after: options.replace_after,
            sessions,
            unsynced,
            durable,
            epoch: view.counters().epoch,
            recovery,
            recovering,
            lock_grace: options.recovery_window,
        },
    );
    core.tell(start(lost_power));
    Ok(core)
}

fn start(lost_power: Option<Position>) -> Note {
    let Some(after) = lost_power else { return Note::new(Severity::Info, METADATA_SERVER, "has started") };
    let what = format!("has started after a loss of power: what came after change {after} was not durable");
    let note = Note::new(Severity::Warning, METADATA_SERVER, what);
    note.meaning("everybody waits").doing("living mounts say again what they had done")
}

/// As an entry that the checkpoint covers.
fn begin_recovery(store: &Store, time: Time) -> Result<(), Fault> {
    store.write_visible(|tables| {
        apply(tables, &Entry { time, command: Command::BeginRecovery })?;
        Ok(())
    })
}

fn replay(
    store: &Store,
    found: &super::log::Found,
    checkpointed: Position,
    durable: Position,
    unsynced: &mut Unsynced,
) -> Result<(), Fault> {
    let mut batch: Vec<(Position, Entry)> = Vec::new();
    found.replay(checkpointed, |position, entry| {
        if position > durable {
            unsynced.note(entry.command.new_blocks());
        }
        batch.push((position, entry));
        if batch.len() == REPLAY_BATCH { replay_batch(store, std::mem::take(&mut batch)) } else { Ok(()) }
    })?;
    replay_batch(store, batch)
}

fn replay_batch(store: &Store, batch: Vec<(Position, Entry)>) -> Result<(), Fault> {
    if batch.is_empty() {
        return Ok(());
    }
    store.write_visible(|tables| {
        for (position, entry) in &batch {
            let applied = apply(tables, entry)?;
            if (applied.position, applied.changed) != (*position, true) {
                return Err(Fault::Diverged { log: *position, database: applied.position });
            }
        }
        Ok(())
    })
}

/// The tasks of a server, on whatever network.
#[derive(Debug)]
pub struct Running {
    pub service: Arc<Service>,
    committer: JoinHandle<Result<(), Fault>>,
    tasks: JoinSet<Result<(), Fault>>,
    faults: mpsc::UnboundedReceiver<StorageError>,
}

/// What a server needs from outside to enrol nodes.
pub struct Authority {
    pub ca: Option<Ca>,
    pub ca_fingerprint: Fingerprint,
    pub secrets: Secrets,
}

impl Running {
    pub fn start(core: Arc<Core>, peers: Arc<dyn Peers>, authority: Authority, options: &Options) -> Self {
        let (committer, proposer) = Committer::new(Arc::clone(&core), options.checkpoint_log_bytes);
        let committer = tokio::spawn(committer.run());
        let mut tasks = JoinSet::new();
        tasks.spawn(Barrier::new(Arc::clone(&core), Arc::clone(&peers), proposer.clone()).run());
        tasks.spawn(duties::watch(Arc::clone(&core), proposer.clone(), options.session_timeout));
        tasks.spawn(duties::watch_space(Arc::clone(&core), options.reserve_bytes));
        tasks.spawn(recovery::run(Arc::clone(&core), proposer.clone()));
        tasks.spawn(Copier::new(Arc::clone(&core), proposer.clone(), Arc::clone(&peers)).run());
        let replacer = Replacer::new(Arc::clone(&core), proposer.clone(), Arc::clone(&peers), options.replace_after);
        tasks.spawn(replacer.run());
        tasks.spawn(Mender::new(Arc::clone(&core), proposer.clone(), Arc::clone(&peers)).run());
        tasks.spawn(Balancer::new(Arc::clone(&core), proposer.clone(), Arc::clone(&peers)).run());
        tasks.spawn(Keeper::new(Arc::clone(&core), Arc::clone(&peers), options.backup_every).run());
        tasks.spawn(Surplus::new(Arc::clone(&core), proposer.clone(), Arc::clone(&peers)).run());
        let spreader = Spreader::new(Arc::clone(&core), proposer.clone(), Arc::clone(&peers), options.spread_after);
        tasks.spawn(spreader.run());
        tasks.spawn(Drainer::new(Arc::clone(&core), proposer.clone(), Arc::clone(&peers)).run());
        let (every, grace) = (options.compare_every, options.garbage_grace);
        tasks.spawn(Collector::new(Arc::clone(&core), proposer.clone(), Arc::clone(&peers), grace).run());
        tasks.spawn(Comparer::new(Arc::clone(&core), proposer.clone(), Arc::clone(&peers), every, grace).run());
        let (fault_sender, faults) = mpsc::unbounded_channel();
        let service = Service::new(core, proposer, peers, options.session_timeout, authority, fault_sender);
        Self { service: Arc::new(service), committer, tasks, faults }
    }

    pub fn proposer(&self) -> &Proposer {
        &self.service.proposer
    }

    /// Returns only when the server can no longer keep its promises.
    pub async fn failed(&mut self) -> Fault {
        let ended = |ended: Result<Result<(), Fault>, tokio::task::JoinError>| match ended {
            Ok(Err(fault)) => fault,
            Ok(Ok(())) | Err(_) => Fault::Thread,
        };
        tokio::select! {
            outcome = &mut self.committer => ended(outcome),
            Some(outcome) = self.tasks.join_next() => ended(outcome),
            Some(fault) = self.faults.recv() => fault.into(),
        }
    }

    /// A last barrier and a checkpoint, if they can be had in time; the log has the rest.
    pub async fn stop(mut self) -> Result<(), Fault> {
        self.service.proposer.stop().await;
        match tokio::time::timeout(STOP_TIMEOUT, &mut self.committer).await {
            Ok(ended) => ended.map_err(|_| Fault::Thread)??,
            Err(_) => tracing::warn!("stopped without a checkpoint: the next start replays the log"),
        }
        self.tasks.shutdown().await;
        Ok(())
    }
}

/// Runs a metadata server until `shutdown`, or until it can no longer keep its promises. Calls `ready` when it serves.
pub async fn run(
    config: MetaConfig,
    disk: Arc<dyn Disk>,
    clock: Arc<dyn Clock>,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let credentials = load_credentials(&config)?;
    let cluster = credentials.cluster;
    let data = DataDir::open(&*disk, &config.data_dir, credentials.identity())?;
    let ca_fingerprint = credentials.fingerprint();
    let ca = config.ca_dir.as_deref().map(|path| load_ca(path, cluster)).transpose()?;
    let options = Options {
        cluster,
        cache_bytes: config.cache_bytes,
        checkpoint_log_bytes: config.checkpoint_log_bytes,
        session_timeout: config.session_timeout,
        recovery_window: config.recovery_window,
        reserve_bytes: config.reserve_bytes,
        suspect_after: config.suspect_after,
        down_after: config.down_after,
        replace_after: config.replace_after,
        garbage_grace: config.garbage_grace,
        compare_every: config.compare_every,
        backup_every: config.backup_every,
        spread_after: SPREAD_AFTER,
    };
    let core = recover(&disk, data.path(), clock, &options)?;
    let node =
        Node::bind(config.listen, credentials, NetOptions { requests_max: REQUESTS_MAX, ..NetOptions::default() })?;
    let authority = Authority { ca, ca_fingerprint, secrets: Box::new(rand::random) };
    let mut running = Running::start(core, Arc::clone(&node) as Arc<dyn Peers>, authority, &options);
    let service = Arc::clone(&running.service);
    let enrol = Arc::clone(&service) as Arc<dyn Enrol>;
    let serving = tokio::spawn(node.serve(service, Some(enrol)).map_err(RunError::Tls)?);
    tracing::info!(address = %config.listen, %cluster, "the metadata server is ready");
    ready();
    tokio::select! {
        fault = running.failed() => return Err(fault.into()),
        () = shutdown => tracing::info!("the metadata server is stopping"),
    }
    // The last barrier talks to storage servers, so the network goes last.
    running.stop().await?;
    node.close();
    if tokio::time::timeout(Duration::from_secs(1), node.closed()).await.is_err() {
        tracing::debug!("some peers were not told that the server stops");
    }
    serving.abort();
    Ok(())
}

/// Makes the metadata of the server that `config` is of from the backup `path`.
/// `check`: whether its rows go together, which takes longer.
pub fn restore_from(path: &Path, config: &MetaConfig, disk: &dyn Disk, check: bool) -> Result<Contents, RunError> {
    let credentials = load_credentials(config)?;
    let data = DataDir::open(disk, &config.data_dir, credentials.identity())?;
    let options = restore::Options { cache_bytes: config.cache_bytes, check };
    Ok(restore::restore(path, disk, data.path(), credentials.cluster, options)?)
}

fn load_credentials(config: &MetaConfig) -> Result<Credentials, RunError> {
    let path = config.tls_dir.clone();
    let credentials =
        Credentials::load(&path).map_err(|source| RunError::Credentials { path: path.clone(), source })?;
    match credentials.node.role {
        Role::Meta => Ok(credentials),
        _ => Err(RunError::Role { path, node: credentials.node }),
    }
}

fn load_ca(path: &Path, cluster: ClusterId) -> Result<Ca, RunError> {
    let ca = Ca::load(path).map_err(|source| RunError::Ca { path: path.to_owned(), source })?;
    if ca.cluster() == cluster {
        Ok(ca)
    } else {
        Err(RunError::OtherCa { path: path.to_owned(), found: ca.cluster(), expected: cluster })
    }
}

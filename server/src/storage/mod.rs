//! The storage server: blocks on a disk, served to who may have them.

mod backups;
mod meter;
mod relay;
mod replicate;
mod report;
mod scrub;
mod service;
mod several;
pub mod store;
#[cfg(test)]
mod tests;
mod vitals;
mod workers;

use std::{future::Future, io, path::PathBuf, sync::Arc, time::Duration};

use holdfast_common::{
    Time,
    clock::Clock,
    config::StorageConfig,
    disk::Disk,
    net::{
        Peers, Serve,
        identity::{NodeName, Role},
        quic::{BindError, NetOptions, Node},
        tls::{Credentials, TlsError},
    },
};

use tokio::sync::mpsc;

pub use self::{
    backups::Backups,
    scrub::{Scrubber, Scrubbing},
    service::StorageService,
    several::{Shared, run_all},
};
use self::{
    relay::Relay,
    replicate::Fetcher,
    report::Reporter,
    store::{OpenError, Store, StoreError, StoreOptions},
    vitals::Watch,
    workers::Workers,
};
use crate::datadir::{DataDir, DataDirError};

/// Threads that hash and write beside the network's.
const WORKERS_MAX: usize = 4;
/// Bad copies kept for inspection.
const QUARANTINE_BYTES: u64 = 1 << 30;

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("cannot use the certificate in {path}: {source}")]
    Credentials { path: PathBuf, source: TlsError },
    #[error("the certificate in {path} is that of {node}, not of a storage server")]
    Role { path: PathBuf, node: NodeName },
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("cannot listen: {0}")]
    Bind(#[from] BindError),
    #[error("cannot serve: {0}")]
    Tls(TlsError),
    #[error("cannot start: {0}")]
    Start(io::Error),
    #[error("the block store failed: {0}")]
    Failed(Arc<str>),
    #[error("cannot close the block store: {0}")]
    Close(StoreError),
}

/// Runs a storage server until `shutdown`, or until its store can no longer keep its promises. Calls `ready` when it serves.
pub async fn run(
    config: StorageConfig,
    disk: Arc<dyn Disk>,
    clock: Arc<dyn Clock>,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let credentials = load_credentials(&config)?;
    let name = credentials.node;
    let data = DataDir::open(&*disk, &config.data_dir, credentials.identity())?;
    let options = store_options(&config, disk.as_ref()).map_err(RunError::Start)?;
    let directory = data.path().to_owned();
    let store = Arc::new(Store::open(Arc::clone(&disk), &directory, options)?.locked_by(data));
    let backups = Backups::new(Arc::clone(&disk), &directory, store.ballast());
    let node = Node::bind(config.listen, credentials, NetOptions::default())?;
    let address = node.local_address().map_err(RunError::Start)?;
    let peers: Arc<dyn Peers> = Arc::clone(&node) as Arc<dyn Peers>;
    let service = start_service(Arc::clone(&store), Arc::clone(&peers), name.id, backups).map_err(RunError::Start)?;
    let serving = tokio::spawn(node.serve(Arc::clone(&service) as Arc<dyn Serve>, None).map_err(RunError::Tls)?);
    let reporter = Reporter {
        peers: Arc::clone(&peers),
        meta: config.meta,
        address: config.advertised(address),
        zone: config.zone.clone(),
        store: Arc::clone(&store),
        service: Arc::clone(&service),
        started_ms: millis_of(clock.now()),
        watch: Watch::new(&directory),
    };
    let (bad, found_bad) = mpsc::unbounded_channel();
    let scrubber = Scrubber {
        store: Arc::clone(&store),
        service: Arc::clone(&service),
        disk,
        directory,
        clock,
        rate: config.scrub_rate_bytes,
        every: config.scrub_every,
        progress: Arc::clone(service.scrub_progress()),
        bad,
    };
    let scrubbing = scrubber.start();
    let reporting = tokio::spawn(reporter.run(found_bad));
    tracing::info!(%address, node = %name, boot = %store.boot(), "the storage server is ready");
    ready();
    let failure = tokio::select! {
        failure = store.failed() => Some(failure),
        () = shutdown => None,
    };
    reporting.abort();
    drop(reporting.await);
    drop(scrubbing);
    if let Some(failure) = &failure {
        let why = format!("{}: {failure}", config.data_dir.display());
        report::tell_failure(&*peers, config.meta, why).await;
    }
    node.close();
    if tokio::time::timeout(Duration::from_secs(1), node.closed()).await.is_err() {
        tracing::debug!("some peers were not told that the server stops");
    }
    serving.abort();
    match failure {
        Some(failure) => Err(RunError::Failed(failure)),
        None => close(&store),
    }
}

fn millis_of(time: Time) -> u64 {
    u64::try_from(time.secs).unwrap_or(0).saturating_mul(1000) + u64::from(time.nanos / 1_000_000)
}

fn close(store: &Store) -> Result<(), RunError> {
    tracing::info!("the storage server is stopping");
    store.checkpoint().map_err(RunError::Close)
}

fn load_credentials(config: &StorageConfig) -> Result<Credentials, RunError> {
    let path = config.tls_dir.clone();
    let credentials =
        Credentials::load(&path).map_err(|source| RunError::Credentials { path: path.clone(), source })?;
    match credentials.node.role {
        Role::Storage => Ok(credentials),
        _ => Err(RunError::Role { path, node: credentials.node }),
    }
}

fn store_options(config: &StorageConfig, disk: &dyn Disk) -> io::Result<StoreOptions> {
    let space = disk.space(&config.data_dir)?;
    Ok(StoreOptions {
        segment_bytes: config.segment_bytes,
        capacity_bytes: config.capacity_bytes,
        reserve_bytes: config.reserve(space.capacity),
        quarantine_bytes: QUARANTINE_BYTES.min(space.capacity / 100),
        index_cache_bytes: config.index_cache_bytes,
        ..StoreOptions::default()
    })
}

/// The service over an open store. `me`: this server's number, which is not asked for copies.
pub fn start_service(
    store: Arc<Store>,
    peers: Arc<dyn Peers>,
    me: u32,
    backups: Backups,
) -> io::Result<Arc<StorageService>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = Workers::start(cores.min(WORKERS_MAX))?;
    let (fetcher, relay) = (Fetcher::new(Arc::clone(&peers), me), Relay::new(peers));
    Ok(Arc::new(StorageService::new(store, workers, fetcher, relay, backups)))
}

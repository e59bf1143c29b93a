//! The life of one mount: from the first contact with the cluster to the last byte flushed.

pub mod options;
pub mod runtime;
pub mod table;

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use holdfast_common::{
    clock::SystemClock,
    memory,
    net::{
        Endpoint, Peers,
        quic::{BindError, NetOptions, Node},
        tls::Credentials,
    },
};
use tokio::signal::unix::{SignalKind, signal};

use self::runtime::{NetworkThread, TaskFailed};
use crate::{
    fs::{Duties, Errno, Fs, FsOptions},
    fuse::{KernelSession, MountError, MountPlan},
    remote::meta::MountName,
    sys::{self, Unmount},
};

/// A new mount that does not answer its own first question in this time has failed.
const PROOF_TIMEOUT: Duration = Duration::from_secs(5);
/// RELEASE is asynchronous: a mount can be busy for a moment after the last close.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// How long files that are still open may keep a mount that was told to stop.
const LINGER: Duration = Duration::from_secs(2);
/// Past the filesystem's own retries: how long the last flush may take.
const FLUSH_MARGIN: Duration = Duration::from_secs(600);
const CLOSE_TIMEOUT: Duration = Duration::from_millis(300);

/// All that is needed to mount.
#[derive(Clone, Debug)]
pub struct MountJob {
    pub plan: MountPlan,
    pub meta: Endpoint,
    pub credentials: Credentials,
    pub fs: FsOptions,
}

#[derive(Debug, thiserror::Error)]
pub enum MountJobError {
    #[error("the network thread could not be started")]
    Thread(#[source] io::Error),
    #[error(transparent)]
    Task(#[from] TaskFailed),
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The sentence that the filesystem gave.
    #[error("{0}")]
    Connect(String),
    #[error(transparent)]
    Kernel(#[from] MountError),
    #[error("the mount was made, but does not answer")]
    Silent(#[source] io::Error),
    #[error("the mount ended before it was ready")]
    EndedEarly,
    #[error("the kernel's requests could not be read any more")]
    Session(#[source] io::Error),
    #[error("not everything that was written could be stored before the end: {0}")]
    Flush(Errno),
    #[error("what was written could not be stored within {0:?}")]
    FlushTimeout(Duration),
}

#[derive(Debug)]
enum Event {
    /// The kernel has answered the first question about the root, or not.
    Proved(io::Result<()>),
    /// SIGTERM or SIGINT.
    Stop,
    /// The kernel has let go of the mount.
    Ended(io::Result<()>),
}

/// Mounts, calls `ready` when the mount answers, and serves it until it is unmounted or this process is told to stop.
/// Everything is flushed when this returns `Ok`.
pub fn run(job: &MountJob, ready: impl FnOnce()) -> Result<(), MountJobError> {
    if let Err(error) = memory::only_small_pages() {
        tracing::debug!(%error, "the kernel may give memory in large pages");
    }
    let network = NetworkThread::start().map_err(MountJobError::Thread)?;
    let (events, happened) = mpsc::channel();
    drop(network.handle().spawn(watch_signals(events.clone())));
    let (node, fs) = network.wait(connect(job.clone()))??;
    let served = serve(job, &network, Arc::clone(&fs), (&events, &happened), ready);
    let flushed = finish(&network, fs, job.fs.io_timeout);
    close(&network, node)?;
    served.and(flushed)
}

async fn connect(job: MountJob) -> Result<(Arc<Node>, Arc<Fs>), MountJobError> {
    let node = Node::bind(any_port_towards(job.meta.address), job.credentials, NetOptions::default())?;
    let name = MountName { host: host_name(), mountpoint: job.plan.mountpoint.display().to_string() };
    let peers: Arc<dyn Peers> = node.clone();
    let clock = Arc::new(SystemClock::default());
    let connected = Fs::connect(peers, job.meta, name, job.fs, clock).await;
    let fs = connected.map_err(MountJobError::Connect)?;
    drop(tokio::spawn(Duties::run(Arc::clone(&fs))));
    Ok((node, fs))
}

/// The local end of connections to `peer`: of its address family, on any port.
pub fn any_port_towards(peer: SocketAddr) -> SocketAddr {
    match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "unknown".to_owned(), |name| name.trim().to_owned())
}

fn serve(
    job: &MountJob,
    network: &NetworkThread,
    fs: Arc<Fs>,
    (events, happened): (&Sender<Event>, &Receiver<Event>),
    ready: impl FnOnce(),
) -> Result<(), MountJobError> {
    let ended = events.clone();
    let session = KernelSession::start(Arc::clone(&fs), network.handle(), &job.plan, move |result| {
        tell(&ended, Event::Ended(result))
    })?;
    fs.tell_kernel(Arc::new(session.notifier()));
    let session = Arc::new(session);
    prove(Arc::clone(&session), events.clone());
    if let Err(error) = await_proof(happened) {
        take_away(&session, Unmount::Lazy);
        return Err(error);
    }
    ready();
    tracing::info!(mountpoint = %job.plan.mountpoint.display(), source = job.plan.source, "mounted");
    await_end(happened, || stop(&session, network, &fs, job.fs.io_timeout))
}

fn tell(events: &Sender<Event>, event: Event) {
    // Nobody listens any more when the mount is given up already.
    drop(events.send(event));
}

fn prove(session: Arc<KernelSession>, events: Sender<Event>) {
    thread::spawn(move || tell(&events, Event::Proved(session.prove())));
}

fn await_proof(happened: &Receiver<Event>) -> Result<(), MountJobError> {
    match happened.recv_timeout(PROOF_TIMEOUT) {
        Ok(Event::Proved(result)) => result.map_err(MountJobError::Silent),
        Ok(Event::Ended(Err(error))) => Err(MountJobError::Session(error)),
        Ok(Event::Ended(Ok(())) | Event::Stop) | Err(RecvTimeoutError::Disconnected) => Err(MountJobError::EndedEarly),
        Err(RecvTimeoutError::Timeout) => Err(MountJobError::Silent(io::ErrorKind::TimedOut.into())),
    }
}

/// Waits until the kernel lets go; `stop` makes it let go, and says how long to wait for that.
fn await_end(happened: &Receiver<Event>, stop: impl Fn() -> Option<Duration>) -> Result<(), MountJobError> {
    let mut until = None;
    loop {
        let event = match until {
            None => happened.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(until) => happened.recv_timeout(Instant::saturating_duration_since(&until, Instant::now())),
        };
        match event {
            Ok(Event::Ended(result)) => return result.map_err(MountJobError::Session),
            Ok(Event::Stop) => until = stop().map(|linger| Instant::now() + linger).or(until),
            Ok(Event::Proved(_)) => {}
            Err(_) => {
                tracing::warn!(
                    "files of this mount are still open in other programs, which will see it as disconnected"
                );
                return Ok(());
            }
        }
    }
}

/// Flushes, then unmounts. Whatever keeps the mount busy is left behind. The answer is how long it may linger.
fn stop(session: &KernelSession, network: &NetworkThread, fs: &Arc<Fs>, io_timeout: Duration) -> Option<Duration> {
    tracing::info!("told to stop: flushing, then unmounting");
    if let Err(error) = flush(network, Arc::clone(fs), io_timeout) {
        tracing::error!(%error, "flushing failed; it is tried once more after unmounting");
    }
    let give_up = Instant::now() + BUSY_PATIENCE;
    loop {
        match session.unmount(Unmount::WhenIdle) {
            Ok(()) => return Some(LINGER),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < give_up => {
                thread::sleep(BUSY_PAUSE)
            }
            Err(error) => {
                tracing::warn!(%error, "the mount is in use: it is taken out of the tree without waiting");
                take_away(session, Unmount::Lazy);
                return Some(LINGER);
            }
        }
    }
}

fn take_away(session: &KernelSession, how: Unmount) {
    if let Err(error) = session.unmount(how) {
        tracing::error!(%error, "the mount could not be taken out of the tree");
    }
}

fn flush(network: &NetworkThread, fs: Arc<Fs>, io_timeout: Duration) -> Result<(), MountJobError> {
    bounded(network, io_timeout, async move { fs.sync_all(true).await })
}

fn finish(network: &NetworkThread, fs: Arc<Fs>, io_timeout: Duration) -> Result<(), MountJobError> {
    bounded(network, io_timeout, async move { fs.shutdown().await })
}

fn bounded(
    network: &NetworkThread,
    io_timeout: Duration,
    work: impl Future<Output = Result<(), Errno>> + Send + 'static,
) -> Result<(), MountJobError> {
    let limit = io_timeout.saturating_mul(2).saturating_add(FLUSH_MARGIN);
    match network.wait(async move { tokio::time::timeout(limit, work).await })? {
        Ok(result) => result.map_err(MountJobError::Flush),
        Err(_elapsed) => Err(MountJobError::FlushTimeout(limit)),
    }
}

/// Says goodbye to the servers, so that they need not time us out.
fn close(network: &NetworkThread, node: Arc<Node>) -> Result<(), TaskFailed> {
    let farewell = async move {
        node.close();
        if tokio::time::timeout(CLOSE_TIMEOUT, node.closed()).await.is_err() {
            tracing::debug!("some connections did not close in time");
        }
    };
    network.wait(farewell)
}

async fn watch_signals(events: Sender<Event>) {
    let (mut terminate, mut interrupt) = match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "signals cannot be watched: stop this mount by unmounting it");
            return;
        }
    };
    while tokio::select! { seen = terminate.recv() => seen, seen = interrupt.recv() => seen }.is_some() {
        tell(&events, Event::Stop);
    }
}

/// Whether a mount can be made here at all: `/dev/fuse` is there and open to this user.
pub fn check_device() -> Result<(), MountError> {
    crate::fuse::check_device()
}

/// Unmounts `mountpoint` from outside: waits a moment when it is busy.
pub fn unmount_patiently(mountpoint: &std::path::Path) -> io::Result<()> {
    let give_up = Instant::now() + BUSY_PATIENCE;
    loop {
        match sys::unmount(mountpoint, Unmount::WhenIdle) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < give_up => {
                thread::sleep(BUSY_PAUSE)
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(events: Vec<Event>) -> Receiver<Event> {
        let (sender, receiver) = mpsc::channel();
        events.into_iter().for_each(|event| sender.send(event).unwrap());
        std::mem::forget(sender);
        receiver
    }

    #[test]
    fn a_mount_is_ready_only_when_it_answered() {
        assert!(await_proof(&after(vec![Event::Proved(Ok(()))])).is_ok());
        let failed = await_proof(&after(vec![Event::Proved(Err(io::ErrorKind::NotConnected.into()))]));
        assert!(matches!(failed, Err(MountJobError::Silent(_))));
        assert!(matches!(await_proof(&after(vec![Event::Ended(Ok(()))])), Err(MountJobError::EndedEarly)));
        assert!(matches!(await_proof(&after(vec![Event::Stop])), Err(MountJobError::EndedEarly)));
    }

    #[test]
    fn an_unmount_from_outside_ends_it_and_a_signal_asks_to_stop_first() {
        let never = || -> Option<Duration> { panic!("nobody asked to stop") };
        assert!(await_end(&after(vec![Event::Ended(Ok(()))]), never).is_ok());
        let stops = std::cell::Cell::new(0);
        let count = || {
            stops.set(stops.get() + 1);
            Some(Duration::from_secs(60))
        };
        assert!(await_end(&after(vec![Event::Stop, Event::Ended(Ok(()))]), count).is_ok());
        assert_eq!(stops.get(), 1);
        let broken = await_end(&after(vec![Event::Ended(Err(io::ErrorKind::InvalidData.into()))]), never);
        assert!(matches!(broken, Err(MountJobError::Session(_))));
    }

    #[test]
    fn open_files_cannot_keep_a_mount_that_was_told_to_stop() {
        assert!(await_end(&after(vec![Event::Stop]), || Some(Duration::ZERO)).is_ok());
    }

    #[test]
    fn the_local_end_is_of_the_peers_family() {
        assert!(any_port_towards(([10, 0, 0, 1], 7000).into()).is_ipv4());
        assert!(any_port_towards((Ipv6Addr::LOCALHOST, 7000).into()).is_ipv6());
    }
}

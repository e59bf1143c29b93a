//! One daemon for several data directories: a storage server for each, on a thread of its own, which fails alone.

use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use holdfast_common::{clock::Clock, config::StorageConfig, disk::Disk, processor};
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
};

use super::{RunError, run};

/// What all of them are given.
#[derive(Clone)]
pub struct Shared {
    pub disk: Arc<dyn Disk>,
    pub clock: Arc<dyn Clock>,
    /// Makes the runtime of a thread.
    pub runtime: fn() -> io::Result<Runtime>,
    /// A directory that has failed is tried again: its disk may have been mounted meanwhile, or replaced.
    pub try_again_after: Duration,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// What a storage server, by its number, tells its daemon.
enum News {
    Serving(usize),
    /// It could not start, or had to stop.
    Out(usize, RunError),
    /// Its thread ends, as it should.
    Stopped(Result<(), RunError>),
}

/// Runs a storage server for each of `configs` until `shutdown`. Calls `ready` when the first one serves. One that cannot start, or has
/// to stop, is tried again while the others go on. When none is left this ends with the reason that the last one gave; after `shutdown`
/// with that of one that did not stop well.
pub async fn run_all(
    configs: Vec<StorageConfig>,
    shared: Shared,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let (stop, stopping) = watch::channel(false);
    let (told, mut news) = mpsc::unbounded_channel();
    let mut out = vec![false; configs.len()];
    for (number, config) in configs.into_iter().enumerate() {
        let (shared, news, stopping) = (shared.clone(), told.clone(), stopping.clone());
        let server = Server { number, config, shared, news, stopping };
        let thread = thread::Builder::new().name(format!("storage-{number}"));
        thread.spawn(move || server.run()).map_err(RunError::Start)?;
    }
    drop(told);
    let (mut ready, mut outcome) = (Some(ready), Ok(()));
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown, if !*stop.borrow() => drop(stop.send_replace(true)),
            told = news.recv() => match told {
                Some(News::Serving(number)) => {
                    out[number] = false;
                    ready.take().into_iter().for_each(|ready| ready());
                }
                Some(News::Out(number, error)) => {
                    out[number] = true;
                    if out.iter().all(|out| *out) && !stop.send_replace(true) {
                        outcome = Err(error);
                    }
                }
                Some(News::Stopped(stopped)) => outcome = outcome.and(stopped),
                None => return outcome,
            },
        }
    }
}

/// A data directory's.
struct Server {
    number: usize,
    config: StorageConfig,
    shared: Shared,
    news: mpsc::UnboundedSender<News>,
    stopping: watch::Receiver<bool>,
}

impl Server {
    fn run(self) {
        // Of which directory a message is.
        let span = tracing::error_span!("storage", directory = %self.config.data_dir.display());
        let _within = span.enter();
        match (self.shared.runtime)() {
            Ok(runtime) => {
                let stopped = runtime.block_on(async {
                    tokio::spawn(processor::stay_warm());
                    self.keep().await
                });
                self.tell(News::Stopped(stopped));
            }
            Err(error) => self.tell(News::Out(self.number, RunError::Start(error))),
        }
    }

    /// Nobody listens only when the daemon has ended with an error.
    fn tell(&self, news: News) {
        drop(self.news.send(news));
    }

    async fn keep(&self) -> Result<(), RunError> {
        loop {
            // The threads that it starts are to go where there is room, and not where this one was last kept.
            processor::roam();
            let is_serving = AtomicBool::new(false);
            let ready = || {
                is_serving.store(true, Ordering::Relaxed);
                self.tell(News::Serving(self.number));
            };
            let (disk, clock) = (Arc::clone(&self.shared.disk), Arc::clone(&self.shared.clock));
            let outcome = run(self.config.clone(), disk, clock, ready, self.stopped()).await;
            if *self.stopping.borrow() {
                // What could not even start has nothing to lose.
                return if is_serving.load(Ordering::Relaxed) { outcome } else { Ok(()) };
            }
            if let Err(error) = outcome {
                self.complain(&error);
                self.tell(News::Out(self.number, error));
            }
            tokio::select! {
                () = tokio::time::sleep(self.shared.try_again_after) => {}
                () = self.stopped() => return Ok(()),
            }
        }
    }

    fn complain(&self, error: &RunError) {
        let mut cause: &dyn std::error::Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        let again_after = self.shared.try_again_after;
        tracing::error!(%error, %cause, ?again_after, "a data directory is out; others of this daemon do not stop for that");
    }

    async fn stopped(&self) {
        let mut stopping = self.stopping.clone();
        // Nobody can say so any more when the daemon has ended.
        drop(stopping.wait_for(|stopping| *stopping).await);
    }
}

#[cfg(test)]
mod tests;

//! One daemon for several data directories: a storage server for each, on a thread of its own, which fails alone.

use std::{future::Future, io, sync::Arc, thread, time::Duration};

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

/// What a storage server tells its daemon.
enum News {
    /// It serves, or could not start. Once.
    Started(Result<(), RunError>),
    /// Its thread ends.
    Ended(Result<(), RunError>),
}

/// Runs a storage server for each of `configs` until `shutdown`. Calls `ready` when each serves or has failed. One that fails is tried
/// again, while the others go on; the error is that of the first, if none could start, or of one that did not stop well.
pub async fn run_all(
    configs: Vec<StorageConfig>,
    shared: Shared,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let (stop, stopping) = watch::channel(false);
    let (told, mut news) = mpsc::unbounded_channel();
    let (mut waiting, mut serving) = (configs.len(), 0);
    for (number, config) in configs.into_iter().enumerate() {
        let server = Server { config, shared: shared.clone(), news: told.clone(), stopping: stopping.clone() };
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
                Some(News::Started(started)) => {
                    waiting -= 1;
                    serving += usize::from(started.is_ok());
                    outcome = outcome.and(started);
                    if waiting == 0 && serving > 0 {
                        outcome = Ok(());
                        ready.take().into_iter().for_each(|ready| ready());
                    } else if waiting == 0 {
                        stop.send_replace(true);
                    }
                }
                Some(News::Ended(ended)) => outcome = outcome.and(ended),
                None => return outcome,
            },
        }
    }
}

/// A data directory's.
struct Server {
    config: StorageConfig,
    shared: Shared,
    news: mpsc::UnboundedSender<News>,
    stopping: watch::Receiver<bool>,
}

impl Server {
    fn run(self) {
        let ended = match (self.shared.runtime)() {
            Ok(runtime) => runtime.block_on(async {
                tokio::spawn(processor::stay_warm());
                self.keep().await
            }),
            Err(error) => Err(RunError::Start(error)),
        };
        self.tell(News::Ended(ended));
    }

    /// Nobody listens only when the daemon has ended with an error.
    fn tell(&self, news: News) {
        drop(self.news.send(news));
    }

    async fn keep(&self) -> Result<(), RunError> {
        let mut is_first = true;
        loop {
            let mut has_started = false;
            let ready = || {
                has_started = true;
                if is_first {
                    self.tell(News::Started(Ok(())));
                }
            };
            let (disk, clock) = (Arc::clone(&self.shared.disk), Arc::clone(&self.shared.clock));
            let outcome = run(self.config.clone(), disk, clock, ready, self.stopped()).await;
            if *self.stopping.borrow() {
                return outcome;
            }
            if let Err(error) = outcome {
                self.complain(&error);
                if is_first && !has_started {
                    self.tell(News::Started(Err(error)));
                }
            }
            is_first = false;
            tokio::select! {
                () = tokio::time::sleep(self.shared.try_again_after) => {}
                () = self.stopped() => return Ok(()),
            }
        }
    }

    fn complain(&self, error: &RunError) {
        let directory = self.config.data_dir.display();
        let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        tracing::error!(%directory, %error, source, again_after = ?self.shared.try_again_after, "a data directory is out; the others go on");
    }

    async fn stopped(&self) {
        let mut stopping = self.stopping.clone();
        // Nobody can say so any more when the daemon has ended.
        drop(stopping.wait_for(|stopping| *stopping).await);
    }
}

#[cfg(test)]
mod tests;

//! The one tokio runtime of a mount: single-threaded, on a thread of its own.

use std::{
    future::Future,
    io,
    sync::mpsc,
    thread::{self, JoinHandle},
};

use holdfast_common::processor;
use tokio::{runtime::Handle, sync::oneshot};

/// Runs tasks until it is dropped. One thread beats several here: a request costs fewer wake-ups.
#[derive(Debug)]
pub struct NetworkThread {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// The task that was waited for panicked, and has said so on standard error.
#[derive(Debug, thiserror::Error)]
#[error("the network thread failed")]
pub struct TaskFailed;

impl NetworkThread {
    pub fn start() -> io::Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().on_thread_start(processor::roam).build()?;
        drop(runtime.spawn(processor::stay_warm()));
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::Builder::new().name("network".to_owned()).spawn(move || {
            // Ends with a message or with the sender's end: both mean stop.
            drop(runtime.block_on(stopped));
            runtime.shutdown_background();
        })?;
        Ok(Self { handle, stop: Some(stop), thread: Some(thread) })
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Runs `work` on the network thread and waits for it. Not to be called from there.
    pub fn wait<T, W>(&self, work: W) -> Result<T, TaskFailed>
    where
        T: Send + 'static,
        W: Future<Output = T> + Send + 'static,
    {
        let (sender, receiver) = mpsc::channel();
        drop(self.handle.spawn(async move { drop(sender.send(work.await)) }));
        receiver.recv().map_err(|_| TaskFailed)
    }
}

impl Drop for NetworkThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the network thread ended in a panic");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_on_the_network_thread_and_a_panic_is_an_error() {
        let network = NetworkThread::start().unwrap();
        let name = network.wait(async { thread::current().name().map(str::to_owned) }).unwrap();
        assert_eq!(name.as_deref(), Some("network"));
        assert!(network.wait(async { assert!(thread::current().id() == thread::current().id()) }).is_ok());
        let failed: Result<(), TaskFailed> = network.wait(async { panic!("in a task") });
        assert_eq!(failed.unwrap_err().to_string(), "the network thread failed");
        assert_eq!(network.wait(async { 5 }).unwrap(), 5);
    }
}

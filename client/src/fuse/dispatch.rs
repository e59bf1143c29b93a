//! Runs an operation: on the kernel's thread when memory can answer it, else on the runtime; always answered.

use std::{
    any::Any,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::runtime::Handle;

use super::caller;
use crate::{
    fs::{Errno, FsResult},
    remote::probe,
};

/// How long the kernel may be kept waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// One question and its answer.
    Answer,
    /// As many bytes as are dirty may have to travel first.
    Flush,
    /// Somebody else decides: a lock.
    Endless,
}

/// An operation's name in the log, and how long it may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    pub(super) name: &'static str,
    pub(super) patience: Patience,
    /// The thread that waits for the answer; 0: unknown.
    pub(super) caller: u32,
}

/// Past the operation's own retries: their last one may have begun at the very end of `--io-timeout`.
const ANSWER_MARGIN: Duration = Duration::from_secs(30);
const FLUSH_MARGIN: Duration = Duration::from_secs(900);

/// The last resort, so that no program waits for ever: the filesystem has deadlines of its own, well before these.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadlines {
    pub(super) answer: Duration,
    pub(super) flush: Duration,
}

impl Deadlines {
    pub(super) fn past(io_timeout: Duration) -> Self {
        Self {
            answer: io_timeout.saturating_add(ANSWER_MARGIN),
            flush: io_timeout.saturating_mul(2).saturating_add(FLUSH_MARGIN),
        }
    }

    fn of(self, patience: Patience) -> Duration {
        match patience {
            Patience::Answer => self.answer,
            Patience::Flush => self.flush,
            Patience::Endless => Duration::MAX,
        }
    }
}

type Running<T> = Pin<Box<dyn Future<Output = FsResult<T>> + Send>>;

#[derive(Clone, Debug)]
pub(super) struct Dispatcher {
    runtime: Handle,
    deadlines: Deadlines,
}

impl Dispatcher {
    pub(super) fn new(runtime: Handle, deadlines: Deadlines) -> Self {
        Self { runtime, deadlines }
    }

    /// Polls `work` once here, to see whether memory can answer. If it is not ready, the runtime goes on with it and calls `reply` later:
    /// it is polled there at once, whether or not anything woke it.
    /// `reply` is called exactly once: with EIO when `work` panics or outlasts the operation's deadline, with EINTR when the caller is killed
    /// meanwhile. `work` is carried out all the same, and its late result dropped.
    pub(super) fn run<T, W, R>(&self, operation: Operation, work: W, reply: R)
    where
        T: Send + 'static,
        W: Future<Output = FsResult<T>> + Send + 'static,
        R: FnOnce(FsResult<T>) + Send + 'static,
    {
        let mut work: Running<T> = Box::pin(work);
        let first = {
            let _in_runtime = self.runtime.enter();
            poll_guarded(operation, &mut work, &mut Context::from_waker(probe()))
        };
        match first {
            Poll::Ready(result) => reply(result),
            Poll::Pending => self.finish_later(operation, work, reply),
        }
    }

    fn finish_later<T, R>(&self, operation: Operation, mut work: Running<T>, reply: R)
    where
        T: Send + 'static,
        R: FnOnce(FsResult<T>) + Send + 'static,
    {
        let deadline = self.deadlines.of(operation.patience);
        let task = async move {
            let mut guarded = std::future::poll_fn(|context| poll_guarded(operation, &mut work, context));
            let early = tokio::select! {
                biased;
                result = &mut guarded => return reply(result),
                () = tokio::time::sleep(deadline) => {
                    tracing::error!(operation = operation.name, ?deadline, "the operation outlasted its deadline: EIO");
                    libc::EIO
                }
                // It dies only when it is answered.
                () = caller::killed(operation.caller) => libc::EINTR,
            };
            reply(Err(Errno(early)));
            // Not dropped: half of an operation is worse than a late one.
            drop(guarded.await);
        };
        drop(self.runtime.spawn(task));
    }
}

fn poll_guarded<T>(operation: Operation, work: &mut Running<T>, context: &mut Context<'_>) -> Poll<FsResult<T>> {
    catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))).unwrap_or_else(|panic| {
        tracing::error!(operation = operation.name, panic = panic_text(panic.as_ref()), "an operation panicked: EIO");
        Poll::Ready(Err(Errno(libc::EIO)))
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::{
        sync::mpsc::{Receiver, channel},
        thread::{self, ThreadId},
    };

    use tokio::sync::oneshot;

    use super::*;

    const TEST: Operation = Operation { name: "test", patience: Patience::Answer, caller: 0 };

    struct Bench {
        runtime: tokio::runtime::Runtime,
        dispatcher: Dispatcher,
    }

    fn bench() -> Bench {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let deadlines = Deadlines { answer: Duration::from_millis(20), flush: Duration::from_secs(3600) };
        let dispatcher = Dispatcher::new(runtime.handle().clone(), deadlines);
        Bench { runtime, dispatcher }
    }

    type Answer = (FsResult<u32>, ThreadId);

    fn start(bench: &Bench, work: impl Future<Output = FsResult<u32>> + Send + 'static) -> Receiver<Answer> {
        let (sender, receiver) = channel();
        bench.dispatcher.run(TEST, work, move |result| sender.send((result, thread::current().id())).unwrap());
        receiver
    }

    /// Runs the runtime until there is an answer.
    fn drive(bench: &Bench, answers: &Receiver<Answer>) -> Answer {
        bench.runtime.block_on(async {
            loop {
                if let Ok(answer) = answers.try_recv() {
                    return answer;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
    }

    #[test]
    fn what_memory_can_answer_is_answered_before_run_returns() {
        let bench = bench();
        let answers = start(&bench, async { Ok(7) });
        assert_eq!(answers.try_recv().unwrap(), (Ok(7), thread::current().id()));
    }

    #[test]
    fn what_must_wait_is_answered_by_the_runtime() {
        let bench = bench();
        let (give, wait) = oneshot::channel();
        let answers = start(&bench, async move { wait.await.map_err(|_| Errno(libc::EPIPE)) });
        assert!(answers.try_recv().is_err(), "answered too early");
        give.send(8).unwrap();
        let (answer, runtime_thread) =
            thread::spawn(move || (drive(&bench, &answers), thread::current().id())).join().unwrap();
        assert_eq!(answer, (Ok(8), runtime_thread));
    }

    #[test]
    fn what_needs_the_network_is_begun_by_the_runtime() {
        let bench = bench();
        let answers = start(&bench, async {
            crate::remote::on_network_thread().await;
            assert_eq!(thread::current().name(), Some("runtime"));
            Ok(9)
        });
        let runtime = thread::Builder::new().name("runtime".to_owned());
        let (answer, _) = runtime.spawn(move || drive(&bench, &answers)).unwrap().join().unwrap();
        assert_eq!(answer, Ok(9));
    }

    #[test]
    fn a_panic_is_an_io_error_at_once_or_later() {
        let bench = bench();
        let at_once = start(&bench, async { panic!("at once") });
        assert_eq!(at_once.try_recv().unwrap().0, Err(Errno(libc::EIO)));
        let later = start(&bench, async {
            tokio::task::yield_now().await;
            panic!("later")
        });
        assert_eq!(drive(&bench, &later).0, Err(Errno(libc::EIO)));
    }

    #[test]
    fn a_panicking_operation_may_carry_any_message() {
        let bench = bench();
        let answers = start(&bench, async { std::panic::panic_any(5_u8) });
        assert_eq!(answers.try_recv().unwrap().0, Err(Errno(libc::EIO)));
    }

    #[test]
    fn what_outlasts_its_deadline_is_an_io_error_once_and_carried_out_all_the_same() {
        let bench = bench();
        let (go, wait) = oneshot::channel::<()>();
        let (done, carried_out) = oneshot::channel();
        let answers = start(&bench, async move {
            drop(wait.await);
            done.send(()).unwrap();
            Ok(1)
        });
        assert_eq!(drive(&bench, &answers).0, Err(Errno(libc::EIO)));
        go.send(()).unwrap();
        bench.runtime.block_on(carried_out).unwrap();
        assert!(answers.try_recv().is_err(), "answered twice");
    }

    #[test]
    fn the_last_resort_is_later_than_the_filesystems_own_deadline() {
        for secs in [0, 1, 60, u64::MAX] {
            let io_timeout = Duration::from_secs(secs);
            let deadlines = Deadlines::past(io_timeout);
            assert!(deadlines.answer > io_timeout || secs == u64::MAX);
            assert!(deadlines.flush >= deadlines.answer);
        }
    }
}

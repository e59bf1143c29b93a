//! Where a simulation runs: one thread, a clock that is counted and not waited for, and chance that follows from a seed.

use std::{
    future::Future,
    panic::resume_unwind,
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

use holdfast_common::{
    Time,
    clock::{Clock, SystemClock},
    work,
};

use crate::sys;

/// Runs what `make` makes to its end; what it left running ends with it. The same seed: the same history.
pub(crate) fn simulated<T: Send, F: Future<Output = T>>(seed: u64, make: impl FnOnce() -> F + Send) -> T {
    // A thread that has done nothing yet has drawn no random numbers yet.
    let outcome = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            sys::simulate(seed);
            work::simulate();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
            runtime.expect("a runtime").block_on(make())
        });
        thread.join()
    });
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}

/// A machine's clock, whose time of day is set now and then.
#[derive(Debug, Default)]
pub(crate) struct JumpingClock {
    system: SystemClock,
    /// Seconds.
    ahead: AtomicI64,
}

impl JumpingClock {
    pub(crate) fn jump(&self, seconds: i64) {
        self.ahead.fetch_add(seconds, Ordering::Relaxed);
    }
}

impl Clock for JumpingClock {
    fn now(&self) -> Time {
        let now = self.system.now();
        Time { secs: now.secs + self.ahead.load(Ordering::Relaxed), ..now }
    }

    fn monotonic(&self) -> Duration {
        self.system.monotonic()
    }
}

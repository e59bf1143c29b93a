//! Where work is done that takes long: hashing, and whatever waits for a disk.
//!
//! In a program, on threads of its own: one that answers requests must not wait. In a simulation there is one thread, and a clock that is
//! only counted, so that a history is always the same: there it is a task like all others, which takes a while of that clock.

use std::{cell::Cell, time::Duration};

use rand::Rng;

/// How long simulated work may take.
const SIMULATED_MAX: Duration = Duration::from_millis(4);

thread_local! {
    static SIMULATED: Cell<bool> = const { Cell::new(false) };
}

/// The work panicked, or the runtime is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the work could not be finished")]
pub struct Died;

/// From now on what this thread starts gets no threads of its own. There has to be a tokio runtime, on this thread alone.
pub fn simulate() {
    SIMULATED.set(true);
}

/// Is there no other thread?
pub fn is_simulated() -> bool {
    SIMULATED.get()
}

/// Runs `work` where it holds nobody up. Dropping the future does not stop it.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Died> {
    let done = if is_simulated() {
        tokio::spawn(async {
            takes_a_while().await;
            work()
        })
    } else {
        tokio::task::spawn_blocking(work)
    };
    done.await.map_err(|_| Died)
}

/// As long as simulated work takes, by chance: often no time at all.
pub async fn takes_a_while() {
    let longest = u64::try_from(SIMULATED_MAX.as_millis()).unwrap_or(u64::MAX);
    let long = rand::rng().random_range(0..=2 * longest).saturating_sub(longest);
    match long {
        0 => tokio::task::yield_now().await,
        millis => tokio::time::sleep(Duration::from_millis(millis)).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread_of_work(simulated: bool) -> bool {
        std::thread::spawn(move || {
            if simulated {
                simulate();
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
            let here = std::thread::current().id();
            runtime.block_on(run(move || std::thread::current().id() == here)).expect("no panic")
        })
        .join()
        .expect("no panic")
    }

    #[test]
    fn work_has_a_thread_of_its_own_unless_there_is_only_one() {
        assert!(!thread_of_work(false));
        assert!(thread_of_work(true));
    }
}

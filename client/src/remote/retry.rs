//! How long to keep trying: exponential pauses with jitter, within one time limit.

use std::time::Duration;

use rand::Rng;
use tokio::time::Instant;

const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// The time limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfTime;

/// One operation's patience.
#[derive(Debug)]
pub struct Retry {
    until: Instant,
    pause: Duration,
}

impl Retry {
    pub fn within(limit: Duration) -> Self {
        Self { until: Instant::now() + limit, pause: PAUSE_MIN }
    }

    /// For what has to be tried until it is done.
    pub fn endless() -> Self {
        Self::within(Duration::from_secs(100 * 365 * 86_400))
    }

    /// As [`Retry::pause`], of a try that does not end.
    pub async fn wait(&mut self) {
        if self.pause().await.is_err() {
            tokio::time::sleep(PAUSE_MAX).await;
        }
    }

    pub fn remaining(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Waits before the next try: 10 ms at first, twice as long each time, at most 500 ms, of which a random half is
    /// left out so that many clients do not come back together.
    pub async fn pause(&mut self) -> Result<(), OutOfTime> {
        let pause = self.pause.mul_f64(rand::rng().random_range(0.5..1.0));
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        if self.remaining() <= pause {
            return Err(OutOfTime);
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn trying_ends_at_the_limit_and_not_much_before() {
        let start = Instant::now();
        let mut retry = Retry::within(Duration::from_secs(3));
        let mut tries = 0;
        while retry.pause().await.is_ok() {
            tries += 1;
        }
        assert!((2500..=3000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
        assert!((8..40).contains(&tries), "{tries}");
    }
}

//! What a mount does without being asked: storing what is old, renewing its session, telling what it has closed.

use std::{sync::Arc, time::Duration};

use tracing::warn;

use super::{Fs, access::TELL_EVERY};
use crate::sys::boot_time;

/// Written bytes are stored at the latest after this, fsynced or not.
const DIRTY_AGE_MAX: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(200);
/// Idle files looked at in one tick to find those that can be forgotten.
const SWEEP_MIN: usize = 64;

/// The background work of one mount.
#[derive(Debug)]
pub struct Duties;

impl Duties {
    /// Runs until the filesystem is dropped by everyone else or the future is.
    pub async fn run(fs: Arc<Fs>) {
        tokio::join!(
            Self::storing(&fs),
            Self::settling(&fs),
            Self::keeping(&fs),
            Self::renewing(&fs),
            Self::releasing(&fs),
            Self::forgetting_listings(&fs),
            fs.shared.meta.keep_locks(),
            Self::telling_accesses(&fs)
        );
    }

    async fn storing(fs: &Arc<Fs>) {
        loop {
            tokio::time::sleep(TICK).await;
            fs.shared.budget.calm_down(tokio::time::Instant::now());
            let age = if fs.is_pressed() { Duration::ZERO } else { DIRTY_AGE_MAX };
            fs.write_out_old(age);
            fs.sweep();
        }
    }

    /// Lets go of what has become durable, and has it become so when it takes much of the budget.
    async fn settling(fs: &Arc<Fs>) {
        loop {
            fs.shared.budget.until_pressed(TICK).await;
            fs.shared.release_durable();
            let waits = fs.shared.retained.lock().bytes();
            if fs.shared.budget.is_pressed()
                && waits > 0
                && waits >= fs.shared.budget.bound() / 8
                && let Err(error) = fs.shared.make_durable().await
            {
                warn!(?error, "what was written does not become durable");
                tokio::time::sleep(TICK).await;
            }
        }
    }

    /// Stores again what servers have lost. Apart, because nothing becomes durable before.
    async fn keeping(fs: &Arc<Fs>) {
        loop {
            tokio::time::sleep(TICK).await;
            if let Err(error) = fs.shared.store_again().await {
                warn!(?error, "what storage servers have lost could not be stored again yet");
            }
        }
    }

    /// Open directories are not listed from the kernel's memory for long.
    async fn forgetting_listings(fs: &Arc<Fs>) {
        loop {
            tokio::time::sleep(TICK).await;
            let old = fs.listings.take_old(boot_time());
            if let Err(error) = fs.forget_listings(old).await {
                warn!(?error, "the kernel was not told to forget the listings of open directories");
            }
        }
    }

    async fn telling_accesses(fs: &Arc<Fs>) {
        loop {
            tokio::time::sleep(TELL_EVERY).await;
            fs.tell_accesses().await;
        }
    }

    async fn renewing(fs: &Arc<Fs>) {
        loop {
            tokio::time::sleep(fs.shared.meta.renew_every()).await;
            if let Err(error) = fs.shared.meta.renew(fs.dirty_bytes(), fs.shared.blocks.repairs()).await {
                warn!(?error, "the session could not be renewed");
            }
        }
    }

    async fn releasing(fs: &Arc<Fs>) {
        loop {
            tokio::time::sleep(TICK).await;
            let released = fs.releases.take();
            if !released.is_empty()
                && let Err(error) = fs.shared.meta.released(released.clone()).await
            {
                warn!(?error, "the server still counts closed files as open");
                fs.releases.put_back(released);
            }
            fs.releases.told();
        }
    }
}

impl Fs {
    /// Forgets files that were closed before their last bytes were stored, and have been since.
    fn sweep(&self) {
        let closed: Vec<_> = {
            let inodes = self.inodes.lock();
            let idle = inodes.values().filter(|inode| {
                let state = inode.lock();
                state.opens == 0 && state.is_clean()
            });
            idle.take(SWEEP_MIN.max(inodes.len() / 4)).cloned().collect()
        };
        closed.iter().for_each(|inode| self.drop_if_idle(inode));
    }
}

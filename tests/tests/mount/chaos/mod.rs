//! A real cluster in use, while one thing after another goes wrong with it: not a wrong byte, not a refused operation, nothing lost.
//!
//! `HOLDFAST_CHAOS_SECS` says how long, `HOLDFAST_CHAOS_SEED` which history; `scripts/soak` runs long ones.

mod faults;
mod user;

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use holdfast_tests::{
    cluster::{Cluster, Options, PATIENCE},
    small_disk::SmallDisk,
    sys, wait,
};
use rand::{SeedableRng, rngs::StdRng};

use self::{faults::Faults, user::User};

const DEFAULT_SECS: u64 = 60;
const SERVERS: usize = 4;
/// The server whose disk can be filled, and how much that holds.
const SMALL: usize = SERVERS;
const SMALL_MEBIBYTES: u32 = 2048;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn prepare() -> Cluster {
    let options = Options { storage: SERVERS, proxied: true, proxied_mounts: true, ..Options::default() };
    let cluster = Cluster::prepare(&options);
    for (key, value) in [
        ("garbage_grace_secs", 2),
        ("compare_every_secs", 5),
        ("down_after_ms", 5000),
        ("replace_after_secs", 2),
        ("backup_every_secs", 5),
    ] {
        cluster.set("meta/meta.toml", key, value);
    }
    cluster
}

/// "A cluster in use to which one thing after another happens (kill -9, SIGSTOP, cut cables, a slow server, an empty or a full disk, lost files, flipped bits, restarts of the metadata server or of everything) loses nothing and refuses nothing, and is whole afterwards."
#[test]
fn whatever_happens_one_after_another_nothing_is_wrong_and_nothing_lost() {
    let (secs, seed) =
        (from_environment("HOLDFAST_CHAOS_SECS", DEFAULT_SECS), from_environment("HOLDFAST_CHAOS_SEED", 1));
    let cluster = prepare();
    let small_disk = cluster.path().join("disk");
    let disk = sys::is_root().then(|| SmallDisk::mount(&small_disk, SMALL_MEBIBYTES));
    if disk.is_some() {
        cluster.move_data(SMALL, &small_disk.join("data"));
    } else {
        eprintln!("SKIPPED: full disks, because only root can mount small filesystems");
    }
    cluster.start_daemons();
    let mounts = [cluster.mount(), cluster.mount_with(&["relay=always"])];
    let mut users = [0, 1].map(|n| User::new(seed + n as u64, mounts[n].join(format!("user-{n}"))));
    let (is_over, steps) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut faults = Faults {
        cluster: &cluster,
        servers: SERVERS,
        small_disk: disk.as_ref(),
        small: SMALL,
        random: StdRng::seed_from_u64(!seed),
        counts: BTreeMap::new(),
        next: Vec::new(),
    };
    let until = Instant::now() + Duration::from_secs(secs);
    let use_it = |user: &mut User| {
        while !is_over.load(Relaxed) {
            user.step();
            steps.fetch_add(1, Relaxed);
        }
    };
    thread::scope(|scope| {
        let running = users.each_mut().map(|user| scope.spawn(|| use_it(user)));
        let _over = Over(&is_over);
        while (Instant::now() < until || !faults.all_came()) && !running.iter().any(|user| user.is_finished()) {
            faults.strike();
        }
    });
    eprintln!("seed {seed}, {secs} s: {} operations, {:?}", steps.load(Relaxed), faults.counts);
    assert!(steps.load(Relaxed) > secs, "hardly anything was done: {}", steps.load(Relaxed));
    assert!(faults.all_came());
    users.iter().for_each(User::check);
    mounts.iter().for_each(holdfast_tests::mount::Mount::remount);
    users.iter().for_each(User::check);
    for (n, user) in users.iter().enumerate() {
        user.check_at(&mounts[1 - n].join(format!("user-{n}")));
    }
    cluster.wait_until_whole();
    let dir = cluster.path().to_str().expect("UTF-8");
    wait::until("everything is well", PATIENCE, || {
        cluster.holdfast(&["fsck", "--repair", "--dir", dir]).status.success()
    });
    drop(mounts);
    cluster.storage(SMALL).kill();
    drop(disk);
}

/// The users stop with it, also when what goes wrong is the test.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

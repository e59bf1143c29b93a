//! A whole cluster on one thread, with two mounts in use, while machines lose their power, disks turn bits, fail and fill up, servers are emptied, clocks jump, and the
//! network loses, repeats, delays and cuts.
//!
//! Servers and mounts are the real code, QUIC included; disks, datagrams, time and chance are simulated. A seed is one history: it happens
//! again exactly. Each mount works in a directory of its own and knows what must be there. At the end everything is mended,
//! then all machines lose their power, and a new mount finds what the others had, three copies of everything and nothing else.
//!
//! `HOLDFAST_STORM_SEED=n` runs one seed, `HOLDFAST_STORM_SEEDS=n` so many, `HOLDFAST_STORM_SECS=n` as many as begin in that time, from
//! `HOLDFAST_STORM_FIRST` on. `one_history` alone, with `HOLDFAST_STORM_SEED=n` and `HOLDFAST_LOG=debug`, says all that happens.

mod faults;
mod history;
mod look;
mod machines;
mod user;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::FutureExt;
use holdfast_client::{
    fs::{AccessTimes, Caller, Duties, Errno, FileHandle, Fs, FsOptions, FsResult, MakeRequest},
    remote::meta::MountName,
};
use holdfast_common::{
    Attr, BlockHash, Ino, Kind, Replicas, ServerId, Time,
    clock::{Clock, SystemClock},
    cluster::Standing,
    config::Relaying,
    disk::{Disk, Space},
    inventory::BUCKETS,
    net::{
        Frame, Peers, Serve,
        identity::{NodeName, Role},
    },
    telemetry,
    wire::{
        codec::{decode, encode},
        meta::{
            AdminRequest, ClusterStatus, Comparison, MetaAnswer, MetaReply, MetaRequest, RenameMode, SetAttr,
            StorageLoad, StorageNotice,
        },
    },
};
use holdfast_server::{
    meta::{
        compare::MISSES_COPIES,
        mend::HAS_BAD_COPIES,
        server::{Options, Running},
    },
    storage::{Backups, Scrubber, Scrubbing, StorageService, start_service, store::Store},
};
use holdfast_tests::{
    fault::random_bytes,
    sim_disk::{SimDisk, Trouble},
    sys::die_with_parent,
};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    ether::{Counts, Ether, Host, Sent, Weather},
    node::{CLUSTER, DIRECTORY, FLUSH_BUSILY, FLUSH_LAZILY, open_store, start_meta},
    world::{JumpingClock, simulated},
};

use self::{
    faults::{KINDS, spoil},
    history::{Told, history},
    look::{ask_meta, nothing_is_missed, nothing_is_violated, set_replicas, stand, until, until_up, until_whole},
    machines::{Machines, beat},
    user::{Files, Mount, User, read_file, wrong},
};

/// Of an operation, and of a cluster that mends itself.
const PATIENCE: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_millis(100);
const STORAGE: std::ops::RangeInclusive<u32> = 1..=4;
const MOUNTS: u32 = 2;
/// Faults of one history.
const FAULTS: u32 = 12;
const SEEDS: u64 = 30;

/// What is wrong with a history.
type Wrong = String;
fn storage(id: u32) -> NodeName {
    NodeName { role: Role::Storage, id }
}

fn mount(id: u32) -> NodeName {
    NodeName { role: Role::Client, id }
}

const META: NodeName = NodeName { role: Role::Meta, id: 1 };

/// The environment of a process that runs one history.
const SEED: &str = "HOLDFAST_STORM_SEED";

/// A history, in a process of its own: what else there was in this one would have a part in it. `Err`: what was wrong, as it said.
pub(crate) fn told_by_a_process(seed: u64, environment: &[(&str, String)]) -> Result<Told, Wrong> {
    let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
    command.args(["--exact", "storm::one_history", "--ignored", "--nocapture"]).env(SEED, seed.to_string());
    command.envs(environment.iter().map(|(name, value)| (name, value))).stdout(Stdio::piped()).stderr(Stdio::piped());
    die_with_parent(&mut command);
    let output = command.output().expect("this program can be started");
    let said = String::from_utf8_lossy(&output.stderr);
    let after = |mark| said.lines().find_map(|line: &str| line.strip_prefix(mark));
    match (after(TOLD), after(WRONG)) {
        (Some(told), None) if output.status.success() => Ok(serde_json::from_str(told).expect("what a history tells")),
        (None, Some(wrong)) => Err(format!("{wrong} (run it again with {SEED}={seed})\n{said}")),
        _ => panic!("no history was run: {said}\n{}", String::from_utf8_lossy(&output.stdout)),
    }
}

/// Before what a history tells, or what was wrong with it.
const TOLD: &str = "told: ";
const WRONG: &str = "wrong: ";

#[test]
#[ignore = "one history, which the tests below run in a process of its own"]
fn one_history() {
    if std::env::var_os("HOLDFAST_LOG").is_some() {
        telemetry::init(telemetry::LogLevel::default(), telemetry::LogFormat::default()).expect("the first subscriber");
    }
    #[cfg(feature = "planted")]
    crate::planted::plant_chosen();
    let seed = number(SEED).unwrap_or(1);
    // What is wrong may also be a promise that the code itself sees broken.
    let outcome = std::panic::catch_unwind(|| history(seed));
    match outcome.unwrap_or_else(|_| Err(format!("seed {seed}: a panic"))) {
        Ok(told) => eprintln!("{TOLD}{}", serde_json::to_string(&told).expect("numbers and names")),
        Err(wrong) => panic!("\n{WRONG}{wrong}"),
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// What many histories tell together.
#[derive(Debug, Default)]
struct Together {
    histories: u64,
    took: Duration,
    counts: Counts,
    faults: BTreeMap<String, u32>,
}

impl Together {
    fn add(&mut self, told: Told) {
        self.histories += 1;
        self.took += told.took;
        self.counts.add(told.counts);
        for (fault, count) in told.faults {
            *self.faults.entry(fault).or_default() += count;
        }
    }
}

/// On all processors, as long as there are seeds.
fn tell(seeds: impl Iterator<Item = u64> + Send) -> Together {
    let (seeds, together) = (Mutex::new(seeds), Mutex::new(Together::default()));
    let next = || seeds.lock().next();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(seed) = next() {
                    let told = told_by_a_process(seed, &[]).unwrap_or_else(|wrong| panic!("{wrong}"));
                    together.lock().add(told);
                }
            });
        }
    });
    together.into_inner()
}

#[test]
fn whatever_goes_wrong_what_was_acknowledged_is_there_with_three_copies_and_nothing_else() {
    let first = number("HOLDFAST_STORM_FIRST").unwrap_or(1);
    let begun = Instant::now();
    let seeds: Box<dyn Iterator<Item = u64> + Send> = match (number(SEED), number("HOLDFAST_STORM_SECS")) {
        (Some(seed), _) => Box::new(std::iter::once(seed)),
        (None, Some(secs)) => Box::new((first..).take_while(move |_| begun.elapsed() < Duration::from_secs(secs))),
        (None, None) => Box::new(first..first + number("HOLDFAST_STORM_SEEDS").unwrap_or(SEEDS)),
    };
    let Together { histories, took, counts, faults } = tell(seeds);
    let (simulated, real) = (took.as_secs(), begun.elapsed().as_secs());
    eprintln!("{histories} histories of {simulated} s together, in {real} s: {faults:?}, {counts:?}");
    if histories >= SEEDS {
        assert_eq!(faults.len(), KINDS, "not everything went wrong: {faults:?}");
        let Counts { datagrams: _, lost, repeated, cut, calls: _, calls_broken } = counts;
        assert!([lost, repeated, cut, calls_broken].iter().all(|count| *count > histories), "{counts:?}");
    }
}

#[test]
fn a_history_happens_again_exactly() {
    let [first, again] = [(); 2].map(|()| told_by_a_process(3, &[]).unwrap_or_else(|wrong| panic!("{wrong}")));
    let pairs = first.sent.iter().zip(&again.sent);
    let differing = pairs.enumerate().find(|(_, (first, again))| first != again);
    assert_eq!(differing, None, "of {} datagrams that one is the first to be another", first.sent.len());
    assert!(first == again, "one history goes on longer than the other");
    assert!(first.counts.datagrams > 1000, "hardly anything happened: {:?}", first.counts);
}

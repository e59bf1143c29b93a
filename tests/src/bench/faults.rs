//! How soon a cluster of four storage servers notices a fault, what programs feel of it, and when every block has its three copies again.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use holdfast_common::limits::REPLICAS;
use parking_lot::Mutex;

use crate::{
    cluster::{Cluster, Options, Status},
    fault::random_bytes,
    mount::Mount,
    wait,
};

const SERVERS: usize = 4;
/// The server that everything happens to, counted from 1.
const VICTIM: usize = 4;
const MIB: usize = 1 << 20;
/// Bytes of one read or write of the foreground.
const RECORD: usize = 64 << 10;
const RECORDS_WRITTEN: u64 = 1024;
const CALM: Duration = Duration::from_secs(6);
/// `replace_after_secs` here: how long a server is away before its copies are made elsewhere. The default is five minutes.
const REPLACE_AFTER_SECS: u64 = 10;
/// By then a server that is away is replaced: after `down_after` and the above.
const REPLACED: Duration = Duration::from_secs(10 + REPLACE_AFTER_SECS + 5);
const WHOLE_LIMIT: Duration = Duration::from_secs(600);
const NOTICED_LIMIT: Duration = Duration::from_secs(120);

/// Of one kind of work, by when it was begun.
type Latencies = Arc<Mutex<Vec<(Instant, Duration)>>>;

/// Two programs that work all the time: one reads at random, one writes at random and syncs each time.
struct Foreground {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
    reads: Latencies,
    writes: Latencies,
}

/// What they felt in some time.
#[derive(Clone, Copy, Debug)]
struct Felt {
    per_second: f64,
    p99_ms: f64,
    longest_ms: f64,
}

impl Foreground {
    /// The file of `data_mib` mebibytes is what is read.
    fn start(mount: &Mount, data_mib: usize) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let (reads, writes) = (Latencies::default(), Latencies::default());
        // Past the kernel's pages.
        let read = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(mount.join("data"))?;
        let written = File::create(mount.join("written"))?;
        let mut bytes = vec![0; RECORD];
        let reading = move |number: u64| {
            let records = (data_mib * MIB / RECORD) as u64;
            Ok(read.read_exact_at(&mut bytes, number % records * RECORD as u64)?)
        };
        let mut content = random_bytes(1, RECORD);
        let writing = move |number: u64| {
            content[..8].copy_from_slice(&number.to_le_bytes());
            written.write_all_at(&content, number % RECORDS_WRITTEN * RECORD as u64)?;
            Ok(written.sync_data()?)
        };
        let threads = vec![work(&over, &reads, reading), work(&over, &writes, writing)];
        Ok(Self { over, threads, reads, writes })
    }

    fn felt(latencies: &Latencies, from: Instant, to: Instant) -> Felt {
        let mut took: Vec<Duration> =
            latencies.lock().iter().filter(|(at, _)| (from..to).contains(at)).map(|(_, took)| *took).collect();
        took.sort_unstable();
        let ms = |took: Option<&Duration>| took.map_or(0.0, |took| took.as_secs_f64() * 1000.0);
        Felt {
            per_second: took.len() as f64 / (to - from).as_secs_f64(),
            p99_ms: ms(took.get(took.len() * 99 / 100)),
            longest_ms: ms(took.last()),
        }
    }

    /// Panics if a read or a write failed.
    fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a thread does not panic").expect("no fault is felt as an error");
        }
    }
}

fn work(
    over: &Arc<AtomicBool>,
    latencies: &Latencies,
    mut act: impl FnMut(u64) -> Result<()> + Send + 'static,
) -> JoinHandle<Result<()>> {
    let (over, latencies) = (Arc::clone(over), Arc::clone(latencies));
    thread::spawn(move || {
        let mut number = 1_u64;
        while !over.load(Ordering::Relaxed) {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let began = Instant::now();
            act(number >> 20)?;
            latencies.lock().push((began, began.elapsed()));
        }
        Ok(())
    })
}

/// What was seen of one fault.
#[derive(Debug)]
struct Seen {
    suspect: Option<Duration>,
    down: Option<Duration>,
    whole: Option<Duration>,
    reads: [Felt; 2],
    writes: [Felt; 2],
}

struct Stage {
    // Before its servers, when it is over.
    mount: Mount,
    cluster: Cluster,
    data_mib: usize,
}

/// Markdown: faults, then scrubbing, of servers that keep a file of `data_mib` mebibytes in three copies.
pub fn run(data_mib: usize) -> Result<String> {
    let stage = Stage::set(data_mib)?;
    let mut table = "| fault | suspect, or slow, after, s | down after, s | all copies again after, s | longest read, ms | longest write and fsync, ms | reads of 64 KiB, 1/s, before and during | p99, ms | writes and fsyncs, 1/s | p99, ms |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n".to_owned();
    let victim = || stage.cluster.storage(VICTIM);
    let mut row = |name: &str, seen: Seen| {
        let row = row(name, &seen);
        eprint!("{row}");
        table += &row;
    };
    row("kill -9", stage.suffer(|| victim().kill(), REPLACED)?);
    row("it returns", stage.suffer(|| victim().start(), CALM)?);
    stage.spread()?;
    row("SIGSTOP", stage.suffer(|| victim().freeze(), REPLACED)?);
    row("it goes on", stage.suffer(|| victim().thaw(), CALM)?);
    stage.spread()?;
    row("its cable is cut", stage.suffer(|| stage.cluster.cut(VICTIM), REPLACED)?);
    row("it is mended", stage.suffer(|| stage.cluster.mend(VICTIM), CALM)?);
    stage.spread()?;
    row("it comes back with an empty disk", stage.suffer(|| stage.cluster.wipe(VICTIM), CALM)?);
    stage.spread()?;
    let slow = Slow::start(victim().pid());
    let [until_noticed, then] = stage.suffer_from(&slow)?;
    row("it runs a tenth of the time, until that is noticed", until_noticed);
    row("the same, from then on", then);
    drop(slow);
    stage.wait_until_whole()?;
    table += &stage.scrub()?;
    Ok(table)
}

fn row(name: &str, seen: &Seen) -> String {
    let seconds = |time: Option<Duration>| time.map_or("-".to_owned(), |time| format!("{:.1}", time.as_secs_f64()));
    let both = |figures: [f64; 2], digits: usize| format!("{:.digits$}, {:.digits$}", figures[0], figures[1]);
    format!(
        "| {name} | {} | {} | {} | {:.0} | {:.0} | {} | {} | {} | {} |\n",
        seconds(seen.suspect),
        seconds(seen.down),
        seconds(seen.whole),
        seen.reads[1].longest_ms,
        seen.writes[1].longest_ms,
        both(seen.reads.map(|felt| felt.per_second), 0),
        both(seen.reads.map(|felt| felt.p99_ms), 1),
        both(seen.writes.map(|felt| felt.per_second), 0),
        both(seen.writes.map(|felt| felt.p99_ms), 1),
    )
}

impl Stage {
    /// With a file of `data_mib` mebibytes in it.
    fn set(data_mib: usize) -> Result<Self> {
        let cluster = Cluster::prepare(&Options { storage: SERVERS, proxied: true, ..Options::default() });
        cluster.set("meta/meta.toml", "replace_after_secs", REPLACE_AFTER_SECS as i64);
        // Between two faults what was overwritten has to go.
        cluster.set("meta/meta.toml", "garbage_grace_secs", 5);
        cluster.start_daemons();
        let mount = cluster.mount();
        let mut bytes = random_bytes(2, MIB);
        let file = File::create(mount.join("data"))?;
        for number in 0..data_mib {
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            file.write_all_at(&bytes, (number * MIB) as u64)?;
        }
        file.sync_all()?;
        let stage = Self { mount, cluster, data_mib };
        stage.wait_until_whole()?;
        Ok(stage)
    }

    /// The victim has its share again of what was copied to others when it was away: everything for a moment, then what placement would choose.
    fn spread(&self) -> Result<()> {
        let directory = self.cluster.path().to_str().context("a path in UTF-8")?;
        // One that was slow, while it deleted what others have by now, would keep few: that is forgotten when nobody asks it.
        let is_well = || self.cluster.try_status().filter(|status| reason_of_victim(status).is_empty());
        wait::try_until(NOTICED_LIMIT, is_well).context("the server stays slow")?;
        for replicas in [SERVERS, REPLICAS] {
            let spread = self.cluster.holdfast(&["replicas", &replicas.to_string(), "--dir", directory]);
            ensure!(spread.status.success(), "replicas: {}", String::from_utf8_lossy(&spread.stderr));
        }
        self.wait_until_whole()?;
        let status = self.cluster.status();
        let (share, all) = (blocks_of_victim(&status)?, status.storage_sum("blocks"));
        ensure!(
            share * SERVERS as u64 * 2 > all,
            "the server has {share} of {all} copies, less than half of its share; {}",
            reason_of_victim(&status)
        );
        Ok(())
    }

    /// With the foreground, some calm, and then `fault` until all copies are there again and stay for `whole_for`.
    fn suffer(&self, fault: impl FnOnce(), whole_for: Duration) -> Result<Seen> {
        let foreground = Foreground::start(&self.mount, self.data_mib)?;
        thread::sleep(CALM);
        let calm = Instant::now();
        fault();
        let struck = Instant::now();
        let mut states = BTreeMap::new();
        let whole = self.watch(struck, whole_for, &mut states)?;
        let end = struck + whole.max(CALM);
        let felt =
            |latencies| [(calm - CALM, calm), (struck, end)].map(|(from, to)| Foreground::felt(latencies, from, to));
        let seen = Seen {
            suspect: states.get("suspect").copied(),
            down: states.get("down").copied(),
            whole: Some(whole),
            reads: felt(&foreground.reads),
            writes: felt(&foreground.writes),
        };
        foreground.end();
        Ok(seen)
    }

    /// Until the cluster says that the victim is slow, and for some time after. No copy is gone.
    fn suffer_from(&self, slow: &Slow) -> Result<[Seen; 2]> {
        let foreground = Foreground::start(&self.mount, self.data_mib)?;
        thread::sleep(CALM);
        let struck = Instant::now();
        slow.begin();
        let is_slow = || self.cluster.try_status().filter(|status| reason_of_victim(status).starts_with("slow"));
        wait::try_until(NOTICED_LIMIT, is_slow).context("nobody notices that a server is slow")?;
        let noticed = Instant::now();
        thread::sleep(CALM * 2);
        let spans = [(struck - CALM, struck), (struck, noticed), (noticed, Instant::now())];
        let felt = |latencies, at: usize| [spans[0], spans[at]].map(|(from, to)| Foreground::felt(latencies, from, to));
        let seen = [1, 2].map(|at| Seen {
            suspect: (at == 1).then(|| noticed - struck),
            down: None,
            whole: None,
            reads: felt(&foreground.reads, at),
            writes: felt(&foreground.writes, at),
        });
        foreground.end();
        Ok(seen)
    }

    /// Notes when the victim comes to be in each state; returns when every block has three copies on record, and
    /// goes on having them: copies of a server that is away count until it is replaced.
    fn watch(&self, struck: Instant, whole_for: Duration, states: &mut BTreeMap<String, Duration>) -> Result<Duration> {
        let mut whole_since: Option<Instant> = None;
        loop {
            ensure!(struck.elapsed() < WHOLE_LIMIT, "copies are still owed after {WHOLE_LIMIT:?}");
            let Some(status) = self.cluster.try_status() else { continue };
            states.entry(state_of_victim(&status)?).or_insert(struck.elapsed());
            match whole_since.filter(|_| status.is_whole()) {
                Some(since) if since.elapsed() > whole_for => return Ok(since - struck),
                Some(_) => {}
                None => whole_since = status.is_whole().then(Instant::now),
            }
        }
    }

    fn wait_until_whole(&self) -> Result<()> {
        let whole = wait::try_until(WHOLE_LIMIT, || self.cluster.try_status().filter(Status::is_whole));
        whole.map(drop).context("copies are still owed")
    }

    /// How fast each server checks what it has, with and without the foreground.
    fn scrub(&self) -> Result<String> {
        let passes = |status: &Status| status.storage_sum("scrub_passes");
        let mut table = "\n| scrubbing | MB/s, each server | reads of 64 KiB, 1/s, before and during | p99, ms |\n|---|---:|---:|---:|\n".to_owned();
        for is_busy in [false, true] {
            let foreground = is_busy.then(|| Foreground::start(&self.mount, self.data_mib)).transpose()?;
            thread::sleep(CALM);
            let (calm, status) = (Instant::now(), self.cluster.status());
            let (ended, stored) = (passes(&status), status.storage_sum("stored_bytes"));
            let directory = self.cluster.path().to_str().context("a path in UTF-8")?;
            let ordered = self.cluster.holdfast(&["scrub", "--now", "--dir", directory]);
            ensure!(ordered.status.success(), "scrub --now: {}", String::from_utf8_lossy(&ordered.stderr));
            let began = Instant::now();
            wait::until("it is over", WHOLE_LIMIT, || passes(&self.cluster.status()) >= ended + SERVERS as u64);
            let end = Instant::now();
            let rate = stored as f64 / 1e6 / SERVERS as f64 / (end - began).as_secs_f64();
            table += &match &foreground {
                None => format!("| idle | {rate:.0} | | |\n"),
                Some(foreground) => {
                    let felt = |from, to| Foreground::felt(&foreground.reads, from, to);
                    let (calm, busy) = (felt(calm - CALM, calm), felt(began, end));
                    format!(
                        "| busy | {rate:.0} | {:.0}, {:.0} | {:.1}, {:.1} |\n",
                        calm.per_second, busy.per_second, calm.p99_ms, busy.p99_ms
                    )
                }
            };
            if let Some(foreground) = foreground {
                foreground.end();
            }
        }
        eprint!("{table}");
        Ok(table)
    }
}

/// Copies that the victim has.
fn blocks_of_victim(status: &Status) -> Result<u64> {
    let servers = status.0["servers"].as_array().context("status lists the servers")?;
    let victim = servers.iter().find(|server| server["id"] == VICTIM).context("the victim is there")?;
    victim["load"]["blocks"].as_u64().context("a server reports its blocks")
}

/// Why it is as it is; empty if that is as it should be.
fn reason_of_victim(status: &Status) -> String {
    let servers = status.0["servers"].as_array().cloned().unwrap_or_default();
    let victim = servers.into_iter().find(|server| server["id"] == VICTIM);
    victim.and_then(|victim| victim["reason"].as_str().map(str::to_owned)).unwrap_or_default()
}

fn state_of_victim(status: &Status) -> Result<String> {
    let servers = status.0["servers"].as_array().context("status lists the servers")?;
    let victim = servers.iter().find(|server| server["id"].as_u64() == Some(VICTIM as u64));
    let state = victim.and_then(|victim| victim["state"].as_str()).context("status lists the victim")?;
    Ok(state.to_lowercase())
}

/// A process that is stopped nine tenths of the time.
struct Slow {
    begun: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Slow {
    fn start(pid: u32) -> Self {
        let (begun, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (is_begun, is_over) = (Arc::clone(&begun), Arc::clone(&over));
        let thread = thread::spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                if is_begun.load(Ordering::Relaxed) {
                    crate::sys::kill(pid, libc::SIGSTOP);
                    thread::sleep(Duration::from_millis(90));
                    crate::sys::kill(pid, libc::SIGCONT);
                }
                thread::sleep(Duration::from_millis(10));
            }
        });
        Self { begun, over, thread: Some(thread) }
    }

    fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("a thread does not panic");
        }
    }
}

//! Servers that die, freeze, are cut off, and come back.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use holdfast_tests::{
    cluster::{Cluster, Options, PATIENCE},
    fault::{self, random_bytes},
    wait,
};

/// What the product promises while one storage server is gone.
const STALL_MAX: Duration = Duration::from_secs(3);
/// How long work goes on after the server is gone, so that every stage of its detection is passed.
const OBSERVED: Duration = Duration::from_secs(15);
const FILE: usize = 48 << 20;

/// The longest operation so far, and how many there were.
#[derive(Default)]
struct Meter {
    longest_ms: AtomicU64,
    count: AtomicU64,
}

impl Meter {
    fn measure<T>(&self, act: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = act();
        let took = u64::try_from(start.elapsed().as_millis()).expect("a short time");
        self.longest_ms.fetch_max(took, Ordering::SeqCst);
        self.count.fetch_add(1, Ordering::SeqCst);
        result
    }

    fn longest(&self) -> Duration {
        Duration::from_millis(self.longest_ms.load(Ordering::SeqCst))
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }
}

/// Writes a file, fsyncs it, and remembers that it must be there.
fn write_forever(root: &Path, stop: &AtomicBool, meter: &Meter) -> Vec<(PathBuf, u64)> {
    let mut written = Vec::new();
    for number in 0u64.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let (path, content) = (root.join(format!("written-{number}")), random_bytes(number, 300_000));
        meter.measure(|| {
            let mut file = File::create(&path).expect("create while a server is gone");
            file.write_all(&content).expect("write while a server is gone");
            file.sync_all().expect("fsync while a server is gone");
        });
        written.push((path, number));
    }
    written
}

/// Reads a file from its start to its end, again and again, past every cache of the kernel.
fn read_forever(path: &Path, content: &[u8], stop: &AtomicBool, meter: &Meter) {
    let file = File::open(path).expect("open");
    let mut bytes = vec![0; 256 << 10];
    for offset in (0..content.len()).step_by(bytes.len()).cycle() {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        meter.measure(|| file.read_exact_at(&mut bytes, offset as u64).expect("read while a server is gone"));
        assert!(bytes == content[offset..][..bytes.len()], "wrong bytes at {offset}");
        if offset == 0 {
            holdfast_tests::sys::drop_pages(&file).expect("drop the pages");
        }
    }
}

/// `hurt` is done to storage server 2 under load, later `heal`: no error, no long stall, and in the end three copies. The writer's mount
/// has `relay`.
fn check(options: &Options, relay: &str, hurt: impl Fn(&Cluster), heal: impl Fn(&Cluster)) {
    let cluster = Cluster::start_with(options);
    let (writer, reader) = (cluster.mount_with(&[relay]), cluster.mount());
    let content = random_bytes(7, FILE);
    fs::write(writer.join("large"), &content).expect("write");
    File::open(writer.join("large")).expect("open").sync_all().expect("fsync");
    let (stop, writes, reads) = (AtomicBool::new(false), Meter::default(), Meter::default());
    let written = thread::scope(|scope| {
        let writing = scope.spawn(|| write_forever(writer.path(), &stop, &writes));
        scope.spawn(|| read_forever(&reader.join("large"), &content, &stop, &reads));
        let busy = || writing.is_finished() || (writes.count() > 3 && reads.count() > 3);
        wait::until("both are at work", PATIENCE, busy);
        hurt(&cluster);
        let since = Instant::now();
        wait::until("the time of observation is over", OBSERVED + STALL_MAX, || {
            since.elapsed() > OBSERVED || writing.is_finished()
        });
        stop.store(true, Ordering::SeqCst);
        writing.join().expect("the writer meets no error")
    });
    assert!(writes.longest() < STALL_MAX, "a write and its fsync took {:?}", writes.longest());
    assert!(reads.longest() < STALL_MAX, "a read took {:?}", reads.longest());
    assert!(writes.count() > 10, "only {} writes in all that time", writes.count());
    let status = cluster.status();
    assert!(status.number("owed") > 0, "the third copies are owed: {:#}", status.0);
    heal(&cluster);
    cluster.wait_until_up();
    cluster.wait_until_whole();
    writer.remount();
    for (path, seed) in written {
        assert!(fs::read(&path).expect("read") == random_bytes(seed, 300_000), "{} is wrong", path.display());
    }
}

fn freeze(cluster: &Cluster) {
    cluster.storage(2).freeze();
}

fn thaw(cluster: &Cluster) {
    cluster.storage(2).thaw();
}

/// "With one storage server dead nothing is noticed."
#[test]
fn a_killed_storage_server_is_not_noticed_and_gets_its_copies_when_it_is_back() {
    check(&Options::default(), "relay=never", |cluster| cluster.storage(2).kill(), Cluster::start_daemons);
}

#[test]
fn a_frozen_storage_server_is_not_noticed_and_gets_its_copies_when_it_is_back() {
    check(&Options::default(), "relay=never", freeze, thaw);
}

/// It is frozen while it passes blocks on, and while others pass them on to it.
#[test]
fn a_frozen_storage_server_is_not_noticed_where_servers_pass_blocks_on() {
    check(&Options::default(), "relay=always", freeze, thaw);
}

#[test]
fn a_storage_server_that_is_cut_off_is_not_noticed_and_gets_its_copies_when_it_is_back() {
    let options = Options { proxied: true, ..Options::default() };
    check(&options, "relay=never", |cluster| cluster.cut(2), |cluster| cluster.mend(2));
}

#[test]
fn a_storage_server_that_is_cut_off_is_not_noticed_where_servers_pass_blocks_on() {
    let options = Options { proxied: true, ..Options::default() };
    check(&options, "relay=always", |cluster| cluster.cut(2), |cluster| cluster.mend(2));
}

/// "With two dead, reads work; writes wait for `io_timeout`, fail at `fsync` or `close`, and succeed when they are tried again later."
#[test]
fn with_two_servers_dead_reads_work_and_writes_fail_at_fsync_and_succeed_when_retried_later() {
    let cluster = Cluster::start();
    let mount = cluster.mount_with(&["io_timeout=4s"]);
    let content = random_bytes(8, 8 << 20);
    fs::write(mount.join("old"), &content).expect("write");
    File::open(mount.join("old")).expect("open").sync_all().expect("fsync");
    mount.remount();
    cluster.storage(1).kill();
    cluster.storage(2).kill();
    assert!(fs::read(mount.join("old")).expect("reads still work") == content);

    let file = OpenOptions::new().create(true).write(true).truncate(false).open(mount.join("new")).expect("create");
    file.write_all_at(&content, 0).expect("a write is buffered");
    let start = Instant::now();
    let error = file.sync_all().expect_err("one copy is not enough");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    let took = start.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(12)).contains(&took), "the error came after {took:?}");

    cluster.start_daemons();
    wait::until("a later fsync succeeds", PATIENCE, || file.sync_all().is_ok());
    drop(file);
    mount.remount();
    assert!(fs::read(mount.join("new")).expect("read") == content, "what was retried is not what was written");
    cluster.wait_until_whole();
}

/// Makes, renames, links, appends and removes: each must be done exactly once, without an error.
fn change_names(root: &Path, stop: &AtomicBool) -> u64 {
    fs::create_dir(root).expect("mkdir");
    for number in 0u64.. {
        if stop.load(Ordering::SeqCst) {
            return number;
        }
        let name = |kind: &str| root.join(format!("{kind}-{number}"));
        fs::create_dir(name("dir")).expect("mkdir is not done twice");
        let mut file =
            OpenOptions::new().write(true).create_new(true).open(name("new")).expect("O_EXCL is not done twice");
        write!(file, "{number}").expect("write");
        drop(file);
        fs::hard_link(name("new"), name("link")).expect("link is not done twice");
        fs::rename(name("new"), name("dir").join("moved")).expect("rename is not done twice");
        if number % 2 == 1 {
            fs::remove_file(name("link")).expect("unlink is not done twice");
        }
        let mut log = OpenOptions::new().append(true).create(true).open(root.join("log")).expect("open the log");
        writeln!(log, "{number}").expect("append");
    }
    0
}

/// The metadata server is killed `rounds` times under load of two mounts, and hurt each time before it starts again.
fn check_metadata_restarts(rounds: u32, hurt: impl Fn(&Cluster)) {
    let cluster = Cluster::start();
    let mounts = [cluster.mount(), cluster.mount()];
    let stop = AtomicBool::new(false);
    let done: Vec<u64> = thread::scope(|scope| {
        let stop = &stop;
        let workers: Vec<_> = (0..4).map(|n| mounts[n % 2].join(format!("worker-{n}"))).collect();
        let threads: Vec<_> = workers.into_iter().map(|root| scope.spawn(move || change_names(&root, stop))).collect();
        for _ in 0..rounds {
            let before = cluster.status().number("log_position");
            let worked = || cluster.try_status().is_some_and(|status| status.number("log_position") > before + 50);
            wait::until("the workers get on", PATIENCE, || {
                threads.iter().any(thread::ScopedJoinHandle::is_finished) || worked()
            });
            cluster.meta().kill();
            hurt(&cluster);
            cluster.start_daemons();
        }
        stop.store(true, Ordering::SeqCst);
        threads.into_iter().map(|thread| thread.join().expect("a worker meets no error")).collect()
    });
    mounts[0].remount();
    for (worker, count) in done.into_iter().enumerate() {
        assert!(count > 5, "worker {worker} did only {count} rounds");
        let root = mounts[0].join(format!("worker-{worker}"));
        for number in 0..count {
            let moved =
                fs::read_to_string(root.join(format!("dir-{number}/moved"))).expect("nothing acknowledged is lost");
            assert_eq!(moved, number.to_string());
            assert_eq!(root.join(format!("link-{number}")).exists(), number % 2 == 0);
            assert!(!root.join(format!("new-{number}")).exists());
        }
        let log = fs::read_to_string(root.join("log")).expect("read the log");
        assert_eq!(log, (0..count).map(|number| format!("{number}\n")).collect::<String>());
    }
    assert_eq!(cluster.violations(), Vec::<String>::new());
}

/// "The metadata server may be killed again and again: nothing is lost, and nothing done twice."
#[test]
fn a_metadata_server_that_is_killed_again_and_again_loses_nothing_and_does_nothing_twice() {
    check_metadata_restarts(5, |_| {});
}

/// "If the metadata server loses its power, mounts that live on give back what was not durable, fsynced or not."
#[test]
fn a_metadata_server_that_loses_its_power_again_and_again_takes_nothing_from_mounts_that_live_on() {
    let lost = AtomicU64::new(0);
    check_metadata_restarts(4, |cluster| {
        let bytes = fault::lose_power(&cluster.path().join("meta/data/log"));
        lost.fetch_add(bytes as u64, Ordering::SeqCst);
    });
    assert!(lost.load(Ordering::SeqCst) > 1000, "hardly anything was lost, so hardly anything was tested");
}

#[test]
fn after_a_power_cut_a_new_mount_waits_for_the_server_that_waits_for_the_old_one() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    fs::write(mount.join("kept"), "kept").expect("write");
    File::open(mount.join("kept")).expect("open").sync_all().expect("fsync");
    mount.kill();
    cluster.meta().kill();
    fault::lose_power(&cluster.path().join("meta/data/log"));
    cluster.start_daemons();
    mount.start_again();
    assert_eq!(fs::read_to_string(mount.join("kept")).expect("read"), "kept");
    fs::write(mount.join("new"), "new").expect("write");
}

/// A restarted metadata server knows of no server that it is up until it hears it. A mount that asks in that moment must
/// not go by the answer for longer than it is true.
#[test]
fn a_write_soon_after_a_metadata_server_came_back_does_not_wait_for_the_next_renewal() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    fs::write(mount.join("before"), "before").expect("write");
    cluster.storage_servers().iter().for_each(holdfast_tests::process::Process::freeze);
    cluster.meta().kill();
    cluster.meta().start();
    wait::until("the status says that nobody is up", PATIENCE, || {
        cluster.try_status().is_some_and(|status| status.servers_up() == 0)
    });
    // With the answer to this the mount knows it too, and asks nothing more.
    let mut file = File::create(mount.join("after")).expect("create");
    file.write_all(b"after").expect("write");
    let syncing = thread::scope(|scope| {
        let sync = scope.spawn(|| file.sync_all());
        cluster.storage_servers().iter().for_each(holdfast_tests::process::Process::thaw);
        let since = Instant::now();
        sync.join().expect("no panic").expect("fsync");
        since.elapsed()
    });
    assert!(syncing < STALL_MAX, "an fsync took {syncing:?} after every server could answer again");
}

/// "What `fsync` acknowledged survives the death of every process at any moment."
#[test]
fn a_kill_of_everything_at_any_moment_loses_nothing_that_fsync_acknowledged() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let mut expected = Vec::new();
    for round in 0u64..6 {
        for number in 0..10 {
            let (path, seed) = (format!("round-{round}-file-{number}"), round * 100 + number);
            let mut file = File::create(mount.join(&path)).expect("create");
            file.write_all(&random_bytes(seed, 50_000 + usize::try_from(seed).expect("small") * 3000)).expect("write");
            file.sync_all().expect("fsync");
            expected.push((path, seed));
        }
        mount.kill();
        let victims = std::iter::once(cluster.meta()).chain(cluster.storage_servers());
        victims.for_each(holdfast_tests::process::Process::kill);
        cluster.start_daemons();
        mount.start_again();
        for (path, seed) in &expected {
            let content = random_bytes(*seed, 50_000 + usize::try_from(*seed).expect("small") * 3000);
            assert!(fs::read(mount.join(path)).expect("read") == content, "{path} is not what fsync acknowledged");
        }
    }
    assert_eq!(cluster.violations(), Vec::<String>::new());
}

#[test]
fn storage_servers_that_restart_one_after_the_other_under_load_lose_nothing() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let (stop, meter) = (AtomicBool::new(false), Meter::default());
    let written = thread::scope(|scope| {
        let writing = scope.spawn(|| write_forever(mount.path(), &stop, &meter));
        for server in [1, 2, 3, 1, 2, 3] {
            let before = meter.count();
            wait::until("the writer gets on", PATIENCE, || writing.is_finished() || meter.count() > before + 5);
            cluster.storage(server).kill();
            cluster.start_daemons();
        }
        stop.store(true, Ordering::SeqCst);
        writing.join().expect("the writer meets no error")
    });
    mount.remount();
    for (path, seed) in written {
        assert!(fs::read(&path).expect("read") == random_bytes(seed, 300_000), "{} is wrong", path.display());
    }
    cluster.wait_until_whole();
}

/// "A storage server that stays away is replaced by the others, if there are three (after five minutes, `replace_after_secs`)."
#[test]
fn a_server_that_stays_dead_is_replaced_by_the_others() {
    let cluster = Cluster::prepare(&Options { storage: 4, ..Options::default() });
    for (key, value) in [("suspect_after_ms", 1000), ("down_after_ms", 2000), ("replace_after_secs", 2)] {
        cluster.set("meta/meta.toml", key, value);
    }
    cluster.start_daemons();
    let mount = cluster.mount();
    let content = |number: u64| random_bytes(number, 200_000);
    for number in 0..60 {
        let mut file = File::create(mount.join(format!("file-{number}"))).expect("create");
        file.write_all(&content(number)).expect("write");
        file.sync_all().expect("fsync");
    }
    cluster.storage(4).kill();
    let made = cluster.status().number("copies_made");
    wait::until("copies are made elsewhere", PATIENCE, || cluster.status().number("copies_made") > made);
    cluster.wait_until_whole();
    assert_eq!(cluster.status().servers_up(), 3);
    // All three have everything: any one of them is enough.
    mount.unmount();
    (1..=2).for_each(|n| cluster.storage(n).kill());
    mount.start_again();
    for number in 0..60 {
        assert!(fs::read(mount.join(format!("file-{number}"))).expect("read") == content(number), "file {number}");
    }
    [1, 2, 4].into_iter().for_each(|n| cluster.storage(n).start());
    cluster.wait_until_up();
    fs::write(mount.join("after"), "works").expect("write");
    cluster.wait_until_whole();
}

//! Disks that break, are not there, or are slow; also one of several of a daemon.

use std::{
    fs::{self, File},
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use holdfast_tests::{
    cluster::{Cluster, Options, PATIENCE, free_address, holdfast_ok},
    fault::{self, random_bytes},
    mount::Mount,
    shell, sys, wait,
};

/// The daemon with two data directories, each a storage server: there are four in all.
const DAEMON: usize = 3;
const SERVERS: usize = 4;

/// The first of two ports that follow each other.
fn two_addresses() -> SocketAddr {
    let mut before = free_address();
    loop {
        let next = free_address();
        if next.port() == before.port() + 1 {
            return before;
        }
        before = next;
    }
}

/// Its daemons run; returns the directory of the second disk.
fn cluster_with_two_disks() -> (Cluster, PathBuf) {
    let cluster = Cluster::prepare(&Options::default());
    let (config, own) = (format!("storage-{DAEMON}/storage.toml"), cluster.path().join(format!("storage-{DAEMON}")));
    let (first, second) = (own.join("data"), own.join("second"));
    for (key, value) in [("down_after_ms", 5000), ("replace_after_secs", 2)] {
        cluster.set("meta/meta.toml", key, value);
    }
    fs::create_dir_all(&first).expect("mkdir");
    fs::rename(own.join("tls"), first.join("tls")).expect("the first disk keeps the certificate");
    cluster.unset(&config, "tls_dir");
    cluster.set(&config, "data_dir", vec![text(&first).to_owned(), text(&second).to_owned()]);
    cluster.set(&config, "listen", two_addresses().to_string());
    cluster.meta().start();
    wait::until("the metadata server answers", PATIENCE, || cluster.try_status().is_some());
    let token = holdfast_ok(&["token", "--role", "storage", "--dir", text(cluster.path())]);
    holdfast_ok(&["enrol", token.trim(), "--tls-dir", text(&second.join("tls"))]);
    cluster.storage_servers().iter().for_each(holdfast_tests::process::Process::start);
    wait_for_servers(&cluster, SERVERS);
    (cluster, second)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

fn wait_for_servers(cluster: &Cluster, count: usize) {
    wait::until(&format!("{count} servers are up"), PATIENCE, || {
        cluster.try_status().is_some_and(|status| status.servers_up() == count)
    });
}

/// What happens to calls of one process that read, write and sync files, while this lives.
struct TroubledDisk(Child);

impl TroubledDisk {
    /// EIO, for the files below `directory`.
    fn broken(process: u32, directory: &Path) -> Self {
        let mut files = fault::files(&directory.join("segments"));
        files.push(directory.join("index.redb"));
        let only = files.iter().flat_map(|path| ["-P", text(path)].map(str::to_owned));
        Self::of(process, only.collect(), "", "error=EIO")
    }

    /// Each takes ten milliseconds longer.
    fn slow(process: u32) -> Self {
        Self::of(process, Vec::new(), ",io_uring_enter", "delay_enter=10000")
    }

    fn of(process: u32, only: Vec<String>, more: &str, trouble: &str) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-q", "-p", &process.to_string(), "-o", "/dev/null"]).args(only);
        command.args(["-e", &format!("inject=pread64,preadv2,pwrite64,pwritev2,fdatasync{more}:{trouble}")]);
        sys::die_with_parent(&mut command);
        let strace = command.stderr(Stdio::null()).spawn().expect("start strace");
        let status = || fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let traced = || status().contains(&format!("TracerPid:\t{}\n", strace.id()));
        wait::until("strace is attached", Duration::from_secs(20), traced);
        Self(strace)
    }
}

impl Drop for TroubledDisk {
    fn drop(&mut self) {
        sys::kill(self.0.id(), libc::SIGINT);
        drop(self.0.wait());
    }
}

/// Writes and syncs a file; returns it with its content.
fn write(mount: &Mount, seed: u64) -> (PathBuf, Vec<u8>) {
    let (path, content) = (mount.join(format!("file-{seed}")), random_bytes(seed, 3 << 20));
    let mut file = File::create(&path).expect("create");
    file.write_all(&content).expect("write");
    file.sync_all().expect("fsync");
    (path, content)
}

/// "Of a storage server with several disks one that fails is taken out alone: the others go on, its copies are made again, and it comes back when it works again."
#[test]
fn a_disk_that_breaks_is_taken_out_alone() {
    if !shell::has("strace") || !sys::is_root() {
        eprintln!("SKIPPED: strace is not installed (scripts/test does that), or this is not root");
        return;
    }
    let (cluster, second) = cluster_with_two_disks();
    let mount = cluster.mount();
    let mut files: Vec<_> = (0..20).map(|seed| write(&mount, seed)).collect();
    assert!(!fault::files(&second.join("segments")).is_empty(), "the second disk is used");
    let made = cluster.status().number("copies_made");
    let broken = TroubledDisk::broken(cluster.storage(DAEMON).pid(), &second);
    let mut seed = 100;
    wait::until("the broken disk is out", PATIENCE, || {
        seed += 1;
        files.push(write(&mount, seed));
        cluster.status().servers_up() == SERVERS - 1
    });
    wait::until("its daemon says so", PATIENCE, || cluster.storage(DAEMON).log().contains("a data directory is out"));
    let dir = cluster.path().to_str().expect("UTF-8");
    let told = String::from_utf8_lossy(&cluster.holdfast(&["events", "--json", "-n", "100", "--dir", dir]).stdout)
        .into_owned();
    let event = told.lines().find(|line| line.contains("has to stop")).unwrap_or_else(|| panic!("not told: {told}"));
    assert!(event.contains(second.to_str().expect("UTF-8")) && event.contains("Input/output error"), "{event}");
    wait::until("its copies are made again", PATIENCE, || cluster.status().number("copies_made") > made);
    cluster.wait_until_whole();
    files.extend((200..210).map(|seed| write(&mount, seed)));
    mount.remount();
    for (path, content) in &files {
        assert!(fs::read(path).expect("read") == *content, "{}", path.display());
    }
    assert!(!cluster.storage(DAEMON).has_ended());
    drop(broken);
    wait_for_servers(&cluster, SERVERS);
    cluster.wait_until_whole();
    for (path, content) in &files {
        assert!(fs::read(path).expect("read") == *content, "{}", path.display());
    }
}

/// "A daemon with several disks starts with those that are there, and takes the others when they come."
#[test]
fn a_daemon_starts_without_a_disk_that_is_not_there() {
    let (cluster, second) = cluster_with_two_disks();
    let mount = cluster.mount();
    let files: Vec<_> = (0..10).map(|seed| write(&mount, seed)).collect();
    let away = second.with_extension("away");
    cluster.storage(DAEMON).kill();
    fs::rename(&second, &away).expect("take the disk away");
    let made = cluster.status().number("copies_made");
    cluster.storage(DAEMON).start();
    wait::until("its copies are made again", PATIENCE, || cluster.status().number("copies_made") > made);
    wait_for_servers(&cluster, SERVERS - 1);
    cluster.wait_until_whole();
    for (path, content) in &files {
        assert!(fs::read(path).expect("read") == *content, "{}", path.display());
    }
    if second.exists() {
        fs::remove_dir_all(&second).expect("nothing of worth was made there");
    }
    fs::rename(&away, &second).expect("bring the disk back");
    wait_for_servers(&cluster, SERVERS);
    cluster.wait_until_whole();
}

/// "A disk that is slower than the others is noticed and gets fewer new blocks, until it is as fast as the others again."
#[test]
fn a_slow_disk_is_noticed_and_gets_fewer_blocks() {
    const SLOW: usize = 2;
    if !shell::has("strace") || !sys::is_root() {
        eprintln!("SKIPPED: strace is not installed (scripts/test does that), or this is not root");
        return;
    }
    let cluster = Cluster::start_with(&Options { storage: SERVERS, ..Options::default() });
    let mount = cluster.mount();
    let dir = text(cluster.path());
    let told = |what: &str| {
        let events = cluster.holdfast(&["events", "--json", "-n", "4096", "--dir", dir]).stdout;
        String::from_utf8_lossy(&events).lines().filter(|line| line.contains(what)).count()
    };
    let blocks = || -> Vec<u64> {
        let servers = cluster.status().0["servers"].as_array().expect("servers").clone();
        servers.iter().map(|server| server["load"]["blocks"].as_u64().expect("a number")).collect()
    };
    let mut seed = 1000;
    let mut write_until = |what: &str, is_so: &mut dyn FnMut() -> bool| {
        wait::until(what, PATIENCE, || {
            seed += 1;
            drop(write(&mount, seed));
            is_so()
        });
    };
    write_until("everybody is known", &mut || blocks().iter().all(|blocks| *blocks > 20));
    let slow = TroubledDisk::slow(cluster.storage(SLOW).pid());
    write_until("it is noticed", &mut || told("times as slow as the others") > 0);
    let status = cluster.status();
    let server = &status.0["servers"][SLOW - 1];
    assert!(server["reason"].as_str().is_some_and(|why| why.starts_with("slow, ")), "{server:#}");
    let (before, mut written) = (blocks(), 0);
    write_until("sixty blocks are written", &mut || {
        written += 3;
        written >= 60
    });
    cluster.wait_until_whole();
    wait::until("the servers have said what they have", PATIENCE, || {
        blocks().iter().sum::<u64>() >= before.iter().sum::<u64>() + 180
    });
    let more: Vec<u64> = blocks().iter().zip(before).map(|(now, then)| now.saturating_sub(then)).collect();
    assert!(more[SLOW - 1] * 3 < more.iter().sum::<u64>() / SERVERS as u64 * 2, "it is avoided: {more:?}");
    drop(slow);
    write_until("it is as fast as the others", &mut || told("is as fast as the others again") > 0);
}

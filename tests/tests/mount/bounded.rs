//! Memory stays within what was configured, whatever passes through.

use std::{
    fs::File,
    io::{Read, Write},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use holdfast_tests::{
    cluster::{Cluster, Options},
    fault::random_bytes,
    memory_limit::MemoryLimit,
    process::Process,
    shell, sys,
};

/// Configured buffer and cache of a client by default, with what threads, stacks and connections need.
const CLIENT_BYTES_MAX: u64 = 1 << 30;
const SERVER_BYTES_MAX: u64 = 768 << 20;

/// The most that each process needed while `act` ran.
fn peaks<T>(processes: &[&Process], act: impl FnOnce() -> T) -> (Vec<u64>, T) {
    let peaks: Vec<AtomicU64> = processes.iter().map(|_| AtomicU64::new(0)).collect();
    let over = AtomicBool::new(false);
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                for (process, peak) in processes.iter().zip(&peaks) {
                    peak.fetch_max(process.resident_bytes(), Ordering::SeqCst);
                }
                thread::sleep(Duration::from_millis(50));
            }
        });
        let result = act();
        over.store(true, Ordering::SeqCst);
        result
    });
    (peaks.into_iter().map(AtomicU64::into_inner).collect(), result)
}

#[test]
fn a_copy_far_larger_than_every_buffer_grows_no_process_past_its_bounds() {
    let mebibytes: usize = if std::env::var_os("HOLDFAST_LONG_TESTS").is_some() { 10 << 10 } else { 2 << 10 };
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let path = mount.join("large");
    let processes = [mount.process(), cluster.meta(), cluster.storage(1), cluster.storage(2), cluster.storage(3)];
    let content = |index: usize| random_bytes(index as u64, 1 << 20);
    let (peaks, ()) = peaks(&processes, || {
        let mut file = File::create(&path).expect("create");
        (0..mebibytes).for_each(|index| file.write_all(&content(index)).expect("write"));
        file.sync_all().expect("fsync");
        let (mut file, mut bytes) = (File::open(&path).expect("open"), vec![0; 1 << 20]);
        for index in 0..mebibytes {
            file.read_exact(&mut bytes).expect("read");
            assert!(bytes == content(index), "mebibyte {index} is wrong");
        }
    });
    for (process, peak) in processes.iter().zip(peaks) {
        let limit = if process.name() == "mount" { CLIENT_BYTES_MAX } else { SERVER_BYTES_MAX };
        eprintln!("{}: at most {} MiB", process.name(), peak >> 20);
        assert!(peak < limit, "{} grew to {} MiB", process.name(), peak >> 20);
    }
}

/// Beyond the caches and buffers that are configured: threads, stacks, connections, messages on their way.
const BESIDE_CACHES: u64 = 256 << 20;

/// "No process takes more memory than its caches and buffers, as they are configured, and 256 MiB."
#[test]
fn every_kind_of_work_gets_done_within_hard_limits_of_memory() {
    if !sys::is_root() {
        eprintln!("SKIPPED: only root can limit the memory of a process");
        return;
    }
    const MIB: u64 = 1 << 20;
    let cluster = Cluster::prepare(&Options::default());
    cluster.set("meta/meta.toml", "cache_bytes", "32MiB");
    (1..=3).for_each(|n| cluster.set(&format!("storage-{n}/storage.toml"), "index_cache_bytes", "16MiB"));
    cluster.start_daemons();
    let mount = cluster.mount_with(&["cache_bytes=32MiB", "dirty_bytes=32MiB"]);
    let bounds = [
        (mount.process(), 64),
        (cluster.meta(), 32),
        (cluster.storage(1), 16),
        (cluster.storage(2), 16),
        (cluster.storage(3), 16),
    ];
    let mut limits = Vec::new();
    for (process, caches) in bounds {
        match MemoryLimit::of(process.pid(), caches * MIB + BESIDE_CACHES) {
            Ok(limit) => limits.push((process, limit)),
            Err(error) => {
                eprintln!("SKIPPED: no control groups here: {error}");
                return;
            }
        }
    }
    let times = if std::env::var_os("HOLDFAST_LONG_TESTS").is_some() { 20 } else { 1 };
    shell::run(
        mount.path(),
        &format!(
            "for round in $(seq {times}); do
                 dd if=/dev/urandom of=long bs=1M count=400 conv=fsync status=none
                 cmp long long
                 mkdir small && (cd small && seq 4000 | split -l 1 -a 4 -d) && ls -lR small | wc -l
                 for i in 1 2 3 4; do dd if=/dev/urandom of=wide$i bs=64k count=800 status=none & done; wait
                 python3 -c \"
import os, random
fd = os.open('long', os.O_RDWR)
for _ in range(8000): os.pwrite(fd, os.urandom(100), random.randrange(400 << 20))
for _ in range(2000): os.pread(fd, 4096, random.randrange(400 << 20))
os.fsync(fd)\"
                 cp -r small copied; truncate -s 1T sparse
                 rm -r small copied long wide* sparse
             done"
        ),
    );
    for (process, limit) in &limits {
        eprintln!("{}: {} MiB, {} kills", process.name(), process.resident_bytes() >> 20, limit.kills());
        assert!(limit.kills() == 0 && !process.has_ended(), "{} needed more than its limit", process.name());
    }
}

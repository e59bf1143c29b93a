//! Memory stays within what was configured, whatever passes through.

use std::{
    fs::File,
    io::{Read, Write},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use holdfast_tests::{cluster::Cluster, fault::random_bytes, process::Process};

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

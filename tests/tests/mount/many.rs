//! Many files: no step may cost more for each of them because there are others, and none may stay in memory.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::Path,
    thread,
    time::Instant,
};

use holdfast_tests::{cluster::Cluster, sys};

fn is_long() -> bool {
    std::env::var_os("HOLDFAST_LONG_TESTS").is_some()
}

/// Calls `act` for every number below `count`, on four threads; says how long each tenth took.
fn for_each(what: &str, count: usize, act: impl Fn(usize) + Sync) {
    let tenth = count / 10;
    let mut took = Vec::new();
    for start in (0..count).step_by(tenth) {
        let began = Instant::now();
        thread::scope(|scope| {
            for part in 0..4 {
                let act = &act;
                scope.spawn(move || (start + part..count.min(start + tenth)).step_by(4).for_each(act));
            }
        });
        took.push(format!("{:.2}", began.elapsed().as_secs_f64()));
    }
    eprintln!("{what}, a tenth of {count} each: {} s", took.join(" "));
}

fn names(directory: &Path) -> BTreeSet<std::ffi::OsString> {
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(directory).expect("list") {
        assert!(seen.insert(entry.expect("list").file_name()), "listed twice");
    }
    seen
}

/// "A directory may have a million entries."
#[test]
fn a_directory_of_many_entries_is_filled_listed_searched_and_emptied() {
    let entries = if is_long() { 1_000_000 } else { 20_000 };
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let directory = mount.join("many");
    let entry = |number: usize| directory.join(format!("entry-{number}"));
    fs::create_dir(&directory).expect("mkdir");
    for_each("create", entries, |number| drop(File::create_new(entry(number)).expect("create")));
    mount.remount();
    let began = Instant::now();
    assert_eq!(names(&directory).len(), entries);
    eprintln!("list: {:.2} s", began.elapsed().as_secs_f64());
    for_each("stat", entries, |number| assert!(fs::metadata(entry(number)).expect("stat").is_file()));
    assert_eq!(fs::remove_dir(&directory).expect_err("not empty").raw_os_error(), Some(libc::ENOTEMPTY));
    for_each("unlink", entries, |number| fs::remove_file(entry(number)).expect("unlink"));
    assert!(names(&directory).is_empty());
    fs::remove_dir(&directory).expect("rmdir");
    let processes = [mount.process(), cluster.meta(), cluster.storage(1)];
    for process in processes {
        eprintln!("{}: {} MiB", process.name(), process.resident_bytes() >> 20);
    }
}

/// The kernel forgets names and inodes that nobody uses, and says so to their filesystem.
fn drop_kernel_caches() {
    fs::write("/proc/sys/vm/drop_caches", "2").expect("drop caches, as root");
}

/// "Files that were touched and are no longer used take no memory of the mount."
#[test]
fn a_mount_forgets_what_is_no_longer_used() {
    if !sys::is_root() {
        eprintln!("SKIPPED: only root can make the kernel forget");
        return;
    }
    let (rounds, files) = if is_long() { (10, 30_000) } else { (6, 2000) };
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let mut resident = Vec::new();
    for round in 0..rounds {
        let directory = mount.join(format!("round-{round}"));
        fs::create_dir(&directory).expect("mkdir");
        for_each("write", files, |number| {
            fs::write(directory.join(number.to_string()), format!("{round} {number}")).expect("write")
        });
        for_each("read", files, |number| {
            let found = fs::read_to_string(directory.join(number.to_string())).expect("read");
            assert_eq!(found, format!("{round} {number}"));
        });
        if round % 2 == 0 {
            for_each("unlink", files, |number| {
                fs::remove_file(directory.join(number.to_string())).expect("unlink");
            });
        }
        drop_kernel_caches();
        resident.push(mount.process().resident_bytes() >> 10);
    }
    eprintln!("resident after each round: {resident:?} KiB");
    // What the first rounds filled are caches with bounds; after them nothing may be kept for another file.
    let (settled, last) = (resident[rounds / 2], resident[rounds - 1]);
    let touched = (files * (rounds / 2 - 1)) as u64;
    assert!(last < settled + 4096 + touched / 16, "{} KiB more after {touched} more files", last - settled);
}

//! The space of what no file has any more comes back, and nothing else goes.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use holdfast_tests::{
    cluster::{Cluster, Options, PATIENCE},
    fault::random_bytes,
    wait,
};

/// A cluster whose garbage goes after a second, from segments of 8 MiB.
fn tidy_cluster() -> Cluster {
    let cluster = Cluster::prepare(&Options::default());
    cluster.set("meta/meta.toml", "garbage_grace_secs", 1);
    for n in 1..=3 {
        cluster.set(&format!("storage-{n}/storage.toml"), "segment_bytes", 8 << 20);
    }
    cluster.start_daemons();
    cluster
}

/// Bytes that the segments of all storage servers take on their disks.
fn taken(cluster: &Cluster) -> u64 {
    let of = |directory: &Path| -> u64 {
        let files = fs::read_dir(directory).expect("list segments");
        files.filter_map(|file| file.ok()?.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
    };
    (1..=3).map(|n| of(&cluster.storage_data(n).join("segments"))).sum()
}

fn is_collected(cluster: &Cluster) -> bool {
    let status = cluster.status();
    status.number("unnamed") == 0 && status.number("condemned") == 0
}

/// "The space of deleted and overwritten data comes back within minutes (a minute after the last file has let go of it, `garbage_grace_secs`)."
#[test]
fn the_space_of_deleted_and_overwritten_data_comes_back() {
    const SMALL: u64 = 2000;
    let cluster = tidy_cluster();
    let mount = cluster.mount();
    let small = |n: u64| mount.join(format!("small-{n}"));
    let large = mount.join("large");
    fs::write(&large, random_bytes(1, 30 << 20)).expect("write");
    for n in 0..SMALL {
        fs::write(small(n), random_bytes(1000 + n, 5000)).expect("write");
    }
    File::open(&large).expect("open").sync_all().expect("fsync");
    wait::until("all copies are made", PATIENCE, || cluster.status().is_whole());
    let full = taken(&cluster);
    assert!(full > 3 * (30 << 20) + 3 * SMALL * 5000, "{full}");
    // One in ten of the small files stays, among dead neighbours; the large one is overwritten.
    (0..SMALL).filter(|n| n % 10 != 0).for_each(|n| fs::remove_file(small(n)).expect("unlink"));
    fs::write(&large, random_bytes(2, 1 << 20)).expect("overwrite");
    wait::until("all garbage is collected", PATIENCE, || is_collected(&cluster));
    let living = 3 * ((1 << 20) + SMALL / 10 * 5000);
    // The newest segment is not rewritten, of each other one at most half is dead, or a mebibyte.
    let bound = 2 * living + 3 * (8 << 20) + 3 * (1 << 20);
    wait::until("their space is free", 2 * PATIENCE, || taken(&cluster) < bound);
    mount.remount();
    assert!(fs::read(mount.join("large")).expect("read") == random_bytes(2, 1 << 20));
    for n in (0..SMALL).step_by(10) {
        assert!(fs::read(mount.join(format!("small-{n}"))).expect("read") == random_bytes(1000 + n, 5000), "{n}");
    }
    assert_eq!(cluster.violations(), Vec::<String>::new());
    assert!(cluster.status().is_whole());
}

/// "A file that was opened before others overwrote it reads as it is now, also when what it was made of is gone."
#[test]
fn whoever_read_a_file_before_reads_what_it_is_now() {
    let cluster = tidy_cluster();
    let (reader, writer) = (cluster.mount(), cluster.mount());
    let old = random_bytes(1, 4 << 20);
    fs::write(writer.join("file"), &old).expect("write");
    let open = File::open(reader.join("file")).expect("open");
    let mut start = [0; 100];
    open.read_exact_at(&mut start, 0).expect("read");
    assert!(start == old[..100]);
    let new = random_bytes(2, 4 << 20);
    File::options().write(true).open(writer.join("file")).expect("open").write_all_at(&new, 0).expect("overwrite");
    wait::until("what it was made of is gone", PATIENCE, || cluster.status().number("collected") >= 4);
    let mut end = [0; 100];
    open.read_exact_at(&mut end, (4 << 20) - 100).expect("read");
    assert!(end == new[(4 << 20) - 100..]);
    assert_eq!(cluster.status().number("missing_copies_met"), 0, "nobody lost anything");
}

/// Files that take each other's contents in turn: what is garbage one moment is written again the next, and servers die.
#[test]
fn what_is_written_again_while_it_is_being_collected_is_there() {
    const FILES: usize = 4;
    const CONTENTS: u64 = 6;
    let cluster = tidy_cluster();
    let mount = cluster.mount();
    let content = |n: u64| random_bytes(n % CONTENTS, 150_000);
    let until = Instant::now() + Duration::from_secs(20);
    thread::scope(|scope| {
        for file in 0..FILES {
            let (mount, content) = (&mount, &content);
            scope.spawn(move || {
                let path = mount.join(format!("file-{file}"));
                for turn in (file as u64..).take_while(|_| Instant::now() < until) {
                    fs::write(&path, content(turn)).expect("write");
                    if turn % 3 == 0 {
                        File::open(&path).expect("open").sync_all().expect("fsync");
                    }
                    assert!(fs::read(&path).expect("read") == content(turn), "file {file}, turn {turn}");
                    // Long enough for the others' contents to become garbage, at some turns.
                    thread::sleep(Duration::from_millis(turn * 389 % 1700));
                }
            });
        }
        thread::sleep(Duration::from_secs(5));
        cluster.storage(2).kill();
        thread::sleep(Duration::from_secs(2));
        cluster.storage(2).start();
        thread::sleep(Duration::from_secs(4));
        cluster.meta().kill();
        cluster.meta().start();
    });
    assert!(cluster.status().number("collected") > 1, "{}", cluster.status().0);
    mount.remount();
    for file in 0..FILES {
        let found = fs::read(mount.join(format!("file-{file}"))).expect("read");
        assert!((0..CONTENTS).any(|n| found == content(n)), "file {file} has {} bytes of nothing", found.len());
    }
    cluster.wait_until_whole();
    assert_eq!(cluster.violations(), Vec::<String>::new());
}

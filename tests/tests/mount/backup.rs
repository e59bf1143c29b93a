//! The metadata comes back after its disk is lost.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use holdfast_tests::{
    cluster::{Cluster, Options, PATIENCE},
    fault::random_bytes,
    mount::Mount,
    wait,
};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn cluster(meta: &[(&str, i64)]) -> Cluster {
    let cluster = Cluster::prepare(&Options::default());
    for (key, value) in meta {
        cluster.set("meta/meta.toml", key, *value);
    }
    cluster.start_daemons();
    cluster
}

fn write(mount: &Mount, name: &str, content: &[u8]) {
    fs::write(mount.join(name), content).expect("write");
    File::open(mount.join(name)).expect("open").sync_all().expect("fsync");
}

fn dir(cluster: &Cluster) -> &str {
    cluster.path().to_str().expect("UTF-8")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The metadata server's disk is gone.
fn lose_metadata(cluster: &Cluster) {
    cluster.meta().kill();
    fs::remove_dir_all(cluster.path().join("meta/data")).expect("remove");
}

fn restore(cluster: &Cluster, backup: &Path) {
    let output = cluster.holdfast(&["meta", "restore", text(backup), "--dir", dir(cluster)]);
    assert!(output.status.success(), "{output:?}");
    cluster.start_daemons();
}

fn fsck(cluster: &Cluster, more: &[&str]) -> (Option<i32>, Value) {
    let output = cluster.holdfast(&[&["fsck", "--json", "--dir", dir(cluster)], more].concat());
    (output.status.code(), serde_json::from_slice(&output.stdout).expect("JSON"))
}

/// "`holdfast meta backup` takes a consistent backup of a cluster in use, and `holdfast meta restore` brings it back."
#[test]
fn what_was_backed_up_is_there_after_the_metadata_is_lost() {
    let cluster = cluster(&[("garbage_grace_secs", 1), ("backup_every_secs", 0)]);
    let mount = cluster.mount();
    let content = random_bytes(1, 5 * MIB);
    write(&mount, "before", &content);
    (0..500).for_each(|n| fs::write(mount.join(format!("small-{n}")), n.to_string()).expect("write"));
    let backup = cluster.path().join("a.backup");
    let output = cluster.holdfast(&["meta", "backup", text(&backup), "--dir", dir(&cluster)]);
    assert!(output.status.success(), "{output:?}");
    write(&mount, "after", &random_bytes(2, MIB));
    mount.unmount();
    let occupied = cluster.holdfast(&["meta", "restore", text(&backup), "--dir", dir(&cluster)]);
    assert!(!occupied.status.success(), "a server that runs is not overwritten");
    lose_metadata(&cluster);
    restore(&cluster, &backup);
    mount.start_again();
    assert!(fs::read(mount.join("before")).expect("read") == content);
    for n in 0..500 {
        assert_eq!(fs::read_to_string(mount.join(format!("small-{n}"))).expect("read"), n.to_string());
    }
    assert!(!mount.join("after").exists(), "it came after the backup");
    // The old mount's numbers are not given out again, and what it left behind goes.
    write(&mount, "new", &random_bytes(3, MIB));
    assert_eq!(fsck(&cluster, &["--repair"]).0, Some(0));
    wait::until("what came after the backup is collected", PATIENCE, || {
        let stored = cluster.status().storage_sum("blocks");
        stored == 3 * cluster.status().number("blocks")
    });
}

/// "The metadata server puts a copy of all metadata on the storage servers every ten minutes; what is lost after a restore is listed by path."
#[test]
fn a_copy_on_a_storage_server_brings_the_metadata_back_and_what_is_lost_is_named() {
    let cluster = cluster(&[("garbage_grace_secs", 1), ("backup_every_secs", 1)]);
    let mount = cluster.mount();
    let content = random_bytes(1, 3 * MIB);
    write(&mount, "kept", &content);
    fs::create_dir(mount.join("d")).expect("mkdir");
    write(&mount, "d/doomed", &random_bytes(2, 2 * MIB));
    let backups = |n: usize| -> Vec<PathBuf> {
        let entries = fs::read_dir(cluster.storage_data(n).join("backups")).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> =
            entries.map(|it| it.path()).filter(|it| it.extension().is_some_and(|it| it == "backup")).collect();
        paths.sort();
        paths
    };
    let since = newest(&backups(2)).map(|(number, _)| number);
    // One that was begun after the last write.
    let (_, found) = wait::until_some("every storage server has a new copy", PATIENCE, || {
        let numbers: Vec<_> = (1..=3).map(|n| newest(&backups(n))).collect();
        let newer = numbers.iter().all(|it| it.as_ref().map(|(number, _)| number) > since.as_ref());
        (newer || since.is_none() && numbers.iter().all(Option::is_some)).then(|| numbers[1].clone()).flatten()
    });
    let copy = cluster.path().join("saved.backup");
    fs::copy(found, &copy).expect("copy");
    fs::remove_file(mount.join("d/doomed")).expect("unlink");
    wait::until("its blocks are deleted", PATIENCE, || cluster.status().storage_sum("blocks") == 3 * 3);
    mount.unmount();
    assert!((1..=3).all(|n| backups(n).len() <= 3), "the newest are kept");
    lose_metadata(&cluster);
    restore(&cluster, &copy);
    mount.start_again();
    assert!(fs::read(mount.join("kept")).expect("read") == content);
    let (code, report) = fsck(&cluster, &[]);
    assert_eq!(code, Some(4), "{report:#}");
    let lost = report["lost_files"].as_array().expect("a list");
    let paths: Vec<&str> = lost.iter().map(|file| file["path"].as_str().expect("text")).collect();
    assert_eq!(paths, ["/d/doomed"], "{report:#}");
    assert_eq!(report["lost"], 2);
    assert!(fs::read(mount.join("d/doomed")).is_err(), "it is said to be lost, and not made up");
    fs::remove_file(mount.join("d/doomed")).expect("unlink");
    wait::until("what is lost is forgotten with its file", PATIENCE, || fsck(&cluster, &["--repair"]).0 == Some(0));
}

fn newest(backups: &[PathBuf]) -> Option<(u64, PathBuf)> {
    let path = backups.last()?;
    let digits: String = path.file_name()?.to_str()?.chars().filter(char::is_ascii_digit).collect();
    Some((digits.parse().ok()?, path.clone()))
}

/// "A backup that is damaged is refused, and nothing is made of it."
#[test]
fn a_damaged_backup_is_refused() {
    let cluster = cluster(&[("backup_every_secs", 0)]);
    let backup = cluster.path().join("a.backup");
    let output = cluster.holdfast(&["meta", "backup", text(&backup), "--dir", dir(&cluster)]);
    assert!(output.status.success(), "{output:?}");
    let mut bytes = fs::read(&backup).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&backup, bytes).expect("write");
    lose_metadata(&cluster);
    let output = cluster.holdfast(&["meta", "restore", text(&backup), "--dir", dir(&cluster)]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("is not a whole backup"), "{said}");
    assert!(!cluster.path().join("meta/data/meta.redb").exists());
}

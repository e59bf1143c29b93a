//! Other numbers of copies than three: of everything, and of a tree.

use std::{
    fs::{self, File},
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
};

use holdfast_tests::{
    cluster::{Cluster, Options, PATIENCE},
    fault::random_bytes,
    mount::Mount,
    shell, sys, wait,
};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn cluster_of(storage: usize) -> (Cluster, Mount) {
    let cluster = Cluster::prepare(&Options { storage, ..Options::default() });
    // What is deleted is gone soon, so that copies can be counted.
    cluster.set("meta/meta.toml", "garbage_grace_secs", 1);
    cluster.start_daemons();
    let mount = cluster.mount();
    (cluster, mount)
}

fn write(path: &Path, content: &[u8]) {
    fs::write(path, content).expect("write");
    File::open(path).expect("open").sync_all().expect("fsync");
}

/// What the command said, and whether it did it. Orders are for the cluster; a path says itself which that is.
fn replicas(cluster: &Cluster, arguments: &[&str]) -> (bool, String) {
    let dir = cluster.path().to_str().expect("UTF-8");
    let output = cluster.holdfast(&[&["replicas"], arguments, &["--dir", dir]].concat());
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

fn done(cluster: &Cluster, arguments: &[&str]) -> String {
    let (done, said) = replicas(cluster, arguments);
    assert!(done, "holdfast replicas {arguments:?}: {said}");
    said
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Copies on all servers together.
fn wait_for_copies(cluster: &Cluster, count: u64) {
    let found = || cluster.status().storage_sum("blocks");
    wait::until(&format!("there are {count} copies"), PATIENCE, || found() == count);
}

fn assert_well(cluster: &Cluster) {
    let output = cluster.holdfast(&["fsck", "--dir", text(cluster.path())]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.ends_with("All is well.\n"), "{said}");
}

/// "`holdfast replicas N` changes how many copies of everything are kept, 1 to 5: what is missing is made, what is too much deleted."
#[test]
fn the_clusters_number_of_copies_can_be_changed_and_is_followed_by_what_is_there() {
    let (cluster, mount) = cluster_of(5);
    let content = random_bytes(1, 20 * MIB);
    write(&mount.join("file"), &content);
    cluster.wait_until_whole();
    wait_for_copies(&cluster, 60);
    assert!(
        done(&cluster, &[]).starts_with("The cluster keeps 3 copies of what has no number of its own: every block")
    );
    for count in [5, 2, 1, 4] {
        let said = done(&cluster, &[&count.to_string()]);
        assert!(said.contains(&format!("keeps {count} copies")) && said.contains("every block has as many"), "{said}");
        wait_for_copies(&cluster, 20 * count);
        write(&mount.join("more"), &random_bytes(2 + count, 3 * MIB));
        wait_for_copies(&cluster, 23 * count);
        fs::remove_file(mount.join("more")).expect("rm");
        mount.remount();
        assert!(fs::read(mount.join("file")).expect("read") == content, "with {count} copies");
        assert_well(&cluster);
    }
    cluster.meta().kill();
    cluster.meta().start();
    cluster.wait_until_up();
    let said = done(&cluster, &["--json"]);
    let report: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(
        (&report["replicas"], &report["owed"], &report["followed_percent"]),
        (&4.into(), &0.into(), &100.into())
    );
}

/// "`holdfast replicas N PATH` gives a tree a number of its own, for what is there and what is made there later; `getfattr` shows it."
#[test]
fn a_tree_can_have_a_number_of_its_own() {
    let (cluster, mount) = cluster_of(5);
    let tree = mount.join("tree");
    fs::create_dir_all(tree.join("below")).expect("mkdir");
    write(&tree.join("below/old"), &random_bytes(1, 4 * MIB));
    write(&mount.join("outside"), &random_bytes(2, 4 * MIB));
    wait_for_copies(&cluster, 24);
    assert_eq!(done(&cluster, &["5", text(&tree)]), "1 files have 5 copies, and what is made in 2 directories will.\n");
    write(&tree.join("below/new"), &random_bytes(3, 4 * MIB));
    wait_for_copies(&cluster, 5 * 8 + 3 * 4);
    assert_eq!(shell::run(mount.path(), "getfattr --only-values -n holdfast.replicas tree/below/new"), "5");
    assert_eq!(shell::run(mount.path(), "getfattr -d -m - tree/below/new"), "", "it is not copied with a file");
    for server in 1..=4 {
        cluster.storage(server).kill();
    }
    mount.remount();
    assert!(fs::read(tree.join("below/old")).expect("one of five is enough") == random_bytes(1, 4 * MIB));
    for server in 1..=4 {
        cluster.storage(server).start();
    }
    cluster.wait_until_up();
    assert_eq!(done(&cluster, &["1", text(&tree)]), "2 files have 1 copies, and what is made in 2 directories will.\n");
    wait_for_copies(&cluster, 8 + 3 * 4);
    done(&cluster, &["inherit", text(&tree)]);
    wait_for_copies(&cluster, 3 * 12);
    assert!(fs::read(tree.join("below/new")).expect("read") == random_bytes(3, 4 * MIB));
    assert_well(&cluster);
}

/// "A cluster that keeps one copy works with one storage server."
#[test]
fn one_server_is_enough_for_one_copy() {
    let (cluster, mount) = cluster_of(3);
    done(&cluster, &["1"]);
    write(&mount.join("file"), &random_bytes(1, 3 * MIB));
    for server in ["2", "3"] {
        let output = cluster.holdfast(&["remove", server, "--dir", text(cluster.path())]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        cluster.storage(server.parse().expect("a number")).kill();
    }
    write(&mount.join("more"), &random_bytes(2, 3 * MIB));
    cluster.storage(1).kill();
    cluster.storage(1).start();
    mount.remount();
    assert!(fs::read(mount.join("file")).expect("read") == random_bytes(1, 3 * MIB));
    assert!(fs::read(mount.join("more")).expect("read") == random_bytes(2, 3 * MIB));
    assert_well(&cluster);
}

/// "A number that cannot be had is refused with the reason; only the owner of a file, and root, may give it one."
#[test]
fn numbers_that_cannot_be_had_are_refused() {
    let (cluster, mount) = cluster_of(3);
    let refused = |arguments: &[&str], reason: &str| {
        let (done, said) = replicas(&cluster, arguments);
        assert!(!done && said.contains(reason), "{arguments:?}: {said}");
    };
    refused(&["4"], "4 copies need 4 storage servers that are up and take blocks: there are 3");
    refused(&["0"], "a number from 1 to 5, or `inherit`");
    refused(&["6"], "a number from 1 to 5, or `inherit`");
    refused(&["inherit"], "the cluster inherits from nobody");
    refused(&["2", text(cluster.path())], "is not on a mount of Holdfast");
    refused(&["2", text(&mount.join("nothing"))], "No such file");
    if !sys::is_root() {
        eprintln!("SKIPPED: another user needs root");
        return;
    }
    let theirs = mount.join("theirs");
    fs::create_dir(&theirs).expect("mkdir");
    fs::set_permissions(&theirs, fs::Permissions::from_mode(0o777)).expect("chmod");
    let name = "-n holdfast.replicas";
    let as_nobody = |what: &str| {
        let script = format!("setpriv --reuid 65534 --clear-groups {what}");
        shell::attempt(mount.path(), &script, PATIENCE).status.success()
    };
    assert!(!as_nobody(&format!("setfattr {name} -v 1 theirs")), "they may write to it, but it is not theirs");
    chown(&theirs, Some(65534), None).expect("chown");
    assert!(as_nobody(&format!("setfattr {name} -v 1 theirs")));
    assert!(as_nobody("setfattr -x holdfast.replicas theirs"));
}

//! Copies of a block are in as many zones as there are, whatever has happened.

use std::fs::{self, File};

use holdfast_tests::{
    cluster::{Cluster, Options, PATIENCE},
    fault::random_bytes,
    wait,
};

const MIB: usize = 1 << 20;

fn done(cluster: &Cluster, arguments: &[&str]) {
    let dir = cluster.path().to_str().expect("UTF-8");
    let output = cluster.holdfast(&[arguments, &["--dir", dir]].concat());
    assert!(output.status.success(), "holdfast {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// How many blocks each server has.
fn blocks(cluster: &Cluster) -> Vec<u64> {
    let servers = cluster.status().0["servers"].as_array().expect("servers").clone();
    servers.iter().map(|server| server["load"]["blocks"].as_u64().expect("a number")).collect()
}

/// "Copies of a block are in distinct zones; where they could not be when they were made, they are moved when they can, and what a lost server had is copied to a zone that has none."
#[test]
fn copies_go_to_zones_that_have_none_when_there_are_servers_again_and_when_one_is_lost() {
    let cluster = Cluster::prepare(&Options { storage: 5, ..Options::default() });
    for (key, value) in [("down_after_ms", 3000), ("replace_after_secs", 1)] {
        cluster.set("meta/meta.toml", key, value);
    }
    for (n, zone) in (1..).zip(["a", "a", "b", "c", "b"]) {
        cluster.set(&format!("storage-{n}/storage.toml"), "zone", zone);
    }
    cluster.start_daemons();
    let mount = cluster.mount();
    done(&cluster, &["drain", "4"]);
    done(&cluster, &["drain", "5"]);
    let content = random_bytes(3, 24 * MIB);
    fs::write(mount.join("file"), &content).expect("write");
    File::open(mount.join("file")).expect("open").sync_all().expect("fsync");
    wait::until("two zones have all copies", PATIENCE, || blocks(&cluster) == [24, 24, 24, 0, 0]);

    done(&cluster, &["undrain", "4"]);
    wait::until("the third zone has a copy of each block", PATIENCE, || {
        let blocks = blocks(&cluster);
        blocks[0] + blocks[1] == 24 && blocks[2..] == [24, 24, 0]
    });

    done(&cluster, &["undrain", "5"]);
    cluster.storage(3).kill();
    wait::until("the zone of the lost server has a copy of each block", PATIENCE, || {
        let blocks = blocks(&cluster);
        blocks[0] + blocks[1] == 24 && blocks[3..] == [24, 24]
    });
    mount.remount();
    assert!(fs::read(mount.join("file")).expect("read") == content);
    drop(mount);
}

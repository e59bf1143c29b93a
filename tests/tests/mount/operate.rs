//! What an operator does with a cluster that is in use: empty servers, take them away, bring them back, and read what happened.

use std::fs::{self, File};

use holdfast_tests::{
    cluster::{Cluster, Options, PATIENCE, Status},
    fault::random_bytes,
    mount::Mount,
    wait,
};
use serde_json::Value;

const MIB: usize = 1 << 20;

struct Ground {
    mount: Mount,
    cluster: Cluster,
    content: Vec<u8>,
}

impl Ground {
    /// A cluster of four that holds one file of `mib` MiB.
    fn new(mib: usize, meta: &[(&str, i64)]) -> Self {
        let cluster = Cluster::prepare(&Options { storage: 4, ..Options::default() });
        for (key, value) in meta {
            cluster.set("meta/meta.toml", key, *value);
        }
        cluster.start_daemons();
        let mount = cluster.mount();
        let content = random_bytes(5, mib * MIB);
        let ground = Self { mount, cluster, content };
        ground.write("file", &ground.content);
        ground.cluster.wait_until_whole();
        ground
    }

    fn write(&self, name: &str, content: &[u8]) {
        fs::write(self.mount.join(name), content).expect("write");
        File::open(self.mount.join(name)).expect("open").sync_all().expect("fsync");
    }

    /// What the command said, and whether it did it.
    fn operate(&self, arguments: &[&str]) -> (bool, String) {
        let dir = self.cluster.path().to_str().expect("UTF-8");
        let output = self.cluster.holdfast(&[arguments, &["--dir", dir]].concat());
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }

    fn done(&self, arguments: &[&str]) -> String {
        let (done, said) = self.operate(arguments);
        assert!(done, "holdfast {arguments:?}: {said}");
        said
    }

    fn events(&self) -> Vec<Value> {
        let lines = self.done(&["events", "--json", "-n", "4096"]);
        lines.lines().map(|line| serde_json::from_str(line).expect("an event is JSON")).collect()
    }

    /// Is there an event of this place with this in its text?
    fn has_happened(&self, place: &str, what: &str) -> bool {
        self.events()
            .iter()
            .any(|event| event["place"] == place && event["what"].as_str().is_some_and(|it| it.contains(what)))
    }

    fn is_intact(&self) -> bool {
        self.mount.remount();
        fs::read(self.mount.join("file")).expect("read") == self.content
    }
}

fn server(status: &Status, id: u64) -> Option<Value> {
    status.0["servers"].as_array().expect("servers").iter().find(|server| server["id"] == id).cloned()
}

fn blocks(ground: &Ground, id: u64) -> u64 {
    server(&ground.cluster.status(), id).expect("the server is there")["load"]["blocks"].as_u64().expect("a number")
}

/// "`holdfast drain` empties a server while everybody works; what is written meanwhile goes elsewhere, until `holdfast undrain`."
#[test]
fn a_drained_server_is_empty_and_takes_blocks_again_when_it_is_undrained() {
    let ground = Ground::new(40, &[]);
    wait::until("it has its part", PATIENCE, || blocks(&ground, 2) > 10);
    let said = ground.done(&["drain", "2"]);
    assert_eq!(said, "Storage server 2 is empty.\n");
    wait::until("it says so itself", PATIENCE, || blocks(&ground, 2) == 0);
    let status = ground.cluster.status();
    assert_eq!(server(&status, 2).expect("it stays")["standing"], "draining");
    assert!(status.is_whole(), "{:#}", status.0);
    ground.write("more", &random_bytes(6, 20 * MIB));
    ground.cluster.wait_until_whole();
    assert_eq!(blocks(&ground, 2), 0, "nothing new goes there");
    assert!(ground.is_intact());
    assert!(ground.has_happened("storage server 2", "is drained"));
    ground.done(&["undrain", "2"]);
    ground.write("yet more", &random_bytes(7, 20 * MIB));
    wait::until("new blocks go there", PATIENCE, || blocks(&ground, 2) > 0);
}

/// "What would leave too few copies, or nowhere to write, is refused with the reasons."
#[test]
fn what_would_endanger_data_is_refused_with_reasons() {
    let ground = Ground::new(1, &[("down_after_ms", 3000)]);
    let refused = |arguments: &[&str], reason: &str| {
        let (done, said) = ground.operate(arguments);
        assert!(!done && said.contains(reason), "{arguments:?}: {said}");
    };
    refused(&["drain", "9"], "there is no storage server 9");
    ground.done(&["drain", "1"]);
    refused(&["drain", "2"], "3 copies need 3 other storage servers that are up and take blocks: there are 2");
    refused(&["remove", "2"], "there are 2");
    ground.done(&["undrain", "1"]);
    ground.done(&["maintenance", "on", "1", "--for", "10m"]);
    refused(&["maintenance", "on", "2"], "storage server 1 is away already");
    ground.done(&["maintenance", "off", "1"]);
    ground.cluster.storage(3).kill();
    wait::until("it is missed", PATIENCE, || ground.cluster.status().servers_up() == 3);
    refused(&["maintenance", "on", "2"], "storage server 3 is away already");
}

/// "`holdfast remove` empties a server and takes it out of the cluster; it is not let in again."
#[test]
fn a_removed_server_is_gone_with_nothing_lost_and_stays_out() {
    let ground = Ground::new(20, &[]);
    let said = ground.done(&["remove", "4"]);
    assert_eq!(said, "Storage server 4 is removed; its daemon can be stopped.\n");
    let status = ground.cluster.status();
    assert!(server(&status, 4).is_none() && status.is_whole(), "{:#}", status.0);
    ground.cluster.storage(4).kill();
    ground.cluster.storage(4).start();
    wait::until("it hears that it is out", PATIENCE, || ground.cluster.storage(4).log().contains("it refused"));
    assert!(server(&ground.cluster.status(), 4).is_none());
    assert!(ground.is_intact());
    let fsck = ground.done(&["fsck"]);
    assert!(fsck.ends_with("All is well.\n"), "{fsck}");
}

/// "A server that is down can be removed too: its blocks get copies from the others."
#[test]
fn a_server_that_is_down_is_removed_without_it() {
    let ground = Ground::new(20, &[("down_after_ms", 3000)]);
    ground.cluster.storage(3).kill();
    wait::until("it is down", PATIENCE, || {
        server(&ground.cluster.status(), 3).expect("still there")["state"] == "down"
    });
    ground.done(&["remove", "3"]);
    let status = ground.cluster.status();
    assert!(server(&status, 3).is_none());
    ground.cluster.wait_until_whole();
    assert!(ground.is_intact());
}

/// "`holdfast maintenance on` gives a server leave: nothing is copied for its absence until the time is over or it is called off."
#[test]
fn a_server_in_maintenance_is_not_replaced_before_its_leave_is_over() {
    let ground = Ground::new(10, &[("down_after_ms", 3000), ("replace_after_secs", 1)]);
    ground.done(&["maintenance", "on", "1", "--for", "1h"]);
    ground.cluster.storage(1).kill();
    // Another one that has no leave: by the time that it has been replaced, the first would have been.
    wait::until("it is missed", PATIENCE, || ground.has_happened("storage server 1", "and down"));
    ground.write("meanwhile", &random_bytes(8, 5 * MIB));
    ground.cluster.wait_until_whole();
    assert!(!ground.has_happened("storage server 1", "stays away"));
    ground.done(&["maintenance", "off", "1"]);
    wait::until("it is replaced then", PATIENCE, || ground.has_happened("storage server 1", "stays away"));
    ground.cluster.wait_until_whole();
    let texts: Vec<String> =
        ground.events().iter().map(|event| event["what"].as_str().expect("text").to_owned()).collect();
    let place = |what: &str| texts.iter().position(|text| text.contains(what)).expect("it has happened");
    assert!(place("serves as any other") < place("stays away"), "{texts:#?}");
    assert!(ground.is_intact());
}

/// "`holdfast maintenance on --for` ends by itself."
#[test]
fn a_leave_ends_by_itself() {
    let ground = Ground::new(1, &[]);
    ground.done(&["maintenance", "on", "2", "--for", "2s"]);
    wait::until("its maintenance is over", PATIENCE, || {
        ground.has_happened("storage server 2", "its maintenance is over")
    });
    assert_eq!(server(&ground.cluster.status(), 2).expect("there")["standing"], "serving");
}

/// "`holdfast rebalance` moves blocks until all servers are nearly equally full."
#[test]
fn blocks_move_to_a_server_that_has_room() {
    let ground = Ground::new(1, &[]);
    ground.done(&["drain", "4"]);
    let content = random_bytes(9, 384 * MIB);
    ground.write("large", &content);
    ground.cluster.wait_until_whole();
    assert_eq!(blocks(&ground, 4), 0);
    ground.done(&["undrain", "4"]);
    for n in 1..=4 {
        // Small servers, so that the difference is worth it.
        ground.cluster.set(&format!("storage-{n}/storage.toml"), "capacity_bytes", 1 << 30);
        ground.cluster.storage(n).kill();
    }
    ground.cluster.start_daemons();
    let said = ground.done(&["rebalance"]);
    assert_eq!(said, "The storage servers are balanced.\n");
    wait::until("nobody has much more than the others, or copies too many", PATIENCE, || {
        (1..=4).all(|id| (240..=336).contains(&blocks(&ground, id)))
    });
    ground.cluster.wait_until_whole();
    ground.mount.remount();
    assert!(fs::read(ground.mount.join("large")).expect("read") == content);
    let fsck = ground.done(&["fsck"]);
    assert!(fsck.ends_with("All is well.\n"), "{fsck}");
}

/// "`holdfast events` tells what happened, where and when, what it means, and what the system did; also after a restart."
#[test]
fn what_happens_is_told_with_what_it_means_and_what_is_done() {
    let ground = Ground::new(5, &[("down_after_ms", 3000), ("replace_after_secs", 1)]);
    ground.cluster.storage(2).kill();
    wait::until("it is told", PATIENCE, || ground.has_happened("storage server 2", "stays away"));
    let events = ground.events();
    let down = events.iter().find(|event| event["what"] == "is silent, and down").expect("told");
    assert_eq!((&down["severity"], &down["place"]), (&"warning".into(), &"storage server 2".into()));
    assert!(down["consequence"].as_str().is_some_and(|it| it.contains("one copy short")), "{down:#}");
    assert!(down["action"].as_str().is_some_and(|it| it.contains("copied to others")), "{down:#}");
    ground.cluster.meta().kill();
    ground.cluster.storage(2).start();
    ground.cluster.meta().start();
    ground.cluster.wait_until_up();
    wait::until("the server is back", PATIENCE, || {
        ground.events().last().is_some_and(|event| event["number"].as_u64() > down["number"].as_u64())
    });
    assert!(ground.has_happened("storage server 2", "and down"), "it outlives the metadata server");
    assert!(ground.has_happened("metadata server", "has started"));
    let serious = ground.done(&["events", "--serious"]);
    assert!(serious.contains("WARNING  storage server 2 is silent, and down\n    means: "), "{serious}");
    assert!(!serious.contains("  info  "), "{serious}");
}

/// "Heartbeats tell how busy a server is: what its mounts' requests take, its processors, its disk, its network."
#[test]
fn a_status_tells_how_busy_the_servers_are() {
    let ground = Ground::new(1, &[]);
    let load = |key: &str| server(&ground.cluster.status(), 1).expect("there")["load"][key].as_u64().expect("a number");
    let mut seen = [false; 3];
    let mut n = 0;
    wait::until("puts, their times and the network are told", PATIENCE, || {
        n += 1;
        ground.write("busy", &random_bytes(n, MIB));
        for (seen, key) in seen.iter_mut().zip(["puts", "put_p99_us", "network_bytes"]) {
            *seen |= load(key) > 0;
        }
        seen == [true; 3]
    });
    assert!(load("memory_available_bytes") > 0 && load("cpu_percent") <= 100 && load("disk_busy_percent") <= 100);
}

/// Until all servers are up, every block has the copies that are wanted of it, and all that servers have is on record.
fn wait_until_paid(ground: &Ground) {
    wait::until("nothing is owed", PATIENCE, || {
        let status = ground.cluster.status();
        let on_servers: u64 = (1..=4).map(|id| blocks(ground, id)).sum();
        status.servers_up() == 4
            && status.0["owed"] == 0
            && status.0["blocks_by_copies"][0] == 0
            && on_servers == 2 * 3 + 12
    });
}

/// "What would leave data without a copy that can be read is refused, with the reasons; `--force` has it done."
#[test]
fn nothing_is_taken_away_that_nobody_else_has_unless_it_is_forced() {
    let ground = Ground::new(2, &[("down_after_ms", 3000), ("replace_after_secs", 1)]);
    fs::create_dir(ground.mount.join("once")).expect("mkdir");
    let once = ground.mount.join("once");
    ground.done(&["replicas", "1", once.to_str().expect("UTF-8")]);
    (0..12).for_each(|n| ground.write(&format!("once/{n}"), &random_bytes(40 + n, MIB)));
    wait_until_paid(&ground);
    // Of twelve blocks each of four has some, but for less than once in a million times; and hashes do not change.
    let (refused, said) = ground.operate(&["maintenance", "on", "2"]);
    assert!(!refused && said.contains("blocks have no copy on another server that is there"), "{said}");
    ground.done(&["maintenance", "on", "2", "--force"]);
    ground.done(&["maintenance", "off", "2"]);

    let is_down = || server(&ground.cluster.status(), 2).is_some_and(|it| it["state"] == "down");
    ground.cluster.storage(2).kill();
    wait::until("it is down", PATIENCE, is_down);
    let (refused, said) = ground.operate(&["remove", "2"]);
    assert!(!refused && said.contains("it is away, and") && said.contains("blocks have no copy on another"), "{said}");
    // Until then it was only asked: with the server all is there again.
    ground.cluster.storage(2).start();
    wait_until_paid(&ground);
    ground.mount.remount();
    for n in 0..12 {
        assert!(fs::read(ground.mount.join(format!("once/{n}"))).expect("read") == random_bytes(40 + n, MIB));
    }

    ground.cluster.storage(2).kill();
    wait::until("it is down", PATIENCE, is_down);
    let said = ground.done(&["remove", "2", "--force"]);
    assert!(said.contains("Storage server 2 is removed"), "{said}");
    assert!(server(&ground.cluster.status(), 2).is_none());
    assert!(ground.is_intact(), "what had three copies is all there");
    let (well, said) = ground.operate(&["fsck"]);
    assert!(!well && said.contains("once/"), "what is lost is named: {said}");
    let lost = (0..12).filter(|n| fs::read(ground.mount.join(format!("once/{n}"))).is_err()).count();
    assert!((1..12).contains(&lost), "{lost} of 12 are lost");
}

/// "More copies than there are servers for are refused, also of a tree; what a server that is to be drained needs of the others is looked at block by block."
#[test]
fn more_copies_than_there_are_servers_are_refused_unless_they_are_forced() {
    let ground = Ground::new(2, &[]);
    let file = ground.mount.join("file");
    let path = file.to_str().expect("UTF-8");
    let (refused, said) = ground.operate(&["replicas", "5", path]);
    assert!(!refused && said.contains("5 copies need 5 storage servers") && said.contains("there are 4"), "{said}");
    let said = ground.done(&["replicas", "4", path]);
    assert!(said.starts_with("1 files have 4 copies"), "{said}");
    assert_eq!(ground.cluster.status().0["owed"], 0, "it was waited for");
    wait::until("each server has said that it has one", PATIENCE, || (1..=4).all(|id| blocks(&ground, id) == 2));
    let (refused, said) = ground.operate(&["drain", "3"]);
    assert!(!refused && said.contains("4 copies need 4 other storage servers"), "{said}");
    let said = ground.done(&["drain", "3", "--force", "--no-wait"]);
    assert!(said.contains("is being emptied"), "{said}");
    wait::until("why it waits is shown", PATIENCE, || {
        server(&ground.cluster.status(), 3)
            .is_some_and(|it| it["hindered"].as_str().is_some_and(|why| why.contains("to have more copies")))
    });
    let said = ground.done(&["status"]);
    assert!(said.contains("Server 3: the operator wants it so; 2 blocks are to have more copies"), "{said}");
    ground.done(&["replicas", "inherit", path]);
    wait::until("it is empty", PATIENCE, || blocks(&ground, 3) == 0);
    assert!(ground.is_intact());
}

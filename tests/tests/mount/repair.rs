//! Damaged copies: a reader never sees them, and the read that meets one heals it.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use holdfast_common::{
    BlockHash, Epoch,
    net::identity::Role,
    wire::storage::{StorageAnswer, StorageRequest},
};
use holdfast_tests::{
    cluster::{Cluster, PATIENCE},
    fault::{self, Copy, random_bytes},
    mount::Mount,
    wait,
};
use redb::{ReadableTableMetadata, TableDefinition};

const BLOCK: usize = 1 << 20;
const BLOCKS: usize = 6;

/// A cluster with one file of random blocks, three copies of each on disk, and nothing in any cache.
struct Patient {
    mount: Mount,
    cluster: Cluster,
    content: Vec<u8>,
}

impl Patient {
    fn new() -> Self {
        let cluster = Cluster::start();
        let mount = cluster.mount();
        let content = random_bytes(42, BLOCKS * BLOCK);
        fs::write(mount.join("file"), &content).expect("write");
        File::open(mount.join("file")).expect("open").sync_all().expect("fsync");
        cluster.wait_until_whole();
        mount.unmount();
        Self { mount, cluster, content }
    }

    fn block(&self, index: usize) -> &[u8] {
        &self.content[index * BLOCK..][..BLOCK]
    }

    fn copy(&self, server: usize, index: usize) -> Option<Copy> {
        fault::copy(&self.cluster.storage_data(server), self.block(index))
    }

    /// Does `damage` to the copy of every block on `servers`, while they do not run.
    fn damage(&self, servers: &[usize], damage: impl Fn(&Self, usize, usize, &Copy)) {
        for &server in servers {
            self.cluster.storage(server).kill();
            for index in 0..BLOCKS {
                let copy = self.copy(server, index);
                // A damage to one block may have taken others with it.
                if let Some(copy) = copy {
                    damage(self, server, index, &copy);
                }
            }
            assert!((0..BLOCKS).any(|index| !self.is_good(server, index)), "nothing was damaged");
        }
        self.cluster.start_daemons();
    }

    /// The copy of block `index` on `server`, outside of quarantine, is good.
    fn is_good(&self, server: usize, index: usize) -> bool {
        let mut bytes = vec![0; BLOCK];
        fault::copies(&self.cluster.storage_data(server), self.block(index)).iter().any(|copy| {
            let file = File::open(&copy.file).expect("open a segment");
            !copy.file.to_string_lossy().contains("quarantine")
                && file.read_exact_at(&mut bytes, copy.offset).is_ok()
                && bytes == self.block(index)
        })
    }

    /// Reads until every copy on `servers` is good again: one pass reads one copy of each block, and which one is the
    /// client's choice, so a few passes from an empty cache may be needed until each bad copy has been met.
    fn read_until_healed(&self, servers: &[usize]) {
        wait::until("every bad copy is met and replaced", PATIENCE, || {
            self.mount.start_again();
            assert!(fs::read(self.mount.join("file")).expect("read") == self.content, "a reader saw damaged bytes");
            self.mount.unmount();
            servers.iter().all(|&server| (0..BLOCKS).all(|index| self.is_good(server, index)))
        });
    }
}

/// The damage is done on `servers`: every read is right, each bad copy is replaced by the read that meets it, and all is
/// counted.
fn check(servers: &[usize], damage: impl Fn(&Patient, usize, usize, &Copy)) -> Patient {
    let patient = Patient::new();
    patient.damage(servers, damage);
    patient.read_until_healed(servers);
    wait::until("the repairs are counted", PATIENCE, || {
        let status = patient.cluster.status();
        let met = status.number("corrupt_copies_met") + status.number("missing_copies_met");
        met > 0 && status.number("copies_repaired") > 0
    });
    patient
}

fn quarantined(patient: &Patient, server: usize) -> bool {
    let files = fault::files(&patient.cluster.storage_data(server));
    files.iter().any(|file| file.to_string_lossy().contains("quarantine"))
}

#[test]
fn a_flipped_bit_on_one_server_is_never_read_and_is_healed_and_kept_for_inspection() {
    let patient = check(&[1], |_, _, index, copy| copy.flip_bit(1000 + index as u64 * 170_000));
    assert!(quarantined(&patient, 1), "the bad copies are kept for inspection");
    // Told with the next heartbeat.
    wait::until("it is counted", PATIENCE, || patient.cluster.status().storage_sum("quarantined") > 0);
}

#[test]
fn flipped_bits_on_two_servers_are_never_read_and_are_healed() {
    check(&[1, 3], |_, _, index, copy| copy.flip_bit(index as u64));
}

#[test]
fn a_truncated_segment_is_healed() {
    check(&[2], |_, _, index, copy| {
        if index == 3 {
            copy.truncate(5000);
        }
    });
}

#[test]
fn missing_segments_on_two_servers_are_healed() {
    check(&[2, 3], |_, _, _, copy| copy.delete_file());
}

#[test]
fn a_wrong_block_under_a_right_name_is_healed() {
    check(&[3], |_, _, index, copy| copy.overwrite(&random_bytes(1000 + index as u64, BLOCK)));
}

#[test]
fn a_small_random_read_meets_damage_too_and_heals_it() {
    let patient = Patient::new();
    patient.damage(&[1, 2], |_, _, _, copy| copy.flip_bit(500_000));
    patient.mount.start_again();
    let file = File::open(patient.mount.join("file")).expect("open");
    let mut bytes = [0; 4096];
    for index in 0..BLOCKS {
        let offset = index * BLOCK + 499_000;
        file.read_exact_at(&mut bytes, offset as u64).expect("read");
        assert!(bytes[..] == patient.content[offset..][..4096], "a reader saw damaged bytes");
    }
    drop(file);
    patient.mount.unmount();
    patient.read_until_healed(&[1, 2]);
}

#[test]
fn three_bad_copies_are_an_error_for_that_range_only_and_are_named_in_the_log() {
    let patient = Patient::new();
    patient.damage(&[1, 2, 3], |_, _, index, copy| {
        if index == 2 {
            copy.flip_bit(7);
        }
    });
    patient.mount.start_again();
    let file = File::open(patient.mount.join("file")).expect("open");
    let mut bytes = vec![0; BLOCK];
    for index in 0..BLOCKS {
        let read = file.read_exact_at(&mut bytes, (index * BLOCK) as u64);
        match index {
            2 => assert_eq!(read.expect_err("no copy is good").raw_os_error(), Some(libc::EIO)),
            _ => {
                read.expect("the rest of the file still reads");
                assert!(bytes == patient.block(index), "a reader saw damaged bytes");
            }
        }
    }
    let hash = blake3::hash(patient.block(2)).to_hex().to_string();
    assert!(patient.mount.process().log().contains(&hash[..12]), "the log names the block {hash}");
}

fn dir(patient: &Patient) -> &str {
    patient.cluster.path().to_str().expect("test paths are UTF-8")
}

/// What was damaged while nobody read is good again on `servers`, without a reader.
fn wait_until_healed(patient: &Patient, servers: &[usize]) {
    wait::until("every bad copy is replaced", PATIENCE, || {
        servers.iter().all(|&server| (0..BLOCKS).all(|index| patient.is_good(server, index)))
    });
    patient.cluster.wait_until_whole();
}

/// "Each storage server reads everything that it stores once a week, and `holdfast scrub --now` has them do it at once: what is bad is replaced before anybody reads it."
#[test]
fn scrubbing_finds_what_nobody_reads_and_has_it_replaced() {
    let patient = Patient::new();
    // One server each, so that a good copy of every block is left.
    patient.damage(&[1], |_, _, index, copy| copy.flip_bit(1000 + index as u64 * 170_000));
    patient.damage(&[2], |_, _, _, copy| copy.delete_file());
    let output = patient.cluster.holdfast(&["scrub", "--now", "--wait", "--dir", dir(&patient)]);
    assert!(output.status.success(), "{output:?}");
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(table.lines().filter(|line| line.ends_with("s ago")).count(), 3, "{table}");
    wait_until_healed(&patient, &[1, 2]);
    assert!(quarantined(&patient, 1), "the bad copies are kept for inspection");
    let status = patient.cluster.status();
    assert!(status.number("corrupt_copies_met") >= BLOCKS as u64, "{}", status.0);
    assert!(status.storage_sum("scrub_passes") >= 3, "an order that was given twice makes two");
    patient.mount.start_again();
    assert!(fs::read(patient.mount.join("file")).expect("read") == patient.content);
    assert_eq!(patient.cluster.status().number("missing_copies_met"), 0, "the reader met nothing bad");
}

/// "A storage server that comes back with an empty disk gets its copies again, without being asked."
#[test]
fn a_server_whose_disk_was_replaced_gets_its_copies_again() {
    let patient = Patient::new();
    let data = patient.cluster.storage_data(3);
    patient.cluster.storage(3).kill();
    for name in ["segments", "index.redb", "boot.toml", "scrub.json"] {
        let path = data.join(name);
        if path.is_dir() {
            fs::remove_dir_all(&path).expect("remove");
        } else if path.exists() {
            fs::remove_file(&path).expect("remove");
        }
    }
    assert!((0..BLOCKS).all(|index| patient.copy(3, index).is_none()));
    patient.cluster.start_daemons();
    wait_until_healed(&patient, &[3]);
}

/// "`holdfast fsck` finds what a server should have and does not, and with `--repair` has it copied again."
#[test]
fn fsck_tells_what_is_missing_and_has_it_copied() {
    let patient = Patient::new();
    let fsck = |more: &[&str]| {
        let output = patient.cluster.holdfast(&[&["fsck", "--json", "--dir", dir(&patient)], more].concat());
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (output.status.code(), report)
    };
    let (code, report) = fsck(&[]);
    assert_eq!((code, &report["sound"]), (Some(0), &true.into()), "{report:#}");
    // What follows each start would be faster otherwise.
    wait::until("every server has been compared after its start", PATIENCE, || {
        patient.cluster.meta().log().matches("was compared with the record").count() == 3
    });
    let blocks = (0..BLOCKS).map(|index| BlockHash::of(patient.block(index))).take(4).collect();
    let delete = StorageRequest::Delete { blocks, epoch: Epoch(1 << 60) };
    let deleted = patient.cluster.ask_storage(patient.cluster.issue(Role::Meta), &delete).expect("an answer").0;
    assert_eq!(deleted, Ok(StorageAnswer::Deleted { count: 4 }));
    let (code, report) = fsck(&[]);
    assert_eq!(code, Some(4), "{report:#}");
    assert_eq!(report["servers"][0]["compared"]["missing"], 4, "{report:#}");
    let (code, report) = fsck(&["--repair"]);
    assert_eq!((code, &report["servers"][0]["compared"]["mended"]), (Some(0), &4.into()), "{report:#}");
    wait_until_healed(&patient, &[1]);
    assert_eq!(fsck(&[]).0, Some(0));
    patient.cluster.storage(2).kill();
    wait::until("the server counts as down", PATIENCE, || patient.cluster.status().servers_up() == 2);
    let (code, report) = fsck(&[]);
    assert_eq!((code, &report["sound"]), (Some(4), &false.into()), "what cannot be compared is not said to be sound");
}

/// Takes rows away that follow from others, from the metadata, which are not in use.
fn forget(cluster: &Cluster, table: &str, is_forgotten: impl Fn(&[u8]) -> bool) {
    let table = TableDefinition::<&[u8], &[u8]>::new(table);
    let database = redb::Database::open(cluster.path().join("meta/data/meta.redb")).expect("open");
    let change = database.begin_write().expect("begin");
    {
        let mut rows = change.open_table(table).expect("the table is there");
        let before = rows.len().expect("a length");
        rows.retain(|key, _| !is_forgotten(key)).expect("retain");
        assert!(rows.len().expect("a length") < before);
    }
    change.commit().expect("commit");
}

/// "`holdfast fsck --repair` makes the metadata's indexes, lists and counts again where they are not what the rest of it says."
#[test]
fn fsck_makes_again_what_follows_from_other_metadata() {
    /// After the inode's number, in the key of a name in the order of reading.
    const COOKIE: u8 = 4;
    /// First in the key of a digest of what a server is on record for.
    const HOLDING: u8 = 8;
    let patient = Patient::new();
    patient.cluster.meta().terminate(PATIENCE);
    forget(&patient.cluster, "tree", |key| key.get(8) == Some(&COOKIE));
    forget(&patient.cluster, "blocks", |key| key.first() == Some(&HOLDING));
    patient.cluster.start_daemons();
    let fsck = |more: &[&str]| {
        let output = patient.cluster.holdfast(&[&["fsck", "--dir", dir(&patient)], more].concat());
        (output.status.code(), String::from_utf8(output.stdout).expect("UTF-8"))
    };
    let (code, said) = fsck(&[]);
    assert!(code == Some(4) && said.contains("\"file\" in directory 1 is not under its cookie"), "{code:?}: {said}");
    assert!(said.contains("the digest of what server 2 is on record for in bucket"), "{said}");
    patient.mount.start_again();
    let listed = || fs::read_dir(patient.mount.path()).expect("list").count();
    assert_eq!(listed(), 0);
    patient.mount.unmount();
    let (code, said) = fsck(&["--repair"]);
    assert!(code == Some(0) && said.contains("rows that follow from others were made again"), "{code:?}: {said}");
    assert_eq!(fsck(&[]).0, Some(0));
    patient.mount.start_again();
    assert_eq!(listed(), 1);
    assert!(fs::read(patient.mount.join("file")).expect("read") == patient.content);
}

//! Damaged copies: a reader never sees them, and the read that meets one heals it.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use holdfast_tests::{
    cluster::{Cluster, PATIENCE},
    fault::{self, Copy, random_bytes},
    mount::Mount,
    wait,
};

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

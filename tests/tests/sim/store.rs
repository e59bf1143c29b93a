//! Segments and their index under power cuts, kills and disk errors, at every n-th write.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use holdfast_common::{BlockHash, Epoch};
use holdfast_server::storage::store::{CheckedBlock, Store, StoreOptions, Verdict};
use holdfast_tests::{
    fault::random_bytes,
    sim_disk::{SimDisk, Trouble},
};

const DATA: &str = "/data";
/// Small, so that a short history begins several segments.
const SEGMENT_BYTES: u64 = 64 << 10;

fn options() -> StoreOptions {
    StoreOptions {
        segment_bytes: SEGMENT_BYTES,
        reserve_bytes: 0,
        flush_every: Duration::from_millis(1),
        flushes_per_checkpoint: 3,
        ..StoreOptions::default()
    }
}

fn open(disk: &SimDisk) -> Result<Store, String> {
    Store::open(Arc::new(disk.clone()), Path::new(DATA), options()).map_err(|error| error.to_string())
}

/// Block `number` of the history: from a few bytes to several hash groups.
fn bytes(number: u64) -> Bytes {
    let length = [10, 4096, 17_000, 40_000][usize::try_from(number % 4).expect("below 4")];
    Bytes::from(random_bytes(number, length))
}

fn checked(number: u64) -> CheckedBlock {
    let bytes = bytes(number);
    CheckedBlock::verify(BlockHash::of(&bytes), bytes, Epoch(0)).expect("bytes match their own hash")
}

/// What the store had said yes to when the disk failed.
#[derive(Debug, Default)]
struct Said {
    visible: Vec<u64>,
    durable: Vec<u64>,
}

/// Puts blocks, every third time waiting until they are durable, until the disk is in trouble or `count` are there.
fn put_until_trouble(disk: &SimDisk, count: u64) -> Said {
    let mut said = Said::default();
    let Ok(store) = open(disk) else { return said };
    for number in 0..count {
        let Ok(ticket) = store.put(&[checked(number)]) else { break };
        said.visible.push(number);
        if number % 3 == 2 {
            if store.wait_durable(ticket).is_err() {
                break;
            }
            said.durable = said.visible.clone();
        }
    }
    said
}

/// The store opens, has every block of `promised`, and serves nothing that is not what its name says.
fn check(disk: &SimDisk, promised: &[u64], history: &str) {
    let store = open(disk).unwrap_or_else(|error| panic!("{history}: {error}"));
    for &number in promised {
        let hash = BlockHash::of(&bytes(number));
        let found = store.get(&hash).unwrap_or_else(|error| panic!("{history}: block {number}: {error}"));
        assert!(found == bytes(number), "{history}: block {number} has other bytes");
    }
    let (listed, end) = store.list(None, 10_000).expect("the index can be listed");
    assert!(end);
    for (hash, _) in listed {
        let verdict = store.examine(&hash).expect("it can be read");
        assert!(matches!(verdict, Verdict::Good), "{history}: {hash} is listed: {verdict:?}");
    }
    let (again, ticket) = (checked(999), store.put(&[checked(999)]).expect("a recovered store takes blocks"));
    store.wait_durable(ticket).expect("and makes them durable");
    assert!(matches!(store.examine(&again.hash()), Ok(Verdict::Good)), "and has them");
}

#[test]
fn a_power_cut_at_any_write_loses_nothing_that_was_said_to_be_durable() {
    const BLOCKS: u64 = 24;
    let changes = {
        let disk = SimDisk::new();
        put_until_trouble(&disk, BLOCKS);
        disk.changes()
    };
    assert!(changes > 60, "only {changes} changes: the history is too short to prove anything");
    for at in 1..=changes {
        let disk = SimDisk::new();
        disk.strike(at, Trouble::PowerCut);
        let said = put_until_trouble(&disk, BLOCKS);
        for seed in 0..3 {
            let history = format!("power cut at change {at}, seed {seed}");
            check(&disk.after_power_cut(at * 100 + seed), &said.durable, &history);
        }
        check(&disk.after_kill(), &said.visible, &format!("killed at change {at}"));
    }
}

#[test]
fn an_error_at_any_write_is_never_taken_for_success() {
    const BLOCKS: u64 = 12;
    for at in 1..=80 {
        let disk = SimDisk::new();
        disk.strike(at, Trouble::OneError);
        let said = put_until_trouble(&disk, BLOCKS);
        check(&disk.after_power_cut(at), &said.durable, &format!("error at change {at}"));
    }
}

#[test]
fn a_second_power_cut_during_recovery_loses_nothing_either() {
    for at in 1..=40 {
        let disk = SimDisk::new();
        disk.strike(70, Trouble::PowerCut);
        let said = put_until_trouble(&disk, 24);
        let second = disk.after_power_cut(at);
        second.strike(at, Trouble::PowerCut);
        drop(open(&second));
        check(&second.after_power_cut(at), &said.durable, &format!("second power cut at change {at}"));
    }
}

#[test]
fn an_index_that_is_lost_is_rebuilt_from_the_segments() {
    let disk = SimDisk::new();
    let said = put_until_trouble(&disk, 24);
    let lost = disk.after_kill();
    for path in holdfast_common::disk::Disk::list(&lost, Path::new(DATA)).expect("list") {
        if path.to_string_lossy().contains("redb") {
            holdfast_common::disk::Disk::remove(&lost, &path).expect("remove");
        }
    }
    check(&lost, &said.visible, "the index is gone");
}

//! The log under torn tails, damage and another boot.

use std::path::Path;

use holdfast_common::{SessionId, Time};

use super::*;
use crate::meta::{memory_disk::MemoryDisk, state::Command};

const DIRECTORY: &str = "/data/log";
const CLUSTER: ClusterId = ClusterId([7; 16]);

fn place(disk: &MemoryDisk) -> LogPlace {
    LogPlace::new(Arc::new(disk.clone()), DIRECTORY.into(), CLUSTER).unwrap()
}

fn entry(number: u64) -> Entry {
    Entry { time: Time { secs: 1, nanos: 0 }, command: Command::EndSession { session: SessionId(number) } }
}

fn append(log: &mut Log, numbers: std::ops::RangeInclusive<u64>) {
    let entries: Vec<_> = numbers.map(|number| Log::encode(&entry(number)).unwrap()).collect();
    log.append(&entries).unwrap();
}

fn replayed(found: &Found, applied: u64) -> Vec<u64> {
    let mut numbers = Vec::new();
    found
        .replay(Position(applied), |position, found| {
            assert_eq!(found, entry(position.0));
            numbers.push(position.0);
            Ok::<(), LogError>(())
        })
        .unwrap();
    numbers
}

fn find(disk: &MemoryDisk) -> Result<Option<Found>, LogError> {
    place(disk).find(Position(0))
}

/// Entries 1 to 3, a mark through 3, one that says that it was synced, entry 4, entries 5 and 6; the file's path and the ends of its records.
fn example(disk: &MemoryDisk) -> (PathBuf, Vec<u64>) {
    let mut log = place(disk).begin(Position(1)).unwrap();
    let mut ends = vec![log.length()];
    append(&mut log, 1..=3);
    ends.push(log.length());
    log.mark(Position(3)).unwrap();
    log.file().sync_data().unwrap();
    ends.push(log.length());
    log.note_synced(&log.file(), log.length(), Position(3)).unwrap();
    ends.push(log.length());
    append(&mut log, 4..=4);
    ends.push(log.length());
    append(&mut log, 5..=6);
    ends.push(log.length());
    (log.path().to_owned(), ends)
}

#[test]
fn the_bytes_are_frozen() {
    let disk = MemoryDisk::new();
    let mut log = place(&disk).begin(Position(1)).unwrap();
    append(&mut log, 1..=1);
    log.mark(Position(1)).unwrap();
    let hex: String = disk.bytes(log.path()).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, GOLDEN);
}

const GOLDEN: &str = concat!(
    "484f4c44464c4f4702000000010000000000000007070707070707070707070707070707bccfabcaf016cd2ffa31cfb15d199493",
    "db800122a631d58e771a315beab23479bdfe97dea765137f48465231010000001c0000000100000000000000ee8bcbc00cedde70",
    "180000000100000000000000000000000200000001000000000000004846523102000000080000000100000000000000d0f6b491",
    "e97a9b094c00000000000000",
);

#[test]
fn the_same_boot_replays_everything_and_another_only_what_is_marked_durable() {
    let disk = MemoryDisk::new();
    example(&disk);
    let found = find(&disk.process_death()).unwrap().unwrap();
    assert_eq!((replayed(&found, 0), found.marked), ((1..=6).collect(), Position(3)));
    assert_eq!(replayed(&found, 4), [5, 6]);
    for torn in 0..200 {
        let after = disk.power_cut(torn);
        let found = find(&after).unwrap().unwrap();
        assert_eq!((replayed(&found, 0), found.marked), (vec![1, 2, 3], Position(3)), "{torn} bytes more");
        assert!(found.resume(&place(&after), Position(3)).unwrap().is_none());
    }
}

#[test]
fn a_torn_tail_is_cut_at_every_byte() {
    let disk = MemoryDisk::new();
    let (path, ends) = example(&disk);
    let whole = disk.bytes(&path);
    let last_of = [0, 3, 3, 3, 4, 6];
    for length in FILE_HEADER_LENGTH..=whole.len() {
        let after = disk.process_death();
        after.replace(&path, whole[..length].to_vec());
        let complete = ends.iter().filter(|end| **end <= length as u64).count() - 1;
        let found = find(&after).unwrap().unwrap();
        assert_eq!(replayed(&found, 0), (1..=last_of[complete]).collect::<Vec<_>>(), "cut at {length}");
        let mut log = found.resume(&place(&after), Position(0)).unwrap().unwrap();
        let next = log.next().0;
        append(&mut log, next..=next + 1);
        let again = find(&after).unwrap().unwrap();
        assert_eq!(replayed(&again, 0), (1..=next + 1).collect::<Vec<_>>());
    }
    for length in 0..FILE_HEADER_LENGTH {
        let after = disk.process_death();
        after.replace(&path, whole[..length].to_vec());
        assert!(find(&after).unwrap().is_none(), "a log whose creation was cut short is none");
    }
}

#[test]
fn what_is_written_ahead_is_the_end_of_the_log_and_seldom_makes_it_longer() {
    const ENTRIES: u64 = 1500;
    let disk = MemoryDisk::new();
    let mut log = place(&disk).begin(Position(1)).unwrap();
    let mut lengths = std::collections::BTreeSet::new();
    for number in 1..=ENTRIES {
        append(&mut log, number..=number);
        log.mark(Position(number)).unwrap();
        let (file, end) = log.to_sync();
        file.sync_data().unwrap();
        log.note_synced(&file, end, Position(number)).unwrap();
        lengths.insert(file.length().unwrap());
    }
    assert!((1..4).contains(&lengths.len()), "{lengths:?}");
    assert!(log.file().length().unwrap() > log.length());
    for (what, after) in [("a kill", disk.process_death()), ("a power cut", disk.power_cut(0))] {
        let found = find(&after).unwrap().unwrap();
        assert_eq!(replayed(&found, 0), (1..=ENTRIES).collect::<Vec<_>>(), "after {what}");
        let torn = after.bytes(log.path());
        let middle = usize::try_from(log.length()).unwrap() - 70;
        after.replace(log.path(), [&torn[..middle], &vec![0; torn.len() - middle]].concat());
        assert!(replayed(&find(&after).unwrap().unwrap(), 0).len() as u64 >= ENTRIES - 1, "zeroes are a torn end");
    }
    let after = disk.process_death();
    let mut log = find(&after).unwrap().unwrap().resume(&place(&after), Position(0)).unwrap().unwrap();
    assert_eq!(log.file().length().unwrap(), log.length(), "what was written ahead is cut");
    append(&mut log, ENTRIES + 1..=ENTRIES + 2);
    assert_eq!(replayed(&find(&after).unwrap().unwrap(), ENTRIES), [ENTRIES + 1, ENTRIES + 2]);
}

#[test]
fn damage_before_the_tail_is_refused_with_a_sentence() {
    let disk = MemoryDisk::new();
    let (path, ends) = example(&disk);
    let whole = disk.bytes(&path);
    let tail = usize::try_from(ends[4]).unwrap();
    for at in (0..tail).step_by(3) {
        let after = disk.process_death();
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        after.replace(&path, bytes);
        let error = find(&after).unwrap_err().to_string();
        assert!(error.contains("is damaged at byte") && error.contains(".log"), "byte {at}: {error}");
    }
}

#[test]
fn after_a_power_cut_only_damage_that_was_synced_for_certain_counts() {
    let disk = MemoryDisk::new();
    let (path, ends) = example(&disk);
    let whole = disk.bytes(&path);
    let synced = usize::try_from(ends[2]).unwrap();
    for at in FILE_HEADER_LENGTH..whole.len() {
        let after = disk.power_cut(0);
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        after.replace(&path, bytes);
        match find(&after) {
            Ok(found) => assert!(at >= synced, "byte {at} was acknowledged: {found:?}"),
            Err(error) => assert!(at < synced, "byte {at}: {error}"),
        }
    }
}

#[test]
fn a_checkpoint_leaves_one_log() {
    let disk = MemoryDisk::new();
    example(&disk);
    let mut log = find(&disk).unwrap().unwrap().resume(&place(&disk), Position(0)).unwrap().unwrap();
    log.rotate().unwrap();
    append(&mut log, 7..=8);
    assert_eq!(disk.list(Path::new(DIRECTORY)).unwrap(), [log.path()]);
    let found = place(&disk).find(Position(6)).unwrap().unwrap();
    assert_eq!(replayed(&found, 6), [7, 8]);
    let error = place(&disk).find(Position(5)).unwrap_err();
    assert!(matches!(error, LogError::Gap { first: Position(7), applied: Position(5), .. }), "{error}");
}

#[test]
fn another_clusters_log_and_a_newer_format_are_refused() {
    let disk = MemoryDisk::new();
    let (path, _) = example(&disk);
    let other = LogPlace::new(Arc::new(disk.clone()), DIRECTORY.into(), ClusterId([8; 16])).unwrap();
    assert!(matches!(other.find(Position(0)), Err(LogError::Cluster { .. })));
    let mut bytes = disk.bytes(&path);
    bytes[8] = 9;
    let checksum = sum(&[&bytes[..FILE_HEADER_LENGTH - 8]]);
    bytes[FILE_HEADER_LENGTH - 8..FILE_HEADER_LENGTH].copy_from_slice(&checksum);
    disk.replace(&path, bytes);
    assert!(matches!(find(&disk), Err(LogError::Version { found: 9, .. })));
}

#[test]
fn a_mark_whose_sync_was_cut_short_is_no_proof_that_what_is_before_it_was_there() {
    let disk = MemoryDisk::new();
    let (path, ends) = example(&disk);
    let whole = disk.bytes(&path);
    let (from, to) = (usize::try_from(ends[3]).unwrap(), usize::try_from(ends[4]).unwrap());
    let mut log = find(&disk).unwrap().unwrap().resume(&place(&disk), Position(0)).unwrap().unwrap();
    log.mark(Position(6)).unwrap();
    // The power went during the sync: the mark reached the disk, entry 4 did not.
    let after = disk.power_cut(0);
    let mut bytes = disk.bytes(&path);
    assert!(bytes.len() > whole.len());
    bytes[from..to].fill(0);
    after.replace(&path, bytes);
    let found = find(&after).unwrap().unwrap();
    assert_eq!((replayed(&found, 0), found.marked), (vec![1, 2, 3], Position(3)));
}

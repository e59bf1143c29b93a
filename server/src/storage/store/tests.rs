use bao_tree::{
    ChunkNum, ChunkRanges,
    io::{round_up_to_chunks_groups, sync::DecodeResponseIter},
};
use bytes::Bytes;
use holdfast_common::{disk::RealDisk, wire::storage::ByteRange};
use proptest::prelude::*;

use super::{
    test_disk::{Fault, Soon, TestDisk},
    *,
};

const DIRECTORY: &str = "/store";

fn options() -> StoreOptions {
    StoreOptions {
        segment_bytes: 100_000,
        index_cache_bytes: 1 << 20,
        quarantine_bytes: 100_000,
        waste_bytes: 1000,
        // Nothing happens by itself, so that calls can be counted.
        flush_every: Duration::from_secs(3600),
        ..StoreOptions::default()
    }
}

fn open(disk: &Arc<TestDisk>) -> Store {
    Store::open(Arc::clone(disk) as Arc<dyn Disk>, Path::new(DIRECTORY), options()).unwrap()
}

/// Block number `n`: `length` bytes like no other's.
fn block(n: u32, length: usize) -> CheckedBlock {
    block_at(n, length, Epoch(0))
}

fn block_at(n: u32, length: usize, epoch: Epoch) -> CheckedBlock {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut bytes);
    CheckedBlock::verify(BlockHash::of(&bytes), bytes.into(), epoch).unwrap()
}

fn put_durable(store: &Store, block: &CheckedBlock) {
    let ticket = store.put(std::slice::from_ref(block)).unwrap();
    store.wait_durable(ticket).unwrap();
}

#[track_caller]
fn found_bad(store: &Store, block: &CheckedBlock) -> BadCopy {
    match store.examine(&block.hash()) {
        Ok(Verdict::Damaged(bad, _) | Verdict::BadTree(_, bad)) => bad,
        other => panic!("{other:?}"),
    }
}

/// Flips a bit of the block's bytes, wherever they are.
fn damage(disk: &TestDisk, block: &CheckedBlock) {
    let middle = block.bytes().len() / 2;
    let sample = &block.bytes()[middle..middle + 16];
    for path in disk.paths(".seg") {
        disk.edit(&path, |bytes| {
            if let Some(position) = bytes.windows(16).position(|window| window == sample) {
                bytes[position] ^= 4;
            }
        });
    }
}

fn assert_here(store: &Store, block: &CheckedBlock) {
    assert_eq!(store.get(&block.hash()).unwrap(), block.bytes());
    store.verify(&block.hash()).unwrap();
}

#[track_caller]
fn assert_missing(store: &Store, block: &CheckedBlock) {
    assert!(matches!(store.get(&block.hash()), Err(StoreError::Missing)), "{:?}", store.get(&block.hash()));
}

fn sorted(blocks: &[CheckedBlock]) -> Vec<BlockHash> {
    blocks.iter().map(CheckedBlock::hash).collect::<BTreeSet<_>>().into_iter().collect()
}

fn segment(number: u64) -> PathBuf {
    Path::new(DIRECTORY).join("segments").join(segment::segment_name(number))
}

fn index_path() -> PathBuf {
    Path::new(DIRECTORY).join(INDEX_FILE)
}

#[test]
fn blocks_of_every_size_come_back_and_are_stored_once() {
    let store = open(&TestDisk::new());
    let blocks: Vec<_> = [1, 7, 8, 4096, 16_384, 16_385, 65_535, 65_536, 1 << 20]
        .into_iter()
        .zip(0..)
        .map(|(length, n)| block(n, length))
        .collect();
    store.put(&blocks).unwrap();
    let once = store.statistics();
    store.put(&[&blocks[..], &blocks[..]].concat()).unwrap();
    assert_eq!(store.statistics(), once);
    assert_eq!(once.blocks, 9);
    for block in &blocks {
        assert_here(&store, block);
    }
    let absent = block(99, 10);
    assert_eq!(store.has(&[blocks[0].hash(), absent.hash()]).unwrap(), [true, false]);
    assert_missing(&store, &absent);
    let stamped = sorted(&blocks).into_iter().map(|hash| (hash, Epoch(0))).collect();
    assert_eq!(store.list(None, 100).unwrap(), (stamped, true));
}

#[test]
fn a_list_is_read_in_pages_across_memory_and_redb() {
    let store = open(&TestDisk::new());
    let blocks: Vec<_> = (0..30).map(|n| block(n, 100)).collect();
    store.put(&blocks[..10]).unwrap();
    store.flush().unwrap();
    store.put(&blocks[10..]).unwrap();
    store.delete(&[blocks[3].hash(), blocks[13].hash()], Epoch(1)).unwrap();
    let left: Vec<_> = blocks.iter().enumerate().filter(|(n, _)| *n != 3 && *n != 13).map(|(_, b)| b.clone()).collect();
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let (page, end) = store.list(after, 7).unwrap();
        assert!(page.len() == 7 || end);
        after = page.last().map(|(hash, _)| *hash).or(after);
        all.extend(page.into_iter().map(|(hash, _)| hash));
        if end {
            break;
        }
    }
    assert_eq!(all, sorted(&left));
}

#[test]
fn the_first_read_of_a_long_block_passes_by_the_memory_of_files_and_the_next_fills_it() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let [long, short, last] = [block(1, 1 << 20), block(2, (512 << 10) - 1), block(3, 1 << 20)];
    for block in [&long, &short, &last] {
        store.put(std::slice::from_ref(block)).unwrap();
    }
    let mut read = |block: &CheckedBlock| {
        let before = disk.read_once();
        assert_eq!(store.get(&block.hash()).unwrap(), block.bytes());
        disk.read_once() - before
    };
    assert_eq!([&long, &long, &long, &short, &short].map(&mut read), [1, 0, 0, 0, 0]);
    assert_eq!(read(&last), 0, "in the segment that grows, it would hold up writes");
    let before = disk.read_once();
    store.verify(&long.hash()).unwrap();
    assert_eq!(disk.read_once() - before, 1, "nobody asked for what is scrubbed");
}

#[test]
fn a_range_comes_with_the_proof_of_its_groups() {
    let store = open(&TestDisk::new());
    for (length, offset, part) in [
        (1, 0, 1),
        (16_384, 100, 50),
        (16_385, 16_384, 1),
        (1 << 20, 500_000, 4096),
        (1 << 20, 0, 1 << 20),
        (70_000, 16_000, 1000),
    ] {
        let block = block(1, length);
        store.put(std::slice::from_ref(&block)).unwrap();
        let (encoding, total) = store.get_range(&block.hash(), ByteRange { offset, length: part }).unwrap();
        assert_eq!(total as usize, length);
        assert!(encoding.len() <= part as usize + 2 * 16_384 + 64 * 64, "{} bytes for {part}", encoding.len());
        let chunks =
            ChunkRanges::from(ChunkNum::full_chunks(u64::from(offset))..ChunkNum::chunks(u64::from(offset + part)));
        let chunks = round_up_to_chunks_groups(chunks, format::GROUP);
        let root = blake3::Hash::from_bytes(block.hash().0);
        let mut covered = 0;
        for item in DecodeResponseIter::new(root, format::bao_tree(total), &encoding[..], &chunks) {
            if let bao_tree::io::BaoContentItem::Leaf(leaf) = item.unwrap() {
                let start = usize::try_from(leaf.offset).unwrap();
                assert_eq!(leaf.data, block.bytes()[start..start + leaf.data.len()]);
                covered += leaf.data.len();
            }
        }
        assert!(covered >= part as usize);
    }
    let hash = block(1, 70_000).hash();
    for (offset, length) in [(0, 0), (70_000, 1), (0, 70_001), (u32::MAX, u32::MAX)] {
        assert!(matches!(store.get_range(&hash, ByteRange { offset, length }), Err(StoreError::Range)));
    }
}

#[tokio::test]
async fn what_is_read_without_a_thread_is_what_a_thread_reads_or_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(Arc::new(RealDisk), directory.path(), options()).unwrap();
    let blocks = [block(1, 1), block(2, 16_385), block(3, 70_000)];
    store.put(&blocks).unwrap();
    let whole = |block: &CheckedBlock| (block.hash(), None);
    let part = |block: &CheckedBlock, offset, length| (block.hash(), Some(ByteRange { offset, length }));
    let wanted = [whole(&blocks[0]), whole(&blocks[2]), part(&blocks[1], 16_384, 1), part(&blocks[2], 16_000, 1000)];
    let plans: Vec<Plan> = wanted.iter().map(|(hash, range)| store.plan(hash, *range).unwrap()).collect();
    for (plan, (hash, range)) in plans.iter().zip(&wanted) {
        let expected = match range {
            None => store.get(hash).unwrap(),
            Some(range) => store.get_range(hash, *range).unwrap().0,
        };
        // Not every filesystem can tell what is in memory.
        assert!(store.read_cached(plan).is_none_or(|found| found == expected));
        if let Some(reading) = store.read_soon(plan) {
            assert_eq!(reading.await, Some(expected));
        }
    }
    // They are elsewhere now, and nothing is left where they were.
    store.delete(&blocks.each_ref().map(CheckedBlock::hash), Epoch(1)).unwrap();
    store.wait_durable(store.ticket()).unwrap();
    store.inner.bury();
    for plan in &plans {
        assert_eq!(store.read_cached(plan), None);
        if let Some(reading) = store.read_soon(plan) {
            assert_eq!(reading.await, None);
        }
    }
    assert!(matches!(store.plan(&blocks[0].hash(), None), Err(StoreError::Missing)));
}

#[tokio::test]
async fn whatever_goes_wrong_with_a_read_without_a_thread_a_thread_finds_out() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let block = block(3, 70_000);
    store.put(std::slice::from_ref(&block)).unwrap();
    for range in [None, Some(ByteRange { offset: 40_000, length: 1000 })] {
        let plan = store.plan(&block.hash(), range).unwrap();
        for soon in [Soon::Never, Soon::Right, Soon::Fails, Soon::Wrong, Soon::Dropped] {
            disk.set_soon(soon);
            let found = match store.read_soon(&plan) {
                Some(reading) => reading.await,
                None => None,
            };
            assert_eq!(found.is_some(), soon == Soon::Right, "{soon:?}, {range:?}");
        }
        assert!(store.inner.suspects.lock().is_empty(), "no copy is suspected for it");
        assert_eq!(store.get(&block.hash()).unwrap(), block.bytes());
    }
}

#[test]
fn a_restart_and_a_rebuilt_index_show_the_same_content() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let blocks: Vec<_> = (0..40).map(|n| block(n, 1000 * n as usize + 1)).collect();
    for block in &blocks {
        store.put(std::slice::from_ref(block)).unwrap();
    }
    store.delete(&[blocks[5].hash(), blocks[6].hash()], Epoch(1)).unwrap();
    store.put(&[block_at(7, 7001, Epoch(9))]).unwrap();
    let (content, statistics, boot) = (store.list(None, 100).unwrap(), store.statistics(), store.boot());
    store.close().unwrap();
    let check = |disk: &Arc<TestDisk>, rebuilt: bool| {
        let store = open(disk);
        assert_eq!(store.recovery().rebuilt, rebuilt);
        assert_eq!((store.recovery().damaged, store.recovery().lost), (0, 0));
        assert_eq!(
            (store.list(None, 100).unwrap(), store.statistics(), store.boot()),
            (content.clone(), statistics, boot)
        );
        assert_eq!(store.delete(&[blocks[7].hash()], Epoch(9)).unwrap(), 0, "the epoch was kept");
        for (n, block) in blocks.iter().enumerate() {
            if n == 5 || n == 6 { assert_missing(&store, block) } else { assert_here(&store, block) }
        }
    };
    check(&disk.after_kill(), false);
    let missing = disk.after_kill();
    missing.remove(&index_path()).unwrap();
    check(&missing, true);
    let garbage = disk.after_kill();
    garbage.edit(&index_path(), |bytes| bytes.fill(0x5a));
    check(&garbage, true);
    let short = disk.after_kill();
    short.edit(&index_path(), |bytes| bytes.truncate(5000));
    check(&short, true);
}

#[test]
fn a_killed_process_loses_nothing_visible_and_keeps_its_boot_id() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let blocks: Vec<_> = (0..20).map(|n| block(n, 9000)).collect();
    store.put(&blocks).unwrap();
    let after = open(&disk.after_kill());
    blocks.iter().for_each(|block| assert_here(&after, block));
    assert_eq!(after.boot(), store.boot());
    let elsewhere = open(&disk.after_power_cut(1));
    assert_ne!(elsewhere.boot(), store.boot());
}

#[test]
fn a_start_that_is_cut_short_leaves_the_next_one_to_know_what_the_first_did() {
    let disk = TestDisk::new();
    let store = open(&disk);
    put_durable(&store, &block(1, 40_000));
    store.put(&[block(2, 40_000)]).unwrap();
    let boot = store.boot();
    let rebooted = disk.after_power_cut(3);
    let directory = Path::new(DIRECTORY);
    let decide = || boot::decide(rebooted.as_ref(), directory, || 77).unwrap();
    for _ in 0..2 {
        let decided = decide();
        assert!(!decided.cache_survived && decided.id != boot, "nothing was committed");
    }
    let store = open(&rebooted);
    let now = decide();
    assert!(now.cache_survived && now.id == store.boot() && now.id != boot);
}

#[test]
fn a_damaged_record_is_not_believed_by_a_later_rebuild() {
    let disk = TestDisk::new();
    let store = open(&disk);
    put_durable(&store, &block(1, 40_000));
    store.put(&[block(2, 40_000)]).unwrap();
    damage(&disk, &block(2, 40_000));
    let killed = disk.after_kill();
    let store = open(&killed);
    assert_eq!(store.recovery().damaged, 1);
    put_durable(&store, &block(3, 100));
    drop(store);
    killed.remove(&index_path()).unwrap();
    let store = open(&killed);
    assert!(store.recovery().rebuilt);
    assert_missing(&store, &block(2, 40_000));
    assert_here(&store, &block(1, 40_000));
    assert_here(&store, &block(3, 100));
}

/// Bytes of a segment up to the end of its last record.
fn used(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| (last + 1).next_multiple_of(8))
}

#[test]
fn short_records_that_are_synced_one_by_one_seldom_make_a_segment_longer() {
    let disk = TestDisk::new();
    let store = Store::open(Arc::clone(&disk) as Arc<dyn Disk>, Path::new(DIRECTORY), StoreOptions::default()).unwrap();
    let blocks: Vec<_> = (0..300).map(|n| block(n, 4000)).collect();
    let mut lengths = BTreeSet::new();
    for block in &blocks {
        put_durable(&store, block);
        lengths.insert(disk.edit(&segment(1), |bytes| bytes.len()));
    }
    assert!(lengths.len() < 12, "{} times for 1.2 MB", lengths.len());
    for (found, kind) in [(disk.after_kill(), "a kill"), (disk.after_power_cut(3), "a power cut")] {
        let store = open(&found);
        assert_eq!((store.recovery().damaged, store.recovery().lost), (0, 0), "after {kind}");
        blocks.iter().for_each(|block| assert_here(&store, block));
    }
}

#[test]
fn what_was_written_ahead_of_a_full_segment_is_cut_and_zeroes_instead_of_records_are_damage() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let mut blocks = Vec::new();
    while disk.paths(".seg").len() < 2 {
        blocks.push(block(u32::try_from(blocks.len()).unwrap(), 900));
        put_durable(&store, &blocks[blocks.len() - 1]);
    }
    let length = disk.edit(&segment(1), |bytes| {
        assert_eq!(bytes.len(), used(bytes));
        bytes.len()
    });
    let whole = open(&disk.after_power_cut(1));
    assert_eq!((whole.recovery().damaged, whole.recovery().lost), (0, 0));
    let damaged = disk.after_kill();
    damaged.edit(&segment(1), |bytes| bytes[length - 2000..].fill(0));
    damaged.remove(&index_path()).unwrap();
    assert!(open(&damaged).recovery().damaged > 0);
}

#[test]
fn what_was_written_ahead_does_not_outlive_a_restart() {
    let disk = TestDisk::new();
    let store = open(&disk);
    put_durable(&store, &block(1, 900));
    assert!(disk.edit(&segment(1), |bytes| bytes.len() > used(bytes)));
    drop(store);
    let disk = disk.after_kill();
    let store = open(&disk);
    assert!(disk.edit(&segment(1), |bytes| bytes.len() == used(bytes)));
    // One that does not fit into the first segment any more.
    put_durable(&store, &block(2, 100_000));
    assert_eq!(disk.paths(".seg").len(), 2);
    let after = disk.after_kill();
    after.remove(&index_path()).unwrap();
    let store = open(&after);
    assert_eq!((store.recovery().damaged, store.recovery().lost), (0, 0));
    [block(1, 900), block(2, 100_000)].iter().for_each(|block| assert_here(&store, block));
}

#[test]
fn a_torn_tail_is_cut_at_every_byte() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let (first, last) = (block(1, 300), block(2, 77));
    put_durable(&store, &first);
    let before = disk.edit(&segment(1), |bytes| used(bytes));
    store.put(std::slice::from_ref(&last)).unwrap();
    let after = disk.edit(&segment(1), |bytes| used(bytes));
    assert!(after > before + 77);
    // What is missing at the end is not there at all, or is the zeroes that were written ahead of it.
    for (length, is_blank) in (before + 1..after - 3).flat_map(|length| [(length, false), (length, true)]) {
        let torn = disk.after_kill();
        let size = torn.edit(&segment(1), |bytes| {
            if is_blank {
                bytes[length..].fill(0)
            } else {
                bytes.truncate(length)
            }
            bytes.len()
        });
        let store = open(&torn);
        assert_eq!((store.recovery().damaged, store.recovery().lost), (0, 1), "at {length}");
        assert_eq!(store.recovery().cut_bytes, (size - before) as u64);
        assert_here(&store, &first);
        assert_missing(&store, &last);
        put_durable(&store, &last);
        let again = open(&torn.after_power_cut(0));
        assert_here(&again, &first);
        assert_here(&again, &last);
    }
}

#[test]
fn damage_is_reported_and_its_neighbours_survive() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let blocks: Vec<_> = (0..5).map(|n| block(n, 5000)).collect();
    blocks.iter().for_each(|block| put_durable(&store, block));
    drop(store);
    let record_of = |disk: &TestDisk, block: &CheckedBlock| {
        disk.edit(&segment(1), |bytes| {
            let payload = bytes.windows(block.bytes().len()).position(|window| window == block.bytes()).unwrap();
            payload - RECORD_HEADER_LENGTH
        })
    };
    for (bad, what) in [(0, "magic"), (9, "length"), (40, "hash"), (70, "checksum")] {
        let damaged = disk.after_kill();
        damaged.remove(&index_path()).unwrap();
        let start = record_of(&damaged, &blocks[2]);
        damaged.edit(&segment(1), |bytes| bytes[start + bad] ^= 0x10);
        let store = open(&damaged);
        assert_eq!((store.recovery().damaged, store.recovery().lost), (1, 0), "{what}");
        assert_eq!(store.statistics().corrupt_found, 1);
        for (n, block) in blocks.iter().enumerate() {
            if n == 2 { assert_missing(&store, block) } else { assert_here(&store, block) }
        }
        put_durable(&store, &blocks[2]);
        assert_here(&store, &blocks[2]);
    }
}

#[test]
fn a_bad_header_of_a_segment_costs_nothing_and_is_written_again() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let blocks: Vec<_> = (0..50).map(|n| block(n, 5000)).collect();
    blocks.iter().for_each(|block| put_durable(&store, block));
    drop(store);
    let damaged = disk.after_kill();
    damaged.remove(&index_path()).unwrap();
    damaged.edit(&segment(1), |bytes| bytes[20] ^= 1);
    let store = open(&damaged);
    assert_eq!(store.recovery().damaged, 1);
    blocks.iter().for_each(|block| assert_here(&store, block));
    drop(store);
    damaged.remove(&index_path()).unwrap();
    assert_eq!(open(&damaged).recovery().damaged, 0);
}

#[test]
fn a_flipped_bit_is_found_quarantined_and_replaced() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let (good, bad) = (block(1, 40_000), block_at(2, 40_000, Epoch(3)));
    put_durable(&store, &good);
    put_durable(&store, &bad);
    damage(&disk, &bad);
    let copy = found_bad(&store, &bad);
    let fetched = block_at(2, 40_000, Epoch(0));
    let ticket = store.replace(&fetched, copy).unwrap().unwrap();
    store.wait_durable(ticket).unwrap();
    assert_eq!(disk.paths("-00000000").len(), 1);
    assert_eq!(store.delete(&[bad.hash()], Epoch(3)).unwrap(), 0, "the epoch is carried on");
    store.checkpoint().unwrap();
    let expected = (1, 1, 1);
    for disk in [disk.after_kill(), disk.after_power_cut(3)] {
        let store = open(&disk);
        assert_here(&store, &bad);
        assert_here(&store, &good);
        let found = store.statistics();
        assert_eq!((found.corrupt_found, found.repaired, found.quarantined), expected, "{:?}", store.recovery());
    }
}

#[test]
fn a_copy_that_came_after_the_verdict_is_not_condemned_by_it() {
    let disk = TestDisk::new();
    let store = open(&disk);
    put_durable(&store, &block(1, 40_000));
    damage(&disk, &block(1, 40_000));
    let copy = found_bad(&store, &block(1, 40_000));
    let newer = block_at(1, 40_000, Epoch(1));
    put_durable(&store, &newer);
    assert!(store.replace(&newer, copy).unwrap().is_none());
    for disk in [disk.after_kill(), disk.after_power_cut(3)] {
        assert_here(&open(&disk), &newer);
    }
}

#[test]
fn a_bad_tree_is_replaced_from_the_good_bytes_beside_it() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let block = block_at(1, 40_000, Epoch(2));
    put_durable(&store, &block);
    disk.edit(&segment(1), |bytes| {
        let position = bytes.windows(32).position(|window| window == &block.tree()[..32]).unwrap();
        bytes[position] ^= 1;
    });
    let Ok(Verdict::BadTree(good, bad)) = store.examine(&block.hash()) else { panic!("the tree is bad") };
    assert!(store.replace(&good, bad).unwrap().is_some());
    assert_here(&store, &block);
}

#[test]
fn a_copy_with_a_bad_header_or_file_is_refused_and_the_next_put_replaces_it() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let block = block(1, 40_000);
    put_durable(&store, &block);
    let damages: [fn(&mut Vec<u8>); 3] =
        [|bytes| bytes[70] ^= 1, |bytes| bytes.truncate(200), |bytes| bytes.truncate(0)];
    for damage in damages {
        let disk = disk.after_kill();
        let store = open(&disk);
        disk.edit(&segment(1), damage);
        assert!(matches!(store.get(&block.hash()), Err(StoreError::Damaged(_))));
        put_durable(&store, &block);
        assert_here(&store, &block);
    }
}

#[test]
fn quarantine_is_bounded_and_the_oldest_copy_goes() {
    let disk = TestDisk::new();
    let store = open(&disk);
    for n in 0..10 {
        let block = block(n, 30_000);
        store.put(std::slice::from_ref(&block)).unwrap();
        damage(&disk, &block);
        assert!(store.replace(&block, found_bad(&store, &block)).unwrap().is_some());
        assert_here(&store, &block);
    }
    let kept: Vec<_> = (0..10).filter(|n| !disk.paths(&format!("-{n:08}")).is_empty()).collect();
    assert_eq!(kept, [7, 8, 9]);
    assert_eq!(store.statistics().quarantined, 10);
}

#[test]
fn only_condemned_blocks_with_an_older_epoch_are_deleted() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let blocks = [block_at(1, 100, Epoch(1)), block_at(2, 100, Epoch(5)), block_at(3, 100, Epoch(4))];
    store.put(&blocks).unwrap();
    store.put(&[block_at(1, 100, Epoch(7))]).unwrap();
    let hashes: Vec<_> = blocks.iter().map(CheckedBlock::hash).collect();
    assert_eq!(store.delete(&hashes, Epoch(5)).unwrap(), 1);
    assert_eq!(store.has(&hashes).unwrap(), [true, true, false]);
    assert_eq!(store.delete(&hashes, Epoch(8)).unwrap(), 2);
    assert_eq!(store.statistics().blocks, 0);
    drop(store);
    disk.remove(&index_path()).unwrap();
    assert_eq!(open(&disk).list(None, 10).unwrap(), (vec![], true));
}

#[test]
fn segments_in_which_nothing_lives_are_removed() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let blocks: Vec<_> = (0..20).map(|n| block(n, 30_000)).collect();
    for block in &blocks {
        store.put(std::slice::from_ref(block)).unwrap();
    }
    let before = disk.paths(".seg").len();
    let hashes: Vec<_> = blocks[..15].iter().map(CheckedBlock::hash).collect();
    store.delete(&hashes, Epoch(1)).unwrap();
    store.checkpoint().unwrap();
    store.checkpoint().unwrap();
    assert!(disk.paths(".seg").len() + 4 <= before, "{before} before");
    for disk in [disk.after_kill(), disk.after_power_cut(1)] {
        drop(disk.remove(&index_path()));
        let store = open(&disk);
        blocks[..15].iter().for_each(|block| assert_missing(&store, block));
        blocks[15..].iter().for_each(|block| assert_here(&store, block));
    }
}

#[test]
fn puts_at_the_same_time_share_a_sync() {
    let disk = TestDisk::new();
    let store = open(&disk);
    put_durable(&store, &block(1000, 10));
    let before = disk.segment_syncs();
    disk.hold_syncs(true);
    std::thread::scope(|scope| {
        for n in 0..16 {
            let store = &store;
            scope.spawn(move || put_durable(store, &block(n, 100)));
        }
        while store.statistics().blocks < 17 {
            std::thread::yield_now();
        }
        disk.hold_syncs(false);
    });
    let syncs = disk.segment_syncs() - before;
    assert!((1..=2).contains(&syncs), "{syncs} syncs for 16 durable puts");
}

#[test]
fn a_store_that_is_dropped_in_the_middle_of_a_checkpoint_ends() {
    let disk = TestDisk::new();
    let options = StoreOptions { flushes_per_checkpoint: 1, ..options() };
    let store = Store::open(Arc::clone(&disk) as Arc<dyn Disk>, Path::new(DIRECTORY), options).unwrap();
    disk.hold_syncs(true);
    let first = store.put(&[block(1, 5000)]).unwrap();
    store.inner.gate.request(first);
    until("the first block is being synced", || disk.syncs_held() == 1);
    let second = store.put(&[block(2, 5000)]).unwrap();
    store.inner.housekeeper.hurry();
    until("a checkpoint waits for the second", || store.inner.gate.is_wanted(second));
    let inner = Arc::clone(&store.inner);
    let dropping = std::thread::spawn(move || drop(store));
    until("the store is being dropped", || inner.housekeeper.state.lock().stopping);
    disk.hold_syncs(false);
    until("the store has ended", || dropping.is_finished());
    dropping.join().unwrap();
    assert!(inner.gate.durable() >= second.0, "the checkpoint was finished");
    assert!(inner.gate.wait(Ticket(second.0 + 1)).is_err(), "nobody waits for a store that has stopped");
}

#[track_caller]
fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "waited in vain until {what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_slow_write_holds_up_only_those_who_write() {
    let store = open(&TestDisk::new());
    put_durable(&store, &block(1, 100));
    let before = store.ticket();
    let slow = store.inner.tail.lock();
    assert_eq!(store.ticket(), before);
    assert!(store.try_put(&[block(2, 100)]).is_none());
    assert_eq!(store.has(&[block(1, 100).hash()]).unwrap(), [true]);
    drop(slow);
    let put = store.try_put(&[block(2, 100)]).unwrap().unwrap();
    assert!(put > before && store.ticket() == put);
}

#[test]
fn a_duplicate_is_durable_only_after_the_sync_of_the_first() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let block = block(1, 100);
    store.put(std::slice::from_ref(&block)).unwrap();
    put_durable(&store, &block);
    assert_here(&open(&disk.after_power_cut(5)), &block);
}

#[test]
fn a_full_store_refuses_and_says_so() {
    let disk = TestDisk::new();
    let limited = StoreOptions { capacity_bytes: Some(10_000), ..options() };
    let store = Store::open(Arc::clone(&disk) as Arc<dyn Disk>, Path::new(DIRECTORY), limited).unwrap();
    store.put(&[block(1, 6000)]).unwrap();
    assert!(matches!(store.put(&[block(2, 6000)]), Err(StoreError::Full)));
    store.put(&[block(1, 6000)]).unwrap();
    store.put(&[block(3, 4000)]).unwrap();
    drop(store);
    disk.set_free(options().reserve_bytes + 5000);
    let store = open(&disk);
    assert!(matches!(store.put(&[block(4, 6000)]), Err(StoreError::Full)));
    store.put(&[block(5, 3000)]).unwrap();
    assert!(matches!(store.put(&[block(6, 3000)]), Err(StoreError::Full)));
}

#[test]
fn a_failed_sync_stops_the_store_for_good_and_changes_the_boot_id() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let boot = store.boot();
    let ticket = store.put(&[block(1, 100)]).unwrap();
    // The first call only writes ahead.
    disk.fail(Fault::Once(2, libc::EIO));
    let error = store.wait_durable(ticket).unwrap_err();
    assert!(error.to_string().contains("sync of the block store failed"), "{error}");
    assert!(matches!(store.put(&[block(2, 100)]), Err(StoreError::Failed(_))));
    assert!(matches!(store.wait_durable(ticket), Err(StoreError::Failed(_))));
    drop(store);
    assert_ne!(open(&disk).boot(), boot);
}

/// A life of a store: what it was promised, by number of block.
#[derive(Debug, Default)]
struct Promises {
    visible: BTreeSet<u32>,
    durable: BTreeSet<u32>,
    gone: BTreeSet<u32>,
}

fn life_block(n: u32) -> CheckedBlock {
    block_at(n, [50, 3000, 20_000, 70_000][n as usize % 4], Epoch(u64::from(n % 2)))
}

/// Puts, deletes, syncs and checkpoints; goes on after a refusal, as a server does.
fn live(disk: &Arc<TestDisk>) -> (Promises, bool) {
    let mut promises = Promises::default();
    let Ok(store) = Store::open(Arc::clone(disk) as Arc<dyn Disk>, Path::new(DIRECTORY), options()) else {
        return (promises, false);
    };
    for n in 0..16 {
        if store.put(&[life_block(n)]).is_ok() {
            promises.visible.insert(n);
        }
        if n % 3 == 2 && store.wait_durable(store.ticket()).is_ok() {
            promises.durable.extend(promises.visible.iter());
        }
        if n % 5 == 4 {
            // From here on it may be there or not.
            let old = n - 3;
            promises.visible.remove(&old);
            promises.durable.remove(&old);
            if store.delete(&[life_block(old).hash()], Epoch(2)).is_ok() {
                promises.gone.insert(old);
            }
        }
        if n % 7 == 6 {
            drop(store.checkpoint());
        }
        if n % 8 == 7 {
            drop(store.compact());
        }
        if n % 4 == 1 {
            drop(store.flush());
        }
    }
    let works = store.wait_durable(store.ticket()).is_ok();
    (promises, works)
}

fn assert_kept(disk: &Arc<TestDisk>, promised: &BTreeSet<u32>, what: &str) {
    let store = open(disk);
    for n in promised {
        let block = life_block(*n);
        assert_eq!(store.get(&block.hash()).ok().as_ref(), Some(block.bytes()), "block {n} after {what}");
        store.verify(&block.hash()).unwrap();
    }
    for (hash, _) in store.list(None, 1000).unwrap().0 {
        store.verify(&hash).unwrap_or_else(|error| {
            panic!(
                "{hash:?} is listed but {error}, after {what}; {:?} {:?} {:?}",
                store.inner.index.get(&hash),
                disk.paths(""),
                store.recovery()
            )
        });
    }
    put_durable(&store, &block(12_345, 30_000));
}

#[test]
fn small_dead_blocks_give_their_space_back_and_their_neighbours_live_on() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let blocks: Vec<_> = (0..300).map(|n| block_at(n, 3000, Epoch(u64::from(n % 3)))).collect();
    blocks.iter().for_each(|block| put_durable(&store, block));
    let size = || disk.paths(".seg").iter().map(|path| disk.edit(path, |bytes| bytes.len())).sum::<usize>();
    let full = size();
    let (dead, living): (Vec<_>, Vec<_>) = blocks.iter().enumerate().partition(|(n, _)| n % 4 != 0);
    let hashes: Vec<_> = dead.iter().map(|(_, block)| block.hash()).collect();
    assert_eq!(store.delete(&hashes, Epoch(9)).unwrap(), 225);
    store.checkpoint().unwrap();
    assert!(size() > full / 10 * 9, "no segment is dead as a whole");
    store.compact().unwrap();
    (0..2).for_each(|_| store.checkpoint().unwrap());
    assert!(size() < full / 2, "{} of {full} bytes are still taken", size());
    let check = |store: &Store| {
        assert_eq!(store.statistics().blocks, 75);
        for (n, block) in &living {
            store.verify(&block.hash()).unwrap();
            let listed = store.list(None, 1000).unwrap().0;
            assert!(listed.contains(&(block.hash(), Epoch(*n as u64 % 3))), "with its stamp");
        }
        dead.iter().for_each(|(_, block)| assert_missing(store, block));
    };
    check(&store);
    drop(store);
    check(&open(&disk));
    disk.paths("index.redb").iter().for_each(|path| disk.edit(path, Vec::clear));
    check(&open(&disk));
}

#[test]
fn rewriting_writes_no_more_than_was_new_and_dead_space_stays_within_its_bound() {
    const LENGTH: u32 = 3000;
    let disk = TestDisk::new();
    let store = open(&disk);
    let size = || disk.paths(".seg").iter().map(|path| disk.edit(path, |bytes| bytes.len() as u64)).sum::<u64>();
    let mut living: Vec<CheckedBlock> = Vec::new();
    let (mut random, mut made, mut most) = (7_u64, 0_u32, 0);
    for _ in 0..40 {
        let mut dead = Vec::new();
        for _ in 0..100 {
            made += 1;
            let new = block(made, usize::try_from(LENGTH).unwrap());
            put_durable(&store, &new);
            living.push(new);
            if living.len() > 300 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                dead.push(living.swap_remove(usize::try_from(random >> 33).unwrap() % living.len()).hash());
            }
        }
        store.delete(&dead, Epoch(9)).unwrap();
        store.checkpoint().unwrap();
        store.compact().unwrap();
        (0..2).for_each(|_| store.checkpoint().unwrap());
        let segments = disk.paths(".seg").len() as u64;
        let bound = 2 * living.len() as u64 * (u64::from(LENGTH) + 100)
            + segments * options().waste_bytes
            + options().segment_bytes;
        assert!(size() <= bound, "{} bytes are taken, {bound} may be", size());
        most = most.max(size());
    }
    let (new, (written, zeroes)) = (u64::from(made) * u64::from(LENGTH), disk.segment_bytes());
    assert!(written > new * 5 / 4, "{written} of {new}: nothing had to be rewritten, so nothing is shown");
    assert!(written < new * 2 * 21 / 20, "{written} bytes were written for {new} new ones");
    assert!(zeroes < written * 21 / 20, "{zeroes} zeroes went ahead of {written} bytes");
    assert!(most > 300 * u64::from(LENGTH) * 3 / 2, "{most}: nothing was ever dead, so nothing is shown");
    living.iter().for_each(|block| assert_here(&store, block));
}

#[test]
fn compaction_goes_on_when_a_segment_of_its_plan_has_died_meanwhile() {
    let disk = TestDisk::new();
    let store = open(&disk);
    let blocks: Vec<_> = (0..300).map(|n| block(n, 3000)).collect();
    blocks.iter().for_each(|block| put_durable(&store, block));
    let hashes: Vec<_> = blocks.iter().map(CheckedBlock::hash).collect();
    let (most, rest): (Vec<_>, Vec<_>) = hashes.iter().enumerate().partition(|(n, _)| n % 4 != 0);
    let most: Vec<_> = most.into_iter().map(|(_, hash)| *hash).collect();
    store.delete(&most, Epoch(9)).unwrap();
    store.checkpoint().unwrap();
    let mut compaction = super::compact::Compaction::default();
    store.inner.plan_compaction(&mut compaction).unwrap();
    assert!(!compaction.is_done());
    // All that lives in the first of them goes, and its file with it.
    let dying: Vec<_> = rest.iter().take(20).map(|(_, hash)| **hash).collect();
    store.delete(&dying, Epoch(9)).unwrap();
    (0..2).for_each(|_| store.checkpoint().unwrap());
    assert!(disk.paths("0000000000000001.seg").is_empty());
    store.inner.compact(&mut compaction, u64::MAX).unwrap();
    assert!(compaction.is_done());
    assert_eq!(store.statistics().blocks, 55);
    blocks.iter().skip(80).step_by(4).for_each(|block| assert_here(&store, block));
}

#[test]
fn a_stamp_is_raised_with_the_block_as_it_is() {
    let store = open(&TestDisk::new());
    let block = block_at(1, 3000, Epoch(2));
    put_durable(&store, &block);
    assert_eq!(store.raise(&block.hash(), Epoch(1)).unwrap(), Some(store.ticket()));
    assert!(store.raise(&block.hash(), Epoch(7)).unwrap().is_some());
    assert_eq!(store.list(None, 2).unwrap().0, [(block.hash(), Epoch(7))]);
    assert_eq!(store.delete(&[block.hash()], Epoch(7)).unwrap(), 0);
    assert_here(&store, &block);
    assert_eq!(store.raise(&BlockHash([1; 32]), Epoch(7)).unwrap(), None);
}

#[test]
fn a_power_cut_at_any_call_keeps_what_was_durable() {
    for n in 1.. {
        let disk = TestDisk::new();
        disk.fail(Fault::PowerCut(n));
        let (promises, _) = live(&disk);
        for seed in 0..3 {
            assert_kept(&disk.after_power_cut(seed * 1000 + n), &promises.durable, &format!("power cut {n}/{seed}"));
        }
        if disk.calls() < n {
            assert!(n > 50, "only {n} calls: the test does not test much");
            break;
        }
    }
}

#[test]
fn a_disk_that_refuses_every_write_stops_the_store_and_one_that_is_full_does_not() {
    let disk = TestDisk::new();
    let store = open(&disk);
    put_durable(&store, &block(1, 500));
    let put = |n| store.put(&[block(n, 500)]);
    for errno in [libc::ENOSPC, libc::EMFILE] {
        disk.fail(Fault::Segments(errno));
        let refused: Vec<_> = (0..10).map(|n| put(100 + n).expect_err("it cannot be written")).collect();
        assert!(!refused.iter().any(|error| matches!(error, StoreError::Failed(_))), "{refused:?}");
    }
    disk.fail(Fault::Segments(libc::EROFS));
    assert!(matches!(put(2), Err(StoreError::Io(_))) && matches!(put(3), Err(StoreError::Io(_))));
    disk.fail(Fault::None);
    put(4).expect("it works again");
    disk.fail(Fault::Segments(libc::EROFS));
    let refused: Vec<_> = (5..10).map(|n| put(n).expect_err("it cannot be written")).collect();
    assert!(matches!(&refused[3], StoreError::Failed(why) if why.contains("cannot be written")), "{refused:?}");
    drop(store);
    let store = open(&disk.after_kill());
    assert_eq!(store.get(&block(4, 500).hash()).unwrap(), *block(4, 500).bytes(), "what was written before is there");
}

#[test]
fn what_a_failed_sync_left_in_memory_alone_is_written_again_before_it_counts_as_durable() {
    let blocks = [block(1, 500), block(2, 5000), block(3, 70_000)];
    for n in 1.. {
        let disk = TestDisk::new();
        let store = open(&disk);
        put_durable(&store, &blocks[0]);
        disk.fail(Fault::Once(n, libc::EIO));
        for block in &blocks[1..] {
            if let Ok(ticket) = store.put(std::slice::from_ref(block)) {
                // Who put it does not hear that it is durable, and puts it again.
                drop(store.wait_durable(ticket));
            }
        }
        if disk.calls() < n {
            assert!(n > 3, "only {n} calls");
            break;
        }
        drop(store);
        let disk = disk.after_kill();
        let store = open(&disk);
        blocks.iter().for_each(|block| put_durable(&store, block));
        let store = open(&disk.after_power_cut(n));
        for block in &blocks {
            assert_eq!(&store.get(&block.hash()).unwrap(), block.bytes(), "error at call {n}");
        }
    }
}

#[test]
fn an_index_that_had_no_space_is_not_rebuilt() {
    let blocks = [block(1, 500), block(2, 500)];
    for n in 1.. {
        let disk = TestDisk::new();
        let store = open(&disk);
        put_durable(&store, &blocks[0]);
        store.checkpoint().unwrap();
        put_durable(&store, &blocks[1]);
        disk.fail(Fault::Once(n, libc::ENOSPC));
        let checkpointed = store.checkpoint();
        if disk.calls() < n {
            assert!(checkpointed.is_ok() && n > 3, "{checkpointed:?} after {n} calls");
            break;
        }
        drop(store);
        let store = open(&disk.after_kill());
        // Of a file that could not be synced nothing is known.
        assert!(!store.recovery().rebuilt || disk.sync_failed(), "no space at call {n}: {checkpointed:?}");
        for block in &blocks {
            assert_eq!(&store.get(&block.hash()).unwrap(), block.bytes(), "no space at call {n}");
        }
    }
}

#[test]
fn an_error_at_any_call_keeps_every_promise() {
    for errno in [libc::EIO, libc::ENOSPC] {
        for n in 1.. {
            let disk = TestDisk::new();
            disk.fail(Fault::Once(n, errno));
            let (promises, _) = live(&disk);
            let what = format!("error {errno} at call {n}");
            assert_kept(&disk.after_kill(), &promises.visible, &what);
            assert_kept(&disk.after_power_cut(n), &promises.durable, &what);
            if disk.calls() < n {
                break;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_in_a_segment_make_the_store_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..3000),
        header in any::<bool>(),
        flips in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..20),
    ) {
        let disk = TestDisk::new();
        let store = open(&disk);
        let blocks: Vec<_> = (0..6).map(|n| block(n, 500)).collect();
        blocks.iter().for_each(|block| put_durable(&store, block));
        drop(store);
        let hostile = disk.after_kill();
        hostile.remove(&index_path()).unwrap();
        hostile.edit(&segment(1), |good| {
            for (position, value) in &flips {
                let position = usize::from(*position) % (used(good) + 100).min(good.len());
                good[position] ^= value;
            }
        });
        let mut other = if header { format::encode_segment_header(2, &[1; 32]).to_vec() } else { Vec::new() };
        other.extend(bytes);
        hostile.put_file(&segment(2), other);
        let store = open(&hostile);
        for (hash, _) in store.list(None, 100).unwrap().0 {
            prop_assert!(blocks.iter().any(|block| block.hash() == hash));
        }
        put_durable(&store, &block(77, 10));
    }
}

/// Not a test: `cargo test --profile checked -p holdfast-server --lib -- --ignored --nocapture speed`.
#[test]
#[ignore = "measures"]
fn speed_of_the_store() {
    use std::time::Instant;
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let store = Store::open(Arc::new(RealDisk), directory.path(), StoreOptions::default()).unwrap();
    let report = |what: &str, count: u32, bytes: u32, start: Instant| {
        let seconds = start.elapsed().as_secs_f64();
        eprintln!(
            "{what}: {:.0}/s, {:.0} MB/s, {:.1} us each",
            f64::from(count) / seconds,
            f64::from(count) * f64::from(bytes) / 1e6 / seconds,
            seconds * 1e6 / f64::from(count)
        );
    };
    let large: Vec<Bytes> = (0..1000).map(|n| block(n, 1 << 20).bytes().clone()).collect();
    let hashes: Vec<_> = large.iter().map(|bytes| BlockHash::of(bytes)).collect();
    let start = Instant::now();
    let checked: Vec<_> =
        large.iter().zip(&hashes).map(|(b, h)| CheckedBlock::verify(*h, b.clone(), Epoch(0)).unwrap()).collect();
    report("check 1 MiB", 1000, 1 << 20, start);
    let start = Instant::now();
    for block in &checked {
        store.put(std::slice::from_ref(block)).unwrap();
    }
    report("put 1 MiB", 1000, 1 << 20, start);
    store.wait_durable(store.ticket()).unwrap();
    report("put 1 MiB with the final sync", 1000, 1 << 20, start);
    let start = Instant::now();
    hashes.iter().for_each(|hash| drop(store.get(hash).unwrap()));
    report("get 1 MiB", 1000, 1 << 20, start);
    let start = Instant::now();
    for n in 0..20_000u32 {
        let range = ByteRange { offset: n % 250 * 4096, length: 4096 };
        store.get_range(&hashes[n as usize % 1000], range).unwrap();
    }
    report("get a range of 4 KiB", 20_000, 4096, start);
    let small: Vec<_> = (0..40_000).map(|n| block(n, 4096)).collect();
    let start = Instant::now();
    for block in &small {
        store.put(std::slice::from_ref(block)).unwrap();
    }
    report("put 4 KiB", 40_000, 4096, start);
    let batched: Vec<_> = (100_000..140_000).map(|n| block(n, 4096)).collect();
    let start = Instant::now();
    for blocks in batched.chunks(64) {
        store.put(blocks).unwrap();
    }
    report("put 4 KiB, 64 in a batch", 40_000, 4096, start);
    store.wait_durable(store.ticket()).unwrap();
    let start = Instant::now();
    (200_000..200_500).for_each(|n| put_durable(&store, &block(n, 4096)));
    report("durable put of 4 KiB, one thread", 500, 4096, start);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let store = &store;
            scope.spawn(move || (0..200).for_each(|n| put_durable(store, &block(300_000 + thread * 1000 + n, 4096))));
        }
    });
    report("durable put of 4 KiB, 8 threads", 1600, 4096, start);
    let start = Instant::now();
    small.iter().for_each(|block| drop(store.get(&block.hash()).unwrap()));
    report("get 4 KiB", 40_000, 4096, start);
    let start = Instant::now();
    store.close().unwrap();
    eprintln!("close: {:?}", start.elapsed());
    let start = Instant::now();
    drop(Store::open(Arc::new(RealDisk), directory.path(), StoreOptions::default()).unwrap());
    eprintln!("open: {:?}", start.elapsed());
    Disk::remove(&RealDisk, &directory.path().join(INDEX_FILE)).unwrap();
    let start = Instant::now();
    let store = Store::open(Arc::new(RealDisk), directory.path(), StoreOptions::default()).unwrap();
    eprintln!("rebuild of {} blocks: {:?}", store.statistics().blocks, start.elapsed());
}

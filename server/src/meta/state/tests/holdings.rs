//! What servers are on record for: in pages, as digests, and of earlier versions.

use holdfast_common::inventory::{BucketDigest, bucket_of};

use super::{
    super::{
        blocks,
        holdings::{Page, ROWS_MAX, adopt, held_after, held_in, is_empty},
        rows::BlockRow,
        tables::{key, past, scan},
    },
    *,
};

const FIRST: ServerId = ServerId(1);
const SECOND: ServerId = ServerId(2);

/// A hash in a bucket, and after those with smaller numbers.
fn numbered(bucket: u8, number: u64) -> BlockHash {
    let mut hash = [0; 32];
    hash[0] = bucket;
    hash[1..9].copy_from_slice(&number.to_be_bytes());
    BlockHash(hash)
}

fn put(world: &mut World, hashes: impl IntoIterator<Item = BlockHash>, holders: &[ServerId]) {
    world.transact(|tables| {
        for hash in hashes {
            let row = BlockRow { holders: holders.to_vec(), ..BlockRow::new(1, Epoch(0)) };
            blocks::store(tables, hash, None, row)?;
        }
        Ok(())
    });
}

fn all(world: &World, server: ServerId, count: usize) -> Vec<BlockHash> {
    let (view, mut all, mut after) = (world.view(), Vec::new(), None);
    loop {
        let page = held_after(&view, server, after, count).unwrap();
        assert!(page.blocks.len() <= count && page.next.is_none_or(|next| Some(next) > after));
        all.extend(page.blocks);
        after = page.next;
        if after.is_none() {
            return all;
        }
    }
}

#[test]
fn the_blocks_of_a_server_are_found_in_pages_of_any_length() {
    let mut world = World::new();
    let [mine, of_both, of_the_other] = [0, 1, 2]
        .map(|turn| (0..60).map(|n| numbered(u8::try_from(n % 5 * 60).unwrap(), n * 3 + turn)).collect::<Vec<_>>());
    put(&mut world, mine.clone(), &[FIRST]);
    put(&mut world, of_both.clone(), &[FIRST, SECOND]);
    put(&mut world, of_the_other, &[SECOND]);
    let mut expected = [mine, of_both].concat();
    expected.sort_unstable();
    for count in [1, 7, 120, 1000] {
        assert_eq!(all(&world, FIRST, count), expected, "pages of {count}");
    }
    assert_eq!(all(&world, ServerId(3), 10), []);
    let of_bucket: Vec<BlockHash> = expected.iter().copied().filter(|hash| bucket_of(hash) == 60).collect();
    let page = held_in(&world.view(), FIRST, 60, None, 1000).unwrap();
    assert_eq!(page, Page { blocks: of_bucket, next: None });
}

#[test]
fn a_page_ends_after_so_many_rows_also_if_they_are_all_of_others() {
    let mut world = World::new();
    let others = ROWS_MAX as u64 + 5;
    put(&mut world, (0..others).map(|number| numbered(9, number)), &[SECOND]);
    put(&mut world, (0..others).map(|number| numbered(8, number)), &[SECOND]);
    put(&mut world, [numbered(9, others)], &[FIRST]);
    let view = world.view();
    let first = held_after(&view, FIRST, None, 10).unwrap();
    // Nothing of bucket 8, in which the server has nothing, was read.
    assert_eq!(first, Page { blocks: vec![], next: Some(numbered(9, ROWS_MAX as u64 - 1)) });
    let second = held_after(&view, FIRST, first.next, 10).unwrap();
    assert_eq!(second, Page { blocks: vec![numbered(9, others)], next: None });
}

#[test]
fn digests_follow_what_comes_and_goes_and_leave_nothing_behind() {
    let mut world = World::new();
    let hashes: Vec<BlockHash> = (0..9).map(|n| numbered(4, n)).collect();
    put(&mut world, hashes.clone(), &[FIRST, SECOND]);
    assert_eq!(world.view().holding(FIRST, 4).unwrap(), BucketDigest::of(&hashes));
    assert_eq!(world.view().holding(FIRST, 5).unwrap(), BucketDigest::default());
    world.transact(|tables| {
        for hash in &hashes {
            blocks::unhold(tables, *hash, FIRST)?;
        }
        assert!(is_empty(tables, FIRST)? && !is_empty(tables, SECOND)?, "also before it is written");
        Ok(())
    });
    let view = world.view();
    assert!(is_empty(&view, FIRST).unwrap() && !is_empty(&view, SECOND).unwrap());
    assert_eq!(view.holding(SECOND, 4).unwrap(), BucketDigest::of(&hashes));
    let mut rows = 0;
    scan(view.blocks(), &[key::HOLDING], &past(&[key::HOLDING]), |_, _| {
        rows += 1;
        Ok(std::ops::ControlFlow::Continue(()))
    })
    .unwrap();
    assert_eq!(rows, 1);
}

/// As versions before wrote it: a row for each server and block, and no digests.
pub(crate) fn age(world: &mut World) {
    let rows = blocks::rows_after(&world.view(), None, usize::MAX).unwrap();
    world.transact(|tables| {
        for (hash, row) in &rows {
            for holder in &row.holders {
                let key = [&key::OLD_HOLDINGS, holder.0.to_be_bytes().as_slice(), &hash.0].concat();
                tables.put_blocks(&key, &[])?;
                tables.remove_blocks(&key::holding(*holder, bucket_of(hash)))?;
            }
        }
        Ok(())
    });
}

#[test]
fn digests_that_an_earlier_version_has_not_kept_are_not_believed() {
    let mut world = World::new();
    put(&mut world, [numbered(3, 1)], &[FIRST]);
    // There are digests, and a version before them has written since.
    world.transact(|tables| {
        let row = BlockRow { holders: vec![FIRST], ..BlockRow::new(1, Epoch(0)) };
        tables.put_blocks(&key::block(numbered(3, 2)), &row.encode())?;
        for hash in [numbered(3, 1), numbered(3, 2)] {
            tables.put_blocks(&[&key::OLD_HOLDINGS, FIRST.0.to_be_bytes().as_slice(), &hash.0].concat(), &[])?;
        }
        Ok(())
    });
    world.transact(initialize);
    let expected = BucketDigest::of(&[numbered(3, 1), numbered(3, 2)]);
    assert_eq!(world.view().holding(FIRST, 3).unwrap(), expected);
}

#[test]
fn what_an_earlier_version_wrote_is_taken_over() {
    let mut world = World::new();
    put(&mut world, (0..300).map(|n| BlockHash::of(&u64::to_le_bytes(n))), &[FIRST, SECOND]);
    put(&mut world, (300..600).map(|n| BlockHash::of(&u64::to_le_bytes(n))), &[SECOND]);
    let (first, second) = (all(&world, FIRST, 50), all(&world, SECOND, 50));
    assert_eq!((first.len(), second.len()), (300, 600));
    age(&mut world);
    assert_eq!(all(&world, FIRST, 50), [], "nothing is found without digests");
    world.transact(initialize);
    assert_eq!((all(&world, FIRST, 50), all(&world, SECOND, 50)), (first.clone(), second.clone()));
    let view = world.view();
    let mut old = 0;
    scan(view.blocks(), &key::OLD_HOLDINGS, &past(&key::OLD_HOLDINGS), |_, _| {
        old += 1;
        Ok(std::ops::ControlFlow::Continue(()))
    })
    .unwrap();
    assert_eq!(old, 0);
    world.transact(adopt);
    assert_eq!((all(&world, FIRST, 50), all(&world, SECOND, 50)), (first, second), "again does nothing");
}

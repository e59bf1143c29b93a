//! That each invariant can be seen to be broken.

use holdfast_common::{Replicas, inventory::bucket_of};

use super::{
    super::{blocks, rows, tables::key},
    *,
};

pub(super) const DIRECTORY: Ino = Ino(2);
pub(super) const BELOW: Ino = Ino(3);
pub(super) const FILE: Ino = Ino(4);
pub(super) const SHORT: Ino = Ino(5);
pub(super) const NOBODY: Ino = Ino(900);

/// A directory in a directory, a file whose block has all its copies, and one whose block is owed one.
pub(super) fn world() -> World {
    let mut world = World::new();
    let made = [
        world.make(Ino::ROOT, "directory", Kind::Directory),
        world.make(DIRECTORY, "below", Kind::Directory),
        world.make(DIRECTORY, "file", Kind::File),
        world.make(Ino::ROOT, "short", Kind::File),
    ];
    assert_eq!(made, [DIRECTORY, BELOW, FILE, SHORT].map(Ok));
    world.commit(vec![file(FILE, vec![(0, piece(1, 0, 100, 0))], 0)], vec![block(1, 100, 3)]).unwrap();
    world.commit(vec![file(SHORT, vec![(0, piece(2, 0, 50, 0))], 0)], vec![block(2, 50, 2)]).unwrap();
    world.check();
    world
}

pub(super) fn inode(
    tables: &mut Tables<'_>,
    ino: Ino,
    edit: impl FnOnce(&mut rows::Inode),
) -> Result<(), StorageError> {
    let mut inode = tables.inode(ino)?.expect("it is there");
    edit(&mut inode);
    tables.put_inode(ino, inode);
    Ok(())
}

pub(super) fn block_row(
    tables: &mut Tables<'_>,
    hash: BlockHash,
    edit: impl FnOnce(&mut rows::BlockRow),
) -> Result<(), StorageError> {
    let mut row = blocks::block(tables, hash)?.expect("it is there");
    edit(&mut row);
    tables.put_blocks(&key::block(hash), &row.encode())
}

pub(super) fn chunk(tables: &mut Tables<'_>, pieces: &[Piece], replicas: Replicas) -> Result<(), StorageError> {
    tables.put_tree(&key::pieces(FILE, ChunkIndex(0)), &rows::encode_pieces(pieces, replicas))
}

pub(super) fn dentry(ino: Ino, kind: Kind, cookie: u64) -> rows::Dentry {
    rows::Dentry { ino, kind, cookie }
}

pub(super) type Damage = fn(&mut Tables<'_>) -> Result<(), StorageError>;

/// Damages the tables, and looks for a sentence that has `part` in it.
#[track_caller]
fn assert_told(part: &str, damage: Damage) {
    let mut world = world();
    world.transact(damage);
    let told = super::violations(&world.view(), 1000).unwrap();
    assert!(told.iter().any(|sentence| sentence.contains(part)), "nothing of {part:?} in {told:?}");
    assert_eq!(super::violations(&world.view(), 1).unwrap().len(), 1, "no more than is wanted");
}

#[test]
fn names_and_inodes_that_disagree_are_told() {
    assert_told("\"file\" in directory 2 names inode 4, which is not there", |tables| {
        tables.remove_inode(FILE);
        Ok(())
    });
    assert_told("says Directory, inode 4 is File", |tables| {
        tables.put_tree(&key::dentry(DIRECTORY, b"file"), &dentry(FILE, Kind::Directory, 2).encode())
    });
    assert_told("\"odd\" is in 4, which is not a directory in the tree", |tables| {
        tables.put_tree(&key::dentry(FILE, b"odd"), &dentry(SHORT, Kind::File, 1).encode())
    });
    assert_told("\"file\" in directory 2 is not under its cookie 2", |tables| {
        tables.remove_tree(&key::cookie(DIRECTORY, 2))
    });
    assert_told("there are 3 cookies for 2 names in 2", |tables| {
        tables.put_tree(&key::cookie(DIRECTORY, 77), &dentry(FILE, Kind::File, 77).encode_with(b"file"))
    });
    assert_told("of directory 2 will be given twice", |tables| inode(tables, DIRECTORY, |it| it.cookie_next = 1));
    assert_told("there are rows of inode 900, which is not there", |tables| {
        tables.put_tree(&key::xattr(NOBODY, b"user.a"), b"b")
    });
}

#[test]
fn links_that_are_counted_wrong_are_told() {
    assert_told("inode 4 counts 2 links, and has 1 names", |tables| inode(tables, FILE, |it| it.nlink = 2));
    assert_told("inode 2 counts 2 links, and has 3", |tables| inode(tables, DIRECTORY, |it| it.nlink = 2));
    assert_told("inode 3 counts 2 links, and has 2 names", |tables| {
        tables.put_tree(&key::dentry(Ino::ROOT, b"again"), &dentry(BELOW, Kind::Directory, 9).encode())
    });
    assert_told("inode 4 has no name and is not listed as an orphan", |tables| inode(tables, FILE, |it| it.nlink = 0));
    assert_told("inode 4 is listed as an orphan, and is none", |tables| tables.put_state(&key::orphan(FILE), &[]));
    assert_told("inode 900 is listed as an orphan, and is none", |tables| tables.put_state(&key::orphan(NOBODY), &[]));
}

#[test]
fn directories_that_do_not_hang_together_are_told() {
    assert_told("directory 3 is not where it says, in 1", |tables| inode(tables, BELOW, |it| it.parent = Ino::ROOT));
    assert_told("does not hang from the root", |tables| inode(tables, DIRECTORY, |it| it.parent = BELOW));
    assert_told("directory 3 does not hang from the root", |tables| inode(tables, BELOW, |it| it.parent = BELOW));
    assert_told("directory 3 does not hang from the root", |tables| inode(tables, BELOW, |it| it.parent = NOBODY));
}

#[test]
fn sizes_and_pieces_that_are_wrong_are_told() {
    assert_told("inode 2 says size 7 and stored 0, and has 2 and 0", |tables| {
        inode(tables, DIRECTORY, |it| it.size = 7)
    });
    assert_told("inode 4 says size 100 and stored 7, and has 100 and 100", |tables| {
        inode(tables, FILE, |it| it.stored = 7)
    });
    assert_told("lies past the end of the file", |tables| inode(tables, FILE, |it| it.size = 99));
    assert_told("chunk 0 of inode 4 has 0 pieces", |tables| chunk(tables, &[], Replicas::INHERITED));
    assert_told("overlap or are out of order", |tables| {
        chunk(tables, &[piece(1, 10, 50, 0), piece(1, 20, 50, 0)], Replicas::INHERITED)
    });
    assert_told("is out of bounds of block", |tables| block_row(tables, hash(1), |row| row.length = 99));
    assert_told("is named by pieces and is not known", |tables| {
        chunk(tables, &[piece(9, 0, 100, 0)], Replicas::INHERITED)
    });
    assert_told("chunk 0 of inode 4 is counted under", |tables| {
        chunk(tables, &[piece(1, 0, 100, 0)], Replicas::new(2).expect("two is a number of copies"))
    });
}

#[test]
fn references_and_holders_that_are_counted_wrong_are_told() {
    assert_told("counts 2 pieces, and 1 name it", |tables| block_row(tables, hash(1), |row| row.refs = 2));
    assert_told("pieces by copies wanted", |tables| block_row(tables, hash(1), |row| row.refs_by_replicas[1] = 1));
    assert_told("what server 2 is on record for", |tables| {
        tables.remove_blocks(&key::holding(ServerId(2), bucket_of(&hash(1))))
    });
    assert_told("what server 3 is on record for", |tables| tables.change_holding(ServerId(3), &hash(1), false));
    assert_told("what server 9 is on record for", |tables| tables.change_holding(ServerId(9), &hash(1), true));
    assert_told("has no copy on record", |tables| block_row(tables, hash(1), |row| row.holders.clear()));
    assert_told("is held by a server that never was", |tables| {
        block_row(tables, hash(1), |row| row.holders.push(ServerId(900)))
    });
    assert_told("wants 2 copies, and should want 3", |tables| block_row(tables, hash(1), |row| row.wanted = 2));
}

#[test]
fn lists_that_disagree_with_their_blocks_are_told() {
    assert_told("the list of owed blocks disagree", |tables| tables.remove_blocks(&key::owed(hash(2))));
    assert_told("the list of owed blocks disagree", |tables| tables.put_blocks(&key::owed(hash(1)), &[]));
    assert_told("the list of last copies disagree", |tables| tables.put_blocks(&key::last_copy(hash(1)), &[]));
    assert_told("the list of those with too many copies disagree", |tables| {
        tables.put_blocks(&key::surplus(hash(1)), &[])
    });
    assert_told("the list of unnamed blocks disagree", |tables| tables.put_blocks(&key::unnamed(hash(1)), &[]));
    assert_told("the list of unnamed blocks disagree", |tables| block_row(tables, hash(1), |row| row.refs = 0));
    for list in [key::CONDEMNED, key::DELETED] {
        let mut world = world();
        world.transact(|tables| tables.put_blocks(&key::condemned(list, Epoch(0), hash(1)), &[]));
        let told = super::violations(&world.view(), 1000).unwrap();
        assert!(told[0].contains("the list of condemned blocks disagree, at epoch 0"), "{told:?}");
    }
    assert_told("is condemned, and 1 pieces name it", |tables| block_row(tables, hash(1), |row| row.condemned = true));
    assert_told("the list of condemned blocks disagree", |tables| {
        block_row(tables, hash(1), |row| row.condemned = true)
    });
    assert_told("is of epoch 900, the newest is 0", |tables| block_row(tables, hash(1), |row| row.epoch = Epoch(900)));
}

#[test]
fn counters_and_replies_that_are_wrong_are_told() {
    assert_told("are counted as", |tables| {
        tables.counters.inodes += 1;
        Ok(())
    });
    assert_told("are counted as", |tables| {
        tables.counters.owed += 1;
        Ok(())
    });
    assert_told("inode number 4 will be given twice", |tables| {
        tables.counters.ino_next = 4;
        Ok(())
    });
    assert_told("are forgotten, the newest is", |tables| {
        tables.counters.forgotten = Epoch(900);
        Ok(())
    });
    assert_told("is kept for session 900, which has no use for it", |tables| {
        tables.put_state(&key::reply(SessionId(900), Sequence(1)), &[])
    });
    assert_told("there are 2 instances for 1 sessions", |tables| {
        let node = NodeName { role: Role::Client, id: 900 };
        tables.put_state(&key::instance(node, &[9; 16]), &[])
    });
}

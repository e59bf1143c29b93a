//! What `fsck --repair` does about the metadata.

use holdfast_common::{
    Replicas,
    inventory::{BucketDigest, bucket_of},
    wire::{codec, meta::RenameMode},
};

use super::{
    super::{
        rows,
        tables::key,
        violations::{Correction, Differences, corrections},
    },
    violations::{BELOW, DIRECTORY, Damage, FILE, NOBODY, SHORT, block_row, chunk, dentry, inode, world},
    *,
};

/// Has one round of what follows from other rows made again: how many rows.
fn round(world: &mut World, corrections: Vec<Correction>, seen: Position) -> u64 {
    match world.command(Command::Correct { seen, corrections }) {
        Ok(Reply::Corrected { made }) => made,
        other => panic!("{other:?}"),
    }
}

fn look(world: &World) -> (Vec<Correction>, Position) {
    let view = world.view();
    (corrections(&view, 1000).unwrap(), view.counters().position)
}

/// As `fsck --repair` does; `between`: what others do after each look.
fn mend(world: &mut World, mut between: impl FnMut(&mut World)) -> Vec<String> {
    let (mut rounds, mut idle) = (0, 0);
    while idle < 3 && rounds < 20 {
        let (corrections, seen) = look(world);
        between(world);
        if corrections.is_empty() {
            break;
        }
        idle = if round(world, corrections, seen) == 0 { idle + 1 } else { 0 };
        rounds += 1;
    }
    assert!(rounds < 20, "something is made again for ever");
    violations(&world.view(), 1000).unwrap()
}

const DAMAGES: [Damage; 32] = [
    |tables| tables.remove_tree(&key::cookie(DIRECTORY, 2)),
    |tables| tables.put_tree(&key::cookie(DIRECTORY, 77), &dentry(FILE, Kind::File, 77).encode_with(b"file")),
    |tables| tables.put_tree(&key::cookie(DIRECTORY, 77), &dentry(NOBODY, Kind::File, 77).encode_with(b"gone")),
    // Two names with one cookie.
    |tables| {
        tables.put_tree(&key::dentry(DIRECTORY, b"file"), &dentry(FILE, Kind::File, 1).encode())?;
        tables.remove_tree(&key::cookie(DIRECTORY, 2))
    },
    |tables| {
        tables.put_tree(&key::cookie(DIRECTORY, 1), &dentry(FILE, Kind::File, 1).encode_with(b"file"))?;
        tables.put_tree(&key::dentry(DIRECTORY, b"file"), &dentry(FILE, Kind::File, 1).encode())?;
        tables.remove_tree(&key::cookie(DIRECTORY, 2))
    },
    |tables| inode(tables, DIRECTORY, |it| it.cookie_next = 1),
    |tables| inode(tables, BELOW, |it| it.parent_cookie = 99),
    |tables| inode(tables, BELOW, |it| it.parent = NOBODY),
    |tables| inode(tables, FILE, |it| it.nlink = 2),
    |tables| inode(tables, BELOW, |it| it.nlink = 0),
    |tables| inode(tables, FILE, |it| it.nlink = 0),
    |tables| inode(tables, FILE, |it| it.stored = 7),
    |tables| inode(tables, FILE, |it| it.stored = 1 << 40),
    |tables| inode(tables, DIRECTORY, |it| (it.nlink, it.size) = (2, 7)),
    |tables| tables.put_state(&key::orphan(FILE), &[]),
    |tables| tables.put_state(&key::orphan(NOBODY), &[]),
    |tables| block_row(tables, hash(1), |row| row.refs = 2),
    |tables| block_row(tables, hash(1), |row| row.refs = 0),
    |tables| block_row(tables, hash(1), |row| row.refs_by_replicas[1] = 1),
    |tables| block_row(tables, hash(1), |row| row.wanted = 2),
    |tables| block_row(tables, hash(1), |row| row.holders.truncate(1)),
    |tables| tables.remove_blocks(&key::holding(ServerId(2), bucket_of(&hash(1)))),
    |tables| tables.change_holding(ServerId(3), &hash(2), true),
    |tables| tables.remove_blocks(&key::owed(hash(2))),
    |tables| tables.put_blocks(&key::owed(hash(1)), &[]),
    |tables| tables.put_blocks(&key::last_copy(hash(1)), &[]),
    |tables| tables.put_blocks(&key::unnamed(hash(1)), &[0; 8]),
    |tables| tables.put_blocks(&key::condemned(key::DELETED, Epoch(0), hash(1)), &[]),
    |tables| tables.put_state(&key::reply(SessionId(900), Sequence(1)), &[]),
    |tables| {
        let counters = &mut tables.counters;
        (counters.inodes, counters.owed, counters.unnamed, counters.condemned) = (9, 0, 1, 1);
        counters.blocks_by_copies = [9, 0, 9, 0];
        Ok(())
    },
    |tables| {
        inode(tables, BELOW, |it| it.size = 3)?;
        tables.remove_blocks(&key::owed(hash(2)))?;
        block_row(tables, hash(2), |row| row.refs = 5)
    },
    // What is made before that is mended takes the place of others.
    |tables| {
        tables.counters.ino_next = 4;
        Ok(())
    },
];

#[test]
fn what_follows_from_other_rows_is_made_again() {
    for (number, damage) in DAMAGES.into_iter().enumerate() {
        let mut world = world();
        world.transact(damage);
        assert_ne!(violations(&world.view(), 1).unwrap(), Vec::<String>::new(), "damage {number}");
        assert_eq!(mend(&mut world, |_| ()), Vec::<String>::new(), "damage {number}");
        world.check();
    }
}

/// Names, links, pieces and copies come and go.
fn work(world: &mut World, turn: u64) {
    let name = format!("new {turn}");
    let made = world.make(DIRECTORY, &name, Kind::File).unwrap();
    let seed = 100 + u8::try_from(turn).unwrap();
    world.commit(vec![file(made, vec![(0, piece(seed, 0, 10, 0))], 0)], vec![block(seed, 10, 2)]).unwrap();
    // Of the block that is damaged in some of the worlds.
    world.commit(vec![file(made, vec![(1, piece(1, 0, 50, 0))], 0)], vec![]).unwrap();
    world.command(Command::HolderAdded { server: ServerId(3), blocks: vec![hash(seed)], epoch: Epoch(0) }).unwrap();
    world.make(DIRECTORY, &format!("directory {turn}"), Kind::Directory).unwrap();
    // And the damaged ones themselves, which may be refused.
    let link = format!("link {turn}").into_bytes();
    drop(world.mutate(Op::Link { ino: FILE, parent: DIRECTORY, name: link.clone() }));
    drop(world.mutate(Op::SetAttr { ino: FILE, set: SetAttr { size: Some(90 - turn), ..SetAttr::default() } }));
    drop(world.commit(vec![file(FILE, vec![(1, piece(seed, 0, 10, 0))], 0)], vec![]));
    if turn > 0 {
        drop(world.mutate(Op::Unlink { parent: DIRECTORY, name: link }));
        let name = format!("directory {}", turn - 1).into_bytes();
        world.mutate(Op::Rmdir { parent: DIRECTORY, name }).unwrap();
    }
    if let Some(before) = turn.checked_sub(1) {
        let name = format!("new {before}").into_bytes();
        drop(world.mutate(Op::Unlink { parent: DIRECTORY, name }));
    }
}

#[test]
fn changes_between_the_look_and_the_correction_do_not_matter() {
    for (number, damage) in DAMAGES.into_iter().take(DAMAGES.len() - 1).enumerate() {
        let mut world = world();
        world.transact(damage);
        let mut turn = 0;
        let left = mend(&mut world, |world| {
            work(world, turn);
            turn += 1;
        });
        assert!(left.is_empty(), "damage {number}: {left:?}");
        world.check();
    }
}

#[test]
fn a_difference_is_added_once() {
    let mut world = world();
    world.transact(|tables| inode(tables, FILE, |it| it.stored = 7));
    let (corrections, seen) = look(&world);
    assert_eq!(round(&mut world, corrections.clone(), seen), 1);
    assert_eq!(round(&mut world, corrections, seen), 0);
    world.check();
}

#[test]
fn what_nothing_else_says_is_left_as_it_is_and_told() {
    let told = |damage: Damage| {
        let mut world = world();
        world.transact(damage);
        (mend(&mut world, |_| ()), world)
    };
    let has = |told: &[String], part: &str| assert!(told.iter().any(|it| it.contains(part)), "{part:?} in {told:?}");

    let (sentences, world) = told(|tables| tables.remove_tree(&key::dentry(DIRECTORY, b"file")));
    has(&sentences, "inode 4 counts 1 links, and has 0 names");
    assert!(world.view().inode(FILE).unwrap().is_some_and(|inode| inode.nlink == 1));

    let (sentences, _) = told(|tables| {
        tables.remove_inode(FILE);
        Ok(())
    });
    has(&sentences, "names inode 4, which is not there");

    let (sentences, world) = told(|tables| block_row(tables, hash(1), |row| row.condemned = true));
    has(&sentences, "is condemned, and 1 pieces name it");
    assert_eq!(super::super::blocks::block(&world.view(), hash(1)).unwrap().map(|row| row.holders.len()), Some(3));

    // It may be full.
    let (sentences, mut world) = told(|tables| {
        tables.remove_tree(&key::dentry(DIRECTORY, b"below"))?;
        tables.remove_tree(&key::cookie(DIRECTORY, 1))?;
        inode(tables, DIRECTORY, |it| (it.nlink, it.size) = (2, 1))?;
        inode(tables, BELOW, |it| it.nlink = 0)
    });
    has(&sentences, "inode 3 has no name and is not listed as an orphan");
    world
        .command(Command::Reclaim { inos: super::super::orphans::orphans_after(&world.view(), Ino(0), 9).unwrap() })
        .unwrap();
    assert!(world.view().inode(BELOW).unwrap().is_some());
}

#[test]
fn what_only_a_person_can_judge_keeps_nothing_else_from_being_mended() {
    let damages: [Damage; 7] = [
        |tables| block_row(tables, hash(1), |row| row.condemned = true),
        |tables| tables.put_tree(&key::dentry(BELOW, b"root"), &dentry(Ino::ROOT, Kind::Directory, 50).encode()),
        |tables| {
            tables.remove_tree(&key::dentry(DIRECTORY, b"below"))?;
            tables.remove_tree(&key::cookie(DIRECTORY, 1))?;
            inode(tables, BELOW, |it| it.nlink = 0)
        },
        |tables| {
            tables.put_tree(
                &key::pieces(NOBODY, ChunkIndex(0)),
                &rows::encode_pieces(&[piece(1, 0, 1, 0)], Replicas::INHERITED),
            )
        },
        |tables| tables.put_tree(&key::dentry(DIRECTORY, b"second"), &dentry(BELOW, Kind::Directory, 50).encode()),
        |tables| tables.put_tree(&key::dentry(NOBODY, b"name"), &dentry(FILE, Kind::File, 1).encode()),
        |tables| tables.put_tree(&key::cookie(DIRECTORY, 3), &dentry(FILE, Kind::File, 3).encode_with(b"nameless")),
    ];
    for (number, damage) in damages.into_iter().enumerate() {
        let mut world = world();
        world.transact(|tables| {
            tables.counters.owed += 1;
            tables.remove_blocks(&key::owed(hash(2)))?;
            tables.remove_blocks(&key::holding(ServerId(1), bucket_of(&hash(1))))?;
            damage(tables)
        });
        let left = mend(&mut world, |_| ());
        let told = |part: &str| left.iter().any(|sentence| sentence.contains(part));
        assert!(
            !left.is_empty() && !told("counted as") && !told("digest") && !told("owed"),
            "damage {number}: {left:?}"
        );
    }
}

#[test]
fn what_a_lost_row_leaves_behind_is_not_taken_for_a_wrong_count() {
    let mut lost_pieces = world();
    lost_pieces.transact(|tables| tables.remove_tree(&key::pieces(FILE, ChunkIndex(0))));
    assert_ne!(mend(&mut lost_pieces, |_| ()), Vec::<String>::new());
    let view = lost_pieces.view();
    assert_eq!(super::super::blocks::block(&view, hash(1)).unwrap().map(|row| row.refs), Some(1));
    assert_eq!(view.inode(FILE).unwrap().map(|inode| inode.stored), Some(100));

    // A page of the tables: an inode and all of its pieces.
    let mut lost_inode = world();
    lost_inode.transact(|tables| {
        tables.remove_inode(FILE);
        tables.remove_tree(&key::pieces(FILE, ChunkIndex(0)))
    });
    assert_ne!(mend(&mut lost_inode, |_| ()), Vec::<String>::new());
    let view = lost_inode.view();
    assert_eq!(super::super::blocks::block(&view, hash(1)).unwrap().map(|row| row.refs), Some(1));
    assert_eq!(view.counters().inodes, 5);

    let mut lost_name = world();
    lost_name.mutate(Op::Link { ino: FILE, parent: Ino::ROOT, name: b"link".to_vec() }).unwrap();
    lost_name.transact(|tables| tables.remove_tree(&key::dentry(Ino::ROOT, b"link")));
    let left = mend(&mut lost_name, |_| ());
    assert!(left.iter().any(|sentence| sentence.contains("inode 4 counts 2 links, and has 1 names")), "{left:?}");

    let mut lost_target = world();
    let new = NewInode { kind: Kind::Symlink, mode: 0o777, uid: 0, gid: 0, rdev: 0, target: b"there".to_vec() };
    let name = b"symlink".to_vec();
    lost_target.mutate(Op::Make { parent: Ino::ROOT, name, new, exclusive: true, open: false }).unwrap();
    lost_target.transact(|tables| tables.remove_tree(&key::symlink(Ino(6))));
    let left = mend(&mut lost_target, |_| ());
    assert!(left.iter().any(|sentence| sentence.contains("inode 6 says size 5")), "{left:?}");
}

#[test]
fn a_directory_that_was_removed_meanwhile_is_not_revived() {
    let mut world = world();
    let inner = world.make(BELOW, "inner", Kind::Directory).unwrap();
    world.transact(|tables| inode(tables, BELOW, |it| it.nlink = 2));
    let (corrections, seen) = look(&world);
    world.mutate(Op::Rmdir { parent: BELOW, name: b"inner".to_vec() }).unwrap();
    world.mutate(Op::Rmdir { parent: DIRECTORY, name: b"below".to_vec() }).unwrap();
    assert_eq!(round(&mut world, corrections, seen), 0);
    assert_eq!(mend(&mut world, |_| ()), Vec::<String>::new());
    assert_eq!(super::super::orphans::orphans_after(&world.view(), Ino(0), 9).unwrap(), [BELOW, inner]);
}

#[test]
fn a_directory_is_not_put_into_itself() {
    let mut world = world();
    let inner = world.make(BELOW, "inner", Kind::Directory).unwrap();
    world.transact(|tables| {
        // The one name that it has is below it.
        tables.remove_tree(&key::dentry(DIRECTORY, b"below"))?;
        tables.remove_tree(&key::cookie(DIRECTORY, 1))?;
        tables.put_tree(&key::dentry(inner, b"below"), &dentry(BELOW, Kind::Directory, 1).encode())?;
        tables.put_tree(&key::cookie(inner, 1), &dentry(BELOW, Kind::Directory, 1).encode_with(b"below"))
    });
    assert_ne!(mend(&mut world, |_| ()), Vec::<String>::new());
    assert_eq!(world.view().inode(BELOW).unwrap().map(|inode| inode.parent), Some(DIRECTORY));
}

#[test]
fn counts_that_fall_below_nothing_stop_nobody_and_are_mended() {
    let mut world = world();
    world.transact(|tables| {
        inode(tables, Ino::ROOT, |it| (it.size, it.nlink) = (0, 2))?;
        block_row(tables, hash(2), |row| row.refs = 0)
    });
    world.mutate(Op::Unlink { parent: Ino::ROOT, name: b"short".to_vec() }).unwrap();
    world.command(Command::Reclaim { inos: vec![SHORT] }).unwrap();
    world.make(Ino::ROOT, "another", Kind::File).unwrap();
    assert_eq!(mend(&mut world, |_| ()), Vec::<String>::new());
    world.check();
}

#[test]
fn a_file_that_counts_one_link_too_few_is_mended_also_below_nothing() {
    let mut world = world();
    world.mutate(Op::Link { ino: FILE, parent: Ino::ROOT, name: b"link".to_vec() }).unwrap();
    world.transact(|tables| inode(tables, FILE, |it| it.nlink = 0));
    world.mutate(Op::Unlink { parent: Ino::ROOT, name: b"link".to_vec() }).unwrap();
    assert_eq!(world.view().inode(FILE).unwrap().map(|inode| inode.nlink), Some(u32::MAX));
    assert_eq!(mend(&mut world, |_| ()), Vec::<String>::new());
    assert_eq!(world.view().inode(FILE).unwrap().map(|inode| inode.nlink), Some(1));
}

#[test]
fn a_directory_that_counts_too_few_below_it_is_mended_when_these_are_gone() {
    let mut world = world();
    world.make(BELOW, "one", Kind::Directory).unwrap();
    world.make(BELOW, "two", Kind::Directory).unwrap();
    world.transact(|tables| inode(tables, BELOW, |it| it.nlink = 2));
    for name in ["one", "two"] {
        world.mutate(Op::Rmdir { parent: BELOW, name: name.into() }).unwrap();
    }
    assert_eq!(world.mutate(Op::Unlink { parent: BELOW, name: b"x".to_vec() }), Err(Refusal::NotFound));
    assert_eq!(mend(&mut world, |_| ()), Vec::<String>::new());
    world.make(BELOW, "three", Kind::Directory).unwrap();
}

#[test]
fn what_names_something_lost_is_refused_or_lets_go_of_it_and_stops_nobody() {
    let mut world = world();
    world.transact(|tables| {
        tables.remove_inode(SHORT);
        let row = super::super::blocks::block(tables, hash(1))?.expect("it is there");
        super::super::blocks::remove(tables, hash(1), &row)
    });
    let short = || b"short".to_vec();
    assert_eq!(world.mutate(Op::Unlink { parent: Ino::ROOT, name: short() }), Err(Refusal::Stale));
    let rename = Op::Rename {
        from: Ino::ROOT,
        from_name: short(),
        to: Ino::ROOT,
        to_name: b"other".to_vec(),
        mode: RenameMode::Replace,
    };
    assert_eq!(world.mutate(rename), Err(Refusal::Stale));
    world.mutate(Op::SetAttr { ino: FILE, set: SetAttr { size: Some(50), ..SetAttr::default() } }).unwrap();
    world.mutate(Op::Unlink { parent: DIRECTORY, name: b"file".to_vec() }).unwrap();
    world.command(Command::Reclaim { inos: vec![FILE] }).unwrap();
    assert!(world.view().inode(FILE).unwrap().is_none());
}

#[test]
fn a_file_that_lost_its_name_and_was_forgotten_is_listed_to_be_deleted() {
    let mut world = world();
    world.mutate(Op::Unlink { parent: Ino::ROOT, name: b"short".to_vec() }).unwrap();
    world.transact(|tables| tables.remove_state(&key::orphan(SHORT)));
    assert_eq!(mend(&mut world, |_| ()), Vec::<String>::new());
    assert_eq!(super::super::orphans::orphans_after(&world.view(), Ino(0), 9).unwrap(), [SHORT]);
}

#[test]
fn garbage_that_was_forgotten_waits_its_time_from_the_correction_on() {
    let mut world = world();
    world.transact(|tables| {
        let pieces = [key::pieces(FILE, ChunkIndex(0))];
        pieces.iter().try_for_each(|key| tables.remove_tree(key))?;
        inode(tables, FILE, |it| it.stored = 0)
    });
    let before = world.view().counters().position;
    assert_eq!(mend(&mut world, |_| ()), Vec::<String>::new());
    let due = |through| super::super::garbage::unnamed_after(&world.view(), None, 9, through).unwrap().0;
    assert_eq!(due(before), []);
    assert_eq!(due(Position(u64::MAX)), [hash(1)]);
}

#[test]
fn pieces_that_are_counted_under_another_number_are_counted_anew() {
    let mut world = world();
    let two = Replicas::new(2).expect("two is a number of copies");
    world.transact(|tables| chunk(tables, &[piece(1, 0, 100, 0)], two));
    mend(&mut world, |_| ());
    let inos = super::super::replicas::recounted_first(&world.view(), 9).unwrap();
    assert_eq!(inos, [FILE]);
    world.command(Command::Recount { inos }).unwrap();
    assert_eq!(mend(&mut world, |_| ()), Vec::<String>::new());
}

#[test]
fn corrections_keep_their_bytes_in_the_log() {
    let (directory, ino, block, server) = (DIRECTORY, FILE, hash(1), ServerId(3));
    let all = [
        Correction::Cookie { directory, name: b"n".to_vec() },
        Correction::StaleCookie { directory, cookie: 5 },
        Correction::Place { directory, name: b"n".to_vec() },
        Correction::CookiesFrom { directory, cookie: 5 },
        Correction::InodesFrom { ino },
        Correction::Inode { ino, nlink: -1, size: 2, stored: -3 },
        Correction::Recount { ino },
        Correction::Orphan { ino },
        Correction::References { block, epoch: Epoch(9), refs: 1, by_replicas: [0, 1, 0, 0, 0] },
        Correction::Lists { block },
        Correction::Listed { key: vec![1] },
        Correction::Holding { server, bucket: 7, by: BucketDigest::of(&[block]) },
        Correction::Counters(Differences::default()),
        Correction::Reply { key: vec![1] },
    ];
    for (number, correction) in all.into_iter().enumerate() {
        let bytes = codec::encode(&correction).unwrap();
        assert_eq!(usize::from(bytes[0]), number);
        assert_eq!(codec::decode::<Correction>(&bytes).unwrap(), correction);
    }
}

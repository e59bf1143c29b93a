//! Numbers of copies: whose they are, and what follows from them.

use holdfast_common::{
    BlockHash, Ino, Kind, Refusal, Replicas, ServerId,
    wire::meta::{Mutated, Op, REPLICAS_ATTRIBUTE, XattrMode},
};

use super::{
    super::{
        blocks::{self, Debts},
        replicas::recounted_first,
        rows::BlockRow,
        xattr,
    },
    Command, Reply, Rows, World, block, file, hash, piece,
};

fn number(count: usize) -> Replicas {
    Replicas::new(count).expect("a number in the range")
}

fn set(world: &mut World, ino: Ino, value: &str) -> Result<Mutated, Refusal> {
    let name = REPLICAS_ATTRIBUTE.as_bytes().to_vec();
    world.mutate(Op::SetXattr { ino, name, value: value.as_bytes().to_vec(), mode: XattrMode::Set })
}

fn unset(world: &mut World, ino: Ino) -> Result<Mutated, Refusal> {
    world.mutate(Op::RemoveXattr { ino, name: REPLICAS_ATTRIBUTE.as_bytes().to_vec() })
}

fn shown(world: &World, ino: Ino) -> Option<Vec<u8>> {
    xattr::value(&world.view(), ino, REPLICAS_ATTRIBUTE.as_bytes()).unwrap()
}

fn row(world: &World, seed: u8) -> BlockRow {
    blocks::block(&world.view(), hash(seed)).unwrap().expect("it has a row")
}

fn listed(world: &World, debts: Debts) -> Vec<BlockHash> {
    blocks::owed_after(&world.view(), debts, None, 100).unwrap()
}

/// Until everything counts and wants what it should.
fn follow(world: &mut World) {
    while world.view().counters().retargeted.is_some() {
        world.command(Command::Retarget).unwrap();
        world.check();
    }
    loop {
        let inos = recounted_first(&world.view(), 2).unwrap();
        if inos.is_empty() {
            return;
        }
        world.command(Command::Recount { inos }).unwrap();
        world.check();
    }
}

/// A file of as many blocks, one in each chunk, with hashes from `seed` on.
fn filled(world: &mut World, name: &str, seed: u8, count: u8) -> Ino {
    let ino = world.make(Ino::ROOT, name, Kind::File).unwrap();
    fill(world, ino, seed, count, 3);
    ino
}

fn fill(world: &mut World, ino: Ino, seed: u8, count: u8, copies: u32) {
    let pieces = (0..count).map(|n| (u32::from(n), piece(seed + n, 0, 10, 0))).collect();
    let blocks = (0..count).map(|n| block(seed + n, 10, copies)).collect();
    assert!(world.commit(vec![file(ino, pieces, 0)], blocks).unwrap()[0].is_ok());
}

#[test]
fn the_attribute_takes_numbers_from_one_to_five_and_shows_them() {
    let mut world = World::new();
    let ino = filled(&mut world, "f", 1, 1);
    assert_eq!((shown(&world, ino), unset(&mut world, ino)), (None, Err(Refusal::NoAttribute)));
    for wrong in ["", "0", "6", "-1", "two", "1.5", "99999999999999999999"] {
        assert_eq!(set(&mut world, ino, wrong), Err(Refusal::Invalid), "{wrong:?}");
    }
    for count in 1..=5 {
        set(&mut world, ino, &format!("{count}\n")).unwrap();
        assert_eq!(shown(&world, ino), Some(count.to_string().into_bytes()));
        world.check();
    }
    assert!(xattr::names(&world.view(), ino).unwrap().is_empty(), "whoever copies attributes does not copy it");
    unset(&mut world, ino).unwrap();
    assert_eq!((shown(&world, ino), row(&world, 1).wanted), (None, 3));
    let link = world.make(Ino::ROOT, "link", Kind::Symlink).unwrap();
    assert_eq!(set(&mut world, link, "2"), Err(Refusal::Invalid), "a link has no blocks");
    world.check();
}

#[test]
fn what_is_made_in_a_directory_has_its_number_and_what_was_there_has_not() {
    let mut world = World::new();
    let directory = world.make(Ino::ROOT, "d", Kind::Directory).unwrap();
    let before = world.make(directory, "before", Kind::File).unwrap();
    set(&mut world, directory, "2").unwrap();
    let after = world.make(directory, "after", Kind::File).unwrap();
    let below = world.make(directory, "below", Kind::Directory).unwrap();
    let deeper = world.make(below, "deeper", Kind::File).unwrap();
    let two = Some(b"2".to_vec());
    assert_eq!([before, after, below, deeper].map(|ino| shown(&world, ino)), [None, two.clone(), two.clone(), two]);
    let attr = world.ask(|view| super::query::attr(view, deeper)).unwrap();
    assert_eq!(attr.replicas, number(2), "mounts know it");
    world.check();
}

#[test]
fn a_block_has_the_most_copies_that_any_of_its_files_wants() {
    let mut world = World::new();
    let (first, second) = (filled(&mut world, "first", 1, 1), filled(&mut world, "second", 1, 1));
    set(&mut world, first, "5").unwrap();
    assert_eq!(row(&world, 1).wanted, 5);
    assert_eq!(listed(&world, Debts::All), [hash(1)]);
    set(&mut world, second, "2").unwrap();
    assert_eq!(row(&world, 1).wanted, 5);
    world.mutate(Op::Unlink { parent: Ino::ROOT, name: b"first".to_vec() }).unwrap();
    world.command(Command::Reclaim { inos: vec![first] }).unwrap();
    assert_eq!(row(&world, 1).wanted, 2, "it is gone that wanted more");
    assert_eq!((listed(&world, Debts::All), listed(&world, Debts::Surplus)), (vec![], vec![hash(1)]));
    set(&mut world, second, "1").unwrap();
    filled(&mut world, "third", 1, 1);
    assert_eq!((row(&world, 1).wanted, listed(&world, Debts::Surplus)), (3, vec![]), "the cluster's counts as well");
    world.check();
}

#[test]
fn a_long_file_is_counted_anew_some_pieces_at_a_time() {
    let mut world = World::new();
    let ino = filled(&mut world, "long", 1, 20);
    set(&mut world, ino, "4").unwrap();
    world.check();
    let wanted = |world: &World| (1..=20).filter(|seed| row(world, *seed).wanted == 4).count();
    assert!((1..20).contains(&wanted(&world)), "some at once, not all");
    // Changed again before the first change was followed, and written, and cut.
    set(&mut world, ino, "2").unwrap();
    fill(&mut world, ino, 40, 5, 2);
    let set_size = holdfast_common::wire::meta::SetAttr { size: Some(10 << 20), ..Default::default() };
    world.mutate(Op::SetAttr { ino, set: set_size }).unwrap();
    world.check();
    follow(&mut world);
    let of = |seed: u8| row(&world, seed).refs_by_replicas;
    assert!((6..=10).all(|seed| of(seed) == [0, 1, 0, 0, 0]) && (40..45).all(|seed| of(seed) == [0, 1, 0, 0, 0]));
    assert!((11..=20).all(|seed| row(&world, seed).refs == 0 && of(seed) == [0; 5]));
    // One that goes before it was followed.
    set(&mut world, ino, "5").unwrap();
    world.mutate(Op::Unlink { parent: Ino::ROOT, name: b"long".to_vec() }).unwrap();
    world.command(Command::Reclaim { inos: vec![ino] }).unwrap();
    world.check();
    assert!(recounted_first(&world.view(), 1).unwrap().is_empty());
}

#[test]
fn the_clusters_number_is_followed_by_all_that_has_none_of_its_own() {
    let mut world = World::new();
    let own = filled(&mut world, "own", 100, 1);
    set(&mut world, own, "3").unwrap();
    filled(&mut world, "many", 1, 20);
    world.command(Command::SetReplicas { replicas: number(2) }).unwrap();
    world.check();
    filled(&mut world, "new", 50, 1);
    assert_eq!(row(&world, 50).wanted, 2, "at once");
    let Ok(Reply::Reclaimed { unfinished: true }) = world.command(Command::Retarget) else { panic!("all at once") };
    world.check();
    follow(&mut world);
    assert!((1..=20).all(|seed| row(&world, seed).wanted == 2) && row(&world, 100).wanted == 3);
    assert_eq!(listed(&world, Debts::Surplus).len(), 21);
    // Back in the middle of it.
    world.command(Command::SetReplicas { replicas: number(5) }).unwrap();
    world.command(Command::Retarget).unwrap();
    world.command(Command::SetReplicas { replicas: number(3) }).unwrap();
    follow(&mut world);
    assert!((1..=20).all(|seed| row(&world, seed).wanted == 3));
    assert_eq!((listed(&world, Debts::All), listed(&world, Debts::Surplus)), (vec![], vec![]));
    let before = world.view().counters().clone();
    world.command(Command::SetReplicas { replicas: number(3) }).unwrap();
    assert_eq!(world.view().counters().retargeted, before.retargeted, "nothing to follow");
}

#[test]
fn one_copy_is_enough_for_who_wants_one_and_for_nobody_else() {
    let mut world = World::new();
    let (one, two) =
        (world.make(Ino::ROOT, "one", Kind::File).unwrap(), world.make(Ino::ROOT, "two", Kind::File).unwrap());
    set(&mut world, one, "1").unwrap();
    fill(&mut world, one, 1, 1, 1);
    assert_eq!(
        (listed(&world, Debts::All), listed(&world, Debts::LastCopies)),
        (vec![], vec![]),
        "that is what it wants"
    );
    let both = |ino, seed| file(ino, vec![(0, piece(seed, 0, 10, 0))], 0);
    let refused = world.commit(vec![both(one, 2), both(two, 2)], vec![block(2, 10, 1)]);
    assert_eq!(refused, Err(Refusal::TooFewReplicas), "one of its files wants more");
    let refused = world.commit(vec![both(one, 2), both(two, 3)], vec![block(2, 10, 1), block(3, 10, 1)]);
    assert_eq!(refused, Err(Refusal::TooFewReplicas));
    world.commit(vec![both(one, 2), both(two, 3)], vec![block(2, 10, 1), block(3, 10, 2)]).unwrap();
    world.check();
    // It is named by a file that wants more: more copies are owed.
    world.commit(vec![both(two, 1)], vec![]).unwrap();
    assert_eq!(listed(&world, Debts::LastCopies), [hash(1)]);
    world.check();
}

#[test]
fn a_copy_that_is_too_much_is_taken_off_and_no_other() {
    let mut world = World::new();
    let ino = filled(&mut world, "f", 1, 1);
    let all: Vec<ServerId> = (1..=3).map(ServerId).collect();
    let retire = |world: &mut World, server| {
        let command = Command::Retire { server: ServerId(server), blocks: vec![hash(1)], counting: all.clone() };
        match world.command(command) {
            Ok(Reply::Strays { condemned, .. }) => condemned,
            other => panic!("{other:?}"),
        }
    };
    assert!(retire(&mut world, 1).is_empty(), "three are wanted");
    set(&mut world, ino, "2").unwrap();
    assert_eq!(retire(&mut world, 1), [hash(1)]);
    assert!(retire(&mut world, 2).is_empty(), "two are wanted");
    set(&mut world, ino, "1").unwrap();
    assert_eq!(retire(&mut world, 2), [hash(1)]);
    assert!(retire(&mut world, 3).is_empty(), "one is wanted");
    assert_eq!(row(&world, 1).holders, [ServerId(3)]);
    world.check();
}

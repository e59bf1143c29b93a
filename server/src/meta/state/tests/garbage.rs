//! Garbage, as the state machine decides about it.

use holdfast_common::{
    Epoch, Ino, Kind, Position, Refusal, ServerId,
    wire::meta::{NewBlock, Op},
};

use super::{
    super::{Command, Reply, Rows, blocks, garbage, rows::BlockRow},
    World, block, file, hash, piece,
};

/// One file, with block `seed` as all of it.
fn written(world: &mut World, seed: u8) -> Ino {
    let ino = world.make(Ino::ROOT, &format!("f{seed}"), Kind::File).unwrap();
    world.commit(vec![file(ino, vec![(0, piece(seed, 0, 8, 0))], 0)], vec![block(seed, 8, 3)]).unwrap();
    ino
}

fn cut(world: &mut World, ino: Ino) {
    world.mutate(Op::Punch { ino, offset: 0, length: 8, grow: false }).unwrap();
}

fn condemn(world: &mut World, seed: u8) -> Epoch {
    world.command(Command::CondemnUnnamed { blocks: vec![hash(seed)], unnamed_through: Position(u64::MAX) }).unwrap();
    world.check();
    world.view().counters().epoch
}

fn row(world: &World, seed: u8) -> Option<BlockRow> {
    blocks::block(&world.view(), hash(seed)).unwrap()
}

/// Every server has deleted it.
fn delete(world: &mut World, seed: u8, epoch: Epoch) {
    for server in 1..=3 {
        world.command(Command::Deleted { server: ServerId(server), blocks: vec![hash(seed)], epoch }).unwrap();
        world.check();
    }
}

/// The same file gets the same block again, put with `epoch`.
fn again(world: &mut World, ino: Ino, seed: u8, epoch: Epoch) -> Result<(), Refusal> {
    let new = NewBlock { epoch, ..block(seed, 8, 2) };
    let answer = world.commit(vec![file(ino, vec![(0, piece(seed, 0, 8, 0))], 0)], vec![new]);
    world.check();
    answer.map(|files| assert_eq!(files, [Ok(8)]))
}

#[test]
fn what_no_piece_names_is_condemned_when_its_time_has_come_and_forgotten_when_it_is_deleted() {
    let mut world = World::new();
    let (kept, cut_off) = (written(&mut world, 1), written(&mut world, 2));
    cut(&mut world, cut_off);
    let unnamed = world.view().counters().position.0;
    let through = |position| garbage::unnamed_after(&world.view(), None, 10, Position(position)).unwrap().0;
    assert_eq!((through(unnamed - 1), through(unnamed)), (vec![], vec![hash(2)]));
    for (seed, through) in [(1, u64::MAX), (2, unnamed - 1), (9, u64::MAX)] {
        let (blocks, unnamed_through) = (vec![hash(seed)], Position(through));
        world.command(Command::CondemnUnnamed { blocks, unnamed_through }).unwrap();
    }
    assert_eq!(world.view().counters().epoch, Epoch(0), "one is named, one too new, one not known");
    let epoch = condemn(&mut world, 2);
    assert_eq!(garbage::condemned_after(&world.view(), None, 10).unwrap(), [(epoch, hash(2))]);
    world.command(Command::Forget { blocks: vec![hash(2)], epoch }).unwrap();
    assert!(row(&world, 2).is_some(), "it is not deleted yet");
    delete(&mut world, 1, epoch);
    delete(&mut world, 2, epoch);
    assert_eq!(garbage::condemned_after(&world.view(), None, 10).unwrap(), []);
    assert_eq!(garbage::deleted_after(&world.view(), None, 10).unwrap(), [(epoch, hash(2))]);
    world.command(Command::Forget { blocks: vec![hash(1), hash(2)], epoch: Epoch(epoch.0 + 1) }).unwrap();
    assert!(row(&world, 2).is_some(), "that was another condemnation");
    world.command(Command::Forget { blocks: vec![hash(1), hash(2)], epoch }).unwrap();
    assert_eq!(row(&world, 2), None);
    assert_eq!(row(&world, 1).map(|row| row.refs), Some(1), "block of inode {kept}");
    let counters = world.view().counters().clone();
    assert_eq!((counters.condemned, counters.unnamed, counters.collected, counters.forgotten), (0, 0, 1, epoch));
    world.check();
}

#[test]
fn a_commit_that_counts_on_condemned_copies_is_refused_and_one_that_put_them_anew_saves_the_block() {
    let mut world = World::new();
    let ino = written(&mut world, 1);
    cut(&mut world, ino);
    let epoch = condemn(&mut world, 1);
    assert_eq!(again(&mut world, ino, 1, Epoch(0)), Err(Refusal::BlockGone));
    let unnamed = world.commit(vec![file(ino, vec![(0, piece(1, 0, 8, 0))], 0)], vec![]);
    assert_eq!(unnamed, Ok(vec![Err(Refusal::BlockGone)]), "nor may it be named without being put");
    let alone = NewBlock { epoch, ..block(1, 8, 1) };
    assert_eq!(world.commit(vec![], vec![alone]), Err(Refusal::TooFewReplicas), "old holders do not count");
    assert_eq!(again(&mut world, ino, 1, epoch), Ok(()));
    let saved = row(&world, 1).unwrap();
    assert_eq!((saved.refs, saved.condemned, saved.epoch), (1, false, epoch));
    assert_eq!(saved.holders, [ServerId(1), ServerId(2)]);
    world.command(Command::Forget { blocks: vec![hash(1)], epoch }).unwrap();
    assert_eq!(row(&world, 1).map(|row| row.refs), Some(1), "an order from before comes too late");
    assert_eq!(again(&mut world, ino, 1, Epoch(0)), Err(Refusal::BlockGone), "such a copy may still be deleted");
}

#[test]
fn what_was_forgotten_has_to_be_put_with_a_later_epoch() {
    let mut world = World::new();
    let ino = written(&mut world, 1);
    cut(&mut world, ino);
    let epoch = condemn(&mut world, 1);
    delete(&mut world, 1, epoch);
    assert_eq!(again(&mut world, ino, 2, Epoch(0)), Ok(()), "another one, while the name is kept");
    cut(&mut world, ino);
    world.command(Command::Forget { blocks: vec![hash(1)], epoch }).unwrap();
    assert_eq!(again(&mut world, ino, 1, Epoch(0)), Err(Refusal::BlockGone));
    assert_eq!(again(&mut world, ino, 3, Epoch(0)), Err(Refusal::BlockGone), "it may be one of those, too");
    assert_eq!(again(&mut world, ino, 1, epoch), Ok(()));
    assert_eq!(row(&world, 1).map(|row| row.epoch), Some(epoch));
}

#[test]
fn a_block_that_is_named_again_is_not_condemned_for_the_time_before() {
    let mut world = World::new();
    let ino = written(&mut world, 1);
    cut(&mut world, ino);
    let unnamed_through = world.view().counters().position;
    again(&mut world, ino, 1, Epoch(0)).unwrap();
    cut(&mut world, ino);
    world.command(Command::CondemnUnnamed { blocks: vec![hash(1)], unnamed_through }).unwrap();
    assert!(row(&world, 1).is_some_and(|row| !row.condemned));
}

#[test]
fn copies_of_blocks_that_nobody_knows_are_condemned_where_they_are() {
    let mut world = World::new();
    let ino = written(&mut world, 1);
    for server in [3, 44] {
        let strays = Command::CondemnStrays { server: ServerId(server), blocks: vec![hash(1), hash(2)] };
        world.command(strays).unwrap();
        world.check();
    }
    let stray = row(&world, 2).unwrap();
    assert_eq!((stray.condemned, stray.holders), (true, vec![ServerId(3)]));
    assert!(row(&world, 1).is_some_and(|row| !row.condemned && row.epoch == Epoch(0)), "this one is on record there");
    let four =
        Command::RegisterServer { server: ServerId(4), address: ([127, 0, 0, 1], 4).into(), zone: String::new() };
    world.command(four).unwrap();
    let strays = |server| Command::CondemnStrays { server: ServerId(server), blocks: vec![hash(1)] };
    let lost = Command::HolderLost { server: ServerId(3), blocks: vec![hash(1)] };
    world.command(lost).unwrap();
    let short = world.command(strays(3)).unwrap();
    assert!(matches!(short, Reply::Strays { condemned, .. } if condemned.is_empty()), "it is short of copies");
    world.command(Command::HolderAdded { server: ServerId(4), blocks: vec![hash(1)], epoch: Epoch(1) }).unwrap();
    let spare = world.command(strays(3)).unwrap();
    assert!(matches!(spare, Reply::Strays { condemned, .. } if condemned == [hash(1)]));
    let epoch = world.view().counters().epoch;
    assert!(row(&world, 1).is_some_and(|row| !row.condemned && row.epoch == epoch), "what is there counts no more");
    assert_eq!(again(&mut world, ino, 1, Epoch(epoch.0 - 1)), Err(Refusal::BlockGone));
    assert_eq!(again(&mut world, ino, 2, Epoch(0)), Err(Refusal::BlockGone));
    assert_eq!(again(&mut world, ino, 2, stray.epoch), Ok(()));
    assert_eq!(row(&world, 2).map(|row| (row.length, row.refs)), Some((8, 1)));
}

#[test]
fn a_copy_that_was_stamped_too_early_is_not_put_on_record() {
    let mut world = World::new();
    let ino = written(&mut world, 1);
    cut(&mut world, ino);
    let epoch = condemn(&mut world, 1);
    let add = |epoch| Command::HolderAdded { server: ServerId(3), blocks: vec![hash(1)], epoch };
    world.command(add(epoch)).unwrap();
    assert_eq!(row(&world, 1).map(|row| row.holders.len()), Some(3), "what is condemned gets no holders");
    again(&mut world, ino, 1, epoch).unwrap();
    world.command(add(Epoch(0))).unwrap();
    assert_eq!(row(&world, 1).map(|row| row.holders.len()), Some(2));
    world.command(add(epoch)).unwrap();
    assert_eq!(row(&world, 1).map(|row| row.holders.len()), Some(3));
}

#[test]
fn a_condemned_block_can_lose_its_last_holder() {
    let mut world = World::new();
    let ino = written(&mut world, 1);
    cut(&mut world, ino);
    let epoch = condemn(&mut world, 1);
    for server in 1..=3 {
        world.command(Command::HolderLost { server: ServerId(server), blocks: vec![hash(1)] }).unwrap();
        world.check();
    }
    assert_eq!(row(&world, 1).map(|row| row.holders), Some(vec![]));
    world.command(Command::Forget { blocks: vec![hash(1)], epoch }).unwrap();
    world.check();
}

#[test]
fn what_is_put_and_named_again_keeps_its_new_holders_when_a_deletion_is_reported_late() {
    let mut world = World::new();
    let ino = written(&mut world, 1);
    cut(&mut world, ino);
    let epoch = condemn(&mut world, 1);
    again(&mut world, ino, 1, epoch).unwrap();
    delete(&mut world, 1, epoch);
    assert_eq!(row(&world, 1).map(|row| row.holders), Some(vec![ServerId(1), ServerId(2)]));
}

#[test]
fn of_two_who_are_too_many_by_one_only_the_first_retires() {
    let mut world = World::new();
    written(&mut world, 1);
    let four =
        Command::RegisterServer { server: ServerId(4), address: ([127, 0, 0, 1], 4).into(), zone: String::new() };
    world.command(four).unwrap();
    world.command(Command::HolderAdded { server: ServerId(4), blocks: vec![hash(1)], epoch: Epoch(0) }).unwrap();
    let retire = |server, counting: &[u32]| Command::Retire {
        server: ServerId(server),
        blocks: vec![hash(1), hash(9)],
        counting: counting.iter().copied().map(ServerId).collect(),
    };
    let retired = |reply| matches!(reply, Ok(Reply::Strays { condemned, .. }) if condemned == [hash(1)]);
    assert!(!retired(world.command(retire(4, &[1, 2, 4]))), "3 does not count");
    assert!(retired(world.command(retire(4, &[1, 2, 3, 4]))));
    assert!(!retired(world.command(retire(3, &[1, 2, 3, 4]))), "now it is needed");
    world.check();
    assert_eq!(row(&world, 1).map(|row| row.holders.len()), Some(3));
}

#[test]
fn of_strays_only_those_may_be_deleted_that_were_condemned_now() {
    let mut world = World::new();
    written(&mut world, 1);
    let ino = written(&mut world, 2);
    cut(&mut world, ino);
    condemn(&mut world, 2);
    // On record there, condemned before, and not known.
    let blocks = vec![hash(1), hash(2), hash(9)];
    let reply = world.command(Command::CondemnStrays { server: ServerId(1), blocks }).unwrap();
    let epoch = world.view().counters().epoch;
    assert_eq!(reply, Reply::Strays { epoch, condemned: vec![hash(9)] });
    let another = world.command(Command::CondemnStrays { server: ServerId(2), blocks: vec![hash(9)] }).unwrap();
    assert!(matches!(another, Reply::Strays { condemned, .. } if condemned.is_empty()));
    let stray = row(&world, 9).unwrap();
    assert_eq!((stray.holders, stray.epoch), (vec![ServerId(1), ServerId(2)], epoch), "it goes with the first");
    world.check();
}

#[test]
fn after_a_loss_of_power_no_epoch_is_given_twice() {
    let mut world = World::new();
    let ino = written(&mut world, 1);
    cut(&mut world, ino);
    let before = condemn(&mut world, 1);
    world.command(Command::BeginRecovery).unwrap();
    assert!(world.view().counters().epoch > Epoch(before.0 + 1000));
    world.check();
}

//! The state machine against its words, its model, and itself.

mod bytes;
mod garbage;
mod garbage_model;
pub(crate) mod holdings;
mod mending;
mod model;
mod replicas;
mod violations;
mod words;

use std::collections::BTreeMap;

use holdfast_common::{
    BlockHash, BootId, ChunkIndex, Epoch, Ino, Kind, Piece, Position, Refusal, Sequence, ServerId, SessionId, Time,
    limits::{BLOCK_SIZE_MAX, CHUNK_SIZE},
    net::identity::{NodeName, Role},
    wire::meta::{FileCommit, Holder, Mutated, NewBlock, NewInode, Op, SetAttr},
};
use redb::{Database, Durability, ReadableDatabase, backends::InMemoryBackend};

use super::{
    Applied, Command, Entry, Outcome, Reply, Rows, Stop, StorageError, Tables, View, apply, initialize, query, tables,
    violations::violations,
};

pub(crate) const MOUNT: NodeName = NodeName { role: Role::Client, id: 1 };

/// A state machine in memory, with three servers and one session, that counts its own sequences and time.
pub(crate) struct World {
    database: Database,
    pub(crate) session: SessionId,
    pub(crate) sequence: u64,
    pub(crate) now: i64,
    pub(crate) entries: Vec<Entry>,
}

impl World {
    pub(crate) fn new() -> Self {
        let mut world = Self::empty();
        for server in 1..=3 {
            let address = ([127, 0, 0, 1], 7000).into();
            world.command(Command::RegisterServer { server: ServerId(server), address, zone: String::new() }).unwrap();
        }
        world.session = world.open_session(1);
        world
    }

    fn empty() -> Self {
        let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        let mut world = Self { database, session: SessionId(0), sequence: 0, now: 1000, entries: Vec::new() };
        world.transact(initialize);
        world
    }

    pub(crate) fn open_session(&mut self, instance: u8) -> SessionId {
        let (host, mountpoint) = ("host".into(), "/mnt".into());
        match self.command(Command::OpenSession { node: MOUNT, instance: [instance; 16], host, mountpoint }) {
            Ok(Reply::Session(id)) => id,
            other => panic!("no session: {other:?}"),
        }
    }

    pub(crate) fn transact<T>(&mut self, work: impl FnOnce(&mut Tables<'_>) -> Result<T, StorageError>) -> T {
        let mut transaction = self.database.begin_write().unwrap();
        transaction.set_durability(Durability::None).unwrap();
        let mut tables = Tables::open(&transaction).unwrap();
        let value = work(&mut tables).unwrap();
        tables.finish().unwrap();
        transaction.commit().unwrap();
        value
    }

    pub(crate) fn apply(&mut self, entry: Entry) -> Applied {
        self.entries.push(entry.clone());
        self.transact(|tables| apply(tables, &entry))
    }

    pub(crate) fn command(&mut self, command: Command) -> Outcome {
        self.now += 1;
        self.apply(Entry { time: Time { secs: self.now, nanos: 0 }, command }).outcome
    }

    pub(crate) fn mutate(&mut self, op: Op) -> Result<Mutated, Refusal> {
        self.sequence += 1;
        self.mutate_as(Sequence(self.sequence), op)
    }

    pub(crate) fn mutate_as(&mut self, sequence: Sequence, op: Op) -> Result<Mutated, Refusal> {
        let answered_below = Sequence(sequence.0.saturating_sub(3).max(1));
        match self.command(Command::Mutate { session: self.session, sequence, answered_below, op })? {
            Reply::Mutated(outcome) => Ok(outcome),
            other => panic!("a mutation answered {other:?}"),
        }
    }

    pub(crate) fn view(&self) -> View {
        View::open(&self.database.begin_read().unwrap()).unwrap()
    }

    pub(crate) fn ask<T>(&self, query: impl FnOnce(&View) -> Result<T, Stop>) -> Result<T, Refusal> {
        super::settled(query(&self.view())).unwrap()
    }

    pub(crate) fn check(&self) {
        assert_eq!(violations(&self.view(), 1000).unwrap(), Vec::<String>::new());
        let view = self.view();
        let owed = |debts| super::blocks::owed_after(&view, debts, None, usize::MAX).unwrap();
        let mut last_copies = owed(super::blocks::Debts::All);
        last_copies.retain(|hash| {
            super::blocks::has_one_copy_left(&super::blocks::block(&view, *hash).unwrap().expect("it has a row"))
        });
        assert_eq!(owed(super::blocks::Debts::LastCopies), last_copies);
    }

    pub(crate) fn make(&mut self, parent: Ino, name: &str, kind: Kind) -> Result<Ino, Refusal> {
        match self.mutate(make(parent, name, kind))? {
            Mutated::Inode { attr, .. } => Ok(attr.ino),
            other => panic!("make answered {other:?}"),
        }
    }

    pub(crate) fn commit(&mut self, files: Vec<FileCommit>, blocks: Vec<NewBlock>) -> Result<Vec<Outcomes>, Refusal> {
        match self.mutate(Op::Commit { files, blocks })? {
            Mutated::Committed(answers) => Ok(answers.into_iter().map(|answer| answer.map(|attr| attr.size)).collect()),
            other => panic!("a commit answered {other:?}"),
        }
    }

    /// Every row of every table.
    pub(crate) fn dump(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let view = self.view();
        let mut rows = Vec::new();
        for table in [view.tree(), view.blocks(), view.state()] {
            tables::scan(table, &[], &tables::past(&[]), |key, row| {
                rows.push((key.to_vec(), row.to_vec()));
                Ok(std::ops::ControlFlow::Continue(()))
            })
            .unwrap();
        }
        rows
    }
}

/// Size of a committed file, or why it was not.
pub(crate) type Outcomes = Result<u64, Refusal>;

pub(crate) fn make(parent: Ino, name: &str, kind: Kind) -> Op {
    let target = if kind == Kind::Symlink { b"target".to_vec() } else { Vec::new() };
    let new = NewInode { kind, mode: 0o644, uid: 10, gid: 20, rdev: 0, target };
    Op::Make { parent, name: name.into(), new, exclusive: true, open: false }
}

pub(crate) fn hash(seed: u8) -> BlockHash {
    BlockHash([seed; 32])
}

/// A block of `length` bytes that the first `copies` servers hold.
pub(crate) fn block(seed: u8, length: u32, copies: u32) -> NewBlock {
    let holders = (1..=copies).map(|id| Holder { server: ServerId(id), boot: BootId(1), durable: true }).collect();
    NewBlock { hash: hash(seed), length, holders, epoch: Epoch(0) }
}

pub(crate) fn piece(seed: u8, offset: u32, length: u32, block_offset: u32) -> Piece {
    Piece { offset, length, block: hash(seed), block_offset }
}

pub(crate) fn file(ino: Ino, pieces: Vec<(u32, Piece)>, size_at_least: u64) -> FileCommit {
    let pieces = pieces.into_iter().map(|(index, piece)| (ChunkIndex(index), piece)).collect();
    FileCommit {
        ino,
        pieces,
        size_at_least,
        mtime: Time { secs: 5, nanos: 0 },
        clear_suid: true,
        only_over: Vec::new(),
    }
}

#[test]
fn pieces_that_were_read_from_others_are_refused_over_anything_else() {
    let mut world = World::new();
    world.mutate_as(Sequence(1), make(Ino::ROOT, "a", Kind::File)).unwrap();
    let ino = Ino(2);
    let commit = |file, blocks| Op::Commit { files: vec![file], blocks };
    let first = piece(1, 0, 100, 0);
    world.mutate_as(Sequence(2), commit(file(ino, vec![(0, first)], 0), vec![block(1, 100, 3)])).unwrap();
    let over = |pieces: &[Piece], seed| FileCommit {
        only_over: vec![(ChunkIndex(0), holdfast_common::pieces::digest(pieces))],
        ..file(ino, vec![(0, piece(seed, 0, 100, 0))], 0)
    };
    let answer = world.mutate_as(Sequence(3), commit(over(&[], 2), vec![block(2, 100, 3)])).unwrap();
    assert_eq!(answer, Mutated::Committed(vec![Err(Refusal::Busy)]));
    let answer = world.mutate_as(Sequence(4), commit(over(&[first], 3), vec![block(3, 100, 3)])).unwrap();
    assert!(matches!(answer, Mutated::Committed(files) if files[0].is_ok()));
    world.check();
}

#[test]
fn a_retried_mutation_gets_its_first_answer_and_changes_nothing() {
    let mut world = World::new();
    let first = world.mutate_as(Sequence(1), make(Ino::ROOT, "a", Kind::Directory));
    let after = world.dump();
    assert!(first.is_ok());
    assert_eq!(world.mutate_as(Sequence(1), make(Ino::ROOT, "a", Kind::Directory)), first);
    let refused = world.mutate_as(Sequence(2), make(Ino::ROOT, "a", Kind::Directory));
    assert_eq!(refused, Err(Refusal::Exists));
    world.mutate_as(Sequence(3), Op::Rmdir { parent: Ino::ROOT, name: b"a".to_vec() }).unwrap();
    assert_eq!(world.mutate_as(Sequence(2), make(Ino::ROOT, "a", Kind::Directory)), Err(Refusal::Exists));
    assert_ne!(world.dump(), after);
    world.check();
}

#[test]
fn a_replayed_answer_has_the_position_of_the_first_and_no_place_in_the_log() {
    let mut world = World::new();
    let command = Command::Mutate {
        session: world.session,
        sequence: Sequence(1),
        answered_below: Sequence(1),
        op: make(Ino::ROOT, "a", Kind::File),
    };
    let entry = |secs| Entry { time: Time { secs, nanos: 0 }, command: command.clone() };
    let first = world.apply(entry(1));
    let before = world.dump();
    let second = world.apply(entry(2));
    assert_eq!((first.changed, second.changed), (true, false));
    assert_eq!((first.position, first.outcome), (second.position, second.outcome));
    assert_eq!(world.dump(), before);
}

#[test]
fn sequences_outside_the_window_and_unknown_sessions_are_refused() {
    let mut world = World::new();
    for sequence in 1..=10 {
        world.mutate_as(Sequence(sequence), make(Ino::ROOT, &format!("{sequence}"), Kind::File)).unwrap();
    }
    let op = || make(Ino::ROOT, "late", Kind::File);
    assert_eq!(world.mutate_as(Sequence(2), op()), Err(Refusal::BadRequest), "its answer was received and dropped");
    assert_eq!(world.mutate_as(Sequence(0), op()), Err(Refusal::BadRequest));
    let far =
        Command::Mutate { session: world.session, sequence: Sequence(5000), answered_below: Sequence(8), op: op() };
    assert_eq!(world.command(far), Err(Refusal::BadRequest), "more in flight than replies are kept");
    world.command(Command::EndSession { session: world.session }).unwrap();
    assert_eq!(world.mutate_as(Sequence(11), op()), Err(Refusal::SessionExpired));
    world.check();
}

#[test]
fn a_mount_that_asks_again_gets_the_session_it_has() {
    let mut world = World::new();
    assert_eq!(world.open_session(1), world.session);
    let other = world.open_session(2);
    assert_ne!(other, world.session);
    world.command(Command::EndSession { session: other }).unwrap();
    world.command(Command::EndSession { session: other }).unwrap();
    assert_ne!(world.open_session(2), other, "an id is never reused");
    world.check();
}

#[test]
fn a_token_is_good_once_for_its_role_until_it_expires() {
    let mut world = World::new();
    let issue =
        |secret, role, secs| Command::IssueToken { secret_hash: [secret; 32], role, expires: Time { secs, nanos: 0 } };
    let redeem = |secret, csr| Command::UseToken { secret_hash: [secret; 32], csr_hash: [csr; 32] };
    world.command(issue(1, Role::Storage, 5000)).unwrap();
    world.command(issue(2, Role::Storage, 5000)).unwrap();
    world.command(issue(3, Role::Client, 1)).unwrap();
    let enrolled = |id| Ok(Reply::Enrolled { role: Role::Storage, id });
    assert_eq!(world.command(redeem(1, 1)), enrolled(1));
    assert_eq!(world.command(redeem(2, 2)), enrolled(2));
    assert_eq!(world.command(redeem(1, 1)), enrolled(1), "the same request again: its answer was lost");
    assert_eq!(world.command(redeem(1, 9)), Err(Refusal::BadToken), "used");
    assert_eq!(world.command(redeem(3, 1)), Err(Refusal::BadToken), "expired");
    assert_eq!(world.command(redeem(4, 1)), Err(Refusal::BadToken), "unknown");
    world.now = 6000;
    world.command(issue(5, Role::Client, 9000)).unwrap();
    assert_eq!(world.command(redeem(1, 1)), Err(Refusal::BadToken), "gone with its time");
}

#[test]
fn a_commit_must_name_copies_that_exist() {
    let mut world = World::new();
    let ino = world.make(Ino::ROOT, "f", Kind::File).unwrap();
    let one = |world: &mut World, piece, block| world.commit(vec![file(ino, vec![(0, piece)], 0)], vec![block]);
    assert_eq!(one(&mut world, piece(1, 0, 10, 0), block(1, 10, 1)), Err(Refusal::TooFewReplicas));
    let twice = NewBlock { holders: vec![block(1, 10, 1).holders[0]; 3], ..block(1, 10, 1) };
    assert_eq!(one(&mut world, piece(1, 0, 10, 0), twice), Err(Refusal::TooFewReplicas), "one server three times");
    let mut stranger = block(1, 10, 2);
    stranger.holders[1].server = ServerId(99);
    assert_eq!(one(&mut world, piece(1, 0, 10, 0), stranger), Err(Refusal::TooFewReplicas));
    assert_eq!(one(&mut world, piece(2, 0, 10, 0), block(1, 10, 3)), Ok(vec![Err(Refusal::UnknownBlock)]));
    assert_eq!(one(&mut world, piece(1, 0, 11, 0), block(1, 10, 3)), Ok(vec![Err(Refusal::Invalid)]), "past the block");
    assert_eq!(one(&mut world, piece(1, 0, 10, u32::MAX), block(1, 10, 3)), Ok(vec![Err(Refusal::Invalid)]));
    assert_eq!(one(&mut world, piece(1, 0, 0, 0), block(1, 10, 3)), Ok(vec![Err(Refusal::Invalid)]), "empty");
    assert_eq!(one(&mut world, piece(1, 1 << 20, 1, 0), block(1, 10, 3)), Ok(vec![Err(Refusal::Invalid)]));
    assert_eq!(one(&mut world, piece(1, 0, 10, 0), block(1, 11, 3)), Err(Refusal::Invalid), "another length");
    assert_eq!(one(&mut world, piece(1, 0, 10, 0), block(1, 10, 0)), Ok(vec![Ok(10)]), "known: no copies needed");
    world.check();
}

#[test]
fn an_append_lies_at_the_end_or_is_refused_and_leaves_nothing_behind() {
    let mut state = World::new();
    let ino = state.make(Ino::ROOT, "a", Kind::File).unwrap();
    let mut append = |seed, at_size: u64| {
        let at = u32::try_from(at_size).unwrap();
        let file = file(ino, vec![(0, piece(seed, at, 10, 0))], at_size + 10);
        let outcome = state.mutate(Op::Append { file, blocks: vec![block(seed, 10, 3)], at_size });
        state.check();
        outcome.map(|_| state.ask(|view| query::attr(view, ino)).unwrap().size)
    };
    assert_eq!(append(1, 0), Ok(10));
    assert_eq!(append(2, 0), Err(Refusal::Busy));
    assert_eq!(append(2, 20), Err(Refusal::Busy));
    assert_eq!(append(2, 10), Ok(20));
    assert_eq!(append(3, 20), Ok(30));
    let gone = Op::Append { file: file(Ino(99), vec![], 0), blocks: vec![], at_size: 0 };
    assert_eq!(state.mutate(gone), Err(Refusal::Stale));
}

#[test]
fn one_file_that_is_gone_does_not_stop_the_others() {
    let mut world = World::new();
    let ino = world.make(Ino::ROOT, "f", Kind::File).unwrap();
    let files = vec![file(Ino(77), vec![(0, piece(1, 0, 4, 0))], 4), file(ino, vec![(0, piece(1, 0, 4, 0))], 9)];
    assert_eq!(world.commit(files, vec![block(1, 4, 3)]), Ok(vec![Err(Refusal::Stale), Ok(9)]));
    assert_eq!(world.commit(vec![file(Ino::ROOT, vec![], 0)], vec![]), Ok(vec![Err(Refusal::IsDirectory)]));
    world.check();
}

#[test]
fn a_chunk_holds_no_more_pieces_than_a_decoder_accepts() {
    let mut world = World::new();
    let ino = world.make(Ino::ROOT, "f", Kind::File).unwrap();
    let many = |from: u32| (0..1024).map(|n| (0, piece(1, from + 2 * n, 1, 0))).collect::<Vec<_>>();
    assert_eq!(world.commit(vec![file(ino, many(0), 0)], vec![block(1, 1, 3)]), Ok(vec![Ok(2047)]));
    assert_eq!(world.commit(vec![file(ino, many(1), 0)], vec![]), Ok(vec![Err(Refusal::TooLarge)]));
    world.check();
}

#[test]
fn copies_are_owed_counted_paid_and_lost() {
    let mut world = World::new();
    let ino = world.make(Ino::ROOT, "f", Kind::File).unwrap();
    world.commit(vec![file(ino, vec![(0, piece(1, 0, 8, 0))], 0)], vec![block(1, 8, 2)]).unwrap();
    let state = |world: &World| {
        let counters = world.view().counters().clone();
        (counters.blocks_by_copies, counters.owed, counters.copies_made)
    };
    assert_eq!(state(&world), ([0, 0, 1, 0], 1, 0));
    let add =
        |server| Command::HolderAdded { server: ServerId(server), blocks: vec![hash(1), hash(2)], epoch: Epoch(0) };
    let lose = |server| Command::HolderLost { server: ServerId(server), blocks: vec![hash(1), hash(2)] };
    world.command(add(3)).unwrap();
    world.command(add(3)).unwrap();
    world.command(add(44)).unwrap();
    assert_eq!(state(&world), ([0, 0, 0, 1], 0, 1));
    for server in 1..=3 {
        world.command(lose(server)).unwrap();
        world.check();
    }
    assert_eq!(state(&world), ([0, 1, 0, 0], 1, 1), "the last one stays on record");
    let last_copies =
        |world: &World| super::blocks::owed_after(&world.view(), super::blocks::Debts::LastCopies, None, 9).unwrap();
    assert_eq!(last_copies(&world), [hash(1)]);
    world.command(add(1)).unwrap();
    assert_eq!((last_copies(&world), state(&world).1), (vec![], 1), "it is not the most urgent any more");
    world.command(lose(1)).unwrap();
    world.mutate(Op::Unlink { parent: Ino::ROOT, name: b"f".to_vec() }).unwrap();
    world.command(Command::Reclaim { inos: vec![ino] }).unwrap();
    assert_eq!((state(&world), world.view().counters().unnamed), (([0, 0, 0, 0], 0, 2), 1));
    world.check();
}

#[test]
fn the_last_copy_is_given_up_only_with_a_server_that_is_to_leave() {
    use holdfast_common::cluster::Standing;
    let mut world = World::new();
    let ino = world.make(Ino::ROOT, "f", Kind::File).unwrap();
    world.commit(vec![file(ino, vec![(0, piece(1, 0, 8, 0))], 0)], vec![block(1, 8, 2)]).unwrap();
    let server = ServerId(1);
    world.command(Command::HolderLost { server: ServerId(2), blocks: vec![hash(1)] }).unwrap();
    let give_up = || Command::GiveUp { server, blocks: vec![hash(1), hash(2)] };
    let lost = |world: &World| super::blocks::lost_after(&world.view(), None, 9).unwrap();
    world.command(give_up()).unwrap();
    assert_eq!(lost(&world), [], "it serves");
    world.command(Command::Stand { server, standing: Standing::Leaving }).unwrap();
    world.command(give_up()).unwrap();
    assert_eq!(lost(&world), [hash(1)]);
    assert_eq!((world.view().counters().owed, world.view().counters().payable()), (1, 0));
    // Nobody can pay it; it goes with the file.
    world.mutate(Op::Unlink { parent: Ino::ROOT, name: b"f".to_vec() }).unwrap();
    world.command(Command::Reclaim { inos: vec![ino] }).unwrap();
    assert_eq!((lost(&world), world.view().counters().owed), (vec![], 0));
}

#[test]
fn a_bad_copy_that_was_not_replaced_is_owed_again() {
    use holdfast_common::wire::meta::CopyFault::{Damaged, Missing};
    let mut world = World::new();
    let ino = world.make(Ino::ROOT, "f", Kind::File).unwrap();
    world.commit(vec![file(ino, vec![(0, piece(1, 0, 8, 0))], 0)], vec![block(1, 8, 3)]).unwrap();
    for (server, fault, repaired) in [(1, Damaged, true), (2, Damaged, false), (3, Missing, false), (1, Missing, false)]
    {
        world.command(Command::BadCopy { server: ServerId(server), block: hash(1), fault, repaired }).unwrap();
        world.check();
    }
    let counters = world.view().counters().clone();
    assert_eq!((counters.corrupt_met, counters.missing_met, counters.repaired), (2, 2, 1));
    assert_eq!(counters.blocks_by_copies, [0, 1, 0, 0]);
}

#[test]
fn a_time_of_more_than_a_second_of_nanoseconds_is_refused() {
    let mut world = World::new();
    let ino = world.make(Ino::ROOT, "f", Kind::File).unwrap();
    let bad = FileCommit { mtime: Time { secs: i64::MAX, nanos: u32::MAX }, ..file(ino, vec![], 0) };
    let op = Op::Commit { files: vec![bad], blocks: vec![] };
    assert_eq!(world.mutate(op), Ok(Mutated::Committed(vec![Err(Refusal::Invalid)])));
    world.check();
}

#[test]
fn a_huge_file_is_reclaimed_piecemeal() {
    let mut world = World::new();
    let ino = world.make(Ino::ROOT, "f", Kind::File).unwrap();
    for batch in 0..2 {
        let pieces = (batch * 4000..(batch + 1) * 4000).map(|index| (index, piece(1, 0, 8, 0))).collect();
        world.commit(vec![file(ino, pieces, 0)], vec![block(1, 8, 3)]).unwrap();
    }
    world.mutate(Op::Unlink { parent: Ino::ROOT, name: b"f".to_vec() }).unwrap();
    let reclaim = Command::Reclaim { inos: vec![ino] };
    assert_eq!(world.command(reclaim.clone()), Ok(Reply::Reclaimed { unfinished: true }));
    world.check();
    assert_eq!(world.command(reclaim), Ok(Reply::Reclaimed { unfinished: false }));
    world.check();
    assert_eq!(world.ask(|view| query::attr(view, ino)), Err(Refusal::Stale));
}

#[test]
fn an_inode_with_a_name_is_never_reclaimed() {
    let mut world = World::new();
    let ino = world.make(Ino::ROOT, "f", Kind::File).unwrap();
    world.command(Command::Reclaim { inos: vec![ino, Ino::ROOT, Ino(99)] }).unwrap();
    assert!(world.ask(|view| query::attr(view, ino)).is_ok());
    world.check();
}

#[test]
fn cookies_stay_valid_while_the_directory_changes() {
    let mut world = World::new();
    for n in 0..10 {
        world.make(Ino::ROOT, &format!("f{n}"), Kind::File).unwrap();
    }
    let page = |world: &World, cookie| {
        world.ask(|view| query::read_directory(view, Ino::ROOT, cookie, 4, true, None)).unwrap()
    };
    let page = |world: &World, cookie| page(world, cookie).expect("it is asked for in any case");
    let query::Page { entries: first, end, parent, version } = page(&world, 0);
    let unless = |version| world.ask(|view| query::read_directory(view, Ino::ROOT, 0, 4, true, Some(version))).unwrap();
    assert!(unless(version).is_none() && unless(version + 1).is_some());
    assert_eq!(parent, Some(Ino::ROOT), "the root has no other");
    assert_eq!((first.len(), end), (4, false));
    let name = |n: usize| format!("f{n}").into_bytes();
    for n in [0, 3, 4] {
        world.mutate(Op::Unlink { parent: Ino::ROOT, name: name(n) }).unwrap();
    }
    world.make(Ino::ROOT, "new", Kind::File).unwrap();
    let query::Page { entries: second, .. } = page(&world, first[3].cookie);
    let names: Vec<_> = second.iter().map(|entry| entry.name.clone()).collect();
    assert_eq!(names, [name(5), name(6), name(7), name(8)]);
    let query::Page { entries: last, end, .. } = page(&world, second[3].cookie);
    assert_eq!((last.len(), end), (2, true));
    let beyond = page(&world, u64::MAX);
    assert_eq!((beyond.entries.len(), beyond.end, beyond.parent), (0, true, None));
    assert!(last.iter().all(|entry| entry.cookie > 0 && entry.attr.is_some()));
}

#[test]
fn the_same_entries_make_the_same_tables() {
    let mut world = World::new();
    let ino = world.make(Ino::ROOT, "f", Kind::File).unwrap();
    let pieces = (0..20).map(|n| (n, piece(u8::try_from(n).unwrap(), 0, 8, 0))).collect();
    let blocks = (0..20).rev().map(|n| block(n, 8, 2 + u32::from(n % 2))).collect();
    world.commit(vec![file(ino, pieces, 0)], blocks).unwrap();
    world.mutate(Op::Unlink { parent: Ino::ROOT, name: b"f".to_vec() }).unwrap();
    world.command(Command::Reclaim { inos: vec![ino] }).unwrap();
    // Once entry by entry as above, and once as one batch.
    let mut other = World::empty();
    let entries = world.entries.clone();
    other.transact(|tables| entries.iter().try_for_each(|entry| apply(tables, entry).map(drop)));
    assert_eq!(world.dump(), other.dump());
}

#[test]
fn a_hole_far_away_is_sought_in_steps_of_which_none_looks_at_the_whole_file() {
    const CHUNKS: u32 = 40_000;
    let mut world = World::new();
    let ino = huge_file(&mut world, "f", CHUNKS);
    let data = u64::from(CHUNKS) * CHUNK_SIZE;
    let seek = |world: &World, offset, hole| world.ask(|view| query::seek(view, ino, offset, hole));
    assert_eq!(seek(&world, 5, true), Ok(query::Sought::Found(data)), "without holes there is nothing to look at");
    world.mutate(Op::SetAttr { ino, set: SetAttr { size: Some(data + 9), ..SetAttr::default() } }).unwrap();
    let (mut at, mut steps) = (5, 0);
    while let query::Sought::Beyond(next) = seek(&world, at, true).unwrap() {
        assert!(next > at && next < data && next - at <= 4096 * CHUNK_SIZE, "from {at} to {next}");
        (at, steps) = (next, steps + 1);
    }
    assert_eq!((seek(&world, at, true), steps), (Ok(query::Sought::Found(data)), 9));
    assert_eq!(seek(&world, 5, false), Ok(query::Sought::Found(5)));
    assert_eq!(seek(&world, data, false), Err(Refusal::NotFound));
}

/// A file of `chunks` chunks that one block fills each, without a hole in between.
fn huge_file(world: &mut World, name: &str, chunks: u32) -> Ino {
    let ino = world.make(Ino::ROOT, name, Kind::File).unwrap();
    let (length, commit_chunks) = (BLOCK_SIZE_MAX, 8192);
    for first in (0..chunks).step_by(8192) {
        let indexes = first..chunks.min(first + commit_chunks);
        let pieces = indexes.map(|index| (index, piece(1, 0, length, 0))).collect();
        let blocks = vec![NewBlock { length, ..block(1, 8, 3) }];
        world.commit(vec![file(ino, pieces, 0)], blocks).unwrap();
    }
    ino
}

#[test]
#[ignore = "measures; run it with --ignored --nocapture"]
fn speed_on_huge_files() {
    const CHUNKS: u32 = 200_000;
    let mut world = World::new();
    let ino = huge_file(&mut world, "f", CHUNKS);
    let size = u64::from(CHUNKS) * CHUNK_SIZE;
    world.mutate(Op::SetAttr { ino, set: SetAttr { size: Some(size + 1), ..SetAttr::default() } }).unwrap();
    let timed = |what: &str, work: &mut dyn FnMut()| {
        let started = std::time::Instant::now();
        work();
        eprintln!("{what}: {:?}", started.elapsed());
    };
    timed("one query for a hole", &mut || assert!(world.ask(|view| query::seek(view, ino, 0, true)).is_ok()));
    timed("one query for data", &mut || assert!(world.ask(|view| query::seek(view, ino, 0, false)).is_ok()));
    let half = Op::Punch { ino, offset: 1, length: size / 2, grow: false };
    timed("punching half of it", &mut || drop(world.mutate(half.clone())));
    let none = Op::SetAttr { ino, set: SetAttr { size: Some(0), ..SetAttr::default() } };
    timed("truncating the other half", &mut || drop(world.mutate(none.clone())));
    world.check();
}

#[test]
#[ignore = "measures; run it with --ignored --nocapture"]
fn speed_of_apply() {
    for batch in [1, 32] {
        let mut world = World::new();
        let started = std::time::Instant::now();
        let count = 20_000;
        let entry = |world: &World, sequence: u64, op| Entry {
            time: Time { secs: 1, nanos: 0 },
            command: Command::Mutate {
                session: world.session,
                sequence: Sequence(sequence),
                answered_below: Sequence(sequence.saturating_sub(64).max(1)),
                op,
            },
        };
        let mut run = |ops: &mut dyn Iterator<Item = (u64, Op)>| {
            let started = std::time::Instant::now();
            let ops: Vec<_> = ops.map(|(n, op)| entry(&world, n, op)).collect();
            for entries in ops.chunks(batch) {
                world.transact(|tables| entries.iter().try_for_each(|entry| apply(tables, entry).map(drop)));
            }
            ops.len() as f64 / started.elapsed().as_secs_f64()
        };
        let creates = run(&mut (1..=count).map(|n| (n, make(Ino::ROOT, &format!("file-{n:08}"), Kind::File))));
        let commits = run(&mut (1..=count).map(|n| {
            let hash = BlockHash::of(&n.to_le_bytes());
            let new = NewBlock { hash, ..block(1, 4096, 3) };
            let piece = Piece { block: hash, ..piece(1, 0, 4096, 0) };
            (count + n, Op::Commit { files: vec![file(Ino(n + 1), vec![(0, piece)], 4096)], blocks: vec![new] })
        }));
        eprintln!("batches of {batch}: {creates:.0} creates/s, {commits:.0} commits/s, in {:?}", started.elapsed());
        world.check();
    }
}

#[test]
fn a_mount_can_tell_its_programs_beforehand_what_is_made() {
    let mut world = World::new();
    let directory = world.make(Ino::ROOT, "d", Kind::Directory).unwrap();
    let kinds =
        [Kind::File, Kind::Directory, Kind::Symlink, Kind::Fifo, Kind::Socket, Kind::CharDevice, Kind::BlockDevice];
    let mut count = 0;
    for mode in [0o755, holdfast_common::mode::SETGID | 0o777] {
        let set = SetAttr { mode: Some(mode), gid: Some(7), ..SetAttr::default() };
        world.mutate(Op::SetAttr { ino: directory, set }).unwrap();
        for kind in kinds {
            count += 1;
            let parent = world.ask(|view| query::attr(view, directory)).unwrap();
            let target = if kind == Kind::Symlink { b"to".to_vec() } else { Vec::new() };
            let new = NewInode {
                kind,
                mode: 0o6777 | 0o027 << holdfast_common::wire::meta::UMASK_SHIFT,
                uid: 3,
                gid: 4,
                rdev: 5,
                target,
            };
            let (name, time) = (count.to_string().into_bytes(), Time { secs: 9, nanos: count });
            let ino = Ino::chosen(SessionId(1), count).unwrap();
            let expected = new.attr(ino, &parent, time);
            let place = || Op::Place { parent: directory, name: name.clone(), new: new.clone(), ino, time };
            let made = world.mutate(place()).unwrap();
            assert_eq!(made, Mutated::Inode { attr: expected, created: true });
            let after = world.ask(|view| query::attr(view, directory)).unwrap();
            let links = parent.nlink + u32::from(kind == Kind::Directory);
            assert_eq!(
                after,
                holdfast_common::Attr {
                    size: parent.size + 1,
                    nlink: links,
                    mtime: time,
                    ctime: time,
                    data_version: parent.data_version + 1,
                    ..parent
                }
            );
            let again = Mutated::Inode { attr: expected, created: false };
            assert_eq!(world.mutate(place()), Ok(again), "asked for again, in another session perhaps");
        }
    }
    let (ino, time) = (Ino::chosen(SessionId(1), 1).unwrap(), Time { secs: 9, nanos: 0 });
    let new = NewInode { kind: Kind::File, mode: 0o644, uid: 0, gid: 0, rdev: 0, target: Vec::new() };
    let mut place = |name: &str, ino| {
        let name = name.as_bytes().to_vec();
        world.mutate(Op::Place { parent: directory, name, new: new.clone(), ino, time })
    };
    assert_eq!(place("other", ino), Err(Refusal::Exists), "the number is taken");
    assert_eq!(place("1", Ino::chosen(SessionId(1), 99).unwrap()), Err(Refusal::Exists), "the name is");
    assert_eq!(place("low", Ino(4711)), Err(Refusal::Invalid), "the server gives such numbers itself");
    assert!(Ino::chosen(SessionId(1 << 30), 1).is_none());
    world.check();
}

//! What the parts of one operation cost on one core: `cargo bench -p holdfast-tests`.

use std::{
    hint::black_box,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use holdfast_client::read::proof;
use holdfast_common::{
    Block, BlockHash, BootId, ChunkIndex, Epoch, Ino, Kind, Piece, Sequence, ServerId, SessionId, Time,
    disk::RealDisk,
    net::identity::{NodeName, Role},
    wire::{
        codec,
        meta::{FileCommit, Holder, MetaRequest, Mutated, NewBlock, NewInode, Op},
        storage::ByteRange,
    },
};
use holdfast_server::{
    meta::state::{Command, Entry, Reply, Tables, apply, initialize},
    storage::store::{CheckedBlock, Store, StoreOptions},
};
use holdfast_tests::fault::random_bytes;
use redb::{Database, Durability, backends::InMemoryBackend};

const BLOCK: usize = 1 << 20;
const SMALL: usize = 4096;
const HOLDERS: [ServerId; 3] = [ServerId(1), ServerId(2), ServerId(3)];

fn hashing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hash");
    for length in [SMALL, BLOCK] {
        let bytes = Bytes::from(random_bytes(1, length));
        let hash = BlockHash::of(&bytes);
        group.throughput(Throughput::Bytes(length as u64));
        group.bench_function(format!("{length} bytes"), |bench| bench.iter(|| BlockHash::of(black_box(&bytes))));
        group.bench_function(format!("{length} bytes with their tree"), |bench| {
            bench.iter(|| CheckedBlock::verify(hash, black_box(bytes.clone()), Epoch(0)).expect("it is its hash"));
        });
    }
}

fn storing(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Store::open(Arc::new(RealDisk), directory.path(), StoreOptions::default()).expect("open");
    let mut group = criterion.benchmark_group("store");
    let mut number = 0;
    for length in [SMALL, BLOCK] {
        group.throughput(Throughput::Bytes(length as u64));
        group.bench_function(format!("put {length} bytes"), |bench| {
            let fresh = || {
                number += 1;
                let block = Block::seal(Bytes::from(random_bytes(number, length))).expect("within the bounds");
                CheckedBlock::from_block(&block, Epoch(0))
            };
            bench.iter_batched(fresh, |block| store.put(&[block]).expect("put"), BatchSize::SmallInput);
        });
        let block = Block::seal(Bytes::from(random_bytes(0, length))).expect("within the bounds");
        store.put(&[CheckedBlock::from_block(&block, Epoch(0))]).expect("put");
        group.bench_function(format!("get {length} bytes"), |bench| {
            bench.iter(|| store.get(black_box(&block.hash())).expect("get"));
        });
    }
    let block = Block::seal(Bytes::from(random_bytes(0, BLOCK))).expect("within the bounds");
    let length = block.length();
    let wanted = proof::aligned(&(500_000..504_096), length);
    let range = ByteRange { offset: wanted.start, length: wanted.end - wanted.start };
    group.throughput(Throughput::Bytes(SMALL as u64));
    group.bench_function("get 4096 bytes of a block with their proof", |bench| {
        bench.iter(|| store.get_range(black_box(&block.hash()), range).expect("get"));
    });
    let (encoded, _) = store.get_range(&block.hash(), range).expect("get");
    group.bench_function("verify 4096 bytes of a block by their proof", |bench| {
        bench
            .iter(|| proof::open(block.hash(), length, wanted.clone(), black_box(&encoded)).expect("it proves itself"));
    });
}

fn make(number: u64) -> Op {
    let new = NewInode { kind: Kind::File, mode: 0o644, uid: 0, gid: 0, rdev: 0, target: Vec::new() };
    Op::Make { parent: Ino::ROOT, name: format!("file-{number}").into_bytes(), new, exclusive: true, open: false }
}

fn unlink(number: u64) -> Op {
    Op::Unlink { parent: Ino::ROOT, name: format!("file-{number}").into_bytes() }
}

/// All of the new file `made` is one block of 4 KiB.
fn commit(made: Mutated, number: u64) -> Op {
    let Mutated::Inode { attr, .. } = made else { panic!("a file was made, and {made:?} came of it") };
    let block = BlockHash::of(&number.to_le_bytes());
    let file = FileCommit {
        ino: attr.ino,
        pieces: vec![(ChunkIndex(0), Piece { offset: 0, length: 4096, block, block_offset: 0 })],
        size_at_least: 4096,
        mtime: Time::default(),
        clear_suid: false,
        only_over: Vec::new(),
    };
    let holders = HOLDERS.map(|server| Holder { server, boot: BootId(1), durable: true }).to_vec();
    Op::Commit { files: vec![file], blocks: vec![NewBlock { hash: block, length: 4096, holders, epoch: Epoch(0) }] }
}

/// A metadata database that counts its own entries.
struct Metadata {
    database: Database,
    session: SessionId,
    count: u64,
    names: u64,
}

impl Metadata {
    fn new() -> Self {
        let database = Database::builder().create_with_backend(InMemoryBackend::new()).expect("a database");
        let mut metadata = Self { database, session: SessionId(0), count: 0, names: 0 };
        let node = NodeName { role: Role::Client, id: 1 };
        let (host, mountpoint) = (String::new(), String::new());
        metadata.transact(|tables, _| initialize(tables).expect("a root"));
        metadata.transact(|tables, _| {
            let command = Command::OpenSession { node, instance: [1; 16], host, mountpoint };
            apply(tables, &Entry { time: Time::default(), command }).expect("a session");
        });
        metadata.session = SessionId(1);
        metadata.transact(|tables, _| {
            for server in HOLDERS {
                let address = ([127, 0, 0, 1], 1).into();
                let command = Command::RegisterServer { server, address, zone: String::new() };
                apply(tables, &Entry { time: Time::default(), command }).expect("a server");
            }
        });
        metadata
    }

    fn transact(&mut self, work: impl FnOnce(&mut Tables<'_>, &mut Self)) {
        let mut transaction = self.database.begin_write().expect("a transaction");
        transaction.set_durability(Durability::None).expect("before anything is written");
        let mut tables = Tables::open(&transaction).expect("tables");
        work(&mut tables, self);
        tables.finish().expect("finish");
        transaction.commit().expect("commit");
    }

    /// As many changes as come together when many mounts are busy, in one transaction.
    fn mutate(&mut self, ops: Vec<Op>) -> Vec<Mutated> {
        let mut answers = Vec::with_capacity(ops.len());
        self.transact(|tables, metadata| {
            for op in ops {
                metadata.count += 1;
                let sequence = Sequence(metadata.count);
                let command = Command::Mutate { session: metadata.session, sequence, answered_below: sequence, op };
                let applied = apply(tables, &Entry { time: Time::default(), command }).expect("no fault");
                match applied.outcome.expect("nothing speaks against it") {
                    Reply::Mutated(answer) => answers.push(answer),
                    other => panic!("a change was answered with {other:?}"),
                }
            }
        });
        answers
    }

    fn names(&mut self, files: u64) -> Range<u64> {
        self.names += files;
        self.names - files..self.names
    }

    /// One turn in the life of `files` new files: made, each with a block in three copies, and gone; how long each of the three took.
    fn turn(&mut self, files: u64) -> [Duration; 3] {
        let names = self.names(files);
        let (made, makes) = self.timed(names.clone().map(make).collect());
        let whole = made.into_iter().zip(names.clone()).map(|(answer, name)| commit(answer, name)).collect();
        let (_, commits) = self.timed(whole);
        let (_, unlinks) = self.timed(names.map(unlink).collect());
        [makes, commits, unlinks]
    }

    fn timed(&mut self, ops: Vec<Op>) -> (Vec<Mutated>, Duration) {
        let start = Instant::now();
        let answers = self.mutate(ops);
        (answers, start.elapsed())
    }
}

fn applying(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("apply");
    for files in [1, 100] {
        group.throughput(Throughput::Elements(files));
        for (stage, what) in ["new files", "commits of 4 KiB", "unlinks"].into_iter().enumerate() {
            let mut metadata = Metadata::new();
            group.bench_function(format!("{files} {what} in a transaction"), |bench| {
                bench.iter_custom(|turns| (0..turns).map(|_| metadata.turn(files)[stage]).sum());
            });
        }
    }
}

fn coding(criterion: &mut Criterion) {
    let request = MetaRequest::Mutate {
        session: SessionId(1),
        sequence: Sequence(2),
        answered_below: Sequence(1),
        durable: false,
        op: make(7),
    };
    let bytes = codec::encode(&request).expect("it can be said");
    let mut group = criterion.benchmark_group("codec");
    group.bench_function("encode a create", |bench| bench.iter(|| codec::encode(black_box(&request)).expect("said")));
    group.bench_function("decode a create", |bench| {
        bench.iter(|| codec::decode::<MetaRequest>(black_box(&bytes)).expect("heard"));
    });
}

criterion_group!(parts, hashing, storing, applying, coding);
criterion_main!(parts);

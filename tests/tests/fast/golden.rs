//! Golden bytes: the wire says today what it said yesterday.
//!
//! `golden.txt` has one line a sample: its name, a blank, its bytes in hex. A change there is a new version of the
//! protocol. New variants are added with `HOLDFAST_WRITE_GOLDEN=1 cargo test -p holdfast-tests --test fast golden`.

use std::{collections::BTreeMap, fmt::Write, fs, path::PathBuf};

use holdfast_common::{
    Attr, BlockHash, BootId, ChunkIndex, ClusterId, DirEntry, Epoch, Ino, Kind, Piece, Position, Refusal, Replicas,
    Sequence, ServerId, SessionId, Time,
    cluster::{ClusterMap, ServerInfo, ServerState, Standing},
    inventory::BucketDigest,
    locks::{Lock, LockClass, LockKind, LockOwner, LockRange},
    net::identity::Role,
    wire::{
        codec::{CodecError, decode, encode},
        enrol::{EnrolReply, EnrolRequest, Enrolled},
        meta::{
            AdminRequest, BlockPlace, Change, Changed, ClusterStatus, Comparison, CopyFault, Event, FileCommit,
            FileMap, Foreign, Holder, JournalEntry, Lease, LockAnswer, LockRequest, LostChange, LostPath, MetaAnswer,
            MetaReply, MetaRequest, MountStatus, Mutated, NewBlock, NewInode, Op, Query, Reach, RenameMode, Replayed,
            ServerStatus, SessionRequest, SetAttr, SetTime, Severity, StatFs, StorageLoad, StorageNotice, XattrMode,
        },
        storage::{ByteRange, PutBlock, Source, StorageAnswer, StorageReply, StorageRequest},
    },
};
use serde::{Serialize, de::DeserializeOwned};

#[derive(Debug)]
pub(crate) struct Sample {
    name: String,
    pub(crate) bytes: Vec<u8>,
}

/// Encodes each value, after making sure that it survives the way back.
fn add<T>(samples: &mut Vec<Sample>, group: &str, values: Vec<T>)
where
    T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    for value in values {
        let bytes = encode(&value).expect("a sample is short");
        assert_eq!(decode::<T>(&bytes).expect("a sample decodes"), value);
        let debug = format!("{value:?}");
        let variant: String = debug.chars().take_while(|c| c.is_alphanumeric()).collect();
        let number = samples.iter().filter(|sample| sample.name.starts_with(&format!("{group}.{variant}."))).count();
        samples.push(Sample { name: format!("{group}.{variant}.{number}"), bytes });
    }
}

/// How many variants an enum has on the wire: the decoder tells when it is asked for one that is not there.
fn variants<T: DeserializeOwned>() -> u32 {
    match decode::<T>(&u32::MAX.to_le_bytes()) {
        Err(CodecError::Malformed(text)) => {
            let digits = text.rsplit("< ").next().map(|rest| rest.chars().take_while(char::is_ascii_digit).collect());
            digits.and_then(|digits: String| digits.parse().ok()).unwrap_or_else(|| panic!("no count in {text:?}"))
        }
        _ => panic!("variant {} exists", u32::MAX),
    }
}

/// Every variant of `T` has a sample whose bytes begin with its number.
fn assert_complete<T: DeserializeOwned>(samples: &[Sample], group: &str) {
    let prefix = format!("{group}.");
    let shown: std::collections::BTreeSet<u32> = samples
        .iter()
        .filter(|sample| sample.name.starts_with(&prefix))
        .map(|sample| u32::from_le_bytes(sample.bytes[..4].try_into().expect("four bytes")))
        .collect();
    assert_eq!(shown, (0..variants::<T>()).collect(), "{group}: a variant without a sample");
}

fn time() -> Time {
    Time { secs: 1_700_000_000, nanos: 123_456_789 }
}

fn hash() -> BlockHash {
    BlockHash::of(b"golden")
}

fn attr() -> Attr {
    Attr {
        ino: Ino(7),
        kind: Kind::File,
        mode: 0o4755,
        uid: 1000,
        gid: 100,
        nlink: 2,
        size: 3 << 20,
        stored: 2 << 20,
        rdev: 0x0801,
        atime: time(),
        mtime: Time { secs: -1, nanos: 5 },
        ctime: time(),
        btime: Time::default(),
        data_version: 9,
        replicas: Replicas::new(2).expect("2 is in the range"),
    }
}

fn piece() -> Piece {
    Piece { offset: 4096, length: 100, block: hash(), block_offset: 12 }
}

fn file_map() -> FileMap {
    FileMap {
        data_version: 9,
        chunks: vec![(ChunkIndex(3), vec![piece()])],
        blocks: vec![BlockPlace { hash: hash(), length: 4242, holders: vec![ServerId(1), ServerId(3)] }],
    }
}

fn server() -> ServerInfo {
    ServerInfo {
        id: ServerId(2),
        address: ([10, 1, 2, 3], 7001).into(),
        zone: "rack-b".into(),
        state: ServerState::Suspect,
        weight: 250,
    }
}

fn load() -> StorageLoad {
    StorageLoad {
        capacity_bytes: 1,
        free_bytes: 2,
        stored_bytes: 3,
        blocks: 4,
        corrupt_found: 5,
        repaired: 6,
        quarantined: 7,
        load_percent: 8,
        memory_bytes: 9,
        queue_depth: 10,
        started_ms: 14,
        scrub_checked_bytes: 11,
        scrub_passes: 12,
        scrub_last_pass_secs: 13,
        puts: 15,
        gets: 16,
        request_mean_us: 17,
        put_p50_us: 18,
        put_p99_us: 19,
        get_p50_us: 20,
        get_p99_us: 21,
        cpu_percent: 22,
        disk_busy_percent: 23,
        memory_available_bytes: 24,
        network_bytes: 25,
        put_mean_us: 26,
        get_mean_us: 27,
        syncs: 28,
        sync_mean_us: 29,
    }
}

fn name() -> Vec<u8> {
    b"na\xffme".to_vec()
}

fn sessions() -> Vec<SessionRequest> {
    let session = SessionId(5);
    vec![
        SessionRequest::Open { instance: [3; 16], host: "host".into(), mountpoint: "/mnt".into() },
        SessionRequest::Renew { session, dirty_bytes: 77, repairs: 2 },
        SessionRequest::Reopen { session, opens: vec![Ino(8), Ino(9)], instance: Some(5), is_behind: false },
        SessionRequest::Close { session },
        SessionRequest::Opens { session, opened: vec![Ino(1)], released: vec![Ino(2)] },
        SessionRequest::Replay { session, part: 1, parts: 3, changes: vec![lost_change()] },
        SessionRequest::Relock { session, locks: vec![(Ino(7), lock())] },
        SessionRequest::Listen { session, heard: 3, instance: 8, since: Position(2) },
    ]
}

fn lost_change() -> LostChange {
    LostChange {
        position: Position(11),
        sequence: Sequence(4),
        op: Op::Unlink { parent: Ino::ROOT, name: name() },
        made: Some(Ino(9)),
        time: Some(time()),
    }
}

fn queries() -> Vec<Query> {
    let ino = Ino(7);
    vec![
        Query::Lookup { parent: Ino::ROOT, name: name() },
        Query::GetAttr { ino },
        Query::Open { ino, chunks: 16 },
        Query::ReadLink { ino },
        Query::ReadDir { ino, cookie: 99, entries_max: 512, plus: true, unless: None },
        Query::ReadDir { ino, cookie: 0, entries_max: 256, plus: true, unless: Some(7) },
        Query::GetXattr { ino, name: b"user.a".to_vec() },
        Query::ListXattr { ino },
        Query::Pieces { ino, first: ChunkIndex(4), count: 8 },
        Query::Seek { ino, offset: 1 << 33, hole: true },
        Query::StatFs,
        Query::ClusterMap { have: 6 },
    ]
}

fn ops() -> Vec<Op> {
    let (ino, parent) = (Ino(7), Ino::ROOT);
    let new = |kind, target: &[u8]| NewInode { kind, mode: 0o644, uid: 1, gid: 2, rdev: 3, target: target.to_vec() };
    let make = |kind, target| Op::Make { parent, name: name(), new: new(kind, target), exclusive: true, open: false };
    let rename = |mode| Op::Rename { from: parent, from_name: name(), to: Ino(8), to_name: b"new".to_vec(), mode };
    let xattr = |mode| Op::SetXattr { ino, name: b"user.a".to_vec(), value: vec![1, 2, 3], mode };
    let set = SetAttr {
        mode: Some(0o600),
        uid: Some(1),
        gid: None,
        size: Some(1 << 40),
        atime: Some(SetTime::Now),
        mtime: Some(SetTime::At(time())),
        clear_suid: true,
    };
    vec![
        make(Kind::File, b""),
        make(Kind::Directory, b""),
        make(Kind::Symlink, b"to"),
        make(Kind::Fifo, b""),
        make(Kind::Socket, b""),
        make(Kind::CharDevice, b""),
        make(Kind::BlockDevice, b""),
        Op::Link { ino, parent, name: name() },
        Op::Unlink { parent, name: name() },
        Op::Rmdir { parent, name: name() },
        Op::Remove { parent, name: name(), ino, time: time() },
        Op::Place { parent, name: name(), new: new(Kind::Fifo, b""), ino, time: time() },
        Op::PlaceOpen { parent, name: name(), new: new(Kind::File, b""), ino, time: time() },
        rename(RenameMode::Replace),
        rename(RenameMode::NoReplace),
        rename(RenameMode::Exchange),
        rename(RenameMode::Whiteout),
        Op::SetAttr { ino, set },
        xattr(XattrMode::Set),
        xattr(XattrMode::Create),
        xattr(XattrMode::Replace),
        Op::RemoveXattr { ino, name: b"user.a".to_vec() },
        Op::Commit { files: vec![file_commit()], blocks: vec![new_block()] },
        Op::CopyRange { from: ino, from_offset: 1, to: Ino(8), to_offset: 2, length: 3 },
        Op::Punch { ino, offset: 5, length: 6, grow: true },
        Op::Accessed { files: vec![(Ino(7), time())], always: true },
        Op::Append { file: file_commit(), blocks: vec![new_block()], at_size: 1 << 21 },
        Op::MakeUnnamed { parent, new: new(Kind::File, b""), linkable: true },
    ]
}

fn file_commit() -> FileCommit {
    FileCommit {
        ino: Ino(7),
        pieces: vec![(ChunkIndex(3), piece())],
        size_at_least: 1 << 22,
        mtime: time(),
        clear_suid: true,
        only_over: vec![(ChunkIndex(3), 0x0102_0304_0506_0708)],
    }
}

fn new_block() -> NewBlock {
    let holder = |server, durable| Holder { server: ServerId(server), boot: BootId(11), durable };
    NewBlock { hash: hash(), length: 4242, holders: vec![holder(1, true), holder(2, false)], epoch: Epoch(3) }
}

fn notices() -> Vec<StorageNotice> {
    let bad = |fault| StorageNotice::BadCopy { block: hash(), server: ServerId(1), fault, repaired: true };
    let address = "[::1]:7001".parse().expect("an address");
    vec![
        StorageNotice::Heartbeat { address, zone: "z".into(), boot: BootId(4), load: load() },
        bad(CopyFault::Missing),
        bad(CopyFault::Damaged),
        StorageNotice::BadCopies { blocks: vec![hash()] },
        StorageNotice::Failed { why: "EIO".into() },
    ]
}

fn admin() -> Vec<AdminRequest> {
    vec![
        AdminRequest::Status,
        AdminRequest::IssueToken { role: Role::Storage, valid_secs: 3600 },
        AdminRequest::Check,
        AdminRequest::Compare { server: ServerId(2), bucket: 7, mend: true },
        AdminRequest::Scrub,
        AdminRequest::Stand { server: ServerId(2), standing: Standing::Maintenance { until: time() } },
        AdminRequest::Journal { after: 9 },
        AdminRequest::Names { blocks: vec![hash()] },
        AdminRequest::Backup { backup: 3, part: 4 },
        AdminRequest::Rebalance,
        AdminRequest::SetReplicas { replicas: Replicas::new(5).expect("5 is in the range") },
        AdminRequest::StandDespite { server: ServerId(2), standing: Standing::Leaving },
        AdminRequest::Lost { after: Some(hash()) },
        AdminRequest::Mend,
    ]
}

fn mutated() -> Vec<Mutated> {
    vec![
        Mutated::Inode { attr: attr(), created: true },
        Mutated::Removed { attr: attr() },
        Mutated::Renamed { moved: attr(), replaced: Some(attr()) },
        Mutated::Done,
        Mutated::Committed(vec![Ok(attr()), Err(Refusal::Stale)]),
    ]
}

fn status() -> ClusterStatus {
    ClusterStatus {
        cluster: ClusterId([0xab; 16]),
        map_version: 3,
        servers: vec![ServerStatus {
            id: ServerId(1),
            address: ([127, 0, 0, 1], 7001).into(),
            zone: "z".into(),
            state: ServerState::Up,
            weight: 100,
            silent_ms: 12,
            boot: BootId(4),
            standing: Standing::Draining,
            left: Some(8),
            load: load(),
            since_ms: 16,
            reason: "silent".into(),
            hindered: "nobody takes its blocks".into(),
        }],
        mounts: vec![MountStatus {
            session: SessionId(5),
            host: "host".into(),
            mountpoint: "/mnt".into(),
            silent_ms: 1,
            open_files: 2,
            dirty_bytes: 3,
            repairs: 4,
        }],
        inodes: 5,
        blocks: 6,
        blocks_by_copies: [0, 1, 2, 3],
        owed: 7,
        copies_made: 8,
        corrupt_copies_met: 9,
        missing_copies_met: 10,
        copies_repaired: 11,
        unnamed: 12,
        condemned: 13,
        collected: 14,
        log_position: Position(12),
        durable_through: Position(11),
        backup_secs: 1_700_000_000,
        balance_left_bytes: 15,
        replicas: 3,
        replicas_followed_percent: 40,
        owed_secs: Some(17),
        balance_hindered: "zones".into(),
        bad_copies_waiting: 18,
    }
}

fn answers() -> Vec<MetaAnswer> {
    let entry = DirEntry { cookie: 3, name: name(), ino: Ino(7), kind: Kind::File, attr: Some(attr()) };
    let map = ClusterMap { version: 3, servers: vec![server()], replicas: Replicas::INHERITED };
    vec![
        MetaAnswer::Session { session: SessionId(5), renew_every_ms: 2000 },
        MetaAnswer::Done,
        MetaAnswer::Attr(attr()),
        MetaAnswer::Opened { attr: attr(), map: file_map() },
        MetaAnswer::Link(b"to".to_vec()),
        MetaAnswer::Directory { entries: vec![entry], end: true, parent: Some(Ino::ROOT), version: 7 },
        MetaAnswer::Unchanged,
        MetaAnswer::Bytes(vec![1, 2]),
        MetaAnswer::Names(vec![b"user.a".to_vec()]),
        MetaAnswer::Map(file_map()),
        MetaAnswer::Offset(1 << 33),
        MetaAnswer::StatFs(StatFs { capacity_bytes: 1, free_bytes: 2, inodes: 3 }),
        MetaAnswer::ClusterMap(map),
        MetaAnswer::Mutated { position: Position(6), outcome: Mutated::Done },
        MetaAnswer::Status(Box::new(status())),
        MetaAnswer::Token { secret: [1; 32], ca_fingerprint: [2; 32] },
        MetaAnswer::Violations(vec!["a sentence".into()]),
        MetaAnswer::MutatedIn {
            position: Position(6),
            outcome: Mutated::Done,
            directories: vec![attr()],
            leases: vec![Lease { directory: Ino(1), number: 9, sole: 11 }],
        },
        MetaAnswer::Reopened { replay_after: Some(Position(10)) },
        MetaAnswer::Replayed(vec![
            Replayed { sequence: Sequence(4), result: Ok(Position(13)) },
            Replayed { sequence: Sequence(5), result: Err(Refusal::Exists) },
        ]),
        MetaAnswer::OffsetBeyond(1 << 34),
        MetaAnswer::MutatedMany(vec![
            Ok(Changed {
                position: Position(6),
                outcome: Mutated::Done,
                directories: vec![attr()],
                leases: Vec::new(),
            }),
            Err(Refusal::NotFound),
        ]),
        MetaAnswer::Lock(LockAnswer::Free),
        MetaAnswer::Relocked { lost: vec![Ino(7)] },
        MetaAnswer::Events(vec![(4, Event::Granted { ticket: Sequence(6), foreign: foreign() })]),
        MetaAnswer::Events(vec![(5, Event::Recall { ino: Ino(7), number: 8 })]),
        MetaAnswer::Events(vec![(6, Event::AskAgain { ticket: Sequence(6) })]),
        MetaAnswer::Events(vec![(7, Event::RecallLease(Lease { directory: Ino(1), number: 9, sole: 0 }))]),
        MetaAnswer::Compared(Comparison { on_record: 5, missing: 3, mended: 2, extra: 1, named: vec![(hash(), 3)] }),
        MetaAnswer::Declined(vec!["a reason".into()]),
        MetaAnswer::Journal(vec![JournalEntry {
            number: 4,
            time: time(),
            severity: Severity::Warning,
            place: "here".into(),
            what: "this".into(),
            consequence: "little".into(),
            action: "nothing".into(),
        }]),
        MetaAnswer::BackupPart { backup: 3, bytes: vec![1, 2] },
        MetaAnswer::Paths(vec![LostPath { path: b"/a".to_vec(), ino: Ino(7), offset: 1 }]),
        MetaAnswer::Blocks(vec![hash()]),
        MetaAnswer::Mended { found: 3, made: 2 },
    ]
}

fn reply(result: Result<MetaAnswer, Refusal>) -> MetaReply {
    MetaReply { server_instance: 1, map_version: 2, durable_through: Position(3), epoch: Epoch(4), result }
}

fn refusals() -> Vec<Refusal> {
    (0..variants::<Refusal>()).map(|n| decode(&n.to_le_bytes()).expect("a variant by its number")).collect()
}

fn storage_requests() -> Vec<StorageRequest> {
    let put = PutBlock { hash: hash(), length: 4242, epoch: Epoch(2) };
    let source = Source { server: ServerId(3), address: ([10, 0, 0, 3], 7003).into() };
    vec![
        StorageRequest::Put { blocks: vec![put], durable: true },
        StorageRequest::Get { block: hash(), range: None },
        StorageRequest::Get { block: hash(), range: Some(ByteRange { offset: 16_384, length: 4096 }) },
        StorageRequest::Sync,
        StorageRequest::Has { blocks: vec![hash()] },
        StorageRequest::Repair { block: hash(), sources: vec![source] },
        StorageRequest::Obtain { block: hash(), sources: vec![source], epoch: Epoch(6) },
        StorageRequest::Delete { blocks: vec![hash()], epoch: Epoch(9) },
        StorageRequest::List { after: Some(hash()) },
        StorageRequest::Digest { bucket: 200 },
        StorageRequest::Scrub,
        StorageRequest::KeepBackup { number: 1_700_000_000, offset: 1 << 20, end: true },
        StorageRequest::Relay { block: put, durable: true, to: vec![source], patience_ms: 5000 },
    ]
}

fn storage_answers() -> Vec<StorageAnswer> {
    let boot = BootId(4);
    vec![
        StorageAnswer::Put { boot, durable: true },
        StorageAnswer::Get { block_length: 4242 },
        StorageAnswer::Sync { boot },
        StorageAnswer::Has { boot, present: vec![true, false] },
        StorageAnswer::Repaired { replaced: true },
        StorageAnswer::Obtained { boot },
        StorageAnswer::Deleted { count: 3 },
        StorageAnswer::List { blocks: vec![(hash(), Epoch(5))], end: true },
        StorageAnswer::Digest(BucketDigest { blocks: 3, digest: [7; 32] }),
        StorageAnswer::Scrubbing,
        StorageAnswer::Kept,
        StorageAnswer::Relayed { copies: vec![Ok(boot), Err(Refusal::Unavailable)] },
    ]
}

fn requests() -> Vec<MetaRequest> {
    let mutate = |op| MetaRequest::Mutate {
        session: SessionId(5),
        sequence: Sequence(6),
        answered_below: Sequence(4),
        durable: true,
        op,
    };
    vec![
        MetaRequest::Session(SessionRequest::Close { session: SessionId(5) }),
        MetaRequest::Query { session: SessionId(5), query: Query::StatFs },
        MetaRequest::MutateMany {
            session: SessionId(5),
            answered_below: Sequence(4),
            changes: vec![(Sequence(6), Op::Unlink { parent: Ino::ROOT, name: name() })],
        },
        mutate(Op::Unlink { parent: Ino::ROOT, name: name() }),
        MetaRequest::Barrier { session: SessionId(5) },
        MetaRequest::Storage(StorageNotice::BadCopy {
            block: hash(),
            server: ServerId(1),
            fault: CopyFault::Missing,
            repaired: false,
        }),
        MetaRequest::Admin(AdminRequest::Check),
        MetaRequest::Admin(AdminRequest::Compare { server: ServerId(2), bucket: 7, mend: false }),
        MetaRequest::Admin(AdminRequest::Scrub),
        MetaRequest::Lock {
            session: SessionId(5),
            request: LockRequest::Cancel { ticket: Sequence(3), since: Position(2) },
        },
    ]
}

fn lock() -> Lock {
    let owner = LockOwner { session: SessionId(5), class: LockClass::Description, id: 9 };
    Lock { owner, range: LockRange { first: 3, last: 4 }, kind: LockKind::Exclusive, pid: 77 }
}

fn foreign() -> Foreign {
    Foreign {
        through: Position(12),
        changes: vec![Change::Inode(Ino(7)), Change::Name(Ino(1), name())],
        reach: Reach::Recent,
    }
}

fn lock_requests() -> Vec<LockRequest> {
    let (ino, range, since) = (Ino(7), LockRange::WHOLE, Position(2));
    let set = |class, kind, wait| LockRequest::Set {
        sequence: Sequence(6),
        answered_below: Sequence(4),
        ino,
        class,
        owner: 9,
        range,
        kind,
        pid: 77,
        wait,
        since,
    };
    vec![
        set(LockClass::Process, Some(LockKind::Shared), true),
        set(LockClass::Flock, None, false),
        LockRequest::Cancel { ticket: Sequence(6), since },
        LockRequest::Test { ino, class: LockClass::Description, owner: 9, range, kind: LockKind::Exclusive },
        LockRequest::Return { ino, number: 8, locks: vec![lock()] },
    ]
}

fn lock_answers() -> Vec<LockAnswer> {
    let nothing = Foreign::default();
    let complete = Foreign { reach: Reach::Complete, ..Foreign::default() };
    vec![
        LockAnswer::Granted(foreign()),
        LockAnswer::Granted(nothing),
        LockAnswer::Granted(complete),
        LockAnswer::Held(lock()),
        LockAnswer::Waiting,
        LockAnswer::Free,
        LockAnswer::Delegated { foreign: foreign(), number: 8, valid_ms: 3000 },
    ]
}

fn enrolled() -> Enrolled {
    Enrolled {
        cluster: ClusterId([0xab; 16]),
        role: Role::Client,
        id: 3,
        certificate: vec![0x30, 1],
        ca: vec![0x30, 2],
    }
}

fn roles() -> Vec<Role> {
    vec![Role::Meta, Role::Storage, Role::Client, Role::Admin]
}

fn states() -> Vec<ServerState> {
    vec![
        ServerState::Joining,
        ServerState::Up,
        ServerState::Suspect,
        ServerState::Down,
        ServerState::Draining,
        ServerState::Maintenance,
    ]
}

/// Every message of the protocol at least once, every variant of it at least once.
pub(crate) fn samples() -> Vec<Sample> {
    let mut all = Vec::new();
    add(&mut all, "MetaRequest", requests());
    add(&mut all, "SessionRequest", sessions());
    add(&mut all, "Query", queries());
    add(&mut all, "Op", ops());
    add(&mut all, "StorageNotice", notices());
    add(&mut all, "AdminRequest", admin());
    add(&mut all, "MetaReply", vec![reply(Ok(MetaAnswer::Done)), reply(Err(Refusal::NotFound))]);
    add(&mut all, "MetaAnswer", answers());
    add(&mut all, "Mutated", mutated());
    add(&mut all, "LockRequest", lock_requests());
    add(&mut all, "LockAnswer", lock_answers());
    add(&mut all, "Refusal", refusals());
    add(&mut all, "StorageRequest", storage_requests());
    add(
        &mut all,
        "StorageReply",
        vec![StorageReply(Ok(StorageAnswer::Get { block_length: 1 })), StorageReply(Err(Refusal::BlockMissing))],
    );
    add(&mut all, "StorageAnswer", storage_answers());
    add(&mut all, "EnrolRequest", vec![EnrolRequest { secret: [7; 32], csr: vec![0x30, 3] }]);
    add(&mut all, "EnrolReply", vec![EnrolReply(Ok(enrolled())), EnrolReply(Err(Refusal::BadToken))]);
    add(&mut all, "Role", roles());
    add(&mut all, "ServerState", states());
    all
}

#[test]
fn every_variant_has_a_sample() {
    let all = samples();
    assert_complete::<MetaRequest>(&all, "MetaRequest");
    assert_complete::<SessionRequest>(&all, "SessionRequest");
    assert_complete::<Query>(&all, "Query");
    assert_complete::<Op>(&all, "Op");
    assert_complete::<StorageNotice>(&all, "StorageNotice");
    assert_complete::<AdminRequest>(&all, "AdminRequest");
    assert_complete::<MetaAnswer>(&all, "MetaAnswer");
    assert_complete::<Mutated>(&all, "Mutated");
    assert_complete::<LockRequest>(&all, "LockRequest");
    assert_complete::<LockAnswer>(&all, "LockAnswer");
    assert_complete::<Refusal>(&all, "Refusal");
    assert_complete::<StorageRequest>(&all, "StorageRequest");
    assert_complete::<StorageAnswer>(&all, "StorageAnswer");
    assert_complete::<Role>(&all, "Role");
    assert_complete::<ServerState>(&all, "ServerState");
}

fn golden_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fast/golden.txt")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}

#[test]
fn the_wire_says_what_it_always_said() {
    let found: BTreeMap<String, String> =
        samples().into_iter().map(|sample| (sample.name, hex(&sample.bytes))).collect();
    if std::env::var_os("HOLDFAST_WRITE_GOLDEN").is_some() {
        let text: String = found.iter().map(|(name, bytes)| format!("{name} {bytes}\n")).collect();
        fs::write(golden_path(), text).expect("write the golden bytes");
    }
    let text = fs::read_to_string(golden_path()).expect("read the golden bytes");
    let golden: BTreeMap<String, String> =
        text.lines().filter_map(|line| line.split_once(' ')).map(|(name, bytes)| (name.into(), bytes.into())).collect();
    for (name, bytes) in &golden {
        assert_eq!(found.get(name), Some(bytes), "{name} has changed on the wire");
    }
    let unknown: Vec<_> = found.keys().filter(|name| !golden.contains_key(*name)).collect();
    assert!(unknown.is_empty(), "no golden bytes yet for {unknown:?}");
}

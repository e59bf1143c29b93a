//! A whole cluster, metadata and segments together, whose machines all lose their power at the n-th write of any.
//!
//! The disks are simulated; a request is a function call. What fsync acknowledged must be there afterwards, a suffix of
//! the rest may be lost, and nothing that is left may dangle.

use std::time::Duration;

use bytes::Bytes;
use holdfast_common::{
    BlockHash, BootId, ChunkIndex, Epoch, Ino, Kind, Piece, Refusal, Sequence, ServerId, SessionId, Time,
    wire::{
        meta::{
            AdminRequest, BlockPlace, FileCommit, FileMap, Holder, MetaAnswer, MetaRequest, Mutated, NewBlock,
            NewInode, Op, Query, SessionRequest,
        },
        storage::{PutBlock, StorageAnswer, StorageRequest},
    },
};
use holdfast_tests::{
    fault::random_bytes,
    sim_disk::{SimDisk, Trouble},
};

use crate::node::{Life, STORAGE_SERVERS, run};

/// Files that the history makes, one after the other.
const FILES: u64 = 12;

/// File `number` is one block, from a few bytes to several hash groups.
fn content(number: u64) -> Bytes {
    let length = [100, 5000, 40_000][usize::try_from(number % 3).expect("below 3")];
    Bytes::from(random_bytes(number, length))
}

fn name(number: u64) -> Vec<u8> {
    format!("file-{number}").into_bytes()
}

/// Every third commit is an fsync; before it, copies are only visible.
fn is_durable(number: u64) -> bool {
    number % 3 == 2
}

/// What the cluster had said yes to: how many files are visible, and how many of them durable.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    visible: u64,
    durable: u64,
}

struct Writer<'a> {
    life: &'a Life,
    session: SessionId,
    sequence: u64,
}

impl<'a> Writer<'a> {
    async fn open(life: &'a Life) -> Option<Self> {
        let open = SessionRequest::Open { instance: [1; 16], host: "host".into(), mountpoint: "/mnt".into() };
        match life.meta(MetaRequest::Session(open)).await? {
            Ok(MetaAnswer::Session { session, .. }) => {
                let writer = Self { life, session, sequence: 0 };
                writer.recover().await?;
                Some(writer)
            }
            _ => None,
        }
    }

    /// The mount has been restarted too, and remembers nothing.
    async fn recover(&self) -> Option<()> {
        let session = self.session;
        let reopen = SessionRequest::Reopen { session, opens: Vec::new(), instance: None, is_behind: false };
        match self.life.meta(MetaRequest::Session(reopen)).await? {
            Ok(MetaAnswer::Reopened { replay_after: None }) => Some(()),
            Ok(MetaAnswer::Reopened { replay_after: Some(_) }) => {
                let replay = SessionRequest::Replay { session, part: 0, parts: 1, changes: Vec::new() };
                self.life.meta(MetaRequest::Session(replay)).await?.ok().map(drop)
            }
            other => panic!("a reopen was answered with {other:?}"),
        }
    }

    async fn mutate(&mut self, durable: bool, op: Op) -> Option<Mutated> {
        self.sequence += 1;
        let sequence = Sequence(self.sequence);
        let request = MetaRequest::Mutate { session: self.session, sequence, answered_below: sequence, durable, op };
        match self.life.meta(request).await? {
            Ok(MetaAnswer::Mutated { outcome, .. } | MetaAnswer::MutatedIn { outcome, .. }) => Some(outcome),
            _ => None,
        }
    }

    /// `None`: something did not answer yes, so nothing is promised.
    async fn write_file(&mut self, number: u64) -> Option<()> {
        let new = NewInode { kind: Kind::File, mode: 0o644, uid: 0, gid: 0, rdev: 0, target: Vec::new() };
        let make = Op::Make { parent: Ino::ROOT, name: name(number), new, exclusive: true, open: false };
        let Some(Mutated::Inode { attr, .. }) = self.mutate(false, make).await else { return None };
        let bytes = content(number);
        let hash = BlockHash::of(&bytes);
        let length = u32::try_from(bytes.len()).expect("a small block");
        let holders = self.put(hash, &bytes, length, number.is_multiple_of(2)).await?;
        let piece = Piece { offset: 0, length, block: hash, block_offset: 0 };
        let file = FileCommit {
            ino: attr.ino,
            pieces: vec![(ChunkIndex(0), piece)],
            size_at_least: u64::from(length),
            mtime: Time::default(),
            clear_suid: false,
            only_over: Vec::new(),
        };
        let commit =
            Op::Commit { files: vec![file], blocks: vec![NewBlock { hash, length, holders, epoch: Epoch(0) }] };
        match self.mutate(is_durable(number), commit).await {
            Some(Mutated::Committed(files)) if files[0].is_ok() => Some(()),
            _ => None,
        }
    }

    async fn put(&self, hash: BlockHash, bytes: &Bytes, length: u32, durable: bool) -> Option<Vec<Holder>> {
        let mut holders = Vec::new();
        for server in STORAGE_SERVERS {
            let put = StorageRequest::Put { blocks: vec![PutBlock { hash, length, epoch: Epoch(0) }], durable };
            match self.life.storage(server, put, bytes.clone()).await?.0 {
                Ok(StorageAnswer::Put { boot, durable }) => {
                    holders.push(Holder { server: ServerId(server), boot: BootId(boot.0), durable });
                }
                _ => return None,
            }
        }
        Some(holders)
    }
}

/// Writes files until there are `FILES` or the power is gone.
async fn write_until_trouble(disks: Vec<SimDisk>) -> Said {
    let mut said = Said::default();
    let Some(life) = Life::start(disks).await else { return said };
    let Some(mut writer) = Writer::open(&life).await else { return said };
    for number in 0..FILES {
        if writer.write_file(number).await.is_none() {
            break;
        }
        said.visible = number + 1;
        if is_durable(number) {
            said.durable = said.visible;
        }
    }
    said
}

/// The bytes of file `number`, from every server that the metadata names: none may be without them.
async fn read_file(life: &Life, session: SessionId, number: u64, history: &str) -> Option<Bytes> {
    let lookup = MetaRequest::Query { session, query: Query::Lookup { parent: Ino::ROOT, name: name(number) } };
    let attr = match life.meta(lookup).await.expect("the power is on") {
        Ok(MetaAnswer::Attr(attr)) => attr,
        Err(Refusal::NotFound) => return None,
        other => panic!("{history}: lookup of file {number}: {other:?}"),
    };
    let open = MetaRequest::Query { session, query: Query::Open { ino: attr.ino, chunks: 4 } };
    let map = match life.meta(open).await.expect("the power is on") {
        Ok(MetaAnswer::Opened { map, .. }) => map,
        other => panic!("{history}: open of file {number}: {other:?}"),
    };
    let FileMap { blocks, .. } = map;
    let Some(place) = blocks.first() else { return Some(Bytes::new()) };
    assert!(place.holders.len() >= 2, "{history}: file {number} has only {:?}", place.holders);
    for holder in &place.holders {
        fetch(life, *holder, place, history).await;
    }
    Some(fetch(life, place.holders[0], place, history).await)
}

async fn fetch(life: &Life, holder: ServerId, place: &BlockPlace, history: &str) -> Bytes {
    let get = StorageRequest::Get { block: place.hash, range: None };
    let (answer, bytes) = life.storage(holder.0, get, Bytes::new()).await.expect("the power is on");
    assert!(answer.is_ok(), "{history}: server {holder} is named for {} and says {answer:?}", place.hash);
    assert_eq!(BlockHash::of(&bytes), place.hash, "{history}: server {holder} has other bytes");
    bytes
}

/// At least the first `promised` files are there and whole; of the later ones, each that is there is whole, and none is
/// there without those before it.
async fn check(disks: Vec<SimDisk>, promised: u64, history: &str) {
    let life = Life::start(disks).await.unwrap_or_else(|| panic!("{history}: the cluster does not start again"));
    let writer = Writer::open(&life).await.unwrap_or_else(|| panic!("{history}: no session can be opened"));
    let mut is_over = false;
    for number in 0..FILES {
        let found = read_file(&life, writer.session, number, history).await;
        assert!(found.is_none() || !is_over, "{history}: file {number} is there and an earlier one is not");
        let is_whole = found.as_ref() == Some(&content(number));
        assert!(number >= promised || is_whole, "{history}: file {number} was promised and is not there");
        // Made and not yet written is a state that the history went through; anything else in between is not.
        assert!(is_whole || found.is_none_or(|bytes| bytes.is_empty()), "{history}: file {number} has other bytes");
        is_over |= !is_whole;
    }
    match life.meta(MetaRequest::Admin(AdminRequest::Check)).await.expect("the power is on") {
        Ok(MetaAnswer::Violations(sentences)) => assert!(sentences.is_empty(), "{history}: {sentences:?}"),
        other => panic!("{history}: the check was answered with {other:?}"),
    }
}

fn fresh_disks() -> Vec<SimDisk> {
    SimDisk::rack(1 + STORAGE_SERVERS.count())
}

#[test]
fn a_power_cut_of_all_machines_at_any_write_keeps_what_fsync_acknowledged_and_leaves_nothing_dangling() {
    let disks = fresh_disks();
    let said = run(write_until_trouble(disks.clone()));
    assert_eq!(said.visible, FILES, "without trouble all is well");
    let changes = disks[0].changes();
    let stride = if std::env::var_os("HOLDFAST_LONG_TESTS").is_some() { 1 } else { 3 };
    let mut promised = 0;
    for at in (1..=changes).step_by(stride) {
        let disks = fresh_disks();
        disks[0].strike(at, Trouble::PowerCut);
        let said = run(write_until_trouble(disks.clone()));
        promised += said.durable;
        let history = format!("power cut at change {at} of {changes}, {said:?}");
        let after = disks.iter().zip(0..).map(|(disk, n)| disk.after_power_cut(at * 10 + n)).collect();
        run(check(after, said.durable, &history));
        let after = disks.iter().map(SimDisk::after_kill).collect();
        run(check(after, said.visible, &format!("all processes killed at change {at}, {said:?}")));
    }
    assert!(promised > changes / 4, "hardly anything was ever promised, so hardly anything was tested");
}

#[test]
fn a_storage_server_that_loses_power_alone_is_no_reason_to_lose_anything() {
    for victim in STORAGE_SERVERS {
        let disks = fresh_disks();
        let said = run(write_until_trouble(disks.clone()));
        let after = disks
            .iter()
            .zip(0..)
            .map(|(disk, n)| if n == victim { disk.after_power_cut(u64::from(n)) } else { disk.after_kill() });
        let history = format!("storage server {victim} lost its power, {said:?}");
        // Copies that were only visible there are lost; the others have them, and the metadata must not name the lost.
        run(settle_and_check(after.collect(), said.visible, &history));
    }
}

/// As [`check`], once the metadata server has found out what is lost.
async fn settle_and_check(disks: Vec<SimDisk>, promised: u64, history: &str) {
    let life = Life::start(disks.clone()).await.unwrap_or_else(|| panic!("{history}: the cluster does not start"));
    let mut writer = Writer::open(&life).await.unwrap_or_else(|| panic!("{history}: no session can be opened"));
    let settled = tokio::time::timeout(Duration::from_secs(20), async {
        let set = Op::SetAttr { ino: Ino::ROOT, set: holdfast_common::wire::meta::SetAttr::default() };
        while writer.mutate(true, set.clone()).await.is_none() {}
    });
    settled.await.unwrap_or_else(|_| panic!("{history}: nothing becomes durable any more"));
    for number in 0..promised {
        let found = read_file(&life, writer.session, number, history).await;
        assert!(found == Some(content(number)), "{history}: file {number} is not whole");
    }
}

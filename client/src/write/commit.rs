//! Commits of many files in one round trip.

use std::{collections::BTreeMap, sync::Arc};

use holdfast_common::{
    Attr, BlockHash, Position, Refusal,
    limits::COMMIT_FILES_MAX,
    wire::meta::{FileCommit, Mutated, NewBlock, Op},
};
use tracing::{debug, error};

use crate::{
    fs::{Errno, FsResult},
    remote::{
        batch::{Batcher, Waiting},
        meta::{Applied, MetaClient},
    },
};

/// One file's part of a commit.
#[derive(Clone, Debug)]
pub struct Item {
    pub file: FileCommit,
    pub blocks: Vec<NewBlock>,
    /// How often locks had been lost when it was written.
    pub losses: u64,
}

/// What the commit did to the file.
#[derive(Clone, Copy, Debug)]
pub struct Committed {
    pub attr: Attr,
    pub position: Position,
}

/// Two queues, so that nobody who only closes a file waits for a disk.
#[derive(Debug)]
pub struct Committer {
    visible: Arc<Batcher<Item, FsResult<Committed>>>,
    durable: Arc<Batcher<Item, FsResult<Committed>>>,
}

/// Items that share one message, which bounds its pieces and bytes.
const BATCH_MAX: usize = 32;
const QUEUE_MAX: usize = 1024;
const _: () = assert!(BATCH_MAX <= COMMIT_FILES_MAX);

impl Committer {
    /// Spawns the queues' workers on the current runtime.
    pub fn start(meta: &Arc<MetaClient>) -> Self {
        let queue = |durable: bool| {
            let meta = Arc::clone(meta);
            Batcher::start(QUEUE_MAX, BATCH_MAX, move |batch| {
                let meta = Arc::clone(&meta);
                async move { commit_all(&meta, batch, durable).await }
            })
        };
        Self { visible: queue(false), durable: queue(true) }
    }

    /// Applies `item`; with `durable` it survives a power cut when this returns.
    pub async fn commit(&self, item: Item, durable: bool) -> FsResult<Committed> {
        let queue = if durable { &self.durable } else { &self.visible };
        queue.ask(item).await.unwrap_or(Err(Errno(libc::EIO)))
    }
}

async fn commit_all(meta: &Arc<MetaClient>, batch: Vec<Waiting<Item, FsResult<Committed>>>, durable: bool) {
    let groups = split(batch);
    for group in groups {
        commit_group(meta, group, durable).await;
    }
}

/// Keeps every message within the limit on pieces.
fn split(batch: Vec<Waiting<Item, FsResult<Committed>>>) -> Vec<Vec<Waiting<Item, FsResult<Committed>>>> {
    let mut groups: Vec<Vec<Waiting<_, _>>> = Vec::new();
    let mut pieces = 0;
    for waiting in batch {
        let more = waiting.item.file.pieces.len();
        match groups.last_mut() {
            Some(group) if pieces + more <= holdfast_common::limits::COMMIT_PIECES_MAX => group.push(waiting),
            _ => {
                pieces = 0;
                groups.push(vec![waiting]);
            }
        }
        pieces += more;
    }
    groups
}

async fn commit_group(meta: &Arc<MetaClient>, group: Vec<Waiting<Item, FsResult<Committed>>>, durable: bool) {
    let losses = group.iter().map(|waiting| waiting.item.losses).min().unwrap_or(0);
    let op = merged(group.iter().map(|waiting| &waiting.item));
    let result = meta.mutate_unless_lost(op, durable, losses).await;
    if result.is_err() && group.len() > 1 {
        // One bad item must not fail the others: each goes alone, and gets its own answer.
        for waiting in group {
            let op = merged(std::iter::once(&waiting.item));
            let result = meta.mutate_unless_lost(op, durable, waiting.item.losses).await;
            answer(vec![waiting], result);
        }
        return;
    }
    answer(group, result);
}

fn merged<'a>(items: impl Iterator<Item = &'a Item>) -> Op {
    let mut files = Vec::new();
    let mut blocks: BTreeMap<BlockHash, NewBlock> = BTreeMap::new();
    for item in items {
        files.push(item.file.clone());
        for block in &item.blocks {
            blocks.entry(block.hash).or_insert_with(|| block.clone());
        }
    }
    Op::Commit { files, blocks: blocks.into_values().collect() }
}

fn answer(group: Vec<Waiting<Item, FsResult<Committed>>>, result: FsResult<Applied>) {
    let answers: Vec<FsResult<Committed>> = match result {
        Ok(Applied { position, outcome: Mutated::Committed(files), .. }) if files.len() == group.len() => {
            files.into_iter().map(|file| one_file(file, position)).collect()
        }
        Ok(other) => {
            error!(?other, "the metadata server answered a commit with something else");
            vec![Err(Errno(libc::EIO)); group.len()]
        }
        Err(errno) => vec![Err(errno); group.len()],
    };
    for (waiting, result) in group.into_iter().zip(answers) {
        // Whoever asked may have given up; the commit stands all the same.
        if waiting.answer.send(result).is_err() {
            debug!("nobody waits for this commit any more");
        }
    }
}

fn one_file(file: Result<Attr, Refusal>, position: Position) -> FsResult<Committed> {
    file.map(|attr| Committed { attr, position }).map_err(|refusal| Errno(refusal.errno()))
}

//! What a metadata server does with more and more files: asked directly, without a mount between.
//!
//! Half of the files are in one directory, the other half in directories of a thousand. Each has one block of its own on three servers
//! that do not exist: only what the metadata server does is measured.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use futures_util::future::join_all;
use holdfast_common::{
    BlockHash, BootId, ChunkIndex, Epoch, Ino, Kind, Piece, Refusal, Sequence, ServerId, SessionId, Time,
    net::{
        Endpoint, Frame, Peers,
        identity::{NodeName, Role},
        quic::{NetOptions, Node},
        tls::{Ca, NODE_VALIDITY},
    },
    wire::{
        codec::{decode, encode},
        meta::{
            FileCommit, Holder, MetaAnswer, MetaReply, MetaRequest, Mutated, NewBlock, NewInode, Op, Query,
            SessionRequest, StorageLoad, StorageNotice,
        },
    },
};

use crate::{
    ask::now,
    cluster::{Cluster, Options, PATIENCE},
};

/// Requests under way at once.
const AT_ONCE: usize = 256;
const DIRECTORY_SIZE: u64 = 1000;
const LOOKUPS: u64 = 50_000;
const DEADLINE: Duration = Duration::from_secs(60);
const PAGE: u32 = 2048;
/// Entries that are listed.
const LISTED_MAX: u64 = 1_000_000;
/// Of the server, in bytes, as it is by default and as somebody would choose it for many files.
const CACHES: [u64; 2] = [256 << 20, 4 << 30];
/// Files that are made with the second.
const MORE_FILES: u64 = 200_000;
/// Files that are looked up before that is measured, so that the second is as full as it gets.
const WARM_UPS: u64 = 40;

/// What was seen with so many files.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub files: u64,
    /// Of the server, bytes.
    pub cache: u64,
    /// A second, of the files that were added since the step before: each with its block.
    pub creates: f64,
    pub lookups: f64,
    /// Entries of the large directory, with their attributes.
    pub listed: f64,
    /// Of the server, bytes.
    pub resident: u64,
    pub on_disk: u64,
    /// Seconds from the start of its process to its first answer: after kill -9, and after SIGTERM.
    pub restart_killed: f64,
    pub restart_stopped: f64,
}

struct Client {
    node: Arc<Node>,
    to: Endpoint,
    session: SessionId,
    sequence: u64,
}

/// Grows one cluster's metadata to each of `steps`, which increase.
pub fn run(steps: &[u64]) -> Result<Vec<Step>> {
    let cluster = Cluster::prepare(&Options::default());
    cluster.set("meta/meta.toml", "backup_every_secs", 0);
    cluster.meta().start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = Client::open(&cluster).await?;
        let large = client.directory(Ino::ROOT, "large").await?;
        let (mut made, mut parent, mut done) = (0, Ino::ROOT, Vec::new());
        let most = steps.last().copied().unwrap_or(0);
        let turns = steps.iter().map(|files| (*files, CACHES[0])).chain([(most + MORE_FILES, CACHES[1])]);
        for (files, cache) in turns {
            if cache != CACHES[0] {
                cluster.meta().terminate(PATIENCE);
                cluster.set("meta/meta.toml", "cache_bytes", format!("{}MiB", cache >> 20));
                client.restart(&cluster).await?;
                client = Client::open(&cluster).await?;
                for _ in 0..WARM_UPS {
                    client.renew().await?;
                    client.lookups(large, made).await?;
                }
            }
            let (began, first) = (Instant::now(), made);
            while made < files {
                if made.is_multiple_of(2 * DIRECTORY_SIZE) {
                    client.renew().await?;
                    parent = client.directory(Ino::ROOT, &format!("dir-{made}")).await?;
                }
                let end = files.min(made + AT_ONCE as u64).min((made / (2 * DIRECTORY_SIZE) + 1) * 2 * DIRECTORY_SIZE);
                client.files(made..end, [large, parent]).await?;
                made = end;
            }
            let creates = (made - first) as f64 / began.elapsed().as_secs_f64();
            let lookups = client.lookups(large, made).await?;
            let listed = client.list(large, (made / 2).min(LISTED_MAX)).await?;
            let resident = cluster.meta().resident_bytes();
            let on_disk = std::fs::metadata(cluster.path().join("meta/data/meta.redb"))?.len();
            cluster.meta().kill();
            let restart_killed = client.restart(&cluster).await?;
            cluster.meta().terminate(PATIENCE);
            let restart_stopped = client.restart(&cluster).await?;
            client = Client::open(&cluster).await?;
            let step =
                Step { files, cache, creates, lookups, listed, resident, on_disk, restart_killed, restart_stopped };
            eprintln!("{step:?}");
            done.push(step);
        }
        Ok(done)
    })
}

/// Markdown.
pub fn table(steps: &[Step]) -> String {
    let mut table = "| files | cache, MiB | create and commit, 1/s | lookup, 1/s | list, entries/s | memory, MiB | tables, MiB | restart after kill -9, s | after SIGTERM, s |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n".to_owned();
    for step in steps {
        table += &format!(
            "| {} | {} | {:.0} | {:.0} | {:.0} | {} | {} | {:.2} | {:.2} |\n",
            step.files,
            step.cache >> 20,
            step.creates,
            step.lookups,
            step.listed,
            step.resident >> 20,
            step.on_disk >> 20,
            step.restart_killed,
            step.restart_stopped
        );
    }
    table
}

impl Client {
    async fn open(cluster: &Cluster) -> Result<Self> {
        let to = Endpoint {
            address: cluster.get("client.toml", "meta").parse()?,
            name: NodeName { role: Role::Meta, id: 1 },
        };
        // A server that has just been started is not there yet.
        let began = Instant::now();
        while !cluster.meta().log().contains("is ready") && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        register_servers(cluster, to).await?;
        let node = bind(cluster, Role::Client, 99)?;
        let mut client = Self { node, to, session: SessionId(0), sequence: 0 };
        let instance = rand::random();
        let open = SessionRequest::Open { instance, host: "bench".into(), mountpoint: "/bench".into() };
        let MetaAnswer::Session { session, .. } = client.ask(&MetaRequest::Session(open)).await? else {
            bail!("no session was opened")
        };
        client.session = session;
        Ok(client)
    }

    /// As a mount does: a server that cannot answer now is asked again.
    async fn ask(&self, request: &MetaRequest) -> Result<MetaAnswer> {
        let header = encode(request)?;
        let began = Instant::now();
        loop {
            let frame = Frame { header: header.clone(), payload: Vec::new() };
            let answer = self.node.call(self.to, frame, DEADLINE).await?;
            match decode::<MetaReply>(&answer.header)?.result {
                Err(Refusal::Unavailable) if began.elapsed() < PATIENCE => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                result => return Ok(result?),
            }
        }
    }

    /// A session that is not renewed ends.
    async fn renew(&self) -> Result<()> {
        let renewal = SessionRequest::Renew { session: self.session, dirty_bytes: 0, repairs: 0 };
        self.ask(&MetaRequest::Session(renewal)).await.map(drop)
    }

    /// Carries out mutations, all at once.
    async fn mutate(&mut self, ops: Vec<Op>) -> Result<Vec<Mutated>> {
        let (session, first) = (self.session, self.sequence + 1);
        self.sequence += ops.len() as u64;
        let requests: Vec<MetaRequest> = (first..)
            .zip(ops)
            .map(|(sequence, op)| {
                let (sequence, answered_below) = (Sequence(sequence), Sequence(first));
                MetaRequest::Mutate { session, sequence, answered_below, durable: false, op }
            })
            .collect();
        let answers = join_all(requests.iter().map(|request| self.ask(request))).await;
        let outcome = |answer| match answer {
            MetaAnswer::Mutated { outcome, .. } | MetaAnswer::MutatedIn { outcome, .. } => Ok(outcome),
            other => bail!("a mutation was answered with {other:?}"),
        };
        answers.into_iter().map(|answer| answer.and_then(outcome)).collect()
    }

    async fn directory(&mut self, parent: Ino, name: &str) -> Result<Ino> {
        let made = self.mutate(vec![make(parent, name, Kind::Directory)]).await?;
        ino(made.first().context("no answer")?)
    }

    /// Makes files, each with a block: those with even numbers in the first directory, the others in the second.
    async fn files(&mut self, numbers: std::ops::Range<u64>, directories: [Ino; 2]) -> Result<()> {
        let parent = |number: u64| directories[usize::from(!number.is_multiple_of(2))];
        let makes = numbers.clone().map(|number| make(parent(number), &number.to_string(), Kind::File)).collect();
        let made = self.mutate(makes).await?;
        let inos: Vec<Ino> = made.iter().map(ino).collect::<Result<_>>()?;
        let files: Vec<(u64, Ino)> = numbers.zip(inos).collect();
        self.mutate(files.chunks(64).map(commit).collect()).await.map(drop)
    }

    /// How many files are found a second, of names here and there.
    async fn lookups(&self, directory: Ino, files: u64) -> Result<f64> {
        let began = Instant::now();
        let mut number: u64 = 1;
        for _ in 0..LOOKUPS / AT_ONCE as u64 {
            let requests: Vec<MetaRequest> = (0..AT_ONCE)
                .map(|_| {
                    number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let name = ((number >> 20) % (files / 2) * 2).to_string().into_bytes();
                    MetaRequest::Query { session: self.session, query: Query::Lookup { parent: directory, name } }
                })
                .collect();
            let answers = join_all(requests.iter().map(|request| self.ask(request))).await;
            answers.into_iter().collect::<Result<Vec<_>>>()?;
        }
        Ok((LOOKUPS / AT_ONCE as u64 * AT_ONCE as u64) as f64 / began.elapsed().as_secs_f64())
    }

    async fn list(&self, directory: Ino, count: u64) -> Result<f64> {
        let (began, mut cookie, mut seen) = (Instant::now(), 0, 0);
        while seen < count {
            let query = Query::ReadDir { ino: directory, cookie, entries_max: PAGE, plus: true, unless: None };
            let MetaAnswer::Directory { entries, end, .. } =
                self.ask(&MetaRequest::Query { session: self.session, query }).await?
            else {
                bail!("a listing was answered with something else")
            };
            seen += entries.len() as u64;
            cookie = entries.last().map_or(cookie, |entry| entry.cookie);
            if end {
                break;
            }
        }
        Ok(seen as f64 / began.elapsed().as_secs_f64())
    }

    /// Starts the server, and returns the seconds until it answers.
    async fn restart(&self, cluster: &Cluster) -> Result<f64> {
        let began = Instant::now();
        cluster.meta().start();
        while began.elapsed() < Duration::from_secs(600) {
            let node = bind(cluster, Role::Client, 98)?;
            let query = MetaRequest::Query { session: SessionId(0), query: Query::ClusterMap { have: 0 } };
            let frame = Frame { header: encode(&query)?, payload: Vec::new() };
            if node.call(self.to, frame, Duration::from_millis(500)).await.is_ok() {
                return Ok(began.elapsed().as_secs_f64());
            }
        }
        bail!("the server does not come back")
    }
}

fn bind(cluster: &Cluster, role: Role, id: u32) -> Result<Arc<Node>> {
    let ca = Ca::load(&cluster.path().join("ca"))?;
    let credentials = ca.issue_credentials(NodeName { role, id }, now(), NODE_VALIDITY)?;
    let options = NetOptions { connect_timeout: Duration::from_millis(500), ..NetOptions::default() };
    Ok(Node::bind(([127, 0, 0, 1], 0).into(), credentials, options)?)
}

/// Three storage servers say once that they are there.
async fn register_servers(cluster: &Cluster, to: Endpoint) -> Result<()> {
    for id in 1..=3 {
        let (address, boot) = (([127, 0, 0, 1], 9).into(), BootId(1));
        let load = StorageLoad { capacity_bytes: 1 << 40, free_bytes: 1 << 40, ..StorageLoad::default() };
        let beat = StorageNotice::Heartbeat { address, zone: String::new(), boot, load };
        let frame = Frame { header: encode(&MetaRequest::Storage(beat))?, payload: Vec::new() };
        let answer = bind(cluster, Role::Storage, id)?.call(to, frame, DEADLINE).await?;
        decode::<MetaReply>(&answer.header)?.result?;
    }
    Ok(())
}

fn make(parent: Ino, name: &str, kind: Kind) -> Op {
    let new = NewInode { kind, mode: 0o644, uid: 0, gid: 0, rdev: 0, target: Vec::new() };
    Op::Make { parent, name: name.as_bytes().to_vec(), new, exclusive: true, open: false }
}

fn ino(made: &Mutated) -> Result<Ino> {
    match made {
        Mutated::Inode { attr, .. } => Ok(attr.ino),
        other => bail!("a file was made, and {other:?} came of it"),
    }
}

fn commit(files: &[(u64, Ino)]) -> Op {
    let block = |number: u64| BlockHash::of(&number.to_le_bytes());
    let holder = |server| Holder { server: ServerId(server), boot: BootId(1), durable: true };
    let file = |&(number, ino): &(u64, Ino)| FileCommit {
        ino,
        pieces: vec![(ChunkIndex(0), Piece { offset: 0, length: 4096, block: block(number), block_offset: 0 })],
        size_at_least: 4096,
        mtime: Time::default(),
        clear_suid: false,
        only_over: Vec::new(),
    };
    let new = |&(number, _): &(u64, Ino)| NewBlock {
        hash: block(number),
        length: 4096,
        holders: (1..=3).map(holder).collect(),
        epoch: Epoch(0),
    };
    Op::Commit { files: files.iter().map(file).collect(), blocks: files.iter().map(new).collect() }
}

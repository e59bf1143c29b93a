//! `holdfast fsck`: everything that must be true of a cluster, checked while it runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, IsTerminal, Write},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::Args;
use holdfast_common::{
    BlockHash, Refusal, ServerId,
    cluster::ServerState,
    inventory::BUCKETS,
    limits::{HASH_LIST_MAX, PATHS_MAX},
    net::{Endpoint, quic::Node},
    wire::meta::{AdminRequest, ClusterStatus, Comparison, LostPath, MetaAnswer},
};
use serde_json::json;

use super::{
    admin::{AskError, Target, call, with_node},
    error::CliResult,
    print,
};

/// Exit status of a check that has found something that is not mended.
const UNSOUND: u8 = 4;
/// Questions that a server that is busy is asked before it counts as silent.
const TRIES: usize = 5;
/// Between two of them, if it looks at everything for somebody else.
const BUSY_PAUSE: Duration = Duration::from_secs(1);
/// Rounds of mending: each finds some thousand rows.
const ROUNDS_MAX: usize = 1000;
/// Those after another in which nothing could be done about what was found: it had changed meanwhile.
const IDLE_ROUNDS_MAX: usize = 3;

/// Check a cluster, and mend it
///
/// Checks every invariant of the metadata, and compares what each storage server has with what it is on record for. The cluster goes on
/// working meanwhile. Exit status: 0 if all is well or has been mended, 4 if something is left, 1 if it could not be checked.
#[derive(Debug, Args)]
pub(super) struct FsckArgs {
    #[command(flatten)]
    pub target: Target,
    /// Have copies made of what a server should have and does not, and indexes, lists and counts of the metadata made again
    #[arg(long)]
    pub repair: bool,
    /// As one JSON object, for programs
    #[arg(long)]
    pub json: bool,
}

/// One server's part of the report.
#[derive(Debug)]
struct Compared {
    server: ServerId,
    state: ServerState,
    /// `None`: it did not answer.
    comparison: Option<Comparison>,
}

#[derive(Debug)]
struct Report {
    /// Rows of the metadata that were made again; `None`: not now.
    corrected: Option<u64>,
    violations: Vec<String>,
    servers: Vec<Compared>,
    /// Blocks of which no copy is left, as far as is known.
    lost: u64,
    /// Files that name them.
    paths: Vec<LostPath>,
}

pub(super) fn run(args: &FsckArgs) -> CliResult<ExitCode> {
    let report = with_node(&args.target.load()?, |node, to| check(node, to, args.repair))??;
    match args.json {
        true => print(&format!("{:#}\n", report.json()))?,
        false => print(&report.text(args.repair))?,
    }
    Ok(if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::from(UNSOUND) })
}

async fn check(node: Arc<Node>, to: Endpoint, repair: bool) -> Result<Report, AskError> {
    let (mut violations, mut corrected) = (violations(&node, to).await?, Some(0));
    if repair && !violations.is_empty() {
        corrected = mend(&node, to).await?;
        violations = self::violations(&node, to).await?;
    }
    let status = status(&node, to).await?;
    let mut servers = Vec::with_capacity(status.servers.len());
    for server in &status.servers {
        let comparison = match server.state {
            state if state.is_up() => compare(&node, to, server.id, repair).await?,
            _ => None,
        };
        servers.push(Compared { server: server.id, state: server.state, comparison });
    }
    let mut lost = lost_among(servers.iter().filter_map(|it| it.comparison.as_ref()));
    lost.extend(nowhere(&node, to).await?);
    let paths = names(&node, to, &lost).await?;
    Ok(Report { corrected, violations, servers, lost: lost.len() as u64, paths })
}

async fn violations(node: &Arc<Node>, to: Endpoint) -> Result<Vec<String>, AskError> {
    match patiently(node, to, AdminRequest::Check).await? {
        MetaAnswer::Violations(violations) => Ok(violations),
        _ => Err(AskError::Unexpected),
    }
}

/// Has what follows from other metadata made again, until nothing is found or nothing can be done about it. How many rows were made;
/// `None`: it cannot be done now.
async fn mend(node: &Arc<Node>, to: Endpoint) -> Result<Option<u64>, AskError> {
    let (mut all, mut idle) = (0, 0);
    for _ in 0..ROUNDS_MAX {
        let (found, made) = match patiently(node, to, AdminRequest::Mend).await {
            Ok(MetaAnswer::Mended { found, made }) => (found, made),
            Ok(_) => return Err(AskError::Unexpected),
            Err(AskError::Refused(Refusal::Unavailable)) => return Ok(Some(all).filter(|all| *all > 0)),
            Err(error) => return Err(error),
        };
        all += made;
        idle = if made == 0 { idle + 1 } else { 0 };
        if found == 0 || idle == IDLE_ROUNDS_MAX {
            break;
        }
    }
    Ok(Some(all))
}

/// Who looks at everything does so for one at a time.
async fn patiently(node: &Arc<Node>, to: Endpoint, request: AdminRequest) -> Result<MetaAnswer, AskError> {
    for _ in 1..TRIES {
        match call(node, to, request.clone()).await {
            Err(AskError::Refused(Refusal::Unavailable)) => tokio::time::sleep(BUSY_PAUSE).await,
            answer => return answer,
        }
    }
    call(node, to, request).await
}

/// Blocks that no server has which is on record for them.
fn lost_among<'a>(comparisons: impl Iterator<Item = &'a Comparison>) -> BTreeSet<BlockHash> {
    let mut missing: BTreeMap<BlockHash, (u32, u32)> = BTreeMap::new();
    for (hash, holders) in comparisons.flat_map(|found| &found.named) {
        let (times, most) = missing.entry(*hash).or_default();
        *times += 1;
        // The first that is mended is taken off the record before the next is looked at.
        *most = (*most).max(*holders);
    }
    missing.into_iter().filter(|(_, (times, holders))| times >= holders).map(|(hash, _)| hash).collect()
}

/// Blocks that files name and that nobody is on record for.
async fn nowhere(node: &Arc<Node>, to: Endpoint) -> Result<BTreeSet<BlockHash>, AskError> {
    let mut found = BTreeSet::new();
    loop {
        let after = found.last().copied();
        let MetaAnswer::Blocks(page) = call(node, to, AdminRequest::Lost { after }).await? else {
            return Err(AskError::Unexpected);
        };
        let is_last = page.len() < HASH_LIST_MAX;
        found.extend(page);
        if is_last {
            return Ok(found);
        }
    }
}

async fn names(node: &Arc<Node>, to: Endpoint, lost: &BTreeSet<BlockHash>) -> Result<Vec<LostPath>, AskError> {
    if lost.is_empty() {
        return Ok(Vec::new());
    }
    let blocks = lost.iter().copied().take(HASH_LIST_MAX).collect();
    match call(node, to, AdminRequest::Names { blocks }).await? {
        MetaAnswer::Paths(paths) => Ok(paths),
        _ => Err(AskError::Unexpected),
    }
}

async fn status(node: &Arc<Node>, to: Endpoint) -> Result<ClusterStatus, AskError> {
    match call(node, to, AdminRequest::Status).await? {
        MetaAnswer::Status(status) => Ok(*status),
        _ => Err(AskError::Unexpected),
    }
}

async fn compare(node: &Arc<Node>, to: Endpoint, server: ServerId, mend: bool) -> Result<Option<Comparison>, AskError> {
    let mut sum = Comparison::default();
    for bucket in BUCKETS {
        progress(server, bucket);
        let Some(found) = compare_bucket(node, to, AdminRequest::Compare { server, bucket, mend }).await? else {
            return Ok(None);
        };
        sum.on_record += found.on_record;
        sum.missing += found.missing;
        sum.mended += found.mended;
        sum.extra += found.extra;
        sum.named.extend(found.named);
    }
    Ok(Some(sum))
}

async fn compare_bucket(node: &Arc<Node>, to: Endpoint, request: AdminRequest) -> Result<Option<Comparison>, AskError> {
    for _ in 0..TRIES {
        match call(node, to, request.clone()).await {
            Ok(MetaAnswer::Compared(found)) => return Ok(Some(found)),
            Ok(_) => return Err(AskError::Unexpected),
            Err(AskError::Refused(Refusal::Unavailable) | AskError::Call(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn progress(server: ServerId, bucket: u8) {
    let mut error = io::stderr();
    if error.is_terminal() {
        let percent = u32::from(bucket) * 100 / 255;
        // Whoever does not see it misses nothing.
        drop(write!(
            error,
            "\rcomparing storage server {server}: {percent} %{}",
            if bucket == 255 { "\n" } else { "" }
        ));
    }
}

impl Compared {
    fn is_sound(&self) -> bool {
        self.comparison.as_ref().is_some_and(|found| found.missing == found.mended)
    }

    fn text(&self, repair: bool) -> String {
        let Self { server, state, comparison } = self;
        let Some(Comparison { on_record, missing, mended, extra, named: _ }) = comparison else {
            return format!("Storage server {server} is {state} and was not compared.\n");
        };
        let mut text = format!("Storage server {server}: {on_record} blocks on record");
        match (missing, repair) {
            (0, _) => text += ", all there",
            (_, false) => text += &format!(", {missing} MISSING (--repair has them copied)"),
            (_, true) => text += &format!(", {missing} missing, of {mended} copies are being made"),
        }
        if *extra > 0 {
            text += &format!("; {extra} that are not on record (new, or deleted in time)");
        }
        text + ".\n"
    }
}

impl Report {
    fn is_sound(&self) -> bool {
        self.violations.is_empty() && self.lost == 0 && self.servers.iter().all(Compared::is_sound)
    }

    fn text(&self, repair: bool) -> String {
        let mut text = String::new();
        match self.corrected {
            Some(0) => {}
            Some(rows) => text += &format!("Metadata: {rows} rows that follow from others were made again.\n"),
            None => {
                text += "Metadata: nothing can be mended now: mounts say again what was lost, or somebody else looks at all. Try later.\n"
            }
        }
        text.extend(self.violations.iter().map(|sentence| format!("Metadata: {sentence}.\n")));
        if self.violations.is_empty() {
            text += "Metadata: every invariant holds.\n";
        }
        self.servers.iter().for_each(|server| text += &server.text(repair));
        if self.lost > 0 {
            text += &format!("{} blocks are LOST: no server has a copy.\n", self.lost);
        }
        for LostPath { path, ino, offset } in &self.paths {
            let name = if path.is_empty() { "(no name any more)".into() } else { String::from_utf8_lossy(path) };
            text += &format!("LOST from byte {offset}: {name} (inode {ino})\n");
        }
        if self.paths.len() == PATHS_MAX {
            text += "There are more.\n";
        }
        text + if self.is_sound() { "All is well.\n" } else { "Not all is well.\n" }
    }

    fn json(&self) -> serde_json::Value {
        let server = |compared: &Compared| {
            let found = compared.comparison.as_ref().map(|found| {
                let Comparison { on_record, missing, mended, extra, named: _ } = found;
                json!({ "on_record": on_record, "missing": missing, "mended": mended, "extra": extra })
            });
            json!({ "id": compared.server.0, "state": compared.state.to_string(), "compared": found })
        };
        let servers: Vec<_> = self.servers.iter().map(server).collect();
        let path = |lost: &LostPath| {
            let LostPath { path, ino, offset } = lost;
            json!({ "path": String::from_utf8_lossy(path), "inode": ino, "offset": offset })
        };
        let files: Vec<_> = self.paths.iter().map(path).collect();
        json!({
            "sound": self.is_sound(),
            "corrected_rows": self.corrected,
            "violations": self.violations,
            "lost": self.lost,
            "lost_files": files,
            "more_lost_files": self.paths.len() == PATHS_MAX,
            "servers": servers,
        })
    }
}

#[cfg(test)]
mod tests {
    use holdfast_common::Ino;

    use super::*;

    fn report(missing: u64, mended: u64) -> Report {
        let comparison = Some(Comparison { on_record: 10, missing, mended, extra: 2, named: Vec::new() });
        let compared = |server, comparison| Compared { server: ServerId(server), state: ServerState::Up, comparison };
        let servers = vec![compared(1, comparison)];
        Report { corrected: Some(0), violations: Vec::new(), servers, lost: 0, paths: Vec::new() }
    }

    #[test]
    fn what_is_missing_and_not_mended_is_not_well() {
        assert!(report(0, 0).is_sound() && report(3, 3).is_sound());
        assert!(!report(3, 0).is_sound() && !report(3, 2).is_sound());
        assert!(!Report { violations: vec!["x".into()], ..report(0, 0) }.is_sound());
        assert!(!Report { lost: 1, ..report(0, 0) }.is_sound());
        let silent = Compared { server: ServerId(2), state: ServerState::Down, comparison: None };
        assert!(!Report { servers: vec![silent], ..report(0, 0) }.is_sound());
    }

    #[test]
    fn what_none_has_that_is_on_record_for_it_is_lost() {
        let hash = |n: u8| BlockHash([n; 32]);
        let found = |named: Vec<(BlockHash, u32)>| Comparison { named, ..Comparison::default() };
        // The second while it is being mended; of the third, another server has a copy.
        let all = [
            found(vec![(hash(1), 2), (hash(2), 3), (hash(3), 2)]),
            found(vec![(hash(1), 2), (hash(2), 2)]),
            found(vec![(hash(2), 1)]),
        ];
        assert_eq!(lost_among(all.iter()), BTreeSet::from([hash(1), hash(2)]));
    }

    #[test]
    fn the_report_is_exactly_this() {
        let expected = "\
Metadata: every invariant holds.
Storage server 1: 10 blocks on record, 3 MISSING (--repair has them copied); 2 that are not on record (new, or deleted in time).
Not all is well.
";
        assert_eq!(report(3, 0).text(false), expected);
        let corrected = Report { corrected: Some(7), ..report(0, 0) };
        assert!(corrected.is_sound());
        assert!(
            corrected
                .text(true)
                .starts_with("Metadata: 7 rows that follow from others were made again.\nMetadata: every")
        );
        assert_eq!(corrected.json()["corrected_rows"], 7);
        let later = Report { corrected: None, violations: vec!["x".into()], ..report(0, 0) };
        assert!(later.text(true).starts_with("Metadata: nothing can be mended now"));
        let path = LostPath { path: b"/a/b".to_vec(), ino: Ino(7), offset: 1 << 20 };
        let lost = Report { lost: 1, paths: vec![path], ..report(0, 0) };
        assert!(lost.text(false).contains("LOST from byte 1048576: /a/b (inode 7)\nNot all is well."));
        assert_eq!(lost.json()["lost_files"][0]["path"], "/a/b");
        assert_eq!(report(3, 0).json()["servers"][0]["compared"]["missing"], 3);
    }
}

//! How many copies are kept: by the whole cluster, and of a file or a tree of directories.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use clap::Args;
use holdfast_common::{
    Replicas,
    cluster::Standing,
    config::ClientConfig,
    limits::REPLICAS_MAX,
    wire::meta::{AdminRequest, ClusterStatus, MetaAnswer, REPLICAS_ATTRIBUTE, ServerStatus},
};
use serde_json::json;

use super::{
    admin::{AskError, Target, ask, ask_status},
    error::{CliError, CliResult},
    print,
    progress::{Progress, say},
};
use crate::sys;

/// Between two looks at how far it has come.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Looks in a row in which nothing comes of it: that is said.
const IDLE_LOOKS: u32 = 20;

/// Show or change how many copies are kept, by the cluster or of a tree of directories
///
/// Without a number, shows the cluster's. With a number alone, changes it: copies that are missing are made and those that are too many
/// deleted, which goes on if this command is interrupted. With paths on a mount, sets a number of their own for these and everything below;
/// what is made there later has it too. Each block has the most copies that any of its files wants. Refused, with the reasons, if there are
/// not enough servers; of paths that is looked at, and the copies waited for, if `--dir` or `--config` says which cluster they are of.
/// `getfattr -n holdfast.replicas PATH` shows what a file or directory has.
#[derive(Debug, Args)]
pub(super) struct ReplicasArgs {
    /// 1 to 5; or `inherit`, for paths: as many as the cluster keeps
    #[arg(value_name = "NUMBER", value_parser = parse)]
    pub number: Option<Replicas>,
    /// Files and directories on a mount
    #[arg(value_name = "PATH", requires = "number")]
    pub paths: Vec<PathBuf>,
    #[command(flatten)]
    pub target: Target,
    /// With paths: also if there are too few servers for so many copies now
    #[arg(long, requires = "paths")]
    pub force: bool,
    /// Return at once
    #[arg(long)]
    pub no_wait: bool,
    /// What came of it as one JSON object, for programs
    #[arg(long)]
    pub json: bool,
}

fn parse(text: &str) -> Result<Replicas, String> {
    match text {
        "inherit" => Ok(Replicas::INHERITED),
        text => text
            .parse()
            .ok()
            .and_then(Replicas::new)
            .ok_or_else(|| format!("a number from 1 to {REPLICAS_MAX}, or `inherit`")),
    }
}

pub(super) fn run(args: &ReplicasArgs) -> CliResult {
    match args.number {
        Some(replicas) if !args.paths.is_empty() => assign(args, replicas),
        Some(replicas) => change(args, replicas),
        None => show(args, &ask_status(&args.target.load()?)?, None),
    }
}

fn change(args: &ReplicasArgs, replicas: Replicas) -> CliResult {
    if replicas == Replicas::INHERITED {
        return Err(CliError::new("the cluster inherits from nobody: give a number, or paths on a mount"));
    }
    let config = args.target.load()?;
    match ask(&config, AdminRequest::SetReplicas { replicas })? {
        MetaAnswer::Done => {}
        MetaAnswer::Declined(reasons) => return Err(CliError::new(format!("refused: {}", reasons.join("; ")))),
        _ => return Err(AskError::Unexpected.into()),
    }
    let status = if args.no_wait { ask_status(&config)? } else { until_followed(&config)? };
    show(args, &status, Some(!args.no_wait))
}

/// Waits until every block has as many copies as are wanted.
fn until_followed(config: &ClientConfig) -> CliResult<ClusterStatus> {
    let (mut looking, mut copying, mut idle) = (Progress::new(), Progress::new(), 0);
    loop {
        let status = ask_status(config)?;
        let percent = status.replicas_followed_percent;
        match (percent, status.owed) {
            (100, left) => copying.show(&format!("{left} copies are missing"), left),
            (percent, _) => looking.show("blocks are looked through", u64::from(100 - percent)),
        }
        if (percent, status.owed) == (100, 0) {
            return Ok(status);
        }
        idle = if percent == 100 && status.owed_secs.is_none() { idle + 1 } else { 0 };
        if idle == IDLE_LOOKS {
            say(&format!("waiting: {} blocks are owed a copy, and none was made lately", status.owed))?;
        }
        thread::sleep(LOOK_EVERY);
    }
}

fn show(args: &ReplicasArgs, status: &ClusterStatus, waited: Option<bool>) -> CliResult {
    let ClusterStatus { replicas, owed, replicas_followed_percent: percent, .. } = status;
    if args.json {
        let report = json!({ "replicas": replicas, "followed_percent": percent, "owed": owed, "waited": waited });
        return print(&format!("{report:#}\n"));
    }
    let state = match (*percent, *owed) {
        (100, 0) => "every block has as many as are wanted".to_owned(),
        (100, owed) => format!("{owed} blocks are owed some"),
        (percent, _) => format!("{percent} % of the blocks have been looked through since that was said"),
    };
    print(&format!("The cluster keeps {replicas} copies of what has no number of its own: {state}.\n"))
}

/// What has been set.
#[derive(Debug, Default, PartialEq, Eq)]
struct Set {
    files: u64,
    directories: u64,
}

/// The cluster, if one is named: the mount may be another one's than that which is here, and who only has a mount may do without.
fn cluster(target: &Target) -> CliResult<Option<ClientConfig>> {
    let is_named = target.dir.is_some() || target.config.is_some();
    is_named.then(|| target.load()).transpose()
}

/// Why what is at some paths should not have so many copies now; `None`: nothing speaks against it.
fn objection(status: &ClusterStatus, replicas: Replicas) -> Option<String> {
    let count = replicas.own()?;
    let takes = |it: &&ServerStatus| it.state.is_up() && it.standing == Standing::Serving;
    let takers = status.servers.iter().filter(takes).count();
    (takers < count).then(|| {
        format!("{count} copies need {count} storage servers that are up and take blocks: there are {takers} (--force sets it all the same)")
    })
}

fn assign(args: &ReplicasArgs, replicas: Replicas) -> CliResult {
    let config = cluster(&args.target)?;
    if let (Some(config), false) = (&config, args.force)
        && let Some(reason) = objection(&ask_status(config)?, replicas)
    {
        return Err(CliError::new(format!("refused: {reason}")));
    }
    let mut set = Set::default();
    for path in &args.paths {
        let failed = |error| CliError::new(format!("{}: {}", path.display(), explained(&error)));
        let top = fs::symlink_metadata(path).map_err(failed)?;
        assign_below(path, &top, top.dev(), replicas, &mut set).map_err(failed)?;
    }
    let Set { files, directories } = set;
    // What is forced may never be.
    let waited = match &config {
        Some(config) if !args.no_wait && !args.force => {
            // The cluster knows: an attribute is set when it is.
            until_followed(config).map(|_| true)?
        }
        _ => false,
    };
    if args.json {
        let report =
            json!({ "replicas": replicas.own(), "files": files, "directories": directories, "waited": waited });
        return print(&format!("{report:#}\n"));
    }
    let number = replicas.own().map_or("as many copies as the cluster".to_owned(), |count| format!("{count} copies"));
    let when = if waited { "have" } else { "are to have" };
    print(&format!("{files} files {when} {number}, and what is made in {directories} directories will.\n"))
}

/// Directories before what is in them, so that what is made meanwhile has the number too.
fn assign_below(
    path: &Path,
    metadata: &fs::Metadata,
    device: u64,
    replicas: Replicas,
    set: &mut Set,
) -> io::Result<()> {
    let kind = metadata.file_type();
    if metadata.dev() != device || !(kind.is_file() || kind.is_dir()) {
        return Ok(());
    }
    assign_one(path, replicas)?;
    if kind.is_file() {
        set.files += 1;
        return Ok(());
    }
    set.directories += 1;
    for entry in fs::read_dir(path)? {
        let path = entry?.path();
        let below = fs::symlink_metadata(&path).and_then(|found| assign_below(&path, &found, device, replicas, set));
        match below {
            // Deleted meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            below => below?,
        }
    }
    Ok(())
}

fn assign_one(path: &Path, replicas: Replicas) -> io::Result<()> {
    match replicas.own() {
        Some(count) => sys::set_attribute(path, REPLICAS_ATTRIBUTE, count.to_string().as_bytes()),
        None => match sys::remove_attribute(path, REPLICAS_ATTRIBUTE) {
            Err(error) if error.raw_os_error() == Some(libc::ENODATA) => Ok(()),
            removed => removed,
        },
    }
}

fn explained(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "is not on a mount of Holdfast".to_owned(),
        Some(libc::EPERM) => "belongs to somebody else: only its owner and root may change that".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_from_one_to_five_and_inherit_are_taken_and_nothing_else() {
        assert_eq!(parse("inherit"), Ok(Replicas::INHERITED));
        assert_eq!(parse("1").unwrap().own(), Some(1));
        assert_eq!(parse("5").unwrap().own(), Some(5));
        for wrong in ["0", "6", "-1", "", "three", "256", "257"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_path_elsewhere_is_named_with_a_sentence() {
        let elsewhere = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        assert_eq!(explained(&elsewhere), "is not on a mount of Holdfast");
    }
}

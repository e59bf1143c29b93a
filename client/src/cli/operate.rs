//! What an operator wants of a storage server: to be emptied, to be away for a while, to leave.

use std::{
    io::{self, IsTerminal, Write},
    thread,
    time::Duration,
};

use clap::{Args, Subcommand};
use holdfast_common::{
    ServerId, Time,
    cluster::{ServerState, Standing},
    config::ClientConfig,
    wire::meta::{AdminRequest, ClusterStatus, MetaAnswer, ServerStatus},
};
use serde_json::json;

use super::{
    admin::{AskError, Target, ask, ask_status},
    error::{CliError, CliResult},
    print,
    status::size,
};
use crate::mount::options::parse_time;

/// Between two looks at how far it has come.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The metadata server plans every second.
const BALANCE_LOOK_EVERY: Duration = Duration::from_millis(2500);
const BAR_WIDTH: usize = 30;

/// Which storage server.
#[derive(Debug, Args)]
pub(super) struct Which {
    /// Number of the storage server, as `holdfast status` shows it
    #[arg(value_name = "SERVER")]
    pub server: u32,
    #[command(flatten)]
    pub target: Target,
    /// What came of it as one JSON object, for programs
    #[arg(long)]
    pub json: bool,
}

/// Empty a storage server, which stays in the cluster
///
/// Each of its blocks gets copies on others, and is deleted on it then; it takes no new ones. That goes on if this command is
/// interrupted, until `holdfast undrain`. Refused, with the reasons, if the copies would have nowhere to go.
#[derive(Debug, Args)]
pub(super) struct DrainArgs {
    #[command(flatten)]
    pub which: Which,
    /// Return at once
    #[arg(long)]
    pub no_wait: bool,
}

/// Empty a storage server, and remove it from the cluster then
///
/// As `holdfast drain`; when it is empty it is removed, and not let in again under its number. One that is down is emptied from the
/// copies that others have.
#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    #[command(flatten)]
    pub which: Which,
    /// Return at once
    #[arg(long)]
    pub no_wait: bool,
}

/// Have a storage server take blocks again that was drained, or was about to be removed
#[derive(Debug, Args)]
pub(super) struct UndrainArgs {
    #[command(flatten)]
    pub which: Which,
}

/// Give a storage server leave to be away for a while
#[derive(Debug, Args)]
pub(super) struct MaintenanceArgs {
    #[command(subcommand)]
    pub change: Maintenance,
}

#[derive(Debug, Subcommand)]
pub(super) enum Maintenance {
    /// From now on: new blocks go elsewhere, and nothing is copied while it is away
    On {
        #[command(flatten)]
        which: Which,
        /// How long: 30m, 2h, 90s; then it counts as any other again
        #[arg(long = "for", value_name = "TIME", default_value = "30m", value_parser = parse_time)]
        long: Duration,
    },
    /// It is back
    Off {
        #[command(flatten)]
        which: Which,
    },
}

/// Move blocks until all storage servers are nearly equally full
///
/// The metadata server does so by itself when one is off by more than a tenth of its space. It goes on if this command is interrupted.
#[derive(Debug, Args)]
pub(super) struct RebalanceArgs {
    #[command(flatten)]
    pub target: Target,
    /// Return at once
    #[arg(long)]
    pub no_wait: bool,
    /// What came of it as one JSON object, for programs
    #[arg(long)]
    pub json: bool,
}

pub(super) fn rebalance(args: &RebalanceArgs) -> CliResult {
    let config = args.target.load()?;
    match ask(&config, AdminRequest::Rebalance)? {
        MetaAnswer::Done => {}
        MetaAnswer::Declined(reasons) => return Err(CliError::new(format!("not now: {}", reasons.join("; ")))),
        _ => return Err(AskError::Unexpected.into()),
    }
    if !args.no_wait {
        until_balanced(&config)?;
    }
    let servers = ask_status(&config)?.servers;
    if args.json {
        let server = |it: &ServerStatus| json!({ "server": it.id.0, "stored_bytes": it.load.stored_bytes, "free_bytes": it.load.free_bytes });
        return print(&format!(
            "{:#}\n",
            json!({ "waited": !args.no_wait, "servers": servers.iter().map(server).collect::<Vec<_>>() })
        ));
    }
    print(if args.no_wait {
        "The storage servers are being balanced: `holdfast status` shows what is left.\n"
    } else {
        "The storage servers are balanced.\n"
    })
}

fn until_balanced(config: &ClientConfig) -> CliResult {
    let mut most = 1;
    loop {
        // Until it has been looked at.
        thread::sleep(BALANCE_LOOK_EVERY);
        let left = ask_status(config)?.balance_left_bytes;
        most = left.max(most);
        progress(&format!("{} to be moved", size(left)), most, left);
        if left == 0 {
            return Ok(());
        }
    }
}

pub(super) fn drain(args: &DrainArgs) -> CliResult {
    empty(&args.which, Standing::Draining, args.no_wait)
}

pub(super) fn remove(args: &RemoveArgs) -> CliResult {
    empty(&args.which, Standing::Leaving, args.no_wait)
}

pub(super) fn undrain(args: &UndrainArgs) -> CliResult {
    change(&args.which, Standing::Serving, "takes blocks again")
}

pub(super) fn maintenance(args: &MaintenanceArgs) -> CliResult {
    match &args.change {
        Maintenance::On { which, long } => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            let until = Time { secs: i64::try_from((now + *long).as_secs()).unwrap_or(i64::MAX), nanos: 0 };
            change(which, Standing::Maintenance { until }, &format!("may be away for {} s", long.as_secs()))
        }
        Maintenance::Off { which } => change(which, Standing::Serving, "counts as any other"),
    }
}

fn change(which: &Which, standing: Standing, done: &str) -> CliResult {
    let config = which.target.load()?;
    order(&config, which.server, standing)?;
    match which.json {
        true => print(&format!("{:#}\n", json!({ "server": which.server, "standing": standing.to_string() }))),
        false => print(&format!("Storage server {} {done}.\n", which.server)),
    }
}

fn order(config: &ClientConfig, server: u32, standing: Standing) -> CliResult {
    match ask(config, AdminRequest::Stand { server: ServerId(server), standing })? {
        MetaAnswer::Done => Ok(()),
        MetaAnswer::Declined(reasons) => Err(CliError::new(format!("not done: {}", reasons.join("; ")))),
        _ => Err(AskError::Unexpected.into()),
    }
}

fn empty(which: &Which, standing: Standing, no_wait: bool) -> CliResult {
    let config = which.target.load()?;
    let removed = standing == Standing::Leaving;
    let before = find(&config, which.server)?.map_or(0, |server| server.load.blocks);
    order(&config, which.server, standing)?;
    let left = if no_wait { None } else { Some(until_empty(&config, which, standing, before)?) };
    if which.json {
        let report = json!({ "server": which.server, "standing": standing.to_string(), "empty": left.is_some() });
        return print(&format!("{report:#}\n"));
    }
    print(&match (left, removed) {
        (None, _) => {
            format!("Storage server {} is being emptied: `holdfast status` shows what is left.\n", which.server)
        }
        (Some(()), false) => format!("Storage server {} is empty.\n", which.server),
        (Some(()), true) => format!("Storage server {} is removed; its daemon can be stopped.\n", which.server),
    })
}

fn find(config: &ClientConfig, server: u32) -> CliResult<Option<ServerStatus>> {
    Ok(ask_status(config)?.servers.into_iter().find(|status| status.id == ServerId(server)))
}

/// Waits until a server has no blocks any more. `before`: how many it had.
fn until_empty(config: &ClientConfig, which: &Which, standing: Standing, before: u64) -> CliResult {
    let mut most = before.max(1);
    let mut hindered = None;
    loop {
        let ClusterStatus { servers, replicas, .. } = ask_status(config)?;
        let Some(server) = servers.iter().find(|status| status.id == ServerId(which.server)) else {
            progress("", most, 0);
            return Ok(());
        };
        if server.standing != standing {
            return Err(CliError::new(format!("storage server {} was told something else meanwhile", which.server)));
        }
        let left = server.left.unwrap_or(most);
        most = most.max(left);
        let hindrance = hindrance(&servers, server.id, replicas);
        if hindrance != hindered {
            say(hindrance.as_deref().unwrap_or("going on"))?;
            hindered = hindrance;
        }
        progress(&format!("{left} blocks left"), most, left);
        // One that leaves is gone in a moment.
        if left == 0 && server.left.is_some() && standing == Standing::Draining {
            return Ok(());
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Why nothing of `emptied` can be moved for now. It was not known yet when the order was given, or has come since.
fn hindrance(servers: &[ServerStatus], emptied: ServerId, replicas: u64) -> Option<String> {
    let takes = |status: &&ServerStatus| {
        status.id != emptied && status.standing == Standing::Serving && status.state == ServerState::Up
    };
    let takers = servers.iter().filter(takes).count();
    ((takers as u64) < replicas).then(|| {
        format!(
            "waiting: {takers} other storage servers are up, and each block needs {replicas}; \
             `holdfast undrain {}` takes the order back",
            emptied.0
        )
    })
}

/// For who waits, on a terminal or in a log.
fn say(sentence: &str) -> CliResult {
    let mut error = io::stderr();
    let line = if error.is_terminal() { format!("\r\x1b[K{sentence}\n") } else { format!("{sentence}\n") };
    error
        .write_all(line.as_bytes())
        .map_err(|source| CliError::new(format!("standard error cannot be written: {source}")))
}

/// A bar for who watches.
pub(super) fn progress(text: &str, all: u64, left: u64) {
    let mut error = io::stderr();
    if error.is_terminal() {
        // Whoever does not see it misses nothing.
        drop(write!(error, "\r{}{text}\x1b[K{}", bar(all, left), if left == 0 { "\n" } else { "" }));
    }
}

fn bar(all: u64, left: u64) -> String {
    let done =
        usize::try_from(u128::from(all - left.min(all)) * BAR_WIDTH as u128 / u128::from(all.max(1))).unwrap_or(0);
    let percent = u128::from(all - left.min(all)) * 100 / u128::from(all.max(1));
    format!("[{}{}] {percent:3} %  ", "#".repeat(done), " ".repeat(BAR_WIDTH - done))
}

#[cfg(test)]
mod tests {
    use holdfast_common::{BootId, wire::meta::StorageLoad};

    use super::*;

    fn server(id: u32, state: ServerState, standing: Standing) -> ServerStatus {
        ServerStatus {
            id: ServerId(id),
            address: ([127, 0, 0, 1], 1).into(),
            zone: String::new(),
            state,
            weight: 1,
            silent_ms: 0,
            boot: BootId::default(),
            standing,
            left: None,
            load: StorageLoad::default(),
        }
    }

    #[test]
    fn whoever_waits_hears_that_there_is_nobody_to_take_the_blocks() {
        let up = |id| server(id, ServerState::Up, Standing::Serving);
        let drained = server(1, ServerState::Draining, Standing::Draining);
        assert_eq!(hindrance(&[drained.clone(), up(2), up(3), up(4)], ServerId(1), 3), None);
        let others = [
            server(4, ServerState::Suspect, Standing::Serving),
            server(4, ServerState::Down, Standing::Serving),
            server(4, ServerState::Draining, Standing::Leaving),
        ];
        for other in others {
            let said = hindrance(&[drained.clone(), up(2), up(3), other], ServerId(1), 3).unwrap();
            assert!(said.starts_with("waiting: 2 other") && said.contains("undrain 1`"), "{said}");
        }
    }

    #[test]
    fn the_bar_grows_with_what_is_done() {
        assert_eq!(bar(200, 200), format!("[{}]   0 %  ", " ".repeat(30)));
        assert_eq!(bar(200, 100), format!("[{}{}]  50 %  ", "#".repeat(15), " ".repeat(15)));
        assert_eq!(bar(200, 0), format!("[{}] 100 %  ", "#".repeat(30)));
        assert_eq!(bar(0, 0), format!("[{}]   0 %  ", " ".repeat(30)));
    }
}

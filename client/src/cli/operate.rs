//! What an operator wants of a storage server: to be emptied, to be away for a while, to leave.

use std::{thread, time::Duration};

use clap::{Args, Subcommand};
use holdfast_common::{
    ServerId, Time,
    cluster::Standing,
    config::ClientConfig,
    wire::meta::{AdminRequest, ClusterStatus, MetaAnswer, ServerStatus},
};
use serde_json::json;

use super::{
    admin::{AskError, Target, ask, ask_status},
    error::{CliError, CliResult},
    print,
    progress::{Progress, say},
    status::size,
};
use crate::mount::options::parse_time;

/// Between two looks at how far it has come.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The metadata server plans every second.
const BALANCE_LOOK_EVERY: Duration = Duration::from_millis(2500);

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
    /// Whatever speaks against it: what cannot be moved waits until it can
    #[arg(long)]
    pub force: bool,
    /// Return at once
    #[arg(long)]
    pub no_wait: bool,
}

/// Empty a storage server, and remove it from the cluster then
///
/// As `holdfast drain`; when it is empty it is removed, and not let in again under its number. One that is down is emptied from the
/// copies that others have; while it may have copies of blocks of which nobody else has one, it stays.
#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    #[command(flatten)]
    pub which: Which,
    /// Whatever speaks against it: of a server that is down, what nobody else has is LOST. With `--no-wait`, to be said again if the
    /// metadata server is restarted before it is done
    #[arg(long)]
    pub force: bool,
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
        /// Whatever speaks against it: what it has alone cannot be read while it is away
        #[arg(long)]
        force: bool,
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
    let hindered = if args.no_wait { String::new() } else { until_balanced(&config)? };
    let servers = ask_status(&config)?.servers;
    if args.json {
        let server = |it: &ServerStatus| json!({ "server": it.id.0, "stored_bytes": it.load.stored_bytes, "free_bytes": it.load.free_bytes });
        let servers: Vec<_> = servers.iter().map(server).collect();
        let report = json!({ "waited": !args.no_wait, "hindered": hindered, "servers": servers });
        print(&format!("{report:#}\n"))?;
    }
    if !hindered.is_empty() {
        return Err(CliError::new(format!("the storage servers are not equally full: {hindered}")));
    }
    if args.json {
        return Ok(());
    }
    print(if args.no_wait {
        "The storage servers are being balanced: `holdfast status` shows what is left.\n"
    } else {
        "The storage servers are balanced.\n"
    })
}

/// Returns what hinders; empty: nothing, they are balanced.
fn until_balanced(config: &ClientConfig) -> CliResult<String> {
    let mut progress = Progress::new();
    loop {
        // Until it has been looked at.
        thread::sleep(BALANCE_LOOK_EVERY);
        let status = ask_status(config)?;
        let left = status.balance_left_bytes;
        progress.show(&format!("{} to be moved", size(left)), left);
        if left == 0 {
            return Ok(status.balance_hindered);
        }
    }
}

pub(super) fn drain(args: &DrainArgs) -> CliResult {
    empty(&args.which, Standing::Draining, args.no_wait, args.force)
}

pub(super) fn remove(args: &RemoveArgs) -> CliResult {
    empty(&args.which, Standing::Leaving, args.no_wait, args.force)
}

pub(super) fn undrain(args: &UndrainArgs) -> CliResult {
    change(&args.which, Standing::Serving, false, "takes blocks again")
}

pub(super) fn maintenance(args: &MaintenanceArgs) -> CliResult {
    match &args.change {
        Maintenance::On { which, long, force } => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            let until = Time { secs: i64::try_from((now + *long).as_secs()).unwrap_or(i64::MAX), nanos: 0 };
            change(which, Standing::Maintenance { until }, *force, &format!("may be away for {} s", long.as_secs()))
        }
        Maintenance::Off { which } => change(which, Standing::Serving, false, "counts as any other"),
    }
}

fn change(which: &Which, standing: Standing, force: bool, done: &str) -> CliResult {
    let config = which.target.load()?;
    order(&config, which.server, standing, force)?;
    match which.json {
        true => print(&format!("{:#}\n", json!({ "server": which.server, "standing": standing.to_string() }))),
        false => print(&format!("Storage server {} {done}.\n", which.server)),
    }
}

fn order(config: &ClientConfig, server: u32, standing: Standing, force: bool) -> CliResult {
    let server = ServerId(server);
    let request = match force {
        true => AdminRequest::StandDespite { server, standing },
        false => AdminRequest::Stand { server, standing },
    };
    match ask(config, request)? {
        MetaAnswer::Done => Ok(()),
        MetaAnswer::Declined(reasons) => Err(CliError::new(format!("not done: {}", reasons.join("; ")))),
        _ => Err(AskError::Unexpected.into()),
    }
}

fn empty(which: &Which, standing: Standing, no_wait: bool, force: bool) -> CliResult {
    let config = which.target.load()?;
    let removed = standing == Standing::Leaving;
    order(&config, which.server, standing, force)?;
    let left = if no_wait { None } else { Some(until_empty(&config, which, standing, force)?) };
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

/// Waits until a server has no blocks any more.
fn until_empty(config: &ClientConfig, which: &Which, standing: Standing, force: bool) -> CliResult {
    let mut progress = Progress::new();
    let mut hindered = None;
    loop {
        let ClusterStatus { servers, replicas, .. } = ask_status(config)?;
        let Some(server) = servers.iter().find(|status| status.id == ServerId(which.server)) else {
            progress.show("", 0);
            return Ok(());
        };
        if server.standing != standing {
            return Err(CliError::new(format!("storage server {} was told something else meanwhile", which.server)));
        }
        let left = server.left.unwrap_or(server.load.blocks);
        let hindrance = hindrance(&servers, server, replicas);
        if hindrance != hindered {
            say(hindrance.as_deref().unwrap_or("going on"))?;
            if force && standing == Standing::Leaving && hindrance.is_some() {
                // The metadata server forgets that when it is started anew. It may be gone by now, too: the next look tells.
                drop(order(config, which.server, standing, true));
            }
            hindered = hindrance;
        }
        // Not all is done before it is known that nothing is left.
        progress.show(&format!("{left} blocks left"), left.max(u64::from(server.left.is_none())));
        // One that leaves is gone in a moment.
        if left == 0 && server.left.is_some() && standing == Standing::Draining {
            return Ok(());
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Why nothing of `emptied` can be moved for now. It was not known yet when the order was given, or has come since.
fn hindrance(servers: &[ServerStatus], emptied: &ServerStatus, replicas: u64) -> Option<String> {
    if !emptied.hindered.is_empty() {
        return Some(format!("waiting: {}", emptied.hindered));
    }
    let takes = |status: &&ServerStatus| {
        status.id != emptied.id && status.standing == Standing::Serving && status.state.is_up()
    };
    let takers = servers.iter().filter(takes).count();
    ((takers as u64) < replicas).then(|| {
        format!(
            "waiting: {takers} other storage servers are up, and each block needs {replicas}; \
             `holdfast undrain {}` takes the order back",
            emptied.id
        )
    })
}

#[cfg(test)]
mod tests {
    use holdfast_common::{BootId, cluster::ServerState, wire::meta::StorageLoad};

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
            since_ms: 0,
            reason: String::new(),
            hindered: String::new(),
        }
    }

    #[test]
    fn whoever_waits_hears_that_there_is_nobody_to_take_the_blocks() {
        let up = |id| server(id, ServerState::Up, Standing::Serving);
        let drained = server(1, ServerState::Draining, Standing::Draining);
        assert_eq!(hindrance(&[drained.clone(), up(2), up(3), up(4)], &drained, 3), None);
        let stuck = ServerStatus { hindered: "of 3 blocks there is no copy".to_owned(), ..drained.clone() };
        assert_eq!(hindrance(&[], &stuck, 3).as_deref(), Some("waiting: of 3 blocks there is no copy"));
        let others = [
            server(4, ServerState::Suspect, Standing::Serving),
            server(4, ServerState::Down, Standing::Serving),
            server(4, ServerState::Draining, Standing::Leaving),
        ];
        for other in others {
            let said = hindrance(&[drained.clone(), up(2), up(3), other], &drained, 3).unwrap();
            assert!(said.starts_with("waiting: 2 other") && said.contains("undrain 1`"), "{said}");
        }
    }
}

//! `holdfast scrub`: how far the servers have come with reading everything again, and having them do it now.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use holdfast_common::{
    ServerId,
    config::ClientConfig,
    wire::meta::{AdminRequest, ServerStatus, StorageLoad},
};

use serde_json::{Value, json};

use super::{
    admin::{Target, ask_status, order},
    error::{CliError, CliResult},
    print,
    progress::Progress,
    status::{columns, size},
};

/// Until the servers have reported what they do by now: twice their time between reports.
const REPORT_PAUSE: Duration = Duration::from_secs(2);

/// Show how far scrubbing has come, or scrub now
///
/// Every storage server reads all that it stores again, once a week unless it is configured otherwise, checks each block against its hash,
/// and has a good copy made of what is bad.
#[derive(Debug, Args)]
pub(super) struct ScrubArgs {
    #[command(flatten)]
    pub target: Target,
    /// Start now, and take no breaks but for whoever reads and writes
    #[arg(long)]
    pub now: bool,
    /// With --now: return when all servers have read everything
    #[arg(long, requires = "now")]
    pub wait: bool,
    /// As one JSON object, for programs
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(args: &ScrubArgs) -> CliResult {
    let config = args.target.load()?;
    if args.now {
        let before = loads(&config)?;
        order(&config, &AdminRequest::Scrub)?;
        if args.wait {
            until_passed(&config, &before)?;
        } else {
            thread::sleep(REPORT_PAUSE);
        }
    }
    let servers = ask_status(&config)?.servers;
    if args.json {
        return print(&format!("{:#}\n", report(&servers)));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    print(&table(&servers, now))
}

fn report(servers: &[ServerStatus]) -> Value {
    let server = |it: &ServerStatus| {
        json!({
            "server": it.id.0,
            "state": it.state.to_string(),
            "stored_bytes": it.load.stored_bytes,
            "checked_bytes": it.load.scrub_checked_bytes,
            "passes": it.load.scrub_passes,
            "last_pass_secs": it.load.scrub_last_pass_secs,
            "corrupt_found": it.load.corrupt_found,
        })
    };
    json!({ "servers": servers.iter().map(server).collect::<Vec<_>>() })
}

/// `now`: seconds since 1970.
fn table(servers: &[ServerStatus], now: u64) -> String {
    let head = ["SERVER", "STATE", "STORED", "CHECKED IN THIS PASS", "PASSES", "LAST PASS"].map(str::to_owned).to_vec();
    columns(&std::iter::once(head).chain(servers.iter().map(|server| row(server, now))).collect::<Vec<_>>())
}

fn row(server: &ServerStatus, now: u64) -> Vec<String> {
    let load = &server.load;
    vec![
        server.id.to_string(),
        server.state.to_string(),
        size(load.stored_bytes),
        size(load.scrub_checked_bytes),
        load.scrub_passes.to_string(),
        match load.scrub_last_pass_secs {
            0 => "never".to_owned(),
            secs => ago(now.saturating_sub(secs)),
        },
    ]
}

fn ago(secs: u64) -> String {
    match secs {
        0..120 => format!("{secs} s ago"),
        120..7200 => format!("{} min ago", secs / 60),
        7200..172_800 => format!("{} h ago", secs / 3600),
        _ => format!("{} days ago", secs / 86_400),
    }
}

/// What servers that are up have done.
fn loads(config: &ClientConfig) -> CliResult<BTreeMap<ServerId, StorageLoad>> {
    let up = ask_status(config)?.servers.into_iter().filter(|server| server.state.is_up());
    Ok(up.map(|server| (server.id, server.load)).collect())
}

/// How much of what it stored a server has not yet checked in the pass that came after `before`.
fn unchecked(before: &StorageLoad, now: &StorageLoad) -> u64 {
    let has_passed = now.scrub_passes > before.scrub_passes;
    if has_passed { 0 } else { now.stored_bytes.saturating_sub(now.scrub_checked_bytes).max(1) }
}

fn until_passed(config: &ClientConfig, before: &BTreeMap<ServerId, StorageLoad>) -> CliResult {
    let mut progress = Progress::new();
    loop {
        let now = loads(config)?;
        let mut left = 0;
        for (server, before) in before {
            let Some(now) = now.get(server) else {
                return Err(CliError::new(format!("storage server {server} went away before it had read everything")));
            };
            left += unchecked(before, now);
        }
        progress.show(&format!("{} to be read", size(left)), left);
        if left == 0 {
            return Ok(());
        }
        thread::sleep(REPORT_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use holdfast_common::{
        BootId,
        cluster::{ServerState, Standing},
        wire::meta::StorageLoad,
    };

    use super::*;

    #[test]
    fn the_table_is_exactly_this() {
        let server = |id, load| ServerStatus {
            id: ServerId(id),
            address: ([127, 0, 0, 1], 7401).into(),
            zone: String::new(),
            state: ServerState::Up,
            weight: 1,
            silent_ms: 0,
            boot: BootId(1),
            standing: Standing::Serving,
            left: None,
            load,
            since_ms: 0,
            reason: String::new(),
            hindered: String::new(),
        };
        let (stored_bytes, scrub_passes, scrub_last_pass_secs) = (3 << 20, 2, 1_000_000);
        let scrubbed = StorageLoad { stored_bytes, scrub_passes, scrub_last_pass_secs, ..StorageLoad::default() };
        let checking = StorageLoad { stored_bytes, scrub_checked_bytes: 1536, ..StorageLoad::default() };
        let expected = "\
SERVER  STATE  STORED   CHECKED IN THIS PASS  PASSES  LAST PASS
1       up     3.0 MiB  0 B                   2       3 h ago
2       up     3.0 MiB  1.5 KiB               0       never
";
        assert_eq!(table(&[server(1, scrubbed), server(2, checking)], 1_000_000 + 3 * 3600 + 5), expected);
        let report = report(&[server(1, scrubbed)]);
        assert_eq!(
            (&report["servers"][0]["passes"], &report["servers"][0]["stored_bytes"]),
            (&2.into(), &(3 << 20).into())
        );
        assert_eq!(unchecked(&checking, &checking), (3 << 20) - 1536);
        assert_eq!(unchecked(&checking, &StorageLoad { scrub_passes: 1, ..checking }), 0);
        assert_eq!([5, 300, 200_000].map(ago), ["5 s ago", "5 min ago", "2 days ago"]);
    }
}

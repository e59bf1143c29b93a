//! A cluster's state, as a table for people and as JSON for programs. Pure.

use std::{
    fmt::Write as _,
    time::{SystemTime, UNIX_EPOCH},
};

use holdfast_common::{
    cluster::Standing,
    wire::meta::{ClusterStatus, MountStatus, ServerStatus},
};
use serde_json::{Value, json};

use super::progress::about;

/// Bytes with a binary unit, three digits or four.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [(u32, &str); 5] = [(50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let Some((shift, unit)) = UNITS.into_iter().find(|(shift, _)| bytes >> shift > 0) else {
        return format!("{bytes} B");
    };
    let tenths = (u128::from(bytes) * 10) >> shift;
    match tenths {
        0..1000 => format!("{}.{} {unit}", tenths / 10, tenths % 10),
        _ => format!("{} {unit}", tenths / 10),
    }
}

/// The status as text, with a line feed at the end.
pub(super) fn table(status: &ClusterStatus, now: SystemTime) -> String {
    let mut text = format!("Cluster {}\n\n", status.cluster);
    text.push_str(&columns(&servers(status)));
    status.servers.iter().filter_map(why).for_each(|line| text.push_str(&line));
    text.push('\n');
    match status.mounts.is_empty() {
        true => text.push_str("No mounts.\n"),
        false => text.push_str(&columns(&mounts(status))),
    }
    text.push('\n');
    for (name, value) in figures(status, now) {
        // Writing to a string cannot fail.
        let _written = writeln!(text, "{name:<18}{value}");
    }
    text
}

fn servers(status: &ClusterStatus) -> Vec<Vec<String>> {
    let head = [
        "SERVER", "STATE", "FOR", "ADDRESS", "ZONE", "CAPACITY", "FREE", "STORED", "BLOCKS", "LOAD", "DISK", "P99",
        "CORRUPT", "REPAIRED", "HEARD",
    ];
    std::iter::once(head.map(str::to_owned).to_vec()).chain(status.servers.iter().map(server)).collect()
}

fn server(server: &ServerStatus) -> Vec<String> {
    let load = &server.load;
    vec![
        server.id.to_string(),
        state(server),
        long(server.since_ms),
        server.address.to_string(),
        if server.zone.is_empty() { "-".to_owned() } else { server.zone.clone() },
        size(load.capacity_bytes),
        size(load.free_bytes),
        size(load.stored_bytes),
        load.blocks.to_string(),
        format!("{}.{:02}", load.load_percent / 100, load.load_percent % 100),
        format!("{} %", load.disk_busy_percent),
        millis(load.put_p99_us.max(load.get_p99_us)),
        load.corrupt_found.to_string(),
        load.repaired.to_string(),
        ago(server.silent_ms),
    ]
}

/// Why a server is as it is, if that is not as it should be; on a line of its own.
fn why(server: &ServerStatus) -> Option<String> {
    let reasons: Vec<&str> =
        [&server.reason, &server.hindered].into_iter().map(String::as_str).filter(|it| !it.is_empty()).collect();
    (!reasons.is_empty()).then(|| format!("Server {}: {}\n", server.id, reasons.join("; ")))
}

/// Microseconds as milliseconds, with a tenth where that says something.
fn millis(micros: u32) -> String {
    match micros {
        0 => "-".to_owned(),
        1..10_000 => format!("{}.{} ms", micros / 1000, micros % 1000 / 100),
        _ => format!("{} ms", micros / 1000),
    }
}

/// By its silence, and by what is wanted of it.
fn state(server: &ServerStatus) -> String {
    let state = server.state;
    match (server.standing, server.left) {
        (Standing::Serving, _) => state.to_string(),
        (Standing::Draining, Some(0)) => format!("{state}, drained"),
        (standing, Some(left)) => format!("{state}, {standing}: {left} left"),
        (standing, None) => format!("{state}, {standing}"),
    }
}

fn mounts(status: &ClusterStatus) -> Vec<Vec<String>> {
    let head = ["MOUNT", "HOST", "MOUNTPOINT", "OPEN", "DIRTY", "REPAIRS", "HEARD"];
    std::iter::once(head.map(str::to_owned).to_vec()).chain(status.mounts.iter().map(mount)).collect()
}

fn mount(mount: &MountStatus) -> Vec<String> {
    vec![
        mount.session.to_string(),
        mount.host.clone(),
        mount.mountpoint.clone(),
        mount.open_files.to_string(),
        size(mount.dirty_bytes),
        mount.repairs.to_string(),
        ago(mount.silent_ms),
    ]
}

fn ago(silent_ms: u64) -> String {
    match silent_ms {
        0..100_000 => format!("{}.{} s ago", silent_ms / 1000, silent_ms % 1000 / 100),
        _ => format!("{} ago", long(silent_ms)),
    }
}

/// A time of which nobody needs the fractions.
fn long(ms: u64) -> String {
    match ms / 1000 {
        secs @ 0..120 => format!("{secs} s"),
        secs @ 120..7200 => format!("{} min", secs / 60),
        secs @ 7200..172_800 => format!("{} h", secs / 3600),
        secs => format!("{} days", secs / 86_400),
    }
}

fn figures(status: &ClusterStatus, now: SystemTime) -> [(&'static str, String); 11] {
    let [none, one, two, full] = status.blocks_by_copies;
    let behind = status.log_position.0.saturating_sub(status.durable_through.0);
    [
        ("Files", format!("{} inodes, {} blocks", status.inodes, status.blocks)),
        ("Copies", format!("{full} blocks with 3 or more, {two} with 2, {one} with 1, {none} lost")),
        ("Wanted", wanted(status)),
        ("Owed", owed(status)),
        ("Copies made", status.copies_made.to_string()),
        ("Bad copies met", bad_copies(status)),
        ("Copies repaired", status.copies_repaired.to_string()),
        ("Garbage", garbage(status)),
        ("Log", format!("{} entries, {behind} not yet on disk", status.log_position)),
        ("To be moved", to_be_moved(status)),
        ("Backup", backup(status.backup_secs, now)),
    ]
}

/// How much is to be copied, and when that will be done.
fn owed(status: &ClusterStatus) -> String {
    match (status.owed, status.owed_secs) {
        (0, _) => "no block is owed a copy".to_owned(),
        (owed, Some(secs)) => format!("{owed} blocks are owed a copy, done in {}", about(secs)),
        (owed, None) => format!("{owed} blocks are owed a copy, and none was made lately"),
    }
}

fn bad_copies(status: &ClusterStatus) -> String {
    let met = format!("{} corrupt, {} missing", status.corrupt_copies_met, status.missing_copies_met);
    match status.bad_copies_waiting {
        0 => met,
        waiting => format!("{met}; {waiting} have no good one in their place yet"),
    }
}

fn to_be_moved(status: &ClusterStatus) -> String {
    match status.balance_hindered.as_str() {
        "" => size(status.balance_left_bytes),
        hindered => format!("{}; not equally full: {hindered}", size(status.balance_left_bytes)),
    }
}

/// How many copies, and whether that is followed yet.
fn wanted(status: &ClusterStatus) -> String {
    let wanted = format!("{} copies of what has no number of its own", status.replicas);
    match status.replicas_followed_percent {
        100 => wanted,
        percent => format!("{wanted} ({percent} % of the blocks looked through since that was said)"),
    }
}

/// When the metadata was last copied to storage servers.
fn backup(secs: i64, now: SystemTime) -> String {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    match u64::try_from(secs).unwrap_or(0) {
        0 => "none since the metadata server was started".to_owned(),
        secs => format!("{} s ago, on the storage servers", now.saturating_sub(secs)),
    }
}

fn garbage(status: &ClusterStatus) -> String {
    let ClusterStatus { unnamed, condemned, collected, .. } = status;
    format!("{unnamed} blocks that no file names, {condemned} being deleted, {collected} deleted so far")
}

/// Rows as columns, each as wide as its widest cell.
pub(super) fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..count).filter_map(width).collect();
    rows.iter().map(|row| line(row, &widths)).collect()
}

fn line(row: &[String], widths: &[usize]) -> String {
    let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
    format!("{}\n", cells.join("  ").trim_end())
}

/// The same as one JSON object. Names and units are those of the fields of `ClusterStatus`.
pub(super) fn json(status: &ClusterStatus) -> serde_json::Result<Value> {
    let mut value = serde_json::to_value(status)?;
    value["cluster"] = json!(status.cluster.to_string());
    if let Some(servers) = value["servers"].as_array_mut() {
        for (shown, server) in servers.iter_mut().zip(&status.servers) {
            shown["state"] = json!(server.state.to_string());
            shown["standing"] = json!(server.standing.to_string());
        }
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use holdfast_common::{
        BootId, ClusterId, Position, ServerId, SessionId, cluster::ServerState, wire::meta::StorageLoad,
    };

    use super::*;

    fn a_server(id: u32, state: ServerState, silent_ms: u64) -> ServerStatus {
        ServerStatus {
            id: ServerId(id),
            address: ([127, 0, 0, 1], 7400 + u16::try_from(id).unwrap()).into(),
            zone: if id == 1 { "rack-a".to_owned() } else { String::new() },
            state,
            weight: 100,
            silent_ms,
            boot: BootId(9),
            standing: Standing::Serving,
            left: None,
            load: StorageLoad {
                capacity_bytes: 100 << 30,
                free_bytes: (42 << 30) + (1 << 29),
                stored_bytes: 3 << 20,
                blocks: 17,
                corrupt_found: 1,
                repaired: 1,
                quarantined: 1,
                load_percent: 105,
                memory_bytes: 0,
                queue_depth: 0,
                disk_busy_percent: 7,
                get_p99_us: 1250,
                ..StorageLoad::default()
            },
            since_ms: 3_500_000,
            reason: if state == ServerState::Down { "silent".to_owned() } else { String::new() },
            hindered: String::new(),
        }
    }

    fn a_status() -> ClusterStatus {
        ClusterStatus {
            cluster: ClusterId([0xab; 16]),
            map_version: 4,
            servers: vec![a_server(1, ServerState::Up, 310), a_server(2, ServerState::Down, 3_600_000)],
            mounts: vec![MountStatus {
                session: SessionId(5),
                host: "alpha".to_owned(),
                mountpoint: "/mnt/data".to_owned(),
                silent_ms: 1250,
                open_files: 3,
                dirty_bytes: 1536,
                repairs: 2,
            }],
            inodes: 12,
            blocks: 17,
            blocks_by_copies: [0, 1, 4, 12],
            owed: 5,
            copies_made: 8,
            corrupt_copies_met: 2,
            missing_copies_met: 1,
            copies_repaired: 3,
            unnamed: 6,
            condemned: 2,
            collected: 40,
            log_position: Position(120),
            durable_through: Position(118),
            backup_secs: 0,
            balance_left_bytes: 0,
            replicas: 3,
            replicas_followed_percent: 100,
            owed_secs: Some(12),
            balance_hindered: String::new(),
            bad_copies_waiting: 0,
        }
    }

    #[test]
    fn the_table_is_exactly_this() {
        let expected = "\
Cluster abababababababababababababababab

SERVER  STATE  FOR     ADDRESS         ZONE    CAPACITY   FREE      STORED   BLOCKS  LOAD  DISK  P99     CORRUPT  REPAIRED  HEARD
1       up     58 min  127.0.0.1:7401  rack-a  100 GiB    42.5 GiB  3.0 MiB  17      1.05  7 %   1.2 ms  1        1         0.3 s ago
2       down   58 min  127.0.0.1:7402  -       100 GiB    42.5 GiB  3.0 MiB  17      1.05  7 %   1.2 ms  1        1         60 min ago
Server 2: silent

MOUNT  HOST   MOUNTPOINT  OPEN  DIRTY    REPAIRS  HEARD
5      alpha  /mnt/data   3     1.5 KiB  2        1.2 s ago

Files             12 inodes, 17 blocks
Copies            12 blocks with 3 or more, 4 with 2, 1 with 1, 0 lost
Wanted            3 copies of what has no number of its own
Owed              5 blocks are owed a copy, done in about 12 s
Copies made       8
Bad copies met    2 corrupt, 1 missing
Copies repaired   3
Garbage           6 blocks that no file names, 2 being deleted, 40 deleted so far
Log               120 entries, 2 not yet on disk
To be moved       0 B
Backup            none since the metadata server was started
";
        let expected = expected.replace("CAPACITY   FREE", "CAPACITY  FREE").replace("100 GiB    42", "100 GiB   42");
        assert_eq!(table(&a_status(), UNIX_EPOCH), expected);
    }

    #[test]
    fn what_hinders_is_said() {
        let status = ClusterStatus {
            owed_secs: None,
            balance_hindered: "zones".to_owned(),
            bad_copies_waiting: 3,
            ..a_status()
        };
        assert_eq!(owed(&status), "5 blocks are owed a copy, and none was made lately");
        assert_eq!(owed(&ClusterStatus { owed: 0, ..status.clone() }), "no block is owed a copy");
        assert_eq!(to_be_moved(&status), "0 B; not equally full: zones");
        assert_eq!(bad_copies(&status), "2 corrupt, 1 missing; 3 have no good one in their place yet");
        let both = ServerStatus { hindered: "nobody takes them".to_owned(), ..a_server(2, ServerState::Down, 0) };
        assert_eq!(why(&both).as_deref(), Some("Server 2: silent; nobody takes them\n"));
        assert_eq!([0, 1250, 250_000].map(millis), ["-", "1.2 ms", "250 ms"]);
        assert_eq!([5000, 300_000, 100_000_000, 200_000_000].map(long), ["5 s", "5 min", "27 h", "2 days"]);
    }

    #[test]
    fn a_backup_has_an_age() {
        assert_eq!(backup(1000, UNIX_EPOCH + std::time::Duration::from_secs(1042)), "42 s ago, on the storage servers");
    }

    #[test]
    fn what_is_wanted_of_a_server_is_beside_its_state() {
        let until = holdfast_common::Time::default();
        for (standing, left, expected) in [
            (Standing::Draining, None, "up, draining"),
            (Standing::Draining, Some(12), "up, draining: 12 left"),
            (Standing::Draining, Some(0), "up, drained"),
            (Standing::Leaving, Some(1), "up, leaving: 1 left"),
            (Standing::Maintenance { until }, None, "up, maintenance"),
        ] {
            assert_eq!(state(&ServerStatus { standing, left, ..a_server(1, ServerState::Up, 0) }), expected);
        }
    }

    #[test]
    fn an_empty_cluster_has_a_table_too() {
        let status = ClusterStatus { servers: Vec::new(), mounts: Vec::new(), ..a_status() };
        let text = table(&status, UNIX_EPOCH);
        assert!(text.contains("SERVER  STATE"), "{text}");
        assert!(text.contains("No mounts.\n"), "{text}");
    }

    #[test]
    fn json_names_the_cluster_and_states_in_words() {
        let value = json(&a_status()).unwrap();
        assert_eq!(value["cluster"], "abababababababababababababababab");
        assert_eq!(value["servers"][1]["state"], "down");
        assert_eq!(value["servers"][0]["address"], "127.0.0.1:7401");
        assert_eq!(value["servers"][0]["load"]["corrupt_found"], 1);
        assert_eq!(value["mounts"][0]["mountpoint"], "/mnt/data");
        assert_eq!(value["blocks_by_copies"], json!([0, 1, 4, 12]));
        assert_eq!(value["log_position"], 120);
    }

    #[test]
    fn sizes_have_binary_units() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (100 << 20, "100 MiB"),
            ((99 << 30) + (1 << 29), "99.5 GiB"),
            (u64::MAX, "16383 PiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}

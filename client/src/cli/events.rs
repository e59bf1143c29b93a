//! `holdfast events`: what happened to a cluster, and what became of it.

use std::{thread, time::Duration};

use clap::Args;
use holdfast_common::{
    Time,
    config::ClientConfig,
    wire::meta::{AdminRequest, JournalEntry, MetaAnswer, Severity},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    admin::{AskError, Target, ask},
    error::CliResult,
    print,
};

const FOLLOW_EVERY: Duration = Duration::from_secs(1);

/// Show what happened to a cluster
///
/// Servers that came and went, damage that was met, disks that ran full: what, where, when, what it means, and what the system did. The
/// metadata server keeps the last 4096 events at least.
#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    #[command(flatten)]
    pub target: Target,
    /// How many, the newest
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 50)]
    pub lines: usize,
    /// Go on with what happens from now on
    #[arg(long, short)]
    pub follow: bool,
    /// Only what may need somebody: warnings and errors
    #[arg(long)]
    pub serious: bool,
    /// One JSON object a line, for programs
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(args: &EventsArgs) -> CliResult {
    let config = args.target.load()?;
    let (mut all, mut seen) = (Vec::new(), 0);
    loop {
        let page = after(&config, seen)?;
        let Some(last) = page.last() else { break };
        seen = last.number;
        all.extend(page.into_iter().filter(|entry| is_wanted(args, entry)));
    }
    let first = all.len().saturating_sub(args.lines);
    show(args, &all[first..])?;
    if args.follow { follow(args, &config, seen) } else { Ok(()) }
}

/// Until it is interrupted.
fn follow(args: &EventsArgs, config: &ClientConfig, mut seen: u64) -> CliResult {
    loop {
        thread::sleep(FOLLOW_EVERY);
        // A metadata server that is away for a moment is asked again.
        let page = after(config, seen).unwrap_or_default();
        seen = page.last().map_or(seen, |entry| entry.number);
        show(args, &page.into_iter().filter(|entry| is_wanted(args, entry)).collect::<Vec<_>>())?;
    }
}

fn after(config: &ClientConfig, number: u64) -> CliResult<Vec<JournalEntry>> {
    match ask(config, AdminRequest::Journal { after: number })? {
        MetaAnswer::Journal(entries) => Ok(entries),
        _ => Err(AskError::Unexpected.into()),
    }
}

fn is_wanted(args: &EventsArgs, entry: &JournalEntry) -> bool {
    !args.serious || entry.severity > Severity::Info
}

fn show(args: &EventsArgs, entries: &[JournalEntry]) -> CliResult {
    let mut text = String::new();
    for entry in entries {
        text += &if args.json { serde_json::to_string(entry)? } else { line(entry) };
        text.push('\n');
    }
    print(&text)
}

fn line(entry: &JournalEntry) -> String {
    let JournalEntry { number: _, time, severity, place, what, consequence, action } = entry;
    let severity = match severity {
        Severity::Info => "info",
        Severity::Warning => "WARNING",
        Severity::Error => "ERROR",
    };
    let mut text = format!("{}  {severity:<7}  {place} {what}", stamp(*time));
    for (name, part) in [("means", consequence), ("done", action)] {
        if !part.is_empty() {
            text += &format!("\n    {name}: {part}");
        }
    }
    text
}

/// In UTC.
fn stamp(at: Time) -> String {
    let at = OffsetDateTime::from_unix_timestamp(at.secs).ok().and_then(|at| at.format(&Rfc3339).ok());
    at.unwrap_or_else(|| "at an impossible time".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_exactly_this() {
        let entry = JournalEntry {
            number: 7,
            time: Time { secs: 1_700_000_000, nanos: 5 },
            severity: Severity::Warning,
            place: "storage server 2".into(),
            what: "is silent, and down".into(),
            consequence: "blocks are one copy short".into(),
            action: String::new(),
        };
        let expected =
            "2023-11-14T22:13:20Z  WARNING  storage server 2 is silent, and down\n    means: blocks are one copy short";
        assert_eq!(line(&entry), expected);
    }
}

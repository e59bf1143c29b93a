//! What a person types: `holdfast ...`, and `mount.holdfast`, which mount(8) types.

mod admin;
mod announce;
mod error;
mod events;
mod fsck;
mod helper;
mod identity;
mod local;
mod metadata;
mod mount;
mod operate;
mod process;
mod progress;
mod replicas;
mod scrub;
mod status;

use std::{
    ffi::OsString,
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use clap::{Parser, Subcommand, error::ErrorKind};

pub use error::{CliError, CliResult};

/// Exit status of a command that could not do what it was asked.
const FAILURE: u8 = 1;
/// Exit status of a command that was asked for something impossible.
const USAGE: u8 = 2;

/// Holdfast: a distributed filesystem that verifies every byte it reads and keeps three copies of each.
///
/// `holdfast up` makes a whole cluster on this machine to try; `holdfast down` stops it and keeps the data.
#[derive(Debug, Parser)]
#[command(name = "holdfast", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(local::UpArgs),
    Down(local::DownArgs),
    Status(admin::StatusArgs),
    Fsck(fsck::FsckArgs),
    Scrub(scrub::ScrubArgs),
    Events(events::EventsArgs),
    Drain(operate::DrainArgs),
    Undrain(operate::UndrainArgs),
    Maintenance(operate::MaintenanceArgs),
    Remove(operate::RemoveArgs),
    Rebalance(operate::RebalanceArgs),
    Replicas(replicas::ReplicasArgs),
    Meta(metadata::MetaArgs),
    Mount(mount::MountArgs),
    Init(identity::InitArgs),
    Token(admin::TokenArgs),
    Enrol(identity::EnrolArgs),
}

/// Runs what the command line `arguments` (with the program's name first) asks for.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    if arguments.first().is_some_and(|name| helper::is_helper(Path::new(name))) {
        return conclude(done(helper::run(arguments.get(1..).unwrap_or_default())));
    }
    match Cli::try_parse_from(&arguments) {
        Ok(cli) => conclude(cli.command.run(&arguments)),
        Err(error) => explain(&error),
    }
}

impl Command {
    fn run(self, arguments: &[OsString]) -> CliResult<ExitCode> {
        done(match self {
            Self::Up(args) => local::up(&args),
            Self::Down(args) => local::down(&args),
            Self::Status(args) => admin::status(&args),
            Self::Scrub(args) => scrub::run(&args),
            Self::Events(args) => events::run(&args),
            Self::Drain(args) => operate::drain(&args),
            Self::Undrain(args) => operate::undrain(&args),
            Self::Maintenance(args) => operate::maintenance(&args),
            Self::Remove(args) => operate::remove(&args),
            Self::Rebalance(args) => operate::rebalance(&args),
            Self::Replicas(args) => replicas::run(&args),
            Self::Meta(args) => metadata::run(&args),
            Self::Fsck(args) => return fsck::run(&args),
            Self::Mount(args) => mount::run(args, arguments.get(1..).unwrap_or_default()),
            Self::Init(args) => identity::init(&args),
            Self::Token(args) => admin::token(&args),
            Self::Enrol(args) => identity::enrol(&args),
        })
    }
}

/// For commands that either do what they were asked or fail.
fn done(result: CliResult) -> CliResult<ExitCode> {
    result.map(|()| ExitCode::SUCCESS)
}

fn conclude(result: CliResult<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            complain(&error);
            ExitCode::from(FAILURE)
        }
    }
}

/// One sentence on standard error. If that is closed, the exit status has to say it alone.
fn complain(error: &CliError) {
    drop(writeln!(io::stderr(), "holdfast: {error}"));
}

/// Help and version as well as mistakes, each to its own stream.
fn explain(error: &clap::Error) -> ExitCode {
    drop(error.print());
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ => ExitCode::from(USAGE),
    }
}

/// Writes to standard output. Whoever stops reading (`| head`) has seen enough.
fn print(text: &str) -> CliResult {
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_sound_and_every_option_is_explained() {
        let command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            assert!(sub.get_about().is_some(), "{} has no description", sub.get_name());
            for argument in sub.get_arguments().filter(|argument| !argument.is_hide_set()) {
                assert!(argument.get_help().is_some(), "{} {} has no help", sub.get_name(), argument.get_id());
            }
        }
    }

    #[test]
    fn what_can_be_typed_is_understood() {
        for line in [
            "holdfast up",
            "holdfast up --dir /d --mount /m --storage 5",
            "holdfast up --no-mount",
            "holdfast down --force",
            "holdfast status --json",
            "holdfast status --config c.toml",
            "holdfast fsck --repair --json --dir /d",
            "holdfast scrub --now --wait",
            "holdfast events -n 5 --follow --serious --json",
            "holdfast drain 3 --no-wait --dir /d",
            "holdfast undrain 3 --json",
            "holdfast maintenance on 2 --for 30m",
            "holdfast maintenance off 2 --config c.toml",
            "holdfast remove 4",
            "holdfast rebalance --no-wait --json",
            "holdfast meta backup f --config c.toml",
            "holdfast meta restore f --dir /d",
            "holdfast meta restore f --meta-config m.toml",
            "holdfast mount /d /m",
            "holdfast mount c.toml /m -o ro,noatime -o allow_other -f",
            "holdfast mount c.toml /m --io-timeout-secs 5 --log-file l",
            "holdfast init /d --address 10.0.0.1:7400",
            "holdfast token --role storage",
            "holdfast token --role client --valid 30m --config c.toml",
            "holdfast enrol hft1.x --tls-dir t",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "holdfast",
            "holdfast fly",
            "holdfast up --storage 2",
            "holdfast up --storage 65",
            "holdfast up --mount /m --no-mount",
            "holdfast status --dir d --config c",
            "holdfast scrub --wait",
            "holdfast drain",
            "holdfast drain all",
            "holdfast maintenance",
            "holdfast meta",
            "holdfast meta restore",
            "holdfast maintenance on --for 30m",
            "holdfast maintenance on 2 --for soon",
            "holdfast token",
            "holdfast token --role admin",
            "holdfast token --role storage --valid never",
            "holdfast mount c.toml",
            "holdfast enrol hft1.x",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}

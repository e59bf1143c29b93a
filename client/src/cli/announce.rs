//! What a mount in the background tells the command that started it: one line on its standard output.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use super::{
    error::{CliError, CliResult},
    process::ProcessId,
};

/// The hidden flag of the child.
pub(super) const FLAG: &str = "--announce";
/// The child gives up by itself before that.
const PATIENCE: Duration = Duration::from_secs(100);
const READY: &str = "ready";
const FAILED: &str = "failed ";
/// Bytes of an announcement that are read.
const LENGTH_MAX: u64 = 8192;

#[derive(Debug, PartialEq, Eq)]
enum Announcement {
    Ready,
    Failed(String),
    /// It ended, or wrote something else.
    Nothing,
}

fn parse(line: &str) -> Announcement {
    match (line, line.strip_prefix(FAILED)) {
        (READY, _) => Announcement::Ready,
        (_, Some(sentence)) => Announcement::Failed(sentence.to_owned()),
        _ => Announcement::Nothing,
    }
}

/// The child's side: the mount answers.
pub(super) fn ready() {
    say(READY);
}

/// The child's side: there will be no mount.
pub(super) fn failed(error: &CliError) {
    say(&format!("{FAILED}{error}"));
}

fn say(line: &str) {
    let mut output = io::stdout().lock();
    if let Err(error) = writeln!(output, "{line}").and_then(|()| output.flush()) {
        tracing::debug!(%error, "whoever started this mount does not listen any more");
    }
}

/// Starts this program again in the background with `arguments` (the subcommand first), and waits until it has announced a
/// mount that answers.
/// Its errors go to `log`, or nowhere.
pub(super) fn launch(arguments: &[OsString], log: Option<&Path>) -> CliResult<ProcessId> {
    let mut child = Command::new("/proc/self/exe")
        .arg0("holdfast")
        .args(arguments.first())
        // Before the rest, where `--` may stand.
        .arg(FLAG)
        .args(arguments.get(1..).unwrap_or_default())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors_to(log)?)
        .spawn()
        .map_err(|error| CliError::from(error).during("the mount process could not be started"))?;
    let process = ProcessId::of(child.id());
    let announced = child.stdout.take().map_or(Announcement::Nothing, |output| await_line(output, PATIENCE));
    match (announced, process) {
        (Announcement::Ready, Some(process)) => Ok(process),
        (Announcement::Failed(sentence), _) => Err(CliError::new(sentence)),
        _ => {
            // Ours, and not reaped yet: the number cannot be anybody else's.
            drop(child.kill());
            drop(child.wait());
            Err(CliError::new(format!("the mount process ended without a word{}", see(log))))
        }
    }
}

fn errors_to(log: Option<&Path>) -> CliResult<Stdio> {
    let Some(path) = log else { return Ok(Stdio::null()) };
    let file = File::options().create(true).append(true).open(path);
    let file =
        file.map_err(|error| CliError::from(error).during(format!("the log {} cannot be written", path.display())))?;
    Ok(file.into())
}

fn see(log: Option<&Path>) -> String {
    log.map_or_else(|| "; run it with --foreground to see why".to_owned(), |path| format!("; see {}", path.display()))
}

fn await_line(output: impl Read + Send + 'static, patience: Duration) -> Announcement {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || drop(sender.send(read_line(output))));
    receiver.recv_timeout(patience).map_or(Announcement::Nothing, |line| parse(&line))
}

fn read_line(output: impl Read) -> String {
    let mut line = Vec::new();
    if let Err(error) = BufReader::new(output.take(LENGTH_MAX)).read_until(b'\n', &mut line) {
        tracing::debug!(%error, "the announcement could not be read to its end");
    }
    String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(&line)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_says_ready_or_why_not_or_nothing() {
        for (text, expected) in [
            ("ready\n", Announcement::Ready),
            ("ready\nand more", Announcement::Ready),
            ("failed no server answers\n", Announcement::Failed("no server answers".to_owned())),
            ("", Announcement::Nothing),
            ("read", Announcement::Nothing),
            ("something else\n", Announcement::Nothing),
        ] {
            assert_eq!(await_line(io::Cursor::new(text.to_owned()), Duration::from_secs(10)), expected, "{text:?}");
        }
    }

    #[test]
    fn a_child_that_stays_silent_is_not_waited_for_for_ever() {
        let (reader, _writer) = io::pipe().unwrap();
        assert_eq!(await_line(reader, Duration::from_millis(10)), Announcement::Nothing);
    }

    #[test]
    fn a_child_that_never_ends_its_line_fills_no_memory() {
        assert_eq!(read_line(io::repeat(b'x')).len() as u64, LENGTH_MAX);
    }
}

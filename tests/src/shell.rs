//! Running the tools that people use, with a limit on how long they may take.

use std::{
    ffi::OsStr,
    io::Read,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

use crate::{sys, wait};

/// No tool of a test may take longer.
pub const TOOL_LIMIT: Duration = Duration::from_secs(240);

/// Runs `script` with bash in `directory`; its standard output. Panics with everything it said if it fails.
pub fn run(directory: &Path, script: &str) -> String {
    let output = attempt(directory, script, TOOL_LIMIT);
    assert!(
        output.status.success(),
        "{script}\nended with {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs `script` with bash in `directory`, whatever comes of it.
pub fn attempt(directory: &Path, script: &str, limit: Duration) -> Output {
    let mut command = Command::new("bash");
    command.arg("-euo").arg("pipefail").arg("-c").arg(script).current_dir(directory);
    complete(command, limit)
}

/// Runs `command` to its end; kills its whole group and panics if that takes longer than `limit`.
pub fn complete(mut command: Command, limit: Duration) -> Output {
    let name = command.get_program().to_owned();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().unwrap_or_else(|error| panic!("start {}: {error}", name.display()));
    let readers = (drain(child.stdout.take()), drain(child.stderr.take()));
    let Some(status) = wait::try_until(limit, || child.try_wait().expect("a child can be asked")) else {
        kill_group(child.id());
        panic!("{} {} still runs after {limit:?}", name.display(), arguments(&command));
    };
    let [stdout, stderr] = [readers.0, readers.1].map(|reader| reader.join().expect("a reader does not panic"));
    Output { status, stdout, stderr }
}

fn arguments(command: &Command) -> String {
    command.get_args().map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

fn kill_group(pid: u32) {
    sys::kill_group(pid, libc::SIGKILL);
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            pipe.read_to_end(&mut bytes).expect("a pipe can be read to its end");
        }
        bytes
    })
}

/// Whether `tool` is on the path.
pub fn has(tool: &str) -> bool {
    let search = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&search).any(|directory| directory.join(tool).is_file())
}

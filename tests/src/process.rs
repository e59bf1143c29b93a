//! Real processes under a test's control, none of which outlives it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{OnceLock, mpsc},
    thread,
    time::Duration,
};

use parking_lot::Mutex;

use crate::{sys, wait};

type Reply = mpsc::SyncSender<io::Result<Child>>;

/// Starts `command` from a thread that lives as long as this process: the kernel ties "dies with its parent" to the
/// *thread* that forks, and a test may start daemons from threads that end.
fn spawn(mut command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<mpsc::SyncSender<(Command, Reply)>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, receiver) = mpsc::sync_channel::<(Command, Reply)>(8);
        thread::spawn(move || {
            while let Ok((mut command, reply)) = receiver.recv() {
                reply.send(command.spawn()).expect("the caller of spawn waits for its answer");
            }
        });
        sender
    });
    sys::die_with_parent(&mut command);
    let (sender, receiver) = mpsc::sync_channel(1);
    spawner.send((command, sender)).expect("the spawner lives as long as the process");
    receiver.recv().expect("the spawner answers every command")
}

/// The folder with `holdfast` and `holdfastd`: `HOLDFAST_BIN_DIR`, or where cargo put this test.
fn bin_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("HOLDFAST_BIN_DIR") {
        return dir.into();
    }
    let test = std::env::current_exe().expect("a test knows its own path");
    test.parent().and_then(Path::parent).expect("tests lie in TARGET/PROFILE/deps").to_owned()
}

/// A command on one of our binaries.
pub fn binary(name: &str) -> Command {
    let path = bin_dir().join(name);
    assert!(path.exists(), "{} is missing: build it with `cargo build --profile checked --bins`", path.display());
    Command::new(path)
}

/// A program that can be started, hurt and started again. Its output is appended to a log.
#[derive(Debug)]
pub struct Process {
    name: String,
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    log: PathBuf,
    child: Mutex<Option<Child>>,
    /// Waits to become the next one, see [`Process::start`].
    spare: Mutex<Option<Child>>,
}

impl Process {
    /// Describes `holdfast` or `holdfastd` with `arguments`; does not start it.
    pub fn new(name: &str, program: &str, arguments: &[&str], log: PathBuf) -> Self {
        Self {
            name: name.into(),
            program: binary(program).get_program().into(),
            arguments: arguments.iter().map(|&argument| argument.into()).collect(),
            environment: vec![("RUST_BACKTRACE".into(), "0".into())],
            log,
            child: Mutex::new(None),
            spare: Mutex::new(None),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// A test may have files of a mount open, with bytes that are not stored. A process that is made then closes its copies of
    /// them before it becomes another program, and that waits for the very server that is to be started. So each start
    /// leaves a shell behind that has done so already, and becomes the program at the next.
    pub fn start(&self) {
        Self::start_all(&[self]);
    }

    /// Starts them all before it leaves anything behind: that may wait for any of them.
    pub fn start_all(processes: &[&Self]) {
        processes.iter().for_each(|process| process.become_the_program());
        processes.iter().for_each(|process| *process.spare.lock() = Some(process.wait_for_start()));
    }

    fn become_the_program(&self) {
        let mut child = self.child.lock();
        assert!(child.is_none(), "{} runs already", self.name);
        let mut next = self.spare.lock().take().unwrap_or_else(|| self.wait_for_start());
        let mut start = next.stdin.take().expect("its input is a pipe");
        start.write_all(b"start\n").unwrap_or_else(|error| panic!("start {}: {error}", self.name));
        *child = Some(next);
    }

    fn wait_for_start(&self) -> Child {
        let output = self.open_log();
        let mut command = Command::new("sh");
        command
            .args(["-c", "read -r start && exec \"$0\" \"$@\" < /dev/null"])
            .arg(&self.program)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::piped())
            .stdout(output.try_clone().expect("a log can be duplicated"))
            .stderr(output);
        spawn(command).unwrap_or_else(|error| panic!("start {}: {error}", self.name))
    }

    fn open_log(&self) -> File {
        let open = OpenOptions::new().create(true).append(true).open(&self.log);
        open.unwrap_or_else(|error| panic!("open {}: {error}", self.log.display()))
    }

    pub fn pid(&self) -> u32 {
        self.child.lock().as_ref().unwrap_or_else(|| panic!("{} does not run", self.name)).id()
    }

    pub fn is_started(&self) -> bool {
        self.child.lock().is_some()
    }

    fn signal(&self, signal: libc::c_int) {
        assert!(sys::kill(self.pid(), signal), "{} is gone", self.name);
    }

    /// `kill -9`, and gone when this returns.
    pub fn kill(&self) {
        if let Some(mut child) = self.child.lock().take() {
            child.kill().expect("a child can be killed");
            child.wait().expect("a killed child can be waited for");
        }
    }

    /// SIGSTOP: alive, deaf and dumb.
    pub fn freeze(&self) {
        self.signal(libc::SIGSTOP);
        let state = || fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        wait::until("the process has stopped", Duration::from_secs(2), || state().contains(") T "));
    }

    pub fn thaw(&self) {
        self.signal(libc::SIGCONT);
    }

    /// SIGTERM, and its exit status; panics when it does not end within `limit`.
    pub fn terminate(&self, limit: Duration) -> ExitStatus {
        self.signal(libc::SIGTERM);
        self.wait(limit).unwrap_or_else(|| panic!("{} does not end after SIGTERM within {limit:?}", self.name))
    }

    /// Its exit status, if it ends within `limit`.
    pub fn wait(&self, limit: Duration) -> Option<ExitStatus> {
        let status = wait::try_until(limit, || self.try_wait());
        if status.is_some() {
            *self.child.lock() = None;
        }
        status
    }

    fn try_wait(&self) -> Option<ExitStatus> {
        self.child.lock().as_mut().and_then(|child| child.try_wait().expect("a child can be asked"))
    }

    /// It ran and has ended by itself.
    pub fn has_ended(&self) -> bool {
        self.try_wait().is_some()
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("a running process has a status");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("the kernel tells RssAnon");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("RssAnon is a number") << 10
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// For a person who looks into a failure.
    pub fn print_log_tail(&self) {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        eprintln!("--- {} ({} lines)", self.name, lines.len());
        lines[lines.len().saturating_sub(40)..].iter().for_each(|line| eprintln!("{line}"));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if let Some(mut spare) = self.spare.get_mut().take() {
            // It has nothing to lose, and dies with its input anyway.
            drop((spare.kill(), spare.wait()));
        }
    }
}

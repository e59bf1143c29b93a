//! A real cluster in a temporary directory: its processes, its configuration, its mounts.
//!
//! `holdfast up` makes the directory as it does for everyone; from then on the harness starts each daemon itself, so
//! that it knows them and can hurt them one by one.

use std::{
    fs::{self, OpenOptions},
    io::{Read, Seek, Write},
    net::{SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::Output,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    mount::{self, Mount},
    process::{self, Process},
    proxy::Proxy,
    shell, sys, wait,
};

/// Everything that a healthy cluster does on its own happens within this.
pub const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub struct Options {
    pub storage: usize,
    /// Every server is reached through a wire that can be cut.
    pub proxied: bool,
    /// Mounts reach the metadata server through a wire that can be cut.
    pub proxied_mounts: bool,
    /// Keys of `client.toml`.
    pub client: Vec<(&'static str, toml::Value)>,
    /// Keys of every `storage.toml`.
    pub storage_keys: Vec<(&'static str, toml::Value)>,
}

impl Default for Options {
    fn default() -> Self {
        Self { storage: 3, proxied: false, proxied_mounts: false, client: Vec::new(), storage_keys: Vec::new() }
    }
}

#[derive(Debug)]
pub struct Cluster {
    meta: Process,
    storage: Vec<Process>,
    wires: Vec<Wires>,
    mounts_wire: Option<Proxy>,
    mounts: AtomicUsize,
    dir: TempDir,
}

/// The two ways of one storage server to the rest.
#[derive(Debug)]
struct Wires {
    /// Others reach the server through it.
    server: Proxy,
    /// It reaches the metadata server through it.
    meta: Proxy,
}

impl Cluster {
    /// Three storage servers and a metadata server, up.
    pub fn start() -> Self {
        Self::start_with(&Options::default())
    }

    pub fn start_with(options: &Options) -> Self {
        let cluster = Self::prepare(options);
        cluster.start_daemons();
        cluster
    }

    /// Configured, but nothing runs yet.
    pub fn prepare(options: &Options) -> Self {
        let dir = temp_dir();
        make_directory(dir.path(), options.storage);
        let daemon = |name: &str, role: &str, config: &str| {
            let config = dir.path().join(config);
            let arguments = [role, "--config", config.to_str().expect("test paths are UTF-8")];
            Process::new(name, "holdfastd", &arguments, dir.path().join("log").join(format!("{name}.test.log")))
        };
        let meta = daemon("meta", "meta", "meta/meta.toml");
        let storage = (1..=options.storage)
            .map(|n| daemon(&format!("storage-{n}"), "storage", &format!("storage-{n}/storage.toml")))
            .collect();
        let mut cluster =
            Self { meta, storage, wires: Vec::new(), mounts_wire: None, mounts: AtomicUsize::new(0), dir };
        cluster.configure(options);
        cluster
    }

    /// Ports that no other test has, wires if asked for, and the options' keys.
    fn configure(&mut self, options: &Options) {
        let meta = free_address();
        self.set("meta/meta.toml", "listen", meta.to_string());
        for file in ["client.toml", "admin.toml"] {
            self.set(file, "meta", meta.to_string());
        }
        if options.proxied_mounts {
            let wire = Proxy::start(free_address(), meta);
            self.set("client.toml", "meta", wire.address().to_string());
            self.mounts_wire = Some(wire);
        }
        for (key, value) in &options.client {
            self.set("client.toml", key, value.clone());
        }
        for n in 1..=options.storage {
            let config = format!("storage-{n}/storage.toml");
            let listen = free_address();
            self.set(&config, "listen", listen.to_string());
            self.set(&config, "meta", meta.to_string());
            for (key, value) in &options.storage_keys {
                self.set(&config, key, value.clone());
            }
            if options.proxied {
                let wires =
                    Wires { server: Proxy::start(free_address(), listen), meta: Proxy::start(free_address(), meta) };
                self.set(&config, "advertise", wires.server.address().to_string());
                self.set(&config, "meta", wires.meta.address().to_string());
                self.wires.push(wires);
            }
        }
    }

    /// Changes one key of a configuration file of the cluster.
    pub fn set(&self, file: &str, key: &str, value: impl Into<toml::Value>) {
        let path = self.path().join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
        let mut table: toml::Table = text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        table.insert(key.into(), value.into());
        fs::write(&path, table.to_string()).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    }

    /// Takes one key out of a configuration file of the cluster.
    pub fn unset(&self, file: &str, key: &str) {
        let path = self.path().join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
        let mut table: toml::Table = text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        table.remove(key);
        fs::write(&path, table.to_string()).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    }

    /// One key of a configuration file, as text.
    pub fn get(&self, file: &str, key: &str) -> String {
        let text = fs::read_to_string(self.path().join(file)).expect("a configuration can be read");
        let table: toml::Table = text.parse().expect("a configuration is TOML");
        table[key].as_str().expect("the key is text").into()
    }

    /// Where the certificate of a client of this cluster is.
    pub fn client_tls(&self) -> PathBuf {
        self.path().join(self.get("client.toml", "tls_dir"))
    }

    /// Starts every daemon that does not run, and waits until all are up.
    pub fn start_daemons(&self) {
        let all = std::iter::once(&self.meta).chain(&self.storage);
        Process::start_all(&all.filter(|process| !process.is_started()).collect::<Vec<_>>());
        self.wait_until_up();
    }

    pub fn wait_until_up(&self) {
        wait::until("every server is up", PATIENCE, || {
            for process in std::iter::once(&self.meta).chain(&self.storage) {
                assert!(!process.has_ended(), "{} ended by itself:\n{}", process.name(), process.log());
            }
            self.try_status().is_some_and(|status| status.servers_up() == self.storage.len())
        });
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn meta(&self) -> &Process {
        &self.meta
    }

    /// Storage server `n`, counted from 1.
    pub fn storage(&self, n: usize) -> &Process {
        &self.storage[n - 1]
    }

    pub fn storage_servers(&self) -> &[Process] {
        &self.storage
    }

    pub fn storage_data(&self, n: usize) -> PathBuf {
        self.path().join(format!("storage-{n}")).join(self.get(&format!("storage-{n}/storage.toml"), "data_dir"))
    }

    /// Storage server `n`, which does not run, has its data in `directory` from now on.
    pub fn move_data(&self, n: usize, directory: &Path) {
        let directory = directory.to_str().expect("test paths are UTF-8");
        self.set(&format!("storage-{n}/storage.toml"), "data_dir", directory);
    }

    /// Storage server `n` dies, and comes back with an empty disk.
    pub fn wipe(&self, n: usize) {
        self.storage(n).kill();
        for name in ["segments", "index.redb", "boot.toml", "scrub.json"] {
            let path = self.storage_data(n).join(name);
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            assert!(removed.is_ok() || !path.exists(), "{}: {removed:?}", path.display());
        }
        self.storage(n).start();
    }

    /// Storage server `n` is alone in the world.
    pub fn cut(&self, n: usize) {
        self.wires[n - 1].server.cut();
        self.wires[n - 1].meta.cut();
    }

    /// The metadata server and storage server `n` do not hear each other.
    pub fn cut_from_meta(&self, n: usize) {
        self.wires[n - 1].meta.cut();
    }

    /// Storage server `n` hears whoever asks it, and nobody hears its answers. What it says to the metadata server arrives.
    pub fn cut_answers(&self, n: usize) {
        self.wires[n - 1].server.cut_answers();
    }

    pub fn mend(&self, n: usize) {
        self.wires[n - 1].server.mend();
        self.wires[n - 1].meta.mend();
    }

    /// Between all mounts and the metadata server, of a cluster with `proxied_mounts`.
    pub fn mounts_wire(&self) -> &Proxy {
        self.mounts_wire.as_ref().expect("the cluster has a wire for its mounts")
    }

    /// A new mount of its own.
    pub fn mount(&self) -> Mount {
        self.mount_with(&[])
    }

    pub fn mount_with(&self, options: &[&str]) -> Mount {
        let n = self.mounts.fetch_add(1, Ordering::Relaxed) + 1;
        let log = self.path().join(format!("log/mount-{n}.test.log"));
        Mount::start(&self.path().join("client.toml"), self.path().join(format!("mnt-{n}")), options, log)
    }

    /// Runs `holdfast` with `arguments` to its end.
    pub fn holdfast(&self, arguments: &[&str]) -> Output {
        holdfast(arguments)
    }

    pub fn status(&self) -> Status {
        self.try_status().expect("the cluster tells its status")
    }

    pub fn try_status(&self) -> Option<Status> {
        let output = holdfast(&["status", "--dir", self.text(), "--json"]);
        output.status.success().then(|| Status(serde_json::from_slice(&output.stdout).expect("status --json is JSON")))
    }

    fn text(&self) -> &str {
        self.path().to_str().expect("test paths are UTF-8")
    }

    /// Every block has all its copies, and nothing is owed.
    pub fn wait_until_whole(&self) {
        let status = wait::try_until(PATIENCE, || self.try_status().filter(Status::is_whole));
        assert!(status.is_some(), "copies are still owed: {:#?}", self.status().0);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for n in 1..=self.mounts.load(Ordering::Relaxed) {
            mount::detach(&self.path().join(format!("mnt-{n}")));
        }
        if thread::panicking() {
            self.meta.print_log_tail();
            self.storage.iter().for_each(Process::print_log_tail);
        }
        if std::env::var_os("HOLDFAST_KEEP").is_some() {
            eprintln!("kept {}", self.path().display());
            self.dir.disable_cleanup(true);
        }
    }
}

/// What `holdfast status --json` says.
#[derive(Clone, Debug)]
pub struct Status(pub Value);

impl Status {
    pub fn servers_up(&self) -> usize {
        let servers = self.0["servers"].as_array().expect("status lists the servers");
        servers.iter().filter(|server| server["state"].as_str().is_some_and(|it| it.eq_ignore_ascii_case("up"))).count()
    }

    /// A number at the top of the status.
    pub fn number(&self, key: &str) -> u64 {
        self.0[key].as_u64().unwrap_or_else(|| panic!("status has no number {key}: {:#}", self.0))
    }

    /// The sum of a number over the storage servers' own reports.
    pub fn storage_sum(&self, key: &str) -> u64 {
        let servers = self.0["servers"].as_array().expect("status lists the servers");
        servers.iter().map(|server| server["load"][key].as_u64().expect("a server reports its load")).sum()
    }

    /// Files that mounts hold open.
    pub fn open_files(&self) -> u64 {
        let mounts = self.0["mounts"].as_array().expect("status lists the mounts");
        mounts.iter().map(|mount| mount["open_files"].as_u64().expect("a mount has open files")).sum()
    }

    pub fn is_whole(&self) -> bool {
        let copies = self.0["blocks_by_copies"].as_array().expect("status counts copies");
        self.number("owed") == 0 && copies[..copies.len() - 1].iter().all(|count| count == 0)
    }
}

/// Runs `holdfast` with `arguments` to its end.
pub fn holdfast(arguments: &[&str]) -> Output {
    let mut command = process::binary("holdfast");
    command.args(arguments);
    shell::complete(command, Duration::from_secs(60))
}

/// Runs `holdfast` with `arguments`; panics with what it said if it fails.
pub fn holdfast_ok(arguments: &[&str]) -> String {
    let output = holdfast(arguments);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "holdfast {} ended with {}\n{said}", arguments.join(" "), output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn make_directory(dir: &Path, storage: usize) {
    let text = dir.to_str().expect("test paths are UTF-8");
    holdfast_ok(&["up", "--dir", text, "--storage", &storage.to_string(), "--no-mount"]);
    holdfast_ok(&["down", "--dir", text]);
    fs::create_dir_all(dir.join("log")).expect("make the folder of logs");
}

const TEMP_PREFIX: &str = "holdfast-test-";

/// A new directory, named after this process. Those of processes that were killed are removed on the way.
pub fn temp_dir() -> TempDir {
    let root = std::env::var_os("HOLDFAST_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    sweep(&root);
    let prefix = format!("{TEMP_PREFIX}{}-", std::process::id());
    tempfile::Builder::new().prefix(&prefix).tempdir_in(root).expect("make a temporary directory")
}

fn sweep(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(TEMP_PREFIX)?.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            for inside in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
                mount::detach(&inside.path());
            }
            // Another test may sweep the same directory: whoever comes first removes it.
            fs::remove_dir_all(entry.path()).ok();
        }
    }
}

/// Below the range from which the kernel hands out ports.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// An address on the loopback that no other test of this machine was or is given, for UDP.
pub fn free_address() -> SocketAddr {
    let path = std::env::temp_dir().join("holdfast-test.ports");
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .expect("open the port counter");
    sys::lock(&file).expect("lock the port counter");
    let mut text = String::new();
    file.read_to_string(&mut text).expect("read the port counter");
    let mut port = text.trim().parse().unwrap_or(PORTS.start);
    loop {
        port = if PORTS.contains(&(port + 1)) { port + 1 } else { PORTS.start };
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if UdpSocket::bind(address).is_ok() {
            file.set_len(0).expect("write the port counter");
            file.rewind().expect("write the port counter");
            file.write_all(port.to_string().as_bytes()).expect("write the port counter");
            return address;
        }
    }
}

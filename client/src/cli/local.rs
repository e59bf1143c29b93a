//! A whole cluster on this machine: `holdfast up` and `holdfast down`.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, File, TryLockError},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use holdfast_common::{
    ServerId,
    config::{ClientConfig, StorageConfig, StorageOptions},
    net::{identity::Role, tls::Credentials},
    wire::meta::ClusterStatus,
};
use serde::{Deserialize, Serialize};

use super::{
    admin, announce,
    error::{CliError, CliResult},
    identity::{self, ADMIN_CONFIG, META_CONFIG},
    mount::{CLIENT_CONFIG, source_name},
    print,
    process::{PidFile, ProcessId, last_lines, start_detached, users_of},
};
use crate::{
    mount::{
        table::{OurMount, our_mounts},
        unmount_patiently,
    },
    sys::{self, Signal, Unmount},
};

const REMEMBERED: &str = "cluster.toml";
const DEFAULT_STORAGE: u32 = 3;
/// How long new processes may take until they answer.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long a process may take to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// Ports that the kernel does not hand out by itself, so that they are free again at the next start.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
const PORT_TRIES: usize = 1000;
const LOG_LINES_SHOWN: usize = 8;
const TOKEN_VALIDITY: Duration = Duration::from_secs(60);

/// Start a cluster on this machine, and mount it
///
/// The first time, it makes one: a metadata server and storage servers, each a process of its own. Afterwards
/// it starts what does not run. The data stay until DIR is removed.
#[derive(Debug, Args)]
pub(super) struct UpArgs {
    /// Directory of the cluster
    /// [default: /var/lib/holdfast/local as root, else ~/.local/share/holdfast/local]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Where to mount it; made if it does not exist, and remembered [default: DIR/mnt]
    #[arg(long, value_name = "DIR")]
    pub mount: Option<PathBuf>,
    /// Storage servers, 3 to 64; a cluster that has fewer gets more [default: 3]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(3..=64))]
    pub storage: Option<u32>,
    /// Start the servers only
    #[arg(long, conflicts_with = "mount")]
    pub no_mount: bool,
}

/// Unmount and stop a cluster on this machine, and keep its data
///
/// What was written is stored first. `holdfast up` brings it back.
#[derive(Debug, Args)]
pub(super) struct DownArgs {
    /// Directory of the cluster
    /// [default: /var/lib/holdfast/local as root, else ~/.local/share/holdfast/local]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Unmount also while files are open, and kill what does not stop
    #[arg(long)]
    pub force: bool,
}

/// The directory that was named, or the one everybody gets.
pub(super) fn directory(named: Option<&Path>) -> CliResult<PathBuf> {
    let chosen = match named {
        Some(path) => path.to_owned(),
        None => default_directory(sys::effective_uid(), |name| std::env::var_os(name).map(PathBuf::from))?,
    };
    Ok(std::path::absolute(chosen)?)
}

fn default_directory(uid: u32, variable: impl Fn(&str) -> Option<PathBuf>) -> CliResult<PathBuf> {
    if uid == 0 {
        return Ok(PathBuf::from("/var/lib/holdfast/local"));
    }
    let data = variable("XDG_DATA_HOME").filter(|path| path.is_absolute());
    let data = data.or_else(|| variable("HOME").map(|home| home.join(".local/share")));
    data.map(|data| data.join("holdfast/local"))
        .ok_or_else(|| CliError::new("neither HOME nor --dir says where the cluster is"))
}

/// What `up` was told once and needs again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remembered {
    storage: u32,
    mount: PathBuf,
}

/// One server process.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Daemon {
    name: String,
    role: Role,
    config: PathBuf,
}

#[derive(Debug)]
struct Local {
    dir: PathBuf,
    remembered: Remembered,
}

pub(super) fn up(args: &UpArgs) -> CliResult {
    let dir = directory(args.dir.as_deref())?;
    let _lock = open(&dir)?;
    let local = Local::remember(dir, args)?;
    // Every path is absolute by now. Whoever stands on the mount must not wait for the server that is to be started.
    std::env::set_current_dir("/")?;
    let admin = local.ensure_identity()?;
    let mut started = local.ensure_meta(&admin)?;
    started.extend(local.ensure_storage(&admin)?);
    let status = local.await_storage(&admin)?;
    local.ensure_client(&admin)?;
    let mounted = if args.no_mount { None } else { Some(local.ensure_mounted()?) };
    print(&local.summary(&status, &started, mounted))
}

/// Makes the directory, and keeps other commands of its cluster out until the file is closed.
fn open(dir: &Path) -> CliResult<File> {
    [dir.to_owned(), dir.join("run"), dir.join("log")].iter().try_for_each(|path| identity::private_directory(path))?;
    let lock = File::options().create(true).append(true).open(dir.join("run/lock"))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => {
            Err(CliError::new(format!("another `holdfast up` or `down` is at work in {}", dir.display())))
        }
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}

/// What a mount of this cluster is, seen from `up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mounted {
    Now,
    Before,
}

impl Local {
    fn remember(dir: PathBuf, args: &UpArgs) -> CliResult<Self> {
        let before = read_remembered(&dir)?;
        let remembered = plan(&dir, before.as_ref(), args.storage, args.mount.as_deref())?;
        let local = Self { dir, remembered };
        if let Some(elsewhere) = local.mounts()?.iter().find(|mount| mount.mountpoint != local.remembered.mount)
            && args.mount.is_some()
        {
            let place = elsewhere.mountpoint.display();
            return Err(CliError::new(format!("the cluster is mounted on {place}; `holdfast down` first to move it")));
        }
        if before.as_ref() != Some(&local.remembered) {
            identity::write(&local.dir.join(REMEMBERED), &toml::to_string(&local.remembered)?)?;
        }
        Ok(local)
    }

    fn ensure_identity(&self) -> CliResult<ClientConfig> {
        if !self.dir.join(ADMIN_CONFIG).exists() {
            if self.dir.join(identity::CA_DIR).exists() {
                let dir = self.dir.display();
                return Err(CliError::new(format!("{dir} was left half made: remove it, and run this again")));
            }
            let address = free_address(&[])?;
            identity::create(&self.dir, address, address)?;
        }
        admin::of_directory(&self.dir)
    }

    fn ensure_meta(&self, admin: &ClientConfig) -> CliResult<Vec<String>> {
        let meta = self.meta();
        let started = self.ensure_running(&meta)?;
        let give_up = Instant::now() + START_PATIENCE;
        loop {
            let error = match admin::ask_status(admin) {
                Ok(_) => return Ok(started),
                Err(error) => error,
            };
            self.check_running(&meta)?;
            if Instant::now() > give_up {
                return Err(error.during("the metadata server runs, but is of no use"));
            }
            thread::sleep(POLL);
        }
    }

    fn meta(&self) -> Daemon {
        Daemon { name: "meta".to_owned(), role: Role::Meta, config: self.dir.join(META_CONFIG) }
    }

    fn storage(&self) -> Vec<Daemon> {
        let daemon = |number| {
            let name = format!("storage-{number}");
            Daemon { config: self.dir.join(&name).join("storage.toml"), role: Role::Storage, name }
        };
        (1..=self.remembered.storage).map(daemon).collect()
    }

    fn ensure_storage(&self, admin: &ClientConfig) -> CliResult<Vec<String>> {
        let mut started = Vec::new();
        let mut taken = vec![admin.meta];
        for daemon in self.storage() {
            self.ensure_storage_config(&daemon, admin, &mut taken)?;
            started.extend(self.ensure_running(&daemon)?);
        }
        Ok(started)
    }

    /// Enrols it as any other server would be, so that its number is the metadata server's choice. The configuration comes
    /// last: a server that has one is complete.
    fn ensure_storage_config(&self, daemon: &Daemon, admin: &ClientConfig, taken: &mut Vec<SocketAddr>) -> CliResult {
        if daemon.config.exists() {
            taken.push(storage_config(daemon)?.listen);
            return Ok(());
        }
        self.ensure_member(&self.dir.join(&daemon.name).join("tls"), Role::Storage, admin)?;
        let listen = free_address(taken)?;
        taken.push(listen);
        let text = format!(
            "# {}: holdfastd storage --config THIS_FILE. Paths are relative to this file.\n\
             data_dir = \"data\"\ntls_dir = \"tls\"\nlisten = \"{listen}\"\nmeta = \"{}\"\n",
            daemon.name, admin.meta
        );
        identity::write(&daemon.config, &text)
    }

    fn ensure_member(&self, tls_dir: &Path, role: Role, admin: &ClientConfig) -> CliResult {
        if !tls_dir.join("node.crt").exists() {
            identity::join(&admin::ask_token(admin, role, TOKEN_VALIDITY)?, tls_dir)?;
        }
        Ok(())
    }

    fn ensure_client(&self, admin: &ClientConfig) -> CliResult {
        let config = self.dir.join(CLIENT_CONFIG);
        if config.exists() {
            return Ok(());
        }
        self.ensure_member(&self.dir.join("client/tls"), Role::Client, admin)?;
        identity::write(&config, &identity::client_config(admin.meta, "client/tls"))
    }

    /// The name of what had to be started.
    fn ensure_running(&self, daemon: &Daemon) -> CliResult<Vec<String>> {
        if self.pid_file(&daemon.name).running().is_some() {
            return Ok(Vec::new());
        }
        let program = server_program()?;
        let arguments = [OsStr::new(daemon.role.as_str()), OsStr::new("--config"), daemon.config.as_os_str()];
        let process = start_detached(&program, &arguments, &self.log(&daemon.name))
            .map_err(|error| CliError::from(error).during(format!("{} could not be started", program.display())))?;
        match process {
            Some(process) => self.pid_file(&daemon.name).remember(process)?,
            None => return Err(self.ended(daemon)),
        }
        Ok(vec![daemon.name.clone()])
    }

    fn check_running(&self, daemon: &Daemon) -> CliResult {
        if self.pid_file(&daemon.name).running().is_some() {
            return Ok(());
        }
        Err(self.ended(daemon))
    }

    fn ended(&self, daemon: &Daemon) -> CliError {
        let lines = last_lines(&self.log(&daemon.name), LOG_LINES_SHOWN);
        CliError::new(format!("{} ended; its log ends with\n{lines}", daemon.name))
    }

    /// Waits until the metadata server counts every storage server as up.
    fn await_storage(&self, admin: &ClientConfig) -> CliResult<ClusterStatus> {
        let give_up = Instant::now() + START_PATIENCE;
        let daemons = self.storage();
        loop {
            let status = admin::ask_status(admin)?;
            daemons.iter().try_for_each(|daemon| self.check_running(daemon))?;
            let mut late = Vec::new();
            for daemon in &daemons {
                if !is_up(&status, storage_id(daemon)?) {
                    late.push(daemon.name.clone());
                }
            }
            if late.is_empty() {
                return Ok(status);
            }
            if Instant::now() > give_up {
                let log = self.dir.join("log");
                return Err(CliError::new(format!(
                    "{} did not report to the metadata server in time; see {}",
                    late.join(", "),
                    log.display()
                )));
            }
            thread::sleep(POLL);
        }
    }

    fn mounts(&self) -> CliResult<Vec<OurMount>> {
        let sources = [source_name(&self.dir), source_name(&self.dir.join(CLIENT_CONFIG))];
        Ok(our_mounts()?.into_iter().filter(|mount| sources.contains(&mount.source)).collect())
    }

    fn ensure_mounted(&self) -> CliResult<Mounted> {
        let running = self.pid_file("mount").running();
        for mount in self.mounts()? {
            if running.is_some() && mount.mountpoint == self.remembered.mount {
                return Ok(Mounted::Before);
            }
            if fs::metadata(&mount.mountpoint).is_ok() {
                // Somebody's own `holdfast mount`.
                continue;
            }
            sys::unmount(&mount.mountpoint, Unmount::Lazy)?;
        }
        let place = &self.remembered.mount;
        fs::create_dir_all(place).map_err(|error| {
            CliError::from(error).during(format!("the mount point {} cannot be made", place.display()))
        })?;
        let arguments = ["mount".into(), self.dir.clone().into_os_string(), place.clone().into_os_string()];
        let log = self.log("mount");
        let process = announce::launch(&arguments, Some(&log))
            .map_err(|error| error.during("the servers run, but the cluster could not be mounted"))?;
        self.pid_file("mount").remember(process)?;
        Ok(Mounted::Now)
    }

    fn pid_file(&self, name: &str) -> PidFile {
        PidFile(self.dir.join("run").join(format!("{name}.pid")))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(format!("{name}.log"))
    }

    fn summary(&self, status: &ClusterStatus, started: &[String], mounted: Option<Mounted>) -> String {
        let mut text = String::new();
        let dir = self.dir.display();
        let news = match started {
            [] => "runs already".to_owned(),
            started if started.len() == 1 + self.storage().len() => "is up".to_owned(),
            started => format!("is complete again: {} started", started.join(", ")),
        };
        // Writing to a string cannot fail.
        let _written = writeln!(text, "Cluster {} {news}, in {dir}", status.cluster);
        for daemon in std::iter::once(self.meta()).chain(self.storage()) {
            let pid =
                self.pid_file(&daemon.name).running().map_or_else(|| "-".to_owned(), |process| process.pid.to_string());
            let _written =
                writeln!(text, "  {:<12}process {pid:<9}log {}", daemon.name, self.log(&daemon.name).display());
        }
        match mounted {
            None => text.push_str("  not mounted\n"),
            Some(when) => {
                let word = if when == Mounted::Now { "mounted" } else { "was mounted" };
                let _written = writeln!(text, "  {word} on {}", self.remembered.mount.display());
                text.push_str(&self.suggestions());
            }
        }
        text
    }

    fn suggestions(&self) -> String {
        let (dir, mount) = (self.dir.display(), self.remembered.mount.display());
        let victim = self.pid_file("storage-2").running().map_or_else(String::new, |process| process.pid.to_string());
        format!(
            "\nTry:\n\
             \x20 cp -r /usr/share/doc {mount}/         # work in it\n\
             \x20 kill -9 {victim:<9}                   # storage-2 dies: go on reading and writing\n\
             \x20 holdfast status --dir {dir}    # see what is owed\n\
             \x20 holdfast up --dir {dir}        # it comes back, and gets what it missed\n\
             \x20 f=$(find {dir}/storage-1/data -name '*.seg' | head -1)\n\
             \x20 printf X | dd of=\"$f\" bs=1 seek=5000 conv=notrunc   # damage a copy: reads stay right, and replace it\n\
             \x20 holdfast down --dir {dir}      # stop; the data stay\n"
        )
    }
}

fn read_remembered(dir: &Path) -> CliResult<Option<Remembered>> {
    let path = dir.join(REMEMBERED);
    match fs::read_to_string(&path) {
        Ok(text) => toml::from_str(&text)
            .map(Some)
            .map_err(|error| CliError::new(format!("{} is damaged: {}", path.display(), error.message()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CliError::from(error).during(format!("{} cannot be read", path.display()))),
    }
}

/// What holds from now on: what was said now, then what was said before, then the defaults.
fn plan(dir: &Path, before: Option<&Remembered>, storage: Option<u32>, mount: Option<&Path>) -> CliResult<Remembered> {
    let had = before.map_or(0, |before| before.storage);
    let storage = storage.unwrap_or(if had == 0 { DEFAULT_STORAGE } else { had });
    if storage < had {
        return Err(CliError::new(format!(
            "the cluster has {had} storage servers, which hold data: it cannot shrink to {storage}"
        )));
    }
    let mount = match (mount, before) {
        (Some(mount), _) => std::path::absolute(mount)?,
        (None, Some(before)) => before.mount.clone(),
        (None, None) => dir.join("mnt"),
    };
    Ok(Remembered { storage, mount })
}

fn storage_config(daemon: &Daemon) -> CliResult<StorageConfig> {
    let mut configs = StorageConfig::load(Some(&daemon.config), StorageOptions::default())?;
    Ok(configs.remove(0))
}

fn storage_id(daemon: &Daemon) -> CliResult<ServerId> {
    Ok(ServerId(Credentials::load(&storage_config(daemon)?.tls_dir)?.node.id))
}

fn is_up(status: &ClusterStatus, id: ServerId) -> bool {
    status.servers.iter().any(|server| server.id == id && server.state.is_up())
}

fn free_address(taken: &[SocketAddr]) -> CliResult<SocketAddr> {
    (0..PORT_TRIES)
        .map(|_| SocketAddr::from((Ipv4Addr::LOCALHOST, rand::random_range(PORTS))))
        .find(|address| !taken.contains(address) && UdpSocket::bind(address).is_ok())
        .ok_or_else(|| CliError::new("no free UDP port was found on 127.0.0.1"))
}

/// `holdfastd` beside this program, else somewhere in PATH.
pub(super) fn server_program() -> CliResult<PathBuf> {
    const NAME: &str = "holdfastd";
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(NAME)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|directory| directory.join(NAME));
    beside
        .into_iter()
        .chain(in_path)
        .find(|program| program.is_file())
        .ok_or_else(|| CliError::new(format!("{NAME} is neither beside this program nor in PATH")))
}

pub(super) fn down(args: &DownArgs) -> CliResult {
    let dir = directory(args.dir.as_deref())?;
    let Some(remembered) = read_remembered(&dir)? else {
        return Err(CliError::new(format!("there is no local cluster in {}", dir.display())));
    };
    let _lock = open(&dir)?;
    let local = Local { dir, remembered };
    let unmounted = local.unmount_all(args.force)?;
    // The metadata server first: it may want the storage servers for its last barrier.
    let mut stopped = local.stop(&[local.meta()], args.force)?;
    stopped += local.stop(&local.storage(), args.force)?;
    let dir = local.dir.display();
    match (unmounted, stopped) {
        (false, 0) => print(&format!("The cluster in {dir} was down already.\n")),
        _ => print(&format!("The cluster in {dir} is down; its data stay. `holdfast up` brings it back.\n")),
    }
}

impl Local {
    /// Whether anything was mounted. Returns when everything that was written is stored.
    fn unmount_all(&self, force: bool) -> CliResult<bool> {
        let mounts = self.mounts()?;
        mounts.iter().try_for_each(|mount| unmount_one(&mount.mountpoint, force))?;
        let file = self.pid_file("mount");
        let Some(process) = file.running() else {
            file.forget()?;
            return Ok(!mounts.is_empty());
        };
        // After an ordinary unmount it ends by itself; out of the tree but still used, it must be told.
        if force || mounts.is_empty() {
            process.signal(Signal::Terminate)?;
        }
        end(process, "the mount, which is storing what was written,", force)?;
        file.forget()?;
        Ok(true)
    }

    /// How many were running.
    fn stop(&self, daemons: &[Daemon], force: bool) -> CliResult<usize> {
        let running: Vec<(&Daemon, ProcessId)> =
            daemons.iter().filter_map(|daemon| Some((daemon, self.pid_file(&daemon.name).running()?))).collect();
        running.iter().try_for_each(|(_, process)| process.signal(Signal::Terminate))?;
        for (daemon, process) in &running {
            end(*process, &daemon.name, force)?;
        }
        daemons.iter().try_for_each(|daemon| self.pid_file(&daemon.name).forget())?;
        Ok(running.len())
    }
}

fn unmount_one(mountpoint: &Path, force: bool) -> CliResult {
    match unmount_patiently(mountpoint) {
        Err(_) if force => Ok(sys::unmount(mountpoint, Unmount::Lazy)?),
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => Err(busy(mountpoint)),
        result => result
            .map_err(|error| CliError::from(error).during(format!("{} cannot be unmounted", mountpoint.display()))),
    }
}

fn busy(mountpoint: &Path) -> CliError {
    let users = users_of(mountpoint, 3);
    let who = if users.is_empty() { "something".to_owned() } else { users.join(", ") };
    let place = mountpoint.display();
    CliError::new(format!("{place} is in use by {who}: stop that first, or use --force to cut it off"))
}

fn end(process: ProcessId, name: &str, force: bool) -> CliResult {
    if process.wait_for_end(STOP_PATIENCE) {
        return Ok(());
    }
    if !force {
        let pid = process.pid;
        return Err(CliError::new(format!(
            "{name} (process {pid}) still runs; wait and try again, or use --force to kill it"
        )));
    }
    process.signal(Signal::Kill)?;
    match process.wait_for_end(STOP_PATIENCE) {
        true => Ok(()),
        false => Err(CliError::new(format!("{name} (process {}) cannot be killed", process.pid))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_has_a_place_for_a_cluster() {
        let with = |variables: &'static [(&str, &str)]| {
            move |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| PathBuf::from(value))
        };
        let chosen = |uid, variables| default_directory(uid, with(variables)).map(|path| path.display().to_string());
        assert_eq!(chosen(0, &[("HOME", "/root")]).unwrap(), "/var/lib/holdfast/local");
        assert_eq!(chosen(1, &[("HOME", "/home/a")]).unwrap(), "/home/a/.local/share/holdfast/local");
        assert_eq!(chosen(1, &[("HOME", "/home/a"), ("XDG_DATA_HOME", "/data")]).unwrap(), "/data/holdfast/local");
        assert_eq!(
            chosen(1, &[("HOME", "/home/a"), ("XDG_DATA_HOME", "x")]).unwrap(),
            "/home/a/.local/share/holdfast/local"
        );
        assert!(chosen(1, &[]).is_err());
    }

    #[test]
    fn what_was_said_before_holds_until_something_else_is_said() {
        let dir = Path::new("/d");
        let first = plan(dir, None, None, None).unwrap();
        assert_eq!(first, Remembered { storage: 3, mount: "/d/mnt".into() });
        let moved = plan(dir, Some(&first), Some(5), Some(Path::new("/m"))).unwrap();
        assert_eq!(moved, Remembered { storage: 5, mount: "/m".into() });
        assert_eq!(plan(dir, Some(&moved), None, None).unwrap(), moved);
        let error = plan(dir, Some(&moved), Some(4), None).unwrap_err().to_string();
        assert!(error.contains("cannot shrink to 4"), "{error}");
    }

    #[test]
    fn what_is_remembered_survives_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_remembered(dir.path()).unwrap(), None);
        let remembered = Remembered { storage: 4, mount: "/m".into() };
        identity::write(&dir.path().join(REMEMBERED), &toml::to_string(&remembered).unwrap()).unwrap();
        assert_eq!(read_remembered(dir.path()).unwrap(), Some(remembered));
        fs::write(dir.path().join(REMEMBERED), "storage = 3\nmount = 5\n").unwrap();
        let error = read_remembered(dir.path()).unwrap_err().to_string();
        assert!(error.contains("cluster.toml is damaged"), "{error}");
    }

    #[test]
    fn only_one_command_works_on_a_cluster_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path()).unwrap();
        assert!(open(dir.path()).unwrap_err().to_string().contains("at work"));
        drop(first);
        open(dir.path()).unwrap();
    }

    #[test]
    fn ports_are_free_and_not_given_twice() {
        let mut taken = Vec::new();
        for _ in 0..20 {
            let address = free_address(&taken).unwrap();
            assert!(PORTS.contains(&address.port()) && !taken.contains(&address));
            taken.push(address);
        }
    }

    #[test]
    fn a_server_that_ended_is_reported_with_the_end_of_its_log() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()).unwrap());
        let local = Local { dir: dir.path().to_owned(), remembered: Remembered { storage: 3, mount: "/m".into() } };
        fs::write(local.log("meta"), "one\nthe port is in use\n").unwrap();
        let error = local.check_running(&local.meta()).unwrap_err().to_string();
        assert_eq!(error, "meta ended; its log ends with\none\nthe port is in use");
    }

    #[test]
    fn down_without_a_cluster_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let args = DownArgs { dir: Some(dir.path().to_owned()), force: false };
        assert!(down(&args).unwrap_err().to_string().contains("there is no local cluster in"));
    }

    #[test]
    fn down_is_down_twice() {
        let dir = tempfile::tempdir().unwrap();
        let remembered = Remembered { storage: 3, mount: dir.path().join("mnt") };
        identity::write(&dir.path().join(REMEMBERED), &toml::to_string(&remembered).unwrap()).unwrap();
        let args = DownArgs { dir: Some(dir.path().to_owned()), force: false };
        down(&args).unwrap();
        down(&args).unwrap();
    }
}

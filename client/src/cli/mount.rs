//! `holdfast mount`: in the foreground, or in the background once the mount answers.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use clap::Args;
use holdfast_common::{
    config::{ClientConfig, ClientOptions},
    net::{
        Endpoint,
        identity::{NodeName, Role},
        tls::Credentials,
    },
    telemetry,
};

use super::{
    announce,
    error::{CliError, CliResult},
};
use crate::{
    fs::{AccessTimes, FsOptions},
    fuse::MountPlan,
    mount::{self, MountJob, options::MountOptions, table::check_mountpoint},
    sys,
};

/// The configuration in a cluster's directory.
pub(super) const CLIENT_CONFIG: &str = "client.toml";
/// The first contact must come in time for the whole command to answer within 5 seconds.
const CONNECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(4);

/// Mount a cluster
///
/// Returns when the mount answers, and leaves it running in the background. `umount MOUNTPOINT`,
/// `fusermount3 -u MOUNTPOINT` and SIGTERM end it; each stores everything first.
/// As root, setuid programs and device files work and everybody may enter, as on a disk:
/// say `-o nosuid,nodev,noallow_other` otherwise.
#[derive(Clone, Debug, Args)]
pub(super) struct MountArgs {
    /// A local cluster's directory, or a client configuration (client.toml)
    #[arg(value_name = "CLUSTER_OR_CONFIG")]
    pub cluster: PathBuf,
    /// An empty directory
    pub mountpoint: PathBuf,
    /// Options, separated by commas: ro, noatime, relatime, strictatime, noexec, nosuid, nodev, sync, allow_other, noallow_other,
    /// fsname=NAME, io_timeout=30s, cache_bytes=1GiB, dirty_bytes=1GiB, relay=never, log_file=PATH, and what fstab(5) has
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Stay in the foreground, log to standard error, end with Ctrl-C
    #[arg(short, long)]
    pub foreground: bool,
    /// File for the log of a mount in the background [default: none is kept]
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    #[command(flatten)]
    pub client: ClientOptions,
    /// Set by a command that waits for this one
    #[arg(long, hide = true)]
    pub announce: bool,
}

/// `arguments` are the command's own, as typed, without the program's name.
pub(super) fn run(args: MountArgs, arguments: &[OsString]) -> CliResult {
    if args.announce {
        return run_announced(args);
    }
    if args.foreground {
        let (job, config) = prepare(args, false)?;
        telemetry::init(config.log_level, config.log_format)?;
        return Ok(mount::run(&job, || {})?);
    }
    let log = log_file(&args)?;
    prepare(args, false)?;
    announce::launch(arguments, log.as_deref()).map(drop)
}

/// A failure before the mount answers is told to whoever waits; one after it, to the log.
fn run_announced(args: MountArgs) -> CliResult {
    sys::leave_terminal();
    let mut answered = false;
    let result = serve_announced(args, &mut answered);
    if let (Err(error), false) = (&result, answered) {
        announce::failed(error);
    }
    result
}

fn serve_announced(args: MountArgs, answered: &mut bool) -> CliResult {
    let (job, config) = prepare(args, false)?;
    telemetry::init(config.log_level, config.log_format)?;
    // Every path has been followed by now; the directory that the command was given in must not be kept in use.
    std::env::set_current_dir("/")?;
    Ok(mount::run(&job, || {
        *answered = true;
        announce::ready();
    })?)
}

/// Everything that can be known to be wrong before a server is asked.
pub(super) fn prepare(args: MountArgs, sloppy: bool) -> CliResult<(MountJob, ClientConfig)> {
    let mut options = MountOptions::new(sys::effective_uid() == 0);
    args.options.iter().try_for_each(|list| options.add(list, sloppy))?;
    mount::check_device()?;
    let mountpoint = check_mountpoint(&args.mountpoint)?;
    let file = config_file(&args.cluster)?;
    let config = configuration(&file, args.client, &options)?;
    let source = options.fsname.clone().unwrap_or_else(|| source_name(&args.cluster));
    let plan = MountPlan {
        source,
        mountpoint,
        flags: options.flags,
        allow_other: options.allow_other,
        io_timeout: config.io_timeout,
    };
    let fs = FsOptions {
        cache_bytes: config.cache_bytes,
        dirty_bytes: config.dirty_bytes,
        io_timeout: config.io_timeout,
        connect_timeout: CONNECT_TIMEOUT,
        relay: config.relay,
        access_times: if options.flags.read_only { AccessTimes::Never } else { options.access_times },
    };
    let credentials = Credentials::load(&config.tls_dir)?;
    Ok((MountJob { plan, meta: meta_endpoint(&config), credentials, fs }, config))
}

/// What `-o` says wins over flags, and these over the file.
fn configuration(file: &Path, mut flags: ClientOptions, options: &MountOptions) -> CliResult<ClientConfig> {
    flags.cache_bytes = options.cache_bytes.or(flags.cache_bytes);
    flags.dirty_bytes = options.dirty_bytes.or(flags.dirty_bytes);
    flags.relay = options.relay.or(flags.relay);
    let mut config = ClientConfig::load(Some(file), flags)?;
    if let Some(io_timeout) = options.io_timeout {
        config.io_timeout = io_timeout;
    }
    Ok(config)
}

/// The one metadata server of a cluster.
pub(super) fn meta_endpoint(config: &ClientConfig) -> Endpoint {
    Endpoint { address: config.meta, name: NodeName { role: Role::Meta, id: super::identity::META_ID } }
}

/// The client configuration that `cluster` is, or has in it.
pub(super) fn config_file(cluster: &Path) -> CliResult<PathBuf> {
    let file = if cluster.is_dir() { cluster.join(CLIENT_CONFIG) } else { cluster.to_owned() };
    match file.is_file() {
        true => Ok(file),
        false if cluster.is_dir() => {
            Err(CliError::new(format!("{} holds no cluster: there is no {CLIENT_CONFIG} in it", cluster.display())))
        }
        false => {
            Err(CliError::new(format!("{} is neither a cluster's directory nor a configuration", cluster.display())))
        }
    }
}

/// What `/proc/mounts` says was mounted: found again by `holdfast down`.
pub(super) fn source_name(cluster: &Path) -> String {
    cluster.canonicalize().unwrap_or_else(|_| cluster.to_owned()).display().to_string()
}

fn log_file(args: &MountArgs) -> CliResult<Option<PathBuf>> {
    let mut options = MountOptions::new(false);
    args.options.iter().try_for_each(|list| options.add(list, false))?;
    Ok(args.log_file.clone().or(options.log_file))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn a_config(directory: &Path) -> PathBuf {
        let file = directory.join(CLIENT_CONFIG);
        fs::write(&file, "meta = \"127.0.0.1:1\"\ntls_dir = \"tls\"\nio_timeout_secs = 9\n").unwrap();
        file
    }

    #[test]
    fn a_cluster_is_its_directory_or_its_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let refused = |path: &Path| config_file(path).unwrap_err().to_string();
        assert!(refused(directory.path()).contains("holds no cluster"));
        assert!(refused(&directory.path().join("none")).contains("neither"));
        let file = a_config(directory.path());
        assert_eq!(config_file(directory.path()).unwrap(), file);
        assert_eq!(config_file(&file).unwrap(), file);
    }

    #[test]
    fn mount_options_win_over_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = a_config(directory.path());
        let mut options = MountOptions::new(true);
        let plain = configuration(&file, ClientOptions::default(), &options).unwrap();
        assert_eq!(plain.io_timeout.as_secs(), 9);
        assert_eq!(plain.tls_dir, directory.path().join("tls"));
        options.add("io_timeout=1500ms,cache_bytes=8MiB,dirty_bytes=16MiB", false).unwrap();
        let other = configuration(&file, ClientOptions::default(), &options).unwrap();
        assert_eq!(other.io_timeout.as_millis(), 1500);
        assert_eq!((other.cache_bytes, other.dirty_bytes), (8 << 20, 16 << 20));
    }
}

//! `holdfastd`: the daemon of a metadata server, or of a storage server.

use std::{future::Future, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use holdfast_common::{
    clock::SystemClock,
    config::{MetaConfig, MetaOptions, StorageConfig, StorageOptions},
    disk::RealDisk,
    processor, telemetry,
};
use holdfast_server::{meta, storage};
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};

/// Keeps the pages of freed blocks of 1 MiB for the next ones, where the C library gives them back to the kernel at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A data directory that has failed, beside others that work.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// The daemons of Holdfast, a distributed filesystem.
#[derive(Parser)]
#[command(name = "holdfastd", version)]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Run a metadata server: names, inodes, and the map from inodes to blocks
    Meta(Daemon<MetaOptions>),
    /// Run a storage server: blocks, each under its hash
    Storage(Daemon<StorageOptions>),
    /// Make a metadata server's directory from a backup, and end
    Restore {
        /// The backup, as `holdfast meta backup` makes it and storage servers keep it
        #[arg(value_name = "FILE")]
        backup: PathBuf,
        /// Do not check whether its rows go together: for very much metadata, for which that takes much memory
        #[arg(long)]
        unchecked: bool,
        #[command(flatten)]
        daemon: Box<Daemon<MetaOptions>>,
    },
}

#[derive(Args)]
struct Daemon<T: Args> {
    /// Configuration file (TOML); every key is also a flag, and a flag wins
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: T,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    abort_on_panic();
    match run(cli.role) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfastd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A panic is a bug, after which nothing that this process promises can be relied on: its state is on disk, and a
/// new process takes over from there.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        // redb may panic on a damaged file; where that is expected it is caught, and the file set aside.
        if holdfast_server::redb_file::is_guarded() {
            return;
        }
        tracing::error!(%panic, "a bug: the process ends");
        eprintln!("holdfastd: a bug: {panic}");
        std::process::abort();
    }));
}

fn run(role: Role) -> anyhow::Result<()> {
    let runtime = new_runtime().context("start the runtime")?;
    match role {
        Role::Meta(daemon) => {
            let config = MetaConfig::load(daemon.config.as_deref(), daemon.options)?;
            telemetry::init(config.log_level, config.log_format)?;
            runtime.block_on(async {
                tokio::spawn(processor::stay_warm());
                let (disk, clock) = (Arc::new(RealDisk), Arc::new(SystemClock::default()));
                Ok(meta::run(config, disk, clock, notify_ready, stop_signal()?).await?)
            })
        }
        Role::Restore { backup, unchecked, daemon } => {
            let config = MetaConfig::load(daemon.config.as_deref(), daemon.options)?;
            let found = meta::restore_from(&backup, &config, &RealDisk, !unchecked)?;
            let said = format!(
                "{}: {} rows, as they were after change {} ({} s after 1970).\n",
                config.data_dir.display(),
                found.rows,
                found.position,
                found.taken_secs
            );
            std::io::Write::write_all(&mut std::io::stdout(), said.as_bytes())?;
            Ok(())
        }
        Role::Storage(daemon) => {
            let configs = StorageConfig::load(daemon.config.as_deref(), daemon.options)?;
            telemetry::init(configs[0].log_level, configs[0].log_format)?;
            runtime.block_on(run_storage(configs))
        }
    }
}

/// One thread for all that is asynchronous: twice to four times faster here than handing work between threads.
fn new_runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().on_thread_start(processor::roam).build()
}

async fn run_storage(mut configs: Vec<StorageConfig>) -> anyhow::Result<()> {
    let (disk, clock) = (Arc::new(RealDisk), Arc::new(SystemClock::default()));
    let stop = stop_signal()?;
    if configs.len() > 1 {
        let shared = storage::Shared { disk, clock, runtime: new_runtime, try_again_after: TRY_AGAIN_AFTER };
        return Ok(storage::run_all(configs, shared, notify_ready, stop).await?);
    }
    tokio::spawn(processor::stay_warm());
    let config = configs.remove(0);
    Ok(storage::run(config, disk, clock, notify_ready, stop).await?)
}

/// Tells the service manager, if one started us.
fn notify_ready() {
    if let Err(error) = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "the service manager could not be told that we are ready");
    }
}

/// Ends with the first SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

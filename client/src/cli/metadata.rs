//! `holdfast meta`: backups of the metadata.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use clap::{Args, Subcommand};
use holdfast_common::{
    net::{Endpoint, quic::Node},
    wire::meta::{AdminRequest, MetaAnswer},
};

use super::{
    admin::{AskError, Target, call, with_node},
    error::{CliError, CliResult},
    local, print,
    status::size,
};

/// Bytes of the hash at the end of a backup.
const HASH_LENGTH: usize = 32;

/// Back the metadata up, and restore it
#[derive(Debug, Args)]
pub(super) struct MetaArgs {
    #[command(subcommand)]
    pub action: Action,
}

#[derive(Debug, Subcommand)]
pub(super) enum Action {
    /// Write all metadata, as it is at one moment, into a file, while the cluster works
    Backup {
        /// Where; a file that is there is replaced when the new one is whole
        #[arg(value_name = "FILE")]
        file: PathBuf,
        #[command(flatten)]
        target: Target,
    },
    /// Make a metadata server's directory from a backup; its daemon must not run, and there must be no metadata in it
    ///
    /// Storage servers keep the last three backups in `backups` in their data directory, where the metadata server puts one every ten
    /// minutes. Files that are newer than the backup are lost; `holdfast fsck` names files whose blocks are gone.
    Restore {
        /// The backup
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Configuration of the metadata server [default: meta/meta.toml of the cluster]
        #[arg(long, value_name = "FILE", conflicts_with = "dir")]
        meta_config: Option<PathBuf>,
        /// Directory of the cluster, as `up` or `init` made it
        /// [default: /var/lib/holdfast/local as root, else ~/.local/share/holdfast/local]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

pub(super) fn run(args: &MetaArgs) -> CliResult {
    match &args.action {
        Action::Backup { file, target } => backup(file, target),
        Action::Restore { file, meta_config, dir } => restore(file, meta_config.as_deref(), dir.as_deref()),
    }
}

fn backup(file: &Path, target: &Target) -> CliResult {
    let config = target.load()?;
    let draft = file.with_added_extension("part");
    let mut out = File::create(&draft).map_err(|error| CliError::from(error).during(draft.display()))?;
    let fetched = with_node(&config, async |node, to| fetch(&node, to, &mut out).await)??;
    out.sync_all()?;
    fs::rename(&draft, file)?;
    File::open(directory_of(file))?.sync_all()?;
    print(&format!("{}: {} of metadata.\n", file.display(), size(fetched)))
}

fn directory_of(file: &Path) -> &Path {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes the backup into `out`, and checks it against its hash. Returns its length.
async fn fetch(node: &Arc<Node>, to: Endpoint, out: &mut File) -> Result<u64, AskError> {
    let (mut backup, mut length, mut hasher) = (0, 0, blake3::Hasher::new());
    // The last bytes are the hash, if nothing follows them.
    let mut last: Vec<u8> = Vec::new();
    for part in 0.. {
        let MetaAnswer::BackupPart { backup: number, bytes } =
            call(node, to, AdminRequest::Backup { backup, part }).await?
        else {
            return Err(AskError::Unexpected);
        };
        if bytes.is_empty() {
            break;
        }
        backup = number;
        length += bytes.len() as u64;
        out.write_all(&bytes)?;
        last.extend_from_slice(&bytes);
        let sure = last.len().saturating_sub(HASH_LENGTH);
        hasher.update(&last[..sure]);
        last.drain(..sure);
    }
    if last == hasher.finalize().as_bytes() { Ok(length) } else { Err(AskError::DamagedBackup) }
}

/// The server's own program does it: it alone knows the tables.
fn restore(file: &Path, meta_config: Option<&Path>, dir: Option<&Path>) -> CliResult {
    let config = match meta_config {
        Some(config) => config.to_owned(),
        None => local::directory(dir)?.join("meta/meta.toml"),
    };
    let mut command = Command::new(local::server_program()?);
    Err(command.arg("restore").arg(file).arg("--config").arg(config).exec().into())
}

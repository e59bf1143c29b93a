//! The boot id: one life of this server's unsynced data.
//!
//! The page cache outlives a killed process, but not its machine. So the id stays as long as the kernel's own boot id
//! does, and is drawn anew when that changed, when the directory is new, or after a sync failed.

use std::{io, path::Path};

use holdfast_common::{
    BootId,
    disk::Disk,
    planted::{Bug, is_planted},
};
use serde::{Deserialize, Serialize};

use crate::datadir::{read_small, write_atomically};

const BOOT_FILE: &str = "boot.toml";
const LENGTH_MAX: u64 = 4096;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct BootFile {
    /// The kernel's boot id.
    machine: String,
    /// 16 hexadecimal digits.
    boot: String,
}

/// One start of this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Boot {
    pub(super) id: BootId,
    /// Nothing that was written since the id was drawn can have been lost.
    pub(super) cache_survived: bool,
    /// The last life may have ended with a sync that failed: the kernel may take for written what the disk never got.
    pub(super) sync_failed: bool,
}

/// The boot id of `directory`; `draw` gives a random one, which counts once it is written with [`commit`].
pub(super) fn decide(disk: &dyn Disk, directory: &Path, draw: impl FnOnce() -> u64) -> io::Result<Boot> {
    let machine = disk.machine_boot()?;
    let file = read(disk, directory)?;
    // See `forget`.
    let sync_failed = file.is_none();
    let is_of_this_boot = |file: &BootFile| file.machine == machine || is_planted(Bug::BootKept);
    if let Some(id) = file.filter(is_of_this_boot).and_then(|file| file.id()) {
        return Ok(Boot { id, cache_survived: true, sync_failed });
    }
    Ok(Boot { id: BootId(draw()), cache_survived: false, sync_failed })
}

/// Writes down a new boot id, when recovery has ended: a start that is cut short before leaves the next one to know
/// that unsynced data may be lost.
pub(super) fn commit(disk: &dyn Disk, directory: &Path, boot: Boot) -> io::Result<()> {
    if boot.cache_survived {
        return Ok(());
    }
    let text = format!("machine = {:?}\nboot = \"{:016x}\"\n", disk.machine_boot()?, boot.id.0);
    write_atomically(disk, &directory.join(BOOT_FILE), text.as_bytes())
}

/// A file that does not parse is as good as none: a new id is always safe.
fn read(disk: &dyn Disk, directory: &Path) -> io::Result<Option<BootFile>> {
    let bytes = match read_small(disk, &directory.join(BOOT_FILE), LENGTH_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::InvalidData => None,
        Err(error) => return Err(error),
    };
    Ok(bytes.and_then(|bytes| toml::from_str(std::str::from_utf8(&bytes).ok()?).ok()))
}

impl BootFile {
    fn id(&self) -> Option<BootId> {
        u64::from_str_radix(&self.boot, 16).ok().map(BootId)
    }
}

/// After a failed sync nothing is known of what was written: the next start draws a new id.
pub(super) fn forget(disk: &dyn Disk, directory: &Path) {
    let removed = match disk.remove(&directory.join(BOOT_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => disk.sync_directory(directory),
    };
    if let Err(error) = removed {
        tracing::error!(%error, "cannot remove {BOOT_FILE} after a failed sync: remove it by hand before the next start");
    }
}

//! Copies of the metadata that the metadata server has this server keep: plain files beside the blocks.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use holdfast_common::{Refusal, disk::Disk};
use parking_lot::Mutex;

use crate::ballast::Ballast;

const DIRECTORY: &str = "backups";
/// Complete ones that are kept: the newest.
const KEPT: usize = 3;

/// The files are `meta-<seconds since 1970, 12 digits>.backup`.
#[derive(Debug)]
pub struct Backups {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
    /// Knows how much of the disk is to stay free.
    ballast: Arc<Ballast>,
    /// One part at a time.
    busy: Mutex<()>,
}

impl Backups {
    /// `data`: the data directory, whose `ballast` knows how much of the disk is to stay free.
    pub fn new(disk: Arc<dyn Disk>, data: &Path, ballast: Arc<Ballast>) -> Self {
        Self { disk, directory: data.join(DIRECTORY), ballast, busy: Mutex::new(()) }
    }

    /// Adds a part at `offset` of the backup `number`; with `end` it is complete, and durable when this returns. Refused `Invalid`
    /// where the part does not go on from what is there.
    pub fn keep(&self, number: u64, offset: u64, part: &[u8], end: bool) -> Result<(), Refusal> {
        let _alone = self.busy.lock();
        self.try_keep(number, offset, part, end).map_err(|error| {
            tracing::error!(%error, "a copy of the metadata cannot be kept");
            match error.kind() {
                io::ErrorKind::InvalidInput => Refusal::Invalid,
                io::ErrorKind::StorageFull => Refusal::ServerFull,
                _ => Refusal::Fault,
            }
        })
    }

    fn try_keep(&self, number: u64, offset: u64, part: &[u8], end: bool) -> io::Result<()> {
        let draft = self.directory.join("meta.part");
        if offset == 0 {
            self.disk.create_directory(&self.directory)?;
        }
        let file = self.disk.open(&draft, offset == 0)?;
        if offset == 0 {
            file.set_length(0)?;
        }
        if self.disk.space(&self.directory)?.free < self.ballast.free_reserve().saturating_add(part.len() as u64) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if file.length()? != offset {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a part does not follow the one before"));
        }
        file.write_all_at(part, offset)?;
        if !end {
            return Ok(());
        }
        file.sync_data()?;
        let new = self.directory.join(format!("meta-{number:012}.backup"));
        self.disk.rename(&draft, &new)?;
        self.disk.sync_directory(&self.directory)?;
        self.prune(&new)
    }

    /// Those that seem to be newer than `new` are from a time in which the clock was wrong, and go first.
    fn prune(&self, new: &Path) -> io::Result<()> {
        let is_complete = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "backup");
        let mut complete: Vec<PathBuf> = self.disk.list(&self.directory)?.into_iter().filter(is_complete).collect();
        complete.sort_by_key(|path| (path.as_path() <= new, path.clone()));
        complete.iter().take(complete.len().saturating_sub(KEPT)).try_for_each(|old| self.disk.remove(old))
    }
}

#[cfg(test)]
mod tests {
    use holdfast_common::disk::RealDisk;

    use super::*;

    #[test]
    fn the_newest_complete_ones_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let with_reserve = |bytes| {
            let ballast = Ballast::open(Arc::new(RealDisk), directory.path(), bytes).unwrap();
            Backups::new(Arc::new(RealDisk), directory.path(), Arc::new(ballast))
        };
        let backups = with_reserve(0);
        for number in [9, 1, 2, 3, 4, 5] {
            backups.keep(number, 0, b"ab", false).unwrap();
            backups.keep(number, 2, &[u8::try_from(number).unwrap()], false).unwrap();
            backups.keep(number, 3, b"", true).unwrap();
        }
        let full = with_reserve(u64::MAX);
        assert_eq!(full.keep(6, 0, b"ab", false), Err(Refusal::ServerFull));
        // One that is broken off takes nothing away.
        backups.keep(6, 0, b"ab", false).unwrap();
        assert_eq!(backups.keep(6, 3, b"c", false), Err(Refusal::Invalid));
        let mut files: Vec<_> =
            std::fs::read_dir(directory.path().join(DIRECTORY)).unwrap().map(|it| it.unwrap().path()).collect();
        files.sort();
        let names: Vec<_> = files.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(
            names,
            ["meta-000000000003.backup", "meta-000000000004.backup", "meta-000000000005.backup", "meta.part"]
        );
        assert_eq!(std::fs::read(&files[2]).unwrap(), b"ab\x05");
    }
}

//! Bad copies, kept for inspection: bounded, the oldest go first.

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use holdfast_common::{BlockHash, disk::Disk};
use parking_lot::Mutex;

#[derive(Debug)]
pub(super) struct Quarantine {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
    bytes_max: u64,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Oldest first.
    files: VecDeque<Copy>,
    bytes: u64,
    next: u64,
}

#[derive(Debug)]
struct Copy {
    number: u64,
    path: PathBuf,
    length: u64,
}

impl Quarantine {
    pub(super) fn open(disk: Arc<dyn Disk>, directory: PathBuf, bytes_max: u64) -> io::Result<Self> {
        disk.create_directory(&directory)?;
        let mut files = Vec::new();
        for path in disk.list(&directory)? {
            if let Some(number) = number_of(&path) {
                let length = disk.open(&path, false)?.length()?;
                files.push(Copy { number, path, length });
            }
        }
        files.sort_by_key(|copy| copy.number);
        let bytes = files.iter().map(|copy| copy.length).sum();
        let next = files.last().map_or(0, |copy| copy.number + 1);
        Ok(Self { disk, directory, bytes_max, kept: Mutex::new(Kept { files: files.into(), bytes, next }) })
    }

    /// Keeps `bytes`, which should have been the record of `hash`; they are on stable storage when this returns.
    pub(super) fn keep(&self, hash: BlockHash, bytes: &[u8]) -> io::Result<()> {
        let length = bytes.len() as u64;
        if length > self.bytes_max {
            return Ok(());
        }
        let mut kept = self.kept.lock();
        while kept.bytes + length > self.bytes_max {
            let Some(oldest) = kept.files.pop_front() else { break };
            kept.bytes -= oldest.length;
            self.disk.remove(&oldest.path)?;
        }
        let number = kept.next;
        let path = self.directory.join(format!("{hash}-{number:08}"));
        let file = self.disk.open(&path, true)?;
        file.write_all_at(bytes, 0)?;
        file.sync_data()?;
        self.disk.sync_directory(&self.directory)?;
        kept.next += 1;
        kept.bytes += length;
        kept.files.push_back(Copy { number, path, length });
        Ok(())
    }
}

fn number_of(path: &Path) -> Option<u64> {
    let (hash, number) = path.file_name()?.to_str()?.rsplit_once('-')?;
    BlockHash::from_hex(hash)?;
    number.parse().ok().filter(|number| *number < u64::MAX)
}

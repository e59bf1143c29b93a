//! Space that a data directory holds for itself: others may fill its disk to the last byte, and a server must still start there,
//! serve and delete.
//!
//! It is a part of the reserve that others cannot take: a file of that many bytes, removed when somebody needs them, and made
//! again when there is room.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use holdfast_common::disk::Disk;
use parking_lot::Mutex;

const BALLAST_FILE: &str = "ballast";
/// At most; else half of the reserve.
const BALLAST_BYTES_MAX: u64 = 64 << 20;

#[derive(Debug)]
pub struct Ballast {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    bytes: u64,
    /// What the file takes on the disk now.
    held: Mutex<u64>,
}

impl Ballast {
    /// That of `directory`, whose disk keeps `reserve_bytes` free. What is left of it from an earlier start is given back at once
    /// if the disk has less room than that.
    pub fn open(disk: Arc<dyn Disk>, directory: &Path, reserve_bytes: u64) -> io::Result<Self> {
        let (path, bytes) = (directory.join(BALLAST_FILE), BALLAST_BYTES_MAX.min(reserve_bytes / 2));
        let held = match disk.open(&path, false) {
            Ok(file) => file.allocated()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        let free = disk.space(directory)?.free;
        let ballast = Self { disk, path, bytes, held: Mutex::new(held) };
        if free < bytes {
            ballast.give_back();
        }
        Ok(ballast)
    }

    /// Bytes of the reserve that nobody else can take.
    pub fn held(&self) -> u64 {
        *self.held.lock()
    }

    /// Takes the space where the disk has `free` bytes, if that leaves the rest of the reserve.
    pub fn keep(&self, free: u64, reserve_bytes: u64) {
        let mut held = self.held.lock();
        if *held > 0 || free < reserve_bytes || self.bytes == 0 {
            return;
        }
        match self.take() {
            Ok(taken) => *held = taken,
            Err(error) => tracing::warn!(%error, path = %self.path.display(), "cannot keep space for a full disk"),
        }
    }

    fn take(&self) -> io::Result<u64> {
        let file = self.disk.open(&self.path, true)?;
        file.allocate(self.bytes)?;
        file.allocated()
    }

    /// Does `work`, and once more with the space given back if that is what it fails for.
    pub fn spend<T>(&self, work: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match work() {
            Err(error) if is_full(&error) && self.give_back() => work(),
            result => result,
        }
    }

    /// Removes the file: there is room for a little now. `false`: there was none, or it cannot be removed.
    fn give_back(&self) -> bool {
        let mut held = self.held.lock();
        if *held == 0 {
            return false;
        }
        if let Err(error) = self.disk.remove(&self.path) {
            tracing::error!(%error, path = %self.path.display(), "the disk is full, and what is kept for that cannot be given back");
            return false;
        }
        tracing::error!(bytes = *held, path = %self.path.display(), "the disk is full: going on with the space that was kept for that");
        *held = 0;
        true
    }
}

/// Whether `error` says that the disk, or what may be used of it, is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use holdfast_common::disk::RealDisk;

    use super::*;

    const RESERVE: u64 = 1 << 20;

    fn open(directory: &Path) -> Ballast {
        Ballast::open(Arc::new(RealDisk), directory, RESERVE).unwrap()
    }

    #[test]
    fn it_is_half_of_the_reserve_and_takes_that_from_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let ballast = open(directory.path());
        assert_eq!(ballast.held(), 0);
        ballast.keep(RESERVE - 1, RESERVE);
        assert_eq!(ballast.held(), 0, "that would take what others hold");
        ballast.keep(RESERVE, RESERVE);
        assert!(ballast.held() >= RESERVE / 2, "{}", ballast.held());
        assert_eq!(open(directory.path()).held(), ballast.held(), "the next start finds it");
    }

    #[test]
    fn it_is_given_back_once_and_taken_again() {
        let directory = tempfile::tempdir().unwrap();
        let ballast = open(directory.path());
        assert!(!ballast.give_back());
        ballast.keep(RESERVE, RESERVE);
        assert!(ballast.give_back());
        assert_eq!((ballast.held(), directory.path().read_dir().unwrap().count()), (0, 0));
        assert!(!ballast.give_back());
        ballast.keep(RESERVE, RESERVE);
        assert!(ballast.held() > 0);
    }

    #[test]
    fn what_a_full_disk_refuses_is_done_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let ballast = open(directory.path());
        ballast.keep(RESERVE, RESERVE);
        let when_given_back = || match directory.path().join(BALLAST_FILE).exists() {
            true => Err(io::Error::from(io::ErrorKind::StorageFull)),
            false => Ok(7),
        };
        assert_eq!(ballast.spend(when_given_back).unwrap(), 7);
        let full = || Err::<(), _>(io::Error::from(io::ErrorKind::StorageFull));
        assert!(is_full(&ballast.spend(full).unwrap_err()), "there is nothing left");
        ballast.keep(RESERVE, RESERVE);
        let other = || Err::<(), _>(io::Error::from(io::ErrorKind::PermissionDenied));
        assert_eq!(ballast.spend(other).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(ballast.held() > 0, "space is no help there");
    }
}

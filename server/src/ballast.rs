//! Space that a data directory holds for itself: others may fill its disk to the last byte, and a server must still start there,
//! serve and delete.
//!
//! It is a part of the reserve that others cannot take: a file of that many bytes, removed when somebody needs them, and made
//! again when there is room.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
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
    /// Bytes of the disk that are to stay free, with what the file takes of them.
    reserve_bytes: u64,
    /// What the file should take.
    bytes: u64,
    /// What it takes now.
    held: AtomicU64,
    /// How often it was given back.
    given: AtomicU64,
    /// Whoever makes the file or removes it, and whether it cannot be made.
    changing: Mutex<bool>,
}

impl Ballast {
    /// That of `directory`, on whose disk `reserve_bytes` are to stay free. What is left of it from an earlier start is given back
    /// at once if the disk has less room than that.
    pub fn open(disk: Arc<dyn Disk>, directory: &Path, reserve_bytes: u64) -> io::Result<Self> {
        let (path, bytes) = (directory.join(BALLAST_FILE), BALLAST_BYTES_MAX.min(reserve_bytes / 2));
        let held = match disk.open(&path, false) {
            Ok(file) => file.allocated()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        let free = disk.space(directory)?.free;
        let (held, given, changing) = (AtomicU64::new(held), AtomicU64::new(0), Mutex::new(false));
        let ballast = Self { disk, path, reserve_bytes, bytes, held, given, changing };
        if free < bytes {
            ballast.give_back();
        }
        Ok(ballast)
    }

    /// Bytes of the reserve that nobody else can take.
    pub fn held(&self) -> u64 {
        self.held.load(SeqCst)
    }

    /// Bytes that are to stay free beside those.
    pub fn free_reserve(&self) -> u64 {
        self.reserve_bytes.saturating_sub(self.held())
    }

    /// Takes the space if it is not taken and the disk has `free` bytes, enough to leave the rest of the reserve.
    pub fn keep(&self, free: u64) {
        let mut has_failed = self.changing.lock();
        if self.held() >= self.bytes || *has_failed || free < self.free_reserve() {
            return;
        }
        match self.take() {
            Ok(taken) => self.held.store(taken, SeqCst),
            Err(error) => {
                // Others may have been faster, or the process lacks something: that passes.
                *has_failed = matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EDQUOT | libc::EISDIR));
                tracing::warn!(%error, path = %self.path.display(), "no space can be kept for the day on which the disk is full");
                self.remove();
            }
        }
    }

    fn take(&self) -> io::Result<u64> {
        let file = self.disk.open(&self.path, true)?;
        file.allocate(self.bytes)?;
        file.allocated()
    }

    /// Does `work`, and once more with the space given back if that is what it fails for. Not for a sync: one that failed must not
    /// be believed the second time.
    pub fn spend<T>(&self, mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let before = self.given.load(SeqCst);
        match work() {
            Err(error) if is_full(&error) && (self.give_back() || self.given.load(SeqCst) != before) => work(),
            result => result,
        }
    }

    /// Removes the file: there is room for a little now. `false`: there was none, or it cannot be removed.
    fn give_back(&self) -> bool {
        let _changing = self.changing.lock();
        let bytes = self.held();
        if bytes == 0 || !self.remove() {
            return false;
        }
        self.given.fetch_add(1, SeqCst);
        tracing::error!(bytes, path = %self.path.display(), "the disk is full: going on with the space that was kept for that");
        true
    }

    /// Whether it is gone, by this or by somebody else.
    fn remove(&self) -> bool {
        match self.disk.remove(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(%error, path = %self.path.display(), "what is kept for a full disk cannot be given back");
                false
            }
            _ => {
                self.held.store(0, SeqCst);
                true
            }
        }
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
        ballast.keep(RESERVE - 1);
        assert_eq!(ballast.held(), 0, "that would take what others hold");
        ballast.keep(RESERVE);
        assert!(ballast.held() >= RESERVE / 2, "{}", ballast.held());
        assert_eq!(open(directory.path()).held(), ballast.held(), "the next start finds it");
    }

    #[test]
    fn it_is_given_back_once_and_taken_again() {
        let directory = tempfile::tempdir().unwrap();
        let ballast = open(directory.path());
        assert!(!ballast.give_back());
        ballast.keep(RESERVE);
        assert!(ballast.give_back());
        assert_eq!((ballast.held(), directory.path().read_dir().unwrap().count()), (0, 0));
        assert!(!ballast.give_back());
        ballast.keep(RESERVE);
        assert!(ballast.held() > 0);
    }

    #[test]
    fn what_a_full_disk_refuses_is_done_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let ballast = open(directory.path());
        ballast.keep(RESERVE);
        let when_given_back = || match directory.path().join(BALLAST_FILE).exists() {
            true => Err(io::Error::from(io::ErrorKind::StorageFull)),
            false => Ok(7),
        };
        assert_eq!(ballast.spend(when_given_back).unwrap(), 7);
        let full = || Err::<(), _>(io::Error::from(io::ErrorKind::StorageFull));
        assert!(is_full(&ballast.spend(full).unwrap_err()), "there is nothing left");
        ballast.keep(RESERVE);
        let other = || Err::<(), _>(io::Error::from(io::ErrorKind::PermissionDenied));
        assert_eq!(ballast.spend(other).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(ballast.held() > 0, "space is no help there");
    }

    #[test]
    fn who_finds_it_given_back_by_another_tries_again() {
        let directory = tempfile::tempdir().unwrap();
        let ballast = open(directory.path());
        ballast.keep(RESERVE);
        let mut tries = 0;
        let result = ballast.spend(|| {
            tries += 1;
            if tries == 1 {
                assert!(ballast.give_back());
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            Ok(())
        });
        assert!(result.is_ok() && tries == 2, "{result:?} after {tries}");
    }

    #[test]
    fn what_an_operator_removed_is_space_too() {
        let directory = tempfile::tempdir().unwrap();
        let ballast = open(directory.path());
        ballast.keep(RESERVE);
        std::fs::remove_file(directory.path().join(BALLAST_FILE)).unwrap();
        assert!(ballast.give_back());
        assert_eq!(ballast.held(), 0);
    }

    #[test]
    fn a_part_of_it_is_made_whole() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(BALLAST_FILE), [1; 4096]).unwrap();
        let ballast = open(directory.path());
        let part = ballast.held();
        assert!(part > 0 && part < RESERVE / 2, "{part}");
        ballast.keep(RESERVE);
        assert!(ballast.held() >= RESERVE / 2, "{}", ballast.held());
    }

    #[test]
    fn where_no_space_can_be_kept_nothing_is_left_and_nothing_is_tried_again() {
        let directory = tempfile::tempdir().unwrap();
        let ballast = Ballast::open(Arc::new(RealDisk), directory.path(), RESERVE).unwrap();
        let path = directory.path().join(BALLAST_FILE);
        std::fs::create_dir(&path).unwrap();
        ballast.keep(RESERVE);
        assert_eq!(ballast.held(), 0);
        std::fs::remove_dir(&path).unwrap();
        ballast.keep(RESERVE);
        assert!(!path.exists());
    }
}

//! The disk as a seam: a handful of methods, real here, hostile in the tests.
//!
//! Both kinds of server keep everything they must not lose behind [`Disk`]: segments, logs, and redb
//! through an adapter. A test's disk loses what was not synced, tears writes, and fails the n-th call.

mod direct;
mod ring;
mod sys;

use std::{
    fs,
    io::{self, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

use self::direct::Direct;
pub use self::ring::Reading;

/// A part of a file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub length: usize,
}

/// An open file: positioned, no cursor. Calls from several threads may overlap.
pub trait DiskFile: Send + Sync + std::fmt::Debug {
    /// Fills all of `buffer`, or fails (`UnexpectedEof` past the end).
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// As `read_exact_at`, but only from memory: `WouldBlock` if the disk must be asked, or might have to be.
    fn read_cached_at(&self, _buffer: &mut [u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    /// `length` bytes that will hardly be asked for again: memory need not keep what it did not have.
    fn read_once(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let mut bytes = vec![0; length];
        self.read_exact_at(&mut bytes, offset)?;
        Ok(bytes.into())
    }
    /// Starts reading `offset..offset+length` into memory without waiting: a later `read_exact_at` has less to wait for.
    fn start_read(&self, _offset: u64, _length: u64) {}
    /// Starts reading up to four `extents`, and no thread waits for them: the runtime of the thread that asks is woken when all
    /// are there. `None` where that cannot be done, or not now: have a thread read.
    fn read_soon(&self, _extents: &[Extent]) -> Option<Reading> {
        None
    }
    /// Forgets what memory has of `offset..offset+length` and the disk as well: a later read asks the disk.
    fn forget_cached(&self, _offset: u64, _length: u64) {}
    /// Writes all of `bytes`, growing the file as needed. Visible at once, durable after `sync_data`.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// As `write_all_at`, for bytes that will hardly be read soon: on their way to the disk at once, and forgotten by
    /// memory when they are there.
    fn write_away_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }
    fn length(&self) -> io::Result<u64>;
    /// Bytes that it takes on the disk: without its holes.
    fn allocated(&self) -> io::Result<u64> {
        self.length()
    }
    fn set_length(&self, length: u64) -> io::Result<()>;
    /// Takes the first `length` bytes of the file from the disk now, where that can be done: who writes there later cannot find it full.
    fn allocate(&self, _length: u64) -> io::Result<()> {
        Ok(())
    }
    /// Data and length are on stable storage when this returns (fdatasync). After an error nothing is known:
    /// the caller must not go on with this file.
    fn sync_data(&self) -> io::Result<()>;
    /// Starts writing `offset..offset+length` to the disk without waiting: a later `sync_data` has less to do.
    fn start_writeback(&self, offset: u64, length: u64);
    /// Gives back the space of `offset..offset+length`; reads there return zeroes.
    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()>;
}

pub trait Disk: Send + Sync + std::fmt::Debug + 'static {
    /// Opens for reading and writing; creates it (empty) if `create` and it is missing. Its name is durable after `sync_directory`.
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>>;
    fn create_directory(&self, path: &Path) -> io::Result<()>;
    /// Full paths of the entries of `directory`, sorted.
    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Names created, renamed and removed in `directory` are on stable storage when this returns.
    fn sync_directory(&self, directory: &Path) -> io::Result<()>;
    fn space(&self, directory: &Path) -> io::Result<Space>;
    /// Changes when what was written and not synced may have been lost: the kernel's boot id.
    fn machine_boot(&self) -> io::Result<String>;
}

/// Bytes of the filesystem that holds a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub capacity: u64,
    pub free: u64,
}

/// The machine's own files.
#[derive(Debug, Default)]
pub struct RealDisk;

/// Of the kernel's memory of files, at least.
const PAGE_LENGTH: u64 = 4096;

#[derive(Debug)]
struct RealFile {
    file: fs::File,
    direct: Direct,
}

impl Disk for RealDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let file = fs::OpenOptions::new().read(true).write(true).create(create).truncate(false).open(path)?;
        Ok(Arc::new(RealFile { file, direct: Direct::default() }))
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        paths.sort();
        Ok(paths)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        fs::File::open(directory)?.sync_all()
    }

    fn space(&self, directory: &Path) -> io::Result<Space> {
        sys::space(directory)
    }

    fn machine_boot(&self) -> io::Result<String> {
        Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
    }
}

impl DiskFile for RealFile {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn read_cached_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match sys::read_nowait(&self.file, buffer, offset) {
            Ok(length) if length == buffer.len() => Ok(()),
            // A part, the end of the file, or a filesystem that cannot tell: who may wait will find out.
            Ok(_) | Err(_) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn read_once(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let is_cold = |cached| cached < length as u64 / 2;
        if sys::cached(&self.file, offset, length as u64).is_some_and(is_cold)
            && let Some(bytes) = self.direct.read(&self.file, offset, length)?
        {
            return Ok(bytes);
        }
        let mut bytes = vec![0; length];
        self.read_exact_at(&mut bytes, offset)?;
        Ok(bytes.into())
    }

    fn start_read(&self, offset: u64, length: u64) {
        sys::advise(&self.file, offset, length, libc::POSIX_FADV_WILLNEED);
    }

    fn read_soon(&self, extents: &[Extent]) -> Option<Reading> {
        ring::read(&self.file, extents)
    }

    fn forget_cached(&self, offset: u64, length: u64) {
        // The kernel forgets whole pages only: those of which a part is meant go too.
        let start = offset / PAGE_LENGTH * PAGE_LENGTH;
        let end = offset.saturating_add(length).next_multiple_of(PAGE_LENGTH);
        sys::advise(&self.file, start, end - start, libc::POSIX_FADV_DONTNEED);
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn write_away_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() && sys::has_uncached_writes() {
            match sys::write_uncached(&self.file, &bytes[done..], offset + done as u64) {
                Ok(more @ 1..) => done += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Whether it is for this filesystem only that this is not possible: the ordinary way will tell.
                Ok(0) | Err(_) => break,
            }
        }
        self.file.write_all_at(&bytes[done..], offset + done as u64)
    }

    fn length(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::blocks(&self.file.metadata()?) * 512)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    fn allocate(&self, length: u64) -> io::Result<()> {
        sys::allocate(&self.file, length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn start_writeback(&self, offset: u64, length: u64) {
        sys::start_writeback(&self.file, offset, length);
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        sys::punch_hole(&self.file, offset, length)
    }
}

#[cfg(test)]
mod tests {
    use io_uring::{IoUring, squeue};

    use super::*;

    /// A file of random bytes that are on the disk, and whether memory can be made to forget them here (not so on tmpfs).
    fn written(path: &Path, length: usize) -> (RealFile, Vec<u8>, bool) {
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        let file = RealFile { file, direct: Direct::default() };
        let mut bytes = vec![0; length];
        blake3::Hasher::new().update(path.as_os_str().as_encoded_bytes()).finalize_xof().fill(&mut bytes);
        file.write_all_at(&bytes, 0).unwrap();
        file.sync_data().unwrap();
        file.forget_cached(0, length as u64);
        let forgets = sys::cached(&file.file, 0, length as u64) == Some(0);
        (file, bytes, forgets)
    }

    fn extents() -> Vec<Extent> {
        let at = |offset, length| Extent { offset, length };
        vec![at(0, 4096), at(70_001, 12_345), at(1_000_000, 16 << 10)]
    }

    /// Where the kernel has no ring for us, a read without a thread must say so.
    fn can_read_soon(file: &RealFile) -> bool {
        let is_possible =
            IoUring::<squeue::Entry>::builder().setup_single_issuer().setup_defer_taskrun().build(2).is_ok();
        assert_eq!(file.read_soon(&extents()).is_some(), is_possible);
        is_possible
    }

    fn runs_alone<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    #[test]
    fn what_is_read_without_a_thread_is_what_is_there_whether_memory_has_it_or_not() {
        let directory = tempfile::tempdir().unwrap();
        let (file, bytes, _) = written(&directory.path().join("file"), 2 << 20);
        // A runtime that has ended is followed by another in the same thread.
        for _ in 0..2 {
            runs_alone(async {
                let forgets = if can_read_soon(&file) { [false, true, true].as_slice() } else { &[] };
                for &forget in forgets {
                    if forget {
                        file.forget_cached(0, 2 << 20);
                    }
                    let read = file.read_soon(&extents()).unwrap().await.unwrap().unwrap();
                    for (extent, found) in extents().iter().zip(read) {
                        let start = usize::try_from(extent.offset).unwrap();
                        assert_eq!(found, bytes[start..start + extent.length]);
                    }
                }
            });
        }
    }

    #[test]
    fn reads_without_a_thread_are_bounded_and_may_be_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let (file, bytes, _) = written(&directory.path().join("file"), 4 << 20);
        runs_alone(async {
            let piece = |number: u64| Extent { offset: number * (32 << 10) + 5, length: 16 << 10 };
            let rounds = if can_read_soon(&file) { 20 } else { 0 };
            assert!(file.read_soon(&[piece(0); 5]).is_none() && file.read_soon(&[]).is_none());
            for round in 0..rounds {
                file.forget_cached(0, 4 << 20);
                let reads: Vec<_> = (0..80).map_while(|n| Some((n, file.read_soon(&[piece(n)])?))).collect();
                // A third of those before may still be under way.
                assert!(reads.len() >= 32, "round {round}: {} at once", reads.len());
                for (number, read) in reads.into_iter().filter(|(number, _)| number % 3 != round % 3) {
                    let start = usize::try_from(piece(number).offset).unwrap();
                    assert_eq!(read.await.unwrap().unwrap(), [&bytes[start..start + (16 << 10)]]);
                }
            }
        });
    }

    #[test]
    fn where_there_is_no_ring_and_past_the_end_a_read_without_a_thread_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let (file, ..) = written(&directory.path().join("file"), 2 << 20);
        assert!(file.read_soon(&extents()).is_none(), "no runtime");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                runs_alone(async {
                    let past = [Extent { offset: 0, length: 16 }, Extent { offset: (2 << 20) - 8, length: 400 }];
                    if can_read_soon(&file) {
                        let error = file.read_soon(&past).unwrap().await.unwrap().unwrap_err();
                        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                    }
                });
            });
        });
    }

    #[test]
    fn what_is_read_once_is_what_is_there_and_memory_does_not_keep_it() {
        let directory = tempfile::tempdir().unwrap();
        let (file, bytes, forgets) = written(&directory.path().join("f"), 1_500_001);
        for (offset, length) in [(0, 1 << 20), (5000, 1 << 20), (4096, 300_000), (1_200_000, 300_001), (77, 1_499_000)]
        {
            let part = file.read_once(offset as u64, length).unwrap();
            assert!(part == bytes[offset..offset + length], "{offset} {length}");
            if forgets && length <= 1 << 20 {
                assert_eq!(sys::cached(&file.file, 0, bytes.len() as u64), Some(0), "{offset} {length}");
            }
        }
        for (offset, length) in [(1_200_000, 300_002), (1_500_001, 1), (1 << 40, 1 << 20)] {
            let error = file.read_once(offset, length).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{offset} {length}");
        }
    }

    #[test]
    fn what_memory_alone_has_is_read_from_there() {
        let directory = tempfile::tempdir().unwrap();
        let (file, mut bytes, _) = written(&directory.path().join("f"), 1 << 20);
        file.write_all_at(b"new", 500_000).unwrap();
        bytes[500_000..500_003].copy_from_slice(b"new");
        assert!(file.read_once(0, 1 << 20).unwrap() == bytes, "a page is newer than the disk");
        let mut whole = vec![0; 1 << 20];
        file.read_exact_at(&mut whole, 0).unwrap();
        assert!(file.read_once(0, 1 << 20).unwrap() == bytes, "all of it is in memory");
    }

    #[test]
    fn what_is_written_away_is_there_and_memory_forgets_it() {
        let directory = tempfile::tempdir().unwrap();
        let (file, mut bytes, forgets) = written(&directory.path().join("f"), 8192);
        let start = 8192;
        let more = vec![7; 1 << 20];
        file.write_away_at(&more, start).unwrap();
        bytes.extend_from_slice(&more);
        file.sync_data().unwrap();
        let cached = || sys::cached(&file.file, start, 1 << 20);
        let can = forgets && sys::has_uncached_writes() && sys::write_uncached(&file.file, &more[..1], start).is_ok();
        let given_up = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while can && cached() > Some(64 << 10) {
            assert!(std::time::Instant::now() < given_up, "{:?} bytes are still in memory", cached());
            std::thread::yield_now();
        }
        // Written again while it goes to the disk: the newer bytes must not be forgotten with the older ones.
        for round in 0..20 {
            file.write_away_at(&more, start).unwrap();
            file.write_all_at(&[round; 5000], start + 100_000).unwrap();
            bytes[108_192..][..5000].fill(round);
            let mut found = vec![0; bytes.len()];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == bytes, "round {round}");
        }
    }

    #[test]
    fn versions_of_the_kernel_are_compared_as_numbers() {
        for (release, is_enough) in
            [("6.16.0", true), ("6.18.2-arch1", true), ("7.0-rc1", true), ("6.9.1", false), ("5.99", false)]
        {
            assert_eq!(sys::is_at_least(release, (6, 16)), is_enough, "{release}");
        }
        assert!(!sys::is_at_least("", (6, 16)));
    }

    #[test]
    fn what_was_just_written_is_read_from_memory_and_nothing_else_pretends_to_be() {
        let directory = tempfile::tempdir().unwrap();
        let file = RealDisk.open(&directory.path().join("f"), true).unwrap();
        file.write_all_at(b"0123456789", 0).unwrap();
        let mut buffer = [0; 4];
        match file.read_cached_at(&mut buffer, 3) {
            Ok(()) => assert_eq!(&buffer, b"3456"),
            // tmpfs and others cannot tell.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        assert_eq!(file.read_cached_at(&mut buffer, 8).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}

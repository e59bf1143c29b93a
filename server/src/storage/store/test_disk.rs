//! A disk in memory for the store's tests: it counts, fails, and loses what was not synced.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use bytes::Bytes;
use holdfast_common::disk::{Disk, DiskFile, Extent, Reading, Space};
use parking_lot::{Condvar, Mutex};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::sync::oneshot;

const PAGE: usize = 4096;

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fault {
    #[default]
    None,
    /// The n-th changing call fails with this error number; those after it work.
    Once(u64, i32),
    /// Every write to a segment fails with this error number.
    Segments(i32),
    /// From the n-th changing call on, everything fails: the power is gone.
    PowerCut(u64),
}

#[derive(Debug, Default)]
struct Shared {
    fault: Mutex<Fault>,
    calls: AtomicU64,
    segment_syncs: AtomicU64,
    segment_bytes: AtomicU64,
    segment_zeroes: AtomicU64,
    read_once: AtomicU64,
    free: AtomicU64,
    hold_syncs: Mutex<bool>,
    syncs_held: AtomicU64,
    released: Condvar,
    boot: AtomicU64,
    dead: AtomicBool,
    sync_failed: AtomicBool,
    soon: Mutex<Soon>,
}

/// What comes of reads without a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Soon {
    /// There are none.
    #[default]
    Never,
    Right,
    /// EIO.
    Fails,
    /// A bit of the first extent is another.
    Wrong,
    /// Whoever does it goes away.
    Dropped,
}

impl Shared {
    fn step(&self) -> io::Result<()> {
        let call = self.calls.fetch_add(1, SeqCst) + 1;
        match *self.fault.lock() {
            Fault::Once(n, errno) if n == call => Err(io::Error::from_raw_os_error(errno)),
            Fault::PowerCut(n) if call >= n => {
                self.dead.store(true, SeqCst);
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            _ => Ok(()),
        }
    }

    fn alive(&self) -> io::Result<()> {
        if self.dead.load(SeqCst) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
}

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Length(usize),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Length(length) => bytes.resize(*length, 0),
            Self::Write(offset, written) => {
                let end = offset + written.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*offset..end].copy_from_slice(written);
            }
        }
    }

    /// As the disk would write it: page by page.
    fn pages(&self) -> Vec<Change> {
        let Self::Write(offset, written) = self else { return vec![self.clone()] };
        let mut pages = Vec::new();
        let mut done = 0;
        while done < written.len() {
            let length = (PAGE - (offset + done) % PAGE).min(written.len() - done);
            pages.push(Self::Write(offset + done, written[done..done + length].to_vec()));
            done += length;
        }
        pages
    }
}

#[derive(Clone, Debug, Default)]
struct Content {
    live: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Change>,
}

#[derive(Debug)]
struct TestFile {
    shared: Arc<Shared>,
    is_segment: bool,
    content: Arc<Mutex<Content>>,
}

type Names = BTreeMap<PathBuf, Arc<Mutex<Content>>>;

#[derive(Debug, Default)]
pub(super) struct TestDisk {
    shared: Arc<Shared>,
    live: Mutex<Names>,
    durable: Mutex<Names>,
    directories: Mutex<BTreeSet<PathBuf>>,
}

impl TestDisk {
    pub(super) fn new() -> Arc<Self> {
        let disk = Self::default();
        disk.shared.free.store(1 << 40, SeqCst);
        Arc::new(disk)
    }

    pub(super) fn fail(&self, fault: Fault) {
        *self.shared.fault.lock() = fault;
        self.shared.calls.store(0, SeqCst);
    }

    pub(super) fn set_soon(&self, soon: Soon) {
        *self.shared.soon.lock() = soon;
    }

    pub(super) fn calls(&self) -> u64 {
        self.shared.calls.load(SeqCst)
    }

    pub(super) fn segment_syncs(&self) -> u64 {
        self.shared.segment_syncs.load(SeqCst)
    }

    /// A call that failed was a sync.
    pub(super) fn sync_failed(&self) -> bool {
        self.shared.sync_failed.load(SeqCst)
    }

    /// Bytes that were written to segments, for the first time or again; and the zeroes that went ahead of them.
    pub(super) fn segment_bytes(&self) -> (u64, u64) {
        (self.shared.segment_bytes.load(SeqCst), self.shared.segment_zeroes.load(SeqCst))
    }

    /// Reads of which memory need keep nothing.
    pub(super) fn read_once(&self) -> u64 {
        self.shared.read_once.load(SeqCst)
    }

    pub(super) fn set_free(&self, free: u64) {
        self.shared.free.store(free, SeqCst);
    }

    /// Syncs so far that were held.
    pub(super) fn syncs_held(&self) -> u64 {
        self.shared.syncs_held.load(SeqCst)
    }

    pub(super) fn hold_syncs(&self, hold: bool) {
        *self.shared.hold_syncs.lock() = hold;
        self.shared.released.notify_all();
    }

    /// What a process killed now leaves behind: the page cache stays.
    pub(super) fn after_kill(&self) -> Arc<Self> {
        let new = Self::new();
        new.shared.boot.store(self.shared.boot.load(SeqCst), SeqCst);
        let copied = |content: &Arc<Mutex<Content>>| Arc::new(Mutex::new(content.lock().clone()));
        let (live, durable) = (self.live.lock(), self.durable.lock());
        let new_live: Names = live.iter().map(|(path, content)| (path.clone(), copied(content))).collect();
        let same = |path: &PathBuf, content: &Arc<Mutex<Content>>| {
            let is_same = live.get(path).is_some_and(|it| Arc::ptr_eq(it, content));
            new_live.get(path).filter(|_| is_same).cloned()
        };
        *new.durable.lock() = durable
            .iter()
            .map(|(path, content)| (path.clone(), same(path, content).unwrap_or_else(|| copied(content))))
            .collect();
        *new.live.lock() = new_live;
        *new.directories.lock() = self.directories.lock().clone();
        new
    }

    /// What a power cut now leaves behind: of what was not synced, any pages and any names.
    pub(super) fn after_power_cut(&self, seed: u64) -> Arc<Self> {
        let mut rng = StdRng::seed_from_u64(seed);
        let durable = self.durable.lock().clone();
        let keep_names = rng.random();
        self.copy(
            self.shared.boot.load(SeqCst) + 1,
            |live| if keep_names { live.clone() } else { durable },
            |content| {
                let mut bytes = content.durable.clone();
                for change in content.unsynced.iter().flat_map(Change::pages).filter(|_| rng.random()) {
                    change.apply(&mut bytes);
                }
                bytes
            },
        )
    }

    fn copy(
        &self,
        boot: u64,
        names: impl FnOnce(&Names) -> Names,
        mut bytes: impl FnMut(&Content) -> Vec<u8>,
    ) -> Arc<Self> {
        let new = Self::new();
        new.shared.boot.store(boot, SeqCst);
        let names = names(&self.live.lock());
        for (path, content) in names {
            let live = bytes(&content.lock());
            let content = Content { durable: live.clone(), live, unsynced: Vec::new() };
            new.live.lock().insert(path, Arc::new(Mutex::new(content)));
        }
        *new.durable.lock() = new.live.lock().clone();
        *new.directories.lock() = self.directories.lock().clone();
        new
    }

    /// The bytes of a file, to look at and to damage.
    pub(super) fn edit<T>(&self, path: &Path, edit: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let content = self.live.lock().get(path).cloned().unwrap();
        let mut content = content.lock();
        let result = edit(&mut content.live);
        content.durable = content.live.clone();
        content.unsynced.clear();
        result
    }

    pub(super) fn put_file(&self, path: &Path, bytes: Vec<u8>) {
        let content = Content { durable: bytes.clone(), live: bytes, unsynced: Vec::new() };
        let content = Arc::new(Mutex::new(content));
        self.live.lock().insert(path.to_owned(), Arc::clone(&content));
        self.durable.lock().insert(path.to_owned(), content);
    }

    pub(super) fn paths(&self, suffix: &str) -> Vec<PathBuf> {
        self.live.lock().keys().filter(|path| path.to_str().unwrap().ends_with(suffix)).cloned().collect()
    }
}

impl Disk for TestDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        self.shared.alive()?;
        let known = self.live.lock().get(path).cloned();
        let content = match known {
            Some(content) => content,
            None if create => {
                self.shared.step()?;
                Arc::clone(self.live.lock().entry(path.to_owned()).or_default())
            }
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        let is_segment = path.extension().is_some_and(|extension| extension == "seg");
        Ok(Arc::new(TestFile { shared: Arc::clone(&self.shared), is_segment, content }))
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        self.shared.step()?;
        self.directories.lock().insert(path.to_owned());
        Ok(())
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        self.shared.alive()?;
        Ok(self.live.lock().keys().filter(|path| path.parent() == Some(directory)).cloned().collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.shared.step()?;
        let mut live = self.live.lock();
        let content = live.remove(from).ok_or(io::ErrorKind::NotFound)?;
        live.insert(to.to_owned(), content);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.shared.step()?;
        self.live.lock().remove(path).map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        self.shared.step()?;
        let mut durable = self.durable.lock();
        durable.retain(|path, _| path.parent() != Some(directory));
        let live = self.live.lock();
        let here = live.iter().filter(|(path, _)| path.parent() == Some(directory));
        durable.extend(here.map(|(path, content)| (path.clone(), Arc::clone(content))));
        Ok(())
    }

    fn space(&self, _: &Path) -> io::Result<Space> {
        Ok(Space { capacity: 1 << 41, free: self.shared.free.load(SeqCst) })
    }

    fn machine_boot(&self) -> io::Result<String> {
        Ok(format!("boot-{}", self.shared.boot.load(SeqCst)))
    }
}

impl TestFile {
    fn change(&self, change: Change) -> io::Result<()> {
        self.shared.step()?;
        if let Fault::Segments(errno) = *self.shared.fault.lock()
            && self.is_segment
        {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let mut content = self.content.lock();
        change.apply(&mut content.live);
        content.unsynced.push(change);
        Ok(())
    }
}

impl DiskFile for TestFile {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.shared.alive()?;
        let content = self.content.lock();
        let start = usize::try_from(offset).unwrap();
        let bytes = content.live.get(start..start + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    fn read_once(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        self.shared.read_once.fetch_add(1, SeqCst);
        let mut bytes = vec![0; length];
        self.read_exact_at(&mut bytes, offset)?;
        Ok(bytes.into())
    }

    fn read_soon(&self, extents: &[Extent]) -> Option<Reading> {
        let soon = *self.shared.soon.lock();
        let read = |extent: &Extent| {
            let mut bytes = vec![0; extent.length];
            self.read_exact_at(&mut bytes, extent.offset).map(|()| bytes)
        };
        let mut found = extents.iter().map(read).collect::<io::Result<Vec<_>>>();
        match soon {
            Soon::Never => return None,
            Soon::Right | Soon::Dropped => {}
            Soon::Fails => found = Err(io::Error::from_raw_os_error(libc::EIO)),
            Soon::Wrong => found.iter_mut().for_each(|parts| parts[0][17] ^= 1),
        }
        let (sender, reading) = oneshot::channel();
        if soon != Soon::Dropped {
            sender.send(found.map(|parts| parts.into_iter().map(Bytes::from).collect())).unwrap();
        }
        Some(reading)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.is_segment {
            let count = if bytes.iter().all(|byte| *byte == 0) {
                &self.shared.segment_zeroes
            } else {
                &self.shared.segment_bytes
            };
            count.fetch_add(bytes.len() as u64, SeqCst);
        }
        self.change(Change::Write(usize::try_from(offset).unwrap(), bytes.to_vec()))
    }

    fn length(&self) -> io::Result<u64> {
        self.shared.alive()?;
        Ok(self.content.lock().live.len() as u64)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.change(Change::Length(usize::try_from(length).unwrap()))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut hold = self.shared.hold_syncs.lock();
        self.shared.syncs_held.fetch_add(u64::from(*hold && self.is_segment), SeqCst);
        while *hold && self.is_segment {
            self.shared.released.wait(&mut hold);
        }
        drop(hold);
        if let Err(error) = self.shared.step() {
            self.shared.sync_failed.store(true, SeqCst);
            // As Linux: it is told once, and what was not written counts as written from then on.
            if !self.shared.dead.load(SeqCst) {
                self.content.lock().unsynced.clear();
            }
            return Err(error);
        }
        self.shared.segment_syncs.fetch_add(u64::from(self.is_segment), SeqCst);
        let mut content = self.content.lock();
        for change in std::mem::take(&mut content.unsynced) {
            change.apply(&mut content.durable);
        }
        Ok(())
    }

    fn start_writeback(&self, _: u64, _: u64) {}

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let zeroes = vec![0; usize::try_from(length).unwrap()];
        self.change(Change::Write(usize::try_from(offset).unwrap(), zeroes))
    }
}

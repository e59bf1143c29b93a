//! A disk in memory that forgets what was not synced, for tests.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use holdfast_common::disk::{Disk, DiskFile, Space};
use parking_lot::Mutex;

/// Bytes that a disk writes at once: small, so that small files have many.
const PAGE: usize = 64;

#[derive(Debug, Default, Clone)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Pages that a sync would write. After one that failed they are clean, as in a kernel, and still not durable.
    dirty: BTreeSet<usize>,
}

#[derive(Debug)]
struct MemoryFile {
    content: Mutex<Content>,
    faults: Arc<Faults>,
}

#[derive(Debug, Default)]
struct Faults {
    /// Calls that change something, so far.
    writes: AtomicU64,
    /// The call from which on every one fails; 0: none.
    stop_at: AtomicU64,
    stopped: AtomicBool,
}

impl Faults {
    fn step(&self) -> io::Result<()> {
        let count = self.writes.fetch_add(1, Ordering::SeqCst) + 1;
        let stop_at = self.stop_at.load(Ordering::SeqCst);
        if stop_at > 0 && count >= stop_at {
            self.stopped.store(true, Ordering::SeqCst);
            return Err(io::Error::other("the disk is gone"));
        }
        Ok(())
    }
}

/// Names are durable at once; bytes when they are synced.
#[derive(Debug, Clone)]
pub(crate) struct MemoryDisk {
    files: Arc<Mutex<BTreeMap<PathBuf, Arc<MemoryFile>>>>,
    boot: Arc<AtomicU64>,
    faults: Arc<Faults>,
}

impl MemoryDisk {
    pub(crate) fn new() -> Self {
        Self { files: Arc::default(), boot: Arc::new(AtomicU64::new(1)), faults: Arc::default() }
    }

    /// The machine loses power, and comes up again: only what was synced is there, and `torn` bytes more of what was
    /// appended to a log. (redb never appends: it sets the length of its file, which a filesystem does whole.)
    pub(crate) fn power_cut(&self, torn: usize) -> Self {
        let copy = Self::new();
        copy.boot.store(self.boot.load(Ordering::SeqCst) + 1, Ordering::SeqCst);
        for (path, file) in self.files.lock().iter() {
            let content = file.content.lock();
            let mut bytes = content.durable.clone();
            let is_log = path.extension().is_some_and(|extension| extension == "log");
            let tail = content.now.get(bytes.len()..).filter(|_| is_log).unwrap_or_default();
            bytes.extend_from_slice(&tail[..torn.min(tail.len())]);
            copy.put(path, bytes);
        }
        copy
    }

    /// The process dies; the machine stays up.
    pub(crate) fn process_death(&self) -> Self {
        let copy = Self::new();
        copy.boot.store(self.boot.load(Ordering::SeqCst), Ordering::SeqCst);
        for (path, file) in self.files.lock().iter() {
            copy.put_content(path, file.content.lock().clone());
        }
        copy
    }

    fn put(&self, path: &Path, bytes: Vec<u8>) {
        self.put_content(path, Content { durable: bytes.clone(), now: bytes, dirty: BTreeSet::new() });
    }

    fn put_content(&self, path: &Path, content: Content) {
        let file = MemoryFile { content: Mutex::new(content), faults: Arc::clone(&self.faults) };
        self.files.lock().insert(path.to_owned(), Arc::new(file));
    }

    pub(crate) fn bytes(&self, path: &Path) -> Vec<u8> {
        self.files.lock()[path].content.lock().now.clone()
    }

    pub(crate) fn replace(&self, path: &Path, bytes: Vec<u8>) {
        self.put(path, bytes);
    }

    /// Every change from the `count`-th on fails.
    pub(crate) fn stop_at(&self, count: u64) {
        self.faults.writes.store(0, Ordering::SeqCst);
        self.faults.stop_at.store(count, Ordering::SeqCst);
    }

    pub(crate) fn stopped(&self) -> bool {
        self.faults.stopped.load(Ordering::SeqCst)
    }
}

fn place(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl DiskFile for MemoryFile {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let content = self.content.lock();
        let found = content.now.get(place(offset)..place(offset) + buffer.len());
        buffer.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.faults.step()?;
        let mut content = self.content.lock();
        let end = place(offset) + bytes.len();
        if content.now.len() < end {
            content.now.resize(end, 0);
        }
        content.now[place(offset)..end].copy_from_slice(bytes);
        content.dirty.extend(place(offset) / PAGE..end.div_ceil(PAGE));
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.content.lock().now.len() as u64)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.faults.step()?;
        self.content.lock().now.resize(place(length), 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut content = self.content.lock();
        let Content { now, durable, dirty } = &mut *content;
        let dirty = std::mem::take(dirty);
        self.faults.step()?;
        durable.resize(now.len(), 0);
        for page in dirty.into_iter().map(|page| page * PAGE).filter(|page| *page < now.len()) {
            let end = (page + PAGE).min(now.len());
            durable[page..end].copy_from_slice(&now[page..end]);
        }
        Ok(())
    }

    fn start_writeback(&self, _: u64, _: u64) {}

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let zeroes = vec![0; place(length)];
        self.write_all_at(&zeroes, offset)
    }
}

impl Disk for MemoryDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        if !self.files.lock().contains_key(path) {
            if !create {
                return Err(io::ErrorKind::NotFound.into());
            }
            self.faults.step()?;
            self.put(path, Vec::new());
        }
        Ok(Arc::<MemoryFile>::clone(&self.files.lock()[path]))
    }

    fn create_directory(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self.files.lock().keys().filter(|path| path.parent() == Some(directory)).cloned().collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.faults.step()?;
        let mut files = self.files.lock();
        let file = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.faults.step()?;
        self.files.lock().remove(path).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync_directory(&self, _: &Path) -> io::Result<()> {
        self.faults.step()
    }

    fn space(&self, _: &Path) -> io::Result<Space> {
        Ok(Space { capacity: 1 << 30, free: 1 << 30 })
    }

    fn machine_boot(&self) -> io::Result<String> {
        Ok(format!("boot-{}", self.boot.load(Ordering::SeqCst)))
    }
}

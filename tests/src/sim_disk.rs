//! A disk in memory that keeps only what it promised to keep.
//!
//! A crash undoes, tears and reorders writes that were not synced: each 512-byte sector that was written since the
//! file's last sync is kept or lost by the toss of a seeded coin. A directory's sync makes the changes of the names in it
//! durable, and no others; of those that no sync has covered, a prefix survives. What a program holds open through
//! a crash is dead.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use holdfast_common::disk::{Disk, DiskFile, Space};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// The grain in which a disk keeps or loses.
const SECTOR_LENGTH: usize = 512;
const SECTOR: u64 = SECTOR_LENGTH as u64;
const CAPACITY: u64 = 64 << 30;

type Sector = [u8; SECTOR_LENGTH];
type FileId = u64;

/// Sectors that were written; all others are zeroes.
#[derive(Clone, Debug, Default)]
struct Content {
    length: u64,
    sectors: BTreeMap<u64, Arc<Sector>>,
}

#[derive(Clone, Debug, Default)]
struct Node {
    live: Content,
    durable: Content,
    /// Sectors that differ, or may, between the two.
    unsynced: BTreeSet<u64>,
}

#[derive(Clone, Debug)]
enum NameChange {
    Add(PathBuf, FileId),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
    Directory(PathBuf),
}

#[derive(Clone, Debug, Default)]
struct Names {
    files: BTreeMap<PathBuf, FileId>,
    directories: BTreeSet<PathBuf>,
}

#[derive(Debug, Default)]
struct State {
    nodes: BTreeMap<FileId, Node>,
    live: Names,
    durable: Names,
    pending: Vec<NameChange>,
    files_made: FileId,
    boot: u64,
    full: bool,
}

/// What happens at the n-th call that changes the disk, and at every one after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The machine has lost its power: every call fails from then on.
    PowerCut,
    /// That one call fails, having done nothing; the next ones succeed.
    OneError,
}

/// What several disks have in common: they lose their power together.
#[derive(Debug, Default)]
struct Power {
    /// Calls that change a disk, so far.
    changes: AtomicU64,
    trouble: Mutex<Option<(u64, Trouble)>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    power: Arc<Power>,
}

#[derive(Clone, Debug, Default)]
pub struct SimDisk {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct SimFile {
    shared: Arc<Shared>,
    id: FileId,
}

impl SimDisk {
    pub fn new() -> Self {
        Self::default()
    }

    /// `count` empty disks on one power line: [`Self::strike`], [`Self::changes`] and the trouble are those of all.
    pub fn rack(count: usize) -> Vec<Self> {
        let power = Arc::new(Power::default());
        let disk = || Self { shared: Arc::new(Shared { state: Mutex::default(), power: Arc::clone(&power) }) };
        (0..count).map(|_| disk()).collect()
    }

    /// `trouble` strikes at the `at`-th change from now (counted from 1).
    pub fn strike(&self, at: u64, trouble: Trouble) {
        *self.shared.power.trouble.lock() = Some((self.changes() + at, trouble));
    }

    /// Calls so far that changed the disk.
    pub fn changes(&self) -> u64 {
        self.shared.power.changes.load(Ordering::SeqCst)
    }

    pub fn has_struck(&self) -> bool {
        self.shared.power.trouble.lock().is_some_and(|(at, _)| self.changes() >= at)
    }

    /// What a power cut leaves, on a machine that has booted again. The old disk stays as it was.
    pub fn after_power_cut(&self, seed: u64) -> Self {
        let mut chance = StdRng::seed_from_u64(seed);
        let old = self.shared.state.lock();
        let names = surviving_names(&old, &mut chance);
        let nodes = old.nodes.iter().map(|(&id, node)| (id, settle(node, &mut chance))).collect();
        Self::from_state(State {
            nodes,
            live: names.clone(),
            durable: names,
            pending: Vec::new(),
            files_made: old.files_made,
            boot: old.boot + 1,
            full: false,
        })
    }

    /// What `kill -9` of the program leaves: everything it wrote.
    pub fn after_kill(&self) -> Self {
        let old = self.shared.state.lock();
        Self::from_state(State {
            nodes: old.nodes.clone(),
            live: old.live.clone(),
            durable: old.durable.clone(),
            pending: old.pending.clone(),
            files_made: old.files_made,
            boot: old.boot,
            full: false,
        })
    }

    fn from_state(state: State) -> Self {
        Self { shared: Arc::new(Shared { state: Mutex::new(state), ..Shared::default() }) }
    }

    /// Whether there is no room left for anything: what would grow a file fails with ENOSPC.
    pub fn fill(&self, full: bool) {
        self.shared.state.lock().full = full;
    }

    /// Turns a bit of a file, as a lying disk does.
    pub fn flip_bit(&self, path: &Path, offset: u64) -> io::Result<()> {
        let mut state = self.shared.state.lock();
        let id = *state.live.files.get(path).ok_or(io::ErrorKind::NotFound)?;
        let node = state.nodes.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
        for content in [&mut node.live, &mut node.durable] {
            let mut byte = [0];
            if content.read(&mut byte, offset).is_ok() {
                content.write(&[byte[0] ^ 1], offset);
            }
        }
        Ok(())
    }
}

fn surviving_names(state: &State, chance: &mut StdRng) -> Names {
    let survivors = chance.random_range(0..=state.pending.len());
    let mut names = state.durable.clone();
    state.pending[..survivors].iter().for_each(|change| names.apply(change));
    // What lies in a directory goes with its name.
    let Names { files, directories } = &mut names;
    files.retain(|path, _| path.parent().is_none_or(|parent| directories.contains(parent)));
    names
}

fn settle(node: &Node, chance: &mut StdRng) -> Node {
    let mut content = node.durable.clone();
    if chance.random() {
        content.set_length(node.live.length);
    }
    for &sector in &node.unsynced {
        if sector * SECTOR < content.length && chance.random() {
            content.copy_sector(&node.live, sector);
        }
    }
    Node { live: content.clone(), durable: content, unsynced: BTreeSet::new() }
}

impl Names {
    fn apply(&mut self, change: &NameChange) {
        match change {
            NameChange::Add(path, id) => {
                self.files.insert(path.clone(), *id);
            }
            NameChange::Remove(path) => {
                self.files.remove(path);
            }
            NameChange::Rename(from, to) => {
                if let Some(id) = self.files.remove(from) {
                    self.files.insert(to.clone(), id);
                }
            }
            NameChange::Directory(path) => {
                self.directories.extend(path.ancestors().map(Path::to_owned));
            }
        }
    }
}

impl NameChange {
    fn touches(&self, directory: &Path) -> bool {
        match self {
            Self::Add(path, _) | Self::Remove(path) | Self::Directory(path) => path.parent() == Some(directory),
            Self::Rename(from, to) => from.parent() == Some(directory) || to.parent() == Some(directory),
        }
    }
}

impl State {
    fn change_names(&mut self, change: NameChange) {
        self.live.apply(&change);
        self.pending.push(change);
    }

    fn sync_names(&mut self, directory: &Path) {
        for change in self.pending.extract_if(.., |change| change.touches(directory)) {
            self.durable.apply(&change);
        }
    }
}

impl Content {
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if offset + buffer.len() as u64 > self.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (at, byte) in (offset..).zip(buffer) {
            *byte = self.sectors.get(&(at / SECTOR)).map_or(0, |sector| sector[index(at)]);
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], offset: u64) {
        let mut done = 0;
        while done < bytes.len() {
            let (number, start) = ((offset + done as u64) / SECTOR, index(offset + done as u64));
            let run = (SECTOR_LENGTH - start).min(bytes.len() - done);
            let sector = Arc::make_mut(self.sectors.entry(number).or_insert_with(|| Arc::new([0; SECTOR_LENGTH])));
            sector[start..start + run].copy_from_slice(&bytes[done..done + run]);
            done += run;
        }
        self.length = self.length.max(offset + bytes.len() as u64);
    }

    fn set_length(&mut self, length: u64) {
        if length < self.length {
            self.zero(length, self.length - length);
        }
        self.length = length;
    }

    fn zero(&mut self, offset: u64, length: u64) {
        let end = (offset + length).min(self.length);
        let numbers: Vec<u64> = self.sectors.range(offset / SECTOR..end.div_ceil(SECTOR)).map(|(&n, _)| n).collect();
        for number in numbers {
            let (start, stop) = (offset.max(number * SECTOR), end.min((number + 1) * SECTOR));
            if stop - start == SECTOR {
                self.sectors.remove(&number);
            } else if let Some(sector) = self.sectors.get_mut(&number) {
                Arc::make_mut(sector)[index(start)..][..usize_of(stop - start)].fill(0);
            }
        }
    }

    fn copy_sector(&mut self, from: &Self, number: u64) {
        match from.sectors.get(&number) {
            Some(sector) => self.sectors.insert(number, Arc::clone(sector)),
            None => self.sectors.remove(&number),
        };
    }
}

fn index(offset: u64) -> usize {
    usize_of(offset % SECTOR)
}

fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("a 64-bit machine")
}

impl Shared {
    /// Counts one change; says no when trouble strikes.
    fn admit_change(&self) -> io::Result<()> {
        let now = self.power.changes.fetch_add(1, Ordering::SeqCst) + 1;
        match *self.power.trouble.lock() {
            Some((at, Trouble::PowerCut)) if now >= at => Err(io::Error::other("the power is off")),
            Some((at, Trouble::OneError)) if now == at => Err(io::Error::other("the disk has an error")),
            _ => Ok(()),
        }
    }

    fn admit_look(&self) -> io::Result<()> {
        match *self.power.trouble.lock() {
            Some((at, Trouble::PowerCut)) if self.power.changes.load(Ordering::SeqCst) >= at => {
                Err(io::Error::other("the power is off"))
            }
            _ => Ok(()),
        }
    }
}

impl SimFile {
    fn with<T>(&self, act: impl FnOnce(&mut Node) -> T) -> T {
        act(self.shared.state.lock().nodes.entry(self.id).or_default())
    }

    /// A full disk lets no file grow.
    fn admit_length(&self, length: u64) -> io::Result<()> {
        let is_full = self.shared.state.lock().full;
        let grows = is_full && self.with(|node| length > node.live.length);
        if grows { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn change(&self, touched: std::ops::Range<u64>, act: impl FnOnce(&mut Content)) -> io::Result<()> {
        self.shared.admit_change()?;
        self.with(|node| {
            act(&mut node.live);
            node.unsynced.extend(touched.start / SECTOR..touched.end.div_ceil(SECTOR));
        });
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.shared.admit_look()?;
        self.with(|node| node.live.read(buffer, offset))
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.admit_length(offset + bytes.len() as u64)?;
        self.change(offset..offset + bytes.len() as u64, |content| content.write(bytes, offset))
    }

    fn length(&self) -> io::Result<u64> {
        self.shared.admit_look()?;
        Ok(self.with(|node| node.live.length))
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.admit_length(length)?;
        let cut = self.with(|node| length.min(node.live.length)..node.live.length);
        self.change(cut, |content| content.set_length(length))
    }

    fn sync_data(&self) -> io::Result<()> {
        if let Err(error) = self.shared.admit_change() {
            // As Linux: it is told once, and what was not written counts as written from then on.
            if self.shared.admit_look().is_ok() {
                self.with(|node| node.unsynced.clear());
            }
            return Err(error);
        }
        self.with(|node| {
            for sector in std::mem::take(&mut node.unsynced) {
                let live = node.live.clone_sector(sector);
                node.durable.put_sector(sector, live);
            }
            node.durable.length = node.live.length;
        });
        Ok(())
    }

    fn start_writeback(&self, _offset: u64, _length: u64) {}

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(offset..offset + length, |content| content.zero(offset, length))
    }
}

impl Content {
    fn clone_sector(&self, number: u64) -> Option<Arc<Sector>> {
        self.sectors.get(&number).cloned()
    }

    fn put_sector(&mut self, number: u64, sector: Option<Arc<Sector>>) {
        match sector {
            Some(sector) => self.sectors.insert(number, sector),
            None => self.sectors.remove(&number),
        };
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        self.shared.admit_look()?;
        let known = self.shared.state.lock().live.files.get(path).copied();
        let id = match known {
            Some(id) => id,
            None if create => self.make_file(path)?,
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(Arc::new(SimFile { shared: Arc::clone(&self.shared), id }))
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        self.shared.admit_change()?;
        self.shared.state.lock().change_names(NameChange::Directory(path.into()));
        Ok(())
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        self.shared.admit_look()?;
        let state = self.shared.state.lock();
        if !state.live.directories.contains(directory) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let names = state.live.files.keys().chain(&state.live.directories);
        let inside: BTreeSet<_> = names.filter(|path| path.parent() == Some(directory)).cloned().collect();
        Ok(inside.into_iter().collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.shared.admit_change()?;
        let mut state = self.shared.state.lock();
        if !state.live.files.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.change_names(NameChange::Rename(from.into(), to.into()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.shared.admit_change()?;
        let mut state = self.shared.state.lock();
        if !state.live.files.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.change_names(NameChange::Remove(path.into()));
        Ok(())
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        self.shared.admit_change()?;
        self.shared.state.lock().sync_names(directory);
        Ok(())
    }

    fn space(&self, _directory: &Path) -> io::Result<Space> {
        self.shared.admit_look()?;
        let state = self.shared.state.lock();
        let used: usize = state.nodes.values().map(|node| node.live.sectors.len()).sum();
        let free = if state.full { 0 } else { CAPACITY.saturating_sub(used as u64 * SECTOR) };
        Ok(Space { capacity: CAPACITY, free })
    }

    fn machine_boot(&self) -> io::Result<String> {
        Ok(format!("simulated boot {}", self.shared.state.lock().boot))
    }
}

impl SimDisk {
    fn make_file(&self, path: &Path) -> io::Result<FileId> {
        self.shared.admit_change()?;
        let mut state = self.shared.state.lock();
        let parent = path.parent().unwrap_or(Path::new("/"));
        if !state.live.directories.contains(parent) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.files_made += 1;
        let id = state.files_made;
        state.nodes.insert(id, Node::default());
        state.change_names(NameChange::Add(path.into(), id));
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk_with_file() -> (SimDisk, Arc<dyn DiskFile>) {
        let disk = SimDisk::new();
        disk.create_directory(Path::new("/d")).unwrap();
        let file = disk.open(Path::new("/d/f"), true).unwrap();
        (disk, file)
    }

    fn content(disk: &SimDisk) -> Option<Vec<u8>> {
        let file = disk.open(Path::new("/d/f"), false).ok()?;
        let mut bytes = vec![0; usize_of(file.length().unwrap())];
        file.read_exact_at(&mut bytes, 0).unwrap();
        Some(bytes)
    }

    #[test]
    fn what_was_synced_survives_every_crash() {
        let (disk, file) = disk_with_file();
        file.write_all_at(&[7; 3000], 0).unwrap();
        file.sync_data().unwrap();
        disk.sync_directory(Path::new("/")).unwrap();
        disk.sync_directory(Path::new("/d")).unwrap();
        for seed in 0..50 {
            assert_eq!(content(&disk.after_power_cut(seed)), Some(vec![7; 3000]));
        }
    }

    #[test]
    fn what_was_not_synced_is_kept_lost_and_torn() {
        let (disk, file) = disk_with_file();
        file.write_all_at(&[1; 2048], 0).unwrap();
        file.sync_data().unwrap();
        disk.sync_directory(Path::new("/")).unwrap();
        disk.sync_directory(Path::new("/d")).unwrap();
        file.write_all_at(&[2; 2048], 0).unwrap();
        let outcomes: BTreeSet<_> = (0..200).filter_map(|seed| content(&disk.after_power_cut(seed))).collect();
        assert!(outcomes.contains(&vec![1; 2048]) && outcomes.contains(&vec![2; 2048]));
        assert_eq!(outcomes.len(), 16, "each of four sectors is kept or lost");
        assert_eq!(content(&disk.after_kill()), Some(vec![2; 2048]));
    }

    #[test]
    fn a_name_that_was_not_synced_may_be_gone() {
        let (disk, file) = disk_with_file();
        file.sync_data().unwrap();
        let outcomes: BTreeSet<_> = (0..50).map(|seed| content(&disk.after_power_cut(seed)).is_some()).collect();
        assert_eq!(outcomes.len(), 2);
    }

    #[test]
    fn a_directory_that_was_not_synced_into_its_parent_takes_its_files_along() {
        let (disk, file) = disk_with_file();
        file.sync_data().unwrap();
        disk.sync_directory(Path::new("/d")).unwrap();
        let outcomes: BTreeSet<_> = (0..50).map(|seed| content(&disk.after_power_cut(seed)).is_some()).collect();
        assert_eq!(outcomes.len(), 2);
    }

    #[test]
    fn trouble_strikes_at_the_change_it_was_ordered_for() {
        let (disk, file) = disk_with_file();
        disk.strike(2, Trouble::OneError);
        assert!(file.write_all_at(b"a", 0).is_ok());
        assert!(file.sync_data().is_err());
        assert!(file.sync_data().is_ok());
        disk.strike(1, Trouble::PowerCut);
        assert!(file.write_all_at(b"b", 0).is_err());
        assert!(file.length().is_err());
    }

    #[test]
    fn a_shortened_file_does_not_show_its_old_end_again() {
        let (disk, file) = disk_with_file();
        file.write_all_at(&[9; 1000], 0).unwrap();
        file.set_length(10).unwrap();
        file.set_length(1000).unwrap();
        let bytes = content(&disk).unwrap();
        assert!(bytes[..10].iter().all(|&byte| byte == 9) && bytes[10..].iter().all(|&byte| byte == 0));
    }
}

//! A program that uses a mount, and knows what it must find there.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use holdfast_tests::{fault::random_bytes, sys};
use rand::{Rng, SeedableRng, rngs::StdRng};

const FILES_MAX: usize = 60;

/// What the files of a directory must be, kept beside them.
pub(super) struct User {
    random: StdRng,
    root: PathBuf,
    files: BTreeMap<String, Vec<u8>>,
    made: u64,
}

impl User {
    /// Of a new directory `root`, the only one who writes there.
    pub(super) fn new(seed: u64, root: PathBuf) -> Self {
        fs::create_dir(&root).expect("mkdir");
        Self { random: StdRng::seed_from_u64(seed), root, files: BTreeMap::new(), made: 0 }
    }

    fn pick(&mut self) -> Option<String> {
        let count = self.files.len();
        (count > 0).then(|| self.random.random_range(0..count)).and_then(|n| self.files.keys().nth(n).cloned())
    }

    fn bytes(&mut self) -> Vec<u8> {
        let most = [100, 5000, 200_000, 3 << 20][self.random.random_range(0..4)];
        let length = self.random.random_range(1..=most);
        random_bytes(self.random.random(), length)
    }

    /// Does something, and checks what there is to see of it.
    pub(super) fn step(&mut self) {
        match self.random.random_range(0..100) {
            0..30 => self.create(),
            30..45 => self.overwrite_a_part(),
            45..55 => self.append(),
            55..80 => self.read(),
            80..88 => self.rename(),
            88..93 => self.truncate(),
            _ => self.delete(),
        }
        if self.files.len() > FILES_MAX {
            self.delete();
        }
    }

    fn create(&mut self) {
        self.made += 1;
        let (name, content) = (format!("file-{}", self.made), self.bytes());
        let mut file = File::create_new(self.root.join(&name)).expect("create");
        file.write_all(&content).expect("write");
        if self.random.random() {
            file.sync_all().expect("fsync");
        }
        drop(file);
        self.files.insert(name, content);
    }

    fn overwrite_a_part(&mut self) {
        let Some(name) = self.pick() else { return };
        let new = self.bytes();
        let content = self.files.get_mut(&name).expect("picked");
        let at = self.random.random_range(0..=content.len());
        let mut file = File::options().write(true).open(self.root.join(&name)).expect("open");
        file.seek(SeekFrom::Start(at as u64)).expect("seek");
        file.write_all(&new).expect("overwrite");
        content.resize(content.len().max(at + new.len()), 0);
        content[at..at + new.len()].copy_from_slice(&new);
    }

    fn append(&mut self) {
        let Some(name) = self.pick() else { return };
        let new = self.bytes();
        let mut file = File::options().append(true).open(self.root.join(&name)).expect("open");
        file.write_all(&new).expect("append");
        file.sync_data().expect("fdatasync");
        self.files.get_mut(&name).expect("picked").extend(new);
    }

    fn truncate(&mut self) {
        let Some(name) = self.pick() else { return };
        let content = self.files.get_mut(&name).expect("picked");
        let length = self.random.random_range(0..=content.len());
        File::options()
            .write(true)
            .open(self.root.join(&name))
            .expect("open")
            .set_len(length as u64)
            .expect("truncate");
        content.truncate(length);
    }

    fn read(&mut self) {
        let Some(name) = self.pick() else { return };
        let path = self.root.join(&name);
        if self.random.random() {
            forget(&path);
        }
        let mut found = Vec::new();
        File::open(&path).expect("open").read_to_end(&mut found).expect("read");
        assert!(found == self.files[&name], "{name}: wrong bytes: {}", difference(&found, &self.files[&name]));
    }

    fn rename(&mut self) {
        let Some(name) = self.pick() else { return };
        self.made += 1;
        let new = format!("file-{}", self.made);
        fs::rename(self.root.join(&name), self.root.join(&new)).expect("rename");
        let content = self.files.remove(&name).expect("picked");
        self.files.insert(new, content);
    }

    fn delete(&mut self) {
        let Some(name) = self.pick() else { return };
        fs::remove_file(self.root.join(&name)).expect("unlink");
        self.files.remove(&name);
    }

    /// Everything of its own.
    pub(super) fn check(&self) {
        self.check_at(&self.root);
    }

    /// Everything as it is seen at `root`, perhaps by another mount.
    pub(super) fn check_at(&self, root: &Path) {
        let mut names: Vec<String> = fs::read_dir(root)
            .expect("list")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        assert_eq!(names, self.files.keys().cloned().collect::<Vec<_>>());
        for (name, content) in &self.files {
            let found = fs::read(root.join(name)).expect("read");
            assert!(found == *content, "{name}: wrong bytes: {}", difference(&found, content));
        }
    }
}

fn difference(found: &[u8], expected: &[u8]) -> String {
    let place = found.iter().zip(expected).position(|(found, expected)| found != expected);
    format!("{} for {} bytes, the first wrong one at {place:?}", found.len(), expected.len())
}

/// The kernel has nothing of the file any more: what is read next comes from the servers.
fn forget(path: &Path) {
    let file = File::open(path).expect("open");
    file.sync_all().expect("fsync");
    sys::drop_pages(&file).expect("fadvise");
}

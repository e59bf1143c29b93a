//! A real cluster in use, while one thing after another goes wrong with it: not a wrong byte, not a refused operation, nothing lost.
//!
//! `HOLDFAST_CHAOS_SECS` says how long, `HOLDFAST_CHAOS_SEED` which history; `scripts/soak` runs long ones.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use holdfast_tests::{
    cluster::{Cluster, Options, PATIENCE},
    fault::{self, random_bytes},
    sys, wait,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

const DEFAULT_SECS: u64 = 40;
const SERVERS: usize = 4;
const FILES_MAX: usize = 60;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What the files must be, kept beside them.
struct Model {
    random: StdRng,
    root: std::path::PathBuf,
    files: BTreeMap<String, Vec<u8>>,
    made: u64,
}

impl Model {
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
    fn step(&mut self) {
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

    /// Everything, against the model.
    fn check(&self) {
        let mut names: Vec<String> = fs::read_dir(&self.root)
            .expect("list")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        assert_eq!(names, self.files.keys().cloned().collect::<Vec<_>>());
        for (name, content) in &self.files {
            let found = fs::read(self.root.join(name)).expect("read");
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

/// What goes wrong, one after the other: the cluster is whole again before the next.
struct Faults<'a> {
    cluster: &'a Cluster,
    random: StdRng,
    kinds: BTreeMap<&'static str, u64>,
}

impl Faults<'_> {
    fn strike(&mut self) {
        let server = self.random.random_range(1..=SERVERS);
        let long = Duration::from_millis(self.random.random_range(100..4000));
        let kind = match self.random.random_range(0..6) {
            0 => {
                self.cluster.storage(server).kill();
                thread::sleep(long);
                self.cluster.storage(server).start();
                "storage server killed"
            }
            1 => {
                self.cluster.storage(server).freeze();
                thread::sleep(long);
                self.cluster.storage(server).thaw();
                "storage server stopped"
            }
            2 => {
                self.cluster.cut(server);
                thread::sleep(long);
                self.cluster.mend(server);
                "storage server cut off"
            }
            3 => {
                self.cluster.meta().kill();
                thread::sleep(long / 4);
                self.cluster.meta().start();
                "metadata server killed"
            }
            4 => {
                self.cluster.meta().freeze();
                thread::sleep(long / 4);
                self.cluster.meta().thaw();
                "metadata server stopped"
            }
            _ => {
                self.flip_bits(server);
                "bits flipped"
            }
        };
        *self.kinds.entry(kind).or_default() += 1;
        self.cluster.wait_until_up();
        self.cluster.wait_until_whole();
    }

    /// In a few segments of one server; then it reads everything again.
    fn flip_bits(&mut self, server: usize) {
        let directory = self.cluster.storage_data(server).join("segments");
        for path in fault::files(&directory) {
            let length = fs::metadata(&path).map_or(0, |found| found.len());
            if length > 8192 {
                let offset = self.random.random_range(4096..length);
                flip(&path, offset);
            }
        }
        let dir = self.cluster.path().to_str().expect("UTF-8");
        let output = self.cluster.holdfast(&["scrub", "--now", "--wait", "--dir", dir]);
        assert!(output.status.success(), "{output:?}");
        wait::until("what scrubbing has found is mended", PATIENCE, || {
            let status = self.cluster.status();
            status.is_whole()
        });
    }
}

/// Of a segment that the server may compact and remove meanwhile.
fn flip(path: &Path, offset: u64) {
    let Ok(file) = File::options().read(true).write(true).open(path) else { return };
    let mut byte = [0];
    if std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, offset).is_ok() {
        std::os::unix::fs::FileExt::write_all_at(&file, &[byte[0] ^ 8], offset).expect("flip a bit");
    }
}

/// "A cluster in use to which one thing after another happens (kill -9, SIGSTOP, cut cables, flipped bits, restarts of the metadata server) loses nothing and refuses nothing, and is whole afterwards."
#[test]
fn whatever_happens_one_after_another_nothing_is_wrong_and_nothing_lost() {
    let (secs, seed) =
        (from_environment("HOLDFAST_CHAOS_SECS", DEFAULT_SECS), from_environment("HOLDFAST_CHAOS_SEED", 1));
    let cluster = Cluster::prepare(&Options { storage: SERVERS, proxied: true, ..Options::default() });
    for (key, value) in [
        ("garbage_grace_secs", 2),
        ("compare_every_secs", 5),
        ("down_after_ms", 5000),
        ("replace_after_secs", 2),
        ("backup_every_secs", 5),
    ] {
        cluster.set("meta/meta.toml", key, value);
    }
    cluster.start_daemons();
    let mount = cluster.mount();
    let over = Arc::new(AtomicBool::new(false));
    let steps = Arc::new(AtomicU64::new(0));
    let (root, is_over, count) = (mount.path().to_owned(), Arc::clone(&over), Arc::clone(&steps));
    let user = thread::spawn(move || {
        let mut model = Model { random: StdRng::seed_from_u64(seed), root, files: BTreeMap::new(), made: 0 };
        while !is_over.load(Relaxed) {
            model.step();
            count.fetch_add(1, Relaxed);
        }
        model
    });
    let mut faults = Faults { cluster: &cluster, random: StdRng::seed_from_u64(!seed), kinds: BTreeMap::new() };
    let until = Instant::now() + Duration::from_secs(secs);
    while Instant::now() < until && !user.is_finished() {
        faults.strike();
    }
    over.store(true, Relaxed);
    let model = user.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    assert!(steps.load(Relaxed) > secs, "hardly anything was done: {}", steps.load(Relaxed));
    model.check();
    mount.remount();
    model.check();
    cluster.wait_until_whole();
    let dir = cluster.path().to_str().expect("UTF-8");
    wait::until("everything is well", PATIENCE, || {
        cluster.holdfast(&["fsck", "--repair", "--dir", dir]).status.success()
    });
    assert!(!faults.kinds.is_empty());
}

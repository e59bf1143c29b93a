//! What goes wrong with a cluster, one thing after the other.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use holdfast_tests::{
    cluster::{Cluster, PATIENCE},
    fault,
    process::Process,
    small_disk::SmallDisk,
    wait,
};
use rand::{Rng, rngs::StdRng, seq::SliceRandom};

/// How long a fault lasts: some are over before anyone is suspect, some are long enough that a server is given up.
const LASTS_MS: std::ops::Range<u64> = 100..10_000;

/// How something that goes wrong is called, and how it happens.
type Kind<F> = (&'static str, fn(&mut F));

/// What goes wrong, one after the other: the cluster is whole again before the next.
pub(super) struct Faults<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) servers: usize,
    /// The filesystem of one of them, which can be filled; only root can make one.
    pub(super) small_disk: Option<&'a SmallDisk<'a>>,
    pub(super) small: usize,
    pub(super) random: StdRng,
    /// How often each has happened.
    pub(super) counts: BTreeMap<&'static str, u64>,
    /// All kinds, in the order in which they come next.
    pub(super) next: Vec<usize>,
}

impl Faults<'_> {
    /// What can happen to a cluster, and how it is called.
    const KINDS: [Kind<Self>; 18] = [
        ("storage server killed", Self::kill_storage),
        ("storage server stopped", Self::stop_storage),
        ("storage server cut off", Self::cut_storage),
        ("storage server cut off from the metadata server", Self::cut_storage_from_meta),
        ("answers of a storage server lost", Self::cut_answers),
        ("storage server slow", Self::slow_storage),
        ("storage server wiped", Self::wipe_storage),
        ("segments truncated or deleted", Self::lose_segments),
        ("bits flipped", Self::flip_bits),
        ("disk full", Self::fill_disk),
        ("disk full, server killed", Self::fill_disk_and_kill),
        ("metadata server killed", Self::kill_meta),
        ("metadata server stopped", Self::stop_meta),
        ("mounts cut off from the metadata server", Self::cut_mounts),
        ("answers of the metadata server lost", Self::cut_answers_to_mounts),
        ("everything killed", Self::kill_everything),
        ("storage and metadata server killed", Self::kill_storage_and_meta),
        ("storage server killed, another slow", Self::kill_and_slow_storage),
    ];

    /// Every kind that is possible here has come.
    pub(super) fn all_came(&self) -> bool {
        (0..Self::KINDS.len())
            .filter(|kind| self.is_possible(*kind))
            .all(|kind| self.counts.contains_key(Self::KINDS[kind].0))
    }

    fn is_possible(&self, kind: usize) -> bool {
        self.small_disk.is_some() || !Self::KINDS[kind].0.starts_with("disk full")
    }

    /// The next kind: all of them come before any comes again.
    pub(super) fn strike(&mut self) {
        if self.next.is_empty() {
            self.next = (0..Self::KINDS.len()).filter(|kind| self.is_possible(*kind)).collect();
            self.next.shuffle(&mut self.random);
        }
        let (name, happen) = Self::KINDS[self.next.pop().expect("filled above")];
        happen(self);
        *self.counts.entry(name).or_default() += 1;
        self.cluster.wait_until_up();
        self.cluster.wait_until_whole();
    }

    fn server(&mut self) -> usize {
        self.random.random_range(1..=self.servers)
    }

    /// Of that much the fault goes on.
    fn a_while(&mut self) -> Duration {
        Duration::from_millis(self.random.random_range(LASTS_MS))
    }

    fn last(&mut self) {
        thread::sleep(self.a_while());
    }

    fn kill_storage(&mut self) {
        let server = self.server();
        self.cluster.storage(server).kill();
        self.last();
        self.cluster.storage(server).start();
    }

    fn stop_storage(&mut self) {
        let server = self.server();
        self.cluster.storage(server).freeze();
        self.last();
        self.cluster.storage(server).thaw();
    }

    fn cut_storage(&mut self) {
        let server = self.server();
        self.cluster.cut(server);
        self.last();
        self.cluster.mend(server);
    }

    /// Mounts go on with it for as long as the map that they know says that it is up.
    fn cut_storage_from_meta(&mut self) {
        let server = self.server();
        self.cluster.cut_from_meta(server);
        self.last();
        self.cluster.mend(server);
    }

    /// It does what it is asked, and nobody knows.
    fn cut_answers(&mut self) {
        let server = self.server();
        self.cluster.cut_answers(server);
        self.last();
        self.cluster.mend(server);
    }

    /// Not for as long as ends their sessions.
    fn cut_mounts(&mut self) {
        self.cluster.mounts_wire().cut();
        self.last();
        self.cluster.mounts_wire().mend();
    }

    /// Changes are made, and asked for again.
    fn cut_answers_to_mounts(&mut self) {
        self.cluster.mounts_wire().cut_answers();
        self.last();
        self.cluster.mounts_wire().mend();
    }

    fn slow_storage(&mut self) {
        let server = self.server();
        self.slow(server);
    }

    /// It runs a tenth of the time.
    fn slow(&mut self, server: usize) {
        let until = Instant::now() + self.a_while();
        while Instant::now() < until {
            self.cluster.storage(server).freeze();
            thread::sleep(Duration::from_millis(90));
            self.cluster.storage(server).thaw();
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn wipe_storage(&mut self) {
        let server = self.server();
        self.cluster.wipe(server);
        self.wait_until_compared(server);
    }

    fn kill_meta(&mut self) {
        self.cluster.meta().kill();
        thread::sleep(self.a_while() / 4);
        self.cluster.meta().start();
    }

    fn stop_meta(&mut self) {
        self.cluster.meta().freeze();
        thread::sleep(self.a_while() / 4);
        self.cluster.meta().thaw();
    }

    /// As when somebody starts it all anew; the machine keeps what was written.
    fn kill_everything(&mut self) {
        self.cluster.storage_servers().iter().for_each(Process::kill);
        self.cluster.meta().kill();
        thread::sleep(self.a_while() / 4);
        self.cluster.start_daemons();
    }

    /// The metadata server is there again first, and does not know who is.
    fn kill_storage_and_meta(&mut self) {
        let server = self.server();
        self.cluster.storage(server).kill();
        self.kill_meta();
        self.last();
        self.cluster.storage(server).start();
    }

    fn kill_and_slow_storage(&mut self) {
        let server = self.server();
        self.cluster.storage(server).kill();
        self.slow(server % self.servers + 1);
        self.cluster.storage(server).start();
    }

    /// Nothing more fits on the disk of one server.
    fn fill_disk(&mut self) {
        let _filler = self.small_disk.map(SmallDisk::fill);
        self.last();
    }

    /// The same, and it has to start with it.
    fn fill_disk_and_kill(&mut self) {
        let _filler = self.small_disk.map(SmallDisk::fill);
        thread::sleep(self.a_while() / 4);
        self.cluster.storage(self.small).kill();
        self.cluster.storage(self.small).start();
        self.last();
    }

    /// A server comes back, and some of its files are shorter or gone.
    fn lose_segments(&mut self) {
        let server = self.server();
        self.cluster.storage(server).kill();
        for path in fault::files(&self.cluster.storage_data(server).join("segments")) {
            match self.random.random_range(0..4) {
                0 => fs::remove_file(&path).expect("delete a segment"),
                1 => truncate(&path, &mut self.random),
                _ => {}
            }
        }
        self.cluster.storage(server).start();
        self.wait_until_compared(server);
    }

    /// What it has lost is on record as lost: until then nobody knows that it is not whole.
    fn wait_until_compared(&self, server: usize) {
        let line = format!("a storage server was compared with the record server={server} ");
        let compared = || self.cluster.meta().log().matches(&line).count();
        let before = compared();
        wait::until("the server is compared with the record", PATIENCE, || compared() > before);
    }

    /// In every segment of one server; then it reads everything again.
    fn flip_bits(&mut self) {
        let server = self.server();
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
    }
}

/// Of a segment that the server may compact and remove meanwhile.
fn flip(path: &Path, offset: u64) {
    let Ok(file) = File::options().read(true).write(true).open(path) else { return };
    let mut byte = [0];
    if file.read_exact_at(&mut byte, offset).is_ok() {
        file.write_all_at(&[byte[0] ^ 8], offset).expect("flip a bit");
    }
}

/// To a random part of what it is.
fn truncate(path: &Path, random: &mut StdRng) {
    let file = File::options().write(true).open(path).expect("open a segment");
    let length = file.metadata().expect("stat").len();
    file.set_len(random.random_range(0..=length)).expect("truncate a segment");
}

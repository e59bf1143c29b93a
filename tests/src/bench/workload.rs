//! Seven workloads, from one long file to many small ones and a database.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use super::{
    Sample, Unit,
    small::{self, Act, Tree},
    tools::{FioFigures, fio, run},
};

/// A making of small files ends after this, and what comes after it is done to what there is.
const CREATE_LIMIT: Duration = Duration::from_secs(12);
const NO_LIMIT: Duration = Duration::from_secs(100);
const SMALL_BYTES: usize = 4096;

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub long_file_mib: usize,
    pub random_reads: usize,
    pub random_seconds: usize,
    pub small_files: usize,
    pub directories: usize,
    pub synced_files: usize,
    pub made_directories: usize,
    pub transactions: usize,
}

impl Sizes {
    pub const FULL: Self = Self {
        long_file_mib: 1024,
        random_reads: 30_000,
        random_seconds: 5,
        small_files: 5000,
        directories: 50,
        synced_files: 500,
        made_directories: 1000,
        transactions: 500,
    };
    /// To see that it works.
    pub const QUICK: Self = Self {
        long_file_mib: 64,
        random_reads: 1000,
        random_seconds: 1,
        small_files: 300,
        directories: 10,
        synced_files: 50,
        made_directories: 100,
        transactions: 30,
    };
}

/// What is measured: a script that answers to `up`, `down`, `remount`, `mountpoint` and `wipe`.
#[derive(Clone, Debug)]
pub struct Subject {
    pub script: PathBuf,
    pub label: String,
}

impl Subject {
    /// Named after its script.
    pub fn new(script: PathBuf) -> Self {
        let label = script.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        Self { script, label }
    }

    pub fn ask(&self, verb: &str) -> Result<String> {
        let output = Command::new("bash").arg(&self.script).arg(verb).output().context("start bash")?;
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} {verb}: {said}{errors}", self.script.display());
        Ok(said.trim().to_owned())
    }
}

/// One run of workloads on one subject.
#[derive(Debug)]
pub struct Bench {
    subject: Subject,
    directory: PathBuf,
    sizes: Sizes,
    /// A tree of sources as an archive.
    archive: PathBuf,
    samples: Vec<Sample>,
}

impl Bench {
    /// On a subject that is up. `archive` is what workload f unpacks.
    pub fn new(subject: Subject, sizes: Sizes, archive: PathBuf) -> Result<Self> {
        let mountpoint = PathBuf::from(subject.ask("mountpoint")?);
        let directory = mountpoint.join(format!("bench-{}", std::process::id()));
        fs::create_dir(&directory).with_context(|| format!("make {}", directory.display()))?;
        Ok(Self { subject, directory, sizes, archive, samples: Vec::new() })
    }

    /// Runs those of `workloads`, letters from a to g. What fails is a sample that says so.
    pub fn run(mut self, workloads: &str) -> Vec<Sample> {
        for workload in workloads.chars() {
            let began = std::time::Instant::now();
            let outcome = match workload {
                'a' => self.long_file(),
                'b' => self.random_reads(),
                'c' => self.random_writes(),
                'd' => self.small_files(),
                'e' => self.made_directories(),
                'f' => self.tools(),
                'g' => self.database(),
                _ => Err(anyhow::anyhow!("no such workload")),
            };
            if let Err(error) = outcome {
                self.note_failure(&format!("{workload} as a whole"), &error);
            }
            eprintln!("{}: workload {workload}, {:.0} s", self.subject.label, began.elapsed().as_secs_f64());
        }
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("{}: {error}", self.directory.display());
        }
        self.samples
    }

    fn note(&mut self, metric: &str, unit: Unit, value: f64) {
        let (label, metric) = (self.subject.label.clone(), metric.to_owned());
        self.samples.push(Sample { label, metric, unit, value: Some(value), error: None });
    }

    fn note_failure(&mut self, metric: &str, error: &anyhow::Error) {
        eprintln!("{}: {metric}: {error:#}", self.subject.label);
        let (label, metric, error) = (self.subject.label.clone(), metric.to_owned(), Some(format!("{error:#}")));
        self.samples.push(Sample { label, metric, unit: Unit::Seconds, value: None, error });
    }

    /// Nothing is in any cache.
    fn chill(&self) -> Result<()> {
        run(Path::new("/"), "sync; echo 3 > /proc/sys/vm/drop_caches")?;
        self.subject.ask("remount").map(drop)
    }

    fn on_long_file(&self, direction: &str, arguments: &str) -> Result<FioFigures> {
        let arguments = format!("--size={}M {arguments}", self.sizes.long_file_mib);
        fio(&self.directory, "long", direction, &arguments)
    }

    fn long_file(&mut self) -> Result<()> {
        let megabytes = |figures: FioFigures| figures.bytes_per_second / 1e6;
        let written = self.on_long_file("write", "--rw=write --bs=1M --end_fsync=1")?;
        self.note("a sequential write", Unit::MegabytesPerSecond, megabytes(written));
        self.chill()?;
        let cold = self.on_long_file("read", "--rw=read --bs=1M")?;
        self.note("a sequential read, cold", Unit::MegabytesPerSecond, megabytes(cold));
        let warm = self.on_long_file("read", "--rw=read --bs=1M")?;
        self.note("a sequential read, warm", Unit::MegabytesPerSecond, megabytes(warm));
        Ok(())
    }

    fn make_long_file(&self) -> Result<()> {
        if !self.directory.join("long").exists() {
            self.on_long_file("write", "--rw=write --bs=1M --end_fsync=1")?;
        }
        Ok(())
    }

    fn random_reads(&mut self) -> Result<()> {
        self.make_long_file()?;
        self.chill()?;
        let reads = self.sizes.random_reads / 4;
        let arguments = format!("--rw=randread --bs=4k --numjobs=4 --number_ios={reads} --runtime=10");
        let figures = self.on_long_file("read", &arguments)?;
        self.note("b random reads, cold", Unit::PerSecond, figures.operations_per_second);
        self.note("b random read, cold, p50", Unit::Microseconds, figures.p50_us);
        self.note("b random read, cold, p99", Unit::Microseconds, figures.p99_us);
        Ok(())
    }

    fn random_writes(&mut self) -> Result<()> {
        self.make_long_file()?;
        let seconds = self.sizes.random_seconds;
        let writes = format!("--rw=randwrite --bs=4k --time_based --runtime={seconds}");
        let synced = self.on_long_file("write", &format!("{writes} --fsync=1"))?;
        self.note("c random writes, fsync after each", Unit::PerSecond, synced.operations_per_second);
        let buffered = self.on_long_file("write", &format!("{writes} --end_fsync=1"))?;
        self.note("c random writes, buffered", Unit::PerSecond, buffered.operations / seconds as f64);
        self.note("c random writes, with the final fsync", Unit::PerSecond, buffered.operations_per_second);
        fs::remove_file(self.directory.join("long"))?;
        Ok(())
    }

    fn tree(&self, threads: usize, files: usize, directories: usize) -> Tree {
        let root = self.directory.join(format!("small-{threads}-{files}"));
        let seed = rand::random();
        Tree { root, directories, files, size: SMALL_BYTES, threads, seed }
    }

    fn small_files(&mut self) -> Result<()> {
        for threads in [1, 4] {
            let tree = self.tree(threads, self.sizes.small_files, self.sizes.directories / threads * threads);
            tree.make_directories()?;
            let each = self.small("create", &tree, Act::Create { fsync: false }, tree.files / threads, CREATE_LIMIT)?;
            self.chill()?;
            self.small("stat, cold", &tree, Act::Stat, each, NO_LIMIT)?;
            self.small("stat, warm", &tree, Act::Stat, each, NO_LIMIT)?;
            self.chill()?;
            self.small("read, cold", &tree, Act::Read, each, NO_LIMIT)?;
            if threads == 1 {
                self.listings(&tree.root)?;
            }
            self.small("rename", &tree, Act::Rename, each, NO_LIMIT)?;
            self.small("unlink", &tree, Act::Unlink, each, NO_LIMIT)?;
            fs::remove_dir_all(&tree.root)?;
        }
        let tree = self.tree(1, self.sizes.synced_files, 5);
        tree.make_directories()?;
        self.small("create and fsync", &tree, Act::Create { fsync: true }, tree.files, CREATE_LIMIT)?;
        fs::remove_dir_all(&tree.root)?;
        Ok(())
    }

    /// Returns how many files each thread came to.
    fn small(&mut self, what: &str, tree: &Tree, act: Act, each: usize, limit: Duration) -> Result<usize> {
        let (rate, each) = tree.run(act, each, limit)?;
        self.note(&format!("d {what}, {} thread(s)", tree.threads), Unit::PerSecond, rate);
        Ok(each)
    }

    fn listings(&mut self, root: &Path) -> Result<()> {
        self.chill()?;
        for state in ["cold", "warm"] {
            let (took, said) = run(root, "find . | wc -l")?;
            let entries: f64 = said.trim().parse().context("what wc says")?;
            self.note(&format!("d entries listed, {state}"), Unit::PerSecond, entries / took.as_secs_f64());
        }
        Ok(())
    }

    fn made_directories(&mut self) -> Result<()> {
        let root = self.directory.join("made");
        fs::create_dir(&root)?;
        let (made, removed) = small::directories(&root, self.sizes.made_directories)?;
        self.note("e mkdir", Unit::PerSecond, made);
        self.note("e rmdir", Unit::PerSecond, removed);
        fs::remove_dir(&root)?;
        Ok(())
    }

    fn tools(&mut self) -> Result<()> {
        let git = "export GIT_AUTHOR_NAME=b GIT_AUTHOR_EMAIL=b@example.org GIT_COMMITTER_NAME=b \
                   GIT_COMMITTER_EMAIL=b@example.org GIT_CONFIG_NOSYSTEM=1 HOME=/nonexistent; cd tree";
        let commit = "git init -q . && git config gc.auto 0 && git config maintenance.auto false && git add -A && git commit -q -m x";
        fs::create_dir(self.directory.join("tree"))?;
        run(Path::new("/"), &format!("cat {} > /dev/null; sync", self.archive.display()))?;
        let steps = [
            ("f tar -x and sync", format!("tar -C tree -xf {} && sync", self.archive.display())),
            ("f cp -r", "cp -r tree copy".to_owned()),
            ("f git init, add, commit", format!("{git}; {commit}")),
            ("f git status", format!("{git}; git status --porcelain")),
            ("f rm -rf", "rm -rf copy".to_owned()),
        ];
        for (what, script) in steps {
            let (took, _) = run(&self.directory, &script).context(what)?;
            self.note(what, Unit::Seconds, took.as_secs_f64());
        }
        Ok(())
    }

    fn database(&mut self) -> Result<()> {
        for mode in ["delete", "wal"] {
            let count = self.sizes.transactions;
            let script = format!(
                "{{ echo 'begin;'; echo \"insert into t(v) values('row');\"; echo 'commit;'; }} > one
                 sqlite3 {mode}.db 'pragma journal_mode={mode}; create table t(id integer primary key, v text)' > /dev/null
                 {{ echo 'pragma synchronous=full;'; for i in $(seq {count}); do cat one; done; }} > all"
            );
            run(&self.directory, &script)?;
            let (took, _) = run(&self.directory, &format!("sqlite3 {mode}.db < all"))?;
            let (_, found) =
                run(&self.directory, &format!("sqlite3 {mode}.db 'pragma integrity_check; select count(*) from t'"))?;
            ensure!(found == format!("ok\n{count}\n"), "the database says {found}");
            self.note(&format!("g SQLite transactions, {mode}"), Unit::PerSecond, count as f64 / took.as_secs_f64());
        }
        Ok(())
    }
}

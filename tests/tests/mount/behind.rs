//! Names that a mount makes and takes away before the metadata server knows, and everybody who could notice.

use std::{
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use holdfast_tests::{
    cluster::{Cluster, PATIENCE},
    mount::Mount,
    wait,
};

/// Names that are removed while the server says nothing.
const ROW: usize = 20;

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .expect("list")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn is_there(path: &Path) -> bool {
    match fs::symlink_metadata(path) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => panic!("{}: {error}", path.display()),
    }
}

/// What programs see of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Looks {
    links: u64,
    size: u64,
    changed: (i64, i64),
    modified: (i64, i64),
}

impl Looks {
    fn of(meta: &fs::Metadata) -> Self {
        Self {
            links: meta.nlink(),
            size: meta.size(),
            changed: (meta.ctime(), meta.ctime_nsec()),
            modified: (meta.mtime(), meta.mtime_nsec()),
        }
    }
}

/// A mount that is alone in a directory.
struct Alone {
    // Before its servers, when the test ends.
    mount: Mount,
    cluster: Cluster,
    rounds: usize,
    /// The directory's name.
    work: String,
    /// How the directory looked when all was removed and the server did not know.
    looked: Option<Looks>,
}

impl Alone {
    fn start() -> Self {
        let cluster = Cluster::start();
        let mount = cluster.mount();
        let mut alone = Self { cluster, mount, rounds: 0, work: String::new(), looked: None };
        alone.begin_anew();
        alone
    }

    /// With another directory: where somebody else has looked, the mount has nothing for itself for a while.
    fn begin_anew(&mut self) {
        self.work = format!("work-{}", self.rounds);
        fs::create_dir(self.at("")).expect("mkdir");
    }

    fn at(&self, name: &str) -> PathBuf {
        self.mount.join(&self.work).join(name)
    }

    /// Makes a row of directories, and removes it while the server is stopped; again, until it did not have to wait for that. Returns what
    /// was removed, with the server still stopped.
    fn remove_a_row(&mut self) -> Vec<PathBuf> {
        let make = |path: &Path| fs::create_dir(path).expect("mkdir");
        self.change_a_row(make, |path| fs::remove_dir(path).expect("rmdir"))
    }

    /// The same, of what is made while the server is stopped.
    fn make_a_row(&mut self) -> Vec<PathBuf> {
        let nothing = |_: &Path| {};
        self.change_a_row(nothing, |path| {
            fs::create_dir(path).expect("mkdir");
            fs::create_dir(path.join("inside")).expect("mkdir");
            std::os::unix::fs::symlink("to", path.join("link")).expect("symlink");
        })
    }

    /// Files that are made while the server is stopped, and open.
    fn make_open_files(&mut self) -> Vec<(PathBuf, fs::File)> {
        let mut made = None;
        wait::until("files are made without the server", PATIENCE, || {
            let row = self.begin_row();
            let make = |path: PathBuf| {
                let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path);
                (path, file.expect("create"))
            };
            made = self.do_while_stopped(move || row.into_iter().map(make).collect());
            made.is_some()
        });
        made.expect("they are made")
    }

    fn change_a_row(&mut self, before: fn(&Path), stopped: fn(&Path)) -> Vec<PathBuf> {
        let mut row = Vec::new();
        wait::until("a row is changed without the server", PATIENCE, || {
            row = self.begin_row();
            row.iter().for_each(|path| before(path));
            // So that the server knows of that much.
            let directory = fs::File::open(self.at("")).expect("open");
            directory.sync_all().expect("fsync");
            let changed = row.clone();
            self.looked = self.do_while_stopped(move || {
                changed.iter().for_each(|path| stopped(path));
                Looks::of(&directory.metadata().expect("stat"))
            });
            self.looked.is_some()
        });
        row
    }

    /// Names for another row, in the directory that the mount has for itself again, after a pause.
    fn begin_row(&mut self) -> Vec<PathBuf> {
        self.rounds += 1;
        (0..3).for_each(|number| {
            let path = self.at(&format!("warm-{}-{number}", self.rounds));
            fs::create_dir(&path).expect("mkdir");
            fs::remove_dir(&path).expect("rmdir");
        });
        (0..ROW).map(|number| self.at(&format!("{}-{number:02}", self.rounds))).collect()
    }

    /// The server is stopped after it. `None`: it had to wait, and the server goes on.
    fn do_while_stopped<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        self.cluster.meta().freeze();
        let (tell, told) = mpsc::channel();
        drop(thread::spawn(move || {
            let done = work();
            // Nobody listens any more if it took too long.
            let _late = tell.send(done);
        }));
        let done = told.recv_timeout(Duration::from_millis(400)).ok();
        if done.is_none() {
            self.cluster.meta().thaw();
        }
        done
    }
}

/// "Who removes names in a directory that nobody else looks at waits for no message; whoever looks waits until the server has heard of them."
#[test]
fn what_a_mount_removes_by_itself_nobody_finds_any_more() {
    let mut alone = Alone::start();
    let other = alone.cluster.mount();
    for _ in 0..5 {
        fs::write(alone.at("stays"), b"here").expect("write");
        let row = alone.remove_a_row();
        let looked_for = other.join(&alone.work).join(row[ROW - 1].file_name().expect("a name"));
        let looking = thread::spawn(move || is_there(&looked_for));
        alone.cluster.meta().thaw();
        assert!(!looking.join().expect("a look"), "the last of them is found");
        assert_eq!(names(&other.join(&alone.work)), ["stays"]);
        assert_eq!(names(&alone.at("")), ["stays"]);
        alone.begin_anew();
    }
}

/// "What a mount makes in a directory that nobody else looks at is there for its programs at once, and for whoever looks when the server has heard of it."
#[test]
fn what_a_mount_makes_by_itself_everybody_finds() {
    let mut alone = Alone::start();
    let other = alone.cluster.mount();
    for _ in 0..5 {
        let row = alone.make_a_row();
        let last = other.join(&alone.work).join(row[ROW - 1].file_name().expect("a name"));
        let looked_for = last.clone();
        let looking = thread::spawn(move || is_there(&looked_for));
        alone.cluster.meta().thaw();
        assert!(looking.join().expect("a look"), "the last of them is missing");
        assert_eq!(names(&last), ["inside", "link"]);
        assert_eq!(fs::read_link(last.join("link")).expect("readlink"), Path::new("to"));
        fs::write(last.join("inside/from-b"), b"b").expect("write");
        assert_eq!(fs::read(row[ROW - 1].join("inside/from-b")).expect("read"), b"b");
        let own = |path: &Path| {
            let meta = fs::symlink_metadata(path).expect("stat");
            (meta.ino(), meta.mode(), meta.uid(), meta.nlink())
        };
        for path in &row {
            let inside = other.join(&alone.work).join(path.file_name().expect("a name"));
            assert_eq!(own(path), own(&inside));
        }
        alone.begin_anew();
    }
}

/// "A file that is made in such a directory is open at once: it can be written, and is there for whoever looks."
#[test]
fn files_that_a_mount_makes_by_itself_are_open_and_everybody_finds_them() {
    let mut alone = Alone::start();
    let other = alone.cluster.mount();
    for round in 0..3 {
        let mut files = alone.make_open_files();
        files.iter_mut().for_each(|(_, file)| file.write_all(b"written").expect("write"));
        let last = other.join(&alone.work).join(files[ROW - 1].0.file_name().expect("a name"));
        let looking = thread::spawn(move || is_there(&last));
        alone.cluster.meta().thaw();
        assert!(looking.join().expect("a look"), "the last of them is missing");
        if round == 1 {
            alone.cluster.meta().kill();
            alone.cluster.meta().start();
        }
        for (path, mut file) in files {
            let there = other.join(&alone.work).join(path.file_name().expect("a name"));
            file.sync_all().expect("fsync");
            assert_eq!(fs::read(&there).expect("read"), b"written");
            fs::remove_file(&path).expect("unlink");
            assert!(!is_there(&path));
            let mut read = Vec::new();
            file.rewind().expect("seek");
            file.read_to_end(&mut read).expect("read what has no name");
            assert_eq!(read, b"written");
        }
        alone.begin_anew();
    }
}

#[test]
fn fsync_of_an_empty_file_waits_until_the_server_has_made_it() {
    let mut alone = Alone::start();
    let mut files = alone.make_open_files();
    let (path, file) = files.pop().expect("a file");
    let syncing = thread::spawn(move || file.sync_all());
    alone.cluster.meta().thaw();
    syncing.join().expect("a thread").expect("fsync");
    alone.mount.kill();
    alone.cluster.meta().kill();
    alone.cluster.meta().start();
    let other = alone.cluster.mount();
    assert!(is_there(&other.join(&alone.work).join(path.file_name().expect("a name"))));
}

#[test]
fn what_was_made_survives_the_death_of_a_server_that_did_not_know() {
    let mut alone = Alone::start();
    let row = alone.make_a_row();
    alone.cluster.meta().kill();
    alone.cluster.meta().start();
    let other = alone.cluster.mount();
    for path in &row {
        let there = other.join(&alone.work).join(path.file_name().expect("a name"));
        assert_eq!(names(&there), ["inside", "link"]);
        assert_eq!(names(path), ["inside", "link"]);
    }
}

#[test]
fn a_directory_looks_the_same_before_and_after_the_server_knows() {
    let mut alone = Alone::start();
    alone.remove_a_row();
    let before = alone.looked.expect("it was looked at");
    alone.cluster.meta().thaw();
    let looks = |mount: &Mount| Looks::of(&fs::metadata(mount.join(&alone.work)).expect("stat"));
    assert_eq!(looks(&alone.mount), before);
    let other = alone.cluster.mount();
    assert_eq!(names(&other.join(&alone.work)), [""; 0]);
    assert_eq!(looks(&other), before, "as the server has it");
    assert_eq!(before.links, 2, "no directory is left in it");
}

#[test]
fn what_was_removed_survives_the_death_of_a_server_that_did_not_know() {
    let mut alone = Alone::start();
    fs::write(alone.at("stays"), b"here").expect("write");
    alone.remove_a_row();
    alone.cluster.meta().kill();
    alone.cluster.meta().start();
    let other = alone.cluster.mount();
    assert_eq!(names(&other.join(&alone.work)), ["stays"]);
    assert_eq!(names(&alone.at("")), ["stays"]);
}

/// "A mount that is killed loses what it had removed in the last moments and not yet told: the last of it, and nothing that was synced before."
#[test]
fn a_mount_that_is_killed_loses_the_last_of_what_it_removed() {
    let mut alone = Alone::start();
    let row = alone.remove_a_row();
    alone.mount.kill();
    alone.cluster.meta().thaw();
    let other = alone.cluster.mount();
    let names_of = |row: &[PathBuf]| -> Vec<String> {
        row.iter().map(|path| path.file_name().expect("a name").to_string_lossy().into_owned()).collect()
    };
    let left = names(&other.join(&alone.work));
    assert!((0..=ROW).any(|first| left == names_of(&row[first..])), "{left:?} are not the last of {row:?}");
}

#[test]
fn fsync_of_a_directory_waits_for_what_was_removed_in_it() {
    let mut alone = Alone::start();
    let row = alone.remove_a_row();
    alone.cluster.meta().thaw();
    fs::File::open(alone.at("")).expect("open").sync_all().expect("fsync");
    alone.mount.kill();
    alone.cluster.meta().kill();
    alone.cluster.meta().start();
    let other = alone.cluster.mount();
    assert_eq!(names(&other.join(&alone.work)), [""; 0], "of {row:?}");
}

#[test]
fn a_directory_that_is_not_empty_stays_whoever_filled_it() {
    let cluster = Cluster::start();
    let (a, b) = (cluster.mount(), cluster.mount());
    fs::create_dir(a.join("work")).expect("mkdir");
    for round in 0..100 {
        let name = |what: &str| format!("work/{round}{what}");
        for number in 0..5 {
            fs::create_dir(a.join(name(&format!("-{number}")))).expect("mkdir");
        }
        fs::write(b.join(name("-3/from-b")), b"b").expect("write");
        for number in 0..5 {
            let removed = fs::remove_dir(a.join(name(&format!("-{number}"))));
            match number {
                3 => assert_eq!(removed.expect_err("it is not empty").raw_os_error(), Some(libc::ENOTEMPTY), "{round}"),
                _ => removed.expect("rmdir"),
            }
        }
        assert_eq!(names(&b.join(name("-3"))), ["from-b"]);
    }
}

#[test]
fn a_directory_is_as_full_for_others_as_for_the_mount_that_fills_it() {
    let alone = Alone::start();
    let other = alone.cluster.mount();
    for round in 0..100 {
        let name = format!("{}/{round}", alone.work);
        let (own, theirs) = (alone.mount.join(&name), other.join(&name));
        fs::create_dir(&own).expect("mkdir");
        // It knows the directory from here on, and need not ask for it.
        assert!(is_there(&theirs));
        for warm in 0..3 {
            fs::create_dir(own.join(warm.to_string())).expect("mkdir");
            fs::remove_dir(own.join(warm.to_string())).expect("rmdir");
        }
        fs::create_dir(own.join("n")).expect("mkdir");
        let refused = fs::remove_dir(&theirs).expect_err("it is not empty");
        assert_eq!(refused.raw_os_error(), Some(libc::ENOTEMPTY), "{round}");
        fs::remove_dir(own.join("n")).expect("rmdir");
        fs::remove_dir(&theirs).expect("it is empty");
    }
}

#[test]
fn the_names_that_are_left_of_a_file_are_counted() {
    let alone = Alone::start();
    let at = |name: &str| alone.at(name);
    for round in 0..50 {
        fs::write(at("file"), b"here").expect("write");
        fs::hard_link(at("file"), at("other")).expect("link");
        fs::remove_file(at("file")).expect("unlink");
        assert_eq!(fs::metadata(at("other")).expect("stat").nlink(), 1, "{round}");
        assert_eq!(fs::read(at("other")).expect("read"), b"here");
        fs::remove_file(at("other")).expect("unlink");
        assert_eq!(names(&alone.at("")), [""; 0]);
    }
}

/// A tree as `rm -r` meets it, removed and made again: what is left out or left over would be noticed.
#[test]
fn trees_are_removed_whole_while_another_mount_watches() {
    let alone = Alone::start();
    let other = alone.cluster.mount();
    for round in 0..5 {
        let tree = alone.mount.join(format!("tree-{round}"));
        for directory in 0..10 {
            let inside = tree.join(format!("{directory}/deeper"));
            fs::create_dir_all(&inside).expect("mkdir");
            (0..10).for_each(|file| fs::write(inside.join(file.to_string()), b"x").expect("write"));
        }
        fs::remove_dir_all(&tree).expect("rm -r");
        assert!(!is_there(&other.join(format!("tree-{round}"))));
        assert!(!is_there(&tree));
    }
    assert_eq!(names(other.path()), std::slice::from_ref(&alone.work));
}

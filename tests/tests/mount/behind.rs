//! Names that a mount takes away before the metadata server knows, and everybody who could notice.

use std::{
    fs, io,
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

/// A mount that is alone in `work`.
struct Alone {
    cluster: Cluster,
    mount: Mount,
    rounds: usize,
    /// How the directory looked when all was removed and the server did not know.
    looked: Option<Looks>,
}

impl Alone {
    fn start() -> Self {
        let cluster = Cluster::start();
        let mount = cluster.mount();
        fs::create_dir(mount.join("work")).expect("mkdir");
        Self { cluster, mount, rounds: 0, looked: None }
    }

    /// Makes a row of directories and removes it while the server is stopped; again, until it did not have to wait for that. Returns what
    /// was removed, with the server still stopped.
    fn remove_a_row(&mut self) -> Vec<PathBuf> {
        let mut row = Vec::new();
        wait::until("a row is removed without the server", PATIENCE, || {
            self.rounds += 1;
            row = (0..ROW).map(|number| self.mount.join(format!("work/{}-{number:02}", self.rounds))).collect();
            row.iter().for_each(|path| fs::create_dir(path).expect("mkdir"));
            self.looked = self.remove_while_stopped(row.clone());
            if self.looked.is_none() {
                self.cluster.meta().thaw();
            }
            self.looked.is_some()
        });
        row
    }

    /// `None`: it had to wait.
    fn remove_while_stopped(&self, row: Vec<PathBuf>) -> Option<Looks> {
        let directory = fs::File::open(self.mount.join("work")).expect("open");
        self.cluster.meta().freeze();
        let (tell, told) = mpsc::channel();
        drop(thread::spawn(move || {
            row.iter().for_each(|path| fs::remove_dir(path).expect("rmdir"));
            let looked = Looks::of(&directory.metadata().expect("stat"));
            // Nobody listens any more if it took too long.
            let _late = tell.send(looked);
        }));
        told.recv_timeout(Duration::from_millis(400)).ok()
    }
}

/// "Who removes names in a directory that nobody else looks at waits for no message; whoever looks waits until the server has heard of them."
#[test]
fn what_a_mount_removes_by_itself_nobody_finds_any_more() {
    let mut alone = Alone::start();
    let other = alone.cluster.mount();
    for _ in 0..5 {
        fs::write(alone.mount.join("work/stays"), b"here").expect("write");
        let row = alone.remove_a_row();
        let looked_for = other.join("work").join(row[ROW - 1].file_name().expect("a name"));
        let looking = thread::spawn(move || is_there(&looked_for));
        alone.cluster.meta().thaw();
        assert!(!looking.join().expect("a look"), "the last of them is found");
        assert_eq!(names(&other.join("work")), ["stays"]);
        assert_eq!(names(&alone.mount.join("work")), ["stays"]);
        // The other has looked: for a while the first has nothing for itself, so begin with another directory.
        fs::rename(alone.mount.join("work"), alone.mount.join(format!("done-{}", alone.rounds))).expect("rename");
        fs::create_dir(alone.mount.join("work")).expect("mkdir");
    }
}

#[test]
fn a_directory_looks_the_same_before_and_after_the_server_knows() {
    let mut alone = Alone::start();
    alone.remove_a_row();
    let before = alone.looked.expect("it was looked at");
    alone.cluster.meta().thaw();
    let looks = |mount: &Mount| Looks::of(&fs::metadata(mount.join("work")).expect("stat"));
    assert_eq!(looks(&alone.mount), before);
    let other = alone.cluster.mount();
    assert_eq!(names(&other.join("work")), [""; 0]);
    assert_eq!(looks(&other), before, "as the server has it");
    assert_eq!(before.links, 2, "no directory is left in it");
}

#[test]
fn what_was_removed_survives_the_death_of_a_server_that_did_not_know() {
    let mut alone = Alone::start();
    fs::write(alone.mount.join("work/stays"), b"here").expect("write");
    alone.remove_a_row();
    alone.cluster.meta().kill();
    alone.cluster.meta().start();
    let other = alone.cluster.mount();
    assert_eq!(names(&other.join("work")), ["stays"]);
    assert_eq!(names(&alone.mount.join("work")), ["stays"]);
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
    let left = names(&other.join("work"));
    assert!((0..=ROW).any(|first| left == names_of(&row[first..])), "{left:?} are not the last of {row:?}");
}

#[test]
fn fsync_of_a_directory_waits_for_what_was_removed_in_it() {
    let mut alone = Alone::start();
    let row = alone.remove_a_row();
    alone.cluster.meta().thaw();
    fs::File::open(alone.mount.join("work")).expect("open").sync_all().expect("fsync");
    alone.mount.kill();
    alone.cluster.meta().kill();
    alone.cluster.meta().start();
    let other = alone.cluster.mount();
    assert_eq!(names(&other.join("work")), [""; 0], "of {row:?}");
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
fn the_names_that_are_left_of_a_file_are_counted() {
    let alone = Alone::start();
    let at = |name: &str| alone.mount.join(format!("work/{name}"));
    for round in 0..50 {
        fs::write(at("file"), b"here").expect("write");
        fs::hard_link(at("file"), at("other")).expect("link");
        fs::remove_file(at("file")).expect("unlink");
        assert_eq!(fs::metadata(at("other")).expect("stat").nlink(), 1, "{round}");
        assert_eq!(fs::read(at("other")).expect("read"), b"here");
        fs::remove_file(at("other")).expect("unlink");
        assert_eq!(names(&alone.mount.join("work")), [""; 0]);
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
    assert_eq!(names(other.path()), ["work"]);
}

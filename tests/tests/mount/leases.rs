//! Mounts that answer for names in their directories by themselves, and others that change those.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use holdfast_tests::{
    cluster::{Cluster, PATIENCE},
    mount::Mount,
    sys::OpenDirectory,
    wait,
};

/// What a change waits for a mount that cannot be told any more.
const STALL_MAX: Duration = Duration::from_secs(3);

fn is_there(path: &Path) -> bool {
    match fs::symlink_metadata(path) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => panic!("{}: {error}", path.display()),
    }
}

/// Does the mount know, while the metadata server cannot say anything, that there is no such name?
fn knows_alone(cluster: &Cluster, missing: PathBuf) -> bool {
    is_done_alone(cluster, move || assert!(!is_there(&missing)))
}

/// Is it done soon while the metadata server cannot say anything?
fn is_done_alone(cluster: &Cluster, work: impl FnOnce() + Send + 'static) -> bool {
    cluster.meta().freeze();
    let (tell, told) = mpsc::channel();
    let looking = thread::spawn(move || {
        work();
        // Nobody listens any more if it took too long.
        let _late = tell.send(());
    });
    let knew = told.recv_timeout(Duration::from_millis(300)).is_ok();
    cluster.meta().thaw();
    looking.join().expect("a look that ends");
    knew
}

/// Two mounts, and a directory in which the first of them works and for which it answers by itself.
struct Pair {
    // Before their servers, when the test ends.
    a: Mount,
    b: Mount,
    cluster: Cluster,
}

impl Pair {
    fn start() -> Self {
        let cluster = Cluster::start();
        let (a, b) = (cluster.mount(), cluster.mount());
        fs::create_dir(a.join("work")).expect("mkdir");
        let pair = Self { cluster, a, b };
        pair.work();
        pair
    }

    /// Until the first mount answers for the directory.
    fn work(&self) {
        let mut number = 0;
        wait::until("the mount answers by itself", PATIENCE, || {
            number += 1;
            fs::write(self.a.join(format!("work/own-{number}")), b"own").expect("write");
            knows_alone(&self.cluster, self.a.join("work/missing"))
        });
    }
}

/// "Names in a directory that only one mount changes cost that mount no message to look up; whoever else changes it waits for that mount's answer, and for little more than a second if none comes."
#[test]
fn a_mount_that_works_alone_knows_which_names_there_are_until_another_makes_one() {
    let pair = Pair::start();
    fs::remove_file(pair.a.join("work/own-1")).expect("unlink");
    fs::rename(pair.a.join("work"), pair.a.join("moved")).expect("rename");
    fs::rename(pair.a.join("moved"), pair.a.join("work")).expect("rename");
    pair.work();
    fs::write(pair.b.join("work/missing"), b"from b").expect("write");
    assert_eq!(fs::read(pair.a.join("work/missing")).expect("read"), b"from b");
    fs::remove_file(pair.b.join("work/missing")).expect("unlink");
    // What is there may be believed for a second; what is not, never.
    wait::until("the name is gone", PATIENCE, || !is_there(&pair.a.join("work/missing")));
}

/// "A name that another mount has made is found as soon as that mount was answered."
#[test]
fn what_one_mount_makes_the_other_finds_at_once_however_both_work_in_one_directory() {
    let pair = Pair::start();
    for round in 0..200 {
        let name = |who: &str| format!("work/{who}-{round}");
        // Rows of different lengths, so that the lease changes hands.
        for own in 0..round % 5 {
            fs::create_dir(pair.a.join(format!("work/row-{round}-{own}"))).expect("mkdir");
        }
        assert!(!is_there(&pair.a.join(name("b"))), "{round}");
        fs::create_dir(pair.b.join(name("b"))).expect("mkdir");
        assert!(is_there(&pair.a.join(name("b"))), "{round}");
        assert!(!is_there(&pair.b.join(name("a"))), "{round}");
        fs::rename(pair.a.join(name("b")), pair.a.join(name("a"))).expect("rename");
        assert!(is_there(&pair.b.join(name("a"))), "{round}");
    }
}

/// "Who looks up a few names of a directory is told the others from memory; what another mount has changed there may look as it was for a second, and no longer."
#[test]
fn names_that_another_mount_works_with_are_told_from_memory_for_a_second() {
    let pair = Pair::start();
    let at = |mount: &Mount, number: usize| mount.join(format!("work/file-{number}"));
    (0..100).for_each(|number| fs::write(at(&pair.a, number), b"here").expect("write"));
    let mut first = 0;
    wait::until("names are told from memory", PATIENCE, || {
        // None that the kernel has been told before.
        first = (first + 10) % 90;
        pair.b.remount();
        (first..first + 4).for_each(|number| assert!(is_there(&at(&pair.b, number))));
        let rest: Vec<PathBuf> = (first + 5..first + 10).map(|number| at(&pair.b, number)).collect();
        is_done_alone(&pair.cluster, move || rest.iter().for_each(|path| assert!(is_there(path))))
    });
    for round in 0..5 {
        (0..10).for_each(|number| assert!(is_there(&at(&pair.b, 10 * round + 10 + number))));
        fs::remove_file(at(&pair.a, 10 * round + 19)).expect("unlink");
        fs::set_permissions(at(&pair.a, 10 * round + 18), fs::Permissions::from_mode(0o600)).expect("chmod");
        // Its own changes a mount sees at once.
        fs::rename(at(&pair.b, 10 * round + 17), at(&pair.b, 1000 + round)).expect("rename");
        assert!(!is_there(&at(&pair.b, 10 * round + 17)) && is_there(&at(&pair.b, 1000 + round)));
        thread::sleep(Duration::from_secs(1));
        assert!(!is_there(&at(&pair.b, 10 * round + 19)), "{round}");
        assert_eq!(fs::metadata(at(&pair.b, 10 * round + 18)).expect("stat").mode() & 0o777, 0o600, "{round}");
    }
}

fn names(directory: &Path) -> BTreeSet<OsString> {
    fs::read_dir(directory).expect("list").map(|entry| entry.expect("an entry").file_name()).collect()
}

/// "Who lists a directory sees what other mounts have done in it, however often it was listed before."
#[test]
fn listings_that_the_kernel_keeps_are_true() {
    let pair = Pair::start();
    let at = |mount: &Mount, name: &str| mount.join("work").join(name);
    (0..300).for_each(|number| fs::write(at(&pair.a, &format!("file-{number}")), b"").expect("write"));
    fs::create_dir(at(&pair.a, "inside")).expect("mkdir");
    let mut expected = names(&pair.a.join("work"));
    for round in 0..60 {
        let (own, other) = if round % 3 == 0 { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
        for _ in 0..round % 4 {
            assert_eq!(names(&own.join("work")), expected);
        }
        let (old, new) = (format!("file-{round}"), format!("new-{round}"));
        match round % 5 {
            0 => fs::remove_file(at(other, &old)).expect("unlink"),
            1 => fs::write(at(other, &new), b"").expect("write"),
            2 => fs::rename(at(other, &old), at(other, &new)).expect("rename"),
            3 => fs::rename(at(other, &old), at(other, &format!("file-{}", round + 100))).expect("rename"),
            _ => fs::rename(at(other, &old), at(other, &format!("inside/{old}"))).expect("rename"),
        }
        if round % 5 != 1 {
            expected.remove(OsStr::new(&old));
        }
        if round % 5 == 1 || round % 5 == 2 {
            expected.insert(new.into());
        }
        assert_eq!(names(&own.join("work")), expected, "{round}");
    }
}

#[test]
fn a_directory_that_a_mount_has_for_itself_is_listed_from_memory() {
    let pair = Pair::start();
    let inside = pair.a.join("work/inside");
    fs::create_dir(&inside).expect("mkdir");
    wait::until("it is listed without the server", PATIENCE, || {
        fs::write(inside.join("file"), b"").expect("write");
        fs::remove_file(inside.join("file")).expect("unlink");
        fs::create_dir(inside.join("there")).expect("mkdir");
        let listed = names(&inside);
        // The kernel asks for the directory's time of access after that.
        assert_eq!(names(&inside), listed);
        let again = inside.clone();
        let is_alone = is_done_alone(&pair.cluster, move || assert_eq!(names(&again), listed));
        fs::remove_dir(inside.join("there")).expect("rmdir");
        is_alone
    });
}

/// "Who goes back to the beginning of a directory that is open sees it as it was at most a second ago."
#[test]
fn a_directory_that_stays_open_is_listed_anew() {
    let pair = Pair::start();
    (0..10).for_each(|number| fs::write(pair.a.join(format!("work/file-{number}")), b"").expect("write"));
    let open = |mount: &Mount| OpenDirectory::open(&mount.join("work"));
    let (first, second) = (open(&pair.b), open(&pair.b));
    let before = first.count();
    for number in 0..4 {
        assert_eq!([first.count(), second.count()], [before + number; 2], "{number}");
        fs::write(pair.a.join(format!("work/more-{number}")), b"").expect("write");
        thread::sleep(Duration::from_secs(1));
    }
}

/// `count` directories in `walk`, each with one file.
fn tree(pair: &Pair, count: usize) {
    fs::create_dir(pair.a.join("walk")).expect("mkdir");
    for number in 0..count {
        fs::create_dir(pair.a.join(format!("walk/dir-{number}"))).expect("mkdir");
        fs::write(pair.a.join(format!("walk/dir-{number}/file")), b"").expect("write");
    }
}

/// The directories below, in the order in which a walk comes through them.
fn in_order(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).expect("list").map(|entry| entry.expect("an entry").path()).collect()
}

/// "Who goes through a tree may be told a directory as it was half a second ago; own changes, and those under a lock, are seen at once."
#[test]
fn whoever_goes_through_a_tree_sees_it_as_it_is_but_for_half_a_second() {
    let pair = Pair::start();
    tree(&pair, 16);
    let file = OsString::from("file");
    let both = BTreeSet::from([file.clone(), "more".into()]);
    let lock = |mount: &Mount| {
        let file = fs::File::options().create(true).append(true).open(mount.join("lock")).expect("open");
        file.lock().expect("lock");
        file
    };
    for round in 0..3 {
        let order = in_order(&pair.b.join("walk"));
        let elsewhere = |n: usize| pair.a.join("walk").join(order[n].file_name().expect("a name")).join("more");
        assert_eq!(
            (names(&order[0]), names(&order[1])),
            (BTreeSet::from([file.clone()]), BTreeSet::from([file.clone()]))
        );
        match round {
            0 => fs::write(order[3].join("more"), b"").expect("write"),
            1 => {
                fs::write(elsewhere(3), b"").expect("write");
                thread::sleep(Duration::from_millis(500));
            }
            _ => {
                let held = lock(&pair.a);
                fs::write(elsewhere(3), b"").expect("write");
                drop(held);
                drop(lock(&pair.b));
            }
        }
        assert_eq!(names(&order[3]), both, "{round}");
        fs::remove_file(elsewhere(3)).expect("unlink");
    }
}

#[test]
fn directories_that_come_next_are_asked_for_ahead() {
    let pair = Pair::start();
    tree(&pair, 16);
    wait::until("the next one is listed without the server", PATIENCE, || {
        pair.a.remount();
        let order = in_order(&pair.a.join("walk"));
        assert_eq!(names(&order[0]).len() + names(&order[1]).len(), 2);
        // Until what was asked for is there.
        names(&order[2]);
        names(&order[3]);
        is_done_alone(&pair.cluster, move || assert_eq!(names(&order[4]).len(), 1))
    });
}

#[test]
fn a_directory_that_was_full_before_is_known_whole_after_a_few_looks() {
    let pair = Pair::start();
    for number in 0..3000 {
        fs::create_dir(pair.a.join(format!("work/before-{number}"))).expect("mkdir");
    }
    pair.a.remount();
    let mut number = 0;
    wait::until("the mount answers by itself", PATIENCE, || {
        number += 1;
        fs::create_dir(pair.a.join(format!("work/after-{number}"))).expect("mkdir");
        (0..3).for_each(|missing| assert!(!is_there(&pair.a.join(format!("work/missing-{missing}")))));
        knows_alone(&pair.cluster, pair.a.join("work/missing"))
    });
    for number in 0..3000 {
        assert!(is_there(&pair.a.join(format!("work/before-{number}"))));
        fs::remove_dir(pair.a.join(format!("work/before-{number}"))).expect("rmdir");
        assert!(!is_there(&pair.a.join(format!("work/before-{number}"))));
    }
}

#[test]
fn a_mount_that_is_killed_keeps_others_out_of_its_directories_for_a_moment_only() {
    let pair = Pair::start();
    pair.a.kill();
    let start = Instant::now();
    fs::create_dir(pair.b.join("work/after")).expect("mkdir");
    assert!(start.elapsed() < STALL_MAX, "{:?}", start.elapsed());
}

#[test]
fn a_mount_that_was_stopped_meanwhile_does_not_answer_from_before() {
    let pair = Pair::start();
    for round in 0..3 {
        pair.work();
        pair.a.process().freeze();
        let name = format!("work/while-stopped-{round}");
        fs::create_dir(pair.b.join(&name)).expect("mkdir");
        pair.a.process().thaw();
        assert!(is_there(&pair.a.join(&name)), "{round}");
    }
}

#[test]
fn a_restart_of_the_metadata_server_ends_what_mounts_may_say_by_themselves() {
    let pair = Pair::start();
    for round in 0..3 {
        pair.work();
        pair.cluster.meta().kill();
        pair.cluster.meta().start();
        let name = format!("work/after-restart-{round}");
        fs::create_dir(pair.b.join(&name)).expect("mkdir");
        assert!(is_there(&pair.a.join(&name)), "{round}");
    }
}

//! Advisory locks: flock, fcntl and open-file-description locks, on one mount as on ext4, and between mounts.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use holdfast_tests::{
    cluster::{Cluster, Options, temp_dir},
    mount::Mount,
    process, shell, sys, wait,
};

/// What is not answered within this waits.
const SOON: Duration = Duration::from_millis(700);
const LIMIT: Duration = Duration::from_secs(30);

/// A process of its own that locks what it is told.
struct Locker {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
}

impl Locker {
    fn start() -> Self {
        let mut command = process::binary("locker");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        sys::die_with_parent(&mut command);
        let mut child = command.spawn().expect("start a locker");
        let orders = child.stdin.take().expect("piped");
        let output: ChildStdout = child.stdout.take().expect("piped");
        let (sender, answers) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, orders, answers }
    }

    /// One that has `path` open as `f`.
    fn on(path: &Path) -> Self {
        let mut locker = Self::start();
        locker.ok(&format!("open f {}", path.display()));
        locker
    }

    fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").expect("order");
    }

    fn ask(&mut self, order: &str) -> String {
        self.order(order);
        self.answers.recv_timeout(LIMIT).unwrap_or_else(|error| panic!("{order}: {error}"))
    }

    #[track_caller]
    fn ok(&mut self, order: &str) -> String {
        let answer = self.ask(order);
        let value = answer.strip_prefix("ok").unwrap_or_else(|| panic!("{order}: {answer}"));
        value.trim_start().to_owned()
    }

    #[track_caller]
    fn fails(&mut self, order: &str, errno: i32) {
        assert_eq!(self.ask(order), errno.to_string(), "{order}");
    }

    /// Gives an order that is not carried out yet.
    #[track_caller]
    fn waits(&mut self, order: &str) {
        self.order(order);
        let answer = self.answers.recv_timeout(SOON);
        assert_eq!(answer, Err(RecvTimeoutError::Timeout), "{order} did not wait");
    }

    /// The order that waited has been carried out.
    #[track_caller]
    fn answers(&mut self, expected: &str) {
        assert_eq!(self.answers.recv_timeout(LIMIT).expect("an answer"), expected);
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("it dies");
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        // It may have been killed already.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

fn flock(operation: i32) -> String {
    format!("flock f {operation}")
}

const FLOCK_EX: i32 = libc::LOCK_EX;
const FLOCK_EX_NOW: i32 = libc::LOCK_EX | libc::LOCK_NB;
const FLOCK_SH_NOW: i32 = libc::LOCK_SH | libc::LOCK_NB;

/// `first..first+length` (0: to the end of the file) with an fcntl command.
fn setlk(command: i32, kind: i32, first: u64, length: u64) -> String {
    format!("setlk f {command} {kind} {first} {length}")
}

fn take(first: u64, length: u64) -> String {
    setlk(libc::F_SETLK, libc::F_WRLCK, first, length)
}

fn wait_for(first: u64, length: u64) -> String {
    setlk(libc::F_SETLKW, libc::F_WRLCK, first, length)
}

fn let_go(first: u64, length: u64) -> String {
    setlk(libc::F_SETLK, libc::F_UNLCK, first, length)
}

/// Two mounts of one cluster, and a file on each: the same.
struct Pair {
    a: Mount,
    b: Mount,
    /// Last: the mounts need it to end.
    cluster: Cluster,
}

impl Pair {
    fn start() -> Self {
        let cluster = Cluster::start();
        let (a, b) = (cluster.mount(), cluster.mount());
        fs::write(a.join("file"), "0123456789").expect("make the file");
        Self { a, b, cluster }
    }

    fn lockers(&self) -> (Locker, Locker) {
        (Locker::on(&self.a.join("file")), Locker::on(&self.b.join("file")))
    }
}

/// Everything that does not need two mounts, on any two paths to one file.
fn locks_behave(here: &Path, there: &Path) {
    // Exclusive excludes, shared does not.
    let (mut a, mut b) = (Locker::on(here), Locker::on(there));
    a.ok(&flock(FLOCK_EX_NOW));
    b.fails(&flock(FLOCK_SH_NOW), libc::EWOULDBLOCK);
    a.ok(&flock(FLOCK_SH_NOW));
    b.ok(&flock(FLOCK_SH_NOW));
    // A conversion that fails has let go of what there was.
    b.fails(&flock(FLOCK_EX_NOW), libc::EWOULDBLOCK);
    a.ok(&flock(FLOCK_EX_NOW));
    a.ok(&flock(libc::LOCK_UN));

    // Ranges are independent, and are split and joined.
    a.ok(&take(0, 100));
    a.ok(&let_go(40, 20));
    b.ok(&take(40, 20));
    b.fails(&take(39, 1), libc::EAGAIN);
    b.fails(&take(60, 0), libc::EAGAIN);
    assert_eq!(
        b.ok(&format!("getlk f {} {} 0 0", libc::F_GETLK, libc::F_WRLCK))
            .rsplit_once(' ')
            .map(|(lock, _)| lock.to_owned()),
        Some(format!("{} 0 40", libc::F_WRLCK))
    );
    assert_eq!(
        b.ok(&format!("getlk f {} {} 40 20", libc::F_GETLK, libc::F_WRLCK)),
        format!("{} 40 20 0", libc::F_UNLCK)
    );

    // flock and fcntl do not know each other, also of the whole file, also of one program.
    a.ok(&let_go(0, 0));
    b.ok(&let_go(0, 0));
    a.ok(&flock(FLOCK_EX_NOW));
    a.ok(&take(0, 0));
    b.fails(&flock(FLOCK_EX_NOW), libc::EWOULDBLOCK);
    b.fails(&take(0, 0), libc::EAGAIN);
    a.ok(&let_go(0, 0));
    b.ok(&take(0, 0));
    b.fails(&flock(FLOCK_EX_NOW), libc::EWOULDBLOCK);
    a.ok(&flock(libc::LOCK_UN));
    b.ok(&flock(FLOCK_EX_NOW));
    drop((a, b));

    // A process's locks go with the close of any descriptor; an open file's with its last one.
    let (mut a, mut b) = (Locker::on(here), Locker::on(there));
    let ofd = |kind| setlk(libc::F_OFD_SETLK, kind, 0, 5);
    a.ok(&format!("open other {}", here.display()));
    a.ok("dup f again");
    a.ok(&take(20, 5));
    a.ok(&ofd(libc::F_WRLCK));
    a.ok(&flock(FLOCK_EX_NOW));
    a.ok("close other");
    b.ok(&take(20, 5));
    b.fails(&ofd(libc::F_RDLCK), libc::EAGAIN);
    b.fails(&take(4, 1), libc::EAGAIN);
    a.ok("close f");
    b.fails(&ofd(libc::F_RDLCK), libc::EAGAIN);
    b.fails(&flock(FLOCK_SH_NOW), libc::EWOULDBLOCK);
    a.ok("close again");
    wait::until("the open file's locks are gone", LIMIT, || b.ask(&ofd(libc::F_WRLCK)) == "ok");
    wait::until("the flock is gone", LIMIT, || b.ask(&flock(FLOCK_EX_NOW)) == "ok");
    drop((a, b));

    waiting_behaves(here, there);
}

fn waiting_behaves(here: &Path, there: &Path) {
    // Who waits gets it, in the order of asking, and when the holder dies.
    let (mut a, mut b) = (Locker::on(here), Locker::on(there));
    let mut c = Locker::on(here);
    a.ok(&flock(FLOCK_EX));
    b.waits(&flock(FLOCK_EX));
    c.waits(&flock(libc::LOCK_SH));
    a.ok(&flock(libc::LOCK_UN));
    b.answers("ok");
    a.waits(&flock(libc::LOCK_SH));
    b.kill();
    c.answers("ok");
    a.answers("ok");
    drop((a, c));

    // A signal with a handler ends the wait, or (SA_RESTART) does not; a killed process is gone at once.
    let (mut a, mut b) = (Locker::on(here), Locker::on(there));
    a.ok(&take(0, 10));
    b.ok("alarm 300 once");
    b.fails(&wait_for(0, 10), libc::EINTR);
    b.ok("alarm 300 again");
    b.waits(&wait_for(0, 10));
    a.ok(&let_go(0, 0));
    b.answers("ok");
    a.waits(&wait_for(5, 10));
    a.kill();
    let mut a = Locker::on(here);
    b.ok(&let_go(0, 0));
    a.ok(&take(0, 100));
    drop((a, b));

    // A circle is refused to who would close it, over two files.
    let (mut a, mut b) = (Locker::on(here), Locker::on(there));
    let open = |locker: &mut Locker, path: &Path| locker.ok(&format!("open g {}.2", path.display()));
    open(&mut a, here);
    open(&mut b, there);
    let on_g = |order: String| order.replacen(" f ", " g ", 1);
    a.ok(&take(0, 1));
    b.ok(&on_g(take(0, 1)));
    b.waits(&wait_for(0, 1));
    a.fails(&on_g(wait_for(0, 1)), libc::EDEADLK);
    a.ok(&let_go(0, 1));
    b.answers("ok");
}

#[test]
fn the_script_of_locks_is_right_about_a_local_filesystem() {
    let dir = temp_dir();
    locks_behave(&dir.path().join("file"), &dir.path().join("file"));
}

/// "flock(2), fcntl(2) and open-file-description locks work as on a local disk: kinds, ranges, conversions, what ends them, EDEADLK, EINTR."
#[test]
fn locks_on_one_mount_are_as_on_a_local_filesystem() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    locks_behave(&mount.join("file"), &mount.join("file"));
}

/// "They do so between mounts."
#[test]
fn locks_between_two_mounts_are_as_on_a_local_filesystem() {
    let pair = Pair::start();
    locks_behave(&pair.a.join("file"), &pair.b.join("file"));
}

#[test]
fn who_takes_a_lock_sees_what_the_last_holder_wrote() {
    let pair = Pair::start();
    let (mut a, mut b) = pair.lockers();
    for (round, order) in [FLOCK_EX, libc::LOCK_EX].into_iter().cycle().take(20).enumerate() {
        let (writer, reader) = if round % 2 == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
        let (locked, unlocked) = match round % 4 {
            0 | 1 => (flock(order), flock(libc::LOCK_UN)),
            _ => (wait_for(0, 0), let_go(0, 0)),
        };
        writer.ok(&locked);
        writer.ok(&format!("write f 0 round-{round:03}-{}", "x".repeat(round)));
        writer.ok(&unlocked);
        reader.ok(&locked);
        assert_eq!(reader.ok("read f 0 100"), format!("round-{round:03}-{}", "x".repeat(round)).as_str());
        reader.ok(&unlocked);
    }
}

/// "Who takes a lock sees names, attributes and data of all files as the last holder left them."
#[test]
fn who_takes_a_lock_sees_names_attributes_and_other_files_as_the_last_holder_left_them() {
    let pair = Pair::start();
    fs::create_dir(pair.a.join("dir")).expect("make a directory");
    fs::write(pair.a.join("dir/data"), "old content").expect("write");
    fs::write(pair.a.join("dir/moved"), "moved").expect("write");
    let (mut a, mut b) = pair.lockers();
    b.ok(&format!("open data {}", pair.b.join("dir/data").display()));
    let look = || {
        let of = |name: &str| {
            fs::symlink_metadata(pair.b.join("dir").join(name)).ok().map(|it| (it.len(), it.permissions().mode()))
        };
        ["data", "moved", "new"].map(of)
    };
    for round in 0..5 {
        b.ok(&wait_for(0, 0));
        // Now they are in this mount's caches.
        let before = look();
        b.ok("read data 0 100");
        b.ok(&let_go(0, 0));
        a.ok(&wait_for(0, 0));
        let data = format!("content of round {round}, {}", "longer".repeat(round));
        fs::write(pair.a.join("dir/data"), &data).expect("write");
        fs::set_permissions(
            pair.a.join("dir/data"),
            fs::Permissions::from_mode(0o600 + u32::try_from(round).expect("few")),
        )
        .expect("chmod");
        let (from, to) = if round % 2 == 0 { ("moved", "new") } else { ("new", "moved") };
        fs::rename(pair.a.join("dir").join(from), pair.a.join("dir").join(to)).expect("rename");
        a.ok(&let_go(0, 0));
        b.ok(&wait_for(0, 0));
        let after = look();
        assert_ne!(before[0], after[0], "round {round}");
        assert_eq!(after[0].map(|(length, _)| length), Some(data.len() as u64), "round {round}");
        assert_eq!([after[1].is_some(), after[2].is_some()], [round % 2 == 1, round % 2 == 0], "round {round}");
        assert_eq!(b.ok("read data 0 1000"), data, "an open file, round {round}");
        b.ok(&let_go(0, 0));
    }
}

/// "What was written under an exclusive lock, to whichever file, is stored before the lock is let go, changed to a shared one, or closed."
#[test]
fn what_is_written_under_a_lock_is_there_for_the_next_holder_whatever_lets_it_go() {
    let pair = Pair::start();
    let (mut a, mut b) = pair.lockers();
    let data = pair.a.join("data");
    fs::write(&data, "nothing").expect("make the data");
    a.ok(&format!("open data {}", data.display()));
    b.ok(&format!("open data {}", pair.b.join("data").display()));
    // To another file than the locked one, which stays open, let go by each way there is.
    let ways = [
        (flock(FLOCK_EX), flock(libc::LOCK_UN), flock(libc::LOCK_SH)),
        (flock(FLOCK_EX), flock(libc::LOCK_SH), flock(libc::LOCK_SH)),
        (wait_for(0, 0), let_go(0, 0), wait_for(0, 0)),
        (wait_for(0, 0), setlk(libc::F_SETLK, libc::F_RDLCK, 0, 0), setlk(libc::F_SETLKW, libc::F_RDLCK, 0, 0)),
        (
            setlk(libc::F_OFD_SETLKW, libc::F_WRLCK, 0, 5),
            "close f".to_owned(),
            setlk(libc::F_OFD_SETLKW, libc::F_RDLCK, 0, 5),
        ),
    ];
    for (round, (take, leave, take_over)) in ways.into_iter().enumerate() {
        a.ok(&take);
        a.ok(&format!("write data 0 written-{round}"));
        a.ok(&leave);
        b.ok(&take_over);
        assert_eq!(b.ok("read data 0 9"), format!("written-{round}"), "{leave}");
        for locker in [&mut a, &mut b] {
            locker.ask(&flock(libc::LOCK_UN));
            locker.ask(&let_go(0, 0));
        }
    }
}

#[test]
fn locks_are_of_who_took_them_not_of_who_closes_something_later() {
    let pair = Pair::start();
    let (mut a, mut b) = pair.lockers();
    // The locks of a process that has gone and come again are new ones: its old descriptor's end does not touch them.
    for _ in 0..20 {
        a.ok(&take(0, 0));
        a.ok(&format!("write f 0 {}", "x".repeat(5000)));
        a.ok(&format!("open again {}", pair.a.join("file").display()));
        a.ok("close f");
        a.ok("dup again f");
        a.ok("close again");
        a.ok(&take(0, 0));
        b.fails(&take(0, 0), libc::EAGAIN);
    }
    // A wait that was given up leaves nothing behind.
    for _ in 0..5 {
        b.ok("alarm 60 once");
        b.fails(&wait_for(0, 0), libc::EINTR);
    }
    a.ok(&let_go(0, 0));
    a.ok(&take(0, 0));
    a.ok(&let_go(0, 0));
    let mut killed = Locker::on(&pair.b.join("file"));
    a.ok(&flock(FLOCK_EX));
    killed.waits(&flock(FLOCK_EX));
    killed.kill();
    a.ok(&flock(libc::LOCK_UN));
    wait::until("nobody has the lock", LIMIT, || a.ask(&flock(FLOCK_EX_NOW)) == "ok");
}

/// "So has one that does not come back within the recovery window (`recovery_window_secs`) after a restart of the metadata server."
#[test]
fn a_mount_that_was_away_while_the_server_restarted_has_lost_its_locks() {
    let pair = Pair::start();
    let (mut a, mut b) = pair.lockers();
    a.ok(&wait_for(0, 0));
    a.ok("write f 0 old");
    pair.a.process().freeze();
    pair.cluster.meta().kill();
    pair.cluster.meta().start();
    // Longer than the grace for mounts to come back; shorter than their sessions.
    b.ok(&wait_for(0, 0));
    b.ok("write f 0 new");
    b.ok(&let_go(0, 0));
    pair.a.process().thaw();
    wait::until("the mount knows that its lock is lost", LIMIT, || a.ask("write f 0 bad") == libc::EIO.to_string());
    b.ok(&wait_for(0, 0));
    assert_eq!(b.ok("read f 0 3"), "new");
}

#[test]
fn a_counter_under_a_lock_loses_no_count_on_two_mounts() {
    const ROUNDS: u32 = 60;
    let pair = Pair::start();
    fs::write(pair.a.join("counter"), "0").expect("make the counter");
    let count = |path: PathBuf, by_range: bool| {
        thread::spawn(move || {
            let mut locker = Locker::on(&path);
            for _ in 0..ROUNDS {
                locker.ok(&if by_range { wait_for(0, 1) } else { wait_for(0, 0) });
                let value: u32 = locker.ok("read f 0 20").parse().expect("a count");
                locker.ok(&format!("write f 0 {}", value + 1));
                locker.ok(&let_go(0, 0));
            }
        })
    };
    let counters = [
        count(pair.a.join("counter"), false),
        count(pair.b.join("counter"), true),
        count(pair.a.join("counter"), true),
        count(pair.b.join("counter"), false),
    ];
    for counter in counters {
        counter.join().expect("a counter counted");
    }
    let total = fs::read_to_string(pair.a.join("counter")).expect("read");
    assert_eq!(total, (4 * ROUNDS).to_string());
}

/// As Samba's ping_pong does with which administrators try the locks of cluster filesystems: each process takes the next byte's
/// lock before it lets the last one go, round and round, and counts every byte up while it holds its lock. One lock more than
/// processes: somebody can always go on, so nobody may hear of a deadlock.
#[test]
fn processes_that_chase_each_other_around_a_ring_of_locks_never_stop_or_miscount() {
    const PROCESSES: usize = 3;
    const STEPS: usize = 80;
    let pair = Pair::start();
    let ring = PROCESSES + 1;
    fs::write(pair.a.join("ring"), "000 ".repeat(ring)).expect("write");
    let chasers: Vec<_> = (0..PROCESSES)
        .map(|number| {
            let path = if number % 2 == 0 { pair.a.join("ring") } else { pair.b.join("ring") };
            thread::spawn(move || {
                let mut chaser = Locker::on(&path);
                let at = |step: usize| (step % ring) as u64 * 4;
                chaser.ok(&wait_for(at(0), 3));
                for step in 0..STEPS {
                    chaser.ok(&wait_for(at(step + 1), 3));
                    let count: usize = chaser.ok(&format!("read f {} 3", at(step))).parse().expect("a count");
                    chaser.ok(&format!("write f {} {:03}", at(step), count + 1));
                    chaser.ok(&let_go(at(step), 3));
                }
                chaser.ok(&let_go(0, 0));
            })
        })
        .collect();
    chasers.into_iter().for_each(|chaser| chaser.join().expect("a chaser got around"));
    let counted = fs::read_to_string(pair.b.join("ring")).expect("read");
    assert_eq!(counted, format!("{:03} ", PROCESSES * STEPS / ring).repeat(ring));
}

/// "Locks outlive a restart of the metadata server, and who waits goes on waiting."
#[test]
fn locks_outlive_the_metadata_server_and_waiters_go_on_waiting() {
    let pair = Pair::start();
    let (mut a, mut b) = pair.lockers();
    a.ok(&flock(FLOCK_EX));
    a.ok(&take(0, 10));
    b.waits(&wait_for(5, 10));
    pair.cluster.meta().kill();
    pair.cluster.meta().start();
    let mut late = Locker::on(&pair.b.join("file"));
    late.fails(&flock(FLOCK_EX_NOW), libc::EWOULDBLOCK);
    late.fails(&take(0, 1), libc::EAGAIN);
    late.ok(&take(20, 1));
    a.ok(&let_go(0, 0));
    b.answers("ok");
    a.ok(&flock(libc::LOCK_UN));
    late.ok(&flock(FLOCK_EX_NOW));
}

/// "The locks of a mount that dies are free when its session ends (60 seconds, `session_timeout_secs`)."
#[test]
fn the_locks_of_a_mount_that_dies_are_free_when_its_session_ends() {
    let cluster = Cluster::prepare(&Options::default());
    cluster.set("meta/meta.toml", "session_timeout_secs", 5);
    cluster.start_daemons();
    let (a, b) = (cluster.mount(), cluster.mount());
    let (mut holder, mut waiter) = (Locker::on(&a.join("file")), Locker::on(&b.join("file")));
    holder.ok(&flock(FLOCK_EX));
    waiter.waits(&flock(FLOCK_EX));
    a.kill();
    waiter.answers("ok");
}

/// Takes the lock and lets it go so often that the server lets the mount decide by itself.
fn use_alone(locker: &mut Locker) {
    for _ in 0..4 {
        locker.ok(&take(0, 10));
        locker.ok(&let_go(0, 0));
    }
}

/// "A file whose locks only one mount uses costs no message to lock: others who want them have to wait for no more than that mount's answer."
#[test]
fn a_mount_that_locks_a_file_alone_needs_no_server_for_it_until_another_mount_asks() {
    let pair = Pair::start();
    let (mut a, mut b) = pair.lockers();
    let mut beside = Locker::on(&pair.a.join("file"));
    use_alone(&mut a);
    pair.cluster.meta().freeze();
    a.ok(&take(0, 10));
    a.ok(&let_go(5, 0));
    a.ok(&setlk(libc::F_SETLK, libc::F_RDLCK, 3, 2));
    beside.ok(&take(5, 5));
    assert_eq!(
        beside.ok(&format!("getlk f {} {} 0 0", libc::F_GETLK, libc::F_WRLCK)),
        format!("{} 0 3 {}", libc::F_WRLCK, a.pid())
    );
    a.ok(&flock(FLOCK_EX_NOW));
    pair.cluster.meta().thaw();
    // All that was granted meanwhile holds for the other mount, and for who waits on the same.
    b.fails(&take(0, 1), libc::EAGAIN);
    b.fails(&take(4, 1), libc::EAGAIN);
    b.ok(&setlk(libc::F_SETLK, libc::F_RDLCK, 4, 1));
    b.fails(&take(9, 1), libc::EAGAIN);
    b.ok(&take(10, 0));
    b.fails(&flock(FLOCK_SH_NOW), libc::EWOULDBLOCK);
    b.waits(&wait_for(0, 3));
    a.ok(&let_go(0, 0));
    b.answers("ok");
}

#[test]
fn thousands_of_ranges_of_one_file_are_locked_and_let_go_whoever_decides() {
    const RANGES: u64 = 3000;
    let pair = Pair::start();
    let (mut a, mut b) = pair.lockers();
    use_alone(&mut a);
    (0..RANGES).for_each(|number| drop(a.ok(&take(2 * number, 1))));
    b.fails(&take(2 * RANGES - 2, 1), libc::EAGAIN);
    b.ok(&take(2 * RANGES - 1, 1));
    b.fails(&take(0, 1), libc::EAGAIN);
    b.ok(&let_go(0, 0));
    // One range for a moment, and then again as many pieces.
    a.ok(&take(0, 2 * RANGES));
    (0..RANGES).for_each(|number| drop(a.ok(&let_go(2 * number, 1))));
    b.ok(&take(RANGES, 1));
    b.fails(&take(RANGES + 1, 1), libc::EAGAIN);
    a.kill();
    b.ok(&wait_for(0, 0));
}

/// "A mount that does not answer is taken to hold all locks of a file that it alone has used."
#[test]
fn a_mount_that_does_not_answer_may_hold_what_it_decided_on() {
    let pair = Pair::start();
    let (mut a, mut b) = pair.lockers();
    use_alone(&mut a);
    pair.a.process().freeze();
    b.fails(&take(0, 1), libc::EAGAIN);
    b.waits(&flock(FLOCK_EX));
    pair.a.process().thaw();
    b.answers("ok");
    b.ok(&take(0, 1));
    a.fails(&take(0, 1), libc::EAGAIN);
}

#[test]
fn a_lock_that_a_mount_granted_itself_is_free_when_its_process_dies_while_no_server_answers() {
    let cluster = Cluster::start();
    let (a, b) = (cluster.mount_with(&["io_timeout=2"]), cluster.mount());
    let (mut holder, mut beside) = (Locker::on(&a.join("file")), Locker::on(&a.join("file")));
    use_alone(&mut holder);
    holder.ok(&take(0, 10));
    cluster.meta().freeze();
    // From then on the mount is not certain any more that it may decide.
    wait::until("the mount has to ask", LIMIT, || beside.ask(&take(20, 1)) != "ok");
    holder.kill();
    // The mount's attempts to say so have all ended when one that began after them has.
    assert_ne!(beside.ask(&take(30, 1)), "ok");
    cluster.meta().thaw();
    let mut other = Locker::on(&b.join("file"));
    other.ok(&wait_for(0, 10));
}

#[test]
fn locks_that_a_mount_granted_itself_outlive_the_metadata_server() {
    let pair = Pair::start();
    let (mut a, mut b) = pair.lockers();
    use_alone(&mut a);
    a.ok(&take(0, 10));
    a.ok(&flock(FLOCK_EX));
    pair.cluster.meta().kill();
    a.ok(&take(10, 10));
    pair.cluster.meta().start();
    b.fails(&take(5, 1), libc::EAGAIN);
    b.fails(&take(15, 1), libc::EAGAIN);
    b.fails(&flock(FLOCK_SH_NOW), libc::EWOULDBLOCK);
    b.ok(&take(20, 1));
    a.kill();
    b.ok(&wait_for(0, 0));
    b.ok(&flock(FLOCK_EX));
}

#[test]
fn locks_that_a_dead_mount_granted_itself_are_free_when_its_session_ends() {
    let cluster = Cluster::prepare(&Options::default());
    cluster.set("meta/meta.toml", "session_timeout_secs", 5);
    cluster.start_daemons();
    let (a, b) = (cluster.mount(), cluster.mount());
    let (mut holder, mut waiter) = (Locker::on(&a.join("file")), Locker::on(&b.join("file")));
    use_alone(&mut holder);
    holder.ok(&take(0, 10));
    a.kill();
    waiter.fails(&take(0, 1), libc::EAGAIN);
    waiter.ok(&wait_for(0, 1));
}

/// What one process waits for under a lock that only its mount knows is a circle for the other mount too.
#[test]
fn a_circle_over_locks_that_mounts_granted_themselves_is_refused() {
    let pair = Pair::start();
    let (mut a, mut b) = (Locker::on(&pair.a.join("first")), Locker::on(&pair.b.join("second")));
    use_alone(&mut a);
    use_alone(&mut b);
    a.ok(&take(0, 1));
    b.ok(&take(0, 1));
    a.ok(&format!("open g {}", pair.a.join("second").display()));
    b.ok(&format!("open g {}", pair.b.join("first").display()));
    a.waits(&wait_for(0, 1).replacen(" f ", " g ", 1));
    b.fails(&wait_for(0, 1).replacen(" f ", " g ", 1), libc::EDEADLK);
    b.ok(&let_go(0, 0));
    a.answers("ok");
}

/// "A mount that was cut off for so long has lost its locks: what is open of those files answers EIO, and what was written under them is not stored."
#[test]
fn a_mount_that_lost_its_locks_while_it_was_cut_off_does_not_write_under_them() {
    let cluster = Cluster::prepare(&Options::default());
    cluster.set("meta/meta.toml", "session_timeout_secs", 5);
    cluster.start_daemons();
    let (a, b) = (cluster.mount(), cluster.mount());
    let (mut lost, mut other) = (Locker::on(&a.join("file")), Locker::on(&b.join("file")));
    lost.ok(&flock(FLOCK_EX));
    lost.ok("write f 0 old");
    lost.ok(&format!("open unlocked {}", a.join("elsewhere").display()));
    a.process().freeze();
    other.ok(&flock(FLOCK_EX));
    other.ok("write f 0 new");
    a.process().thaw();
    wait::until("the mount knows that its lock is lost", LIMIT, || lost.ask("write f 0 bad") == libc::EIO.to_string());
    lost.fails("read f 0 3", libc::EIO);
    lost.fails(&flock(FLOCK_SH_NOW), libc::EIO);
    lost.ok("write unlocked 0 fine");
    lost.ok(&format!("open again {}", a.join("file").display()));
    other.ok(&flock(libc::LOCK_UN));
    lost.ok(&format!("flock again {FLOCK_EX}"));
    assert_eq!(lost.ok("read again 0 3"), "new");
}

/// "A process that is killed dies at once, whatever it waits for."
#[test]
fn a_killed_process_dies_though_the_servers_do_not_answer() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    fs::write(mount.join("file"), "content").expect("write");
    let mut blocked = Locker::on(&mount.join("file"));
    cluster.meta().freeze();
    blocked.waits(&format!("open other {}", mount.join("new").display()));
    let pid = blocked.pid();
    assert!(sys::kill(pid, libc::SIGKILL));
    wait::until("the process is dead", Duration::from_secs(5), || {
        fs::read_to_string(format!("/proc/{pid}/status")).map_or(true, |status| status.contains("State:\tZ"))
    });
    cluster.meta().thaw();
    drop(blocked);
    wait::until("nothing stays open", LIMIT, || cluster.status().open_files() == 0);
}

/// "Databases that rely on locks can be used from several mounts at once."
#[test]
fn two_sqlite_programs_on_two_mounts_lose_nothing() {
    let pair = Pair::start();
    let insert = |mount: &Mount, name: &str| {
        let (path, name) = (mount.path().to_owned(), name.to_owned());
        thread::spawn(move || {
            let script = format!(
                "for i in $(seq 25); do sqlite3 -cmd '.timeout 60000' db \"insert into t values('{name}', $i)\" || exit 1; done"
            );
            shell::run(&path, &script);
        })
    };
    shell::run(pair.a.path(), "sqlite3 db 'create table t(who text, number int)'");
    let programs = [insert(&pair.a, "a"), insert(&pair.b, "b"), insert(&pair.a, "c")];
    for program in programs {
        program.join().expect("a program inserted");
    }
    for mount in [&pair.a, &pair.b] {
        let found = shell::run(
            mount.path(),
            "sqlite3 db 'pragma integrity_check; select count(*), count(distinct who || number) from t'",
        );
        assert_eq!(found.trim(), "ok\n75|75");
    }
}

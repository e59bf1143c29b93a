//! How a mount ends when nobody asked it to: killed, forced, or taken away lazily.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use holdfast_tests::{cluster::Cluster, mount, sys, wait};

/// Who waited for a mount that is gone hears of it within this; far less than any deadline of an operation.
const AT_ONCE: Duration = Duration::from_secs(3);

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.expect_err("refused").raw_os_error().expect("an errno")
}

/// Looks for a name that no cache knows, on a thread of its own; back when the request is on its way.
fn ask_in_the_background(directory: &Path) -> thread::JoinHandle<(io::Result<fs::Metadata>, Instant)> {
    let path = directory.join("asked for");
    let asking = thread::spawn(move || (fs::metadata(path), Instant::now()));
    let is_waiting = || {
        let tasks = fs::read_dir("/proc/self/task").expect("list threads");
        tasks.flatten().any(|task| {
            fs::read_to_string(task.path().join("wchan")).is_ok_and(|at| at.contains("request_wait_answer"))
        })
    };
    wait::until("the request waits for its answer", AT_ONCE, is_waiting);
    asking
}

/// "When the mount process is killed, whoever waits hears of it at once, everything else answers ENOTCONN, and it can be mounted again."
#[test]
fn a_killed_mount_says_so_at_once_and_can_be_mounted_again() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let path = mount.join("file");
    fs::write(&path, "stored").expect("write");
    let open = File::open(&path).expect("open");
    open.sync_all().expect("fsync");
    cluster.meta().freeze();
    let asking = ask_in_the_background(mount.path());
    let killed = Instant::now();
    mount.process().kill();
    let (answer, at) = asking.join().expect("the thread ends");
    assert!(matches!(errno(answer), libc::ENOTCONN | libc::ECONNABORTED));
    assert!(at - killed < AT_ONCE, "heard after {:?}", at - killed);
    assert_eq!(errno(fs::metadata(&path)), libc::ENOTCONN);
    assert_eq!(errno(open.metadata()), libc::ENOTCONN);
    assert_eq!(errno(File::create(mount.join("another"))), libc::ENOTCONN);
    cluster.meta().thaw();
    drop(open);
    sys::umount(mount.path(), 0).expect("an ordinary umount takes it away");
    mount.start_again();
    assert_eq!(fs::read(&path).expect("read"), b"stored");
}

/// "`umount -f` frees whoever waits for servers that do not answer."
#[test]
fn a_forced_umount_frees_whoever_waits() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    cluster.meta().freeze();
    let asking = ask_in_the_background(mount.path());
    let forced = Instant::now();
    // Busy for as long as somebody waits in it; it is the waiting that the force ends.
    let busy = sys::umount(mount.path(), libc::MNT_FORCE).err().and_then(|error| error.raw_os_error());
    assert!(matches!(busy, None | Some(libc::EBUSY)), "{busy:?}");
    let (answer, at) = asking.join().expect("the thread ends");
    assert!(matches!(errno(answer), libc::ENOTCONN | libc::ECONNABORTED));
    assert!(at - forced < AT_ONCE, "freed after {:?}", at - forced);
    wait::until("the mount point is free", AT_ONCE, || {
        !mount::is_mounted(mount.path()) || sys::umount(mount.path(), libc::MNT_FORCE).is_ok()
    });
    cluster.meta().thaw();
    assert!(mount.process().wait(Duration::from_secs(30)).is_some(), "the process of a mount that is gone ends");
    mount.start_again();
    fs::write(mount.join("after"), "works").expect("write");
}

/// "After `umount -l` the mount point is free; what is open stays usable, and is stored when it is closed."
#[test]
fn a_lazy_umount_lets_what_is_open_finish() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let mut open = File::create_new(mount.join("file")).expect("create");
    open.write_all(b"before, ").expect("write");
    sys::umount(mount.path(), libc::MNT_DETACH).expect("umount -l");
    assert!(!mount::is_mounted(mount.path()));
    assert_eq!(errno(fs::metadata(mount.join("file"))), libc::ENOENT);
    open.write_all(b"after").expect("write");
    assert!(!mount.process().has_ended());
    drop(open);
    let status = mount.process().wait(Duration::from_secs(30)).expect("it ends with its last file");
    assert!(status.success(), "{status}\n{}", mount.process().log());
    mount.start_again();
    let mut text = String::new();
    File::open(mount.join("file")).expect("open").read_to_string(&mut text).expect("read");
    assert_eq!(text, "before, after");
}

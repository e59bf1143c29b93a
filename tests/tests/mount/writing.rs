//! Ways of writing that programs choose: direct, synchronous, by flags of one call, up to a limit.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use holdfast_tests::{
    cluster::{self, Cluster},
    fault::random_bytes,
    shell, sys, wait,
};

fn open(path: &Path, flags: libc::c_int) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).custom_flags(flags).open(path).expect("open")
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.expect_err("refused").raw_os_error().expect("an errno")
}

/// "What is written through O_DIRECT, a mapping or a buffer is what each of the others reads next."
#[test]
fn direct_buffered_and_mapped_writes_see_each_other() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let path = mount.join("file");
    let (direct, buffered) = (open(&path, libc::O_DIRECT), open(&path, 0));
    let mut content = random_bytes(1, 3 << 20);
    buffered.write_all_at(&content, 0).expect("write");
    let read_all = |file: &File| {
        let mut bytes = vec![0; 3 << 20];
        file.read_exact_at(&mut bytes, 0).expect("read");
        bytes
    };
    assert!(read_all(&direct) == content, "direct after buffered");
    for (round, offset) in [0, 4096, 511, (1 << 20) - 100, (2 << 20) + 1].into_iter().enumerate() {
        let patch = random_bytes(round as u64 + 2, 70_001);
        direct.write_all_at(&patch, offset as u64).expect("write, aligned or not");
        content[offset..offset + patch.len()].copy_from_slice(&patch);
        assert!(read_all(&buffered) == content, "buffered after direct at {offset}");
        assert!(read_all(&direct) == content, "direct after itself at {offset}");
    }
    let said = shell::run(
        mount.path(),
        "python3 - <<'EOF'
import mmap, os
fd = os.open('file', os.O_RDWR)
direct = os.open('file', os.O_RDWR | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
with mmap.mmap(fd, 3 << 20) as m:
    m[5000:5006] = b'mapped'
    print(os.pread(direct, 6, 5000))
    page[:6] = b'direct'
    os.pwritev(direct, [page], 8192)
    print(m[8192:8198])
EOF",
    );
    assert_eq!(said, "b'mapped'\nb'direct'\n");
}

/// "What O_SYNC, O_DSYNC, RWF_SYNC or RWF_DSYNC wrote is durable when the call returns."
#[test]
fn synchronous_writes_outlive_the_mount_without_an_fsync() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let kinds = [("sync", libc::O_SYNC), ("dsync", libc::O_DSYNC), ("both", libc::O_SYNC | libc::O_DIRECT)];
    let files = kinds.map(|(name, flags)| open(&mount.join(name), flags));
    for file in &files {
        file.write_all_at(&random_bytes(7, 10_000), 3).expect("write");
    }
    // The mount dies while all of them are open: nothing but the writes themselves can have stored the bytes.
    let script = format!(
        "python3 - <<'EOF'
import os, signal
for name, flag in ('rwf_sync', os.RWF_SYNC), ('rwf_dsync', os.RWF_DSYNC):
    print(os.pwritev(os.open(name, os.O_RDWR | os.O_CREAT), [b'durable'], 4096, flag))
os.kill({}, signal.SIGKILL)
EOF",
        mount.process().pid()
    );
    assert_eq!(shell::run(mount.path(), &script), "7\n7\n");
    mount.kill();
    drop(files);
    mount.start_again();
    for name in ["sync", "dsync", "both"] {
        let found = fs::read(mount.join(name)).expect("read");
        assert!(found.len() == 10_003 && found[3..] == random_bytes(7, 10_000), "{name}: {} bytes", found.len());
    }
    for name in ["rwf_sync", "rwf_dsync"] {
        assert_eq!(&fs::read(mount.join(name)).expect("read")[4096..], b"durable", "{name}");
    }
}

/// "RWF_APPEND appends; RWF_NOWAIT and RWF_HIPRI are obeyed or refused, never misread."
#[test]
fn flags_of_one_call_mean_what_preadv2_says() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let said = shell::run(
        mount.path(),
        "python3 - <<'EOF'
import errno, os
fd = os.open('file', os.O_RDWR | os.O_CREAT)
os.write(fd, b'0123456789')
print(os.pwritev(fd, [b'end'], 2, os.RWF_APPEND), os.pread(fd, 100, 0))
def attempt(call, *arguments):
    try: return call(*arguments)
    except OSError as error: return errno.errorcode[error.errno]
for flag in os.RWF_NOWAIT, os.RWF_HIPRI:
    buffer = bytearray(4)
    print(attempt(os.preadv, fd, [buffer], 3, flag) in (4, 'EAGAIN', 'ENOTSUP'), bytes(buffer) in (b'3456', bytes(4)))
    print(attempt(os.pwritev, fd, [b'xyz'], 0, flag) in (3, 'EAGAIN', 'ENOTSUP'), os.pread(fd, 5, 0) in (b'01234', b'xyz34'))
    os.pwritev(fd, [b'012'], 0)
EOF",
    );
    assert_eq!(said, "3 b'0123456789end'\nTrue True\nTrue True\nTrue True\nTrue True\n");
}

/// "RLIMIT_FSIZE cuts a write short, and then refuses it with EFBIG and SIGXFSZ."
#[test]
fn a_limit_on_the_size_of_files_is_obeyed() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let said = shell::run(
        mount.path(),
        "python3 - <<'EOF'
import errno, os, resource, signal
signals = []
signal.signal(signal.SIGXFSZ, lambda *_: signals.append('SIGXFSZ'))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
def attempt(call, *arguments):
    try: return call(*arguments)
    except OSError as error: return errno.errorcode[error.errno]
for flags in 0, os.O_APPEND, os.O_SYNC:
    fd = os.open('file%d' % flags, os.O_RDWR | os.O_CREAT | flags)
    print(attempt(os.write, fd, bytes(2 << 20)) == 1 << 20, attempt(os.write, fd, b'more'), os.fstat(fd).st_size)
    print(attempt(os.ftruncate, fd, (1 << 20) + 1), attempt(os.posix_fallocate, fd, 0, (1 << 20) + 1), os.fstat(fd).st_size)
print(len(signals) >= 3)
EOF",
    );
    let each = format!("True EFBIG {0}\nEFBIG EFBIG {0}\n", 1 << 20);
    assert_eq!(said, format!("{}True\n", each.repeat(3)));
}

/// "A write that could not be stored is reported to every descriptor that asks while it is not stored, and to none afterwards."
#[test]
fn every_descriptor_hears_of_what_is_not_stored() {
    let cluster = Cluster::start();
    let mount = cluster.mount_with(&["io_timeout=2"]);
    let path = mount.join("file");
    let mut first = open(&path, 0);
    let second = open(&path, 0);
    let third = open(&path, 0);
    (1..=2).for_each(|n| cluster.storage(n).kill());
    first.write_all(b"one").expect("accepted");
    second.write_all_at(b"two", 3).expect("accepted");
    assert_eq!(errno(first.sync_all()), libc::EIO);
    assert_eq!(errno(second.sync_all()), libc::EIO);
    assert_eq!(errno(third.sync_all()), libc::EIO, "also who wrote nothing");
    (1..=2).for_each(|n| cluster.storage(n).start());
    cluster.wait_until_up();
    first.sync_all().expect("stored now");
    third.sync_all().expect("and no error is told that is over");
    drop((first, second, third));
    mount.remount();
    assert_eq!(fs::read(&path).expect("read"), b"onetwo");
}

/// "`fallocate` punches holes and zeroes ranges; what it would have to promise it refuses with EOPNOTSUPP, and `posix_fallocate` works all the same."
#[test]
fn fallocate_zeroes_and_does_not_promise_what_it_cannot_keep() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let file = open(&mount.join("file"), 0);
    file.write_all_at(&[b'x'; 300], 0).expect("write");
    let (keep, punch, zero) = (libc::FALLOC_FL_KEEP_SIZE, libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE);
    let size = || file.metadata().expect("stat").len();
    for mode in [0, keep, libc::FALLOC_FL_COLLAPSE_RANGE, libc::FALLOC_FL_INSERT_RANGE] {
        assert_eq!(errno(sys::fallocate(&file, mode, 0, 1 << 20)), libc::EOPNOTSUPP, "mode {mode}");
    }
    sys::fallocate(&file, punch | keep, 10, 20).expect("punch");
    sys::fallocate(&file, zero | keep, 290, 100).expect("zero, within the size");
    assert_eq!(size(), 300);
    sys::fallocate(&file, zero, 290, 100).expect("zero, and grow");
    assert_eq!(size(), 390);
    let expected: Vec<u8> = (0..390).map(|at| if (10..30).contains(&at) || at >= 290 { 0 } else { b'x' }).collect();
    assert_eq!(fs::read(mount.join("file")).expect("read"), expected);
    let script = "python3 -c \"import os; fd = os.open('file', os.O_RDWR); os.posix_fallocate(fd, 100, 100000)\"";
    shell::run(mount.path(), script);
    assert_eq!(size(), 100_100);
    let found = fs::read(mount.join("file")).expect("read");
    assert!(found[..390] == expected && found[390..].iter().all(|&byte| byte == 0));
}

/// A program that notes when each fdatasync of a process is over.
struct Trace {
    strace: Child,
    output: PathBuf,
}

impl Trace {
    fn of(pid: u32, output: PathBuf) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-ttt", "-T", "-e", "trace=fdatasync,fsync", "-p", &pid.to_string(), "-o"]).arg(&output);
        sys::die_with_parent(&mut command);
        let strace = command.stderr(Stdio::null()).spawn().expect("start strace");
        let traced = || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
            status.contains(&format!("TracerPid:\t{}\n", strace.id()))
        };
        wait::until("strace is attached", Duration::from_secs(20), traced);
        Self { strace, output }
    }

    /// When syncs that did not fail were over, seconds since 1970.
    fn stop(mut self) -> Vec<f64> {
        assert!(sys::kill(self.strace.id(), libc::SIGINT));
        self.strace.wait().expect("strace ends");
        let text = fs::read_to_string(&self.output).expect("what strace says");
        text.lines().filter(|line| line.contains("sync") && line.contains("= 0 <")).map(over_at).collect()
    }
}

/// `PID TIME fdatasync(N) = 0 <SECONDS>` names the beginning, `PID TIME <... fdatasync resumed>) = 0 <SECONDS>` the end.
fn over_at(line: &str) -> f64 {
    let number = |word: &str| word.parse::<f64>().unwrap_or_else(|_| panic!("a time: {line}"));
    let at = number(line.split_whitespace().nth(1).expect("a time"));
    let took = number(line.rsplit_once('<').expect("a duration").1.trim_end_matches('>'));
    if line.contains("resumed") { at } else { at + took }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

/// "An `fsync` is an fdatasync on each server that has a copy, and then one of the metadata's log."
#[test]
fn an_fsync_waits_for_every_replicas_disk_and_then_for_the_metadatas() {
    if !shell::has("strace") || !sys::is_root() {
        eprintln!("SKIPPED: strace is not installed (scripts/test does that), or this is not root");
        return;
    }
    let cluster = Cluster::start();
    let (mount, outside) = (cluster.mount(), cluster::temp_dir());
    let file = open(&mount.join("file"), 0);
    file.write_all_at(b"before", 0).expect("write");
    file.sync_all().expect("fsync");
    let pids = [cluster.meta().pid(), cluster.storage(1).pid(), cluster.storage(2).pid(), cluster.storage(3).pid()];
    let traces = pids.map(|pid| Trace::of(pid, outside.path().join(pid.to_string())));
    file.write_all_at(&random_bytes(1, 100_000), 0).expect("write");
    let asked = now();
    file.sync_all().expect("fsync");
    let answered = now();
    let within = |at: &f64| (asked..=answered).contains(at);
    let [meta, storage @ ..] = traces.map(|trace| trace.stop().into_iter().filter(within).collect::<Vec<f64>>());
    let last = meta.last().expect("the metadata's log was synced");
    for (number, syncs) in storage.iter().enumerate() {
        let first = syncs.first().unwrap_or_else(|| panic!("storage-{} was not synced", number + 1));
        assert!(first <= last, "storage-{} was synced after the commit", number + 1);
    }
}

/// "A copy by `cp` or copy_file_range moves no data: both files share them, until one is written to."
#[test]
fn a_copy_shares_its_blocks_also_of_what_was_just_written() {
    const MIB: usize = 1 << 20;
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let blocks = || {
        let status = cluster.status();
        let copies = status.0["blocks_by_copies"].as_array().expect("status counts copies").clone();
        copies.iter().map(|count| count.as_u64().expect("a count")).sum::<u64>()
    };
    let content = random_bytes(1, 5 * MIB);
    let source = open(&mount.join("source"), 0);
    source.write_all_at(&content, 0).expect("write, and leave it dirty");
    shell::run(mount.path(), "cp --reflink=never source copy");
    assert_eq!(blocks(), 5);
    assert!(fs::read(mount.join("copy")).expect("read") == content);
    // A part, over what the target has not stored yet.
    let target = open(&mount.join("target"), 0);
    target.write_all_at(&[b'x'; 3 * MIB], 0).expect("write, and leave it dirty");
    assert_eq!(sys::copy_range(&source, 7, &target, MIB as i64 + 3, MIB).expect("copy"), MIB);
    source.write_all_at(b"changed", 7).expect("write");
    let mut expected = vec![b'x'; 3 * MIB];
    expected[MIB + 3..2 * MIB + 3].copy_from_slice(&content[7..MIB + 7]);
    assert!(fs::read(mount.join("target")).expect("read") == expected);
    assert!(fs::read(mount.join("copy")).expect("read") == content, "the copy follows its source");
}

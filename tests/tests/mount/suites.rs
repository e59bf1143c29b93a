//! Suites that others wrote, on a mounted cluster: each runs to its end and finds nothing.
//!
//! `HOLDFAST_LONG_TESTS=1` gives them minutes instead of seconds.

use std::{fs, path::Path, time::Duration};

use holdfast_tests::{
    cluster::{self, Cluster},
    mount::Mount,
    shell, sys, wait,
};

fn is_long() -> bool {
    std::env::var_os("HOLDFAST_LONG_TESTS").is_some()
}

/// The output of `script`, which has to end well.
#[track_caller]
fn run(directory: &Path, script: &str) -> String {
    let limit = Duration::from_secs(if is_long() { 3600 } else { 300 });
    let output = shell::attempt(directory, script, limit);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}: {}\n{said}", output.status);
    said
}

/// Says so, and that the test is left out, if the tool is missing.
fn has(tool: &str) -> bool {
    let has = shell::has(tool);
    if !has {
        eprintln!("SKIPPED: {tool} is not installed (scripts/test does that)");
    }
    has
}

const FSX: &str = "
flen = 3000000
[opsize]
max = MAX
[weights]
close_open = 1
invalidate = 1
read = 10
write = 10
mapread = 8
mapwrite = 8
truncate = 4
fsync = 1
fdatasync = 1
punch_hole = 4
copy_file_range = 4
posix_fallocate = 1
sendfile = 1
posix_fadvise = 1
";

/// Runs fsx with `seed` for `operations` of at most `most` bytes on a file of its own, which stays.
fn fsx(mount: &Mount, outside: &Path, seed: u64, operations: u64, most: u64) {
    fs::write(outside.join("fsx.toml"), FSX.replace("MAX", &most.to_string())).expect("write the configuration");
    let said = run(
        mount.path(),
        &format!("fsx -q -f {0}/fsx.toml -P {0} -S {seed} -N {operations} fsx-{seed} 2>&1", outside.display()),
    );
    assert!(said.contains("All operations completed A-OK!"), "seed {seed}: {said}");
}

/// "Read, write, mmap, truncate, punch, preallocate, copy_file_range and fsync in any order leave every byte where it was put, also after a remount."
#[test]
fn fsx_finds_every_byte_where_it_was_put() {
    if !has("fsx") {
        return;
    }
    let (cluster, outside) = (Cluster::start(), cluster::temp_dir());
    let mount = cluster.mount();
    // Much is written, and none of it given back: a million operations must not be long ones.
    let long = (4..=13).map(|seed| (seed, 100_000, 16_000)).filter(|_| is_long());
    for (seed, operations, most) in (1..=3).map(|seed| (seed, 8000, 300_000)).chain(long) {
        fsx(&mount, outside.path(), seed, operations, most);
        let before = fs::read(mount.join(format!("fsx-{seed}"))).expect("read");
        mount.remount();
        assert!(fs::read(mount.join(format!("fsx-{seed}"))).expect("read") == before, "seed {seed}, after a remount");
    }
}

/// "Buffered, unaligned, direct, mapped and synchronous writes can all be read back."
#[test]
fn fio_verifies_what_it_wrote_by_every_way_of_writing() {
    if !has("fio") {
        return;
    }
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let megabytes = if is_long() { 512 } else { 32 };
    let ways = [
        "--ioengine=psync --bsrange=512-256k --rw=randrw --numjobs=3",
        "--ioengine=psync --bsrange=1k-1m --bs_unaligned=1 --rw=randwrite --fsync=20 --numjobs=2",
        "--ioengine=libaio --direct=1 --bs=4k --iodepth=16 --rw=randrw --numjobs=2",
        "--ioengine=mmap --bs=4k --rw=randrw --numjobs=2",
        "--ioengine=psync --sync=1 --bs=16k --rw=write --numjobs=2",
    ];
    for (number, way) in ways.into_iter().enumerate() {
        let said = run(
            mount.path(),
            &format!(
                "fio --name=way-{number} --directory=. --size={megabytes}m --verify=crc32c --verify_fatal=1 --group_reporting {way} 2>&1"
            ),
        );
        assert!(said.contains("err= 0"), "{way}: {said}");
    }
}

#[test]
fn stress_ng_meets_no_failure_in_any_of_its_filesystem_stressors() {
    if !has("stress-ng") || !sys::is_root() {
        return;
    }
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let seconds = if is_long() { 20 } else { 1 };
    let script =
        format!("mkdir st && stress-ng --class filesystem --seq 1 --timeout {seconds} --temp-path st --verify 2>&1");
    // Some are left out where the kernel lacks what they stress (then the exit status says so), which has nothing to do with us.
    let output = shell::attempt(mount.path(), &script, Duration::from_secs(3600));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(!said.contains("fail:") && said.contains("successful run completed"), "{said}");
}

#[test]
fn file_server_and_mail_server_loads_end_clean() {
    if !["dbench", "fs_mark", "postmark", "bonnie++"].into_iter().all(has) || !sys::is_root() {
        return;
    }
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let (seconds, files, transactions) = if is_long() { (120, 20_000, 50_000) } else { (5, 500, 1000) };
    run(mount.path(), "mkdir dbench fs_mark postmark bonnie");
    let said = run(mount.path(), &format!("dbench -D dbench -t {seconds} 4 2>&1"));
    assert!(said.contains("Throughput") && !said.contains("ERROR"), "{said}");
    let said = run(mount.path(), &format!("fs_mark -d fs_mark -n {files} -s 8192 -t 2 -S 1 2>&1"));
    assert!(said.contains("Files/sec"), "{said}");
    let said = run(
        mount.path(),
        &format!(
            "printf 'set location postmark\\nset number 300\\nset transactions {transactions}\\nrun\\nquit\\n' | postmark 2>&1"
        ),
    );
    assert!(said.contains("transactions per second") || said.contains("deleted"), "{said}");
    let said = run(mount.path(), "bonnie++ -d bonnie -f -s 64 -r 32 -n 1 -u root -q 2>&1");
    assert!(said.contains(','), "{said}");
    assert!(!mount.process().log().contains("panicked"));
}

/// PostgreSQL's own programs, wherever Debian put them; run as a user of their own, for they refuse root.
const POSTGRES: &str = "
    set -e
    bin=$(ls -d /usr/lib/postgresql/*/bin | tail -1)
    pg() { setpriv --reuid=postgres --regid=postgres --clear-groups env PATH=$bin:$PATH PGHOST=$SOCKETS \"$@\"; }
    start() { pg pg_ctl -D data -w -t 60 -o \"-k $SOCKETS -h ''\" -l $SOCKETS/log start > /dev/null; }
";

/// "PostgreSQL, killed in the middle, comes back with every committed row."
#[test]
fn postgresql_keeps_every_committed_row_when_it_is_killed() {
    if !Path::new("/usr/lib/postgresql").exists() || !sys::is_root() {
        eprintln!("SKIPPED: postgresql is not installed (scripts/test does that), or this is not root");
        return;
    }
    let (cluster, sockets) = (Cluster::start(), cluster::temp_dir());
    let mount = cluster.mount_with(&["allow_other"]);
    let rounds = if is_long() { 10 } else { 2 };
    let script = format!(
        "export SOCKETS={sockets} {POSTGRES}
         chmod 755 {sockets}; chown postgres {sockets} .
         trap 'pg pg_ctl -D data -m immediate stop > /dev/null 2>&1 || true' EXIT
         pg initdb -D data --data-checksums > /dev/null
         start
         pg createdb bench && pg pgbench -q -i -s 2 bench > /dev/null 2>&1
         pg psql -qc 'create table counted(number int primary key)' bench
         number=0
         for round in $(seq {rounds}); do
             pg pgbench -T 30 -c 4 bench > /dev/null 2>&1 &
             for i in $(seq 40); do
                 number=$((number + 1))
                 pg psql -qc \"insert into counted values ($number)\" bench
             done
             postmaster=$(head -1 data/postmaster.pid)
             killed=\"$postmaster $(pgrep -P $postmaster -d ' ')\"
             kill -9 $killed
             for pid in $killed; do while kill -0 $pid 2> /dev/null; do sleep 0.05; done; done
             wait || true
             start
             found=$(pg psql -Atc 'select count(*), max(number) from counted' bench)
             [ \"$found\" = \"$number|$number\" ] || {{ echo \"$number were committed, $found are there\"; exit 1; }}
             pg psql -Atc 'select abs(sum(a.abalance) - (select sum(bbalance) from pgbench_branches)) from pgbench_accounts a' bench | grep -qx 0
         done
         pg pg_ctl -D data -m fast stop > /dev/null
         pg pg_checksums --check -D data | grep -q 'Bad checksums:  0'
         trap - EXIT
         echo all rows are there",
        sockets = sockets.path().display(),
    );
    let said = run(mount.path(), &script);
    assert!(said.contains("all rows are there"), "{said}");
    assert!(!mount.process().log().contains("panicked"));
}

/// "PostgreSQL's data can move to another mount, also when the first one died under it; two cannot use them at once."
#[test]
fn postgresql_moves_from_one_mount_to_another_with_every_row() {
    if !Path::new("/usr/lib/postgresql").exists() || !sys::is_root() {
        eprintln!("SKIPPED: postgresql is not installed (scripts/test does that), or this is not root");
        return;
    }
    let (cluster, sockets) = (Cluster::start(), cluster::temp_dir());
    let (a, b) = (cluster.mount_with(&["allow_other"]), cluster.mount_with(&["allow_other"]));
    let environment = format!("export SOCKETS={} {POSTGRES}", sockets.path().display());
    let on = |mount: &Mount, script: &str| run(mount.path(), &format!("{environment}\n{script}"));
    on(
        &a,
        "chmod 755 $SOCKETS; chown postgres $SOCKETS .
         pg initdb -D data --data-checksums > /dev/null
         start
         pg createdb bench && pg pgbench -q -i -s 2 bench > /dev/null 2>&1
         pg pgbench -T 3 -c 4 bench > /dev/null 2>&1
         pg psql -Atc 'select count(*) from pgbench_history' bench > $SOCKETS/committed",
    );
    // While it runs on one mount, the other refuses: the file with the postmaster's process is seen there.
    let refused = on(&b, "pg pg_ctl -D data -w -t 5 -o \"-k $SOCKETS/other -h ''\" start 2>&1 && exit 1 || true");
    assert!(refused.contains("could not start") || refused.contains("another server might be running"), "{refused}");
    let processes = on(&b, "postmaster=$(head -1 data/postmaster.pid); echo $postmaster $(pgrep -P $postmaster)");
    let processes: Vec<u32> = processes.split_whitespace().map(|pid| pid.parse().expect("a process")).collect();
    a.kill();
    for process in &processes {
        sys::kill(*process, libc::SIGKILL);
    }
    wait::until("its processes are gone", Duration::from_secs(30), || !processes.iter().any(|pid| sys::kill(*pid, 0)));
    let said = on(
        &b,
        "trap 'pg pg_ctl -D data -m immediate stop > /dev/null 2>&1 || true' EXIT
         start
         found=$(pg psql -Atc 'select count(*) from pgbench_history' bench)
         [ \"$found\" = \"$(cat $SOCKETS/committed)\" ] || { echo \"$found rows\"; exit 1; }
         pg psql -Atc 'select abs(sum(a.abalance) - (select sum(bbalance) from pgbench_branches)) from pgbench_accounts a' bench | grep -qx 0
         pg pgbench -T 2 -c 2 bench > /dev/null 2>&1
         pg pg_ctl -D data -m fast stop > /dev/null
         pg pg_checksums --check -D data | grep -q 'Bad checksums:  0'
         trap - EXIT
         echo all rows are there",
    );
    assert!(said.contains("all rows are there"), "{said}");
}

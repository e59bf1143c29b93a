//! The core of POSIX, where shell tools do not reach.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
        net::UnixListener,
    },
    thread,
    time::Duration,
};

use holdfast_tests::{
    cluster::{Cluster, Options, PATIENCE},
    fault::random_bytes,
    model::DirectTree,
    sys, wait,
};

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.expect_err("it must be refused").raw_os_error().expect("the kernel said so")
}

/// "Names are bytes: anything but `/` and NUL, at most 255 of them."
#[test]
fn names_of_255_bytes_and_names_that_are_not_text_work_and_longer_ones_do_not() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let long = "n".repeat(255);
    let odd = OsStr::from_bytes(b"\xff\xfe \n\t*\\'\"");
    for name in [OsStr::new(&long), odd, OsStr::new("..."), OsStr::new(" ")] {
        fs::write(mount.join(name), name.as_bytes()).expect("write under a strange name");
    }
    mount.remount();
    let listed: BTreeSet<_> =
        fs::read_dir(mount.path()).expect("list").map(|entry| entry.expect("list").file_name()).collect();
    assert_eq!(listed.len(), 4);
    assert!(listed.contains(odd) && listed.contains(OsStr::new(&long)));
    assert_eq!(fs::read(mount.join(odd)).expect("read"), odd.as_bytes());
    assert_eq!(errno(File::create(mount.join("n".repeat(256)))), libc::ENAMETOOLONG);
    assert_eq!(errno(fs::metadata(mount.join("n".repeat(256)))), libc::ENAMETOOLONG);
}

#[test]
fn the_first_and_the_last_second_that_a_time_can_have_are_times_like_others() {
    let cluster = Cluster::start();
    let (mount, other) = (cluster.mount(), cluster.mount());
    for (number, secs) in [i64::MIN, i64::MIN + 1, -1, i64::MAX - 1, i64::MAX].into_iter().enumerate() {
        // The kernel itself takes the nanoseconds of the first and of the last second away.
        let nanos = if secs == i64::MIN || secs == i64::MAX { 0 } else { 999_999_999 };
        let name = format!("file-{number}");
        fs::write(mount.join(&name), "old or new").expect("write");
        sys::set_times(&mount.join(&name), (secs, 999_999_999), (secs, 999_999_999)).expect("set the times");
        for path in [mount.join(&name), other.join(&name)] {
            let meta = fs::metadata(&path).expect("stat");
            assert_eq!((meta.atime(), meta.atime_nsec()), (secs, nanos), "{}", path.display());
            assert_eq!((meta.mtime(), meta.mtime_nsec()), (secs, nanos), "{}", path.display());
        }
    }
    mount.remount();
    assert_eq!(fs::metadata(mount.join("file-0")).expect("stat").mtime(), i64::MIN);
}

/// "A directory that changes while it is listed shows every entry that was there throughout, once."
#[test]
fn a_directory_that_changes_while_it_is_listed_shows_every_entry_that_stays() {
    let cluster = Cluster::start();
    let (mount, other) = (cluster.mount(), cluster.mount());
    for number in 0..3000 {
        File::create(mount.join(format!("stays-{number:04}"))).expect("create");
        File::create(mount.join(format!("goes-{number:04}"))).expect("create");
    }
    let mut seen = Vec::new();
    let mut changed = 0;
    for (count, entry) in fs::read_dir(mount.path()).expect("list").enumerate() {
        let name = entry.expect("list").file_name().into_string().expect("UTF-8");
        if name.starts_with("stays-") {
            seen.push(name);
        }
        if count % 7 == 0 && changed < 3000 {
            fs::remove_file(other.join(format!("goes-{changed:04}"))).expect("unlink");
            File::create(other.join(format!("new-{changed:04}"))).expect("create");
            changed += 1;
        }
    }
    let unique: BTreeSet<_> = seen.iter().collect();
    assert_eq!((unique.len(), seen.len()), (3000, 3000), "an entry that was there throughout is listed exactly once");
}

/// "A hole costs nothing and reads as zeroes; `st_blocks` counts what was written."
#[test]
fn a_sparse_file_of_a_tebibyte_costs_what_was_written_and_reads_zeroes() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let path = mount.join("sparse");
    let file = OpenOptions::new().create_new(true).read(true).write(true).open(&path).expect("create");
    file.set_len(1 << 40).expect("truncate to a tebibyte");
    file.write_all_at(b"middle", 500 << 30).expect("write");
    file.write_all_at(b"end", (1 << 40) - 3).expect("write");
    file.sync_all().expect("fsync");
    drop(file);
    mount.remount();
    let file = File::open(&path).expect("open");
    let meta = file.metadata().expect("stat");
    assert_eq!(meta.len(), 1 << 40);
    assert!(meta.blocks() * 512 <= 4 << 20, "{} bytes for nine", meta.blocks() * 512);
    let mut bytes = [1; 8];
    file.read_exact_at(&mut bytes, (500 << 30) - 2).expect("read");
    assert_eq!(&bytes, b"\0\0middle");
    file.read_exact_at(&mut bytes, 300 << 30).expect("read a hole");
    assert_eq!(bytes, [0; 8]);
    let data = sys::seek(&file, 0, libc::SEEK_DATA).expect("seek to data");
    assert!(data > 499 << 30 && data <= 500 << 30, "data begin at {data}");
    assert!(sys::seek(&file, 500 << 30, libc::SEEK_HOLE).expect("seek to a hole") < 501 << 30);
}

/// "A file that has lost its last name lives until its last close, on any mount."
#[test]
fn an_unlinked_file_lives_until_its_last_close_on_any_mount() {
    let cluster = Cluster::start();
    let (one, two) = (cluster.mount(), cluster.mount());
    let content = random_bytes(3, 2 << 20);
    fs::write(one.join("file"), &content).expect("write");
    let open_here = OpenOptions::new().read(true).write(true).open(one.join("file")).expect("open");
    let open_there = File::open(two.join("file")).expect("open on the other mount");
    fs::remove_file(one.join("file")).expect("unlink");
    assert_eq!(errno(File::open(one.join("file"))), libc::ENOENT);
    open_here.write_all_at(b"still writable", 100).expect("write after unlink");
    open_here.sync_all().expect("fsync after unlink");
    assert_eq!(open_here.metadata().expect("stat").nlink(), 0);
    drop(open_here);
    let mut bytes = vec![0; 4096];
    open_there.read_exact_at(&mut bytes, 1 << 20).expect("read on the other mount");
    assert_eq!(bytes, content[1 << 20..][..4096]);
    cluster.meta().kill();
    cluster.start_daemons();
    sys::drop_pages(&open_there).expect("drop the pages");
    open_there.read_exact_at(&mut bytes, 0).expect("read after the metadata server restarted");
    assert_eq!(bytes[..100], content[..100]);
    let inodes = cluster.status().number("inodes");
    drop(open_there);
    wait::until("the orphan is reclaimed", PATIENCE, || cluster.status().number("inodes") < inodes);
}

/// What `O_TMPFILE` will do when the library that speaks FUSE passes it on.
#[test]
fn a_file_that_is_made_without_a_name_lives_until_its_close_or_gets_one() {
    let cluster = Cluster::start();
    let direct = DirectTree::connect(&cluster.get("client.toml", "meta"), &cluster.client_tls());
    let mount = cluster.mount();
    let before = cluster.status().number("inodes");
    direct.make_unnamed(b"kept", Some("named")).expect("make, and link");
    direct.make_unnamed(b"lost", None).expect("make");
    assert_eq!(fs::read(mount.join("named")).expect("read"), b"kept");
    assert_eq!(fs::read_dir(mount.path()).expect("list").count(), 1);
    wait::until("the other one is gone", Duration::from_secs(20), || cluster.status().number("inodes") == before + 1);
}

/// "What one mount has closed, another that opens afterwards sees."
#[test]
fn what_one_mount_has_closed_the_other_opens_and_sees() {
    let cluster = Cluster::start();
    let (one, two) = (cluster.mount(), cluster.mount());
    for round in 0..20u64 {
        let content = random_bytes(round, 10_000 + usize::try_from(round).expect("small") * 150_000);
        fs::write(one.join("shared"), &content).expect("write");
        assert!(fs::read(two.join("shared")).expect("read") == content, "round {round}: the other mount sees old data");
        fs::write(two.join("back"), &content[..5000]).expect("write");
        assert!(fs::read(one.join("back")).expect("read") == content[..5000]);
    }
    fs::create_dir(one.join("dir")).expect("mkdir");
    fs::rename(two.join("shared"), two.join("dir/moved")).expect("rename");
    wait::until("the first mount sees the move", PATIENCE, || {
        one.join("dir/moved").exists() && !one.join("shared").exists()
    });
}

#[test]
fn appends_of_several_mounts_and_descriptors_never_overwrite_each_other() {
    let cluster = Cluster::start();
    let mounts = [cluster.mount(), cluster.mount()];
    File::create(mounts[0].join("log")).expect("create");
    for round in 0..10 {
        for (who, mount) in mounts.iter().enumerate() {
            let mut file = OpenOptions::new().append(true).open(mount.join("log")).expect("open");
            file.write_all(format!("{who} {round}\n").as_bytes()).expect("append");
        }
    }
    thread::scope(|scope| {
        for who in 2..6 {
            let path = mounts[0].join("log");
            scope.spawn(move || {
                let mut file = OpenOptions::new().append(true).open(path).expect("open");
                (0..200).for_each(|round| file.write_all(format!("{who} {round}\n").as_bytes()).expect("append"));
            });
        }
    });
    let text = fs::read_to_string(mounts[1].join("log")).expect("read");
    let lines: BTreeSet<_> = text.lines().collect();
    assert_eq!((text.lines().count(), lines.len()), (820, 820));
}

/// A record that says who wrote it as which, up to 20 KB long, so that records cross the borders of chunks.
fn record(who: usize, round: usize) -> String {
    format!("{who} {round} {}\n", "x".repeat((who * 7919 + round * 104_729) % 20_000))
}

/// "Records of at most 1 MiB that several mounts append to one file are all there, whole, and in each writer's order."
#[test]
fn records_that_mounts_append_at_the_same_time_are_all_whole_and_in_each_writers_order() {
    const ROUNDS: usize = 300;
    let cluster = Cluster::start();
    let mounts = [cluster.mount(), cluster.mount()];
    File::create(mounts[0].join("log")).expect("create");
    thread::scope(|scope| {
        for who in 0..4 {
            let path = mounts[who % 2].join("log");
            scope.spawn(move || {
                let mut file = OpenOptions::new().append(true).open(path).expect("open");
                for round in 0..ROUNDS {
                    file.write_all(record(who, round).as_bytes()).expect("append");
                    if (round + who) % 40 == 0 {
                        file.sync_data().expect("fdatasync");
                    }
                }
            });
        }
    });
    mounts[0].remount();
    let text = fs::read_to_string(mounts[0].join("log")).expect("read");
    let mut next = [0; 4];
    for line in text.split_inclusive('\n') {
        let who: usize = line.split(' ').next().and_then(|who| who.parse().ok()).expect("a whole record");
        assert_eq!(line, record(who, next[who]), "record {} of writer {who}", next[who]);
        next[who] += 1;
    }
    assert_eq!(next, [ROUNDS; 4]);
}

#[test]
fn a_log_that_another_mount_cuts_is_appended_to_from_its_new_end() {
    let cluster = Cluster::start();
    let mounts = [cluster.mount(), cluster.mount()];
    let mut log = OpenOptions::new().append(true).create(true).open(mounts[0].join("log")).expect("open");
    log.write_all(&[b'a'; 5000]).expect("append");
    log.sync_all().expect("fsync");
    fs::write(mounts[1].join("log"), "cut ").expect("truncate and write");
    log.write_all(b"and on").expect("append");
    log.sync_all().expect("fsync");
    drop(log);
    mounts[1].remount();
    assert_eq!(fs::read_to_string(mounts[1].join("log")).expect("read"), "cut and on");
}

#[test]
fn mounts_that_append_in_turn_never_meet_a_chunk_of_too_many_pieces() {
    const ROUNDS: usize = 700;
    let cluster = Cluster::start();
    let mounts = [cluster.mount(), cluster.mount()];
    let mut logs = mounts
        .each_ref()
        .map(|mount| OpenOptions::new().append(true).create(true).open(mount.join("log")).expect("open"));
    for round in 0..ROUNDS {
        for (who, log) in logs.iter_mut().enumerate() {
            writeln!(log, "{round} {who}").expect("append");
            log.sync_data().expect("fdatasync");
        }
    }
    drop(logs);
    mounts[0].remount();
    let expected: String = (0..ROUNDS).map(|round| format!("{round} 0\n{round} 1\n")).collect();
    assert!(fs::read_to_string(mounts[0].join("log")).expect("read") == expected);
}

/// "A file that another mount lengthens never reads as zeroes where that has written."
#[test]
fn a_file_that_another_mount_lengthens_while_it_is_open_never_reads_as_zeroes() {
    let cluster = Cluster::start();
    let mounts = [cluster.mount(), cluster.mount()];
    fs::write(mounts[0].join("log"), "first\n").expect("write");
    let mut reader = File::open(mounts[0].join("log")).expect("open");
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("read");
    let mut writer = OpenOptions::new().append(true).open(mounts[1].join("log")).expect("open");
    writeln!(writer, "second").expect("append");
    drop(writer);
    wait::until("the reader sees what was appended", PATIENCE, || {
        reader.read_to_string(&mut text).expect("read on");
        text.len() > 6
    });
    assert_eq!(text, "first\nsecond\n");
}

/// "Small writes of two mounts into one file do not undo each other."
#[test]
fn small_writes_of_two_mounts_into_one_mebibyte_do_not_undo_each_other() {
    const RECORDS: u64 = 200;
    let cluster = Cluster::start();
    let mounts = [cluster.mount(), cluster.mount()];
    fs::write(mounts[0].join("file"), vec![0; 1 << 20]).expect("write");
    let files = mounts.each_ref().map(|mount| OpenOptions::new().write(true).open(mount.join("file")).expect("open"));
    thread::scope(|scope| {
        for (who, file) in (1u8..).zip(&files) {
            scope.spawn(move || {
                for record in 0..RECORDS {
                    // Records of 100 bytes, those of the two mounts in turn; many enough to make each compact.
                    file.write_all_at(&[who; 100], record * 5000 + u64::from(who) * 1000).expect("write");
                    file.sync_data().expect("fsync");
                }
            });
        }
    });
    drop(files);
    let bytes = fs::read(cluster.mount().join("file")).expect("read");
    for (who, record) in (1u8..=2).flat_map(|who| (0..RECORDS).map(move |record| (who, record))) {
        let at = usize::try_from(record * 5000 + u64::from(who) * 1000).expect("small");
        assert!(bytes[at..at + 100] == [who; 100], "record {record} of mount {who} was undone");
    }
}

/// "A file that another mount shortens ends where that has cut it, for a reader of any size."
#[test]
fn a_file_that_another_mount_shortens_reads_no_further_than_its_new_end() {
    let cluster = Cluster::start();
    let mounts = [cluster.mount(), cluster.mount()];
    for length in [600_000, 1_300_000, 3_000_000, 9_000_000] {
        let name = format!("file-{length}");
        let whole = vec![7; length];
        let held = OpenOptions::new().read(true).append(false).write(true).create(true).truncate(false).clone();
        let held = held.open(mounts[0].join(&name)).expect("create");
        held.write_all_at(&whole, 0).expect("write");
        held.sync_all().expect("fsync");
        // The kernel knows the name and the size for a second.
        for end in [length / 2 + 77, length / 3 + 1, 4096, 5] {
            let cut = File::options().write(true).open(mounts[1].join(&name)).expect("open");
            sys::flock(&cut, libc::LOCK_EX).expect("lock");
            cut.set_len(end as u64).expect("truncate");
            drop(cut);
            let mut bytes = vec![0; length];
            let count = File::open(mounts[0].join(&name)).expect("open").read_at(&mut bytes, 0).expect("read");
            assert_eq!((count, bytes[..count] == whole[..count]), (end, true), "of {length} cut to {end}");
            sys::flock(&held, libc::LOCK_SH).expect("lock");
            let count = held.read_at(&mut bytes, 3).expect("read");
            sys::flock(&held, libc::LOCK_UN).expect("unlock");
            assert_eq!(count, end - 3, "under a lock, of {length} cut to {end}");
            assert_eq!(held.read_at(&mut bytes, length as u64 - 10).expect("read"), 0, "past the end");
            assert_eq!(held.metadata().expect("stat").len(), end as u64);
        }
    }
}

#[test]
fn thousands_of_scattered_bytes_in_one_mebibyte_are_stored_and_read() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let file = File::create(mount.join("file")).expect("create");
    (0..2048).for_each(|n| file.write_all_at(&[1], n * 512).expect("write"));
    file.sync_all().expect("fsync");
    drop(file);
    mount.remount();
    let bytes = fs::read(mount.join("file")).expect("read");
    let expected: Vec<u8> = (0..2047 * 512 + 1).map(|at| u8::from(at % 512 == 0)).collect();
    assert!(bytes == expected);
}

/// "`rename` can refuse to replace a name, exchange two, and leave a whiteout."
#[test]
fn rename_can_refuse_to_replace_and_can_exchange() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let (a, b) = (mount.join("a"), mount.join("b"));
    fs::write(&a, "a").expect("write");
    fs::create_dir(&b).expect("mkdir");
    fs::write(b.join("inside"), "b").expect("write");
    assert_eq!(errno(sys::rename(&a, &b, libc::RENAME_NOREPLACE)), libc::EEXIST);
    sys::rename(&a, &b, libc::RENAME_EXCHANGE).expect("exchange a file and a directory");
    assert_eq!(fs::read_to_string(&b).expect("read"), "a");
    assert_eq!(fs::read_to_string(a.join("inside")).expect("read"), "b");
    sys::rename(&b, &mount.join("c"), libc::RENAME_NOREPLACE).expect("the name is free");
    assert_eq!(errno(sys::rename(&b, &a, libc::RENAME_EXCHANGE)), libc::ENOENT);
    assert_eq!(errno(fs::rename(&a, a.join("below"))), libc::EINVAL);
    sys::rename(&mount.join("c"), &mount.join("moved"), libc::RENAME_WHITEOUT).expect("rename with a whiteout");
    assert_eq!(fs::read_to_string(mount.join("moved")).expect("read"), "a");
    let whiteout = fs::symlink_metadata(mount.join("c")).expect("stat");
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0, "{whiteout:?}");
}

/// "Fifos, sockets and device files are what they were made."
#[test]
fn special_files_are_what_they_were_made() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    sys::mknod(&mount.join("fifo"), libc::S_IFIFO | 0o640, 0).expect("mkfifo");
    sys::mknod(&mount.join("null"), libc::S_IFCHR | 0o666, libc::makedev(1, 3)).expect("a device node");
    sys::mknod(&mount.join("disk"), libc::S_IFBLK | 0o600, libc::makedev(7, 200)).expect("a block device node");
    fs::set_permissions(mount.join("null"), fs::Permissions::from_mode(0o666)).expect("chmod");
    drop(UnixListener::bind(mount.join("socket")).expect("a socket"));
    symlink("no/where", mount.join("link")).expect("symlink");
    mount.remount();
    let kind = |name: &str| fs::symlink_metadata(mount.join(name)).expect("stat").file_type();
    assert!(kind("fifo").is_fifo() && kind("null").is_char_device() && kind("disk").is_block_device());
    assert!(kind("socket").is_socket() && kind("link").is_symlink());
    assert_eq!(fs::metadata(mount.join("disk")).expect("stat").rdev(), libc::makedev(7, 200));
    assert_eq!(fs::metadata(mount.join("null")).expect("stat").mode() & 0o7777, 0o666);
    assert_eq!(fs::read_link(mount.join("link")).expect("readlink").as_os_str(), "no/where");
}

/// "`user.`, `trusted.` and `security.` attributes are kept, with the limits and errors of a local disk."
#[test]
fn user_attributes_are_kept_replaced_listed_and_removed() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let file = mount.join("file");
    fs::write(&file, "").expect("write");
    sys::set_xattr(&file, "user.a", b"one", libc::XATTR_CREATE).expect("create");
    assert_eq!(errno(sys::set_xattr(&file, "user.a", b"x", libc::XATTR_CREATE)), libc::EEXIST);
    assert_eq!(errno(sys::set_xattr(&file, "user.b", b"x", libc::XATTR_REPLACE)), libc::ENODATA);
    sys::set_xattr(&file, "user.b", &[0xff; 60_000], 0).expect("a large value");
    sys::set_xattr(&file, "user.a", b"two", libc::XATTR_REPLACE).expect("replace");
    mount.remount();
    assert_eq!(sys::get_xattr(&file, "user.a").expect("get"), b"two");
    assert_eq!(sys::get_xattr(&file, "user.b").expect("get"), [0xff; 60_000]);
    assert_eq!(sys::list_xattrs(&file).expect("list"), b"user.a\0user.b\0");
    sys::remove_xattr(&file, "user.a").expect("remove");
    assert_eq!(errno(sys::get_xattr(&file, "user.a")), libc::ENODATA);
    assert_eq!(errno(sys::remove_xattr(&file, "user.a")), libc::ENODATA);
}

/// "O_APPEND, O_TRUNC, O_EXCL and the others mean what open(2) says."
#[test]
fn open_flags_mean_what_open_2_says() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let path = mount.join("file");
    let exclusive = || OpenOptions::new().write(true).create_new(true).open(&path);
    exclusive().expect("the name is free");
    assert_eq!(errno(exclusive()), libc::EEXIST);
    fs::write(&path, "0123456789").expect("write");
    let truncated = OpenOptions::new().write(true).truncate(true).open(&path).expect("O_TRUNC");
    assert_eq!(truncated.metadata().expect("stat").len(), 0);
    truncated.write_all_at(b"abc", 5).expect("write");
    assert_eq!(fs::read(&path).expect("read"), b"\0\0\0\0\0abc");
    let synced = OpenOptions::new().write(true).custom_flags(libc::O_SYNC).open(&path).expect("O_SYNC");
    synced.write_all_at(b"synced", 0).expect("write");
    assert_eq!(errno(OpenOptions::new().write(true).open(mount.path())), libc::EISDIR);
    let directory = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&path);
    assert_eq!(errno(directory), libc::ENOTDIR);
    symlink("file", mount.join("link")).expect("symlink");
    let not_followed = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(mount.join("link"));
    assert_eq!(errno(not_followed), libc::ELOOP);
}

/// "Times of files are kept to the nanosecond, also those before 1970."
#[test]
fn times_are_kept_to_the_nanosecond_also_before_1970() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let path = mount.join("file");
    fs::write(&path, "x").expect("write");
    for (atime, mtime) in [((1, 1), (2, 999_999_999)), ((-5, 7), (-1, 0)), ((5_000_000_000, 3), (4_102_444_800, 4))] {
        sys::set_times(&path, atime, mtime).expect("utimensat");
        mount.remount();
        let meta = fs::metadata(&path).expect("stat");
        assert_eq!(((meta.atime(), meta.atime_nsec()), (meta.mtime(), meta.mtime_nsec())), (atime, mtime));
    }
    let before = fs::metadata(&path).expect("stat");
    fs::write(&path, "y").expect("write");
    let after = fs::metadata(&path).expect("stat");
    assert!((after.mtime(), after.mtime_nsec()) != (before.mtime(), before.mtime_nsec()), "a write changes mtime");
    assert!((after.ctime(), after.ctime_nsec()) > (before.ctime(), before.ctime_nsec()), "and ctime");
}

/// "`df` tells true figures."
#[test]
fn statfs_tells_true_figures() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let said = holdfast_tests::shell::run(mount.path(), "stat -f -c '%S %b %f %l' .");
    let numbers: Vec<u64> = said.split_whitespace().map(|number| number.parse().expect("a number")).collect();
    let (capacity, free) = (numbers[0] * numbers[1], numbers[0] * numbers[2]);
    assert!(capacity > 0 && free > 0 && free <= capacity, "{said}");
    assert_eq!(numbers[3], 255);
    let servers = cluster.status().storage_sum("capacity_bytes");
    assert!(capacity <= servers / 2, "three copies of everything fit in {servers}, but {capacity} is promised");
}

/// "`df` is true within a block: what is written is used, once, and every file counts."
#[test]
fn df_tells_what_was_written_to_the_block_and_each_inode() {
    const MIB: u64 = 1 << 20;
    let cluster = Cluster::start_with(&Options {
        storage_keys: vec![("capacity_bytes", "300MiB".into()), ("reserve_bytes", 0.into())],
        ..Options::default()
    });
    let mount = cluster.mount();
    // Block size, and what is used of bytes and inodes.
    let used = || {
        let said = holdfast_tests::shell::run(mount.path(), "stat -f -c '%S %b %f %c %d' .");
        let numbers: Vec<u64> = said.split_whitespace().map(|number| number.parse().expect("a number")).collect();
        (numbers[0], (numbers[1] - numbers[2]) * numbers[0], numbers[3] - numbers[4])
    };
    let (block, bytes_before, inodes_before) = used();
    let length = 10 * MIB + 12_345;
    for number in 0..3 {
        let mut file = File::create(mount.join(format!("file-{number}"))).expect("create");
        file.write_all(&random_bytes(number, usize::try_from(length).expect("small"))).expect("write");
        file.sync_all().expect("fsync");
    }
    fs::create_dir(mount.join("directory")).expect("mkdir");
    let expected = bytes_before + 3 * length;
    wait::until("the servers have said what they have", PATIENCE, || used().1.abs_diff(expected) <= block);
    assert_eq!(used().2, inodes_before + 4);
}

/// "A mapped file can be read and written through memory."
#[test]
fn a_mapped_file_is_read_and_written_through_memory() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let said = holdfast_tests::shell::run(
        mount.path(),
        "python3 - <<'EOF'
import mmap, os
with open('mapped', 'w+b') as f:
    f.truncate(3 << 20)
    with mmap.mmap(f.fileno(), 3 << 20) as m:
        m[0:5] = b'first'
        m[(1 << 20) - 3:(1 << 20) + 3] = b'across'
        m.flush()
with open('mapped', 'rb') as f:
    data = f.read()
print(data[:5].decode(), data[(1 << 20) - 3:(1 << 20) + 3].decode(), len(data), data.count(0))
EOF",
    );
    assert_eq!(said, format!("first across {} {}\n", 3 << 20, (3 << 20) - 11));
    mount.remount();
    let mut bytes = Vec::new();
    File::open(mount.join("mapped")).expect("open").read_to_end(&mut bytes).expect("read");
    assert_eq!(&bytes[(1 << 20) - 3..][..6], b"across");
}

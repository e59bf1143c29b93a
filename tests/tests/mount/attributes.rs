//! Lists of permissions, capabilities and other attributes: what a local disk answers, the mount answers.

use std::{fs, os::unix::fs::MetadataExt, path::Path, time::Duration};

use holdfast_tests::{cluster::Cluster, shell, sys, wait};

/// Runs `script` on the mount and on the local disk: both say the same.
fn check_same(script: &str) {
    if !sys::is_root() {
        eprintln!("SKIPPED: only root can set capabilities and become somebody else");
        return;
    }
    let cluster = Cluster::start();
    let mount = cluster.mount_with(&["allow_other"]);
    let local = tempfile::tempdir().expect("a directory of the local disk");
    let expected = shell::run(local.path(), script);
    assert!(expected.lines().count() > 5, "the script says too little: {expected}");
    assert_eq!(shell::run(mount.path(), script), expected, "on the mount, and on the local disk");
    // And the same again from what is stored.
    mount.remount();
    let look = "shopt -s globstar; getfacl -cnp ** 2>/dev/null; stat -c '%n %a' **; getcap ** || true";
    assert_eq!(shell::run(mount.path(), look), shell::run(local.path(), look), "after a remount");
}

/// "They change with the mode, and the mode with them."
#[test]
fn lists_of_permissions_are_kept_and_change_with_the_mode() {
    check_same(
        "umask 022; touch f; chmod 640 f
         show() { getfacl -cnp f; stat -c %a f; }
         setfacl -m u:1234:rw f; show
         setfacl -m g:77:x f; show
         chmod 600 f; show
         chmod 4771 f; show
         setfacl -m m::r f; show
         setfacl -x u:1234 f; show
         setfacl -b f; show
         setfacl -b f; show
         setfacl --set u::rwx,g::r,o::- f; show; getfattr -d -m - f | wc -l
         setfacl -d -m u:5:r f 2>/dev/null || echo refused",
    );
}

/// "What is made in a directory inherits its default list instead of the umask."
#[test]
fn what_is_made_in_a_directory_inherits_its_default_list_instead_of_the_umask() {
    check_same(
        "umask 077; mkdir d
         setfacl -d -m u:1234:rwx,g:9:rx,g::rx,o::r d; getfacl -cnp d
         touch d/f; mkdir -p d/sub/deeper; mkfifo d/p; (umask 000; touch d/open; mkdir d/wide); ln -s f d/link
         cp /bin/true d/program; touch d/sub/g
         getfacl -cnp d/f d/p d/open d/wide d/program d/sub d/sub/deeper d/sub/g; stat -c '%n %a' d/* d/sub/*
         setfacl -k d; getfacl -cnp d; touch d/later; mkdir d/latest; stat -c '%n %a' d/later d/latest
         mkdir s; chmod 2755 s; chgrp 7 s; setfacl -d -m u:3:rwx s; mkdir s/sub; touch s/f; stat -c '%n %a %g' s/sub s/f",
    );
}

/// "POSIX access control lists are obeyed."
#[test]
fn lists_of_permissions_are_obeyed() {
    check_same(
        "umask 022; chmod 711 .; mkdir d; echo secret > d/f; chmod 600 d/f; chmod 700 d
         as() { setpriv --reuid=$1 --regid=$2 --clear-groups ${@:3} 2>/dev/null || echo no; }
         as 1234 55 cat d/f
         setfacl -m u:1234:x d; as 1234 55 cat d/f
         setfacl -m u:1234:r d/f; as 1234 55 cat d/f; as 1235 55 cat d/f
         setfacl -m g:55:r d/f; setfacl -m g:55:x d; as 1235 55 cat d/f
         setfacl -m m::- d/f; as 1234 55 cat d/f; as 1235 55 cat d/f
         setfacl -m u:1234:wx d; as 1234 55 touch d/new; as 1235 55 touch d/other; ls d
         setfacl -b d/f; as 1234 55 cat d/f",
    );
}

/// "Capabilities of programs work, and are lost with a write."
#[test]
fn capabilities_of_programs_are_kept_and_lost_with_a_write() {
    check_same(
        "umask 022; cp /bin/true p; setcap cap_net_raw+ep p; getcap p; ./p && echo runs
         chown 5 p; getcap p; echo chowned
         setcap cap_net_raw+ep p; echo x >> p; getcap p; echo written
         setcap cap_net_raw+ep p; truncate -s 10 p; getcap p; echo truncated
         chmod 6755 p; setpriv --reuid=9 --regid=9 --clear-groups sh -c 'echo x >> p' 2>/dev/null || echo no; stat -c %a p
         chmod 6757 p; setpriv --reuid=9 --regid=9 --clear-groups sh -c 'echo x >> p'; stat -c %a p
         chmod 2746 p; setpriv --reuid=9 --regid=9 --clear-groups sh -c 'echo x >> p'; stat -c %a p
         chmod 6757 p; echo x >> p; stat -c %a p
         setcap cap_net_raw,cap_sys_ptrace=ep p; getcap p; setcap -r p; getcap p; echo removed
         setfattr -n trusted.a -v 1 p; setfattr -n user.b -v 2 p; setfattr -n security.c -v 3 p
         getfattr -d -m - p; chmod 644 p; setpriv --reuid=9 --regid=9 --clear-groups getfattr -d -m - p",
    );
}

/// Seconds and nanoseconds of the last access, as programs see it.
fn accessed(path: &Path) -> (i64, i64) {
    let metadata = fs::symlink_metadata(path).expect("stat");
    (metadata.atime(), metadata.atime_nsec())
}

/// "Reading is noted in a file's time of access as `relatime` (without a word), `strictatime` or `noatime` say; it is told to the servers within a second, and changes nothing else of the file."
#[test]
fn reading_is_noted_as_the_mount_options_say() {
    let cluster = Cluster::start();
    let (relative, strict, never) =
        (cluster.mount(), cluster.mount_with(&["strictatime"]), cluster.mount_with(&["noatime"]));
    let old = "touch -a -d '2020-01-01 00:00:00' file && touch -m -d '2020-01-02 00:00:00' file";
    for (mount, name) in [(&relative, "relative"), (&strict, "strict"), (&never, "never")] {
        let directory = mount.join(name);
        fs::create_dir(&directory).expect("make a directory");
        fs::write(directory.join("file"), "content").expect("write");
        shell::run(&directory, old);
        let file = directory.join("file");
        let before = accessed(&file);
        assert_eq!(before.0, 1_577_836_800);
        let changed = fs::metadata(&file).expect("stat").ctime();
        // The kernel may have the bytes already: that is reading all the same.
        assert_eq!(fs::read(&file).expect("read"), b"content");
        let first = accessed(&file);
        assert_eq!(first > before, name != "never", "{name}: {first:?}");
        assert_eq!(fs::read(&file).expect("read"), b"content");
        let second = accessed(&file);
        assert_eq!(second > first, name == "strict", "{name}: {second:?}");
        assert_eq!(fs::metadata(&file).expect("stat").ctime(), changed, "reading changes nothing else");
        // It is remembered by the servers, and a time that is set by hand is not overtaken.
        let there = strict.join(name).join("file");
        wait::until("another mount sees it", Duration::from_secs(20), || accessed(&there) == second);
        shell::run(&directory, "touch -a -d '2001-01-01 00:00:00' file");
        // What is told after it has been told.
        fs::write(directory.join("marker"), "content").expect("write");
        let unread = accessed(&directory.join("marker"));
        assert_eq!(fs::read(directory.join("marker")).expect("read"), b"content");
        let marker = strict.join(name).join("marker");
        if name != "never" {
            wait::until("a later access is told", Duration::from_secs(20), || accessed(&marker) > unread);
        }
        assert_eq!(accessed(&file).0, 978_307_200, "{name}");
    }
    relative.remount();
    assert_eq!(fs::read(relative.join("relative/file")).expect("read"), b"content");
    let noted = accessed(&relative.join("relative/file"));
    relative.remount();
    assert_eq!(accessed(&relative.join("relative/file")), noted, "what was noted is told before the mount ends");
}

//! Lists of permissions, capabilities and other attributes: what a local disk answers, the mount answers.

use holdfast_tests::{cluster::Cluster, shell, sys};

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

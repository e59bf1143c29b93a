//! The tools that people use, in a mounted cluster, compared with what they do elsewhere.

use std::{fs, path::Path};

use holdfast_tests::{
    cluster::{self, Cluster},
    fault::random_bytes,
    shell, tree,
};

/// A source tree of thousands of small files, with links, modes and depth, outside of the mount.
fn source_tree(root: &Path) {
    for module in 0..40u64 {
        let folder = root.join(format!("src/module{module:02}/detail"));
        fs::create_dir_all(&folder).expect("make a folder");
        for number in 0..50u64 {
            let seed = module * 100 + number;
            let length = usize::try_from(seed * 37 % 9000).expect("small");
            let name = format!("part{number:02}.c");
            let directory = if number % 2 == 0 { folder.as_path() } else { folder.parent().expect("has a parent") };
            fs::write(directory.join(name), random_bytes(seed, length)).expect("write a source");
        }
    }
    fs::write(root.join("large.bin"), random_bytes(1, (5 << 20) + 4321)).expect("write a large file");
    shell::run(
        root,
        "ln -s ../src/module01 src/link
         ln large.bin hardlink.bin
         chmod 750 src/module02
         chmod +x src/module03/detail/part02.c
         touch -d '2001-02-03 04:05:06.789' src/module04/part01.c
         mkdir -p 'a name with spaces' empty",
    );
}

#[test]
fn tar_unpacks_a_source_tree_and_every_hash_is_right_after_a_remount() {
    let (cluster, outside) = (Cluster::start(), cluster::temp_dir());
    let mount = cluster.mount();
    source_tree(outside.path());
    shell::run(mount.path(), &format!("tar -C {} --format=posix -cf - . | tar -xpf -", outside.path().display()));
    tree::assert_same(outside.path(), mount.path());
    mount.remount();
    tree::assert_same(outside.path(), mount.path());
    let copied = shell::run(mount.path(), "stat -c '%y' src/module04/part01.c");
    assert!(copied.starts_with("2001-02-03 04:05:06.789"), "{copied}");
    shell::run(
        mount.path(),
        "tar --format=posix -cf ../again.tar . && rm -rf src large.bin && test ! -e src && tar -xpf ../again.tar",
    );
    tree::assert_same(outside.path(), mount.path());
    let log = mount.process().log();
    assert!(!log.contains("storing it again"), "no server has lost anything: {log}");
}

#[test]
fn git_clones_commits_branches_checks_and_collects() {
    let (cluster, outside) = (Cluster::start(), cluster::temp_dir());
    let mount = cluster.mount();
    let script = "
        export HOME=$PWD GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
        git init -q origin && cd origin
        for i in $(seq 300); do echo \"file $i\" > f$i.txt; done
        git add . && git commit -qm first
        for i in $(seq 20); do echo $i >> f$i.txt; git commit -qam \"change $i\"; done
        cd .. && git clone -q --no-hardlinks origin clone && cd clone
        git checkout -qb branch && git mv f1.txt renamed.txt && git rm -q f2.txt && git commit -qam moved
        git checkout -q - && git merge -q branch && git stash list && git status --porcelain
        git fsck --full --strict 2>&1 && git gc -q --aggressive --prune=now && git fsck --full 2>&1
        git push -q origin HEAD:refs/heads/pushed
        git log --oneline | wc -l";
    let on_mount = shell::run(mount.path(), script);
    assert_eq!(on_mount, shell::run(outside.path(), script));
    mount.remount();
    shell::run(&mount.join("clone"), "git -c safe.directory='*' fsck --full --strict && test -e renamed.txt");
}

#[test]
fn cargo_builds_and_runs_a_crate() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let said = shell::run(
        mount.path(),
        "unset CARGO_TARGET_DIR RUSTC_WRAPPER RUSTFLAGS CARGO_BUILD_RUSTFLAGS
         cargo new -q --vcs none demo && cd demo
         cargo build -q --offline && cargo test -q --offline && cargo run -q --offline
         touch src/main.rs && cargo build -q --offline --release && ./target/release/demo",
    );
    assert_eq!(said.matches("Hello, world!").count(), 2, "{said}");
}

#[test]
fn rsync_copies_finds_nothing_to_do_and_sees_one_changed_byte() {
    let (cluster, outside) = (Cluster::start(), cluster::temp_dir());
    let mount = cluster.mount();
    source_tree(outside.path());
    let sync = format!("rsync -acH --delete --itemize-changes {}/ .", outside.path().display());
    shell::run(mount.path(), &sync);
    tree::assert_same(outside.path(), mount.path());
    assert_eq!(shell::run(mount.path(), &sync), "", "the second run has nothing to do");
    shell::run(
        outside.path(),
        "printf x | dd of=large.bin bs=1 seek=3000000 conv=notrunc status=none; rm -r src/module05",
    );
    let changes = shell::run(mount.path(), &sync);
    assert!(changes.contains("large.bin") && changes.contains("src/module05/detail/part00.c"), "{changes}");
    tree::assert_same(outside.path(), mount.path());
    shell::run(mount.path(), &sync.replace(" -acH", " -aH --inplace --no-whole-file -c"));
}

#[test]
fn sqlite_keeps_its_integrity_in_both_journal_modes() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    for journal in ["delete", "wal"] {
        let script = format!(
            "sqlite3 {journal}.db \"PRAGMA journal_mode={journal}; PRAGMA synchronous=FULL; CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB);\"
             for i in $(seq 20); do sqlite3 {journal}.db \"INSERT INTO t(v) VALUES(randomblob($i * 700));\"; done
             sqlite3 {journal}.db \"BEGIN; WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c WHERE n<5000) INSERT INTO t(v) SELECT randomblob(200) FROM c; DELETE FROM t WHERE id % 3 = 0; COMMIT; VACUUM;\"
             sqlite3 {journal}.db 'PRAGMA integrity_check; SELECT count(*) FROM t;'"
        );
        let said = shell::run(mount.path(), &script);
        assert!(said.contains(&format!("{journal}\n")) && said.ends_with("ok\n3347\n"), "{journal}: {said}");
    }
    mount.remount();
    let said = shell::run(
        mount.path(),
        "for db in *.db; do sqlite3 $db 'PRAGMA integrity_check; SELECT count(*) FROM t;'; done",
    );
    assert_eq!(said, "ok\n3347\nok\n3347\n");
}

#[test]
fn make_rebuilds_exactly_what_is_newer() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    fs::write(mount.join("Makefile"), "out: a.o b.o\n\tcat a.o b.o > out\n%.o: %.c\n\tcp $< $@\n").expect("write");
    shell::run(mount.path(), "echo a > a.c; echo b > b.c");
    assert_eq!(shell::run(mount.path(), "make | wc -l"), "3\n");
    assert!(shell::run(mount.path(), "make").contains("up to date"));
    let again = shell::run(mount.path(), "sleep 0.02; touch b.c; make");
    assert_eq!(again, "cp b.c b.o\ncat a.o b.o > out\n");
}

#[test]
fn the_everyday_tools_do_what_they_do_on_a_local_disk() {
    let (cluster, outside) = (Cluster::start(), cluster::temp_dir());
    let mount = cluster.mount();
    let script = "
        mkdir -p d/e/f && cd d
        seq 100000 > numbers && dd if=numbers of=copy bs=7777 status=none && cmp numbers copy
        dd if=/dev/zero of=sparse bs=1 count=1 seek=10M status=none && stat -c %s sparse
        dd if=numbers of=direct bs=4096 count=8 conv=fsync status=none
        cp -a numbers e/preserved && cp --sparse=always sparse e/sparse && cmp sparse e/sparse
        mv numbers e/f/moved && ln e/f/moved hard && ln -s e/f/moved soft && stat -c '%h' hard && readlink soft
        chmod 640 hard && stat -c %a e/f/moved && chmod u+s,g+s,o+t e && stat -c %a e
        chown 12:34 hard && stat -c '%u %g' soft -L
        sort -rn soft | head -3 && grep -c 77 hard && wc -c < copy
        printf 'one\\ntwo\\nthree\\n' > text
        ex -s text <<'EOF'
%s/two/zwei/
1d
wq
EOF
        cat text && sed -i s/three/drei/ text && cat text
        head -c 1000 copy > short && truncate -s 10 short && cat short && truncate -s 20 short && od -c short | tail -2
        : > empty && test -f empty && test ! -s empty && echo more >> empty && cat empty
        mkfifo fifo && (echo through > fifo & cat fifo)
        find . -type f -newer numbers 2>/dev/null || find . | sort
        find . -name '*o*' -type f -size +10k | sort
        mkdir gone && rmdir gone && ! rmdir e 2>/dev/null && rm -r e && ls -1
        tar cf t.tar text short && tar df t.tar && tar tf t.tar
        (flock -x 9; echo locked) 9> lock
        diff -q text copy || echo differ";
    assert_eq!(shell::run(mount.path(), script), shell::run(outside.path(), script));
}

#[test]
fn vi_edits_and_saves_with_backup_and_swap_files() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    fs::write(mount.join("text"), "alpha\nbeta\n").expect("write");
    shell::run(
        mount.path(),
        "vi -u NONE -N -es -c 'set backup writebackup backupdir=. backupskip=' -c '%s/beta/gamma/' -c 'wq' text",
    );
    assert_eq!(fs::read_to_string(mount.join("text")).expect("read"), "alpha\ngamma\n");
    assert_eq!(fs::read_to_string(mount.join("text~")).expect("read"), "alpha\nbeta\n");
}

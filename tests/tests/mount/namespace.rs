//! Mounts in a mount namespace of their own, where the machine can be changed: no `/dev/fuse`, a helper in `/sbin`.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use holdfast_tests::{cluster::Cluster, process, shell, sys};

const SENTENCE_LIMIT: Duration = Duration::from_secs(5);
const SCRIPT_LIMIT: Duration = Duration::from_secs(60);

/// Runs `script` with bash as the first process of new namespaces: what it mounts and starts ends with it.
fn in_namespaces(script: &str) -> Output {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-euo", "pipefail", "-c"]);
    command.arg(script);
    shell::complete(command, SCRIPT_LIMIT)
}

/// A cluster and an empty directory in it; `None` where namespaces cannot be made.
fn cluster_and_target() -> Option<(Cluster, std::path::PathBuf)> {
    if !sys::is_root() {
        eprintln!("SKIPPED: a mount namespace needs root");
        return None;
    }
    let cluster = Cluster::start();
    let target = cluster.path().join("mnt-9");
    fs::create_dir(&target).expect("mkdir");
    Some((cluster, target))
}

fn program() -> String {
    process::binary("holdfast").get_program().to_str().expect("test paths are UTF-8").to_owned()
}

#[test]
fn without_the_fuse_device_a_mount_is_refused_with_a_sentence_that_names_it() {
    let Some((cluster, target)) = cluster_and_target() else { return };
    for hide in [
        "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3",
        "mount --bind /dev/null /dev/fuse",
        "mount --bind /etc/passwd /dev/fuse",
    ] {
        for more in ["", "-f"] {
            assert_says_that_fuse_is_missing(hide, &cluster.path().join("client.toml"), &target, more);
        }
    }
}

fn assert_says_that_fuse_is_missing(hide: &str, config: &Path, target: &Path, more: &str) {
    let start = Instant::now();
    let output =
        in_namespaces(&format!("{hide}; exec {} mount {} {} {more}", program(), config.display(), target.display()));
    let (took, said) = (start.elapsed(), String::from_utf8_lossy(&output.stderr));
    // 1: refused. bash has other numbers for what goes wrong before.
    assert_eq!(output.status.code(), Some(1), "{hide}, {more:?}: {said}");
    assert!(took < SENTENCE_LIMIT, "{hide}, {more:?}: took {took:?}");
    assert!(said.contains("/dev/fuse") && said.lines().count() == 1, "{hide}, {more:?}: {said}");
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn mount_8_and_fstab_work_through_the_helper() {
    let Some((cluster, target)) = cluster_and_target() else { return };
    let helper = cluster.path().join("sbin");
    fs::create_dir(&helper).expect("mkdir");
    std::os::unix::fs::symlink(program(), helper.join("mount.holdfast")).expect("make the helper");
    let output = in_namespaces(&format!(
        r#"
        config={config} target={target} table={table}
        mount -t overlay overlay -o lowerdir={helper}:"$(readlink -f /sbin)" "$(readlink -f /sbin)"
        mounted() {{ grep -q " $target fuse.holdfast " /proc/mounts; }}
        # bash overlooks a `!` that fails.
        refused() {{ if "$@"; then echo "not refused: $*"; exit 3; fi; }}
        # Whoever unmounts need not wait for the last byte; who ends the namespace must.
        finish() {{ umount "$target"; while ls -l /proc/[0-9]*/exe 2> /dev/null | grep -q '/holdfast$'; do sleep 0.05; done; }}

        mount -t holdfast -o allow_other,io_timeout=5s,_netdev,noauto "$config" "$target"
        mounted
        grep " $target " /proc/mounts | grep -q allow_other
        echo "through mount(8)" > "$target/file"
        finish

        echo "$config $target holdfast ro,noatime,allow_other,io_timeout=5s,_netdev,noauto 0 0" > "$table"
        mount -a -T "$table"
        refused mounted
        mount -T "$table" "$target"
        grep "through mount(8)" "$target/file"
        refused touch "$target/new" 2> /dev/null
        finish

        refused mount -t holdfast -o surprise "$config" "$target" 2> "$table.errors"
        grep -q surprise "$table.errors"
        refused mount -t holdfast -o io_timeout=soon "$config" "$target" 2> "$table.errors"
        grep -q io_timeout "$table.errors"
        refused mounted
        mount -s -t holdfast -o surprise "$config" "$target"
        mounted
        finish
        echo all
        "#,
        config = cluster.path().join("client.toml").display(),
        target = target.display(),
        table = cluster.path().join("fstab").display(),
        helper = helper.display(),
    ));
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{errors}");
    assert_eq!(said, "through mount(8)\nall\n", "{errors}");
    assert!(cluster.status().0["mounts"].as_array().expect("status lists mounts").is_empty(), "every session ended");
}

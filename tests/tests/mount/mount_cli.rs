//! The command line around a mount: what it refuses, how it ends, what `up` and `down` keep.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::Output,
    time::{Duration, Instant},
};

use holdfast_tests::{
    cluster::{Cluster, holdfast, holdfast_ok, temp_dir},
    fault::random_bytes,
    mount, shell, wait,
};

const SENTENCE_LIMIT: Duration = Duration::from_secs(5);

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// `holdfast mount` with these arguments says no in time, with `words`, and without noise.
fn assert_refused(arguments: &[&str], words: &[&str]) {
    let start = Instant::now();
    let output = holdfast(arguments);
    let (took, said) = (start.elapsed(), said(&output));
    assert!(!output.status.success(), "{arguments:?} must be refused: {said}");
    assert!(took < SENTENCE_LIMIT, "{arguments:?} took {took:?} to be refused");
    for word in words {
        assert!(said.contains(word), "{arguments:?}: {word:?} is missing in: {said}");
    }
    assert!(!said.contains("panicked") && !said.contains("backtrace"), "{said}");
}

#[test]
fn a_mount_point_that_cannot_be_one_is_refused_with_a_sentence() {
    let cluster = Cluster::start();
    let config = cluster.path().join("client.toml");
    let (file, full, missing) =
        (cluster.path().join("file"), cluster.path().join("full"), cluster.path().join("missing"));
    fs::write(&file, "").expect("write");
    fs::create_dir_all(full.join("something")).expect("mkdir");
    for background in [false, true] {
        let more: &[&str] = if background { &[] } else { &["-f"] };
        let mount = |target: &Path, words: &[&str]| {
            assert_refused(&[&["mount", text(&config), text(target)], more].concat(), words);
        };
        mount(&file, &[text(&file), "directory"]);
        mount(&full, &[text(&full), "not empty"]);
        mount(&missing, &[text(&missing)]);
    }
    let empty = cluster.path().join("empty");
    fs::create_dir(&empty).expect("mkdir");
    assert_refused(&["mount", "/no/such/config", text(&empty)], &["/no/such/config"]);
    assert_refused(&["mount", text(&config), text(&empty), "-o", "surprise"], &["surprise"]);
}

#[test]
fn no_server_is_a_sentence_within_five_seconds() {
    let cluster = Cluster::start();
    let config = cluster.path().join("client.toml");
    let target = cluster.path().join("mnt-9");
    fs::create_dir(&target).expect("mkdir");
    cluster.meta().kill();
    let address = cluster.get("client.toml", "meta");
    for more in [&[][..], &["-f"]] {
        assert_refused(&[&["mount", text(&config), text(&target)], more].concat(), &[&address]);
        assert!(!mount::is_mounted(&target));
    }
}

/// "An unmount stores everything."
#[test]
fn a_mount_in_the_background_answers_when_the_command_returns_and_flushes_when_unmounted() {
    let cluster = Cluster::start();
    let target = cluster.path().join("mnt-9");
    fs::create_dir(&target).expect("mkdir");
    for name in ["umount", "fusermount3 -u"] {
        holdfast_ok(&["mount", text(cluster.path()), text(&target)]);
        assert!(mount::is_mounted(&target), "it must be mounted when the command returns");
        let content = random_bytes(1, 3 << 20);
        fs::write(target.join(name), &content).expect("write");
        wait::until("umount succeeds", SENTENCE_LIMIT, || {
            let script = format!("{name} {}", target.display());
            shell::attempt(Path::new("/"), &script, SENTENCE_LIMIT).status.success()
        });
        wait::until("the mount is gone", SENTENCE_LIMIT, || !mount::is_mounted(&target));
        wait::until("the session has ended", Duration::from_secs(20), || {
            cluster.status().0["mounts"].as_array().expect("status lists mounts").is_empty()
        });
        let reader = cluster.mount();
        assert!(fs::read(reader.join(name)).expect("read") == content, "{name} did not flush");
    }
}

/// "So does SIGTERM to the mount, whatever is open."
#[test]
fn sigterm_flushes_what_was_never_closed() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let content = random_bytes(2, 5 << 20);
    let mut file = File::create(mount.join("open")).expect("create");
    file.write_all(&content).expect("write");
    let status = mount.process().terminate(Duration::from_secs(30));
    assert!(status.success(), "{status}: {}", mount.process().log());
    drop(file);
    mount::detach(mount.path());
    mount.start_again();
    assert!(fs::read(mount.join("open")).expect("read") == content, "SIGTERM did not flush");
}

#[test]
fn up_works_for_who_stands_on_the_mount_and_leaves_nothing_there() {
    let dir = holdfast_tests::cluster::temp_dir();
    let cluster = dir.path().to_str().expect("test paths are UTF-8");
    let mount = dir.path().join("mnt");
    let up = |from: &std::path::Path| {
        let mut command = holdfast_tests::process::binary("holdfast");
        command.args(["up", "--dir", cluster]).current_dir(from);
        let output = shell::complete(command, Duration::from_secs(60));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    up(dir.path());
    let pid = fs::read_to_string(dir.path().join("run/meta.pid")).expect("read the pid");
    let pid: i32 = pid.split_whitespace().next().and_then(|pid| pid.parse().ok()).expect("a number");
    shell::run(dir.path(), &format!("kill -9 {pid}"));
    up(&mount);
    fs::write(mount.join("file"), "works").expect("write");
    holdfast_tests::cluster::holdfast_ok(&["down", "--dir", cluster]);
}

#[test]
fn up_and_down_and_up_again_keep_the_data() {
    let dir = temp_dir();
    let (cluster, target) = (dir.path().join("cluster"), dir.path().join("mnt"));
    let guard = Downed(&cluster, &target);
    let up = ["up", "--dir", text(&cluster), "--mount", text(&target), "--storage", "3"];
    let said = holdfast_ok(&up);
    assert!(said.contains(text(&target)), "up says where everything is: {said}");
    let content = random_bytes(5, 4 << 20);
    fs::write(target.join("kept"), &content).expect("write");
    let table = holdfast_ok(&["status", "--dir", text(&cluster)]);
    assert!(table.matches("up").count() >= 3, "{table}");
    holdfast_ok(&up);
    holdfast_ok(&["down", "--dir", text(&cluster)]);
    assert!(!mount::is_mounted(&target));
    assert!(!holdfast(&["status", "--dir", text(&cluster)]).status.success(), "nothing runs after down");
    holdfast_ok(&up);
    assert!(fs::read(target.join("kept")).expect("read") == content);
    holdfast_ok(&["down", "--dir", text(&cluster)]);
    drop(guard);
}

/// Whatever happens, the cluster that `up` started is stopped.
struct Downed<'a>(&'a Path, &'a Path);

impl Drop for Downed<'_> {
    fn drop(&mut self) {
        mount::detach(self.1);
        holdfast(&["down", "--dir", text(self.0), "--force"]);
    }
}

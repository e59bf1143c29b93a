//! Daemons that are started wrongly say one sentence and end; daemons that are hurt lose nothing.

use std::{
    fs::{self, File},
    io::Write,
    net::UdpSocket,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Output,
    time::Duration,
};

use holdfast_tests::{
    cluster::{Cluster, Options, PATIENCE, free_address},
    fault::random_bytes,
    process, shell,
    small_disk::SmallDisk,
    sys, wait,
};

/// A daemon that cannot run says so within this.
const REFUSAL_LIMIT: Duration = Duration::from_secs(15);

fn daemon(cluster: &Cluster, role: &str, config: &str, more: &[&str]) -> Output {
    let mut command = process::binary("holdfastd");
    command.arg(role).arg("--config").arg(cluster.path().join(config)).args(more);
    shell::complete(command, REFUSAL_LIMIT)
}

/// It ended with an error, and what it said is short, whole and contains each of `words`.
fn assert_refused(output: &Output, words: &[&str]) {
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success(), "it must not succeed: {said}");
    assert!(output.status.code().is_some(), "it must end by itself: {}", output.status);
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
    for noise in ["panicked", "stack backtrace", "RUST_BACKTRACE"] {
        assert!(!said.contains(noise), "{said}");
    }
}

#[test]
fn a_second_process_on_a_data_directory_is_refused() {
    let cluster = Cluster::start();
    for (role, config) in [("meta", "meta/meta.toml"), ("storage", "storage-1/storage.toml")] {
        let elsewhere = free_address().to_string();
        let output = daemon(&cluster, role, config, &["--listen", &elsewhere]);
        assert_refused(&output, &["data"]);
    }
    cluster.wait_until_up();
}

#[test]
fn the_data_directory_of_another_cluster_or_another_node_is_refused() {
    let (cluster, other) = (Cluster::start(), Cluster::start());
    for process in cluster.storage_servers().iter().chain(other.storage_servers()) {
        process.terminate(REFUSAL_LIMIT);
    }
    let foreign = other.storage_data(1);
    let foreign = foreign.to_str().expect("test paths are UTF-8");
    assert_refused(&daemon(&cluster, "storage", "storage-1/storage.toml", &["--data-dir", foreign]), &["cluster"]);
    let neighbour = cluster.storage_data(2);
    let neighbour = neighbour.to_str().expect("test paths are UTF-8");
    assert_refused(&daemon(&cluster, "storage", "storage-1/storage.toml", &["--data-dir", neighbour]), &[neighbour]);
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    let cluster = Cluster::prepare(&Options::default());
    for (role, file) in [("meta", "meta/meta.toml"), ("storage", "storage-1/storage.toml")] {
        let path = cluster.path().join(file);
        let text = fs::read_to_string(&path).expect("read");
        fs::write(&path, format!("# a comment\nsurprise = 1\n{text}")).expect("write");
        assert_refused(&daemon(&cluster, role, file, &[]), &["surprise", "line 2"]);
        fs::write(&path, "listen = [broken").expect("write");
        assert_refused(&daemon(&cluster, role, file, &[]), &["line 1"]);
        fs::remove_file(&path).expect("remove");
        assert_refused(&daemon(&cluster, role, file, &[]), &[file]);
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let cluster = Cluster::prepare(&Options::default());
    for (role, file) in [("meta", "meta/meta.toml"), ("storage", "storage-1/storage.toml")] {
        let address = cluster.get(file, "listen");
        let taken = UdpSocket::bind(&address).expect("the port is free");
        assert_refused(&daemon(&cluster, role, file, &[]), &[&address, "in use"]);
        drop(taken);
    }
}

#[test]
fn a_key_that_is_broken_or_missing_is_named() {
    let cluster = Cluster::prepare(&Options::default());
    for (role, file) in [("meta", "meta/meta.toml"), ("storage", "storage-1/storage.toml")] {
        let key = find_key(&cluster.path().join(file).with_file_name(""));
        let name = key.file_name().expect("a key has a name").to_string_lossy().into_owned();
        let mode = fs::metadata(&key).expect("stat").permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{}", key.display());
        fs::write(&key, "not a key").expect("write");
        assert_refused(&daemon(&cluster, role, file, &[]), &[&name]);
        fs::remove_file(&key).expect("remove");
        assert_refused(&daemon(&cluster, role, file, &[]), &[&name]);
    }
}

fn find_key(directory: &Path) -> std::path::PathBuf {
    let files = holdfast_tests::fault::files(directory);
    files.into_iter().find(|file| file.to_string_lossy().contains("key")).expect("a node has a private key")
}

#[test]
fn sigterm_ends_every_daemon_well_and_the_data_are_there_again() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    fs::write(mount.join("file"), random_bytes(1, 3 << 20)).expect("write");
    mount.unmount();
    for process in std::iter::once(cluster.meta()).chain(cluster.storage_servers()) {
        let status = process.terminate(Duration::from_secs(20));
        assert!(status.success(), "{} ended with {status}:\n{}", process.name(), process.log());
    }
    cluster.start_daemons();
    mount.start_again();
    assert!(fs::read(mount.join("file")).expect("read") == random_bytes(1, 3 << 20));
}

/// Makes files with long names in `directory` until one is refused; returns how many there are, and why not more.
fn make_until_refused(directory: &Path) -> (usize, std::io::Error) {
    let name = |number| directory.join(format!("{number:-<200}"));
    (0..)
        .find_map(|number: usize| File::create(name(number)).err().map(|error| (number, error)))
        .expect("a disk has an end")
}

#[test]
fn a_full_metadata_disk_refuses_growth_and_nothing_else() {
    if !sys::is_root() {
        eprintln!("SKIPPED: only root can mount small filesystems");
        return;
    }
    let cluster = Cluster::prepare(&Options::default());
    let path = cluster.path().join("disk");
    let disk = SmallDisk::mount(&path, 40);
    let data = path.join("data").to_str().expect("test paths are UTF-8").to_owned();
    cluster.set("meta/meta.toml", "data_dir", data);
    cluster.set("meta/meta.toml", "checkpoint_log_bytes", "1MiB");
    cluster.set("meta/meta.toml", "reserve_bytes", "20MiB");
    cluster.start_daemons();
    let mount = cluster.mount();
    fs::write(mount.join("early"), "early").expect("there is room");
    fs::create_dir(mount.join("d")).expect("there is room");
    let (made, error) = make_until_refused(&mount.join("d"));
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    assert!(made > 1000, "only {made} files fit");
    assert_eq!(fs::read_to_string(mount.join("early")).expect("reads go on"), "early");
    fs::rename(mount.join("early"), mount.join("moved")).expect("a rename needs no room");
    fs::remove_dir_all(mount.join("d")).expect("deleting needs no room");
    wait::until("what was deleted is in the tables", PATIENCE, || {
        fs::read_dir(mount.path()).is_ok_and(|all| all.count() == 1)
    });
    cluster.meta().terminate(PATIENCE);
    cluster.start_daemons();
    wait::until("there is room again", PATIENCE, || fs::create_dir(mount.join("d")).is_ok());
    assert_eq!(fs::read_to_string(mount.join("moved")).expect("read"), "early");
    assert!(!cluster.meta().log().contains("panicked"), "{}", cluster.meta().log());
    mount.unmount();
    cluster.meta().kill();
    drop(disk);
}

/// "What no room is left for is refused with ENOSPC before it is accepted, or at `fsync` and `close`; nothing else is lost."
#[test]
fn full_disks_are_no_space_left_and_nothing_else() {
    if !sys::is_root() {
        eprintln!("SKIPPED: only root can mount small filesystems");
        return;
    }
    let cluster = Cluster::prepare(&Options::default());
    let paths: Vec<_> = (1..=3).map(|n| cluster.path().join(format!("disk-{n}"))).collect();
    let disks: Vec<_> = paths.iter().map(|path| SmallDisk::mount(path, 160)).collect();
    for (n, path) in (1..).zip(&paths) {
        let data = path.join("data").to_str().expect("test paths are UTF-8").to_owned();
        let config = format!("storage-{n}/storage.toml");
        cluster.set(&config, "data_dir", data);
        cluster.set(&config, "reserve_bytes", "16MiB");
        cluster.set(&config, "segment_bytes", "16MiB");
    }
    cluster.start_daemons();
    let mount = cluster.mount_with(&["io_timeout=5s"]);
    let early = random_bytes(1, 4 << 20);
    fs::write(mount.join("early"), &early).expect("there is room");
    File::open(mount.join("early")).expect("open").sync_all().expect("fsync");

    let mut file = File::create(mount.join("large")).expect("create");
    let mut fill = || -> std::io::Result<()> {
        for number in 2..400 {
            file.write_all(&random_bytes(number, 1 << 20))?;
        }
        file.sync_all()
    };
    let error = fill().expect_err("400 MiB do not fit into 160");
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    drop(file);
    mount.kill();
    mount.start_again();
    assert!(fs::read(mount.join("early")).expect("read") == early, "what was there stays readable");
    for process in std::iter::once(cluster.meta()).chain(cluster.storage_servers()) {
        assert!(!process.has_ended(), "{} has ended:\n{}", process.name(), process.log());
        assert!(!process.log().contains("panicked"), "{}", process.log());
    }
    mount.unmount();
    for server in cluster.storage_servers() {
        server.kill();
    }
    cluster.start_daemons();
    mount.start_again();
    assert!(fs::read(mount.join("early")).expect("read") == early, "also after a restart on the full disk");
    mount.unmount();
    cluster.storage_servers().iter().for_each(process::Process::kill);
    drop(disks);
}

/// "A disk that others have filled to the last byte does not keep a server from starting, serving and deleting."
#[test]
fn servers_start_on_disks_without_a_free_byte() {
    if !sys::is_root() {
        eprintln!("SKIPPED: only root can mount small filesystems");
        return;
    }
    let cluster = Cluster::prepare(&Options::default());
    let paths = ["disk-meta", "disk-1"].map(|name| cluster.path().join(name));
    let disks = [0, 1].map(|n| SmallDisk::mount(&paths[n], 400));
    let data = |n: usize| paths[n].join("data").to_str().expect("test paths are UTF-8").to_owned();
    cluster.set("meta/meta.toml", "data_dir", data(0));
    cluster.set("meta/meta.toml", "garbage_grace_secs", 2);
    cluster.move_data(1, Path::new(&data(1)));
    cluster.start_daemons();
    let mount = cluster.mount();
    let content = random_bytes(1, 3 << 20);
    for (seed, name) in [(1, "kept"), (2, "early"), (3, "deleted")] {
        let content = random_bytes(seed, content.len());
        fs::write(mount.join(name), content).expect("there is room");
        File::open(mount.join(name)).expect("open").sync_all().expect("fsync");
    }
    wait::until("space is kept for full disks", PATIENCE, || {
        (0..2).all(|n| Path::new(&data(n)).join("ballast").exists())
    });
    let fillers = disks.each_ref().map(SmallDisk::fill);
    let stored = || cluster.status().storage_sum("stored_bytes");
    let length = content.len() as u64;
    wait::until("all that is stored is told", PATIENCE, || stored() >= 9 * length);
    fs::remove_file(mount.join("early")).expect("deleting needs no room");
    wait::until("what was deleted takes no space", PATIENCE, || stored() <= 6 * length);
    cluster.storage(1).kill();
    cluster.meta().kill();
    cluster.start_daemons();
    assert!(fs::read(mount.join("kept")).expect("read") == content);
    fs::remove_file(mount.join("deleted")).expect("deleting needs no room");
    mount.remount();
    assert!(fs::read(mount.join("kept")).expect("read") == content);
    assert!(!mount.join("deleted").exists());
    let refused = File::create(mount.join("new")).expect_err("there is no room for it");
    assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC), "{refused}");
    drop(fillers);
    wait::until("there is room again", PATIENCE, || fs::write(mount.join("new"), &content).is_ok());
    wait::until("space is kept anew", PATIENCE, || (0..2).all(|n| Path::new(&data(n)).join("ballast").exists()));
    cluster.wait_until_whole();
    for process in [cluster.meta(), cluster.storage(1)] {
        assert!(!process.has_ended() && !process.log().contains("panicked"), "{}", process.log());
    }
    mount.unmount();
    cluster.meta().kill();
    cluster.storage(1).kill();
}

//! How far a cluster reaches: files of up to 10 GiB and of 100 GiB of holes, and up to 64 clients at once.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{
    small::{Act, Tree},
    tools,
};
use crate::{cluster::Cluster, fault::random_bytes, mount::Mount};

const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;
/// Real bytes, and the distance between two of a mebibyte each: all of the file if there are no holes.
const LONG_FILES: [(usize, usize); 4] = [(100 * MIB, MIB), (GIB, MIB), (10 * GIB, MIB), (100 * GIB, GIB)];
const RANDOM_READS: u64 = 2000;
const CLIENTS: [usize; 4] = [1, 4, 16, 64];
/// Files of all clients together, and bytes of each.
const SMALL_FILES: usize = 8192;
const SMALL_FILE_SIZE: usize = 4096;
const DIRECTORIES: usize = 4;
const CLIENT_LIMIT: Duration = Duration::from_secs(300);

/// Resident bytes of processes; of several of a kind, of the largest.
#[derive(Clone, Copy, Debug)]
struct Memory {
    mount: u64,
    meta: u64,
    storage: u64,
}

impl Memory {
    fn of(cluster: &Cluster, mounts: &[Mount]) -> Self {
        let largest = |sizes: &mut dyn Iterator<Item = u64>| sizes.max().unwrap_or(0);
        Self {
            mount: largest(&mut mounts.iter().map(|mount| mount.process().resident_bytes())),
            meta: cluster.meta().resident_bytes(),
            storage: largest(&mut cluster.storage_servers().iter().map(|server| server.resident_bytes())),
        }
    }

    fn columns(&self) -> String {
        format!("{} | {} | {}", self.mount >> 20, self.meta >> 20, self.storage >> 20)
    }
}

/// Markdown: long files, then clients.
pub fn run() -> Result<String> {
    let mut table = "| file | written and synced, MB/s | read cold, MB/s | random reads of 4 KiB, cold, 1/s | memory of the mount, MiB | metadata server | storage server |\n|---|---:|---:|---:|---:|---:|---:|\n".to_owned();
    let cluster = Cluster::start();
    let mounts = [cluster.mount()];
    for (size, stride) in LONG_FILES {
        table += &long_file(&cluster, &mounts, size, stride)?;
    }
    drop(mounts);
    drop(cluster);
    table += "\n| clients | create and close, 1/s | stat, cold, 1/s | open, read and close, cold, 1/s | memory of a mount, MiB | metadata server | storage server |\n|---|---:|---:|---:|---:|---:|---:|\n";
    for clients in CLIENTS {
        table += &small_files(clients, 1)?;
    }
    for clients in CLIENTS.into_iter().filter(|clients| *clients > 1) {
        table += &small_files(clients, clients)?;
    }
    Ok(table)
}

fn long_file(cluster: &Cluster, mounts: &[Mount], size: usize, stride: usize) -> Result<String> {
    let (mount, pattern) = (&mounts[0], random_bytes(size as u64, MIB));
    let path = mount.join("long");
    let written = {
        let (began, file) = (Instant::now(), File::create(&path)?);
        for at in (0..size).step_by(stride) {
            file.write_all_at(&stamped(&pattern, at), at as u64)?;
        }
        file.set_len(size as u64)?;
        file.sync_all()?;
        began.elapsed()
    };
    let mut memory = Memory::of(cluster, mounts);
    chill(mounts)?;
    let read = {
        let (began, file) = (Instant::now(), File::open(&path)?);
        let (mut bytes, zeroes) = (vec![0; MIB], vec![0; MIB]);
        for at in (0..size).step_by(MIB) {
            file.read_exact_at(&mut bytes, at as u64)?;
            let is_right = if at.is_multiple_of(stride) { bytes == stamped(&pattern, at) } else { bytes == zeroes };
            ensure!(is_right, "other bytes at {at} than were written");
        }
        began.elapsed()
    };
    chill(mounts)?;
    let random = random_reads(&File::open(&path)?, (size / stride) as u64, stride as u64)?;
    let after = Memory::of(cluster, mounts);
    memory.mount = memory.mount.max(after.mount);
    fs::remove_file(&path)?;
    let (name, real) = (name_of(size, stride), size / stride * MIB);
    let row = format!(
        "| {name} | {:.0} | {:.0} | {random:.0} | {} |\n",
        real as f64 / 1e6 / written.as_secs_f64(),
        size as f64 / 1e6 / read.as_secs_f64(),
        memory.columns()
    );
    eprint!("{row}");
    Ok(row)
}

fn name_of(size: usize, stride: usize) -> String {
    let size = if size >= GIB { format!("{} GiB", size >> 30) } else { format!("{} MiB", size >> 20) };
    if stride > MIB { format!("{size}, a mebibyte in each {} GiB", stride >> 30) } else { size }
}

/// No two mebibytes are the same.
fn stamped(pattern: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = pattern.to_vec();
    bytes[..8].copy_from_slice(&(at as u64).to_le_bytes());
    bytes
}

/// How many a second, one after the other, in `mebibytes` that are `stride` apart.
fn random_reads(file: &File, mebibytes: u64, stride: u64) -> Result<f64> {
    let (began, mut bytes, mut number) = (Instant::now(), [0; 4096], 1_u64);
    for _ in 0..RANDOM_READS {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let within = (number >> 20) % 256 * 4096;
        file.read_exact_at(&mut bytes, (number >> 33) % mebibytes * stride + within)?;
    }
    Ok(RANDOM_READS as f64 / began.elapsed().as_secs_f64())
}

/// `clients` processes on `mounts` mounts.
fn small_files(clients: usize, mounts: usize) -> Result<String> {
    let cluster = Cluster::start();
    let mounts: Vec<Mount> = (0..mounts).map(|_| cluster.mount()).collect();
    let root = |client: usize| mounts[client % mounts.len()].join(format!("client-{client}"));
    let mut rates = Vec::new();
    for act in ["create", "stat", "read"] {
        if act != "create" {
            chill(&mounts)?;
        }
        let began = Instant::now();
        let running: Vec<Child> = (0..clients)
            .map(|client| start_client(act, &root(client), SMALL_FILES / clients, client))
            .collect::<Result<_>>()?;
        for mut client in running {
            ensure!(client.wait()?.success(), "a client failed to {act}");
        }
        rates.push(SMALL_FILES as f64 / began.elapsed().as_secs_f64());
    }
    let on = if mounts.len() > 1 { "a mount each" } else { "on one mount" };
    let row = format!(
        "| {clients} {}, {on} | {:.0} | {:.0} | {:.0} | {} |\n",
        if clients > 1 { "processes" } else { "process" },
        rates[0],
        rates[1],
        rates[2],
        Memory::of(&cluster, &mounts).columns()
    );
    eprint!("{row}");
    Ok(row)
}

fn start_client(act: &str, root: &Path, files: usize, client: usize) -> Result<Child> {
    let program = std::env::current_exe()?;
    let numbers = [files.to_string(), client.to_string()];
    Command::new(program).args(["client", act]).arg(root).args(numbers).spawn().context("start a client")
}

/// What one client process does.
pub fn client(act: &str, root: PathBuf, files: usize, seed: u64) -> Result<()> {
    let tree = Tree { root, directories: DIRECTORIES, files, size: SMALL_FILE_SIZE, threads: 1, seed };
    let act = match act {
        "create" => {
            tree.make_directories()?;
            Act::Create { fsync: false }
        }
        "stat" => Act::Stat,
        "read" => Act::Read,
        other => anyhow::bail!("{other}: a client does create, stat or read"),
    };
    let (_, done) = tree.run(act, files, CLIENT_LIMIT)?;
    ensure!(done == files, "only {done} of {files} files within {CLIENT_LIMIT:?}");
    Ok(())
}

/// Nothing is in any cache.
fn chill(mounts: &[Mount]) -> Result<()> {
    tools::run(Path::new("/"), "sync")?;
    mounts.iter().for_each(Mount::remount);
    OpenOptions::new().write(true).open("/proc/sys/vm/drop_caches").and_then(|file| file.write_all_at(b"3", 0))?;
    Ok(())
}

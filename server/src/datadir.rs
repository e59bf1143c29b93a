//! A data directory: locked against a second process, and marked with whose it is.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use holdfast_common::{
    disk::Disk,
    net::identity::{NodeName, PeerIdentity},
};
use serde::{Deserialize, Serialize};

/// Version of the layout of data directories that this program reads and writes.
pub const FORMAT: u32 = 1;

const LOCK_FILE: &str = "lock";
const IDENTITY_FILE: &str = "identity.toml";
/// A longer one is damaged: ours has about 100 bytes.
const IDENTITY_LENGTH_MAX: u64 = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the data directory {path} is in use by another process")]
    Locked { path: PathBuf },
    #[error("the data directory {path} belongs to node {found} of this cluster, not to node {expected}")]
    OtherNode { path: PathBuf, found: NodeName, expected: NodeName },
    #[error(
        "the data directory {path} belongs to cluster {} (node {}), not to cluster {} (node {})",
        found.cluster, found.node, expected.cluster, expected.node
    )]
    OtherCluster { path: PathBuf, found: PeerIdentity, expected: PeerIdentity },
    #[error("the data directory {path} has format {found}; this program knows format {FORMAT}")]
    Format { path: PathBuf, found: u32 },
    #[error("{path} is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error("{path} is neither empty nor a data directory of Holdfast (it has no {IDENTITY_FILE})")]
    Foreign { path: PathBuf },
}

/// A data directory that this process owns. The lock goes when it is dropped, or the process dies.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: fs::File,
}

impl DataDir {
    /// Makes `path` if it is missing, locks it, and checks that it belongs to `owner`; a new one is given to `owner`.
    /// The lock is always a real file's; everything else goes through `disk`.
    pub fn open(disk: &dyn Disk, path: &Path, owner: PeerIdentity) -> Result<Self, DataDirError> {
        make_directory(path).map_err(io_error("create the data directory", path))?;
        let lock = lock(path)?;
        identify(disk, path, owner)?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes `path` and what is missing above it; their names are on stable storage when this returns.
fn make_directory(path: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = path.ancestors().take_while(|path| !path.exists()).collect();
    fs::create_dir_all(path)?;
    for parent in missing.iter().filter_map(|path| path.parent()) {
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        fs::File::open(parent)?.sync_all()?;
    }
    Ok(())
}

fn lock(directory: &Path) -> Result<fs::File, DataDirError> {
    let path = directory.join(LOCK_FILE);
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io_error("open the lock file", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(DataDirError::Locked { path: directory.to_owned() }),
        Err(fs::TryLockError::Error(source)) => Err(io_error("lock", &path)(source)),
    }
}

#[derive(Serialize, Deserialize)]
struct IdentityFile {
    format: u32,
    /// As in the certificate: `<id>.<role>.<cluster>.holdfast`.
    owner: String,
}

/// Checks that `directory` belongs to `owner`, or gives it to them if it is empty.
pub fn identify(disk: &dyn Disk, directory: &Path, owner: PeerIdentity) -> Result<(), DataDirError> {
    let path = directory.join(IDENTITY_FILE);
    match read_small(disk, &path, IDENTITY_LENGTH_MAX).map_err(io_error("read", &path))? {
        Some(bytes) => check_owner(directory, parse_identity(&path, &bytes)?, owner),
        None => claim(disk, directory, owner),
    }
}

fn parse_identity(path: &Path, bytes: &[u8]) -> Result<IdentityFile, DataDirError> {
    let damaged = |reason: String| DataDirError::Damaged { path: path.to_owned(), reason };
    let text = std::str::from_utf8(bytes).map_err(|error| damaged(error.to_string()))?;
    toml::from_str(text).map_err(|error| damaged(error.message().to_owned()))
}

fn check_owner(directory: &Path, file: IdentityFile, expected: PeerIdentity) -> Result<(), DataDirError> {
    let path = directory.to_owned();
    if file.format != FORMAT {
        return Err(DataDirError::Format { path, found: file.format });
    }
    let Some(found) = PeerIdentity::from_dns_name(&file.owner) else {
        return Err(DataDirError::Damaged {
            path: directory.join(IDENTITY_FILE),
            reason: format!("{:?} names no node", file.owner),
        });
    };
    if found.cluster != expected.cluster {
        return Err(DataDirError::OtherCluster { path, found, expected });
    }
    if found.node != expected.node {
        return Err(DataDirError::OtherNode { path, found: found.node, expected: expected.node });
    }
    Ok(())
}

fn claim(disk: &dyn Disk, directory: &Path, owner: PeerIdentity) -> Result<(), DataDirError> {
    let entries = disk.list(directory).map_err(io_error("list", directory))?;
    if entries.iter().any(|entry| !is_expected_in_new(entry)) {
        return Err(DataDirError::Foreign { path: directory.to_owned() });
    }
    let file = IdentityFile { format: FORMAT, owner: owner.dns_name() };
    let text = format!("format = {}\nowner = {:?}\n", file.format, file.owner);
    let path = directory.join(IDENTITY_FILE);
    write_atomically(disk, &path, text.as_bytes()).map_err(io_error("write", &path))
}

/// What a directory may hold before it is claimed: our lock, a claim that was interrupted, what mkfs leaves, and the
/// certificate, which by default is kept here and comes first.
fn is_expected_in_new(entry: &Path) -> bool {
    let names = [LOCK_FILE.to_owned(), format!("{IDENTITY_FILE}.new"), "lost+found".to_owned(), "tls".to_owned()];
    names.iter().any(|name| entry.file_name() == Some(OsStr::new(name)))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DataDirError {
    let path = path.to_owned();
    move |source| DataDirError::Io { action, path, source }
}

/// All bytes of `path`, `None` if there is no such file; more than `length_max` are `InvalidData`.
pub fn read_small(disk: &dyn Disk, path: &Path, length_max: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match disk.open(path, false) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let length = file.length()?;
    let length = usize::try_from(length).ok().filter(|_| length <= length_max);
    let length = length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the file is too long"))?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(Some(bytes))
}

/// Replaces `path` with `bytes`, durably: a crash leaves the old file or the new one.
pub fn write_atomically(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_added_extension("new");
    let file = disk.open(&new, true)?;
    file.set_length(0)?;
    file.write_all_at(bytes, 0)?;
    file.sync_data()?;
    drop(file);
    disk.rename(&new, path)?;
    disk.sync_directory(path.parent().unwrap_or(Path::new("/")))
}

#[cfg(test)]
mod tests {
    use holdfast_common::{ClusterId, disk::RealDisk, net::identity::Role};

    use super::*;

    fn owner(cluster: u8, role: Role, id: u32) -> PeerIdentity {
        PeerIdentity { cluster: ClusterId([cluster; 16]), node: NodeName { role, id } }
    }

    fn open(path: &Path, owner: PeerIdentity) -> Result<DataDir, DataDirError> {
        DataDir::open(&RealDisk, path, owner)
    }

    #[test]
    fn a_directory_belongs_to_one_process_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let me = owner(1, Role::Storage, 3);
        let first = open(directory.path(), me).unwrap();
        let error = open(directory.path(), me).unwrap_err();
        assert!(matches!(error, DataDirError::Locked { .. }), "{error}");
        drop(first);
        assert!(open(directory.path(), me).is_ok());
    }

    #[test]
    fn a_directory_of_somebody_else_is_refused_with_a_sentence() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        drop(open(path, owner(1, Role::Storage, 3)).unwrap());
        for (who, sentence) in [
            (owner(1, Role::Storage, 4), "belongs to node 3.storage of this cluster, not to node 4.storage"),
            (owner(1, Role::Meta, 3), "belongs to node 3.storage of this cluster, not to node 3.meta"),
            (owner(2, Role::Storage, 3), "not to cluster 02020202020202020202020202020202 (node 3.storage)"),
        ] {
            let error = open(path, who).unwrap_err().to_string();
            assert!(error.contains(sentence), "{error}");
        }
    }

    #[test]
    fn a_damaged_or_newer_identity_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let me = owner(1, Role::Meta, 1);
        for (text, sentence) in [
            ("", "is damaged"),
            ("format = 1\nowner = \"x\"\n", "names no node"),
            ("format = 2\nowner = \"x\"\n", "has format 2"),
        ] {
            fs::write(directory.path().join(IDENTITY_FILE), text).unwrap();
            let error = open(directory.path(), me).unwrap_err().to_string();
            assert!(error.contains(sentence), "{error}");
        }
    }

    #[test]
    fn a_directory_with_other_files_is_not_claimed() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("thesis.txt"), "mine").unwrap();
        let error = open(directory.path(), owner(1, Role::Meta, 1)).unwrap_err();
        assert!(matches!(error, DataDirError::Foreign { .. }), "{error}");
    }

    #[test]
    fn the_identity_file_is_frozen() {
        let directory = tempfile::tempdir().unwrap();
        drop(open(directory.path(), owner(0xab, Role::Storage, 7)).unwrap());
        assert_eq!(
            fs::read_to_string(directory.path().join(IDENTITY_FILE)).unwrap(),
            "format = 1\nowner = \"7.storage.abababababababababababababababab.holdfast\"\n"
        );
    }
}

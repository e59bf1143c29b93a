//! A directory tree as a value: what `diff -r` and `ls -lR` would look at.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

/// What one name shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    Directory { mode: u32 },
    File { mode: u32, length: u64, hash: String },
    Symlink { target: PathBuf },
    Other { mode: u32 },
}

/// Everything below `root`, by relative path.
pub fn read(root: &Path) -> BTreeMap<PathBuf, Shown> {
    let mut tree = BTreeMap::new();
    walk(root, Path::new(""), &mut tree);
    tree
}

fn walk(root: &Path, below: &Path, tree: &mut BTreeMap<PathBuf, Shown>) {
    let directory = root.join(below);
    let entries = fs::read_dir(&directory).unwrap_or_else(|error| panic!("list {}: {error}", directory.display()));
    for entry in entries {
        let entry = entry.unwrap_or_else(|error| panic!("list {}: {error}", directory.display()));
        let path = below.join(entry.file_name());
        let shown = show(&root.join(&path));
        let is_directory = matches!(shown, Shown::Directory { .. });
        assert!(tree.insert(path.clone(), shown).is_none(), "{} is listed twice", path.display());
        if is_directory {
            walk(root, &path, tree);
        }
    }
}

fn show(path: &Path) -> Shown {
    let meta = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("stat {}: {error}", path.display()));
    let (kind, mode) = (meta.file_type(), meta.mode() & 0o7777);
    if kind.is_dir() {
        Shown::Directory { mode }
    } else if kind.is_symlink() {
        Shown::Symlink { target: fs::read_link(path).expect("a link can be read") }
    } else if kind.is_file() {
        Shown::File { mode, length: meta.len(), hash: hash_file(path) }
    } else {
        assert!(kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device());
        Shown::Other { mode }
    }
}

/// BLAKE3 of a file's bytes, as they are read.
pub fn hash_file(path: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    let file = fs::File::open(path).unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
    hasher.update_reader(file).unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
    hasher.finalize().to_string()
}

/// Panics with the first names that differ.
pub fn assert_same(left: &Path, right: &Path) {
    let (left, right) = (read(left), read(right));
    let names = left.keys().chain(right.keys());
    let differing: Vec<_> = names.filter(|&name| left.get(name) != right.get(name)).take(8).collect();
    let shown: Vec<_> = differing.iter().map(|&name| (name, left.get(name), right.get(name))).collect();
    assert!(shown.is_empty(), "the trees differ: {shown:#?}");
    assert!(!left.is_empty(), "there was nothing to compare");
}

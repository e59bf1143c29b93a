//! Damage to what a server has on its disk.
//!
//! Blocks lie in its files as they are, so a block is found by its own bytes: no format needs to be known here.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Bytes by which a block is recognised: random data do not repeat them.
const NEEDLE_LENGTH: usize = 48;

/// Where a block's bytes lie.
#[derive(Clone, Debug)]
pub struct Copy {
    pub file: PathBuf,
    pub offset: u64,
}

impl Copy {
    fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.file).expect("open a segment")
    }

    /// Turns one bit of the byte at `offset` of the block.
    pub fn flip_bit(&self, offset: u64) {
        let (file, mut byte) = (self.open(), [0]);
        file.read_exact_at(&mut byte, self.offset + offset).expect("read a segment");
        file.write_all_at(&[byte[0] ^ 0x10], self.offset + offset).expect("write a segment");
    }

    /// Writes other bytes over the block's.
    pub fn overwrite(&self, bytes: &[u8]) {
        self.open().write_all_at(bytes, self.offset).expect("write a segment");
    }

    /// Cuts the file in the middle of the block.
    pub fn truncate(&self, keep: u64) {
        self.open().set_len(self.offset + keep).expect("truncate a segment");
    }

    pub fn delete_file(&self) {
        fs::remove_file(&self.file).expect("delete a segment");
    }
}

/// Lengths in a metadata log, as the server's `log` module describes them.
const LOG_HEADER: usize = 76;
const LOG_BOOT: std::ops::Range<usize> = 36..68;
const LOG_RECORD_HEADER: usize = 28;
const LOG_KIND_MARK: u8 = 2;

/// Makes the log in `directory` that of another boot of the machine, as if that had lost its power when its metadata server died:
/// what no barrier had covered does not count any more. Returns how many bytes of entries that are.
pub fn lose_power(directory: &Path) -> usize {
    let [path] = &files(directory)[..] else { panic!("not one log in {}", directory.display()) };
    let mut log = fs::read(path).expect("read the metadata log");
    let (mut at, mut lost) = (LOG_HEADER, 0);
    // What follows the last record was written ahead.
    while log[at..].iter().any(|byte| *byte != 0) {
        assert_eq!(&log[at..][..4], b"HFR1", "a record at {at}");
        let length = u32::from_le_bytes(log[at + 8..][..4].try_into().expect("four bytes")) as usize;
        lost = if log[at + 4] == LOG_KIND_MARK { 0 } else { lost + length };
        at += LOG_RECORD_HEADER + length;
    }
    log[LOG_BOOT].fill(0x5a);
    let sum = blake3::hash(&log[..LOG_BOOT.end]);
    log[LOG_BOOT.end..LOG_HEADER].copy_from_slice(&sum.as_bytes()[..8]);
    fs::write(path, log).expect("write the metadata log");
    lost
}

/// Every place under `data` where `block` (more than `NEEDLE_LENGTH` bytes) begins.
pub fn copies(data: &Path, block: &[u8]) -> Vec<Copy> {
    let needle = &block[..NEEDLE_LENGTH];
    let mut found = Vec::new();
    for file in files(data) {
        let bytes = fs::read(&file).unwrap_or_default();
        found.extend(positions(&bytes, needle).map(|offset| Copy { file: file.clone(), offset }));
    }
    found
}

/// The one copy of `block` under `data` that a server would serve: not in quarantine.
pub fn copy(data: &Path, block: &[u8]) -> Option<Copy> {
    copies(data, block).into_iter().find(|copy| !copy.file.to_string_lossy().contains("quarantine"))
}

fn positions(bytes: &[u8], needle: &[u8]) -> impl Iterator<Item = u64> {
    let first = needle[0];
    let candidates = bytes.iter().enumerate().filter(move |&(_, &byte)| byte == first).map(|(at, _)| at);
    candidates.filter(move |&at| bytes[at..].starts_with(needle)).map(|at| at as u64)
}

/// Every regular file under `directory`, sorted.
pub fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

/// Bytes that no other seed gives, and that do not compress.
pub fn random_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

//! The two servers of Holdfast: metadata and storage. Neither imports the other.

pub mod ballast;
pub mod datadir;
pub mod meta;
pub mod redb_file;
pub mod storage;

#[cfg(test)]
mod together;

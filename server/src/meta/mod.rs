//! The metadata server: names, inodes, and the map from inodes to blocks.

pub mod barrier;
pub mod cluster;
pub mod committer;
pub mod compare;
pub mod core;
pub mod duties;
pub mod garbage;
pub mod locking;
pub mod log;
#[cfg(test)]
mod memory_disk;
pub mod recent;
pub mod recovery;
pub mod replace;
pub mod server;
pub mod service;
pub mod sessions;
pub mod state;
pub mod store;
pub mod unsynced;

pub use server::{RunError, run};

#[cfg(test)]
mod tests;

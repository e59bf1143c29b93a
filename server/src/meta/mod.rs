//! The metadata server: names, inodes, and the map from inodes to blocks.

pub mod backup;
pub mod balance;
pub mod barrier;
pub mod budget;
pub mod cluster;
pub mod committer;
pub mod compare;
pub mod copier;
pub mod copy_rate;
pub mod core;
pub mod drain;
pub mod duties;
pub mod garbage;
pub mod journal;
pub mod keep;
pub mod leases;
pub mod locking;
pub mod log;
#[cfg(test)]
mod memory_disk;
pub mod mend;
pub mod names;
pub mod operate;
pub mod pace;
pub mod recent;
pub mod recovery;
pub mod relocate;
pub mod replace;
pub mod restore;
pub mod rhythm;
pub mod server;
pub mod service;
pub mod sessions;
pub mod spread;
pub mod state;
pub mod store;
pub mod strays;
pub mod surplus;
pub mod unsynced;

pub use server::{RunError, restore_from, run};

#[cfg(test)]
mod tests;

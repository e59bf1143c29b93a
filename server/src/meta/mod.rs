//! The metadata server: names, inodes, and the map from inodes to blocks.

pub mod log;
#[cfg(test)]
mod memory_disk;
pub mod state;

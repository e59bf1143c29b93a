//! The metadata server: names, inodes, and the map from inodes to blocks.

pub mod state;

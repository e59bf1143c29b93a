//! The storage server: blocks on a disk, served to who may have them.

pub mod store;

//! The mounted filesystem and the command line of Holdfast.

pub mod cache;
pub mod fs;
pub mod read;
pub mod remote;
pub mod write;

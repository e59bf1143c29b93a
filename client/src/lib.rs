//! The mounted filesystem and the command line of Holdfast.

pub mod cache;
pub mod cli;
pub mod fs;
pub mod fuse;
pub mod mount;
pub mod read;
pub mod remote;
pub mod sys;
pub mod write;

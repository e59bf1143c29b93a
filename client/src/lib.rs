//! The mounted filesystem and the command line of Holdfast.

pub mod fs;
pub mod fuse;
pub mod sys;

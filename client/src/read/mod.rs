//! From a byte range of a file to verified bytes.

pub mod proof;

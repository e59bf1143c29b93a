//! From a byte range of a file to verified bytes.

pub mod ahead;
pub mod fetch;
pub mod map;
pub mod plan;
pub mod proof;

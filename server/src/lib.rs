//! The servers of Holdfast: metadata and storage. Neither role imports the other.

pub mod meta;

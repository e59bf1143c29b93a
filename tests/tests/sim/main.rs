//! Servers on simulated disks that lose, tear and fail.

mod cluster;
mod node;
mod store;

//! Servers on simulated disks that lose, tear and fail.

mod cluster;
mod ether;
mod leases;
mod live_mount;
mod node;
#[cfg(feature = "planted")]
mod planted;
mod store;
mod storm;
mod sys;
mod world;

//! Real clusters, simulated faults and the model that defines right: what every test stands on.

pub mod ask;
pub mod bench;
pub mod cluster;
pub mod fault;
pub mod memory_limit;
pub mod model;
pub mod mount;
pub mod process;
pub mod proxy;
pub mod shell;
pub mod sim_disk;
pub mod small_disk;
pub mod sys;
pub mod tree;
pub mod wait;

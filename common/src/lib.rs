//! Words, wire formats and transport that both sides of Holdfast share.

pub mod block;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod disk;
pub mod inventory;
pub mod limits;
pub mod locks;
pub mod memory;
pub mod net;
pub mod pieces;
pub mod placement;
pub mod planted;
pub mod processor;
pub mod refusal;
pub mod telemetry;
pub mod types;
pub mod wire;
pub mod work;

pub use block::{Block, BlockHash, HashMismatch};
pub use refusal::Refusal;
pub use types::*;

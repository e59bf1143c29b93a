//! The definition of right: a filesystem as a value, and random operations to compare with it.

mod direct;
mod memory;
mod ops;
mod real;

pub use direct::DirectTree;
pub use memory::Memory;
pub use ops::{Answer, Op, RenameKind, Shape, System, check, ops, payload};
pub use real::{InTurn, RealTree};

//! The definition of right: a filesystem as a value, and random operations to compare with it.

mod direct;
mod memory;
mod ops;
mod real;

pub use direct::DirectTree;
pub use memory::Memory;
pub use ops::{
    Answer, Op, RECENT, RenameKind, SLOTS, Shape, System, Time, XattrKind, check, check_answers, data_ops, ops, payload,
};
pub use real::{InTurn, RealTree};

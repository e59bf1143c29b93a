//! From written bytes to blocks and pieces.

pub mod budget;
pub mod buffer;
pub mod commit;
pub mod cut;
pub mod pace;
pub mod retained;

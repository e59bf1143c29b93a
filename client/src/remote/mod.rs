//! The servers as the client sees them: calls that retry, choose, hedge and verify.

pub mod batch;
pub mod blocks;
pub mod health;
pub mod meta;
pub mod retry;
pub mod undurable;

//! The only user of fuser: takes the kernel's requests, asks [`Fs`](crate::fs::Fs), gives the kernel its answers.

mod adapter;
mod caller;
mod convert;
mod dispatch;
mod notify;
mod past_end;
mod session;
#[cfg(test)]
mod tests;

pub use notify::KernelNotifier;
pub(crate) use session::check_device;
pub use session::{KernelSession, MountError, MountFlags, MountPlan};

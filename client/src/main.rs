//! The binary `holdfast`, which is also `mount.holdfast`.

use std::process::ExitCode;

/// Keeps the pages of freed blocks of 1 MiB for the next ones, where the C library gives them back to the kernel at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    holdfast_client::cli::main(std::env::args_os().collect())
}

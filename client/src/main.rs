//! The binary `holdfast`, which is also `mount.holdfast`.

use std::process::ExitCode;

fn main() -> ExitCode {
    holdfast_client::cli::main(std::env::args_os().collect())
}

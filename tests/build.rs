//! The simulation defines `getrandom` itself (tests/sim/sys.rs). A crate that looks it up at run time finds only what is exported.

fn main() {
    println!("cargo::rustc-link-arg-tests=-Wl,--export-dynamic-symbol=getrandom");
    println!("cargo::rerun-if-changed=build.rs");
}

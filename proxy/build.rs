//! Puts the functions that run when there is traffic side by side in a release build (`layout.ld`): they are a seventh of the code, and
//! as the compiler leaves them they are spread over all of it, which costs misses of the caches for code and for addresses. A function
//! that the script does not know stays where it was, so that a script which is out of date does no harm.

#![expect(
    clippy::disallowed_methods,
    reason = "cargo tells a build script everything by its environment"
)]

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=layout.ld");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    if is_optimized() && links_with_lld() {
        let folder = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!("cargo::rustc-link-arg-bins=-Wl,--script={folder}/layout.ld");
    }
}

fn is_optimized() -> bool {
    env::var("OPT_LEVEL").is_ok_and(|level| level != "0")
}

/// Whether the linker is the one that comes with Rust, of which we know that it takes such a script: it is the default on this target
/// alone, as long as nobody wants another one.
fn links_with_lld() -> bool {
    let is_default = env::var("TARGET").is_ok_and(|target| target == "x86_64-unknown-linux-gnu");
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    is_default && env::var_os("RUSTC_LINKER").is_none() && !flags.contains("link")
}

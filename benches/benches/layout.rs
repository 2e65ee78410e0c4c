//! `cargo bench -p underpass-benches --bench layout -- RECORDING BINARY >proxy/layout.ld`: which functions of a release build run when
//! there is traffic, the busiest for their size first, as the linker script by which `proxy/build.rs` puts them side by side.
//!
//! RECORDING is of `perf record`, BINARY what ran then; docs/performance.md has the whole recipe. Needs `perf` and `nm`.

#![expect(
    clippy::expect_used,
    reason = "a bench that meets an error must stop loudly: its figures would be worth nothing"
)]
#![expect(clippy::print_stdout, reason = "this is a program for a terminal")]

use std::collections::{HashMap, HashSet};
use std::env;
use std::process::Command;

/// What is counted: the workers and the log's writer. The main thread starts up, looks after rules and certificates, and rests.
const THREADS: [&str; 2] = ["worker-", "tracing-appe"];
/// A name may stand for many functions, for a generic one has the same for all its types. Its bytes have to be worth it: so many
/// samples for each...
const DENSE: f64 = 0.002;
/// ...or there are not many.
const SMALL: u64 = 4096;
/// Gathers randomness, for a long time, once in each thread.
const ONCE: &str = "jent_";
/// Assembly whose functions have no sections of their own: what AES-GCM is on a processor without AVX-512.
const OBJECTS: [&str; 3] = ["*aesni-gcm-x86_64.o", "*aesni-x86_64.o", "*ghash-x86_64.o"];

fn main() {
    let arguments: Vec<_> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [recording, binary] = arguments.as_slice() else {
        println!("usage: cargo bench -p underpass-benches --bench layout -- RECORDING BINARY");
        return;
    };
    let samples = samples(&output(
        "perf",
        &["script", "-i", recording, "-F", "comm,ip,sym,dso", "--no-demangle"],
    ));
    let sizes = sizes(&output("nm", &["--print-size", binary]));
    println!(
        "/* What runs when there is traffic, side by side. Written by benches/benches/layout.rs. */"
    );
    println!("SECTIONS {{ .text.busy : {{");
    for object in OBJECTS {
        println!("{object}(.text)");
    }
    for name in busiest(&samples, &sizes) {
        println!("*(.text.{name})");
    }
    println!("}} }}\nINSERT BEFORE .text;");
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("it is installed");
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// How often each function was found running: lines of a thread, an address, a function and, in brackets, a file.
fn samples(script: &str) -> HashMap<String, u32> {
    let mut samples = HashMap::new();
    for line in script.lines() {
        let mut words = line.split_whitespace();
        let (thread, file) =
            (words.next().unwrap_or_default(), words.next_back().unwrap_or_default());
        if let Some(function) = words.nth(1)
            && THREADS.iter().any(|ours| thread.starts_with(ours))
            && file.ends_with("/underpass)")
        {
            *samples.entry(pattern(function)).or_default() += 1;
        }
    }
    samples
}

/// How many bytes of code a pattern stands for: lines of an address, a size, a kind and a name.
fn sizes(symbols: &str) -> HashMap<String, u64> {
    let (mut sizes, mut seen) = (HashMap::new(), HashSet::new());
    for line in symbols.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        if let [address, size, "t" | "T" | "w" | "W", name] = words.as_slice()
            && seen.insert((*address).to_owned())
        {
            let size = u64::from_str_radix(size, 16).expect("nm prints hexadecimal sizes");
            *sizes.entry(pattern(name)).or_default() += size;
        }
    }
    sizes
}

fn busiest<'a>(samples: &'a HashMap<String, u32>, sizes: &HashMap<String, u64>) -> Vec<&'a str> {
    let mut found: Vec<_> = samples
        .iter()
        .filter(|(name, _)| !name.starts_with(ONCE))
        .filter_map(|(name, count)| {
            let size = *sizes.get(name).filter(|size| **size > 0)?;
            #[expect(clippy::cast_precision_loss, reason = "no function is that large")]
            let density = f64::from(*count) / size as f64;
            (density >= DENSE || size <= SMALL).then_some((density, name.as_str()))
        })
        .collect();
    found.sort_by(|(one, name), (other, another)| other.total_cmp(one).then(name.cmp(another)));
    found.into_iter().map(|(_, name)| name).collect()
}

/// The name of a function without what differs between builds: the hash at its end, those of crates, and a version.
fn pattern(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("aws_lc_") {
        let function = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '_');
        return format!("aws_lc_*_{}", without_suffix(function));
    }
    if name.starts_with("_R") {
        return without_suffix(&without_crates(name));
    }
    match name.rfind("17h") {
        Some(hash) if name.starts_with("_ZN") => {
            format!("{}17h*", name.get(..hash).unwrap_or_default())
        }
        _ => without_suffix(name),
    }
}

/// Compilers split functions, and say so behind a dot.
fn without_suffix(name: &str) -> String {
    name.split_once('.').map_or_else(|| name.to_owned(), |(name, _)| format!("{name}*"))
}

/// `Cs8_4core` is the crate `core` with its hash.
fn without_crates(name: &str) -> String {
    let mut parts = name.split("Cs");
    let mut pattern = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        pattern.push_str("Cs");
        match part.split_once('_') {
            Some((hash, rest)) if hash.bytes().all(|c| c.is_ascii_alphanumeric()) => {
                pattern.push_str("*_");
                pattern.push_str(rest);
            }
            _ => pattern.push_str(part),
        }
    }
    pattern
}

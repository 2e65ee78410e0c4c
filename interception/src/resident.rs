//! The memory of a program that rests: what only its start needed, or work that is rare, is given back.

use std::ffi::c_void;
use std::fs;
use std::io;
use std::ops::Range;
use std::ptr::with_exposed_provenance_mut;

use rustix::mm::{Advice, madvise};

/// Unmaps the code of the program and of its libraries. What it goes on to run is mapped again as it runs, from the page cache,
/// some pages at a time; what ran once, at the start, is not, nor is what runs rarely until it does. That was more than half of a
/// proxy's memory at rest.
///
/// A breakpoint that somebody has set in the code by now (a debugger, a uprobe) is lost.
///
/// # Errors
///
/// The kernel's.
pub fn unmap_code() -> io::Result<()> {
    fs::read_to_string("/proc/self/maps")?.lines().filter_map(code).try_for_each(unmap)
}

/// The addresses of a mapping, if it is code of a file: what `mmap` wrote, as proc(5) shows it.
fn code(line: &str) -> Option<Range<usize>> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions) = (fields.next()?, fields.next()?);
    let file = fields.nth(3)?;
    let (start, end) = range.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let range = address(start)?..address(end)?;
    (permissions == "r-xp" && file.starts_with('/')).then_some(range)
}

fn unmap(Range { start, end }: Range<usize>) -> io::Result<()> {
    let mapping = with_exposed_provenance_mut::<c_void>(start);
    // SAFETY: the mapping is of a file, and was never writable: the linker leaves no relocations in code. So all that is dropped is
    // where the pages are, and whoever touches one finds the same bytes again, in the page cache or on disk.
    #[expect(unsafe_code, reason = "no safe call gives back a mapping that is not one's own")]
    let advised = unsafe { madvise(mapping, end - start, Advice::LinuxDontNeed) };
    Ok(advised?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_unmapped() {
        let line = "5581-5582 r-xp 00317000 fe:00 1837 /usr/bin/under pass";
        assert_eq!(code(line), Some(0x5581..0x5582));
        for other in [
            "5581-5582 r--p 00000000 fe:00 1837 /usr/bin/underpass",
            "5581-5582 rwxp 00000000 fe:00 1837 /usr/bin/underpass",
            "7ffc-7ffd r-xp 00000000 00:00 0 [vdso]",
            "5581-5582 r-xp 00000000 00:00 0",
            "nonsense",
        ] {
            assert_eq!(code(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_unmapped_still_runs() {
        for _ in 0..3 {
            unmap_code().unwrap();
            assert_eq!(format!("{:?}", "1-2".split_once('-')), "Some((\"1\", \"2\"))");
        }
    }
}

//! Texts for people: wrapped lines, durations and sizes.

use std::time::Duration;

/// The width of texts.
pub(super) const WIDTH: usize = 80;

/// The words of `text` in lines of at most [`WIDTH`] columns, of which the first begins with
/// `first`, and each later one with as many spaces as `indent`. A longer word has its own line.
pub(super) fn wrapped(first: &str, indent: usize, text: &str) -> String {
    let (mut lines, mut line) = (String::new(), first.to_owned());
    let (mut width, mut is_empty) = (first.chars().count(), true);
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if !is_empty && width + 1 + length > WIDTH {
            lines.push_str(&line);
            lines.push('\n');
            line = " ".repeat(indent);
            (width, is_empty) = (indent, true);
        }
        if !is_empty {
            line.push(' ');
            width += 1;
        }
        line.push_str(word);
        (width, is_empty) = (width + length, false);
    }
    lines + &line + "\n"
}

/// Like [`wrapped`], with `indent` spaces before every line.
pub(super) fn indented(indent: usize, text: &str) -> String {
    wrapped(&" ".repeat(indent), indent, text)
}

/// The indented lines of a hint; nothing without one.
pub(super) fn hint_lines(indent: usize, hint: Option<&str>) -> String {
    hint.map(|hint| indented(indent, &format!("hint: {hint}"))).unwrap_or_default()
}

/// For example `12 s`, `3 min`, `2 h 5 min` or `4 d 1 h`.
pub(super) fn age(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min"),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

/// For example `0.4 ms`, `120 ms` or `3 s`.
pub(super) fn milliseconds(duration: f64) -> String {
    if duration < 10.0 {
        format!("{duration:.1} ms")
    } else if duration < 1000.0 {
        format!("{duration:.0} ms")
    } else {
        age(Duration::try_from_secs_f64(duration / 1000.0).unwrap_or_default().as_secs())
    }
}

/// For example `17 B`, `1.5 kB` or `2.0 GB`.
pub(super) fn bytes(count: u64) -> String {
    if count < 1000 {
        return format!("{count} B");
    }
    let (mut size, mut unit) = (count as f64 / 1000.0, "kB");
    for larger in ["MB", "GB", "TB", "PB"] {
        if size < 1000.0 {
            break;
        }
        (size, unit) = (size / 1000.0, larger);
    }
    format!("{size:.1} {unit}")
}

/// For example `1 tunnel` or `2 tunnels`.
pub(super) fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_wrapped_between_words_and_indented() {
        let text = "word ".repeat(30);
        let lines = wrapped("first: ", 4, &text);
        let lines: Vec<_> = lines.lines().collect();
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{lines:?}");
        assert!(lines[0].starts_with("first: word word") && lines[0].len() > WIDTH - 6);
        assert!(lines[1].starts_with("    word"), "{lines:?}");
        let long = "x".repeat(100);
        assert_eq!(wrapped("a ", 2, &format!("b {long} c")), format!("a b\n  {long}\n  c\n"));
        assert_eq!(wrapped("- ", 2, ""), "- \n");
        assert_eq!(hint_lines(2, Some("wait")), "  hint: wait\n");
        assert_eq!(hint_lines(2, None), "");
    }

    #[test]
    fn durations_and_sizes_have_units() {
        assert_eq!(
            [0, 59, 60, 7500, 360_000].map(age),
            ["0 s", "59 s", "1 min", "2 h 5 min", "4 d 4 h"]
        );
        assert_eq!([0.35, 120.0, 3400.0].map(milliseconds), ["0.3 ms", "120 ms", "3 s"]);
        let sizes = [0, 999, 1500, 2_000_000_000, u64::MAX].map(bytes);
        assert_eq!(sizes, ["0 B", "999 B", "1.5 kB", "2.0 GB", "18446.7 PB"]);
        assert_eq!(count(1, "tunnel"), "1 tunnel");
        assert_eq!(count(0, "tunnel"), "0 tunnels");
    }
}

//! Formats each event as one line of bounded length.

use std::borrow::Cow;

use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use underpass_config::LogFormat;

/// The maximum length of a line in bytes: above that of any legitimate message, and far below the
/// size of the queue.
const MAX_LINE_BYTES: usize = 32 << 10;

/// Formats log lines as plain text or JSON.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lines {
    format: LogFormat,
}

impl Lines {
    pub(super) fn new(format: LogFormat) -> Self {
        Self { format }
    }

    /// Cuts an overlong line. In the plain format, also escapes control characters, so that a
    /// message cannot forge a second line.
    pub(super) fn bounded<'a>(&self, line: &'a [u8]) -> Cow<'a, [u8]> {
        match self.format {
            LogFormat::Plain => plain(line),
            LogFormat::Json if line.len() <= MAX_LINE_BYTES => Cow::Borrowed(line),
            // Truncated JSON would be invalid.
            LogFormat::Json => {
                let start =
                    String::from_utf8_lossy(line.get(..MAX_LINE_BYTES / 4).unwrap_or_default());
                let fields = [("bytes", line.len().into()), ("start", start.into())];
                Cow::Owned(json("a log line was too long", fields))
            }
        }
    }

    /// Formats the line that reports the number of lost lines.
    pub(super) fn lost(&self, lines: u64) -> Vec<u8> {
        match self.format {
            LogFormat::Plain => {
                let target = module_path!();
                format!("{}  WARN {target}: log lines lost: {lines}\n", time()).into_bytes()
            }
            LogFormat::Json => {
                let message = format!("log lines lost: {lines}");
                json(&message, [("lost", lines.into())])
            }
        }
    }
}

fn plain(line: &[u8]) -> Cow<'_, [u8]> {
    let (body, newline) = match line.strip_suffix(b"\n") {
        Some(body) => (body, &b"\n"[..]),
        None => (line, &b""[..]),
    };
    // In UTF-8, C1 control characters begin with 0xc2, and line separators with 0xe2.
    let is_suspect = |byte: &u8| byte.is_ascii_control() || matches!(byte, 0xc2 | 0xe2);
    if body.len() <= MAX_LINE_BYTES && !body.iter().any(is_suspect) {
        return Cow::Borrowed(line);
    }
    let mut written = Vec::with_capacity(body.len().min(MAX_LINE_BYTES) + 64);
    for character in String::from_utf8_lossy(body).chars() {
        if written.len() >= MAX_LINE_BYTES {
            let cut = format!("... (cut, {} bytes)", body.len());
            written.extend_from_slice(cut.as_bytes());
            break;
        }
        if character.is_control() || matches!(character, '\u{2028}' | '\u{2029}') {
            written.extend(character.escape_default().map(|c| c as u8));
        } else {
            written.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
        }
    }
    written.extend_from_slice(newline);
    Cow::Owned(written)
}

/// A JSON line with the same fields as the formatter's.
fn json<const N: usize>(message: &str, fields: [(&str, serde_json::Value); N]) -> Vec<u8> {
    let mut object = serde_json::Map::new();
    object.insert("timestamp".to_owned(), time().into());
    object.insert("level".to_owned(), "WARN".into());
    object.insert("message".to_owned(), message.into());
    for (key, value) in fields {
        object.insert(key.to_owned(), value);
    }
    object.insert("target".to_owned(), module_path!().into());
    let mut line = serde_json::Value::Object(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

fn time() -> String {
    let mut text = String::new();
    // Writing to a String cannot fail; a failure of the clock leaves the time empty.
    let _untimed = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Lines = Lines { format: LogFormat::Plain };
    const JSON: Lines = Lines { format: LogFormat::Json };

    #[test]
    fn escapes_newlines_within_plain_line() {
        let line = b"time INFO rules changed\n- old\r\n+ new \x1b[31m\tx\n";
        let expected = b"time INFO rules changed\\n- old\\r\\n+ new \\u{1b}[31m\\tx\n";
        assert_eq!(&*PLAIN.bounded(line), expected);
        let separators = "a\u{2028}b\u{85}c \u{201c}\u{e9}\u{201d}\n";
        assert_eq!(
            &*PLAIN.bounded(separators.as_bytes()),
            "a\\u{2028}b\\u{85}c \u{201c}\u{e9}\u{201d}\n".as_bytes()
        );
    }

    #[test]
    fn leaves_ordinary_line_unchanged() {
        for line in ["time INFO ready workload=\"a\"\n", "no newline", ""] {
            for lines in [PLAIN, JSON] {
                assert!(matches!(lines.bounded(line.as_bytes()), Cow::Borrowed(_)), "{line}");
            }
        }
    }

    #[test]
    fn cuts_long_plain_line() {
        let line = format!("start {}\n", "\u{e9}".repeat(200_000));
        let cut = PLAIN.bounded(line.as_bytes()).into_owned();
        assert!(cut.len() < MAX_LINE_BYTES + 100 && cut.starts_with(b"start "), "{}", cut.len());
        assert!(String::from_utf8(cut).unwrap().ends_with("... (cut, 400006 bytes)\n"));
    }

    #[test]
    fn replaces_long_json_line_by_valid_json() {
        let line = format!("{{\"message\":\"{}\"}}\n", "\\\"".repeat(100_000));
        let cut = JSON.bounded(line.as_bytes()).into_owned();
        assert!(cut.len() < MAX_LINE_BYTES && cut.ends_with(b"}\n"));
        let object: serde_json::Value = serde_json::from_slice(&cut).unwrap();
        assert_eq!(object["bytes"], line.len());
        assert!(object["start"].as_str().unwrap().starts_with("{\"message\":"));
    }

    #[test]
    fn reports_lost_lines_in_either_format() {
        let plain = String::from_utf8(PLAIN.lost(7)).unwrap();
        assert!(
            plain.ends_with("  WARN underpass::process::logging::line: log lines lost: 7\n"),
            "{plain}"
        );
        let json: serde_json::Value = serde_json::from_slice(&JSON.lost(7)).unwrap();
        assert_eq!((&json["lost"], &json["level"]), (&7.into(), &"WARN".into()));
        assert!(json["timestamp"].as_str().unwrap().ends_with('Z'), "{json}");
    }
}

//! Log lines: on standard output, written by a thread of their own so that a slow reader of them slows nobody down.

use std::io::{self, Write};
use std::time::Duration;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::time::SystemTime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use underpass_config::{ConfigErrors, LogFormat, Logging, Problem};

/// How many lines may wait for a slow reader; what is more is lost. The library's 128,000 are 4 MiB that are resident from the start.
const LINES: usize = 16 << 10;
/// How long the thread rests when it has written what there was. Whoever logs meanwhile need not wake it: that cost a connection
/// two of its 30 system calls and some of the thread's.
const REST: Duration = Duration::from_millis(10);
/// How much is gathered at most before it is written.
const MOST_GATHERED: usize = 64 << 10;

/// Starts logging; lines that are not written yet are written when the guard is dropped.
///
/// # Errors
/// The filter is not in tracing's syntax.
pub(crate) fn start(settings: &Logging) -> Result<WorkerGuard, ConfigErrors> {
    let filter = filter(settings)?;
    // It warns of every answer that is no success, expected ones too; what matters comes to us as an error.
    let filter = if settings.filter.contains("nlink") {
        filter
    } else {
        filter.with_target("nlink", LevelFilter::ERROR)
    };
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(LINES)
        .finish(Batches::new(io::stdout()));
    let lines = tracing_subscriber::fmt::layer()
        .with_timer(SystemTime)
        .with_ansi(false)
        .with_writer(writer);
    let registry = tracing_subscriber::registry().with(filter);
    match settings.format {
        LogFormat::Plain => registry.with(lines).init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).init(),
    }
    Ok(guard)
}

/// What is logged.
///
/// # Errors
/// The filter is not in tracing's syntax.
pub(crate) fn filter(settings: &Logging) -> Result<Targets, ConfigErrors> {
    settings.filter.parse().map_err(|error| ConfigErrors {
        problems: vec![Problem {
            key: "logging.filter".to_owned(),
            value: Some(settings.filter.clone()),
            reason: format!("must be like info or info,access=off: {error}"),
            origin: None,
        }],
        more: 0,
    })
}

/// Gathers lines, writes them together when it is flushed, and rests. tracing-appender flushes when no line is waiting, and at the
/// end.
struct Batches<W> {
    to: W,
    gathered: Vec<u8>,
}

impl<W: Write> Batches<W> {
    fn new(to: W) -> Self {
        Self { to, gathered: Vec::new() }
    }

    fn write_gathered(&mut self) -> io::Result<()> {
        let written = self.to.write_all(&self.gathered).and_then(|()| self.to.flush());
        // What could not be written is lost, as it would be line by line; it is not to grow for ever.
        self.gathered.clear();
        written
    }
}

impl<W: Write> Write for Batches<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.gathered.len() + line.len() > MOST_GATHERED {
            self.write_gathered()?;
        }
        self.gathered.extend_from_slice(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        self.write_gathered()?;
        // May end early, which only costs a wake-up.
        std::thread::park_timeout(REST);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What was written, and how often.
    #[derive(Debug, Clone, Default)]
    struct Writes(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_come_together_are_written_together() {
        let writes = Writes::default();
        let mut batches = Batches::new(writes.clone());
        batches.write_all(b"one\n").unwrap();
        batches.write_all(b"two\n").unwrap();
        batches.flush().unwrap();
        batches.flush().unwrap();
        assert_eq!(*writes.0.lock().unwrap(), [b"one\ntwo\n"]);
    }

    #[test]
    fn what_is_gathered_is_bounded() {
        let writes = Writes::default();
        let mut batches = Batches::new(writes.clone());
        let line = [b'x'; 1000];
        for _ in 0..200 {
            batches.write_all(&line).unwrap();
        }
        let lengths: Vec<_> = writes.0.lock().unwrap().iter().map(Vec::len).collect();
        assert!(lengths.len() == 3 && lengths.iter().all(|&length| length <= MOST_GATHERED));
    }

    #[test]
    fn every_line_is_there_when_the_guard_is_gone() {
        let writes = Writes::default();
        let (mut lines, guard) = tracing_appender::non_blocking(Batches::new(writes.clone()));
        for _ in 0..10_000 {
            lines.write_all(b"line\n").unwrap();
        }
        drop(guard);
        let written = writes.0.lock().unwrap();
        assert_eq!(written.concat().len(), 10_000 * b"line\n".len());
        assert!(written.len() < 100, "{}", written.len());
    }
}

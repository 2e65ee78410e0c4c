//! Tests of the queue with outputs that stall and fail.

use underpass_config::LogFormat;

use super::*;

/// An output that records writes. Tests make it stall, fail or panic.
#[derive(Debug, Clone, Default)]
struct FakeOutput(Arc<(Mutex<Behaviour>, Condvar)>);

#[derive(Debug, Default)]
struct Behaviour {
    written: Vec<Vec<u8>>,
    stalled: bool,
    panics: bool,
    /// The number of bytes that it still accepts; later writes fail.
    room: Option<usize>,
    attempts: usize,
}

impl FakeOutput {
    fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.0.0.lock().unwrap());
        self.0.1.notify_all();
    }

    /// Waits until the recorded state meets the condition.
    fn until(&self, expected: impl Fn(&Behaviour) -> bool) {
        let state = self.0.0.lock().unwrap();
        drop(self.0.1.wait_while(state, |state| !expected(state)).unwrap());
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.0.lock().unwrap().written.concat()).unwrap()
    }
}

impl Write for FakeOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap();
        state.attempts += 1;
        changed.notify_all();
        if mem::take(&mut state.panics) {
            drop(state);
            panic!("of the output");
        }
        let mut state = changed.wait_while(state, |state| state.stalled).unwrap();
        let taken = state.room.map_or(bytes.len(), |room| room.min(bytes.len()));
        if taken == 0 {
            return Err(ErrorKind::StorageFull.into());
        }
        state.room = state.room.map(|room| room - taken);
        state.written.push(bytes[..taken].to_vec());
        changed.notify_all();
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn started(sink: &FakeOutput) -> (Arc<Queue>, QueueGuard) {
    start(sink.clone(), Lines::new(LogFormat::Plain)).unwrap()
}

/// The sum of the lost lines that the log reports.
fn reported(text: &str) -> u64 {
    text.lines().filter_map(|line| line.split_once("log lines lost: ")?.1.parse::<u64>().ok()).sum()
}

#[test]
fn writes_every_line_before_guard_drop_returns() {
    let sink = FakeOutput::default();
    let (queue, guard) = started(&sink);
    for _ in 0..10_000 {
        queue.push(b"line\n");
    }
    drop(guard);
    assert_eq!(sink.text(), "line\n".repeat(10_000));
    let writes = sink.0.0.lock().unwrap().written.len();
    assert!(writes < 100, "lines are written together: {writes}");
}

#[test]
fn stalled_output_bounds_memory_and_reports_lost_lines() {
    let sink = FakeOutput::default();
    sink.set(|sink| sink.stalled = true);
    let (queue, guard) = started(&sink);
    let line = [&[b'x'; 999][..], b"\n"].concat();
    queue.push(&line);
    sink.until(|sink| sink.attempts > 0);
    for _ in 0..5000 {
        queue.push(&line);
    }
    {
        let state = queue.state();
        assert!(state.waiting.len() + state.in_flight <= MAX_BYTES);
        assert!(state.waiting.capacity() <= 2 * MAX_BYTES);
    }
    sink.set(|sink| sink.stalled = false);
    drop(guard);
    let text = sink.text();
    let lines = text.lines().filter(|line| line.starts_with('x')).count() as u64;
    assert!(lines > 1000, "{lines}");
    assert_eq!(lines + reported(&text), 5001);
    assert!(
        text.ends_with(&format!("log lines lost: {}\n", 5001 - lines)),
        "the report follows the written lines"
    );
}

#[test]
fn reports_lost_lines_when_full_output_has_room_again() {
    let sink = FakeOutput::default();
    // The room suffices for one line and a part of the next.
    sink.set(|sink| sink.room = Some(13));
    let (queue, guard) = started(&sink);
    queue.push(b"line one\nline two\nline three\n");
    sink.until(|sink| sink.room == Some(0) && sink.attempts >= 2);
    sink.set(|sink| sink.room = None);
    // No later write adds a line.
    sink.until(|sink| sink.written.len() >= 3);
    drop(guard);
    let text = sink.text();
    assert!(text.starts_with("line one\nline\n"), "{text}");
    assert_eq!(reported(&text), 2, "{text}");
}

#[test]
fn stalled_output_does_not_block_exit() {
    let sink = FakeOutput::default();
    sink.set(|sink| sink.stalled = true);
    let (queue, guard) = started(&sink);
    queue.push(b"line\n");
    drop(guard);
    assert_eq!(sink.text(), "");
    sink.set(|sink| sink.stalled = false);
}

#[test]
fn panic_of_the_output_loses_only_the_lines_of_that_write() {
    let sink = FakeOutput::default();
    sink.set(|sink| sink.panics = true);
    let (queue, guard) = started(&sink);
    queue.push(b"lost\n");
    sink.until(|sink| sink.attempts > 0 && !sink.panics);
    queue.push(b"next\n");
    sink.until(|sink| sink.written.len() >= 2);
    drop(guard);
    let text = sink.text();
    assert!(text.starts_with("next\n"), "{text}");
    assert_eq!(reported(&text), 1, "{text}");
}

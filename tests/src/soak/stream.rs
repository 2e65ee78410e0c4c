//! Executes both ends of a stream, and checks the received data.
//!
//! A stream starts with its seed, from which the server derives the plan. After a FIN, all data
//! must have been received. After any other end, data may be missing but not altered.

use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use fastrand::Rng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::pause;
use super::plan::{Kind, Pace, Pattern, Plan};
use crate::peers::abort;

/// The length of the seed and a checksum.
const HEADER: usize = 16;
const CHECKSUM: u64 = 0x5eed_5eed_5eed_5eed;

/// The end of a stream for one side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// All data was sent and received.
    Well,
    /// This side reset the stream, as planned.
    Reset,
    /// The connection failed.
    Broken(io::ErrorKind),
    /// An invariant was violated.
    Violation(String),
}

/// Runs the client's side on a new connection.
pub(super) async fn client(plan: &Plan, mut stream: TcpStream) -> Ended {
    let mut rng = Rng::with_seed(plan.seed ^ 1);
    if plan.kind == Kind::Unused {
        pause(Duration::from_millis(rng.u64(0..3000))).await;
        return Ended::Well;
    }
    if let Err(error) = stream.write_all(&header(plan.seed)).await {
        return Ended::Broken(error.kind());
    }
    let limit = if let Kind::ClientResets(limit) = plan.kind { Some(limit) } else { None };
    let (mut reader, mut writer) = stream.split();
    let mut reading = Reading::new(Pattern::down(plan), plan.down, plan.client, limit);
    let writing = Writing { pattern: Pattern::up(plan), length: plan.up, pace: plan.client };
    let outcome = match plan.kind {
        Kind::ServerEndsFirst => match reading.run(&mut reader, &mut rng.fork(), None).await {
            Ended::Well => writing.run(&mut writer, &mut rng).await,
            other => other,
        },
        _ => both(&mut reading, &mut reader, &writing, &mut writer, &mut rng).await,
    };
    end(outcome, stream)
}

/// Runs the server's side. Returns the seed and the kind of end; `None` if the stream ended before
/// the seed.
pub(super) async fn server(mut stream: TcpStream) -> Option<(u64, Ended)> {
    let mut received = [0; HEADER];
    let mut length = 0;
    while length < HEADER {
        match stream.read(received.get_mut(length..)?).await {
            Ok(0) if length == 0 => return None,
            Ok(0) => {
                return Some((
                    0,
                    Ended::Violation(format!("a FIN after {length} bytes of the header")),
                ));
            }
            Ok(more) => length += more,
            Err(_) => return None,
        }
    }
    let Some(seed) = seed(&received) else {
        return Some((0, Ended::Violation(format!("a header of {received:x?}"))));
    };
    Some((seed, serve(&Plan::new(seed), stream).await))
}

async fn serve(plan: &Plan, mut stream: TcpStream) -> Ended {
    let mut rng = Rng::with_seed(plan.seed ^ 2);
    let limit = if let Kind::ServerResets(limit) = plan.kind { Some(limit) } else { None };
    let (mut reader, mut writer) = stream.split();
    let mut reading = Reading::new(Pattern::up(plan), plan.up, plan.server, limit);
    let writing = Writing { pattern: Pattern::down(plan), length: plan.down, pace: plan.server };
    let outcome = match plan.kind {
        Kind::RequestResponse => match reading.run(&mut reader, &mut rng.fork(), None).await {
            Ended::Well => writing.run(&mut writer, &mut rng).await,
            other => other,
        },
        _ => both(&mut reading, &mut reader, &writing, &mut writer, &mut rng).await,
    };
    end(outcome, stream)
}

/// Runs both directions until both have ended or one fails.
async fn both(
    reading: &mut Reading,
    reader: &mut ReadHalf<'_>,
    writing: &Writing,
    writer: &mut WriteHalf<'_>,
    rng: &mut Rng,
) -> Ended {
    let mut fork = rng.fork();
    let broken = OnceLock::new();
    let read = async {
        match reading.run(reader, &mut fork, Some(&broken)).await {
            Ended::Well => Ok(()),
            other => Err(other),
        }
    };
    let write = async {
        match writing.run(writer, rng).await {
            Ended::Well => {}
            // The reader still gets earlier data and may find a violation in it. It does not see
            // the reset, because the kernel reports that only once.
            Ended::Broken(kind) => {
                broken.get_or_init(|| kind);
            }
            other => return Err(other),
        }
        Ok(())
    };
    tokio::try_join!(read, write).map_or_else(|other| other, |_| Ended::Well)
}

/// Ends the connection as planned.
fn end(outcome: Ended, stream: TcpStream) -> Ended {
    if outcome == Ended::Reset {
        abort(stream);
    }
    outcome
}

/// Reads one direction.
struct Reading {
    pattern: Pattern,
    length: u64,
    pace: Pace,
    /// The number of bytes after which this side resets the stream.
    limit: Option<u64>,
}

impl Reading {
    fn new(pattern: Pattern, length: u64, pace: Pace, limit: Option<u64>) -> Self {
        Self { pattern, length, pace, limit: limit.map(|limit| limit.min(length)) }
    }

    /// Reads to the end. `broken` is the error of the writer of the same connection.
    async fn run(
        &mut self,
        reader: &mut ReadHalf<'_>,
        rng: &mut Rng,
        broken: Option<&OnceLock<io::ErrorKind>>,
    ) -> Ended {
        let mut buffer = vec![0; self.pace.piece];
        let mut received = 0;
        loop {
            if self.limit.is_some_and(|limit| received >= limit) {
                return Ended::Reset;
            }
            if let Some((_, stall)) = self.pace.stall.take_if(|(at, _)| received >= *at) {
                pause(stall).await;
            }
            let bytes = match reader.read(&mut buffer).await {
                Ok(0) if received < self.length => {
                    if let Some(kind) = broken.and_then(OnceLock::get) {
                        return Ended::Broken(*kind);
                    }
                    return Ended::Violation(format!(
                        "a FIN after {received} of {} bytes",
                        self.length
                    ));
                }
                Ok(0) => return Ended::Well,
                Ok(length) => buffer.get(..length).unwrap_or_default(),
                Err(error) => return Ended::Broken(error.kind()),
            };
            if let Some(place) = self.pattern.deviation(received, bytes) {
                return Ended::Violation(format!("an altered byte at {place}"));
            }
            received += bytes.len() as u64;
            if received > self.length {
                return Ended::Violation(format!("{received} of {} bytes", self.length));
            }
            self.pace.pause(rng).await;
        }
    }
}

/// Writes one direction.
struct Writing {
    pattern: Pattern,
    length: u64,
    pace: Pace,
}

impl Writing {
    async fn run(&self, writer: &mut WriteHalf<'_>, rng: &mut Rng) -> Ended {
        let mut buffer = vec![0; self.pace.piece];
        let mut sent = 0;
        while sent < self.length {
            let rest = usize::try_from(self.length - sent).unwrap_or(usize::MAX);
            let length = rng.usize(1..=self.pace.piece).min(rest);
            let piece = buffer.get_mut(..length).unwrap_or_default();
            self.pattern.fill(sent, piece);
            if let Err(error) = writer.write_all(piece).await {
                return Ended::Broken(error.kind());
            }
            sent += length as u64;
            self.pace.pause(rng).await;
        }
        match writer.shutdown().await {
            Ok(()) => Ended::Well,
            Err(error) => Ended::Broken(error.kind()),
        }
    }
}

impl Pace {
    async fn pause(&self, rng: &mut Rng) {
        if rng.u64(0..self.pauses) == 0 {
            pause(Duration::from_millis(rng.u64(1..100))).await;
        }
    }
}

fn header(seed: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let (first, second) = header.split_at_mut(HEADER / 2);
    first.copy_from_slice(&seed.to_le_bytes());
    second.copy_from_slice(&(seed ^ CHECKSUM).to_le_bytes());
    header
}

fn seed(header: &[u8; HEADER]) -> Option<u64> {
    let (first, second) = header.split_first_chunk::<8>()?;
    let seed = u64::from_le_bytes(*first);
    (second == (seed ^ CHECKSUM).to_le_bytes()).then_some(seed)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// The end of a stream with this plan for its client. `serve` is the server.
    async fn ended(plan: &Plan, serve: impl AsyncFnOnce(TcpStream)) -> Ended {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let (stream, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (stream, (served, _)) = (stream.expect("it connects"), accepted.expect("it accepts"));
        tokio::join!(client(plan, stream), serve(served)).0
    }

    fn plan() -> Plan {
        let plans = (0..).map(Plan::new);
        let mut fit = plans.filter(|plan| plan.kind == Kind::Both && plan.down > 1000);
        Plan { up: 0, ..fit.next().expect("there is one") }
    }

    /// Sends the data of `plan`, modified by `change`, then FIN.
    async fn answer(plan: &Plan, mut stream: TcpStream, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = vec![0; usize::try_from(plan.down).expect("it fits")];
        Pattern::down(plan).fill(0, &mut bytes);
        change(&mut bytes);
        stream.write_all(&bytes).await.expect("the client reads");
        // A client that has detected a violation closes the connection.
        stream.shutdown().await.ok();
        stream.read_to_end(&mut Vec::new()).await.ok();
    }

    #[tokio::test]
    async fn early_fin_and_altered_byte_are_violations_and_reset_is_not() {
        let plan = plan();
        let good = ended(&plan, async |stream| answer(&plan, stream, |_| {}).await).await;
        assert_eq!(good, Ended::Well);
        let cut = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - 1);
        let cut = ended(&plan, async |stream| answer(&plan, stream, cut).await).await;
        assert!(
            matches!(&cut, Ended::Violation(violation) if violation.contains("a FIN after")),
            "{cut:?}"
        );
        let reset = ended(&plan, async |stream| abort(stream)).await;
        assert!(matches!(reset, Ended::Broken(_)), "{reset:?}");
        let flip = |bytes: &mut Vec<u8>| *bytes.last_mut().expect("there are some") ^= 1;
        let flipped = ended(&plan, async |stream| {
            // The client closes after it has seen the altered byte.
            let answer = answer(&plan, stream, flip);
            tokio::time::timeout(Duration::from_secs(5), answer).await.ok();
        });
        let flipped = flipped.await;
        assert!(
            matches!(&flipped, Ended::Violation(violation) if violation.contains("altered byte")),
            "{flipped:?}"
        );
    }
}

//! The header `traceparent`: the trace of a connection (W3C Trace Context section 3.2).

use std::cell::RefCell;
use std::fmt;
use std::num::{NonZeroU64, NonZeroU128};
use std::str::FromStr;

use fastrand::Rng;
use http::header::{HeaderMap, HeaderValue};
use rustls::crypto::aws_lc_rs;

use super::{HeaderError, TRACEPARENT, header};
use crate::tunnel::text::push_hex;

/// The length of the header value.
const LENGTH: usize = 55;
/// The version that is written. Common fields of later versions are read.
const VERSION: u8 = 0x00;
/// The forbidden version.
const RESERVED_VERSION: u8 = 0xff;
/// The only flag of version 00 (Trace Context section 3.2.2.5).
const SAMPLED: u8 = 0x01;

thread_local! {
    /// A fast generator is enough, because ids are not secret. aws-lc seeds it: `fastrand` alone
    /// seeds with the time since boot and the thread number, so that machines that start together
    /// could generate equal ids.
    static RANDOM: RefCell<Rng> = RefCell::new(seeded());
}

/// A position in a trace. Formats only well-formed values: ztunnel's parser panics on 55 characters
/// that start with `00-` and contain no other dash, which closes the whole tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceParent {
    trace_id: NonZeroU128,
    parent_id: NonZeroU64,
    sampled: bool,
}

impl TraceParent {
    /// Starts a new trace with random ids, not sampled.
    #[expect(clippy::new_without_default, reason = "each has new random ids")]
    pub fn new() -> Self {
        let trace_id = RANDOM.with_borrow_mut(|random| random.u128(1..));
        let trace_id = NonZeroU128::new(trace_id).unwrap_or(NonZeroU128::MIN);
        Self { trace_id, parent_id: random_parent_id(), sampled: false }
    }

    /// The trace id: 32 hexadecimal digits when printed (`{:032x}`).
    pub fn trace_id(self) -> NonZeroU128 {
        self.trace_id
    }

    /// The parent id, also called span id: 16 hexadecimal digits when printed (`{:016x}`).
    pub fn parent_id(self) -> NonZeroU64 {
        self.parent_id
    }

    /// Returns true if the sender may have recorded the trace.
    pub fn is_sampled(self) -> bool {
        self.sampled
    }

    /// The same position, marked as recorded.
    #[must_use]
    pub fn sampled(self) -> Self {
        Self { sampled: true, ..self }
    }

    /// A new position in the same trace.
    #[must_use]
    pub fn child(self) -> Self {
        Self { parent_id: random_parent_id(), ..self }
    }

    /// Formats the header value.
    #[expect(clippy::expect_used, reason = "digits and dashes are a header value")]
    pub fn to_header(self) -> HeaderValue {
        header(self.to_text()).expect("visible ASCII")
    }

    fn to_text(self) -> String {
        let (trace_id, parent_id) = (self.trace_id.get(), self.parent_id.get());
        let mut text = String::with_capacity(LENGTH);
        push_hex(&mut text, &[VERSION]);
        text.push('-');
        push_hex(&mut text, &trace_id.to_be_bytes());
        text.push('-');
        push_hex(&mut text, &parent_id.to_be_bytes());
        text.push('-');
        push_hex(&mut text, &[if self.sampled { SAMPLED } else { 0 }]);
        text
    }

    /// Parses the header, which must occur once. `None` if it is missing or malformed.
    pub fn read(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let value = values.next().filter(|_| values.next().is_none())?;
        Self::try_from(value).ok()
    }
}

impl FromStr for TraceParent {
    type Err = HeaderError;

    fn from_str(text: &str) -> Result<Self, HeaderError> {
        let mut fields = text.splitn(5, '-');
        let mut field = |digits| fields.next().and_then(|text| hex(text, digits));
        let fields_read = (field(2), field(32), field(16), field(2));
        let (Some(version), Some(trace_id), Some(parent_id), Some(flags)) = fields_read else {
            return Err(HeaderError::TraceParent);
        };
        if version == RESERVED_VERSION.into() {
            return Err(HeaderError::TraceVersion);
        }
        // Later versions may append fields (Trace Context section 3.2.4).
        if version == VERSION.into() && fields.next().is_some() {
            return Err(HeaderError::TraceParent);
        }
        let parent_id = u64::try_from(parent_id).map_err(|_| HeaderError::TraceParent)?;
        Ok(Self {
            trace_id: NonZeroU128::new(trace_id).ok_or(HeaderError::TraceIdZero)?,
            parent_id: NonZeroU64::new(parent_id).ok_or(HeaderError::TraceIdZero)?,
            sampled: flags & u128::from(SAMPLED) != 0,
        })
    }
}

impl TryFrom<&HeaderValue> for TraceParent {
    type Error = HeaderError;

    fn try_from(value: &HeaderValue) -> Result<Self, HeaderError> {
        value.to_str().map_err(|_| HeaderError::NotText)?.parse()
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_text())
    }
}

fn random_parent_id() -> NonZeroU64 {
    let parent_id = RANDOM.with_borrow_mut(|random| random.u64(1..));
    NonZeroU64::new(parent_id).unwrap_or(NonZeroU64::MIN)
}

fn seeded() -> Rng {
    let mut seed = [0; 8];
    let filled = aws_lc_rs::default_provider().secure_random.fill(&mut seed);
    // If aws-lc has no randomness, every TLS handshake fails anyway, so ids may be weak.
    filled.map_or_else(|_| Rng::new(), |()| Rng::with_seed(u64::from_ne_bytes(seed)))
}

/// Parses exactly `digits` lower-case hexadecimal digits.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let digit = |c| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let read = |number, c| Some(number << 4 | u128::from(digit(c)?));
    if text.len() == digits { text.bytes().try_fold(0, read) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn traceparent_prints_as_parsed() {
        let read: TraceParent = EXAMPLE.parse().unwrap();
        assert_eq!(read.trace_id().get(), 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!(read.parent_id().get(), 0x00f0_67aa_0ba9_02b7);
        assert!(read.is_sampled());
        assert_eq!(read.to_string(), EXAMPLE);
    }

    #[test]
    fn new_traceparents_differ() {
        let (one, other) = (TraceParent::new(), TraceParent::new());
        assert_ne!(one.trace_id(), other.trace_id());
        assert_ne!(one.parent_id(), other.parent_id());
        assert_eq!(one.to_string().len(), 55);
    }

    #[test]
    fn child_is_another_position_in_the_same_trace() {
        let parent: TraceParent = EXAMPLE.parse().unwrap();
        let child = parent.child();
        assert_eq!((child.trace_id(), child.is_sampled()), (parent.trace_id(), true));
        assert_ne!(child.parent_id(), parent.parent_id());
        assert!(TraceParent::new().sampled().to_string().ends_with("-01"));
    }

    #[test]
    fn later_version_is_read_and_written_as_version_00() {
        for later in [
            EXAMPLE.replacen("00", "01", 1),
            EXAMPLE.replacen("00", "fe", 1) + "-what-comes-then",
            EXAMPLE.replacen("00", "cc", 1) + "-",
            EXAMPLE.replacen("-01", "-ff", 1),
        ] {
            assert_eq!(later.parse::<TraceParent>().unwrap().to_string(), EXAMPLE, "{later}");
        }
    }

    #[test]
    fn rejects_malformed_traceparent_with_reason() {
        let zeros = |count| "0".repeat(count);
        let of = |trace: &str, parent: &str| format!("00-{trace}-{parent}-00");
        let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        for (text, reason) in [
            (String::new(), HeaderError::TraceParent),
            // ztunnel's parser panics on this value.
            (format!("00-{}", zeros(52)), HeaderError::TraceParent),
            (format!("00-{}", "-".repeat(52)), HeaderError::TraceParent),
            (EXAMPLE.to_uppercase(), HeaderError::TraceParent),
            (format!("{EXAMPLE}-"), HeaderError::TraceParent),
            (format!("{EXAMPLE}-00"), HeaderError::TraceParent),
            (format!("{EXAMPLE}0"), HeaderError::TraceParent),
            (format!(" {EXAMPLE}"), HeaderError::TraceParent),
            (EXAMPLE.replacen("00", "0", 1), HeaderError::TraceParent),
            (EXAMPLE.replacen("00", "+0", 1), HeaderError::TraceParent),
            (EXAMPLE.replacen("00", "01", 1) + "00", HeaderError::TraceParent),
            (EXAMPLE.replacen("-01", "-1", 1), HeaderError::TraceParent),
            (EXAMPLE.replacen("-01", "", 1), HeaderError::TraceParent),
            (of(&trace.replacen('b', "é", 1), parent), HeaderError::TraceParent),
            (of(&trace.replacen('b', "g", 1), parent), HeaderError::TraceParent),
            (EXAMPLE.replacen("00", "ff", 1), HeaderError::TraceVersion),
            (of(&zeros(32), parent), HeaderError::TraceIdZero),
            (of(trace, &zeros(16)), HeaderError::TraceIdZero),
        ] {
            assert_eq!(text.parse::<TraceParent>(), Err(reason), "{text}");
        }
    }
}

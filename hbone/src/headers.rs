//! What a CONNECT request says beside its destination: where it belongs in a trace, who sends it, whose connection it carries
//! and from which network. An answer says who serves it.
//!
//! All of it is the peer's claim. It is good for logs and metrics; who the peer is tells its certificate alone
//! ([`PeerIdentity`](crate::PeerIdentity)), and no decision to let somebody in may depend on anything in here.

mod baggage;
mod forwarded;
mod network;
mod traceparent;

use std::fmt::{self, Write as _};

use http::header::{FORWARDED, HeaderMap, HeaderName, HeaderValue};
use thiserror::Error;
use underpass_config::Name;

pub use baggage::Baggage;
pub use forwarded::Forwarded;
pub use traceparent::TraceParent;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// The whitespace that HTTP allows between the parts of a value (RFC 9110 section 5.6.3).
const OWS: [char; 2] = [' ', '\t'];

/// Why a header cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// Something other than visible ASCII, spaces and tabs.
    #[error("the header is no text")]
    NotText,
    /// Longer than anything that we hold.
    #[error("the header is longer than {limit} bytes")]
    TooLong {
        /// The cap.
        limit: usize,
    },
    /// More list members than we look at.
    #[error("the header has more than {limit} members")]
    TooManyMembers {
        /// The cap.
        limit: usize,
    },
    /// A `traceparent` of another shape.
    #[error("a traceparent is VERSION-TRACEID-PARENTID-FLAGS in lower-case hexadecimal")]
    TraceParent,
    /// A `traceparent` of the version that there will never be.
    #[error("version ff of traceparent is forbidden")]
    TraceVersion,
    /// A `traceparent` whose trace or parent has no id.
    #[error("an id of zeros alone identifies no trace")]
    TraceIdZero,
    /// A `forwarded` of another shape.
    #[error("a forwarded header is a list of NAME=VALUE;NAME=VALUE, each name once")]
    Forwarded,
}

/// The headers of a CONNECT request. As read from a peer: its claims, never a reason to let it in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestHeaders {
    /// The trace that the connection belongs to.
    pub traceparent: Option<TraceParent>,
    /// The workload that sends it.
    pub baggage: Option<Baggage>,
    /// The connection that is carried.
    pub forwarded: Option<Forwarded>,
    /// The network that it comes from, on the inner request of one that crosses a gateway. ztunnel compares it ignoring case.
    pub network: Option<Name>,
}

impl RequestHeaders {
    /// What can be read of them; what is absent, malformed or too long is `None`.
    pub fn read(headers: &HeaderMap) -> Self {
        Self {
            traceparent: TraceParent::read(headers),
            baggage: Baggage::read(headers),
            forwarded: Forwarded::read(headers),
            network: network::read(headers),
        }
    }

    /// As a [`ConnectRequest`](crate::ConnectRequest) carries them. What says nothing is left out.
    pub fn into_header_map(self) -> HeaderMap {
        let values = [
            (TRACEPARENT, self.traceparent.map(|trace| once(trace.to_header()))),
            (BAGGAGE, self.baggage.and_then(|baggage| baggage.to_header())),
            (FORWARDED, self.forwarded.and_then(|forwarded| forwarded.to_header()).map(once)),
            (NETWORK, self.network.and_then(|network| network::to_header(&network))),
        ];
        values.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

/// What is said as a header's value; `None` if it is nothing. It takes about `length` bytes.
fn header(said: &impl fmt::Display, length: usize) -> Option<HeaderValue> {
    let mut text = String::with_capacity(length);
    write!(text, "{said}").ok()?;
    // Only control characters are refused, and none of ours writes any: the tests try.
    HeaderValue::try_from(text).ok().filter(|value| !value.is_empty())
}

/// A value that is never the same twice: the tables of HPACK are for others (RFC 7541 section 7.1.3 has the way to say that).
fn once(mut value: HeaderValue) -> HeaderValue {
    value.set_sensitive(true);
    value
}

#[cfg(test)]
mod tests;

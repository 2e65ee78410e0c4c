//! The headers of CONNECT requests and responses: trace, sender, forwarded connection and network.
//!
//! They are unverified claims of the peer, for logs and metrics only: authorization must not use
//! them. The certificate proves the peer's identity ([`PeerIdentity`](crate::PeerIdentity)).

mod baggage;
mod forwarded;
mod network;
mod traceparent;

use http::header::{FORWARDED, HeaderMap, HeaderName, HeaderValue};
use thiserror::Error;
use underpass_config::Name;

pub use baggage::Baggage;
pub use forwarded::Forwarded;
pub use traceparent::TraceParent;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// Optional whitespace between the parts of a value (RFC 9110 section 5.6.3).
const OPTIONAL_WHITESPACE: [char; 2] = [' ', '\t'];

/// The reason why a header does not parse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// The header contains bytes other than visible ASCII, spaces and tabs.
    #[error("the header contains non-ASCII bytes")]
    NotText,
    /// The header exceeds the maximum length.
    #[error("the header is longer than {limit} bytes")]
    TooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// The header contains too many list members.
    #[error("the header has more than {limit} members")]
    TooManyMembers {
        /// The maximum number of members.
        limit: usize,
    },
    /// `traceparent` is malformed.
    #[error("a traceparent is VERSION-TRACEID-PARENTID-FLAGS in lower-case hexadecimal")]
    TraceParent,
    /// `traceparent` has the forbidden version ff.
    #[error("version ff of traceparent is forbidden")]
    TraceVersion,
    /// `traceparent` has a trace id or parent id of zeros.
    #[error("a traceparent must not contain an id of zeros")]
    TraceIdZero,
    /// `forwarded` is malformed.
    #[error("a forwarded header is a list of NAME=VALUE;NAME=VALUE, each name once")]
    Forwarded,
}

/// The headers of a CONNECT request. Those of a peer are unverified claims.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestHeaders {
    /// The trace of the connection.
    pub traceparent: Option<TraceParent>,
    /// The workload that sent the request.
    pub baggage: Option<Baggage>,
    /// The connection that the tunnel carries.
    pub forwarded: Option<Forwarded>,
    /// The network of the sender, in the inner request through a gateway. ztunnel compares it
    /// case-insensitively.
    pub network: Option<Name>,
}

impl RequestHeaders {
    /// Parses the headers. Missing, malformed and too long headers become `None`.
    pub fn read(headers: &HeaderMap) -> Self {
        Self {
            traceparent: TraceParent::read(headers),
            baggage: Baggage::read(headers),
            forwarded: Forwarded::read(headers),
            network: network::read(headers),
        }
    }

    /// Formats the headers for a [`ConnectRequest`](crate::ConnectRequest). Omits empty ones.
    pub fn into_header_map(self) -> HeaderMap {
        let values = [
            (TRACEPARENT, self.traceparent.map(|trace| never_indexed(trace.to_header()))),
            (BAGGAGE, self.baggage.and_then(|baggage| baggage.to_header())),
            (
                FORWARDED,
                self.forwarded.and_then(|forwarded| forwarded.to_header()).map(never_indexed),
            ),
            (NETWORK, self.network.and_then(|network| network::to_header(&network))),
        ];
        values.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

/// Makes a header value of a formatted text. `None` if the text is empty.
fn header(text: String) -> Option<HeaderValue> {
    // Only control characters are invalid. Tests check that no formatted value contains any.
    HeaderValue::try_from(text).ok().filter(|value| !value.is_empty())
}

/// Excludes a unique value from the HPACK tables, which then keep other values (RFC 7541 section
/// 7.1.3).
fn never_indexed(mut value: HeaderValue) -> HeaderValue {
    value.set_sensitive(true);
    value
}

#[cfg(test)]
mod tests;

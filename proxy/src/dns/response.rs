//! Builds the responses of this proxy: answers from the mesh, and stored responses of servers.

use std::net::IpAddr;
use std::time::Duration;

use super::message::{
    self, AA, AD, CD, Edns, HEADER, Layout, MAX_MESSAGE, OPT_LENGTH, QR, Query, RA, RD, RecordType,
    ResponseCode, TC,
};

/// The lifetime of answers from the mesh, as in ztunnel and in Kubernetes.
pub(super) const MESH_TTL: u32 = 30;
/// The TTL of a stale answer (RFC 8767 section 4).
const STALE_TTL: u32 = 30;
/// The upper part of the response code BADVERS (RFC 6891 section 9).
const BAD_VERSION: u8 = 1;

/// How a client receives its response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

impl Transport {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }

    /// The maximum length of a response to `query`.
    pub(super) fn limit(self, query: &Query) -> usize {
        match self {
            Self::Udp => query.udp_limit(),
            Self::Tcp => MAX_MESSAGE,
        }
    }
}

/// A response with these addresses. If `alias` is set, the addresses belong to the name of the
/// question's first `alias` labels, to which a CNAME record points.
pub(super) fn of_addresses(
    query: &Query,
    alias: Option<usize>,
    addresses: &[IpAddr],
    transport: Transport,
) -> Vec<u8> {
    let mut message = start(query, ResponseCode::NO_ERROR, AA);
    let mut owner = HEADER;
    let limit = transport.limit(query) - query.edns.map_or(0, |_| OPT_LENGTH);
    let (mut count, mut truncated) = (0, false);
    if let Some(target) = alias.and_then(|labels| first_labels(&query.question, labels))
        && !addresses.is_empty()
    {
        let length = message.len();
        record(&mut message, HEADER, RecordType::CNAME, &target);
        owner = message.len() - target.len();
        count = 1;
        truncated = message.len() > limit;
        if truncated {
            message.truncate(length);
            count = 0;
        }
    }
    for address in addresses.iter().filter(|_| !truncated) {
        let length = message.len();
        match address {
            IpAddr::V4(v4) => record(&mut message, owner, RecordType::A, &v4.octets()),
            IpAddr::V6(v6) => record(&mut message, owner, RecordType::AAAA, &v6.octets()),
        }
        if message.len() > limit {
            message.truncate(length);
            truncated = true;
            break;
        }
        count += 1;
    }
    if truncated {
        let flags = message::flags(&message);
        message::set_flags(&mut message, flags | TC);
    }
    finish(message, query, count)
}

/// A response without records.
pub(super) fn of_code(query: &Query, code: ResponseCode) -> Vec<u8> {
    finish(start(query, code, 0), query, 0)
}

/// A response to a query with a version of EDNS that is not 0; `None` for other queries.
pub(super) fn unsupported_version(query: &Query) -> Option<Vec<u8>> {
    query.edns.filter(|Edns { version, .. }| *version != 0)?;
    let mut message = start(query, ResponseCode::NO_ERROR, 0);
    message.extend(message::opt(query.dnssec_ok(), BAD_VERSION));
    message::set_counts(&mut message, [0, 0, 1]);
    Some(message)
}

fn start(query: &Query, code: ResponseCode, flags: u16) -> Vec<u8> {
    let mut message = query.id.to_be_bytes().to_vec();
    message.extend((QR | RA | flags | query.flags & (RD | CD) | code.0).to_be_bytes());
    message.extend([0, 1, 0, 0, 0, 0, 0, 0]);
    message.extend(&*query.question);
    message
}

fn finish(mut message: Vec<u8>, query: &Query, answers: u16) -> Vec<u8> {
    message::set_counts(&mut message, [answers, 0, query.edns.map_or(0, |_| 1)]);
    if query.edns.is_some() {
        message.extend(message::opt(query.dnssec_ok(), 0));
    }
    message
}

/// Appends a record of the name at `owner`.
fn record(message: &mut Vec<u8>, owner: usize, kind: RecordType, data: &[u8]) {
    // A name beyond the reach of a pointer is impossible: it is in the question or follows it.
    let pointer = 0xc000 | u16::try_from(owner).unwrap_or_default();
    let length = u16::try_from(data.len()).unwrap_or_default();
    message.extend(pointer.to_be_bytes());
    message.extend(kind.0.to_be_bytes());
    message.extend(message::CLASS_IN.to_be_bytes());
    message.extend(MESH_TTL.to_be_bytes());
    message.extend(length.to_be_bytes());
    message.extend(data);
}

/// The name of the first `count` labels of the name at the start of `question`.
fn first_labels(question: &[u8], count: usize) -> Option<Vec<u8>> {
    let mut end = 0;
    for _ in 0..count {
        end += usize::from(*question.get(end)?) + 1;
    }
    let mut name = question.get(..end)?.to_vec();
    name.push(0);
    Some(name)
}

/// Shortens a response to what the client of `query` accepts: leaves out whole records, keeps an
/// OPT record, and sets TC. Clients without TCP use the remaining answers.
pub(super) fn truncate(mut message: Vec<u8>, query: &Query, transport: Transport) -> Vec<u8> {
    let limit = transport.limit(query);
    if message.len() <= limit {
        return message;
    }
    let Some(layout) = Layout::read(&message) else {
        return of_code(query, ResponseCode::SERVER_FAILURE);
    };
    let room = limit.saturating_sub(layout.question);
    let opt = opt_of(&message, &layout).filter(|opt| opt.len() <= room);
    let own = || query.edns.map(|_| message::opt(query.dnssec_ok(), 0).to_vec());
    let opt = opt.or_else(|| own().filter(|opt| opt.len() <= room)).unwrap_or_default();
    let fits = |end: usize| end + opt.len() <= limit;
    let answers = layout.answers.iter().take_while(|answer| fits(answer.end()));
    let (mut end, mut count) = (layout.question, 0);
    for answer in answers {
        (end, count) = (answer.end(), count + 1);
    }
    message.truncate(end);
    message.extend(&opt);
    let flags = message::flags(&message);
    message::set_flags(&mut message, flags | TC);
    message::set_counts(&mut message, [count, 0, u16::from(!opt.is_empty())]);
    message
}

/// The OPT record of a response. Its name must be the root: another one may point to a record that
/// is left out.
fn opt_of(message: &[u8], layout: &Layout) -> Option<Vec<u8>> {
    let opt = layout.additionals.iter().find(|record| record.is_opt())?;
    let bytes = message.get(opt.start..opt.end())?;
    bytes.starts_with(&[0]).then(|| bytes.to_vec())
}

/// A response of a server, for later queries with the same question.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StoredResponse {
    /// The message without OPT record.
    message: Vec<u8>,
    /// The position and the value of each TTL.
    ttls: Vec<(usize, u32)>,
    /// The end of the question.
    question: usize,
}

/// The remaining lifetime of a stored response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Age {
    /// It is this old, and not expired.
    Fresh(Duration),
    Stale,
}

impl StoredResponse {
    /// `None` if the response cannot serve other queries: an error of EDNS, or records after the
    /// OPT record, to whose names others may point.
    pub(super) fn new(mut message: Vec<u8>) -> Option<Self> {
        let layout = Layout::read(&message)?;
        message.truncate(layout.end());
        let records = || layout.records();
        let opts = records().filter(|record| record.is_opt()).count();
        if opts > 0 {
            let last = records().last().filter(|last| last.is_opt() && opts == 1)?;
            // The first byte is the upper part of the response code.
            if last.ttl.to_be_bytes().first() != Some(&0) {
                return None;
            }
            message.truncate(last.start);
            let additionals = u16::try_from(layout.additionals.len()).ok()?.checked_sub(1)?;
            message::write_u16(&mut message, 10, additionals);
        }
        let ttl = |record: &message::Record| (record.ttl_at, record.ttl);
        let ttls = records().filter(|record| !record.is_opt()).map(ttl).collect();
        Some(Self { message, ttls, question: layout.question })
    }

    pub(super) fn code(&self) -> ResponseCode {
        message::code(&self.message)
    }

    /// How long the response may be used; `None` if it must not be cached.
    pub(super) fn ttl(&self, kind: RecordType) -> Option<u32> {
        let is_cacheable = matches!(self.code(), ResponseCode::NO_ERROR | ResponseCode::NAME_ERROR);
        if !is_cacheable || message::is_truncated(&self.message) {
            return None;
        }
        let layout = Layout::read(&self.message)?;
        let of_records = self.ttls.iter().map(|(_, ttl)| *ttl).min();
        if has_answer(&layout, kind) {
            of_records
        } else {
            of_records.min(layout.negative_ttl(&self.message))
        }
    }

    /// Whether there is an answer of the requested type, not only an alias.
    pub(super) fn has_answer(&self, kind: RecordType) -> bool {
        Layout::read(&self.message).is_some_and(|layout| has_answer(&layout, kind))
    }

    pub(super) fn len(&self) -> usize {
        self.message.len() + self.ttls.len() * size_of::<(usize, u32)>()
    }

    /// The response to `query`, which has the same question.
    pub(super) fn to(&self, query: &Query, age: Age, transport: Transport) -> Vec<u8> {
        let mut message = Vec::with_capacity(self.message.len() + OPT_LENGTH);
        message.extend(query.id.to_be_bytes());
        let kept = message::flags(&self.message) & !(AA | RD | CD | AD);
        // A client that does not ask for it may not expect AD (RFC 6840 section 5.7).
        let asked = query.dnssec_ok() || query.flags & AD != 0;
        let authentic = if asked { message::flags(&self.message) & AD } else { 0 };
        message.extend((kept | authentic | query.flags & (RD | CD)).to_be_bytes());
        message.extend(self.message.get(4..HEADER).unwrap_or_default());
        message.extend(&*query.question);
        message.extend(self.message.get(self.question..).unwrap_or_default());
        for (at, ttl) in &self.ttls {
            let left = match age {
                Age::Fresh(age) => {
                    let age = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
                    ttl.saturating_sub(age)
                }
                Age::Stale => STALE_TTL,
            };
            message::write_u32(&mut message, *at, left);
        }
        if query.edns.is_some() {
            let additionals = message.get(10..12).and_then(|count| count.try_into().ok());
            let additionals = additionals.map(u16::from_be_bytes).unwrap_or_default();
            message::write_u16(&mut message, 10, additionals.saturating_add(1));
            message.extend(message::opt(query.dnssec_ok(), 0));
        }
        truncate(message, query, transport)
    }
}

fn has_answer(layout: &Layout, kind: RecordType) -> bool {
    layout.answers.iter().any(|answer| answer.kind == kind.0)
}

#[cfg(test)]
mod tests;

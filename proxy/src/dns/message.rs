//! DNS messages (RFC 1035, RFC 6891): reads queries, and finds the fields of responses that a
//! forwarder changes.
//!
//! The proxy forwards the messages of others unchanged. So this module decodes only the record data
//! that the proxy uses, addresses and the minimum of an SOA record; of other records it checks the
//! lengths.

use std::net::IpAddr;
use std::ops::Range;

use super::name::{DomainName, MAX_NAME};

/// The length of the header.
pub(super) const HEADER: usize = 12;
/// The maximum length of a message.
pub(super) const MAX_MESSAGE: usize = 65_535;
/// The maximum length of a response over UDP for a client without EDNS.
pub(super) const MIN_PAYLOAD: u16 = 512;
/// The payload size that this proxy announces: the one of DNS Flag Day 2020, which needs no
/// fragments.
pub(super) const PAYLOAD: u16 = 1232;
/// The length of an OPT record without options.
pub(super) const OPT_LENGTH: usize = 11;

pub(super) const QR: u16 = 0x8000;
pub(super) const OPCODE: u16 = 0x7800;
pub(super) const AA: u16 = 0x0400;
pub(super) const TC: u16 = 0x0200;
pub(super) const RD: u16 = 0x0100;
pub(super) const RA: u16 = 0x0080;
pub(super) const AD: u16 = 0x0020;
pub(super) const CD: u16 = 0x0010;
const RCODE: u16 = 0x000f;
/// The bit DO of an OPT record.
pub(super) const DNSSEC_OK: u16 = 0x8000;

const OPT: u16 = 41;
const COOKIE: u16 = 10;
const SOA: u16 = 6;
pub(super) const CLASS_IN: u16 = 1;

/// The type of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RecordType(pub(super) u16);

impl RecordType {
    pub(crate) const A: Self = Self(1);
    pub(crate) const AAAA: Self = Self(28);
    pub(super) const CNAME: Self = Self(5);

    pub(super) fn number(self) -> u16 {
        self.0
    }

    /// Whether the answer is a series of messages: AXFR or IXFR.
    fn is_transfer(self) -> bool {
        matches!(self.0, 251 | 252)
    }

    /// The name in logs and metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self.0 {
            1 => "A",
            2 => "NS",
            5 => "CNAME",
            6 => "SOA",
            12 => "PTR",
            15 => "MX",
            16 => "TXT",
            28 => "AAAA",
            33 => "SRV",
            35 => "NAPTR",
            43 => "DS",
            48 => "DNSKEY",
            64 => "SVCB",
            65 => "HTTPS",
            255 => "ANY",
            257 => "CAA",
            _ => "other",
        }
    }
}

/// A response code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ResponseCode(pub(super) u16);

impl ResponseCode {
    pub(crate) const NO_ERROR: Self = Self(0);
    pub(crate) const FORMAT_ERROR: Self = Self(1);
    pub(crate) const SERVER_FAILURE: Self = Self(2);
    pub(crate) const NAME_ERROR: Self = Self(3);
    pub(crate) const NOT_IMPLEMENTED: Self = Self(4);
    pub(crate) const REFUSED: Self = Self(5);
    /// Its upper part is in the OPT record (RFC 6891 section 9).
    pub(crate) const BAD_VERSION: Self = Self(16);

    /// The name in logs and metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::NO_ERROR => "NOERROR",
            Self::FORMAT_ERROR => "FORMERR",
            Self::SERVER_FAILURE => "SERVFAIL",
            Self::NAME_ERROR => "NXDOMAIN",
            Self::NOT_IMPLEMENTED => "NOTIMP",
            Self::REFUSED => "REFUSED",
            Self::BAD_VERSION => "BADVERS",
            Self(_) => "other",
        }
    }
}

/// The EDNS part of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Edns {
    /// The maximum length of a response over UDP.
    pub(super) payload: u16,
    pub(super) dnssec_ok: bool,
    pub(super) version: u8,
}

/// A query with one question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Query {
    pub(super) id: u16,
    pub(super) flags: u16,
    pub(crate) name: DomainName,
    pub(crate) kind: RecordType,
    pub(super) class: u16,
    /// The question as the client wrote it. Its name is not compressed.
    pub(super) question: Box<[u8]>,
    pub(super) edns: Option<Edns>,
    /// Whether the answer to another client's query serves too: no signature, and no option but a
    /// cookie.
    pub(super) is_plain: bool,
}

/// Why a message is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Malformed {
    /// It is too short to answer, or not a query.
    Ignored,
    /// It gets a response with this code.
    Rejected(ResponseCode),
}

impl Query {
    /// Reads a query.
    pub(super) fn read(message: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader { bytes: message, at: 0 };
        let header = reader.header().ok_or(Malformed::Ignored)?;
        if header.flags & QR != 0 {
            return Err(Malformed::Ignored);
        }
        if header.flags & OPCODE != 0 {
            return Err(Malformed::Rejected(ResponseCode::NOT_IMPLEMENTED));
        }
        let malformed = Malformed::Rejected(ResponseCode::FORMAT_ERROR);
        let query = Self::read_parts(reader, header).ok_or(malformed)?;
        if query.kind.is_transfer() {
            return Err(Malformed::Rejected(ResponseCode::NOT_IMPLEMENTED));
        }
        Ok(query)
    }

    fn read_parts(mut reader: Reader<'_>, header: Header) -> Option<Self> {
        let [1, answers, authorities, additionals] = header.counts else { return None };
        let start = reader.at;
        let name = reader.name()?;
        let (kind, class) = (RecordType(reader.u16()?), reader.u16()?);
        let question = reader.bytes.get(start..reader.at)?.into();
        let (mut edns, mut is_plain) = (None, answers == 0 && authorities == 0);
        for section in [answers, authorities, additionals] {
            for _ in 0..section {
                let record = reader.record()?;
                match record.kind {
                    OPT if edns.is_none() => {
                        edns = Some(record.edns());
                        is_plain &= only_cookies(reader.bytes.get(record.data)?)?;
                    }
                    // More than one OPT record is a format error (RFC 6891 section 6.1.1).
                    OPT => return None,
                    _ => is_plain = false,
                }
            }
        }
        is_plain &= reader.at == reader.bytes.len() && class == CLASS_IN;
        let Header { id, flags, .. } = header;
        Some(Self { id, flags, name, kind, class, question, edns, is_plain })
    }

    /// The maximum length of a response over UDP.
    pub(super) fn udp_limit(&self) -> usize {
        let payload = self.edns.map_or(MIN_PAYLOAD, |edns| edns.payload.max(MIN_PAYLOAD));
        usize::from(payload)
    }

    pub(super) fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }

    /// Whether `message` is a response with this `id` to the question of this query.
    pub(super) fn is_answered_by(&self, message: &[u8], id: u16) -> bool {
        let mut reader = Reader { bytes: message, at: 0 };
        let Some(header) = reader.header() else { return false };
        let question = message.get(HEADER..HEADER + self.question.len());
        header.id == id
            && header.flags & (QR | OPCODE) == QR
            && header.counts.first() == Some(&1)
            && question.is_some_and(|question| question.eq_ignore_ascii_case(&self.question))
            && Layout::read(message).is_some()
    }
}

/// Whether the options of an OPT record are at most cookies; `None` if they are malformed.
fn only_cookies(options: &[u8]) -> Option<bool> {
    let mut reader = Reader { bytes: options, at: 0 };
    let mut only = true;
    while reader.at < options.len() {
        let (code, length) = (reader.u16()?, reader.u16()?);
        reader.take(length.into())?;
        only &= code == COOKIE;
    }
    Some(only)
}

/// A response to a message that is no valid query: only a header.
pub(super) fn rejection(message: &[u8], code: ResponseCode) -> Option<Vec<u8>> {
    let header = Reader { bytes: message, at: 0 }.header()?;
    let flags = QR | header.flags & (OPCODE | RD) | code.0;
    let mut response = header.id.to_be_bytes().to_vec();
    response.extend(flags.to_be_bytes());
    response.resize(HEADER, 0);
    Some(response)
}

/// Writes the id of a message.
pub(super) fn set_id(message: &mut [u8], id: u16) {
    write_u16(message, 0, id);
}

/// The flags of a message; 0 if it has none.
pub(super) fn flags(message: &[u8]) -> u16 {
    Reader { bytes: message, at: 2 }.u16().unwrap_or_default()
}

pub(super) fn set_flags(message: &mut [u8], flags: u16) {
    write_u16(message, 2, flags);
}

pub(super) fn is_truncated(message: &[u8]) -> bool {
    flags(message) & TC != 0
}

/// The response code in the header.
pub(super) fn code(message: &[u8]) -> ResponseCode {
    ResponseCode(flags(message) & RCODE)
}

pub(super) fn set_code(message: &mut [u8], code: ResponseCode) {
    set_flags(message, flags(message) & !RCODE | code.0);
}

/// Writes the numbers of answers, authorities and additional records.
pub(super) fn set_counts(message: &mut [u8], counts: [u16; 3]) {
    for (at, count) in (6..).step_by(2).zip(counts) {
        write_u16(message, at, count);
    }
}

pub(super) fn write_u16(message: &mut [u8], at: usize, value: u16) {
    if let Some(field) = message.get_mut(at..at + 2) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

pub(super) fn write_u32(message: &mut [u8], at: usize, value: u32) {
    if let Some(field) = message.get_mut(at..at + 4) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

/// An OPT record of this proxy. `code` is the upper part of the response code.
pub(super) fn opt(dnssec_ok: bool, code: u8) -> [u8; OPT_LENGTH] {
    let [kind_high, kind_low] = OPT.to_be_bytes();
    let [payload_high, payload_low] = PAYLOAD.to_be_bytes();
    let [do_high, do_low] = if dnssec_ok { DNSSEC_OK } else { 0 }.to_be_bytes();
    [0, kind_high, kind_low, payload_high, payload_low, code, 0, do_high, do_low, 0, 0]
}

/// The position of a record in a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) start: usize,
    pub(super) kind: u16,
    class: u16,
    pub(super) ttl_at: usize,
    pub(super) ttl: u32,
    pub(super) data: Range<usize>,
}

impl Record {
    pub(super) fn end(&self) -> usize {
        self.data.end
    }

    pub(super) fn is_opt(&self) -> bool {
        self.kind == OPT
    }

    /// The fields of an OPT record (RFC 6891 section 6.1.3).
    fn edns(&self) -> Edns {
        let [_, version, flags, _] = self.ttl.to_be_bytes();
        Edns { payload: self.class, version, dnssec_ok: flags & 0x80 != 0 }
    }

    /// The address, if this is a record of an address.
    pub(super) fn address(&self, message: &[u8]) -> Option<IpAddr> {
        let data = message.get(self.data.clone())?;
        match RecordType(self.kind) {
            RecordType::A => <[u8; 4]>::try_from(data).ok().map(Into::into),
            RecordType::AAAA => <[u8; 16]>::try_from(data).ok().map(Into::into),
            _ => None,
        }
    }
}

/// The positions of the records of a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    /// The end of the question.
    pub(super) question: usize,
    pub(super) answers: Vec<Record>,
    pub(super) authorities: Vec<Record>,
    pub(super) additionals: Vec<Record>,
}

impl Layout {
    /// The records of a message with one question; `None` if a record is not whole.
    pub(super) fn read(message: &[u8]) -> Option<Self> {
        let mut reader = Reader { bytes: message, at: 0 };
        let [1, answers, authorities, additionals] = reader.header()?.counts else { return None };
        // The first name has no earlier name to point to: it is not compressed.
        reader.skip_name()?;
        reader.take(4)?;
        let question = reader.at;
        let mut records =
            |count: u16| (0..count).map(|_| reader.record()).collect::<Option<Vec<_>>>();
        Some(Self {
            question,
            answers: records(answers)?,
            authorities: records(authorities)?,
            additionals: records(additionals)?,
        })
    }

    pub(super) fn records(&self) -> impl Iterator<Item = &Record> {
        self.answers.iter().chain(&self.authorities).chain(&self.additionals)
    }

    /// The end of the last record.
    pub(super) fn end(&self) -> usize {
        self.records().last().map_or(self.question, Record::end)
    }

    /// The addresses in the answers.
    pub(super) fn addresses(&self, message: &[u8]) -> Vec<IpAddr> {
        self.answers.iter().filter_map(|answer| answer.address(message)).collect()
    }

    /// How long a response without answers may be cached (RFC 2308 section 5); `None` without an
    /// SOA record.
    pub(super) fn negative_ttl(&self, message: &[u8]) -> Option<u32> {
        let soa = self.authorities.iter().find(|record| record.kind == SOA)?;
        let minimum = message.get(soa.data.end.checked_sub(4)?..soa.data.end)?;
        Some(soa.ttl.min(u32::from_be_bytes(minimum.try_into().ok()?)))
    }
}

struct Header {
    id: u16,
    flags: u16,
    /// Questions, answers, authorities, additional records.
    counts: [u16; 4],
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn header(&mut self) -> Option<Header> {
        let (id, flags) = (self.u16()?, self.u16()?);
        Some(Header { id, flags, counts: [self.u16()?, self.u16()?, self.u16()?, self.u16()?] })
    }

    /// The name of a question, which must not be compressed.
    fn name(&mut self) -> Option<DomainName> {
        let (start, mut labels) = (self.at, Vec::new());
        loop {
            match self.u8()? {
                0 => break,
                length @ 1..=63 => labels.push(self.take(length.into())?),
                _ => return None,
            }
        }
        (self.at - start <= MAX_NAME).then(|| DomainName::of_labels(labels.into_iter()))
    }

    /// Skips the name of a record. A pointer must point back; its target is not read.
    fn skip_name(&mut self) -> Option<()> {
        let start = self.at;
        loop {
            match self.u8()? {
                0 => break,
                length @ 1..=63 => {
                    self.take(length.into())?;
                }
                high @ 0xc0.. => {
                    let target = usize::from(high & 0x3f) << 8 | usize::from(self.u8()?);
                    if !(HEADER..start).contains(&target) {
                        return None;
                    }
                    break;
                }
                _ => return None,
            }
        }
        (self.at - start <= MAX_NAME).then_some(())
    }

    fn record(&mut self) -> Option<Record> {
        let start = self.at;
        self.skip_name()?;
        let (kind, class, ttl_at) = (self.u16()?, self.u16()?, self.at);
        let (ttl, length) = (self.u32()?, self.u16()?);
        let data = self.at..self.at + usize::from(length);
        self.take(length.into())?;
        Some(Record { start, kind, class, ttl_at, ttl, data })
    }
}

#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;

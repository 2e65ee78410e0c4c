//! Messages for tests.

use super::*;
use crate::dns::name::encode;

/// A query for `name` with the id 7, RD, and these additional records.
pub(crate) fn query(name: &str, kind: RecordType, additionals: &[&[u8]]) -> Vec<u8> {
    let count = u8::try_from(additionals.len()).unwrap();
    let mut message = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, count];
    message.extend(encode(name).unwrap());
    message.extend(kind.0.to_be_bytes());
    message.extend(CLASS_IN.to_be_bytes());
    additionals.iter().for_each(|record| message.extend(*record));
    message
}

/// An OPT record with this payload size and these options.
pub(crate) fn edns(payload: u16, dnssec_ok: bool, options: &[u8]) -> Vec<u8> {
    let mut record = opt(dnssec_ok, 0).to_vec();
    record[3..5].copy_from_slice(&payload.to_be_bytes());
    record[9..11].copy_from_slice(&u16::try_from(options.len()).unwrap().to_be_bytes());
    record.extend(options);
    record
}

/// A record of the question's name.
pub(crate) fn record(kind: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let mut record = vec![0xc0, 12];
    record.extend(kind.to_be_bytes());
    record.extend(CLASS_IN.to_be_bytes());
    record.extend(ttl.to_be_bytes());
    record.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
    record.extend(data);
    record
}

/// A response to `query` with these flags and sections.
pub(crate) fn response(query: &[u8], flags: u16, sections: [&[Vec<u8>]; 3]) -> Vec<u8> {
    let question = Query::read(query).unwrap().question;
    let mut message = query[..2].to_vec();
    message.extend((QR | RD | RA | flags).to_be_bytes());
    message.extend([0, 1, 0, 0, 0, 0, 0, 0]);
    message.extend(&*question);
    set_counts(&mut message, sections.map(|records| u16::try_from(records.len()).unwrap()));
    sections.iter().flat_map(|records| records.iter()).for_each(|one| message.extend(one));
    message
}

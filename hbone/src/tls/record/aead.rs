//! The AEAD key of one direction: seals and opens single records, and counts them.
//!
//! A slice of the wrong length causes an error, never a panic.

use std::fmt;

use aws_lc_rs::aead::{Aad, Algorithm, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::error::Unspecified;
use rustls::crypto::cipher::{self, Iv};
use rustls::{ContentType, Error};

use super::{HEADER, TAG, TRAILER};

/// The key of one direction. A key update replaces it.
pub(in crate::tls) struct RecordKey {
    key: LessSafeKey,
    iv: Iv,
    /// The sequence number of the next record. Each number is used once.
    sequence: u64,
}

impl RecordKey {
    pub(super) fn new(
        algorithm: &'static Algorithm,
        key: &[u8],
        iv: Iv,
        sequence: u64,
    ) -> Result<Self, Error> {
        let key = UnboundKey::new(algorithm, key)
            .map_err(|Unspecified| Error::General("a traffic key of the wrong length".into()))?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// The number of records that this key has sealed or opened.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Seals `content` as one record at the start of `slot`. Returns the length of the record. Does
    /// not copy `content`.
    pub(super) fn seal(
        &mut self,
        kind: ContentType,
        content: &[u8],
        slot: &mut [u8],
    ) -> Result<usize, Error> {
        let nonce = self.next_nonce().ok_or(Error::EncryptError)?;
        let (header, body, trailer) = parts(slot, content.len()).ok_or(Error::EncryptError)?;
        self.key
            .seal_out_of_place_scatter(
                nonce,
                Aad::from(&*header),
                content,
                body,
                &[u8::from(kind)],
                trailer,
            )
            .map_err(|Unspecified| Error::EncryptError)?;
        Ok(HEADER + content.len() + TRAILER)
    }

    /// Like [`seal`](Self::seal), for `length` bytes of content that `slot` contains already, after
    /// the space for the header.
    pub(super) fn seal_in_place(
        &mut self,
        kind: ContentType,
        length: usize,
        slot: &mut [u8],
    ) -> Result<usize, Error> {
        let nonce = self.next_nonce().ok_or(Error::EncryptError)?;
        let (header, body, trailer) = parts(slot, length).ok_or(Error::EncryptError)?;
        self.key
            .seal_in_place_scatter(nonce, Aad::from(&*header), body, &[u8::from(kind)], trailer)
            .map_err(|Unspecified| Error::EncryptError)?;
        Ok(HEADER + length + TRAILER)
    }

    /// Opens a complete record in place. Returns its inner plaintext: content, type and padding.
    pub(super) fn open_in_place<'a>(
        &mut self,
        record: &'a mut [u8],
    ) -> Result<&'a mut [u8], Error> {
        let nonce = self.next_nonce().ok_or(Error::DecryptError)?;
        let (header, body) = record.split_at_mut_checked(HEADER).ok_or(Error::DecryptError)?;
        self.key
            .open_in_place(nonce, Aad::from(&*header), body)
            .map_err(|Unspecified| Error::DecryptError)
    }

    /// Opens a complete record into `plain`, whose length must be the length of the inner
    /// plaintext.
    pub(super) fn open_into(&mut self, record: &[u8], plain: &mut [u8]) -> Result<(), Error> {
        let nonce = self.next_nonce().ok_or(Error::DecryptError)?;
        let (header, body) = record.split_at_checked(HEADER).ok_or(Error::DecryptError)?;
        let (text, tag) = body.split_last_chunk::<TAG>().ok_or(Error::DecryptError)?;
        self.key
            .open_separate_gather(nonce, Aad::from(header), text, tag, plain)
            .map_err(|Unspecified| Error::DecryptError)
    }

    /// Increments the sequence number before its use, so that a failed call cannot cause a nonce to
    /// be reused.
    fn next_nonce(&mut self) -> Option<Nonce> {
        let nonce = cipher::Nonce::new(&self.iv, self.sequence).0;
        self.sequence = self.sequence.checked_add(1)?;
        Some(Nonce::assume_unique_for_key(nonce))
    }
}

impl fmt::Debug for RecordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordKey").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

/// Writes the header of a record with `length` bytes of content. Splits `slot` into header, content
/// and trailer.
fn parts(slot: &mut [u8], length: usize) -> Option<(&mut [u8; HEADER], &mut [u8], &mut [u8])> {
    let (header, rest) = slot.split_first_chunk_mut::<HEADER>()?;
    let (body, rest) = rest.split_at_mut_checked(length)?;
    let (trailer, _) = rest.split_at_mut_checked(TRAILER)?;
    let [high, low] = u16::try_from(length + TRAILER).ok()?.to_be_bytes();
    // Every encrypted record has this opaque type and version (RFC 8446 section 5.2).
    *header = [u8::from(ContentType::ApplicationData), 3, 3, high, low];
    Some((header, body, trailer))
}

//! Parses YAML documents with positions, reads typed values, and quotes input in error messages.

pub(crate) mod document;
pub(crate) mod quote;
pub(crate) mod read;

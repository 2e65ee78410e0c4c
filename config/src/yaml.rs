//! YAML read with positions: documents, values and what error messages quote of them.

pub(crate) mod document;
pub(crate) mod quote;
pub(crate) mod read;

//! SPIFFE IDs, and the list of clients that a certificate authority accepts.

pub(crate) mod ca_clients;
pub(crate) mod spiffe;

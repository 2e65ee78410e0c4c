//! SPIFFE ids, and the clients of a certificate authority.

pub(crate) mod ca_clients;
pub(crate) mod spiffe;

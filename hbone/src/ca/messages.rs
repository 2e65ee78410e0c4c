//! Istio's certificate service on the wire (`istio.v1.auth`), as much of it as is used.
//!
//! Not here: what is asked and answered; client and server share the messages only.

use prost_types::Struct;

/// The one method.
pub(crate) const CREATE_CERTIFICATE: &str =
    "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The key in a request's metadata under which a node names the workload that it asks for.
pub(crate) const IMPERSONATED: &str = "ImpersonatedIdentity";

/// A request for a certificate.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct IstioCertificateRequest {
    /// The certificate signing request, PEM.
    #[prost(string, tag = "1")]
    pub(crate) csr: String,
    /// How long the certificate shall be valid, in seconds.
    #[prost(int64, tag = "3")]
    pub(crate) validity_duration: i64,
    /// What else there is to say, such as [`IMPERSONATED`].
    #[prost(message, optional, tag = "4")]
    pub(crate) metadata: Option<Struct>,
}

/// The certificate.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct IstioCertificateResponse {
    /// PEM: the leaf, intermediates, and last the roots, which may be several in one text.
    #[prost(string, repeated, tag = "1")]
    pub(crate) cert_chain: Vec<String>,
}

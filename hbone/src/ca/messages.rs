//! The messages of Istio's certificate service (`istio.v1.auth`) that are used, for client and
//! server.

use prost_types::Struct;

/// The path of the only method.
pub(crate) const CREATE_CERTIFICATE: &str =
    "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The metadata key with the workload for which a node requests a certificate.
pub(crate) const IMPERSONATED: &str = "ImpersonatedIdentity";

/// A request for a certificate.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct IstioCertificateRequest {
    /// The certificate signing request in PEM.
    #[prost(string, tag = "1")]
    pub(crate) csr: String,
    /// The requested validity in seconds.
    #[prost(int64, tag = "3")]
    pub(crate) validity_duration: i64,
    /// Additional fields, such as [`IMPERSONATED`].
    #[prost(message, optional, tag = "4")]
    pub(crate) metadata: Option<Struct>,
}

/// The issued certificate.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct IstioCertificateResponse {
    /// PEM: leaf, intermediates, and last the roots, which may be several in one string.
    #[prost(string, repeated, tag = "1")]
    pub(crate) cert_chain: Vec<String>,
}

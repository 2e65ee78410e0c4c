//! The Protobuf messages of Istio's certificate service (`istio.v1.auth`), for client and server.

use prost_types::Struct;

/// The gRPC path of the service's only method.
pub(crate) const CREATE_CERTIFICATE: &str =
    "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The metadata key by which a node names the workload that the certificate is for.
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

/// The answer with the issued certificate.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct IstioCertificateResponse {
    /// PEM: the leaf, then intermediates, then the roots. One string may contain several roots.
    #[prost(string, repeated, tag = "1")]
    pub(crate) cert_chain: Vec<String>,
}

//! The messages of SPIRE's Delegated Identity API (package `spire.api.agent.delegatedidentity.v1`).

use std::collections::BTreeMap;

/// `SubscribeToX509SVIDsRequest`: the selectors of a workload.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SvidRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) selectors: Vec<Selector>,
}

/// `spire.api.types.Selector`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Selector {
    #[prost(string, tag = "1")]
    pub(super) r#type: String,
    #[prost(string, tag = "2")]
    pub(super) value: String,
}

/// `SubscribeToX509SVIDsResponse`: all certificates of a workload.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Svids {
    #[prost(message, repeated, tag = "1")]
    pub(super) x509_svids: Vec<SvidWithKey>,
    /// Trust domains.
    #[prost(string, repeated, tag = "2")]
    pub(super) federates_with: Vec<String>,
}

/// `X509SVIDWithKey`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SvidWithKey {
    #[prost(message, optional, tag = "1")]
    pub(super) x509_svid: Option<Svid>,
    /// PKCS#8 in DER.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) x509_svid_key: Vec<u8>,
}

/// `spire.api.types.X509SVID`. Its other fields repeat the contents of the leaf.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Svid {
    /// DER, the leaf first.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub(super) cert_chain: Vec<Vec<u8>>,
}

/// `SubscribeToX509BundlesRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct BundleRequest {}

/// `SubscribeToX509BundlesResponse`: the roots of each trust domain, as concatenated DER.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Bundles {
    #[prost(btree_map = "string, bytes", tag = "1")]
    pub(super) ca_certificates: BTreeMap<String, Vec<u8>>,
}

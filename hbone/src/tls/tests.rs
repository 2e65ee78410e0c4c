//! Tests of accepted and rejected handshakes. A side that fails the handshake has no tunnel, so
//! that no CONNECT can pass.

mod interop;

use std::path::Path;
use std::time::SystemTime;

use rcgen::ExtendedKeyUsagePurpose as Usage;
use rustls::client::ResolvesClientCert;
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CipherSuite, ClientConfig, NamedGroup, SignatureScheme};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncWriteExt as _, DuplexStream, duplex};
use underpass_config::{Cipher, TrustDomain, TrustSettings};

use super::*;
use crate::ca::CertificateAuthority;
use crate::crypto::provider;
use crate::error::ExpectedPeer;
use crate::identity::Identity;
use crate::identity::credentials::Credentials;
use crate::testing::pki::{Ca, Files};
use crate::testing::{
    ADDRESS, CLIENT, HOUR, Mesh, SECOND, SERVER, authority, credentials, id, identity, request,
};
use crate::trust::Trust;
use crate::trust::bundle::Bundle;
use crate::tunnel::client::Tunnel;
use crate::tunnel::settings::{ClientSettings, ServerSettings};

/// The error of the client, from its handshake or its first request, and the error of the server.
async fn handshake_errors(
    client: &Identity,
    server: &Identity,
    expected: &str,
) -> (HboneError, HboneError) {
    handshake_errors_with(credentials(client), credentials(server), expected).await
}

async fn handshake_errors_with(
    client: Credentials,
    server: Credentials,
    expected: &str,
) -> (HboneError, HboneError) {
    let (client, server) = (client.fixed(), server.fixed());
    let Mesh { connector, acceptor } =
        Mesh::of(client, ClientSettings::default(), server, ServerSettings::default());
    let (near, far) = duplex(64 << 10);
    let expected = [id(expected)];
    let open = async {
        let tunnel: Tunnel = connector.open(near, ADDRESS, &expected, SECOND).await?;
        tunnel.connect(request(), SECOND).await
    };
    let (client, server) = tokio::join!(open, acceptor.accept(far, SECOND));
    (client.err().unwrap(), server.err().unwrap())
}

fn issued(
    authority: &CertificateAuthority,
    subject: &str,
    not_after: SystemTime,
    usages: &[Usage],
    roots: &str,
) -> Identity {
    let start = SystemTime::now() - 2 * HOUR;
    let issued = authority.issue_for(&id(subject), start, not_after, usages).unwrap();
    let (chain, key) = (issued.chain_pem.as_bytes(), issued.key_pem.as_bytes());
    Identity::from_pem_at(chain, key, roots.as_bytes(), start).unwrap()
}

fn with_usage(authority: &CertificateAuthority, subject: &str, usage: Usage) -> Identity {
    issued(authority, subject, SystemTime::now() + HOUR, &[usage], authority.roots_pem())
}

fn expired(authority: &CertificateAuthority, subject: &str) -> Identity {
    let both = [Usage::ServerAuth, Usage::ClientAuth];
    issued(authority, subject, SystemTime::now() - HOUR, &both, authority.roots_pem())
}

fn refused_with(error: &HboneError, expected: &str) {
    let HboneError::CertificateRefused { alert } = error else {
        panic!("expected a refused certificate, got {error:?}");
    };
    assert_eq!(alert, expected);
}

fn failed_with(error: &HboneError, expected: &str) {
    let HboneError::Tls { source } = error else {
        panic!("expected a TLS error, got {error:?}");
    };
    assert!(source.to_string().contains(expected), "{source}");
}

#[tokio::test]
async fn both_sides_reject_unknown_authority() {
    let (ours, other) = (authority("td"), authority("td"));
    let (client, server) =
        handshake_errors(&identity(&ours, CLIENT), &identity(&other, SERVER), SERVER).await;
    // Both roots have the same name, as in two meshes that are both called cluster.local.
    failed_with(&client, "BadSignature");
    refused_with(&server, "DecryptError");

    // The client trusts both authorities, the server only its own.
    let roots = format!("{}{}", ours.roots_pem(), other.roots_pem());
    let both = [Usage::ServerAuth, Usage::ClientAuth];
    let client = issued(&other, CLIENT, SystemTime::now() + HOUR, &both, &roots);
    let (client, server) = handshake_errors(&client, &identity(&ours, SERVER), SERVER).await;
    refused_with(&client, "DecryptError");
    failed_with(&server, "BadSignature");

    let other = authority("other");
    let expected = "spiffe://other/ns/default/sa/server";
    let (client, server) =
        handshake_errors(&identity(&ours, CLIENT), &identity(&other, expected), expected).await;
    let domain = "other".parse().unwrap();
    assert!(
        matches!(client, HboneError::UntrustedDomain { trust_domain } if trust_domain == domain)
    );
    refused_with(&server, "CertificateUnknown");
}

#[tokio::test]
async fn both_sides_reject_expired_certificate() {
    let authority = authority("td");
    let (good_client, good_server) = (identity(&authority, CLIENT), identity(&authority, SERVER));
    let (client, server) =
        handshake_errors(&good_client, &expired(&authority, SERVER), SERVER).await;
    assert!(matches!(client, HboneError::PeerCertificateExpired { .. }), "{client:?}");
    refused_with(&server, "CertificateExpired");
    let (client, server) =
        handshake_errors(&expired(&authority, CLIENT), &good_server, SERVER).await;
    refused_with(&client, "CertificateExpired");
    let HboneError::PeerCertificateExpired { expired } = server else { panic!("{server:?}") };
    let ago = SystemTime::now().duration_since(expired).unwrap();
    assert!(ago >= HOUR && ago < HOUR + 60 * SECOND, "{ago:?}");
}

#[tokio::test]
async fn certificate_that_is_not_valid_yet_is_rejected_with_its_start() {
    let authority = authority("td");
    let begins = SystemTime::now() + HOUR;
    let issued = authority.issue_between(&id(SERVER), begins, begins + HOUR).unwrap();
    let (chain, key) = (issued.chain_pem.as_bytes(), issued.key_pem.as_bytes());
    let roots = authority.roots_pem().as_bytes();
    let server = Identity::from_pem_at(chain, key, roots, begins + SECOND).unwrap();
    let (client, server) = handshake_errors(&identity(&authority, CLIENT), &server, SERVER).await;
    assert!(matches!(client, HboneError::PeerCertificateNotYetValid { .. }), "{client:?}");
    assert_eq!(client.kind(), "not_yet_valid");
    refused_with(&server, "CertificateExpired");
}

#[tokio::test]
async fn unexpected_server_never_receives_our_certificate() {
    let authority = authority("td");
    let required = "spiffe://td/ns/default/sa/other";
    let (client, server) =
        handshake_errors(&identity(&authority, CLIENT), &identity(&authority, SERVER), required)
            .await;
    let HboneError::UnexpectedPeer { expected, presented } = client else { panic!("{client:?}") };
    assert_eq!(expected, ExpectedPeer::OneOf([id(required)].into()));
    assert_eq!(presented.as_str(), SERVER);
    refused_with(&server, "CertificateUnknown");
}

#[tokio::test]
async fn client_of_other_domain_requires_roots_of_that_domain() {
    let (ours, other) = (Ca::root("ours"), Ca::root("other"));
    let foreign_id = "spiffe://other/foreign";
    let federated = Files::new().bundle("td", &ours);
    let client = Credentials::new(other.identity(foreign_id, 1), federated.trust()).unwrap();
    // Roots of another domain in our own domain's bundle are not enough.
    let both = Bundle::from_der(Path::new("both"), [ours.certificate(), other.certificate()]);
    let domain: TrustDomain = "td".parse().unwrap();
    let server =
        ours.identity_with(SERVER, 1, SystemTime::now() + HOUR, [(domain, both.unwrap())].into());
    let (client, server) = handshake_errors_with(client, credentials(&server), SERVER).await;
    refused_with(&client, "CertificateUnknown");
    let HboneError::UntrustedDomain { trust_domain } = server else { panic!("{server:?}") };
    assert_eq!(trust_domain.as_str(), "other");
}

#[tokio::test]
async fn rejects_certificate_for_the_other_role() {
    let authority = authority("td");
    let client_only = with_usage(&authority, SERVER, Usage::ClientAuth);
    let (client, server) =
        handshake_errors(&identity(&authority, CLIENT), &client_only, SERVER).await;
    failed_with(&client, "server authentication");
    refused_with(&server, "UnsupportedCertificate");
    let server_only = with_usage(&authority, CLIENT, Usage::ServerAuth);
    let (client, server) =
        handshake_errors(&server_only, &identity(&authority, SERVER), SERVER).await;
    refused_with(&client, "UnsupportedCertificate");
    failed_with(&server, "client authentication");
}

/// Credentials that allow these ciphers, in this order of preference.
fn with_ciphers(identity: &Identity, ciphers: &[Cipher]) -> Credentials {
    let settings = TrustSettings { ciphers: ciphers.to_vec(), ..TrustSettings::default() };
    Credentials::new(identity.clone(), Trust::read(&settings).unwrap()).unwrap()
}

#[tokio::test]
async fn tunnel_uses_common_cipher_preferred_by_server() {
    use Cipher::{Aes128Gcm, Aes256Gcm};
    let (small, large) =
        (CipherSuite::TLS13_AES_128_GCM_SHA256, CipherSuite::TLS13_AES_256_GCM_SHA384);
    let authority = authority("td");
    let (client, server) = (identity(&authority, CLIENT), identity(&authority, SERVER));
    for (of_client, of_server, expected) in [
        (&Cipher::ALL[..], &Cipher::ALL[..], small),
        // The ciphers of an unmodified ztunnel.
        (&[Aes256Gcm, Aes128Gcm], &Cipher::ALL, small),
        (&Cipher::ALL, &[Aes256Gcm, Aes128Gcm], large),
        (&[Aes256Gcm], &Cipher::ALL, large),
        (&Cipher::ALL, &[Aes256Gcm], large),
    ] {
        let (client, server) = (with_ciphers(&client, of_client), with_ciphers(&server, of_server));
        let (near, far) = duplex(64 << 10);
        let expecting = [id(SERVER)];
        let (connected, accepted) = tokio::join!(
            client.client().handshake(Box::new(near), ADDRESS, &expecting),
            server.server().accept(Box::new(far))
        );
        let agreed = connected.unwrap().0.negotiated().negotiated_cipher_suite().unwrap().suite();
        assert_eq!(agreed, expected, "{of_client:?}, {of_server:?}");
        accepted.unwrap();
    }
    let (client, server) =
        (with_ciphers(&client, &[Aes256Gcm]), with_ciphers(&server, &[Aes128Gcm]));
    failed_with(&handshake_errors_with(client, server, SERVER).await.0, "HandshakeFailure");
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// Connects with any TLS configuration, and stays connected until `accepting` completes.
async fn connect_until<T>(
    config: ClientConfig,
    accepting: impl Future<Output = T>,
    near: DuplexStream,
) -> T {
    let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let (_client, accepting) = tokio::join!(connector.connect(name, near), accepting);
    accepting
}

/// Our client's configuration, with another key exchange.
fn config(
    authority: &CertificateAuthority,
    groups: &[&'static dyn SupportedKxGroup],
) -> ClientConfig {
    let identity = identity(authority, CLIENT);
    let provider =
        CryptoProvider { kx_groups: groups.to_vec(), ..(*provider(&Cipher::ALL)).clone() };
    let verifier = verify::Verifier {
        authorities: credentials(&identity).authorities().clone(),
        expected: ExpectedPeer::OneOf([id(SERVER)].into()),
    };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config
}

/// The server's error for a client whose configuration `change` has modified.
async fn accept_from(change: impl FnOnce(&mut ClientConfig)) -> HboneError {
    let authority = authority("td");
    let mut config = config(&authority, &[kx_group::X25519MLKEM768]);
    change(&mut config);
    let server = credentials(&identity(&authority, SERVER));
    let (near, far) = duplex(64 << 10);
    connect_until(config, server.server().accept(Box::new(far)), near).await.err().unwrap()
}

#[tokio::test]
async fn rejects_client_without_certificate() {
    let error = accept_from(|config| {
        config.client_auth_cert_resolver = Arc::new(NoCertificate);
    });
    assert!(matches!(error.await, HboneError::NoPeerCertificate));
}

#[tokio::test]
async fn rejects_client_without_h2() {
    let silent = accept_from(|config| config.alpn_protocols.clear());
    failed_with(&silent.await, "protocol");
    let http1 = accept_from(|config| config.alpn_protocols = vec![b"http/1.1".to_vec()]);
    failed_with(&http1.await, "protocol");
}

#[tokio::test]
async fn rejects_plaintext_client() {
    let credentials = credentials(&identity(&authority("td"), SERVER));
    let server = credentials.server();
    let (mut near, far) = duplex(1024);
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(matches!(server.accept(Box::new(far)).await, Err(HboneError::Tls { .. })));
    let (near, far) = duplex(1024);
    drop(near);
    assert!(matches!(server.accept(Box::new(far)).await, Err(HboneError::Tls { .. })));
}

#[tokio::test]
async fn both_sides_agree_on_tls13_aes_gcm_and_a_hybrid_key_exchange() {
    let authority = authority("td");
    let client = credentials(&identity(&authority, CLIENT));
    let server = credentials(&identity(&authority, SERVER));
    let (near, far) = duplex(64 << 10);
    let expected = [id(SERVER)];
    let (client, server) = tokio::join!(
        client.client().handshake(Box::new(near), ADDRESS, &expected),
        server.server().accept(Box::new(far))
    );
    let ((client, server_peer), (_, client_peer)) = (client.unwrap(), server.unwrap());
    assert_eq!(server_peer.identity.spiffe_id().to_string(), SERVER);
    assert_eq!(client_peer.identity.spiffe_id().to_string(), CLIENT);
    let connection = client.negotiated();
    assert_eq!(connection.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let suite = connection.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, CipherSuite::TLS13_AES_128_GCM_SHA256);
    let group = connection.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::X25519MLKEM768);
}

#[tokio::test]
async fn client_sends_no_server_name() {
    let client = credentials(&identity(&authority("td"), CLIENT));
    let (near, far) = duplex(64 << 10);
    let expected = [id(SERVER)];
    let connect = client.client().connect(Box::new(near), ADDRESS, &expected);
    let hello = async {
        let acceptor = tokio_rustls::LazyConfigAcceptor::new(Default::default(), far);
        acceptor.await.unwrap().client_hello().server_name().map(str::to_owned)
    };
    let (_, name) = tokio::join!(connect, hello);
    assert_eq!(name, None);
}

#[tokio::test]
async fn accepts_client_without_hybrid_key_exchange() {
    let authority = authority("td");
    let server = credentials(&identity(&authority, SERVER));
    let groups: [&'static dyn SupportedKxGroup; 2] = [kx_group::X25519, kx_group::SECP256R1];
    for group in groups {
        let (near, far) = duplex(64 << 10);
        let accepted = connect_until(
            config(&authority, &[group]),
            server.server().handshake(Box::new(far)),
            near,
        )
        .await;
        let accepted = accepted.unwrap();
        let negotiated = accepted.negotiated().negotiated_key_exchange_group().unwrap().name();
        assert_eq!(negotiated, group.name());
    }
}

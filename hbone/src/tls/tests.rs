//! Who gets in and who does not. A side that fails the handshake has no tunnel, so no CONNECT can pass.

use std::time::SystemTime;

use rcgen::ExtendedKeyUsagePurpose as Usage;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncWriteExt as _, duplex};

use super::*;
use crate::testing::{CLIENT, HOUR, SECOND, SERVER, authority, id, identity, request};
use crate::{
    Acceptor, CertificateAuthority, ClientSettings, Connector, ExpectedPeer, ServerSettings, Tunnel,
};

/// What became of the client, at the latest at its first request, and of the server.
async fn meet(client: &Identity, server: &Identity, expected: &str) -> (HboneError, HboneError) {
    let connector = Connector::new(client, ClientSettings::default()).unwrap();
    let acceptor = Acceptor::new(server, ServerSettings::default()).unwrap();
    let (near, far) = duplex(64 << 10);
    let expected = [id(expected)];
    let open = async {
        let tunnel: Tunnel = connector.open(near, &expected, SECOND).await?;
        tunnel.connect(request(), SECOND).await
    };
    let (client, server) = tokio::join!(open, acceptor.accept(far, SECOND));
    (client.err().unwrap(), server.err().unwrap())
}

fn issued(
    authority: &CertificateAuthority,
    who: &str,
    not_after: SystemTime,
    usages: &[Usage],
    roots: &str,
) -> Identity {
    let start = SystemTime::now() - 2 * HOUR;
    let issued = authority.issue_for(&id(who), start, not_after, usages).unwrap();
    let (chain, key) = (issued.chain_pem.as_bytes(), issued.key_pem.as_bytes());
    Identity::from_pem_at(chain, key, roots.as_bytes(), start).unwrap()
}

fn with_usage(authority: &CertificateAuthority, who: &str, usage: Usage) -> Identity {
    issued(authority, who, SystemTime::now() + HOUR, &[usage], authority.roots_pem())
}

fn expired(authority: &CertificateAuthority, who: &str) -> Identity {
    let both = [Usage::ServerAuth, Usage::ClientAuth];
    issued(authority, who, SystemTime::now() - HOUR, &both, authority.roots_pem())
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
async fn another_authority_is_refused_by_either_side() {
    let (ours, other) = (authority("td"), authority("td"));
    let (client, server) = meet(&identity(&ours, CLIENT), &identity(&other, SERVER), SERVER).await;
    // The roots have the same name, as in two meshes that are both called cluster.local.
    failed_with(&client, "BadSignature");
    refused_with(&server, "DecryptError");

    // The client trusts both, the server does not.
    let roots = format!("{}{}", ours.roots_pem(), other.roots_pem());
    let both = [Usage::ServerAuth, Usage::ClientAuth];
    let client = issued(&other, CLIENT, SystemTime::now() + HOUR, &both, &roots);
    let (client, server) = meet(&client, &identity(&ours, SERVER), SERVER).await;
    refused_with(&client, "DecryptError");
    failed_with(&server, "BadSignature");

    let other = authority("other");
    let expected = "spiffe://other/ns/default/sa/server";
    let (client, server) =
        meet(&identity(&ours, CLIENT), &identity(&other, expected), expected).await;
    failed_with(&client, "UnknownIssuer");
    refused_with(&server, "UnknownCA");
}

#[tokio::test]
async fn an_expired_certificate_is_refused_by_either_side() {
    let authority = authority("td");
    let (good_client, good_server) = (identity(&authority, CLIENT), identity(&authority, SERVER));
    let (client, server) = meet(&good_client, &expired(&authority, SERVER), SERVER).await;
    assert!(matches!(client, HboneError::PeerCertificateExpired { .. }), "{client:?}");
    refused_with(&server, "CertificateExpired");
    let (client, server) = meet(&expired(&authority, CLIENT), &good_server, SERVER).await;
    refused_with(&client, "CertificateExpired");
    let HboneError::PeerCertificateExpired { expired } = server else { panic!("{server:?}") };
    let ago = SystemTime::now().duration_since(expired).unwrap();
    assert!(ago >= HOUR && ago < HOUR + 60 * SECOND, "{ago:?}");
}

#[tokio::test]
async fn a_server_that_is_somebody_else_never_gets_our_certificate() {
    let authority = authority("td");
    let wanted = "spiffe://td/ns/default/sa/other";
    let (client, server) =
        meet(&identity(&authority, CLIENT), &identity(&authority, SERVER), wanted).await;
    let HboneError::UnexpectedPeer { expected, presented } = client else { panic!("{client:?}") };
    assert_eq!(expected, ExpectedPeer::OneOf([id(wanted)].into()));
    assert_eq!(presented, [SERVER]);
    refused_with(&server, "CertificateUnknown");
}

#[tokio::test]
async fn a_client_of_another_trust_domain_is_refused_though_its_root_is_trusted() {
    let (ours, other) = (authority("td"), authority("other"));
    let roots = format!("{}{}", ours.roots_pem(), other.roots_pem());
    let both = [Usage::ServerAuth, Usage::ClientAuth];
    let in_an_hour = SystemTime::now() + HOUR;
    let stranger = "spiffe://other/ns/default/sa/client";
    let client = issued(&other, stranger, in_an_hour, &both, &roots);
    let server = issued(&ours, SERVER, in_an_hour, &both, &roots);
    let (client, server) = meet(&client, &server, SERVER).await;
    refused_with(&client, "CertificateUnknown");
    let HboneError::UnexpectedPeer { expected, presented } = server else { panic!("{server:?}") };
    assert_eq!(expected, ExpectedPeer::MemberOf("td".parse().unwrap()));
    assert_eq!(presented, [stranger]);
}

#[tokio::test]
async fn a_certificate_for_the_other_role_is_refused() {
    let authority = authority("td");
    let client_only = with_usage(&authority, SERVER, Usage::ClientAuth);
    let (client, server) = meet(&identity(&authority, CLIENT), &client_only, SERVER).await;
    failed_with(&client, "server authentication");
    refused_with(&server, "UnsupportedCertificate");
    let server_only = with_usage(&authority, CLIENT, Usage::ServerAuth);
    let (client, server) = meet(&server_only, &identity(&authority, SERVER), SERVER).await;
    refused_with(&client, "UnsupportedCertificate");
    failed_with(&server, "client authentication");
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

/// The server's error when a client with such a configuration comes.
async fn accept_from(change: impl Fn(&mut ClientConfig)) -> HboneError {
    let authority = authority("td");
    let mut client = ClientTls::new(&identity(&authority, CLIENT)).unwrap();
    change(&mut client.config);
    let server = ServerTls::new(&identity(&authority, SERVER)).unwrap();
    let (near, far) = duplex(64 << 10);
    let expected = [id(SERVER)];
    let (_client, server) = tokio::join!(client.connect(near, &expected), server.accept(far));
    server.err().unwrap()
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let error = accept_from(|config| {
        config.client_auth_cert_resolver = Arc::new(NoCertificate);
    });
    assert!(matches!(error.await, HboneError::NoPeerCertificate));
}

#[tokio::test]
async fn a_client_that_does_not_speak_h2_is_refused() {
    let silent = accept_from(|config| config.alpn_protocols.clear());
    failed_with(&silent.await, "protocol");
    let http1 = accept_from(|config| config.alpn_protocols = vec![b"http/1.1".to_vec()]);
    failed_with(&http1.await, "protocol");
}

#[tokio::test]
async fn what_is_not_tls_is_refused() {
    let server = ServerTls::new(&identity(&authority("td"), SERVER)).unwrap();
    let (mut near, far) = duplex(1024);
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(matches!(server.accept(far).await, Err(HboneError::Tls { .. })));
    let (near, far) = duplex(1024);
    drop(near);
    assert!(matches!(server.accept(far).await, Err(HboneError::Tls { .. })));
}

#[tokio::test]
async fn both_sides_agree_on_tls13_aes_gcm_and_a_hybrid_key_exchange() {
    let authority = authority("td");
    let client = ClientTls::new(&identity(&authority, CLIENT)).unwrap();
    let server = ServerTls::new(&identity(&authority, SERVER)).unwrap();
    let (near, far) = duplex(64 << 10);
    let expected = [id(SERVER)];
    let (client, server) = tokio::join!(client.connect(near, &expected), server.accept(far));
    let ((client, is_server), (server, is_client)) = (client.unwrap(), server.unwrap());
    assert_eq!(is_server.spiffe_id().to_string(), SERVER);
    assert_eq!(is_client.spiffe_id().to_string(), CLIENT);
    let connection = server.get_ref().1;
    assert_eq!(connection.server_name(), None, "no SNI");
    assert_eq!(connection.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let suite = connection.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_256_GCM_SHA384);
    let group = client.get_ref().1.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
}

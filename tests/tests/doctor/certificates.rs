//! Broken certificates, on either side.

use std::fs;

use underpass_config::IdentityFiles;
use underpass_tests::{CLIENT, Mesh, Pki, SERVER, Scene, Settings, Suite};

use crate::{doctor, other_authority, without_dns};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("an expired certificate is named", expired_certificate_is_named);
    suite.test("a foreign key and foreign roots are named together", mismatched_files_are_named);
    suite.test("a peer with another authority is named", peer_of_other_authority_is_named);
    suite.test("a peer that does not trust our authority is named", distrusting_peer_is_named);
    suite.test("a peer with another identity is named", other_identity_is_named);
    suite.test("a peer of a trust domain without roots is named", untrusted_domain_is_named);
}

/// The settings of the client's proxy with other files.
fn client_with(scene: &Scene, files: &IdentityFiles) -> Settings {
    let settings = Settings::new(CLIENT).identity(files).mesh(&scene.mesh);
    without_dns(&scene.client, settings)
}

async fn expired_certificate_is_named() {
    let scene = Scene::new().await;
    let expired = scene.pki.issue_expired(CLIENT);
    let findings = doctor(&scene.client, &client_with(&scene, &expired)).await;
    findings.assert("certificate", "failure", "the certificate expired at");
    findings.assert("certificate", "failure", "issue a new certificate");
    assert!(findings.find("peers-connect").is_none(), "without a certificate: {findings:?}");
}

async fn mismatched_files_are_named() {
    let scene = Scene::new().await;
    let other = other_authority(&scene).issue(CLIENT);
    let files = IdentityFiles {
        certificate: scene.client_files.certificate.clone(),
        key: other.key.clone(),
        roots: other.roots.clone(),
    };
    let findings = doctor(&scene.client, &client_with(&scene, &files)).await;
    for part in ["the key does not belong to the certificate", "the roots do not verify"] {
        findings.assert("certificate", "failure", part);
    }
}

async fn peer_of_other_authority_is_named() {
    let scene = Scene::new().await;
    let files = other_authority(&scene).issue(SERVER);
    let settings = Settings::new(SERVER).identity(&files).mesh(&scene.mesh);
    let _server = scene.server.proxy(&settings).await;
    let findings = doctor(&scene.client, &client_with(&scene, &scene.client_files)).await;
    assert_eq!(findings.failures(), ["peers-connect"], "{findings:?}");
    findings.assert("peers-connect", "failure", ": tls: ");
    findings.assert("peers-connect", "failure", "compare our roots of the peer's trust domain");
}

async fn distrusting_peer_is_named() {
    let scene = Scene::new().await;
    let other = other_authority(&scene);
    let files = other.issue(CLIENT);
    // Only the client trusts both authorities.
    other.trust(&scene.pki);
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let findings = doctor(&scene.client, &client_with(&scene, &files)).await;
    assert_eq!(findings.failures(), ["peers-connect"], "{findings:?}");
    findings.assert("peers-connect", "failure", ": certificate_refused: ");
    findings.assert("peers-connect", "failure", "compare the peer's roots");
}

async fn other_identity_is_named() {
    let scene = Scene::new().await;
    let files = scene.pki.issue("other");
    let settings = Settings::new(SERVER).identity(&files).mesh(&scene.mesh);
    let _server = scene.server.proxy(&settings).await;
    let findings = doctor(&scene.client, &client_with(&scene, &scene.client_files)).await;
    findings.assert("peers-connect", "failure", ": identity: ");
    findings.assert("peers-connect", "failure", "ns/default/sa/other");
}

async fn untrusted_domain_is_named() {
    let scene = Scene::new().await;
    let folder = scene.world.folder().join("elsewhere");
    fs::create_dir_all(&folder).expect("a folder");
    let elsewhere = Pki::of(&folder, "elsewhere.test", "roots");
    elsewhere.trust(&scene.pki);
    let files = elsewhere.issue(SERVER);
    scene.set_mesh(&Mesh::default().hbone(&scene.client).foreign(&scene.server, "elsewhere.test"));
    let settings = Settings::new(SERVER).identity(&files).mesh(&scene.mesh);
    let settings = settings.set("workload.trustDomain=elsewhere.test");
    let _server = scene.server.proxy(&settings).await;
    let findings = doctor(&scene.client, &client_with(&scene, &scene.client_files)).await;
    findings.assert("peers-connect", "failure", ": untrusted_domain: ");
    findings.assert("peers-connect", "failure", "trust.bundles");
}

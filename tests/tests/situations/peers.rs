//! Peers with which a handshake fails: their certificate, their identity, or their program.

use std::fs;
use std::sync::Arc;

use tokio::io::AsyncWriteExt as _;
use underpass_config::IdentityFiles;
use underpass_tests::{CLIENT, HBONE, Mesh, Pki, SERVER, Scene, Server, Settings, TlsServer};

use crate::situation::{Doctor, ERRORS, Log, Metric, Situation, Status};
use crate::stage::{Broken, client_only, client_settings, connect, quick, server_settings};

pub(crate) const SITUATIONS: &[Situation] = &[
    Situation {
        name: "a peer with an expired certificate is named",
        make: || Box::pin(scripted(|pki| pki.issue_expired(SERVER))),
        status: Status::Failure("expired", "check that the peer's certificate is renewed"),
        doctor: Doctor("peers-connect", "failure", ": expired: "),
        log: Log::Line(&["reason=\"expired\"", "expired at", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "expired")]),
    },
    Situation {
        name: "a wrong clock is named by a peer's certificate that is not valid yet",
        make: || Box::pin(scripted(|pki| pki.issue_future(SERVER))),
        status: Status::Failure("not_yet_valid", "check the clocks"),
        doctor: Doctor("peers-connect", "failure", ": not_yet_valid: "),
        log: Log::Line(&["reason=\"not_yet_valid\"", "valid only from", "check the clocks"]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "not_yet_valid")]),
    },
    Situation {
        name: "a peer with another authority is named",
        make: || Box::pin(wrong_authority()),
        status: Status::Failure("tls", "compare our roots of the peer's trust domain"),
        doctor: Doctor("peers-connect", "failure", ": tls: "),
        log: Log::Line(&["reason=\"tls\"", "BadSignature", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "tls")]),
    },
    Situation {
        name: "a peer that does not trust our authority is named",
        make: || Box::pin(distrusting()),
        status: Status::Failure("certificate_refused", "compare the peer's roots"),
        doctor: Doctor("peers-connect", "failure", ": certificate_refused: "),
        log: Log::Line(&["reason=\"certificate_refused\"", "hint="]),
        metric: Metric::Rises(
            ERRORS,
            &[("direction", "outbound"), ("reason", "certificate_refused")],
        ),
    },
    Situation {
        name: "a peer of a trust domain without roots is named",
        make: || Box::pin(untrusted_domain()),
        status: Status::Failure("untrusted_domain", "trust.bundles"),
        doctor: Doctor("peers-connect", "failure", ": untrusted_domain: "),
        log: Log::Line(&["reason=\"untrusted_domain\"", "elsewhere.test", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "untrusted_domain")]),
    },
    Situation {
        name: "a peer with another identity is named",
        make: || Box::pin(wrong_identity()),
        status: Status::Failure("identity", "check serviceAccount and trustDomain"),
        doctor: Doctor("peers-connect", "failure", ": identity: "),
        log: Log::Line(&["reason=\"identity\"", "ns/default/sa/other", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "identity")]),
    },
    Situation {
        name: "a peer whose certificate is revoked is named",
        make: || Box::pin(revoked()),
        status: Status::Failure("revoked", "issue a new certificate for the peer"),
        doctor: Doctor("peers-connect", "failure", ": revoked: "),
        log: Log::Line(&["reason=\"revoked\"", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "revoked")]),
    },
    Situation {
        name: "another program on the peer's port 15008 is named",
        make: || Box::pin(other_program()),
        status: Status::Failure("tls", "check whether another program listens there"),
        doctor: Doctor("peers-connect", "failure", "check whether another program listens there"),
        log: Log::Line(&["reason=\"tls\"", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "tls")]),
    },
    Situation {
        name: "a peer that hangs is named",
        make: || Box::pin(hanging()),
        status: Status::Failure("handshake_timeout", "check whether the peer is overloaded"),
        doctor: Doctor("peers-connect", "failure", ": handshake_timeout: "),
        log: Log::Line(&["reason=\"handshake_timeout\"", "hint="]),
        metric: Metric::Rises(
            ERRORS,
            &[("direction", "outbound"), ("reason", "handshake_timeout")],
        ),
    },
];

/// A peer without a proxy of ours, with this certificate.
async fn scripted(issue: fn(&Pki) -> IdentityFiles) -> Broken {
    let (scene, proxy) = client_only().await;
    let tls = Arc::new(TlsServer::new(&issue(&scene.pki)));
    let peer = Server::start(&scene.server, HBONE, move |stream, _| {
        let tls = tls.clone();
        async move { tls.receive(stream).await.map(drop) }
    });
    connect(&scene).await;
    Broken::client(scene, proxy).keep(peer)
}

/// A peer whose proxy has these files and settings.
async fn with_peer(scene: Scene, peer: Settings) -> Broken {
    let server = scene.server.proxy(&quick(&scene.server, peer)).await;
    let client = scene.client.proxy(&client_settings(&scene)).await;
    connect(&scene).await;
    Broken::client(scene, client).keep(server)
}

/// Another authority of the same trust domain.
fn other_authority(scene: &Scene) -> Pki {
    let folder = scene.world.folder().join("other");
    fs::create_dir_all(&folder).expect("a folder");
    Pki::new(&folder)
}

async fn wrong_authority() -> Broken {
    let scene = Scene::new().await;
    let files = other_authority(&scene).issue(SERVER);
    let settings = Settings::new(SERVER).identity(&files).mesh(&scene.mesh);
    with_peer(scene, settings).await
}

async fn distrusting() -> Broken {
    let scene = Scene::new().await;
    let other = other_authority(&scene);
    let files = other.issue(CLIENT);
    // Only the client trusts both authorities.
    other.trust(&scene.pki);
    let server = scene.server.proxy(&server_settings(&scene)).await;
    let settings = Settings::new(CLIENT).identity(&files).mesh(&scene.mesh);
    let client = scene.client.proxy(&quick(&scene.client, settings)).await;
    connect(&scene).await;
    Broken::client(scene, client).keep(server)
}

async fn untrusted_domain() -> Broken {
    let scene = Scene::new().await;
    let folder = scene.world.folder().join("elsewhere");
    fs::create_dir_all(&folder).expect("a folder");
    let elsewhere = Pki::of(&folder, "elsewhere.test", "roots");
    elsewhere.trust(&scene.pki);
    let files = elsewhere.issue(SERVER);
    scene.set_mesh(&Mesh::default().hbone(&scene.client).foreign(&scene.server, "elsewhere.test"));
    let settings = Settings::new(SERVER).identity(&files).mesh(&scene.mesh);
    with_peer(scene, settings.set("workload.trustDomain=elsewhere.test")).await
}

async fn wrong_identity() -> Broken {
    let scene = Scene::new().await;
    let files = scene.pki.issue("other");
    let settings = Settings::new(SERVER).identity(&files).mesh(&scene.mesh);
    with_peer(scene, settings).await
}

async fn revoked() -> Broken {
    let scene = Scene::new().await;
    let list = scene.pki.revoke(&[&scene.server_files]);
    let settings = client_settings(&scene).section(&format!("trust: {{crls: [{list:?}]}}"));
    let server = scene.server.proxy(&server_settings(&scene)).await;
    let client = scene.client.proxy(&settings).await;
    connect(&scene).await;
    Broken::client(scene, client).keep(server)
}

async fn other_program() -> Broken {
    let (scene, proxy) = client_only().await;
    let peer = Server::start(&scene.server, HBONE, async |mut stream, _| {
        stream.write_all(b"SSH-2.0-OpenSSH\r\n").await
    });
    connect(&scene).await;
    Broken::client(scene, proxy).keep(peer)
}

async fn hanging() -> Broken {
    let (scene, proxy) = client_only().await;
    // The kernel accepts the connections.
    let peer = scene.server.listen(HBONE);
    connect(&scene).await;
    Broken::client(scene, proxy).keep(peer)
}

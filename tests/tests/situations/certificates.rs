//! The certificate of the proxy itself: it expires, cannot be renewed, or is not issued.

use std::fs;
use std::path::Path;
use std::time::Duration;

use underpass_tests::{CLIENT, Family, Pki, Scene, Settings, binary, until};

use crate::situation::{CERTIFICATE_FAILURES, Doctor, Log, Metric, Situation, Status};
use crate::stage::{Broken, client_only, client_settings, quick};

/// The message about a certificate that cannot be renewed.
const NOT_RENEWED: &str = "cannot get a certificate or the trust bundle";
/// The port of the CA.
const CA: u16 = 15012;

pub(crate) const SITUATIONS: &[Situation] = &[
    Situation {
        name: "a certificate that expires is named",
        make: || Box::pin(expired()),
        status: Status::Problem("certificate", "has expired"),
        doctor: Doctor("certificate", "failure", "the certificate expired at"),
        log: Log::Line(&["ERROR", "the certificate has expired", "hint="]),
        metric: Metric::Passed("underpass_certificate_expiry_timestamp_seconds"),
    },
    Situation {
        name: "a wrong clock is named by a new certificate that is not valid yet",
        make: || Box::pin(renewed_by(|scene| drop(scene.pki.issue_future(CLIENT)))),
        status: Status::Problem("certificate", "is not valid before"),
        doctor: Doctor("clock", "failure", "our certificate begins to be valid only in"),
        log: Log::Line(&["ERROR", NOT_RENEWED, "is not valid before", "check the clocks"]),
        metric: Metric::Rises(CERTIFICATE_FAILURES, &[]),
    },
    Situation {
        name: "a new key that does not belong to the certificate is named",
        make: || Box::pin(renewed_by(with_other_key)),
        status: Status::Problem("certificate", "the key does not belong to the certificate"),
        doctor: Doctor("certificate", "failure", "the key does not belong to the certificate"),
        log: Log::Line(&["ERROR", NOT_RENEWED, "the key does not belong", "hint="]),
        metric: Metric::Rises(CERTIFICATE_FAILURES, &[]),
    },
    Situation {
        name: "new roots that do not verify the certificate are named",
        make: || Box::pin(renewed_by(with_other_roots)),
        status: Status::Problem("certificate", "the roots do not verify the certificate"),
        doctor: Doctor("certificate", "failure", "the roots do not verify the certificate"),
        log: Log::Line(&["ERROR", NOT_RENEWED, "the roots do not verify", "hint="]),
        metric: Metric::Rises(CERTIFICATE_FAILURES, &[]),
    },
    Situation {
        name: "a CA that refuses the token is named",
        make: || Box::pin(refusing_authority()),
        status: Status::Problem("certificate", "identity.istio_ca.token"),
        doctor: Doctor("certificate", "failure", "identity.istio_ca.token"),
        log: Log::Line(&["ERROR", NOT_RENEWED, "identity.istio_ca.token"]),
        metric: Metric::Rises(CERTIFICATE_FAILURES, &[]),
    },
    Situation {
        name: "a CA that does not run is named",
        make: || Box::pin(absent_authority()),
        status: Status::Problem("certificate", "check that the CA runs"),
        doctor: Doctor("certificate", "failure", "check that the CA runs"),
        log: Log::Line(&["ERROR", NOT_RENEWED, "check that the CA runs"]),
        metric: Metric::Rises(CERTIFICATE_FAILURES, &[]),
    },
    Situation {
        name: "a SPIRE agent that does not run is named",
        make: || Box::pin(absent_agent()),
        status: Status::Problem("certificate", "check that the SPIRE agent runs"),
        doctor: Doctor("certificate", "failure", "check that the SPIRE agent runs"),
        log: Log::Line(&["ERROR", NOT_RENEWED, "check that the SPIRE agent runs"]),
        metric: Metric::Rises(CERTIFICATE_FAILURES, &[]),
    },
];

async fn expired() -> Broken {
    let scene = Scene::new().await;
    // Longer than a start on a busy machine.
    let _files = scene.pki.issue_expiring(CLIENT, Duration::from_secs(4));
    let proxy = scene.client.proxy(&client_settings(&scene)).await;
    Broken::client(scene, proxy)
}

/// The files of the running proxy are replaced.
async fn renewed_by(replace: fn(&Scene)) -> Broken {
    let (scene, proxy) = client_only().await;
    replace(&scene);
    Broken::client(scene, proxy)
}

fn replace_file(file: &Path, from: &Path) {
    let new = file.with_extension("new");
    fs::copy(from, &new).expect("copied");
    fs::rename(&new, file).expect("replaced");
}

fn with_other_key(scene: &Scene) {
    replace_file(&scene.client_files.key, &scene.server_files.key);
}

fn with_other_roots(scene: &Scene) {
    let folder = scene.world.folder().join("other");
    fs::create_dir_all(&folder).expect("a folder");
    replace_file(&scene.client_files.roots, Pki::new(&folder).roots());
}

/// Settings with a CA in the server's pod, and this token.
fn with_authority(scene: &Scene) -> Settings {
    let token = scene.world.folder().join("token");
    fs::write(&token, "unknown-secret").expect("a file");
    let (address, roots) = (scene.server.at(Family::V4, CA), scene.pki.dir().join("roots.pem"));
    let ca = format!(
        "identity: {{istio_ca: {{address: \"https://{address}\", server_name: ca.test, roots: {roots:?}, token: {token:?}}}}}"
    );
    quick(&scene.client, Settings::new(CLIENT).section(&ca).mesh(&scene.mesh))
}

async fn refusing_authority() -> Broken {
    let scene = Scene::new().await;
    let clients = scene.world.folder().join("clients.yaml");
    let client = "clients:\n- token: another-secret\n  identities: [\"spiffe://cluster.local/ns/default/sa/*\"]\n";
    fs::write(&clients, client).expect("a file");
    let address = scene.server.at(Family::V4, CA);
    let (listen, text) = (address.to_string(), |path: &Path| path.display().to_string());
    let (dir, clients) = (text(scene.pki.dir()), text(&clients));
    let arguments = [
        "ca",
        "serve",
        "--dir",
        &dir,
        "--listen",
        &listen,
        "--clients",
        &clients,
        "--name",
        "ca.test",
    ];
    let authority = scene.server.background(binary(), &arguments);
    until("the CA listens", async || scene.client.dial(address).await.is_ok()).await;
    let settings = with_authority(&scene);
    Broken::waiting(scene, settings).keep(authority)
}

async fn absent_authority() -> Broken {
    let scene = Scene::new().await;
    let settings = with_authority(&scene);
    Broken::waiting(scene, settings)
}

async fn absent_agent() -> Broken {
    let scene = Scene::new().await;
    let socket = scene.world.folder().join("no-agent.sock");
    let spire = format!("identity: {{spire: {{socket: {socket:?}}}}}");
    let settings = Settings::new(CLIENT).section(&spire).mesh(&scene.mesh);
    let settings = quick(&scene.client, settings);
    Broken::waiting(scene, settings)
}

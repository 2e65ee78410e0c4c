//! Starts that fail. There is no process whose status or metrics could be asked: the error of the
//! start and the doctor name the situation.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use underpass_config::IdentityFiles;
use underpass_tests::{CLIENT, HBONE, Scene, Settings, binary, tool};

use crate::situation::{Doctor, Log, Metric, NOT_STARTED, Situation, Status};
use crate::stage::{Broken, client_settings, quick};

const STATUS: Status = Status::NoProxy("start the proxy");
const METRIC: Metric = Metric::Absent(NOT_STARTED);

pub(crate) const SITUATIONS: &[Situation] = &[
    Situation {
        name: "a port in use is named at the start",
        make: || Box::pin(port_in_use()),
        status: STATUS,
        doctor: Doctor("ports-free", "failure", "[::]:15008 (proxy.hbone_port)"),
        log: Log::StartError(&["15008", "hint: stop the other process", "proxy.hbone_port"]),
        metric: METRIC,
    },
    Situation {
        name: "a missing NET_ADMIN is named at the start",
        make: || Box::pin(without_net_admin()),
        status: STATUS,
        doctor: Doctor("capabilities-start", "failure", "NET_ADMIN"),
        log: Log::StartError(&["NET_ADMIN is missing", "hint: ", "--cap-add NET_ADMIN"]),
        metric: METRIC,
    },
    Situation {
        name: "an expired certificate is named at the start",
        make: || Box::pin(with_files(|scene| scene.pki.issue_expired(CLIENT))),
        status: STATUS,
        doctor: Doctor("certificate", "failure", "the certificate expired at"),
        log: Log::StartError(&["the certificate expired at", "hint: issue a new certificate"]),
        metric: METRIC,
    },
    Situation {
        name: "a certificate that is not valid yet is named at the start",
        make: || Box::pin(with_files(|scene| scene.pki.issue_future(CLIENT))),
        status: STATUS,
        doctor: Doctor("clock", "failure", "our certificate begins to be valid only in"),
        log: Log::StartError(&["is not valid before", "hint: check the clocks"]),
        metric: METRIC,
    },
    Situation {
        name: "a key that does not belong to the certificate is named at the start",
        make: || Box::pin(with_files(other_key)),
        status: STATUS,
        doctor: Doctor("certificate", "failure", "the key does not belong to the certificate"),
        log: Log::StartError(&["the key does not belong", "hint: use the key"]),
        metric: METRIC,
    },
    Situation {
        name: "a mesh file with mistakes is named at the start",
        make: || Box::pin(broken_mesh()),
        status: STATUS,
        doctor: Doctor("configuration", "failure", "workloads[0].workloadIps[0]"),
        log: Log::StartError(&["error: ", "workloads[0].workloadIps[0]"]),
        metric: METRIC,
    },
    Situation {
        name: "a read-only folder of a socket is named at the start",
        make: || Box::pin(unwritable("ro")),
        status: STATUS,
        doctor: Doctor("disk-space", "failure", "is read-only"),
        log: Log::StartError(&["cannot listen at", "Read-only file system", "hint: "]),
        metric: METRIC,
    },
    Situation {
        name: "a full file system of a socket is named at the start",
        make: || Box::pin(unwritable("size=64k,nr_inodes=2")),
        status: STATUS,
        doctor: Doctor("disk-space", "failure", "a file system is full"),
        log: Log::StartError(&["cannot listen at", "No space left on device", "hint: "]),
        metric: METRIC,
    },
];

async fn port_in_use() -> Broken {
    let scene = Scene::new().await;
    let taken = scene.client.listen(HBONE);
    let settings = client_settings(&scene);
    Broken::not_started(scene, settings).await.keep(taken)
}

async fn without_net_admin() -> Broken {
    let scene = Scene::new().await;
    // Check that the program exists, because a failure of `exec` would be less clear.
    tool(&scene.client, "setpriv", &["--version"]).await.ok();
    let drop = "exec setpriv --bounding-set -net_admin --inh-caps -net_admin";
    let settings = client_settings(&scene);
    let script = format!("{drop} \"$UNDERPASS\" \"$@\"");
    let started = scene.client.try_proxy_through(&script, &settings).await;
    let program = scene.world.folder().join("without-net-admin");
    write_script(&program, &format!("{drop} {:?} \"$@\"", binary()));
    let mut broken = Broken::failed(scene, started, settings);
    broken.program = Some(program);
    broken
}

/// Writes an executable script, by another process: a child that this process starts meanwhile
/// would inherit the open file, and the kernel would refuse to execute it (ETXTBSY).
fn write_script(file: &Path, command: &str) {
    let text = file.with_extension("text");
    fs::write(&text, format!("#!/bin/sh\n{command}\n")).expect("written");
    fs::set_permissions(&text, fs::Permissions::from_mode(0o755)).expect("executable");
    let copied = std::process::Command::new("cp").arg(&text).arg(file).status();
    assert!(copied.expect("cp runs").success());
}

/// The client's proxy with these certificate files.
async fn with_files(files: fn(&Scene) -> IdentityFiles) -> Broken {
    let scene = Scene::new().await;
    let settings = Settings::new(CLIENT).identity(&files(&scene)).mesh(&scene.mesh);
    let settings = quick(&scene.client, settings);
    Broken::not_started(scene, settings).await
}

fn other_key(scene: &Scene) -> IdentityFiles {
    let key = scene.server_files.key.clone();
    IdentityFiles { key, ..scene.client_files.clone() }
}

async fn broken_mesh() -> Broken {
    let scene = Scene::new().await;
    fs::write(&scene.mesh, "workloads: [{name: a, workloadIps: [nowhere]}]\n").expect("written");
    let settings = client_settings(&scene);
    Broken::not_started(scene, settings).await
}

/// The folder of the admin socket is a full or read-only file system.
async fn unwritable(options: &str) -> Broken {
    let scene = Scene::new().await;
    let folder = scene.world.folder().join("sockets");
    fs::create_dir(&folder).expect("a folder");
    let at = folder.display().to_string();
    tool(&scene.client, "mount", &["-t", "tmpfs", "-o", options, "tmpfs", &at]).await.ok();
    // Fails at the end of the space.
    fs::write(folder.join("fill"), vec![0; 128 << 10]).ok();
    let socket = format!("admin.socket={}", folder.join("admin.sock").display());
    let settings = client_settings(&scene).set(&socket);
    Broken::not_started(scene, settings).await
}

//! Tests of failing take-overs: the old process continues unaffected.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use underpass::spawn::SpawnError;
use underpass_interception::{BoundListener, Handover};
use underpass_tests::{APP, Family, Proxy, Scene, Server, Settings, Suite, tool, until, within};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test(
        "a take-over with different settings is refused, and the error names the difference",
        different_settings,
    );
    suite.test(
        "a take-over by a process that fails to start does not disturb the old process",
        does_not_start,
    );
    suite.test("a take-over that is aborted half-way fails no connection", aborted_half_way);
    suite.test("the old process restores rules that a failed take-over changed", rules_restored);
    suite.test("invalid messages on the take-over socket have no effect", invalid_messages);
    suite.test("the error of a second process suggests --take-over", second_process);
    suite.test_with_users("a take-over by a process of another user is refused", another_user);
}

/// A client's proxy with a known socket, and a server with an echo.
struct Running {
    scene: Scene,
    proxy: Proxy,
    socket: PathBuf,
    _server: Proxy,
    _echo: Server,
}

impl Running {
    async fn new() -> Self {
        let scene = Scene::new().await;
        let socket = scene.client.folder().join("take-over.sock");
        let settings = with_socket(&scene, &socket);
        let proxy = scene.client.proxy(&settings).await;
        let server = scene.server.proxy(&scene.server_settings()).await;
        let echo = Server::echo(&scene.server, APP);
        Self { scene, proxy, socket, _server: server, _echo: echo }
    }

    fn settings(&self) -> Settings {
        with_socket(&self.scene, &self.socket).take_over()
    }

    /// The exit code and output of a process that must fail to take over.
    async fn fails(&self, settings: &Settings) -> (Option<i32>, String) {
        match self.scene.client.try_proxy(settings).await {
            Err(SpawnError::Ended { status, log }) => (status.code(), log),
            other => unreachable!("the process did not exit: {other:?}"),
        }
    }

    /// Asserts that the old process serves and can be taken over.
    async fn assert_continues(&mut self) {
        self.scene.echoed().await;
        let new = self.scene.client.proxy(&self.settings()).await;
        self.proxy.line(&["another process has taken over"]).await;
        assert!(self.proxy.ended().await.success(), "{}", self.proxy.log());
        self.proxy = new;
        self.scene.echoed().await;
    }

    /// Connects to the running process without the product's client.
    async fn connect(&self) -> Handover {
        Handover::new(UnixStream::connect(&self.socket).await.expect("connected"))
    }

    /// Connects, and performs the protocol until the listeners are passed.
    async fn receive_listeners(&self) -> (Handover, Vec<BoundListener>) {
        let first = self.connect().await;
        first.send("who are you?", &[]).await.expect("sent");
        let (refusal, _) = first.receive().await.expect("received").expect("an answer");
        let role = refusal.split('"').nth(1).expect("the role");
        let conversation = self.connect().await;
        conversation.send(role, &[]).await.expect("sent");
        let (names, sockets) = conversation.receive().await.expect("received").expect("an answer");
        let names = names.strip_prefix("listeners ").expect("listeners").split(' ');
        let listeners = names
            .zip(sockets)
            .filter(|(name, _)| !["take-over", "instance", "alive"].contains(name))
            .filter(|(name, _)| !name.starts_with("admin:"))
            .map(|(_, socket)| BoundListener::try_from(socket).expect("a listener"));
        (conversation, listeners.collect())
    }
}

fn with_socket(scene: &Scene, socket: &std::path::Path) -> Settings {
    scene.client_settings().set(&format!("take_over.socket={}", socket.display()))
}

async fn ask(conversation: &Handover, what: &str) {
    conversation.send(what, &[]).await.expect("sent");
    let answer = within("an answer", conversation.receive()).await.expect("received");
    assert_eq!(answer.expect("an answer").0, "ok");
}

async fn different_settings() {
    let mut running = Running::new().await;
    for (setting, expected) in [
        ("proxy.outbound_port=15011", "ports 15011 15006 15008"),
        ("interception.profile=none", "profile none"),
    ] {
        let (code, log) = running.fails(&running.settings().set(setting)).await;
        assert_eq!(code, Some(1), "{log}");
        for part in ["refused the take-over", "ports 15001 15006 15008", expected] {
            assert!(log.contains(part), "{part} is missing:\n{log}");
        }
        running
            .proxy
            .line(&[
                "take-over by another process failed",
                "the other process has a different role",
            ])
            .await;
    }
    running.assert_continues().await;
}

async fn does_not_start() {
    let mut running = Running::new().await;
    let settings = [
        "identity.certificate=/nowhere.pem",
        // The failure is detected after the rules were replaced: there is no CA at this address.
        "identity={istio_ca: {address: \"https://127.0.0.1:1\", roots: /nowhere.pem, token: /nowhere}}",
    ];
    for setting in settings {
        let rules = running.scene.client.traces().await;
        let (code, log) = running.fails(&running.settings().set(setting)).await;
        assert_ne!(code, Some(0), "{log}");
        running.scene.echoed().await;
        assert_eq!(running.scene.client.traces().await, rules);
    }
    running.assert_continues().await;
}

async fn aborted_half_way() {
    let mut running = Running::new().await;
    for messages in [&["rules"][..], &["rules", "accept"]] {
        let (conversation, listeners) = running.receive_listeners().await;
        for what in messages {
            ask(&conversation, what).await;
        }
        let failed = ["take-over by another process failed", "the connection was closed before"];
        let before = running.proxy.count(&failed);
        let echo = tokio::join!(running.scene.echoed(), async {
            // The old process accepts again once the connection is closed.
            if messages.contains(&"accept") {
                let to = running.scene.app(Family::V4);
                within("a connection waits", running.scene.client.dial(to)).await.expect("queued");
            }
            drop((conversation, listeners));
        });
        let ((), ()) = echo;
        running.proxy.more_than(before, &failed).await;
    }
    running.assert_continues().await;
}

async fn rules_restored() {
    for repair in [true, false] {
        let mut running = Running::new().await;
        if !repair {
            let settings = running.settings().set("interception.repair=false");
            running.proxy = running.scene.client.proxy(&settings).await;
        }
        let rules = running.scene.client.traces().await;
        let (conversation, _listeners) = running.receive_listeners().await;
        ask(&conversation, "rules").await;
        tool(&running.scene.client, "nft", &["flush", "ruleset"]).await.ok();
        drop(conversation);
        until("the rules are back", async || running.scene.client.traces().await == rules).await;
        running.scene.echoed().await;
    }
}

async fn invalid_messages() {
    let mut running = Running::new().await;
    let mut raw = UnixStream::connect(&running.socket).await.expect("connected");
    raw.write_all(&[0xff; 10_000]).await.ok();
    drop(UnixStream::connect(&running.socket).await.expect("connected"));
    let (conversation, _listeners) = running.receive_listeners().await;
    // A message out of order.
    conversation.send("ready", &[]).await.expect("sent");
    running.proxy.line(&["take-over by another process failed", "instead of"]).await;
    drop(raw);
    running.assert_continues().await;
}

async fn second_process() {
    let running = Running::new().await;
    let settings = with_socket(&running.scene, &running.socket);
    let (code, log) = running.fails(&settings).await;
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("--take-over"), "{log}");
    running.scene.echoed().await;
}

async fn another_user() {
    let mut running = Running::new().await;
    // Authorization depends on the peer's user, not only on the file's mode.
    fs::set_permissions(&running.socket, fs::Permissions::from_mode(0o666)).expect("a file");
    let folder = running.socket.parent().expect("a folder");
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("a folder");
    let settings = running.settings();
    let script = "exec setpriv --reuid 4711 --regid 4711 --clear-groups \"$UNDERPASS\" \"$@\"";
    match running.scene.client.try_proxy_through(script, &settings).await {
        Err(SpawnError::Ended { status, log }) => {
            assert_eq!(status.code(), Some(1), "{log}");
            assert!(log.contains("only root and the proxy's user may take over"), "{log}");
        }
        other => unreachable!("the process did not exit: {other:?}"),
    }
    running
        .proxy
        .line(&["take-over by another process failed", "the other process runs as user 4711"])
        .await;
    running.assert_continues().await;
}

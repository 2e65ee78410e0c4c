//! Kills or stops one of the processes during a hot restart.

use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use underpass::spawn::SpawnError;
use underpass_interception::Handover;
use underpass_tests::{APP, Proxy, Server, Settings};

use crate::scene::{Mode, Scene, child};

/// The process that is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    Old,
    ProxyOfOld,
    New,
    ProxyOfNew,
}

/// Passes requests and answers between both processes, and kills one after `requests` requests.
struct Relay {
    listener: UnixListener,
    to: PathBuf,
    requests: usize,
    old: u32,
    victim: Victim,
}

impl Relay {
    /// Listens for the new process. Also returns the settings with which the new process connects
    /// to this relay.
    fn new(
        scene: &Scene,
        old: &Proxy,
        mode: Mode,
        requests: usize,
        victim: Victim,
    ) -> (Self, Settings) {
        let socket = scene.world.folder().join(format!("relay-{requests}.sock"));
        let listener = UnixListener::bind(&socket).expect("listens");
        let settings = scene.settings(mode).set(&format!("take_over.socket={}", socket.display()));
        let (old, to) = (old.pid(), scene.socket());
        (Self { listener, to, requests, old, victim }, settings.take_over())
    }

    /// Returns whether it killed the process: the exchange can have fewer requests.
    async fn run(self) -> bool {
        let (new, old) = self.connect().await;
        for request in 0.. {
            if request == self.requests {
                self.kill(pid(&new));
            }
            for (from, to) in [(&new, &old), (&old, &new)] {
                if pass(from, to).await.is_none() {
                    return request >= self.requests;
                }
            }
        }
        unreachable!("requests have a last one")
    }

    /// Stops the new process before the last answer. Returns whether it waited for that answer.
    async fn stop_before_last_answer(self) -> bool {
        let (new, old) = self.connect().await;
        while pass(&new, &old).await.expect("a request") != "ready" {
            pass(&old, &new).await.expect("an answer");
        }
        signal(pid(&new), Signal::SIGTERM);
        let waits = timeout(Duration::from_secs(1), new.receive()).await.is_err();
        pass(&old, &new).await;
        waits
    }

    /// The connections to the new and the old process.
    async fn connect(&self) -> (Handover, Handover) {
        let (stream, _) = self.listener.accept().await.expect("accepted");
        let new = Handover::new(stream).with_longest_line(1 << 20);
        let old = UnixStream::connect(&self.to).await.expect("connected");
        let old = Handover::new(old).with_longest_line(1 << 20);
        (new, old)
    }

    fn kill(&self, new: u32) {
        let victim = match self.victim {
            Victim::Old => Some(self.old),
            Victim::ProxyOfOld => child(self.old),
            Victim::New => Some(new),
            Victim::ProxyOfNew => child(new),
        };
        signal(victim.expect("a process"), Signal::SIGKILL);
    }
}

/// The process at the other end.
fn pid(connection: &Handover) -> u32 {
    let pid = connection.peer().expect("a peer").pid.expect("a pid");
    u32::try_from(pid).expect("a pid")
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).expect("a pid")), signal).expect("a signal");
}

/// Passes a message with its descriptors, and returns it; `None` if one of both has ended.
async fn pass(from: &Handover, to: &Handover) -> Option<String> {
    let (line, attached) = from.receive().await.ok()??;
    let attached: Vec<_> = attached.iter().map(|descriptor| descriptor.as_fd()).collect();
    to.send(&line, &attached).await.ok()?;
    Some(line)
}

/// Kills the old process, or its proxy process, after some of the requests.
pub(crate) async fn old_is_killed(mode: Mode, victim: Victim) {
    for requests in [1, 2, 4, 6, 9, 11] {
        let scene = Scene::new().await;
        let mut daemon = scene.daemon(mode).await;
        let _echo = Server::echo(&scene.b, APP);
        let (relay, settings) = Relay::new(&scene, &daemon, mode, requests, victim);
        let relayed = tokio::spawn(relay.run());
        let new = scene.node.proxy(&settings).await;
        assert!(relayed.await.expect("relayed"), "there are less than {requests} requests");
        daemon.ended_by_itself().await;
        scene.serves(&["a", "b"]).await;
        scene.assert_rules().await;
        scene.echoed().await;
        let count = new.count(&["the running process ended before it had passed all pods"]);
        assert!(count <= 1, "{}", new.log());
    }
}

/// Kills the new broker, or its proxy process, after some of the requests.
pub(crate) async fn new_is_killed(victim: Victim) {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(Mode::Broker).await;
    let _echo = Server::echo(&scene.b, APP);
    for requests in [2, 4, 6, 9] {
        let failure = ["take-over by another process failed"];
        let before = daemon.count(&failure);
        let (relay, settings) = Relay::new(&scene, &daemon, Mode::Broker, requests, victim);
        let relayed = tokio::spawn(relay.run());
        match scene.node.try_proxy(&settings).await {
            Err(SpawnError::Ended { log, .. }) => {
                assert_eq!(
                    log.contains("the proxy process has ended"),
                    victim == Victim::ProxyOfNew,
                    "{log}"
                );
            }
            other => unreachable!("the process did not end: {other:?}"),
        }
        assert!(relayed.await.expect("relayed"), "there are less than {requests} requests");
        daemon.more_than(before, &failure).await;
        scene.serves(&["a", "b"]).await;
        scene.assert_rules().await;
        scene.echoed().await;
    }
    let _new = scene.start_successor(&mut daemon, Mode::Broker).await;
    scene.serves(&["a", "b"]).await;
    scene.echoed().await;
}

/// Stops the new process before it has the last answer of the old one, which ends too.
pub(crate) async fn new_is_stopped_before_last_answer() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(Mode::Broker).await;
    let (relay, settings) = Relay::new(&scene, &daemon, Mode::Broker, 0, Victim::New);
    let relayed = tokio::spawn(relay.stop_before_last_answer());
    let log = match scene.node.try_proxy(&settings).await {
        Ok(mut new) => {
            assert!(new.ended().await.success(), "{}", new.log());
            new.log()
        }
        Err(SpawnError::Ended { log, .. }) => log,
        Err(other) => unreachable!("{other:?}"),
    };
    assert!(relayed.await.expect("relayed"), "it did not wait for the last answer:\n{log}");
    daemon.line(&["another process has taken over"]).await;
    assert!(log.contains("stopping") && !log.contains("stopped while taking over"), "{log}");
    scene.assert_rules().await;
}

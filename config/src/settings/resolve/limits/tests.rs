//! Tests of valid and invalid settings of limits, timeouts and hot restart.

use std::time::Duration;

use crate::settings::LocalSocket;
use crate::settings::load::settings_of;

fn mistakes(text: &str) -> Vec<String> {
    let problems = settings_of(text).unwrap_err().problems;
    problems.into_iter().map(|problem| format!("{}: {}", problem.key, problem.reason)).collect()
}

#[test]
fn defaults_limit_resources_and_keep_open_connections() {
    let settings = settings_of("").unwrap();
    let (limits, timeouts) = (settings.limits, settings.timeouts);
    assert_eq!(limits.connections_per_worker, 50_000);
    assert_eq!(limits.connections_per_source, Some(20_000));
    assert_eq!(limits.accepts_per_second, None);
    assert_eq!((limits.handshakes, limits.handshakes_per_source), (1024, 64));
    assert_eq!((limits.tunnels_per_source, limits.tunnels_per_identity), (Some(512), Some(4096)));
    assert_eq!(limits.buffers, 256 << 20);
    assert!(timeouts.tunnel_idle > timeouts.pool_idle, "the client closes an idle tunnel first");
    assert_eq!(timeouts.idle, None);
    assert_eq!(timeouts.half_close, Some(Duration::from_secs(3600)));
    assert_eq!(timeouts.keepalive, Duration::from_secs(180));
    assert_eq!(settings.take_over, LocalSocket::Auto);
}

#[test]
fn optional_limits_accept_off() {
    let text = "limits: {connections_per_source: off, accepts_per_second: 7, \
                tunnels_per_source: off, tunnels_per_identity: off, buffers: 64KiB}\n\
                timeouts: {idle: 10m, half_close: off}\n\
                take_over: {socket: off}\n";
    let settings = settings_of(text).unwrap();
    assert_eq!(settings.limits.connections_per_source, None);
    assert_eq!(settings.limits.accepts_per_second, Some(7));
    assert_eq!(settings.limits.tunnels_per_source, None);
    assert_eq!(settings.limits.tunnels_per_identity, None);
    assert_eq!(settings.limits.buffers, 64 << 10);
    assert_eq!(settings.timeouts.idle, Some(Duration::from_secs(600)));
    assert_eq!(settings.timeouts.half_close, None);
    assert_eq!(settings.take_over, LocalSocket::Off);
}

#[test]
fn rejects_invalid_limits() {
    let text = "limits: {connections_per_worker: off, connections_per_source: 0, accepts_per_second: no, \
                handshakes: 0, handshakes_per_source: 0, tunnels_per_source: 0, tunnels_per_identity: none, \
                buffers: 256}\n\
                timeouts: {idle: never, half_close: 0s}\n\
                take_over: {socket: ''}\n";
    assert_eq!(
        mistakes(text),
        [
            "limits.connections_per_worker: must be a number, 1 or more",
            "limits.connections_per_source: must be off or a number, 1 or more",
            "limits.accepts_per_second: must be off or a number, 1 or more",
            "limits.handshakes: must be a number, 1 or more",
            "limits.handshakes_per_source: must be a number, 1 or more",
            "limits.tunnels_per_source: must be off or a number, 1 or more",
            "limits.tunnels_per_identity: must be off or a number, 1 or more",
            "limits.buffers: must be a size above zero with its unit, such as 64KiB, 256MiB or 1GiB",
            "timeouts.idle: must be off or a duration above zero with its unit, such as 250ms, 10s, 5m or 24h",
            "timeouts.half_close: must be off or a duration above zero with its unit, such as 250ms, 10s, 5m or 24h",
            "take_over.socket: must be the path of a file",
        ]
    );
}

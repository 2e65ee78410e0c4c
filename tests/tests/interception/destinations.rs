//! Tests of inbound connections to addresses that are not the pod's.

use std::net::{IpAddr, SocketAddr};

use underpass_tests::{APP, Family, Scene, Settings, Suite, exchange, tool};

use crate::{PROFILES, SIDECAR};

pub(crate) fn add_tests(suite: &mut Suite) {
    for family in Family::BOTH {
        for profile in PROFILES {
            let name =
                format!("a connection to an address that is not the pod's is refused ({family})");
            profile.test(suite, &name, async move || {
                serves_own_addresses_only(family, |settings| profile.of(settings)).await;
            });
        }
        let name = format!(
            "TPROXY: a connection to an address that is not the pod's is refused ({family})"
        );
        SIDECAR.test(suite, &name, async move || {
            let tproxy = |settings| SIDECAR.of(settings).set("interception.inbound.mode=tproxy");
            serves_own_addresses_only(family, tproxy).await;
        });
    }
}

/// The client routes two addresses through the server's pod, which forwards packets. The pod owns
/// the first; no host owns the second.
async fn serves_own_addresses_only(family: Family, settings: impl Fn(Settings) -> Settings) {
    let scene = Scene::new().await;
    let (own, other): (IpAddr, IpAddr) = match family {
        Family::V4 => ([203, 0, 113, 7].into(), [203, 0, 113, 8].into()),
        Family::V6 => {
            ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 7].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 8].into())
        }
    };
    let gateway = scene.server.ip(family).to_string();
    for address in [own, other] {
        tool(&scene.client, "ip", &["route", "add", &address.to_string(), "via", &gateway])
            .await
            .ok();
    }
    tool(&scene.server, "ip", &["address", "add", &own.to_string(), "dev", "lo"]).await.ok();
    for forwarding in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
        tool(&scene.server, "sysctl", &["-w", forwarding]).await.ok();
    }
    let mut proxy = scene.server.proxy(&settings(scene.server_settings())).await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, SocketAddr::new(own, APP)).await;
    exchange(&mut client, &mut server).await;
    drop((client, server));
    let refused = SocketAddr::new(other, APP);
    scene.client.dial_and_see_reset(refused).await;
    proxy
        .line(&["connection failed", "reason=\"not_local\"", &format!("dst.addr={refused}")])
        .await;
    let metrics = scene.server.metrics().await;
    assert_eq!(metrics.sum("underpass_inbound_not_local_total", &[]), Some(1.0));
    assert!(!app.is_reached(), "the application was reached");
}

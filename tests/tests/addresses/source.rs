//! Tests of the client address that an application sees for a client in another pod.

use underpass_tests::{APP, Family, Scene, Suite, exchange};

use crate::{PROFILES, Profile};

pub(crate) fn add_tests(suite: &mut Suite) {
    for profile in PROFILES {
        profile.test(
            suite,
            "the application sees the profile's client address, in plaintext and through a tunnel",
            async move || {
                application_sees_client(profile).await;
            },
        );
    }
}

async fn application_sees_client(profile: Profile) {
    let scene = Scene::new().await;
    let mut at_server = scene.server.proxy(&profile.of(scene.server_settings())).await;
    arrives(profile, &scene).await;
    let _at_client = scene.client.proxy(&profile.of(scene.client_settings())).await;
    arrives(profile, &scene).await;
    let lines = at_server.access_lines(4).await;
    let tunnelled = lines.iter().filter(|line| line.contains("dst.hbone_addr=")).count();
    assert_eq!((lines.len(), tunnelled), (4, 2), "{lines:#?}");
}

async fn arrives(profile: Profile, scene: &Scene) {
    let app = scene.server.listen(APP);
    for family in Family::BOTH {
        let (mut client, mut server, peer) = scene.client.meet(&app, scene.app(family)).await;
        exchange(&mut client, &mut server).await;
        let expected = match profile.last_hop {
            Some([v4, v6]) => {
                if family == Family::V4 { v4 } else { v6 }.parse().expect("an address")
            }
            None => scene.client.ip(family),
        };
        assert_eq!(peer.ip(), expected, "{family}");
    }
}

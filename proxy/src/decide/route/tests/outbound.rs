//! Tests of outbound routing: a table of caller, destination and route, for each step of ztunnel's
//! decisions and each difference from them.

use crate::decide::route::testing::{FixedInputs, best_route, caller, mesh, named, show};
use crate::decide::route::{Authority, Caller, Target};

const PLAIN: &str = "
    workload client ip=10.0.0.1,fd00::1
    workload plain ip=10.0.0.2,fd00::2
    workload meshed ip=10.0.0.3,fd00::3 hbone
    workload far ip=10.0.0.9 net=far hbone
    workload node1 ip=10.0.0.4 hostnetwork of=default/hostnet.example
    workload node2 ip=10.0.0.4 hostnetwork
    workload node3 ip=10.0.0.5 hostnetwork hbone
    workload node4 ip=10.0.0.5 hostnetwork
    workload node5 ip=10.0.0.6 hostnetwork hbone
    service default/hostnet.example vip=/10.1.0.1 ports=80:80
";

const SERVICES: &str = "
    workload client ip=10.0.0.1,fd00::1
    workload outsider ip=10.0.0.2 ns=other
    workload web ip=10.0.0.10,fd00::10 hbone of=default/web.example of=default/v4.example of=default/v6.example of=default/own.example{80:9090}
    workload old ip=10.0.0.11 of=default/old.example
    workload named1 ip=10.0.0.12 of=default/named.example{80:1234}
    workload named2 ip=10.0.0.13 of=default/named.example{8080:9999}
    workload dns host=db.internal of=default/dns.example
    workload dnsmesh host=mesh.internal hbone of=default/dnsmesh.example
    workload lost of=default/lost.example
    workload v4only ip=10.0.0.14 of=default/v4only.example
    workload sick ip=10.0.0.15 unhealthy of=default/sick.example of=default/anyway.example
    workload full ip=10.0.0.16 capacity=0 of=default/full.example
    workload one ip=10.0.0.17 hbone of=default/pair.example{80:1}
    workload two ip=10.0.0.18 hbone capacity=0 of=default/pair.example{80:2}
    workload mine ip=10.0.0.19 of=default/mine.example
    workload theirs ip=10.0.0.20 of=other/mine.example
    workload inrange ip=10.9.0.1 hbone
    workload itself ip=10.0.0.21 hbone
    workload bare ip=10.0.0.22
    workload alone ip=10.0.0.23 hbone
    workload around ip=10.7.0.1
    service default/web.example vip=/10.1.0.1,/fd01::1 sans=web-team
    service default/v4.example vip=/10.1.0.2,/fd01::2 families=v4
    service default/v6.example vip=/10.1.0.3 families=v6
    service default/own.example vip=/10.1.0.4
    service default/old.example vip=/10.1.0.5 ports=80:8080,81:8081
    service default/named.example vip=/10.1.0.6 ports=80:0,8080:0,9:0
    service default/dns.example vip=/10.1.0.7,/fd01::7 ports=80:5432
    service default/dnsmesh.example vip=/10.1.0.8,/fd01::8
    service default/lost.example vip=/10.1.0.9
    service default/v4only.example vip=/10.1.0.10 families=v6
    service default/sick.example vip=/10.1.0.11
    service default/anyway.example vip=/10.1.0.12 unhealthy
    service default/full.example vip=/10.1.0.13
    service default/pair.example vip=/10.1.0.14
    service default/empty.example vip=/10.1.0.15
    service default/mine.example vip=/10.1.0.16
    service other/mine.example vip=/10.1.0.16
    service default/secret.example vip=/10.1.0.17 private
    service default/pass.example vip=/10.1.0.18,/10.0.0.10 cidr=/10.9.0.0/16 mode=passthrough
    service default/range.example cidr=/10.8.0.0/16 waypoint=/10.0.0.11@15008
    service default/passway.example vip=/10.1.0.19 mode=passthrough waypoint=/10.0.0.11@15008
    service default/itself.example vip=/10.0.0.21 ports=80:8080,82:0
    service default/bare.example vip=/10.0.0.22 ports=80:8080
    service default/alone.example vip=/10.0.0.23 ports=80:8080 mode=strict prefer=region
    workload elsewhere ip=10.0.0.24 region=other of=default/alone.example of=default/itself.example
    service default/around.example cidr=/10.7.0.0/16 ports=80:8080
    workload behind ip=10.0.0.25 of=default/around.example
";

const WAYPOINTS: &str = "
    workload client ip=10.0.0.1,fd00::1
    workload way ip=10.0.0.2,fd00::2 hbone of=default/way.example{15008:15008}
    workload way2 ip=10.0.0.3 hbone of=default/way.example{15008:15008} capacity=0
    workload tunnelway ip=10.0.0.4 tunnel=15088 of=default/tunnelway.example
    workload noway ip=10.0.0.5 of=default/noway.example
    workload lone ip=10.0.0.6 hbone host=lone.internal
    workload behind ip=10.0.0.10,fd00::10 hbone waypoint=default/way.example@15008 of=default/direct.example
    workload behind-ip ip=10.0.0.11 waypoint=/10.0.0.2@15008
    workload behind-v4 ip=10.0.0.12,fd00::12 waypoint=/10.0.0.2@15010
    workload behind-lone ip=10.0.0.13 hbone waypoint=default/lone.internal@15008
    workload behind-far ip=10.0.0.14 hbone waypoint=far/10.0.0.2@15008
    workload farway ip=10.0.0.2 net=far gateway=far/10.0.0.2@15009
    service default/way.example vip=/10.1.0.1 ports=15008:15008 sans=way-team
    service default/tunnelway.example vip=/10.1.0.2 ports=80:80
    service default/noway.example vip=/10.1.0.3 ports=80:80
    service default/front.example vip=/10.1.0.4,/fd01::4 waypoint=default/way.example@15008
    service default/front-vip.example vip=/10.1.0.5,/fd01::5 waypoint=/10.1.0.1@15008
    service default/front-tunnel.example vip=/10.1.0.6 waypoint=default/tunnelway.example@15008
    service default/front-no.example vip=/10.1.0.7 waypoint=default/noway.example@15008
    service default/weighted.example vip=/10.1.0.8 waypoint=/10.0.0.4@1 weighted=/10.0.0.2@15008*1,/10.0.0.3@15008*0
    service default/weightless.example vip=/10.1.0.9 waypoint=/10.0.0.2@15008 weighted=/10.0.0.3@15008*0
    service default/direct.example vip=/10.1.0.10
    service default/private.example vip=/10.1.0.11 ports=15008:15008 private
    workload outsider ip=10.0.0.20 ns=other
    service other/hidden.example vip=/10.1.0.12 waypoint=/10.1.0.11@15008
    workload both ip=10.0.0.15 hbone waypoint=/10.0.0.2@15008 of=default/both.example
    workload both-far ip=10.0.0.16 waypoint=far/10.0.0.2@15008 of=default/both-far.example
    service default/both-far.example vip=/10.0.0.16 sans=team
    service default/both.example vip=/10.0.0.15 waypoint=/10.0.0.6@15008
";

const NETWORKS: &str = "
    workload client ip=10.0.0.1
    workload gw ip=10.22.1.1 net=far
    workload gw1 ip=10.0.0.5 of=default/gw.example{15009:15008}
    workload gw2 ip=10.0.0.6 capacity=0 of=default/gw.example{15009:15008}
    workload remote net=far gateway=far/10.22.1.1@15009 of=default/by-ip.example of=default/nameless.example
    workload remote2 ip=10.0.0.1 net=far gateway=default/gw.example@15009 of=default/by-name.example
    workload cut ip=10.0.0.2 net=far of=default/cut.example
    workload here ip=10.0.0.7 hbone of=default/failover.example of=default/mixed.example
    workload there net=far gateway=far/10.22.1.1@15009 of=default/failover.example
    workload there2 net=far of=default/mixed.example
    workload sick ip=10.0.0.8 unhealthy of=default/over.example
    workload well net=far gateway=far/10.22.1.1@15009 of=default/over.example
    workload farway net=far gateway=far/10.22.1.1@15009 of=default/way.example{15008:15008}
    workload addressless gateway=far/10.22.1.1@15009 of=default/local.example
    service default/gw.example vip=/10.1.0.1 ports=15009:15009 sans=gw-team
    service default/by-ip.example vip=/10.1.0.2 sans=team
    service default/by-name.example vip=/10.1.0.3 sans=team
    service default/nameless.example vip=/10.1.0.4
    service default/cut.example vip=/10.1.0.5 sans=team
    service default/failover.example vip=/10.1.0.6 sans=team mode=failover prefer=network
    service default/over.example vip=/10.1.0.7 sans=team mode=failover prefer=network
    service default/way.example vip=/10.1.0.8 ports=15008:15008 sans=way-team
    service default/front.example vip=/10.1.0.9 sans=team waypoint=default/way.example@15008
    service default/mixed.example vip=/10.1.0.10
    service default/local.example vip=/10.1.0.11 sans=team
    workload named net=far gateway=far/10.22.1.1@15009 of=default/named.example{80:0}
    workload unnamed net=far gateway=far/10.22.1.1@15009 of=default/unnamed.example
    workload near ip=10.0.0.9 of=default/near.example{80:0}
    service default/named.example vip=/10.1.0.12 ports=80:0 sans=team
    service default/unnamed.example vip=/10.1.0.13 ports=80:0 sans=team
    service default/near.example vip=/10.1.0.14 ports=80:0
";

#[rustfmt::skip]
const TABLE: &[(&str, &str, &str, &str)] = &[
    // A destination without a service: a workload's address, or an unknown address.
    (PLAIN, "client", "192.0.2.1:443", "plain 192.0.2.1:443"),
    (PLAIN, "client", "[2001:db8::1]:443", "plain [2001:db8::1]:443"),
    (PLAIN, "client", "10.0.0.2:80", "plain 10.0.0.2:80 @plain"),
    (PLAIN, "client", "[fd00::2]:80", "plain [fd00::2]:80 @plain"),
    (PLAIN, "client", "10.0.0.3:80", "tunnel 10.0.0.3:15008 > 10.0.0.3:80 by meshed @meshed"),
    (PLAIN, "client", "[fd00::3]:80", "tunnel [fd00::3]:15008 > [fd00::3]:80 by meshed @meshed"),
    (PLAIN, "client", "[::ffff:10.0.0.3]:80", "tunnel 10.0.0.3:15008 > 10.0.0.3:80 by meshed @meshed"),
    (PLAIN, "meshed", "10.0.0.3:80", "tunnel 10.0.0.3:15008 > 10.0.0.3:80 by meshed @meshed"),
    (PLAIN, "client", "10.0.0.9:80", "plain 10.0.0.9:80"),
    (PLAIN, "far", "10.0.0.9:80", "tunnel 10.0.0.9:15008 > 10.0.0.9:80 by far @far"),
    (PLAIN, "far", "10.0.0.3:80", "plain 10.0.0.3:80"),
    (PLAIN, "client", "10.0.0.4:80", "plain 10.0.0.4:80"),
    (PLAIN, "client", "10.1.0.1:80", "plain 10.0.0.4:80 @node1 for hostnet.example"),
    (PLAIN, "client", "10.0.0.5:80", "shared_address"),
    (PLAIN, "client", "10.0.0.6:9100", "tunnel 10.0.0.6:15008 > 10.0.0.6:9100 by node5 @node5"),
    // Services: ports, families, hostnames, health, capacity, visibility.
    (SERVICES, "client", "10.1.0.1:80", "tunnel 10.0.0.10:15008 > 10.0.0.10:8080 by web+web-team @web for web.example"),
    (SERVICES, "client", "[fd01::1]:80", "tunnel [fd00::10]:15008 > [fd00::10]:8080 by web+web-team @web for web.example"),
    (SERVICES, "client", "10.1.0.1:81", "no_service_port"),
    (SERVICES, "client", "[fd01::2]:80", "tunnel 10.0.0.10:15008 > 10.0.0.10:8080 by web @web for v4.example"),
    (SERVICES, "client", "10.1.0.3:80", "tunnel [fd00::10]:15008 > [fd00::10]:8080 by web @web for v6.example"),
    (SERVICES, "client", "10.1.0.4:80", "tunnel 10.0.0.10:15008 > 10.0.0.10:9090 by web @web for own.example"),
    (SERVICES, "client", "10.1.0.5:81", "plain 10.0.0.11:8081 @old for old.example"),
    (SERVICES, "client", "10.1.0.6:80", "plain 10.0.0.12:1234 @named1 for named.example one named1:1234"),
    (SERVICES, "client", "10.1.0.6:8080", "plain 10.0.0.13:9999 @named2 for named.example one named2:9999"),
    (SERVICES, "client", "10.1.0.6:9", "no endpoint: NoPort"),
    (SERVICES, "client", "10.1.0.7:80", "plain db.internal:5432/Any @dns for dns.example"),
    (SERVICES, "client", "[fd01::7]:80", "plain db.internal:5432/Any/v6 @dns for dns.example"),
    (SERVICES, "client", "10.1.0.8:80", "tunnel mesh.internal:15008/Any > *:8080 by dnsmesh @dnsmesh for dnsmesh.example"),
    (SERVICES, "client", "10.1.0.9:80", "no endpoint: NoAddress"),
    (SERVICES, "client", "10.1.0.10:80", "no endpoint: NoAddressOfFamily"),
    (SERVICES, "client", "10.1.0.11:80", "no endpoint: NoHealthyWorkload"),
    (SERVICES, "client", "10.1.0.12:80", "plain 10.0.0.15:8080 @sick for anyway.example"),
    (SERVICES, "client", "10.1.0.13:80", "no endpoint: NoCapacity"),
    (SERVICES, "client", "10.1.0.14:80", "tunnel 10.0.0.17:15008 > 10.0.0.17:1 by one @one for pair.example one one:1"),
    (SERVICES, "client", "10.1.0.15:80", "no endpoint: NoHealthyWorkload"),
    (SERVICES, "client", "10.1.0.16:80", "plain 10.0.0.19:8080 @mine for mine.example"),
    (SERVICES, "outsider", "10.1.0.16:80", "plain 10.0.0.20:8080 @theirs for mine.example"),
    (SERVICES, "client", "10.1.0.17:80", "no endpoint: NoHealthyWorkload"),
    (SERVICES, "outsider", "10.1.0.17:80", "plain 10.1.0.17:80"),
    // Passthrough: plain TCP to the original destination, but never to an HBONE workload.
    (SERVICES, "client", "10.1.0.18:81", "plain 10.1.0.18:81 for pass.example"),
    (SERVICES, "client", "10.9.0.2:80", "plain 10.9.0.2:80 for pass.example"),
    (SERVICES, "client", "10.9.0.1:80", "tunnel 10.9.0.1:15008 > 10.9.0.1:80 by inrange @inrange for pass.example"),
    (SERVICES, "client", "10.0.0.10:80", "tunnel 10.0.0.10:15008 > 10.0.0.10:80 by web @web for pass.example"),
    (SERVICES, "client", "10.1.0.19:80", "tunnel 10.0.0.11:15008 > 10.1.0.19:80 by old @old for passway.example"),
    (SERVICES, "client", "10.8.1.2:443", "tunnel 10.0.0.11:15008 > 10.8.1.2:443 by old @old for range.example"),
    // An address of both a service and a workload: the workload, if the service has no endpoint for
    // the port.
    (SERVICES, "client", "10.0.0.21:80", "plain 10.0.0.24:8080 @elsewhere for itself.example"),
    (SERVICES, "client", "10.0.0.21:81", "tunnel 10.0.0.21:15008 > 10.0.0.21:81 by itself @itself"),
    (SERVICES, "client", "10.0.0.21:82", "tunnel 10.0.0.21:15008 > 10.0.0.21:82 by itself @itself"),
    (SERVICES, "client", "10.0.0.22:80", "plain 10.0.0.22:80 @bare"),
    (SERVICES, "client", "10.0.0.23:80", "tunnel 10.0.0.23:15008 > 10.0.0.23:80 by alone @alone"),
    (SERVICES, "client", "10.7.0.1:80", "plain 10.0.0.25:8080 @behind for around.example"),
    (SERVICES, "client", "10.7.0.1:81", "plain 10.7.0.1:81 @around"),
    (SERVICES, "client", "10.7.0.2:81", "no_service_port"),
    // Waypoints of services.
    (WAYPOINTS, "client", "10.1.0.4:80", "tunnel 10.0.0.2:15008 > 10.1.0.4:80 by way+way-team @way for front.example one way:15008"),
    (WAYPOINTS, "client", "10.1.0.4:81", "tunnel 10.0.0.2:15008 > 10.1.0.4:81 by way+way-team @way for front.example one way:15008"),
    (WAYPOINTS, "client", "[fd01::4]:80", "tunnel [fd00::2]:15008 > [fd01::4]:80 by way+way-team @way for front.example one way:15008"),
    (WAYPOINTS, "client", "10.1.0.5:80", "tunnel 10.0.0.2:15008 > 10.1.0.5:80 by way+way-team @way for front-vip.example one way:15008"),
    (WAYPOINTS, "client", "[fd01::5]:80", "tunnel 10.0.0.2:15008 > [fd01::5]:80 by way+way-team @way for front-vip.example one way:15008"),
    (WAYPOINTS, "client", "10.1.0.6:80", "tunnel 10.0.0.4:15008 > 10.1.0.6:80 by tunnelway @tunnelway for front-tunnel.example"),
    (WAYPOINTS, "client", "10.1.0.7:80", "no endpoint: NoPort"),
    (WAYPOINTS, "client", "10.1.0.8:80", "tunnel 10.0.0.2:15008 > 10.1.0.8:80 by way @way for weighted.example"),
    (WAYPOINTS, "client", "10.1.0.9:80", "tunnel 10.0.0.2:15008 > 10.1.0.9:80 by way @way for weightless.example"),
    (WAYPOINTS, "outsider", "10.1.0.12:80", "unknown_waypoint"),
    // Waypoints of workloads: for their own addresses only, and not for the waypoint itself.
    (WAYPOINTS, "client", "10.0.0.10:80", "tunnel 10.0.0.2:15008 > 10.0.0.10:80 by way+way-team @way one way:15008"),
    (WAYPOINTS, "client", "10.0.0.15:80", "tunnel 10.0.0.2:15008 > 10.0.0.15:80 by way @way for both.example"),
    (WAYPOINTS, "client", "10.0.0.15:81", "tunnel 10.0.0.2:15008 > 10.0.0.15:81 by way @way"),
    (WAYPOINTS, "way", "10.0.0.15:81", "tunnel 10.0.0.15:15008 > 10.0.0.15:81 by both @both"),
    (WAYPOINTS, "client", "[fd00::10]:80", "tunnel [fd00::2]:15008 > [fd00::10]:80 by way+way-team @way one way:15008"),
    (WAYPOINTS, "client", "10.1.0.10:80", "tunnel 10.0.0.10:15008 > 10.0.0.10:8080 by behind @behind for direct.example"),
    (WAYPOINTS, "client", "10.0.0.11:80", "tunnel 10.0.0.2:15008 > 10.0.0.11:80 by way @way"),
    (WAYPOINTS, "client", "[fd00::12]:80", "tunnel 10.0.0.2:15010 > [fd00::12]:80 by way @way"),
    (WAYPOINTS, "client", "10.0.0.13:80", "tunnel 10.0.0.6:15008 > 10.0.0.13:80 by lone @lone"),
    (WAYPOINTS, "client", "10.0.0.14:80", "farway unusable: OtherNetwork"),
    (WAYPOINTS, "client", "10.0.0.16:80", "farway unusable: OtherNetwork"),
    (WAYPOINTS, "way", "[fd00::10]:80", "tunnel [fd00::10]:15008 > [fd00::10]:80 by behind @behind"),
    (WAYPOINTS, "way", "10.0.0.11:80", "plain 10.0.0.11:80 @behind-ip"),
    (WAYPOINTS, "lone", "10.0.0.13:80", "tunnel 10.0.0.13:15008 > 10.0.0.13:80 by behind-lone @behind-lone"),
    (WAYPOINTS, "behind", "10.0.0.11:80", "tunnel 10.0.0.2:15008 > 10.0.0.11:80 by way @way"),
    // Other networks.
    (NETWORKS, "client", "10.1.0.2:80", "double 10.22.1.1:15009 by gw > by-ip.example:80 by team @gw for by-ip.example"),
    (NETWORKS, "client", "10.1.0.3:80", "double 10.0.0.5:15008 by gw1+gw-team > by-name.example:80 by team @gw1 for by-name.example gateway gw1:15008"),
    (NETWORKS, "client", "10.1.0.4:80", "no endpoint: NoSubjectAltNames"),
    (NETWORKS, "client", "10.1.0.5:80", "no endpoint: NoGateway"),
    (NETWORKS, "client", "10.1.0.6:80", "tunnel 10.0.0.7:15008 > 10.0.0.7:8080 by here+team @here for failover.example one here:8080"),
    (NETWORKS, "client", "10.1.0.7:80", "double 10.22.1.1:15009 by gw > over.example:80 by team @gw for over.example"),
    (NETWORKS, "client", "10.1.0.12:80", "double 10.22.1.1:15009 by gw > named.example:80 by team @gw for named.example"),
    (NETWORKS, "client", "10.1.0.13:80", "no endpoint: NoPort"),
    (NETWORKS, "client", "10.1.0.14:80", "no endpoint: NoPort"),
    (NETWORKS, "client", "10.1.0.9:80", "double 10.22.1.1:15009 by gw > front.example:80 by way-team @gw for front.example"),
    (NETWORKS, "client", "10.1.0.10:80", "tunnel 10.0.0.7:15008 > 10.0.0.7:8080 by here @here for mixed.example one here:8080"),
    (NETWORKS, "client", "10.1.0.11:80", "no endpoint: NoAddress"),
];

#[test]
fn routes_every_destination_by_the_mesh() {
    let mut wrong = Vec::new();
    for (text, from, destination, expected) in TABLE {
        let mesh = mesh(text);
        let caller = caller(named(&mesh, from));
        for seed in 0..8 {
            let route = best_route(
                destination.parse().unwrap(),
                &mesh,
                &caller,
                &mut FixedInputs::new(seed),
            );
            let shown = show(&route);
            if shown != *expected {
                wrong.push(format!("{from} to {destination}: {shown}, not {expected}"));
                break;
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn connect_to_hostname_requests_dialled_address() {
    let dialled = "fd00::1".parse().unwrap();
    assert_eq!(Authority::AtNextHop(80).target(dialled).to_string(), "[fd00::1]:80");
    let known = Authority::KnownEndpoint(Target::Hostname("web.example".into(), 80));
    assert_eq!(known.target(dialled).to_string(), "web.example:80");
}

#[test]
fn connection_bypasses_waypoint_only_with_identity_and_address_of_waypoint() {
    let mesh = mesh(WAYPOINTS);
    let (way, client) = (caller(named(&mesh, "way")), caller(named(&mesh, "client")));
    let through = "tunnel 10.0.0.2:15008 > 10.0.0.11:80 by way @way";
    for (identity, address, expected) in [
        (way.identity, way.address, "plain 10.0.0.11:80 @behind-ip"),
        (client.identity, way.address, through),
        (None, way.address, through),
        (way.identity, client.address, through),
    ] {
        let caller = Caller { identity, address, ..client };
        let destination = ([10, 0, 0, 11], 80).into();
        let route = best_route(destination, &mesh, &caller, &mut FixedInputs::new(0));
        assert_eq!(show(&route), expected);
    }
}

#[test]
fn failed_service_endpoints_do_not_select_owner_of_address() {
    let mesh = mesh(SERVICES);
    let caller = caller(named(&mesh, "client"));
    let mut inputs = FixedInputs::new(0);
    inputs.tried = vec!["elsewhere".into()];
    let route = best_route(([10, 0, 0, 21], 80).into(), &mesh, &caller, &mut inputs);
    assert_eq!(show(&route), "no endpoint: Tried");
}

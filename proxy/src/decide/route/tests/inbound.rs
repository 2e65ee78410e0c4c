//! Tests of inbound routing: a table of local workload, CONNECT request and target.

use std::net::SocketAddr;

use crate::decide::route::testing::{mesh, named};
use crate::decide::route::{InboundTarget, RouteError, Target, inbound};

const MESH: &str = "
    workload web ip=10.0.0.1,fd00::1 of=default/web.example{90:9090} of=default/plain.example of=other/twice.example of=other/inner.example
    workload sick ip=10.0.0.2 unhealthy of=default/web.example{90:9090}
    workload way ip=10.0.0.3 of=default/way.example of=other/innerway.example
    workload sandwich ip=10.0.0.4 of=default/way.example tunnel=15088 proxy
    workload anyport ip=10.0.0.5 tunnel=any proxy
    workload silent ip=10.0.0.6 tunnel=15088
    workload behind ip=10.0.0.7 waypoint=default/way.example@15008
    workload behind-ip ip=10.0.0.8 waypoint=/10.0.0.3@15008
    service default/web.example vip=/fd01::1,far/10.2.0.1,/10.1.0.1 ports=80:8080,90:0
    service default/plain.example vip=/10.1.0.2 ports=80:8080 waypoint=default/way.example@15008
    service default/split.example vip=/10.1.0.3 weighted=/10.0.0.3@15008*1
    service default/way.example vip=/10.1.0.4
    service default/novip.example
    service default/range.example cidr=/10.0.0.0/24 waypoint=default/way.example@15008
    service other/secret.example vip=/10.1.0.5 private
    service other/v6.example vip=/fd01::6,far/10.2.0.6
    service other/hidden.example vip=/10.1.0.6 private waypoint=default/way.example@15008
    service default/shared.example vip=/10.1.0.7,/10.5.0.9
    service other/shared-too.example vip=/10.1.0.7 waypoint=default/way.example@15008
    service default/narrow.example cidr=/10.5.0.0/24
    service other/wide.example cidr=/10.5.0.0/16 private waypoint=default/way.example@15008
    service other/innerway.example vip=/10.1.0.8 private
    service default/by-innerway.example vip=/10.1.0.9 waypoint=/10.1.0.8@15008
    service default/twice.example vip=/10.1.0.10 ports=80:1111
    service other/twice.example ports=80:2222 private
    service third/twice.example ports=80:3333 private waypoint=default/way.example@15008
    service other/inner.example ports=80:8080 private
";

#[rustfmt::skip]
const TABLE: &[(&str, &str, &str)] = &[
    // The workload's own addresses.
    ("web", "10.0.0.1:80", "10.0.0.1:80"),
    ("web", "[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
    ("web", "[fd00::1]:80", "not_here"),
    ("web", "10.0.0.2:80", "not_here"),
    ("web", "127.0.0.1:80", "not_here"),
    ("web", "10.1.0.1:80", "not_here"),
    ("no workload", "10.0.0.99:80", "10.0.0.99:80"),
    ("no workload", "10.0.0.1:80", "not_here"),
    // Services by name.
    ("web", "web.example:80", "10.0.0.1:8080 for web.example"),
    ("web", "web.example:90", "10.0.0.1:9090 for web.example"),
    ("web", "web.example:81", "no_service_port"),
    ("web", "way.example:80", "not_endpoint"),
    ("web", "unknown.example:80", "unknown_service"),
    ("web", "secret.example:80", "unknown_service"),
    ("sick", "web.example:80", "10.0.0.2:8080 for web.example"),
    ("sick", "web.example:90", "no_service_port"),
    ("no workload", "web.example:80", "not_endpoint"),
    // Destinations whose waypoint is the local workload.
    ("way", "10.0.0.7:80", "10.0.0.3:80"),
    ("way", "10.0.0.8:80", "10.0.0.3:80"),
    ("way", "10.0.0.1:80", "10.0.0.3:80 for range.example"),
    ("way", "10.0.0.77:80", "10.0.0.3:80 for range.example"),
    ("way", "10.1.0.2:80", "10.0.0.3:80 for plain.example"),
    ("way", "10.1.0.3:80", "10.0.0.3:80 for split.example"),
    ("way", "10.1.0.1:80", "not_here"),
    ("way", "plain.example:80", "10.0.0.3:8080 for plain.example"),
    ("way", "web.example:80", "not_endpoint"),
    ("web", "10.0.0.7:80", "not_here"),
    // Hidden destinations too, and addresses that others share.
    ("way", "10.1.0.6:80", "10.0.0.3:80 for hidden.example"),
    ("way", "10.1.0.7:80", "10.0.0.3:80 for shared-too.example"),
    ("way", "10.5.0.1:80", "10.0.0.3:80 for wide.example"),
    ("way", "10.5.0.9:80", "10.0.0.3:80 for wide.example"),
    ("way", "10.5.1.1:80", "10.0.0.3:80 for wide.example"),
    ("way", "10.6.0.1:80", "not_here"),
    ("way", "hidden.example:80", "10.0.0.3:8080 for hidden.example"),
    ("way", "10.1.0.9:80", "10.0.0.3:80 for by-innerway.example"),
    ("way", "by-innerway.example:80", "10.0.0.3:8080 for by-innerway.example"),
    ("web", "10.1.0.6:80", "not_here"),
    ("web", "10.1.0.9:80", "not_here"),
    // Several services with one hostname: preferably one that this workload serves, then one behind
    // this waypoint, then the best match.
    ("web", "twice.example:80", "10.0.0.1:2222 for twice.example"),
    ("web", "inner.example:80", "10.0.0.1:8080 for inner.example"),
    ("way", "twice.example:80", "10.0.0.3:3333 for twice.example"),
    ("anyport", "twice.example:80", "10.0.0.5:1111 as 10.1.0.10:80 for twice.example"),
    ("sick", "twice.example:80", "not_endpoint"),
    ("anyport", "inner.example:80", "unknown_service"),
    // Application tunnels accept every destination, at their own port.
    ("sandwich", "10.1.0.1:80", "10.0.0.4:15088 as 10.1.0.1:80 for web.example"),
    ("sandwich", "192.0.2.1:80", "10.0.0.4:15088 as 192.0.2.1:80"),
    ("sandwich", "10.0.0.4:80", "10.0.0.4:15088 as 10.0.0.4:80"),
    ("sandwich", "web.example:80", "10.0.0.4:15088 as 10.1.0.1:80 for web.example"),
    ("sandwich", "web.example:90", "10.0.0.4:15088 as 10.1.0.1:90 for web.example"),
    ("sandwich", "v6.example:80", "10.0.0.4:15088 as [fd01::6]:80 for v6.example"),
    ("sandwich", "web.example:91", "no_service_port"),
    ("sandwich", "novip.example:80", "no_vip"),
    ("anyport", "10.1.0.1:80", "10.0.0.5:80 as 10.1.0.1:80 for web.example"),
    ("anyport", "web.example:80", "10.0.0.5:8080 as 10.1.0.1:80 for web.example"),
    ("anyport", "web.example:90", "no_service_port"),
    ("silent", "10.1.0.1:80", "10.0.0.6:15088 for web.example"),
    ("silent", "novip.example:80", "10.0.0.6:15088 for novip.example"),
];

#[test]
fn tunnel_reaches_only_local_workload() {
    let mesh = mesh(MESH);
    for (here, requested, expected) in TABLE {
        let local = (*here != "no workload").then(|| &**named(&mesh, here));
        let address = local.map_or_else(|| [10, 0, 0, 99].into(), |local| local.addresses[0]);
        let here_at = SocketAddr::new(address, 15008);
        let authority = requested.parse().map(Target::Address).unwrap_or_else(|_| {
            let (hostname, port) = requested.split_once(':').unwrap();
            Target::Hostname(hostname.into(), port.parse().unwrap())
        });
        let target = inbound(&authority, here_at, &mesh, local, "", "default");
        let shown = match target {
            Err(error) => error.code().to_owned(),
            Ok(InboundTarget { address: target, header, service }) => {
                assert_eq!(target.ip(), address);
                let header = header.map(|header| format!(" as {header}"));
                let service = service.map(|service| format!(" for {}", service.hostname));
                let (header, service) = (header.unwrap_or_default(), service.unwrap_or_default());
                format!("{target}{header}{service}")
            }
        };
        assert_eq!(shown, *expected, "{here} requested for {requested}");
    }
}

#[test]
fn rejects_same_address_of_other_network() {
    let mesh = mesh(
        "workload here ip=10.0.0.1
         workload behind ip=10.0.0.2 waypoint=far/10.0.0.1@15008
         workload there ip=10.0.0.1 net=far",
    );
    let requested = Target::Address(([10, 0, 0, 2], 80).into());
    let here = ([10, 0, 0, 1], 15008).into();
    let target = inbound(&requested, here, &mesh, Some(named(&mesh, "here")), "", "default");
    assert_eq!(target, Err(RouteError::NotHere { requested, here }));
}

//! Tests of lookups with scripted servers.

use std::fs::write;
use std::net::SocketAddr;

use underpass_config::testing::Folder;

use super::*;
use crate::dns::upstream::tests::{Script, ScriptedExchange, Servers};

fn lookup(folder: &Folder, script: Script) -> (HostLookup, Arc<Servers>) {
    let path = folder.path("resolv.conf");
    write(&path, "nameserver 10.0.0.1\nsearch one.example two.example").unwrap();
    let servers = Arc::new(Servers::default());
    let server = SocketAddr::from(([10, 0, 0, 1], 53));
    servers.scripts.lock().unwrap().insert(server, script);
    let upstream = Upstream::new(Arc::new(ScriptedExchange(servers.clone())));
    (HostLookup::new(Arc::new(ResolvFile::new(&path)), upstream, true), servers)
}

#[tokio::test(start_paused = true)]
async fn addresses_and_local_names_need_no_server() {
    let folder = Folder::of_test();
    let (lookup, servers) = lookup(&folder, Script::Drops);
    let (found, _) = lookup.addresses("::ffff:10.0.0.7").await.unwrap();
    assert_eq!(found[..], [IpAddr::from([10, 0, 0, 7])]);
    let (found, _) = lookup.addresses("localhost").await.unwrap();
    assert!(found.iter().all(IpAddr::is_loopback) && servers.asked() == 0);
}

#[tokio::test(start_paused = true)]
async fn both_types_are_asked_and_their_ttl_is_returned() {
    let folder = Folder::of_test();
    let answers = Script::Answers(ResponseCode::NO_ERROR, Duration::from_millis(1));
    let (lookup, servers) = lookup(&folder, answers);
    // The scripted server has an A record for every question.
    let (found, ttl) = lookup.addresses("a.example").await.unwrap();
    assert!(found.contains(&IpAddr::from([10, 0, 0, 1])));
    assert_eq!((servers.asked(), ttl), (2, Duration::from_secs(60)));
}

#[tokio::test(start_paused = true)]
async fn accepts_record_after_opt_record() {
    let folder = Folder::of_test();
    let unusual = Script::AnswersUnusually(Duration::from_millis(1));
    let (found, _) = lookup(&folder, unusual).0.addresses("a.example").await.unwrap();
    assert!(found.contains(&IpAddr::from([10, 0, 0, 1])));
}

#[tokio::test(start_paused = true)]
async fn missing_name_is_looked_up_in_each_search_domain() {
    let folder = Folder::of_test();
    let missing = Script::Answers(ResponseCode::NAME_ERROR, Duration::from_millis(1));
    let (lookup, servers) = lookup(&folder, missing);
    let error = lookup.addresses("a.example").await.unwrap_err();
    assert!(matches!(error, HostLookupError::NotFound), "{error}");
    assert_eq!(servers.asked(), 6);
    lookup.addresses("a.example.").await.unwrap_err();
    assert_eq!(servers.asked(), 8, "a final dot: no search");
}

#[tokio::test(start_paused = true)]
async fn error_of_server_ends_the_lookup() {
    let folder = Folder::of_test();
    let fails = Script::Answers(ResponseCode::REFUSED, Duration::from_millis(1));
    let error = lookup(&folder, fails).0.addresses("a.example").await.unwrap_err();
    assert_eq!(error.to_string(), "the server reports REFUSED");
    let error = lookup(&folder, Script::Refuses).0.addresses("a.example").await.unwrap_err();
    assert_eq!(error.to_string(), "cannot ask 10.0.0.1:53");
    let error = lookup(&folder, fails).0.addresses("a..b").await.unwrap_err();
    assert_eq!(error.to_string(), "it is not a domain name");
}

#[tokio::test(start_paused = true)]
async fn use_vc_asks_over_tcp_only_if_allowed() {
    let folder = Folder::of_test();
    let answers = Script::Answers(ResponseCode::NO_ERROR, Duration::from_millis(1));
    for (has_tcp, transport) in [(true, Transport::Tcp), (false, Transport::Udp)] {
        let (mut lookup, servers) = lookup(&folder, answers);
        write(folder.path("resolv.conf"), "nameserver 10.0.0.1\noptions use-vc").unwrap();
        lookup.has_tcp = has_tcp;
        lookup.addresses("a.example").await.unwrap();
        assert!(servers.asked.lock().unwrap().iter().all(|(_, used)| *used == transport));
    }
}

#[test]
fn name_with_dot_is_looked_up_as_it_is_first() {
    let search = ["x".to_owned()];
    assert_eq!(candidates("a.b", &search), ["a.b", "a.b.x"]);
    assert_eq!(candidates("a", &search), ["a.x", "a"]);
    assert_eq!(candidates("a.", &search), ["a."]);
}

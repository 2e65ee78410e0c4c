//! Tests of every command of the plugin, against a scripted daemon.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;

use proptest::prelude::*;
use serde_json::Value;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use underpass_interception::Handover;

use super::*;
use crate::pods::cni::protocol::{Answer, Refusal};
use crate::pods::cni::testing::Folder;

/// The variables of a kubelet's ADD.
const KUBERNETES: [(&str, &str); 5] = [
    ("CNI_COMMAND", "ADD"),
    ("CNI_CONTAINERID", "9f86d081"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_NETNS", "/proc/self/ns/uts"),
    (
        "CNI_ARGS",
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=9f86d081;K8S_POD_UID=0c1f",
    ),
];

fn environment(changes: &[(&str, &str)]) -> Environment {
    let kept = KUBERNETES.iter().filter(|(name, _)| changes.iter().all(|(other, _)| other != name));
    kept.chain(changes).map(|(name, value)| (OsString::from(name), OsString::from(value))).collect()
}

fn previous() -> Value {
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "sandbox": "/run/netns/a"}],
        "ips": [{"interface": 0, "address": "10.0.0.1/24"}],
    })
}

fn config(changes: Value) -> String {
    let mut config = json!({
        "cniVersion": "1.1.0",
        "name": "pods",
        "type": "underpass-cni",
        "socket": "/nonexistent/underpass/cni.sock",
        "prevResult": previous(),
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config.to_string()
}

async fn outcome(changes: &[(&str, &str)], config: &str) -> Outcome {
    call(&environment(changes), config.as_bytes(), |path| Namespace::open(path)).await
}

/// The code, message and hint of a failed call.
async fn failure(changes: &[(&str, &str)], config: &str) -> (u64, String, String) {
    let outcome = outcome(changes, config).await;
    outcome.error.expect("an error");
    let error: Value = serde_json::from_str(&outcome.text).unwrap();
    let text = |key: &str| error[key].as_str().unwrap().to_owned();
    (error["code"].as_u64().unwrap(), text("msg"), text("details"))
}

/// A daemon that answers every request with the same answer.
struct Daemon {
    folder: Folder,
    requests: JoinHandle<Vec<(Request, Vec<OwnedFd>)>>,
}

impl Daemon {
    /// Answers `count` requests of one connection.
    fn answering(count: usize, answer: Answer) -> Self {
        let folder = Folder::new();
        let listener = UnixListener::bind(folder.path("cni.sock")).unwrap();
        let requests = tokio::spawn(async move {
            let connection = Handover::new(listener.accept().await.unwrap().0);
            let mut requests = Vec::new();
            for _ in 0..count {
                let (line, descriptors) = connection.receive().await.unwrap().unwrap();
                requests.push((Request::decode(&line).unwrap(), descriptors));
                connection.send(&answer.encode(), &[]).await.unwrap();
            }
            requests
        });
        Self { folder, requests }
    }

    fn config(&self, changes: Value) -> String {
        let mut config: Value = serde_json::from_str(&config(changes)).unwrap();
        config["socket"] = self.folder.path("cni.sock").to_str().into();
        config.to_string()
    }

    async fn requests(self) -> Vec<(Request, Vec<OwnedFd>)> {
        self.requests.await.unwrap()
    }
}

fn refusal(code: u32) -> Answer {
    let (message, hint) = ("the mesh is empty".to_owned(), "fill it".to_owned());
    Answer::Refused(Refusal { code, message, hint })
}

#[tokio::test]
async fn add_command_sends_facts_and_namespace_and_returns_previous_result() {
    let daemon = Daemon::answering(1, Answer::Done);
    let outcome = outcome(&[], &daemon.config(json!({}))).await;
    assert_eq!(outcome.text, previous().to_string());
    assert!(outcome.error.is_none());
    let requests = daemon.requests().await;
    let [(Request::Add(pod), descriptors)] = &requests[..] else { panic!("{requests:?}") };
    assert_eq!(descriptors.len(), 1);
    assert_eq!(pod.attachment.to_string(), "9f86d081:eth0");
    assert_eq!((pod.network.as_str(), &*pod.namespace_path), ("pods", "/proc/self/ns/uts"));
    assert_eq!(
        (&*pod.pod.namespace, &*pod.pod.name, pod.pod.uid.as_str()),
        ("shop", "web", "0c1f")
    );
    assert_eq!(pod.addresses, [std::net::IpAddr::from([10, 0, 0, 1])]);
}

/// A result with arbitrary order, numbers and white space.
fn result() -> impl Strategy<Value = String> {
    let number = prop_oneof![Just("1.50e3"), Just("1"), Just("-0"), Just("12345678901234567890")];
    let key = "[ -!#-\\[\\]-~]{0,8}";
    let entries = proptest::collection::vec((key, number, "[ \t\r\n]{0,3}"), 0..5);
    (entries, any::<bool>()).prop_map(|(entries, first)| {
        let ips = r#""ips": [ {"address":"10.0.0.1/24"}]"#.to_owned();
        let entry = |(key, number, space): &(String, &str, String)| {
            format!("{space}\"x{key}\"{space}:{space}{number}{space}")
        };
        let mut parts: Vec<_> = entries.iter().map(entry).collect();
        parts.insert(if first { 0 } else { parts.len() }, ips);
        format!("{{{}}}", parts.join(","))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn previous_result_is_returned_byte_for_byte(result in result()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let text = runtime.block_on(async {
            let daemon = Daemon::answering(1, Answer::Done);
            let config = daemon.config(json!({"prevResult": "HERE"})).replace("\"HERE\"", &result);
            let text = outcome(&[], &config).await.text;
            daemon.requests().await;
            text
        });
        prop_assert_eq!(text, result);
    }
}

#[tokio::test]
async fn refusal_by_the_daemon_becomes_the_plugins_result() {
    for code in [11, 101] {
        let daemon = Daemon::answering(1, refusal(code));
        let (found, message, hint) = failure(&[], &daemon.config(json!({}))).await;
        assert_eq!(found, u64::from(code));
        assert_eq!((&*message, &*hint), ("underpass: the mesh is empty", "fill it"));
        daemon.requests().await;
    }
}

#[tokio::test]
async fn add_fails_closed_while_the_daemon_is_down() {
    let (code, message, hint) = failure(&[], &config(json!({}))).await;
    assert_eq!(code, 11);
    assert_eq!(
        message,
        "underpass: the daemon cannot be reached at /nonexistent/underpass/cni.sock: No such file or directory (os error 2)"
    );
    assert!(hint.starts_with("start `underpass node` on this node"), "{hint}");
}

#[tokio::test]
async fn call_fails_if_the_daemon_ends_during_it() {
    let daemon = Daemon::answering(0, Answer::Done);
    let (code, message, _) = failure(&[], &daemon.config(json!({}))).await;
    assert_eq!(code, 11);
    assert!(message.ends_with("closed the connection without an answer"), "{message}");
    daemon.requests().await;
}

#[tokio::test(start_paused = true)]
async fn call_times_out_if_the_daemon_is_silent() {
    let folder = Folder::new();
    let socket = folder.path("cni.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let config = config(json!({"socket": socket.to_str(), "timeout": "7s"}));
    let (code, message, _) = failure(&[], &config).await;
    assert_eq!(code, 11);
    assert!(message.ends_with("did not answer within 7 s"), "{message}");
}

#[tokio::test]
async fn namespace_of_the_host_is_refused() {
    let variables = [("CNI_NETNS", "/proc/self/ns/net")];
    let (code, message, _) = failure(&variables, &config(json!({}))).await;
    assert_eq!(code, 101);
    assert_eq!(
        message,
        "underpass: CNI_NETNS /proc/self/ns/net is the host's own network namespace"
    );
}

#[tokio::test]
async fn malformed_environment_variable_is_named_in_the_error() {
    let long = "a".repeat(201);
    let cases: [(&[(&str, &str)], &str); 12] = [
        (&[("CNI_COMMAND", "")], "CNI_COMMAND is not set"),
        (
            &[("CNI_COMMAND", "add")],
            r#"CNI_COMMAND is invalid: "add" is not one of ADD, DEL, CHECK, STATUS, GC, VERSION"#,
        ),
        (&[("CNI_CONTAINERID", "")], "CNI_CONTAINERID is not set"),
        (
            &[("CNI_CONTAINERID", "../a")],
            r#"CNI_CONTAINERID is invalid: "../a" is not a container id"#,
        ),
        (&[("CNI_CONTAINERID", &long)], "CNI_CONTAINERID is invalid: "),
        (&[("CNI_IFNAME", "")], "CNI_IFNAME is not set"),
        (&[("CNI_IFNAME", "eth/0")], r#"CNI_IFNAME is invalid: "eth/0" is not an interface name"#),
        (&[("CNI_NETNS", "")], "CNI_NETNS is not set"),
        (&[("CNI_NETNS", "netns/a")], r#"CNI_NETNS is invalid: "netns/a" is not an absolute path"#),
        (&[("CNI_NETNS", "/nonexistent")], "CNI_NETNS /nonexistent cannot be opened"),
        (&[("CNI_ARGS", "A=1;B")], r#"CNI_ARGS is invalid: "B" is not KEY=VALUE"#),
        (
            &[("CNI_ARGS", "K8S_POD_NAMESPACE=a/b;K8S_POD_NAME=web")],
            r#"CNI_ARGS is invalid: "a/b" is not a namespace of a pod"#,
        ),
    ];
    for (variables, expected) in cases {
        let (code, message, _) = failure(variables, &config(json!({}))).await;
        assert_eq!(code, 4, "{message}");
        assert!(message.starts_with(&format!("underpass: {expected}")), "{message}");
    }
    let invalid = OsString::from_vec(vec![0xff]);
    let environment = [(OsString::from("CNI_COMMAND"), invalid)].into_iter().collect();
    let error = call(&environment, &b""[..], |path| Namespace::open(path)).await.error.unwrap();
    assert_eq!(error.to_string(), "CNI_COMMAND is invalid: it is not UTF-8");
}

#[tokio::test]
async fn malformed_configuration_key_is_named_in_the_error() {
    for (text, code, expected) in [
        (String::new(), 6, "the configuration is not JSON"),
        ("[]".to_owned(), 6, "the configuration is not JSON"),
        (
            config(json!({"cniVersion": "0.2.0"})),
            1,
            r#"the configuration has cniVersion "0.2.0", which is not one of 0.3.1, 0.4.0, 1.0.0, 1.1.0"#,
        ),
        (
            config(json!({"cniVersion": 1})),
            7,
            "the configuration is invalid: cniVersion: must be a string",
        ),
        (config(json!({"name": ""})), 7, "the name of the network is invalid"),
        (config(json!({"name": "a/b"})), 7, "the name of the network is invalid"),
        (
            config(json!({"socket": "cni.sock"})),
            7,
            "the configuration is invalid: socket: must be an absolute path",
        ),
        (
            config(json!({"timeout": "30"})),
            7,
            "the configuration is invalid: timeout: must be a duration up to 100s, such as 30s",
        ),
        (
            config(json!({"timeout": "10m"})),
            7,
            "the configuration is invalid: timeout: must be a duration up to 100s, such as 30s",
        ),
        (
            config(json!({"prevResult": null})),
            7,
            "the configuration is invalid: prevResult: is missing: the plugin must follow one that makes the pod's interface",
        ),
        (
            config(json!({"prevResult": "x"})),
            7,
            "the configuration is invalid: prevResult: is not a result of a plugin",
        ),
    ] {
        let (found, message, hint) = failure(&[], &text).await;
        assert_eq!(found, code, "{message}");
        assert!(message.starts_with(&format!("underpass: {expected}")), "{message}");
        assert!(!hint.is_empty());
    }
}

#[tokio::test]
async fn missing_and_contradictory_facts_return_a_retryable_error() {
    for (arguments, expected) in [
        ("", "the pod's namespace is unknown"),
        ("K8S_POD_NAMESPACE=shop", "the pod's name is unknown"),
        ("K8S_POD_NAMESPACE=;K8S_POD_NAME=web", "the pod's namespace is unknown"),
        (
            "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=other",
            "CNI_CONTAINERID is 9f86d081, but the K8S_POD_INFRA_CONTAINER_ID of CNI_ARGS is other",
        ),
    ] {
        let (code, message, hint) = failure(&[("CNI_ARGS", arguments)], &config(json!({}))).await;
        assert_eq!((code, message), (11, format!("underpass: {expected}")));
        assert!(!hint.is_empty());
    }
}

#[tokio::test]
async fn pod_names_come_from_configuration_if_runtime_names_no_pod() {
    let daemon = Daemon::answering(1, Answer::Done);
    let args = json!({"args": {"underpass": {"namespace": "shop", "name": "db"}, "other": 1}});
    let config = daemon.config(args);
    outcome(&[("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=web")], &config).await;
    let requests = daemon.requests().await;
    let [(Request::Add(pod), _)] = &requests[..] else { panic!("{requests:?}") };
    assert_eq!((&*pod.pod.namespace, &*pod.pod.name), ("shop", "web"));
    assert_eq!(
        pod.pod.uid.as_str(),
        "9f86d081",
        "the id of the container serves as uid of the pod"
    );
    let wrong = config.replace("\"db\"", "1");
    let (code, message, _) = failure(&[("CNI_ARGS", "")], &wrong).await;
    assert_eq!(code, 7);
    assert!(message.contains("args.underpass: must be an object of strings"), "{message}");
}

#[tokio::test]
async fn delete_command_succeeds_despite_any_failure() {
    let delete = ("CNI_COMMAND", "DEL");
    for config in [config(json!({})), "{".to_owned(), config(json!({"prevResult": null}))] {
        let outcome = outcome(&[delete, ("CNI_NETNS", ""), ("CNI_ARGS", "")], &config).await;
        assert!(outcome.error.is_none() && outcome.text.is_empty(), "{outcome:?}");
    }
    let (code, _, _) = failure(&[delete, ("CNI_CONTAINERID", "")], &config(json!({}))).await;
    assert_eq!(code, 4, "there is nothing to delete");
    let daemon = Daemon::answering(1, Answer::Done);
    outcome(&[delete, ("CNI_NETNS", "")], &daemon.config(json!({"prevResult": null}))).await;
    let requests = daemon.requests().await;
    let [(Request::Delete(attachment), _)] = &requests[..] else { panic!("{requests:?}") };
    assert_eq!(attachment.to_string(), "9f86d081:eth0");
}

#[tokio::test]
async fn check_command_queries_the_daemon() {
    let check = ("CNI_COMMAND", "CHECK");
    let daemon = Daemon::answering(1, Answer::Done);
    let outcome = outcome(&[check], &daemon.config(json!({}))).await;
    assert!(outcome.error.is_none() && outcome.text.is_empty(), "{outcome:?}");
    let requests = daemon.requests().await;
    assert!(matches!(&requests[..], [(Request::Check(_), descriptors)] if descriptors.len() == 1));
    let (code, message, _) = failure(&[check], &config(json!({"cniVersion": "0.3.1"}))).await;
    assert_eq!((code, &*message), (1, "underpass: version 0.3.1 of CNI has no command CHECK"));
    let (code, _, _) = failure(&[check], &config(json!({"prevResult": null}))).await;
    assert_eq!(code, 7);
}

#[tokio::test]
async fn status_command_fails_with_code_50_unless_the_daemon_is_ready() {
    let status = ("CNI_COMMAND", "STATUS");
    let variables = [status, ("CNI_CONTAINERID", ""), ("CNI_IFNAME", ""), ("CNI_NETNS", "")];
    let daemon = Daemon::answering(1, Answer::Done);
    let outcome = outcome(&variables, &daemon.config(json!({"prevResult": null}))).await;
    assert!(outcome.error.is_none() && outcome.text.is_empty(), "{outcome:?}");
    daemon.requests().await;
    let (code, message, hint) = failure(&variables, &config(json!({}))).await;
    assert_eq!(code, 50);
    assert!(message.contains("cannot be reached"), "{message}");
    assert!(hint.starts_with("start `underpass node`"), "{hint}");
    let daemon = Daemon::answering(1, refusal(50));
    let (code, message, _) = failure(&variables, &daemon.config(json!({}))).await;
    assert_eq!((code, &*message), (50, "underpass: pods cannot be added: the mesh is empty"));
    daemon.requests().await;
    let (code, _, _) = failure(&variables, &config(json!({"cniVersion": "1.0.0"}))).await;
    assert_eq!(code, 1);
}

#[tokio::test]
async fn garbage_collection_sends_remaining_attachments_in_several_messages() {
    let variables = [("CNI_COMMAND", "GC"), ("CNI_CONTAINERID", ""), ("CNI_IFNAME", "")];
    let valid: Vec<_> =
        (0..30).map(|i| json!({"containerID": format!("c{i}"), "ifname": "eth0"})).collect();
    let daemon = Daemon::answering(3, Answer::Done);
    let config_of = |valid: &Value| json!({"cni.dev/valid-attachments": valid, "prevResult": null});
    let outcome_of = outcome(&variables, &daemon.config(config_of(&valid.into()))).await;
    assert!(outcome_of.error.is_none() && outcome_of.text.is_empty(), "{outcome_of:?}");
    let mut named = 0;
    let requests = daemon.requests().await;
    for (index, (request, _)) in requests.iter().enumerate() {
        let Request::Collect { network, valid, last } = request else { panic!("{request:?}") };
        assert_eq!((network.as_str(), *last), ("pods", index == 2));
        named += valid.len();
    }
    assert_eq!(named, 30);
    let daemon = Daemon::answering(1, Answer::Done);
    outcome(&variables, &daemon.config(config_of(&json!([])))).await;
    assert_eq!(daemon.requests().await.len(), 1, "an empty list has a line too");
    for (changes, expected) in [
        (json!({}), "is missing"),
        (config_of(&json!("x")), "must be a list of attachments"),
        (config_of(&json!([{"containerID": "../a", "ifname": "eth0"}])), "is not a container id"),
    ] {
        let (code, message, _) = failure(&variables, &config(changes)).await;
        assert_eq!(code, 7);
        assert!(
            message.contains("cni.dev/valid-attachments: ") && message.contains(expected),
            "{message}"
        );
    }
}

#[tokio::test]
async fn version_lists_supported_versions() {
    for (config, version) in [
        (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"),
        (r#"{"cniVersion":"9.0.0"}"#, "1.1.0"),
        ("", "1.1.0"),
    ] {
        let outcome = outcome(&[("CNI_COMMAND", "VERSION")], config).await;
        let result: Value = serde_json::from_str(&outcome.text).unwrap();
        let supported = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
        assert_eq!(result, json!({"cniVersion": version, "supportedVersions": supported}));
    }
}

#[tokio::test]
async fn error_results_have_the_version_of_the_configuration() {
    for (config, version) in
        [(config(json!({"cniVersion": "0.4.0"})), "0.4.0"), ("{".to_owned(), "1.1.0")]
    {
        let text = outcome(&[], &config).await.text;
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["cniVersion"], version);
    }
}

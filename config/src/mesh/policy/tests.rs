//! Tests of rules: a truth table, and a second evaluator after Istio's and ztunnel's documentation.

use proptest::prelude::*;

use super::*;
use crate::mesh::Mesh;

/// The tested connections: name, identity, source, destination.
const CONNECTIONS: &[(&str, Option<&str>, &str, &str)] = &[
    ("web", Some("spiffe://td/ns/shop/sa/web"), "10.0.0.1", "10.0.0.9:80"),
    ("foreign", Some("spiffe://other/ns/shop/sa/web"), "10.0.0.2", "10.0.0.9:80"),
    ("teller", Some("spiffe://td/ns/bank/sa/teller"), "10.1.0.1", "10.0.0.9:8080"),
    ("odd", Some("spiffe://td/some/path"), "10.0.0.3", "10.0.0.8:80"),
    ("plain", None, "10.0.0.4", "10.0.0.9:80"),
    ("web6", Some("spiffe://td/ns/shop/sa/web"), "fd00::1", "[fd00::9]:80"),
    ("mapped", None, "::ffff:10.1.0.4", "[::ffff:10.0.0.8]:8080"),
];

const ALL: &str = "web foreign teller odd plain web6 mapped";
const PEERS: &str = "web foreign teller odd web6";

/// Rules, and the names of the connections that they match.
const TRUTH_TABLE: &[(&str, &str)] = &[
    // Empty rules, clauses and matches.
    ("[]", ""),
    ("[[]]", ALL),
    ("[[[]]]", ALL),
    ("[[[{}]]]", ""),
    ("[[[{}, {destinationPorts: [8080]}]]]", "teller mapped"),
    ("[[[], [{}]]]", ""),
    ("[[[{}]], []]", ALL),
    ("[[[{principals: []}]]]", ""),
    ("[[[{notPrincipals: [], destinationPorts: [8080]}]]]", "teller mapped"),
    // Rules, matches and values are alternatives; clauses and fields are conjunctions.
    ("[[[{destinationPorts: [8080]}]], [[{sourceIps: [10.0.0.1]}]]]", "web teller mapped"),
    ("[[[{destinationPorts: [8080]}], [{sourceIps: [10.1.0.1]}]]]", "teller"),
    ("[[[{destinationPorts: [8080]}], []]]", "teller mapped"),
    ("[[[{destinationPorts: [8080]}, {sourceIps: [10.0.0.1]}]]]", "web teller mapped"),
    ("[[[{destinationPorts: [8080], sourceIps: [10.1.0.1]}]]]", "teller"),
    ("[[[{sourceIps: [10.1.0.1, 10.0.0.1]}]]]", "web teller"),
    ("[[[{notSourceIps: [10.1.0.1, 10.0.0.1]}]]]", "foreign odd plain web6 mapped"),
    ("[[[{sourceIps: [10.0.0.0/16], notSourceIps: [10.0.0.2, 10.0.0.3]}]]]", "web plain"),
    ("[[[{sourceIps: [10.0.0.1], notSourceIps: [10.0.0.0/8]}]]]", ""),
    // Namespaces: empty without an identity, or with an identity of another form.
    ("[[[{namespaces: [!Exact shop]}]]]", "web foreign web6"),
    ("[[[{notNamespaces: [!Exact shop]}]]]", "teller odd plain mapped"),
    ("[[[{namespaces: [!Prefix s]}]]]", "web foreign web6"),
    ("[[[{namespaces: [!Suffix k]}]]]", "teller"),
    ("[[[{namespaces: [!Presence []]}]]]", "web foreign teller web6"),
    ("[[[{notNamespaces: [!Presence []]}]]]", "odd plain mapped"),
    ("[[[{namespaces: [!Exact '']}]]]", "odd plain mapped"),
    ("[[[{namespaces: [!Prefix '']}]]]", ALL),
    ("[[[{namespaces: [!Exact bank, !Suffix op]}]]]", "web foreign teller web6"),
    ("[[[{namespaces: [!Exact hop]}]]]", ""),
    ("[[[{namespaces: [!Prefix s], notNamespaces: [!Exact shop]}]]]", ""),
    // Service accounts, in any trust domain.
    ("[[[{serviceAccounts: [{namespace: shop, serviceAccount: web}]}]]]", "web foreign web6"),
    (
        "[[[{notServiceAccounts: [{namespace: shop, serviceAccount: web}]}]]]",
        "teller odd plain mapped",
    ),
    ("[[[{serviceAccounts: [{namespace: bank, serviceAccount: web}]}]]]", ""),
    ("[[[{serviceAccounts: [{namespace: shop, serviceAccount: teller}]}]]]", ""),
    (
        "[[[{serviceAccounts: [{namespace: shop, serviceAccount: web}, {namespace: bank, serviceAccount: teller}]}]]]",
        "web foreign teller web6",
    ),
    // Principals: the identity without the scheme, in one trust domain.
    ("[[[{principals: [!Exact td/ns/shop/sa/web]}]]]", "web web6"),
    ("[[[{notPrincipals: [!Exact td/ns/shop/sa/web]}]]]", "foreign teller odd plain mapped"),
    ("[[[{principals: [!Exact td/some/path]}]]]", "odd"),
    ("[[[{principals: [!Prefix td/]}]]]", "web teller odd web6"),
    ("[[[{notPrincipals: [!Prefix td/]}]]]", "foreign plain mapped"),
    ("[[[{principals: [!Suffix /sa/web]}]]]", "web foreign web6"),
    ("[[[{notPrincipals: [!Suffix /sa/web]}]]]", "teller odd plain mapped"),
    ("[[[{principals: [!Presence []]}]]]", PEERS),
    ("[[[{notPrincipals: [!Presence []]}]]]", "plain mapped"),
    ("[[[{principals: [!Prefix '']}]]]", PEERS),
    ("[[[{principals: [!Exact '']}]]]", ""),
    ("[[[{notPrincipals: [!Exact '']}]]]", ALL),
    ("[[[{principals: [!Exact TD/ns/shop/sa/web]}]]]", ""),
    ("[[[{principals: [!Presence []], notPrincipals: [!Prefix td/]}]]]", "foreign"),
    // Sources.
    ("[[[{sourceIps: [10.0.0.0/16]}]]]", "web foreign odd plain"),
    ("[[[{notSourceIps: [10.0.0.0/16]}]]]", "teller web6 mapped"),
    ("[[[{sourceIps: [10.1.0.4/32]}]]]", "mapped"),
    ("[[[{sourceIps: ['::ffff:10.1.0.0/112']}]]]", "teller mapped"),
    ("[[[{sourceIps: [0.0.0.0/0]}]]]", "web foreign teller odd plain mapped"),
    ("[[[{sourceIps: ['::/0']}]]]", "web6"),
    ("[[[{sourceIps: ['fd00::/8']}]]]", "web6"),
    ("[[[{sourceIps: ['fd00::1']}]]]", "web6"),
    ("[[[{notSourceIps: ['fd00::/8']}]]]", "web foreign teller odd plain mapped"),
    ("[[[{sourceIps: [10.0.0.1/16]}]]]", "web foreign odd plain"),
    ("[[[{sourceIps: [10.0.0.0/31, 10.0.0.2/31, 10.1.0.0/16]}]]]", "web foreign teller odd mapped"),
    // Destinations.
    ("[[[{destinationIps: [10.0.0.9]}]]]", "web foreign teller plain"),
    ("[[[{notDestinationIps: [10.0.0.9]}]]]", "odd web6 mapped"),
    ("[[[{destinationIps: [10.0.0.8, 'fd00::/8']}]]]", "odd web6 mapped"),
    ("[[[{notDestinationIps: ['fd00::/8', 10.0.0.8/31]}]]]", ""),
    ("[[[{destinationPorts: [8080]}]]]", "teller mapped"),
    ("[[[{notDestinationPorts: [8080]}]]]", "web foreign odd plain web6"),
    ("[[[{destinationPorts: [1, 8080, 80]}]]]", ALL),
    ("[[[{notDestinationPorts: [8080, 80]}]]]", ""),
    ("[[[{destinationPorts: [80], notDestinationPorts: [80]}]]]", ""),
    // Several conditions together.
    (
        "[[[{namespaces: [!Exact shop], principals: [!Prefix td/], sourceIps: [10.0.0.0/8], destinationPorts: [80]}]]]",
        "web",
    ),
    ("[[[{destinationPorts: [80], notPrincipals: [!Presence []]}]]]", "plain"),
    // Values without tags.
    ("[[[{namespaces: [{exact: shop}]}]]]", "web foreign web6"),
    ("[[[{principals: [{prefix: td/ns}, {suffix: path}]}]]]", "web teller odd web6"),
    ("[[[{principals: [{presence: true}]}]]]", PEERS),
    ("[[[{principals: [!Presence ]}]]]", PEERS),
];

/// Reads `rules` from a mesh file.
fn policy(rules: &str) -> Policy {
    let text = format!(
        "policies:\n- {{name: p, namespace: n, scope: Global, action: Allow, rules: {rules}}}\n"
    );
    let mesh =
        Mesh::from_text("mesh.yaml", &text).unwrap_or_else(|error| panic!("{rules}: {error}"));
    Policy::clone(mesh.policies("", None).iter().next().unwrap())
}

#[test]
fn policy_rules_match_connections_of_truth_table() {
    for (rules, expected) in TRUTH_TABLE {
        let policy = policy(rules);
        let mut matched = Vec::new();
        for (name, identity, source, destination) in CONNECTIONS {
            let identity = identity.map(|text| text.parse().unwrap());
            let connection = Connection {
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
                identity: identity.as_ref(),
                aliases: &[],
            };
            if policy.matches(&connection) {
                matched.push(*name);
            }
        }
        assert_eq!(matched.join(" "), *expected, "{rules}");
    }
}

/// Rules, and the trust domains in which they match the service account web of the namespace shop.
/// `old` is an alias of `td`.
const ALIAS_TABLE: &[(&str, &str)] = &[
    // The policy may use either name of the peer's trust domain.
    ("{principals: [!Exact td/ns/shop/sa/web]}", "td old"),
    ("{principals: [!Exact old/ns/shop/sa/web]}", "td old"),
    ("{notPrincipals: [!Exact td/ns/shop/sa/web]}", ""),
    ("{notPrincipals: [!Exact old/ns/shop/sa/web]}", ""),
    // Identities of another account or trust domain.
    ("{principals: [!Exact td/ns/shop/sa/we]}", ""),
    ("{principals: [!Exact old/ns/shop/sa/webb]}", ""),
    ("{principals: [!Exact other/ns/shop/sa/web]}", ""),
    ("{notPrincipals: [!Exact other/ns/shop/sa/web]}", "td old"),
    // Prefixes: a part of the trust domain, all of it, and more.
    ("{principals: [!Prefix t]}", "td old"),
    ("{principals: [!Prefix old]}", "td old"),
    ("{principals: [!Prefix old/]}", "td old"),
    ("{principals: [!Prefix td/ns/shop]}", "td old"),
    ("{principals: [!Prefix td/ns/bank]}", ""),
    ("{principals: [!Prefix oldest/]}", ""),
    ("{notPrincipals: [!Prefix old/]}", ""),
    ("{notPrincipals: [!Prefix other/]}", "td old"),
    ("{principals: [!Prefix '']}", "td old"),
    // Suffixes: without the trust domain, with its end, and with all of it.
    ("{principals: [!Suffix /ns/shop/sa/web]}", "td old"),
    ("{principals: [!Suffix ld/ns/shop/sa/web]}", "td old"),
    ("{principals: [!Suffix d/ns/shop/sa/web]}", "td old"),
    ("{principals: [!Suffix old/ns/shop/sa/web]}", "td old"),
    ("{principals: [!Suffix told/ns/shop/sa/web]}", ""),
    ("{notPrincipals: [!Suffix old/ns/shop/sa/web]}", ""),
    // Conditions without a trust domain.
    ("{principals: [!Presence []]}", "td old"),
    ("{notPrincipals: [!Presence []]}", ""),
    ("{namespaces: [!Exact shop]}", "td old"),
    ("{notNamespaces: [!Exact shop]}", ""),
    ("{serviceAccounts: [{namespace: shop, serviceAccount: web}]}", "td old"),
    ("{notServiceAccounts: [{namespace: shop, serviceAccount: web}]}", ""),
    // Several values.
    ("{principals: [!Exact td/x, !Exact old/ns/shop/sa/web]}", "td old"),
    ("{principals: [!Presence []], notPrincipals: [!Exact old/ns/shop/sa/web]}", ""),
];

#[test]
fn principals_match_peers_under_every_alias() {
    let aliases: Vec<TrustDomain> =
        ["td", "old"].iter().map(|domain| domain.parse().unwrap()).collect();
    for (rule, expected) in ALIAS_TABLE {
        let policy = policy(&format!("[[[{rule}]]]"));
        let matches = |domain: &&str| {
            let identity = format!("spiffe://{domain}/ns/shop/sa/web").parse().unwrap();
            policy.matches(&Connection {
                source: [10, 0, 0, 1].into(),
                destination: ([10, 0, 0, 9], 80).into(),
                identity: Some(&identity),
                aliases: &aliases,
            })
        };
        let matched: Vec<_> = ["td", "old"].into_iter().filter(matches).collect();
        assert_eq!(matched.join(" "), *expected, "{rule}");
    }
}

#[test]
fn identity_of_other_form_has_no_service_account() {
    let policy = policy("[[[{serviceAccounts: [{namespace: shop, serviceAccount: web/x}]}]]]");
    let identity = "spiffe://td/ns/shop/sa/web/x".parse().unwrap();
    let connection = Connection {
        source: [10, 0, 0, 1].into(),
        destination: ([10, 0, 0, 9], 80).into(),
        identity: Some(&identity),
        aliases: &[],
    };
    assert!(!policy.matches(&connection));
}

#[test]
fn sets_of_different_snapshots_are_equal_if_they_decide_equally() {
    let mesh = |rules: &str| {
        let text = format!(
            "policies: [{{name: p, namespace: n, scope: Namespace, action: Deny, rules: {rules}}}]"
        );
        Mesh::from_text("mesh.yaml", &text).unwrap()
    };
    let (one, same, other) = (
        mesh("[[[{sourceIps: [10.0.0.0/8]}]]]"),
        mesh("[[[{sourceIps: [10.128.0.0/9, 10.0.0.0/9]}]]]"),
        mesh("[[[{notSourceIps: [10.0.0.0/8]}]]]"),
    );
    assert_eq!(one.policies("n", None), one.policies("n", None));
    assert_eq!(one.policies("n", None), same.policies("n", None));
    assert_ne!(one.policies("n", None), other.policies("n", None));
    assert_ne!(one.policies("n", None), one.policies("m", None));
}

/// One field of a match: its positive and negative values.
type WrittenField = (Vec<Values>, Vec<Values>);

/// Evaluates Istio's definition: rules, matches and values are alternatives; clauses and fields are
/// conjunctions; a field needs a positive match and no negative one.
fn matches_by_definition(
    rules: &[Vec<Vec<Vec<WrittenField>>>],
    connection: &Connection<'_>,
) -> bool {
    let field = |(positive, negative): &WrittenField| {
        (positive.is_empty() || positive.iter().any(|value| matches_value(value, connection)))
            && !negative.iter().any(|value| matches_value(value, connection))
    };
    let is_empty =
        |fields: &[WrittenField]| fields.iter().all(|(p, n)| p.is_empty() && n.is_empty());
    let one = |fields: &Vec<WrittenField>| !is_empty(fields) && fields.iter().all(field);
    let clause = |matches: &Vec<Vec<WrittenField>>| matches.is_empty() || matches.iter().any(one);
    rules.iter().any(|rule| rule.iter().all(clause))
}

/// Whether the single value matches.
fn matches_value(value: &Values, connection: &Connection<'_>) -> bool {
    let text = |expected: &StringMatch, text: &str| match expected {
        StringMatch::Exact(exact) => text == exact,
        StringMatch::Prefix(prefix) => text.starts_with(prefix.as_str()),
        StringMatch::Suffix(suffix) => text.ends_with(suffix.as_str()),
        StringMatch::Presence => !text.is_empty(),
    };
    let parts = connection.identity.and_then(|identity| identity.namespace_and_service_account());
    match value {
        Values::Namespaces(one) => text(&one[0], parts.map_or("", |(namespace, _)| namespace)),
        Values::ServiceAccounts(one) => parts == Some((&one[0].0, &one[0].1)),
        Values::Principals(one) => connection.identity.is_some_and(|identity| {
            let own = std::iter::once(identity.trust_domain());
            own.chain(connection.aliases)
                .any(|domain| text(&one[0], &format!("{domain}{}", identity.path())))
        }),
        Values::SourceIps(one) => one[0].contains(&connection.source),
        Values::DestinationIps(one) => one[0].contains(&connection.destination.ip()),
        Values::DestinationPorts(one) => one[0] == connection.destination.port(),
    }
}

/// Merges the values of one field into one condition.
fn merged_values(values: &[Values]) -> Option<Values> {
    values.iter().cloned().reduce(|all, value| match (all, value) {
        (Values::Namespaces(all), Values::Namespaces(one)) => {
            Values::Namespaces([all, one].concat())
        }
        (Values::ServiceAccounts(all), Values::ServiceAccounts(one)) => {
            Values::ServiceAccounts([all, one].concat())
        }
        (Values::Principals(all), Values::Principals(one)) => {
            Values::Principals([all, one].concat())
        }
        (Values::SourceIps(all), Values::SourceIps(one)) => Values::SourceIps([all, one].concat()),
        (Values::DestinationIps(all), Values::DestinationIps(one)) => {
            Values::DestinationIps([all, one].concat())
        }
        (Values::DestinationPorts(all), Values::DestinationPorts(one)) => {
            Values::DestinationPorts([all, one].concat())
        }
        (all, other) => panic!("{all:?} and {other:?} are of different fields"),
    })
}

fn compiled(rules: &[Vec<Vec<Vec<WrittenField>>>]) -> Rules {
    let one = |fields: &Vec<WrittenField>| -> Match {
        let conditions = fields.iter().flat_map(|(positive, negative)| {
            [
                merged_values(positive).map(Condition::any_of),
                merged_values(negative).map(Condition::none_of),
            ]
        });
        conditions.flatten().collect()
    };
    let clause = |matches: &Vec<Vec<WrittenField>>| matches.iter().map(one).collect();
    let rules: Vec<Vec<Vec<Match>>> =
        rules.iter().map(|rule| rule.iter().map(clause).collect()).collect();
    Rules::from(rules)
}

fn string_match() -> impl Strategy<Value = StringMatch> {
    let text = "[abt/]{0,2}|td/ns/[ab]|[ab]";
    prop_oneof![
        text.prop_map(StringMatch::Exact),
        "td/ns/[ab]/sa/[ab]".prop_map(StringMatch::Exact),
        text.prop_map(StringMatch::Prefix),
        text.prop_map(StringMatch::Suffix),
        Just(StringMatch::Presence),
    ]
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0..4u8, 0..4u8).prop_map(|(c, d)| IpAddr::from([10, 0, c << 6, d])),
        (0..4u16, 0..4u16).prop_map(|(g, h)| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, g << 14, h])),
    ]
}

fn range() -> impl Strategy<Value = ipnet::IpNet> {
    (address(), prop_oneof![Just(0u8), 8..12u8, 22..=32u8, 110..=128u8]).prop_map(
        |(address, bits)| {
            let most = if address.is_ipv4() { 32 } else { 128 };
            ipnet::IpNet::new(address, bits.min(most)).unwrap()
        },
    )
}

/// A field with separate values.
fn field() -> impl Strategy<Value = WrittenField> {
    fn both<T: Clone + fmt::Debug>(
        value: impl Strategy<Value = T>,
        wrap: fn(Vec<T>) -> Values,
    ) -> impl Strategy<Value = WrittenField> {
        let one = value.prop_map(move |value| wrap(vec![value]));
        let list = proptest::collection::vec(one, 0..6);
        (list, 0..3usize).prop_map(|(values, negative)| {
            let (negative, positive) = values.split_at(negative.min(values.len()));
            (positive.to_vec(), negative.to_vec())
        })
    }
    prop_oneof![
        both(string_match(), Values::Namespaces),
        both(("[ab]", "[ab]"), Values::ServiceAccounts),
        both(string_match(), Values::Principals),
        both(range(), Values::SourceIps),
        both(range(), Values::DestinationIps),
        both(1..4u16, Values::DestinationPorts),
    ]
}

fn rules() -> impl Strategy<Value = Vec<Vec<Vec<Vec<WrittenField>>>>> {
    use proptest::collection::vec;
    vec(vec(vec(vec(field(), 0..3), 0..3), 0..3), 0..4)
}

fn identity() -> impl Strategy<Value = Option<SpiffeId>> {
    let text = prop_oneof![
        "spiffe://(td|t)/ns/[ab]{1,2}/sa/[ab]{1,2}",
        "spiffe://td(/[ab]){0,2}",
        "spiffe://td/ns/[ab]"
    ];
    proptest::option::weighted(0.8, text.prop_map(|text| text.parse().unwrap()))
}

proptest! {
    #[test]
    fn compiled_rules_agree_with_definition(
        rules in rules(),
        connections in proptest::collection::vec((identity(), address(), address(), 1..4u16), 16),
        aliases in proptest::collection::vec("td|t|[ab]", 0..3),
    ) {
        let aliases: Vec<TrustDomain> = aliases.iter().map(|one| one.parse().unwrap()).collect();
        let compiled = compiled(&rules);
        for (identity, source, destination, port) in &connections {
            let connection = Connection {
                source: *source,
                destination: SocketAddr::new(*destination, *port),
                identity: identity.as_ref(),
                aliases: &aliases,
            };
            prop_assert_eq!(compiled.matches(&connection), matches_by_definition(&rules, &connection), "{:?}", connection);
        }
    }
}

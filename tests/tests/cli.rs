//! Tests of the command line without namespaces: help, exit codes, and files that commands create.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use underpass_tests::binary;

/// A folder in which the commands of one test run.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("underpass-cli-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).unwrap();
    }

    fn mode(&self, name: &str) -> u32 {
        fs::metadata(self.0.join(name)).unwrap().permissions().mode() & 0o777
    }

    /// Runs `underpass` with space-separated arguments.
    fn underpass(&self, arguments: &str) -> Answer {
        self.run(binary(), arguments)
    }

    /// Runs the folder's copy of `underpass` as an unprivileged user.
    fn unprivileged(&self, arguments: &str) -> Answer {
        let mut command = Command::new(self.0.join("underpass"));
        if fs::metadata(&self.0).unwrap().uid() == 0 {
            command.uid(65534).gid(65534);
        }
        self.answer(command, arguments)
    }

    fn run(&self, program: impl AsRef<Path>, arguments: &str) -> Answer {
        self.answer(Command::new(program.as_ref()), arguments)
    }

    fn answer(&self, mut command: Command, arguments: &str) -> Answer {
        command.args(arguments.split_whitespace()).current_dir(&self.0);
        // This variable of the test has the prefix of settings, and would be rejected as unknown.
        let output = command.env_remove("UNDERPASS_SKIP_NAMESPACES").output();
        let missing = "is the program installed? openssl is in Debian's package openssl";
        Answer::from(output.unwrap_or_else(|error| unreachable!("{command:?}: {error}: {missing}")))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

struct Answer {
    code: Option<i32>,
    out: String,
    err: String,
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Answer {
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{}", self.out);
        self.out
    }

    /// The error of a command that must have failed with `code`, without output.
    #[track_caller]
    fn fails(self, code: i32) -> String {
        assert_eq!((self.code, self.out.as_str()), (Some(code), ""), "{}", self.err);
        self.err
    }
}

/// The subcommands that a help text lists, except `help`.
fn subcommands(help: &str) -> Vec<String> {
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    listed
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

#[test]
fn help_of_every_command_has_example() {
    let folder = Folder::new("help");
    let mut commands = vec![String::new()];
    let mut seen = 0;
    while let Some(command) = commands.pop() {
        let help = folder.underpass(&format!("{command} --help")).ok();
        let below = subcommands(&help);
        if below.is_empty() {
            let example = format!("Example:\n  underpass{command}");
            let from_outside = format!("underpass{command}");
            let shown =
                help.split("Example:").nth(1).is_some_and(|text| text.contains(&from_outside));
            assert!(shown, "no {example:?} in\n{help}");
            seen += 1;
        }
        commands.extend(below.into_iter().map(|name| format!("{command} {name}")));
    }
    assert!(seen >= 14, "only {seen} commands");
}

#[test]
fn exit_code_distinguishes_failure_from_usage_error() {
    let folder = Folder::new("codes");
    let version = folder.underpass("--version").ok();
    let lines: Vec<_> = version.lines().collect();
    let commit = lines[0].strip_prefix(concat!("underpass ", env!("CARGO_PKG_VERSION")));
    let commit = commit.expect("a version").trim().trim_matches(['(', ')']);
    assert!(commit.chars().all(|c| c.is_ascii_hexdigit()), "{commit:?}");
    assert!(lines[1].starts_with("target: ") && lines[1].contains("-linux-"), "{version}");
    assert_eq!(lines[2..], ["features: none"]);
    assert_eq!(folder.underpass("").code, Some(2));
    for wrong in [
        "nonsense",
        "run --nonsense",
        "ca init",
        "ca issue --dir x --out y --spiffe-id nonsense",
        "config check --set a",
        "rules",
        "rules verify --format nft",
        "rules render --format tables",
        "rules explain --from app",
        "rules explain --from kernel --to 10.0.0.1:80",
        "rules render --set interception.profile=kuma",
        "rules render --profile osm --ingress",
        "rules remove --profile osm",
    ] {
        folder.underpass(wrong).fails(2);
    }
    let id = "spiffe://cluster.local/ns/default/sa/web";
    let error =
        folder.underpass(&format!("ca issue --dir nowhere --spiffe-id {id} --out web")).fails(1);
    assert!(error.starts_with("error: nowhere/ca.pem: "), "{error}");
    let hint = "hint: check that the file exists and is readable";
    assert_eq!(error.lines().nth(1), Some(hint), "{error}");
}

#[test]
fn unprivileged_user_can_render_but_not_install_rules() {
    let folder = Folder::new("unprivileged");
    // Copy the binary to a folder that every user can access, unlike a home directory.
    folder.run("cp", &format!("{} underpass", binary().display())).ok();
    for profile in ["ambient", "sidecar", "osm"] {
        let render = |format: &str| {
            folder.unprivileged(&format!("rules render --profile {profile} --format {format}")).ok()
        };
        assert!(render("nft").contains("add table inet underpass\n"), "{profile}");
        assert!(render("iptables").contains("*nat\n"), "{profile}");
        assert!(render("ip6tables").ends_with("COMMIT\n"), "{profile}");
        let json: serde_json::Value = serde_json::from_str(&render("json")).unwrap();
        assert!(json["rules"].as_array().is_some_and(|rules| rules.len() > 10), "{profile}");
        for options in ["", "--from app --to 10.1.0.2:80"] {
            folder.unprivileged(&format!("rules explain --profile {profile} {options}")).ok();
        }
    }
    for command in ["install", "verify", "watch"] {
        let error = folder.unprivileged(&format!("rules {command}")).fails(1);
        assert!(error.contains("NET_ADMIN is missing"), "{command}: {error}");
        // `verify` first reports that it uses defaults.
        let lines = if command == "verify" { 3 } else { 2 };
        assert_eq!(error.lines().count(), lines, "{command}: {error}");
    }
}

#[test]
fn wrong_option_of_rules_is_reported_with_its_key() {
    let folder = Folder::new("options");
    for (options, key) in [
        ("--outbound-exclude-ports 0", "interception.outbound.exclude_ports"),
        ("--outbound-include-cidrs 10.0.0.0/33", "interception.outbound.include_cidrs"),
        ("--inbound-exclude-interfaces lo", "interception.inbound.exclude_interfaces"),
        ("--profile osm --inbound-mode tproxy", "interception.inbound.mode"),
        ("--proxy-uids proxy", "interception.proxy_uids"),
    ] {
        let error = folder.underpass(&format!("rules render {options}")).fails(2);
        assert!(error.contains(key), "{options}: {error}");
    }
}

#[test]
fn openssl_verifies_issued_certificates() {
    let folder = Folder::new("ca");
    let id = "spiffe://example.org/ns/shop/sa/web";
    folder.underpass("ca init --dir ca --trust-domain example.org").ok();
    folder.underpass(&format!("ca issue --dir ca --spiffe-id {id} --out web --ttl 1h")).ok();
    assert_eq!(
        folder.run("openssl", "verify -x509_strict -CAfile ca/roots.pem web.pem").ok(),
        "web.pem: OK\n"
    );
    for purpose in ["sslclient", "sslserver"] {
        folder
            .run("openssl", &format!("verify -purpose {purpose} -CAfile ca/roots.pem web.pem"))
            .ok();
    }
    let text = folder.run("openssl", "x509 -in web.pem -noout -text").ok();
    for part in [
        &format!("URI:{id}"),
        "X509v3 Subject Alternative Name: critical",
        "CA:FALSE",
        "TLS Web Server Authentication, TLS Web Client Authentication",
        "Digital Signature",
        "id-ecPublicKey",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    // The certificate is valid for one hour, not for two.
    folder.run("openssl", "x509 -in web.pem -noout -checkend 3500").ok();
    assert_eq!(folder.run("openssl", "x509 -in web.pem -noout -checkend 7200").code, Some(1));
    let key = folder.run("openssl", "pkey -in web.key -pubout").ok();
    assert_eq!(key, folder.run("openssl", "x509 -in web.pem -noout -pubkey").ok());
}

#[test]
fn keys_are_private_and_authority_files_are_not_overwritten() {
    let folder = Folder::new("modes");
    folder.underpass("ca init --dir ca").ok();
    folder.underpass("ca issue --dir ca --spiffe-id spiffe://cluster.local/ns/a/sa/b --out b").ok();
    assert_eq!((folder.mode("ca/ca.key"), folder.mode("b.key")), (0o600, 0o600));
    assert_eq!((folder.mode("ca/roots.pem"), folder.mode("b.pem")), (0o644, 0o644));
    let before = fs::read(folder.0.join("ca/ca.key")).unwrap();
    let error = folder.underpass("ca init --dir ca").fails(1);
    assert!(error.contains("ca/ca.key: the file exists and is not overwritten"), "{error}");
    assert_eq!(fs::read(folder.0.join("ca/ca.key")).unwrap(), before);
    let foreign = "ca issue --dir ca --spiffe-id spiffe://elsewhere/ns/a/sa/b --out c";
    let error = folder.underpass(foreign).fails(1);
    assert!(error.contains("issues for trust domain cluster.local"), "{error}");
    assert!(!folder.0.join("c.pem").exists() && !folder.0.join("c.key").exists());
}

#[test]
fn config_check_lists_every_mistake_with_its_location() {
    let folder = Folder::new("check");
    folder.write(
        "bad.yaml",
        "proxy: {workers: none}\nmehs: {}\ntimeouts:\n  drain: 5\nidentity: {key: k}\n",
    );
    let error = folder.underpass("config check --config bad.yaml --set metrics.address=x").fails(2);
    for part in [
        "6 mistakes",
        "bad.yaml:1:",
        "proxy.workers",
        "did you mean mesh?",
        "bad.yaml:4:",
        "identity.certificate",
        "identity.roots",
        "metrics.address",
    ] {
        assert!(error.contains(part), "{part:?} is not in\n{error}");
    }
    folder.write("mesh.yaml", "workloads: [{name: a, workloadIps: [nowhere]}]\n");
    folder.write("good.yaml", "mesh: {file: mesh.yaml}\n");
    let error = folder.underpass("config check --config good.yaml").fails(2);
    assert!(
        error.contains("mesh.yaml:1:") && error.contains("workloads[0].workloadIps[0]"),
        "{error}"
    );
    folder.write("mesh.yaml", "workloads: [{name: a, workloadIps: [10.0.0.1]}]\n");
    let answer = folder.underpass("config check --config good.yaml");
    assert_eq!(
        (answer.code, &*answer.out),
        (Some(0), "ok; workloads: 1, services: 0, policies: 0\n")
    );
    for part in ["there is no certificate", "no workload \"default\""] {
        assert!(answer.err.contains(part), "{part:?} is not in\n{}", answer.err);
    }
}

#[test]
fn man_writes_every_referenced_page() {
    let folder = Folder::new("man");
    folder.underpass("man --dir pages").ok();
    let pages: Vec<_> =
        fs::read_dir(folder.0.join("pages")).unwrap().map(|page| page.unwrap().path()).collect();
    assert!(pages.len() >= 18, "{pages:?}");
    for page in &pages {
        let text = fs::read_to_string(page).unwrap().replace("\\-", "-");
        let named = text.split_whitespace().filter_map(|word| word.strip_suffix("(1)"));
        for name in named {
            let file = folder.0.join("pages").join(format!("{name}.1"));
            assert!(file.exists(), "{} names {name}(1)", page.display());
        }
    }
    assert!(folder.underpass("man rules verify").ok().contains("underpass-rules-verify"));
    folder.underpass("man nonsense").fails(2);
}

#[test]
fn rejects_wrong_ttl_and_names_units() {
    let folder = Folder::new("ttl");
    for command in
        ["ca issue --dir ca --spiffe-id spiffe://a/b --out x --ttl 30d", "ca issue --help"]
    {
        let answer = folder.underpass(command);
        let text = format!("{}{}", answer.out, answer.err);
        let words: Vec<_> = text.split_whitespace().collect();
        assert!(words.join(" ").contains("ms, s, m or h"), "{text}");
    }
}

/// A folder with a CA, a certificate of `a`, and settings that reference them.
fn with_certificate(name: &str) -> Folder {
    let folder = Folder::new(name);
    folder.underpass("ca init --dir ca").ok();
    folder.underpass(&format!("ca issue --dir ca --spiffe-id {A} --out a")).ok();
    folder.write(
        "a.yaml",
        "workload: {serviceAccount: a}\nidentity: {certificate: a.pem, key: a.key, roots: ca/roots.pem}\n",
    );
    folder
}

const A: &str = "spiffe://cluster.local/ns/default/sa/a";

#[test]
fn config_check_accepts_certificate_and_prints_its_lifetime() {
    let folder = with_certificate("check-certificate");
    let shown = folder.underpass("config check --config a.yaml").ok();
    assert!(shown.contains(&format!("certificate: {A}, expires in 23 h 59 min")), "{shown}");
    folder.write("local.yaml", "workload: {serviceAccount: a}\nidentity: {local_ca: ca}\n");
    let shown = folder.underpass("config check --config local.yaml").ok();
    assert!(shown.contains(&format!("certificate: {A}, expires in 23 h 59 min")), "{shown}");
}

#[test]
fn config_check_rejects_settings_that_fail_start() {
    let folder = with_certificate("check-refuses");
    folder.underpass("ca init --dir other").ok();
    folder.underpass(&format!("ca issue --dir other --spiffe-id {A} --out b")).ok();
    folder.underpass(&format!("ca issue --dir ca --spiffe-id {A} --ttl 1ms --out expired")).ok();
    let refused = [
        ("identity.certificate=nowhere.pem", "nowhere.pem: No such file"),
        ("identity.key=b.key", "the key does not belong to the certificate"),
        ("identity.roots=other/roots.pem", "the roots do not verify the certificate"),
        ("identity.roots=a.key", "no PEM section of a certificate"),
        ("trust.crls=nowhere.crl", "nowhere.crl: No such file"),
        ("trust.bundles=other.test=nowhere.pem", "nowhere.pem: No such file"),
        ("logging.filter=a=b=c", "logging.filter"),
        ("mesh.file=nowhere.yaml", "nowhere.yaml"),
        ("metrics.address=[::]:15021", "readiness.address"),
    ];
    for (setting, expected) in refused {
        let error =
            folder.underpass(&format!("config check --config a.yaml --set {setting}")).fails(2);
        assert!(error.contains(expected), "{setting}: {error}");
    }
    let expired = "--set identity.certificate=expired.pem --set identity.key=expired.key";
    let error = folder.underpass(&format!("config check --config a.yaml {expired}")).fails(2);
    assert!(error.contains("expired.pem: the certificate expired at"), "{error}");
    let foreign = "--set identity={local_ca:ca} --set workload.trustDomain=other.test";
    let error = folder.underpass(&format!("config check {foreign}"));
    assert_eq!(error.code, Some(2), "{}", error.err);
}

#[test]
fn config_check_lists_problems_of_settings_and_files_together() {
    let folder = with_certificate("check-all");
    folder.underpass("ca init --dir other").ok();
    folder.underpass(&format!("ca issue --dir other --spiffe-id {A} --out b")).ok();
    let error = folder
        .underpass(
            "config check --config a.yaml --set proxy.workers=none --set identity.key=b.key \
             --set identity.roots=other/roots.pem --set trust.crls=nowhere.crl --set mesh.file=nowhere.yaml",
        )
        .fails(2);
    for part in [
        "5 mistakes",
        "proxy.workers",
        "b.key: the key does not belong to the certificate",
        "a.pem: the roots do not verify the certificate",
        "nowhere.crl: No such file",
        "nowhere.yaml: cannot be read",
    ] {
        assert!(error.contains(part), "{part:?} is not in\n{error}");
    }
}

#[test]
fn config_check_prints_checked_files_or_nothing() {
    let folder = with_certificate("check-verbosity");
    let shown = folder.underpass("config check --config a.yaml --verbose").ok();
    assert!(shown.contains("checked identity.key: a.key\n"), "{shown}");
    assert_eq!(folder.underpass("config check --config a.yaml --quiet").ok(), "");
    folder.underpass("config check --quiet --verbose").fails(2);
}

#[test]
fn config_check_prints_json() {
    let folder = with_certificate("check-json");
    let json = |answer: &Answer| -> serde_json::Value { answer.out.parse().expect("JSON") };
    let good = folder.underpass("config check --config a.yaml -o json");
    assert_eq!((good.code, &json(&good)["ok"]), (Some(0), &true.into()), "{}", good.err);
    assert_eq!(json(&good)["certificate"]["spiffe_id"], A);
    let bad = folder.underpass("config check --config a.yaml -o json --set proxy.workers=none");
    let problem = &json(&bad)["problems"][0];
    assert_eq!((bad.code, &problem["key"]), (Some(2), &"proxy.workers".into()), "{problem}");
    let misspelt = folder.underpass("config check --config a.yaml -o json --set proxy.wokers=1");
    assert_eq!(json(&misspelt)["problems"][0]["hint"], "did you mean workers?", "{}", misspelt.out);
}

#[test]
fn config_check_warns_of_mistakes_that_do_not_fail_start() {
    let folder = with_certificate("check-warns");
    folder.underpass(&format!("ca issue --dir ca --spiffe-id {A} --ttl 10s --out short")).ok();
    folder
        .write("mesh.yaml", "workloads: [{name: a, serviceAccount: b, workloadIps: [10.0.0.1]}]\n");
    let mut command = Command::new(binary());
    command.env("UNDERPASS_WORKLOD_NAME", "x").env("UNDERPASS_CA_PORT", "tcp://10.96.0.9:15012");
    command.env("UNDERPASS_CONFIG", "a.yaml");
    let answer = folder.answer(command, "config check --set mesh.file=mesh.yaml");
    assert_eq!(answer.code, Some(0), "{}", answer.err);
    for part in [
        "did you mean UNDERPASS_WORKLOAD_NAME?",
        "has the identity spiffe://cluster.local/ns/default/sa/b in the file",
        "no `protocol: HBONE`",
    ] {
        assert!(answer.err.contains(part), "{part:?} is not in\n{}", answer.err);
    }
    assert!(!answer.err.contains("UNDERPASS_CA_PORT"), "{}", answer.err);
}

#[test]
fn config_show_prints_equivalent_settings_file() {
    let folder = Folder::new("show");
    let flags = "--set proxy.workers=3 --set timeouts.connect=250ms --set interception.on_exit=remove \
                 --set mesh.file=/m.yaml --set logging.filter=info,access=off --set workload.name=web";
    let shown = folder.underpass(&format!("config show {flags}")).ok();
    for part in ["workers: 3", "connect: 250ms", "on_exit: remove", "name: web"] {
        assert!(shown.contains(part), "{part:?} is not in\n{shown}");
    }
    folder.write("shown.yaml", &shown);
    assert_eq!(folder.underpass("config show --config shown.yaml").ok(), shown);
}

#[test]
fn readme_example_works_as_written() {
    let folder = Folder::new("readme");
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
    let commands = readme.lines().filter_map(|line| line.strip_prefix("underpass ca "));
    // `serve` runs until it is stopped.
    let commands: Vec<_> = commands.filter(|command| !command.starts_with("serve ")).collect();
    assert!(commands.len() >= 2, "{commands:?}");
    for command in commands {
        folder.underpass(&format!("ca {command}")).ok();
    }
    for block in readme.split("```yaml\n# ").skip(1) {
        let name = block.split([' ', ',', '\n', ':']).next().unwrap();
        let text = block.split("```").next().unwrap();
        folder.write(name, &format!("# {text}"));
    }
    // The README tells the reader to copy this file.
    fs::copy(folder.0.join("ca/roots.pem"), folder.0.join("roots.pem")).unwrap();
    folder.write("a.token", "token\n");
    let mesh = "ok; workloads: 2, services: 1, policies: 0\n";
    for (file, life) in
        [("a", Some("23 h 59 min")), ("underpass", None), ("files", Some("29 d 23 h"))]
    {
        let certificate = |life| format!("certificate: {A}, expires in {life}\n");
        let expected = format!("{mesh}{}", life.map(certificate).unwrap_or_default());
        let shown = folder.underpass(&format!("config check --config {file}.yaml")).ok();
        assert_eq!(shown, expected, "{file}.yaml");
    }
    let clients = folder.0.join("clients.yaml");
    assert!(clients.exists(), "the README example creates no clients.yaml");
}

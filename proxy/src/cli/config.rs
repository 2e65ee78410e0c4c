//! `underpass config`: checks or shows the settings and the files that they name.

use std::borrow::Cow;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use serde_json::json;
use tokio::net::TcpStream;
use underpass_config::{
    ConfigErrors, Hint, IdentitySettings, Mesh, MeshSize, Problem, Protocol, Reference, Settings,
    SpireApi, reference,
};
use underpass_hbone::{
    ControlPlaneClient, Credentials, Dial, FileSource, HboneError, Identity, IstioCa,
    LocalAuthority, Trust,
};

use super::print;
use super::rules::Output;
use super::run::SettingsArguments;
use crate::error::chain;
use crate::process::command_error::CommandError;
use crate::process::logging;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check the settings, the mesh file and the certificates as `underpass run` would; list every
    /// mistake, and exit with code 2 if there is one
    #[command(after_help = "Example:\n  underpass config check --config underpass.yaml")]
    Check {
        #[command(flatten)]
        settings: SettingsArguments,
        /// The output format
        #[arg(long, short = 'o', visible_alias = "format", value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Print the settings in effect: file, environment, flags and defaults
    #[command(after_help = "Example:\n  underpass config show --config underpass.yaml")]
    Show(SettingsArguments),
    /// Print every setting with its type, its default and its meaning
    #[command(after_help = "Example:\n  underpass config keys | grep -A1 timeouts")]
    Keys {
        /// Print the table of docs/settings.md
        #[arg(long)]
        markdown: bool,
    },
}

pub(super) fn run(command: Command) -> Result<(), CommandError> {
    match command {
        Command::Check { settings, output } => check(settings, output),
        Command::Show(arguments) => print(&arguments.load()?.to_string()),
        Command::Keys { markdown: true } => print(&Reference::table(reference())),
        Command::Keys { markdown: false } => {
            print(&reference().map(|setting| setting.to_string()).collect::<String>())
        }
    }
}

fn check(arguments: SettingsArguments, output: Output) -> Result<(), CommandError> {
    let sources = arguments.sources();
    let mut check = Check::default();
    check.warnings.extend(sources.warnings().iter().map(Problem::with_hint));
    match sources.load() {
        Ok(settings) => check.check_all(&settings),
        Err(errors) => check.add_errors(errors),
    }
    match output {
        Output::Text => check.print_text()?,
        Output::Json => print(&format!("{}\n", check.json()))?,
    }
    match (check.problems.is_empty(), output) {
        (true, _) => Ok(()),
        (false, Output::Text) => {
            Err(ConfigErrors { problems: check.problems, more: check.more }.into())
        }
        // The mistakes are already printed.
        (false, Output::Json) => Err(CommandError::Mistakes(check.problems.len() + check.more)),
    }
}

/// The result of a check. Mistakes prevent a start, warnings do not.
#[derive(Debug, Default)]
struct Check {
    problems: Vec<Problem>,
    more: usize,
    warnings: Vec<String>,
    mesh: Mesh,
    identity: Option<Identity>,
}

impl Check {
    fn check_all(&mut self, settings: &Settings) {
        self.check_settings(settings);
        self.identity = self.check_credentials(settings);
        self.mesh = self.read_mesh(settings);
        self.check_control_plane(settings);
        if let Some(identity) = self.identity.clone() {
            self.check_identity(settings, &identity);
        }
    }

    fn print_text(&self) -> Result<(), CommandError> {
        for warning in &self.warnings {
            // Ignored if standard error is closed; the exit code still reports the result.
            writeln!(io::stderr(), "warning: {warning}").ok();
        }
        if !self.problems.is_empty() {
            return Ok(());
        }
        let MeshSize { workloads, services, policies } = self.mesh.size();
        print(&format!(
            "ok; workloads: {workloads}, services: {services}, policies: {policies}\n"
        ))?;
        let Some(identity) = &self.identity else { return Ok(()) };
        let (id, left) = (identity.spiffe_id(), in_words(time_left(identity)));
        print(&format!("certificate: {id}, expires in {left}\n"))
    }

    fn json(&self) -> serde_json::Value {
        let problems: Vec<_> = self
            .problems
            .iter()
            .map(|Problem { key, value, reason, hint, origin }| {
                let origin = origin.as_ref().map(ToString::to_string);
                json!({"key": key, "value": value, "reason": reason, "hint": hint, "origin": origin})
            })
            .collect();
        let certificate = self.identity.as_ref().map(|identity| {
            json!({
                "spiffe_id": identity.spiffe_id().to_string(),
                "expires_in_seconds": time_left(identity).as_secs(),
            })
        });
        json!({
            "ok": self.problems.is_empty(),
            "problems": problems,
            "more_problems": self.more,
            "warnings": self.warnings,
            "workloads": self.mesh.size().workloads,
            "services": self.mesh.size().services,
            "policies": self.mesh.size().policies,
            "certificate": certificate,
        })
    }

    fn add_errors(&mut self, errors: ConfigErrors) {
        self.problems.extend(errors.problems);
        self.more += errors.more;
    }

    fn add_problem(&mut self, key: &str, value: Option<String>, error: &(impl Hint + 'static)) {
        let (reason, hint) = (chain(error), error.hint().map(Cow::into_owned));
        self.problems.push(Problem { key: key.to_owned(), value, reason, hint, origin: None });
    }

    fn check_settings(&mut self, settings: &Settings) {
        if let Err(errors) = logging::parse(&settings.logging.filter) {
            self.add_errors(errors);
        }
    }

    /// Checks the files for the connection to the control plane, without connecting.
    fn check_control_plane(&mut self, settings: &Settings) {
        let Some(xds) = &settings.xds else { return };
        if let Err(error) = ControlPlaneClient::new(xds.clone(), NoDialer) {
            self.add_problem("mesh.xds", None, &error);
        }
    }

    /// Checks credentials from files. It does not connect to a CA or an agent.
    fn check_credentials(&mut self, settings: &Settings) -> Option<Identity> {
        let trust = Trust::read(&settings.trust);
        let trust = trust.map_err(|error| self.add_problem("trust", None, &error)).ok();
        let identity = match self.own_identity(settings) {
            Ok(identity) => identity?,
            Err(error) => {
                self.add_problem("identity", None, &error);
                return None;
            }
        };
        let credentials = Credentials::new(identity.clone(), trust?);
        credentials.map_err(|error| self.add_problem("identity", None, &error)).ok()?;
        Some(identity)
    }

    fn own_identity(&mut self, settings: &Settings) -> Result<Option<Identity>, HboneError> {
        let workload = &settings.workload.spiffe_id;
        match &settings.identity {
            Some(IdentitySettings::Files(files)) => FileSource::check(files).map(Some),
            Some(IdentitySettings::LocalCa(ca)) => {
                LocalAuthority::new(ca.clone()).issue(workload).map(Some)
            }
            Some(IdentitySettings::IstioCa(ca)) => IstioCa::new(ca.clone(), NoDialer).map(|_| None),
            Some(IdentitySettings::Spire(spire)) => {
                if !spire.socket.exists() {
                    let key = match spire.api {
                        SpireApi::Workload => "socket",
                        SpireApi::DelegatedIdentity => "admin_socket",
                    };
                    let socket = spire.socket.display();
                    self.warnings.push(format!(
                        "identity.spire.{key}: {socket} does not exist yet: at its start the proxy waits for it, unready"
                    ));
                }
                Ok(None)
            }
            None => {
                let off = "identity: there is no certificate: HBONE is off, inbound and outbound";
                self.warnings.push(off.to_owned());
                Ok(None)
            }
        }
    }

    fn read_mesh(&mut self, settings: &Settings) -> Mesh {
        let mesh = match settings.mesh_file.as_deref().map(Mesh::from_file).transpose() {
            Ok(mesh) => mesh.unwrap_or_default(),
            Err(errors) => {
                self.add_errors(errors);
                return Mesh::default();
            }
        };
        if settings.mesh_file.is_some() {
            // A node daemon has no workload of its own.
            if settings.node.pods.is_none() {
                self.check_own_workload(settings, &mesh);
            }
        }
        mesh
    }

    /// Checks that the mesh file's entry of this workload agrees with the settings.
    fn check_own_workload(&mut self, settings: &Settings, mesh: &Mesh) {
        let own = &settings.workload;
        let Some(workload) = mesh.workloads_named(&own.namespace, &own.name).first() else {
            self.warnings.push(format!(
                "mesh.file: it has no workload {:?} of namespace {:?} (workload.name, workload.namespace): peers with the \
                 same file do not know this workload",
                own.name, own.namespace
            ));
            return;
        };
        if workload.identity != own.spiffe_id {
            self.warnings.push(format!(
                "mesh.file: workload {:?} has the identity {} in the file and {} in the settings (workload.serviceAccount, \
                 workload.trustDomain): peers with the same file refuse its connections",
                own.name, workload.identity, own.spiffe_id
            ));
        }
        if settings.identity.is_some() && workload.protocol != Protocol::Hbone {
            self.warnings.push(format!(
                "mesh.file: workload {:?} has no `protocol: HBONE`: peers with the same file reach it in plaintext",
                own.name
            ));
        }
    }

    fn check_identity(&mut self, settings: &Settings, identity: &Identity) {
        let (is, wanted) = (identity.spiffe_id(), &settings.workload.spiffe_id);
        if is != wanted {
            self.warnings.push(format!(
                "identity: the certificate has the identity {is}, but the settings {wanted} (workload.serviceAccount, \
                 workload.trustDomain): peers see that of the certificate"
            ));
        }
        let lifetime = identity.expires().duration_since(identity.not_before()).unwrap_or_default();
        let left = time_left(identity);
        if left < lifetime / 3 {
            self.warnings.push(format!(
                "identity: the certificate expires in {}: is it still renewed?",
                in_words(left)
            ));
        }
    }
}

fn time_left(identity: &Identity) -> Duration {
    identity.expires().duration_since(SystemTime::now()).unwrap_or_default()
}

/// For example `3d 4h`, `23h 59m` or `59m 59s`.
fn in_words(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes}m {rest}s"),
        (0, hours) => format!("{hours}h {minutes}m"),
        (days, hours) => format!("{days}d {hours}h"),
    }
}

/// A dialer that never connects, because the check contacts neither a CA nor a control plane.
struct NoDialer;

impl Dial for NoDialer {
    type Io = TcpStream;

    async fn dial(&self, _: SocketAddr) -> io::Result<TcpStream> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

//! Checks settings, and all files that they name, in one pass: the mistakes that would prevent a
//! start, and warnings.
//!
//! The files are checked even if other settings are wrong. Nothing is connected to.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use underpass_config::{
    ConfigErrors, Hint, IdentityFiles, IdentitySettings, InputSettings, Mesh, OtlpSettings,
    Problem, Protocol, Settings, Sources, SpireApi, WorkloadSettings,
};
use underpass_hbone::{
    CredentialProblem, Credentials, HboneError, Identity, Inspection, LocalAuthority, Trust,
    collector_problems, control_plane_problems, istio_ca_problems,
};

use crate::cli::layout::age;
use crate::error::chain;
use crate::pods::kubernetes;
use crate::process::logging;

/// The result of a check. Mistakes prevent a start, warnings do not.
#[derive(Debug, Default)]
pub(in crate::cli) struct ConfigCheck {
    pub(in crate::cli) problems: Vec<Problem>,
    /// The number of further mistakes.
    pub(in crate::cli) more: usize,
    pub(in crate::cli) warnings: Vec<Warning>,
    /// The settings, if they have no mistake.
    pub(in crate::cli) settings: Option<Settings>,
    pub(in crate::cli) mesh: Mesh,
    /// The identity in files, or of a local CA.
    pub(in crate::cli) identity: Option<Identity>,
    /// The start of the certificate's validity, if it is in the future.
    pub(in crate::cli) not_yet_valid: Option<SystemTime>,
    /// The checked files and folders, each with its setting.
    pub(in crate::cli) checked: Vec<String>,
}

/// A mistake that does not prevent a start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) struct Warning {
    /// The key of the setting; empty for the environment.
    pub(in crate::cli) key: &'static str,
    text: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, text } = self;
        if key.is_empty() { f.write_str(text) } else { write!(f, "{key}: {text}") }
    }
}

impl ConfigCheck {
    /// Checks the settings of these sources.
    pub(in crate::cli) fn of(sources: &Sources) -> Self {
        let mut check = Self::default();
        for warning in sources.warnings() {
            check.warn("", warning.with_hint());
        }
        check.settings = match sources.load() {
            Ok(settings) => Some(settings),
            Err(errors) => {
                check.add_errors(errors);
                None
            }
        };
        let filter =
            check.settings.as_ref().map(|settings| logging::parse(&settings.logging.filter));
        if let Some(Err(errors)) = filter {
            check.add_errors(errors);
        }
        check.check_inputs(&sources.inputs());
        check
    }

    /// Checks the files of these settings.
    pub(in crate::cli) fn of_settings(settings: Settings) -> Self {
        let inputs = InputSettings::from(&settings);
        let mut check = Self { settings: Some(settings), ..Self::default() };
        check.check_inputs(&inputs);
        check
    }

    fn check_inputs(&mut self, inputs: &InputSettings) {
        self.check_credentials(inputs);
        self.check_mesh(inputs);
        if let Some(xds) = &inputs.xds {
            self.add_checked("mesh.xds.roots", &xds.roots);
            for error in control_plane_problems(xds) {
                self.add_problem("mesh.xds", &error);
            }
        }
        if let Some(otlp) = self.settings.as_ref().and_then(|settings| settings.otlp.clone()) {
            self.check_collector(&otlp);
        }
        if let Some(Err(errors)) = self.settings.as_ref().map(kubernetes::cluster) {
            self.add_errors(errors);
        }
        if let (Some(identity), Some(workload)) = (self.identity.clone(), &inputs.workload) {
            self.check_identity(workload, &identity, inputs.serves_pods);
        }
    }

    fn add_errors(&mut self, errors: ConfigErrors) {
        self.problems.extend(errors.problems);
        self.more += errors.more;
    }

    fn add_problem(&mut self, key: &str, error: &(impl Hint + 'static)) {
        let (key, reason, hint) = (key.to_owned(), chain(error), error.hint().map(Cow::into_owned));
        self.problems.push(Problem { key, value: None, reason, hint, origin: None });
    }

    fn warn(&mut self, key: &'static str, text: String) {
        self.warnings.push(Warning { key, text });
    }

    fn add_checked(&mut self, key: &str, path: &Path) {
        self.checked.push(format!("{key}: {}", path.display()));
    }

    /// Checks credentials from files.
    fn check_credentials(&mut self, inputs: &InputSettings) {
        for bundle in &inputs.trust.bundles {
            self.add_checked("trust.bundles", &bundle.file);
        }
        for list in &inputs.trust.crls {
            self.add_checked("trust.crls", list);
        }
        let untrusted = Trust::problems(&inputs.trust);
        for error in &untrusted {
            self.add_problem("trust", error);
        }
        self.identity = self.check_source(inputs);
        let (Some(identity), true) = (self.identity.clone(), untrusted.is_empty()) else { return };
        let trust = Trust::read(&inputs.trust);
        let credentials = trust.and_then(|trust| Credentials::new(identity, trust));
        if let Err(error) = credentials {
            self.add_problem("identity", &error);
        }
    }

    /// The identity of the workload, if its source needs no connection.
    fn check_source(&mut self, inputs: &InputSettings) -> Option<Identity> {
        match inputs.identity.as_ref() {
            Some(IdentitySettings::Files(files)) => self.check_files(files),
            Some(IdentitySettings::LocalCa(ca)) => {
                self.add_checked("identity.local_ca", &ca.dir);
                let issued = LocalAuthority::new(ca.clone());
                let issued = issued.issue(&inputs.workload.as_ref()?.spiffe_id);
                issued.map_err(|error| self.add_problem("identity", &error)).ok()
            }
            Some(IdentitySettings::IstioCa(ca)) => {
                self.add_checked("identity.istio_ca.roots", &ca.roots);
                self.add_checked("identity.istio_ca.token", &ca.token);
                for error in istio_ca_problems(ca) {
                    self.add_problem("identity", &error);
                }
                None
            }
            Some(IdentitySettings::Spire(spire)) => {
                let key = match spire.api {
                    SpireApi::Workload => "identity.spire.socket",
                    SpireApi::DelegatedIdentity => "identity.spire.admin_socket",
                };
                self.add_checked(key, &spire.socket);
                if !spire.socket.exists() {
                    let socket = spire.socket.display();
                    self.warn(
                        key,
                        format!(
                            "{socket} does not exist yet: at its start the proxy waits for it, unready"
                        ),
                    );
                }
                None
            }
            None => {
                if self.settings.is_some() {
                    let off = "there is no certificate: HBONE is off, inbound and outbound";
                    self.warn("identity", off.to_owned());
                }
                None
            }
        }
    }

    fn check_files(&mut self, files: &IdentityFiles) -> Option<Identity> {
        let IdentityFiles { certificate, key, roots } = files;
        for (setting, file) in [
            ("identity.certificate", certificate),
            ("identity.key", key),
            ("identity.roots", roots),
        ] {
            self.add_checked(setting, file);
        }
        let Inspection { identity, problems, exposed_key } = Inspection::of_files(files);
        for error in &problems {
            self.add_problem("identity", error);
            if let HboneError::Credential { what: CredentialProblem::NotYetValid(start), .. } =
                error
            {
                self.not_yet_valid = Some(*start);
            }
        }
        if let Some(mode) = exposed_key {
            let key = key.display();
            let text = format!("other users can read {key} (mode {mode:04o}; run chmod 0600)");
            self.warn("identity.key", text);
        }
        identity
    }

    /// Checks the files for requests to the collector. A start succeeds without them.
    fn check_collector(&mut self, otlp: &OtlpSettings) {
        let files = [("tracing.otlp.roots", &otlp.roots), ("tracing.otlp.headers", &otlp.headers)];
        for (key, file) in files {
            if let Some(file) = file {
                self.add_checked(key, file);
            }
        }
        for error in collector_problems(otlp) {
            self.warn("tracing.otlp", format!("the collector gets nothing: {}", chain(&error)));
        }
    }

    fn check_mesh(&mut self, inputs: &InputSettings) {
        let Some(file) = &inputs.mesh_file else { return };
        self.add_checked("mesh.file", file);
        match Mesh::from_file(file) {
            Ok(mesh) => self.mesh = mesh,
            Err(errors) => return self.add_errors(errors),
        }
        // A node daemon has no workload of its own. A control plane may have that of this proxy.
        let is_complete = !inputs.serves_pods && inputs.xds.is_none();
        if let Some(workload) = inputs.workload.as_ref().filter(|_| is_complete) {
            self.check_own_workload(workload, inputs.identity.is_some());
        }
    }

    /// Checks that the mesh file's entry of this workload agrees with the settings.
    fn check_own_workload(&mut self, own: &WorkloadSettings, has_identity: bool) {
        let same_name = self.mesh.workloads_named(&own.namespace, &own.name).iter();
        let own_network_first = same_name.min_by_key(|workload| *workload.network != *own.network);
        let Some(workload) = own_network_first.cloned() else {
            let text = format!(
                "it has no workload {:?} of namespace {:?} (workload.name, workload.namespace): peers with the same file \
                 do not know this workload",
                own.name, own.namespace
            );
            return self.warn("mesh.file", text);
        };
        if workload.identity != own.spiffe_id {
            let text = format!(
                "workload {:?} has the identity {} in the file and {} in the settings (workload.serviceAccount, \
                 workload.trustDomain): peers with the same file refuse its connections",
                own.name, workload.identity, own.spiffe_id
            );
            self.warn("mesh.file", text);
        }
        if *workload.network != *own.network {
            let text = format!(
                "workload {:?} is in the network {:?} in the file and in {:?} in the settings (workload.network): its \
                 connections are refused",
                own.name, &*workload.network, own.network
            );
            self.warn("mesh.file", text);
        }
        if has_identity && workload.protocol != Protocol::Hbone {
            let text = format!(
                "workload {:?} has no `protocol: HBONE`: peers with the same file reach it in plaintext",
                own.name
            );
            self.warn("mesh.file", text);
        }
    }

    fn check_identity(&mut self, own: &WorkloadSettings, identity: &Identity, serves_pods: bool) {
        let (is, wanted) = (identity.spiffe_id(), &own.spiffe_id);
        if is != wanted && !serves_pods {
            let text = format!(
                "the certificate has the identity {is}, but the settings {wanted} (workload.serviceAccount, \
                 workload.trustDomain): peers see that of the certificate"
            );
            self.warn("identity", text);
        }
        let lifetime = identity.expires().duration_since(identity.not_before()).unwrap_or_default();
        let left = time_left(identity);
        if left < lifetime / 3 {
            let left = age(left.as_secs());
            let text = format!("the certificate expires in {left}: is it still renewed?");
            self.warn("identity", text);
        }
    }
}

/// The remaining validity of the certificate.
pub(in crate::cli) fn time_left(identity: &Identity) -> Duration {
    identity.expires().duration_since(SystemTime::now()).unwrap_or_default()
}

//! Builds the settings file of a proxy.

use std::fs;
use std::path::{Path, PathBuf};

use underpass_config::{IdentityFiles, Sources};

use crate::or_fail::OrFail;
use crate::pods::Pod;

/// A settings file.
#[derive(Debug, Clone)]
pub struct Settings {
    name: String,
    command: &'static str,
    text: String,
    flags: Vec<String>,
}

impl Settings {
    /// The settings of the workload `name`, with two workers and defaults otherwise.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let text = format!("workload: {{name: {name}, serviceAccount: {name}}}\n");
        Self::with(name, "run", text)
    }

    /// The settings of a node daemon with the source of pods `source`, such as `zds:
    /// /run/agent.sock`, with two workers and defaults otherwise.
    #[must_use]
    pub fn node(name: &str, source: &str) -> Self {
        Self::with(name, "node", format!("node: {{name: {name}, pods: {{{source}}}}}\n"))
    }

    fn with(name: &str, command: &'static str, text: String) -> Self {
        let settings = Self { name: name.to_owned(), command, text, flags: Vec::new() };
        settings.set("proxy.workers=2")
    }

    /// Adds a certificate.
    #[must_use]
    pub fn identity(mut self, files: &IdentityFiles) -> Self {
        let IdentityFiles { certificate, key, roots } = files;
        self.text.push_str(&format!(
            "identity: {{certificate: {certificate:?}, key: {key:?}, roots: {roots:?}}}\n"
        ));
        self
    }

    /// Adds a mesh file.
    #[must_use]
    pub fn mesh(mut self, file: &Path) -> Self {
        self.text.push_str(&format!("mesh: {{file: {file:?}}}\n"));
        self
    }

    /// Adds a section in YAML, such as `interception: {profile: osm}`. [`set`](Self::set) overrides
    /// it.
    #[must_use]
    pub fn section(mut self, yaml: &str) -> Self {
        self.text.push_str(yaml);
        self.text.push('\n');
        self
    }

    /// Adds a `--set KEY=VALUE`.
    #[must_use]
    pub fn set(mut self, assignment: &str) -> Self {
        self.flags.extend(["--set".to_owned(), assignment.to_owned()]);
        self
    }

    /// Makes the proxy take over from the running one.
    #[must_use]
    pub fn take_over(mut self) -> Self {
        self.flags.push("--take-over".to_owned());
        self
    }

    /// The path in the pod's folder to which [`write`](Self::write) writes the file.
    #[must_use]
    pub fn file(&self, pod: &Pod) -> PathBuf {
        pod.folder().join(format!("settings-{}.yaml", self.name))
    }

    /// Replaces the file atomically, because a proxy may watch it.
    pub fn write(&self, pod: &Pod) {
        let file = self.file(pod);
        let new = file.with_extension("new");
        fs::write(&new, &self.text).or_fail("write a settings file");
        fs::rename(&new, &file).or_fail("write a settings file");
    }

    /// Writes the file, and reads the settings like a process with these arguments.
    #[must_use]
    pub fn load(&self, pod: &Pod) -> underpass_config::Settings {
        self.write(pod);
        let flags = self.flags.iter().filter(|flag| !flag.starts_with("--")).cloned().collect();
        let sources = Sources { file: Some(self.file(pod)), environment: Vec::new(), flags };
        sources.load().or_fail("load settings")
    }

    /// The underpass command for these settings.
    #[must_use]
    pub fn command(&self) -> &'static str {
        self.command
    }

    /// Writes the file, and returns the arguments for the command.
    #[must_use]
    pub fn arguments(&self, pod: &Pod) -> Vec<String> {
        self.write(pod);
        let file = self.file(pod);
        let mut arguments = vec!["--config".to_owned(), file.display().to_string()];
        arguments.extend(self.flags.iter().cloned());
        arguments
    }
}

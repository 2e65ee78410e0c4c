//! The settings file of one proxy.

use std::fs;
use std::path::{Path, PathBuf};

use underpass_config::IdentityFiles;

use crate::OrFail;
use crate::pods::Pod;

/// A settings file in the making.
#[derive(Debug, Clone)]
pub struct Settings {
    name: String,
    text: String,
    flags: Vec<String>,
}

impl Settings {
    /// Those of the workload `name`, with two data workers and everything else as it is by default.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let text = format!("workload: {{name: {name}, serviceAccount: {name}}}\n");
        Self { name: name.to_owned(), text, flags: Vec::new() }.set("proxy.workers=2")
    }

    /// With a certificate.
    #[must_use]
    pub fn identity(mut self, files: &IdentityFiles) -> Self {
        let IdentityFiles { certificate, key, roots } = files;
        self.text.push_str(&format!(
            "identity: {{certificate: {certificate:?}, key: {key:?}, roots: {roots:?}}}\n"
        ));
        self
    }

    /// With a mesh file.
    #[must_use]
    pub fn mesh(mut self, file: &Path) -> Self {
        self.text.push_str(&format!("mesh: {{file: {file:?}}}\n"));
        self
    }

    /// With one more section of the file, in YAML: `interception: {profile: osm}`. What is [`set`](Self::set) wins.
    #[must_use]
    pub fn section(mut self, yaml: &str) -> Self {
        self.text.push_str(yaml);
        self.text.push('\n');
        self
    }

    /// With one more `--set KEY=VALUE`.
    #[must_use]
    pub fn set(mut self, assignment: &str) -> Self {
        self.flags.extend(["--set".to_owned(), assignment.to_owned()]);
        self
    }

    /// To take over from the process that runs.
    #[must_use]
    pub fn take_over(mut self) -> Self {
        self.flags.push("--take-over".to_owned());
        self
    }

    /// Where [`write`](Self::write) writes the file: beside the other files of the pod's world.
    #[must_use]
    pub fn file(&self, pod: &Pod) -> PathBuf {
        pod.folder().join(format!("settings-{}.yaml", self.name))
    }

    /// Writes the file anew, in one step, as there may be who follows it.
    pub fn write(&self, pod: &Pod) {
        let file = self.file(pod);
        let new = file.with_extension("new");
        fs::write(&new, &self.text).or_fail("write a settings file");
        fs::rename(&new, &file).or_fail("write a settings file");
    }

    /// Writes the file; the arguments for `underpass run` that name it.
    #[must_use]
    pub fn arguments(&self, pod: &Pod) -> Vec<String> {
        self.write(pod);
        let file = self.file(pod);
        let mut arguments = vec!["--config".to_owned(), file.display().to_string()];
        arguments.extend(self.flags.iter().cloned());
        arguments
    }
}

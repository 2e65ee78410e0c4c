//! Loads the settings from file, environment and flags, and reports all mistakes of all three at
//! once.
//!
//! Flags override the environment, which overrides the file. `resolve.rs` has keys and defaults.

mod environment;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::environment::{CONFIG_FILE, Meaning};

use crate::error::{ConfigErrors, Problem};
use crate::settings::resolve::{declared, inputs, settings};
use crate::settings::{InputSettings, Settings};
use crate::yaml::document::{Node, Origin, SyntaxError, Value};
use crate::yaml::read::{Cursor, Problems};

/// The sources of the settings.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The settings file. Relative paths in it refer to its folder.
    pub file: Option<PathBuf>,
    /// The environment: `UNDERPASS_PROXY_HBONE_PORT=15018` sets `proxy.hbone_port`.
    pub environment: Vec<(String, String)>,
    /// Flags of the form `KEY=VALUE`, such as `proxy.hbone_port=15018`.
    pub flags: Vec<String>,
}

impl Sources {
    /// The sources of this process: the settings file of the command line or of `UNDERPASS_CONFIG`,
    /// the environment, and the flags.
    pub fn of_process(file: Option<PathBuf>, flags: Vec<String>) -> Self {
        let environment = environment::of_process();
        let named = environment.iter().find(|(name, path)| name == CONFIG_FILE && !path.is_empty());
        let file = file.or_else(|| named.map(|(_, path)| path.into()));
        Self { file, environment, flags }
    }

    /// Warnings about variables with our prefix that set nothing.
    pub fn warnings(&self) -> Vec<Problem> {
        let unknown = |(name, value): &(String, String)| {
            (Meaning::new(name, value) == Meaning::Unknown)
                .then(|| environment::unknown(name, value))
        };
        self.environment.iter().filter_map(unknown).collect()
    }

    /// Reads and validates all settings.
    ///
    /// # Errors
    /// All mistakes in the three sources, or the reason why the file could not be read.
    pub fn load(&self) -> Result<Settings, ConfigErrors> {
        let problems = Problems::default();
        let root = self.document(&problems)?;
        let settings = settings(Cursor::root(&root, &problems), self.folder());
        problems.or_else(settings)
    }

    /// The settings that name files, as far as they are valid, whatever the others are. Reports no
    /// mistake: [`load`](Self::load) does.
    #[must_use]
    pub fn inputs(&self) -> InputSettings {
        let problems = Problems::default();
        let Ok(root) = self.document(&problems) else { return InputSettings::default() };
        inputs(Cursor::root(&root, &problems), self.folder())
    }

    /// The file, overlaid with the environment and the flags.
    fn document(&self, problems: &Problems) -> Result<Node, ConfigErrors> {
        let mut root = match &self.file {
            Some(path) => read_file(path)?,
            None => Node::empty(Origin::Flag),
        };
        self.overlay_environment(&mut root, problems);
        self.overlay_flags(&mut root, problems);
        Ok(root)
    }

    /// The folder of relative paths.
    fn folder(&self) -> &Path {
        self.file.as_deref().and_then(Path::parent).unwrap_or_else(|| Path::new(""))
    }

    fn overlay_environment(&self, root: &mut Node, problems: &Problems) {
        for (name, value) in &self.environment {
            if let Meaning::Key(key) = Meaning::new(name, value) {
                overlay(root, key, value, Origin::Environment(name.clone()), problems);
            }
        }
    }

    fn overlay_flags(&self, root: &mut Node, problems: &Problems) {
        for flag in &self.flags {
            match flag.split_once('=') {
                Some((key, value)) => overlay(root, key, value, Origin::Flag, problems),
                None => problems.add(Problem {
                    key: String::new(),
                    value: Some(flag.clone()),
                    reason: "must be KEY=VALUE, such as proxy.workers=2".to_owned(),
                    hint: None,
                    origin: Some(Origin::Flag),
                }),
            }
        }
    }
}

/// Parses a YAML file into a tree whose positions include the file's name.
pub(crate) fn read_file(path: &Path) -> Result<Node, ConfigErrors> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        ConfigErrors::one(format!("{}: cannot be read: {error}", path.display()), None)
    })?;
    read_text(&path.display().to_string(), &text)
}

pub(crate) fn read_text(name: &str, text: &str) -> Result<Node, ConfigErrors> {
    let name: Arc<str> = name.into();
    let origin = |line, column| Origin::Document { name: name.clone(), line, column };
    Ok(Node::parse(text, &origin)?)
}

/// The settings of a file with this text.
#[cfg(test)]
pub(crate) fn settings_of(text: &str) -> Result<Settings, ConfigErrors> {
    Settings::of_text("underpass.yaml", text)
}

impl Settings {
    /// Parses the output of the `Display` implementation of [`Settings`]. Errors contain `name`.
    ///
    /// # Errors
    /// All mistakes in the text.
    pub fn of_text(name: &str, text: &str) -> Result<Self, ConfigErrors> {
        let root = read_text(name, text)?;
        let problems = Problems::default();
        let settings = settings(Cursor::root(&root, &problems), Path::new(""));
        problems.or_else(settings)
    }
}

fn overlay(root: &mut Node, key: &str, value: &str, origin: Origin, problems: &Problems) {
    let path: Vec<&str> = key.split('.').collect();
    match parse(key, value.trim(), &origin) {
        Ok(node) => root.set(&path, node),
        Err(error) => problems.add(Problem {
            key: key.to_owned(),
            value: Some(value.to_owned()),
            reason: error.reason,
            hint: None,
            origin: Some(origin),
        }),
    }
}

/// Parses the value of a flag or variable. It is plain text, as in a shell: YAML would misread `*`,
/// `[::]:15020` or `::1,::2`. Quotes, brackets of a list and the key of a section select YAML.
fn parse(key: &str, value: &str, origin: &Origin) -> Result<Node, SyntaxError> {
    let setting = declared().find(|setting| setting.key() == key);
    let is_yaml = setting.is_none_or(|setting| setting.is_list() && value.starts_with('['));
    if is_yaml || value.starts_with(['"', '\'']) {
        return Node::parse(value, &|_, _| origin.clone());
    }
    let value = match value {
        "" | "~" | "null" => Value::Null,
        text => Value::Scalar(text.to_owned()),
    };
    Ok(Node { value, tag: None, origin: origin.clone() })
}

#[cfg(test)]
mod tests;

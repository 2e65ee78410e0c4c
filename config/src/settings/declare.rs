//! The declaration of a setting: key, type, default, help text, and the field that holds its value.
//!
//! The parsers, the environment variables, `--set`, `config show`, `config keys` and the table in
//! docs/settings.md all derive from the declarations in `resolve/`.

mod kinds;

use std::fmt;
use std::path::{Path, PathBuf};

pub(crate) use self::kinds::{
    ADDRESS, ADDRESS_OR_OFF, CIDRS, COUNT, COUNT_OR_OFF, DURATION, DURATION_OR_OFF, FLAG,
    LOCAL_SOCKET, NAME_SERVERS, PATH, PORT, PORTS, RATE_OR_OFF, SIZE, TEXT, cidr, given_included,
    given_list, included, list, name_server, parsed, port_range, word,
};
use crate::settings::Settings;
use crate::yaml::document::Origin;
use crate::yaml::read::Cursor;

/// One setting.
#[derive(Debug)]
pub(crate) struct Setting<T: 'static> {
    pub(crate) key: &'static str,
    pub(crate) kind: Kind<T>,
    pub(crate) default: Fallback<T>,
    /// The lines of the setting's doc comment.
    pub(crate) help: &'static [&'static str],
    /// Reads the value from the settings; `None` where the setting does not apply.
    pub(crate) value: fn(&Settings) -> Option<T>,
}

/// A type of settings: its name in the documentation, its parser and its printer.
#[derive(Debug)]
pub(crate) struct Kind<T> {
    pub(crate) name: &'static str,
    /// Whether the value is a list. Then a flag or variable whose value starts with `[` is parsed
    /// as YAML.
    pub(crate) is_list: bool,
    /// Parses the value at a place. Returns `None` if the value is absent, or after reporting a
    /// mistake.
    pub(crate) read: fn(Cursor<'_>, Files<'_>) -> Option<T>,
    pub(crate) write: fn(&T) -> Written,
}

/// The default of a setting.
#[derive(Debug)]
pub(crate) enum Fallback<T> {
    /// A fixed value.
    Is(fn() -> T),
    /// A fixed value with a description for the documentation.
    Called(fn() -> T, &'static str),
    /// No fixed default: it depends on other settings, or is absent. The text describes it in the
    /// documentation.
    Varies(&'static str),
}

/// A value in the form of a settings file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Written {
    /// A text, number or word.
    Scalar(String),
    /// The items of a list.
    List(Vec<String>),
}

/// A document with settings, and the folder that its relative paths refer to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Document<'a> {
    pub(crate) root: Cursor<'a>,
    pub(crate) files: Files<'a>,
}

/// Resolves paths: those in the file relative to its folder, those in the environment and flags
/// relative to the working directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Files<'a> {
    pub(crate) folder: &'a Path,
}

/// A setting of any type.
pub(crate) trait Declared: Sync {
    fn key(&self) -> &'static str;
    fn is_list(&self) -> bool;
    /// Whether the default depends on other settings.
    fn is_derived(&self) -> bool;
    fn reference(&self) -> Reference;
    /// The value in effect; `None` where the setting does not apply.
    fn written(&self, settings: &Settings) -> Option<Written>;
    /// Reports a mistake at the key.
    fn problem(&self, document: Document<'_>, reason: &str);
}

/// The documentation of a setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The path of the setting in the settings file and in `--set`. In capitals it is part of the
    /// variable's name.
    pub key: &'static str,
    /// The type in words.
    pub kind: &'static str,
    /// The default as Markdown.
    pub default: String,
    /// The help text as Markdown, on one line.
    pub help: String,
}

/// Declares the settings of a module: constants for its readers, and the list `ALL` of them.
///
/// A declaration consists of the help text as a doc comment, the type, the key, the kind, the
/// default and the field.
macro_rules! settings {
    ($($(#[doc = $help:literal])+
        $name:ident: $type:ty = $key:literal, $kind:expr, $default:expr, $value:expr;)+) => {
        $(const $name: $crate::settings::declare::Setting<$type> = $crate::settings::declare::Setting {
            key: $key,
            kind: $kind,
            default: $default,
            help: &[$($help),+],
            value: $value,
        };)+

        /// All settings of this module.
        pub(crate) const ALL: &[&dyn $crate::settings::declare::Declared] = &[$(&$name),+];
    };
}

pub(crate) use settings;

impl<T> Setting<T> {
    /// Reads the value from the document, or returns the default. A mistake is reported and counts
    /// as absent. Returns `None` only for a setting without a fixed default.
    pub(crate) fn read(&self, document: Document<'_>) -> Option<T> {
        self.given(document).or_else(|| self.default())
    }

    /// Like [`read`](Self::read), but returns `None` after a mistake.
    pub(crate) fn read_sound(&self, document: Document<'_>) -> Option<T> {
        if self.is_given(document) { self.given(document) } else { self.default() }
    }

    /// Reads the value from the document.
    pub(crate) fn given(&self, document: Document<'_>) -> Option<T> {
        self.at(document, |cursor| (self.kind.read)(cursor, document.files))
    }

    /// Reads the value from the document. If it is absent, reports a mistake with this reason.
    pub(crate) fn needed(&self, document: Document<'_>, reason: &str) -> Option<T> {
        if !self.is_given(document) {
            self.problem(document, reason);
            return None;
        }
        self.given(document)
    }

    pub(crate) fn is_given(&self, document: Document<'_>) -> bool {
        self.at(document, |cursor| cursor.is_given())
    }

    pub(crate) fn is_empty_list(&self, document: Document<'_>) -> bool {
        self.at(document, |cursor| cursor.is_empty_list())
    }

    fn default(&self) -> Option<T> {
        match &self.default {
            Fallback::Is(value) | Fallback::Called(value, _) => Some(value()),
            Fallback::Varies(_) => None,
        }
    }

    fn at<R>(&self, document: Document<'_>, visit: impl FnOnce(Cursor<'_>) -> R) -> R {
        at(document.root, self.key, visit)
    }
}

/// Calls `visit` with the place at `path` below `cursor`.
fn at<R>(cursor: Cursor<'_>, path: &str, visit: impl FnOnce(Cursor<'_>) -> R) -> R {
    match path.split_once('.') {
        Some((section, rest)) => at(cursor.key(section), rest, visit),
        None => visit(cursor.key(path)),
    }
}

impl<T: 'static> Declared for Setting<T> {
    fn key(&self) -> &'static str {
        self.key
    }

    fn is_list(&self) -> bool {
        self.kind.is_list
    }

    fn is_derived(&self) -> bool {
        matches!(self.default, Fallback::Varies(_))
    }

    fn reference(&self) -> Reference {
        let default = match &self.default {
            Fallback::Is(value) => match (self.kind.write)(&value()) {
                Written::Scalar(text) if text.is_empty() => "`\"\"`".to_owned(),
                Written::Scalar(text) => format!("`{text}`"),
                Written::List(items) if items.is_empty() => "none".to_owned(),
                Written::List(items) => format!("`[{}]`", items.join(", ")),
            },
            Fallback::Called(_, words) | Fallback::Varies(words) => (*words).to_owned(),
        };
        let help: Vec<&str> = self.help.iter().map(|line| line.trim()).collect();
        Reference { key: self.key, kind: self.kind.name, default, help: help.join(" ") }
    }

    fn written(&self, settings: &Settings) -> Option<Written> {
        (self.value)(settings).as_ref().map(self.kind.write)
    }

    fn problem(&self, document: Document<'_>, reason: &str) {
        self.at(document, |cursor| cursor.problem(reason));
    }
}

impl Reference {
    /// Formats the table of docs/settings.md.
    #[must_use]
    pub fn table(settings: impl Iterator<Item = Self>) -> String {
        let row = |Self { key, kind, default, help }: Self| {
            format!("| `{key}` | {kind} | {default} | {help} |\n")
        };
        let head = "| key | type | default | meaning |\n|---|---|---|---|\n".to_owned();
        settings.map(row).fold(head, |table, row| table + &row)
    }
}

impl fmt::Display for Reference {
    /// Formats the documentation for a terminal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |text: &str| text.replace('`', "");
        let Self { key, kind, default, help } = self;
        writeln!(f, "{key} ({}; default: {})", plain(kind), plain(default))?;
        writeln!(f, "    {}", plain(help))
    }
}

impl Files<'_> {
    pub(crate) fn path(self, cursor: Cursor<'_>) -> Option<PathBuf> {
        let text = cursor.text()?;
        if text.is_empty() {
            cursor.problem("must be the path of a file");
            return None;
        }
        Some(self.resolve(cursor, text))
    }

    /// Resolves a path that is part of the value at `cursor`.
    pub(crate) fn resolve(self, cursor: Cursor<'_>, path: &str) -> PathBuf {
        let in_file =
            cursor.node().is_some_and(|node| matches!(node.origin, Origin::Document { .. }));
        if in_file { self.folder.join(path) } else { PathBuf::from(path) }
    }
}

impl Written {
    pub(crate) fn scalar(value: impl ToString) -> Self {
        Self::Scalar(value.to_string())
    }

    pub(crate) fn list<T: ToString>(items: &[T]) -> Self {
        Self::List(items.iter().map(ToString::to_string).collect())
    }
}

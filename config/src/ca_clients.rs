//! Who may ask `underpass ca serve` for which identity: a file of its own, for it holds tokens.
//!
//! ```yaml
//! clients:
//! - token_file: tokens/web             # or token: TEXT
//!   identities: [spiffe://cluster.local/ns/default/sa/web, "spiffe://cluster.local/ns/shop/*"]
//! ```
//!
//! Not here: comparing tokens. No message of this file has a token in it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::document::Node;
use crate::read::{Cursor, Problems};
use crate::{ConfigErrors, SpiffeError, SpiffeId};

const CLIENT_KEYS: &[&str] = &["token", "token_file", "identities"];
/// What a pattern ends with to stand for every identity below.
const ANY: &str = "/*";

/// What a clients file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CaClients {
    /// In the order of the file. Whoever is not here gets nothing.
    pub clients: Vec<CaClient>,
}

/// One who may ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaClient {
    /// How the client proves itself.
    pub token: CaToken,
    /// What it may be.
    pub identities: Vec<IdentityPattern>,
}

/// The bearer token of a client.
#[derive(Clone, PartialEq, Eq)]
pub enum CaToken {
    /// In the clients file itself.
    Literal(String),
    /// In a file of its own.
    File(PathBuf),
}

/// An identity, or all those below a path: `spiffe://TD/ns/shop/*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityPattern {
    base: SpiffeId,
    below: bool,
}

impl CaClients {
    /// Reads a clients file. Relative paths in it are relative to its folder.
    ///
    /// # Errors
    /// Every mistake in the file, or the one reason why it could not be read.
    pub fn from_file(path: &Path) -> Result<Self, ConfigErrors> {
        let folder = path.parent().unwrap_or_else(|| Path::new(""));
        read(&crate::load::read_file(path)?, folder)
    }
}

impl IdentityPattern {
    /// Whether `id` is this identity, or one of those below this path.
    pub fn matches(&self, id: &SpiffeId) -> bool {
        if !self.below {
            return self.base == *id;
        }
        let (base, id) = (self.base.to_string(), id.to_string());
        id.strip_prefix(&base).is_some_and(|rest| rest.starts_with('/'))
    }
}

impl FromStr for IdentityPattern {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let (base, below) = match text.strip_suffix(ANY) {
            Some(base) => (base, true),
            None => (text, false),
        };
        let base: SpiffeId = base.parse()?;
        if !below && !base.is_workload() {
            return Err(SpiffeError::NoPath);
        }
        Ok(Self { base, below })
    }
}

impl fmt::Display for IdentityPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.base, if self.below { ANY } else { "" })
    }
}

impl fmt::Debug for CaToken {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Literal(_) => f.write_str("Literal(…)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

fn read(node: &Node, folder: &Path) -> Result<CaClients, ConfigErrors> {
    let problems = Problems::default();
    let root = Cursor::root(node, &problems);
    only(root, &["clients"]);
    let clients = root.key("clients").items(|item| client(item, folder));
    problems.or_else(Some(CaClients { clients }))
}

fn client(item: Cursor<'_>, folder: &Path) -> Option<CaClient> {
    only(item, CLIENT_KEYS);
    let token = token(item, folder);
    let list = item.key("identities");
    let identities = list.list(|text| {
        text.parse::<IdentityPattern>().map(|pattern| pattern.to_string()).map_err(|error| {
            format!("must be a SPIFFE identity, whose last segment may be *: {error}")
        })
    });
    // `list` counts what is given twice once, for which it needs texts.
    let identities: Vec<IdentityPattern> =
        identities.iter().filter_map(|text| text.parse().ok()).collect();
    if !list.is_given() || list.is_empty_list() {
        item.problem("needs identities: the SPIFFE identities that this client may ask for");
    }
    Some(CaClient { token: token?, identities })
}

/// Told at the client and not at the key, which would show the token.
fn token(item: Cursor<'_>, folder: &Path) -> Option<CaToken> {
    let (literal, file) = (item.key("token"), item.key("token_file"));
    match (literal.text(), file.text()) {
        (Some(token), None) if is_token(token) => Some(CaToken::Literal(token.to_owned())),
        (Some(_), None) => {
            item.problem("token must be visible ASCII characters without spaces");
            None
        }
        (None, Some(file)) => Some(CaToken::File(folder.join(file))),
        _ => {
            item.problem("needs either token or token_file");
            None
        }
    }
}

/// What can be sent in an `authorization` header (RFC 6750 section 2.1 allows even less).
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|c| c.is_ascii_graphic())
}

/// As [`Cursor::only`], without the value: it may be a token under a misspelt key.
fn only(place: Cursor<'_>, known: &[&str]) {
    for (key, _) in place.entries() {
        if !known.contains(&key.as_str()) {
            place.problem(format!("no such key: {key}; there are {}", known.join(", ")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clients(text: &str) -> Result<CaClients, ConfigErrors> {
        read(&crate::load::read_text("clients.yaml", text)?, Path::new("/etc/ca"))
    }

    fn id(text: &str) -> SpiffeId {
        text.parse().unwrap()
    }

    #[test]
    fn a_file_says_who_may_be_what() {
        let text = "clients:\n- token: s3cret\n  identities: [spiffe://td/ns/a/sa/b, \"spiffe://td/ns/shop/*\"]\n\
                    - token_file: tokens/web\n  identities: spiffe://td/x\n";
        let found = clients(text).unwrap().clients;
        assert_eq!(found[0].token, CaToken::Literal("s3cret".to_owned()));
        assert_eq!(found[0].identities[1].to_string(), "spiffe://td/ns/shop/*");
        assert_eq!(found[1].token, CaToken::File("/etc/ca/tokens/web".into()));
        assert!(!format!("{found:?}").contains("s3cret"), "{found:?}");
    }

    #[test]
    fn an_empty_file_lets_nobody_in() {
        for text in ["", "clients: []\n", "clients:\n"] {
            assert_eq!(clients(text).unwrap(), CaClients::default(), "{text:?}");
        }
    }

    #[test]
    fn a_star_stands_for_one_or_more_last_segments_and_nothing_else() {
        let shop: IdentityPattern = "spiffe://td/ns/shop/*".parse().unwrap();
        for inside in ["spiffe://td/ns/shop/sa/web", "spiffe://td/ns/shop/x"] {
            assert!(shop.matches(&id(inside)), "{inside}");
        }
        for outside in [
            "spiffe://td/ns/shop",
            "spiffe://td/ns/shopping/sa/web",
            "spiffe://other/ns/shop/sa/web",
            "spiffe://td.evil/ns/shop/sa/web",
        ] {
            assert!(!shop.matches(&id(outside)), "{outside}");
        }
        let all: IdentityPattern = "spiffe://td/*".parse().unwrap();
        assert!(all.matches(&id("spiffe://td/ns/a/sa/b")));
        assert!(!all.matches(&id("spiffe://td")) && !all.matches(&id("spiffe://tdx/a")));
        for bad in [
            "*",
            "spiffe://*",
            "spiffe://td",
            "spiffe://td/*/sa/x",
            "spiffe://td/ns/sh*",
            "spiffe://td/**",
        ] {
            assert!(bad.parse::<IdentityPattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn every_mistake_is_told_and_no_token_with_it() {
        let text = "clients:\n- {tokn: s3cret, identities: [spiffe://td/a]}\n\
                    - {token: s3cret with space, identities: [spiffe://td/a]}\n\
                    - {token: s3cret, token_file: x, identities: [spiffe://td/a]}\n\
                    - {token: s3cret}\n- {token: s3cret, identities: [http://a]}\n\
                    - {token: [s3cret], identities: []}\nclient: s3cret\n";
        let message = clients(text).unwrap_err().to_string();
        assert!(!message.contains("s3cret"), "{message}");
        for part in [
            "clients[0]: no such key: tokn; there are token, token_file, identities",
            "clients[0]: needs either token or token_file",
            "clients[1]: token must be visible ASCII",
            "clients[2]: needs either",
            "clients[3]: needs identities",
            "clients[4].identities[0]: \"http://a\": must be a SPIFFE identity",
            "clients[5].token: must be a single value",
            "no such key: client;",
        ] {
            assert!(message.contains(part), "{part} is not in {message}");
        }
    }
}

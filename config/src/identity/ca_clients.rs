//! The clients file of `underpass ca serve`: tokens, and the identities that each client may
//! request.
//!
//! ```yaml
//! clients:
//! - token_file: tokens/web             # or token: TEXT
//!   identities: [spiffe://cluster.local/ns/default/sa/web, "spiffe://cluster.local/ns/shop/*"]
//! ```
//!
//! This file is separate from the settings because it contains tokens. Error messages never contain
//! one.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{ConfigErrors, Reason};
use crate::identity::spiffe::{SpiffeError, SpiffeId};
use crate::yaml::document::Node;
use crate::yaml::read::{Cursor, Problems};

const CLIENT_KEYS: &[&str] = &["token", "token_file", "identities"];
/// The suffix of a pattern for all identities below a path.
const WILDCARD_SUFFIX: &str = "/*";

/// The content of a clients file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CaClients {
    /// The clients in file order. Other clients are refused.
    pub clients: Vec<CaClient>,
}

/// A client of the CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaClient {
    /// The token that authenticates the client.
    pub token: CaToken,
    /// The identities that the client may request.
    pub identities: Vec<IdentityPattern>,
}

/// The bearer token of a client.
#[derive(Clone, PartialEq, Eq)]
pub enum CaToken {
    /// A token in the clients file.
    Literal(String),
    /// The path of a file with the token.
    File(PathBuf),
}

/// An identity, or all identities below a path: `spiffe://TD/ns/shop/*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityPattern {
    base: SpiffeId,
    is_wildcard: bool,
}

impl CaClients {
    /// Reads a clients file. Relative paths refer to its folder.
    ///
    /// # Errors
    /// All mistakes in the file, or the reason why it cannot be read.
    pub fn from_file(path: &Path) -> Result<Self, ConfigErrors> {
        let folder = path.parent().unwrap_or_else(|| Path::new(""));
        read(&crate::settings::load::read_file(path)?, folder)
    }
}

impl IdentityPattern {
    /// Whether `id` is this identity, or is below this path.
    pub fn matches(&self, id: &SpiffeId) -> bool {
        if !self.is_wildcard {
            return self.base == *id;
        }
        let (base, id) = (self.base.to_string(), id.to_string());
        id.strip_prefix(&base).is_some_and(|rest| rest.starts_with('/'))
    }
}

impl FromStr for IdentityPattern {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let (base, is_wildcard) = match text.strip_suffix(WILDCARD_SUFFIX) {
            Some(base) => (base, true),
            None => (text, false),
        };
        let base: SpiffeId = base.parse()?;
        if !is_wildcard && !base.is_workload() {
            return Err(SpiffeError::NoPath);
        }
        Ok(Self { base, is_wildcard })
    }
}

impl fmt::Display for IdentityPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.base, if self.is_wildcard { WILDCARD_SUFFIX } else { "" })
    }
}

impl fmt::Debug for CaToken {
    /// Omits the token.
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
    // `list` removes duplicate texts, so patterns are parsed afterwards.
    let identities: Vec<IdentityPattern> =
        identities.iter().filter_map(|text| text.parse().ok()).collect();
    if !list.is_given() || list.is_empty_list() {
        item.problem("needs identities: the SPIFFE identities that this client may request");
    }
    Some(CaClient { token: token?, identities })
}

/// Reads a token. Mistakes are reported for the client instead of the key, because the message for
/// the key would contain the token.
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

/// Whether the token can be sent in an `authorization` header (RFC 6750 section 2.1 is stricter).
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|c| c.is_ascii_graphic())
}

/// Like [`Cursor::only`], but never prints the value, which may be a token under a misspelt key.
fn only(place: Cursor<'_>, known: &[&str]) {
    for (key, _) in place.entries() {
        if !known.contains(&key.as_str()) {
            let hint = format!("the keys are {}", known.join(", "));
            place.problem(Reason::with_hint(format!("no such key: {key}"), hint));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clients(text: &str) -> Result<CaClients, ConfigErrors> {
        read(&crate::settings::load::read_text("clients.yaml", text)?, Path::new("/etc/ca"))
    }

    fn id(text: &str) -> SpiffeId {
        text.parse().unwrap()
    }

    #[test]
    fn reads_tokens_and_identities() {
        let text = "clients:\n- token: s3cret\n  identities: [spiffe://td/ns/a/sa/b, \"spiffe://td/ns/shop/*\"]\n\
                    - token_file: tokens/web\n  identities: spiffe://td/x\n";
        let found = clients(text).unwrap().clients;
        assert_eq!(found[0].token, CaToken::Literal("s3cret".to_owned()));
        assert_eq!(found[0].identities[1].to_string(), "spiffe://td/ns/shop/*");
        assert_eq!(found[1].token, CaToken::File("/etc/ca/tokens/web".into()));
        assert!(!format!("{found:?}").contains("s3cret"), "{found:?}");
    }

    #[test]
    fn empty_file_has_no_clients() {
        for text in ["", "clients: []\n", "clients:\n"] {
            assert_eq!(clients(text).unwrap(), CaClients::default(), "{text:?}");
        }
    }

    #[test]
    fn pattern_with_star_matches_one_or_more_last_segments() {
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
    fn reports_every_mistake_without_tokens() {
        let text = "clients:\n- {tokn: s3cret, identities: [spiffe://td/a]}\n\
                    - {token: s3cret with space, identities: [spiffe://td/a]}\n\
                    - {token: s3cret, token_file: x, identities: [spiffe://td/a]}\n\
                    - {token: s3cret}\n- {token: s3cret, identities: [http://a]}\n\
                    - {token: [s3cret], identities: []}\nclient: s3cret\n";
        let message = clients(text).unwrap_err().to_string();
        assert!(!message.contains("s3cret"), "{message}");
        for part in [
            "clients[0]: no such key: tokn",
            "clients[0]: needs either token or token_file",
            "clients[1]: token must be visible ASCII",
            "clients[2]: needs either",
            "clients[3]: needs identities",
            "clients[4].identities[0]: \"http://a\": must be a SPIFFE identity",
            "clients[5].token: must be a single value",
            "no such key: client\n",
        ] {
            assert!(message.contains(part), "{part} is not in {message}");
        }
    }
}

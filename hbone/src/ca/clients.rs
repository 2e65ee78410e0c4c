//! Who may ask the CA for which identity: the clients file in force, followed as it and its token files change.
//!
//! Not here: the file's format (`underpass_config::CaClients`).

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use underpass_config::{CaClients, CaToken, IdentityPattern, SpiffeId};

use crate::files::{WatchedFiles, warn_if_exposed};
use crate::{CredentialProblem, HboneError};

/// Everyone who may ask, and for what.
#[derive(Debug, Default)]
pub(super) struct Clients(Vec<Client>);

#[derive(Debug)]
struct Client {
    /// SHA-256: two of a kind compare in the same time, whatever the tokens have in common.
    token: Vec<u8>,
    identities: Vec<IdentityPattern>,
}

/// Whoever has a token, which may be listed more than once.
#[derive(Debug)]
pub(super) struct Bearer<'a>(Vec<(usize, &'a Client)>);

impl Clients {
    /// Who has `token`. Looks at every client, so that time does not tell which one it is.
    pub(super) fn bearer(&self, token: &str) -> Option<Bearer<'_>> {
        let token = hash(token);
        let has_it = |client: &Client| verify_slices_are_equal(&client.token, &token).is_ok();
        let found: Vec<_> =
            self.0.iter().enumerate().filter(|(_, client)| has_it(client)).collect();
        (!found.is_empty()).then_some(Bearer(found))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Bearer<'_> {
    pub(super) fn may_be(&self, id: &SpiffeId) -> bool {
        self.0.iter().any(|(_, client)| client.identities.iter().any(|one| one.matches(id)))
    }
}

impl fmt::Display for Bearer<'_> {
    /// As in the clients file: `clients[0]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places: Vec<_> = self.0.iter().map(|(index, _)| format!("clients[{index}]")).collect();
        f.write_str(&places.join(" and "))
    }
}

/// A clients file and what it refers to.
#[derive(Debug)]
pub(super) struct ClientsFile {
    path: PathBuf,
    watched: WatchedFiles,
}

impl ClientsFile {
    /// # Errors
    /// [`HboneError::Clients`] with every mistake in the file, or [`HboneError::Credential`] with a token's file.
    pub(super) fn open(path: PathBuf) -> Result<(Self, Clients), HboneError> {
        let mut file = Self { path, watched: WatchedFiles::default() };
        let clients = file.read()?;
        Ok((file, clients))
    }

    /// Waits for a change. After an error the last clients stay, and this is called again. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Clients, HboneError> {
        self.watched.changed().await;
        self.read()
    }

    fn read(&mut self) -> Result<Clients, HboneError> {
        let mut watched = WatchedFiles::new([&self.path])?;
        let read = self.read_all(&mut watched);
        self.watched = watched;
        read
    }

    fn read_all(&self, watched: &mut WatchedFiles) -> Result<Clients, HboneError> {
        let document =
            CaClients::from_file(&self.path).map_err(|source| HboneError::Clients { source })?;
        warn_if_exposed(&self.path, "the tokens")?;
        let mut clients = Vec::new();
        for client in document.clients {
            let token = match client.token {
                CaToken::Literal(token) => hash(&token),
                CaToken::File(file) => {
                    watched.add(&file)?;
                    warn_if_exposed(&file, "the token")?;
                    hash(&read_token(&file)?)
                }
            };
            clients.push(Client { token, identities: client.identities });
        }
        Ok(Clients(clients))
    }
}

/// The one word in a token's file.
pub(crate) fn read_token(file: &Path) -> Result<String, HboneError> {
    let text = fs::read_to_string(file).map_err(|error| HboneError::file(file, error))?;
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|c| c.is_ascii_graphic()) {
        return Err(HboneError::credential(file, CredentialProblem::Token));
    }
    Ok(token.to_owned())
}

fn hash(token: &str) -> Vec<u8> {
    digest(&SHA256, token.as_bytes()).as_ref().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::tests::TempDir;
    use crate::testing::id;

    const WEB: &str = "spiffe://td/ns/default/sa/web";

    fn write(file: &Path, text: &str) {
        fs::write(file, text).unwrap();
    }

    #[test]
    fn a_token_may_be_what_any_of_its_clients_may_be() {
        let dir = TempDir::new("clients-grant");
        let path = dir.0.join("clients.yaml");
        write(
            &path,
            "clients:\n- {token: a, identities: [spiffe://td/x]}\n\
             - {token: b, identities: [\"spiffe://td/ns/*\"]}\n- {token: a, identities: [spiffe://td/y]}\n",
        );
        let (_, clients) = ClientsFile::open(path).unwrap();
        let may = |token, name: &str| clients.bearer(token).unwrap().may_be(&id(name));
        assert!(may("a", "spiffe://td/x") && may("a", "spiffe://td/y") && may("b", WEB));
        assert!(!may("a", WEB) && !may("b", "spiffe://td/x"));
        assert_eq!(clients.bearer("a").unwrap().to_string(), "clients[0] and clients[2]");
        for nobody in ["", "A", "aa", "c"] {
            assert!(clients.bearer(nobody).is_none(), "{nobody}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_is_used_and_a_bad_one_is_told_while_the_last_good_one_stays() {
        let dir = TempDir::new("clients-change");
        let (path, token) = (dir.0.join("clients.yaml"), dir.0.join("token"));
        write(&token, "first\n");
        write(&path, &format!("clients:\n- {{token_file: token, identities: [{WEB}]}}\n"));
        let (mut file, clients) = ClientsFile::open(path.clone()).unwrap();
        assert!(clients.bearer("first").unwrap().may_be(&id(WEB)));
        write(&token, "second\n");
        let clients = file.next().await.unwrap();
        assert!(clients.bearer("first").is_none());
        assert!(clients.bearer("second").unwrap().may_be(&id(WEB)));
        write(&path, "clients: [\n");
        assert!(matches!(file.next().await, Err(HboneError::Clients { .. })));
        write(&path, "clients:\n- {token: third, identities: [spiffe://td/x]}\n");
        let clients = file.next().await.unwrap();
        assert!(clients.bearer("third").unwrap().may_be(&id("spiffe://td/x")));
        write(&path, "clients:\n- {token_file: absent, identities: [spiffe://td/x]}\n");
        assert!(matches!(file.next().await, Err(HboneError::Credential { .. })));
    }

    #[test]
    fn a_token_file_has_one_word() {
        let dir = TempDir::new("token-file");
        let file = dir.0.join("token");
        write(&file, " eyJhbGci.x-y_z=\n\n");
        assert_eq!(read_token(&file).unwrap(), "eyJhbGci.x-y_z=");
        for bad in ["", "\n", "two words", "n\u{f6}n-ascii"] {
            write(&file, bad);
            let error = read_token(&file).unwrap_err();
            assert!(matches!(error, HboneError::Credential { what: CredentialProblem::Token, .. }));
        }
    }
}

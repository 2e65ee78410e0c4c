//! The clients that may request certificates, and the identities that each may have.
//!
//! Watches the clients file and the token files that it names. `underpass_config::CaClients`
//! defines the format.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use underpass_config::{CaClients, CaToken, FileWatcher, IdentityPattern, SpiffeId};

use crate::error::{CredentialProblem, HboneError};
use crate::identity::files::{WatchedFiles, warn_if_exposed};

/// The clients in the clients file, with their tokens and identities.
#[derive(Debug, Default)]
pub(super) struct Clients(Vec<Client>);

#[derive(Debug)]
struct Client {
    /// SHA-256 of the token. Comparing hashes leaks no prefix of the token by its timing.
    token: Vec<u8>,
    identities: Vec<IdentityPattern>,
}

/// The clients with the token of a request. Several clients may have the same token.
#[derive(Debug)]
pub(super) struct ClientsWithToken<'a>(Vec<(usize, &'a Client)>);

impl Clients {
    /// Finds the clients with `token`. Compares every client, so that timing reveals nothing.
    pub(super) fn clients_with_token(&self, token: &str) -> Option<ClientsWithToken<'_>> {
        let token = hash(token);
        let has_token = |client: &Client| verify_slices_are_equal(&client.token, &token).is_ok();
        let found: Vec<_> =
            self.0.iter().enumerate().filter(|(_, client)| has_token(client)).collect();
        (!found.is_empty()).then_some(ClientsWithToken(found))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl ClientsWithToken<'_> {
    pub(super) fn is_allowed(&self, id: &SpiffeId) -> bool {
        self.0.iter().any(|(_, client)| client.identities.iter().any(|one| one.matches(id)))
    }
}

impl fmt::Display for ClientsWithToken<'_> {
    /// Prints positions in the clients file, such as `clients[0]`, and no token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let positions: Vec<_> =
            self.0.iter().map(|(index, _)| format!("clients[{index}]")).collect();
        f.write_str(&positions.join(" and "))
    }
}

/// Watches the clients file and the token files that it names.
#[derive(Debug)]
pub(super) struct ClientsFile {
    path: PathBuf,
    watched: WatchedFiles,
}

impl ClientsFile {
    /// # Errors
    /// [`HboneError::Clients`] with all mistakes in the clients file, or [`HboneError::Credential`]
    /// for an unreadable token file.
    pub(super) fn open(
        path: PathBuf,
        watcher: &FileWatcher,
    ) -> Result<(Self, Clients), HboneError> {
        let mut file = Self { path, watched: WatchedFiles::none(watcher) };
        let clients = file.read()?;
        Ok((file, clients))
    }

    /// Waits until a file changes, and reads all of them. The caller keeps the previous clients
    /// after an error, and may call again. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Clients, HboneError> {
        self.watched.changed().await;
        self.read()
    }

    fn read(&mut self) -> Result<Clients, HboneError> {
        self.watched.replace([&self.path])?;
        let document =
            CaClients::from_file(&self.path).map_err(|source| HboneError::Clients { source })?;
        warn_if_exposed(&self.path, "the tokens")?;
        let mut clients = Vec::new();
        for client in document.clients {
            let token = match client.token {
                CaToken::Literal(token) => hash(&token),
                CaToken::File(file) => {
                    self.watched.add(&file)?;
                    warn_if_exposed(&file, "the token")?;
                    hash(&read_token(&file)?)
                }
            };
            clients.push(Client { token, identities: client.identities });
        }
        Ok(Clients(clients))
    }
}

/// Reads a token file, which contains one word.
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
    fn token_grants_identities_of_all_its_clients() {
        let dir = TempDir::new("clients-grant");
        let path = dir.0.join("clients.yaml");
        write(
            &path,
            "clients:\n- {token: a, identities: [spiffe://td/x]}\n\
             - {token: b, identities: [\"spiffe://td/ns/*\"]}\n- {token: a, identities: [spiffe://td/y]}\n",
        );
        let (_, clients) = ClientsFile::open(path, &FileWatcher::default()).unwrap();
        let may =
            |token, name: &str| clients.clients_with_token(token).unwrap().is_allowed(&id(name));
        assert!(may("a", "spiffe://td/x") && may("a", "spiffe://td/y") && may("b", WEB));
        assert!(!may("a", WEB) && !may("b", "spiffe://td/x"));
        assert_eq!(
            clients.clients_with_token("a").unwrap().to_string(),
            "clients[0] and clients[2]"
        );
        for unknown in ["", "A", "aa", "c"] {
            assert!(clients.clients_with_token(unknown).is_none(), "{unknown}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn applies_changed_clients_file_and_reports_invalid_one() {
        let dir = TempDir::new("clients-change");
        let (path, token) = (dir.0.join("clients.yaml"), dir.0.join("token"));
        write(&token, "first\n");
        write(&path, &format!("clients:\n- {{token_file: token, identities: [{WEB}]}}\n"));
        let (mut file, clients) = ClientsFile::open(path.clone(), &FileWatcher::default()).unwrap();
        assert!(clients.clients_with_token("first").unwrap().is_allowed(&id(WEB)));
        write(&token, "second\n");
        let clients = file.next().await.unwrap();
        assert!(clients.clients_with_token("first").is_none());
        assert!(clients.clients_with_token("second").unwrap().is_allowed(&id(WEB)));
        write(&path, "clients: [\n");
        assert!(matches!(file.next().await, Err(HboneError::Clients { .. })));
        write(&path, "clients:\n- {token: third, identities: [spiffe://td/x]}\n");
        let clients = file.next().await.unwrap();
        assert!(clients.clients_with_token("third").unwrap().is_allowed(&id("spiffe://td/x")));
        write(&path, "clients:\n- {token_file: absent, identities: [spiffe://td/x]}\n");
        assert!(matches!(file.next().await, Err(HboneError::Credential { .. })));
    }

    #[test]
    fn token_file_contains_one_word() {
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

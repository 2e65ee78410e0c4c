//! The side of the new process.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use tokio::time::timeout;
use underpass_config::Settings;
use underpass_interception::{BoundListener, Handover};

use super::place::{self, Place};
use super::{
    ACCEPT, ANSWER, INSTANCE, LISTENERS, OK, PLACE, READY, REFUSED, RULES, Role, TakeOverError,
};

/// A conversation with the process that runs. Dropping it before that has let go leaves everything as it was.
#[derive(Debug)]
pub(crate) struct Claim {
    conversation: Handover,
    socket: PathBuf,
}

/// What the process that runs has handed over.
#[derive(Debug, Default)]
pub(crate) struct Handed {
    /// Listeners, by their names.
    pub(crate) listeners: Vec<(String, BoundListener)>,
    /// Where it is asked, and we shall be.
    pub(crate) place: Option<Place>,
    /// What makes it the only proxy of its network namespace.
    pub(crate) instance: Option<OwnedFd>,
}

impl Claim {
    /// Asks the process that runs for its listeners; `None` if there is no such process.
    pub(crate) async fn make(settings: &Settings) -> Result<Option<(Self, Handed)>, TakeOverError> {
        let Some(socket) = place::path(&settings.take_over).map_err(TakeOverError::Namespace)?
        else {
            return Ok(None);
        };
        let talk = |source| TakeOverError::Talk { socket: socket.clone(), source };
        let Some(stream) = place::connect(&socket).await.map_err(talk)? else {
            return Ok(None);
        };
        let conversation = Handover::new(stream);
        let peer = conversation.peer().map_err(talk)?;
        if !peer.is_trusted() {
            return Err(TakeOverError::Stranger { socket, uid: peer.uid });
        }
        let role = Role::of(settings).map_err(TakeOverError::Namespace)?;
        let claim = Self::over(conversation, socket.clone());
        let (names, sockets) = claim.ask("hello", &role.to_string()).await?;
        let mut handed = Handed::default();
        for (name, socket) in names.split(' ').zip(sockets) {
            handed.add(name, socket, &claim.socket).map_err(talk)?;
        }
        Ok(Some((claim, handed)))
    }

    pub(super) fn over(conversation: Handover, socket: PathBuf) -> Self {
        Self { conversation, socket }
    }

    /// From here on, the rules are ours to change.
    pub(crate) async fn rules(&self) -> Result<(), TakeOverError> {
        self.ask(RULES, RULES).await.map(|_| ())
    }

    /// From here on, connections are ours to accept.
    pub(crate) async fn accept(&self) -> Result<(), TakeOverError> {
        self.ask(ACCEPT, ACCEPT).await.map(|_| ())
    }

    /// From here on, the other process only serves what it has. If it is gone instead, there is nobody to let go.
    pub(crate) async fn ready(&self) -> Result<(), TakeOverError> {
        match self.ask(READY, READY).await {
            Err(TakeOverError::Left { .. }) if self.is_gone().await => Ok(()),
            outcome => outcome.map(|_| ()),
        }
    }

    async fn is_gone(&self) -> bool {
        matches!(place::connect(&self.socket).await, Ok(None))
    }

    /// Says `line`, which is called `asked`, and hears what comes with the consent.
    async fn ask(
        &self,
        asked: &'static str,
        line: &str,
    ) -> Result<(String, Vec<OwnedFd>), TakeOverError> {
        let talk = |source: io::Error| TakeOverError::Talk { socket: self.socket.clone(), source };
        let answer = async {
            self.conversation.send(line, &[]).await?;
            self.conversation.receive().await
        };
        let answer = timeout(ANSWER, answer).await;
        let heard = match answer.map_err(|_| TakeOverError::NoAnswer { asked })? {
            Err(error) if is_end(&error) => None,
            heard => heard.map_err(talk)?,
        };
        let (said, sockets) = heard.ok_or(TakeOverError::Left { asked })?;
        match said.split_once(' ') {
            None if said == OK => Ok((String::new(), sockets)),
            Some((LISTENERS, names)) => Ok((names.to_owned(), sockets)),
            Some((REFUSED, why)) => Err(TakeOverError::Refused(why.to_owned())),
            _ => Err(TakeOverError::Misunderstood { asked, said }),
        }
    }
}

/// A process that ends may do so before it has heard us.
fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}

impl Handed {
    /// Whether there is a process that runs.
    pub(crate) fn is_something(&self) -> bool {
        !self.listeners.is_empty()
    }

    fn add(&mut self, name: &str, socket: OwnedFd, path: &Path) -> io::Result<()> {
        if name == PLACE {
            self.place = Some(Place::share(path, socket)?);
        } else if name == INSTANCE {
            self.instance = Some(socket);
        } else {
            self.listeners.push((name.to_owned(), BoundListener::try_from(socket)?));
        }
        Ok(())
    }
}

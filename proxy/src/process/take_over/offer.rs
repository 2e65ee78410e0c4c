//! The side of the process that runs.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd as _;
use std::time::Duration;

use tokio::time::timeout;
use underpass_config::{Settings, TakeOver};
use underpass_interception::{Handover, Peer, ProxyUser};

use super::place::{self, Place};
use super::{
    ACCEPT, ANSWER, INSTANCE, LISTENERS, OK, PLACE, PREPARE, READY, REFUSED, RULES, Role, TURN,
    TakeOverError,
};
use crate::process::instance::Instance;
use crate::process::pause_gate::PauseGate;
use crate::traffic::listeners::Listeners;

/// How long to wait when the socket cannot be listened at, as without descriptors.
const REST: Duration = Duration::from_secs(1);

/// What only one of two processes does at a time.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gates {
    /// To accept, for connections, readiness and metrics.
    pub(crate) accept: PauseGate,
    /// To look after the rules.
    pub(crate) rules: PauseGate,
}

impl Gates {
    fn open(&self) {
        self.accept.open();
        self.rules.open();
    }
}

/// The offer to be taken over.
#[derive(Debug)]
pub(crate) struct Offer {
    /// `None` if nobody can ask.
    place: Option<Place>,
    listeners: Listeners,
    instance: Option<Instance>,
    role: Role,
    gates: Gates,
}

/// What became of a process that asked.
#[derive(Debug)]
pub(crate) enum Offered {
    /// It has taken over.
    Taken { pid: Option<i32> },
    /// It had begun to, and did not: the rules may be other than they were.
    TakenBack,
}

/// Why a process that asked has not taken over.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("it is user {0}, neither root nor ours")]
    Stranger(u32),
    #[error("it is not like us")]
    Refused,
    #[error("it did not go on within {} s after \"{after}\"", deadline.as_secs())]
    Late { after: &'static str, deadline: Duration },
    #[error("it left instead of saying \"{wanted}\"")]
    Left { wanted: &'static str },
    #[error("it said \"{said}\" instead of \"{wanted}\"")]
    Misunderstood { said: String, wanted: &'static str },
    #[error("the conversation failed")]
    Talk(#[from] io::Error),
}

impl Offer {
    /// Listens for who wants to take over, where it was handed over or else where the settings say. Where none says so, and it
    /// cannot, that is told and no more.
    pub(crate) fn make(
        settings: &Settings,
        listeners: Listeners,
        gates: Gates,
        handed: Option<Place>,
    ) -> Result<Self, TakeOverError> {
        let role = Role::of(settings).map_err(TakeOverError::Namespace)?;
        let place = match handed {
            Some(place) => Some(place),
            None => make_place(settings)?,
        };
        Ok(Self { place, listeners, instance: None, role, gates })
    }

    /// Hands over what makes this the only proxy of its network namespace, too.
    pub(crate) fn with_instance(self, instance: Option<Instance>) -> Self {
        Self { instance, ..self }
    }

    /// From now on it is ours to be asked.
    pub(crate) fn own(&mut self) {
        if let Some(place) = &mut self.place {
            place.own(true);
        }
    }

    /// Waits for a process that connects. Cancel-safe.
    pub(crate) async fn asked(&self) -> Handover {
        let Some(place) = &self.place else {
            return std::future::pending().await;
        };
        loop {
            match place.listener.accept().await {
                Ok((stream, _)) => return Handover::new(stream),
                Err(error) => {
                    tracing::warn!(%error, "cannot take part in a take-over just now");
                    tokio::time::sleep(REST).await;
                }
            }
        }
    }

    /// Lets that process take over, if it may and can. Has deadlines of its own; cancelled, it leaves gates closed.
    pub(crate) async fn answer(&mut self, conversation: Handover) -> Offered {
        let peer = conversation.peer();
        let outcome = match &peer {
            Ok(peer) => self.converse(&conversation, *peer).await,
            Err(error) => Err(Failed::Talk(io::Error::from(error.kind()))),
        };
        let pid = peer.ok().and_then(|peer| peer.pid);
        match outcome {
            Ok(()) => {
                if let Some(place) = &mut self.place {
                    place.own(false);
                }
                Offered::Taken { pid }
            }
            Err(error) => {
                self.gates.open();
                let error = crate::error::chain(&error);
                tracing::warn!(
                    pid,
                    error,
                    "another process did not take over: this one goes on as before"
                );
                Offered::TakenBack
            }
        }
    }

    async fn converse(&self, conversation: &Handover, peer: Peer) -> Result<(), Failed> {
        let said = hear(conversation, "hello", "connecting", ANSWER).await?;
        if !peer.is_trusted() {
            conversation
                .send(&format!("{REFUSED} it gives way to its own user and root"), &[])
                .await?;
            return Err(Failed::Stranger(peer.uid));
        }
        if let Some(why) = self.role.refusal(&said) {
            conversation.send(&format!("{REFUSED} {why}"), &[]).await?;
            return Err(Failed::Refused);
        }
        tracing::info!(pid = peer.pid, "another process is about to take over");
        let place = self.place.as_ref().map(|place| (PLACE, place.listener.as_fd()));
        let listeners = self.listeners.named();
        let instance =
            self.instance.as_ref().map(|instance| (INSTANCE, instance.listener().as_fd()));
        let sockets = listeners.map(|(name, listener)| (name, listener.as_fd()));
        let sockets = sockets.chain(place).chain(instance);
        let (names, sockets): (Vec<_>, Vec<_>) = sockets.unzip();
        conversation.send(&format!("{LISTENERS} {}", names.join(" ")), &sockets).await?;
        expect(conversation, RULES, "hello", PREPARE).await?;
        self.gates.rules.close().await;
        conversation.send(OK, &[]).await?;
        expect(conversation, ACCEPT, RULES, PREPARE).await?;
        self.gates.accept.close().await;
        conversation.send(OK, &[]).await?;
        expect(conversation, READY, ACCEPT, TURN).await?;
        // Whether it hears that or not, it accepts.
        conversation.send(OK, &[]).await.ok();
        Ok(())
    }
}

fn make_place(settings: &Settings) -> Result<Option<Place>, TakeOverError> {
    let Some(socket) = place::path(&settings.take_over).map_err(TakeOverError::Namespace)? else {
        return Ok(None);
    };
    let user = ProxyUser::required(&settings.interception).ok().flatten();
    match Place::make(&socket, user) {
        Ok(place) => Ok(Some(place)),
        Err(error) if settings.take_over == TakeOver::Auto => {
            tracing::info!(
                %error, socket = %socket.display(),
                "no other process can take over from this one (take_over.socket)"
            );
            Ok(None)
        }
        Err(source) => Err(TakeOverError::Offer { socket, source }),
    }
}

async fn expect(
    conversation: &Handover,
    wanted: &'static str,
    after: &'static str,
    deadline: Duration,
) -> Result<(), Failed> {
    match hear(conversation, wanted, after, deadline).await? {
        said if said == wanted => Ok(()),
        said => Err(Failed::Misunderstood { said, wanted }),
    }
}

async fn hear(
    conversation: &Handover,
    wanted: &'static str,
    after: &'static str,
    deadline: Duration,
) -> Result<String, Failed> {
    match timeout(deadline, conversation.receive()).await {
        Err(_) => Err(Failed::Late { after, deadline }),
        Ok(Ok(Some((line, _)))) => Ok(line),
        Ok(Ok(None)) => Err(Failed::Left { wanted }),
        Ok(Err(error)) if error.kind() == ErrorKind::UnexpectedEof => Err(Failed::Left { wanted }),
        Ok(Err(error)) => Err(Failed::Talk(error)),
    }
}

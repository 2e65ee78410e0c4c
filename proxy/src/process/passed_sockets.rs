//! The sockets that a new process gets from the running process (hot restart), or from the
//! supervisor (after a crash).

use underpass_config::Settings;
use underpass_interception::BoundListener;

use crate::process::command_error::CommandError;
use crate::process::descriptor_store::DescriptorStore;
use crate::process::take_over::{ReceivedSockets, TakeoverClient};

/// The sockets that were passed to a new process.
pub(crate) struct PassedSockets {
    /// The connection to the process that is being taken over.
    pub(crate) client: Option<TakeoverClient>,
    pub(crate) sockets: ReceivedSockets,
    pub(crate) store: DescriptorStore,
}

impl PassedSockets {
    /// Connects to the running process with `take_over`, and receives its sockets. Adds those that
    /// the supervisor has passed.
    ///
    /// # Errors
    ///
    /// The running process refuses, or the network namespace cannot be read from /proc.
    pub(crate) async fn receive(
        settings: &Settings,
        take_over: bool,
        inherited: Vec<(String, BoundListener)>,
    ) -> Result<Self, CommandError> {
        let (client, sockets) = TakeoverClient::connect_if(take_over, settings).await?.unzip();
        let stored = DescriptorStore::open(settings, inherited);
        let (store, inherited) = stored.map_err(CommandError::Start)?;
        let mut sockets = sockets.unwrap_or_default();
        sockets.listeners.extend(inherited);
        Ok(Self { client, sockets, store })
    }
}

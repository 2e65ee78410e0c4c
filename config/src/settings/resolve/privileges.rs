//! The settings `privileges`.

use crate::settings::declare::{Document, Fallback, Kind, Written, settings, word};
use crate::settings::{Broker, NodeSettings, PrivilegesSettings};

settings! {
    /// `auto`: one process enters namespaces, changes rules and has the keys of CAs; another one
    /// without privileges serves the connections. There is one process with `off`, and without
    /// SETUID and SETGID. The same holds if that user cannot read a file of `underpass run`, or
    /// if `node.pods.cni` takes its facts from the mesh of `mesh.xds` (without Kubernetes)
    BROKER: Broker = "privileges.broker", word("`auto`, `off`"),
        Fallback::Varies("`auto` with `node.pods`, else `off`"), |s| Some(s.privileges.broker);
    /// user and group of the process without privileges. It reads the mesh file, trust bundles,
    /// revocation lists, the files of `mesh.xds` and `tracing.otlp`, and the roots and token of
    /// `identity.istio_ca`; no other process should have this user. In `sidecar` and `osm` that
    /// process has the user of the rules instead (`interception.proxy_uids`)
    USER: u32 = "privileges.user", USER_ID,
        Fallback::Is(|| 15008), |s| Some(s.privileges.user);
}

/// The next id is -1, which means no change (setresuid(2)).
const LARGEST: usize = u32::MAX as usize - 1;

const USER_ID: Kind<u32> = Kind {
    name: "number",
    is_list: false,
    read: |cursor, _| {
        let id = cursor.number(1..=LARGEST, "the id of a user other than root")?;
        u32::try_from(id).ok()
    },
    write: |user| Written::scalar(user),
};

pub(super) fn privileges(
    document: Document<'_>,
    node: &NodeSettings,
) -> Option<PrivilegesSettings> {
    let default = if node.pods.is_some() { Broker::Auto } else { Broker::Off };
    let broker = BROKER.read(document).unwrap_or(default);
    Some(PrivilegesSettings { broker, user: USER.read(document)? })
}

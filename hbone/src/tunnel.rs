//! HBONE tunnels over any byte stream: client, server, streams, flow-control windows and limits.

pub(crate) mod activity;
pub(crate) mod authority;
pub(crate) mod back_pressure;
pub(crate) mod client;
pub(crate) mod headers;
pub(crate) mod inspect;
pub(crate) mod io;
pub(crate) mod keepalive;
pub(crate) mod overdue;
pub(crate) mod server;
pub(crate) mod settings;
pub(crate) mod stream;
pub(crate) mod text;
pub(crate) mod tunnel_state;

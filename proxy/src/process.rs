//! The life of the process: start, reload, take-over and stop.

pub(crate) mod app;
pub(crate) mod background;
pub(crate) mod command_error;
pub(crate) mod cpus;
pub(crate) mod daemon;
pub(crate) mod descriptor_store;
pub(crate) mod instance;
pub(crate) mod logging;
pub(crate) mod node_proxy;
pub(crate) mod notify;
pub(crate) mod parent;
pub(crate) mod passed_sockets;
pub(crate) mod pause_gate;
pub(crate) mod phases;
mod proxy_part;
pub(crate) mod reload;
pub(crate) mod stop_signal;
pub(crate) mod supervise;
pub(crate) mod take_over;
pub(crate) mod watchdog;

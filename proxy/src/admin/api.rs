//! The answers of administration, a file for each path.

pub(crate) mod certificates;
pub(crate) mod config_dump;
pub(crate) mod connection;
pub(crate) mod connections;
pub(crate) mod drain;
pub(crate) mod filter;
pub(crate) mod logging;
pub(crate) mod rules;
pub(crate) mod states;
pub(crate) mod status;
pub(crate) mod time;
pub(crate) mod version;

//! The data that a node daemon reads about one pod: uid, interception and resolver
//! settings, file.

pub(crate) mod dns;
pub(crate) mod file;
pub(crate) mod folder;
pub(crate) mod overlay;
pub(crate) mod uid;

//! The data that a node daemon reads about one pod: uid, interception settings, file.

pub(crate) mod file;
pub(crate) mod folder;
pub(crate) mod overlay;
pub(crate) mod uid;

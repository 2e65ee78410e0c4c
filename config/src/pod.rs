//! What a node daemon reads about one pod: its uid, its own interception settings, its file.

pub(crate) mod file;
pub(crate) mod folder;
pub(crate) mod overlay;
pub(crate) mod uid;
